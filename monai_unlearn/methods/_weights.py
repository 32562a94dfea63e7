"""Which weights the methods that disturb a network act on."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from monai_unlearn.methods._trainer import parameter_name

__all__ = ["convolution_weights", "kernels"]

NORMALISATION = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def convolution_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """The kernels of a network's convolutions that require a gradient, each once.

    Args:
        network: any network; transposed convolutions count.

    Returns:
        Name → kernel, sorted by name. A kernel that several layers share goes by the first of its names in that order,
        so that nothing depends on the order of the layers.
    """
    found = (
        (prefix, name, parameter)
        for prefix, module in network.named_modules(remove_duplicate=False)
        if isinstance(module, _ConvNd)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if name == "weight"
    )
    return _once(found)


def kernels(network: nn.Module) -> dict[str, nn.Parameter]:
    """All weights with two or more dimensions that require a gradient, but those of normalisation layers, each once.

    Args:
        network: any network.

    Returns:
        Name → kernel, as ``convolution_weights``.
    """
    found = (
        (prefix, name, parameter)
        for prefix, module in network.named_modules(remove_duplicate=False)
        if not isinstance(module, NORMALISATION)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.ndim >= 2
    )
    return _once(found)


def _once(found: Iterator[tuple[str, str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    names: dict[nn.Parameter, str] = {}
    for prefix, name, parameter in found:
        if parameter.requires_grad:
            full = parameter_name(f"{prefix}.{name}" if prefix else name)
            names[parameter] = min(full, names.get(parameter, full))
    return dict(sorted((name, parameter) for parameter, name in names.items()))
