"""Whose an image is, which images a request means, and the quarantine."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from folder import Folder
from hypothesis import given, settings
from hypothesis import strategies as st
from studies import write_studies

from monai_unlearn.label.images import (
    Quarantine,
    UnknownImagesError,
    image_table,
    images_of,
    link_files,
    with_split,
    write_table,
)
from monai_unlearn.label.site import Site


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    return write_studies(tmp_path / "studies", patients=6, size=8)


def test_patients_come_from_the_headers_and_labels_from_the_table(studies: Path) -> None:
    site = Site(studies, labels_file=studies.parent / "labels.csv")
    table = image_table(Folder(studies), site)
    given = pd.read_csv(studies.parent / "labels.csv")
    assert table["file"].tolist() == given["file"].tolist()
    assert table["patient"].tolist() == given["patient"].tolist()
    assert table["label"].tolist() == given["label"].tolist()
    assert set(table["sex"]) == {"F", "M"}
    without = image_table(Folder(studies), Site(studies))
    assert without["patient"].tolist() == given["patient"].tolist()
    assert "label" not in without


def test_the_datastores_info_goes_before(studies: Path) -> None:
    folder = Folder(studies)
    folder.update_image_info("scan0000a", {"patient": "other", "label": "none", "strategy": {"random": 1}, "age": 7})
    folder.update_image_info("scan0000b", {"labels": {"oedema": 1, "fracture": 0}})
    table = image_table(folder, Site(studies, labels_file=studies.parent / "labels.csv")).set_index("image")
    assert table.loc["scan0000a", ["patient", "label", "age"]].tolist() == ["other", "none", "7"]
    assert table.loc["scan0000b", ["oedema", "fracture"]].tolist() == ["1", "0"]
    assert "strategy" not in table
    assert "ts" not in table


def test_clients_do_not_decide_which_file_is_moved(studies: Path) -> None:
    folder = Folder(studies)
    objects = folder.json()
    objects["objects"]["scan0000a"]["image"]["info"]["name"] = "scan0001a.dcm"
    folder.json = lambda: objects  # type: ignore[method-assign]
    table = image_table(folder, Site(studies)).set_index("image")
    assert table.loc["scan0000a", "file"] == "scan0000a.dcm"
    quarantine = Quarantine(studies / ".unlearning" / "q", studies)
    for bad in ("../x", ".unlearning", "a/b", ".."):
        row = pd.DataFrame([{"image": "scan0000a", "file": bad, "patient": "p"}])
        with pytest.raises(ValueError, match="in the datastore's folder itself"):
            quarantine.take("r1", row, folder)


def test_the_table_of_labels_goes_before_the_header(studies: Path) -> None:
    """A scanner's pseudonym in the header is not whom the site knows."""
    labels = pd.read_csv(studies.parent / "labels.csv")
    labels["patient"] = [f"REAL-{i // 4}" for i in range(len(labels))]
    labels.to_csv(studies.parent / "labels.csv", index=False)
    table = image_table(Folder(studies), Site(studies, labels_file=studies.parent / "labels.csv"))
    assert table["patient"].tolist() == labels["patient"].tolist()


def test_labels_by_patient_meet_the_headers(studies: Path) -> None:
    labels = pd.read_csv(studies.parent / "labels.csv").drop_duplicates("patient").drop(columns="file")
    labels.to_csv(studies.parent / "labels.csv", index=False)
    table = image_table(Folder(studies), Site(studies, labels_file=studies.parent / "labels.csv"))
    assert table["label"].notna().all()


def test_a_run_has_links_of_its_own_under_names_that_say_nothing(studies: Path, tmp_path: Path) -> None:
    table = image_table(Folder(studies), Site(studies))
    linked = link_files(table, studies, tmp_path / "run")
    assert linked["file"].tolist()[:2] == ["000000.dcm", "000001.dcm"]
    before = (studies / "scan0000a.dcm").read_bytes()
    (studies / "scan0000a.dcm").unlink()
    assert (tmp_path / "run" / "000000.dcm").read_bytes() == before


def test_an_image_without_a_patient_is_a_patient_of_its_own(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "broken.dcm").write_bytes(b"no dicom")
    assert image_table(Folder(tmp_path), Site(tmp_path))["patient"].tolist() == ["a", "b", "broken"]


def test_all_images_of_a_patient_are_meant(studies: Path) -> None:
    table = image_table(Folder(studies), Site(studies))
    assert images_of(table, ["scan0002b"], [])["image"].tolist() == ["scan0002a", "scan0002b"]
    both = images_of(table, ["scan0002b"], ["PAT-0004"])
    assert both["image"].tolist() == ["scan0002a", "scan0002b", "scan0004a", "scan0004b"]


def test_who_is_unknown_is_counted_and_not_named(studies: Path) -> None:
    table = image_table(Folder(studies), Site(studies))
    with pytest.raises(UnknownImagesError, match="1 of 2 images and 2 of 2 patients are not") as error:
        images_of(table, ["scan0002b", "../../etc/passwd"], ["X-1", "X-2"])
    assert "X-1" not in str(error.value)
    assert "passwd" not in str(error.value)


def test_ten_thousand_ids(studies: Path) -> None:
    table = image_table(Folder(studies), Site(studies))
    with pytest.raises(UnknownImagesError, match="10000 of 10000 images"):
        images_of(table, [f"x{i}" for i in range(10_000)], [])


