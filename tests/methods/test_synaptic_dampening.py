"""Selective synaptic dampening: the importance of each weight, which are dampened and by how much, and what is not."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Events
from monai.data import Dataset, MetaTensor
from monai.handlers import CheckpointSaver
from monai.inferers import Inferer, SimpleInferer
from monai.losses import FocalLoss
from monai.networks.nets import DenseNet, ResNet
from monai.transforms import Compose, EnsureTyped, RandGaussianNoised
from torch import nn
from torch.nn import functional

from monai_unlearn import ForgetSet
from monai_unlearn.loss import MaskedBCEWithLogitsLoss
from monai_unlearn.methods import BatchNormPolicy, FineTune, RandomLabeling, SelectiveSynapticDampening
from monai_unlearn.methods.synaptic_dampening import dampening_factor, squared_gradients
from monai_unlearn.training import run_trainer

IS_FORGET = [i // 5 in (0, 3) for i in range(30)]
FORGET = [i for i in range(30) if IS_FORGET[i]]
RETAIN = [i for i in range(30) if not IS_FORGET[i]]
NAN = float("nan")


def mean_of_squares(network, records, loss=functional.cross_entropy):
    """Parameter name → mean over the records of each one's squared gradient, one at a time in float64."""
    network = copy.deepcopy(network).double().eval()
    total = {name: 0.0 for name, _ in network.named_parameters()}
    for record in records:
        network.zero_grad()
        loss(network(record["image"][None].double()), torch.as_tensor(record["label"])[None]).backward()
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                total[name] = total[name] + parameter.grad.numpy() ** 2 / len(records)
    return total


def dampened(network, records, alpha, dampening, loss=functional.cross_entropy):
    """Parameter name → what the equation makes of it, in NumPy."""
    of_forget = mean_of_squares(network, [records[i] for i in FORGET], loss)
    of_all = mean_of_squares(network, records, loss)
    result = {}
    for name, parameter in network.named_parameters():
        value = parameter.detach().double().numpy().copy()
        chosen = of_forget[name] > alpha * np.asarray(of_all[name])
        if np.any(chosen):
            value[chosen] *= np.minimum(dampening * of_all[name][chosen] / of_forget[name][chosen], 1)
        result[name] = value
    return result


# The pure functions


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 1e3)), min_size=1, max_size=20),
    alpha=st.floats(0.01, 100),
    dampening=st.floats(0, 10),
)
def test_the_factor_is_the_equation_for_each_weight(pairs, alpha, dampening) -> None:
    of_forget, of_all = torch.tensor(pairs, dtype=torch.float64).T
    factor = dampening_factor(of_forget, of_all, alpha, dampening)
    for one, (f, d) in zip(factor.tolist(), pairs):
        assert one == (min(dampening * d / f, 1) if f > alpha * d else 1)
    assert ((factor >= 0) & (factor <= 1)).all()


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (nn.CrossEntropyLoss(), torch.tensor([0, 2, 1, 1])),
        (nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum"), torch.tensor([0, 2, 1, 1])),
        (nn.BCEWithLogitsLoss(), torch.rand(4, 3, dtype=torch.float64)),
        (MaskedBCEWithLogitsLoss(), torch.tensor([[1, 0, NAN], [NAN, NAN, 1], [0, 0, 0], [NAN, NAN, NAN]]).double()),
        (FocalLoss(), torch.eye(3).double()[[0, 2, 1, 1]]),
    ],
)
def test_vectorised_squares_equal_those_of_each_sample_alone(make_network, loss, target) -> None:
    network = make_network().double().eval()
    parameters = list(network.parameters())
    images = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for i in range(4):
        # Of each sample alone, whatever the reduction: the mean of one is the sum of one.
        for t, g in zip(total, torch.autograd.grad(loss(network(images[i : i + 1]), target[i : i + 1]), parameters)):
            t += g**2
    for one, other in zip(squared_gradients(network, parameters, images, target, loss), total):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-16)
    assert all(parameter.grad is None for parameter in parameters)


