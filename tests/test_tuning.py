"""The tuner: whole searches, what ends a trial, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from bundle_runs import METHODS, TINY, Workplace, unfinished_below
from hypothesis import given
from hypothesis import strategies as st
from monai.bundle import ConfigParser

import monai_unlearn.run
import monai_unlearn.selection
from monai_unlearn import tuning
from monai_unlearn.bundle import Bundle, bundle_path
from monai_unlearn.checkpoint import load_checkpoint
from monai_unlearn.run import Run
from monai_unlearn.selection import SelectionJudge
from monai_unlearn.tuning import _harmless, objective, pareto_front, search_space, tune

pytest_plugins = ["bundle_runs"]

SPACE = {"lr": {"low": 1e-4, "high": 0.1, "log": True}, "epochs": [1, 2]}


def _settings(workplace: Workplace, **settings: Any) -> dict[str, Any]:
    defaults = {"dataset_file": str(workplace.data), "reference": False, "trials": 3, "search_space": SPACE}
    return {**TINY, **defaults, **settings}


def _bundle(workplace: Workplace, method: str = "random_labeling", **settings: Any) -> Bundle:
    files = [str(bundle_path(method)), str(bundle_path("tune"))]
    return Bundle.from_files(files, **_settings(workplace, **settings))


def _table(output: Path) -> pd.DataFrame:
    return pd.read_csv(output / "tuning.csv")


def _grid(**values: list) -> dict[str, Any]:
    """Settings by which each of these is tried once: a sampler of Optuna's in the place of another."""
    return {
        "search_space": values,
        "sampler": {"_target_": "optuna.samplers.GridSampler", "search_space": values},
        "trials": math.prod(len(options) for options in values.values()),
    }


def _journal(workplace: Workplace, method: str = "random_labeling") -> optuna.Study:
    path = workplace.folder / f"runs/{method}-tuning/study.journal"
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    (study,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=study, storage=storage)


def test_a_search_and_the_run_with_what_it_chose(workplace: Workplace) -> None:
    tune(_bundle(workplace, "saliency", trials=4))
    output = workplace.folder / "runs/saliency"
    report, table = json.loads((output / "report.json").read_text()), _table(output)
    trials = table[table["trial"] > 0]
    best = trials.loc[trials["objective"].idxmin()]
    assert list(table["trial"]) == [0, 1, 2, 3, 4]
    assert list(table["state"]) == ["original", *4 * ["complete"]]
    assert trials.loc[trials["chosen"], "trial"].tolist() == [best["trial"]]
    for name in ("lr", "epochs"):
        assert report["settings"][name] == best[name]
    assert np.allclose(table["objective"], table["distinguishability"] + table["utility_loss"])
    assert np.allclose(table["distinguishability"], (2 * table["auc"] - 1).abs())
    assert np.allclose(table["utility_loss"], (table["utility"][0] - table["utility"]).clip(lower=0))
    assert any("4 trials (0 of them pruned, 0 failed)" in note for note in report["notes"])
    page = (output / "tuning.html").read_text()
    assert page.count("<svg") == 2
    assert page.count('<tr><th scope="row">') == 5
    assert not unfinished_below(workplace.folder)

    # All trials' cost is on the clock, and it is what the same run costs by itself and its judgements.
    for name in ("seconds", "samples", "forward", "backward"):
        assert report["cost"]["tuning"][name] == pytest.approx(table[name].sum(), abs=0.01)
    plain = workplace.unlearn(
        "saliency",
        lr=float(best["lr"]),
        epochs=int(best["epochs"]),
        reference=False,
        output_dir="runs/plain",
    )
    alone = json.loads((plain / "report.json").read_text())["cost"]
    images = report["models"]["original"]["forget"]["n"] + 21
    own = sum(alone[phase]["samples"] for phase in ("mask", "unlearn"))
    assert best["samples"] == own + best["epochs"] * images
    assert table["samples"][0] == images

    # The trial, the run after it and a plain run with its settings give one model.
    states = [torch.load(folder / "unlearned_model.pt", weights_only=True) for folder in (output, plain)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    run = Run.start(_bundle(workplace, "saliency"))
    network = run.bundle.build("network")
    load_checkpoint(output / "unlearned_model.pt").load_into(network)
    judgement = SelectionJudge(run).evaluate(network)
    assert sum(objective(judgement, table["utility"][0])) == pytest.approx(best["objective"])


def test_the_same_seed_tries_the_same_and_a_stop_in_between_changes_nothing(workplace: Workplace) -> None:
    def tried(**settings: Any) -> list[dict[str, Any]]:
        tune(_bundle(workplace, finish=False, **settings))
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(settings["storage"]))
        found = [optuna.load_study(study_name=n, storage=storage) for n in optuna.get_all_study_names(storage)]
        return [(trial.params, trial.value) for trial in found[-1].trials]

    whole = tried(storage="one")
    assert tried(storage="two", trials=2) == whole[:2]
    assert tried(storage="two") == whole
    assert tried(storage="one") == whole  # all are made: nothing is done
    assert tried(storage="two", sampler_seed=7) != whole
    assert not (workplace.folder / "runs/random_labeling").exists()


