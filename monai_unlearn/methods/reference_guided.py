"""ReGUn: answer forget samples as unseen ones of their class are answered (Mirlach et al., 2026; arXiv:2603.11210)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch.nn import functional
from torch.utils.data import DataLoader

from monai_unlearn.cost import Cost, seconds_of
from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._trainer import (
    cycle,
    evaluation_mode,
    forget_batches,
    predict,
    prepare,
    require_loaded_weights,
    require_logits,
    require_supervised_trainer,
    train_on_retain,
)
from monai_unlearn.methods.scrub import are_findings

__all__ = ["ReferenceGuided", "mean_outputs", "reference_divergence", "references_of"]

logger = logging.getLogger("monai_unlearn")


def mean_outputs(logits: torch.Tensor, labels: torch.Tensor, findings: bool = False) -> torch.Tensor:
    """Mean probabilities of the samples of each class, or of each finding where it is absent and where it is there.

    Args:
        logits: shape N × C. Half precision is computed in float32.
        labels: class indices in [0, C - 1], shape N; with ``findings`` labels in [0, 1], shape N × C, NaN where a
            finding is not known. A finding is there where its label is above ½.
        findings: whether each logit is a finding of its own.

    Returns:
        Shape C × C, one distribution a class (in the order of rows); with ``findings`` shape 2 × C, the mean sigmoid of
        each finding where it is absent, and where it is there. NaN where there is no sample to take a mean of.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if findings:
        probabilities, known = logits.sigmoid(), ~labels.isnan()
        sides = torch.stack([known & (labels <= 0.5), known & (labels > 0.5)]).to(logits.dtype)
        return (sides * probabilities).sum(1) / sides.sum(1)
    members = functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return members.T @ logits.softmax(1) / members.sum(0)[:, None]


def references_of(table: torch.Tensor, labels: torch.Tensor, findings: bool = False) -> torch.Tensor:
    """What each sample should be answered: the mean probabilities of its class.

    Args:
        table: as ``mean_outputs`` returns it.
        labels: as there, B rows.
        findings: as there.

    Returns:
        Probabilities, shape B × C. NaN for a finding that is not known.
    """
    if not findings:
        return table[labels]
    return torch.where(labels > 0.5, table[1], table[0]).masked_fill(labels.isnan(), float("nan"))


def reference_divergence(logits: torch.Tensor, references: torch.Tensor, findings: bool = False) -> torch.Tensor:
    """Mean over the samples of KL(reference ‖ output).

    Args:
        logits: shape B × C. Half precision is computed in float32.
        references: probabilities, shape B × C; with ``findings`` NaN for one that does not count.
        findings: False: the C outputs are one distribution over classes. True: each is a finding of its own, and a
            sample's divergence is the mean of those of its findings that count, 0 where none does, so that it weighs
            against a loss that is such a mean.

    Returns:
        Scalar tensor, at least 0 but for rounding.

    Raises:
        ValueError: if shapes differ.
    """
    if logits.ndim != 2 or references.shape != logits.shape:
        raise ValueError(
            f"logits and references should both be B × C, but got {tuple(logits.shape)} and {tuple(references.shape)}."
        )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    references = references.to(logits.dtype)
    if not findings:
        return functional.kl_div(logits.log_softmax(1), references, reduction="batchmean")
    counts = ~references.isnan()
    # Filled before, not after: a gradient of zero times NaN would be NaN.
    there, kept = references.masked_fill(~counts, 0), logits.masked_fill(~counts, 0)
    each = functional.kl_div(functional.logsigmoid(kept), there, reduction="none")
    each = each + functional.kl_div(functional.logsigmoid(-kept), 1 - there, reduction="none")
    return (each.masked_fill(~counts, 0).sum(1) / counts.sum(1).clamp(min=1)).mean()


