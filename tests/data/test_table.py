"""Image files with a table: nibabel's own volumes, and tables of every kind."""

from __future__ import annotations

import gzip
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser

from monai_unlearn.data.image_data import ImageData, ImageFiles, make_loader
from monai_unlearn.data.image_files import file_dataset
from monai_unlearn.data.table import labelled_data, read_table

VOLUMES = Path(nibabel.__file__).parent / "tests" / "data"
SECRET = "SECRET7"
PARTS = ["train"] * 4 + ["validation"] * 2 + ["test"] * 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight files of anything; only NIfTI files are looked into."""
    for i in range(8):
        (tmp_path / f"{i}.png").touch()
    return tmp_path


Table = Callable[..., Path]


@pytest.fixture
def table(folder: Path) -> Table:
    """Write a table of the eight files; keywords add, change or, with None, remove columns."""

    def write(name: str = "labels.csv", **columns: Any) -> Path:
        values = {
            "file": [f"{i}.png" for i in range(8)],
            "patient": [f"P{i}" for i in range(8)],
            "label": ["sick", "well"] * 4,
            "split": PARTS,
        }
        frame = pd.DataFrame({key: value for key, value in (values | columns).items() if value is not None})
        frame.to_csv(folder / name, index=False, sep="\t" if name.endswith(".tsv") else ",")
        return folder / name

    return write


def _rows(data: ImageData) -> dict[str, int]:
    parts = [part for part in data.parts().values() if isinstance(part, ImageFiles)]
    return {file: label for part in parts for file, label in zip(part.files.tolist(), part.labels.tolist())}


def test_classes_splits_and_attributes(folder: Path, table: Table) -> None:
    data = read_table(
        folder,
        table(
            age=range(40, 48), site=["a"] * 4 + ["b"] * 4, split=["Training", *PARTS[1:4], "val", "VALID", *PARTS[6:]]
        ),
    )
    assert data.class_names == ("sick", "well")
    assert {name: part.files.tolist() for name, part in data.parts().items()} == {
        "train": ["0.png", "1.png", "2.png", "3.png"],
        "validation": ["4.png", "5.png"],
        "test": ["6.png", "7.png"],
    }
    assert data.validation.labels.tolist() == [0, 1]
    assert data.train.attributes.to_dict("list") == {
        "patient": ["P0", "P1", "P2", "P3"],
        "age": [40, 41, 42, 43],
        "site": ["a"] * 4,
    }
    assert (data.channels, data.notes) == (1, ())


def test_tabs_aliases_capitals_and_a_byte_order_mark(folder: Path, table: Table) -> None:
    file = table("labels.tsv", patient=None, Participant_ID=[f"P{i}" for i in range(8)], label=None, Label=[0, 1] * 4)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"0.png", b" sub\\..\\0.png "))
    assert list(read_table(folder, file).train.patients) == ["P0", "P1", "P2", "P3"]


def test_semicolons_of_a_spreadsheet(folder: Path, table: Table) -> None:
    file = table()
    plain = read_table(folder, file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b",", b";").replace(b"\n", b"\r\n"))
    other = read_table(folder, file)
    assert plain.digest() == other.digest()


def test_studies_and_series_of_the_table_are_kept(folder: Path, table: Table) -> None:
    attributes = read_table(folder, table(study=list("aabbccdd"))).train.attributes
    assert attributes["study"].tolist() == list("aabb")


@pytest.mark.parametrize(
    ("labels", "class_names", "expected"),
    [
        ([10, 9] * 4, None, ("9", "10")),
        (["b", "a"] * 4, None, ("a", "b")),
        (["b", "a"] * 4, ["b", "a"], ("b", "a")),
        ([0, 1] * 4, [0, 1, 2], None),
        (["None", "null"] * 4, None, ("None", "null")),
    ],
)
def test_the_order_of_classes(
    folder: Path, table: Table, labels: list, class_names: list | None, expected: tuple | None
) -> None:
    file = table(label=labels)
    if expected is None:
        with pytest.raises(ValueError, match=r"Each class or finding should have a label .* not so 2"):
            read_table(folder, file, class_names)
    else:
        data = read_table(folder, file, class_names)
        assert data.class_names == expected
        assert _rows(data) == {f"{i}.png": expected.index(str(labels[i])) for i in range(8)}


def test_findings_are_columns_of_zeros_ones_and_blanks(
    folder: Path, table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    columns = {"oedema": [0, 1] * 4, "fracture": [1, None, 0.0, 0, 1, 1, "n/a", 0], "sex": [0, 1] * 4, "age": range(8)}
    file = table(label=None, **columns)
    data = read_table(folder, file)
    assert data.multi_label
    assert data.class_names == ("oedema", "fracture")
    assert "findings: oedema and fracture" in caplog.text
    assert data.train.labels.dtype == np.float32
    np.testing.assert_array_equal(data.train.labels, [[0, 1], [1, np.nan], [0, 0], [1, 0]])
    assert list(data.train.attributes) == ["patient", "sex", "age"]
    assert read_table(folder, file, ["fracture"], on_broken="skip").class_names == ("fracture",)
    with pytest.raises(ValueError, match="2 images without a label"):
        read_table(folder, file, ["fracture"])
    with pytest.raises(ValueError, match="hold something else or nothing"):
        read_table(folder, table(label=None, oedema=[0, 1, 2, -1] * 2), ["oedema"])
    with pytest.raises(ValueError, match="but has no tumour"):
        read_table(folder, file, ["tumour"])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no file column": ({"file": None}, "should have a column 'file'.*relative to dataset_dir"),
    "no patient column": ({"patient": None}, "should have a column 'patient'.*whose image"),
    "no labels": ({"label": None}, "a column label with classes, or columns of 0, 1 and blank .* neither"),
    "one class": ({"label": [1] * 8}, "should have at least two classes, but has 1"),
    "no label": ({"label": [None, *[0, 1, 1] * 2, 0]}, "1 images without a label"),
    "a file twice": ({"file": [*[f"{i}.png" for i in range(7)], "./0.png"]}, "name each file once, but 1 of 8 rows"),
    "an absent file": ({"file": [*[f"{i}.png" for i in range(7)], f"{SECRET}.png"]}, "1 not there"),
    "an absolute path": ({"file": [*[f"{i}.png" for i in range(7)], "/etc/passwd"]}, "1 not there"),
    "a path out of the folder": ({"file": [*[f"{i}.png" for i in range(7)], "../7.png"]}, "1 not there"),
    "no name": ({"file": [*[f"{i}.png" for i in range(7)], None]}, "1 without a name"),
    "no patient": ({"patient": [*"abcdefg", " "]}, "1 without a patient"),
    "an odd split": ({"split": [*PARTS[:7], "holdout"]}, "train, validation or test, but 1 of 8"),
    "no split": ({"split": [*PARTS[:7], None]}, "train, validation or test, but 1 of 8"),
    "no validation": ({"split": ["train"] * 8}, "at least one image to validation"),
    "a class for tests alone": ({"label": [0, 1] * 3 + [2, 2]}, "among the training images, but not so 2"),
    "two columns of patients": ({"PatientID": range(8)}, "more of patient"),
    "an unknown class": ({"class_names": ["sick", "fine"]}, r"class_names \(sick and fine\), but 4 are not"),
    "a class twice": ({"class_names": ["sick", "sick"]}, "each class once"),
    "a text for classes": ({"class_names": "sick"}, "should be a list of names"),
    "no channels": ({"channels": 0}, "channels should be an integer of at least 1"),
    "an unknown choice": ({"on_broken": "drop"}, "on_broken should be raise or skip"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_refused_and_says_why(folder: Path, table: Table, case: str) -> None:
    columns, message = BAD[case]
    options = {key: value for key, value in columns.items() if key in ("class_names", "channels", "on_broken")}
    columns = {key: value for key, value in columns.items() if key not in options}
    (folder.parent / "7.png").touch()
    with pytest.raises(ValueError, match=message) as error:
        read_table(folder, table(**columns), **options)
    for name in (SECRET, "7.png", "P3"):
        assert name not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "could not be read"),
        (b"file,patient,label\n", "at least one row"),
        (b"file,label\n0.png,P0,1\n", "more fields than its header"),
        (b"file,patient,label\n0.png,P0,1,2,3\n1.png,P1\n2.png,P2,1,3,4,5,6,7\n", "could not be read|more fields"),
        (b"\xff\xfe\x00f\x00i", "it is not UTF-8"),
        (f"0.png,{SECRET},1\n1.png,{SECRET},0\n".encode(), "should have a column 'file'"),
    ],
)
def test_what_is_no_table_is_refused_without_its_content(folder: Path, content: bytes, message: str) -> None:
    (folder / "bad.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_table(folder, folder / "bad.csv")
    assert SECRET not in str(error.value)


def test_a_table_or_folder_that_is_not_there(folder: Path, table: Table) -> None:
    with pytest.raises(FileNotFoundError, match="labels_file should be a table"):
        read_table(folder, folder / "nothing.csv")
    with pytest.raises(FileNotFoundError, match="dataset_dir should be a folder"):
        read_table(folder / "nothing", table())
    with pytest.raises(ValueError, match=r"dataset_dir should say where .* got None. Use --dataset_dir DIR"):
        read_table(None, table())
    with pytest.raises(ValueError, match=r"labels_file should say where .* got None. Use --labels_file FILE"):
        read_table(folder, None)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="of 8 none can be used: 8 not there"):
        read_table(folder / "empty", table(), on_broken="skip")


def test_what_is_left_out_is_counted_and_noted(folder: Path, table: Table, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "2.png").unlink()
    data = read_table(folder, table(patient=["a", None, *"cdefgh"]), on_broken="skip")
    assert data.train.files.tolist() == ["0.png", "3.png"]
    assert data.notes == ("Left out: 1 not there, 1 without a patient.",)
    assert "Left out: 1 not there, 1 without a patient." in caplog.text


def test_a_patient_in_two_parts_is_said(folder: Path, table: Table, caplog: pytest.LogCaptureFixture) -> None:
    data = read_table(folder, table(patient=["a", "b", "c", "d", "a", "b", "g", "h"]))
    assert data.notes == ("2 patients have images in more than one of training, validation and test images.",)
    assert data.notes[0] in caplog.text


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(1, 6), min_size=40, max_size=80), data=st.data())
def test_drawn_parts_keep_patients_together_and_do_not_depend_on_order(counts: list[int], data: st.DataObject) -> None:
    patients = [f"P{i}" for i, n in enumerate(counts) for _ in range(n)]
    order = data.draw(st.permutations(range(len(patients))))

    def parts(rows: Sequence[int]) -> dict[str, set[str]]:
        index = pd.DataFrame({"file": [f"f{i}" for i in rows], "patient": [patients[i] for i in rows]})
        labels = index.assign(label=["0" if i % 2 else "1" for i in rows])
        made = labelled_data("x", Path(), index, labels, None, "raise")
        assert sum(map(len, made.parts().values())) == len(rows)
        return {name: set(part.patients) for name, part in made.parts().items()}

    first = parts(range(len(patients)))
    assert sum(map(len, first.values())) == len(counts)
    assert parts(order) == first
    sizes = {name: sum(patients.count(patient) for patient in names) for name, names in first.items()}
    for name, share in (("train", 0.7), ("validation", 0.15), ("test", 0.15)):
        assert abs(sizes[name] - share * len(patients)) <= 6


def test_too_few_patients_are_not_divided(folder: Path, table: Table) -> None:
    with pytest.raises(ValueError, match=r"8 patients are too few .* Add a column split"):
        read_table(folder, table(split=None))


def _nifti(file: Path, shape: tuple[int, ...]) -> None:
    nibabel.save(nibabel.Nifti1Image(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), np.eye(4)), file)


def _table(folder: Path, files: list[str], **columns: Any) -> Path:
    n = len(files)
    values = {"file": files, "patient": range(n), "label": [i % 2 for i in range(n)]}
    pd.DataFrame(values | {"split": [["train", "validation"][i // 2 % 2] for i in range(n)]} | columns).to_csv(
        folder / "t.csv", index=False
    )
    return folder / "t.csv"


def test_nibabels_own_volumes_are_read_or_refused_for_their_fourth_dimension(tmp_path: Path) -> None:
    files = ["anatomical.nii", "standard.nii.gz", "functional.nii", "example4d.nii.gz"]
    for file in files:
        shutil.copy(VOLUMES / file, tmp_path)
    with pytest.raises(ValueError, match=r"1 with 2 volumes \(.*--channels 2\), 1 with 20 volumes \(.*--channels 20\)"):
        read_table(tmp_path, _table(tmp_path, files))
    split = ["train", "validation", "train", "validation"]
    with pytest.raises(ValueError, match=r"at least one image|Each class"):  # one of each part is left
        read_table(tmp_path, _table(tmp_path, files, split=split, label=[0, 1, 0, 1]), on_broken="skip")
    for copy in ("other.nii.gz", "third.nii.gz"):
        shutil.copy(VOLUMES / "standard.nii.gz", tmp_path / copy)
    files = [*files[:2], "other.nii.gz", "third.nii.gz"]
    assert len(read_table(tmp_path, _table(tmp_path, files)).train) == 2


def test_volumes_over_time_can_be_channels(tmp_path: Path) -> None:
    for i in range(4):
        shutil.copy(VOLUMES / "functional.nii", tmp_path / f"{i}.nii")
    data = read_table(tmp_path, _table(tmp_path, [f"{i}.nii" for i in range(4)]), channels=20)
    assert data.channels == 20
    parser = ConfigParser(CONFIG)
    image = file_dataset(data.train, parser.get_parsed_content("preprocessing"))[0]["image"]
    assert image.shape == (20, 16, 16, 16)


def test_broken_volumes_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(8):
        _nifti(tmp_path / f"{i}.nii", (4, 5, 6))
    (tmp_path / "4.nii").write_bytes((tmp_path / "4.nii").read_bytes()[:400])
    (tmp_path / "5.nii").write_bytes(b"no volume")
    with gzip.open(tmp_path / "6.nii.gz", "wb") as file:
        file.write(b"no volume")
    _nifti(tmp_path / "7.nii", (2, 2, 2, 1, 3))
    files = [*[f"{i}.nii" for i in range(6)], "6.nii.gz", "7.nii"]
    reasons = "2 could not be read, 1 cut short, 1 of 5 dimensions"
    with pytest.raises(ValueError, match=f"All 8 files .* but got {reasons}") as error:
        read_table(tmp_path, _table(tmp_path, files))
    assert ".nii" not in str(error.value)
    data = read_table(tmp_path, _table(tmp_path, files), on_broken="skip")
    assert sorted(_rows(data)) == ["0.nii", "1.nii", "2.nii", "3.nii"]
    assert ".nii" not in caplog.text


CONFIG = {
    "image_size": [16, 16, 16],
    "preprocessing": [
        {"_target_": "monai.transforms.LoadImaged", "keys": "image"},
        {"_target_": "monai.transforms.EnsureChannelFirstd", "keys": "image"},
        {"_target_": "monai.transforms.Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
        {"_target_": "monai.transforms.Resized", "keys": "image", "spatial_size": "@image_size"},
        {"_target_": "monai.transforms.NormalizeIntensityd", "keys": "image", "channel_wise": True},
        {"_target_": "monai.transforms.EnsureTyped", "keys": "image", "dtype": "$torch.float32", "track_meta": False},
    ],
    "network": {
        "_target_": "monai.networks.nets.ResNet",
        "block": "basic",
        "layers": [1, 1, 1, 1],
        "block_inplanes": [4, 8, 8, 8],
        "spatial_dims": 3,
        "n_input_channels": 1,
        "num_classes": 2,
    },
    "imports": ["$import torch"],
}


def test_a_3d_resnet_takes_a_step_on_real_volumes(tmp_path: Path) -> None:
    for i, file in enumerate(("anatomical.nii", "reoriented_anat_moved.nii", "anatomical.nii", "standard.nii.gz")):
        source = VOLUMES / file
        shutil.copy(source, tmp_path / f"{i}{''.join(source.suffixes)}")
    files = ["0.nii", "1.nii", "2.nii", "3.nii.gz"]
    data = read_table(tmp_path, _table(tmp_path, files))
    assert data.test is None
    parser = ConfigParser(CONFIG)
    dataset = file_dataset(data.train, parser.get_parsed_content("preprocessing"), cache="memory")
    batch = next(iter(make_loader(dataset, 2, shuffle=True)))
    assert batch["image"].shape == (2, 1, 16, 16, 16)
    assert batch["image"].mean(dim=(1, 2, 3, 4)).abs().max() < 1e-3
    network = parser.get_parsed_content("network")
    torch.nn.functional.cross_entropy(network(batch["image"]), batch["label"]).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())
    assert network.fc.weight.grad.any()
