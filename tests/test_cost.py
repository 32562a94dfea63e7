"""What work cost: sums, and a clock that includes its whole block."""

from __future__ import annotations

import pytest

from monai_unlearn import cost
from monai_unlearn.cost import Cost, seconds_of, synchronize


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    times = iter([10.0, 12.5, 20.0, 20.25])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(times))


def test_costs_add_up_field_by_field_and_stay_as_they_are() -> None:
    one, other = Cost(1.5, 2, 3, 4), Cost(0.25, 20, 30, 40)
    assert one + other == Cost(1.75, 22, 33, 44)
    assert (one, other) == (Cost(1.5, 2, 3, 4), Cost(0.25, 20, 30, 40))
    assert one + Cost() == one
    assert sum([one, other], Cost()) == other + one


def test_as_dict_rounds_seconds_to_a_millisecond() -> None:
    assert Cost(1.23456, 2, 3, 4).as_dict() == {"seconds": 1.235, "samples": 2, "forward": 3, "backward": 4}


@pytest.mark.usefixtures("clock")
def test_seconds_of_several_blocks_are_added() -> None:
    spent = Cost(samples=5)
    with seconds_of(spent, "cpu") as same:
        assert same is spent
    assert spent == Cost(2.5, samples=5)
    with seconds_of(spent, None):
        pass
    assert spent == Cost(2.75, samples=5)


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
