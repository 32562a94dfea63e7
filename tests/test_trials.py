"""A study that several share: who counts, who is gone, and what is tried."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

import monai_unlearn
import monai_unlearn.trials
from monai_unlearn.trials import SharedStudy, optuna_module, shown_storage

SPACE = {"lr": FloatDistribution(1e-5, 1, log=True), "epochs": CategoricalDistribution([2, 5, 10])}


def _study(storage: Path | str, trials: int = 4, seed: int = 0, name: str = "study") -> SharedStudy:
    return SharedStudy(
        str(storage),
        name,
        trials=trials,
        space=SPACE,
        sampler=lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=2),
        pruner=optuna.pruners.NopPruner(),
        seed=seed,
    )


def _make(study: SharedStudy, most: int = 100) -> list[dict[str, Any]]:
    """Trials whose objective is that of a toy problem; returns what was tried."""
    tried = []
    while len(tried) < most and (trial := study.ask(wait=False)) is not None:
        tried.append(trial.params)
        study.end(trial, "complete", abs(trial.params["lr"] - 0.01))
    return tried


def test_as_many_trials_as_there_should_be_and_the_best_of_them(tmp_path: Path) -> None:
    study = _study(tmp_path / "deep" / "study.journal", 6)
    tried = _make(study)
    assert len(tried) == len(study.counted()) == 6
    assert study.ask() is None
    assert study.best().params == min(tried, key=lambda params: abs(params["lr"] - 0.01))


def test_the_first_of_equal_trials_is_the_best(tmp_path: Path) -> None:
    study = _study(tmp_path / "j", 3)
    for value in (0.5, 0.2, 0.2):
        study.end(study.ask(), "complete", value)
    assert study.best().number == 1


def test_pruned_and_failed_trials_count_and_are_never_the_best(tmp_path: Path) -> None:
    study = _study(tmp_path / "j", 3)
    trial = study.ask()
    trial.report(0.0, 1)
    study.end(trial, "pruned")
    study.end(study.ask(), "FloatingPointError")
    assert study.best() is None
    study.end(study.ask(), "complete", 7.0)
    assert study.ask() is None
    assert [trial.state for trial in study.counted()] == [TrialState.PRUNED, TrialState.FAIL, TrialState.COMPLETE]
    assert study.best().number == 2


@pytest.mark.parametrize("url", [False, True])
def test_what_is_tried_does_not_depend_on_a_stop_in_between(tmp_path: Path, url: bool) -> None:
    def storage(name: str) -> str:
        return f"sqlite:///{tmp_path}/{name}.db" if url else str(tmp_path / name)

    whole = _make(_study(storage("whole"), 4))
    parts = [_make(_study(storage("parts"), 4), most) for most in (1, 2, 9)]
    assert [len(part) for part in parts] == [1, 2, 1]
    assert [params for part in parts for params in part] == whole


def test_another_seed_tries_others(tmp_path: Path) -> None:
    assert _make(_study(tmp_path / "one", 2)) != _make(_study(tmp_path / "other", 2, seed=1))


def test_a_sampler_that_has_no_more_to_try_ends_the_search(tmp_path: Path) -> None:
    values = {"lr": [0.1, 0.01], "epochs": [1]}
    study = SharedStudy(
        str(tmp_path / "j"),
        "grid",
        trials=10,
        space={name: CategoricalDistribution(options) for name, options in values.items()},
        sampler=lambda seed: optuna.samplers.GridSampler(values),
        pruner=optuna.pruners.NopPruner(),
        seed=0,
    )
    assert sorted(params["lr"] for params in _make(study)) == [0.01, 0.1]
    assert [trial.state for trial in study.counted()] == 2 * [TrialState.COMPLETE]


def test_two_at_once_try_different_settings_and_share_the_number(tmp_path: Path) -> None:
    one, other = _study(tmp_path / "j"), _study(tmp_path / "j")
    one_started, other_started = one.ask(), None
    other._looked_at = other.all  # both are this process, which would take the other's trial for its own of before
    other_started = other.ask()
    assert one_started.params != other_started.params
    one.end(one_started, "complete", 1.0)
    other.end(other_started, "complete", 0.5)
    _make(one)
    assert len(one.counted()) == len(other.counted()) == 4
    assert one.best().number == other.best().number


def test_of_two_that_start_the_last_trial_at_once_the_later_steps_back(tmp_path: Path) -> None:
    one, other = _study(tmp_path / "j", 1), _study(tmp_path / "j", 1)
    first = one.ask()
    looks = iter([[], other.all()])  # as if the other had looked before the first trial was started
    other._looked_at = lambda: next(looks)
    assert other.ask(wait=False) is None
    one.end(first, "complete", 1.0)
    assert [trial.number for trial in one.counted()] == [0]
    assert one.all()[1].state == TrialState.FAIL


def test_waiting_for_a_trial_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = _study(tmp_path / "j", 1)
    trial = study.ask()
    monkeypatch.setattr(monai_unlearn.trials, "_is_gone", lambda trial: False)
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            study.end(trial, "complete", 1.0)

    monkeypatch.setattr(time, "sleep", sleep)
    assert _study(tmp_path / "j", 1).ask() is None
    assert len(waited) == 3


def test_a_trial_of_a_process_that_is_gone_does_not_count(tmp_path: Path) -> None:
    study = _study(tmp_path / "j", 2)
    left = study.ask()  # of this process, which asks again without having ended it: an interrupt
    assert len(_make(_study(tmp_path / "j", 2))) == 2
    states = {trial.number: trial.state for trial in study.all()}
    assert states[left.number] == TrialState.FAIL
    assert left.number not in [trial.number for trial in study.counted()]


def _running(worker: dict[str, Any] | None, seen: float | None = None, age: float = 0.0) -> SimpleNamespace:
    attributes = {name: value for name, value in (("worker", worker), ("seen", seen)) if value is not None}
    return SimpleNamespace(user_attrs=attributes, datetime_start=datetime.now() - timedelta(seconds=age))


def test_who_is_gone() -> None:
    gone, started = monai_unlearn.trials._is_gone, monai_unlearn.trials._started
    here, now = socket.gethostname(), time.time()
    parent = os.getppid()
    alive = {"host": here, "pid": parent, "started": started(parent)}
    assert not gone(_running(alive, age=1e6))
    assert gone(_running({**alive, "pid": os.getpid()}))
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert gone(_running({**alive, "pid": done.pid}))
    if alive["started"] is not None:  # Linux: the number was given to another process since
        assert gone(_running({**alive, "started": "1"}))
    elsewhere = {"host": "elsewhere", "pid": 1, "started": None}
    assert not gone(_running(elsewhere, seen=now - 60, age=1e6))
    assert gone(_running(elsewhere, seen=now - 3600))
    assert not gone(_running(None, age=1))
    assert gone(_running(None, age=3600))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux")
def test_a_killed_process_that_nobody_waited_for_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    worker = {"host": socket.gethostname(), "pid": child.pid, "started": monai_unlearn.trials._started(child.pid)}
    assert not monai_unlearn.trials._is_gone(_running(worker))
    child.kill()
    deadline = time.time() + 30
    while not monai_unlearn.trials._is_gone(_running(worker)) and time.time() < deadline:
        time.sleep(0.01)
    assert monai_unlearn.trials._is_gone(_running(worker))
    child.wait()


def test_studies_of_other_data_are_apart(tmp_path: Path) -> None:
    _make(_study(tmp_path / "j", 2))
    assert _study(tmp_path / "j", 2, name="other").all() == []


def _text(path: Path) -> str:
    path.write_text("This is no journal.\nIt is a letter.\n")
    return str(path)


@pytest.mark.parametrize(
    ("storage", "shown"),
    [
        (lambda folder: _text(folder / "letter.txt"), "letter.txt"),
        (lambda folder: "nosuch://user:secret@host/study", "nosuch:// database"),
    ],
)
def test_a_storage_that_is_none(
    tmp_path: Path, storage: Callable[[Path], str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match="storage should be a file for a journal") as caught:
        _study(storage(tmp_path))
    assert shown in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_folder_in_the_place_of_the_journal(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        _study(tmp_path)


def test_the_address_of_a_database_is_not_shown() -> None:
    assert shown_storage("postgresql://user:secret@host/study") == "postgresql:// database"
    assert shown_storage("runs/study.journal") == "runs/study.journal"


def test_nothing_but_a_search_needs_optuna() -> None:
    for path in Path(monai_unlearn.__file__).parent.rglob("*.py"):
        at_import = ast.parse(path.read_text(encoding="utf-8")).body  # what stands under TYPE_CHECKING is deeper
        names = [node.module for node in at_import if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in at_import if isinstance(node, ast.Import) for alias in node.names]
        assert not any(name and name.split(".")[0] == "optuna" for name in names), path


def test_optuna_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match="Optuna, which is not installed"):
        optuna_module()
