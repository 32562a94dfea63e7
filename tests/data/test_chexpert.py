"""CheXpert: its two layouts, uncertain and blank findings, parts by patient, and rows that are odd.

The images are text that says which one it is: the reader opens none, and a test can tell that a path is the right one.
"""

from __future__ import annotations

import csv
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from chexpert_layout import BATCHES, COLUMNS, CSV_BATCH, write_chexpert
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from monai_unlearn.data.chexpert import read_chexpert
from monai_unlearn.data.image_data import ImageData, ImageFiles
from monai_unlearn.data.request import DeletionRequest, Selector, resolve_request
from monai_unlearn.data.splits import make_split

PROPERTIES = settings(deadline=None, derandomize=True, max_examples=25)
COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
SECRET = "SECRET7"
MODEL = "model.pt"  # only whether there is one counts: then all of train.csv is training data
N_PATIENTS, N_VALID = 24, 5


def _marked(root: Path) -> Path:
    for file in root.rglob("*.jpg"):
        if file.stat().st_size:
            file.write_text(_tail(str(file)))
    return root


def _tail(file: str) -> str:
    """What names an image wherever the data lies: patient, study and file."""
    return "/".join(file.split("/")[-3:])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CheXpert-v1.0-small; not to be changed."""
    return _marked(write_chexpert(tmp_path_factory.mktemp("s"), N_PATIENTS, n_valid=N_VALID, size=16))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data as the parts of CheXpert-v1.0; not to be changed."""
    folder = tmp_path_factory.mktemp("f")
    (folder / CSV_BATCH).mkdir()
    return _marked(write_chexpert(folder, N_PATIENTS, n_valid=N_VALID, size=16, small=False))


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CheXpert-v1.0-small with a missing and an empty file and odd values; not to be changed."""
    folder = tmp_path_factory.mktemp("o")
    return _marked(write_chexpert(folder, N_PATIENTS, n_valid=N_VALID, size=16, odd_rows=True))


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """CheXpert-v1.0-small, to be changed."""
    return Path(shutil.copytree(small, tmp_path / "CheXpert-v1.0-small"))


def _rows(file: Path) -> dict[str, dict[str, str]]:
    """The rows of a CSV file as they are written, by image."""
    with file.open(newline="") as text:
        return {_tail(row["Path"]): row for row in csv.DictReader(text)}


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", newline="") as text:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _as_label(cell: str, policy: str, blanks: str) -> float:
    if cell == "":
        return 0.0 if blanks == "zeros" else math.nan
    if float(cell) == -1:
        return {"zeros": 0.0, "ones": 1.0, "ignore": math.nan, "soft": 0.5}[policy]
    return float(cell)


def _baseline(finding: str) -> str:
    return "ones" if finding in ("Atelectasis", "Edema") else "zeros"


def _check_labels(
    part: ImageFiles,
    rows: Mapping[str, Mapping[str, str]],
    findings: Sequence[str] = COMPETITION,
    policy: Callable[[str], str] = _baseline,
    blanks: str = "zeros",
) -> None:
    expected = [
        [_as_label(rows[_tail(file)][name], policy(name), blanks) for name in findings] for file in part.files.tolist()
    ]
    np.testing.assert_array_equal(part.labels, np.array(expected, dtype=np.float32))


def _images(part: ImageFiles | Any) -> list[str]:
    return [_tail(file) for file in part.files.tolist()]


def _patients(part: ImageFiles | Any) -> set[str]:
    return set(part.patients.tolist())


def _names_nobody(text: str) -> bool:
    return not re.search(rf"patient\d|study\d|view\d|{SECRET}", text)


# Layouts


def _beside_others(small: Path, full: Path, folder: Path) -> Path:
    shutil.copytree(full, folder / "data")
    (folder / "data" / "patient_lists").mkdir()
    (folder / "data" / ".cache" / "patient00001").mkdir(parents=True)
    (folder / "data" / "notes" / "patients").mkdir(parents=True)
    shutil.copytree(full / BATCHES[0] / "patient00001", folder / "data" / CSV_BATCH / "valid" / "patient00001")
    (folder / "data" / "train_cheXbert.csv").write_text("another file\n")
    return folder / "data"


def _renamed_parts(small: Path, full: Path, folder: Path) -> Path:
    shutil.copytree(full / CSV_BATCH, folder / "tables")
    for number, batch in enumerate(BATCHES):
        shutil.copytree(full / batch, folder / f"part {number}")
    return folder


def _images_of_v1_sorted_by_split(small: Path, full: Path, folder: Path) -> Path:
    """Tables above the images, as after unpacking CheXpert-v1.0 by hand."""
    shutil.copytree(full / CSV_BATCH, folder, dirs_exist_ok=True)
    for number, batch in enumerate(BATCHES):
        shutil.copytree(full / batch, folder / str(number) / "train")
    return folder


LAYOUTS: dict[str, Callable[[Path, Path, Path], Path]] = {
    "small": lambda small, full, folder: small,
    "above small": lambda small, full, folder: small.parent,
    "small renamed": lambda small, full, folder: shutil.copytree(small, folder / "X-rays, old"),
    "above small renamed": lambda small, full, folder: shutil.copytree(small, folder / "X-rays, old").parent,
    "v1.0": lambda small, full, folder: full,
    "v1.0 renamed": lambda small, full, folder: shutil.copytree(full, folder / "chexpertchestxrays-u20210408"),
    "v1.0 with renamed parts": _renamed_parts,
    "v1.0 beside other things": _beside_others,
    "v1.0 sorted by split": _images_of_v1_sorted_by_split,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images_labels_and_attributes(
    small: Path, full: Path, tmp_path: Path, layout: str
) -> None:
    data = read_chexpert(LAYOUTS[layout](small, full, tmp_path), view="all")
    assert (data.name, data.class_names, data.channels, data.notes) == ("CheXpert", COMPETITION, 1, ())
    reference = read_chexpert(small, view="all")
    for name, part in data.parts().items():
        assert isinstance(part, ImageFiles)
        rows = _rows(small / ("valid.csv" if name == "test" else "train.csv"))
        assert [Path(path).read_text() for path in part.paths] == _images(part)
        assert [record["image"] for record in part.records()] == part.paths
        _check_labels(part, rows)
        pd.testing.assert_frame_equal(part.attributes, reference.parts()[name].attributes)
    assert _images(data.test) == list(_rows(small / "valid.csv"))
    assert sorted(_images(data.train) + _images(data.validation)) == sorted(_rows(small / "train.csv"))


def test_names_of_the_folder_above_do_not_change_the_digest(small: Path, copy: Path, tmp_path: Path) -> None:
    copy.rename(tmp_path / "other")
    assert read_chexpert(tmp_path / "other").digest() == read_chexpert(small).digest()
    assert read_chexpert(str(small)).digest() == read_chexpert(small).digest()


@pytest.mark.parametrize("change", ["byte order mark", "Windows", "index", "prefix", "no prefix"])
def test_how_the_table_was_saved_does_not_matter(small: Path, copy: Path, change: str) -> None:
    file = copy / "train.csv"
    text = file.read_text()
    if change == "byte order mark":
        file.write_text(text, encoding="utf-8-sig")
    elif change == "Windows":
        file.write_bytes(text.replace("\n", "\r\n").encode())
    elif change == "index":
        pd.read_csv(file).to_csv(file)
    else:
        file.write_text(text.replace("CheXpert-v1.0-small/train/", "/mnt/x y/" if change == "prefix" else ""))
    data, expected = read_chexpert(copy), read_chexpert(small)
    assert data.digest() == expected.digest()
    pd.testing.assert_frame_equal(data.train.attributes, expected.train.attributes)


# Findings


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight patients of train.csv and one of valid.csv, with an image each; its tables are written by the tests."""
    root = tmp_path_factory.mktemp("few")
    for split, numbers in (("train", range(1, 9)), ("valid", [64541])):
        for number in numbers:
            file = root / split / f"patient{number:05}" / "study1" / "view1_frontal.jpg"
            file.parent.mkdir(parents=True)
            file.write_text("not opened")
    return root


