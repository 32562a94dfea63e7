"""Retraining: nothing of the trainer's past may survive, and no forget sample may be met."""

from __future__ import annotations

import copy

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.handlers import CheckpointLoader, LrScheduleHandler
from torch import nn
from torch.optim import lr_scheduler

from monai_unlearn import ForgetSet
from monai_unlearn.methods import Retrain
from monai_unlearn.methods.retrain import restore

IS_FORGET = [i // 5 in (0, 3) for i in range(30)]
EPOCHS = 4

SCHEDULES = {
    "none": None,
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, gamma=0.1),
    "multi_step": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 3], gamma=0.1),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (epoch + 2)),
    "linear": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
    "constant": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=2),
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.5),
    "polynomial": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, total_iters=EPOCHS, power=2),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS),
    "one_cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=EPOCHS + 1),
}


class Used:
    """A trainer whose network, optimizer and schedule have already been through a training on everything."""

    def __init__(self, make_trainer, network, schedule=None, optimizer=None, **changes):
        self.network, self.rates = network, []
        optimizer = optimizer or torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        self.scheduler = SCHEDULES[schedule](optimizer) if schedule and SCHEDULES[schedule] else None
        handlers = [LrScheduleHandler(self.scheduler, print_lr=False)] if self.scheduler else []
        self.trainer = make_trainer(handlers, network=network, optimizer=optimizer, max_epochs=EPOCHS, **changes)

        def record(engine):
            group = engine.optimizer.param_groups[0]
            self.rates.append((group["lr"], group.get("momentum")))

        self.trainer.add_event_handler(Events.EPOCH_STARTED, record)

    def run(self, seed=0):
        torch.manual_seed(seed)
        generator = getattr(self.trainer.data_loader, "generator", None)
        if generator is not None:
            generator.manual_seed(seed)
        self.rates.clear()
        self.trainer.run()
        return self


@pytest.fixture
def retain_records(records):
    return [record for i, record in enumerate(records) if not IS_FORGET[i]]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_used_trainer_retrains_as_a_fresh_one_on_the_retain_set(
    make_trainer, make_network, forget, retain_records, snapshot, same_bits, schedule
) -> None:
    used = Used(make_trainer, make_network(), schedule).run(seed=3)
    trained = snapshot(used.network)
    Retrain(forget, initial_state=make_network().state_dict()).attach(used.trainer)
    used.run(seed=0)
    fresh = Used(make_trainer, make_network(), schedule, dataset=Dataset(retain_records)).run(seed=0)
    assert used.rates == fresh.rates
    assert len(used.rates) == EPOCHS
    assert used.trainer.state.iteration == fresh.trainer.state.iteration == 3 * EPOCHS
    assert same_bits(snapshot(used.network), snapshot(fresh.network))
    assert not same_bits(trained, snapshot(used.network))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_the_optimizers_state_is_dropped(
    make_trainer, make_network, forget, retain_records, snapshot, same_bits, name
) -> None:
    def build(network):
        return getattr(torch.optim, name)(network.parameters(), lr=0.01, weight_decay=0.1)

    network = make_network()
    used = Used(make_trainer, network, optimizer=build(network)).run(seed=3)
    Retrain(forget, initial_state=make_network).attach(used.trainer)
    used.run()
    other = make_network()
    fresh = Used(make_trainer, other, optimizer=build(other), dataset=Dataset(retain_records)).run()
    assert same_bits(snapshot(used.network), snapshot(fresh.network))


