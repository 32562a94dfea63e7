from __future__ import annotations

import pytest
import torch
from monai.networks.nets import DenseNet121, ResNet, resnet18
from torch import nn

from monai_unlearn.placement import place_network

LAST, FIRST = torch.channels_last, torch.contiguous_format


def _resnet(planes: list[int], spatial_dims: int = 2) -> nn.Module:
    return ResNet("basic", [1, 1, 1, 1], planes, spatial_dims=spatial_dims, n_input_channels=1, num_classes=2)


@pytest.mark.parametrize(
    ("network", "memory_format"),
    [
        (lambda: _resnet([16, 32, 64, 128]), LAST),  # the bundles'
        (lambda: resnet18(spatial_dims=2, n_input_channels=1), LAST),
        (lambda: DenseNet121(2, 1, 2), LAST),
        (lambda: _resnet([4, 4, 8, 8]), FIRST),
        (lambda: _resnet([12, 32, 64, 128]), FIRST),
        (lambda: nn.Sequential(nn.Conv2d(32, 32, 1, stride=2, groups=4)), FIRST),
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 1)), LAST),
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, stride=2)), LAST),
    ],
    ids=["narrow", "resnet18", "densenet", "tiny", "12 channels", "groups", "no stride", "3 × 3"],
)
def test_channels_are_last_unless_that_is_unsafe(network: object, memory_format: torch.memory_format) -> None:
    made = network()
    state = {name: value.clone() for name, value in made.state_dict().items()}
    assert place_network(made, "cpu") is made
    kernels = [m.weight for m in made.modules() if isinstance(m, nn.Conv2d)]
    assert all(kernel.is_contiguous(memory_format=memory_format) for kernel in kernels)
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())


def test_networks_of_volumes_and_without_convolutions_are_moved_as_they_are() -> None:
    for network in (_resnet([4, 4, 8, 8], spatial_dims=3), nn.Linear(3, 2)):
        assert place_network(network, torch.device("cpu")) is network
        assert all(parameter.is_contiguous() for parameter in network.parameters())
