"""Distance of each part to the least work that it could be, as ratios within one run.

    python benchmarks/speed.py

Prints the medians and ranges that docs/benchmarks.md records. Compared runs alternate, so that a machine whose speed
drifts slows both; a ratio is the median over pairs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Events
from monai.data import CacheDataset
from monai.engines import SupervisedTrainer
from monai.networks.nets import ResNet
from monai.transforms import Compose, EnsureTyped, RandFlipd, ScaleIntensityRanged
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from monai_unlearn import ForgetSet
from monai_unlearn.cost import synchronize
from monai_unlearn.data import BatchedImages, RandomFlip, make_loader, make_split, synthetic_cells
from monai_unlearn.methods import BatchNormPolicy, RandomLabeling, SaliencyMask
from monai_unlearn.methods.saliency_mask import summed_gradient, top_fraction
from monai_unlearn.provenance import machine

NARROW, FULL = [16, 32, 64, 128], [64, 128, 256, 512]


def resnet18(planes: list[int], device: torch.device, channels_last: bool = True, stride: int = 2) -> nn.Module:
    """The bundles' network, or with ``FULL`` planes the full ResNet-18."""
    torch.manual_seed(0)
    network = ResNet(
        "basic",
        [2, 2, 2, 2],
        planes,
        spatial_dims=2,
        n_input_channels=1,
        num_classes=8,
        conv1_t_size=3,
        conv1_t_stride=stride,
        no_max_pool=True,
    )
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return network.to(device, memory_format=memory_format)


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    """The bundles' optimizer of the unlearning phase."""
    return torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of a call."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def report(name: str, pairs: list[tuple[float, float]]) -> None:
    """Print the ratio of each pair's first time to its second."""
    ratios = [a / b for a, b in pairs]
    first, second = (statistics.median(times) for times in zip(*pairs))
    print(
        f"{name:<66} {statistics.median(ratios):5.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(pairs)} pairs; "
        f"{1000 * first:.0f} against {1000 * second:.0f} ms)",
        flush=True,
    )


