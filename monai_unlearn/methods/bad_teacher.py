"""Bad teacher: an untrained network teaches the forget set (Chundawat et al., 2023; arXiv:2205.08096)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import nn
from torch.utils.data import DataLoader

from monai_unlearn.cost import Cost
from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._trainer import (
    plain_network,
    prepare,
    require_loaded_weights,
    require_logits,
    require_supervised_trainer,
    train_on,
)
from monai_unlearn.methods.retrain import InitialState, held, restore
from monai_unlearn.methods.scrub import are_findings, distillation_loss

__all__ = ["BadTeacher", "bad_teaching_loss"]


def bad_teaching_loss(
    student: torch.Tensor,
    incompetent: torch.Tensor,
    competent: torch.Tensor,
    is_forget: torch.Tensor,
    temperature: float,
    findings: bool = False,
) -> torch.Tensor:
    """T² · mean over the samples of KL(teacher ‖ student), with another teacher for forget samples than for the rest.

    Args:
        student: logits of a batch, shape B × C.
        incompetent: logits of the batch's forget rows, in their order, from the teacher that knows nothing.
        competent: logits of the batch's other rows, in their order, from the original.
        is_forget: boolean, shape B.
        temperature: T, greater than 0.
        findings: as in ``distillation_loss``.

    Returns:
        Scalar tensor, at least 0 but for rounding.

    Raises:
        ValueError: if shapes differ.
    """
    rows = torch.cat([student[is_forget], student[~is_forget]])
    return distillation_loss(rows, torch.cat([incompetent, competent]), temperature, findings)


class BadTeacher:
    """Teach the forget set by a network that knows nothing, and a part of the retain set by the original.

    Of a randomly initialised network u and the original t, both frozen, and the network f, with T the temperature:

    minimise T² KL(u(x) ‖ f(x)) over the forget set + T² KL(t(x) ‖ f(x)) over a random share of the retain set.

    Each batch mixes both, as they come, and each sample passes one teacher. No label is used; so a finding that is not
    known (NaN) counts like any other: the teachers know an answer.

    Runs on ``STARTED`` (the teachers are made, the mixed loader takes the place of the trainer's),
    ``LOSS_COMPLETED`` (the teachers' pass, within the step's mixed precision) and ``COMPLETED``.

    Args:
        forget: the forget set.
        initial_state: weights of the network that knows nothing: a state dict, a network, the path of a checkpoint, or
            a function that returns one of these. They should be random: pretrained ones know something.
        share: share of the retain samples that are used, in (0, 1].
        temperature: T, greater than 0.
        multi_label: whether the network's outputs are findings, each a question of its own, rather than classes; by
            default they are where the trainer's loss is a ``BCEWithLogitsLoss`` or ``MaskedBCEWithLogitsLoss``, or
            there is one output.
        seed: seed of the draw of the retain samples.
        loader: forget samples and those retain samples that are to be used, mixed; by default made from the trainer's
            own loader (same batch size, order and transforms).

    Attributes:
        cost: samples and passes of the teachers; their time is that of the steps.

    Raises:
        ValueError: if an argument is outside its range, the initial state is not complete or that of the original
            itself, forget or retain samples can't be found, or outputs are of another form.
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``, or its loss takes probabilities.
        RuntimeError: if a ``CheckpointLoader`` stands after it, or a run ends without having met a forget sample.

    References:
        Chundawat et al., Can Bad Teaching Induce Forgetting? Unlearning in Deep Networks using an Incompetent Teacher,
        AAAI 2023, arXiv:2205.08096.

    Differs from the public code, where every sample passes both teachers, and the divergence is divided by the number
    of classes too (which Adam hardly notices) and has no factor T² (1 at the default).

    Example::

        bad_teacher = BadTeacher(forget, initial_state=lambda: ResNet(...))
        trainer = SupervisedTrainer(..., max_epochs=1, train_handlers=[bad_teacher, BatchNormPolicy(forget)])
    """

    cost_phase = "unlearn"

    def __init__(
        self,
        forget: ForgetSet,
        *,
        initial_state: InitialState,
        share: float = 0.3,
        temperature: float = 1.0,
        multi_label: bool | None = None,
        seed: int = 0,
        loader: DataLoader | None = None,
    ) -> None:
        if isinstance(share, bool) or not 0 < share <= 1:
            raise ValueError(f"share should lie in (0, 1], but got {share!r}.")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature should be greater than 0, but got {temperature!r}.")
        if multi_label is not None and not isinstance(multi_label, bool):
            raise ValueError(f"multi_label should be true, false or None, but got {multi_label!r}.")
        self.forget = forget
        self.initial_state = held(initial_state)
        self.share = share
        self.temperature = temperature
        self.multi_label = multi_label
        self.seed = seed
        self.loader = loader
        self.cost = Cost()
        self._incompetent: nn.Module | None = None
        self._competent: nn.Module | None = None
        self._met = 0

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._replace_loss)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def _start(self, engine: SupervisedTrainer) -> None:
        self._release()
        self.cost = Cost()
        self._met = 0
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        require_logits(engine, self)
        loader = self.loader
        if loader is None:
            # It says itself what kind of loader it can't work with.
            loader = self.forget.with_part_of_retain(engine.data_loader, self.share, self.seed)  # type: ignore[arg-type]
        self.forget.check(loader)
        train_on(engine, loader, "forget and retain")
        original = plain_network(engine)
        incompetent = copy.deepcopy(original)
        restore(incompetent, self.initial_state)
        if all(torch.equal(own, other) for own, other in zip(original.parameters(), incompetent.parameters())):
            raise ValueError(
                "initial_state should be the weights of a network that knows nothing, but they are the original's own, "
                "with which nothing would be unlearned. Give a newly made network."
            )
        self._incompetent = incompetent.eval().requires_grad_(False)
        self._competent = copy.deepcopy(original).eval().requires_grad_(False)

    def _replace_loss(self, engine: SupervisedTrainer) -> None:
        # Rows of a MetaTensor would be taken with their metadata, one by one.
        student = engine.state.output[CommonKeys.PRED].as_subclass(torch.Tensor)
        findings = are_findings(engine, student, self.multi_label)
        if not findings and student.ndim == 2 and student.shape[1] == 1:
            raise ValueError(
                "multi_label should be true for a network with one output, but got False: of a single class there is "
                "nothing to learn. Pass multi_label=True, or leave it out."
            )
        is_forget = self.forget.mask(engine.state.batch).to(student.device)
        incompetent, competent = self._taught(engine, is_forget, student)
        engine.state.output[CommonKeys.LOSS] = bad_teaching_loss(
            student, incompetent, competent, is_forget, self.temperature, findings
        )
        self._met += int(is_forget.sum())
        self.cost.samples += len(student)
        self.cost.forward += len(student)

    def _taught(
        self, engine: SupervisedTrainer, is_forget: torch.Tensor, student: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs of either teacher for its rows of the batch; where it has none, there is no pass."""
        inputs, _, args, kwargs = prepare(engine, engine.state.batch)

        def some(value: Any, rows: torch.Tensor) -> Any:
            if not isinstance(value, torch.Tensor) or value.shape[:1] != rows.shape:
                return value
            return value.as_subclass(torch.Tensor)[rows]  # type: ignore[arg-type]

        def outputs(teacher: Any, rows: torch.Tensor) -> torch.Tensor:
            if not rows.any():
                return student.detach()[:0]
            further = {name: some(value, rows) for name, value in kwargs.items()}
            taught: torch.Tensor = engine.inferer(
                some(inputs, rows), teacher, *(some(value, rows) for value in args), **further
            )
            return taught

        with torch.no_grad():
            return outputs(self._incompetent, is_forget), outputs(self._competent, ~is_forget)

    def _complete(self, engine: Engine) -> None:
        self._release()
        if not self._met:
            raise RuntimeError(
                f"BadTeacher met no forget sample in {engine.state.iteration} iterations, so nothing was unlearned. "
                "Check the forget set's key and that the loader holds its samples."
            )

    def _release(self) -> None:
        self._incompetent = self._competent = None