def test_a_patients_part_depends_on_their_id_alone(studies: Path) -> None:
    table = pd.DataFrame({"image": [f"i{i}" for i in range(2000)], "patient": [f"p{i // 2}" for i in range(2000)]})
    split = with_split(table)
    assert (split.groupby("patient")["split"].nunique() == 1).all()
    shares = split["split"].value_counts(normalize=True)
    assert shares["train"] == pytest.approx(0.7, abs=0.05)
    assert shares["test"] == pytest.approx(0.15, abs=0.04)
    rest = with_split(table.iloc[1000:])
    assert rest["split"].tolist() == split["split"].iloc[1000:].tolist()
    given = with_split(table.assign(split=["test", *[None] * 1999]))
    assert given["split"].tolist() == ["test", *split["split"].iloc[1:]]


def test_quarantine_moves_and_gives_back(studies: Path) -> None:
    folder, quarantine = Folder(studies), Quarantine(studies / ".unlearning" / "quarantine", studies)
    (studies / "labels" / "final").mkdir(parents=True)
    (studies / "labels" / "final" / "scan0001a.json").write_text("{}")
    (studies / "labels" / "final" / "scan0001ab.json").write_text("{}")  # another image's
    folder.update_image_info("scan0001a", {"label": "opacity"})
    before = {path.name: path.read_bytes() for path in studies.iterdir() if path.is_file()}
    table = images_of(image_table(folder, Site(studies)), [], ["PAT-0001"])
    quarantine.take("r1", table, folder)
    assert "scan0001a" not in folder.list_images()
    assert not (studies / "scan0001a.dcm").exists()
    assert [path.name for path in (studies / "labels" / "final").iterdir()] == ["scan0001ab.json"]
    inside = quarantine.table(["r1"])
    assert inside["patient"].unique().tolist() == ["PAT-0001"]
    assert all((studies / file).is_file() for file in inside["file"])
    assert {"PAT-0001", "scan0001a", "scan0001a.dcm"} <= quarantine.names()

    assert quarantine.give_back("r1", folder) == 2
    assert {path.name: path.read_bytes() for path in studies.iterdir() if path.is_file()} == before
    assert (studies / "labels" / "final" / "scan0001a.json").is_file()
    assert folder.get_image_info("scan0001a")["label"] == "opacity"
    assert quarantine.names() == set()


def test_erasing_leaves_nothing(studies: Path) -> None:
    folder, quarantine = Folder(studies), Quarantine(studies / ".unlearning" / "q", studies)
    quarantine.take("r1", images_of(image_table(folder, Site(studies)), ["scan0001a"], []), folder)
    assert quarantine.erase("r1") == 2
    assert list((studies / ".unlearning" / "q").iterdir()) == []
    assert quarantine.erase("r1") == 0


def test_a_link_is_taken_and_not_what_it_points_to(studies: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive.dcm"
    (studies / "scan0003a.dcm").rename(archive)
    (studies / "scan0003a.dcm").symlink_to(Path("..") / "archive.dcm")
    folder, quarantine = Folder(studies), Quarantine(studies / ".unlearning" / "q", studies)
    quarantine.take("r1", images_of(image_table(folder, Site(studies)), ["scan0003a"], []), folder)
    assert (studies / ".unlearning" / "q" / "r1" / "files" / "scan0003a.dcm").resolve() == archive
    quarantine.erase("r1")
    assert archive.is_file()


def test_what_was_moved_half_way_is_finished(studies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    folder, quarantine = Folder(studies), Quarantine(studies / ".unlearning" / "q", studies)
    table = images_of(image_table(folder, Site(studies)), [], ["PAT-0001", "PAT-0002"])
    moved, real = [], os.replace

    def killed(source: object, target: object) -> None:
        if len(moved) == 3:  # the list, and two images
            raise KeyboardInterrupt
        moved.append(source)
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            quarantine.take("r1", table, folder)
    assert len(quarantine.rows("r1")) == 4
    assert quarantine.give_back("r1", folder) == 4
    assert len(folder.list_images()) == 12


def test_the_table_that_a_bundle_reads_has_no_other_ids(tmp_path: Path) -> None:
    table = pd.DataFrame({"image": ["i"], "file": ["i.dcm"], "patient": ["p"], "study": ["1.2"], "label": ["a"]})
    write_table(table, tmp_path / "t.csv")
    assert pd.read_csv(tmp_path / "t.csv").columns.tolist() == ["file", "patient", "label"]


@given(st.dictionaries(st.text(min_size=1), st.one_of(st.text(), st.integers(), st.none(), st.lists(st.text()))))
@settings(max_examples=30, deadline=None)
def test_whatever_clients_keep_as_info(tmp_path_factory: pytest.TempPathFactory, info: dict) -> None:
    path = tmp_path_factory.mktemp("studies")
    (path / "a.png").write_bytes(b"")
    folder = Folder(path)
    folder.update_image_info("a", {**json.loads(json.dumps(info)), "name": "a.png"})
    row = image_table(folder, Site(path)).iloc[0]
    assert (row["image"], row["file"]) == ("a", "a.png")
    assert isinstance(row["patient"], str)
