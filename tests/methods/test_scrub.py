"""SCRUB: which loss each step has, in which order the passes come, and to which epoch it rewinds."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Events
from ignite.handlers import ProgressBar
from method_tasks import IS_FORGET, LABELS, NETWORKS, task_of, with_labels
from monai.data import DataLoader, Dataset
from monai.handlers import CheckpointSaver
from scipy.special import expit, rel_entr, softmax
from sklearn.metrics import accuracy_score
from torch import nn
from torch.distributions import Bernoulli, Categorical, kl_divergence
from torch.nn import functional

from monai_unlearn import ForgetSet
from monai_unlearn.handlers import CostClock
from monai_unlearn.methods import SCRUB, BatchNormPolicy, FineTune, SaliencyMask
from monai_unlearn.methods.scrub import distillation_loss, nearest_epoch, wrong_answers

NAN = float("nan")
FORGET = IS_FORGET.nonzero().view(-1).tolist()
RETAIN = [i for i in range(30) if not IS_FORGET[i]]
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def batch_of(dataset, positions):
    images = torch.stack([dataset.data[i]["image"] for i in positions])
    return images, torch.stack([torch.as_tensor(dataset.data[i]["label"]) for i in positions])


@pytest.fixture
def steps(on):
    """The indices of each step's batch with its epoch, and the handler that keeps them."""
    kept: list[tuple[int, list[int]]] = []
    return kept, on(
        Events.ITERATION_COMPLETED,
        lambda engine: kept.append((engine.state.epoch, engine.state.batch["index"].tolist())),
    )


@pytest.fixture
def unseen(loader_of):
    """A loader of twelve unseen samples like the records."""

    def make(kind="classes", batch_size=5):
        images = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(7))
        images += torch.arange(12).view(-1, 1, 1, 1) % 3
        return loader_of(with_labels([{"image": image} for image in images], kind).data, batch_size)

    return make


# ---- the functions


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 5), st.floats(0.1, 20))
def test_the_divergence_is_that_of_the_distributions(seed, n, outputs, temperature) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (5 * torch.randn(n, outputs, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = teacher.numpy() / temperature, student.numpy() / temperature
    expected = rel_entr(softmax(p, axis=1), softmax(q, axis=1)).sum() / n
    result = distillation_loss(student, teacher, temperature)
    assert math.isclose(result.item(), temperature**2 * expected, rel_tol=1e-9, abs_tol=1e-9)
    each = rel_entr(expit(p), expit(q)) + rel_entr(expit(-p), expit(-q))
    known = torch.rand(n, outputs, generator=generator) < 0.6
    for mask in (None, known):
        expected = sum(float(each[i, j]) for i in range(n) for j in range(outputs) if mask is None or known[i, j]) / n
        result = distillation_loss(student, teacher, temperature, True, mask)
        assert math.isclose(result.item(), temperature**2 * expected, rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize("findings", [False, True])
def test_equal_outputs_diverge_by_nothing_and_pull_nowhere(findings) -> None:
    teacher = torch.randn(5, 3, dtype=torch.float64)
    student = teacher.clone().requires_grad_()
    loss = distillation_loss(student, teacher, 4.0, findings)
    assert abs(loss.item()) < 1e-15
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-15


def test_the_divergence_is_of_the_teacher_from_the_student_and_not_the_other_way_round() -> None:
    student, teacher = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    expected = sum(0.5 * math.log(0.5 / q) for q in (1 / (1 + math.exp(-3)), 1 / (1 + math.exp(3))))
    assert distillation_loss(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-6)
    assert distillation_loss(teacher, student, 1.0).item() != pytest.approx(expected, rel=1e-2)


def test_the_size_of_the_gradient_hardly_depends_on_a_high_temperature() -> None:
    teacher = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
    sizes = []
    for temperature in (20.0, 200.0):
        student = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        loss = distillation_loss(student, teacher, temperature)
        sizes.append(torch.autograd.grad(loss, student)[0].norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("findings", [False, True])
def test_half_precision_is_computed_in_full(dtype, findings) -> None:
    student, teacher = torch.tensor([[30.0, -30.0]], dtype=dtype), torch.tensor([[-30.0, 30.0]], dtype=dtype)
    loss = distillation_loss(student, teacher, 0.5, findings)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.25 * 120, rel=1e-3)


@pytest.mark.parametrize(("one", "other"), [((2, 3), (2, 2)), ((2,), (2,)), ((2, 3, 4), (2, 3, 4))])
def test_outputs_of_another_shape_raise(one, other) -> None:
    with pytest.raises(ValueError, match="student and teacher should both be B × C"):
        distillation_loss(torch.zeros(one), torch.zeros(other), 1.0)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(2, 4))
def test_wrong_answers_are_those_of_scikit_learn_and_of_a_loop(seed, n, outputs) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, outputs, generator=generator)
    classes = torch.randint(outputs, (n,), generator=generator)
    for target in (classes, classes[:, None]):
        wrong, answers = wrong_answers(logits, target)
        assert answers == n
        assert wrong / answers == pytest.approx(1 - accuracy_score(classes, logits.argmax(1)))
    labels = torch.randint(2, (n, outputs), generator=generator).float()
    labels[torch.rand(n, outputs, generator=generator) < 0.4] = NAN
    rows = itertools.product(range(n), range(outputs))
    known = [(float(logits[i, j]) > 0, float(labels[i, j]) == 1) for i, j in rows if not labels[i, j].isnan()]
    assert wrong_answers(logits, labels, True) == (sum(p != y for p, y in known), len(known))
    assert wrong_answers(logits[:, :1], labels[:, 0], True) == wrong_answers(logits[:, :1], labels[:, :1], True)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=8), st.integers(0, 8))
