"""Perturb and recover: noise on every kernel, then the recipe's training in fast motion on the retain set alone."""

from __future__ import annotations

import logging
import math
from typing import Any, Protocol, cast

import torch
from ignite.engine import Engine, Events
from ignite.handlers.param_scheduler import BaseParamScheduler
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers import LrScheduleHandler
from monai.utils import CommonKeys
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from monai_unlearn.cost import Cost, seconds_of
from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._trainer import (
    plain_network,
    require_batches,
    require_before_savers,
    require_loaded_weights,
    require_supervised_trainer,
    train_on,
    unwrapped_handlers,
)
from monai_unlearn.methods._weights import kernels
from monai_unlearn.methods.weight_noise import disturb

__all__ = ["PerturbAndRecover", "augmented_epochs", "excess", "height", "steps_within"]

logger = logging.getLogger("monai_unlearn")

# States that may be judged: the last one, and the one before it where the last one can be told from an unseen one.
JUDGED = 2
# How far a step moves a kernel at the height of the learning rate, as a share of the kernel's norm. About what weight
# decay brings usual recipes of SGD to by itself: sqrt(2 · rate · decay), 0.003 to 0.01.
STRIDE = 0.004
RISE, FALL = 0.05, 0.6  # shares of the steps in which the rate rises, and in which it falls; between them it stays
# Share of the epochs whose images are augmented, and how many without it takes to learn single images again: a short
# run has no time for others.
AUGMENTED, PLAIN_EPOCHS = 0.3, 6
# How far steps move kernels changes slowly: after the first steps it is looked at in every fourth, in filters of each
# kernel that have about so many entries, and the past counts so much in its mean.
LOOKED_AT, EVERY, SAMPLED, SMOOTHING = 8, 4, 4096, 0.4
# Where schedules of the learning rate act.
SCHEDULED = (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, Events.ITERATION_STARTED, Events.ITERATION_COMPLETED)
State = dict[str, torch.Tensor]


class Judgement(Protocol):
    """What a judge says of a network: see ``monai_unlearn.selection.Judgement``."""

    @property
    def auc(self) -> float:
        """AUC of forget images against matched unseen ones, in [0, 1]."""

    @property
    def low(self) -> float:
        """Lower end of its interval."""

    @property
    def high(self) -> float:
        """Upper end of its interval."""

    @property
    def utility(self) -> float:
        """Accuracy or mean AUROC on unseen images, in [0, 1]."""


class Judge(Protocol):
    """Who judges a network: see ``monai_unlearn.selection.SelectionJudge``."""

    cost: Cost
    matched_on: tuple[str, ...]

    @property
    def samples(self) -> int:
        """How many samples a judgement passes through the network."""

    def evaluate(self, network: nn.Module) -> Judgement:
        """Judge a network."""


