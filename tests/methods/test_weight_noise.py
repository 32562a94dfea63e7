"""Weight noise: how large it is, which weights it is added to, and that training on the retain set follows."""

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
from scipy.stats import kstest
from torch import nn
from torch.nn import functional

from monai_unlearn.loss import MaskedBCEWithLogitsLoss
from monai_unlearn.methods import FineTune, WeightNoise
from monai_unlearn.methods._weights import kernels
from monai_unlearn.methods.weight_noise import noisy

IS_FORGET = [i // 5 in (0, 3) for i in range(30)]


def start(trainer):
    """Let the handlers do what they do before the first iteration."""
    trainer.fire_event(Events.STARTED)


# The pure function


def test_the_noise_is_normal_with_the_kernels_own_standard_deviation() -> None:
    weight = 0.03 * torch.randn(64, 32, 3, 3) + 0.5
    noise = (noisy(weight, 0.5, torch.Generator().manual_seed(1)) - weight).double().numpy().ravel()
    assert kstest(noise / (0.5 * np.std(weight.double().numpy())), "norm").pvalue > 0.01


def test_the_noise_is_the_generators_draw_in_order() -> None:
    weight = torch.randn(4, 3, 2, dtype=torch.float64)
    draw = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(7)).double()
    expected = weight.numpy() + 2 * np.std(weight.numpy()) * draw.numpy()
    np.testing.assert_allclose(noisy(weight, 2, torch.Generator().manual_seed(7)).numpy(), expected, rtol=1e-14)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    scale=st.floats(0, 10),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_noise_keeps_shape_and_type_and_the_given_weight(shape, scale, dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    given_weight = weight.clone()
    result = noisy(weight, scale, torch.Generator())
    assert (result.shape, result.dtype) == (weight.shape, dtype)
    assert torch.isfinite(result).all()
    assert torch.equal(weight, given_weight)
    if scale == 0 or weight.numel() == 1:
        assert torch.equal(result, weight)


# Which weights


def test_biases_normalisation_layers_and_buffers_stay(make_trainer, forget, snapshot) -> None:
    normalisation = [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm([4, 4, 4])]
    network = nn.Sequential(nn.Conv2d(1, 4, 3), *normalisation, nn.Flatten(), nn.Linear(64, 3))
    before = snapshot(network)
    start(make_trainer([WeightNoise(forget)], network=network))
    after = snapshot(network)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before["3.weight"].ndim == 3
    assert changed == {"0.weight", "5.weight"}


def test_frozen_kernels_stay_bit_identical(make_trainer, make_network, forget, snapshot) -> None:
    network = make_network()
    network[0].weight.requires_grad_(False)
    before = snapshot(network)
    make_trainer([WeightNoise(forget)], network=network).run()
    after = snapshot(network)
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["5.weight"], after["5.weight"])