def test_the_nearest_epoch_is_the_last_of_the_nearest(errors, reference) -> None:
    errors, reference = [error / 8 for error in errors], reference / 8
    epoch = nearest_epoch(errors, reference)
    own = abs(errors[epoch - 1] - reference)
    assert all(own <= abs(error - reference) for error in errors)
    assert all(own < abs(error - reference) for error in errors[epoch:])


# ---- training


def by_hand(network, data, forget_epochs, epochs, gamma, alpha, temperature, divergence, loss):
    """The whole method as a loop, in order and with batches of six; the weights after each epoch."""
    teacher = copy.deepcopy(network).eval()
    optimizer = torch.optim.SGD(network.parameters(), **SGD)
    network.train()
    states = []
    for epoch in range(epochs):
        passes = [(True, FORGET)] if epoch < forget_epochs else []
        for ascent, part in [*passes, (False, RETAIN)]:
            for start in range(0, len(part), 6):
                images, labels = batch_of(data, part[start : start + 6])
                outputs = network(images)
                with torch.no_grad():
                    targets = teacher(images)
                apart = temperature**2 * divergence(targets / temperature, outputs / temperature, labels)
                optimizer.zero_grad()
                (-apart if ascent else gamma * loss(outputs, labels) + alpha * apart).backward()
                optimizer.step()
        states.append(copy.deepcopy(network.state_dict()))
    return states


def of_classes(teacher, student, labels):
    return kl_divergence(Categorical(logits=teacher), Categorical(logits=student)).mean()


def of_findings(teacher, student, labels):
    each = kl_divergence(Bernoulli(logits=teacher), Bernoulli(logits=student))
    return sum(each[i][~labels[i].isnan()].sum() for i in range(len(labels))) / len(labels)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("forget_epochs", [0, 2, 5])
def test_float64_training_equals_a_hand_written_loop(
    make_trainer, make_network, forget, records, kind, forget_epochs
) -> None:
    outputs, _, loss = LABELS[kind]
    data = with_labels(records, kind).data
    data = Dataset(
        [
            {**r, "image": r["image"].double(), "label": r["label"] if outputs > 1 and r["label"].ndim == 0
             else r["label"].double()}
            for r in data
        ]
    )  # fmt: skip
    network = make_network(classes=outputs).double()
    expected = copy.deepcopy(network)
    settings = {"gamma": 0.9, "alpha": 0.3, "temperature": 2.0, "forget_epochs": forget_epochs}
    handler = SCRUB(forget, **settings)
    make_trainer([handler], network=network, dataset=data, batch_size=6, shuffle=False, max_epochs=3,
                 loss_function=loss, optimizer=torch.optim.SGD(network.parameters(), **SGD)).run()  # fmt: skip
    divergence = of_classes if kind in ("classes", "two_outputs") else of_findings
    state = by_hand(expected, data, epochs=3, divergence=divergence, loss=loss, **settings)[-1]
    for name, value in state.items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-10, atol=1e-11)
    passes = 3 * 20 + min(forget_epochs, 3) * 10
    assert handler.cost.samples == handler.cost.forward == passes
    assert handler.cost.backward == 0
    assert handler.tuning_cost.samples == 0


