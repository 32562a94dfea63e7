"""Convolution transpose: which axes are swapped, and that training on the retain set follows."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Events
from monai.data import Dataset
from monai.networks.nets import DenseNet, ResNet
from torch import nn
from torch.nn import functional

from monai_unlearn.loss import MaskedBCEWithLogitsLoss
from monai_unlearn.methods import ConvTranspose
from monai_unlearn.methods._weights import convolution_weights
from monai_unlearn.methods.conv_transpose import transposed

IS_FORGET = [i // 5 in (0, 3) for i in range(30)]


def start(trainer):
    """Let the handlers do what they do before the first iteration."""
    trainer.fire_event(Events.STARTED)


# The pure function


@settings(max_examples=40, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    side=st.integers(1, 5),
    depth=st.one_of(st.none(), st.integers(1, 3)),
)
def test_twice_is_the_kernel_itself_and_once_is_numpys_swapaxes(channels, side, depth) -> None:
    shape = (*channels, *([] if depth is None else [depth]), side, side)
    kernel = torch.randn(shape, generator=torch.Generator().manual_seed(side))
    once = transposed(kernel)
    np.testing.assert_array_equal(once.numpy(), np.swapaxes(kernel.numpy(), -1, -2))
    assert torch.equal(transposed(once), kernel)
    assert once.data_ptr() != kernel.data_ptr()


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3), (2, 2, 3, 5), (2, 2, 3, 3, 1)])
def test_kernels_that_are_not_square_in_two_spatial_axes_are_refused_by_shape(shape) -> None:
    with pytest.raises(ValueError, match=rf"the last two of one size, but got \({', '.join(map(str, shape))}\)"):
        transposed(torch.zeros(shape))


def test_with_the_swapped_kernel_a_swapped_image_gives_the_swapped_output() -> None:
    convolution = nn.Conv2d(2, 3, 3, padding=1).double()
    image = torch.randn(1, 2, 7, 7, dtype=torch.float64)
    swapped = functional.conv2d(image.transpose(-1, -2), transposed(convolution.weight), convolution.bias, padding=1)
    torch.testing.assert_close(swapped.transpose(-1, -2), convolution(image), rtol=1e-12, atol=1e-13)


# The handler


def test_only_convolution_kernels_change_and_each_is_swapped(make_trainer, make_network, forget, snapshot) -> None:
    network = make_network()
    before = snapshot(network)
    start(make_trainer([ConvTranspose(forget)], network=network))
    after = snapshot(network)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"0.weight"}
    assert torch.equal(after["0.weight"], before["0.weight"].transpose(2, 3))


def test_starting_twice_gives_the_original_back(make_trainer, make_network, forget, snapshot, same_bits) -> None:
    network = make_network()
    before = snapshot(network)
    for _ in range(2):
        start(make_trainer([ConvTranspose(forget)], network=network))
    assert same_bits(before, snapshot(network))


def test_the_parameters_stay_the_ones_that_the_optimizer_trains(make_trainer, make_network, forget, snapshot) -> None:
    network = make_network()
    kernel, before = network[0].weight, snapshot(network)
    trainer = make_trainer([ConvTranspose(forget)], network=network)
    trainer.run()
    assert network[0].weight is kernel
    assert any(parameter is kernel for parameter in trainer.optimizer.param_groups[0]["params"])
    assert not torch.equal(kernel, before["0.weight"].transpose(2, 3))  # trained on since


def test_a_shared_kernel_is_swapped_once(make_trainer, forget) -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3), nn.Flatten(), nn.Linear(4, 3))
    network[1].weight = network[0].weight
    before = network[0].weight.detach().clone()
    start(make_trainer([ConvTranspose(forget)], network=network))
    assert torch.equal(network[1].weight, before.transpose(2, 3))


def test_frozen_kernels_stay_bit_identical(make_trainer, forget) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    network[0].weight.requires_grad_(False)
    before = [network[i].weight.detach().clone() for i in (0, 1)]
    make_trainer([ConvTranspose(forget)], network=network).run()
    assert torch.equal(network[0].weight, before[0])
    assert not torch.equal(network[1].weight, before[1])


def test_a_channels_last_kernel_stays_so(make_trainer, make_network, forget) -> None:
    network = nn.Sequential(nn.Conv2d(2, 4, 3), *make_network())
    network[1] = nn.Conv2d(4, 4, 3)
    network = network.to(memory_format=torch.channels_last)
    before = network[0].weight.detach().clone()
    start(make_trainer([ConvTranspose(forget)], network=network))
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(network[0].weight, before.transpose(2, 3))


def test_float64_training_equals_a_hand_written_loop(make_trainer, make_network, forget, double) -> None:
    network = make_network().double()
    expected = copy.deepcopy(network)
    make_trainer(
        [ConvTranspose(forget)], network=network, dataset=double, batch_size=20, shuffle=False, max_epochs=3
    ).run()

    keep = [i for i in range(30) if not IS_FORGET[i]]
    images = torch.stack([double.data[i]["image"] for i in keep])
    labels = torch.tensor([int(double.data[i]["label"]) for i in keep])
    weight = expected[0].weight
    weight.data = torch.from_numpy(np.swapaxes(weight.detach().numpy(), 2, 3).copy())
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(expected(images), labels).backward()
        optimizer.step()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-11, atol=1e-13)


def test_its_seconds_are_counted_and_no_sample(make_trainer, forget) -> None:
    handler = ConvTranspose(forget)
    make_trainer([handler]).run()
    assert handler.cost.seconds > 0
    assert (handler.cost.samples, handler.cost.forward, handler.cost.backward) == (0, 0, 0)


def test_in_3d_the_first_spatial_axis_stays(make_trainer, forget) -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, (2, 3, 3)), nn.Flatten(), nn.Linear(2 * 4 * 3 * 3, 3))
    before = network[0].weight.detach().clone()
    data = [{"image": torch.randn(1, 5, 5, 5), "label": i % 3, "patient": f"P{i % 6}"} for i in range(12)]
    start(make_trainer([ConvTranspose(forget)], network=network, dataset=Dataset(data)))
    assert torch.equal(network[0].weight, before.permute(0, 1, 2, 4, 3))


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("kind", ["resnet", "densenet"])
def test_monais_networks_with_findings(make_trainer, forget, snapshot, spatial_dims, kind) -> None:
    if kind == "resnet":
        network: nn.Module = ResNet("basic", [1, 1, 1, 1], [2, 2, 2, 2], spatial_dims, 1, conv1_t_size=3, num_classes=2)
    else:
        network = DenseNet(spatial_dims, 1, 2, init_features=2, growth_rate=2, block_config=(1, 1), bn_size=1)
    before = snapshot(network)
    label = torch.tensor([1.0, float("nan")])
    data = [{"image": torch.randn(1, *[9] * spatial_dims), "label": label, "patient": f"P{i % 6}"} for i in range(12)]
    trainer = make_trainer(
        [ConvTranspose(forget)],
        network=network,
        dataset=Dataset(data),
        loss_function=MaskedBCEWithLogitsLoss(),
        max_epochs=1,
    )
    start(trainer)
    after = snapshot(network)
    names = convolution_weights(network)
    assert any(parameter.shape[-1] > 1 for parameter in names.values())
    for name in before:
        assert torch.equal(after[name], before[name].transpose(-1, -2) if name in names else before[name])


# Bad input


def test_a_network_without_convolutions_is_refused(make_trainer, forget) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with pytest.raises(RuntimeError, match="larger than 1 × 1 that requires a gradient, but the network has none"):
        make_trainer([ConvTranspose(forget)], network=network).run()


def test_convolutions_of_one_pixel_alone_are_refused(make_trainer, forget) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(72, 3))
    with pytest.raises(RuntimeError, match="nothing would change"):
        make_trainer([ConvTranspose(forget)], network=network).run()


def test_a_kernel_that_is_not_square_is_refused_by_name_and_nothing_changes(
    make_trainer, forget, snapshot, same_bits
) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, (1, 3)), nn.Flatten(), nn.Linear(16, 3))
    before = snapshot(network)
    with pytest.raises(ValueError, match=r"can't change 1.weight.*but got \(2, 2, 1, 3\)"):
        make_trainer([ConvTranspose(forget)], network=network).run()
    assert same_bits(before, snapshot(network))