def _row(split: str, number: int, cells: Sequence[str], columns: Sequence[str] = COLUMNS) -> dict[str, str]:
    file = f"CheXpert-v1.0-small/{split}/patient{number:05}/study1/view1_frontal.jpg"
    attributes = {"Path": file, "Sex": "Female", "Age": "50", "Frontal/Lateral": "Frontal", "AP/PA": "AP"}
    return {**attributes, **dict(zip(columns, cells))}


CELLS = st.lists(st.sampled_from(["", "1.0", "0.0", "-1.0"]), min_size=14, max_size=14)
POLICIES = ("zeros", "ones", "ignore", "soft", "baseline")


@PROPERTIES
@given(
    cells=st.lists(CELLS, min_size=9, max_size=9),
    columns=st.permutations(COLUMNS),
    findings=st.sampled_from(["competition", "all"])
    | st.sampled_from(COLUMNS)
    | st.lists(st.sampled_from(COLUMNS), min_size=1, unique=True),
    uncertainty=st.sampled_from(POLICIES) | st.dictionaries(st.sampled_from(COLUMNS), st.sampled_from(POLICIES)),
    blanks=st.sampled_from(["zeros", "ignore"]),
)
def test_labels_are_those_of_the_policy_cell_by_cell(
    few: Path,
    cells: list[list[str]],
    columns: list[str],
    findings: str | list[str],
    uncertainty: str | dict[str, str],
    blanks: str,
) -> None:
    _write(few / "train.csv", [_row("train", i + 1, cells[i], columns) for i in range(8)])
    _write(few / "valid.csv", [_row("valid", 64541, cells[8], columns)])

    def policy(finding: str) -> str:
        given = uncertainty if isinstance(uncertainty, str) else uncertainty.get(finding, "baseline")
        return _baseline(finding) if given == "baseline" else given

    if findings == "competition":
        names: Sequence[str] = COMPETITION
    elif findings == "all":
        names = COLUMNS
    else:
        names = [findings] if isinstance(findings, str) else findings
    data = read_chexpert(few, findings, uncertainty, blanks, original_checkpoint=MODEL)
    assert data.multi_label
    assert data.class_names == tuple(names)
    assert data.train.labels.dtype == np.float32
    assert (len(data.train), len(data.validation)) == (8, 1)
    for split, part in (("train", data.train), ("valid", data.validation)):
        assert isinstance(part, ImageFiles)
        _check_labels(part, _rows(few / f"{split}.csv"), names, policy, blanks)


