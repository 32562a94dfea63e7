"""A progress bar that suits a terminal as well as a log file."""

from __future__ import annotations

import os
import sys
import time

from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from tqdm import tqdm

__all__ = ["Progress", "on_terminal"]


def on_terminal() -> bool:
    """Whether the progress is shown on a terminal; one that has no width (in some containers) shows no bar."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


class Progress:
    """Ignite's progress bar: over the iterations on a terminal, and one line an epoch where the output is a file.

    Args:
        description: what is in progress.
    """

    def __init__(self, description: str) -> None:
        self.description = description
        self._started = 0.0

    def attach(self, engine: Engine) -> None:
        """Register on an engine's events."""
        if on_terminal():
            ProgressBar(desc=self.description).attach(engine)
        else:  # Ignite's bar writes some epochs twice there, and short ones not at all
            engine.add_event_handler(Events.STARTED, self._start)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._write_line)

    def _start(self, engine: Engine) -> None:
        self._started = time.perf_counter()

    def _write_line(self, engine: Engine) -> None:
        line = tqdm.format_meter(
            engine.state.epoch,
            engine.state.max_epochs,
            time.perf_counter() - self._started,
            bar_format=self.description + " {n_fmt}/{total_fmt} epochs [{elapsed}<{remaining}]",
        )
        print(line, file=sys.stderr, flush=True)
