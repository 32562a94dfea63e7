"""AMUN: forget samples beside their nearest adversarial examples (Ebrahimpour-Boroojeny et al., 2025; 2503.00917)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from monai_unlearn.cost import Cost, seconds_of
from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._adversarial import Classify, input_gradients, value_range, within_range
from monai_unlearn.methods._trainer import (
    evaluation_mode,
    plain_network,
    prepare,
    require_loaded_weights,
    require_logits,
    require_supervised_trainer,
    train_on,
    train_on_retain,
)
from monai_unlearn.methods.random_labeling import BINARY

__all__ = ["AMUN", "nearest_adversarial", "normalised_step"]

logger = logging.getLogger("monai_unlearn")

# The step of the search, as a share of the ball's radius.
STRIDE = 0.1
FINDINGS = "For the findings of a multi-label task use another method, BoundaryShrink, say."


def normalised_step(
    moved: torch.Tensor, gradients: torch.Tensor, images: torch.Tensor, radius: torch.Tensor
) -> torch.Tensor:
    """Move each image a tenth of the radius along its gradient, and back into the ball around where it came from.

    Args:
        moved: shape B × ….
        gradients: of the same shape; one that is 0 moves nothing.
        images: what they came from, of the same shape.
        radius: largest Euclidean distance from them, shape B × 1 × …, at least 0.

    Returns:
        Images of the same shape, each within the range of values that its own ``images`` has.
    """
    largest = _amax(gradients.abs())
    # Scaled first: the squares of a gradient of 1e-30, which a sure network has, would all be 0.
    direction = torch.where(largest > 0, gradients / largest, 0)
    moved = moved + STRIDE * radius * direction / _norm(direction).clamp(min=1e-12)
    away = moved - images
    distance = _norm(away)
    shrunk = torch.where(distance > radius, radius / distance, 1)
    return within_range(images + shrunk * away, images)


def nearest_adversarial(
    classify: Classify, images: torch.Tensor, labels: torch.Tensor, epsilon: float = 0.04, steps: int = 50
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each image one as near as can be found that is answered wrong.

    Steps up the loss from the image on, within a ball of radius ε around it (projected gradient ascent), end at the
    first wrong answer. Where there is none, they begin anew with ε doubled, until the ball holds all images of the same
    range of values.

    Args:
        classify: images → logits, B × C; no sample's outputs may depend on another sample.
        images: shape B × ….
        labels: true classes, shape B.
        epsilon: the first radius, greater than 0, as a share of the range from the least to the largest value of the
            image.
        steps: largest number of steps with each radius, at least 1.

    Returns:
        Images of the same shape, the classes that they are taken for, and which of them are answered wrong: the others
        are as they were. An image that is answered wrong from the start is its own nearest.
    """
    examples, answers = images.detach().clone(), labels.clone()
    found = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    low, high = value_range(images)
    left = torch.arange(len(images), device=images.device)
    whole = images[0].numel() ** 0.5  # radius of a ball that holds all
    while len(left):
        moved = images[left]
        for step in range(steps + 1):
            gradients, logits = input_gradients(classify, moved, labels[left])
            wrong = logits.argmax(1) != labels[left]
            examples[left[wrong]], answers[left[wrong]] = moved[wrong], logits.argmax(1)[wrong]
            found[left[wrong]] = True
            left, moved, gradients = left[~wrong], moved[~wrong], gradients[~wrong]
            if not len(left) or step == steps:
                break
            moved = normalised_step(moved, gradients, images[left], epsilon * (high - low)[left])
        if epsilon >= whole:
            break
        epsilon = 2 * epsilon
    return examples, answers, found


