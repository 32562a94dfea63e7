"""Relearn time: how soon does a model know the forget set again?"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.utils import CommonKeys, set_determinism
from torch.utils.data import Subset

from monai_unlearn.bundle import Bundle
from monai_unlearn.checkpoint import Checkpoint
from monai_unlearn.cost import Cost, seconds_of
from monai_unlearn.data import ImageData, Split
from monai_unlearn.training import run_trainer

__all__ = ["MOST_IMAGES", "forget_loss", "relearn_steps"]

logger = logging.getLogger("monai_unlearn")

# The loss is taken after every step; of a larger forget set, a fixed draw of so many images tells it well enough.
MOST_IMAGES = 512


def forget_loss(bundle: Bundle, checkpoint: Checkpoint, data: ImageData, split: Split, seed: int = 0) -> float:
    """Mean loss of a model on the forget images by which ``relearn_steps`` goes, in evaluation mode.

    With the original model, the target of ``relearn_steps``.

    Args:
        bundle: the running bundle, with the component ``trainer``.
        checkpoint: the model.
        data: the data under audit.
        split: who is forgotten.
        seed: as for ``relearn_steps``: of more than 512 forget images it draws 512.
    """
    trainer = bundle.build("trainer", methods=[])
    checkpoint.load_into(trainer.network)
    return _mean_loss(trainer, _batches(bundle, data, split, seed))


def relearn_steps(
    bundle: Bundle,
    checkpoint: Checkpoint,
    data: ImageData,
    split: Split,
    target_loss: float,
    max_epochs: int,
    seed: int = 0,
) -> tuple[int | None, Cost]:
    """Steps of training on the forget set alone until its mean loss is at most a target.

    The bundle's ``trainer`` takes them, without the method's handlers: its optimizer, batch size and augmentation are
    those of unlearning, and BatchNorm's statistics follow the forget batches. The loss is taken before the first step
    and after each, in evaluation mode and without augmentation, on the whole forget set, or on 512 of its images.

    A model that still holds what it learned of the forget set gets there in fewer steps than the retrained model, with
    which to compare. As many steps prove nothing: how many it takes also hangs on the learning rate and on where in
    the weights a method has left the model.

    Args:
        bundle: the running bundle, with the component ``trainer``.
        checkpoint: the model that is to relearn; it is only read.
        data: the data under audit.
        split: who is forgotten.
        target_loss: loss to reach, as a rule the original model's ``forget_loss``.
        max_epochs: most epochs over the forget set, at least 1.
        seed: seed of order and augmentation, and of the draw of 512 images.

    Returns:
        The number of steps, 0 if the loss is at most the target to begin with, and what all that cost. None for the
        steps if the target was not reached, the loss diverged, or the forget set gives no batch to train on, as one
        image does not (BatchNorm is undefined on it); a logged sentence says which.

    Raises:
        ValueError: if the target is not finite, or there is no epoch.

    References:
        Golatkar et al., Forgetting Outside the Box: Scrubbing Deep Networks of Information Accessible from
        Input-Output Observations, ECCV 2020, arXiv:2003.02960.
    """
    if not math.isfinite(target_loss):
        raise ValueError(f"target_loss should be finite, but got {target_loss!r}. Take the original's forget_loss.")
    if isinstance(max_epochs, bool) or not isinstance(max_epochs, int) or max_epochs < 1:
        raise ValueError(f"max_epochs should be an integer of at least 1, but got {max_epochs!r}.")
    set_determinism(seed)
    images = bundle.build("train_dataset", train_seed=seed)
    trainer: SupervisedTrainer = bundle.build(
        "trainer", methods=[], train_dataset=Subset(images, split.forget.tolist()), train_seed=seed
    )
    trainer.state.max_epochs = max_epochs
    checkpoint.load_into(trainer.network)
    loader: Any = trainer.data_loader
    evaluation, training = Cost(), Cost()
    batches = _batches(bundle, data, split, seed)
    reached: list[int] = []

    def check(engine: SupervisedTrainer) -> None:
        """Note the step at which the target is reached."""
        evaluation.forward += sum(len(batch[CommonKeys.LABEL]) for batch in batches)
        if _mean_loss(engine, batches) <= target_loss:
            reached.append(engine.state.iteration)

    with seconds_of(evaluation, trainer.state.device):
        check(trainer)
        if not reached and len(split.forget) > 1 and len(loader):
            trainer.add_event_handler(Events.ITERATION_COMPLETED, check)
            trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: trainer.terminate() if reached else None)
            try:
                training = run_trainer(trainer, "relearning")
            except FloatingPointError:
                reason = "the loss diverged"
            else:
                reason = f"the loss did not get to {target_loss:.3g} within {max_epochs} epochs"
        else:
            reason = f"a forget set of {len(split.forget)} gives no batch to train on"
    if not reached:
        logger.info("Relearn time is not known: %s.", reason)
    # The clock around it all ran during the training's too.
    return (reached[0] if reached else None), evaluation + replace(training, seconds=0.0)


def _batches(bundle: Bundle, data: ImageData, split: Split, seed: int) -> list[Any]:
    """The forget images that the loss is taken on, without augmentation; kept, since each step needs them."""
    rows = split.forget
    if len(rows) > MOST_IMAGES:
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:MOST_IMAGES]
        rows = rows[np.sort(drawn.numpy())]
    images = Subset(bundle.build("evaluation_dataset", evaluation_part=data.train), rows.tolist())
    return list(bundle.build("evaluation_loader", evaluation_dataset=images))


@torch.no_grad()
def _mean_loss(engine: SupervisedTrainer, batches: Sequence[Any]) -> float:
    """The trainer's loss over batches, in evaluation mode; its step puts the network back into training mode."""
    engine.network.eval()
    total, images = 0.0, 0
    for batch in batches:
        inputs, labels, *rest = engine.prepare_batch(batch, engine.state.device, engine.non_blocking)
        args, options = rest or ((), {})
        loss = engine.loss_function(engine.inferer(inputs, engine.network, *args, **options), labels)
        total += float(loss.mean()) * len(labels)
        images += len(labels)
    return total / images
