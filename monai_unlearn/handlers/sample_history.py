"""How each sample fared during a training: what tells easy samples from hard ones."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch.nn import functional

from monai_unlearn.metrics import finding_log_odds

__all__ = ["SCORES", "SampleHistory", "read_history"]

# The columns of a history that a request may go by: higher is harder.
SCORES = ("mean_loss", "forgetting_events")


class SampleHistory:
    """Record, while a model is trained, how each training sample fares.

    It reads the outputs that the trainer's own step makes: no further pass, and nothing of the training changes. For
    each sample it keeps

    - ``seen``: how often it was trained on,
    - ``mean_loss``: mean cross entropy (of a multi-label task: binary, over its known findings; NaN if none is known),
    - ``mean_margin`` and ``last_margin``: logit of the true class minus the largest other one (of a multi-label task
      the mean over the known findings of the logit, its sign turned where the finding is absent),
    - ``forgetting_events``: how often it was right and wrong the next time (Toneva et al., 2019),
    - ``never_learned``: it was not right once. Such samples have no forgetting event, but are the hardest.

    A sample is right where its margin is positive; of a multi-label task, where each known finding is. Outputs are
    those of training: augmented images, BatchNorm and dropout as in training, before the step on that batch.

    Runs on ``STARTED``, ``FORWARD_COMPLETED``, ``EPOCH_COMPLETED`` and ``COMPLETED``. A run that goes on where another
    has ended (more epochs of the same trainer) adds to its record; a new one starts anew.

    Args:
        path: CSV file to write at the end, one row a sample. Ids must be whole numbers then, since other ids may be
            personal data.
        key: key of the sample's id in a batch.

    Raises:
        KeyError: if the batch has no such key.
        TypeError: if the batch is no dict.
        ValueError: if ids or labels don't fit the outputs, an output is not finite, or a file is to be written, but
            ids are no whole numbers.
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
        self._samples: dict[Hashable, _Sample] = {}
        self._waiting: list[tuple] = []

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

    def _start(self, engine: Engine) -> None:
        if engine.state.iteration == 0:
            self._samples, self._waiting = {}, []

    @torch.no_grad()
    def _record(self, engine: SupervisedTrainer) -> None:
        batch = engine.state.batch
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"SampleHistory needs batches that are dicts with an id of each sample, but got {type(batch).__name__}."
            )
        if self.key not in batch:
            raise KeyError(
                f"The batch has no {self.key!r}, by which samples are told apart. It has {sorted(map(str, batch))}. "
                "Give SampleHistory the right key."
            )
        logits = engine.state.output[CommonKeys.PRED].float()
        labels = engine.state.output[CommonKeys.LABEL]
        if logits.ndim == 2 and labels.shape == logits.shape:
            loss, margin, right = _of_findings(logits, labels.float())
        elif logits.ndim == 2 and labels.numel() == len(logits):
            loss, margin, right = _of_classes(logits, labels.reshape(-1).long())
        else:
            raise ValueError(
                f"SampleHistory needs outputs B × C with one class a sample, or B × L with L findings, but got outputs "
                f"{tuple(logits.shape)} and labels {tuple(labels.shape)}."
            )
        ids = batch[self.key]
        if len(ids) != len(logits):
            raise ValueError(f"{self.key!r} should hold {len(logits)} ids, one an output, but holds {len(ids)}.")
        # Left on the device until the epoch's end: moving them now would have every step wait for it.
        finite = logits.isfinite().all(1)
        self._waiting.append((ids, torch.stack([loss, margin, right.float(), finite.float()])))

    def _gather(self, engine: Engine | None = None) -> None:
        waiting, self._waiting = self._waiting, []
        for ids, figures in waiting:
            keys = ids.reshape(-1).tolist() if isinstance(ids, torch.Tensor) else list(ids)
            for key, loss, margin, right, finite in zip(keys, *figures.tolist(), strict=True):
                if not finite:
                    raise ValueError(
                        "The network's outputs in training should be finite, but hold NaN or infinity. Lower the "
                        "learning rate, and check the images."
                    )
                self._samples.setdefault(key, _Sample()).add(loss, margin, bool(right))

    def _complete(self, engine: Engine) -> None:
        self._gather()
        if not self._samples:
            raise RuntimeError(
                "SampleHistory met no sample. Check that the trainer's loader gives batches, and that it has no "
                "iteration_update of its own."
            )
        if self.path is None:
            return
        if not all(isinstance(key, int) for key in self._samples):
            raise ValueError(
                f"A history is written for samples known by whole numbers only, as other ids may be personal data. Put "
                f"a running number into the records, and give its key instead of {self.key!r}; or use frame()."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{self.path.name}.part-{os.getpid()}")
        try:
            self.frame().to_csv(unfinished, index=False)
            os.replace(unfinished, self.path)
        finally:
            unfinished.unlink(missing_ok=True)


def read_history(path: str | os.PathLike, n: int) -> pd.DataFrame:
    """The scores of a written history, higher is harder.

    An image that was never learned has no forgetting event and is harder than any that was: it counts one event more
    than the most of the others.

    Args:
        path: file that ``SampleHistory`` wrote with the key ``index``.
        n: number of training images.

    Returns:
        Row i is image i; columns ``SCORES``. NaN for an image that the training did not meet.

    Raises:
        ValueError: if the file is no history of so many images.
    """
    try:
        history = pd.read_csv(path, float_precision="round_trip")[["index", "never_learned", *SCORES]]
        history = history.astype({name: float for name in SCORES})
    except (KeyError, ValueError):  # among which are all that pandas raises on a file that is no table
        history = None
    if history is None or not np.isin(history["index"], np.arange(n)).all() or history["index"].duplicated().any():
        raise ValueError(
            f"{Path(path).name} beside the original model should be its training's history of {n} images, but is "
            "damaged or of other data. Restore it, or train the original again."
        )
    events = history["forgetting_events"]
    history["forgetting_events"] = events.mask(history["never_learned"].astype(bool), events.max() + 1)
    return history.set_index("index").reindex(range(n))[list(SCORES)]


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
    unknown = labels.isnan()
    losses = functional.binary_cross_entropy_with_logits(logits, labels.masked_fill(unknown, 0), reduction="none")
    wrong = (logits * (2 * labels - 1) <= 0) & (labels != 0.5)  # NaN compares as False: unknown is not wrong
    loss = losses.masked_fill(unknown, torch.nan).nanmean(1)
    return loss, finding_log_odds(logits, labels).float(), ~wrong.any(1)