def masked_step(device: torch.device, stride: int, pairs: int) -> None:
    """A step of the full ResNet-18 with the mask's hooks against the plain step, batch 64."""
    images = torch.randn(64, 1, 28, 28, device=device)
    labels = torch.randint(0, 8, (64,), device=device)
    batch = {"image": images, "label": labels, "index": torch.arange(64)}

    def trainer(handlers: list) -> SupervisedTrainer:
        network = resnet18(FULL, device, stride=stride)
        return SupervisedTrainer(
            device,
            1,
            [batch] * 4,
            network,
            sgd(network),
            nn.CrossEntropyLoss(),
            decollate=False,
            train_handlers=handlers,
        )

    class Timed:
        """Time of each iteration but the first, without what runs before the epoch."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def attach(self, engine: SupervisedTrainer) -> None:
            engine.add_event_handler(Events.ITERATION_STARTED, self._start)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._stop)

        def _start(self, engine: SupervisedTrainer) -> None:
            synchronize(device)
            self._last = time.perf_counter()

        def _stop(self, engine: SupervisedTrainer) -> None:
            synchronize(device)
            self.times.append(time.perf_counter() - self._last)

    timed_mask, timed_plain = Timed(), Timed()
    loader = [{key: value[:8] for key, value in batch.items()}]
    mask = SaliencyMask(ForgetSet(range(8)), ratio=0.5, loader=loader)
    masked, plain = trainer([mask, timed_mask]), trainer([timed_plain])
    result = []
    for _ in range(pairs + 1):
        for engine, timed in ((masked, timed_mask), (plain, timed_plain)):
            timed.times = []
            engine.state.epoch = engine.state.iteration = 0
            engine.run()
        result.append((statistics.median(timed_mask.times[1:]), statistics.median(timed_plain.times[1:])))
    report(f"step with SaliencyMask / plain step, resnet18, stem stride {stride}", result[1:])


def mask_against_pass(device: torch.device, planes: list[int], n: int, pairs: int) -> None:
    """Building the mask against one forward and backward pass over the same samples."""
    data = synthetic_cells()
    split = make_split(data)
    dataset = BatchedImages(data.train, device=device)
    loader = make_loader(dataset, 64)
    network = resnet18(planes, device)
    forget = split.forget_set()
    few = list(forget.forget_loader(loader))[: math.ceil(n / 64)]
    loss_function = nn.CrossEntropyLoss(reduction="sum")
    handler = SaliencyMask(forget, ratio=0.5, loader=few)
    trainer = SupervisedTrainer(
        device, 1, loader, network, sgd(network), nn.CrossEntropyLoss(), decollate=False, train_handlers=[handler]
    )

    def one_pass() -> None:
        network.eval()
        network.zero_grad(set_to_none=True)
        for batch in few:
            loss_function(network(batch["image"].to(device)), batch["label"].to(device)).backward()

    result = []
    for _ in range(pairs + 1):
        network.zero_grad(set_to_none=True)
        result.append((seconds(lambda: handler._compute(trainer), device), seconds(one_pass, device)))
    size = sum(len(batch["label"]) for batch in few)
    width = "full" if planes == FULL else "narrow"
    report(f"mask / one forward and backward pass, {width} resnet18, {size} samples", result[1:])


def mask_memory() -> None:
    """Peak memory of turning a gradient into a mask, in float copies of the weights (CPU)."""
    network = resnet18(FULL, torch.device("cpu"))
    weights = sum(parameter.numel() for parameter in network.parameters())
    images, labels = torch.randn(1, 1, 28, 28), torch.zeros(1, dtype=torch.long)
    parameters = list(network.parameters())
    network.eval()

    def peak(work: Callable[[], object]) -> float:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            kept = work()
        total = highest = 0
        for event in record.profiler.kineto_results.events():
            if event.name() == "[memory]":
                total += event.nbytes()
                highest = max(highest, total)
        del kept
        return highest / (4 * weights)

    def gradient() -> torch.Tensor:
        loss = nn.functional.cross_entropy(network(images), labels, reduction="sum")
        return summed_gradient(parameters, [loss])[0]

    flat = gradient().abs_()
    print(f"{'mask: peak beside the weights, in float copies of them, gradient':<66} {peak(gradient):5.2f}")
    chosen = 1 + peak(lambda: top_fraction(flat, 0.5))
    print(f"{'mask: the same, choosing the largest half (gradient included)':<66} {chosen:5.2f}")
    print(f"{'mask: bytes a weight that stay':<66} {top_fraction(flat, 0.5).element_size():5d}", flush=True)


def unlearning_phase(device: torch.device, pairs: int) -> None:
    """The saliency bundle's whole unlearning phase against the bare loop over the same samples."""
    data = synthetic_cells()
    split = make_split(data)
    forget = split.forget_set()
    epochs = 2

    def unlearn() -> None:
        network = resnet18(NARROW, device)
        loader = make_loader(BatchedImages(data.train, [RandomFlip(1)], device=device), 64, shuffle=True)
        SupervisedTrainer(
            device,
            epochs,
            loader,
            network,
            sgd(network),
            nn.CrossEntropyLoss(),
            decollate=False,
            train_handlers=[
                RandomLabeling(forget, num_classes=8),
                SaliencyMask(forget, ratio=0.5),
                BatchNormPolicy(forget),
            ],
        ).run()

    dataset = BatchedImages(data.train, device=device)
    batches = [
        dataset.__getitems__(range(start, min(start + 64, len(dataset)))) for start in range(0, len(dataset), 64)
    ]
    forgotten = [dataset.__getitems__(rows.tolist()) for rows in np.array_split(split.forget, 4)]

    def bare() -> None:
        """The passes that the definition needs: mask, epochs, forward passes for BatchNorm; no loading at all."""
        network = resnet18(NARROW, device)
        optimizer = sgd(network)
        network.eval()
        for batch in forgotten:
            nn.functional.cross_entropy(network(batch["image"]), batch["label"]).backward()
        network.train()
        for _ in range(epochs):
            for batch in batches:
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(batch["image"]), batch["label"]).backward()
                optimizer.step()
        with torch.no_grad():
            for batch in batches[: len(batches) * len(split.retain) // len(dataset)]:
                network(batch["image"])

    result = [(seconds(unlearn, device), seconds(bare, device)) for _ in range(pairs + 1)]
    report(f"whole unlearning phase / bare loop, narrow resnet18, {epochs} epochs", result[1:])


def loading(pairs: int) -> None:
    """One epoch of augmented batches: this package's in-memory data set against MONAI's CacheDataset."""
    data = synthetic_cells().train
    own = make_loader(BatchedImages(data, [RandomFlip(1)]), 64, shuffle=True)
    records = [{"image": image[None], "label": int(label)} for image, label in zip(data.images, data.labels)]
    steps = Compose(
        [
            EnsureTyped("image", track_meta=False),
            ScaleIntensityRanged("image", 0, 255, -1, 1),
            RandFlipd("image", prob=0.5),
        ]
    )
    theirs = DataLoader(CacheDataset(records, steps, progress=False), batch_size=64, shuffle=True)
    cpu = torch.device("cpu")
    result = [(seconds(lambda: list(own), cpu), seconds(lambda: list(theirs), cpu)) for _ in range(pairs + 1)]
    report("one epoch of augmented batches: in-memory / CacheDataset", result[1:])


def variants(device: torch.device, pairs: int) -> None:
    """What is fastest for the bare training step of the narrow network."""
    images, labels = torch.randn(64, 1, 28, 28, device=device), torch.randint(0, 8, (64,), device=device)

    def step(network: nn.Module) -> Callable[[], None]:
        optimizer = sgd(network)

        def run() -> None:
            for _ in range(10):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(images), labels).backward()
                optimizer.step()

        run()
        return run

    base = step(resnet18(NARROW, device))
    contiguous = step(resnet18(NARROW, device, channels_last=False))
    report(
        "step, contiguous / channels-last", [(seconds(contiguous, device), seconds(base, device)) for _ in range(pairs)]
    )
    try:
        network = resnet18(NARROW, device)
        start = time.perf_counter()
        compiled = step(torch.compile(network))
        print(f"torch.compile: first ten steps took {time.perf_counter() - start:.0f} s")
        report(
            "step, compiled / channels-last", [(seconds(compiled, device), seconds(base, device)) for _ in range(pairs)]
        )
    except Exception as error:
        print(f"torch.compile failed: {type(error).__name__}")
    if device.type == "cpu":
        threads = torch.get_num_threads()
        result = []
        for _ in range(pairs):
            torch.set_num_threads(1)
            one = seconds(base, device)
            torch.set_num_threads(threads)
            result.append((one, seconds(base, device)))
        report(f"step, 1 thread / {threads} threads", result)


def main() -> None:
    """Run all, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, default=7)
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    print(f"{Path(__file__).name} on {machine(device)}\n")
    masked_step(device, stride=1, pairs=chosen.pairs)
    masked_step(device, stride=2, pairs=chosen.pairs)
    mask_against_pass(device, NARROW, 256, chosen.pairs)
    mask_against_pass(device, FULL, 256, chosen.pairs)
    mask_memory()
    unlearning_phase(device, chosen.pairs)
    loading(chosen.pairs)
    variants(device, chosen.pairs)


if __name__ == "__main__":
    main()