def test_each_policy_changes_uncertain_labels_alone(small: Path) -> None:
    labels = {
        policy: read_chexpert(small, "all", policy, "ignore", "all", original_checkpoint=MODEL).train.labels
        for policy in POLICIES
    }
    table = pd.read_csv(small / "train.csv")
    cells = table[list(COLUMNS)].to_numpy()
    uncertain = cells == -1
    assert uncertain.any()
    for policy, value in (("zeros", 0), ("ones", 1), ("ignore", math.nan), ("soft", 0.5)):
        np.testing.assert_array_equal(labels[policy][uncertain], np.full(uncertain.sum(), value))
        np.testing.assert_array_equal(labels[policy][~uncertain], cells[~uncertain])
    for column, name in enumerate(COLUMNS):
        np.testing.assert_array_equal(labels["baseline"][:, column], labels[_baseline(name)][:, column])


def test_the_order_of_findings_is_the_one_asked_for(small: Path) -> None:
    both = read_chexpert(small, ["Edema", "Fracture"])
    turned = read_chexpert(small, ("Fracture", "Edema"))
    assert (both.class_names, turned.class_names) == (("Edema", "Fracture"), ("Fracture", "Edema"))
    np.testing.assert_array_equal(both.train.labels, turned.train.labels[:, ::-1])


def test_findings_that_are_not_asked_for_may_be_missing_or_odd(copy: Path) -> None:
    for split in ("train", "valid"):
        table = pd.read_csv(copy / f"{split}.csv").drop(columns="Lung Lesion")
        table["Fracture"] = "seen"
        table.to_csv(copy / f"{split}.csv", index=False)
    data = read_chexpert(copy, view="all")
    assert not {"Fracture", "fracture", "Lung Lesion"} & set(data.train.index())
    _check_labels(data.train, _rows(copy / "train.csv"))


def test_a_finding_that_can_not_be_learned_is_noted(copy: Path) -> None:
    table = pd.read_csv(copy / "train.csv")
    table["Edema"], table["Fracture"], table["Pneumonia"] = math.nan, 1.0, -1.0
    table.to_csv(copy / "train.csv", index=False)
    names = ["Edema", "Fracture", "Pneumonia", "Support Devices"]

    def note(uncertainty: str, blanks: str) -> str:
        notes = read_chexpert(copy, names, uncertainty, blanks).notes
        return re.fullmatch(r"No training image is known to have, or none to lack: (.*)\. Nothing.*", *notes)[1]

    assert note("zeros", "zeros") == "Edema, Fracture, Pneumonia"
    assert note("ones", "ignore") == "Edema, Fracture, Pneumonia"
    assert note("ignore", "ignore") == "Edema, Fracture, Pneumonia"
    assert note("soft", "zeros") == "Edema, Fracture"
    assert read_chexpert(copy, "Support Devices").notes == ()


# Filters and attributes


@pytest.mark.parametrize("view", ["all", "frontal", "lateral"])
@pytest.mark.parametrize("projection", ["all", "AP", "PA"])
def test_filters_keep_the_images_of_the_view_and_projection_in_order(small: Path, view: str, projection: str) -> None:
    if view == "lateral" and projection != "all":
        with pytest.raises(ValueError, match=f"No row of train.csv is left with view 'lateral' and .*'{projection}'"):
            read_chexpert(small, view=view, projection=projection)
        return
    table = pd.read_csv(small / "train.csv")
    assert len(table["AP/PA"].dropna().unique()) == 2
    assert table["AP/PA"].isna().any()
    wanted = [
        image
        for image, row in _rows(small / "train.csv").items()
        if view in ("all", row["Frontal/Lateral"].lower()) and projection in ("all", row["AP/PA"])
    ]
    train = read_chexpert(small, view=view, projection=projection, original_checkpoint=MODEL).train
    assert _images(train) == wanted
    assert train.index().index.tolist() == list(range(len(wanted)))
    _check_labels(train, _rows(small / "train.csv"))


def test_frontal_images_are_what_one_gets_unless_told(small: Path) -> None:
    assert read_chexpert(small).digest() == read_chexpert(small, view="frontal", projection="all").digest()
    assert read_chexpert(small).digest() != read_chexpert(small, view="all").digest()