# The handler


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 100])
@pytest.mark.parametrize(("alpha", "dampening"), [(1.2, 1.0), (1.1, 0.3), (1.2, 1.25)])
def test_weights_are_those_of_the_equation(
    make_trainer, make_network, forget, records, double, chunk_size, alpha, dampening
) -> None:
    network = make_network().double()
    for tensor in (network[1].running_mean, network[1].bias.data):  # a bias of 0 would stay 0
        tensor.normal_()
    expected = dampened(network, records, alpha, dampening)
    changed = sum(int((v != dict(network.named_parameters())[n].detach().numpy()).sum()) for n, v in expected.items())
    handler = SelectiveSynapticDampening(forget, alpha=alpha, dampening=dampening, chunk_size=chunk_size)
    make_trainer([handler], network=network, dataset=double).run()
    for name, value in network.named_parameters():
        np.testing.assert_allclose(value.detach().numpy(), expected[name], rtol=1e-9, atol=0, err_msg=name)
    assert handler.dampened == changed > 0


@pytest.mark.parametrize("chunk_size", [1, 5])
def test_the_batch_size_does_not_matter(make_trainer, make_network, forget, double, snapshot, chunk_size) -> None:
    states, chosen = [], []
    for batch_size in (1, 7, 64):
        network = make_network().double()
        before = snapshot(network)
        handler = SelectiveSynapticDampening(forget, alpha=1.3, chunk_size=chunk_size)
        make_trainer([handler], network=network, dataset=double, batch_size=batch_size).run()
        states.append(snapshot(network))
        chosen.append({name: states[-1][name] != before[name] for name in before})
    for name in states[0]:
        assert torch.equal(chosen[0][name], chosen[1][name])
        assert torch.equal(chosen[0][name], chosen[2][name])
        for other in states[1:]:
            torch.testing.assert_close(states[0][name], other[name], rtol=1e-12, atol=0)


def test_one_at_a_time_the_batch_size_does_not_matter_to_the_last_bit(
    make_trainer, make_network, forget, snapshot, same_bits
) -> None:
    states = []
    for batch_size in (1, 7, 64):
        network = make_network()
        make_trainer(
            [SelectiveSynapticDampening(forget, alpha=1.3)], network=network, batch_size=batch_size, shuffle=True
        ).run()
        states.append(snapshot(network))
    assert same_bits(states[0], states[1])
    assert same_bits(states[0], states[2])


def test_squares_of_batch_means_would_choose_other_weights(make_network, records) -> None:
    """What public code does, and why the order of mean and square matters."""
    network = make_network().double().eval()
    images = torch.stack([records[i]["image"].double() for i in FORGET])
    labels = torch.tensor([int(records[i]["label"]) for i in FORGET])
    loss = functional.cross_entropy(network(images), labels)
    of_means = torch.autograd.grad(loss, network[5].weight)[0].numpy() ** 2
    of_samples = mean_of_squares(network, [records[i] for i in FORGET])["5.weight"]
    assert (of_samples > of_means).all()
    assert not np.allclose(of_samples / of_means, (of_samples / of_means).mean(), rtol=0.1)


def test_the_order_of_the_data_does_not_matter(make_trainer, make_network, forget, double) -> None:
    weights = []
    for order in (range(30), np.random.RandomState(0).permutation(30)):
        network = make_network().double()
        dataset = Dataset([double.data[i] for i in order])
        make_trainer([SelectiveSynapticDampening(forget, alpha=1.3)], network=network, dataset=dataset).run()
        weights.append(network[5].weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-12, atol=0)


def test_augmentation_is_left_out(make_trainer, make_network, forget, records, snapshot, same_bits) -> None:
    states = []
    for noise in ([], [RandGaussianNoised("image", prob=1, std=3.0)]):
        network = make_network()
        dataset = Dataset(records, transform=Compose([EnsureTyped("image"), *noise]))
        make_trainer([SelectiveSynapticDampening(forget, alpha=1.3)], network=network, dataset=dataset).run()
        states.append(snapshot(network))
    assert same_bits(*states)


def test_it_passes_once_over_all_data_and_the_run_has_no_iteration(make_trainer, forget, on) -> None:
    fired = []
    handler = SelectiveSynapticDampening(forget, alpha=1.3)
    events = (Events.EPOCH_STARTED, Events.ITERATION_STARTED, Events.COMPLETED)
    trainer = make_trainer([handler, *(on(event, lambda e, name=event.name: fired.append(name)) for event in events)])
    for _ in range(2):
        trainer.run()
        assert fired == ["COMPLETED"]
        fired.clear()
        assert trainer.state.iteration == 0
        assert (handler.cost.samples, handler.cost.forward, handler.cost.backward) == (30, 30, 30)
        assert handler.cost.seconds > 0
        trainer.load_state_dict({"iteration": 0, "epoch_length": 4, "max_epochs": 2})
        handler.alpha = 1.1  # the dampened weights matter less


