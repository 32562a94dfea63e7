"""The clock of a training run."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents

from monai_unlearn.cost import Cost
from monai_unlearn.handlers import CostClock

MakeTrainer = Callable[..., SupervisedTrainer]


class _Clock:
    """A clock that stands still unless it is moved on."""

    def __init__(self) -> None:
        self.now = 50.0

    def perf_counter(self) -> float:
        return self.now

    def add(self, seconds: float) -> Callable[[Engine], None]:
        def move(_: Engine) -> None:
            self.now += seconds

        return move


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    moved = _Clock()
    monkeypatch.setattr("monai_unlearn.handlers.cost_clock.time", SimpleNamespace(perf_counter=moved.perf_counter))
    return moved


@pytest.mark.parametrize("batch_size", [5, 8, 30, 64])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_sample_and_pass_is_counted_once(make_trainer: MakeTrainer, batch_size: int, epochs: int) -> None:
    counter = CostClock()
    make_trainer([counter], batch_size=batch_size, max_epochs=epochs).run()
    assert (counter.cost.samples, counter.cost.forward, counter.cost.backward) == (30 * epochs,) * 3
    assert counter.cost.seconds > 0


@pytest.mark.parametrize("steps", [2, 3])
def test_accumulated_passes_count_like_all_others(make_trainer: MakeTrainer, steps: int) -> None:
    counter = CostClock()
    make_trainer([counter], accumulation_steps=steps).run()
    assert (counter.cost.samples, counter.cost.forward, counter.cost.backward) == (60, 60, 60)


def test_loading_and_steps_are_on_the_clock(make_trainer: MakeTrainer, clock: _Clock) -> None:
    counter = CostClock()
    trainer = make_trainer([counter])  # 2 epochs of 4 iterations
    trainer.add_event_handler(Events.GET_BATCH_STARTED, clock.add(1))
    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, clock.add(0.25))
    trainer.run()
    assert counter.cost.seconds == pytest.approx(8 * 1.25)


@pytest.mark.parametrize("event", [Events.STARTED, Events.EPOCH_COMPLETED, Events.COMPLETED])
def test_validation_and_what_stands_before_and_after_is_off_the_clock(
    make_trainer: MakeTrainer, clock: _Clock, event: Events
) -> None:
    counter = CostClock()
    trainer = make_trainer([counter])
    trainer.add_event_handler(Events.GET_BATCH_STARTED, clock.add(1))
    trainer.add_event_handler(event, clock.add(1000))
    trainer.run()
    assert counter.cost.seconds == pytest.approx(8)


def test_a_second_run_begins_at_zero(make_trainer: MakeTrainer, clock: _Clock) -> None:
    counter = CostClock()
    trainer = make_trainer([counter])
    trainer.add_event_handler(Events.GET_BATCH_STARTED, clock.add(1))
    trainer.run()
    first = counter.cost
    trainer.run()
    assert counter.cost is not first
    assert counter.cost == Cost(8, 60, 60, 60)


def test_an_aborted_run_keeps_what_it_cost_so_far(make_trainer: MakeTrainer, clock: _Clock) -> None:
    counter = CostClock()
    trainer = make_trainer([counter])
    trainer.add_event_handler(Events.GET_BATCH_STARTED, clock.add(1))

    def stop(_: Engine) -> None:
        raise KeyError("stop")

    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), stop)
    with pytest.raises(KeyError, match="stop"):
        trainer.run()
    assert counter.cost == Cost(2, 16, 16, 16)


def test_the_clock_changes_no_weight(make_trainer: MakeTrainer) -> None:
    watched, plain = make_trainer([CostClock()]), make_trainer()
    watched.run()
    plain.run()
    for name, value in plain.network.state_dict().items():
        assert torch.equal(watched.network.state_dict()[name], value), name
