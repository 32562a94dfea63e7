"""Gradient ascent: steps up the loss of the forget samples alone, and at least one of them."""

from __future__ import annotations

import copy

import pytest
import torch
from ignite.engine import Events
from method_tasks import IS_FORGET, LABELS, NETWORKS, task_of, with_labels
from monai.data import DataLoader, Dataset
from monai.engines.utils import IterationEvents
from monai.transforms import Compose, RandGaussianNoised
from torch.nn import functional

from monai_unlearn import ForgetSet
from monai_unlearn.handlers import FiniteLoss
from monai_unlearn.methods import BatchNormPolicy, FineTune, GradientAscent, SaliencyMask

FORGET = IS_FORGET.nonzero().view(-1).tolist()


@pytest.fixture
def met(on):
    """The indices of each batch, and the handler that keeps them."""
    batches: list[list[int]] = []
    return batches, on(Events.ITERATION_COMPLETED, lambda engine: batches.append(engine.state.batch["index"].tolist()))


def batch_of(dataset, positions):
    images = torch.stack([dataset.data[i]["image"] for i in positions])
    return images, torch.stack([torch.as_tensor(dataset.data[i]["label"]) for i in positions])


def test_float64_training_equals_a_hand_written_loop(make_trainer, make_network, forget, double) -> None:
    network = make_network().double()
    expected = copy.deepcopy(network)
    make_trainer(
        [GradientAscent(forget)], network=network, dataset=double, batch_size=4, shuffle=False, max_epochs=2
    ).run()

    momenta = [torch.zeros_like(parameter) for parameter in expected.parameters()]
    for _ in range(2):
        for start in (0, 4, 8):
            images, labels = batch_of(double, FORGET[start : start + 4])
            loss = functional.cross_entropy(expected.train()(images), labels)
            gradients = torch.autograd.grad(loss, list(expected.parameters()))
            with torch.no_grad():
                for parameter, gradient, momentum in zip(expected.parameters(), gradients, momenta):
                    momentum.mul_(0.9).add_(-gradient + 0.01 * parameter)  # up the loss, but down the decay
                    parameter.sub_(0.1 * momentum)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-12, atol=1e-13)


def test_masked_findings_are_ascended_as_a_loop_over_the_known_ones_says(
    make_trainer, make_network, forget, records
) -> None:
    network = make_network(classes=2).double()
    expected = copy.deepcopy(network)
    dataset = with_labels(records, "findings")
    dataset = Dataset([{**r, "image": r["image"].double(), "label": r["label"].double()} for r in dataset.data])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    make_trainer(
        [GradientAscent(forget)], network=network, dataset=dataset, batch_size=10, shuffle=False, max_epochs=1,
        loss_function=LABELS["findings"][2], optimizer=optimizer,
    ).run()  # fmt: skip

    images, labels = batch_of(dataset, FORGET)
    logits = expected.train()(images)
    total = 0
    for row, true in zip(logits, labels):
        known = ~true.isnan()
        total += functional.binary_cross_entropy_with_logits(row[known], true[known])
    gradients = torch.autograd.grad(total / 10, list(expected.parameters()))
    for parameter, start, gradient in zip(network.parameters(), expected.parameters(), gradients):
        torch.testing.assert_close(parameter, start + 0.1 * gradient, rtol=1e-12, atol=1e-13)


def test_only_forget_samples_are_met_each_once_an_epoch_and_shuffled(make_trainer, forget, met) -> None:
    batches, keep = met
    trainer = make_trainer([GradientAscent(forget), keep], max_epochs=3)
    trainer.run()
    assert [len(batch) for batch in batches] == 3 * [8, 2]
    epochs = [batches[i] + batches[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == FORGET for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert trainer.state.epoch_length == 2


@pytest.mark.parametrize(("ids", "rows"), [(["P0"], 5), (["P0", "P3"], 10)])
@pytest.mark.parametrize("batch_size", [8, 25])
def test_drop_last_takes_no_step_away_from_a_small_forget_set(
    make_trainer, make_network, records, met, ids, rows, batch_size
) -> None:
    batches, keep = met
    network = make_network()
    before = copy.deepcopy(network)
    loader = DataLoader(Dataset(records), batch_size=batch_size, shuffle=True, drop_last=True)
    handlers = [GradientAscent(ForgetSet(ids, key="patient")), keep]
    make_trainer(handlers, network=network, train_data_loader=loader).run()
    assert [len(batch) for batch in batches] == 2 * [min(rows, batch_size)]
    assert all((p != q).any() for p, q in zip(network.parameters(), before.parameters()))


def test_one_sample_is_enough(make_trainer, make_network, records, met) -> None:
    batches, keep = met
    loader = DataLoader(Dataset(records), batch_size=8, shuffle=True, drop_last=True)
    make_trainer([GradientAscent(ForgetSet([7])), keep], train_data_loader=loader).run()
    assert batches == [[7], [7]]


def test_the_loss_of_the_forget_set_rises(make_trainer, make_network, forget, records) -> None:
    network = make_network()
    make_trainer([FineTune(ForgetSet([29]))], network=network, max_epochs=20).run()
    images, labels = batch_of(Dataset(records), FORGET)

    def loss():
        with torch.no_grad():
            return float(functional.cross_entropy(network.eval()(images), labels))

    before = loss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    make_trainer([GradientAscent(forget), BatchNormPolicy(forget, policy="frozen")], network=network,
                 optimizer=optimizer, max_epochs=5).run()  # fmt: skip
    assert loss() > before + 0.1


def test_without_a_rate_no_weight_changes(make_trainer, make_network, forget) -> None:
    network = make_network()
    before = copy.deepcopy(network)
    make_trainer(
        [GradientAscent(forget)], network=network, optimizer=torch.optim.SGD(network.parameters(), lr=0.0)
    ).run()
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before.parameters()))