class AMUN:
    """Go on training, and beside it train the nearest adversarial example of each forget sample on its wrong label.

    minimise CE(f(x), y) over the training samples + CE(f(x′), y′) over the adversarial examples, each sample counting
    the same: x′ is the nearest image to a forget sample x that the original answers wrong, y′ its answer. As the
    boundary is near x′ already, little moves but the network's confidence around x.

    A step takes a batch of either; an epoch is one pass over the training samples, in which the examples come round as
    often as it takes, in a new order each time. Their batches' weights are such that a sample counts as in one set of
    both: α = n / (n + n′) and 1 − α, for n training samples and n′ examples.

    Runs on ``STARTED``, where the examples are found (by a frozen copy of the original in evaluation mode; without
    augmentation; they are kept on the CPU), on ``LOSS_COMPLETED``, where a batch of them goes through the network (in
    training mode, within the step's mixed precision) and its loss is added, and on ``COMPLETED``.

    Args:
        forget: the forget set.
        epsilon: the first radius of the search, greater than 0, as a share of the range from the least to the largest
            value of an image; doubled until the answer is wrong.
        steps: largest number of steps of the search with each radius, at least 1.
        true_labels: whether forget samples themselves, with their true labels, are among the training samples, as in
            the paper; False: the retain samples alone.
        alpha: weight of the training samples' loss, in [0, 1]; None: as above, by their numbers. With 1, which
            ``true_labels`` excludes, no forget sample is looked at, which is fine-tuning.
        multi_label: whether the outputs are findings. They are refused here, which tells a bundle so before anything is
            trained; where outputs or labels show it, they are refused later.
        seed: seed of the examples' order.
        loader: training samples; by default the trainer's own loader, or its retain samples.
        forget_loader: forget samples only, without augmentation; by default made from the trainer's own loader.

    Attributes:
        cost: the search, and samples and passes of the examples' batches, whose time is that of the steps.
        examples: how many forget samples have an adversarial example.
        notes: how many have none, in a sentence.

    Raises:
        ValueError: if an argument is outside its range, forget or retain samples can't be found, labels are no class
            indices (findings are refused), or the original's outputs are not finite.
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``, its loss takes probabilities, or its
            network takes more than the images.
        RuntimeError: if a ``CheckpointLoader`` stands after it, or no forget sample has an adversarial example.

    References:
        Ebrahimpour-Boroojeny et al., AMUN: Adversarial Machine UNlearning (Not All Wrong is Bad: Using Adversarial
        Examples for Unlearning), ICML 2025, arXiv:2503.00917.

    Differs from the public code, where examples are mixed with the training samples in one batch, the search goes on
    from where it was when ε is doubled, without an end, and images are cut to [0, 1].

    Example::

        trainer = SupervisedTrainer(..., train_handlers=[AMUN(forget), BatchNormPolicy(forget)])
    """

    cost_phase = "unlearn"

    def __init__(
        self,
        forget: ForgetSet,
        *,
        epsilon: float = 0.04,
        steps: int = 50,
        true_labels: bool = True,
        alpha: float | None = None,
        multi_label: bool = False,
        seed: int = 0,
        loader: DataLoader | None = None,
        forget_loader: DataLoader | None = None,
    ) -> None:
        if not 0 < epsilon < float("inf"):
            raise ValueError(f"epsilon should be greater than 0, but got {epsilon!r}.")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps should be a whole number of at least 1, but got {steps!r}.")
        if not isinstance(true_labels, bool):
            raise ValueError(f"true_labels should be true or false, but got {true_labels!r}.")
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"alpha should lie in [0, 1], or be None, but got {alpha!r}.")
        if alpha == 1 and true_labels:
            raise ValueError(
                "alpha should be below 1 where forget samples are trained on with their true labels, but got 1: "
                "nothing would be unlearned. Lower it, or pass true_labels=False."
            )
        if not isinstance(multi_label, bool):
            raise ValueError(f"multi_label should be true or false, but got {multi_label!r}.")
        if multi_label:
            raise ValueError(f"multi_label should be false with AMUN, but got True. {FINDINGS}")
        self.forget = forget
        self.epsilon = epsilon
        self.steps = steps
        self.true_labels = true_labels
        self.alpha = alpha
        self.seed = seed
        self.loader = loader
        self.forget_loader = forget_loader
        self._clear()

    def _clear(self) -> None:
        self.cost = Cost()
        self.examples = 0
        self.notes: list[str] = []
        self._release()

    def _release(self) -> None:
        self._batches: Iterator[tuple[torch.Tensor, torch.Tensor]] | None = None
        self._weight = 1.0

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._add)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def _start(self, engine: SupervisedTrainer) -> None:
        self._clear()
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        require_logits(engine, self)
        forget_loader = self.forget_loader
        if forget_loader is None:
            forget_loader = self.forget.forget_loader(engine.data_loader)
        batch_size = getattr(engine.data_loader, "batch_size", None)
        if not self.true_labels:
            train_on_retain(engine, self.forget, self.loader)
        elif self.loader is not None:
            train_on(engine, self.loader, "training")
        if self.alpha == 1:
            return
        with seconds_of(self.cost, engine.state.device), evaluation_mode(engine.network):
            images, targets = self._search(engine, forget_loader)
        self._weight = self._share(engine) if self.alpha is None else self.alpha
        self._batches = _rounds(images, targets, batch_size or len(images), self.seed)

    def _share(self, engine: SupervisedTrainer) -> float:
        """Share of the training samples among these and the examples."""
        dataset: Any = getattr(engine.state.dataloader, "dataset", None)
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"alpha should be given with a {type(engine.state.dataloader).__name__}, whose number of samples can't "
                "be told, but is None."
            )
        return len(dataset) / (len(dataset) + self.examples)

    def _search(self, engine: SupervisedTrainer, loader: DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
        """The adversarial examples of the forget samples, and the labels to train them on."""
        original = copy.deepcopy(plain_network(engine)).eval().requires_grad_(False)
        images, targets, count = [], [], 0
        for batch in tqdm(loader, desc="adversarial examples", unit="batch", disable=None, leave=False):
            found_images, found_targets, rows = self._search_batch(engine, original, batch)
            images.append(found_images)
            targets.append(found_targets)
            count += rows
        self.examples = sum(len(some) for some in images)
        if not count:
            raise ValueError("The loader of forget samples should hold at least one sample, but is empty.")
        if not self.examples:
            raise RuntimeError(
                f"None of the {count} forget samples has an adversarial example, however far from it: the original "
                "answers all alike, or its outputs have no slope. Check the original, or use more steps."
            )
        logger.info("AMUN: adversarial examples of %d of %d forget samples", self.examples, count)
        if self.examples < count:
            self.notes.append(
                f"{count - self.examples} of {count} forget images have no adversarial example, so these were not "
                "unlearned by any. Use more steps."
            )
        return torch.cat(images), torch.cat(targets)

    def _search_batch(
        self, engine: SupervisedTrainer, original: nn.Module, batch: Any
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Those of a batch, on the CPU, and how many samples it has."""
        images, target, args, kwargs = prepare(engine, batch)
        if args or kwargs:
            raise TypeError(
                "AMUN can't work with a network that takes more than the images, since there would be none of that for "
                "adversarial examples. Use another method, RandomLabeling, say."
            )
        images = images.as_tensor() if isinstance(images, MetaTensor) else images
        target = target.as_tensor() if isinstance(target, MetaTensor) else target
        labels = _classes(target, len(images))

        def classify(moved: torch.Tensor) -> torch.Tensor:
            for name in ("samples", "forward", "backward"):
                setattr(self.cost, name, getattr(self.cost, name) + len(moved))
            return _as_classes(engine.inferer(moved, original), labels, engine.loss_function)

        examples, answers, found = nearest_adversarial(classify, images, labels, self.epsilon, self.steps)
        wrong = answers.to(target.dtype).reshape(target.shape)
        return examples[found].cpu(), wrong[found].cpu(), len(images)

    def _add(self, engine: SupervisedTrainer) -> None:
        if self._batches is None:
            return
        images, targets = (
            part.to(engine.state.device, non_blocking=engine.non_blocking) for part in next(self._batches)
        )
        loss = engine.loss_function(engine.inferer(images, plain_network(engine)), targets).mean()
        output = engine.state.output
        output[CommonKeys.LOSS] = self._weight * output[CommonKeys.LOSS] + (1 - self._weight) * loss
        self.cost.samples += len(images)
        self.cost.forward += len(images)
        self.cost.backward += len(images)

    def _complete(self, engine: Engine) -> None:
        self._release()


def _amax(values: torch.Tensor) -> torch.Tensor:
    """The largest of each image, shape B × 1 × …."""
    return values.amax(dim=tuple(range(1, values.ndim)), keepdim=True)


def _norm(values: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of each image, shape B × 1 × …."""
    return torch.linalg.vector_norm(values, dim=tuple(range(1, values.ndim)), keepdim=True)


def _classes(target: torch.Tensor, size: int) -> torch.Tensor:
    """Labels as class indices of shape B; others are refused."""
    if target.numel() != size or not bool(((target >= 0) & (target == target.long())).all()):
        raise ValueError(
            "AMUN needs labels that are one class index a sample (0 or 1 for one output, and known), but got labels of "
            f"shape {tuple(target.shape)} for {size} samples. Turn one-hot vectors into class indices. {FINDINGS}"
        )
    return target.reshape(-1).long()


def _as_classes(logits: torch.Tensor, labels: torch.Tensor, loss: Any) -> torch.Tensor:
    """Logits of shape B × C with C ≥ 2: one output z is (0, z), of which the cross entropy is the binary one of z."""
    if logits.ndim == 2 and logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    elif logits.ndim != 2 or isinstance(loss, BINARY):
        raise ValueError(
            f"AMUN needs a network whose outputs are classes, B × C, but got outputs of shape {tuple(logits.shape)} "
            f"with {type(loss).__name__}. {FINDINGS}"
        )
    if int(labels.max()) >= logits.shape[1]:
        raise ValueError(f"labels should lie in [0, {logits.shape[1] - 1}], but one is {int(labels.max())}.")
    if not bool(logits.isfinite().all()):
        raise ValueError(
            "The original's outputs on the forget samples should be finite, but some are NaN or infinite. Check the "
            "images and the original model."
        )
    return logits


def _rounds(
    images: torch.Tensor, targets: torch.Tensor, batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches without end, in a new order each time round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        batches = torch.randperm(len(images), generator=generator).split(batch_size)
        # BatchNorm is undefined on a batch of one image; another one is left out each time.
        for rows in batches if len(batches[-1]) > 1 or len(batches) == 1 else batches[:-1]:
            yield images[rows], targets[rows]
