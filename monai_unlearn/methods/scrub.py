"""SCRUB: leave a teacher on the forget set, keep to it on the retain set (Kurmanji et al., 2023; arXiv:2302.09880)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from monai_unlearn.cost import Cost, seconds_of
from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._trainer import (
    evaluation_mode,
    forget_batches,
    plain_network,
    predict,
    require_before_savers,
    require_loaded_weights,
    require_logits,
    require_supervised_trainer,
    train_on_retain,
    unwrapped_handlers,
)
from monai_unlearn.methods.batch_norm import BatchNormPolicy
from monai_unlearn.methods.random_labeling import BINARY

__all__ = ["SCRUB", "distillation_loss", "nearest_epoch", "wrong_answers"]

logger = logging.getLogger("monai_unlearn")

State = dict[str, torch.Tensor]


def distillation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    findings: bool = False,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """T² · mean over the samples of KL(teacher ‖ student), of the outputs softened by the temperature T.

    Args:
        student: logits, shape B × C. Half precision is computed in float32.
        teacher: logits, shape B × C.
        temperature: T, greater than 0. The factor T² keeps the gradient's size about the same for all T.
        findings: False: the C logits are one distribution over classes. True: each is a finding of its own, and the
            divergences of the findings, which are independent, add up.
        known: boolean, shape B × C: findings that count; by default all.

    Returns:
        Scalar tensor, at least 0 but for rounding.

    Raises:
        ValueError: if shapes differ.
    """
    if student.ndim != 2 or teacher.shape != student.shape:
        raise ValueError(
            f"student and teacher should both be B × C, but got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if student.dtype in (torch.float16, torch.bfloat16):
        student, teacher = student.float(), teacher.float()
    student, teacher = student / temperature, teacher.to(student.dtype) / temperature
    if not findings:
        ours, theirs = student.log_softmax(1), teacher.log_softmax(1)
        each = functional.kl_div(ours, theirs, reduction="none", log_target=True)
    else:
        each = torch.zeros_like(student)
        for sign in (1, -1):  # there, and not there
            ours, theirs = functional.logsigmoid(sign * student), functional.logsigmoid(sign * teacher)
            each = each + functional.kl_div(ours, theirs, reduction="none", log_target=True)
        if known is not None:
            each = each.masked_fill(~known, 0)
    return temperature**2 * each.sum(1).mean()


def wrong_answers(prediction: torch.Tensor, target: torch.Tensor, findings: bool = False) -> tuple[int, int]:
    """How many answers are wrong, and how many there are.

    Args:
        prediction: logits, shape B × C.
        target: class indices, shape B or B × 1; with ``findings`` labels in [0, 1], shape B × C (B for one finding),
            NaN where a finding is not known. A finding is there where its label is above ½, and predicted where its
            logit is above 0.
        findings: whether each logit is a finding of its own. The answers are then those of all known findings, else
            one a sample.
    """
    if not findings:
        return int((prediction.argmax(1) != target.reshape(-1)).sum()), len(prediction)
    target = target.reshape(prediction.shape)
    known = ~target.isnan()
    return int((((prediction > 0) != (target > 0.5)) & known).sum()), int(known.sum())


def nearest_epoch(errors: Sequence[float], reference: float) -> int:
    """The epoch, counted from 1, whose error is nearest to the reference; of equally near ones the last.

    Args:
        errors: the forget error after each epoch.
        reference: the final model's error on unseen samples that are matched to the forget set.
    """
    distances = [abs(error - reference) for error in errors]
    return max(epoch for epoch, distance in enumerate(distances, 1) if distance == min(distances))


class SCRUB:
    """Drive the network away from the original on the forget set, and keep it near the original on the retain set.

    Of the frozen original as a teacher t and the network f, in each of the first ``forget_epochs`` epochs:

    - one pass over the forget set: maximise T² KL(t(x) ‖ f(x));

    and in every epoch, after that:

    - one pass over the retain set: minimise γ CE(f(x), y) + α T² KL(t(x) ‖ f(x)).

    Each step is an ordinary iteration of the trainer. With a ``rewind_loader`` (SCRUB+R) the network is set back in the
    end to the epoch whose error on the forget set is nearest to the *final* model's error on that loader's samples:
    forget samples should not be answered worse than unseen ones like them.

    Runs on ``STARTED`` (the teacher is copied, retain samples take the place of the trainer's), ``EPOCH_STARTED``,
    ``LOSS_COMPLETED`` (the teacher's pass, within the step's mixed precision), ``ITERATION_COMPLETED`` (from forget to
    retain samples), ``EPOCH_COMPLETED`` and ``COMPLETED`` (the rewind).

    Args:
        forget: the forget set.
        forget_epochs: number of epochs with a pass over the forget set, at least 0.
        alpha: weight of the divergence on the retain set, at least 0.
        gamma: weight of the trainer's own loss on the retain set, at least 0.
        temperature: T, greater than 0.
        multi_label: whether the network's outputs are findings, each a question of its own, rather than classes; by
            default they are where the trainer's loss is a ``BCEWithLogitsLoss`` or ``MaskedBCEWithLogitsLoss``, or
            there is one output. A finding that is not known (NaN) does not count.
        loader: retain samples only; by default made from the trainer's own loader.
        forget_loader: forget samples only, also for the forget error of the rewind; by default made from the trainer's
            own loader (same batch size and transforms; for the forget error in order and without random transforms).
        rewind_loader: samples that no model was trained on and that are like the forget set (its classes, and whatever
            else it was chosen by), without augmentation; None: no rewind.

    Attributes:
        cost: samples and passes of the teacher; their time is that of the steps.
        tuning_cost: what the rewind's evaluation cost, a phase of its own.
        errors: the forget error after each epoch, in [0, 1], with a ``rewind_loader``.
        reference_error: the final model's error on the ``rewind_loader``; None before.
        epoch: the epoch whose weights are the result, counted from 1; None without a rewind.

    Raises:
        ValueError: if an argument is outside its range, forget or retain samples can't be found, the trainer
            accumulates gradients over several steps, its outputs or labels are of another form, or no error can be
            measured.
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``, or its loss takes probabilities.
        RuntimeError: if a ``CheckpointLoader`` stands after it; with a rewind if a ``CheckpointSaver`` or a
            ``BatchNormPolicy`` stands before it, or no epoch was completed.

    References:
        Kurmanji et al., Towards Unbounded Machine Unlearning, NeurIPS 2023, arXiv:2302.09880.

    Differs from the public code, where the forget passes have a batch size of their own and the learning rate falls by
    a schedule: here the batch size is the trainer's, and a schedule is another handler.

    Example::

        trainer = SupervisedTrainer(..., max_epochs=3, train_handlers=[SCRUB(forget), BatchNormPolicy(forget)])
    """

    cost_phase = "unlearn"

    def __init__(
        self,
        forget: ForgetSet,
        *,
        forget_epochs: int = 2,
        alpha: float = 0.001,
        gamma: float = 0.99,
        temperature: float = 4.0,
        multi_label: bool | None = None,
        loader: DataLoader | None = None,
        forget_loader: DataLoader | None = None,
        rewind_loader: DataLoader | None = None,
    ) -> None:
        if isinstance(forget_epochs, bool) or not isinstance(forget_epochs, int) or forget_epochs < 0:
            raise ValueError(f"forget_epochs should be a whole number of at least 0, but got {forget_epochs!r}.")
        for name, value in (("alpha", alpha), ("gamma", gamma)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} should be a number of at least 0, but got {value!r}.")
        if not alpha and not gamma:
            raise ValueError("alpha or gamma should be greater than 0, but both are 0: the retain set would not count.")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature should be greater than 0, but got {temperature!r}.")
        if multi_label is not None and not isinstance(multi_label, bool):
            raise ValueError(f"multi_label should be true, false or None, but got {multi_label!r}.")
        self.forget = forget
        self.forget_epochs = forget_epochs
        self.alpha = alpha
        self.gamma = gamma
        self.temperature = temperature
        self.multi_label = multi_label
        self.loader = loader
        self.forget_loader = forget_loader
        self.rewind_loader = rewind_loader
        self._clear()

    def _clear(self) -> None:
        self.cost = Cost()
        self.tuning_cost = Cost()
        self.errors: list[float] = []
        self.reference_error: float | None = None
        self.epoch: int | None = None
        self._release()

    def _release(self) -> None:
        self._teacher: nn.Module | None = None
        self._retain_batches: DataLoader | None = None
        self._forget_batches: DataLoader | None = None
        self._forget_samples: DataLoader | None = None
        self._states: list[State] = []
        self._left = 0  # forget batches of this epoch that are still to come

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._replace_loss)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._complete_iteration)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._complete_epoch)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def _start(self, engine: SupervisedTrainer) -> None:
        self._clear()
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        require_logits(engine, self)
        if getattr(engine, "accumulation_steps", 1) > 1:
            raise ValueError(
                f"accumulation_steps should be 1 with SCRUB, but is {engine.accumulation_steps}: a step would mix "
                "forget and retain batches. Use larger batches instead."
            )
        train_on_retain(engine, self.forget, self.loader)
        self._retain_batches = engine.state.dataloader
        if self.forget_epochs:
            self._forget_batches = forget_batches(engine, self.forget, self.forget_loader)
            engine.state.epoch_length += len(self._forget_batches)
        if self.forget_epochs or self.alpha:
            self._teacher = copy.deepcopy(plain_network(engine)).eval().requires_grad_(False)
        if self.rewind_loader is not None:
            self._prepare_rewind(engine)

    def _prepare_rewind(self, engine: SupervisedTrainer) -> None:
        require_before_savers(engine, self)
        completed = unwrapped_handlers(engine, Events.COMPLETED)
        if any(isinstance(earlier, BatchNormPolicy) for earlier in completed[: completed.index(self)]):
            raise RuntimeError(
                "SCRUB stands after a BatchNormPolicy, whose statistics its rewind would undo. Put it before the "
                "BatchNormPolicy in train_handlers."
            )
        self._forget_samples = self.forget_loader
        if self._forget_samples is None:
            self._forget_samples = self.forget.forget_loader(engine.data_loader)

    def _start_epoch(self, engine: SupervisedTrainer) -> None:
        if self._forget_batches is None:
            return
        if engine.state.epoch <= self.forget_epochs:
            self._left = len(self._forget_batches)
            engine.set_data(self._forget_batches)
        else:
            # Ignite, its progress bar and the clock count on epochs of one length. So this one goes on where its
            # forget pass would have ended, as a run does that is resumed within an epoch.
            engine.state.iteration += len(self._forget_batches)
            engine._init_iter = len(self._forget_batches)

    def _replace_loss(self, engine: SupervisedTrainer) -> None:
        output = engine.state.output
        if not self._left and not self.alpha:
            output[CommonKeys.LOSS] = self.gamma * output[CommonKeys.LOSS]
            return
        divergence = self._divergence(engine, output[CommonKeys.PRED], output[CommonKeys.LABEL])
        if self._left:
            output[CommonKeys.LOSS] = -divergence
        else:
            output[CommonKeys.LOSS] = self.gamma * output[CommonKeys.LOSS] + self.alpha * divergence

    def _divergence(self, engine: SupervisedTrainer, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher, _ = predict(engine, engine.state.batch, self._teacher)
        self.cost.samples += len(teacher)
        self.cost.forward += len(teacher)
        findings = are_findings(engine, student, self.multi_label)
        known = None
        if findings:
            _check_shapes(student, target, findings)
            known = ~target.reshape(student.shape).isnan()
        return distillation_loss(student, teacher, self.temperature, findings, known)

    def _complete_iteration(self, engine: SupervisedTrainer) -> None:
        if self._left and self._retain_batches is not None:
            self._left -= 1
            if not self._left:
                engine.set_data(self._retain_batches)

    def _complete_epoch(self, engine: SupervisedTrainer) -> None:
        if self._forget_samples is None:
            return
        with seconds_of(self.tuning_cost, engine.state.device):
            self.errors.append(self._error(engine, self._forget_samples, "forget"))
            state = plain_network(engine).state_dict()
            self._states.append({name: value.detach().to("cpu", copy=True) for name, value in state.items()})

    def _complete(self, engine: SupervisedTrainer) -> None:
        if self.rewind_loader is not None:
            if not self._states:
                raise RuntimeError("The run ended within its first epoch, so there is none to rewind to.")
            with seconds_of(self.tuning_cost, engine.state.device):
                self.reference_error = self._error(engine, self.rewind_loader, "rewind")
                self.epoch = nearest_epoch(self.errors, self.reference_error)
                plain_network(engine).load_state_dict(self._states[self.epoch - 1])
            logger.info("SCRUB: rewound to epoch %d of %d", self.epoch, len(self.errors))
        self._release()

    def _error(self, engine: SupervisedTrainer, loader: DataLoader, part: str) -> float:
        """Share of wrong answers, in [0, 1]."""
        wrong, answers = 0, 0
        with torch.no_grad(), evaluation_mode(engine.network):
            for batch in loader:
                prediction, target = predict(engine, batch)
                findings = are_findings(engine, prediction, self.multi_label)
                _check_shapes(prediction, target, findings)
                some, number = wrong_answers(prediction, target, findings)
                wrong, answers = wrong + some, answers + number
                self.tuning_cost.samples += len(prediction)
                self.tuning_cost.forward += len(prediction)
        if not answers:
            raise ValueError(f"The loader of {part} samples should give at least one known label, but gives none.")
        return wrong / answers


def are_findings(engine: SupervisedTrainer, prediction: torch.Tensor, multi_label: bool | None) -> bool:
    """Whether each output is a question of its own, where ``multi_label`` does not say so already."""
    if multi_label is not None:
        return multi_label
    return isinstance(engine.loss_function, BINARY) or (prediction.ndim == 2 and prediction.shape[1] == 1)


def _check_shapes(prediction: torch.Tensor, target: torch.Tensor, findings: bool) -> None:
    """Refuse outputs and labels that are neither classes nor findings."""
    fits = target.numel() == (prediction.numel() if findings else len(prediction))
    if prediction.ndim != 2 or not fits:
        wanted = "findings, as many as outputs" if findings else "one class index a sample"
        raise ValueError(
            f"SCRUB needs outputs of shape B × C and labels that are {wanted}, but got {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}. If these are the findings of a multi-label task, pass multi_label=True."
        )
