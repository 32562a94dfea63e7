"""RUM: one method for the forget samples learned by heart, another for the others (Zhao et al., 2024; 2406.01257)."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.utils import CommonKeys
from torch.nn import functional
from torch.utils.data import DataLoader

from monai_unlearn.cost import Cost, seconds_of
from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._trainer import (
    evaluation_mode,
    plain_network,
    predict,
    require_batches,
    require_loaded_weights,
    require_supervised_trainer,
)
from monai_unlearn.methods.random_labeling import BINARY, RandomLabeling

__all__ = ["RUM", "error_norm", "shared_out", "strata"]

logger = logging.getLogger("monai_unlearn")

STRATA = ("low", "middle", "high")
TREATMENTS = ("nothing", "finetune", "random_labeling")


def error_norm(logits: torch.Tensor, labels: torch.Tensor, findings: bool = False) -> torch.Tensor:
    """The score by default, EL2N: ‖softmax(z) − one-hot(y)‖₂, or the root mean square of σ(z) − y over known findings.

    Args:
        logits: z, shape B × C.
        labels: class indices, shape B or B × 1; with ``findings`` labels in [0, 1], shape B × C (B for one finding),
            NaN where a finding is not known.
        findings: whether each logit is a finding of its own.

    Returns:
        Float64 tensor of shape B; NaN where no finding is known.

    Raises:
        ValueError: if the shapes don't fit.
    """
    entries = logits.numel() if findings else len(logits)
    if logits.ndim != 2 or labels.numel() != entries:
        raise ValueError(
            f"RUM needs outputs B × C with one class a sample, or findings of the outputs' shape, but got outputs "
            f"{tuple(logits.shape)} and labels {tuple(labels.shape)}. Give it scores."
        )
    logits = logits.double()
    if findings:
        return (logits.sigmoid() - labels.reshape(logits.shape).double()).square().nanmean(1).sqrt()
    return (logits.softmax(1) - functional.one_hot(labels.reshape(-1).long(), logits.shape[1])).norm(dim=1)


def strata(scores: Sequence[float] | torch.Tensor) -> tuple[list[int], list[int], list[int]]:
    """Split samples into thirds by a score, the lowest first; of equal scores, the first sample comes first.

    Args:
        scores: one finite number a sample, at least three of them and not all equal.

    Returns:
        Positions of the low, the middle and the high third, ascending. Where their number is no multiple of three,
        the lower thirds are one larger.

    Raises:
        ValueError: if a score is not finite, there are fewer than three, or they are all equal.
    """
    values = torch.as_tensor(scores, dtype=torch.float64)
    if bad := int((~values.isfinite()).sum()):
        raise ValueError(
            f"Each forget sample should have a finite score, but {bad} of {len(values)} have none: the training that "
            "recorded the scores never met them, or no finding of theirs is known. Use another score or method."
        )
    if len(values) < len(STRATA):
        raise ValueError(
            f"Each third of the forget set should hold at least one sample, but there are {len(values)} in all. Use "
            "another method for so small a forget set."
        )
    if bool((values == values[0]).all()):
        raise ValueError(
            f"The scores of the forget samples should differ, but all {len(values)} are {float(values[0]):.4g}, so no "
            "third is higher than another. Use another score or method."
        )
    low, middle, high = (sorted(part.tolist()) for part in values.argsort(stable=True).tensor_split(len(STRATA)))
    return low, middle, high


def shared_out(epochs: int, parts: int) -> list[int]:
    """Epochs of each of several parts in turn: equal shares, the last parts one more where it does not come out even.

    Args:
        epochs: at least ``parts``.
        parts: at least 1.
    """
    share, rest = divmod(epochs, parts)
    return [share + (part >= parts - rest) for part in range(parts)]


class RUM:
    """Unlearn the forget set third by third, those that the model has learned least by heart first, each in its way.

    The forget set is split into three strata of equal size by a score of how hard each sample is to the original, which
    stands for how far it was memorised. A stratum has one of these treatments:

    - ``"nothing"``: it is left out, and has no epochs of its own: what is hardly memorised is hardly to be unlearned;
    - ``"finetune"``: train on the retain set alone;
    - ``"random_labeling"``: train on the retain set, and on the stratum with a random wrong label for each sample,
      redrawn each time (as ``RandomLabeling``).

    The trainer's epochs are shared out evenly among the strata with another treatment than ``"nothing"``, from low to
    high; the last get one more where it does not come out even. No forget sample is ever trained on with its true
    label: the strata that are not being treated are left out.

    Runs on ``STARTED`` (scores, strata and loaders), ``EPOCH_STARTED`` (the stratum's loader takes the place of the
    trainer's), ``ITERATION_STARTED`` (labels are redrawn) and ``COMPLETED``.

    Args:
        forget: the forget set.
        low: treatment of the third with the lowest scores.
        middle: treatment of the third in the middle.
        high: treatment of the third with the highest scores.
        scores: id → score, higher is harder; the ids as the training data's records have them under the forget set's
            key (for files, the path there). Other samples' scores are not looked at. By default each forget sample's
            EL2N score under the original model, with one more pass over the forget set.
        num_classes: number of classes, at least 2; by default as many as the network has outputs.
        label_key: key of the label in a batch.
        seed: seed of the draws.
        multi_label: whether labels are findings rather than class indices; by default they are where the trainer's loss
            is a ``BCEWithLogitsLoss``, ``BCELoss`` or ``MaskedBCEWithLogitsLoss``.

    Attributes:
        cost: what the scores cost.

    Raises:
        ValueError: if a treatment is none of the above or all are ``"nothing"``, the trainer has fewer epochs than
            there are strata to treat, a forget sample has no finite score, there are fewer than three forget samples or
            all have one score, or forget or retain samples can't be found.
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``, or its loss takes probabilities.
        RuntimeError: if a ``CheckpointLoader`` stands after it.

    References:
        Zhao et al., What Makes Unlearning Hard and What to Do about It, NeurIPS 2024, arXiv:2406.01257. Differs from
        the paper: a score of one model takes the place of memorisation estimated from many; all strata have one
        optimizer and learning rate; and the strata whose turn is still to come are left out, which the public code goes
        on training on with their true labels.

    Example::

        trainer = SupervisedTrainer(..., max_epochs=6, train_handlers=[RUM(forget), BatchNormPolicy(forget)])
    """

    cost_phase = "unlearn"

    def __init__(
        self,
        forget: ForgetSet,
        *,
        low: str = "nothing",
        middle: str = "finetune",
        high: str = "random_labeling",
        scores: Mapping[Any, float] | None = None,
        num_classes: int | None = None,
        label_key: str = CommonKeys.LABEL,
        seed: int = 0,
        multi_label: bool | None = None,
    ) -> None:
        treatments = dict(zip(STRATA, (low, middle, high)))
        for stratum, treatment in treatments.items():
            if treatment not in TREATMENTS:
                raise ValueError(f"{stratum} should be one of {', '.join(TREATMENTS)}, but got {treatment!r}.")
        self.treatments = {name: treatment for name, treatment in treatments.items() if treatment != "nothing"}
        if not self.treatments:
            raise ValueError("low, middle or high should be another treatment than nothing, or nothing is unlearned.")
        if scores is not None and not isinstance(scores, Mapping):
            raise ValueError(f"scores should map ids to numbers, but got a {type(scores).__name__}.")
        self.forget = forget
        self.scores = scores
        self.num_classes = num_classes
        self.label_key = label_key
        self.seed = seed
        self.multi_label = multi_label
        self.cost = Cost()
        self._release()
        self._labeling()  # refuses what it can't work with

    def _labeling(self) -> RandomLabeling:
        return RandomLabeling(
            self.forget,
            num_classes=self.num_classes,
            label_key=self.label_key,
            seed=self.seed,
            multi_label=self.multi_label,
        )

    def _release(self) -> None:
        self._phases: list[_Phase] = []
        self._now: _Phase | None = None

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.ITERATION_STARTED, self._relabel)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def _start(self, engine: SupervisedTrainer) -> None:
        self._release()
        self.cost = Cost()
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        epochs = engine.state.max_epochs
        if epochs < len(self.treatments):
            raise ValueError(
                f"epochs should be at least {len(self.treatments)}, one for each of {', '.join(self.treatments)}, but "
                f"the trainer has {epochs}. Raise them, or let a stratum have nothing."
            )
        samples = self.forget.forget_loader(engine.data_loader)
        positions: list[int] = samples.dataset.indices  # type: ignore[attr-defined]
        with seconds_of(self.cost, engine.state.device):
            scores = self._computed(engine, samples) if self.scores is None else self._given(self.scores, samples)
        parts = dict(zip(STRATA, strata(scores)))
        for (name, treatment), own in zip(self.treatments.items(), shared_out(epochs, len(self.treatments))):
            redrawn = treatment == "random_labeling"
            also = [positions[i] for i in parts[name]] if redrawn else []
            loader = self.forget.retain_loader(engine.data_loader, training=True, also=also)
            require_batches(loader, "retain")
            self._phases.append(_Phase(loader, own, self._labeling() if redrawn else None))
        # Ignite, its progress bar and the clock count on epochs of one length.
        self._now = self._phases[0]
        engine.set_data(self._now.loader)
        engine.state.epoch_length = max(len(phase.loader) for phase in self._phases)
        logger.info(
            "Forget set in thirds of %s samples by their score; epochs: %s",
            ", ".join(str(len(part)) for part in parts.values()),
            ", ".join(f"{phase.epochs} for {name}" for name, phase in zip(self.treatments, self._phases)),
        )

    def _given(self, scores: Mapping[Any, float], samples: DataLoader) -> list[float]:
        """The scores that were given, in the samples' order."""
        known = {_plain(key): float(value) for key, value in scores.items()}
        ids = self.forget.ids(samples.dataset)
        if missing := sum(value not in known for value in ids):
            raise ValueError(
                f"scores should hold each forget sample's id, but {missing} of {len(ids)} are not there. Compute the "
                "scores on the data that is trained on, or leave scores out."
            )
        return [known[value] for value in ids]

    def _computed(self, engine: SupervisedTrainer, samples: DataLoader) -> list[float]:
        """The EL2N score of each forget sample under the network as it is."""
        if isinstance(engine.loss_function, torch.nn.BCELoss):
            raise TypeError(
                "RUM should be given a network whose outputs are logits, but BCELoss takes probabilities. Use "
                "BCEWithLogitsLoss, and leave the sigmoid out of the network, or give it scores."
            )
        findings = isinstance(engine.loss_function, BINARY) if self.multi_label is None else self.multi_label
        found: list[float] = []
        with torch.no_grad(), evaluation_mode(plain_network(engine)):
            for batch in samples:
                logits, labels = predict(engine, batch)
                found += error_norm(logits, labels, findings).tolist()
                self.cost.samples += len(logits)
                self.cost.forward += len(logits)
        return found

    def _start_epoch(self, engine: SupervisedTrainer) -> None:
        last = 0
        for phase in self._phases:
            last += phase.epochs
            if engine.state.epoch <= last:
                break
        if phase is not self._now:
            self._now = phase
            engine.set_data(phase.loader)
        # A shorter epoch goes on where its missing steps would have ended, as a run that is resumed within an epoch.
        skipped = engine.state.epoch_length - len(phase.loader)
        if skipped:
            engine.state.iteration += skipped
            engine._init_iter = skipped

    def _relabel(self, engine: SupervisedTrainer) -> None:
        if self._now is not None and self._now.labeling is not None:
            self._now.labeling._relabel(engine)

    def _complete(self, engine: Engine) -> None:
        phases = self._phases
        self._release()
        for phase in phases:
            if phase.labeling is not None:
                phase.labeling._complete(engine)


class _Phase:
    """The epochs of one stratum."""

    def __init__(self, loader: DataLoader, epochs: int, labeling: RandomLabeling | None) -> None:
        self.loader = loader
        self.epochs = epochs
        self.labeling = labeling
        if labeling is not None:
            labeling._generator.manual_seed(labeling.seed)


def _plain(value: Any) -> Hashable:
    """A number as Python's own, so that a NumPy or tensor id equals the one in the scores."""
    return value.item() if hasattr(value, "item") else value
