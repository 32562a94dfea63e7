"""Trials that several processes, or machines, make together, and that go on after any of them was killed."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial

__all__ = ["SharedStudy", "optuna_module", "shown_storage"]

logger = logging.getLogger("monai_unlearn")

ABANDONED = 1800.0  # seconds without a sign of life, from which on a trial on another machine is given up
SIGN_OF_LIFE = 60.0  # seconds between two of them
BORN = 60.0  # seconds in which a new trial should have said whose it is
POLL = 1.0  # seconds between two looks at what others do
ENDED = "ended"  # attribute of a trial that came to an end by itself


def optuna_module() -> ModuleType:
    """Optuna, which is an extra of the package.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        return importlib.import_module("optuna")
    except ImportError:
        raise ValueError(
            "Tuning needs Optuna, which is not installed here. Install it with `pip install optuna`, or the package "
            "with its extra `tune`."
        ) from None


def shown_storage(storage: str) -> str:
    """A storage as logs and reports may show it: the address of a database may hold a password."""
    return f"{storage.partition('://')[0]}:// database" if "://" in storage else storage


class SharedStudy:
    """An Optuna study that is told to make a number of trials, whoever makes them.

    A trial counts if it came to an end: completed, pruned or failed. One whose process is gone does not; the next
    process that looks marks it, and another takes its place. Two processes that start the last trial at once are told
    apart by the trials' numbers: the later one steps back.

    Each trial has a sampler of its own, with a seed made from the study's and the trial's number. So what is tried
    does not depend on whether a study was stopped in between, and processes with one seed don't try the same.

    Args:
        storage: a file for Optuna's journal, or the address of a database (``sqlite:///study.db``).
        name: the study's name in it, by which trials of other data or settings are kept apart.
        trials: number of trials of all processes together, at least 1.
        space: setting → its distribution.
        sampler: makes a sampler from a seed.
        pruner: the pruner.
        seed: seed of the samplers.

    Raises:
        ValueError: if Optuna is not installed, or the storage can't be opened.
        OSError: if the journal can't be written.
    """

    def __init__(
        self,
        storage: str,
        name: str,
        *,
        trials: int,
        space: Mapping[str, BaseDistribution],
        sampler: Callable[[int], BaseSampler],
        pruner: BasePruner,
        seed: int,
    ) -> None:
        optuna = optuna_module()
        self.trials, self._space, self._states = trials, dict(space), optuna.trial.TrialState
        self._through = False

        def stop() -> None:
            self._through = True

        with quiet():
            self.study: Study = _opened(
                optuna, storage, name, sampler=_reseeded(optuna, sampler, seed, stop), pruner=pruner
            )

    def ask(self, wait: bool = True) -> Trial | None:
        """The next trial that is to be made here, or None if there is none left, or the sampler has no more to try.

        Args:
            wait: where all that are left are at work elsewhere, wait for them, since one may be killed.
        """
        told = False
        while not self._through:
            trials = self._looked_at()
            at_work = [trial for trial in trials if trial.state == self._states.RUNNING]
            if len(self.counted(trials)) + len(at_work) < self.trials:
                with quiet():
                    trial = self.study.ask(fixed_distributions=self._space)
                    trial.set_user_attr("worker", _myself())
                    trial.set_user_attr("seen", time.time())
                    if self._is_surplus(trial.number):
                        self.study.tell(trial, state=self._states.FAIL)
                        continue
                return trial
            if not at_work or not wait:
                return None
            if not told:
                logger.info("Waiting for %d trials in other processes", len(at_work))
                told = True
            time.sleep(POLL)
        return None

    def end(self, trial: Trial, how: str, value: float | None = None) -> None:
        """A trial came to an end.

        Args:
            trial: the trial.
            how: ``"complete"``, ``"pruned"``, or what error it failed by.
            value: the objective of a complete one.
        """
        states = {"complete": self._states.COMPLETE, "pruned": self._states.PRUNED}
        with quiet():
            trial.set_user_attr(ENDED, how)
            self.study.tell(trial, value, state=states.get(how, self._states.FAIL))

    def all(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self.study.get_trials(deepcopy=False)

    def counted(self, trials: list[FrozenTrial] | None = None) -> list[FrozenTrial]:
        """The trials that came to an end."""
        return [
            t for t in (self.all() if trials is None else trials) if t.state.is_finished() and ENDED in t.user_attrs
        ]

    def best(self) -> FrozenTrial | None:
        """The complete trial with the smallest objective, the first of several; None without one."""
        complete = [trial for trial in self.counted() if trial.state == self._states.COMPLETE]
        return min(complete, key=lambda trial: (trial.value, trial.number), default=None)

    def _looked_at(self) -> list[FrozenTrial]:
        """All trials, after those whose process is gone were given up."""
        for trial in self.all():
            if trial.state == self._states.RUNNING and _is_gone(trial):
                with quiet():
                    self.study.tell(trial.number, state=self._states.FAIL, skip_if_finished=True)
                logger.info("Trial %d was left by a process that is gone: it does not count", trial.number + 1)
        return self.all()

    def _is_surplus(self, number: int) -> bool:
        trials = [trial for trial in self.all() if trial.number < number]
        at_work = sum(trial.state == self._states.RUNNING for trial in trials)
        return len(self.counted(trials)) + at_work >= self.trials


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's own lines, for which this package has its own, and its warnings of what is experimental."""
    optuna = optuna_module()
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _opened(optuna: ModuleType, storage: str, name: str, **options: Any) -> Study:
    try:
        return optuna.create_study(
            study_name=name, storage=_storage(optuna, storage), direction="minimize", load_if_exists=True, **options
        )
    except OSError:
        raise
    except Exception as error:  # each kind of database has its own
        raise ValueError(
            f"storage should be a file for a journal, or the address of a database, but {shown_storage(storage)!r} "
            f"can't be opened as one ({type(error).__name__}). Name another with --storage."
        ) from None


def _storage(optuna: ModuleType, storage: str) -> BaseStorage:
    local = storage.startswith("sqlite:///")
    file = Path(storage.removeprefix("sqlite:///") if local else storage)
    if local or "://" not in storage:
        file.parent.mkdir(parents=True, exist_ok=True)
    if "://" in storage:
        options = {"connect_args": {"timeout": 120}} if local else None
        for _ in range(3):  # two processes may make the tables at once
            try:
                return optuna.storages.RDBStorage(storage, engine_kwargs=options)
            except Exception:
                time.sleep(POLL)
        return optuna.storages.RDBStorage(storage, engine_kwargs=options)
    journal = optuna.storages.journal
    lock = journal.JournalFileOpenLock(str(file)) if os.name == "nt" else None  # links are for administrators there
    return optuna.storages.JournalStorage(journal.JournalFileBackend(str(file), lock_obj=lock))


def _reseeded(
    optuna: ModuleType, build: Callable[[int], BaseSampler], seed: int, stop: Callable[[], None]
) -> BaseSampler:
    """A sampler that is made anew for each trial, with a seed of the trial's own; it may stop the search."""

    class Stoppable:
        """A study as a sampler sees it: Optuna's own can be stopped within its loop only, and a grid stops it."""

        def __init__(self, study: Study) -> None:
            self._study = study

        def __getattr__(self, name: str) -> Any:
            return stop if name == "stop" else getattr(self._study, name)

    class Reseeded(optuna.samplers.BaseSampler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self._inner = build(seed)

        def before_trial(self, study: Study, trial: FrozenTrial) -> None:
            self._inner = build(int(np.random.SeedSequence([seed, trial.number]).generate_state(1)[0]))
            self._inner.before_trial(study, trial)

        def infer_relative_search_space(self, *args: Any) -> Any:
            return self._inner.infer_relative_search_space(*args)

        def sample_relative(self, *args: Any) -> Any:
            return self._inner.sample_relative(*args)

        def sample_independent(self, *args: Any) -> Any:
            return self._inner.sample_independent(*args)

        def after_trial(self, study: Study, *args: Any) -> None:
            self._inner.after_trial(cast(Any, Stoppable(study)), *args)

    return Reseeded()


def _myself() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """When a process was started, in ticks since the machine was: another one may get the same number later."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        return None


def _is_gone(trial: FrozenTrial) -> bool:
    """Whether the process of a running trial is not there any more. None of this process is running when it asks."""
    worker = trial.user_attrs.get("worker")
    begun = 0.0 if trial.datetime_start is None else trial.datetime_start.timestamp()
    if worker is None:
        return time.time() - begun > BORN
    if worker["host"] != socket.gethostname():
        return time.time() - trial.user_attrs.get("seen", begun) > ABANDONED
    if worker["pid"] == os.getpid():
        return True
    try:
        os.kill(worker["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return _started(worker["pid"]) != worker["started"]