def test_attributes_are_those_of_the_row_and_of_the_path(odd: Path) -> None:
    data = read_chexpert(odd, view="all", original_checkpoint=MODEL, on_broken="skip")
    rows = _rows(odd / "train.csv")
    assert {row["Sex"] for row in rows.values()} == {"Female", "Male", "Unknown"}
    assert {row["AP/PA"] for row in rows.values()} == {"AP", "PA", "LL", ""}
    assert "0" in {row["Age"] for row in rows.values()}
    assert len(data.train) == len(rows) - 2
    assert list(data.train.attributes) == ["patient", "study", "sex", "age", "view", "projection", "scanner"]
    got = data.train.attributes.astype(object).where(data.train.attributes.notna(), None)
    for image, (patient, study, sex, age, view, projection, scanner) in zip(_images(data.train), got.values.tolist()):
        row = rows[image]
        assert f"{patient}/{study.split('/')[1]}" == study == image.rpartition("/")[0]
        assert sex == {"Female": "female", "Male": "male", "Unknown": None}[row["Sex"]]
        assert age == (float(row["Age"]) or None)
        assert view == row["Frontal/Lateral"].lower()
        assert projection == (row["AP/PA"] or None)
        assert scanner == row["Scanner"]


def test_further_columns_are_attributes_by_a_plain_name(copy: Path) -> None:
    table = pd.read_csv(copy / "train.csv").assign(**{" Scanner Model ": 7, "path": "p", "No finding": 2})
    table.to_csv(copy / "train.csv", index=False)
    data = read_chexpert(copy)
    assert data.train.attributes.columns[6:].tolist() == ["scanner", "scanner_model", "path", "no_finding"]
    assert data.train.attributes["scanner_model"].eq(7).all()
    assert list(data.test.attributes) == list(data.train.attributes)  # which valid.csv need not have
    assert data.test.attributes["scanner_model"].isna().all()
    assert set(data.test.attributes["scanner"]) == {row["Scanner"] for row in _rows(copy / "valid.csv").values()}


def test_a_request_finds_images_by_study_file_and_rules_and_an_unknown_age_is_no_age(odd: Path) -> None:
    train = read_chexpert(odd, view="all", original_checkpoint=MODEL, on_broken="skip").train
    rows = [_rows(odd / "train.csv")[image] for image in _images(train)]

    def asked(by: str, value: str) -> list[int]:
        return resolve_request(DeletionRequest((Selector(by, (value,)),)), train.index()).positions.tolist()

    image = _images(train)[20]
    study = image.rpartition("/")[0]
    assert asked("file", f"train/{image}") == [20]
    assert asked("study", study) == [i for i, other in enumerate(_images(train)) if other.startswith(f"{study}/")]
    assert asked("rule", 'scanner == "A"') == [i for i, row in enumerate(rows) if row["Scanner"] == "A"]
    young = [i for i, row in enumerate(rows) if 0 < int(row["Age"]) < 60]
    assert 0 < len(young) < len(rows)
    assert asked("rule", "age < 60") == young


# Parts


def _assigned(data: ImageData) -> dict[str, str]:
    return {p: name for name, part in data.parts().items() if name != "test" for p in _patients(part)}


def test_the_patients_to_validate_on_never_change(few: Path, tmp_path: Path) -> None:
    """Pinned: with other ones, a model's validation images would be another's training images."""
    _write(tmp_path / "valid.csv", [_row("valid", 64541, ["1.0"] * 14)])
    _write(tmp_path / "train.csv", [_row("train", i, ["1.0"] * 14) for i in range(1, 61)])
    for split, numbers in (("train", range(1, 61)), ("valid", [64541])):
        for number in numbers:
            shutil.copytree(few / "train" / "patient00001", tmp_path / split / f"patient{number:05}")
    data = read_chexpert(tmp_path)
    assert data.validation.patients.tolist() == ["patient00006", "patient00018", "patient00034", "patient00060"]
    before: set[str] = set()
    for fraction in (0.05, 0.1, 0.3, 0.5, 0.9):
        data = read_chexpert(tmp_path, validation_fraction=fraction)
        held_out = _patients(data.validation)
        assert before < held_out
        assert held_out | _patients(data.train) == {f"patient{i:05}" for i in range(1, 61)}
        assert abs(len(held_out) - 60 * fraction) <= 3 * math.sqrt(60 * fraction * (1 - fraction))
        before = held_out