def test_vectorised_passes_are_counted_as_they_are(make_trainer, forget) -> None:
    handler = SelectiveSynapticDampening(forget, alpha=1.3, chunk_size=4)
    make_trainer([handler]).run()
    assert (handler.cost.samples, handler.cost.forward, handler.cost.backward) == (30, 60, 30)


def test_run_trainer_takes_a_run_without_a_step_from_it_alone(make_trainer, forget, on) -> None:
    cost = run_trainer(make_trainer([SelectiveSynapticDampening(forget, alpha=1.3)]), "unlearning")
    assert (cost.samples, cost.backward) == (0, 0)
    ended = on(Events.STARTED, lambda engine: engine.terminate())
    with pytest.raises(RuntimeError, match="The unlearning run took no step"):
        run_trainer(make_trainer([ended]), "unlearning")


def test_statistics_stay_unless_a_policy_estimates_them(make_trainer, make_network, forget, snapshot) -> None:
    for policy, moved in ((), False), ((BatchNormPolicy(forget),), True):
        network = make_network()
        before = snapshot(network)
        make_trainer([SelectiveSynapticDampening(forget, alpha=1.3), *policy], network=network).run()
        after = snapshot(network)
        assert torch.equal(before["1.running_mean"], after["1.running_mean"]) is not moved
        assert network.training
        assert all(parameter.grad is None for parameter in network.parameters())


def test_a_checkpoint_saver_writes_what_is_left(make_trainer, make_network, forget, tmp_path) -> None:
    network = make_network()
    saver = CheckpointSaver(str(tmp_path), {"net": network}, save_final=True)
    make_trainer([SelectiveSynapticDampening(forget, alpha=1.3), saver], network=network).run()
    (path,) = tmp_path.glob("*.pt")
    saved = torch.load(path, weights_only=True)
    assert all(torch.equal(saved[name], value) for name, value in network.state_dict().items())


def test_frozen_parameters_stay_bit_identical_and_the_others_are_the_same(
    make_trainer, make_network, forget, double
) -> None:
    networks = [make_network().double() for _ in range(2)]
    networks[1][0].weight.requires_grad_(False)
    before = networks[1][0].weight.clone()
    for network in networks:
        handler = SelectiveSynapticDampening(forget, alpha=1.1, chunk_size=4)
        make_trainer([handler], network=network, dataset=double).run()
    assert torch.equal(networks[1][0].weight, before)
    torch.testing.assert_close(networks[0][5].weight, networks[1][5].weight, rtol=1e-12, atol=0)


def test_shared_parameters_are_dampened_once(make_trainer, forget, double, records) -> None:
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv2d(1, 1, 3, padding=1)
            self.other = self.one
            self.head = nn.Linear(36, 3)

        def forward(self, x):
            return self.head(self.other(self.one(x).tanh()).flatten(1))

    for chunk_size in (1, 4):
        torch.manual_seed(0)
        network = Twice().double()
        expected = dampened(network, records, 1.2, 1.0)
        handler = SelectiveSynapticDampening(forget, alpha=1.2, chunk_size=chunk_size)
        kernel = network.one.weight
        make_trainer([handler], network=network, dataset=double).run()
        assert network.one.weight is network.other.weight is kernel
        for name, value in network.named_parameters():
            np.testing.assert_allclose(value.detach().numpy(), expected[name], rtol=1e-9, atol=0)


# Networks and inferers that can't be vectorised


