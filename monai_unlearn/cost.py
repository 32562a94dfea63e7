"""What work cost: seconds, samples and passes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

__all__ = ["Cost", "seconds_of", "synchronize"]


@dataclass
class Cost:
    """Cost of a piece of work.

    Args:
        seconds: wall-clock time.
        samples: samples processed, counted each time.
        forward: forward passes of one sample.
        backward: backward passes of one sample.
    """

    seconds: float = 0.0
    samples: int = 0
    forward: int = 0
    backward: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds,
            self.samples + other.samples,
            self.forward + other.forward,
            self.backward + other.backward,
        )

    def as_dict(self) -> dict[str, float | int]:
        """The figures by name, seconds rounded to a millisecond."""
        return {**asdict(self), "seconds": round(self.seconds, 3)}


def synchronize(device: torch.device | str | None) -> None:
    """Wait for a GPU to finish, so that a clock read next to it tells the truth."""
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def seconds_of(cost: Cost, device: torch.device | str | None) -> Iterator[Cost]:
    """Add the wall-clock time of the block, device included, to a cost."""
    synchronize(device)
    start = time.perf_counter()
    yield cost
    synchronize(device)
    cost.seconds += time.perf_counter() - start
