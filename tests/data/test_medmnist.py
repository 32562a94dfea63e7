"""Reading and fetching MedMNIST's files."""

from __future__ import annotations

import time
import tracemalloc
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medmnist import INFO

from monai_unlearn.data import download_medmnist, make_split, read_medmnist

SHARED = Path(__file__).parents[3] / "shared" / "data"
TISSUE = {"train": 165_466, "val": 23_640, "test": 47_280}


def _arrays(n: int = 12, shape: tuple[int, ...] = (8, 7), classes: int = 3, **changes: Any) -> dict[str, Any]:
    random = np.random.RandomState(0)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = random.randint(0, 256, (n, *shape)).astype(np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n) % classes).astype(np.uint8)[:, None]
    return arrays | changes


def test_the_real_pneumonia_set_is_read() -> None:
    file = SHARED / "pneumoniamnist.npz"
    if not file.is_file():
        pytest.skip("the real PneumoniaMNIST is not beside this checkout (shared/data/pneumoniamnist.npz)")
    data = read_medmnist(file)
    assert (len(data.train), len(data.validation), len(data.test)) == (4690, 524, 624)
    assert data.class_names == ("normal", "pneumonia")
    assert data.name == "pneumoniamnist"
    assert data.channels == 1
    with np.load(file) as stored:
        for part, name in ((data.train, "train"), (data.validation, "val"), (data.test, "test")):
            assert part.patients is None
            np.testing.assert_array_equal(part.images, stored[f"{name}_images"])
            np.testing.assert_array_equal(part.labels[:, None], stored[f"{name}_labels"])


def test_a_file_of_the_size_of_tissuemnist_is_read_and_split_in_seconds(tmp_path: Path) -> None:
    file = tmp_path / "tissuemnist.npz"
    random = np.random.default_rng(0)
    arrays = {}
    for name, n in TISSUE.items():
        arrays[f"{name}_images"] = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{name}_labels"] = random.integers(0, 8, (n, 1), dtype=np.uint8)
    np.savez(file, **arrays)
    size = sum(array.nbytes for array in arrays.values())
    del arrays

    start = time.process_time()
    tracemalloc.start()
    try:
        data = read_medmnist(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        file.unlink()
    split = make_split(data, seed=0)
    assert time.process_time() - start < 20
    assert peak < 1.2 * size
    assert data.class_names == tuple(INFO["tissuemnist"]["label"][str(i)] for i in range(8))
    assert (len(data.train), len(data.validation), len(data.test)) == tuple(TISSUE.values())
    assert len(split.forget) == 16_547
    assert len(split.forget) + len(split.retain) == TISSUE["train"]


def test_colour_images_have_three_channels(tmp_path: Path) -> None:
    np.savez(tmp_path / "bloodmnist.npz", **_arrays(shape=(8, 7, 3), classes=8))
    data = read_medmnist(tmp_path / "bloodmnist.npz")
    assert data.channels == 3
    assert data.class_names[0] == "basophil"


@pytest.mark.parametrize("name", ["pneumoniamnist_64.npz", "PneumoniaMNIST.npz"])
def test_class_names_are_known_whatever_the_size_and_case(tmp_path: Path, name: str) -> None:
    np.savez(tmp_path / name, **_arrays(classes=2))
    assert read_medmnist(tmp_path / name).class_names == ("normal", "pneumonia")


def test_an_unknown_file_gets_numbered_classes_from_all_its_parts(tmp_path: Path) -> None:
    np.savez(tmp_path / "ours.npz", **_arrays(test_labels=np.full((12, 1), 4, np.int64)))
    assert read_medmnist(tmp_path / "ours.npz").class_names == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize("labels", [np.arange(12) % 3, (np.arange(12) % 3).astype(np.int16)[:, None]])
def test_labels_are_flat_whole_numbers_in_any_integer_type(tmp_path: Path, labels: np.ndarray) -> None:
    np.savez(tmp_path / "ours.npz", **_arrays(train_labels=labels))
    read = read_medmnist(tmp_path / "ours.npz").train.labels
    assert read.dtype == np.int64
    np.testing.assert_array_equal(read, labels.ravel())


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"'nowhere\.npz'.*--download"):
        read_medmnist("nowhere.npz")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="should be an existing"):
        read_medmnist(tmp_path)


def test_a_multi_label_set_is_refused_by_its_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "chestmnist.npz", **_arrays())
    with pytest.raises(ValueError, match="multi-label set, which is not supported"):
        read_medmnist(tmp_path / "chestmnist.npz")


