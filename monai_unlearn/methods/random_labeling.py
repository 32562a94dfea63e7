"""Random labeling: forget samples are trained on wrong labels (Golatkar et al., 2020; arXiv:1911.04933)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.utils import CommonKeys

from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._trainer import evaluation_mode, predict, require_loaded_weights, require_supervised_trainer

__all__ = ["RandomLabeling", "other_labels"]


def other_labels(labels: torch.Tensor, num_classes: int, generator: torch.Generator) -> torch.Tensor:
    """Draw for each label another one, uniformly among the ``num_classes - 1`` others.

    Args:
        labels: true classes of any shape, integer-valued, in [0, num_classes - 1].
        num_classes: number of classes, at least 2. With two, the draw is a flip.
        generator: CPU generator of the draw.

    Returns:
        Labels of the same shape, type and device, none equal to the true one.

    Raises:
        ValueError: if there are fewer than two classes, or a label is not one of them.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes should be at least 2, but got {num_classes!r}.")
    if labels.numel() and (labels.min() < 0 or labels.max() >= num_classes or (labels != labels.round()).any()):
        raise ValueError(
            f"labels should be whole numbers in [0, {num_classes - 1}], but got [{labels.min()}, {labels.max()}]. "
            "One-hot and soft labels can't be redrawn."
        )
    step = torch.randint(1, num_classes, labels.shape, generator=generator).to(labels)
    return (labels + step) % num_classes


class RandomLabeling:
    r"""Train on a random wrong label for each forget sample, and on the true label for all others.

    minimise CE(f(x), y) over the retain set + CE(f(x), y′) over the forget set, y′ ~ U({1…C} \\ {y}), redrawn
    each time a sample is met, that is, each epoch. With two classes the label is flipped, the same in every epoch.

    Runs on ``STARTED``, ``ITERATION_STARTED`` (the batch is replaced, never changed in place, so caches stay as
    they are) and ``COMPLETED``.

    Args:
        forget: the forget set.
        num_classes: number of classes, at least 2; by default as many as the network has outputs (2 if it has
            one), found with one forward pass of the first batch's first sample.
        label_key: key of the label in a batch; shape B or B × 1.
        seed: seed of the draws.

    Raises:
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``.
        ValueError: if labels are not class indices, or a part of the request is not in the training data.
        RuntimeError: if a run ends without having met a forget sample.

    References:
        Golatkar et al., Eternal Sunshine of the Spotless Net, CVPR 2020, arXiv:1911.04933.

    Example::

        forget = ForgetSet(["patient 7"], key="patient_id")
        trainer = SupervisedTrainer(..., train_handlers=[RandomLabeling(forget)])
    """

    def __init__(
        self, forget: ForgetSet, *, num_classes: int | None = None, label_key: str = CommonKeys.LABEL, seed: int = 0
    ) -> None:
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes should be at least 2, but got {num_classes!r}.")
        self.forget = forget
        self.num_classes = num_classes
        self.label_key = label_key
        self.seed = seed
        self._generator = torch.Generator()
        self._classes: int | None = num_classes
        self._relabeled = 0

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._relabel)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def _start(self, engine: SupervisedTrainer) -> None:
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        self.forget.check(engine.data_loader)
        self._generator.manual_seed(self.seed)
        self._classes = self.num_classes
        self._relabeled = 0

    def _relabel(self, engine: SupervisedTrainer) -> None:
        batch = engine.state.batch
        is_forget = self.forget.mask(batch)
        if not is_forget.any():
            return
        labels = batch[self.label_key]
        if not isinstance(labels, torch.Tensor) or labels.numel() != len(is_forget):
            shape = tuple(labels.shape) if isinstance(labels, torch.Tensor) else type(labels).__name__
            raise ValueError(
                f"batch[{self.label_key!r}] should hold one class index a sample, shape B or B × 1, but got {shape} "
                f"for {len(is_forget)} samples. Multi-label and one-hot targets are not supported by RandomLabeling."
            )
        if self._classes is None:
            self._classes = self._count_classes(engine, batch)
        rows = is_forget.to(labels.device)
        relabeled = labels.clone()
        relabeled[rows] = other_labels(labels[rows], self._classes, self._generator)
        engine.state.batch = {**batch, self.label_key: relabeled}
        self._relabeled += int(is_forget.sum())

    def _complete(self, engine: Engine) -> None:
        if not self._relabeled:
            raise RuntimeError(
                f"RandomLabeling met no forget sample in {engine.state.iteration} iterations, so nothing was "
                "unlearned. Check the forget set's key and that the loader holds its samples."
            )

    @staticmethod
    def _count_classes(engine: SupervisedTrainer, batch: Mapping) -> int:
        first = {
            key: value[:1] if isinstance(value, (torch.Tensor, list, tuple)) else value for key, value in batch.items()
        }
        with torch.no_grad(), evaluation_mode(engine.network):
            return max(predict(engine, first)[0].shape[1], 2)
