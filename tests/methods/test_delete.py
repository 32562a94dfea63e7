"""DELETE: the true class of forget samples loses its mass, and the others keep their proportions."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Events
from method_tasks import IS_FORGET, LABELS, NETWORKS, task_of, with_labels
from monai.data import DataLoader, Dataset
from scipy.special import rel_entr, softmax
from torch import nn
from torch.nn import functional

from monai_unlearn.methods import DELETE, BatchNormPolicy, FineTune, SaliencyMask
from monai_unlearn.methods.delete import erasing_loss, without_true_class

FORGET = IS_FORGET.nonzero().view(-1).tolist()
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
SINGLE = {"classes": 3, "two_outputs": 2}


@pytest.fixture
def met(on):
    """The indices of each batch, and the handler that keeps them."""
    batches: list[list[int]] = []
    return batches, on(Events.ITERATION_COMPLETED, lambda engine: batches.append(engine.state.batch["index"].tolist()))


def batch_of(dataset, positions):
    images = torch.stack([dataset.data[i]["image"] for i in positions])
    return images, torch.stack([torch.as_tensor(dataset.data[i]["label"]) for i in positions])


def drawn(seed, n, classes, scale=5.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(n, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(classes, (n,), generator=generator)


# ---- the functions


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 6))
def test_the_others_share_the_true_classs_mass_in_proportion(seed, n, classes) -> None:
    _, logits, labels = drawn(seed, n, classes)
    given_ = logits.clone()
    before, after = logits.softmax(1).numpy(), without_true_class(logits, labels).softmax(1).numpy()
    assert torch.equal(logits, given_)
    for i, true in enumerate(labels.tolist()):
        expected = np.delete(before[i], true)
        assert after[i, true] == 0
        np.testing.assert_allclose(np.delete(after[i], true), expected / expected.sum(), rtol=1e-12)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 6))
def test_the_loss_is_the_divergence_of_the_target_from_the_student(seed, n, classes) -> None:
    student, teacher, labels = drawn(seed, n, classes)
    expected = 0.0
    for i, true in enumerate(labels.tolist()):
        target = np.insert(softmax(np.delete(teacher[i].numpy(), true)), true, 0.0)
        expected += rel_entr(target, softmax(student[i].numpy())).sum()
    for shape in (labels, labels[:, None]):
        assert math.isclose(erasing_loss(student, teacher, shape).item(), expected / n, rel_tol=1e-9)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 6))
def test_at_the_original_it_is_the_surprise_of_another_class_and_pulls_as_probabilities_say(seed, n, classes) -> None:
    _, teacher, labels = drawn(seed, n, classes, scale=2.0)
    student = teacher.clone().requires_grad_()
    loss = erasing_loss(student, teacher, labels)
    p = teacher.softmax(1)
    true = p[torch.arange(n), labels]
    torch.testing.assert_close(loss, -(1 - true).log().mean(), rtol=1e-8, atol=1e-10)
    target = p / (1 - true)[:, None]
    target[torch.arange(n), labels] = 0
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], (p - target) / n, rtol=1e-8, atol=1e-10)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_with_two_classes_it_is_cross_entropy_to_the_other_one(seed, n) -> None:
    student, teacher, labels = drawn(seed, n, 2)
    torch.testing.assert_close(erasing_loss(student, teacher, labels), functional.cross_entropy(student, 1 - labels))


def test_the_others_of_a_sure_answer_are_still_told_apart() -> None:
    """Of probabilities in float32, nothing would be left of them."""
    teacher = torch.tensor([[200.0, 1.0, 0.0]])
    assert teacher.softmax(1)[0, 1:].tolist() == [0, 0]
    torch.testing.assert_close(
        without_true_class(teacher, torch.tensor([0])).softmax(1), torch.tensor([[0.0, 0.7310586, 0.2689414]])
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype) -> None:
    student, teacher = torch.tensor([[30.0, -30.0, 0.0]], dtype=dtype), torch.tensor([[9.0, 20.0, -20.0]], dtype=dtype)
    loss = erasing_loss(student, teacher, torch.tensor([0]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(60, rel=1e-5)


@pytest.mark.parametrize(
    ("logits", "labels"), [((4, 1), (4,)), ((4,), (4,)), ((4, 3), (4, 3)), ((4, 3), (3,)), ((4, 3, 2), (4,))]
)
def test_outputs_and_labels_of_another_form_raise(logits, labels) -> None:
    with pytest.raises(ValueError, match="DELETE needs outputs of shape B × C with at least two classes and one class"):
        without_true_class(torch.zeros(logits), torch.zeros(labels))


@pytest.mark.parametrize("labels", [[0.0, 0.5], [-1, 0], [0, 3], [0.0, float("nan")]])
def test_labels_that_are_no_class_raise(labels) -> None:
    with pytest.raises(ValueError, match=r"labels should be whole numbers in \[0, 2\]"):
        without_true_class(torch.zeros(2, 3), torch.tensor(labels))


def test_outputs_of_two_shapes_raise() -> None:
    with pytest.raises(ValueError, match="student and teacher should both be B × C"):
        erasing_loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2))


# ---- training


@pytest.mark.parametrize("kind", SINGLE)
def test_float64_training_equals_a_hand_written_loop(make_trainer, make_network, forget, records, kind) -> None:
    data = with_labels(records, kind).data
    data = Dataset([{**record, "image": record["image"].double()} for record in data])
    network = make_network(classes=SINGLE[kind]).double()
    student, original = copy.deepcopy(network), copy.deepcopy(network).eval()
    handler = DELETE(forget)
    make_trainer([handler], network=network, dataset=data, batch_size=4, shuffle=False,
                 optimizer=torch.optim.SGD(network.parameters(), **SGD)).run()  # fmt: skip

    optimizer = torch.optim.SGD(student.parameters(), **SGD)
    for _ in range(2):
        for start in (0, 4, 8):
            images, labels = batch_of(data, FORGET[start : start + 4])
            with torch.no_grad():
                target = original(images).exp()
            target[torch.arange(len(images)), labels] = 0
            target /= target.sum(1, keepdim=True)
            ours = student.train()(images).log_softmax(1)
            loss = 0
            for p, q in zip(target, ours):
                others = p > 0
                loss = loss + (p[others] * (p[others].log() - q[others])).sum() / len(images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-10, atol=1e-11)
    assert handler.cost.samples == handler.cost.forward == 20
    assert handler.cost.backward == 0


def test_the_teacher_stays_the_original(make_trainer, make_network, forget, on) -> None:
    network = make_network()
    original = copy.deepcopy(network)
    handler = DELETE(forget)
    seen = []

    def check(engine):
        teacher = handler._teacher
        assert teacher is not engine.network
        assert not any(module.training for module in teacher.modules())
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert all(torch.equal(v, original.state_dict()[name]) for name, v in teacher.state_dict().items())
        seen.append(engine.state.iteration)

    make_trainer([handler, on(Events.ITERATION_COMPLETED, check)], network=network).run()
    assert len(seen) == 4
    assert all((p != q).any() for p, q in zip(network.parameters(), original.parameters()))
    assert handler._teacher is None


def test_only_forget_samples_are_met_each_once_an_epoch(make_trainer, forget, met) -> None:
    batches, keep = met
    make_trainer([DELETE(forget), keep], max_epochs=3).run()
    assert [len(batch) for batch in batches] == 3 * [8, 2]
    assert all(sorted(batches[i] + batches[i + 1]) == FORGET for i in (0, 2, 4))


def test_drop_last_takes_no_step_away_from_a_small_forget_set(make_trainer, forget, records, met) -> None:
    batches, keep = met
    loader = DataLoader(Dataset(records), batch_size=25, shuffle=True, drop_last=True)
    make_trainer([DELETE(forget), keep], train_data_loader=loader).run()
    assert [sorted(batch) for batch in batches] == 2 * [FORGET]


def test_the_true_class_loses_its_mass(make_trainer, make_network, forget, records) -> None:
    network = make_network()
    make_trainer([FineTune(forget)], network=network, max_epochs=15).run()
    images, labels = batch_of(Dataset(records), FORGET)
    rows = torch.arange(10)
    with torch.no_grad():
        before = network.eval()(images)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    handlers = [DELETE(forget), BatchNormPolicy(forget, policy="frozen")]
    make_trainer(handlers, network=network, optimizer=optimizer, max_epochs=40).run()
    with torch.no_grad():
        after = network.eval()(images)
    assert erasing_loss(after, before, labels) < 0.5 * erasing_loss(before, before, labels)
    assert after.softmax(1)[rows, labels].mean() < 0.5 * before.softmax(1)[rows, labels].mean()


def test_without_a_rate_no_weight_changes(make_trainer, make_network, forget) -> None:
    network = make_network()
    before = copy.deepcopy(network)
    make_trainer([DELETE(forget)], network=network, optimizer=torch.optim.SGD(network.parameters(), lr=0.0)).run()
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before.parameters()))


def test_accumulated_gradients_are_those_of_a_larger_batch(make_trainer, make_network, forget, double) -> None:
    states = []
    for batch_size, steps in ((5, 2), (10, 1)):
        network = make_network().double()
        handlers = [DELETE(forget), BatchNormPolicy(forget, policy="frozen")]
        trainer = make_trainer(handlers, network=network, dataset=double, batch_size=batch_size, shuffle=False)
        trainer.accumulation_steps = steps
        trainer.run()
        states.append(network.state_dict())
    torch.testing.assert_close(*states, rtol=1e-10, atol=1e-11)


@pytest.mark.filterwarnings("ignore::UserWarning")  # autocast and its scaler look for CUDA
def test_loss_scaling_changes_nothing_but_rounding(make_trainer, make_network, forget, on) -> None:
    def use_scaler(engine):
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    states = []
    for amp in (False, True):
        network = make_network()
        make_trainer([on(Events.STARTED, use_scaler), DELETE(forget)], network=network, amp=amp).run()
        states.append(network.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)


def test_other_handlers_still_find_both_parts(make_trainer, make_network, forget) -> None:
    network = make_network()
    saliency, statistics = SaliencyMask(forget), BatchNormPolicy(forget)
    before = copy.deepcopy(dict(network.named_parameters()))
    make_trainer([DELETE(forget), saliency, statistics], network=network).run()
    assert saliency.cost.samples == 10
    assert statistics.cost.samples == 20
    for name, parameter in network.named_parameters():
        frozen = ~saliency.mask[name]
        assert torch.equal(parameter[frozen], before[name][frozen])
    assert any((parameter != before[name]).any() for name, parameter in network.named_parameters())


@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_task_of_classes_and_network_is_taught(make_trainer, forget, records, kind, name) -> None:
    task = task_of(records, kind, name)
    network = task["network"]
    before = copy.deepcopy(network)
    make_trainer([DELETE(forget)], max_epochs=1, **task).run()
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert any((p != q).any() for p, q in zip(network.parameters(), before.parameters()))


# ---- loaders and bad input


def test_a_given_loader_is_used(make_trainer, forget, records, loader_of, met) -> None:
    batches, keep = met
    make_trainer([DELETE(forget, loader=loader_of(records[15:20], 3)), keep]).run()
    assert batches == 2 * [[15, 16, 17], [18, 19]]


def test_a_loader_without_a_batch_raises(make_trainer, forget, records) -> None:
    loader = DataLoader(Dataset(records[:3]), batch_size=8, drop_last=True)
    with pytest.raises(ValueError, match="loader of forget samples should give at least one batch, but gives none"):
        make_trainer([DELETE(forget, loader=loader)]).run()


@pytest.mark.parametrize("kind", ["findings", "one_output"])
def test_findings_and_single_outputs_are_refused_before_any_step(
    make_trainer, make_network, forget, records, snapshot, same_bits, kind
) -> None:
    outputs, _, loss = LABELS[kind]
    network = make_network(classes=outputs)
    before = snapshot(network)
    trainer = make_trainer([DELETE(forget)], network=network, dataset=with_labels(records, kind), loss_function=loss)
    with pytest.raises(ValueError, match=rf"DELETE, but is {type(loss).__name__}\. .*Use a method that takes them"):
        trainer.run()
    assert trainer.state.iteration == 0
    assert same_bits(snapshot(network), before)


def test_a_single_output_under_another_loss_is_refused(make_trainer, make_network, forget, records) -> None:
    given = {"network": make_network(classes=1), "dataset": with_labels(records, "one_output")}
    trainer = make_trainer([DELETE(forget)], loss_function=nn.MSELoss(), **given)
    with pytest.raises(ValueError, match="at least two classes and one class index a sample"):
        trainer.run()


def test_findings_that_are_known_to_be_such_are_refused_at_once(forget) -> None:
    with pytest.raises(ValueError, match=r"multi_label should be false with DELETE, but got True\. .*Use a method"):
        DELETE(forget, multi_label=True)
    with pytest.raises(ValueError, match="multi_label should be true or false, but got 'no'"):
        DELETE(forget, multi_label="no")


def test_one_hot_labels_are_refused(make_trainer, forget, records) -> None:
    dataset = Dataset([{**record, "label": torch.eye(3)[i % 3]} for i, record in enumerate(records)])
    with pytest.raises(ValueError, match="Turn one-hot vectors into class indices"):
        make_trainer([DELETE(forget)], dataset=dataset).run()
