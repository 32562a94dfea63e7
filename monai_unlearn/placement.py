"""A network on its device, in the memory format that is quickest there."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["place_network"]

# Channels that oneDNN's kernels take at once with AVX-512; with AVX2 it is half of that.
CHANNEL_BLOCK = 16


def place_network(network: nn.Module, device: str | torch.device) -> nn.Module:
    """Move a network to a device, 2-D convolutions with their channels last, where that is safe.

    Channels last is the quicker format (docs/benchmarks.md). Not on a CPU for convolutions of 1 × 1 with a stride and
    few input channels, as the shortcuts of a very narrow ResNet are: oneDNN, also that of torch 2.13, writes past its
    memory in their backward pass (uxlfoundation/oneDNN#6035), which ends in wrong gradients, a hang or a crash.

    Args:
        network: any network; changed in place.
        device: where to.

    Returns:
        The same network.
    """
    device = torch.device(device)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions or (device.type == "cpu" and any(map(_is_unsafe, convolutions))):
        return network.to(device)
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _is_unsafe(convolution: nn.Conv2d) -> bool:
    channels = convolution.in_channels // convolution.groups
    return tuple(convolution.kernel_size) == (1, 1) and max(convolution.stride) > 1 and channels < CHANNEL_BLOCK
