"""What a study's processes do: train the models that runs share, make the runs, hand back their rows."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import monai.bundle
import torch

from monai_unlearn.auditing import audited_figures, without_pages
from monai_unlearn.bundle import Bundle, bundle_path, unwrapped
from monai_unlearn.checkpoint import load_checkpoint
from monai_unlearn.cost import Cost
from monai_unlearn.output import is_run
from monai_unlearn.provenance import machine
from monai_unlearn.report import build_report
from monai_unlearn.run import Run, refuse_near_chance, remembered_outputs
from monai_unlearn.study.plan import NOTHING, Group, Plan, PlannedRun
from monai_unlearn.study.table import figures_of, floors_of
from monai_unlearn.training import TrainedModel, train_model

__all__ = ["Done", "Work", "failed_row", "serve"]

logger = logging.getLogger("monai_unlearn")

LONGEST = 300  # characters of an error in the table
Send = Callable[["Done"], None]


@dataclass(frozen=True)
class Work:
    """A piece of work for a process.

    Args:
        plan: the study.
        commit: version of the code.
        seed: seed of the original to be trained; the group is None then.
        group: the group whose runs are to be made.
        cells: which of its runs.
    """

    plan: Plan
    commit: str
    seed: int
    group: Group | None = None
    cells: tuple[PlannedRun, ...] = ()

    def __str__(self) -> str:
        return f"original, seed {self.seed}" if self.group is None else str(self.group)


@dataclass(frozen=True)
class Done:
    """What a process has to say.

    Args:
        what: ``original``, ``retrained`` (models are ready), ``started`` or ``run``; ``end`` when a piece of work is
            done, whether it failed or not.
        seconds: how long that took.
        row: the row of a run.
        key: name of the run.
        error: what went wrong with an original or retrained models.
    """

    what: str
    seconds: float = 0.0
    row: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    error: str = ""


def serve(connection: Connection, log: Path, threads: int) -> None:
    """Do what comes through a connection until it is closed, or SIGTERM asks to stop.

    Args:
        connection: gives ``Work`` and takes ``Done``.
        log: file for all that is printed.
        threads: threads of PyTorch.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches all; the study tells us in its turn
    signal.signal(signal.SIGTERM, _interrupt)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1, encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["study"]  # errors are to be raised here, not to end the process with their message
    torch.set_num_threads(threads)
    try:
        with remembered_outputs(), without_pages():
            while True:
                _do(connection.recv(), connection.send)
                connection.send(Done("end"))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # the study has ended, or is to end


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _do(work: Work, send: Send) -> None:
    started = time.perf_counter()
    if work.group is None:
        try:
            bundle = _bundle(work, forget_fraction=0.1, overlap="keep")
            run = Run.start(bundle)
            if run.settings["original_checkpoint"] is None:
                folder = run.model_folder(work.seed, forget=False)
                train_model(bundle, folder, work.seed, None, "original")
        except Exception as error:
            send(Done("original", error=_message(error, ())))
        else:
            send(Done("original", time.perf_counter() - started))
        return
    yardsticks: dict[int | None, _Yardstick] = {}
    try:
        shared = _Yardstick.of(work, work.group.pooled)
    except Exception as error:
        send(Done("retrained", error=_message(error, ())))
        return
    send(Done("retrained", time.perf_counter() - started))
    for cell in work.cells:
        send(Done("started", key=cell.key))
        started = time.perf_counter()
        try:
            if cell.method == NOTHING:
                request = cell.request
                if request is not None and request not in yardsticks:
                    yardsticks[request] = _Yardstick.of(work, work.group.requests[request], shared.models)
                figures = (shared if request is None else yardsticks[request]).of_original()
                row = {"settings": "{}", "device": shared.device, **figures}
            else:
                row = _run(work, cell, shared)
            row = {**identity_of(work, cell), **row, **shared.floors(cell)}
        except Exception as error:
            row = failed_row(work, cell, _message(error, shared.hidden))
        send(Done("run", time.perf_counter() - started, row, cell.key))


