"""Studies: small real ones, interrupted and gone on with, and the rules for tables, requests and processes."""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import TINY, Workplace, medmnist_arrays, messages, with_patients
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_unlearn.bundle import Bundle, bundle_path
from monai_unlearn.data import ImageData, LabeledImages, make_split
from monai_unlearn.study import command, table
from monai_unlearn.study.plan import Group, Plan, PlannedRun
from monai_unlearn.study.requests import KINDS, group_of_sex, pooled, requests_of
from monai_unlearn.study.table import COLUMNS, Table, floors_of
from monai_unlearn.study.worker import Done, Work

pytest_plugins = ["bundle_runs"]

OPTIONS = {**TINY, "train_epochs": 2, "epochs": 1}
PATIENCE = 600  # seconds, far more than a busy machine needs


def rows_in(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@dataclass
class Studied:
    """What a study left behind."""

    folder: Path
    interrupted: list[dict[str, str]]
    exit_code: Any
    left_unfinished: list[Path]
    rows: list[dict[str, str]]
    after_another_call: list[dict[str, str]]
    models_trained: list[str]

    def row(self, method: str, kind: str, seed: int) -> dict[str, str]:
        (found,) = [r for r in self.rows if (r["method"], r["kind"], r["seed"]) == (method, kind, str(seed))]
        return found

    def report(self, row: dict[str, str]) -> dict[str, Any]:
        (file,) = self.folder.glob(f"study/runs/{row['key']}-*/report.json")
        return json.loads(file.read_text())


def _interrupt_when(results: Path) -> None:
    """Ctrl-C, as soon as the first row is there."""
    until = time.monotonic() + PATIENCE
    while not results.exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Studied:
    """Two methods, one of which diverges, two kinds and two seeds: interrupted, gone on with, called once more."""
    folder = tmp_path_factory.mktemp("study")
    np.savez(folder / "tiny.npz", **medmnist_arrays())
    diverging = json.loads(bundle_path("random_labeling").read_text())
    (folder / "diverging.json").write_text(json.dumps({**diverging, "method": "diverging", "lr": 1e30}))
    given: dict[str, Any] = {
        "methods": ["saliency", str(folder / "diverging.json")],
        "kinds": ["random", "easiest"],
        "fractions": [0.2],
        "seeds": [0, 1],
        "reference_models": 2,
        "options": {**OPTIONS, "dataset_file": str(folder / "tiny.npz")},
        "output_dir": str(folder / "study"),
        "models_dir": str(folder / "models"),
        "commit": "one",
    }
    results, config = folder / "study" / "study.csv", str(bundle_path("study"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=_interrupt_when, args=(results,), daemon=True).start()
        try:
            with pytest.raises(SystemExit) as ended:
                monai.bundle.run("study", config_file=config, **given, workers=1)
        finally:
            signal.signal(signal.SIGINT, handler)
        interrupted = rows_in(results)
        unfinished = [path for path in folder.rglob(".*") if ".part-" in path.name]
        monai.bundle.run("study", config_file=config, **given)
        rows, began = rows_in(results), time.time()
        monai.bundle.run("study", config_file=config, **{**given, "methods": ["saliency"]})
        assert not [log for log in (folder / "study" / "logs").iterdir() if log.stat().st_mtime > began]
    trained = [json.loads(record.read_text())["what"] for record in (folder / "models").glob("*/training.json")]
    return Studied(folder, interrupted, ended.value.code, unfinished, rows, rows_in(results), trained)


@pytest.fixture(autouse=True)
def _quiet(_logging_as_before: None) -> None:
    """Bundles set logging up."""


def a_row_for_each_run_and_each_untouched_original(studied: Studied) -> None:
    found = sorted((row["method"], row["kind"], row["seed"]) for row in studied.rows)
    methods = ("nothing", "saliency", "diverging")
    assert found == sorted((m, k, s) for m in methods for k in ("random", "easiest") for s in ("0", "1"))
    assert len({row["key"] for row in studied.rows}) == len(studied.rows)
    assert {row["commit"] for row in studied.rows} == {"one"}
    assert list(studied.rows[0]) == list(COLUMNS)


def after_an_interrupt_the_same_command_goes_on(studied: Studied) -> None:
    assert studied.exit_code == 130
    assert 0 < len(studied.interrupted) < len(studied.rows)
    assert studied.left_unfinished == []
    kept = [row for row in studied.interrupted if not row["error"]]
    assert [row for row in studied.rows if row["key"] in {k["key"] for k in kept}] == kept  # not made again


def models_that_runs_share_are_trained_once(studied: Studied) -> None:
    # Two seeds; and two retrained models for each of two kinds and two seeds.
    assert Counter(studied.models_trained) == {"original": 2, "retrained": 8}


def one_failing_cell_is_in_the_table_and_the_others_go_on(studied: Studied) -> None:
    for row in studied.rows:
        if row["method"] == "diverging":
            assert row["error"].startswith("FloatingPointError: ")
            assert row["gap"] == ""
        else:
            assert row["error"] == ""
            assert float(row["gap"]) >= 0


def runs_of_the_same_key_and_commit_are_not_made_again(studied: Studied) -> None:
    assert studied.after_another_call == studied.rows


def a_row_has_the_figures_of_its_report(studied: Studied) -> None:
    row = studied.row("saliency", "random", 1)
    report = studied.report(row)
    for split in ("forget", "retain", "validation", "test"):
        accuracy = report["models"]["unlearned"][split]["accuracy"]
        assert float(row[f"{split}_accuracy"]) == pytest.approx(accuracy, abs=1e-6)
        change = 100 * (accuracy - report["models"]["retrained"][split]["accuracy"])
        assert float(row[f"{split}_change"]) == pytest.approx(change, abs=1e-3)
    assert float(row["gap"]) == pytest.approx(report["gap_to_retrained"], abs=1e-6)
    assert float(row["harm_test"]) == pytest.approx(max(0.0, -float(row["test_change"])), abs=1e-5)
    cost = report["cost"]
    own = cost["mask"]["samples"] + cost["unlearn"]["samples"]
    assert int(row["samples"]) == own
    assert float(row["share"]) == pytest.approx(own / cost["retrain"]["samples"], abs=1e-6)
    assert row["share_with_tuning"] == row["share"]
    assert report["settings"]["seed"] == 1
    assert json.loads(row["settings"])["epochs"] == 1


def figures_of_the_untouched_original_and_the_retrained_models(studied: Studied) -> None:
    """Counted by hand, from the kept weights."""
    row = studied.row("nothing", "random", 0)
    report = studied.report(studied.row("saliency", "random", 0))
    hashes = report["provenance"]["hashes"]
    files = {hashlib.sha256(file.read_bytes()).hexdigest(): file for file in studied.folder.glob("models/*/model.pt")}
    bundle = Bundle.from_files([str(bundle_path("saliency"))], **OPTIONS, dataset_file=str(studied.folder / "tiny.npz"))
    arrays = medmnist_arrays()
    images = torch.from_numpy(arrays["test_images"])[:, None].float() / 255 * 2 - 1
    accuracies = []
    for name in ("original", "retrained", "retrained 2"):
        network = bundle.build("network").eval()
        network.load_state_dict(torch.load(files[hashes[name]], weights_only=True))
        with torch.no_grad():
            right = network(images).argmax(1).numpy() == arrays["test_labels"][:, 0]
        accuracies.append(right.mean())
    assert float(row["test_accuracy"]) == pytest.approx(accuracies[0], abs=1e-6)
    assert float(row["retrained_test_accuracy"]) == pytest.approx(np.mean(accuracies[1:]), abs=1e-6)
    assert float(row["retrained_test_accuracy_sd"]) == pytest.approx(np.std(accuracies[1:], ddof=1), abs=1e-6)
    for column in ("samples", "seconds", "share"):
        assert float(row[column]) == 0
    assert row["gap"] == row["untouched_gap"]


def floors_are_the_same_for_all_runs_on_a_forget_set(studied: Studied) -> None:
    for column in ("floor", "untouched_gap", "retrained_test_accuracy_sd", "hardest_test_floor"):
        values = {studied.row(m, "easiest", 1)[column] for m in ("nothing", "saliency")}
        assert len(values) == 1
        assert float(values.pop()) >= 0


def what_a_study_leaves_holds_nothing_of_the_forgotten(studied: Studied) -> None:
    text = (studied.folder / "study" / "study.csv").read_text()
    assert str(studied.folder) not in text
    left = [path.name for path in (studied.folder / "study" / "runs").rglob("*") if path.is_file()]
    assert set(left) == {"report.json", "split.json"}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX systems")
def test_a_small_study(studied: Studied) -> None:
    """In one test, since each process that runs tests would make the study anew."""
    for check in (
        a_row_for_each_run_and_each_untouched_original,
        after_an_interrupt_the_same_command_goes_on,
        models_that_runs_share_are_trained_once,
        one_failing_cell_is_in_the_table_and_the_others_go_on,
        runs_of_the_same_key_and_commit_are_not_made_again,
        a_row_has_the_figures_of_its_report,
        figures_of_the_untouched_original_and_the_retrained_models,
        floors_are_the_same_for_all_runs_on_a_forget_set,
        what_a_study_leaves_holds_nothing_of_the_forgotten,
    ):
        check(studied)


# What is refused


WRONG = {
    "unknown method": ({"methods": ["salency"]}, "Did you mean 'saliency'"),
    "part as a method": ({"methods": ["chexpert"]}, "methods should be configs with a method"),
    "part before a method": ({"methods": [["chexpert", "saliency"]]}, "'chexpert' is none"),
    "one name twice": ({"methods": ["saliency", ["finetune", "saliency"]]}, "'saliency' is taken"),
    "a file that is not there": ({"methods": ["mine.json"]}, "configs that are there"),
    "unknown part": ({"parts": ["chexprt"]}, "Did you mean 'chexpert'"),
    "method as a part": ({"parts": ["saliency"]}, "'saliency' stands by itself. Name methods with --methods"),
    "unknown kind": ({"kinds": ["hardst"]}, "Did you mean 'hardest'"),
    "no sex": ({"kinds": ["female"]}, "needs a column sex or gender"),
    "no site": ({"kinds": ["one_site"]}, "needs a column site"),
    "no patients": ({"kinds": ["patients"]}, "needs data with patients"),
    "nothing forgotten": ({"fractions": [0]}, "fractions should be numbers between 0 and 1"),
    "all forgotten": ({"fractions": [0.1, 1.0]}, "fractions should be numbers between 0 and 1"),
    "misspelt option": ({"options": {"train_epoch": 2}}, "Did you mean 'train_epochs'"),
    "misspelt within": ({"options": {"network_def::block_inplane": [4]}}, "has no argument 'block_inplane'"),
    "option of another type": ({"options": {"epochs": "many"}}, "epochs should be a whole number"),
    "option of the study": ({"options": {"seed": 3}}, "which the study sets. Use --seeds"),
    "options no dict": ({"options": "epochs"}, "options should be a dict"),
    "seed": ({"seeds": [-1]}, "seeds should be whole numbers"),
    "seed twice": ({"seeds": [0, 0]}, "seeds should name each once"),
    "no method": ({"methods": []}, "methods should have at least one"),
    "one reference": ({"reference_models": 1}, "reference_models should be a whole number of at least 2"),
    "no worker": ({"workers": 0}, "workers should be a whole number of at least 1"),
    "tuned": ({"tuned": ["maybe"]}, "tuned should be true, false or both"),
    "a word for true": ({"tuned": ["true"], "methods": ["auto"]}, "no method has a search_space"),
    "setting": ({"method": "saliency"}, "Did you mean 'methods'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_refused_before_anything_runs(name: str, empty_workplace: Workplace) -> None:
    wrong, message = WRONG[name]
    options = wrong.get("options", {})
    if isinstance(options, dict):
        wrong = {**wrong, "options": {**OPTIONS, "dataset_file": str(empty_workplace.data), **options}}
    with pytest.raises((ValueError, RuntimeError)) as caught:
        monai.bundle.run("study", config_file=str(bundle_path("study")), **wrong)
    assert message in messages(caught.value)
    assert not (empty_workplace.folder / "runs" / "study" / "models").exists()
    assert not list(empty_workplace.folder.rglob("*.csv"))
    assert not list(empty_workplace.folder.rglob("*.json"))


def test_a_folder_of_somebody_else_is_refused(empty_workplace: Workplace) -> None:
    with pytest.raises(RuntimeError) as caught:
        monai.bundle.run("study", config_file=str(bundle_path("study")), output_dir=str(empty_workplace.folder))
    assert "holds files that no study wrote" in messages(caught.value)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "patients.csv").write_text("name\nsomebody\n")
    with pytest.raises(ValueError, match="should be a study's table"):
        Table(tmp_path / "patients.csv")
    with pytest.raises(ValueError, match="is a folder"):
        Table(tmp_path)


# Who is forgotten


def data_of(sexes: list[Any], sizes: list[int], name: str = "sex") -> ImageData:
    """Data with patients of given sexes and numbers of images."""
    patient = np.repeat([f"p{i}" for i in range(len(sizes))], sizes)
    n = len(patient)
    images = np.random.RandomState(0).randint(0, 255, (n, 2, 2), dtype=np.uint8)
    attributes = pd.DataFrame({"patient": patient, name: np.repeat(np.array(sexes, dtype=object), sizes)})
    train = LabeledImages(images, np.arange(n) % 3, attributes)
    other = LabeledImages(images[:4] // 2, np.arange(4) % 3)
    return ImageData("drawn", ("a", "b", "c"), train, other, other)


def resolved(data: ImageData, request: dict, folder: Path) -> np.ndarray:
    file = folder / "request.json"
    file.write_text(json.dumps(request))
    split = make_split(data, forget_request=file)
    return split.forget


@settings(max_examples=40, deadline=None)
@given(
    people=st.lists(
        st.tuples(st.sampled_from(["female", "male", None]), st.integers(1, 5)), min_size=4, max_size=30
    ).filter(lambda people: sum(s for x, s in people if x == "female") >= 4 and any(x == "male" for x, _ in people)),
    seed=st.integers(0, 5),
    share=st.floats(0.05, 0.9),
)
def test_women_are_drawn_as_whole_patients_up_to_the_share(
    people: list, seed: int, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sexes, sizes = [list(column) for column in zip(*people)]
    data = data_of(sexes, sizes)
    n, women = sum(sizes), sum(size for sex, size in people if sex == "female")
    wanted = int(np.ceil(share * n - 1e-9))
    if wanted > women:
        with pytest.raises(ValueError, match=f"has only {women} of"):
            requests_of(data, "female", share, seed)
        return
    (request,) = requests_of(data, "female", share, seed)
    rows = resolved(data, request, tmp_path_factory.mktemp("request"))
    table = data.train.attributes
    assert set(table["sex"].iloc[rows]) == {"female"}
    drawn = set(table["patient"].iloc[rows])
    assert len(rows) == table["patient"].isin(drawn).sum()  # whole patients
    assert len(rows) >= wanted
    largest = max(sizes)
    assert len(rows) < wanted + largest
    assert requests_of(data, "female", share, seed) == [request]


@pytest.mark.parametrize(
    ("codes", "column"), [(("F", "M"), "Sex"), (("Woman", "Man"), "gender"), (("female ", "male"), "sex")]
)
def test_any_coding_of_the_sex_is_understood(codes: tuple, column: str, tmp_path: Path) -> None:
    data = data_of([codes[i % 2] for i in range(12)], [3] * 12, column)
    for sex, code in zip(("female", "male"), codes):
        rows = resolved(data, requests_of(data, sex, 0.2, 0)[0], tmp_path)
        assert set(data.train.attributes[column].iloc[rows]) == {code}
        everyone = resolved(data, requests_of(data, f"all_{sex}", None, 0)[0], tmp_path)
        assert everyone.tolist() == np.flatnonzero(data.train.attributes[column] == code).tolist()
        assert group_of_sex(code) == sex
    split = make_split(data, forget_request=tmp_path / "request.json")
    assert split.named_columns == (column,)  # so that the audit matches unseen images by it


def test_a_sex_in_numbers_is_not_guessed() -> None:
    with pytest.raises(ValueError, match=r"with female or f, but its values are 0, 1"):
        requests_of(data_of([0, 1] * 4, [2] * 8), "female", 0.1, 0)


@pytest.mark.parametrize("kind", ["random", "easiest", "hardest", "one_class", "one_site", "female", "male"])
@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.3])
def test_each_kind_forgets_the_share_that_it_says(kind: str, fraction: float, tmp_path: Path) -> None:
    data = data_of(["female", "male", "female"] * 20, [2, 3, 1] * 20)
    attributes = data.train.attributes
    attributes["site"] = np.where(attributes["sex"] == "male", "north", "south")
    attributes["difficulty"] = np.arange(len(attributes)) * 7 % 11 / 11
    rows = resolved(data, requests_of(data, kind, fraction, 3)[0], tmp_path)
    wanted = int(np.ceil(fraction * len(attributes) - 1e-9))
    assert wanted <= len(rows) < wanted + 3
    chosen, score = attributes.iloc[rows], attributes["difficulty"]
    if kind == "one_site":
        assert set(chosen["site"]) == {"north"}
    if kind == "one_class":
        assert len(set(data.train.labels[rows])) == 1
    if kind == "easiest":
        assert chosen["difficulty"].max() <= np.sort(score)[wanted - 1]
    if kind == "hardest":
        assert chosen["difficulty"].min() >= np.sort(score)[::-1][wanted - 1]


def test_single_patients_are_different_ones_and_pooled_in_one_request(tmp_path: Path) -> None:
    data = with_patients()
    requests = requests_of(data, "patients", None, 0, patients=4)
    each = [resolved(data, request, tmp_path) for request in requests]
    patients = [set(data.train.patients[rows]) for rows in each]
    assert [len(names) for names in patients] == [1] * 4
    assert len(set.union(*patients)) == 4
    assert all(len(rows) == 5 for rows in each)
    together = resolved(data, pooled(requests), tmp_path)
    assert together.tolist() == sorted(np.concatenate(each))
    with pytest.raises(ValueError, match="less than the 12 patients"):
        requests_of(data, "patients", None, 0, patients=12)


def test_no_request_names_a_patient() -> None:
    data = data_of(["female", "male"] * 10, [2] * 20)
    for kind in set(KINDS) - {"one_site"}:
        text = json.dumps(requests_of(data, kind, 0.2, 0, patients=3))
        assert not re.search(r"p\d", text)


# The table


def test_rows_of_other_commits_and_columns_of_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "study.csv"
    file.write_text("key,commit,error,mine\nk,old,,7\nk,new,ValueError: no,8\n")
    results = Table(file)
    assert results.finished() == {("k", "old")}
    results.add([{"key": "k", "commit": "new", "gap": 1.5, "tuned": False, "floor": float("nan"), "verdict": None}])
    old, new = rows_in(file)
    assert (old["commit"], old["mine"], old["gap"]) == ("old", "7", "")
    assert (new["error"], new["gap"], new["tuned"], new["floor"], new["verdict"]) == ("", "1.5", "false", "", "")
    assert results.finished() == {("k", "old"), ("k", "new")}


def test_studies_that_add_at_once_lose_no_row(tmp_path: Path) -> None:
    def add(number: int) -> None:
        for i in range(8):
            Table(tmp_path / "study.csv").add([{"key": f"{number}-{i}", "commit": "c"}])

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = rows_in(tmp_path / "study.csv")
    assert {row["key"] for row in rows} == {f"{number}-{i}" for number in range(4) for i in range(8)}
    assert len(rows) == 32
    assert [path.name for path in tmp_path.iterdir()] == ["study.csv"]


def test_floors_by_hand() -> None:
    models = [
        {split: {"accuracy": a, "auroc": None} for split in ("forget", "retain", "validation", "test")}
        for a in (0.5, 0.7, 0.9)
    ]
    held_out = [
        {"female_test_change": 2.0, "sex_test_difference": -1.0},
        {"female_test_change": -4.0, "sex_test_difference": 2.0},
    ]
    floors = floors_of(models, held_out)
    assert floors["retrained_test_accuracy_sd"] == pytest.approx(0.2)
    assert floors["retrained_test_auroc_sd"] is None
    assert floors["female_test_floor"] == 3
    assert floors["sex_test_floor"] == 1.5
    assert floors["male_test_floor"] is None


def test_the_version_of_the_code_is_its_commit_and_what_was_changed_since(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"log": "abc", "status": ""}
    monkeypatch.setattr(table, "_git", lambda folder, command, *_: said[command])
    assert table.code_version() == "abc"
    said["status"] = " M run.py"
    assert re.fullmatch(r"abc\+[0-9a-f]{8}", table.code_version())
    said["log"] = ""
    assert table.code_version().startswith("version ")


# Processes


def _groups(seeds: int, cells: int) -> tuple[Plan, list[Work]]:
    settings = {"workers": 2, "output_dir": "study"}
    groups = []
    for seed in range(seeds):
        for kind in ("random", "easiest"):
            each = tuple(PlannedRun(f"{seed}{kind}{i}", f"m{i}", (), False, {}, {}) for i in range(cells))
            groups.append(Group(kind, 0.1, seed, ("r",), "r", each))
    plan = Plan(tuple(groups), (), {}, settings, "data")
    return plan, [Work(plan, "c", group.seed, group, group.cells) for group in groups]


def _pretend(connection: Any, log: Path, threads: int) -> None:
    """A process that does nothing but say so; one run kills it, one original and one group can't be trained."""
    while True:
        try:
            work = connection.recv()
        except EOFError:
            return
        if work.group is None:
            connection.send(Done("original", 1.0, error="ValueError: no" if work.seed == 2 else ""))
        elif str(work.group) == "easiest 10 %, seed 1":
            connection.send(Done("retrained", error="ValueError: none"))
        else:
            connection.send(Done("retrained", 1.0))
            for cell in work.cells:
                connection.send(Done("started", key=cell.key))
                if cell.key == "0random1":
                    os._exit(9)
                row = {"key": cell.key, "commit": work.commit, "seed": work.seed, "method": cell.method}
                connection.send(Done("run", 0.5, row, cell.key))
        connection.send(Done("end"))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes without a new import")
def test_the_others_go_on_when_a_process_dies_or_a_model_can_not_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(command.multiprocessing, "get_context", lambda _: fork)
    plan, pieces = _groups(seeds=3, cells=3)
    monkeypatch.setattr(command, "serve", _pretend)
    study = command._Study(pieces, Table(tmp_path / "study.csv"), plan)
    failed = study.run()
    rows = {row["key"]: row["error"] for row in rows_in(tmp_path / "study.csv")}
    assert len(rows) == 18
    assert rows.pop("0random1") == "the process ended with exit code 9: killed, or out of memory"
    assert {key for key, error in rows.items() if error == "ValueError: none"} == {f"1easiest{i}" for i in range(3)}
    no_original = {f"2{kind}{i}" for kind in ("random", "easiest") for i in range(3)}
    assert {key for key, error in rows.items() if error == "ValueError: no"} == no_original
    assert failed == sum(bool(error) for error in rows.values()) + 1 == 10
    assert all(not worker.process.is_alive() for worker in study.workers)


@pytest.mark.parametrize(
    ("cores", "pieces", "workers", "expected"),
    [
        (2, 10, None, (2, 1)),
        (16, 3, None, (3, 5)),
        (2, 1, None, (1, 2)),
        (1, 9, None, (1, 1)),
        (8, 9, 2, (2, 4)),
        (2, 9, 4, (4, 1)),
    ],
)
def test_processes_and_threads(cores: int, pieces: int, workers: int | None, expected: tuple[int, int]) -> None:
    assert command.shares_of(cores, pieces, workers) == expected


def test_time_left_by_kind_of_work() -> None:
    progress = command._Progress({"original": 2, "retrained": 4, "run": 10}, workers=2)
    assert progress.left() == 0
    progress.step("original", 10, "")
    progress.step("run", 2, "")
    progress.step("run", 4, "")
    progress.step("run", 0, "")  # failed with its group: took no time
    assert progress.left() == ((2 - 1) * 10 + (10 - 3) * 3) / 2
