"""Boundary shrink: the step up the original's loss, the nearest wrong label, and training on it alone."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Events
from method_tasks import IS_FORGET, LABELS, NETWORKS, task_of, with_labels
from monai.data import DataLoader, Dataset
from monai.engines.utils import IterationEvents
from torch import nn
from torch.nn import functional

from monai_unlearn import ForgetSet
from monai_unlearn.methods import BatchNormPolicy, BoundaryShrink, FineTune, SaliencyMask
from monai_unlearn.methods._adversarial import input_gradients, within_range, wrong_class
from monai_unlearn.methods.boundary_shrink import signed_step, wrong_findings

NAN = float("nan")
FORGET = IS_FORGET.nonzero().view(-1).tolist()


def batch_of(dataset, positions):
    images = torch.stack([dataset.data[i]["image"] for i in positions])
    return images, torch.stack([torch.as_tensor(dataset.data[i]["label"]) for i in positions])


def in_double(dataset):
    def label(value):
        return value.double() if value.is_floating_point() else value

    return Dataset([{**r, "image": r["image"].double(), "label": label(r["label"])} for r in dataset.data])


# ---- the functions


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 5))
def test_the_gradient_of_a_linear_network_is_that_of_the_formula(seed, n, outputs) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, bias, images = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((outputs, 4), (outputs,), (n, 4))
    )
    labels = torch.randint(outputs, (n,), generator=generator)
    gradients, logits = input_gradients(lambda x: x @ weight.T + bias, images, labels)
    assert not logits.requires_grad
    for i in range(n):
        z = weight @ images[i] + bias
        torch.testing.assert_close(logits[i], z)
        slope = z.exp() / z.exp().sum() - torch.eye(outputs, dtype=torch.float64)[labels[i]]
        torch.testing.assert_close(gradients[i], weight.T @ slope)
    known = torch.rand(n, outputs, generator=generator) < 0.6
    true = torch.rand(n, outputs, generator=generator, dtype=torch.float64)
    gradients, _ = input_gradients(lambda x: x @ weight.T + bias, images, true.masked_fill(~known, NAN), True)
    for i in range(n):
        z = weight @ images[i] + bias
        torch.testing.assert_close(gradients[i], weight.T @ ((z.sigmoid() - true[i]) * known[i]))


def test_the_gradient_leaves_no_trace(make_network) -> None:
    network, images = make_network().eval(), torch.randn(3, 1, 6, 6)
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():  # as in an evaluation
        gradients, _ = input_gradients(network, images, torch.tensor([0, 1, 2]))
    assert gradients.abs().sum() > 0
    assert images.grad is None
    assert not images.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0.01, 100), st.floats(-100, 100))
def test_the_step_stays_within_the_image_and_scales_with_it(seed, bound, factor, shift) -> None:
    generator = torch.Generator().manual_seed(seed)
    images, gradients = (torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    moved = signed_step(images, gradients, bound)
    for image, gradient, result in zip(images, gradients, moved):
        low, high = float(image.min()), float(image.max())
        for value, slope, found in zip(image.flatten(), gradient.flatten(), result.flatten()):
            expected = float(value) + bound * (high - low) * (1 if slope > 0 else -1)
            assert found.item() == pytest.approx(min(max(expected, low), high), abs=1e-12)
    # [0, 1] or [-1, 1] or unit variance: it is the same step.
    other = signed_step(factor * images + shift, gradients, bound)
    torch.testing.assert_close(other, factor * moved + shift, rtol=1e-9, atol=1e-9)


def test_an_image_without_contrast_and_one_without_slope_stay() -> None:
    images = torch.stack([torch.ones(1, 2, 2), torch.rand(1, 2, 2)])
    gradients = torch.stack([torch.randn(1, 2, 2), torch.zeros(1, 2, 2)])
    assert torch.equal(signed_step(images, gradients, 0.3), images)
    assert torch.equal(within_range(images + 9, images)[0], images[0])


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(2, 5))
def test_the_wrong_class_is_the_best_of_the_others(seed, n, classes) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    for row, true, found in zip(logits.tolist(), labels.tolist(), wrong_class(logits, labels).tolist()):
        assert found == max((value, c) for c, value in enumerate(row) if c != true)[1]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 4))
def test_the_wrong_findings_are_the_most_probable_of_all_other_vectors(seed, n, findings) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, findings, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (n, findings), generator=generator).double()
    labels[torch.rand(n, findings, generator=generator) < 0.3] = NAN
    found = wrong_findings(logits, labels)
    assert torch.equal(found.isnan(), labels.isnan())
    for z, true, result in zip(logits, labels, found):
        known = [j for j in range(findings) if not true[j].isnan()]
        if not known:
            continue
        vectors = itertools.product((0.0, 1.0), repeat=len(known))
        others = [vector for vector in vectors if list(vector) != [float(true[j]) for j in known]]

        def probability(vector, z=z, known=known):
            return math.prod(float((z[j] if y else -z[j]).sigmoid()) for j, y in zip(known, vector))

        assert probability([float(result[j]) for j in known]) == pytest.approx(max(map(probability, others)))
        assert [float(result[j]) for j in known] in [list(vector) for vector in others]


def test_a_label_of_one_half_has_no_other_and_soft_ones_are_mirrored() -> None:
    logits = torch.tensor([[0.1, 3.0], [0.1, -3.0]])
    labels = torch.tensor([[0.5, 0.9], [0.5, 0.5]])
    torch.testing.assert_close(wrong_findings(logits, labels), torch.tensor([[0.5, 0.1], [0.5, 0.5]]))


# ---- training


def label_by_hand(kind, original, image, true, bound):
    """The label to train one sample on, by the definition."""
    image = image[None].clone().requires_grad_()
    logits = original(image)[0]
    if kind in ("classes", "two_outputs"):
        loss = -logits.log_softmax(0)[true]
    else:
        known = [j for j in range(len(logits)) if not true[j].isnan()]
        loss = sum(functional.binary_cross_entropy_with_logits(logits[j], true[j]) for j in known)
    (slope,) = torch.autograd.grad(loss, image)
    with torch.no_grad():
        low, high = image.min(), image.max()
        moved = (image + bound * (high - low) * slope.sign()).clamp(low, high)
        logits = original(moved)[0]
    if kind in ("classes", "two_outputs"):
        return torch.tensor(max((float(z), c) for c, z in enumerate(logits) if c != true)[1])
    result = true.clone()
    wrong = [j for j in known if (logits[j] > 0) != (true[j] == 1)]
    for j in wrong or [min(known, key=lambda j: abs(float(logits[j])))]:
        result[j] = 1 - true[j]
    return result


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("bound", [0.1, 0.0, 1.0])
def test_float64_training_equals_a_hand_written_loop(make_trainer, make_network, forget, records, kind, bound) -> None:
    outputs, _, loss = LABELS[kind]
    data = in_double(with_labels(records, kind))
    network = make_network(classes=outputs).double()
    original, expected = copy.deepcopy(network).eval(), copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    handler = BoundaryShrink(forget, bound=bound)
    make_trainer([handler], network=network, dataset=data, batch_size=6, shuffle=False, max_epochs=2,
                 loss_function=loss, optimizer=optimizer).run()  # fmt: skip

    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for batch in 2 * [FORGET[0:6], FORGET[6:10]]:
        images, labels = batch_of(data, batch)
        wrong = torch.stack([label_by_hand(kind, original, x, y, bound) for x, y in zip(images, labels)])
        optimizer.zero_grad()
        loss(expected(images), wrong).backward()
        optimizer.step()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-11, atol=1e-12)
    assert handler.cost.samples == handler.cost.backward == 2 * 10
    assert handler.cost.forward == 2 * 2 * 10
    assert handler.cost.seconds == 0


def test_three_classes_get_other_labels_from_another_bound(make_network, records) -> None:
    """That the bound matters at all, on which the comparison above would be silent."""
    original = make_network().double().eval()
    images, labels = batch_of(in_double(Dataset(records)), range(30))
    found = [
        [int(label_by_hand("classes", original, x, y, bound)) for x, y in zip(images, labels)] for bound in (0.0, 0.5)
    ]
    assert found[0] != found[1]


@pytest.mark.parametrize("kind", ["two_outputs", "one_output"])
def test_with_two_classes_it_is_training_on_the_flipped_labels_to_the_bit(
    make_trainer, make_network, forget, records, snapshot, same_bits, kind
) -> None:
    outputs, _, loss = LABELS[kind]
    flipped = Dataset([{**r, "label": 1 - r["label"]} for r in with_labels(records, kind).data])
    states = []
    for dataset, handler in (
        (with_labels(records, kind), BoundaryShrink(forget)),
        # Fine-tuning of which all but the forget samples are to be forgotten.
        (flipped, FineTune(ForgetSet(["P1", "P2", "P4", "P5"], key="patient"))),
    ):
        network = make_network(classes=outputs)
        make_trainer([handler], network=network, dataset=dataset, loss_function=loss, batch_size=5, shuffle=False).run()
        states.append(snapshot(network))
    assert same_bits(*states)


def test_a_sample_whose_step_crosses_nothing_is_not_trained_on_its_true_label(
    make_trainer, make_network, forget, records, on
) -> None:
    """The public code takes the most probable class, which may be the true one."""
    network = make_network()
    make_trainer([FineTune(ForgetSet([29]))], network=network, max_epochs=15).run()
    original = copy.deepcopy(network).eval()
    images, labels = batch_of(Dataset(records), FORGET)
    gradients, _ = input_gradients(original, images, labels)
    with torch.no_grad():
        kept = original(signed_step(images, gradients, 1e-3)).argmax(1) == labels
    assert kept.sum() > 1
    images, labels = images[kept], labels[kept]
    losses = []
    see = on(IterationEvents.LOSS_COMPLETED, lambda engine: losses.append(engine.state.output["loss"].item()))
    handler = BoundaryShrink(ForgetSet([FORGET[i] for i in kept.nonzero().view(-1)]), bound=1e-3)
    make_trainer([handler, see], network=network, max_epochs=1, batch_size=30).run()
    wrong = torch.stack([label_by_hand("classes", original, x, y, 1e-3) for x, y in zip(images, labels)])
    assert (wrong != labels).all()
    with torch.no_grad():
        logits = original.train()(images)
    assert losses == [pytest.approx(float(functional.cross_entropy(logits, wrong)), 1e-5)]
    assert losses[0] > float(functional.cross_entropy(logits, labels)) + 0.1


def test_only_forget_samples_are_met_and_their_labels_stay_in_batch_and_data(make_trainer, forget, records, on) -> None:
    kept: list[int] = []

    def look(engine):
        batch = engine.state.batch
        kept.extend(batch["index"].tolist())
        assert batch["label"].tolist() == [i % 3 for i in batch["index"].tolist()]
        assert engine.state.output["label"].tolist() == batch["label"].tolist()

    trainer = make_trainer([BoundaryShrink(forget), on(Events.ITERATION_COMPLETED, look)], max_epochs=3)
    trainer.run()
    assert sorted(kept) == sorted(3 * FORGET)
    assert [int(record["label"]) for record in records] == [i % 3 for i in range(30)]


def test_the_copy_stays_the_original(make_trainer, make_network, forget, on) -> None:
    network = make_network()
    network.insert(2, nn.Dropout(0.5))
    original, probe = copy.deepcopy(network).eval(), torch.randn(4, 1, 6, 6)
    handler = BoundaryShrink(forget)

    def check(engine):
        assert not any(module.training for module in handler._original.modules())
        assert all(p.grad is None and not p.requires_grad for p in handler._original.parameters())
        assert torch.equal(handler._original(probe), original(probe))
        seen.append(engine.state.iteration)

    seen: list[int] = []
    make_trainer([handler, on(Events.ITERATION_COMPLETED, check)], network=network).run()
    assert len(seen) == 4
    assert any((p != q).any() for p, q in zip(network.parameters(), original.parameters()))
    assert handler._original is None


def test_the_forget_set_is_answered_wrong_in_the_end(make_trainer, make_network, forget, records, caplog) -> None:
    network = make_network()
    make_trainer([FineTune(ForgetSet([29]))], network=network, max_epochs=20).run()
    images, labels = batch_of(Dataset(records), FORGET)

    def loss():
        with torch.no_grad():
            return float(functional.cross_entropy(network.eval()(images), labels))

    before = loss()
    with caplog.at_level("INFO", logger="monai_unlearn"):
        make_trainer([BoundaryShrink(forget)], network=network, max_epochs=5).run()
    assert loss() > before + 0.2
    assert "the step crossed a boundary for" in caplog.text


@pytest.mark.filterwarnings("ignore::UserWarning")  # autocast and its scaler look for CUDA
def test_loss_scaling_changes_nothing_but_rounding(make_trainer, make_network, forget, on) -> None:
    def use_scaler(engine):
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    states = []
    for amp in (False, True):
        network = make_network()
        make_trainer([on(Events.STARTED, use_scaler), BoundaryShrink(forget)], network=network, amp=amp).run()
        states.append(network.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-6)


def test_masked_weights_do_not_move_and_statistics_hold_retain_samples(make_trainer, make_network, forget) -> None:
    network = make_network()
    saliency, statistics = SaliencyMask(forget), BatchNormPolicy(forget)
    before = copy.deepcopy(dict(network.named_parameters()))
    make_trainer([BoundaryShrink(forget), saliency, statistics], network=network).run()
    assert statistics.cost.samples == 20
    for name, parameter in network.named_parameters():
        frozen = ~saliency.mask[name]
        assert torch.equal(parameter[frozen], before[name][frozen])
    assert any((parameter != before[name]).any() for name, parameter in network.named_parameters())


def test_a_given_loader_is_used(make_trainer, forget, records, loader_of) -> None:
    class NoRecords(torch.utils.data.Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, index):
            raise AssertionError("the trainer's own data should not be touched")

    handler = BoundaryShrink(forget, loader=loader_of(records[:5], 3))
    make_trainer([handler], dataset=NoRecords()).run()
    assert handler.cost.samples == 10


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_task_and_network_is_trained(make_trainer, forget, records, kind, name) -> None:
    task = task_of(records, kind, name)
    network = task["network"]
    before = copy.deepcopy(network)
    make_trainer([BoundaryShrink(forget)], max_epochs=1, **task).run()
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert any((p != q).any() for p, q in zip(network.parameters(), before.parameters()))


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bound": -0.1}, r"bound should lie in \[0, 1\], but got -0.1. It is a share of the range"),
        ({"bound": 8}, r"bound should lie in \[0, 1\], but got 8"),
        ({"bound": NAN}, r"bound should lie in \[0, 1\]"),
        ({"multi_label": "no"}, "multi_label should be true, false or None, but got 'no'"),
    ],
    ids=str,
)
def test_an_argument_outside_its_range_raises(forget, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        BoundaryShrink(forget, **arguments)


def test_a_loss_of_probabilities_is_refused(make_trainer, make_network, forget, records) -> None:
    network = nn.Sequential(make_network(classes=1), nn.Sigmoid())
    task = {"dataset": with_labels(records, "one_output"), "loss_function": nn.BCELoss(), "network": network}
    with pytest.raises(TypeError, match="outputs are logits, but BCELoss takes probabilities"):
        make_trainer([BoundaryShrink(forget)], **task).run()


def test_a_loader_without_a_batch_raises(make_trainer, forget, records) -> None:
    empty = DataLoader(Dataset(records[:3]), batch_size=8, drop_last=True)
    with pytest.raises(ValueError, match="loader of forget samples should give at least one batch, but gives none"):
        make_trainer([BoundaryShrink(forget, loader=empty)]).run()


def test_findings_of_which_none_is_known_raise(make_trainer, make_network, forget, records) -> None:
    data = with_labels(records, "findings")
    for record in data.data:
        record["label"] = torch.tensor([NAN, 0.5])
    task = {"dataset": data, "loss_function": LABELS["findings"][2], "network": make_network(classes=2)}
    with pytest.raises(RuntimeError, match="None of the 20 forget samples that BoundaryShrink met has a finding that"):
        make_trainer([BoundaryShrink(forget)], **task).run()


def test_labels_that_are_neither_classes_nor_findings_raise(make_trainer, forget, records) -> None:
    one_hot = Dataset([{**record, "label": torch.eye(3)[i % 3]} for i, record in enumerate(records)])
    with pytest.raises(ValueError, match="outputs of shape B × C and labels that are one class index a sample"):
        make_trainer([BoundaryShrink(forget)], dataset=one_hot).run()
    with pytest.raises(ValueError, match=r"labels that are findings in \[0, 1\], as many as outputs"):
        make_trainer([BoundaryShrink(forget, multi_label=True)]).run()
