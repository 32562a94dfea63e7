"""The clock of a training run."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents

from monai_unlearn import cost
from monai_unlearn.cost import Cost, seconds_of
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
    assert counter.cost == Cost(8, 60, 60, 60, counter.cost.peak_bytes)


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


class _Memory:
    """A process whose memory is a number: the most since the mark was set back, to 10."""

    def __init__(self) -> None:
        self.mark, self.reads = 10, 0

    def read(self, _: object) -> int:
        self.reads += 1
        return self.mark

    def set_back(self, _: object) -> bool:
        self.mark = 10
        return True

    def use(self, amount: int) -> Callable[[Engine], None]:
        def use(_: Engine) -> None:
            self.mark = max(self.mark, amount)

        return use


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> _Memory:
    kept = _Memory()
    monkeypatch.setattr(cost, "_high_water", kept.read)
    monkeypatch.setattr(cost, "_set_back", kept.set_back)
    monkeypatch.setattr(cost, "_measuring", set())  # without those of earlier tests that failed on purpose
    return kept


@pytest.mark.parametrize("epoch", [1, 2])
def test_the_peak_is_that_of_loading_and_steps_in_any_epoch(
    make_trainer: MakeTrainer, memory: _Memory, epoch: int
) -> None:
    counter = CostClock()
    trainer = make_trainer([counter])

    def load(engine: Engine) -> None:
        if engine.state.epoch == epoch:
            memory.use(70)(engine)

    trainer.add_event_handler(Events.GET_BATCH_STARTED, load)
    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, memory.use(50))
    trainer.run()
    assert counter.cost.peak_bytes == 70


@pytest.mark.parametrize("event", [Events.STARTED, Events.EPOCH_COMPLETED, Events.COMPLETED])
def test_memory_of_validation_and_of_what_stands_before_and_after_does_not_count(
    make_trainer: MakeTrainer, memory: _Memory, event: Events
) -> None:
    counter = CostClock()
    trainer = make_trainer([counter])
    trainer.add_event_handler(event, memory.use(1000))
    trainer.add_event_handler(Events.GET_BATCH_STARTED, memory.use(20))
    trainer.run()
    assert counter.cost.peak_bytes == 20


def test_a_block_around_the_run_has_the_peak_of_all_of_it(make_trainer: MakeTrainer, memory: _Memory) -> None:
    counter = CostClock()
    trainer = make_trainer([counter])
    trainer.add_event_handler(Events.STARTED, memory.use(300))
    trainer.add_event_handler(Events.GET_BATCH_STARTED, memory.use(20))
    with seconds_of(Cost(), "cpu") as around:
        trainer.run()
    assert (around.peak_bytes, counter.cost.peak_bytes) == (300, 20)


@pytest.mark.parametrize("end", ["terminate", "terminate_epoch"])
def test_a_run_that_is_ended_has_the_peak_so_far(make_trainer: MakeTrainer, memory: _Memory, end: str) -> None:
    counter = CostClock()
    trainer = make_trainer([counter], max_epochs=1)
    trainer.add_event_handler(Events.GET_BATCH_STARTED, memory.use(20))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda engine: getattr(engine, end)())
    trainer.add_event_handler(Events.COMPLETED, memory.use(1000))
    trainer.run()
    assert counter.cost.peak_bytes == 20


def test_memory_is_read_by_the_epoch_and_not_by_the_step(make_trainer: MakeTrainer, memory: _Memory) -> None:
    counter = CostClock()
    make_trainer([counter], batch_size=1, max_epochs=3).run()
    assert memory.reads == 3


def test_after_a_run_that_failed_the_next_is_measured_anew(make_trainer: MakeTrainer, memory: _Memory) -> None:
    counter = CostClock()
    trainer = make_trainer([counter])

    def fail(engine: Engine) -> None:
        memory.use(500)(engine)
        raise KeyError("stop")

    with trainer.add_event_handler(Events.ITERATION_STARTED(once=3), fail), pytest.raises(KeyError, match="stop"):
        trainer.run()
    another = make_trainer([counter])
    another.add_event_handler(Events.GET_BATCH_STARTED, memory.use(20))
    another.run()
    assert counter.cost.peak_bytes == 20