def test_without_divergence_it_is_fine_tuning_to_the_bit(
    make_trainer, make_network, forget, snapshot, same_bits
) -> None:
    network, plain = make_network(), make_network()
    handler = SCRUB(forget, forget_epochs=0, alpha=0, gamma=1)
    make_trainer([handler], network=network).run()
    make_trainer([FineTune(forget)], network=plain).run()
    assert same_bits(snapshot(network), snapshot(plain))
    assert handler.cost.samples == 0


@pytest.mark.parametrize("ids", [["P0", "P3"], ["P0", "P1", "P2", "P3", "P4"], ["P2"]])
@pytest.mark.parametrize(("forget_epochs", "epochs"), [(0, 3), (2, 5), (3, 3), (4, 2)])
def test_each_epoch_has_the_passes_that_it_should(make_trainer, steps, ids, forget_epochs, epochs) -> None:
    kept, keep = steps
    gone = {i for i in range(30) if f"P{i // 5}" in ids}
    trainer = make_trainer(
        [SCRUB(ForgetSet(ids, key="patient"), forget_epochs=forget_epochs), keep], batch_size=7, max_epochs=epochs
    )
    trainer.run()
    orders = set()
    for epoch in range(1, epochs + 1):
        own = [batch for number, batch in kept if number == epoch]
        met = [i for batch in own for i in batch]
        orders.add(tuple(met))
        first = len(gone) if epoch <= forget_epochs else 0
        assert sorted(met[:first]) == (sorted(gone) if first else [])
        assert sorted(met[first:]) == sorted(set(range(30)) - gone)
    assert len(orders) == epochs
    assert trainer.state.epoch == trainer.state.max_epochs == epochs


