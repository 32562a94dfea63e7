"""The command ``study``: many runs of many methods, in several processes, into one table."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from monai_unlearn.bundle import Bundle, readable_errors
from monai_unlearn.handlers import on_terminal
from monai_unlearn.study.plan import Group, Plan, PlannedRun, make_plan
from monai_unlearn.study.table import Table, code_version
from monai_unlearn.study.worker import Done, Work, failed_row, serve

__all__ = ["study"]

logger = logging.getLogger("monai_unlearn")

MARKER = "private/.study"  # a folder with this file is a study's
PATIENCE = 60  # seconds that processes have to clear up
LISTS = ("methods", "parts", "kinds", "fractions", "seeds", "tuned", "options")


def study(bundle: Bundle) -> None:
    """Run methods × kinds and sizes of forget set × seeds, and add a row for each run to a table; see docs/study.md.

    Args:
        bundle: the running bundle.
    """
    with readable_errors():
        settings = {**bundle.settings(), **{name: bundle.config[name] for name in LISTS}}
        output = Path(settings["output_dir"])
        table = Table(Path(settings["results_file"] or output / "study.csv"))
        _check_output(output)
        plan = make_plan(settings, output / "private")
        (output / MARKER).touch()
        commit = settings["commit"] or code_version()
        finished = table.finished()
        pieces = []
        for group in plan.groups:
            cells = tuple(cell for cell in group.cells if (cell.key, commit) not in finished)
            if cells:
                pieces.append(Work(plan, commit, group.seed, group, cells))
        total = sum(len(group.cells) for group in plan.groups)
        logger.info(
            "%s: %d forget %s and %d runs, the untouched original's among them, of which %d are in %s already",
            plan.data_name,
            len(plan.groups),
            "set" if len(plan.groups) == 1 else "sets",
            total,
            total - sum(len(piece.cells) for piece in pieces),
            table.path.name,
        )
        failed = _Study(pieces, table, plan).run() if pieces else 0
        if failed:
            logger.warning(
                "%d of the runs failed: column error of %s says why. The same command tries them again.",
                failed,
                table.path,
            )
        else:
            logger.info("All runs are in %s", table.path)


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output_dir should be a folder, but {str(output)!r} is a file. Choose another.")
    if output.is_dir() and any(output.iterdir()) and not (output / MARKER).is_file():
        raise FileExistsError(
            f"output_dir {str(output)!r} holds files that no study wrote. Choose another folder with --output_dir."
        )
    try:
        (output / MARKER).parent.mkdir(parents=True, exist_ok=True)
        (output / MARKER).touch()
    except OSError as error:
        raise PermissionError(
            f"output_dir {str(output)!r} can't be written ({error.strerror}). Choose another with --output_dir."
        ) from error


def shares_of(cores: int, pieces: int, workers: int | None) -> tuple[int, int]:
    """Number of processes, and threads of each.

    Args:
        cores: cores of this machine.
        pieces: pieces of work that can go on side by side.
        workers: processes that the user wants; None: one a core.
    """
    workers = max(1, min(cores if workers is None else workers, pieces))
    return workers, max(1, cores // workers)


@dataclass
class _Worker:
    """A process, and what it is at."""

    process: BaseProcess
    connection: Connection
    work: Work | None = None
    left: list[PlannedRun] = field(default_factory=list)
    started: bool = False  # whether the first of those left has been begun


class _Study:
    """The work of a study, handed out to processes."""

    def __init__(self, pieces: Sequence[Work], table: Table, plan: Plan) -> None:
        self.table, self.plan = table, plan
        self.commit = pieces[0].commit
        self.groups = list(pieces)
        self.originals = [Work(plan, self.commit, seed) for seed in dict.fromkeys(piece.seed for piece in pieces)]
        self.ready: set[int] = set()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.number, self.threads = shares_of(cores, len(pieces), plan.settings["workers"])
        self.workers: list[_Worker] = []
        self.failed = 0
        self.progress = _Progress(
            {"original": len(self.originals), "retrained": len(pieces), "run": sum(len(p.cells) for p in pieces)},
            self.number,
        )

    def run(self) -> int:
        """Do all of it; returns how many runs failed."""
        # A new interpreter each: what a fork would take over of PyTorch's threads and of a GPU does not work in it.
        context = multiprocessing.get_context("spawn")
        try:
            with _interrupted_by_sigterm():
                self.workers = [self._start(context, number) for number in range(self.number)]
                while self._hand_out():
                    busy = {worker.connection: worker for worker in self.workers if worker.work is not None}
                    for connection in wait(list(busy)):
                        worker = busy[connection]  # type: ignore[index]
                        try:
                            self._take(worker, worker.connection.recv())
                        except (EOFError, ConnectionResetError):
                            self._replace(context, worker)
        except KeyboardInterrupt:
            logger.warning("Interrupted: the runs that are finished are kept, the same command goes on from there.")
            raise SystemExit(130) from None
        finally:
            self._stop()
            self.progress.close()
        return self.failed

    def _start(self, context: Any, number: int) -> _Worker:
        ours, theirs = context.Pipe()
        log = Path(self.plan.settings["output_dir"]) / "logs" / f"process-{number + 1}.log"
        process = context.Process(target=serve, args=(theirs, log, self.threads), daemon=False)
        with _threads(self.threads):
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def _hand_out(self) -> bool:
        """Give work to those who have none; whether anybody has any."""
        for worker in self.workers:
            if worker.work is None:
                work = self._next()
                if work is not None:
                    worker.work, worker.left, worker.started = work, list(work.cells), False
                    worker.connection.send(work)
        return any(worker.work is not None for worker in self.workers)

    def _next(self) -> Work | None:
        if self.originals:
            return self.originals.pop(0)
        for i, piece in enumerate(self.groups):
            if piece.seed in self.ready:
                return self.groups.pop(i)
        return None

    def _take(self, worker: _Worker, done: Done) -> None:
        """Take note of what a process says."""
        work = worker.work
        if work is None or done.what == "end":
            worker.work = None
        elif done.what == "started":
            worker.started = True
        elif done.what == "run":
            cell = next(cell for cell in worker.left if cell.key == done.key)
            worker.left.remove(cell)
            worker.started = False
            self.table.add([done.row])
            self.failed += bool(done.row.get("error"))
            self.progress.step("run", done.seconds, _sentence(work.group, cell, done))
        elif done.what == "original":
            self.ready.add(work.seed)
            self.progress.step("original", done.seconds, f"original, seed {work.seed}{_error(done.error)}")
            if done.error:
                for piece in [piece for piece in self.groups if piece.seed == work.seed]:
                    self.groups.remove(piece)
                    self.progress.step("retrained", 0, "")
                    self._fail(piece, piece.cells, done.error)
        else:
            self.progress.step("retrained", done.seconds, f"retrained models, {work}{_error(done.error)}")
            if done.error:
                self._fail(work, worker.left, done.error)
                worker.left = []

    def _fail(self, work: Work, cells: Sequence[PlannedRun], error: str) -> None:
        self.table.add([failed_row(work, cell, error) for cell in cells])
        self.failed += len(cells)
        for _ in cells:
            self.progress.step("run", 0, "")

    def _replace(self, context: Any, worker: _Worker) -> None:
        """Go on after a process has died: the run that it was at failed, a new process makes those after it."""
        worker.process.join()
        error = f"the process ended with exit code {worker.process.exitcode}: killed, or out of memory"
        work, left = worker.work, worker.left
        number = self.workers.index(worker)
        self.workers[number] = self._start(context, number)
        if work is None:
            return
        if work.group is None:
            self._take(worker, Done("original", error=error))
        elif not worker.started:
            self._take(worker, Done("retrained", error=error))
        else:
            self._fail(work, left[:1], error)
            if left[1:]:
                self.progress.total["retrained"] += 1
                self.groups.insert(0, Work(work.plan, work.commit, work.seed, work.group, tuple(left[1:])))

    def _stop(self) -> None:
        """End the processes, and wait until they have cleared up."""
        for worker in self.workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join(PATIENCE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """NumPy and scikit-learn read their number of threads when they are imported."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(number)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """A batch system's SIGTERM is to stop the processes too."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _sentence(group: Group | None, cell: PlannedRun, done: Done) -> str:
    name = cell.method + (" (tuned)" if cell.tuned else "")
    number = "" if cell.request is None else f", patient {cell.request + 1}"
    gap = done.row.get("gap")
    result = "" if gap is None else f": gap {gap:.1f} points"
    return f"{name}, {group}{number}{result}{_error(done.row.get('error', ''))}"