def identity_of(work: Work, cell: PlannedRun) -> dict[str, Any]:
    """The columns that say what was asked for."""
    group = work.group
    return {
        "data": work.plan.data_name,
        "method": cell.method,
        "tuned": cell.tuned,
        "kind": group.kind if group else None,
        "fraction": group.fraction if group else None,
        "seed": work.seed,
        "request": cell.request,
        "options": json.dumps(cell.options, sort_keys=True, default=str),
        "key": cell.key,
        "commit": work.commit,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def failed_row(work: Work, cell: PlannedRun, error: str) -> dict[str, Any]:
    """The row of a run that failed."""
    return {**identity_of(work, cell), "settings": "{}", "error": error}


def _bundle(work: Work, **settings: Any) -> Bundle:
    """The bundle of data and recipe, by which original and retrained models are trained."""
    plan = work.plan
    given = {**plan.base_settings, **_given(work), **settings}
    return Bundle.from_files(plan.base, **given)


def _given(work: Work) -> dict[str, Any]:
    """What the study gives each run."""
    settings = work.plan.settings
    return {
        "seed": work.seed,
        "models_dir": settings["models_dir"],
        "reference_models": settings["reference_models"],
        "reference_seed": work.plan.first_reference(work.seed),
    }


class _Yardstick:
    """Original and retrained models, evaluated on one forget set and the others."""

    def __init__(self, run: Run, models: Sequence[TrainedModel] | None) -> None:
        self.run = run
        self.hidden = run.hidden_names()
        self.device = machine(run.device)["device"]
        path, checkpoint = run.original()
        evaluator, network = run.bundle.build("evaluator", "network")
        checkpoint.load_into(network)
        self.original = run.evaluate(evaluator, network)
        refuse_near_chance(self.original, run.data.num_classes, run.data.multi_label, path)
        self.models = run.retrained() if models is None else models  # only now, as it takes long
        self.retrained = []
        for model in self.models:
            load_checkpoint(model.path).load_into(network)
            self.retrained.append(run.evaluate(evaluator, network))
        self._floors: dict[str, float | None] | None = None

    @classmethod
    def of(cls, work: Work, request: str, models: Sequence[TrainedModel] | None = None) -> _Yardstick:
        """Evaluate the models on a request's forget set; the retrained ones are trained unless they are given."""
        return cls(Run.start(_bundle(work, forget_request=request)), models)

    def of_original(self) -> dict[str, Any]:
        """The figures of the untouched original, as if it were the result of a method that costs nothing."""
        return self._row(self.original, self.retrained)

    def floors(self, cell: PlannedRun) -> dict[str, Any]:
        """What the retrained models differ by; of a single patient only on images of others."""
        if self._floors is None:
            others = [self._row(one, [other for other in self.retrained if other is not one]) for one in self.retrained]
            figures = [{split: result.as_dict() for split, result in one.items()} for one in self.retrained]
            self._floors = floors_of(figures, others)
        if cell.request is None:
            return self._floors
        return {name: value for name, value in self._floors.items() if "forget" not in name and "attack" not in name}

    def _row(self, outputs: Mapping[str, Any], yardstick: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        results: dict[str, Sequence[Any]] = {"original": [self.original], "unlearned": [outputs]}
        results["retrained"] = yardstick
        figures, audit = audited_figures(self.run, results)
        report = build_report(
            method=NOTHING,
            settings={},
            models=figures,
            cost={"unlearn": Cost(), "retrain": self.models[0].cost},
            provenance={},
            task="multi-label" if self.run.data.multi_label else "multi-class",
            request=self.run.split.request,
            audit=audit,
        )
        return figures_of(report)


def _run(work: Work, cell: PlannedRun, shared: _Yardstick) -> dict[str, Any]:
    """Make a run, as a user would, and read its report."""
    settings = work.plan.settings
    # Versions of the code lie apart: what one has begun (the trials of a search) another should not go on with.
    version = hashlib.sha256(work.commit.encode()).hexdigest()[:8]
    folder = Path(settings["output_dir"]) / "runs" / f"{cell.key}-{version}"
    single = cell.request is not None
    request = work.group.requests[cell.request or 0] if work.group else ""
    given = {**cell.settings, **_given(work), "forget_request": request, "reference": not single}
    _forget_earlier(folder)
    monai.bundle.run("tune" if cell.tuned else "unlearn", config_file=list(cell.files), output_dir=str(folder), **given)
    report = _report(folder)
    retrain = None
    if single:
        # The retrained models never saw any of the single patients, so they are no run's own: the audit takes them.
        audit = folder.with_name(f"{folder.name}-audit")
        _forget_earlier(audit)
        monai.bundle.run(
            "audit",
            config_file=str(bundle_path("audit")),
            run=str(folder),
            retrained=[str(model.path) for model in shared.models],
            relearn_epochs=0,
            device=str(shared.run.device),
            output_dir=str(audit),
        )
        audited = _report(audit)
        audited["settings"] = report["settings"]
        shutil.copy(audit / "report.json", folder / "audit.json")
        shutil.rmtree(audit)
        report, retrain = audited, shared.models[0].cost.as_dict()
    if not settings["keep_models"]:
        for path in folder.glob("*.pt"):
            path.unlink()
        shutil.rmtree(folder / "private", ignore_errors=True)
    return {
        "settings": json.dumps(_without_paths(report["settings"]), sort_keys=True),
        "device": report["provenance"]["machine"]["device"],
        **figures_of(report, retrain),
    }


def _forget_earlier(folder: Path) -> None:
    """Remove a run of ours that the table does not have: the study ended before its row was written."""
    if is_run(folder):
        shutil.rmtree(folder)


def _report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def _without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    ends = ("_file", "_dir", "_checkpoint", "_indices", "_patients", "_request", "storage")
    return {name: value for name, value in settings.items() if not name.endswith(ends) and value is not None}


def _message(error: BaseException, hidden: Collection[str]) -> str:
    """Type and message of an error, without names and folders."""
    raised = unwrapped(error)
    logger.error("%s", raised, exc_info=raised)  # the process's own log says where
    text = " ".join(str(raised).split())
    text = re.sub(r"(?:[A-Za-z]:)?[/\\][^\s'\"]*[/\\]", "…/", text)
    for name in hidden:
        text = text.replace(name, "…")
    return f"{type(raised).__name__}: {text}"[:LONGEST]