@pytest.mark.parametrize("ids", [["P0", "P3"], ["P0", "P1", "P2", "P3", "P4"]])
def test_clock_bar_and_schedules_see_epochs_of_one_length(make_trainer, capsys, on, ids) -> None:
    positions, ends, numbers = [], [], []
    bar, clock = ProgressBar(), CostClock()

    def look(engine):
        positions.append((engine.state.epoch, bar.pbar.n, bar.pbar.total))
        numbers.append(engine.state.iteration)

    def end(engine):
        ends.append(engine.state.iteration)

    gone, kept = 5 * len(ids), 30 - 5 * len(ids)
    forget_length, length = -(-gone // 7), -(-gone // 7) - (-kept // 7)
    handlers = [SCRUB(ForgetSet(ids, key="patient"), forget_epochs=2), clock, bar]
    make_trainer(
        [*handlers, on(Events.ITERATION_COMPLETED, look), on(Events.EPOCH_COMPLETED, end)], batch_size=7, max_epochs=4
    ).run()
    capsys.readouterr()
    assert ends == [length, 2 * length, 3 * length, 4 * length]
    assert all(one < other for one, other in itertools.pairwise(numbers))
    for epoch in range(1, 5):
        own = [(n, total) for number, n, total in positions if number == epoch]
        start = 0 if epoch <= 2 else forget_length
        assert [n for n, _ in own] == list(range(start + 1, length + 1))
        assert {total for _, total in own} == {length}
    assert clock.cost.samples == clock.cost.backward == 4 * kept + 2 * gone
    assert clock.cost.seconds > 0


def test_the_teacher_stays_the_original(make_trainer, make_network, forget, on) -> None:
    network = make_network()
    original = copy.deepcopy(network).eval()
    handler = SCRUB(forget)
    probe = torch.randn(4, 1, 6, 6)

    def check(engine):
        teacher = handler._teacher
        assert teacher is not engine.network
        assert not any(module.training for module in teacher.modules())
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert torch.equal(teacher(probe), original(probe))
        seen.append(engine.state.iteration)

    seen: list[int] = []
    make_trainer([handler, on(Events.ITERATION_COMPLETED, check)], network=network).run()
    assert len(seen) == 10
    assert any((p != q).any() for p, q in zip(network.parameters(), original.parameters()))
    assert handler._teacher is None


def test_the_forget_set_is_left_and_the_retain_set_is_kept(make_trainer, make_network, forget, records) -> None:
    network = make_network()
    make_trainer([FineTune(ForgetSet([29]))], network=network, max_epochs=15).run()
    original = copy.deepcopy(network).eval()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    make_trainer([SCRUB(forget, forget_epochs=3)], network=network, optimizer=optimizer, max_epochs=4).run()
    apart = {}
    with torch.no_grad():
        for name, part in (("forget", FORGET), ("retain", RETAIN)):
            images, labels = batch_of(Dataset(records), part)
            losses = [functional.cross_entropy(model.eval()(images), labels) for model in (original, network)]
            apart[name] = float(losses[1] - losses[0])
    assert apart["forget"] > 0.1
    assert apart["retain"] < apart["forget"] / 2


def test_masked_weights_do_not_move_even_when_it_rewinds(make_trainer, make_network, forget, unseen) -> None:
    network = make_network()
    saliency, statistics = SaliencyMask(forget), BatchNormPolicy(forget)
    before = copy.deepcopy(dict(network.named_parameters()))
    make_trainer([SCRUB(forget, rewind_loader=unseen()), saliency, statistics], network=network, max_epochs=3).run()
    assert statistics.cost.samples == 20
    for name, parameter in network.named_parameters():
        frozen = ~saliency.mask[name]
        assert torch.equal(parameter[frozen], before[name][frozen])
    assert any((parameter != before[name]).any() for name, parameter in network.named_parameters())


@pytest.mark.filterwarnings("ignore::UserWarning")  # autocast and its scaler look for CUDA
def test_loss_scaling_changes_nothing_but_rounding(make_trainer, make_network, forget, on) -> None:
    def use_scaler(engine):
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    states = []
    for amp in (False, True):
        network = make_network()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        handlers = [on(Events.STARTED, use_scaler), SCRUB(forget, alpha=0.5)]
        make_trainer(handlers, network=network, optimizer=optimizer, amp=amp, max_epochs=3).run()
        states.append(network.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_task_and_network_is_scrubbed(make_trainer, forget, records, kind, name) -> None:
    task = task_of(records, kind, name)
    network = task["network"]
    before = copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001)
    make_trainer([SCRUB(forget, forget_epochs=1)], optimizer=optimizer, **task).run()
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert any((p != q).any() for p, q in zip(network.parameters(), before.parameters()))


# ---- rewinding


@pytest.mark.parametrize("kind", LABELS)
def test_it_rewinds_to_the_epoch_that_a_search_by_hand_finds(
    make_trainer, make_network, forget, records, unseen, snapshot, same_bits, on, kind
) -> None:
    outputs, _, loss = LABELS[kind]
    network = make_network(classes=outputs)
    data = with_labels(records, kind)
    states = []

    def keep(engine):
        states.append(snapshot(engine.network))

    def error(state, images, labels):
        other = make_network(classes=outputs)
        other.load_state_dict(state)
        with torch.no_grad():
            logits = other.eval()(images)
        if kind in ("classes", "two_outputs"):
            return 1 - accuracy_score(labels, logits.argmax(1))
        known = ~labels.isnan()
        return 1 - accuracy_score(labels[known] > 0.5, logits[known] > 0)

    handler = SCRUB(forget, forget_epochs=3, rewind_loader=unseen(kind))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3, momentum=0.5)
    make_trainer([on(Events.EPOCH_COMPLETED, keep), handler], network=network, dataset=data, loss_function=loss,
                 optimizer=optimizer, max_epochs=6).run()  # fmt: skip
    errors = [error(state, *batch_of(data, FORGET)) for state in states]
    others = unseen(kind).dataset
    reference = error(states[-1], *batch_of(others, range(12)))
    assert handler.errors == pytest.approx(errors)
    assert handler.reference_error == pytest.approx(reference)
    distances = [round(abs(e - reference), 9) for e in errors]
    chosen = max(i for i, d in enumerate(distances) if d == min(distances))
    assert handler.epoch == chosen + 1
    assert same_bits(snapshot(network), states[chosen])
    assert handler.tuning_cost.samples == handler.tuning_cost.forward == 6 * 10 + 12
    assert handler.tuning_cost.backward == 0
    assert handler.tuning_cost.seconds > 0
    assert handler._states == []


