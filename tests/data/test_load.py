"""Which data a run works on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from monai_unlearn.data import ImageData, load_data


def _write(path: Path) -> None:
    images, labels = np.zeros((4, 3, 3), np.uint8), np.array([[0], [1], [0], [1]], np.uint8)
    np.savez(
        path, **{f"{s}_{k}": v for s in ("train", "val", "test") for k, v in (("images", images), ("labels", labels))}
    )


def test_without_arguments_it_is_the_embedded_set(cells: ImageData) -> None:
    assert load_data().digest() == cells.digest()


def test_a_file_is_read(tmp_path: Path) -> None:
    _write(tmp_path / "mine.npz")
    assert load_data(dataset_file=str(tmp_path / "mine.npz")).name == "mine"


def test_a_download_is_fetched_into_its_folder_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_unlearn.data.medmnist.download_url", lambda url, path, **_: _write(path))
    data = load_data(download="pneumoniamnist", dataset_dir=str(tmp_path))
    assert data.class_names == ("normal", "pneumonia")
    assert (tmp_path / "pneumoniamnist.npz").is_file()


def test_a_file_and_a_download_together_are_refused() -> None:
    with pytest.raises(ValueError, match="dataset_file or download, not both"):
        load_data(dataset_file="a.npz", download="tissuemnist")