@pytest.mark.parametrize(
    "form", ["live_state_dict", "live_network", "network", "function", "path", "Path", "key", "module"]
)
def test_every_form_of_the_initial_state_is_taken(
    make_trainer, make_network, forget, retain_records, snapshot, same_bits, form, tmp_path
) -> None:
    network = make_network()
    network[1].running_mean.fill_(0.5)
    network[1].num_batches_tracked.fill_(11)
    start = copy.deepcopy(network)
    state = start.state_dict()
    torch.save({"model": state} if form == "key" else state, tmp_path / "start.pt")
    given = {
        "live_state_dict": network.state_dict(),
        "live_network": network,
        "network": start,
        "function": lambda: start.state_dict(),
        "path": str(tmp_path / "start.pt"),
        "Path": tmp_path / "start.pt",
        "key": tmp_path / "start.pt",
        "module": {f"module.{name}": value for name, value in state.items()},
    }[form]
    handler = Retrain(forget, initial_state=given)
    used = Used(make_trainer, network).run(seed=3)
    handler.attach(used.trainer)
    used.run()
    fresh = Used(make_trainer, copy.deepcopy(start), dataset=Dataset(retain_records)).run()
    assert same_bits(snapshot(network), snapshot(fresh.network))
    assert network[1].num_batches_tracked == 11 + 3 * EPOCHS


def test_all_parameters_and_buffers_are_restored_before_the_first_step(
    make_trainer, make_network, forget, snapshot, same_bits
) -> None:
    network, start = make_network(), make_network(seed=9)
    for value in start.buffers():
        value.fill_(3)
    trainer = make_trainer([Retrain(forget, initial_state=start)], network=network)
    trainer.fire_event(Events.STARTED)
    assert same_bits(snapshot(network), snapshot(start))


def test_a_wrapped_network_is_restored(make_trainer, make_network, forget, snapshot, same_bits) -> None:
    network, start = make_network(), make_network(seed=9)
    trainer = make_trainer([Retrain(forget, initial_state=start)], network=nn.DataParallel(network))
    trainer.fire_event(Events.STARTED)
    assert same_bits(snapshot(network), snapshot(start))


def test_only_retain_samples_are_met(make_trainer, make_network, forget, on) -> None:
    met = []
    keep = on(Events.ITERATION_COMPLETED, lambda engine: met.extend(engine.state.batch["index"].tolist()))
    make_trainer([Retrain(forget, initial_state=make_network), keep]).run()
    assert sorted(met) == sorted(2 * [i for i in range(30) if not IS_FORGET[i]])


def test_the_same_trainer_retrains_twice_alike(make_trainer, make_network, forget, snapshot, same_bits) -> None:
    used = Used(make_trainer, make_network(), "one_cycle")
    Retrain(forget, initial_state=make_network).attach(used.trainer)
    first = snapshot(used.run().network)
    assert same_bits(first, snapshot(used.run().network))


def test_a_given_loader_is_used(make_trainer, make_network, forget, retain_records, snapshot, same_bits) -> None:
    class NoRecords(torch.utils.data.Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, index):
            raise AssertionError("the trainer's own data should not be touched")

    def loader():
        return DataLoader(Dataset(retain_records[:12]), batch_size=4)

    network, other = make_network(), make_network()
    handler = Retrain(forget, initial_state=make_network, loader=loader())
    trainer = make_trainer([handler], network=network, dataset=NoRecords())
    trainer.run()
    make_trainer([], network=other, train_data_loader=loader()).run()
    assert trainer.state.epoch_length == 3
    assert same_bits(snapshot(network), snapshot(other))


def incomplete(state):
    return {name: value for name, value in state.items() if name != "1.running_mean"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (incomplete, "1 are missing, 0 have another shape and 0 are unknown \\(first: 1.running_mean\\)"),
        (lambda state: {**state, "6.weight": torch.ones(1)}, "0 are missing, 0 have another shape and 1 are unknown"),
        (lambda state: {**state, "5.bias": torch.ones(9)}, "0 are missing, 1 have another shape.*first: 5.bias"),
        (lambda state: {}, "9 are missing"),
    ],
    ids=["missing", "unknown", "shape", "empty"],
)
def test_an_initial_state_of_another_network_raises_and_changes_nothing(
    make_trainer, make_network, forget, snapshot, same_bits, change, message
) -> None:
    network = make_network()
    before = snapshot(network)
    handler = Retrain(forget, initial_state=change(make_network(seed=5).state_dict()))
    with pytest.raises(ValueError, match=f"exactly the network's 9 parameters and buffers, but {message}"):
        make_trainer([handler], network=network).run()
    assert same_bits(before, snapshot(network))


