"""What work cost: seconds, samples, passes and memory."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

__all__ = ["Cost", "PeakMemory", "larger", "seconds_of", "synchronize"]

# Linux's own: the most memory that this process had at once, and what sets it back to what it has now.
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """Cost of a piece of work.

    Args:
        seconds: wall-clock time.
        samples: samples processed, counted each time.
        forward: forward passes of one sample.
        backward: backward passes of one sample.
        peak_bytes: most memory at once, what was there before included: of the GPU, as PyTorch allocated it, or of
            this process (without loader's workers) on the CPU; None where it can't be measured.
    """

    seconds: float = 0.0
    samples: int = 0
    forward: int = 0
    backward: int = 0
    peak_bytes: int | None = None

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds,
            self.samples + other.samples,
            self.forward + other.forward,
            self.backward + other.backward,
            larger(self.peak_bytes, other.peak_bytes),
        )

    def as_dict(self) -> dict[str, float | int | None]:
        """The figures by name, seconds rounded to a millisecond."""
        return {**asdict(self), "seconds": round(self.seconds, 3)}


def larger(one: int | None, other: int | None) -> int | None:
    """The larger of two peaks, of which either may be unknown."""
    return max((peak for peak in (one, other) if peak is not None), default=None)


class PeakMemory:
    """Measure the most memory at once between ``start`` and ``stop``, also where others measure within or around.

    The system keeps one high-water mark for all, and a start sets it back. So at each start and stop, what the mark
    has reached by then is noted for all that measure on the same device.

    Args:
        device: whose memory; None is the CPU.
    """

    def __init__(self, device: torch.device | str | None) -> None:
        self.device = _indexed(device)
        self.bytes: int | None = None
        self._known = False

    def start(self) -> None:
        """Begin anew."""
        self._note()
        self.bytes, self._known = None, _set_back(self.device)
        _measuring.add(self)

    def stop(self) -> int | None:
        """End, and return the peak in bytes; None where it can't be measured, or nothing was started."""
        if self in _measuring:
            self._note()
            _measuring.discard(self)
        return self.bytes

    def _note(self) -> None:
        here = [other for other in _measuring if other.device == self.device]
        mark = _high_water(self.device) if any(other._known for other in here) else None
        for other in here:
            other.bytes = larger(other.bytes, mark) if other._known else None


# Those that have started; weakly, since an error may keep one from its stop.
_measuring: weakref.WeakSet[PeakMemory] = weakref.WeakSet()


def _indexed(device: torch.device | str | None) -> torch.device:
    """The device with its number, so that ``cuda`` and ``cuda:0`` are one."""
    device = torch.device("cpu" if device is None else device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _high_water(device: torch.device) -> int | None:
    """The high-water mark in bytes, or None."""
    try:
        if device.type == "cuda" and torch.cuda.is_available():
            return torch.cuda.max_memory_allocated(device)
        if device.type == "cpu":
            lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
            return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    except (OSError, RuntimeError, ValueError, IndexError):
        pass
    return None


def _set_back(device: torch.device) -> bool:
    """Set the high-water mark back to what is in use now; whether that was possible."""
    try:
        if device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats(device)
            return True
        if device.type == "cpu":
            CLEAR.write_text("5", encoding="ascii")
            return True
    except (OSError, RuntimeError, ValueError):
        pass
    return False


def synchronize(device: torch.device | str | None) -> None:
    """Wait for a GPU to finish, so that a clock read next to it tells the truth."""
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def seconds_of(cost: Cost, device: torch.device | str | None) -> Iterator[Cost]:
    """Add the wall-clock time of the block, device included, to a cost, and its peak of memory."""
    synchronize(device)
    memory = PeakMemory(device)
    memory.start()
    try:
        start = time.perf_counter()
        yield cost
        synchronize(device)
        cost.seconds += time.perf_counter() - start
    finally:
        cost.peak_bytes = larger(cost.peak_bytes, memory.stop())
