"""NegGrad+: both losses in one step, with their weights, and the forget set round and round."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Events
from method_tasks import IS_FORGET, LABELS, NETWORKS, task_of, with_labels
from monai.data import DataLoader, Dataset
from torch.nn import functional

from monai_unlearn.methods import BatchNormPolicy, FineTune, NegGradPlus, SaliencyMask
from monai_unlearn.methods.neg_grad_plus import weighted_difference

FORGET = IS_FORGET.nonzero().view(-1).tolist()
RETAIN = [i for i in range(30) if not IS_FORGET[i]]
FINITE = st.floats(-1e6, 1e6)


@pytest.fixture
def recorded(records):
    """A data set that keeps the index of every sample that is taken from it."""

    class Recorded(Dataset):
        def __init__(self):
            super().__init__(records)
            self.taken = []

        def _transform(self, index):
            self.taken.append(index)
            return super()._transform(index)

    return Recorded()


def batch_of(dataset, positions):
    images = torch.stack([dataset.data[i]["image"] for i in positions])
    return images, torch.stack([torch.as_tensor(dataset.data[i]["label"]) for i in positions])


@settings(deadline=None, derandomize=True)
@given(FINITE, FINITE, st.floats(0, 1))
def test_the_weighted_difference_is_that_of_numbers(retain, forget, alpha) -> None:
    result = weighted_difference(torch.tensor(retain).double(), torch.tensor(forget).double(), alpha)
    expected = alpha * torch.tensor(retain).double().item() - (1 - alpha) * torch.tensor(forget).double().item()
    assert math.isclose(result.item(), expected, rel_tol=1e-12, abs_tol=1e-9)


@pytest.mark.parametrize("alpha", [0.95, 0.5, 0.0])
def test_float64_training_equals_a_hand_written_loop(make_trainer, make_network, forget, double, alpha) -> None:
    network = make_network().double()
    expected = copy.deepcopy(network)
    handler = NegGradPlus(forget, alpha=alpha)
    make_trainer([handler], network=network, dataset=double, batch_size=6, shuffle=False, max_epochs=2).run()

    retain_batches = [RETAIN[0:6], RETAIN[6:12], RETAIN[12:18], RETAIN[18:20]]
    forget_batches = [FORGET[0:6], FORGET[6:10]]
    momenta = [torch.zeros_like(parameter) for parameter in expected.parameters()]
    expected.train()
    for step in range(8):
        losses = []
        for batch in (retain_batches[step % 4], forget_batches[step % 2]):
            images, labels = batch_of(double, batch)
            losses.append(functional.cross_entropy(expected(images), labels))
        gradients = torch.autograd.grad(alpha * losses[0] - (1 - alpha) * losses[1], list(expected.parameters()))
        with torch.no_grad():
            for parameter, gradient, momentum in zip(expected.parameters(), gradients, momenta):
                momentum.mul_(0.9).add_(gradient + 0.01 * parameter)
                parameter.sub_(0.1 * momentum)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-11, atol=1e-12)


def test_masked_findings_count_as_a_loop_over_the_known_ones_says(make_trainer, make_network, forget, records) -> None:
    network = make_network(classes=2).double()
    expected = copy.deepcopy(network).train()
    data = with_labels(records, "findings").data
    dataset = Dataset([{**r, "image": r["image"].double(), "label": r["label"].double()} for r in data])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    make_trainer([NegGradPlus(forget, alpha=0.7)], network=network, dataset=dataset, batch_size=20, shuffle=False,
                 max_epochs=1, loss_function=LABELS["findings"][2], optimizer=optimizer).run()  # fmt: skip

    def mean_loss(positions):
        images, labels = batch_of(dataset, positions)
        total = 0
        for row, true in zip(expected(images), labels):
            known = ~true.isnan()
            total += functional.binary_cross_entropy_with_logits(row[known], true[known])
        return total / len(positions)

    loss = 0.7 * mean_loss(RETAIN) - 0.3 * mean_loss(FORGET)
    gradients = torch.autograd.grad(loss, list(expected.parameters()))
    for parameter, start, gradient in zip(network.parameters(), expected.parameters(), gradients):
        torch.testing.assert_close(parameter, start - 0.1 * gradient, rtol=1e-12, atol=1e-13)


def test_with_alpha_1_it_is_fine_tuning_to_the_bit_and_meets_no_forget_sample(
    make_trainer, make_network, forget, recorded, snapshot, same_bits
) -> None:
    network, plain = make_network(), make_network()
    handler = NegGradPlus(forget, alpha=1)
    make_trainer([handler], network=network, dataset=recorded).run()
    assert not set(recorded.taken) & set(FORGET)
    assert handler.cost.samples == 0
    make_trainer([FineTune(forget)], network=plain).run()
    assert same_bits(snapshot(network), snapshot(plain))


def test_the_retain_order_is_that_of_fine_tuning(make_trainer, forget, on) -> None:
    orders = []
    for handler in (NegGradPlus(forget), FineTune(forget)):
        order: list[int] = []
        keep = on(Events.ITERATION_COMPLETED, lambda engine, o=order: o.extend(engine.state.batch["index"].tolist()))
        make_trainer([handler, keep]).run()
        orders.append(order)
    assert orders[0] == orders[1]


def test_the_forget_set_comes_round_in_a_new_order_each_time(make_trainer, forget, recorded) -> None:
    handler = NegGradPlus(forget)
    make_trainer([handler], dataset=recorded, batch_size=5, max_epochs=3).run()  # 12 steps, two a round
    taken = [i for i in recorded.taken if i in FORGET]
    rounds = [taken[i : i + 10] for i in range(0, 60, 10)]
    assert len(taken) == 60
    assert all(sorted(one) == FORGET for one in rounds)
    assert len({tuple(one) for one in rounds}) > 3
    assert handler.cost.samples == handler.cost.forward == handler.cost.backward == 60
    assert handler.cost.seconds == 0


def test_a_forget_set_smaller_than_a_batch_takes_part_although_drop_last_is_set(make_trainer, forget, records) -> None:
    handler = NegGradPlus(forget)
    loader = DataLoader(Dataset(records), batch_size=15, shuffle=True, drop_last=True)
    make_trainer([handler], train_data_loader=loader).run()
    assert handler.cost.samples == 2 * 10


def test_a_lower_alpha_raises_the_loss_of_the_forget_set(make_trainer, make_network, forget, records) -> None:
    images, labels = batch_of(Dataset(records), FORGET)
    losses = []
    for alpha in (1, 0.8, 0.5):
        network = make_network()
        make_trainer([NegGradPlus(forget, alpha=alpha)], network=network, max_epochs=6).run()
        with torch.no_grad():
            losses.append(float(functional.cross_entropy(network.eval()(images), labels)))
    assert losses[0] < losses[1] < losses[2]


def test_given_loaders_are_used(make_trainer, make_network, forget, records, loader_of) -> None:
    class NoRecords(torch.utils.data.Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, index):
            raise AssertionError("the trainer's own data should not be touched")

    handler = NegGradPlus(forget, loader=loader_of(records[5:12], 3), forget_loader=loader_of(records[:5], 5))
    trainer = make_trainer([handler], dataset=NoRecords())
    trainer.run()
    assert trainer.state.iteration == 6
    assert handler.cost.samples == 30


@pytest.mark.parametrize("part", ["retain", "forget"])
def test_a_loader_without_a_batch_raises(make_trainer, forget, records, part) -> None:
    empty = DataLoader(Dataset(records[:3]), batch_size=8, drop_last=True)
    given = {"loader" if part == "retain" else "forget_loader": empty}
    with pytest.raises(ValueError, match=f"loader of {part} samples should give at least one batch, but gives none"):
        make_trainer([NegGradPlus(forget, **given)]).run()


@pytest.mark.parametrize("alpha", [-0.01, 1.01, math.nan, math.inf])
def test_alpha_outside_its_range_raises(forget, alpha) -> None:
    with pytest.raises(ValueError, match=r"alpha should lie in \[0, 1\], but got"):
        NegGradPlus(forget, alpha=alpha)


@pytest.mark.filterwarnings("ignore::UserWarning")  # autocast and its scaler look for CUDA
def test_loss_scaling_changes_nothing_but_rounding(make_trainer, make_network, forget, on) -> None:
    def use_scaler(engine):
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    states = []
    for amp in (False, True):
        network = make_network()
        handlers = [on(Events.STARTED, use_scaler), NegGradPlus(forget, alpha=0.6)]
        make_trainer(handlers, network=network, amp=amp).run()
        states.append(network.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-6)


def test_masked_weights_do_not_move_and_statistics_hold_retain_samples(make_trainer, make_network, forget) -> None:
    network = make_network()
    saliency, statistics = SaliencyMask(forget), BatchNormPolicy(forget)
    before = copy.deepcopy(dict(network.named_parameters()))
    make_trainer([NegGradPlus(forget, alpha=0.6), saliency, statistics], network=network).run()
    assert statistics.cost.samples == 20
    for name, parameter in network.named_parameters():
        frozen = ~saliency.mask[name]
        assert torch.equal(parameter[frozen], before[name][frozen])
    assert any((parameter != before[name]).any() for name, parameter in network.named_parameters())


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_task_and_network_is_trained(make_trainer, forget, records, kind, name) -> None:
    task = task_of(records, kind, name)
    network = task["network"]
    before = copy.deepcopy(network)
    make_trainer([NegGradPlus(forget)], max_epochs=1, **task).run()
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert any((p != q).any() for p, q in zip(network.parameters(), before.parameters()))