def test_random_transforms_are_kept(make_trainer, forget, records, on) -> None:
    seen = []
    keep = on(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.batch["image"].clone()))
    noise = Compose([RandGaussianNoised("image", prob=1.0, std=5.0)])
    make_trainer([GradientAscent(forget), keep], dataset=Dataset(records, noise), batch_size=10, shuffle=False).run()
    own = torch.stack([records[i]["image"] for i in FORGET])
    assert all((images != own).any() for images in seen)
    assert not torch.equal(*seen)


def test_the_output_shows_the_negated_loss(make_trainer, forget, on) -> None:
    def keep(engine):
        true = functional.cross_entropy(engine.state.output["pred"], engine.state.output["label"])
        losses.append((engine.state.output["loss"].item(), -true.item()))

    losses: list[tuple[float, float]] = []
    make_trainer([GradientAscent(forget), on(IterationEvents.BACKWARD_COMPLETED, keep)]).run()
    assert len(losses) == 4
    assert all(shown == expected < 0 for shown, expected in losses)


@pytest.mark.filterwarnings("ignore::UserWarning")  # autocast and its scaler look for CUDA
def test_loss_scaling_changes_nothing_but_rounding(make_trainer, make_network, forget, on) -> None:
    def use_scaler(engine):
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    states = []
    for amp in (False, True):
        network = make_network()
        handlers = [on(Events.STARTED, use_scaler), GradientAscent(forget)]
        make_trainer(handlers, network=network, amp=amp).run()
        states.append(network.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-6)


def test_a_diverging_run_is_found_out(make_trainer, make_network, forget) -> None:
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e30)
    with pytest.raises(FloatingPointError, match="loss should be finite"):
        make_trainer([GradientAscent(forget), FiniteLoss()], network=network, optimizer=optimizer, max_epochs=9).run()


def test_other_handlers_still_find_both_parts(make_trainer, make_network, forget) -> None:
    network = make_network()
    saliency, statistics = SaliencyMask(forget), BatchNormPolicy(forget)
    before = copy.deepcopy(dict(network.named_parameters()))
    make_trainer([GradientAscent(forget), saliency, statistics], network=network).run()
    assert saliency.cost.samples == 10
    assert statistics.cost.samples == 20
    for name, parameter in network.named_parameters():
        frozen = ~saliency.mask[name]
        assert torch.equal(parameter[frozen], before[name][frozen])


def test_a_given_loader_is_used(make_trainer, forget, records, loader_of, met) -> None:
    batches, keep = met
    make_trainer([GradientAscent(forget, loader=loader_of(records[15:20], 3)), keep]).run()
    assert batches == 2 * [[15, 16, 17], [18, 19]]


def test_a_loader_without_a_batch_raises(make_trainer, forget, records) -> None:
    loader = DataLoader(Dataset(records[:3]), batch_size=8, drop_last=True)
    with pytest.raises(ValueError, match="loader of forget samples should give at least one batch, but gives none"):
        make_trainer([GradientAscent(forget, loader=loader)]).run()


def test_a_custom_sampler_is_refused(make_trainer, forget, records) -> None:
    loader = DataLoader(Dataset(records), batch_size=8, sampler=list(range(30)))
    with pytest.raises(ValueError, match=r"A forget loader can't be made from a .*Give the method a loader"):
        make_trainer([GradientAscent(forget)], train_data_loader=loader).run()


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_task_and_network_is_ascended(make_trainer, forget, records, kind, name) -> None:
    task = task_of(records, kind, name)
    network = task["network"]
    before = copy.deepcopy(network)
    make_trainer([GradientAscent(forget)], max_epochs=1, **task).run()
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert any((p != q).any() for p, q in zip(network.parameters(), before.parameters()))
