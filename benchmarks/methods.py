"""What the methods cost beyond the work that their definitions need, as ratios within one run.

    OMP_NUM_THREADS=1 python benchmarks/methods.py --only steps

Three parts, each for itself with ``--only``:

- ``one-shot``: work that is done once, before or instead of training, against the passes that its definition needs;
- ``steps``: steps of the training methods in MONAI's trainer, against a bare loop that does the same passes;
- ``fisher``: squared gradients of single samples, against the loop over batches of one.

Compared work takes turns, step by step or pass by pass; a ratio is the median over pairs. On a CPU it is one of
processor time, which other processes disturb less than the clock on the wall; that one's ratio is printed too. On a
GPU it is the clock's, with the GPU waited for. Batches lie ready: what loading costs is in benchmarks/speed.py.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.networks.nets import DenseNet121
from speed import FULL, NARROW, resnet18, sgd
from torch import nn
from torch.nn import functional

from monai_unlearn import ForgetSet
from monai_unlearn.cost import Cost, synchronize
from monai_unlearn.data import BatchedImages, make_split, synthetic_cells
from monai_unlearn.methods import (
    AMUN,
    DELETE,
    SCRUB,
    BadTeacher,
    BoundaryShrink,
    ConvTranspose,
    FineTune,
    GradientAscent,
    L1Sparse,
    LastLayers,
    MaskedSmallGradients,
    NegGradPlus,
    PerturbAndRecover,
    RandomLabeling,
    ReferenceGuided,
    SelectiveSynapticDampening,
    WeightNoise,
)
from monai_unlearn.methods.last_layers import layers
from monai_unlearn.methods.synaptic_dampening import _Passes
from monai_unlearn.provenance import machine

ONE_SHOT_BOUND, STEP_BOUND, FISHER_BOUND = 1.2, 1.03, 1.0
BATCH = 64
LAST = 6  # layers that are trained, the last stage and the classifier
STEPS = 4  # of a pair, and of the trainer's epoch
EPOCH = 32  # the same for a method that works at an epoch's end; the embedded data has 34 steps an epoch


@dataclass
class Spent:
    """Seconds of the processor, all threads together, and on the wall."""

    cpu: float = 0.0
    wall: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.cpu + other.cpu, self.wall + other.wall)


class Clock:
    """Both clocks, read when the device has nothing left to do."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start()

    def start(self) -> None:
        """Begin anew."""
        synchronize(self.device)
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> Spent:
        """What was spent since the start."""
        synchronize(self.device)
        return Spent(time.process_time() - self._cpu, time.perf_counter() - self._wall)


def report(name: str, pairs: Sequence[tuple[Spent, Spent]], device: torch.device, bound: float | None = None) -> None:
    """Print the ratio of each pair's first time to its second."""
    which = "wall" if device.type == "cuda" else "cpu"
    times = [(getattr(a, which), getattr(b, which)) for a, b in pairs]
    ratios = [a / b for a, b in times]
    first, second = (1000 * statistics.median(side) for side in zip(*times))
    wall = statistics.median(a.wall / b.wall for a, b in pairs)
    limit = "" if bound is None else f"; bound {bound:g}"
    print(
        f"{name:<58} {statistics.median(ratios):5.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(pairs)} pairs; "
        f"{first:.4g} against {second:.4g} ms; wall {wall:.3f}{limit})",
        flush=True,
    )


def in_turns(
    first: Callable[[], object],
    second: Callable[[], object],
    device: torch.device,
    pairs: int,
    before: Callable[[], object] = lambda: None,
) -> list[tuple[Spent, Spent]]:
    """Time two pieces of work by turns, each first in every other pair; the first pair warms up and is dropped.

    ``before`` is called before each piece of work and is not timed.
    """
    clock = Clock(device)
    result = []
    for turn in range(pairs + 1):
        spent = {}
        for work in (first, second) if turn % 2 else (second, first):
            before()
            clock.start()
            work()
            spent[work] = clock.stop()
        result.append((spent[first], spent[second]))
    return result[1:]


class Ready(list):
    """Batches that lie ready, in a loader's clothes."""

    def __init__(self, batches: Sequence[dict[str, torch.Tensor]]) -> None:
        super().__init__(batches)
        self.batch_size = len(batches[0]["label"])
        self.dataset = range(sum(len(batch["label"]) for batch in batches))