@PROPERTIES
@given(data=st.data())
def test_a_patient_is_on_the_same_side_whatever_the_other_rows_and_the_filters_are(
    small: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    side = _assigned(read_chexpert(small, view="all", validation_fraction=0.3))
    rows = list(_rows(small / "train.csv").items())
    first = {name: next(p for p, s in side.items() if s == name) for name in ("train", "validation")}
    chosen = data.draw(st.lists(st.sampled_from(rows), unique_by=lambda row: row[0]))
    chosen = [*[row for row in rows if row[0].split("/")[0] in first.values()], *chosen]
    shuffled = data.draw(st.permutations(list(dict(chosen).values())))
    root = tmp_path_factory.mktemp("rows")
    for split in ("train", "valid"):
        (root / split).symlink_to(small / split)
    shutil.copy(small / "valid.csv", root)
    _write(root / "train.csv", shuffled)
    view = data.draw(st.sampled_from(["all", "frontal"]))
    read = read_chexpert(root, view=view, validation_fraction=0.3)
    found = _assigned(read)
    assert found == {patient: side[patient] for patient in found}
    assert not _patients(read.train) & _patients(read.validation)
    wanted = [_tail(row["Path"]) for row in shuffled if view in ("all", row["Frontal/Lateral"].lower())]
    for part in (read.train, read.validation):
        assert _images(part) == [image for image in wanted if image.split("/")[0] in _patients(part)]
    assert len(read.train) + len(read.validation) == len(wanted)


def test_lateral_images_are_on_the_side_of_their_patient(small: Path) -> None:
    side = _assigned(read_chexpert(small, view="all", validation_fraction=0.5))
    lateral = _assigned(read_chexpert(small, view="lateral", validation_fraction=0.5))
    assert set(lateral.values()) == {"train", "validation"}
    assert lateral == {patient: side[patient] for patient in lateral}


@PROPERTIES
@given(
    held_out=st.sets(st.integers(1, N_PATIENTS), min_size=1, max_size=N_PATIENTS - 1),
    written=st.sampled_from(["{}\n", "\r\n{}  \r\n", "\t{}\n\n"]),
    checkpoint=st.sampled_from([None, MODEL]),
)
def test_held_out_patients_are_the_validation_set_and_all_others_are_trained_on(
    small: Path, tmp_path_factory: pytest.TempPathFactory, held_out: set[int], written: str, checkpoint: str | None
) -> None:
    names = [f"patient{number:05}" for number in held_out]
    file = tmp_path_factory.getbasetemp() / "held_out.txt"
    file.write_bytes("".join(written.format(name) for name in [*names, names[0]]).encode("utf-8-sig"))
    data = read_chexpert(small, view="all", heldout_patients=file, original_checkpoint=checkpoint)
    assert _patients(data.validation) == set(names)
    assert _patients(data.train) == {f"patient{i:05}" for i in range(1, N_PATIENTS + 1)} - set(names)
    assert sorted(_images(data.train) + _images(data.validation)) == sorted(_rows(small / "train.csv"))
    assert _images(data.test) == list(_rows(small / "valid.csv"))
    assert sum("the given checkpoint was trained on" in note for note in data.notes) == (checkpoint is not None)
    assert all(_names_nobody(note) for note in data.notes)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.9])
def test_all_of_train_csv_was_seen_by_somebody_elses_model(small: Path, fraction: float) -> None:
    data = read_chexpert(small, view="all", original_checkpoint=MODEL, validation_fraction=fraction)
    assert _images(data.train) == list(_rows(small / "train.csv"))
    assert _images(data.validation) == list(_rows(small / "valid.csv"))
    assert data.test is None
    _check_labels(data.validation, _rows(small / "valid.csv"))


def test_images_that_somebody_elses_model_never_saw_are_halved_by_patient(small: Path) -> None:
    data = read_chexpert(small, view="all", original_checkpoint=MODEL)
    split = make_split(data, forget_fraction=0.1)
    patients = data.validation.patients
    assert not set(patients[split.selection]) & set(patients[split.validation])
    assert set(patients) == {f"patient{64541 + i}" for i in range(N_VALID)}
    np.testing.assert_array_equal(split.test, split.validation)
    assert len(split.forget) + len(split.retain) == len(_rows(small / "train.csv"))


def _margin(half: float) -> float:
    """1.96 standard deviations of Mann and Whitney's U / (n m) under equal distributions, m without bound."""
    many = 10**9
    return 1.96 * math.sqrt((half + many + 1) / (12 * half * many))


def test_the_power_that_is_lost_with_somebody_elses_model_is_noted(small: Path, tmp_path: Path) -> None:
    assert read_chexpert(small).notes == ()
    data = read_chexpert(small, original_checkpoint=MODEL, validation_fraction=0.5)
    (note,) = data.notes
    assert f"never saw: {len(data.validation)} images of {N_VALID} patients of valid.csv" in note
    assert "Radiologists labelled these, where the labels of train.csv come from reports" in note
    assert f"the other half, about {N_VALID // 2} patients, is for all figures on unseen images" in note
    assert f"more than about {_margin(N_VALID / 2):.3f} away" in note
    assert f"that would be {_margin(N_PATIENTS / 4):.3f}, from about {N_PATIENTS // 4} patients" in note
    file = tmp_path / "held_out.txt"
    file.write_text("".join(f"patient{number:05}\n" for number in range(1, 9)))
    (note,) = read_chexpert(small, view="all", original_checkpoint=MODEL, heldout_patients=file).notes
    assert "images of 8 patients of the held-out patients" in note
    assert f"more than about {_margin(4):.3f} away" in note
    assert "Radiologists" not in note


