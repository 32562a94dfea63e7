"""ℓ1-sparse unlearning: fine-tuning with a penalty of the right size in each epoch, alone or beside another method."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Events
from method_tasks import IS_FORGET, LABELS, NETWORKS, task_of
from monai.engines.utils import IterationEvents
from torch import nn
from torch.nn import functional

from monai_unlearn.methods import (
    SCRUB,
    BatchNormPolicy,
    FineTune,
    GradientAscent,
    L1Sparse,
    NegGradPlus,
    RandomLabeling,
    SaliencyMask,
)
from monai_unlearn.methods.l1_sparse import decayed, l1_norm

RETAIN = [i for i in range(30) if not IS_FORGET[i]]
ALL = list(range(30))


# ---- pure functions


@settings(deadline=None, derandomize=True)
@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=4), min_size=1, max_size=4))
def test_the_norm_is_the_sum_of_absolute_values_and_its_gradient_the_sign(rows) -> None:
    tensors = [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in rows]
    norm = l1_norm(tensors)
    assert math.isclose(norm.item(), sum(abs(value) for row in rows for value in row), rel_tol=1e-12, abs_tol=1e-12)
    norm.backward()
    for row, tensor in zip(rows, tensors):
        assert tensor.grad.tolist() == [(value > 0) - (value < 0) for value in row]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_up_in_float32(dtype) -> None:
    weight = torch.full((70_000,), 1.0, dtype=dtype, requires_grad=True)  # beyond float16's range, and its precision
    norm = l1_norm([weight, torch.ones(1)])
    assert norm.dtype == torch.float32
    assert norm.item() == 70_001
    norm.backward()
    assert weight.grad.dtype == dtype
    assert bool((weight.grad == 1).all())


def test_there_has_to_be_something_to_sum_up() -> None:
    with pytest.raises(ValueError, match="at least one tensor, but there is none"):
        l1_norm([])


@settings(deadline=None, derandomize=True)
@given(st.floats(0, 1e3), st.integers(1, 50))
def test_the_weight_falls_in_equal_steps_from_alpha_to_a_part_of_it(alpha, epochs) -> None:
    weights = [decayed(alpha, epoch, epochs) for epoch in range(1, epochs + 1)]
    assert weights[0] == alpha
    assert math.isclose(weights[-1], alpha / epochs, rel_tol=1e-9, abs_tol=1e-300)
    assert math.isclose(sum(weights), alpha * (epochs + 1) / 2, rel_tol=1e-9, abs_tol=1e-300)
    assert sorted(weights, reverse=True) == weights


@pytest.mark.parametrize("epoch", [0, 4])
def test_an_epoch_that_is_none_raises(epoch) -> None:
    with pytest.raises(ValueError, match=rf"epoch should lie in \[1, 3\], but got {epoch}"):
        decayed(0.1, epoch, 3)


# ---- in the trainer


def hand_written(network, data, positions, alpha, epochs=3, size=6, accumulated=1):
    """SGD with momentum 0.9 and weight decay 0.01 at 0.1 on means over so many batches, and the penalty by hand."""
    parameters = list(network.train().parameters())
    momenta = [torch.zeros_like(parameter) for parameter in parameters]
    for t in range(epochs):
        batches = [positions[i : i + size] for i in range(0, len(positions), size)]
        for first in range(0, len(batches), accumulated):
            total = [torch.zeros_like(parameter) for parameter in parameters]
            for batch in batches[first : first + accumulated]:
                images = torch.stack([data.data[i]["image"] for i in batch])
                labels = torch.tensor([int(data.data[i]["label"]) for i in batch])
                loss = functional.cross_entropy(network(images), labels)
                for sums, gradient, parameter in zip(total, torch.autograd.grad(loss, parameters), parameters):
                    sums += (gradient + alpha * (1 - t / epochs) * parameter.detach().sign()) / accumulated
            with torch.no_grad():
                for parameter, gradient, momentum in zip(parameters, total, momenta):
                    momentum.mul_(0.9).add_(gradient + 0.01 * parameter)
                    parameter.sub_(0.1 * momentum)
    return network


@pytest.mark.parametrize("alpha", [1e-4, 0.02])
@pytest.mark.parametrize("accumulated", [1, 2, 3])
def test_float64_training_equals_a_hand_written_loop(
    make_trainer, make_network, forget, double, alpha, accumulated
) -> None:
    network = make_network().double()
    expected = hand_written(copy.deepcopy(network), double, RETAIN, alpha, accumulated=accumulated)
    handler = L1Sparse(forget, alpha=alpha)
    make_trainer([handler], network=network, dataset=double, batch_size=6, shuffle=False, max_epochs=3,
                 accumulation_steps=accumulated).run()  # fmt: skip
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-11, atol=1e-12)


def test_with_alpha_0_it_is_fine_tuning_to_the_bit(make_trainer, make_network, forget, snapshot, same_bits) -> None:
    network, plain = make_network(), make_network()
    make_trainer([L1Sparse(forget, alpha=0)], network=network).run()
    make_trainer([FineTune(forget)], network=plain).run()
    assert same_bits(snapshot(network), snapshot(plain))


def test_a_larger_alpha_leaves_smaller_weights(make_trainer, make_network, forget) -> None:
    norms = []
    for alpha in (0, 1e-3, 1e-2, 0.1):
        network = make_network()
        make_trainer([L1Sparse(forget, alpha=alpha)], network=network, max_epochs=4).run()
        norms.append(l1_norm(network.parameters()).item())
    assert norms == sorted(norms, reverse=True)
    assert len(set(norms)) == 4


def test_biases_and_normalisation_are_in_the_penalty_and_what_requires_no_gradient_is_not(
    make_trainer, make_network, forget, on
) -> None:
    network, seen = make_network(), []
    network[0].weight.requires_grad_(False)
    before = network[0].weight.detach().clone()
    losses = on(IterationEvents.LOSS_COMPLETED, lambda engine: seen.append(engine.state.output["loss"].item()))
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    make_trainer([losses, L1Sparse(forget, alpha=0.5), losses], network=network, max_epochs=1).run()
    penalised = sum(value.abs().sum().item() for name, value in start.items() if name != "0.weight")
    assert seen[1] - seen[0] == pytest.approx(0.5 * penalised, rel=1e-5)
    assert torch.equal(network[0].weight, before)


def test_a_wrapped_network_is_penalised_as_a_plain_one(make_trainer, make_network, forget, snapshot, same_bits) -> None:
    network, plain = make_network(), make_network()
    make_trainer([L1Sparse(forget, alpha=0.01)], network=nn.DataParallel(network)).run()
    make_trainer([L1Sparse(forget, alpha=0.01)], network=plain).run()
    assert same_bits(snapshot(network), snapshot(plain))


@pytest.mark.filterwarnings("ignore::UserWarning")  # autocast and its scaler look for CUDA
def test_loss_scaling_changes_nothing_but_rounding(make_trainer, make_network, forget, on) -> None:
    def use_scaler(engine):
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    states = []
    for amp in (False, True):
        network = make_network()
        handlers = [on(Events.STARTED, use_scaler), L1Sparse(forget, alpha=0.01)]
        make_trainer(handlers, network=network, amp=amp).run()
        states.append(network.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-6)


def test_masked_weights_do_not_move_and_statistics_hold_retain_samples(make_trainer, make_network, forget) -> None:
    network = make_network()
    saliency, statistics = SaliencyMask(forget), BatchNormPolicy(forget)
    before = copy.deepcopy(dict(network.named_parameters()))
    make_trainer([L1Sparse(forget, alpha=0.05), saliency, statistics], network=network).run()
    assert statistics.cost.samples == 20
    for name, parameter in network.named_parameters():
        frozen = ~saliency.mask[name]
        assert torch.equal(parameter[frozen], before[name][frozen])
    assert any((parameter != before[name]).any() for name, parameter in network.named_parameters())


def test_only_retain_samples_are_met_in_the_order_of_fine_tuning(make_trainer, forget, on) -> None:
    orders = []
    for handler in (L1Sparse(forget), FineTune(forget)):
        order: list[int] = []
        keep = on(Events.ITERATION_COMPLETED, lambda engine, o=order: o.extend(engine.state.batch["index"].tolist()))
        make_trainer([handler, keep]).run()
        orders.append(order)
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == sorted(2 * RETAIN)


def test_a_given_loader_is_used(make_trainer, forget, loader_of, records) -> None:
    trainer = make_trainer([L1Sparse(forget, loader=loader_of(records[5:12], 3))])
    trainer.run()
    assert trainer.state.iteration == 2 * 3


# ---- beside another method


def test_beside_random_labeling_it_adds_the_penalty_and_nothing_else(
    make_trainer, make_network, forget, double
) -> None:
    network = make_network().double()
    flipped = copy.deepcopy(double)
    labeling = RandomLabeling(forget, num_classes=3, seed=4)
    generator = torch.Generator().manual_seed(4)
    for first in range(0, 30, 6):  # the draws of one epoch, batch by batch
        batch = [i for i in range(first, first + 6) if IS_FORGET[i]]
        steps = torch.randint(1, 3, (len(batch),), generator=generator)
        for i, step in zip(batch, steps.tolist()):
            flipped.data[i]["label"] = (int(double.data[i]["label"]) + step) % 3
    expected = hand_written(copy.deepcopy(network), flipped, ALL, 0.02, epochs=1)
    make_trainer([labeling, L1Sparse(forget, alpha=0.02, retain=False)], network=network, dataset=double,
                 batch_size=6, shuffle=False, max_epochs=1).run()  # fmt: skip
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-11, atol=1e-12)


OTHERS = {
    "gradient_ascent": lambda forget: GradientAscent(forget),
    "neg_grad_plus": lambda forget: NegGradPlus(forget, alpha=0.6),
    "scrub": lambda forget: SCRUB(forget, forget_epochs=1, alpha=0.5),
}


@pytest.mark.parametrize("other", OTHERS)
def test_it_adds_to_the_loss_that_another_method_leaves(make_trainer, make_network, forget, on, other) -> None:
    network, seen = make_network(), []

    def see(engine):
        norm = sum(parameter.detach().abs().sum().item() for parameter in network.parameters())
        seen.append((engine.state.epoch, engine.state.output["loss"].item(), norm))

    look = on(IterationEvents.LOSS_COMPLETED, see)
    handlers = [OTHERS[other](forget), look, L1Sparse(forget, alpha=0.2, retain=False), look]
    make_trainer(handlers, network=network).run()
    assert {epoch for epoch, *_ in seen} == {1, 2}
    for (epoch, before, norm), (_, after, _) in zip(seen[::2], seen[1::2]):
        assert after - before == pytest.approx({1: 0.2, 2: 0.1}[epoch] * norm, rel=1e-4)


@pytest.mark.parametrize("other", OTHERS)
def test_a_place_before_a_method_that_changes_the_loss_is_refused(make_trainer, forget, other) -> None:
    handlers = [L1Sparse(forget, retain=False), OTHERS[other](forget)]
    name = type(handlers[1]).__name__
    with pytest.raises(RuntimeError, match=f"L1Sparse stands before {name}, .*Put it after {name}"):
        make_trainer(handlers).run()


def test_someone_elses_handler_may_look_at_the_loss(make_trainer, forget, on) -> None:
    seen = []
    look = on(IterationEvents.LOSS_COMPLETED, lambda engine: seen.append(engine.state.output["loss"].item()))
    make_trainer([L1Sparse(forget), look]).run()
    assert len(seen) == 6


# ---- refusals


@pytest.mark.parametrize("alpha", [-1e-9, math.nan, math.inf])
def test_alpha_outside_its_range_raises(forget, alpha) -> None:
    with pytest.raises(ValueError, match="alpha should be a number of at least 0, but got"):
        L1Sparse(forget, alpha=alpha)


def test_retain_is_true_or_false(forget) -> None:
    with pytest.raises(ValueError, match="retain should be true or false, but got 'no'"):
        L1Sparse(forget, retain="no")


def test_a_loader_that_would_not_be_used_is_refused(forget, loader_of, records) -> None:
    with pytest.raises(ValueError, match="loader should be None with retain=False"):
        L1Sparse(forget, retain=False, loader=loader_of(records))


def test_a_network_without_anything_to_train_raises(make_trainer, make_network, forget) -> None:
    network = make_network().requires_grad_(False)
    with pytest.raises(ValueError, match="at least one tensor, but there is none"):
        make_trainer([L1Sparse(forget)], network=network).run()


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_task_and_network_is_trained(make_trainer, forget, records, kind, name) -> None:
    task = task_of(records, kind, name)
    network = task["network"]
    before = copy.deepcopy(network)
    make_trainer([L1Sparse(forget)], max_epochs=1, **task).run()
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert any((p != q).any() for p, q in zip(network.parameters(), before.parameters()))


def test_a_handler_of_ones_own_that_drops_the_penalty_is_found(make_trainer, forget, on) -> None:
    def replace(engine) -> None:
        output = engine.state.output
        output["loss"] = functional.cross_entropy(output["pred"], output["label"])

    late, early = ([L1Sparse(forget), on(IterationEvents.LOSS_COMPLETED, replace)][::step] for step in (1, -1))
    with pytest.raises(RuntimeError, match="The penalty of L1Sparse did not reach the weights: a handler that stands"):
        make_trainer(late).run()
    make_trainer(early).run()


def test_a_plain_function_after_it_is_let_be(make_trainer, forget) -> None:
    trainer = make_trainer([L1Sparse(forget)])
    seen: list = []
    trainer.add_event_handler(IterationEvents.LOSS_COMPLETED, seen.append, 1)
    trainer.run()
    assert seen