@pytest.mark.parametrize("wrapped", [False, True])
def test_only_the_named_parameters_and_buffers_are_restored(make_network, snapshot, same_bits, wrapped) -> None:
    network, start = make_network(), make_network(seed=9)
    start[1].running_mean.fill_(3)
    if wrapped:
        network = nn.DataParallel(network)
    before, names = snapshot(network), [name for name in network.state_dict() if "1.running_mean" in name]
    names += [name for name in network.state_dict() if "5." in name]
    restore(network, start, names)
    state = {name.removeprefix("module."): value for name, value in network.state_dict().items()}
    expected = {name.removeprefix("module."): value for name, value in before.items()}
    for name in ("1.running_mean", "5.weight", "5.bias"):
        assert not torch.equal(state[name], expected[name])
        expected[name] = start.state_dict()[name]
    assert same_bits(state, expected)


def test_names_that_the_network_does_not_have_raise_and_change_nothing(make_network, snapshot, same_bits) -> None:
    network = make_network()
    before = snapshot(network)
    with pytest.raises(ValueError, match=r"names should be those .* 1 are not \(first: 9\.weight\)"):
        restore(network, make_network(seed=9), ["5.weight", "9.weight"])
    assert same_bits(snapshot(network), before)


def test_a_missing_checkpoint_raises(make_trainer, forget, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        make_trainer([Retrain(forget, initial_state=tmp_path / "none.pt")]).run()


def test_an_empty_retain_set_raises(make_trainer, make_network) -> None:
    everyone = ForgetSet([f"P{i}" for i in range(6)], key="patient")
    with pytest.raises(ValueError, match="all 30 are to be forgotten"):
        make_trainer([Retrain(everyone, initial_state=make_network)]).run()


def test_a_loader_without_a_batch_raises(make_trainer, make_network, forget, records) -> None:
    loader = DataLoader(Dataset(records[:3]), batch_size=8, drop_last=True)
    with pytest.raises(ValueError, match="should give at least one batch, but gives none"):
        make_trainer([Retrain(forget, initial_state=make_network, loader=loader)]).run()


def test_a_retain_set_smaller_than_a_batch_is_trained_on_although_drop_last_is_set(
    make_trainer, make_network, forget, records
) -> None:
    loader = DataLoader(Dataset(records), batch_size=25, shuffle=True, drop_last=True)
    trainer = make_trainer([Retrain(forget, initial_state=make_network)], train_data_loader=loader)
    trainer.run()
    assert trainer.state.iteration == 2


def test_a_checkpoint_loader_after_it_is_refused(make_trainer, make_network, forget, tmp_path) -> None:
    torch.save({"net": make_network(seed=5).state_dict()}, tmp_path / "trained.pt")
    network = make_network()
    loader = CheckpointLoader(str(tmp_path / "trained.pt"), {"net": network})
    with pytest.raises(RuntimeError, match="Retrain stands before a CheckpointLoader"):
        make_trainer([Retrain(forget, initial_state=make_network), loader], network=network).run()


def test_a_checkpoint_loader_before_it_is_overruled(
    make_trainer, make_network, forget, tmp_path, snapshot, same_bits
) -> None:
    torch.save({"net": make_network(seed=5).state_dict()}, tmp_path / "trained.pt")
    network, plain = make_network(), make_network()
    loader = CheckpointLoader(str(tmp_path / "trained.pt"), {"net": network})
    make_trainer([loader, Retrain(forget, initial_state=make_network)], network=network).run()
    make_trainer([Retrain(forget, initial_state=make_network)], network=plain).run()
    assert same_bits(snapshot(network), snapshot(plain))


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
        lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1),
    ],
    ids=["warm_restarts", "cyclic"],
)
def test_a_used_schedule_that_cannot_start_again_raises(make_trainer, make_network, forget, schedule) -> None:
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    scheduler = schedule(optimizer)
    handlers = [LrScheduleHandler(scheduler, print_lr=False)]
    trainer = make_trainer(handlers, network=network, optimizer=optimizer)
    Retrain(forget, initial_state=make_network).attach(trainer)
    trainer.run()  # as it was made
    with pytest.raises(RuntimeError, match=f"A {type(scheduler).__name__} that has already taken steps"):
        trainer.run()
