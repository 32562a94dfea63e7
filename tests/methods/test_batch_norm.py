"""BatchNorm's policies: whose samples the running statistics describe after a run."""

from __future__ import annotations

import copy

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.handlers import CheckpointSaver
from monai.transforms import Compose, EnsureTyped, RandGaussianNoised
from torch import nn
from torch.nn import functional

from monai_unlearn.methods import BatchNormPolicy, RandomLabeling, Retrain

IS_FORGET = [i // 5 in (0, 3) for i in range(30)]


def deep_network() -> nn.Module:
    """Two BatchNorm layers, so that the second sees what the first makes of a batch, and dropout between them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5, momentum=0.3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip


def layers(network):
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def hooks(network):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in network.modules())


def cumulative_mean(network, batches):
    """Mean over the batches of each layer's batch mean and unbiased variance, by hand."""
    network = copy.deepcopy(network).double().eval()
    values = [([], []) for _ in layers(network)]
    for images in batches:
        x, i = images, 0
        for module in network:
            if isinstance(module, nn.BatchNorm2d):
                values[i][0].append(x.mean((0, 2, 3)))
                values[i][1].append(x.var((0, 2, 3), unbiased=True))
                spread = (x.var((0, 2, 3), unbiased=False) + module.eps).sqrt()[:, None, None]
                x = (x - x.mean((0, 2, 3))[:, None, None]) / spread
                x = x * module.weight[:, None, None] + module.bias[:, None, None]
                i += 1
            else:
                x = module(x)
    return [(torch.stack(means).mean(0), torch.stack(variances).mean(0)) for means, variances in values]


@pytest.fixture
def explode(on):
    def third(engine):
        if engine.state.iteration == 3:
            raise FloatingPointError("in the third iteration")

    return on(Events.ITERATION_COMPLETED, third)


def test_retain_is_the_cumulative_mean_over_retain_batches_in_float64(make_trainer, forget, double) -> None:
    network = deep_network().double()
    make_trainer([RandomLabeling(forget), BatchNormPolicy(forget)], network=network, dataset=double).run()
    retain = torch.stack([record["image"] for i, record in enumerate(double.data) if not IS_FORGET[i]])
    with torch.no_grad():
        expected = cumulative_mean(network, retain.split(8))
    for layer, (mean, variance) in zip(layers(network), expected):
        torch.testing.assert_close(layer.running_mean, mean, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(layer.running_var, variance, rtol=1e-11, atol=1e-13)


def test_retain_counts_what_it_cost(make_trainer, forget) -> None:
    policy = BatchNormPolicy(forget)
    make_trainer([policy]).run()
    assert (policy.cost.samples, policy.cost.forward, policy.cost.backward) == (20, 20, 0)
    assert policy.cost.seconds > 0


def test_retain_drops_random_transforms(make_trainer, make_network, forget, records, snapshot, same_bits) -> None:
    states = []
    for prob in (0.0, 1.0):
        network = make_network()
        noise = RandGaussianNoised("image", prob=prob, std=5.0)
        dataset = Dataset(records, Compose([EnsureTyped("image"), noise]))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
        make_trainer([BatchNormPolicy(forget)], network=network, optimizer=optimizer, dataset=dataset).run()
        states.append(snapshot(network))
    assert same_bits(*states)


def test_a_given_loader_is_used(make_trainer, make_network, forget, records, loader_of) -> None:
    network = make_network()
    policy = BatchNormPolicy(forget, loader=loader_of(records[25:]))
    make_trainer([policy], network=network).run()
    images = torch.stack([record["image"] for record in records[25:]]).double()
    with torch.no_grad():
        mean, variance = cumulative_mean(network, [images])[0]
    torch.testing.assert_close(network[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network[1].running_var.double(), variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("max_batches", "batches", "samples"), [(1, 1, 8), (2, 2, 16), (3, 3, 20), (50, 3, 20)])
def test_max_batches_is_respected(make_trainer, make_network, forget, max_batches, batches, samples) -> None:
    network = make_network()
    policy = BatchNormPolicy(forget, max_batches=max_batches)
    make_trainer([policy], network=network).run()
    assert network[1].num_batches_tracked == batches
    assert policy.cost.samples == samples


def test_max_batches_is_respected_with_a_given_loader(make_trainer, make_network, forget, records, loader_of) -> None:
    network = make_network()
    policy = BatchNormPolicy(forget, loader=loader_of(records[5:15], batch_size=2), max_batches=3)
    make_trainer([policy], network=network).run()
    assert network[1].num_batches_tracked == 3
    assert policy.cost.samples == 6


def test_a_last_batch_of_one_sample_is_left_out(make_trainer, make_network, forget, records, loader_of) -> None:
    network = make_network()
    policy = BatchNormPolicy(forget, loader=loader_of(records[5:14]))
    make_trainer([policy], network=network).run()
    assert policy.cost.samples == 8


def test_an_empty_loader_raises(make_trainer, forget) -> None:
    with pytest.raises(ValueError, match="loader of retain samples should hold at least one sample"):
        make_trainer([BatchNormPolicy(forget, loader=[])]).run()


def test_frozen_buffers_are_bit_identical_and_used_in_a_float64_loop(
    make_trainer, make_network, forget, double, snapshot, same_bits
) -> None:
    network = make_network().double()
    network[1].running_mean.fill_(0.3)
    network[1].running_var.fill_(2.0)
    expected = copy.deepcopy(network)
    policy = BatchNormPolicy(forget, policy="frozen")
    make_trainer([policy], network=network, dataset=double, batch_size=30, shuffle=False, max_epochs=3).run()

    images = torch.stack([record["image"] for record in double.data])
    labels = torch.tensor([int(record["label"]) for record in double.data])
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    buffers = dict(copy.deepcopy(expected).named_buffers())
    expected.eval()
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(expected(images), labels).backward()
        optimizer.step()
    assert same_bits(dict(network.named_buffers()), buffers)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-12, atol=1e-14)


def test_plain_equals_a_run_without_the_handler(make_trainer, make_network, forget, snapshot, same_bits) -> None:
    states = []
    for handlers in ([], [BatchNormPolicy(forget, policy="plain")]):
        network = make_network()
        make_trainer(handlers, network=network).run()
        states.append(snapshot(network))
    assert same_bits(*states)


def test_retain_changes_no_weight(make_trainer, make_network, forget, snapshot, same_bits) -> None:
    states = []
    for policy in ("plain", "retain"):
        network = make_network()
        make_trainer([BatchNormPolicy(forget, policy=policy)], network=network).run()
        states.append({name: v for name, v in snapshot(network).items() if name not in dict(network.named_buffers())})
    assert same_bits(*states)


@pytest.mark.parametrize("policy", ["retain", "frozen", "plain"])
def test_momentum_flags_and_hooks_are_put_back(make_trainer, forget, policy) -> None:
    network = deep_network()
    make_trainer([BatchNormPolicy(forget, policy=policy)], network=network).run()
    assert [layer.momentum for layer in layers(network)] == [0.1, 0.3]
    assert all(module.training for module in network.modules() if not isinstance(module, nn.BatchNorm2d))
    network.train()
    assert all(layer.training for layer in layers(network))
    assert hooks(network) == 0


def test_retain_puts_momentum_and_flags_back_when_a_pass_fails(make_trainer, forget, records) -> None:
    network = deep_network()
    broken = [{**record, "image": record["image"][0]} for record in records[5:15]]
    loader = DataLoader(Dataset([*records[5:15], *broken]), batch_size=10)
    with pytest.raises(RuntimeError, match=r"Expected|expected"):
        make_trainer([BatchNormPolicy(forget, loader=loader)], network=network).run()
    assert [layer.momentum for layer in layers(network)] == [0.1, 0.3]
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("policy", ["retain", "frozen", "plain"])
def test_after_an_exception_the_network_works_as_if_never_hooked(
    make_trainer, make_network, forget, explode, policy, snapshot, same_bits
) -> None:
    network = make_network()
    with pytest.raises(FloatingPointError, match="in the third iteration"):
        make_trainer([BatchNormPolicy(forget, policy=policy), explode], network=network).run()
    other = make_network()
    other.load_state_dict(network.state_dict())
    images = torch.randn(8, 1, 6, 6)
    outputs = [net.train()(images) for net in (network, other)]
    assert torch.equal(*outputs)
    assert same_bits(snapshot(network), snapshot(other))
    assert network[1].num_batches_tracked == other[1].num_batches_tracked


@pytest.mark.parametrize("policy", ["retain", "frozen", "plain"])
def test_a_second_run_after_an_exception_leaves_no_hook(
    make_trainer, make_network, forget, on, policy, begin_again
) -> None:
    network = make_network()

    def explode_once(engine):
        armed, explode_once.armed = explode_once.armed, False
        if armed:
            raise FloatingPointError("once")

    explode_once.armed = True
    trainer = make_trainer(
        [BatchNormPolicy(forget, policy=policy), on(Events.ITERATION_COMPLETED, explode_once)], network=network
    )
    with pytest.raises(FloatingPointError):
        trainer.run()
    begin_again(trainer)
    trainer.run()
    assert trainer.state.epoch == 2
    assert hooks(network) == 0


@pytest.mark.parametrize("policy", ["retain", "frozen", "plain"])
def test_a_place_after_a_checkpoint_saver_is_refused(make_trainer, make_network, forget, tmp_path, policy) -> None:
    network = make_network()
    saver = CheckpointSaver(str(tmp_path), {"net": network}, save_final=True)
    with pytest.raises(RuntimeError, match="BatchNormPolicy stands after a CheckpointSaver"):
        make_trainer([saver, BatchNormPolicy(forget, policy=policy)], network=network).run()


def test_a_checkpoint_saver_after_it_saves_the_estimated_statistics(
    make_trainer, make_network, forget, tmp_path, snapshot, same_bits
) -> None:
    network = make_network()
    saver = CheckpointSaver(str(tmp_path), {"net": network}, save_final=True, final_filename="final.pt")
    make_trainer([BatchNormPolicy(forget), saver], network=network).run()
    assert same_bits(torch.load(tmp_path / "final.pt", weights_only=True), snapshot(network))


@pytest.mark.parametrize("policy", ["retain", "frozen", "plain"])
@pytest.mark.parametrize("layer", [None, "no_statistics", "group"])
def test_networks_without_running_statistics_are_left_alone(
    make_trainer, forget, policy, layer, snapshot, same_bits
) -> None:
    def network():
        torch.manual_seed(0)
        norm = {"no_statistics": nn.BatchNorm2d(4, track_running_stats=False), "group": nn.GroupNorm(2, 4)}
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), norm.get(layer, nn.Identity()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )

    states = []
    for handlers in ([], [BatchNormPolicy(forget, policy=policy)]):
        net = network()
        make_trainer(handlers, network=net).run()
        states.append(snapshot(net))
    assert same_bits(*states)


def test_it_goes_with_retrain(make_trainer, make_network, forget, double) -> None:
    network = make_network().double()
    start = network.state_dict()
    make_trainer([Retrain(forget, initial_state=start), BatchNormPolicy(forget)], network=network, dataset=double).run()
    retain = torch.stack([record["image"] for i, record in enumerate(double.data) if not IS_FORGET[i]])
    with torch.no_grad():
        mean, variance = cumulative_mean(network, retain.split(8))[0]
    torch.testing.assert_close(network[1].running_mean, mean, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(network[1].running_var, variance, rtol=1e-11, atol=1e-13)


def test_an_unknown_policy_raises(forget) -> None:
    with pytest.raises(ValueError, match="policy should be one of retain, frozen, plain, but got 'reset'"):
        BatchNormPolicy(forget, policy="reset")


def test_fewer_than_one_batch_raises(forget) -> None:
    with pytest.raises(ValueError, match="max_batches should be at least 1, but got 0"):
        BatchNormPolicy(forget, max_batches=0)
