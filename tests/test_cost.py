"""What work cost: sums, a clock that includes its whole block, and the most memory within it."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monai_unlearn import cost
from monai_unlearn.cost import Cost, PeakMemory, larger, seconds_of, synchronize

SIZE = 100_000_000
PEAKS = st.one_of(st.none(), st.integers(0, 2**40))
measured = pytest.mark.skipif(not cost._set_back(cost._indexed("cpu")), reason="the system gives no peak of memory")


def _use(size: int) -> None:
    """Take memory for a moment: touched, and given back to the system."""
    np.ones(size, dtype=np.uint8)
    gc.collect()


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    times = iter([10.0, 12.5, 20.0, 20.25])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(times))


def test_costs_add_up_field_by_field_and_stay_as_they_are() -> None:
    one, other = Cost(1.5, 2, 3, 4, 9), Cost(0.25, 20, 30, 40, 5)
    assert one + other == Cost(1.75, 22, 33, 44, 9)
    assert (one, other) == (Cost(1.5, 2, 3, 4, 9), Cost(0.25, 20, 30, 40, 5))
    assert one + Cost() == one
    assert sum([one, other], Cost()) == other + one


def test_as_dict_rounds_seconds_to_a_millisecond() -> None:
    figures = {"seconds": 1.235, "samples": 2, "forward": 3, "backward": 4, "peak_bytes": 5}
    assert Cost(1.23456, 2, 3, 4, 5).as_dict() == figures
    assert Cost().as_dict()["peak_bytes"] is None


def test_a_cost_that_was_kept_without_a_peak_is_read() -> None:
    kept = {"seconds": 1.0, "samples": 2, "forward": 3, "backward": 4}
    assert Cost(**kept) == Cost(1.0, 2, 3, 4)
    assert Cost(**Cost(1.0, 2, 3, 4, 5).as_dict()) == Cost(1.0, 2, 3, 4, 5)


@given(st.lists(PEAKS, max_size=5))
def test_of_peaks_the_largest_known_one_counts(peaks: list[int | None]) -> None:
    known = [peak for peak in peaks if peak is not None]
    assert sum((Cost(peak_bytes=peak) for peak in peaks), Cost()).peak_bytes == (max(known) if known else None)


@given(PEAKS, PEAKS)
def test_which_peak_comes_first_does_not_matter(one: int | None, other: int | None) -> None:
    assert larger(one, other) == larger(other, one)
    assert larger(one, None) == larger(one, one) == one


@pytest.mark.usefixtures("clock")
def test_seconds_of_several_blocks_are_added() -> None:
    spent = Cost(samples=5)
    with seconds_of(spent, "cpu") as same:
        assert same is spent
    assert (spent.seconds, spent.samples) == (2.5, 5)
    with seconds_of(spent, None):
        pass
    assert (spent.seconds, spent.samples) == (2.75, 5)


@pytest.mark.usefixtures("clock")
def test_an_error_in_the_block_propagates() -> None:
    with pytest.raises(KeyError, match="inside"), seconds_of(Cost(), "cpu"):
        raise KeyError("inside")


@pytest.mark.parametrize(("device", "waits"), [("cuda", 1), ("cuda:1", 1), ("cpu", 0), (None, 0)])
def test_only_a_gpu_is_waited_for(monkeypatch, device, waits) -> None:
    waited = []
    monkeypatch.setattr(cost.torch.cuda, "synchronize", waited.append)
    synchronize(device)
    assert waited == [device] * waits


@measured
@pytest.mark.parametrize("device", ["cpu", None])
def test_memory_within_the_block_counts_and_memory_before_and_after_does_not(device: str | None) -> None:
    _use(2 * SIZE)
    spent, nothing = Cost(), Cost()
    with seconds_of(nothing, device):
        pass
    with seconds_of(spent, device):
        _use(SIZE)
    _use(2 * SIZE)
    assert spent.peak_bytes is not None
    assert nothing.peak_bytes is not None
    # So much more, but for what the system and the allocator round to.
    assert 0.95 * SIZE < spent.peak_bytes - nothing.peak_bytes < 1.5 * SIZE


@measured
def test_what_is_held_throughout_counts() -> None:
    nothing, spent = Cost(), Cost()
    with seconds_of(nothing, "cpu"):
        pass
    held = np.ones(SIZE, dtype=np.uint8)
    with seconds_of(spent, "cpu"):
        pass
    assert spent.peak_bytes - nothing.peak_bytes > 0.95 * held.nbytes


@measured
@pytest.mark.parametrize("order", ["before", "within", "after"])
def test_a_block_within_loses_no_peak_of_the_one_around(order: str) -> None:
    floor, outer, inner = Cost(), Cost(), Cost()
    with seconds_of(floor, "cpu"):
        pass
    with seconds_of(outer, "cpu"):
        _use(SIZE if order == "before" else 1)
        with seconds_of(inner, "cpu"):
            _use(SIZE if order == "within" else 1)
        _use(SIZE if order == "after" else 1)
    assert outer.peak_bytes - floor.peak_bytes > 0.95 * SIZE
    assert (inner.peak_bytes - floor.peak_bytes > 0.95 * SIZE) == (order == "within")


@measured
def test_an_error_keeps_the_peak_and_disturbs_no_later_block() -> None:
    floor, outer, broken, later = Cost(), Cost(), Cost(), Cost()
    before = set(cost._measuring)
    with seconds_of(floor, "cpu"):
        pass

    def fail() -> None:
        with seconds_of(broken, "cpu"):
            _use(SIZE)
            raise KeyError

    with seconds_of(outer, "cpu"):
        with pytest.raises(KeyError):
            fail()
        with seconds_of(later, "cpu"):
            pass
    assert broken.peak_bytes - floor.peak_bytes > 0.95 * SIZE
    assert outer.peak_bytes >= broken.peak_bytes
    assert later.peak_bytes - floor.peak_bytes < 0.5 * SIZE
    assert set(cost._measuring) == before


class _Machine:
    """A device whose memory is a number: what is in use, and the most since the mark was set back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used = self.mark = 10
        self.reads = 0
        monkeypatch.setattr(cost, "_high_water", self.read)
        monkeypatch.setattr(cost, "_set_back", self.set_back)

    def use(self, amount: int) -> None:
        self.mark = max(self.mark, self.used + amount)

    def read(self, _: object) -> int:
        self.reads += 1
        return self.mark

    def set_back(self, _: object) -> bool:
        self.mark = self.used
        return True


