"""A progress bar that suits a terminal as well as a log file."""

from __future__ import annotations

import sys

from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar

__all__ = ["Progress"]


class Progress:
    """Ignite's progress bar: over the iterations on a terminal, and one line an epoch where the output is a file.

    Args:
        description: what is in progress.
    """

    def __init__(self, description: str) -> None:
        self.description = description

    def attach(self, engine: Engine) -> None:
        """Register on an engine's events."""
        if sys.stderr.isatty():
            ProgressBar(desc=self.description).attach(engine)
        else:
            bar = ProgressBar(
                desc=self.description, bar_format="{desc} {n_fmt}/{total_fmt} epochs [{elapsed}<{remaining}]\n"
            )
            bar.attach(engine, event_name=Events.EPOCH_COMPLETED, closing_event_name=Events.COMPLETED)
