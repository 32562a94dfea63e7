"""Deletion requests through whole runs of the bundles: who is forgotten, and what the report says of that."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import shutil
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import PATIENTS, Workplace, files_below, messages, with_patients

from monai_unlearn.data import BatchedImages, ImageData
from monai_unlearn.handlers import read_history
from monai_unlearn.methods import rum
from monai_unlearn.metrics import el2n

pytest_plugins = ["bundle_runs"]

N = 60  # training images: five of each of twelve patients
Change = Callable[[ImageData], ImageData]


def _changed(data: ImageData, name: str, **columns: Any) -> ImageData:
    """The data with other columns in one of its parts."""
    part = getattr(data, name)
    return dataclasses.replace(data, **{name: dataclasses.replace(part, attributes=part.attributes.assign(**columns))})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``runs/models`` with an original model of the data with patients."""
    workplace = Workplace(tmp_path_factory.mktemp("with_patients"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace.folder)
        patch.setattr("monai_unlearn.data.load.synthetic_cells", with_patients)
        workplace.train(dataset_file=None)
    return workplace.models


class Site:
    """A place whose data has patients, to which requests come."""

    def __init__(self, workplace: Workplace, patch: pytest.MonkeyPatch) -> None:
        self.workplace, self._patch = workplace, patch
        self.use(lambda data: data)

    @property
    def folder(self) -> Path:
        return self.workplace.folder

    def use(self, change: Change) -> None:
        """Take changed data."""
        self.data = change(with_patients())
        self._patch.setattr("monai_unlearn.data.load.synthetic_cells", lambda: self.data)

    def write(self, request: dict | str, name: str = "request.json") -> Path:
        """Write a request's file."""
        text = request if isinstance(request, str) else json.dumps(request)
        (self.folder / name).write_text(text, encoding="utf-8")
        return self.folder / name

    def run(self, request: dict | str | None = None, name: str = "request.json", **settings: Any) -> dict[str, Any]:
        """Unlearn; returns the report."""
        if request is not None:
            settings["forget_request"] = str(self.write(request, name))
        method = settings.pop("method", "random_labeling")
        output = self.workplace.unlearn(method, **{"dataset_file": None, "reference": False, **settings})
        return json.loads((output / "report.json").read_text(encoding="utf-8"))

    def refused(self, request: dict | str | None = None, name: str = "request.json", **settings: Any) -> str:
        """The message of a run that is refused and writes nothing but the request's key."""
        if request is not None:
            settings["forget_request"] = str(self.write(request, name))
        before = files_below(self.folder)
        with pytest.raises(RuntimeError) as caught:
            self.run(**settings)
        after = {path: digest for path, digest in files_below(self.folder).items() if not path.endswith(".key")}
        assert after == {path: digest for path, digest in before.items() if not path.endswith(".key")}
        assert not (self.folder / "runs" / "random_labeling").exists()
        text = messages(caught.value)
        assert not [patient for patient in PATIENTS if patient in text]
        return text

    def split(self) -> dict[str, Any]:
        """What the run says of the split, in hashes."""
        return json.loads((self.folder / "runs" / "random_labeling" / "split.json").read_text())

    def forgotten(self) -> list[int]:
        """Positions of the forgotten images, found with the key beside the request."""
        key = (self.folder / "request.json.key").read_text().strip().encode()
        hashes = {hmac.new(key, self.data.train.content(i), hashlib.sha256).hexdigest(): i for i in range(N)}
        return sorted(hashes[image] for image in self.split()["forget"]["images"])


@pytest.fixture
def site(empty_workplace: Workplace, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A working directory in which an original model is there already."""
    shutil.copytree(trained, empty_workplace.models)
    return Site(empty_workplace, monkeypatch)


def _of(*patients: int) -> list[int]:
    return [5 * patient + i for patient in patients for i in range(5)]


def _include(**selector: Any) -> dict:
    return {"include": [selector]}


# Who is forgotten


def test_patients_by_id_are_forgotten_and_counted(site: Site) -> None:
    report = site.run({"reference": "ticket 2031", **_include(patient=[PATIENTS[3], PATIENTS[7]])})
    assert site.forgotten() == _of(3, 7)
    assert report["request"] == {
        "reference": "ticket 2031",
        "unit": "patient",
        "images": 10,
        "matched": 10,
        "patients": 2,
        "partly_forgotten": 0,
        "entries": 2,
        "unmatched": 0,
        "duplicates": {"training": 0, "evaluation": 0},
        "allow_partial": False,
        "overlap": {"option": "refuse", "patients": 0, "images": 0},
    }
    assert report["models"]["unlearned"]["forget"]["n"] == 10
    assert report["models"]["unlearned"]["retain"]["n"] == N - 10
    assert report["settings"]["forget_request"] == "a file"


@pytest.mark.parametrize("method", ["saliency", "retrain"])
def test_every_method_takes_a_request(site: Site, method: str) -> None:
    report = site.run(_include(patient=PATIENTS[3]), method=method)
    assert report["request"]["images"] == report["models"]["unlearned"]["forget"]["n"] == 5


def test_a_csv_file_says_the_same(site: Site) -> None:
    report = site.run(f"PatientID\n{PATIENTS[3]}\n{PATIENTS[7]}\n", "request.csv")
    assert (report["request"]["images"], report["request"]["patients"], report["request"]["entries"]) == (10, 2, 2)
    shutil.copy(site.folder / "request.csv.key", site.folder / "request.json.key")
    assert site.forgotten() == _of(3, 7)


def test_a_rule_takes_all_images_of_whom_it_matches_and_exclude_takes_them_off(site: Site) -> None:
    site.use(lambda data: _changed(data, "train", age=np.arange(N), sex=np.where(np.arange(N) < 30, "F", "M")))
    report = site.run({**_include(rule='sex == "F" and age >= 18'), "exclude": [{"patient": PATIENTS[5]}]})
    assert site.forgotten() == _of(3, 4)  # image 18 belongs to patient 3
    assert (report["request"]["matched"], report["request"]["images"]) == (12, 10)


def test_a_fraction_draws_whole_patients_by_its_own_seed(site: Site) -> None:
    drawn = []
    for seed in (0, 1, 0):
        report = site.run(_include(fraction=0.2, seed=seed))
        assert (report["request"]["images"], report["request"]["patients"]) == (15, 3)
        drawn.append(site.forgotten())
        assert len({i // 5 for i in drawn[-1]}) == 3
    assert drawn[0] == drawn[2] != drawn[1]


def test_images_by_position_leave_patients_in_part_and_say_so(site: Site) -> None:
    report = site.run(_include(index=[0, 1, 6, *_of(4)]))
    assert site.forgotten() == [0, 1, 6, *_of(4)]
    request = report["request"]
    assert (request["unit"], request["patients"], request["partly_forgotten"]) == ("image", 3, 2)
    assert site.run({"unit": "patient", **_include(index=[0, 6])})["request"]["partly_forgotten"] == 0
    assert site.forgotten() == _of(0, 1)


def test_the_shortcuts_still_work_and_are_counted_alike(site: Site) -> None:
    (site.folder / "ids.txt").write_text(f"{PATIENTS[3]}\n")
    (site.folder / "rows.txt").write_text("0\n1\n")
    by_id, by_row = (site.run(forget_patients="ids.txt"), site.run(forget_indices="rows.txt"))
    by_share = site.run(forget_fraction=0.2, seed=0)
    counts = [
        tuple(report["request"][key] for key in ("unit", "images", "patients", "partly_forgotten", "entries"))
        for report in (by_id, by_row, by_share)
    ]
    assert counts == [("patient", 5, 1, 0, 1), ("image", 2, 1, 1, 2), ("patient", 15, 3, 0, 1)]
    assert all(report["request"]["reference"] is None for report in (by_id, by_row, by_share))


def test_two_ways_at_once_are_refused(site: Site) -> None:
    text = site.refused(_include(patient=PATIENTS[3]), forget_patients="ids.txt")
    assert "Give forget_patients or forget_request, not both" in text


# What matches nothing


def _short(site: Site, value: str) -> str:
    key = (site.folder / "request.json.key").read_text().strip().encode()
    return hmac.new(key, value.encode(), hashlib.sha256).hexdigest()[:12]


def test_entries_that_match_nothing_are_named_by_place_and_hash(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    text = site.refused({"include": [{"patient": [PATIENTS[3], "Nobody-77"]}, {"index": [3, 60]}]})
    assert "2 of 4 match none" in text
    assert f"include[0] entry 2 (patient {_short(site, 'Nobody-77')})" in text
    assert f"include[1] entry 2 (index {_short(site, '60')})" in text
    printed = capfd.readouterr()
    assert "Nobody-77" not in text + printed.out + printed.err


def test_with_allow_partial_the_rest_is_forgotten_and_the_report_says_so(site: Site) -> None:
    report = site.run(_include(patient=[PATIENTS[3], "Nobody-77"]), allow_partial=True)
    assert site.forgotten() == _of(3)
    request = report["request"]
    assert (request["allow_partial"], request["entries"], request["unmatched"]) == (True, 2, 1)


def test_a_request_that_matches_nothing_at_all_is_refused_even_so(site: Site) -> None:
    text = site.refused(_include(patient=["Nobody-77", "Nobody-78"]), allow_partial=True)
    assert "Nothing to forget" in text
    assert "Nobody" not in text


# People who are in the evaluation too


def _shared(data: ImageData) -> ImageData:
    """Patient 3 has three validation and two test images more."""
    validation = data.validation.attributes["patient"].to_numpy(copy=True)
    test = data.test.attributes["patient"].to_numpy(copy=True)
    validation[[0, 11, 22]] = PATIENTS[3]
    test[[4, 5]] = PATIENTS[3]
    return _changed(_changed(data, "validation", patient=validation), "test", patient=test)


def test_a_patient_who_is_in_the_evaluation_too_is_refused_with_count_and_option(site: Site) -> None:
    site.use(_shared)
    site.workplace.train(dataset_file=None)  # other patients are other data
    text = site.refused(_include(patient=[PATIENTS[3], PATIENTS[4]]))
    assert "1 of the 2 patients to forget also have 5 validation or test images" in text
    assert "--overlap drop" in text
    assert "--overlap keep" in text


@pytest.mark.parametrize(("overlap", "left"), [("drop", 5), ("keep", 0)])
def test_their_images_are_dropped_or_kept_by_choice(site: Site, overlap: str, left: int) -> None:
    site.use(_shared)
    report = site.run(_include(patient=[PATIENTS[3], PATIENTS[4]]), overlap=overlap)
    assert report["request"]["overlap"] == {"option": overlap, "patients": 1, "images": 5}
    split = site.split()
    assert split["selection"]["n"] + split["validation"]["n"] + split["test"]["n"] == 40 + 20 - left
    assert report["models"]["unlearned"]["validation"]["n"] == split["validation"]["n"]
    assert split["forget"]["n"] == 10


# Copies


def _copies(data: ImageData) -> ImageData:
    """Image 15 of patient 3 is image 20 of patient 4, too, and image 7 of the test set."""
    train, test = data.train.images.copy(), data.test.images.copy()
    train[20] = test[7] = train[15]
    return dataclasses.replace(
        data,
        train=dataclasses.replace(data.train, images=train),
        test=dataclasses.replace(data.test, images=test),
    )


def test_copies_under_another_name_follow_and_are_counted(site: Site) -> None:
    site.use(_copies)
    site.workplace.train(dataset_file=None)
    report = site.run(_include(patient=PATIENTS[3]))
    assert site.split()["forget"]["n"] == report["request"]["images"] == 6
    request = report["request"]
    assert request["duplicates"] == {"training": 1, "evaluation": 1}
    assert (request["matched"], request["patients"], request["partly_forgotten"]) == (5, 2, 1)
    assert report["models"]["unlearned"]["test"]["n"] == 19


# Easy and hard


def _scores(site: Site) -> pd.DataFrame:
    [folder] = site.workplace.models.iterdir()
    return read_history(folder / "history.csv", N)


@pytest.mark.parametrize("score", ["mean_loss", "forgetting_events"])
def test_the_hardest_and_easiest_by_what_the_training_recorded(site: Site, score: str) -> None:
    recorded = _scores(site)[score].to_numpy()
    for kind, sign in (("hardest", -1), ("easiest", 1)):
        report = site.run(_include(**{kind: 10}, score=score))
        assert site.forgotten() == sorted(np.argsort(sign * recorded, kind="stable")[:6])
        assert (report["request"]["unit"], report["request"]["images"]) == ("image", 6)
        assert report["request"]["partly_forgotten"] > 0


def test_the_hardest_as_the_original_sees_them(site: Site) -> None:
    site.run(_include(hardest=10))
    network = site.workplace.network()
    network.load_state_dict(site.workplace.original())
    network.eval()
    batch = BatchedImages(site.data.train).__getitems__(range(N))
    with torch.no_grad():
        scores = el2n(network(batch["image"]), batch["label"]).numpy()
    assert site.forgotten() == sorted(np.argsort(-scores)[:6])


def test_a_column_of_the_data_goes_before_a_computed_score(site: Site) -> None:
    own = np.random.RandomState(3).permutation(N)
    site.use(lambda data: _changed(data, "train", difficulty=own, mean_loss=-own))
    site.run(_include(hardest=10))
    assert site.forgotten() == sorted(np.argsort(-own)[:6])
    site.run(_include(hardest=10, score="mean_loss"))
    assert site.forgotten() == sorted(np.argsort(own)[:6])


def test_a_score_that_is_nowhere_is_refused_before_a_model_is_trained(site: Site) -> None:
    shutil.rmtree(site.workplace.models)
    for score in ("mean_los", "mean_margin"):  # of a margin, higher is easier
        text = site.refused(_include(hardest=10, score=score))
        assert f"goes by {score}. The data has no such column" in text
        assert "difficulty, mean_loss, forgetting_events" in text


def test_a_recorded_score_needs_the_record(site: Site) -> None:
    kept = next(site.workplace.models.glob("*/model.pt"))
    shutil.copy(kept, site.folder / "mine.pt")
    text = site.refused(_include(hardest=10, score="mean_loss"), original_checkpoint="mine.pt")
    assert "no history.csv lies beside mine.pt. Train the original with" in text
    shutil.copy(kept.with_name("history.csv"), site.folder)
    site.run(_include(hardest=10, score="mean_loss"), original_checkpoint="mine.pt")
    assert site.forgotten() == sorted(np.argsort(-_scores(site)["mean_loss"].to_numpy())[:6])
    (site.folder / "history.csv").write_text("epoch,loss\n0,1\n")
    shutil.rmtree(site.folder / "runs" / "random_labeling")
    text = site.refused(_include(hardest=10, score="mean_loss"), original_checkpoint="mine.pt")
    assert "history.csv beside the original model should be its training's history of 60 images" in text


# The key


def test_the_key_stays_beside_the_request_and_gives_the_same_hashes_again(site: Site) -> None:
    site.run(_include(patient=PATIENTS[3]))
    first, key = site.split(), site.folder / "request.json.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert not (site.folder / "runs" / "random_labeling" / "private" / "split_key").exists()
    assert site.forgotten() == _of(3)
    content = key.read_bytes()
    site.run(_include(patient=PATIENTS[3]))
    assert site.split() == first
    assert key.read_bytes() == content
    everywhere = b"".join(path.read_bytes() for path in (site.folder / "runs").rglob("*") if path.is_file())
    assert content.strip() not in everywhere

    key.unlink()
    site.run(_include(patient=PATIENTS[3]))
    assert set(site.split()["forget"]["images"]).isdisjoint(first["forget"]["images"])


def test_where_no_key_can_be_kept_the_run_keeps_its_own(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """And though the request is read twice, the hashes and the key that is written belong together."""
    drawn = iter([character * 64 for character in "0123456789"])
    monkeypatch.setattr("monai_unlearn.data.request.key_beside", lambda path: (next(drawn), False))
    site.run(_include(hardest=10))
    private = site.folder / "runs" / "random_labeling" / "private"
    shutil.copy(private / "split_key", site.folder / "request.json.key")
    assert len(site.forgotten()) == 6


def test_images_without_a_patient_are_people_of_their_own(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    def unknown(data: ImageData) -> ImageData:
        for name in ("train", "validation", "test"):
            patients = getattr(data, name).attributes["patient"].to_numpy(dtype=object, copy=True)
            patients[::7] = None
            data = _changed(data, name, patient=patients)
        return data

    site.use(unknown)
    site.workplace.train(dataset_file=None)
    assert "60 training images of 21 patients" in capsys.readouterr().out
    report = site.run(_include(index=[0, 7, *range(1, 5)]))
    assert report["request"]["overlap"]["patients"] == 0
    assert (report["request"]["patients"], report["request"]["partly_forgotten"]) == (3, 0)
    attack = report["models"]["unlearned"]["attack"]
    assert 0 <= attack["low"] <= attack["auc"] <= attack["high"] <= 1


def test_rum_goes_by_what_the_training_recorded_where_it_is_asked_to(site: Site, monkeypatch: Any) -> None:
    given: list[list[float]] = []
    forget = [2, 3, 17, 40, 41, 42]
    file = site.write("\n".join(map(str, forget)), "forget.txt")
    monkeypatch.setattr("monai_unlearn.methods.rum.strata", partial(_noted, given, rum.strata))
    site.run(method="rum", forget_indices=str(file), score="mean_loss")
    assert given.pop() == _scores(site)["mean_loss"][forget].tolist()
    site.run(method="rum", forget_indices=str(file))
    network = site.workplace.network()
    network.load_state_dict(site.workplace.original())
    batch = BatchedImages(site.data.train).__getitems__(forget)
    with torch.no_grad():
        assert given.pop() == pytest.approx(el2n(network.eval()(batch["image"]), batch["label"]).tolist(), rel=1e-5)


def _noted(given: list, function: Callable, scores: list[float]) -> Any:
    given.append(list(scores))
    return function(scores)


def test_rum_refuses_a_score_that_there_is_not(site: Site) -> None:
    text = site.refused(method="rum", score="mean_margin")
    assert "score should be one of difficulty, mean_loss, forgetting_events, but got 'mean_margin'" in text
    kept = next(site.workplace.models.glob("*/model.pt"))
    shutil.copy(kept, site.folder / "mine.pt")
    text = site.refused(method="rum", score="mean_loss", original_checkpoint="mine.pt")
    assert "The run goes by mean_loss" in text
    assert "no history.csv lies beside mine.pt" in text