@given(st.lists(st.one_of(st.sampled_from(["start", "stop"]), st.integers(0, 100)), max_size=30))
def test_blocks_nested_anyhow_each_have_the_peak_of_their_own_time(steps: list[str | int]) -> None:
    """Against a list of all that each of them has lived to see."""
    with pytest.MonkeyPatch.context() as patch:
        machine = _Machine(patch)
        running: list[tuple[PeakMemory, list[int]]] = []
        for number, step in enumerate(steps):
            if step == "start":
                running.append((PeakMemory("cpu"), [machine.used]))
                running[-1][0].start()
            elif step == "stop" and running:
                memory, seen = running.pop(number % len(running))  # also one around before one within
                assert memory.stop() == max(seen)
            elif isinstance(step, int):
                machine.use(step)
                for _, seen in running:
                    seen.append(machine.used + step)
        for memory, seen in running:
            assert memory.stop() == max(seen)


def test_devices_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = {"cpu": 10, "meta": 20}
    monkeypatch.setattr(cost, "_high_water", lambda device: marks[device.type])
    monkeypatch.setattr(cost, "_set_back", lambda device: marks.__setitem__(device.type, 1) or True)
    one, other = PeakMemory("cpu"), PeakMemory("meta")
    one.start()
    marks["cpu"] = 30
    other.start()
    assert marks == {"cpu": 30, "meta": 1}
    marks["meta"] = 50
    assert (one.stop(), other.stop()) == (30, 50)


def test_a_gpu_is_known_with_and_without_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {0: 700, 1: 900}
    gpu = SimpleNamespace(
        is_available=lambda: True,
        current_device=lambda: 0,
        synchronize=lambda _: None,
        max_memory_allocated=lambda device: peaks[device.index],
        reset_peak_memory_stats=lambda device: peaks.__setitem__(device.index, 100),
    )
    monkeypatch.setattr(cost.torch, "cuda", gpu)
    outer, inner, another = Cost(), Cost(), Cost()
    with seconds_of(outer, "cuda"):
        peaks[0] = 500
        with seconds_of(inner, "cuda:0"), seconds_of(another, "cuda:1"):
            peaks[0], peaks[1] = 300, 400
    assert (outer.peak_bytes, inner.peak_bytes, another.peak_bytes) == (500, 300, 400)


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps", "meta"])
def test_a_device_that_tells_no_peak_has_none(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost.torch.cuda, "is_available", lambda: False)
    memory = PeakMemory(device)
    memory.start()
    assert memory.stop() is None


@pytest.mark.parametrize("missing", ["both", "mark", "permission", "strange"])
def test_a_system_that_tells_no_peak_is_no_error(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS and Windows have no such files, some containers an unwritable one, and a kernel may leave the line out."""
    status, clear = tmp_path / "status", tmp_path / "clear"
    if missing != "both":
        status.write_text({"mark": "VmRSS: 1 kB\n", "strange": "VmHWM:\nVmHWM:\tmuch\n"}.get(missing, "VmHWM:\t7 kB\n"))
        clear.mkdir() if missing == "permission" else clear.touch()
    monkeypatch.setattr(cost, "STATUS", status)
    monkeypatch.setattr(cost, "CLEAR", tmp_path / "none" / "clear" if missing == "both" else clear)
    spent = Cost(peak_bytes=None)
    with seconds_of(spent, "cpu"):
        pass
    assert spent.peak_bytes is None
    assert spent.seconds > 0


def test_the_mark_of_the_system_is_in_kibibytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmPeak:\t  99 kB\nVmHWM:\t    7 kB\nVmRSS:\t  5 kB\n")
    monkeypatch.setattr(cost, "STATUS", tmp_path / "status")
    monkeypatch.setattr(cost, "CLEAR", tmp_path / "clear")
    with seconds_of(spent := Cost(), "cpu"):
        pass
    assert spent.peak_bytes == 7 * 1024
    assert (tmp_path / "clear").read_text() == "5"


def test_a_block_whose_mark_could_not_be_set_back_has_no_peak_and_the_one_around_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter([True, False])
    monkeypatch.setattr(cost, "_high_water", lambda _: 40)
    monkeypatch.setattr(cost, "_set_back", lambda _: next(answers))
    with seconds_of(outer := Cost(), "cpu"), seconds_of(inner := Cost(), "cpu"):
        pass
    assert (outer.peak_bytes, inner.peak_bytes) == (40, None)


def test_stopping_what_never_started_gives_none() -> None:
    assert PeakMemory("cpu").stop() is None
