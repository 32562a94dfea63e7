"""The clock of a training run."""

from __future__ import annotations

import time

from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys

from monai_unlearn.cost import Cost, PeakMemory, larger, synchronize

__all__ = ["CostClock"]


class CostClock:
    """Measure what the iterations of a trainer cost: loading, steps and the methods' work within them.

    The clock runs from the start of each epoch to the end of its last iteration, so neither what methods do before
    the first epoch or after the last (they keep a ``cost`` of their own), nor a validation between epochs counts. The
    same holds for the peak of memory.

    Runs on ``STARTED``, ``EPOCH_STARTED``, ``FORWARD_COMPLETED``, ``BACKWARD_COMPLETED``, ``ITERATION_COMPLETED``,
    ``TERMINATE_SINGLE_EPOCH`` and ``TERMINATE``.

    Attributes:
        cost: the cost of the last run, or so far.
    """

    def __init__(self) -> None:
        self.cost = Cost()
        self._last = 0.0
        self._rows = 0
        self._memory: PeakMemory | None = None

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._count_forward)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._count_backward)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._tick)
        engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, self._end_epoch)
        engine.add_event_handler(Events.TERMINATE, self._end_epoch)

    def _start(self, engine: SupervisedTrainer) -> None:
        self.cost = Cost()
        self._memory = PeakMemory(engine.state.device)

    def _start_epoch(self, engine: SupervisedTrainer) -> None:
        synchronize(engine.state.device)
        if self._memory is not None:
            self._memory.start()
        self._last = time.perf_counter()

    def _count_forward(self, engine: SupervisedTrainer) -> None:
        self._rows = len(engine.state.output[CommonKeys.PRED])
        self.cost.samples += self._rows
        self.cost.forward += self._rows

    def _count_backward(self, engine: SupervisedTrainer) -> None:
        self.cost.backward += self._rows

    def _tick(self, engine: SupervisedTrainer) -> None:
        last = engine.state.iteration % engine.state.epoch_length == 0
        if last:
            synchronize(engine.state.device)
        now = time.perf_counter()
        self.cost.seconds += now - self._last
        self._last = now
        if last:
            self._end_epoch(engine)

    def _end_epoch(self, engine: SupervisedTrainer, *_: object, **__: object) -> None:
        if self._memory is not None:
            self.cost.peak_bytes = larger(self.cost.peak_bytes, self._memory.stop())