class Cells:
    """Batches of the embedded data: forget samples, retain samples, and both as they come."""

    def __init__(self, device: torch.device) -> None:
        data = synthetic_cells()
        split = make_split(data)
        self._images = BatchedImages(data.train, device=device)
        self.forget_set: ForgetSet = split.forget_set()
        self._rows = {"forget": split.forget.tolist(), "retain": split.retain.tolist(), "all": range(len(data.train))}

    def batches(self, part: str, number: int, size: int = BATCH) -> Ready:
        """The first batches of a part of the data, which begins anew where it does not suffice."""
        rows = itertools.cycle(self._rows[part])
        return Ready([self._images.__getitems__(list(itertools.islice(rows, size))) for _ in range(number)])


def trainer(
    device: torch.device, network: nn.Module, loader: Ready, handlers: Sequence[Any], epochs: int = 1
) -> SupervisedTrainer:
    """The bundles' trainer of the unlearning phase."""
    return SupervisedTrainer(
        device,
        epochs,
        loader,
        network,
        sgd(network),
        nn.CrossEntropyLoss(),
        decollate=False,
        train_handlers=list(handlers),
    )


def one_shot(device: torch.device, planes: list[int], cells: Cells, pairs: int) -> None:
    """What is done once, from its start to the first step, against the passes that the definition needs."""
    width = "full" if planes == FULL else "narrow"
    network = resnet18(planes, device)
    original = copy.deepcopy(network.state_dict())
    forget, retain = cells.batches("forget", 2), cells.batches("retain", 2)

    def put_back() -> None:
        network.load_state_dict(original)
        network.eval()
        network.zero_grad(set_to_none=True)

    def start_of(method: Any) -> Callable[[], object]:
        """Everything that the method does before the first step, its checks included."""
        engine = trainer(device, network, retain, [method])
        return lambda: engine.fire_event(Events.STARTED)

    def compare(name: str, method: Any, least: Callable[[], object], bound: float | None = ONE_SHOT_BOUND) -> None:
        result = in_turns(start_of(method), least, device, pairs, put_back)
        report(f"{name}, {width} resnet18", result, device, bound)

    some = [Ready(part[:1]) for part in (forget, retain)]
    parameters = list(network.parameters())

    def passes_of_one() -> None:
        for batch in itertools.chain(*some):
            for image, label in zip(batch["image"].split(1), batch["label"].split(1)):
                torch.autograd.grad(functional.cross_entropy(network(image), label), parameters)

    dampening = SelectiveSynapticDampening(cells.forget_set, alpha=1.0, loader=some[1], forget_loader=some[0])
    compare(f"SSD / one pass of each sample ({2 * BATCH})", dampening, passes_of_one)

    def passes() -> None:
        for batch in itertools.chain(forget, retain):
            functional.cross_entropy(network(batch["image"]), batch["label"], reduction="sum").backward()

    gradients = MaskedSmallGradients(cells.forget_set, loader=retain, forget_loader=forget)
    compare(f"MSG / one pass of forget and retain samples ({4 * BATCH})", gradients, passes)

    convolutions = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    kernels = [*convolutions, *(module.weight for module in network.modules() if isinstance(module, nn.Linear))]

    @torch.no_grad()
    def swap() -> None:
        for weight in convolutions:
            weight.copy_(weight.transpose(-1, -2).clone())

    @torch.no_grad()
    def disturb() -> None:
        generator = torch.Generator().manual_seed(0)
        for weight in kernels:
            noise = torch.randn(weight.shape, generator=generator).to(device)
            weight.add_(noise.mul_(weight.std(correction=0)))

    def step() -> None:
        network.train()
        functional.cross_entropy(network(retain[0]["image"]), retain[0]["label"]).backward()

    transpose = ConvTranspose(cells.forget_set, loader=retain)
    noise = WeightNoise(cells.forget_set, loader=retain)
    compare("CT / transposing each kernel", transpose, swap)
    compare("WeightNoise / drawing and adding noise", noise, disturb)
    compare("CT / forward and backward pass of one batch", transpose, step, None)
    compare("WeightNoise / the same", noise, step, None)