def _error(error: str) -> str:
    return f": FAILED, {error}" if error else ""


class _Progress:
    """How far it is, and how much longer it takes: from what each kind of work has taken so far."""

    def __init__(self, total: dict[str, int], workers: int) -> None:
        self.total, self.workers = total, workers
        self.seconds: dict[str, list[float]] = {name: [] for name in total}
        self._began = time.perf_counter()
        self._bar = tqdm(total=total["run"], desc="study", unit="run") if on_terminal() else None

    def step(self, what: str, seconds: float, sentence: str) -> None:
        """One piece of work is done."""
        self.seconds[what].append(seconds)
        runs = len(self.seconds["run"])
        # Before anything has taken its time there is nothing to reckon with.
        seconds_left = self.left()
        known = seconds_left > 0 or runs == self.total["run"]
        left = f"about {tqdm.format_interval(seconds_left)}" if known else "?"
        if self._bar is not None:
            if sentence:
                self._bar.write(sentence, file=sys.stderr)
            self._bar.n = runs
            self._bar.set_postfix_str(f"{left} left")
        elif sentence:
            elapsed = tqdm.format_interval(time.perf_counter() - self._began)
            logger.info("%d/%d runs [%s, %s left] %s", runs, self.total["run"], elapsed, left, sentence)

    def left(self) -> float:
        """Seconds to go, if all goes on as it went; kinds of which none is done yet count nothing."""
        seconds = 0.0
        for what, done in self.seconds.items():
            known = [value for value in done if value > 0]
            if known:
                seconds += (self.total[what] - len(done)) * sum(known) / len(known)
        return seconds / self.workers

    def close(self) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.close()
