"""CF-k and EU-k: the last layers alone are trained, and the others stay as they are, whatever else is there."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Events
from method_tasks import IS_FORGET, LABELS, NETWORKS, task_of
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer
from monai.networks.nets import resnet18
from torch import nn
from torch.nn import functional

from monai_unlearn.methods import (
    BatchNormPolicy,
    FineTune,
    L1Sparse,
    LastLayers,
    RandomLabeling,
    Retrain,
    SaliencyMask,
)
from monai_unlearn.methods.last_layers import frozen, layers

RETAIN = [i for i in range(30) if not IS_FORGET[i]]


class StopError(Exception):
    pass


def deep_network(classes: int = 3, seed: int = 0) -> nn.Module:
    """Three layers, two of them with BatchNorm and the first with a buffer of another kind."""
    torch.manual_seed(seed)
    first = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.InstanceNorm2d(4, track_running_stats=True)]
    second = [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


FROZEN = {1: ("0.", "1.", "3.", "4.", "5."), 2: ("0.", "1.", "3."), 3: ()}  # k → names of deep_network
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
}


def changed(before, network):
    """The names of the parameters and buffers that have moved."""
    bits = {name: value.detach().contiguous().view(-1).view(torch.uint8) for name, value in before.items()}
    now = {name: value.detach().contiguous().view(-1).view(torch.uint8) for name, value in network.state_dict().items()}
    return {name for name in now if not torch.equal(bits[name], now[name])}


def split_names(network, k):
    """Names of the frozen and of the trained part, by hand."""
    names = network.state_dict()
    return {n for n in names if n.startswith(FROZEN[k])}, {n for n in names if not n.startswith(FROZEN[k])}


# ---- which layers there are


def names_of(network):
    return [next(iter(layer)) for layer in layers(network)]


def test_layers_of_a_resnet_are_its_kernels_in_the_order_of_registration() -> None:
    network = resnet18(spatial_dims=2, n_input_channels=1, num_classes=3)
    found = layers(network)
    kernels = [next(n for n, m in layer.items() if getattr(m, "weight", torch.ones(1)).ndim >= 2) for layer in found]
    assert len(found) == 21
    assert kernels[-6:] == [
        *("layer4.0.conv1", "layer4.0.conv2", "layer4.0.downsample.0", "layer4.1.conv1", "layer4.1.conv2", "fc"),
    ]
    assert "layer4.0.downsample.1" in found[-4]
    assert "layer4.1.bn2" in found[-2]
    assert set(found[-1]) == {"fc"}


def test_every_module_is_in_one_layer_and_what_stands_first_is_in_the_first() -> None:
    network = nn.Sequential(nn.BatchNorm2d(1), deep_network(), nn.PReLU())
    found = layers(network)
    names = [name for layer in found for name in layer]
    assert len(names) == len(set(names))
    assert names == [name for name, _ in network.named_modules()]
    assert set(found[0]) >= {"", "0", "1", "1.0", "1.1"}
    assert "2" in found[-1]


def test_a_normalisation_layer_over_an_image_is_no_kernel() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm([4, 4]), nn.Linear(4, 4))
    assert names_of(network) == ["", "2"]
    assert "1" in layers(network)[0]


def test_a_network_without_a_kernel_has_no_layer() -> None:
    assert layers(nn.BatchNorm1d(3)) == []


@settings(deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["conv", "transposed", "linear", "bn", "relu", "gn"]), max_size=9))
def test_as_many_layers_as_kernels_each_with_what_follows(kinds) -> None:
    make = {
        "conv": lambda: nn.Conv2d(2, 2, 1),
        "transposed": lambda: nn.ConvTranspose3d(2, 2, 1),
        "linear": lambda: nn.Linear(2, 2),
        "bn": lambda: nn.BatchNorm2d(2),
        "relu": nn.ReLU,
        "gn": lambda: nn.GroupNorm(1, 2),
    }
    network = nn.Sequential(*[make[kind]() for kind in kinds])
    places = [i for i, kind in enumerate(kinds) if kind in ("conv", "transposed", "linear")]
    found = layers(network)
    assert len(found) == len(places)
    for number, layer in enumerate(found):
        end = places[number + 1] if number + 1 < len(places) else len(kinds)
        start = places[number] if number else 0
        assert {name for name in layer if name} == {str(i) for i in range(start, end)}


def test_frozen_puts_everything_back_after_an_interrupt_too() -> None:
    network = deep_network()
    network[0].bias.requires_grad_(False)
    network[1].eval()
    flags = [p.requires_grad for p in network.parameters()]
    modes = [m.training for m in network.modules()]

    def interrupted() -> None:
        with frozen(network.parameters(), network.modules()):
            assert not any(p.requires_grad for p in network.parameters())
            assert not any(m.training for m in network.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.requires_grad for p in network.parameters()] == flags
    assert [m.training for m in network.modules()] == modes


# ---- CF-k


def hand_written(network, data, trained, steps):
    """SGD with momentum 0.9 and weight decay 0.01 at 0.1 for the trained parameters, with frozen layers by hand."""
    momenta = {name: torch.zeros_like(p) for name, p in network.named_parameters() if name in trained}
    for step in range(steps):
        batch = (RETAIN[:10], RETAIN[10:])[step % 2]
        images = torch.stack([data.data[i]["image"] for i in batch])
        labels = torch.tensor([int(data.data[i]["label"]) for i in batch])
        network.train()
        network[1].eval(), network[3].eval()  # of the first layer
        if "5.weight" not in trained:
            network[5].eval()
        own = {name: p for name, p in network.named_parameters() if name in trained}
        gradients = torch.autograd.grad(functional.cross_entropy(network(images), labels), list(own.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(own.items(), gradients):
                momenta[name].mul_(0.9).add_(gradient + 0.01 * parameter)
                parameter.sub_(0.1 * momenta[name])
    return network


@pytest.mark.parametrize("k", [1, 2])
def test_float64_training_equals_a_hand_written_loop(make_trainer, forget, double, k) -> None:
    network = deep_network().double()
    trained = split_names(network, k)[1]
    expected = hand_written(copy.deepcopy(network), double, trained, steps=4)
    make_trainer([LastLayers(forget, k=k)], network=network, dataset=double, batch_size=10, shuffle=False).run()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-11, atol=1e-12)


def test_with_all_layers_it_is_fine_tuning_to_the_bit(make_trainer, forget, snapshot, same_bits) -> None:
    network, plain = deep_network(), deep_network()
    make_trainer([LastLayers(forget, k=3)], network=network).run()
    make_trainer([FineTune(forget)], network=plain).run()
    assert same_bits(snapshot(network), snapshot(plain))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_frozen_layers_stay_bit_identical_and_the_others_move(
    make_trainer, forget, snapshot, name, set_to_none, k
) -> None:
    network = deep_network()
    optimizer = OPTIMIZERS[name](network.parameters())
    network(torch.randn(4, 1, 6, 6)).sum().backward()  # an optimizer that has moments, and gradients from elsewhere
    optimizer.step()
    before, (still, trained) = snapshot(network), split_names(network, k)
    make_trainer([LastLayers(forget, k=k)], network=network, optimizer=optimizer, optim_set_to_none=set_to_none).run()
    assert changed(before, network) == trained
    assert not still & trained


def test_the_backward_pass_ends_at_the_first_trained_layer(make_trainer, forget, on) -> None:
    network, reached = deep_network(), []
    for module in (network[0], network[4], network[9]):
        module.register_forward_hook(lambda module, inputs, output: reached.append(output.requires_grad))
    make_trainer([LastLayers(forget, k=2)], network=network, max_epochs=1).run()
    assert reached == 3 * [False, True, True]


def test_flags_and_modes_are_the_networks_own_at_every_event(make_trainer, forget, on) -> None:
    network, seen = deep_network(), []
    network[9].bias.requires_grad_(False)
    own = [p.requires_grad for p in network.parameters()]

    def see(engine):
        seen.append(([p.requires_grad for p in network.parameters()] == own, network[1].training, network[5].training))

    events = (*IterationEvents, Events.ITERATION_STARTED, Events.ITERATION_COMPLETED, Events.COMPLETED)
    make_trainer([LastLayers(forget, k=1), *[on(event, see) for event in events]], network=network).run()
    assert set(seen) == {(True, True, True)}
    assert network[9].bias.grad is None


def test_an_error_within_a_forward_pass_leaves_nothing_behind(make_trainer, forget, snapshot) -> None:
    network = deep_network()
    trainer = make_trainer([LastLayers(forget, k=1)], network=network)
    hook = network[9].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    hook.remove()
    assert all(p.requires_grad for p in network.parameters())
    assert all(m.training for m in network.modules())
    before = snapshot(network)  # what is left in the trainer freezes nothing
    trainer.inferer(torch.randn(4, 1, 6, 6), network).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert "1.running_mean" in changed(before, network)


def test_the_trainers_inferer_is_its_own_again(make_trainer, forget) -> None:
    inferer = SimpleInferer()
    trainer = make_trainer([LastLayers(forget, k=1)], network=deep_network(), inferer=inferer)
    trainer.run()
    assert trainer.inferer is inferer


def test_gradients_that_other_handlers_make_do_not_move_frozen_layers(make_trainer, forget, snapshot) -> None:
    network = deep_network()
    before, (_, trained) = snapshot(network), split_names(network, 2)
    handlers = [LastLayers(forget, k=2), L1Sparse(forget, alpha=0.1)]
    make_trainer(handlers, network=network).run()
    assert changed(before, network) == trained


def test_a_saliency_mask_within_the_last_layers(make_trainer, forget, snapshot) -> None:
    network = deep_network()
    before, saliency = snapshot(network), SaliencyMask(forget, ratio=0.7)
    _, trained = split_names(network, 2)
    make_trainer([LastLayers(forget, k=2), saliency], network=network).run()
    assert saliency.cost.samples == 10
    assert changed(before, network) <= trained
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter[~saliency.mask[name]], before[name][~saliency.mask[name]])
    assert "9.weight" in changed(before, network)


@pytest.mark.filterwarnings("ignore::UserWarning")  # autocast and its scaler look for CUDA
@pytest.mark.parametrize("accumulation", [1, 2])
def test_under_loss_scaling_and_accumulation_too(make_trainer, forget, snapshot, on, accumulation) -> None:
    def use_scaler(engine):
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    network = deep_network()
    before, (_, trained) = snapshot(network), split_names(network, 2)
    handlers = [on(Events.STARTED, use_scaler), LastLayers(forget, k=2)]
    make_trainer(handlers, network=network, amp=True, accumulation_steps=accumulation).run()
    assert changed(before, network) == trained


@pytest.mark.parametrize("policy", ["plain", "frozen"])
def test_with_two_policies_of_batch_norm_frozen_layers_stay_whole(make_trainer, forget, snapshot, policy) -> None:
    network = deep_network()
    before, (_, trained) = snapshot(network), split_names(network, 2)
    make_trainer([LastLayers(forget, k=2), BatchNormPolicy(forget, policy=policy)], network=network).run()
    statistics = {name for name in trained if "running" in name or "num_batches" in name}
    assert changed(before, network) == (trained if policy == "plain" else trained - statistics)


def test_the_policy_retain_estimates_the_frozen_statistics_too(make_trainer, forget, snapshot) -> None:
    states = []
    for order in (1, -1):  # the handlers', which is of no matter
        network = deep_network()
        before = snapshot(network)
        make_trainer([LastLayers(forget, k=1), BatchNormPolicy(forget)][::order], network=network).run()
        moved = changed(before, network)
        assert {"1.running_mean", "1.running_var", "5.running_mean", "9.weight"} <= moved
        assert not {"0.weight", "1.weight", "3.running_mean", "4.weight"} & moved
        states.append(snapshot(network))
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_random_labeling_beside_it_meets_no_forget_sample(make_trainer, forget) -> None:
    handlers = [RandomLabeling(forget), LastLayers(forget, k=1)]
    with pytest.raises(RuntimeError, match="met no forget sample"):
        make_trainer(handlers, network=deep_network()).run()


def test_what_requires_no_gradient_is_not_trained(make_trainer, forget, snapshot) -> None:
    network = deep_network()
    network[4].weight.requires_grad_(False)
    before, (_, trained) = snapshot(network), split_names(network, 2)
    make_trainer([LastLayers(forget, k=2)], network=network).run()
    assert changed(before, network) == trained - {"4.weight"}


def test_a_weight_that_a_trained_layer_shares_is_trained(make_trainer, forget, snapshot) -> None:
    network = deep_network()
    network[1].bias = network[5].bias
    before, (still, _) = snapshot(network), split_names(network, 2)
    make_trainer([LastLayers(forget, k=2)], network=network).run()
    assert changed(before, network) & still == {"1.bias"}


# ---- EU-k


@pytest.mark.parametrize("form", ["state", "network", "function", "path", "wrapped"])
def test_the_last_layers_start_anew_and_the_others_do_not(make_trainer, forget, snapshot, tmp_path, form) -> None:
    network, start = deep_network(), deep_network(seed=9)
    for value in start.buffers():
        value.fill_(3)
    torch.save(start.state_dict(), tmp_path / "start.pt")
    given_ = {
        "state": start.state_dict(),
        "network": start,
        "function": lambda: start,
        "path": tmp_path / "start.pt",
        "wrapped": {f"module.{name}": value for name, value in start.state_dict().items()},
    }[form]
    before, (still, trained) = snapshot(network), split_names(network, 2)
    trainer = make_trainer([LastLayers(forget, k=2, initial_state=given_)], network=nn.DataParallel(network))
    trainer.fire_event(Events.STARTED)
    for name, value in network.state_dict().items():
        assert torch.equal(value, (before if name in still else start.state_dict())[name]), name
    assert "5.running_mean" in trained


def test_the_initial_state_is_what_it_was_when_the_handler_was_made(make_trainer, forget, snapshot) -> None:
    network = deep_network()
    start = snapshot(network)
    handler = LastLayers(forget, k=1, initial_state=network.state_dict())
    with torch.no_grad():
        for value in network.parameters():
            value.add_(1)
    trainer = make_trainer([handler], network=network)
    trainer.fire_event(Events.STARTED)
    assert torch.equal(network[9].weight, start["9.weight"])
    assert torch.equal(network[0].weight, start["0.weight"] + 1)


def test_with_all_layers_it_is_retraining_to_the_bit(make_trainer, forget, snapshot, same_bits) -> None:
    states = []
    for method in (LastLayers, Retrain):
        network = deep_network(seed=5)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
        network(torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))).sum().backward()
        optimizer.step()
        more = {"k": 3} if method is LastLayers else {}
        handler = method(forget, initial_state=deep_network, **more)
        make_trainer([handler], network=network, optimizer=optimizer).run()
        states.append(snapshot(network))
    assert same_bits(*states)


def test_the_optimizers_state_is_dropped_for_the_layers_that_start_anew_alone(make_trainer, forget) -> None:
    for start, kept in ((None, True), (deep_network, False)):
        network = deep_network()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        network(torch.randn(4, 1, 6, 6)).sum().backward()
        optimizer.step()
        trainer = make_trainer([LastLayers(forget, k=1, initial_state=start)], network=network, optimizer=optimizer)
        trainer.fire_event(Events.STARTED)
        assert (network[9].weight in optimizer.state) is kept
        assert network[0].weight in optimizer.state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {n: v for n, v in state.items() if n != "0.weight"}, r"1 are missing.*first: 0.weight"),
        (lambda state: {**state, "10.weight": torch.ones(1)}, "1 are unknown"),
        (lambda state: {**state, "9.bias": torch.ones(7)}, r"1 have another shape.*first: 9.bias"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_an_initial_state_of_another_network_raises_and_changes_nothing(
    make_trainer, forget, snapshot, same_bits, change, message
) -> None:
    network = deep_network()
    before = snapshot(network)
    handler = LastLayers(forget, k=1, initial_state=change(deep_network(seed=5).state_dict()))
    with pytest.raises(ValueError, match=message):
        make_trainer([handler], network=network).run()
    assert same_bits(before, snapshot(network))


# ---- both


def test_only_retain_samples_are_met_in_the_order_of_fine_tuning(make_trainer, forget, on) -> None:
    orders = []
    for handler in (LastLayers(forget, k=1), FineTune(forget)):
        order: list[int] = []
        keep = on(Events.ITERATION_COMPLETED, lambda engine, o=order: o.extend(engine.state.batch["index"].tolist()))
        make_trainer([handler, keep]).run()
        orders.append(order)
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == sorted(2 * RETAIN)


def test_a_given_loader_is_used(make_trainer, forget, loader_of, records) -> None:
    trainer = make_trainer([LastLayers(forget, k=1, loader=loader_of(records[5:12], 3))])
    trainer.run()
    assert trainer.state.iteration == 2 * 3


def test_the_same_trainer_runs_twice(make_trainer, forget, snapshot, begin_again) -> None:
    network = deep_network()
    before, (_, trained) = snapshot(network), split_names(network, 1)
    trainer = make_trainer([LastLayers(forget, k=1)], network=network)
    trainer.run()
    once = snapshot(network)
    begin_again(trainer)
    trainer.run()
    assert changed(before, network) == trained
    assert "9.weight" in changed(once, network)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel(make_trainer, forget, snapshot, same_bits) -> None:
    network, plain = deep_network(), deep_network()
    before, (_, trained) = snapshot(network), split_names(network, 2)
    wrapped = nn.parallel.DistributedDataParallel(network, find_unused_parameters=True)
    make_trainer([LastLayers(forget, k=2)], network=wrapped).run()
    make_trainer([LastLayers(forget, k=2)], network=plain).run()
    assert changed(before, network) == trained
    assert same_bits(snapshot(network), snapshot(plain))
    waiting = nn.parallel.DistributedDataParallel(network)
    with pytest.raises(RuntimeError, match="Wrap the network with find_unused_parameters=True"):
        make_trainer([LastLayers(forget, k=2)], network=waiting).run()


def test_a_compiled_network(make_trainer, forget, snapshot) -> None:
    network = deep_network()
    before, (_, trained) = snapshot(network), split_names(network, 2)
    compiled = torch.compile(network, backend="eager")
    make_trainer([LastLayers(forget, k=2)], network=compiled).run()
    assert changed(before, network) == trained


# ---- refusals


@pytest.mark.parametrize("k", [0, -1, 1.0, True, "2", None])
def test_k_that_is_no_whole_number_above_0_raises(forget, k) -> None:
    with pytest.raises(ValueError, match="k should be a whole number of at least 1, but got"):
        LastLayers(forget, k=k)


def test_more_layers_than_there_are_raise_with_their_number(make_trainer, forget) -> None:
    with pytest.raises(ValueError, match=r"k should be at most 3, the network's number of layers .* but got 4"):
        make_trainer([LastLayers(forget, k=4)], network=deep_network()).run()


def test_last_layers_without_anything_to_train_raise(make_trainer, forget) -> None:
    network = deep_network()
    network[9].requires_grad_(False)
    with pytest.raises(RuntimeError, match="The last 1 layers have no parameter that requires a gradient"):
        make_trainer([LastLayers(forget, k=1)], network=network).run()


@pytest.mark.parametrize("start", [None, deep_network])
def test_an_optimizer_of_something_else_raises_and_changes_nothing(
    make_trainer, forget, snapshot, same_bits, start
) -> None:
    network = deep_network()
    before = snapshot(network)
    optimizer = torch.optim.SGD([*network[:9].parameters(), network[9].bias], lr=0.1)
    handler = LastLayers(forget, k=1, initial_state=start)
    with pytest.raises(RuntimeError, match="all 2 parameters of the last 1 layers, but 1 are not in it"):
        make_trainer([handler], network=network, optimizer=optimizer).run()
    assert same_bits(before, snapshot(network))


def test_two_of_them_are_refused(make_trainer, forget) -> None:
    with pytest.raises(RuntimeError, match="should have one LastLayers, but has one already"):
        make_trainer([LastLayers(forget, k=1), LastLayers(forget, k=2)])


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_task_and_network_is_trained(make_trainer, forget, records, snapshot, kind, name, anew) -> None:
    task = task_of(records, kind, name)
    network = task["network"]
    before = snapshot(network)
    last = {f"{p}.{n}" for p, m in layers(network)[-1].items() for n, _ in m.named_parameters(recurse=False)}
    handler = LastLayers(forget, k=1, initial_state=before if anew else None)
    make_trainer([handler], max_epochs=1, **task).run()
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    moved = changed(before, network)
    assert moved
    assert moved <= last