def steps_within(samples: float, batch_size: int, batches: int) -> tuple[int, int]:
    """Epochs and steps in each, as near to whole epochs as a number of samples allows, and never more.

    Args:
        samples: how many samples may be trained on.
        batch_size: samples a step.
        batches: steps in a whole epoch.

    Returns:
        Number of epochs, at least 1, and steps in each; 0 steps if the samples do not make one batch.
    """
    steps = int(samples // batch_size)
    epochs = max(1, round(steps / batches))
    return epochs, steps // epochs


def height(step: int, steps: int) -> float:
    """How high the learning rate is: up in the first 5 % of the steps, then a plateau, down to 0 in the last 60 %.

    Args:
        step: which step, counted from 0.
        steps: number of steps, above ``step``.

    Returns:
        Share of the greatest rate, at least 0.04 on the way up, and above 0 on the way down.

    Source: Hägele et al., arXiv:2405.18392.
    """
    rise = RISE * steps
    if step < rise:
        return 0.04 + 0.96 * step / rise
    return min(1.0, (steps - step) / (FALL * steps))


def augmented_epochs(epochs: int) -> int:
    """In how many epochs of a run the images are augmented: the first three tenths, but none of the last six.

    Args:
        epochs: number of epochs, at least 1.
    """
    return max(0, min(round(AUGMENTED * epochs), epochs - PLAIN_EPOCHS))


def excess(judgement: Judgement) -> float:
    """How far the interval of the AUC is from ½.

    Returns:
        0 where the interval holds ½, or there is none (a single patient has none); above 0 if the network remembers,
        below 0 if it over-forgets.
    """
    if math.isnan(judgement.low) or math.isnan(judgement.high):
        return 0.0
    return max(0.0, judgement.low - 0.5) + min(0.0, judgement.high - 0.5)


class PerturbAndRecover:
    r"""Disturb every kernel by noise as large as its own spread, then repeat the recipe's training in fast motion.

    1. θ_k += scale · std(θ_k) · ε, ε ~ N(0, 1), for each kernel θ_k; BatchNorm's running statistics are reset.
    2. Training on the retain set alone with the recipe's optimizer and loss, as long as ``budget`` allows: the
       learning rate stays high and then falls to 0 in a straight line (Hägele et al., arXiv:2405.18392). The recipe's
       augmentation is left out after the first three tenths, and in the last six epochs at any rate: from then on
       images are learnt one by one, as in all of a retraining. The rate is set step by step so that at its greatest
       kernels move by ``STRIDE`` of their norm a step (the median of all kernels), whatever the recipe's rate and
       optimizer are: what counts in a network with normalisation layers is how far a step turns its kernels.
    3. A judge compares forget samples with matched unseen ones. If they can still be told apart, the state before is
       looked at too, and kept if it is nearer to unseen ones by more than chance makes. A run that diverged is put back
       to the last good state.

    Nothing ever trains on a forget sample, so that none is pushed below what an unseen one scores. The trainer is to be
    the recipe's own: its optimizer, its loader and its ``max_epochs`` say what the original training was. Of the
    learning rates only their ratio counts where groups of parameters have their own. Schedules have to be left out.

    Runs on ``STARTED``, ``LOSS_COMPLETED``, ``ITERATION_COMPLETED``, ``EPOCH_COMPLETED`` and ``COMPLETED``.

    Args:
        forget: the forget set.
        budget: share of retraining's samples (the recipe's epochs × retain samples) that unlearning may pass through
            the network, judging included, above 0. At 1 it takes as long as retraining.
        scale: standard deviation of the noise in units of each kernel's own, at least 0.
        judge: who judges states; None: none is judged, and the last one is kept.
        seed: seed of the noise.
        loader: retain samples only, shuffled, from the first step to the last; by default two loaders are made from the
            trainer's own, with its random transforms and without.

    Attributes:
        cost: what the change of the weights cost.
        tuning_cost: what judging cost.
        notes: what was judged and chosen, in sentences.

    Raises:
        ValueError: if an argument is out of its range, the budget does not make one step, retain samples can't be
            found, or the recipe's learning rate is 0.
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``.
        RuntimeError: if a ``CheckpointLoader`` stands after it or a ``CheckpointSaver`` before it, the trainer has a
            schedule of the learning rate, the network has no kernel to train, or the run diverges before its first
            epoch ends.

    Example::

        trainer = SupervisedTrainer(..., max_epochs=30, train_handlers=[PerturbAndRecover(forget, budget=0.3)])
    """

    cost_phase = "unlearn"

    def __init__(
        self,
        forget: ForgetSet,
        *,
        budget: float = 0.3,
        scale: float = 1.0,
        judge: Judge | None = None,
        seed: int = 0,
        loader: DataLoader | None = None,
    ) -> None:
        if not (math.isfinite(budget) and budget > 0):
            raise ValueError(
                f"budget should be above 0, but got {budget!r}. It is the share of retraining's samples that "
                "unlearning may pass through the network, 0.3 for three tenths."
            )
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"scale should be a number of at least 0, but got {scale!r}.")
        self.forget = forget
        self.budget = budget
        self.scale = scale
        self.judge = judge
        self.seed = seed
        self.loader = loader
        self.cost = Cost()
        self.tuning_cost = Cost()
        self.notes: list[str] = []
        self._recipe_epochs: int | None = None  # while the trainer has another number
        self._plain: DataLoader | None = None  # retain samples without augmentation
        self._augmented = 0  # epochs with it, before those without
        self._steps = 0  # of the run; 0 while there is none
        self._rate = 0.0  # of the step, in units of the recipe's
        self._reach: float | None = None  # how far a step of the recipe's rate moves a kernel, as a share of its norm
        self._kernels: list[torch.Tensor] = []  # filters of each, which change as it does
        self._before: list[torch.Tensor] = []  # the same before a step
        self._rates: list[Any] = []  # the recipe's, of each group of parameters
        self._states: list[State] = []
        self._diverged = False

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._watch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._keep)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def _start(self, engine: SupervisedTrainer) -> None:
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        require_before_savers(engine, self)
        _require_no_schedule(engine)
        self._release(engine)
        self.cost, self.tuning_cost = Cost(), Cost()
        self.notes, self._states, self._diverged = [], [], False
        if not any(float(group["lr"]) > 0 for group in engine.optimizer.param_groups):
            raise ValueError("The optimizer's learning rate should be above 0, but is 0. Use the recipe's.")
        epochs, length = self._plan(engine)
        with seconds_of(self.cost, engine.state.device):
            self._perturb(plain_network(engine))
        # The recipe has more epochs than a run that has ended, which Ignite would go on with.
        engine.state.epoch = engine.state.iteration = 0
        # Its moments know the forget set where the trainer is the one that trained the original.
        engine.optimizer.state.clear()
        self._rates = [group["lr"] for group in engine.optimizer.param_groups]
        self._kernels = [_some_filters(kernel.detach()) for kernel in kernels(plain_network(engine)).values()]
        self._before = [kernel.clone() for kernel in self._kernels]
        self._steps, self._reach = epochs * length, None
        self._set_rate(engine, height(0, self._steps))

    def _plan(self, engine: SupervisedTrainer) -> tuple[int, int]:
        """Give the run its data and length: epochs and steps in each."""
        recipe_epochs = int(engine.state.max_epochs or 0)
        loader = self.loader
        if loader is None:
            loader = self.forget.retain_loader(engine.data_loader, training=True, augmentation=False)
        require_batches(loader, "retain")
        recipe = recipe_epochs * len(cast(Any, loader.dataset))
        # A loader with a batch sampler of its own does not say how large its batches are.
        batch = loader.batch_size or math.ceil(len(cast(Any, loader.dataset)) / len(loader))
        reserved = 0 if self.judge is None else JUDGED * self.judge.samples
        epochs, length = steps_within(self.budget * recipe - reserved, batch, len(loader))
        if length < 1:
            raise ValueError(
                f"budget should allow at least one step, but {self.budget:g} of retraining's {recipe} "
                f"samples are {self.budget * recipe:.0f}, of which judging takes {reserved} and a step {batch}"
                f". Use a budget of at least {(reserved + batch) / max(recipe, 1):.2g}."
            )
        self._plain = loader
        self._augmented = 0 if self.loader is not None else augmented_epochs(epochs)
        augmented = self.forget.retain_loader(engine.data_loader, training=True) if self._augmented else loader
        train_on(engine, augmented, "retain")
        self._recipe_epochs = recipe_epochs
        engine.state.max_epochs, engine.state.epoch_length = epochs, length
        logger.info(
            "Perturb and recover: %d × %d steps on the retain set, within %g %% of retraining's samples",
            epochs,
            length,
            100 * self.budget,
        )
        if epochs * length < len(loader):
            self._say(
                f"The budget allowed {epochs * length} of the {len(loader)} steps of one pass through the retain set: "
                "too few to recover from the noise. Raise it."
            )
        return epochs, length

    def _perturb(self, network: nn.Module) -> None:
        disturb(network, self.scale, self.seed, type(self).__name__)
        for module in network.modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                module.reset_running_stats()

    def _watch(self, engine: SupervisedTrainer) -> None:
        loss = engine.state.output[CommonKeys.LOSS]
        if bool(torch.isfinite(loss).all()):
            if _looked_at(engine):
                torch._foreach_copy_(self._before, self._kernels)
            return
        if not self._states:
            raise RuntimeError(
                "The run diverged before its first epoch ended: the loss is not finite. Check the images for NaN, and "
                "try another seed. Nothing was written."
            )
        self._diverged = True
        # The step that follows is of no consequence: the state is put back when the run ends. But all weights have to
        # have a gradient, for which the scaler of mixed precision and the processes of distributed training wait.
        engine.state.output[CommonKeys.LOSS] = sum(
            (weight.nan_to_num() * 0).sum() for weight in engine.network.parameters() if weight.requires_grad
        )
        engine.terminate()

    def _step(self, engine: SupervisedTrainer) -> None:
        if not self._steps or self._diverged or engine.state.iteration >= self._steps:
            return
        if _looked_at(engine):
            reach = self._moved() / self._rate
            if math.isfinite(reach) and reach > 0:  # a step that mixed precision leaves out moves nothing
                self._reach = reach if self._reach is None else SMOOTHING * self._reach + (1 - SMOOTHING) * reach
        share = height(engine.state.iteration, self._steps)
        self._set_rate(engine, share if self._reach is None else STRIDE * share / self._reach)

    def _moved(self) -> float:
        """How far the last step moved the kernels, as a share of their norms: the median."""
        torch._foreach_sub_(self._before, self._kernels)
        moved, now = (torch.stack(torch._foreach_norm(weights)) for weights in (self._before, self._kernels))
        return float((moved / now).nanmedian())

    def _set_rate(self, engine: SupervisedTrainer, rate: float) -> None:
        """Set each group's learning rate to so much of the recipe's."""
        self._rate = rate
        for group, own in zip(engine.optimizer.param_groups, self._rates):
            group["lr"] = rate * own

    def _keep(self, engine: SupervisedTrainer) -> None:
        """Keep the states of the last epochs, of which the last is the network's own for now; end augmentation."""
        if self._diverged:
            return
        if self._plain is not None and engine.state.epoch == self._augmented:
            engine.set_data(self._plain)
        state = {name: value.detach().clone() for name, value in engine.network.state_dict().items()}
        if _all_finite(state):
            self._states = [*self._states, state][-JUDGED:]
        elif not self._states:
            raise RuntimeError(
                "The run diverged in its first epoch: weights are not finite. Check the images for NaN, and try "
                "another seed. Nothing was written."
            )
        else:
            self._diverged = True
            engine.terminate()

    def _complete(self, engine: SupervisedTrainer) -> None:
        if not self._states:
            raise RuntimeError("The run ended before its first epoch did, so nothing was unlearned.")
        epochs = engine.state.max_epochs
        self._release(engine)
        chosen = self._states[-1]
        whole = engine.state.epoch == epochs and engine.state.iteration == epochs * (engine.state.epoch_length or 0)
        if self._diverged:
            self._say("The run diverged; the last state before that was kept. Try another seed.")
        elif not whole:
            self._say("The run was ended early; the state of the last whole epoch was kept. Let it run to its end.")
        if self._diverged or not whole:
            engine.network.load_state_dict(chosen)
        if self.judge is None:
            self._say(
                "No state was judged, for want of a judge or of unseen images that are comparable to those to forget: "
                f"the run had a fixed budget of {100 * self.budget:g} % of retraining's samples."
            )
        else:
            self.judge.cost = self.tuning_cost
            self._choose(engine.network, self.judge)
        self._states = []

    def _choose(self, network: nn.Module, judge: Judge) -> None:
        """Keep the last state, or the one before it if that can be told from an unseen one less easily."""
        last = judge.evaluate(network)
        judged, which = last, "the last state"
        if excess(last) and len(self._states) > 1:
            network.load_state_dict(self._states[0])
            before = judge.evaluate(network)
            # What is gained in not being told apart has to be more than what is lost on unseen images, and more than
            # chance makes: one interval in twenty lies beside ½, and the state before has not learnt all that it could.
            by_chance = last.low <= before.auc <= last.high
            lost = max(0.0, last.utility - before.utility)
            if not by_chance and abs(excess(before)) + lost < abs(excess(last)):
                judged, which = before, "the state one epoch before the last"
            else:
                network.load_state_dict(self._states[-1])
        known = not (math.isnan(judged.low) or math.isnan(judged.high))
        within = f"[{judged.low:.3f}, {judged.high:.3f}]" if known else "(no interval)"
        self._say(
            f"Judged on the selection half of the validation data, {which} was kept: AUC of forget images against "
            f"unseen ones (matched by {', '.join(judge.matched_on)}) {judged.auc:.3f} {within}."
        )
        if not known:
            self._say("That is of too few patients or images for an interval, so nothing was concluded from it.")
        if excess(judged) > 0:
            self._say("Forget images can still be told from unseen ones there: the budget was not enough. Raise it.")
        elif excess(judged) < 0:
            self._say(
                "Forget images score lower there than unseen ones: judge by the retrained models whether they may."
            )

    def _say(self, sentence: str) -> None:
        self.notes.append(sentence)
        logger.info("%s", sentence)

    def _release(self, engine: SupervisedTrainer) -> None:
        """Put the rates and the length of the recipe back."""
        self._steps = 0
        self._plain, self._kernels, self._before = None, [], []
        for group, own in zip(engine.optimizer.param_groups, self._rates):
            group["lr"] = own
        self._rates = []
        if self._recipe_epochs is not None:
            engine.state.max_epochs, self._recipe_epochs = self._recipe_epochs, None