def test_an_earlier_epoch_is_chosen_where_it_is_nearer(
    make_trainer, make_network, forget, unseen, snapshot, same_bits, on, monkeypatch
) -> None:
    """Errors as in the paper: the final model answers the forget set worse than unseen samples."""
    network, states = make_network(), []
    found = iter([0.1, 0.3, 0.6, 0.9, 0.25])
    monkeypatch.setattr(SCRUB, "_error", lambda *arguments: next(found))
    handler = SCRUB(forget, rewind_loader=unseen())
    keep = on(Events.EPOCH_COMPLETED, lambda engine: states.append(snapshot(engine.network)))
    make_trainer([handler, keep], network=network, max_epochs=4).run()
    assert handler.epoch == 2
    assert same_bits(snapshot(network), states[1])
    assert not same_bits(snapshot(network), states[3])


def test_looking_for_the_rewind_does_not_change_the_training(
    make_trainer, make_network, forget, unseen, snapshot, same_bits, on
) -> None:
    states: list[list] = [[], []]
    for kept, loader in zip(states, (None, unseen())):
        network = make_network()
        network.insert(2, nn.Dropout(0.3))
        torch.manual_seed(3)
        keep = on(Events.EPOCH_COMPLETED, lambda engine, kept=kept: kept.append(snapshot(engine.network)))
        make_trainer([SCRUB(forget, rewind_loader=loader), keep], network=network, max_epochs=3).run()
    assert all(same_bits(one, other) for one, other in zip(*states))


def test_the_clock_does_not_count_the_search_among_the_updates(make_trainer, forget, unseen) -> None:
    clock = CostClock()
    make_trainer([SCRUB(forget, forget_epochs=1, rewind_loader=unseen()), clock], max_epochs=3).run()
    assert clock.cost.samples == 3 * 20 + 10


def test_a_second_run_begins_anew(make_trainer, make_network, forget, unseen) -> None:
    handler = SCRUB(forget, rewind_loader=unseen())
    trainer = make_trainer([handler], max_epochs=3)
    trainer.run()
    trainer.run()
    assert len(handler.errors) == 3
    assert trainer.state.epoch == 3
    assert handler.tuning_cost.samples == 3 * 10 + 12


def test_a_given_forget_loader_is_used_for_the_error_too(make_trainer, forget, records, loader_of, unseen) -> None:
    class NoRecords(torch.utils.data.Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, index):
            raise AssertionError("the trainer's own data should not be touched")

    handler = SCRUB(
        forget,
        forget_epochs=1,
        loader=loader_of(records[5:12], 3),
        forget_loader=loader_of(records[:5], 5),
        rewind_loader=unseen(),
    )
    make_trainer([handler], dataset=NoRecords()).run()
    assert handler.cost.samples == 5 + 2 * 7
    assert handler.tuning_cost.samples == 2 * 5 + 12


def test_a_saver_before_a_rewind_is_refused(make_trainer, make_network, forget, unseen, tmp_path) -> None:
    network = make_network()
    saver = CheckpointSaver(str(tmp_path), {"network": network}, save_final=True)
    with pytest.raises(RuntimeError, match="SCRUB stands after a CheckpointSaver"):
        make_trainer([saver, SCRUB(forget, rewind_loader=unseen())], network=network).run()
    make_trainer([saver, SCRUB(forget)], network=network).run()  # without a rewind nothing changes at the end