class Tied(nn.Module):
    """Two names of one convolution, in either order."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        shared = nn.Conv2d(1, 1, 3, padding=1)
        setattr(self, first, shared)
        self.between = nn.Linear(6, 6)
        setattr(self, second, shared)
        self.head = nn.Linear(36, 3)

    def forward(self, x):
        return self.head(self.b(self.between(self.a(x))).flatten(1))


def test_a_shared_kernel_gets_noise_once_whatever_the_order_of_its_names(make_trainer, forget) -> None:
    torch.manual_seed(0)
    networks = [Tied("a", "b"), Tied("b", "a")]
    networks[1].load_state_dict(networks[0].state_dict())
    weight = networks[0].a.weight.detach().clone()
    for network in networks:
        start(make_trainer([WeightNoise(forget, seed=3)], network=network))
    for name, value in networks[0].named_parameters():
        assert torch.equal(value, networks[1].get_parameter(name))
    expected = noisy(weight, 1.0, torch.Generator().manual_seed(3))  # a is the first name of all
    assert torch.equal(networks[0].a.weight, expected)
    assert list(kernels(networks[0])) == list(kernels(networks[1])) == ["a.weight", "between.weight", "head.weight"]


def test_two_layers_that_share_a_weight_alone_count_once() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    assert list(kernels(network)) == ["0.weight"]


def test_names_do_not_depend_on_what_is_wrapped_around_the_network(make_network) -> None:
    network = make_network()
    wrapped = nn.Sequential()
    wrapped.add_module("module", network)
    assert list(kernels(wrapped)) == list(kernels(network)) == ["0.weight", "5.weight"]


# The run


def test_float64_training_equals_a_hand_written_loop(make_trainer, make_network, forget, double) -> None:
    network = make_network().double()
    expected = copy.deepcopy(network)
    handler = WeightNoise(forget, scale=0.7, seed=5)
    make_trainer([handler], network=network, dataset=double, batch_size=20, shuffle=False, max_epochs=3).run()

    keep = [i for i in range(30) if not IS_FORGET[i]]
    images = torch.stack([double.data[i]["image"] for i in keep])
    labels = torch.tensor([int(double.data[i]["label"]) for i in keep])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in (expected[0].weight, expected[5].weight):
            weight += 0.7 * float(np.std(weight.numpy())) * torch.randn(weight.shape, generator=generator).double()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(expected(images), labels).backward()
        optimizer.step()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-11, atol=1e-13)


def test_without_noise_it_is_fine_tuning(make_trainer, make_network, forget, snapshot, same_bits) -> None:
    states = []
    for handler in (WeightNoise(forget, scale=0), FineTune(forget)):
        network = make_network()
        make_trainer([handler], network=network).run()
        states.append(snapshot(network))
    assert same_bits(*states)


def test_the_seed_decides_the_noise(make_trainer, make_network, forget, snapshot, same_bits) -> None:
    states = []
    for seed in (0, 0, 1):
        network = make_network()
        start(make_trainer([WeightNoise(forget, seed=seed)], network=network))
        states.append(snapshot(network))
    assert same_bits(states[0], states[1])
    assert not same_bits(states[0], states[2])


def test_an_own_loader_is_trained_on(make_trainer, forget, records, loader_of, on) -> None:
    seen = set()
    see = on(Events.ITERATION_COMPLETED, lambda e: seen.update(e.state.batch["index"].tolist()))
    make_trainer([WeightNoise(forget, loader=loader_of(records[20:26])), see]).run()
    assert seen == set(range(20, 26))


def test_its_seconds_are_counted_and_no_sample(make_trainer, forget) -> None:
    handler = WeightNoise(forget)
    make_trainer([handler]).run()
    assert handler.cost.seconds > 0
    assert (handler.cost.samples, handler.cost.forward, handler.cost.backward) == (0, 0, 0)
    assert handler.cost_phase == "unlearn"


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("kind", ["resnet", "densenet"])
@pytest.mark.parametrize("task", ["classes", "binary", "findings"])
def test_monais_networks_in_each_task(make_trainer, forget, snapshot, spatial_dims, kind, task) -> None:
    outputs = {"classes": 3, "binary": 1, "findings": 4}[task]
    if kind == "resnet":
        network: nn.Module = ResNet(
            "basic", [1, 1, 1, 1], [2, 2, 2, 2], spatial_dims, 1, conv1_t_size=3, num_classes=outputs
        )
    else:
        network = DenseNet(spatial_dims, 1, outputs, init_features=2, growth_rate=2, block_config=(1, 1), bn_size=1)
    before = snapshot(network)

    def label(i):
        findings = torch.tensor([1.0, 0.0, float("nan"), float(i % 2)])
        return {"classes": torch.tensor(i % 3), "binary": torch.tensor([float(i % 2)]), "findings": findings}[task]

    data = [
        {"image": torch.randn(1, *[9] * spatial_dims), "label": label(i), "patient": f"P{i % 6}"} for i in range(12)
    ]
    loss = {
        "classes": nn.CrossEntropyLoss(),
        "binary": nn.BCEWithLogitsLoss(),
        "findings": MaskedBCEWithLogitsLoss(),
    }[task]
    make_trainer([WeightNoise(forget)], network=network, dataset=Dataset(data), loss_function=loss, max_epochs=1).run()
    after = snapshot(network)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert all(not torch.equal(before[name], after[name]) for name in kernels(network))


# Bad input


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_a_scale_that_is_none_raises(forget, scale) -> None:
    with pytest.raises(ValueError, match=r"scale should be a number of at least 0, but got"):
        WeightNoise(forget, scale=scale)


def test_a_network_without_kernels_is_refused(make_trainer, make_network, forget) -> None:
    network = make_network()
    for parameter in (network[0].weight, network[5].weight):
        parameter.requires_grad_(False)
    with pytest.raises(RuntimeError, match="Let its weights require a gradient"):
        make_trainer([WeightNoise(forget)], network=network).run()


def test_an_empty_loader_raises_and_changes_no_weight(
    make_trainer, make_network, forget, records, snapshot, same_bits
) -> None:
    network = make_network()
    before = snapshot(network)
    empty = torch.utils.data.DataLoader(Dataset(records[:3]), batch_size=8, drop_last=True)
    with pytest.raises(ValueError, match="at least one batch, but gives none"):
        make_trainer([WeightNoise(forget, loader=empty)], network=network).run()
    assert same_bits(before, snapshot(network))
