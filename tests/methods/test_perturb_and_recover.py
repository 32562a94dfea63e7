"""Perturb and recover: what is disturbed, how long and at which rate is trained, and which state is kept."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Events
from method_tasks import IS_FORGET, LABELS, NETWORKS, task_of
from monai.data import DataLoader, Dataset
from monai.engines.utils import IterationEvents
from monai.handlers import CheckpointSaver, LrScheduleHandler
from monai.transforms import Compose, EnsureTyped, RandScaleIntensityd
from torch import nn
from torch.nn import functional

from monai_unlearn.cost import Cost
from monai_unlearn.methods import PerturbAndRecover
from monai_unlearn.methods.perturb_and_recover import STRIDE, excess, height, steps_within
from monai_unlearn.methods.weight_noise import noisy

RETAIN = [i for i in range(30) if not IS_FORGET[i]]
NAN = float("nan")


def verdict(auc, low=NAN, high=NAN, utility=0.8):
    return SimpleNamespace(auc=auc, low=low, high=high, utility=utility)


class Judge:
    """Says in turn what it was told to say, and remembers which networks it saw."""

    def __init__(self, *answers, samples=5):
        self.answers, self.samples = list(answers), samples
        self.cost, self.matched_on = Cost(), ("class",)
        self.seen = []

    def evaluate(self, network):
        self.cost.samples += self.samples
        self.seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return self.answers.pop(0)


# The pure functions


@given(samples=st.floats(0, 1e6), batch=st.integers(1, 500), batches=st.integers(1, 1000))
def test_steps_stay_within_the_samples_and_near_whole_epochs(samples, batch, batches) -> None:
    epochs, length = steps_within(samples, batch, batches)
    assert epochs >= 1
    assert epochs * length * batch <= samples
    assert epochs * (length + 1) > samples // batch  # nothing is left that would make each epoch a step longer
    if samples >= batch * batches:
        assert batches / 2 - 1 < length < 1.6 * batches + 1


@pytest.mark.parametrize("steps", [20, 200, 3000])
def test_the_rate_goes_up_stays_and_goes_down_in_straight_lines(steps) -> None:
    corners = [0, steps / 20, steps * 2 / 5, steps]
    expected = np.interp(np.arange(steps), corners, [0.04, 1, 1, 0])
    assert [height(step, steps) for step in range(steps)] == pytest.approx(expected)


@given(steps=st.integers(1, 3000))
def test_the_rate_rises_once_and_falls_once(steps) -> None:
    rates = [height(step, steps) for step in range(steps)]
    top = rates.index(max(rates))
    assert rates[0] == pytest.approx(0.04)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0
    assert max(rates) <= 1


@pytest.mark.parametrize(
    ("given_verdict", "expected"),
    [
        (verdict(0.53, 0.48, 0.58), 0.0),
        (verdict(0.6, 0.55, 0.65), 0.05),
        (verdict(0.3, 0.25, 0.35), -0.15),
        (verdict(0.9), 0.0),
        (verdict(0.1, 0.05, NAN), 0.0),
    ],
)
def test_the_excess_is_how_far_the_interval_is_from_a_half(given_verdict, expected) -> None:
    assert excess(given_verdict) == pytest.approx(expected)


# What is trained


def test_float64_training_equals_a_hand_written_loop(make_trainer, make_network, forget, double) -> None:
    network = make_network().double()
    expected = copy.deepcopy(network)
    handler = PerturbAndRecover(forget, budget=0.6, scale=0.7, seed=3)
    make_trainer([handler], network=network, dataset=double, batch_size=20, shuffle=False, max_epochs=25).run()

    generator = torch.Generator().manual_seed(3)
    images = torch.stack([double.data[i]["image"] for i in RETAIN])
    labels = torch.tensor([int(double.data[i]["label"]) for i in RETAIN])
    kernels = [expected.get_parameter(name) for name in ("0.weight", "5.weight")]
    with torch.no_grad():
        for kernel in kernels:
            kernel.copy_(noisy(kernel, 0.7, generator))
    expected[1].reset_running_stats()
    momenta = [torch.zeros_like(parameter) for parameter in expected.parameters()]
    steps = int(0.6 * 25 * 20 // 20)
    rate, reach = 0.04, None
    for step in range(steps):
        loss = functional.cross_entropy(expected.train()(images), labels)
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        before = [kernel.detach().clone() for kernel in kernels]
        with torch.no_grad():
            for parameter, gradient, momentum in zip(expected.parameters(), gradients, momenta):
                momentum.mul_(0.9).add_(gradient + 0.01 * parameter)
                parameter.sub_(0.1 * rate * momentum)
            moved = [float((one - other).norm() / one.norm()) for one, other in zip(kernels, before)]
        if step + 1 <= 8 or (step + 1) % 4 == 0:
            reach = min(moved) / rate if reach is None else 0.4 * reach + 0.6 * min(moved) / rate
        rate = 0.004 * min(1, (steps - step - 1) / (0.6 * steps)) / reach
    assert steps == 15
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rate", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_steps_move_kernels_as_far_as_wanted_whatever_the_recipes_rate(
    make_trainer, make_network, forget, on, optimizer, rate
) -> None:
    network = make_network()
    kernels = [network[0].weight, network[5].weight]
    before, moved = [], []
    handlers = [
        PerturbAndRecover(forget, budget=1.0),
        on(IterationEvents.LOSS_COMPLETED, lambda engine: before.append([k.detach().clone() for k in kernels])),
        on(
            Events.ITERATION_COMPLETED,
            lambda engine: moved.append(min(float((k - b).norm() / k.norm()) for k, b in zip(kernels, before[-1]))),
        ),
    ]
    trained = optimizer(network.parameters(), lr=rate)
    trainer = make_trainer(handlers, network=network, optimizer=trained, batch_size=20, max_epochs=100)
    trainer.run()
    assert len(moved) == 100
    wanted = [STRIDE * height(step, 100) for step in range(100)]
    assert sum(moved[20:60]) == pytest.approx(sum(wanted[20:60]), rel=0.25)
    assert trained.param_groups[0]["lr"] == rate


def test_the_recipes_rate_cancels_out(make_trainer, make_network, forget, snapshot) -> None:
    states = []
    for rate in (0.01, 0.0101):
        network = make_network()
        optimizer = torch.optim.SGD(network.parameters(), lr=rate)
        make_trainer([PerturbAndRecover(forget, budget=1.0)], network=network, optimizer=optimizer).run()
        states.append(snapshot(network))
    # All but the first step, whose reach nobody knows yet.
    for one, other in zip(*(state.values() for state in states)):
        torch.testing.assert_close(one, other, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize(("epochs", "augmented"), [(1, 0), (6, 0), (7, 1), (10, 3)])
def test_only_retain_samples_are_met_and_augmented_in_the_first_epochs(
    make_trainer, forget, records, on, epochs, augmented
) -> None:
    met, changed = [], []

    def keep(engine):
        batch = engine.state.batch
        met.append(batch["index"].tolist())
        same = [torch.equal(records[i]["image"], image) for i, image in zip(met[-1], batch["image"])]
        assert len(set(same)) == 1
        changed.append((engine.state.epoch, not same[0]))

    scaled = Compose([EnsureTyped("image"), RandScaleIntensityd("image", factors=(1, 2), prob=1.0)])
    dataset = Dataset(records, transform=scaled)
    handlers = [PerturbAndRecover(forget, budget=1.0), on(Events.ITERATION_COMPLETED, keep)]
    trainer = make_trainer(handlers, dataset=dataset, batch_size=5, max_epochs=epochs)
    trainer.run()
    assert trainer.state.epoch == epochs
    assert {epoch for epoch, other in changed if other} == set(range(1, augmented + 1))
    for epoch in range(epochs):  # each of them once an epoch
        assert sorted(i for batch in met[4 * epoch : 4 * epoch + 4] for i in batch) == RETAIN


def test_a_given_loader_is_used_from_the_first_step_to_the_last(make_trainer, forget, records, on) -> None:
    loaders = []
    loader = DataLoader(Dataset([records[i] for i in RETAIN]), batch_size=5)
    keep = on(Events.ITERATION_COMPLETED, lambda engine: loaders.append(engine.state.dataloader))
    make_trainer([PerturbAndRecover(forget, budget=1.0, loader=loader), keep], max_epochs=10).run()
    assert len(loaders) == 40
    assert all(one is loader for one in loaders)


@pytest.mark.parametrize(("budget", "samples"), [(0.3, 5), (0.5, 5), (1.0, 20), (1.5, 0)])
def test_the_budget_holds_with_judging_included(make_trainer, forget, budget, samples) -> None:
    judge = Judge(verdict(0.9, 0.8, 0.95), verdict(0.9, 0.8, 0.95), samples=samples)
    handler = PerturbAndRecover(forget, budget=budget, judge=judge)
    trainer = make_trainer([handler], max_epochs=10)
    trainer.run()
    spent = trainer.state.iteration * 8 + handler.tuning_cost.samples
    assert len(judge.seen) == (2 if trainer.state.epoch > 1 else 1)
    assert spent <= budget * 10 * 20
    assert spent > budget * 10 * 20 - samples - 8 * (trainer.state.epoch + 1)


def test_settings_of_optimizer_and_trainer_are_put_back_and_a_second_run_is_equal(
    make_trainer, make_network, forget, snapshot, same_bits
) -> None:
    network = make_network()
    start = snapshot(network)
    trainer = make_trainer([PerturbAndRecover(forget, budget=0.9)], network=network, max_epochs=4)
    trainer.data_loader = DataLoader(trainer.data_loader.dataset, batch_size=8)
    settings = copy.deepcopy(trainer.optimizer.state_dict()["param_groups"])
    states = []
    for _ in range(2):
        network.load_state_dict(start)
        trainer.run()
        states.append(snapshot(network))
        assert trainer.optimizer.state_dict()["param_groups"] == settings
        assert trainer.state.max_epochs == 4
        assert trainer.state.epoch == 3  # of the second run too, though the recipe has more
    assert same_bits(*states)


def test_after_an_error_a_run_begins_anew_with_the_recipes_rate_and_length(
    make_trainer, make_network, forget, snapshot, same_bits, on, begin_again
) -> None:
    network = make_network()
    start = snapshot(network)
    iterations = []

    def interrupt(engine):
        iterations.append(engine.state.iteration)
        if len(iterations) == 7:
            raise KeyboardInterrupt

    handlers = [PerturbAndRecover(forget, budget=0.9), on(Events.ITERATION_COMPLETED, interrupt)]
    trainer = make_trainer(handlers, network=network, max_epochs=6)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    network.load_state_dict(start)
    begin_again(trainer)
    trainer.run()
    other = make_trainer([PerturbAndRecover(forget, budget=0.9)], max_epochs=6)
    other.network.load_state_dict(start)
    other.run()
    assert iterations[7:] == list(range(1, other.state.iteration + 1))
    assert same_bits(snapshot(network), snapshot(other.network))
    assert trainer.state.max_epochs == 6
    assert trainer.optimizer.param_groups[0]["lr"] == 0.1


def test_the_recipes_length_is_that_of_the_trainer_when_it_starts(make_trainer, forget) -> None:
    trainer = make_trainer([PerturbAndRecover(forget, budget=0.5)], max_epochs=2)
    trainer.state.max_epochs = 10
    trainer.run()
    assert 0.5 * 200 - 8 * (trainer.state.epoch + 1) < 8 * trainer.state.iteration <= 0.5 * 200
    assert trainer.state.max_epochs == 10


def test_the_budget_holds_for_a_loader_with_a_batch_sampler(make_trainer, forget, records) -> None:
    sampler = torch.utils.data.BatchSampler(range(20), batch_size=5, drop_last=False)
    loader = DataLoader(Dataset([records[i] for i in RETAIN]), batch_sampler=sampler)
    trainer = make_trainer([PerturbAndRecover(forget, budget=0.5, loader=loader)], max_epochs=10)
    trainer.run()
    assert 0.5 * 200 - 5 * (trainer.state.epoch + 1) < 5 * trainer.state.iteration <= 0.5 * 200


def test_each_group_of_parameters_has_its_own_rate(make_trainer, make_network, forget, on) -> None:
    network = make_network()
    rates = []
    groups = [{"params": network[:2].parameters()}, {"params": network[5].parameters(), "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    keep = on(
        IterationEvents.BACKWARD_COMPLETED,
        lambda engine: rates.append([group["lr"] for group in optimizer.param_groups]),
    )
    make_trainer(
        [PerturbAndRecover(forget, budget=1.0), keep], network=network, optimizer=optimizer, max_epochs=9
    ).run()
    assert all(one == pytest.approx(10 * other) for one, other in rates)
    assert rates[0][0] == pytest.approx(0.1 * 0.04)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_task_and_network_is_trained(make_trainer, forget, records, kind, name) -> None:
    task = task_of(records, kind, name)
    network = task["network"]
    before = copy.deepcopy(network)
    handler = PerturbAndRecover(forget, budget=1.0)
    make_trainer([handler], max_epochs=1, **task).run()
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())
    assert all((p != q).any() for p, q in zip(network.parameters(), before.parameters()) if p.ndim > 1)


def test_frozen_weights_stay_bit_identical(make_trainer, make_network, forget) -> None:
    network = make_network()
    network[0].weight.requires_grad_(False)
    before = network[0].weight.clone()
    make_trainer([PerturbAndRecover(forget, budget=1.0)], network=network).run()
    assert torch.equal(network[0].weight, before)


# Which state is kept


def run_judged(make_trainer, network, forget, *answers):
    judge = Judge(*answers)
    handler = PerturbAndRecover(forget, budget=0.9, judge=judge)
    make_trainer([handler], network=network, max_epochs=6).run()
    return handler, judge


def test_a_state_that_can_not_be_told_apart_is_kept_and_no_other_is_judged(
    make_trainer, make_network, forget, snapshot, same_bits
) -> None:
    network = make_network()
    handler, judge = run_judged(make_trainer, network, forget, verdict(0.52, 0.47, 0.57))
    assert len(judge.seen) == 1
    assert same_bits(snapshot(network), judge.seen[0])
    assert len(handler.notes) == 1
    assert "the last state" in handler.notes[0]


@pytest.mark.parametrize(
    ("last", "before", "rewound", "said"),
    [
        (verdict(0.6, 0.55, 0.65), verdict(0.52, 0.47, 0.57), True, None),
        (verdict(0.6, 0.55, 0.65), verdict(0.52, 0.47, 0.57, utility=0.7), False, "budget was not enough"),
        (verdict(0.6, 0.55, 0.65), verdict(0.6, 0.56, 0.65), False, "budget was not enough"),
        (verdict(0.56, 0.51, 0.61), verdict(0.52, 0.47, 0.57), False, "budget was not enough"),
        (verdict(0.3, 0.25, 0.35), verdict(0.45, 0.4, 0.48), True, "score lower"),
        (verdict(0.3, 0.25, 0.35), verdict(0.2, 0.15, 0.25), False, "score lower"),
        (verdict(0.44, 0.39, 0.49), verdict(0.48, 0.43, 0.53), False, "score lower"),
    ],
)
def test_the_better_of_the_last_two_states_is_kept(
    make_trainer, make_network, forget, snapshot, same_bits, last, before, rewound, said
) -> None:
    network = make_network()
    handler, judge = run_judged(make_trainer, network, forget, last, before)
    assert len(judge.seen) == 2
    assert not same_bits(*judge.seen)
    assert same_bits(snapshot(network), judge.seen[int(rewound)])
    assert ("one epoch before" in handler.notes[0]) == rewound
    assert [note for note in handler.notes if said and said in note] == handler.notes[1:]


def test_of_too_few_for_an_interval_nothing_is_concluded(make_trainer, make_network, forget) -> None:
    handler, judge = run_judged(make_trainer, make_network(), forget, verdict(0.9))
    assert len(judge.seen) == 1
    assert "0.900 (no interval)." in handler.notes[0]
    assert "nothing was concluded" in handler.notes[1]
    assert len(handler.notes) == 2


def test_without_a_judge_the_notes_say_that_the_budget_was_fixed(make_trainer, forget) -> None:
    handler = PerturbAndRecover(forget, budget=0.5)
    make_trainer([handler], max_epochs=6).run()
    assert "No state was judged" in handler.notes[0]
    assert "50 %" in handler.notes[0]


def test_a_run_that_is_ended_early_keeps_the_last_whole_epoch_and_says_so(
    make_trainer, make_network, forget, on, snapshot, same_bits
) -> None:
    network = make_network()
    kept = []

    def stop(engine):
        if engine.state.iteration == 2 * engine.state.epoch_length + 1:
            engine.terminate()

    handlers = [
        PerturbAndRecover(forget, budget=0.9, judge=Judge(verdict(0.5, 0.45, 0.55))),
        on(Events.EPOCH_COMPLETED(once=2), lambda engine: kept.append(snapshot(network))),
        on(Events.ITERATION_COMPLETED, stop),
    ]
    make_trainer(handlers, network=network, max_epochs=6).run()
    assert same_bits(snapshot(network), kept[0])
    assert "ended early" in handlers[0].notes[0]


def test_a_run_of_less_than_one_pass_says_that_it_was_too_short(make_trainer, forget) -> None:
    handler = PerturbAndRecover(forget, budget=0.45)
    make_trainer([handler]).run()
    assert "allowed 2 of the 3 steps" in handler.notes[0]
    assert len(handler.notes) == 2


def test_a_loss_that_diverges_under_mixed_precision_is_rewound_too(make_trainer, forget, on, monkeypatch) -> None:
    def break_it(engine):
        if engine.state.epoch == 3:
            engine.state.output["loss"] = engine.state.output["loss"] * NAN

    monkeypatch.setattr("torch.cuda.amp.GradScaler", lambda: torch.amp.GradScaler("cpu"))
    handler = PerturbAndRecover(forget, budget=0.9)
    handlers = [on(IterationEvents.LOSS_COMPLETED, break_it), handler]
    make_trainer(handlers, max_epochs=6, amp=True, optim_set_to_none=True).run()
    assert "diverged" in handler.notes[0]


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_a_run_that_diverges_is_rewound_and_says_so(
    make_trainer, make_network, forget, on, snapshot, same_bits, where
) -> None:
    network = make_network()
    kept = []

    def break_it(engine):
        if engine.state.epoch == 3 and where == "loss":
            engine.state.output["loss"] = engine.state.output["loss"] * NAN

    def break_weights(engine):
        if engine.state.epoch == 3 and where == "weights":
            with torch.no_grad():
                network[0].weight.mul_(NAN)

    handlers = [
        on(IterationEvents.LOSS_COMPLETED, break_it),
        on(Events.EPOCH_COMPLETED, break_weights),
        PerturbAndRecover(forget, budget=0.9),
        on(Events.EPOCH_COMPLETED(once=2), lambda engine: kept.append(snapshot(network))),
    ]
    trainer = make_trainer(handlers, network=network, max_epochs=6)
    trainer.run()
    assert trainer.state.epoch == 3
    assert same_bits(snapshot(network), kept[0])
    assert "diverged" in handlers[2].notes[0]


def test_a_run_that_diverges_at_once_raises(make_trainer, forget, on) -> None:
    def break_it(engine):
        engine.state.output["loss"] = engine.state.output["loss"] * NAN

    with pytest.raises(RuntimeError, match=r"diverged before its first epoch ended.*Check the images for NaN"):
        make_trainer([on(IterationEvents.LOSS_COMPLETED, break_it), PerturbAndRecover(forget)], max_epochs=9).run()


# Bad input


@pytest.mark.parametrize("budget", [0, -0.1, NAN, math.inf])
def test_a_budget_that_is_none_raises(forget, budget) -> None:
    with pytest.raises(ValueError, match=r"budget should be above 0, but got .* 0\.3 for three tenths"):
        PerturbAndRecover(forget, budget=budget)


@pytest.mark.parametrize("scale", [-1, NAN])
def test_a_scale_that_is_none_raises(forget, scale) -> None:
    with pytest.raises(ValueError, match="scale should be a number of at least 0"):
        PerturbAndRecover(forget, scale=scale)


def test_a_budget_that_makes_no_step_raises_and_changes_nothing(
    make_trainer, make_network, forget, snapshot, same_bits
) -> None:
    network = make_network()
    before = snapshot(network)
    handler = PerturbAndRecover(forget, budget=0.2, judge=Judge(samples=3))
    with pytest.raises(ValueError, match=r"budget should allow at least one step.*Use a budget of at least 0\.35"):
        make_trainer([handler], network=network).run()
    assert same_bits(snapshot(network), before)
    handler.budget = 0.36
    trainer = make_trainer([PerturbAndRecover(forget, budget=0.36, judge=Judge(verdict(0.5), samples=3))])
    trainer.run()
    assert trainer.state.iteration == 1


def test_a_rate_of_0_raises(make_trainer, make_network, forget) -> None:
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    with pytest.raises(ValueError, match="learning rate should be above 0"):
        make_trainer([PerturbAndRecover(forget, budget=1.0)], network=network, optimizer=optimizer).run()


def test_a_network_without_kernels_is_refused(make_trainer, forget) -> None:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(1))
    with pytest.raises(RuntimeError, match="needs a weight of two or more dimensions"):
        make_trainer([PerturbAndRecover(forget, budget=1.0)], network=network).run()


@pytest.mark.parametrize("every_epoch", [True, False])
def test_a_schedule_of_the_rate_is_refused(
    make_trainer, make_network, forget, snapshot, same_bits, every_epoch
) -> None:
    network = make_network()
    before = snapshot(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    schedule = LrScheduleHandler(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2), epoch_level=every_epoch)
    handlers = [PerturbAndRecover(forget, budget=1.0), schedule]
    with pytest.raises(RuntimeError, match=r"has a LrScheduleHandler too\. Leave it out"):
        make_trainer(handlers, network=network, optimizer=optimizer).run()
    assert same_bits(snapshot(network), before)


def test_a_place_after_a_saver_is_refused(make_trainer, make_network, forget, tmp_path) -> None:
    network = make_network()
    saver = CheckpointSaver(str(tmp_path), {"net": network}, save_final=True)
    with pytest.raises(RuntimeError, match="stands after a CheckpointSaver"):
        make_trainer([saver, PerturbAndRecover(forget, budget=1.0)], network=network).run()
