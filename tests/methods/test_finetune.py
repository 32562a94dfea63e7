"""Fine-tuning: plain training that meets retain samples alone."""

from __future__ import annotations

import copy

import pytest
import torch
from ignite.engine import Events
from method_tasks import IS_FORGET, LABELS, NETWORKS, task_of
from monai.data import DataLoader, Dataset
from torch.nn import functional

from monai_unlearn import ForgetSet
from monai_unlearn.methods import BatchNormPolicy, FineTune, SaliencyMask

RETAIN = [i for i in range(30) if not IS_FORGET[i]]


def test_float64_training_equals_a_hand_written_loop(make_trainer, make_network, forget, double) -> None:
    network = make_network().double()
    expected = copy.deepcopy(network)
    make_trainer([FineTune(forget)], network=network, dataset=double, batch_size=20, shuffle=False, max_epochs=4).run()

    images = torch.stack([double.data[i]["image"] for i in RETAIN])
    labels = torch.tensor([int(double.data[i]["label"]) for i in RETAIN])
    momenta = [torch.zeros_like(parameter) for parameter in expected.parameters()]
    for _ in range(4):
        loss = functional.cross_entropy(expected.train()(images), labels)
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for parameter, gradient, momentum in zip(expected.parameters(), gradients, momenta):
                momentum.mul_(0.9).add_(gradient + 0.01 * parameter)
                parameter.sub_(0.1 * momentum)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-12, atol=1e-13)


def test_it_equals_plain_training_on_the_retain_records(
    make_trainer, make_network, forget, records, snapshot, same_bits
) -> None:
    network, plain = make_network(), make_network()
    trainer = make_trainer([FineTune(forget)], network=network)
    trainer.run()
    other = make_trainer([], network=plain, dataset=Dataset([records[i] for i in RETAIN]))
    other.run()
    assert same_bits(snapshot(network), snapshot(plain))
    assert trainer.state.iteration == other.state.iteration == 6


def test_only_retain_samples_are_met_each_once_an_epoch(make_trainer, forget, on) -> None:
    met = []
    keep = on(Events.ITERATION_COMPLETED, lambda engine: met.extend(engine.state.batch["index"].tolist()))
    make_trainer([FineTune(forget), keep]).run()
    assert sorted(met) == sorted(2 * RETAIN)
    assert met[:20] != met[20:]


def test_without_a_rate_nothing_but_the_running_statistics_changes(make_trainer, make_network, forget) -> None:
    network = make_network()
    before = copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)
    make_trainer([FineTune(forget)], network=network, optimizer=optimizer).run()
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before.parameters()))
    assert not torch.equal(network[1].running_mean, before[1].running_mean)


def test_other_handlers_still_find_the_forget_samples(make_trainer, make_network, forget) -> None:
    network = make_network()
    saliency, statistics = SaliencyMask(forget), BatchNormPolicy(forget)
    before = copy.deepcopy(dict(network.named_parameters()))
    make_trainer([FineTune(forget), saliency, statistics], network=network).run()
    assert saliency.cost.samples == 10
    assert statistics.cost.samples == 20
    for name, parameter in network.named_parameters():
        frozen = ~saliency.mask[name]
        assert torch.equal(parameter[frozen], before[name][frozen])
    assert any((parameter != before[name]).any() for name, parameter in network.named_parameters())


def test_a_given_loader_is_used(make_trainer, make_network, forget, loader_of, records, snapshot, same_bits) -> None:
    network, other = make_network(), make_network()
    trainer = make_trainer([FineTune(forget, loader=loader_of(records[5:12], 3))], network=network)
    trainer.run()
    make_trainer([], network=other, train_data_loader=loader_of(records[5:12], 3)).run()
    assert trainer.state.epoch_length == 3
    assert same_bits(snapshot(network), snapshot(other))


def test_a_loader_without_a_batch_raises(make_trainer, forget, records) -> None:
    loader = DataLoader(Dataset(records[:3]), batch_size=8, drop_last=True)
    with pytest.raises(ValueError, match="loader of retain samples should give at least one batch, but gives none"):
        make_trainer([FineTune(forget, loader=loader)]).run()


def test_an_empty_retain_set_raises(make_trainer) -> None:
    with pytest.raises(ValueError, match="all 30 are to be forgotten"):
        make_trainer([FineTune(ForgetSet([f"P{i}" for i in range(6)], key="patient"))]).run()


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_task_and_network_is_trained(make_trainer, forget, records, kind, name) -> None:
    task = task_of(records, kind, name)
    network = task["network"]
    before = copy.deepcopy(network)
    make_trainer([FineTune(forget)], max_epochs=1, **task).run()
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert any((p != q).any() for p, q in zip(network.parameters(), before.parameters()))