class ByValue(nn.Module):
    """A network that decides by what it sees, which torch.vmap refuses."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(36, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(-x if bool((x.mean() > 1).all()) else x)


class Doubling(Inferer):
    def __call__(self, inputs, network, *args, **kwargs):
        return network(2 * inputs, *args, **kwargs)


def test_a_network_that_vmap_cant_take_goes_one_at_a_time(make_trainer, forget, records, double, caplog) -> None:
    network = ByValue().double()
    expected = dampened(network, records, 1.2, 1.0)
    handler = SelectiveSynapticDampening(forget, alpha=1.2, chunk_size=8)
    with caplog.at_level(logging.INFO, logger="monai_unlearn"):
        make_trainer([handler], network=network, dataset=double).run()
    assert caplog.text.count("torch.vmap can't take the network") == 1
    np.testing.assert_allclose(network.head.weight.detach().numpy(), expected["head.weight"], rtol=1e-9, atol=0)
    assert (handler.cost.samples, handler.cost.forward, handler.cost.backward) == (30, 30, 30)


def test_an_inferer_of_ones_own_is_used(make_trainer, make_network, forget, records, double) -> None:
    network = make_network().double()
    doubled = [{**record, "image": 2 * record["image"]} for record in records]
    expected = dampened(network, doubled, 1.2, 1.0)
    handler = SelectiveSynapticDampening(forget, alpha=1.2, chunk_size=8)
    make_trainer([handler], network=network, dataset=double, inferer=Doubling()).run()
    for name, value in network.named_parameters():
        np.testing.assert_allclose(value.detach().numpy(), expected[name], rtol=1e-9, atol=0)


def test_further_inputs_of_the_network_go_with_their_sample(make_trainer, forget, double, records) -> None:
    class WithAge(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(36, 3)

        def forward(self, x, age, factor=1.0):
            return self.head(x.flatten(1)) * (1 + age[:, None]) * factor

    def prepare(batch, device, non_blocking, **kwargs):
        return batch["image"], batch["label"], (batch["index"].double() / 10,), {"factor": 0.5}

    network = WithAge().double()
    handler = SelectiveSynapticDampening(forget, alpha=1.2, chunk_size=8)
    squares = {True: 0.0, False: 0.0}
    for i, record in enumerate(records):
        network.zero_grad()
        output = network(record["image"][None].double(), torch.tensor([i / 10], dtype=torch.float64), factor=0.5)
        functional.cross_entropy(output, record["label"][None]).backward()
        squares[IS_FORGET[i]] = squares[IS_FORGET[i]] + network.head.weight.grad.numpy() ** 2
    of_forget, of_all = squares[True] / 10, (squares[True] + squares[False]) / 30
    factor = np.where(of_forget > 1.2 * of_all, of_all / of_forget, 1)
    expected = network.head.weight.detach().numpy() * factor
    make_trainer([handler], network=network, dataset=double, prepare_batch=prepare).run()
    np.testing.assert_allclose(network.head.weight.detach().numpy(), expected, rtol=1e-9, atol=0)


def test_images_with_metadata_are_taken(make_trainer, make_network, forget, records, snapshot, same_bits) -> None:
    states = []
    for kind in (torch.Tensor, MetaTensor):
        network = make_network()
        dataset = Dataset([{**record, "image": kind(record["image"])} for record in records])
        handler = SelectiveSynapticDampening(forget, alpha=1.3, chunk_size=4)
        make_trainer([handler], network=network, dataset=dataset, inferer=SimpleInferer()).run()
        assert handler.cost.forward == 60  # vectorised
        states.append(snapshot(network))
    assert same_bits(*states)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("kind", ["resnet", "densenet"])
@pytest.mark.parametrize("task", ["classes", "binary", "findings"])
def test_monais_networks_are_vectorised_with_the_same_result(make_trainer, forget, spatial_dims, kind, task) -> None:
    outputs = {"classes": 2, "binary": 1, "findings": 3}[task]

    def build():
        torch.manual_seed(1)
        if kind == "resnet":
            return ResNet("basic", [1, 1, 1, 1], [4, 4, 4, 4], spatial_dims, 1, conv1_t_size=3, num_classes=outputs)
        return DenseNet(spatial_dims, 1, outputs, init_features=4, growth_rate=4, block_config=(1, 1), bn_size=2)

    def label(i):
        findings = torch.tensor([1.0, NAN, float(i % 2)]).double()
        return {"classes": torch.tensor(i % 2), "binary": findings[2:], "findings": findings}[task]

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 1, *[9] * spatial_dims, generator=generator).double()
    data = [{"image": image, "label": label(i), "patient": f"P{i % 6}"} for i, image in enumerate(images)]
    loss = {
        "classes": nn.CrossEntropyLoss(),
        "binary": nn.BCEWithLogitsLoss(),
        "findings": MaskedBCEWithLogitsLoss(),
    }[task]
    networks, handlers = [], []
    for chunk_size in (1, 5):
        networks.append(build().double())
        handlers.append(SelectiveSynapticDampening(forget, alpha=0.5, chunk_size=chunk_size))
        make_trainer([handlers[-1]], network=networks[-1], dataset=Dataset(data), loss_function=loss).run()
    assert (handlers[0].cost.forward, handlers[1].cost.forward) == (12, 24)
    assert handlers[0].dampened == handlers[1].dampened > 0
    for one, other in zip(networks[0].parameters(), networks[1].parameters()):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# Bad input


@pytest.mark.parametrize("alpha", [0, -1.0, NAN, float("inf")])
def test_a_threshold_that_is_none_raises(forget, alpha) -> None:
    with pytest.raises(ValueError, match="alpha should be a number above 0, but got"):
        SelectiveSynapticDampening(forget, alpha=alpha)


@pytest.mark.parametrize("dampening", [-0.1, NAN, float("inf")])
def test_a_dampening_that_is_none_raises(forget, dampening) -> None:
    with pytest.raises(ValueError, match="dampening should be a number of at least 0, but got"):
        SelectiveSynapticDampening(forget, dampening=dampening)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5])
def test_a_chunk_that_is_none_raises(forget, chunk_size) -> None:
    with pytest.raises(ValueError, match="chunk_size should be an integer of at least 1, but got"):
        SelectiveSynapticDampening(forget, chunk_size=chunk_size)


def test_a_threshold_that_no_weight_can_reach_raises_before_any_work(
    make_trainer, make_network, forget, snapshot, same_bits
) -> None:
    network = make_network()
    before = snapshot(network)
    for alpha in (3, 10):  # ten of thirty are forget samples
        handler = SelectiveSynapticDampening(forget, alpha=alpha)
        with pytest.raises(ValueError, match=rf"alpha should be below 3, the number.*but got {alpha}.*Lower alpha"):
            make_trainer([handler], network=network).run()
        assert handler.cost.samples == 0
    assert same_bits(before, snapshot(network))


@pytest.mark.parametrize(("alpha", "dampening"), [(2.999999, 1.0), (1.1, 3.0)])
def test_when_no_weight_is_dampened_it_raises(
    make_trainer, make_network, forget, snapshot, same_bits, alpha, dampening
) -> None:
    network = make_network()
    before = snapshot(network)
    handler = SelectiveSynapticDampening(forget, alpha=alpha, dampening=dampening)
    with pytest.raises(RuntimeError, match=r"so nothing was unlearned. Lower alpha"):
        make_trainer([handler], network=network).run()
    assert same_bits(before, snapshot(network))


def test_images_that_are_no_numbers_raise_and_change_nothing(
    make_trainer, make_network, records, snapshot, same_bits
) -> None:
    broken = [*records[:29], {**records[29], "image": torch.full((1, 6, 6), NAN)}]
    network = make_network()
    before = snapshot(network)
    handler = SelectiveSynapticDampening(ForgetSet(["P0"], key="patient"), alpha=2)
    with pytest.raises(RuntimeError, match="should be finite, but some hold NaN"):
        make_trainer([handler], network=network, dataset=Dataset(broken)).run()
    assert same_bits(before, snapshot(network))


def test_a_network_without_a_trainable_parameter_is_refused(make_trainer, make_network, forget) -> None:
    network = make_network()
    trainer = make_trainer([SelectiveSynapticDampening(forget, alpha=1.3)], network=network)
    network.requires_grad_(False)
    with pytest.raises(RuntimeError, match="no parameter that requires a gradient"):
        trainer.run()


@pytest.mark.parametrize("other", [FineTune, RandomLabeling])
@pytest.mark.parametrize("first", [True, False])
def test_another_method_in_the_same_trainer_is_refused(make_trainer, forget, other, first) -> None:
    handlers = [SelectiveSynapticDampening(forget, alpha=1.3), other(forget)]
    with pytest.raises(RuntimeError, match=f"in which {other.__name__} would do nothing"):
        make_trainer(handlers if first else handlers[::-1]).run()


@pytest.mark.parametrize(("argument", "part"), [("loader", "retain"), ("forget_loader", "forget")])
def test_an_empty_loader_raises(make_trainer, forget, loader_of, records, argument, part) -> None:
    empty = torch.utils.data.DataLoader(Dataset(records[:3]), batch_size=8, drop_last=True)
    handler = SelectiveSynapticDampening(forget, alpha=1.01, **{argument: empty})
    with pytest.raises(ValueError, match=f"loader of {part} samples should hold at least one sample"):
        make_trainer([handler]).run()


def test_own_loaders_are_used(make_trainer, make_network, forget, records, double, loader_of) -> None:
    network = make_network().double()
    expected = dampened(network, records, 1.2, 1.0)
    own = {
        "loader": loader_of([double.data[i] for i in RETAIN], 6),
        "forget_loader": loader_of([double.data[i] for i in FORGET], 4),
    }
    trainer = make_trainer([SelectiveSynapticDampening(forget, alpha=1.2, **own)], network=network)
    trainer.run()
    for name, value in network.named_parameters():
        np.testing.assert_allclose(value.detach().numpy(), expected[name], rtol=1e-9, atol=0)
