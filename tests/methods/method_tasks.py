"""Tasks that a method should cope with: what the labels are, how many dimensions an image has, which network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from monai.data import Dataset
from monai.networks.nets import DenseNet, resnet10
from torch import nn

from monai_unlearn.loss import MaskedBCEWithLogitsLoss

IS_FORGET = torch.tensor([i // 5 in (0, 3) for i in range(30)])  # of the fixtures `records` and `forget`


def findings_of(i: int) -> torch.Tensor:
    """Two findings, of which one is not known in every third sample."""
    return torch.tensor([float(i % 2), float("nan") if i % 3 == 0 else float(i % 3 == 1)])


LABELS: dict[str, tuple[int, Callable[[int], torch.Tensor], nn.Module]] = {
    "classes": (3, lambda i: torch.tensor(i % 3), nn.CrossEntropyLoss()),
    "two_outputs": (2, lambda i: torch.tensor(i % 2), nn.CrossEntropyLoss()),
    "one_output": (1, lambda i: torch.tensor([float(i % 2)]), nn.BCEWithLogitsLoss()),
    "findings": (2, findings_of, MaskedBCEWithLogitsLoss()),
}
NETWORKS: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
    "densenet_2d": (2, lambda n: DenseNet(2, 1, n, init_features=4, growth_rate=2, block_config=(1, 1))),
    "densenet_3d": (3, lambda n: DenseNet(3, 1, n, init_features=4, growth_rate=2, block_config=(1, 1))),
    "resnet_3d": (3, lambda n: resnet10(spatial_dims=3, n_input_channels=1, num_classes=n, widen_factor=0.05)),
}


def with_labels(records: list[dict], kind: str, dims: int = 2, side: int | None = None) -> Dataset:
    """The records with labels of a kind, in two or three dimensions, perhaps enlarged."""
    out = []
    for i, record in enumerate(records):
        image = record["image"]
        if dims == 3:
            image = image[..., None].repeat(1, 1, 1, image.shape[-1])
        if side is not None:
            image = nn.functional.interpolate(image[None], size=(side,) * dims)[0]
        out.append({**record, "image": image, "label": LABELS[kind][1](i)})
    return Dataset(out)


def task_of(records: list[dict], kind: str, name: str) -> dict:
    """Network, data and loss of a kind of labels and a network, for ``make_trainer``."""
    dims, build = NETWORKS[name]
    outputs, _, loss = LABELS[kind]
    return {
        "network": build(outputs),
        "dataset": with_labels(records[:20], kind, dims, side=8),
        "loss_function": loss,
    }
