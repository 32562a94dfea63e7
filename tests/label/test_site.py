"""The settings of a site: defaults by what the folder holds, and what is refused."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest

from monai_unlearn.label.site import METHODS, Accept, read_site


def _site(tmp_path: Path, content: object) -> dict[str, str]:
    (tmp_path / "site.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return {"site": str(tmp_path / "site.json")}


@pytest.mark.parametrize(
    ("file", "part"), [("a.dcm", "dicom"), ("a.nii.gz", "nifti"), ("a.nii", "nifti"), ("a.png", "images")]
)
def test_the_folder_says_how_it_is_read(tmp_path: Path, file: str, part: str) -> None:
    (tmp_path / file).touch()
    site = read_site(tmp_path, {})
    assert site.parts == (part,)
    assert site.methods == METHODS
    assert site.folder == tmp_path / ".unlearning"
    assert site.accept == Accept()
    assert [Path(file).stem for file in site.configs("auto")] == ["auto", part]


def test_paths_of_the_file_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text("{}")
    conf = _site(tmp_path, {"labels_file": "labels.csv", "checkpoint": "m.pt", "parts": ["dicom", "own.json"]})
    site = read_site(tmp_path / "studies", conf)
    assert site.labels_file == tmp_path / "labels.csv"
    assert site.checkpoint == tmp_path / "m.pt"
    assert site.configs("train")[2] == str(tmp_path / "own.json")


def test_what_is_accepted_and_when_it_is_final(tmp_path: Path) -> None:
    content = {
        "accept": {"test_loss": 0.01, "verdicts": ["equivalent"]},
        "finalise_after_days": 30,
        "multi_label": True,
    }
    site = read_site(tmp_path, _site(tmp_path, content))
    assert site.accept == Accept(0.01, 1.0, ("equivalent",))
    assert site.finalise_after == timedelta(days=30)
    assert [Path(file).stem for file in site.configs("auto")][-1] == "multi_label"


WRONG = {
    "misspelt": ({"modle": "x"}, "no setting 'modle' of a site. Did you mean 'model'"),
    "folder": ({"folder": "/tmp/x"}, "no setting 'folder' of a site"),
    "no object": ([1], "one JSON object"),
    "no json": ("{", "is no JSON"),
    "threshold": ({"accept": {"test_los": 1}}, "no threshold 'test_los'. Did you mean 'test_loss'"),
    "range": ({"accept": {"test_loss": 2}}, r"test_loss should be a number in \[0, 1\], but got 2"),
    "AUC": ({"accept": {"attack_auc": 0.4}}, r"attack_auc should be a number in \[0.5, 1\], but got 0.4"),
    "bool": ({"accept": {"test_loss": True}}, "test_loss should be a number"),
    "accept": ({"accept": 3}, "accept should be an object"),
    "parts": ({"parts": "dicom"}, "parts should be a list of names"),
    "part": ({"parts": ["dicmo"]}, "There is no bundle 'dicmo'. Did you mean 'dicom'"),
    "method": ({"methods": ["magic"]}, "There is no bundle 'magic'"),
    "no method": ({"methods": []}, "at least one method"),
    "model": ({"model": "unlearn"}, "model should be a name other than 'unlearn'"),
    "options": ({"options": []}, "options should be an object"),
    "days": ({"finalise_after_days": -1}, "finalise_after_days should be a number of at least 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(tmp_path: Path, case: str) -> None:
    content, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        read_site(tmp_path, _site(tmp_path, content))


def test_a_remote_datastore_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a folder of studies"):
        read_site("http://localhost/dicom-web", {})
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_site(tmp_path, {"site": str(tmp_path / "none.json")})
