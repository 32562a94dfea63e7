"""Influence unlearning: one step with the inverse Fisher matrix takes the forget set's influence out (2304.04934)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from monai.inferers import SimpleInferer
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from monai_unlearn.cost import Cost, seconds_of
from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.methods._trainer import (
    evaluation_mode,
    plain_network,
    predict,
    prepare,
    require_loaded_weights,
    require_supervised_trainer,
)
from monai_unlearn.methods.saliency_mask import summed_gradient, summed_loss
from monai_unlearn.methods.synaptic_dampening import require_alone, row_of, sample_gradients

__all__ = ["InfluenceUnlearning", "inverse_fisher_product", "removal_gradient"]

logger = logging.getLogger("monai_unlearn")

# Most memory of one of the two blocks of single samples' gradients that are held at once.
BLOCK_BYTES = 2**30
# Most samples whose gradients are computed at once on a GPU.
MOST_AT_ONCE = 32
# Columns of a block that are turned into float64 at once.
PIECE = 2**11


def removal_gradient(forget_sum: torch.Tensor, retain_sum: torch.Tensor, forgotten: int, retained: int) -> torch.Tensor:
    """How the gradient of the mean loss changes when the forget set is left out, with its sign turned.

    In the mean loss of all n = n_f + n_r samples each has the weight 1/n, in that of the retain set a forget sample 0
    and a retain sample 1/n_r. So with the gradients g

    v = 1/n · Σ_f g − (1/n_r − 1/n) · Σ_r g = n_f/n · (mean_f g − mean_r g),

    and the weights with which the latter loss is least are, to first order, H⁻¹v away from those of the former.

    Args:
        forget_sum: sum of the forget samples' gradients.
        retain_sum: sum of the retain samples' gradients, of the same shape.
        forgotten: n_f, at least 1.
        retained: n_r, at least 1.

    Returns:
        Tensor of the same shape.
    """
    total = forgotten + retained
    return forget_sum / total - retain_sum * (forgotten / (total * retained))


def inverse_fisher_product(blocks: Sequence[torch.Tensor], vector: torch.Tensor, damping: float) -> torch.Tensor:
    """F⁻¹v with F = λI + 1/N Σ_i g_i g_iᵀ, without ever making a P × P matrix.

    By the Woodbury identity F⁻¹v = (v − Gᵀ(NλI + GGᵀ)⁻¹Gv) / λ, where the rows of G are the g_i: what WoodFisher's
    N updates of rank one, F⁻¹ ← F⁻¹ − F⁻¹g_i g_iᵀF⁻¹ / (N + g_iᵀF⁻¹g_i) from I/λ on, end with, in whatever order. A
    matrix of N × N is solved, in float64.

    Args:
        blocks: G in blocks of rows, each a matrix with P columns. A block is asked for each time it is needed, and no
            more than two are held at once: with B blocks, (B + 1) / 2 times on average, and all but the last once more.
        vector: v, shape P.
        damping: λ, greater than 0.

    Returns:
        Float64 tensor of shape P.

    Raises:
        RuntimeError: if an entry of G or v is not finite, or NλI + GGᵀ is singular in float64.
    """
    number = len(blocks)
    tiles: list[list[Any]] = [[None] * number for _ in range(number)]
    products: list[torch.Tensor] = []
    block = other = None
    for i in range(number):
        block = None  # or three would be held while the next one is made
        block = blocks[i]
        products.append(_product(block, vector[None])[:, 0])
        for j in range(i, number):
            other = None
            other = block if j == i else blocks[j]
            tiles[i][j] = _product(block, other)
            tiles[j][i] = tiles[i][j].T
    other = None
    system = torch.cat([torch.cat(row, 1) for row in tiles])
    if not bool(system.isfinite().all() & vector.isfinite().all()):
        raise RuntimeError(
            "The gradients of all samples should be finite, but some hold NaN or infinity. Check the images and the "
            "original model's loss; labels that are not known (NaN) need monai_unlearn.loss.MaskedBCEWithLogitsLoss."
        )
    system.diagonal().add_(len(system) * damping)
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        raise RuntimeError(f"The Fisher matrix can't be inverted with damping = {damping!r}. Raise damping.")
    weights = torch.cholesky_solve(torch.cat(products)[:, None], factor)[:, 0]
    result = vector.to(torch.float64, copy=True)
    parts = weights.split([len(some) for some in products])
    for i in reversed(range(number)):  # the last block is still at hand
        if block is None:
            block = blocks[i]
        for columns in _pieces(block):
            result[columns] -= parts[i] @ block[:, columns].double()
        block = None
    return result.div_(damping)


def _product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The product one · otherᵀ in float64, of matrices that are too wide to be turned into float64 as a whole."""
    total = torch.zeros(len(one), len(other), dtype=torch.float64, device=one.device)
    for columns in _pieces(one):
        total.addmm_(one[:, columns].double(), other[:, columns].double().T)
    return total


