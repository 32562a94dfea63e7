"""Runs of MONAI's own command, stopped in the middle."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from bundle_runs import TINY, Workplace, files_below, unfinished_below

from monai_unlearn.bundle import bundle_path

pytest_plugins = ["bundle_runs"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX systems"),
]

ENDLESS = 100_000  # epochs: the run is always stopped in their midst
PATIENCE = 120  # seconds to wait for a line: far more than a busy machine needs


def _only_default_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background of a shell ignores it


class Run:
    """A process of ``python -m monai.bundle run``, and what it prints."""

    def __init__(self, workplace: Workplace, run_id: str, **settings: Any) -> None:
        config = bundle_path("train" if run_id == "train" else "saliency")
        own = {} if run_id == "train" else {"reference_models": 1}
        given = {**TINY, "dataset_file": workplace.data, **own, **settings}
        options = [part for key, value in given.items() for part in (f"--{key}", str(value).replace(" ", ""))]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", str(config), *options],
            cwd=workplace.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=_only_default_interrupt,
        )
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            self._queue.put(line)
        self._queue.put(None)

    def wait_for(self, text: str) -> None:
        """Return as soon as a line with this text is printed."""
        while True:
            line = self._queue.get(timeout=PATIENCE)
            if line is None:
                raise AssertionError(f"ended without {text!r}:\n{''.join(self.lines)}")
            self.lines.append(line)
            if text in line:
                return

    def stop(self, number: int) -> str:
        """Send a signal; returns all that was printed."""
        self.process.send_signal(number)
        self.process.wait(timeout=PATIENCE)
        self._reader.join(timeout=PATIENCE)
        while (line := self._queue.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
        return "".join(self.lines)


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    """The processes that a test started; none outlives it."""
    started: list[Run] = []
    yield started
    for run in started:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


def _hidden(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.is_dir()]


def test_an_interrupt_during_unlearning_leaves_only_what_was_there(workplace: Workplace, runs: list[Run]) -> None:
    before = files_below(workplace.folder)
    original = str(workplace.kept()["original"])
    run = Run(workplace, "unlearn", epochs=ENDLESS, original_checkpoint=original)
    runs.append(run)
    run.wait_for(f"/{ENDLESS} epochs")
    assert [path.name.startswith(".saliency.part-") for path in _hidden(workplace.folder)] == [True]

    printed = run.stop(signal.SIGINT)

    assert run.process.returncode not in (0, None)
    assert "Wrote" not in printed
    assert files_below(workplace.folder) == before
    assert not _hidden(workplace.folder)
    assert not (workplace.folder / "runs" / "saliency").exists()

    output = workplace.unlearn(original_checkpoint=original)
    assert (output / "unlearned_model.pt").is_file()


def test_an_interrupt_keeps_the_output_of_the_run_before(workplace: Workplace, runs: list[Run]) -> None:
    workplace.unlearn()
    before = files_below(workplace.folder)
    run = Run(workplace, "unlearn", epochs=ENDLESS, reference="false")
    runs.append(run)
    run.wait_for(f"/{ENDLESS} epochs")
    run.stop(signal.SIGINT)
    assert run.process.returncode not in (0, None)
    assert files_below(workplace.folder) == before
    assert not _hidden(workplace.folder)


def test_after_a_kill_during_unlearning_the_next_run_works_and_clears_up(workplace: Workplace, runs: list[Run]) -> None:
    before = files_below(workplace.folder)
    run = Run(workplace, "unlearn", epochs=ENDLESS)
    runs.append(run)
    run.wait_for(f"/{ENDLESS} epochs")
    run.stop(signal.SIGKILL)
    assert run.process.returncode == -signal.SIGKILL
    (left,) = _hidden(workplace.folder)
    assert left.name.startswith(".saliency.part-")
    assert files_below(left)  # the saliency mask: a function of the forgotten images
    assert not (workplace.folder / "runs" / "saliency").exists()
    assert {path: sha for path, sha in files_below(workplace.folder).items() if left.name not in path} == before
    # What a run that is still at work has there is not to be touched.
    at_work = left.with_name(left.name.rsplit("-", 1)[0] + f"-{os.getppid()}")
    shutil.copytree(left, at_work)

    output = workplace.unlearn()

    assert (output / "unlearned_model.pt").is_file()
    assert not left.exists()
    assert _hidden(workplace.folder) == [at_work]


def test_after_a_kill_during_training_the_next_run_works(empty_workplace: Workplace, runs: list[Run]) -> None:
    before = files_below(empty_workplace.folder)
    run = Run(empty_workplace, "train", train_epochs=ENDLESS)
    runs.append(run)
    run.wait_for(f"/{ENDLESS} epochs")
    run.stop(signal.SIGKILL)
    assert files_below(empty_workplace.folder) == before
    with pytest.raises(RuntimeError):  # what was interrupted is no model
        empty_workplace.unlearn(train_epochs=ENDLESS)

    empty_workplace.train()
    output = empty_workplace.unlearn(reference=False)
    assert (output / "unlearned_model.pt").is_file()
    assert not unfinished_below(empty_workplace.folder)
    assert not _hidden(empty_workplace.folder)