class ReferenceGuided:
    """Pull the outputs on forget samples to those that unseen samples of the same class have from the original.

    minimise CE over the retain set + α · mean of KL(q_y ‖ f(x)) over the forget set, with q_y the mean of the original
    model's probabilities over the held-out samples of class y. With several findings a sample, or one output, each
    finding has two references, the mean over held-out samples that have it and over those that don't, and a sample's
    divergence is the mean over its known findings. A finding whose answer no held-out sample has does not count either,
    which is noted.

    A step takes a batch of either set, as ``NegGradPlus`` does; an epoch is one pass over the retain set, in which the
    forget set comes round as often as it takes. With batches in which both are mixed, forget samples would still have a
    part in BatchNorm's statistics with an α of 0.

    Runs on ``STARTED``, where the references are computed (in evaluation mode) and a loader of retain samples takes the
    place of the trainer's, on ``LOSS_COMPLETED``, where the forget batch goes through the network (in training mode,
    within the step's mixed precision) and its divergence is added, and on ``COMPLETED``.

    Args:
        forget: the forget set.
        held_out_loader: samples that no model was trained on, without augmentation, among them some of each class of
            the forget set. No figure should be reported on them.
        alpha: weight of the divergence, at least 0. With 0 no forget and no held-out sample is looked at, which is
            fine-tuning.
        multi_label: whether the network's outputs are findings, each a question of its own, rather than classes; by
            default they are where the trainer's loss is a ``BCEWithLogitsLoss`` or ``MaskedBCEWithLogitsLoss``, or
            there is one output. A finding that is not known (NaN) does not count.
        loader: retain samples only; by default made from the trainer's own loader.
        forget_loader: forget samples only; by default made from the trainer's own loader (same batch size and
            transforms, shuffled if that was).

    Attributes:
        cost: the pass over the held-out samples, and samples and passes of the forget batches, whose time is that of
            the steps.
        notes: what could not be unlearned, in sentences.

    Raises:
        ValueError: if an argument is outside its range, forget or retain samples can't be found, outputs or labels are
            of another form or not finite, a class of the forget set has no held-out sample, or
            none of its findings has one.
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``, or its loss takes probabilities.
        RuntimeError: if a ``CheckpointLoader`` stands after it.

    References:
        Mirlach et al., Reference-Guided Machine Unlearning, 2026, arXiv:2603.11210.

    Differs from the paper, where held-out samples are drawn anew for each forget batch, with that batch's classes, and
    their mean is the reference of the whole batch: here each sample has that of its own class, from all held-out
    samples, which is computed once. References of findings are this package's own.

    Example::

        method = ReferenceGuided(forget, held_out_loader=validation_loader)
        trainer = SupervisedTrainer(..., train_handlers=[method, BatchNormPolicy(forget)])
    """

    cost_phase = "unlearn"

    def __init__(
        self,
        forget: ForgetSet,
        *,
        held_out_loader: DataLoader,
        alpha: float = 1.0,
        multi_label: bool | None = None,
        loader: DataLoader | None = None,
        forget_loader: DataLoader | None = None,
    ) -> None:
        if held_out_loader is None:
            raise ValueError("held_out_loader should load samples that no model was trained on, but got None.")
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"alpha should be a number of at least 0, but got {alpha!r}.")
        if multi_label is not None and not isinstance(multi_label, bool):
            raise ValueError(f"multi_label should be true, false or None, but got {multi_label!r}.")
        self.forget = forget
        self.held_out_loader = held_out_loader
        self.alpha = alpha
        self.multi_label = multi_label
        self.loader = loader
        self.forget_loader = forget_loader
        self.cost = Cost()
        self.notes: list[str] = []
        self._release()

    def _release(self) -> None:
        self._batches: Iterator[Any] | None = None
        self._table: torch.Tensor | None = None

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._add)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def _start(self, engine: SupervisedTrainer) -> None:
        self._release()
        self.cost = Cost()
        self.notes = []
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        require_logits(engine, self)
        train_on_retain(engine, self.forget, self.loader)
        if not self.alpha:
            return
        batches = forget_batches(engine, self.forget, self.forget_loader)
        with seconds_of(self.cost, engine.state.device), torch.no_grad(), evaluation_mode(engine.network):
            self._table, findings = self._references(engine)
            self._check_references(engine, self._table, findings)
        self._batches = cycle(batches)

    def _references(self, engine: SupervisedTrainer) -> tuple[torch.Tensor, bool]:
        """The table of references, and whether it is one of findings."""
        outputs, labels, findings = [], [], False
        for batch in self.held_out_loader:
            prediction, target = predict(engine, batch)
            findings = are_findings(engine, prediction, self.multi_label)
            outputs.append(prediction)
            labels.append(_checked(target, prediction.shape, findings))
            self.cost.samples += len(prediction)
            self.cost.forward += len(prediction)
        if not outputs:
            raise ValueError("The loader of held-out samples should hold at least one sample, but is empty.")
        logits = torch.cat(outputs)
        if not bool(logits.isfinite().all()):
            raise ValueError(
                "The original's outputs on the held-out samples should be finite, but some are NaN or infinite. Check "
                "the images and the original model."
            )
        return mean_outputs(logits, torch.cat(labels), findings), findings

    def _check_references(self, engine: SupervisedTrainer, table: torch.Tensor, findings: bool) -> None:
        """Refuse a forget set of which a class has no held-out sample, before the first step."""
        loader = self.forget_loader
        if loader is None:
            loader = self.forget.forget_loader(engine.data_loader)
        asked = torch.zeros(table.shape if findings else len(table), dtype=torch.bool, device=table.device)
        for batch in loader:
            target = prepare(engine, batch)[1]
            labels = _checked(target, (len(target), table.shape[1]), findings)
            if findings:
                asked[0] |= (labels <= 0.5).any(0)
                asked[1] |= (labels > 0.5).any(0)
            else:
                asked[labels] = True
        missing, number = int((asked & (table if findings else table[:, 0]).isnan()).sum()), int(asked.sum())
        if missing and not findings:
            raise ValueError(
                f"held_out_loader should hold a sample of each class of the forget set, but {missing} of {number} "
                "classes have none. Use more held-out (validation) data of these, or a method that needs none."
            )
        if missing == number:
            raise ValueError(
                "The forget samples should have at least one known finding of which held_out_loader has a sample with "
                "the same label, but have none. Check the labels, or use more held-out (validation) data."
            )
        if missing:
            note = (
                f"{missing} of {number} answers of the forget set (a finding that is there, or is not) have no "
                "held-out image with the same answer, so these were not unlearned. Use more validation data of them."
            )
            self.notes.append(note)
            logger.warning("%s", note)

    def _add(self, engine: SupervisedTrainer) -> None:
        if self._batches is None or self._table is None:
            return
        prediction, target = predict(engine, next(self._batches))
        findings = are_findings(engine, prediction, self.multi_label)
        references = references_of(self._table, _checked(target, prediction.shape, findings), findings)
        output = engine.state.output
        divergence = reference_divergence(prediction, references, findings)
        output[CommonKeys.LOSS] = output[CommonKeys.LOSS] + self.alpha * divergence
        self.cost.samples += len(prediction)
        self.cost.forward += len(prediction)
        self.cost.backward += len(prediction)

    def _complete(self, engine: Engine) -> None:
        self._release()


def _checked(target: torch.Tensor, shape: tuple[int, ...], findings: bool) -> torch.Tensor:
    """Labels as the functions above take them, of outputs of a shape; others are refused."""
    fits = len(shape) == 2 and target.numel() == (shape[0] * shape[1] if findings else shape[0])
    if fits and findings and not bool(((target < 0) | (target > 1)).any()):
        return target.reshape(shape)
    if fits and not findings:
        labels = target.reshape(-1)
        if not labels.numel() or (
            bool((labels == labels.long()).all()) and 0 <= labels.min() <= labels.max() < shape[1]
        ):
            return labels.long()
    wanted = "findings in [0, 1], as many as outputs" if findings else "one class index a sample"
    raise ValueError(
        f"ReferenceGuided needs outputs of shape B × C and labels that are {wanted}, but got {tuple(shape)} and labels "
        f"of shape {tuple(target.shape)}. If these are the findings of a multi-label task, pass multi_label=True."
    )