def _pieces(matrix: torch.Tensor) -> Iterator[slice]:
    return (slice(start, start + PIECE) for start in range(0, matrix.shape[1], PIECE))


class InfluenceUnlearning:
    """Take out, in one step and without training, what the forget set's samples have pulled the weights to.

    θ ← θ + α F⁻¹ v, v = n_f/n · (mean_f g − mean_r g), F = λI + 1/N Σ g_i g_iᵀ over N retain samples,

    with g the gradient of a sample's own loss: in evaluation mode, without augmentation, with true labels. v is minus
    the gradient of the retain set's mean loss, as far as leaving out n_f of n samples changes it, and F the empirical
    Fisher matrix in the Hessian's place; so α = 1 is the step of influence functions, which raises the loss of the
    forget set.

    F⁻¹v is exact: it is solved in the space of the N samples (see ``inverse_fisher_product``), where WoodFisher goes
    through them by N updates of rank one. The N samples are drawn at random. The result depends on neither their
    order nor the batch size, but for rounding. Where their gradients take more than a block of 1 GiB each, they are
    computed anew block by block.

    Runs on ``STARTED``, where it ends the run, so that no training step follows. Weights that require no gradient, and
    BatchNorm's statistics, stay bit-identical.

    Args:
        forget: the forget set.
        alpha: how far to step, at least 0. With 0 no weight changes.
        damping: λ, greater than 0. Directions in which no retain sample's loss has a slope are stepped by α/λ · v.
        samples: N, at least 1; a smaller retain set is taken whole.
        seed: seed of the draw of these.
        retained: how many retain samples the original was trained on, where the loader has only a part of them, which
            stands for all; by default as many as the loader has.
        loader: retain samples only, without augmentation; by default made from the trainer's own loader.
        forget_loader: forget samples only, without augmentation; by default made from the trainer's own loader.

    Attributes:
        cost: what it cost.

    Raises:
        ValueError: if an argument is outside its range, or forget or retain samples can't be found.
        TypeError: if attached to an engine that is no plain ``SupervisedTrainer``.
        RuntimeError: if a ``CheckpointLoader`` stands after it, another method is in the same trainer, the gradients
            or the new weights are not finite, or no weight would change.

    References:
        Koh & Liang, Understanding Black-box Predictions via Influence Functions, ICML 2017, arXiv:1703.04730; Izzo et
        al., Approximate Data Deletion from Machine Learning Models, AISTATS 2021, arXiv:2002.10077; Singh & Alistarh,
        WoodFisher, NeurIPS 2020, arXiv:2004.14340; Jia et al., Model Sparsity Can Simplify Machine Unlearning, NeurIPS
        2023, arXiv:2304.04934. Differs from the latter's public code, whose recursion keeps one vector for all updates,
        so that it takes no more off v than a multiple of the first sample's gradient, with λ = 1; and which takes the
        first samples of the retain set rather than drawn ones.

    Example::

        trainer = SupervisedTrainer(..., train_handlers=[InfluenceUnlearning(forget), BatchNormPolicy(forget)])
    """

    cost_phase = "unlearn"
    takes_no_step = True  # run_trainer's complaint about a run without a step is not for this one

    def __init__(
        self,
        forget: ForgetSet,
        *,
        alpha: float = 1.0,
        damping: float = 0.03,
        samples: int = 1000,
        seed: int = 0,
        retained: int | None = None,
        loader: DataLoader | None = None,
        forget_loader: DataLoader | None = None,
    ) -> None:
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"alpha should be a number of at least 0, but got {alpha!r}.")
        if not (math.isfinite(damping) and damping > 0):
            raise ValueError(f"damping should be a number above 0, but got {damping!r}.")
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples should be a whole number of at least 1, but got {samples!r}.")
        self.forget = forget
        self.alpha = alpha
        self.damping = damping
        self.samples = samples
        self.seed = seed
        self.retained = retained
        self.loader = loader
        self.forget_loader = forget_loader
        self.cost = Cost()

    def attach(self, engine: Engine) -> None:
        """Register on a trainer's events."""
        require_supervised_trainer(engine, self)
        engine.add_event_handler(Events.STARTED, self._start)

    def _start(self, engine: SupervisedTrainer) -> None:
        self.cost = Cost()
        require_supervised_trainer(engine, self)
        require_loaded_weights(engine, self)
        require_alone(engine, self)
        with seconds_of(self.cost, engine.state.device):
            self._step(engine)
        engine.terminate()

    def _step(self, engine: SupervisedTrainer) -> None:
        network = plain_network(engine)
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if not parameters:
            raise RuntimeError("The network has no parameter that requires a gradient, so nothing can change.")
        forget_loader, loader = self.forget_loader, self.loader
        if forget_loader is None:
            forget_loader = self.forget.forget_loader(engine.data_loader)
        if loader is None:
            loader = self.forget.retain_loader(engine.data_loader, training=False)
        with torch.enable_grad(), evaluation_mode(network):
            forget_sum, forgotten = self._sum(engine, parameters, forget_loader, "forget")
            retain_sum, retained = self._sum(engine, parameters, loader, "retain")
            if not hasattr(loader.dataset, "__len__") or len(loader.dataset) != retained:
                raise ValueError(
                    f"loader should give each sample of its data set once, but gives {retained}. Make a data set of "
                    "the retain samples alone, and a loader without a sampler and drop_last."
                )
            whole = retained if self.retained is None else self.retained
            if whole < retained:
                raise ValueError(
                    f"retained should be at least {retained}, what the loader of retain samples has, but got {whole!r}."
                )
            vector = removal_gradient(forget_sum, retain_sum * (whole / retained), forgotten, whole)
            order = torch.randperm(retained, generator=torch.Generator().manual_seed(self.seed))
            with tqdm(desc="gradients of single samples", unit="sample", disable=None, leave=False) as bar:
                blocks = _Blocks(engine, parameters, loader, sorted(order[: self.samples].tolist()), self.cost, bar)
                direction = inverse_fisher_product(blocks, vector, self.damping)
        self._apply(parameters, direction)
        logger.info(
            "Influence of %d forget samples taken out, with the Fisher matrix of %d of %d retain samples",
            forgotten,
            min(self.samples, retained),
            retained,
        )

    def _sum(
        self, engine: SupervisedTrainer, parameters: list[nn.Parameter], loader: Iterable, part: str
    ) -> tuple[torch.Tensor, int]:
        """Sum of the gradients of a loader's samples, and how many they are."""
        count = 0

        def losses() -> Iterator[torch.Tensor]:
            nonlocal count
            for batch in tqdm(loader, desc=f"gradient of the {part} set", unit="batch", disable=None, leave=False):
                prediction, target = predict(engine, batch)
                count += len(target)
                yield summed_loss(engine.loss_function, prediction, target)

        total, _ = summed_gradient(parameters, losses())
        if not count:
            raise ValueError(f"The loader of {part} samples should hold at least one sample, but is empty.")
        for name in ("samples", "forward", "backward"):
            setattr(self.cost, name, getattr(self.cost, name) + count)
        return total, count

    @torch.no_grad()
    def _apply(self, parameters: list[nn.Parameter], direction: torch.Tensor) -> None:
        steps = direction.mul_(self.alpha).split([parameter.numel() for parameter in parameters])
        changed = [
            # Where there is nothing to add, -0.0 stays -0.0.
            torch.where((step := some.view(parameter.shape).to(parameter)) != 0, parameter + step, parameter)
            for parameter, some in zip(parameters, steps)
        ]
        if not all(bool(value.isfinite().all()) for value in changed):
            raise RuntimeError(
                f"The weights should stay finite, but with alpha = {self.alpha!r} and damping = {self.damping!r} some "
                "do not. Lower alpha, or raise damping."
            )
        if self.alpha and all(torch.equal(value, parameter) for parameter, value in zip(parameters, changed)):
            raise RuntimeError(
                f"With alpha = {self.alpha!r} and damping = {self.damping!r} no weight would change, so nothing would "
                "be unlearned. Raise alpha, or lower damping; check the forget set if its samples equal the others."
            )
        for parameter, value in zip(parameters, changed):
            parameter.copy_(value)