def _looked_at(engine: Engine) -> bool:
    """Whether the step is one of those of which it is measured how far they move kernels."""
    return engine.state.iteration <= LOOKED_AT or engine.state.iteration % EVERY == 0


def _some_filters(kernel: torch.Tensor) -> torch.Tensor:
    """Filters of a kernel at equal distances, about ``SAMPLED`` entries, as a view; all of a small one."""
    return kernel[:: max(1, min(len(kernel), kernel.numel() // SAMPLED))]


def _require_no_schedule(engine: Engine) -> None:
    handlers = [handler for event in SCHEDULED for handler in unwrapped_handlers(engine, event)]
    found = next((one for one in handlers if isinstance(one, (LrScheduleHandler, BaseParamScheduler))), None)
    if found is not None:
        raise RuntimeError(
            f"PerturbAndRecover sets the learning rate itself, step by step, but the trainer has a "
            f"{type(found).__name__} too. Leave it out of train_handlers."
        )


def _all_finite(state: State) -> bool:
    """Whether a state holds neither NaN nor infinity."""
    values = [value for value in state.values() if value.is_floating_point() and value.numel()]
    # Both ends of a tensor's values take one run through it, a third of isfinite's time, and carry a NaN along.
    ends = [end.double() for value in values for end in torch.aminmax(value)]
    return not ends or bool(torch.stack(ends).isfinite().all())