def test_neither_the_retrained_model_nor_the_reported_half_is_looked_at(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    read: list[Path] = []
    for module in (monai_unlearn.run, monai_unlearn.selection):
        real = module.evaluate

        def recording(evaluator: Any, network: Any, loaders: Any, *args: Any, real: Any = real) -> Any:
            seen.update(loaders)
            return real(evaluator, network, loaders, *args)

        monkeypatch.setattr(module, "evaluate", recording)

    def reading(path: Path, *args: Any) -> Any:
        read.append(Path(path))
        return load_checkpoint(path, *args)

    monkeypatch.setattr(monai_unlearn.run, "load_checkpoint", reading)
    monkeypatch.setattr(Run, "retrained", lambda self: pytest.fail("the retrained model is not for choices"))
    tune(_bundle(workplace, reference=True, finish=False, trials=1))
    assert seen == {"forget", "retain", "selection"}
    assert [path.resolve() for path in read] == [workplace.kept()["original"].resolve()]


def test_a_diverging_trial_is_a_failed_one(workplace: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("monai_unlearn")
    logger.addHandler(caplog.handler)
    try:
        tune(_bundle(workplace, finish=False, **_grid(lr=[1e30, 0.001], epochs=[2])))
    finally:
        logger.removeHandler(caplog.handler)
    found = {trial.params["lr"]: trial for trial in _journal(workplace).trials}
    assert {rate: trial.state.name for rate, trial in found.items()} == {0.001: "COMPLETE", 1e30: "FAIL"}
    assert found[1e30].user_attrs["ended"] in ("FloatingPointError", "ValueError")
    assert found[1e30].user_attrs["cost"]["samples"] > 0
    assert any("failed: FloatingPointError: The loss should be finite" in message for message in caplog.messages)


def test_a_pruned_trial(workplace: Workplace) -> None:
    pruner = {"_target_": "optuna.pruners.ThresholdPruner", "upper": -1.0}
    tune(_bundle(workplace, pruner=pruner, finish=False, **_grid(epochs=[1, 3])))
    found = {trial.params["epochs"]: trial for trial in _journal(workplace).trials}
    assert {epochs: trial.state.name for epochs, trial in found.items()} == {1: "COMPLETE", 3: "PRUNED"}
    assert list(found[3].intermediate_values) == [1]
    # An epoch of every training image and one judgement: less than half of what it was to be.
    images = found[1].user_attrs["cost"]["samples"]
    assert found[3].user_attrs["cost"]["samples"] <= images


def test_no_trial_came_through(workplace: Workplace) -> None:
    with pytest.raises(ValueError, match="of 1 none was: the last one failed"):
        tune(_bundle(workplace, **_grid(lr=[1e30], epochs=[2])))
    assert not (workplace.folder / "runs/random_labeling").exists()
    assert not unfinished_below(workplace.folder)


def test_a_method_that_takes_no_step(workplace: Workplace) -> None:
    space = {"alpha": [1.0, 2.0], "dampening": [0.5]}
    tune(_bundle(workplace, "synaptic_dampening", search_space=space, trials=2, finish=False))
    assert [trial.state.name for trial in _journal(workplace, "synaptic_dampening").trials] == 2 * ["COMPLETE"]


def _command(workplace: Workplace, **settings: Any) -> list[str]:
    files = [str(bundle_path("random_labeling")), str(bundle_path("tune"))]
    options = [part for key, value in _settings(workplace, **settings).items() for part in (f"--{key}", str(value))]
    return [sys.executable, "-m", "monai.bundle", "run", "tune", "--config_file", str(files), *options]


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX systems")
def test_two_processes_share_a_study_and_one_of_them_is_killed(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"search_space": {"lr": SPACE["lr"], "epochs": [8]}, "trials": 5}
    real = tuning._Search._make
    with subprocess.Popen(
        _command(workplace, finish=False, **settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None

        def making(search: tuning._Search, trial: Any) -> str:
            """After this process' first trial, the other one is killed in the midst of one of its own."""
            line = real(search, trial)
            while process.poll() is None:
                if any(other.state.name == "RUNNING" and "cost" in other.user_attrs for other in search.shared.all()):
                    process.kill()
                    process.wait()
            return line

        monkeypatch.setattr(tuning._Search, "_make", making)
        assert any("Trial 1:" in line for line in process.stdout)
        tune(_bundle(workplace, **settings))
    assert process.returncode == -signal.SIGKILL
    trials = _journal(workplace).trials
    counted = [trial for trial in trials if "ended" in trial.user_attrs]
    assert len(counted) == 5
    assert len({trial.user_attrs["worker"]["pid"] for trial in counted}) == 2
    assert len({trial.params["lr"] for trial in counted}) == 5
    assert [trial.state.name for trial in trials if trial not in counted] == ["FAIL"]
    output = workplace.folder / "runs/random_labeling"
    report, table = json.loads((output / "report.json").read_text()), _table(output)
    assert sorted(table["state"]) == [*5 * ["complete"], "original", "stopped"]
    assert table.loc[table["state"] == "stopped", "samples"].item() >= 120
    assert table["samples"].sum() == sum(trial.user_attrs["cost"]["samples"] for trial in trials) + table["samples"][0]
    assert report["cost"]["tuning"]["samples"] == table["samples"].sum()
    assert any("chosen in 5 trials" in note for note in report["notes"])
    assert not unfinished_below(workplace.folder)


def test_other_settings_are_another_study(workplace: Workplace) -> None:
    for share in (0.1, 0.2):
        tune(_bundle(workplace, trials=1, finish=False, forget_fraction=share))
    with pytest.raises(ValueError, match="too many values"):
        _journal(workplace)


def test_selection_data_that_is_too_small_to_choose_by(workplace: Workplace) -> None:
    bundle = _bundle(workplace)
    run = Run.start(bundle)
    bundle.share(split=replace(run.split, selection=run.split.selection[:9]))
    with pytest.raises(ValueError, match=r"at least 10 that are comparable .* of 9 images 9 are comparable"):
        tune(bundle)
    assert not (workplace.folder / "runs/random_labeling").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trials": 0}, "trials should be at least 1, but got 0"),
        ({"search_space": {}}, r"search_space should name settings .* but got \{\}"),
        ({"search_space": None}, "has no search_space"),
        ({"search_space": {"lrr": [0.1]}}, "names 'lrr'. Did you mean 'lr'?"),
        ({"search_space": {"forget_fraction": [0.1]}}, "names 'forget_fraction'"),
        ({"search_space": {"batch_size": [8, 16]}}, "names 'batch_size'"),
        ({"search_space": {"train_lr": [0.1]}}, "names 'train_lr'"),
        ({"search_space": {"output_dir": ["x"]}}, "names 'output_dir'"),
        ({"search_space": {"lr": {"low": 0.1, "hihg": 1}}}, "has 'hihg'. Did you mean 'high'?"),
        ({"search_space": {"lr": {"low": 0.1}}}, "should have low < high"),
        ({"search_space": {"lr": {"low": 1, "high": 0.1}}}, "should have low < high"),
        ({"search_space": {"lr": {"low": 0.1, "high": math.nan}}}, "should have low < high"),
        ({"search_space": {"lr": {"low": 0.1, "high": True}}}, "should have low < high"),
        ({"search_space": {"lr": {"low": 0.1, "high": 1, "log": "yes"}}}, "should have low < high"),
        ({"search_space": {"saliency_ratio": {"low": 0, "high": 1, "log": True}}}, "above 0 with log"),
        ({"search_space": {"lr": []}}, r"should be a list of values, or a range with low and high, but got \[\]"),
        ({"search_space": {"lr": 0.1}}, "should be a list of values"),
        ({"search_space": {"lr": [[0.1]]}}, "should list plain values"),
        ({"search_space": {"lr": [0.1, "fast"]}}, "lr should be a number, but got 'fast'"),
        ({"search_space": {"lr": [-0.1]}}, "lr should be greater than 0"),
        ({"search_space": {"epochs": {"low": 0, "high": 5}}}, "epochs should be greater than 0"),
        ({"search_space": {"epochs": [1.5]}}, "epochs should be a whole number"),
        ({"sampler_seed": -1}, "sampler_seed should be a whole number"),
        ({"search_space": {"saliency_ratio": [2.0]}, "saliency_ratio": 3.0}, "ratio should"),
    ],
)
def test_searches_that_make_no_sense_end_before_any_trial(
    workplace: Workplace, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tune(_bundle(workplace, "saliency", **settings))
    assert not (workplace.folder / "runs/saliency").exists()
    assert not unfinished_below(workplace.folder)


def test_a_misspelt_key_of_the_tuner(workplace: Workplace) -> None:
    with pytest.raises(ValueError, match=r"no setting 'trails'\. Did you mean 'trials'\?"):
        _bundle(workplace, trails=3)


@pytest.mark.parametrize("method", ["retrain", "auto"])
def test_a_method_without_settings_has_nothing_to_tune(workplace: Workplace, method: str) -> None:
    files = [str(bundle_path(method)), str(bundle_path("tune"))]
    settings = {name: value for name, value in _settings(workplace).items() if name not in ("search_space", "epochs")}
    with pytest.raises(ValueError, match=rf"bundle of '{method}' has no search_space.*run it without tune\.json"):
        tune(Bundle.from_files(files, **settings))


def test_ranges_and_lists_become_distributions(workplace: Workplace) -> None:
    space = {"lr": {"low": 1e-5, "high": 1}, "epochs": {"low": 2, "high": 9, "log": True}, "batchnorm": ["retain"]}
    found = search_space(_bundle(workplace, search_space=space))
    assert found == {
        "lr": optuna.distributions.FloatDistribution(1e-5, 1.0),
        "epochs": optuna.distributions.IntDistribution(2, 9, log=True),
        "batchnorm": optuna.distributions.CategoricalDistribution(["retain"]),
    }


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("retrain", "auto")])
def test_every_method_has_a_search_space(method: str) -> None:
    files = [str(bundle_path(method)), str(bundle_path("tune"))]
    config = ConfigParser.load_config_file(files[0])
    space = config["search_space"]
    found = search_space(Bundle.from_files(files))  # each name is a setting, each value of its type
    assert set(found) == set(space)
    if "epochs" not in config:
        assert not {"lr", "epochs"} & set(space)
        return
    rates, lengths = found["lr"], space["epochs"]
    if isinstance(rates, optuna.distributions.FloatDistribution):
        assert rates.log
        assert rates.low == 1e-5
        assert rates.high >= 1e-2
    else:
        assert min(rates.choices) == 1e-5
        assert len(set(rates.choices)) >= 6
    assert len(set(lengths)) >= 3
    assert min(lengths) <= config["epochs"] <= max(lengths)


def _judgement(auc: float, utility: float) -> Any:
    return SimpleNamespace(distinguishability=abs(2 * auc - 1), utility=utility)


def test_the_objective_in_closed_form() -> None:
    assert objective(_judgement(0.5, 0.9), 0.9) == (0, 0)
    assert objective(_judgement(1.0, 0.4), 0.9) == (1, 0.5)
    assert objective(_judgement(0.0, 0.9), 0.9) == (1, 0)
    assert objective(_judgement(0.75, 0.95), 0.9) == (0.5, 0)  # a better model is no gain that pays for traces


_COORDINATE = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@given(st.lists(st.tuples(_COORDINATE, _COORDINATE), max_size=8))
def test_the_front_is_what_nothing_betters(points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)
    for point, on in zip(points, front):
        bettered = False
        for other in points:
            bettered |= all(o <= p for o, p in zip(other, point)) and other != point
        assert on is not bettered
    assert any(front) == bool(points)


def test_an_error_that_names_a_patient_is_not_logged() -> None:
    run: Any = SimpleNamespace(hidden_names=lambda: {"Zq7-0001-Xw"})
    assert _harmless(RuntimeError("can't read Zq7-0001-Xw.png"), run) == "RuntimeError"
    assert _harmless(RuntimeError("out of memory\nmore"), run) == "RuntimeError: out of memory"
    assert _harmless(RuntimeError(), run) == "RuntimeError"