# Odd rows


def test_missing_and_empty_files_are_counted_and_left_out_if_told(
    odd: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = _rows(odd / "train.csv")
    frontal = [image for image, row in rows.items() if row["Frontal/Lateral"] == "Frontal"]
    count = f"of the {len(frontal)} images of train.csv, 1 are missing and 1 are empty files"
    with pytest.raises(ValueError, match=rf"All images should be there, but {count}\. .*--on_broken skip\.") as error:
        read_chexpert(odd, original_checkpoint=MODEL)
    data = read_chexpert(odd, original_checkpoint=MODEL, on_broken="skip")
    assert data.notes[0] == f"Left out: {count}."
    assert _images(data.train) == frontal[2:]
    _check_labels(data.train, rows)
    for text in (str(error.value), *data.notes, caplog.text, *capfd.readouterr()):
        assert _names_nobody(text)


def test_files_that_nobody_asked_for_may_be_missing(copy: Path) -> None:
    expected = read_chexpert(copy)
    lateral = [file for file in copy.rglob("*.jpg") if "lateral" in file.name]
    assert lateral
    for file in lateral:
        file.unlink()
    assert read_chexpert(copy).digest() == expected.digest()
    with pytest.raises(ValueError, match=r"images of train.csv, \d+ are missing and 0 are empty"):
        read_chexpert(copy, view="all")


@pytest.mark.parametrize("name", ["", ".."])
def test_a_folder_is_no_image(copy: Path, name: str) -> None:
    rows = list(_rows(copy / "train.csv").values())
    rows[3]["Path"] = rows[3]["Path"].rpartition("/")[0] + f"/{name}"
    _write(copy / "train.csv", rows)
    with pytest.raises(ValueError, match=f"of the {len(rows)} images of train.csv, 1 are missing and 0 are empty"):
        read_chexpert(copy, view="all")


def test_what_an_image_is_like_is_not_the_readers_business(copy: Path) -> None:
    expected = read_chexpert(copy)
    pixels = np.arange(64).reshape(8, 8)
    pictures = [
        Image.fromarray(np.stack([pixels.astype(np.uint8)] * 3, axis=2)),
        Image.fromarray((pixels * 999).astype(np.uint16)),
        Image.fromarray(np.stack([pixels.astype(np.uint8)] * 4, axis=2)),
    ]
    for path, picture in zip(expected.train.paths, pictures):
        picture.save(path, format="png")
    data = read_chexpert(copy)
    assert data.channels == 1
    assert _images(data.train) == _images(expected.train)
    np.testing.assert_array_equal(data.train.labels, expected.train.labels)


# What is refused

Change = Callable[[Path], "dict[str, Any] | None"]


def _options(**options: Any) -> Change:
    return lambda root: options


def _cell(column: str, value: Any, rows: int = 1, split: str = "train") -> Change:
    def change(root: Path) -> None:
        table = list(_rows(root / f"{split}.csv").values())
        for row in table[:rows]:
            row[column] = value
        _write(root / f"{split}.csv", table)

    return change


def _text(change: Callable[[str], str | bytes], split: str = "train") -> Change:
    def write(root: Path) -> None:
        new = change((root / f"{split}.csv").read_text())
        (root / f"{split}.csv").write_bytes(new if isinstance(new, bytes) else new.encode())

    return write


def _held_out(content: bytes, name: str = "held_out.txt") -> Change:
    def change(root: Path) -> dict[str, Any]:
        (root / "held_out.txt").write_bytes(content)
        return {"heldout_patients": root / name}

    return change


def _first_line(text: str) -> str:
    return text.splitlines()[0]


def _two_copies(root: Path) -> dict[str, Any]:
    shutil.copytree(root, root.parent / "old")
    return {"dataset_dir": root.parent}


def _two_folders_above(root: Path) -> dict[str, Any]:
    (root.parent / "a" / "b").mkdir(parents=True)
    root.rename(root.parent / "a" / "b" / root.name)
    return {"dataset_dir": root.parent / "a"}


def _another_copy_within(root: Path) -> None:
    shutil.copytree(root / "train" / "patient00001", root / "backup" / "train" / "patient00001")


def _without_valid(root: Path) -> None:
    (root / "valid.csv").unlink()


def _without_images(root: Path) -> None:
    shutil.rmtree(root / "valid")


def _odd_findings(root: Path) -> None:
    _cell("Edema", "2", 3, "valid")(root)
    _cell("Atelectasis", "0.5", 2, "valid")(root)


def _of_no_bytes(root: Path) -> dict[str, Any]:
    for file in (root / "valid").rglob("*.jpg"):
        file.write_bytes(b"")
    return {"on_broken": "skip"}


def _one_patient(split: str) -> Change:
    """Rename the first patient of a table and of the images to one who is in the other table."""

    def change(root: Path) -> None:
        other, theirs = ("patient64541", "valid") if split == "train" else ("patient00001", "train")
        own = "patient00001" if split == "train" else "patient64541"
        (root / split / own).rename(root / split / other)
        assert (root / theirs / other).is_dir()
        _text(lambda text: text.replace(own, other), split)(root)

    return change


REFUSED: dict[str, tuple[Change, str]] = {
    # Options
    "a fraction of 0": (_options(validation_fraction=0), "validation_fraction should lie between 0 and 1 .* got 0"),
    "a fraction of 1": (_options(validation_fraction=1.0), "validation_fraction should lie between 0 and 1"),
    "no fraction": (_options(validation_fraction=math.nan), "validation_fraction should lie between 0 and 1 .*nan"),
    "a truth for a fraction": (_options(validation_fraction=True), "validation_fraction should lie .* but got True"),
    "another view": (_options(view="Frontal"), "view should be one of frontal, lateral, all.* Did you mean 'frontal'"),
    "another projection": (_options(projection="ap"), "projection should be one of all, AP, PA.* Did you mean 'AP'"),
    "another blank": (_options(blanks="ones"), r"blanks should be one of zeros, ignore, but got 'ones'"),
    "another choice": (_options(on_broken="ignore"), "on_broken should be one of raise, skip, but got 'ignore'"),
    "another policy": (_options(uncertainty="U-Ones"), "uncertainty should be one of .* Did you mean 'ones'"),
    "another policy for one": (
        _options(uncertainty={"Edema": "zero"}),
        "uncertainty of Edema should be one of baseline, .* but got 'zero'. Did you mean 'zeros'",
    ),
    "a policy for no finding": (
        _options(uncertainty={"edema": "ones"}),
        "uncertainty should map findings, but got 'edema'. Did you mean 'Edema'",
    ),
    "policies as a list": (_options(uncertainty=["ones"] * 5), r"uncertainty should be .*, or map findings to them"),
    "another word for findings": (
        _options(findings="Competition"),
        "findings should be competition, all, or a list of names, but got .* Did you mean 'competition'",
    ),
    "another finding": (
        _options(findings=["Edema", "Airspace Opacity"]),
        "among CheXpert's 14, but got 'Airspace Opacity'. Did you mean 'Lung Opacity'.* There are: No Finding, ",
    ),
    "no finding": (_options(findings=[]), "findings should name at least one finding, and each once"),
    "a finding twice": (_options(findings=["Edema", "Edema"]), "at least one finding, and each once, but got .*Edema"),
    # The folder
    "no folder given": (_options(dataset_dir=None), "dataset_dir should be the folder .*, but got None"),
    "two copies": (_two_copies, "hold one copy of CheXpert, but 2 .*CheXpert-v1.0-small, old. Name one of them"),
    "a second copy of a patient": (_another_copy_within, "each patient once, but 1 have folders in more than one"),
    "all files empty": (_of_no_bytes, r"of the \d+ images of valid.csv, 0 are missing and .* Unpack them again\.$"),
    # The tables
    "an empty file": (_text(lambda text: ""), "train.csv could not be read as CSV"),
    "UTF-16": (_text(lambda text: text.encode("utf-16")), "train.csv could not be read as CSV"),
    "a row with more cells": (_text(lambda text: f"{text}{',' * 40}{SECRET}\n"), r"could not be read as CSV \(.*\S\)"),
    "rows with more cells": (
        _text(lambda text: text.replace("\n", f",{SECRET}\n").replace(f",{SECRET}", "", 1)),
        r"Path should end in .* of \d+ rows",
    ),
    "no header": (
        _text(lambda text: text.partition("\n")[2]),
        "should have the columns of CheXpert, but has no 'Path'",
    ),
    "no sex": (_text(lambda text: text.replace("Sex", "Gender", 1), "valid"), "valid.csv .* but has no 'Sex'"),
    "a misspelt finding": (
        _text(lambda text: text.replace("Pleural Effusion", "Pleural effusion", 1)),
        "but has no 'Pleural Effusion'. Did you mean 'Pleural effusion'",
    ),
    "a header alone": (_text(_first_line, "valid"), "valid.csv should have a row for each image, but has none"),
    "a path without a study": (
        _cell("Path", "CheXpert-v1.0-small/train/patient00001/view1_frontal.jpg", 2),
        r"Path should end in patientXXXXX/studyX/FILE, but 2 of \d+ rows of train.csv don't",
    ),
    "a path of Windows": (_cell("Path", r"train\patient00001\study1\view1.jpg"), r"Path should end in .* but 1 of"),
    "a blank path": (_cell("Path", ""), "Path should end in .* but 1 of"),
    "a patient without a number": (_cell("Path", "train/patients/study1/view1.jpg"), "Path should end in .* but 1 of"),
    "another number for a finding": (
        _cell("Edema", "2", 3),
        r"Findings should be 1, 0, -1 or blank, but 3 of \d+ rows of train.csv .* 'Edema'",
    ),
    "several odd findings": (_odd_findings, r"but 2 of \d+ rows of valid.csv have something else for 'Atelectasis'"),
    "a word for a finding": (_cell("Edema", SECRET), r"should be 1, 0, -1 or blank, but 1 of \d+ .* 'Edema'"),
    "words for an age": (_cell("Age", SECRET, 2), r"Age should be a number of years, but 2 of \d+ rows of train.csv"),
    "a negative age": (_cell("Age", "-1"), "Age should be a number of years, but 1 of"),
    "an infinite age": (_cell("Age", "inf", split="valid"), r"Age should be .*, but 1 of \d+ rows of valid.csv"),
    "another sex": (_cell("Sex", SECRET, 3), "Sex should be Female, Male, Unknown, but 3 of"),
    "another view in a row": (_cell("Frontal/Lateral", SECRET), "Frontal/Lateral should be Frontal, Lateral, but 1 of"),
    "a blank view": (_cell("Frontal/Lateral", "", 4), "Frontal/Lateral should be Frontal, Lateral, but 4 of"),
    "a row twice": (
        _text(lambda text: text + text.splitlines()[1] + "\n" + text.splitlines()[2] + "\n"),
        r"Path should name each image once, but 2 of \d+ rows of train.csv repeat another",
    ),
    "an image twice under two prefixes": (
        _text(lambda text: text + "other/" + text.splitlines()[1] + "\n"),
        "name each image once, but 1 of",
    ),
    "a column that is the reader's own": (
        _text(lambda text: text.replace("Scanner", "Patient", 1)),
        "should not be called as the reader's own, but train.csv has 'Patient'. Rename it",
    ),
    "a column for positions": (_text(lambda text: text.replace("Scanner", "Index", 1)), "the reader's own, .*'Index'"),
    "a column for files": (_text(lambda text: text.replace("Scanner", "File", 1)), "the reader's own, but .*'File'"),
    "two columns of one name": (
        _text(lambda text: "\n".join(line + (",x" if i else ", scanner ") for i, line in enumerate(text.splitlines()))),
        "the reader's own, but train.csv has ' scanner '",
    ),
    # The parts
    "a patient of valid.csv to train on": (_one_patient("train"), "in both train.csv and valid.csv, but 1 are"),
    "a patient of train.csv to test on": (_one_patient("valid"), "in both train.csv and valid.csv, but 1 are"),
    "nobody to validate on": (
        _options(validation_fraction=1e-9),
        "No image of train.csv is left for the validation set. Choose other patients or filters",
    ),
    "nobody to train on": (_options(validation_fraction=1 - 1e-9), "No image of train.csv is left for the train set"),
    "an empty list of patients": (_held_out(b"\n \n"), "name patients of train.csv .* 'held_out.txt' is empty"),
    "a list that is no text": (_held_out(b"\xff\xfe\x00"), "should be a text file, but 'held_out.txt' is not text"),
    "patients that are not there": (
        _held_out(b"patient00001\npatient64541\n00002\nPatient00003"),
        "name patients of train.csv as patientXXXXX, one a line, but 3 of 4 are not in it",
    ),
}
NOT_FOUND: dict[str, tuple[Change, str]] = {
    "no such folder": (
        _options(dataset_dir="/no/such/folder"),
        "unpacked to, but there is no folder '/no",
    ),
    "a file": (lambda root: {"dataset_dir": root / "train.csv"}, r"but there is no folder '.*train\.csv'"),
    "one table alone": (_without_valid, "neither '.*' nor a folder in it has both train.csv and valid.csv"),
    "two folders above": (_two_folders_above, "nor a folder in it has both"),
    "no image": (_without_images, r"CheXpert's images, .* but none of the \d+ images of valid.csv is there"),
    "no list of patients": (_held_out(b"", "other.txt"), "should be an existing text file, but got .*other.txt"),
    "a folder for a list": (_options(heldout_patients="/"), "heldout_patients should be an existing text file"),
}


@pytest.mark.parametrize("case", [*REFUSED, *NOT_FOUND])
def test_what_can_not_be_read_is_refused_and_says_why_without_a_name(copy: Path, case: str) -> None:
    change, message = {**REFUSED, **NOT_FOUND}[case]
    options = {"dataset_dir": copy, "view": "all", **(change(copy) or {})}
    with pytest.raises(FileNotFoundError if case in NOT_FOUND else ValueError, match=message) as error:
        read_chexpert(**options)
    assert _names_nobody(str(error.value))


def test_the_folder_with_the_tables_of_v1_alone_has_no_training_images(full: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the parts of CheXpert-v1\.0, but none of the \d+ images of train"):
        read_chexpert(full / CSV_BATCH)
