"""How each sample fared during a training: what tells easy samples from hard ones."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path

import pandas as pd
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys

from monai_unlearn.loss import MaskedBCEWithLogitsLoss
from monai_unlearn.metrics import finding_log_odds

__all__ = ["SampleHistory"]


class SampleHistory:
    """Record, while a model is trained, how each training sample fares.

    It reads the outputs that the trainer's own step makes: no further pass, and nothing of the training changes. For
    each sample it keeps

    - ``seen``: how often it was trained on,
    - ``mean_loss``: mean cross entropy (of a multi-label task: binary, over its known findings),
    - ``mean_margin`` and ``last_margin``: logit of the true class minus the largest other one (of a multi-label task
      the mean over the known findings of the logit, its sign turned where the finding is absent),
    - ``forgetting_events``: how often it was right and wrong the next time (Toneva et al., 2019),
    - ``never_learned``: it was not right once. Such samples have no forgetting event, but are the hardest.

    Runs on ``STARTED``, ``FORWARD_COMPLETED``, ``EPOCH_COMPLETED`` and ``COMPLETED``.

    Args:
        path: CSV file to write at the end, one row a sample. Ids must be whole numbers then, since other ids may be
            personal data.
        key: key of the sample's id in a batch.

    Raises:
        KeyError: if the batch has no such key.
        ValueError: if a file is to be written, but ids are no whole numbers.
        RuntimeError: if the run has met no sample.

    References:
        Toneva et al., An Empirical Study of Example Forgetting during Deep Neural Network Learning, ICLR 2019,
        arXiv:1812.05159.

    Example::

        trainer = SupervisedTrainer(..., train_handlers=[SampleHistory("history.csv")])
    """

    def __init__(self, path: str | os.PathLike | None = None, *, key: str = "index") -> None:
        self.path = None if path is None else Path(path)
        self.key = key
        self._start()

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._record)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._gather)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def frame(self) -> pd.DataFrame:
        """One row a sample, ascending by its id, which is in the column named after ``key``."""
        self._gather()
        names = (self.key, "seen", "mean_loss", "mean_margin", "last_margin", "forgetting_events", "never_learned")
        rows = [
            (key, s.seen, s.loss / s.seen, s.margin / s.seen, s.last_margin, s.forgetting_events, not s.ever_right)
            for key, s in self._samples.items()
        ]
        frame = pd.DataFrame(rows, columns=list(names))
        return frame.sort_values(
            self.key, key=lambda ids: ids if ids.dtype.kind in "iu" else ids.astype(str)
        ).reset_index(drop=True)

    def _start(self, engine: Engine | None = None) -> None:
        self._samples: dict[Hashable, _Sample] = {}
        self._waiting: list[tuple] = []

    @torch.no_grad()
    def _record(self, engine: SupervisedTrainer) -> None:
        if self.key not in engine.state.batch:
            raise KeyError(
                f"The batch has no {self.key!r}, by which samples are told apart. It has "
                f"{sorted(map(str, engine.state.batch))}. Give SampleHistory the right key."
            )
        logits = engine.state.output[CommonKeys.PRED].float()
        labels = engine.state.output[CommonKeys.LABEL]
        if labels.ndim == 2 and labels.shape == logits.shape:
            loss, margin, right = _of_findings(logits, labels.float())
        else:
            loss, margin, right = _of_classes(logits, labels.reshape(len(labels)).long())
        # Left on the device until the epoch's end: moving them now would have every step wait for it.
        self._waiting.append((engine.state.batch[self.key], torch.stack([loss, margin, right.float()])))

    def _gather(self, engine: Engine | None = None) -> None:
        for ids, figures in self._waiting:
            keys = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
            for key, loss, margin, right in zip(keys, *figures.tolist()):
                self._samples.setdefault(key, _Sample()).add(loss, margin, bool(right))
        self._waiting = []

    def _complete(self, engine: Engine) -> None:
        self._gather()
        if not self._samples:
            raise RuntimeError("SampleHistory met no sample. Check that the trainer's loader gives batches.")
        if self.path is None:
            return
        if not all(isinstance(key, int) for key in self._samples):
            raise ValueError(
                f"A history is written for samples known by whole numbers only, as other ids may be personal data. Put "
                f"a running number into the records, and give its key instead of {self.key!r}; or use frame()."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            self.frame().to_csv(unfinished, index=False)
            os.replace(unfinished, self.path)
        finally:
            unfinished.unlink(missing_ok=True)


class _Sample:
    """What is kept of one sample."""

    __slots__ = ("ever_right", "forgetting_events", "last_margin", "loss", "margin", "seen", "was_right")

    def __init__(self) -> None:
        self.seen, self.forgetting_events = 0, 0
        self.loss = self.margin = self.last_margin = 0.0
        self.was_right = self.ever_right = False

    def add(self, loss: float, margin: float, right: bool) -> None:
        self.seen += 1
        self.loss += loss
        self.margin += margin
        self.last_margin = margin
        self.forgetting_events += int(self.was_right and not right)
        self.was_right = right
        self.ever_right |= right


def _of_classes(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    column = labels[:, None]
    true = logits.gather(1, column)[:, 0]
    margin = true - logits.scatter(1, column, -torch.inf).amax(1)
    return logits.logsumexp(1) - true, margin, margin > 0


def _of_findings(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss = torch.stack([MaskedBCEWithLogitsLoss()(row[None], known[None]) for row, known in zip(logits, labels)])
    wrong = (logits * (2 * labels - 1) <= 0) & (labels != 0.5)  # NaN compares as False: unknown is not wrong
    return loss, finding_log_odds(logits, labels).float(), ~wrong.any(1)