class Turns:
    """A step of the bare loop after each of the trainer's, on the same batch, each timed for itself.

    To be attached last: the trainer's time is all that passes between two steps of the bare loop, so that work at an
    epoch's ends counts.
    """

    def __init__(self, bare: Callable[[dict[str, torch.Tensor], int], object], device: torch.device) -> None:
        self.pairs: list[tuple[Spent, Spent]] = []  # of each epoch but the first, which warms up
        self._bare = bare
        self._clock = Clock(device)
        self._steps: list[tuple[Spent, Spent]] = []

    def attach(self, engine: SupervisedTrainer) -> None:
        """Register on a trainer's events."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._turn)

    def _turn(self, engine: SupervisedTrainer) -> None:
        own = self._clock.stop()
        length = int(engine.state.epoch_length or 1)
        self._clock.start()
        self._bare(engine.state.batch, (engine.state.iteration - 1) % length)
        self._steps.append((own, self._clock.stop()))
        if len(self._steps) == length:
            if engine.state.epoch > 1:
                theirs, ours = zip(*self._steps)
                self.pairs.append((sum(theirs, Spent()), sum(ours, Spent())))
            self._steps = []
        self._clock.start()


def steps(device: torch.device, planes: list[int], cells: Cells, pairs: int, only: str = "") -> None:
    """Steps of a method in the trainer against steps of a bare loop on batches that lie ready."""
    width = "full" if planes == FULL else "narrow"
    request = cells.forget_set
    forget, retain = cells.batches("forget", STEPS // 2), cells.batches("retain", STEPS)
    mixed = cells.batches("all", STEPS)
    half = Ready(retain[: STEPS // 2])

    def loop(kind: str) -> Callable[[dict[str, torch.Tensor], int], None]:
        """The bare loop: the passes that the definition needs, the loss and the step."""
        network = resnet18(planes, device).train()
        optimizer = sgd(network)
        teacher = resnet18(planes, device).eval().requires_grad_(False)
        if kind == "last layers":
            for layer in layers(network)[:-LAST]:
                for module in layer.values():
                    module.eval()
                    for parameter in module.parameters(recurse=False):
                        parameter.requires_grad_(False)

        def divergence(outputs: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                theirs = teacher(images)
            ours, theirs = (outputs / 4).log_softmax(1), (theirs / 4).log_softmax(1)
            return 16 * functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)

        def taught(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return functional.kl_div(outputs.log_softmax(1), targets, reduction="batchmean")

        def wrong(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            moved = images.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(functional.cross_entropy(teacher(moved), labels), moved)
            with torch.no_grad():
                return teacher(images + 0.2 * gradient.sign()).scatter(1, labels[:, None], -torch.inf).argmax(1)

        def step(batch: dict[str, torch.Tensor], position: int) -> None:
            images, labels = batch["image"], batch["label"]
            optimizer.zero_grad()
            outputs = network(images)
            if kind == "scrub" and position < len(forget):
                loss = -divergence(outputs, images)
            elif kind == "bad teacher":
                rows = request.mask(batch)
                with torch.no_grad():
                    targets = torch.cat([teacher(part) for part in (images[rows], images[~rows]) if len(part)])
                loss = taught(torch.cat([outputs[rows], outputs[~rows]]), targets.softmax(1))
            elif kind == "erase":
                with torch.no_grad():
                    targets = teacher(images).scatter(1, labels[:, None], -torch.inf).softmax(1)
                loss = taught(outputs, targets)
            elif kind == "shrink":
                loss = functional.cross_entropy(outputs, wrong(images, labels))
            else:
                loss = functional.cross_entropy(outputs, labels)
                if kind == "scrub":
                    loss = 0.99 * loss + 0.001 * divergence(outputs, images)
                elif kind == "difference":
                    other = forget[position % len(forget)]
                    loss = 0.95 * loss - 0.05 * functional.cross_entropy(network(other["image"]), other["label"])
                elif kind == "two batches":
                    other = forget[position % len(forget)]
                    loss = 0.5 * loss + 0.5 * functional.cross_entropy(network(other["image"]), other["label"])
                elif kind == "penalty":
                    loss = loss + 1e-4 * torch.stack([weight.abs().sum() for weight in network.parameters()]).sum()
                elif kind == "ascent":
                    loss = -loss
            loss.backward()
            optimizer.step()

        return step

    def compare(name: str, methods: Sequence[Any], kind: str = "plain", loader: Ready = retain) -> None:
        if only.lower() not in name.lower():
            return
        turns = Turns(loop(kind), device)
        trainer(device, resnet18(planes, device), loader, [*methods, turns], pairs + 1).run()
        bound = STEP_BOUND if methods else None
        report(f"{name} / bare loop, {width} resnet18", turns.pairs, device, bound)

    bare, other = loop("plain"), loop("plain")
    if only.lower() in "bare loop":
        run = [lambda step=step: [step(batch, 0) for batch in retain] for step in (bare, other)]
        report(f"bare loop / bare loop, {width} resnet18", in_turns(*run, device, pairs), device)
    compare("trainer without a method", [])
    compare("FineTune", [FineTune(request, loader=retain)])
    compare("GradientAscent", [GradientAscent(request, loader=retain)], "ascent")
    compare("NegGradPlus", [NegGradPlus(request, loader=retain, forget_loader=forget)], "difference")
    compare("SCRUB", [SCRUB(request, forget_epochs=pairs + 1, loader=half, forget_loader=forget)], "scrub", Ready(half))
    compare("MaskedSmallGradients", [MaskedSmallGradients(request, loader=retain, forget_loader=forget)])
    compare("ConvTranspose", [ConvTranspose(request, loader=retain)])
    compare("WeightNoise", [WeightNoise(request, loader=retain)])
    whole = cells.batches("retain", EPOCH)
    compare("PerturbAndRecover", [PerturbAndRecover(request, budget=1.0, loader=whole)], loader=whole)
    compare("RandomLabeling", [RandomLabeling(request, num_classes=8)], loader=mixed)
    compare("L1Sparse", [L1Sparse(request, loader=retain)], "penalty")
    compare(f"LastLayers, k = {LAST}", [LastLayers(request, k=LAST, loader=retain)], "last layers")
    untrained = {name: value.flip(0) for name, value in resnet18(planes, device).state_dict().items() if value.ndim}
    untrained = {**resnet18(planes, device).state_dict(), **untrained}
    compare("BadTeacher", [BadTeacher(request, initial_state=untrained, loader=mixed)], "bad teacher", mixed)
    compare("DELETE", [DELETE(request, loader=forget)], "erase", forget)
    compare("BoundaryShrink", [BoundaryShrink(request, loader=forget)], "shrink", forget)
    guided = ReferenceGuided(request, held_out_loader=mixed, loader=retain, forget_loader=forget)
    compare("ReferenceGuided", [guided], "two batches")
    adversarial = AMUN(request, true_labels=False, steps=5, alpha=0.5, loader=retain, forget_loader=forget)
    compare("AMUN", [adversarial], "two batches")


def fisher(device: torch.device, cells: Cells, pairs: int) -> None:
    """Squared gradients of single samples against the loop over batches of one, and against one plain pass."""
    torch.manual_seed(0)
    dense = DenseNet121(spatial_dims=2, in_channels=1, out_channels=8).to(device)
    larger = Ready([{"image": torch.randn(8, 1, 64, 64, device=device), "label": torch.arange(8, device=device)}])
    for name, network, batches in (
        ("narrow resnet18, 28 x 28", resnet18(NARROW, device), cells.batches("retain", 2, 16)),
        ("densenet121, 64 x 64", dense, larger),
    ):
        network.eval()
        parameters = list(network.parameters())
        engine = trainer(device, network, batches, [])

        def importance(chunk: int | None) -> Callable[[], object]:
            return lambda: _Passes(engine, parameters, chunk, Cost()).over(batches, "retain")  # noqa: B023

        def of_one() -> None:
            sums = [torch.zeros_like(parameter) for parameter in parameters]  # noqa: B023
            for batch in batches:  # noqa: B023
                for image, label in zip(batch["image"].split(1), batch["label"].split(1)):
                    loss = functional.cross_entropy(network(image), label)  # noqa: B023
                    for total, gradient in zip(sums, torch.autograd.grad(loss, parameters)):  # noqa: B023
                        total.addcmul_(gradient, gradient)

        def plain() -> None:
            for batch in batches:  # noqa: B023
                loss = functional.cross_entropy(network(batch["image"]), batch["label"])  # noqa: B023
                torch.autograd.grad(loss, parameters)  # noqa: B023

        report(
            f"Fisher / batches of one, {name}",
            in_turns(importance(None), of_one, device, pairs),
            device,
            FISHER_BOUND,
        )
        report(f"vectorised, 8 at once / batches of one, {name}", in_turns(importance(8), of_one, device, 3), device)
        report(f"Fisher / plain pass of batches, {name}", in_turns(importance(None), plain, device, 3), device)


def main() -> None:
    """Run all, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--only", choices=("one-shot", "steps", "fisher"))
    parser.add_argument("--method", default="", help="steps of the methods whose names contain this")
    parser.add_argument("--full", action="store_true", help="the full ResNet-18 instead of the narrow one")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    planes = FULL if chosen.full else NARROW
    print(f"{Path(__file__).name} on {machine(device)}\n")
    cells = Cells(device)
    if chosen.only in (None, "one-shot"):
        one_shot(device, planes, cells, chosen.pairs)
    if chosen.only in (None, "steps"):
        steps(device, planes, cells, chosen.pairs, chosen.method)
    if chosen.only in (None, "fisher"):
        fisher(device, cells, chosen.pairs)


if __name__ == "__main__":
    main()