def test_statistics_that_a_rewind_would_undo_are_refused(make_trainer, forget, unseen) -> None:
    with pytest.raises(RuntimeError, match=r"SCRUB stands after a BatchNormPolicy.*Put it before"):
        make_trainer([BatchNormPolicy(forget), SCRUB(forget, rewind_loader=unseen())]).run()
    make_trainer([BatchNormPolicy(forget), SCRUB(forget)]).run()


def test_a_run_that_ends_within_its_first_epoch_can_not_rewind(make_trainer, forget, unseen, on) -> None:
    stop = on(Events.ITERATION_COMPLETED, lambda engine: engine.terminate())
    with pytest.raises(RuntimeError, match="ended within its first epoch"):
        make_trainer([SCRUB(forget, rewind_loader=unseen()), stop]).run()


@pytest.mark.parametrize("part", ["forget", "rewind"])
def test_samples_without_a_known_label_raise(make_trainer, make_network, forget, records, unseen, part) -> None:
    data = with_labels(records, "findings")
    other = unseen("findings")
    for record in data.data if part == "forget" else other.dataset.data:
        record["label"] = torch.full((2,), NAN)
    trainer = make_trainer(
        [SCRUB(forget, rewind_loader=other)],
        network=make_network(classes=2),
        dataset=data,
        loss_function=LABELS["findings"][2],
    )
    with pytest.raises(ValueError, match=f"loader of {part} samples should give at least one known label"):
        trainer.run()


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forget_epochs": -1}, "forget_epochs should be a whole number of at least 0, but got -1"),
        ({"forget_epochs": 1.5}, "forget_epochs should be a whole number"),
        ({"forget_epochs": True}, "forget_epochs should be a whole number"),
        ({"alpha": -0.1}, "alpha should be a number of at least 0, but got -0.1"),
        ({"alpha": NAN}, "alpha should be a number of at least 0"),
        ({"gamma": math.inf}, "gamma should be a number of at least 0"),
        ({"alpha": 0, "gamma": 0}, "alpha or gamma should be greater than 0, but both are 0"),
        ({"temperature": 0}, "temperature should be greater than 0, but got 0"),
        ({"temperature": NAN}, "temperature should be greater than 0"),
        ({"multi_label": "no"}, "multi_label should be true, false or None, but got 'no'"),
    ],
    ids=str,
)
def test_an_argument_outside_its_range_raises(forget, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        SCRUB(forget, **arguments)


def test_accumulated_gradients_are_refused(make_trainer, forget) -> None:
    trainer = make_trainer([SCRUB(forget)])
    trainer.accumulation_steps = 2
    with pytest.raises(ValueError, match="accumulation_steps should be 1 with SCRUB, but is 2"):
        trainer.run()


def test_a_loss_of_probabilities_is_refused(make_trainer, make_network, forget, records) -> None:
    network = nn.Sequential(make_network(classes=1), nn.Sigmoid())
    dataset = with_labels(records, "one_output")
    with pytest.raises(TypeError, match="outputs are logits, but BCELoss takes probabilities"):
        make_trainer([SCRUB(forget)], network=network, dataset=dataset, loss_function=nn.BCELoss()).run()


@pytest.mark.parametrize("part", ["retain", "forget"])
def test_a_loader_without_a_batch_raises(make_trainer, forget, records, part) -> None:
    empty = DataLoader(Dataset(records[:3]), batch_size=8, drop_last=True)
    given = {"loader" if part == "retain" else "forget_loader": empty}
    with pytest.raises(ValueError, match=f"loader of {part} samples should give at least one batch, but gives none"):
        make_trainer([SCRUB(forget, **given)]).run()


def test_labels_that_are_neither_classes_nor_findings_raise(make_trainer, forget, records, unseen) -> None:
    dataset = Dataset([{**record, "label": torch.eye(3)[i % 3]} for i, record in enumerate(records)])
    with pytest.raises(ValueError, match="SCRUB needs outputs of shape B × C and labels that are one class index"):
        make_trainer([SCRUB(forget, rewind_loader=unseen())], dataset=dataset).run()
    with pytest.raises(ValueError, match="labels that are findings, as many as outputs"):
        make_trainer([SCRUB(forget, multi_label=True)]).run()