@pytest.mark.parametrize("key", [f"{s}_{k}" for s in ("train", "val", "test") for k in ("images", "labels")])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    arrays = _arrays()
    del arrays[key]
    np.savez(tmp_path / "ours.npz", **arrays)
    with pytest.raises(ValueError, match=f"has no '{key}'"):
        read_medmnist(tmp_path / "ours.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": np.zeros((12, 8), np.uint8)}, r"ours\.npz, train: images should be N × H × W"),
        ({"train_images": np.zeros((12, 8, 7, 9), np.uint8)}, "3-D sets are not supported"),
        ({"train_images": np.zeros((11, 8, 7), np.uint8)}, r"N = 12 \(the number of labels\)"),
        ({"val_images": np.zeros((12, 7, 7), np.uint8)}, r"of the training images, but those of validation have"),
        ({"train_images": np.zeros((12, 8, 7), np.int32)}, "should be uint8 or floating point, but got int32"),
        ({"train_images": np.full((12, 8, 7), np.nan, np.float32)}, "should be finite, but 12 of 12"),
        ({"train_images": np.full((12, 8, 7), 3.0)}, r"should lie in \[0, 1\], but got \[3\.0, 3\.0\]"),
        ({"test_labels": np.zeros((12, 2), np.uint8)}, "Multi-label tasks are not supported"),
        ({"test_labels": np.zeros((12, 1))}, "should be N × 1 integers, but got float64"),
        ({"test_labels": np.full((12, 1), -1)}, r"labels of test should lie in \[0, 2\]"),
        ({"test_labels": np.full((12, 1), 10**9)}, "should number the classes from 0, but go up to 1000000000"),
        (
            {"val_images": np.zeros((0, 8, 7), np.uint8), "val_labels": np.zeros((0, 1), np.uint8)},
            r"ours\.npz, val: A split should hold at least one image",
        ),
        ({f"{s}_labels": np.zeros((12, 1), np.uint8) for s in ("train", "val", "test")}, "at least two classes"),
    ],
)
def test_arrays_of_another_task_are_refused(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "ours.npz", **_arrays(**changes))
    with pytest.raises(ValueError, match=message):
        read_medmnist(tmp_path / "ours.npz")


def test_labels_beyond_the_sets_own_classes_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "pneumoniamnist.npz", **_arrays(classes=3))
    with pytest.raises(ValueError, match=r"should lie in \[0, 1\] for 2 classes, but got \[0, 2\]"):
        read_medmnist(tmp_path / "pneumoniamnist.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_truncated_file_is_called_damaged_wherever_it_ends(tmp_path: Path, save: Callable[..., None]) -> None:
    file = tmp_path / "ours.npz"
    save(file, **_arrays())
    content = file.read_bytes()
    for end in {0, 1, 3, 4, len(content) - 1, *range(0, len(content), 53)}:
        file.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"ours\.npz could not be read .* damaged"):
            read_medmnist(file)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_changed_byte_is_noticed_or_without_consequence(tmp_path: Path, save: Callable[..., None]) -> None:
    file = tmp_path / "ours.npz"
    save(file, **_arrays())
    intact, digest = file.read_bytes(), read_medmnist(file).digest()
    refused = 0
    for position in range(0, len(intact), 5):
        content = bytearray(intact)
        content[position] ^= 0xFF
        file.write_bytes(content)
        try:
            assert read_medmnist(file).digest() == digest
        except ValueError:
            refused += 1
    assert refused > len(intact) / 10


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ours.npz"
    with file.open("wb") as stream:
        np.save(stream, np.zeros((12, 8, 7), np.uint8))
    with pytest.raises(ValueError, match=r"damaged or no \.npz file"):
        read_medmnist(file)
    file.write_text("train_images, 1, 2, 3")
    with pytest.raises(ValueError, match=r"damaged or no \.npz file"):
        read_medmnist(file)


class _Intruder:
    """Code in a file: unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_pickled_objects_are_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    images = np.empty(12, dtype=object)
    images[:] = [_Intruder(trace)] * 12
    np.savez(tmp_path / "ours.npz", **_arrays(train_images=images))
    with pytest.raises(ValueError, match=r"ours\.npz could not be read"):
        read_medmnist(tmp_path / "ours.npz")
    assert not trace.exists()
    np.load(tmp_path / "ours.npz", allow_pickle=True)["train_images"]
    assert trace.exists()  # it would have run


@pytest.mark.parametrize("name", ["nothing", "organmnist3d", "tissuemnist_65", "", "../tissuemnist"])
def test_an_unknown_set_lists_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"2-D set of MedMNIST.*bloodmnist, .*tissuemnist") as error:
        download_medmnist(name, tmp_path)
    assert "3d" not in str(error.value).split("There are:")[1]


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), RuntimeError("md5 check failed"), OSError("disk"), ValueError("x")]
)
def test_without_a_network_the_message_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("monai_unlearn.data.medmnist.download_url", fail)
    with pytest.raises(ConnectionError, match=r"tissuemnist\.npz could not be fetched.*--dataset_file"):
        download_medmnist("tissuemnist", tmp_path)


@pytest.mark.parametrize(("name", "suffix"), [("TissueMNIST", ""), ("tissuemnist_64", "_64")])
def test_address_and_checksum_are_those_of_the_medmnist_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str
) -> None:
    calls = []
    monkeypatch.setattr("monai_unlearn.data.medmnist.download_url", lambda *a, **k: calls.append((a, k)))
    target = download_medmnist(name, tmp_path)
    info = INFO["tissuemnist"]
    assert target == tmp_path / f"tissuemnist{suffix}.npz"
    assert calls == [((info[f"url{suffix}"], target), {"hash_val": info[f"MD5{suffix}"], "hash_type": "md5"})]