class _Blocks(Sequence):
    """The gradients of single samples in blocks of rows, each computed anew whenever it is asked for."""

    def __init__(
        self,
        engine: SupervisedTrainer,
        parameters: list[nn.Parameter],
        loader: DataLoader,
        positions: list[int],
        cost: Cost,
        bar: tqdm,
    ) -> None:
        self.engine = engine
        self.network = plain_network(engine)
        self.parameters = parameters
        self.cost = cost
        self.bar = bar
        self.size = sum(parameter.numel() for parameter in parameters)
        row_bytes = self.size * parameters[0].element_size()
        rows = max(1, BLOCK_BYTES // row_bytes)
        self.loaders = [_part(loader, positions[i : i + rows]) for i in range(0, len(positions), rows)]
        self.at_once = min(rows, _most_at_once(engine, parameters))

    def __len__(self) -> int:
        return len(self.loaders)

    def __getitem__(self, i: Any) -> Any:
        loader = self.loaders[i]
        first, count = self.parameters[0], 0
        block = torch.zeros(len(loader.dataset), self.size, dtype=first.dtype, device=first.device)  # type: ignore[arg-type]
        for batch in loader:
            inputs, targets, args, kwargs = prepare(self.engine, batch)
            if isinstance(inputs, MetaTensor):
                inputs = inputs.as_tensor()
            step = 1 if args or kwargs else self.at_once
            for start in range(0, len(targets), step):
                some = slice(start, min(start + step, len(targets)))
                self._fill(block[count : count + some.stop - start], inputs, targets, args, kwargs, some)
                count += some.stop - start
            self.cost.samples += len(targets)
            self.cost.backward += len(targets)
            self.bar.update(len(targets))
        return block

    def _fill(
        self, rows: torch.Tensor, inputs: Any, targets: torch.Tensor, args: tuple, kwargs: dict, some: slice
    ) -> None:
        """Write the gradients of a batch's samples into their rows."""
        loss = self.engine.loss_function
        places = [parameter.numel() for parameter in self.parameters]
        if len(rows) > 1:
            try:
                found = sample_gradients(self.network, self.parameters, inputs[some], targets[some], loss)
            except (RuntimeError, TypeError, ValueError) as error:
                logger.info("torch.vmap can't take the network (%s): one sample at a time, then", type(error).__name__)
                self.at_once = 1
            else:
                self.cost.forward += 2 * len(rows)
                for piece, gradient in zip(rows.split(places, 1), found):
                    piece.copy_(gradient.flatten(1))
                return
        for row, i in zip(rows, range(some.start, some.stop)):
            more = [row_of(value, i, len(targets)) for value in args]
            named = {key: row_of(value, i, len(targets)) for key, value in kwargs.items()}
            prediction = self.engine.inferer(inputs[i : i + 1], self.network, *more, **named)
            self.cost.forward += 1
            value = summed_loss(loss, prediction, targets[i : i + 1])
            gradients = torch.autograd.grad(value, self.parameters, allow_unused=True)
            for piece, gradient in zip(row.split(places), gradients):
                if gradient is not None:
                    piece.copy_(gradient.flatten())


def _most_at_once(engine: SupervisedTrainer, parameters: list[nn.Parameter]) -> int:
    """How many samples' gradients may be computed at once; as in SelectiveSynapticDampening one on a CPU."""
    network = plain_network(engine)
    shared = len(dict(network.named_parameters(remove_duplicate=False))) > len(list(network.parameters()))
    on_cpu = parameters[0].device.type == "cpu"
    return 1 if on_cpu or shared or type(engine.inferer) is not SimpleInferer else MOST_AT_ONCE


def _part(loader: DataLoader, positions: list[int]) -> DataLoader:
    """Some of a loader's samples, in order."""
    return DataLoader(
        Subset(loader.dataset, positions),
        batch_size=loader.batch_size or 1,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )
