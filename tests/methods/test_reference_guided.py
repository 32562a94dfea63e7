"""ReGUn: each forget sample is pulled to what unseen samples of its class are answered, and no further."""

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
from scipy.special import expit, rel_entr, softmax
from torch import nn
from torch.nn import functional

from monai_unlearn import ForgetSet
from monai_unlearn.loss import MaskedBCEWithLogitsLoss
from monai_unlearn.methods import BatchNormPolicy, FineTune, NegGradPlus, ReferenceGuided, SaliencyMask
from monai_unlearn.methods.reference_guided import mean_outputs, reference_divergence, references_of

NAN = float("nan")
FORGET = IS_FORGET.nonzero().view(-1).tolist()
RETAIN = [i for i in range(30) if not IS_FORGET[i]]


def batch_of(dataset, positions):
    images = torch.stack([dataset.data[i]["image"] for i in positions])
    return images, torch.stack([torch.as_tensor(dataset.data[i]["label"]) for i in positions])


def in_double(dataset):
    def label(value):
        return value.double() if value.is_floating_point() else value

    return Dataset([{**r, "image": r["image"].double(), "label": label(r["label"])} for r in dataset.data])


@pytest.fixture
def unseen(loader_of):
    """A loader of twelve unseen samples like the records."""

    def make(kind="classes", batch_size=5, dims=2, side=None, n=12):
        images = torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(7))
        images += torch.arange(n).view(-1, 1, 1, 1) % 3
        return loader_of(with_labels([{"image": image} for image in images], kind, dims, side).data, batch_size)

    return make


# ---- the functions


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(2, 5))
def test_the_mean_outputs_are_those_of_a_loop(seed, n, outputs) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(n, outputs, generator=generator, dtype=torch.float64)
    classes = torch.randint(outputs, (n,), generator=generator)
    table = mean_outputs(logits, classes)
    references = references_of(table, classes)
    p = softmax(logits.numpy(), axis=1)
    for c in range(outputs):
        own = [i for i in range(n) if classes[i] == c]
        if not own:
            assert table[c].isnan().all()
        for k in range(outputs if own else 0):
            assert table[c, k].item() == pytest.approx(sum(p[i, k] for i in own) / len(own))
        for i in own:
            assert torch.equal(references[i], table[c])
            assert references[i].sum().item() == pytest.approx(1)

    labels = torch.randint(2, (n, outputs), generator=generator).double()
    labels[torch.rand(n, outputs, generator=generator) < 0.3] = NAN
    table = mean_outputs(logits, labels, True)
    references = references_of(table, labels, True)
    q = expit(logits.numpy())
    for j in range(outputs):
        for side in (0, 1):
            own = [i for i in range(n) if float(labels[i, j]) == side]
            expected = sum(q[i, j] for i in own) / len(own) if own else NAN
            assert table[side, j].item() == pytest.approx(expected, nan_ok=True)
            assert all(references[i, j] == table[side, j] for i in own)
        assert all(references[i, j].isnan() for i in range(n) if labels[i, j].isnan())


def test_a_soft_label_counts_as_what_it_is_nearer_to() -> None:
    logits, labels = torch.tensor([[0.0], [3.0], [1.0]]), torch.tensor([[0.2], [0.9], [0.5]])
    table = mean_outputs(logits, labels, True)
    assert table[:, 0].tolist() == pytest.approx([(expit(0) + expit(1)) / 2, expit(3)])


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 5))
def test_the_divergence_is_that_of_the_distributions(seed, n, outputs) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(n, outputs, generator=generator, dtype=torch.float64)
    references = torch.rand(n, outputs, generator=generator, dtype=torch.float64)
    references[0, 0] = 0  # a class that no unseen sample is ever taken for
    shares = references / references.sum(1, keepdim=True).clamp(min=1e-9)
    shares[:, 0] += 1 - shares.sum(1)
    expected = rel_entr(shares.numpy(), softmax(logits.numpy(), axis=1)).sum() / n
    assert math.isclose(reference_divergence(logits, shares).item(), expected, rel_tol=1e-9, abs_tol=1e-9)

    counts = torch.rand(n, outputs, generator=generator) < 0.6
    q, p = references.numpy(), logits.numpy()
    each = rel_entr(q, expit(p)) + rel_entr(1 - q, expit(-p))
    rows = [[each[i, j] for j in range(outputs) if counts[i, j]] for i in range(n)]
    expected = sum(sum(row) / len(row) for row in rows if row) / n
    result = reference_divergence(logits, references.masked_fill(~counts, NAN), True)
    assert math.isclose(result.item(), expected, rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize("findings", [False, True])
def test_it_pulls_as_cross_entropy_with_the_references_as_soft_labels(findings) -> None:
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    references = torch.rand(6, 3, dtype=torch.float64)
    if findings:
        references[1, 2], references[3] = NAN, NAN
        entropy_and_divergence = MaskedBCEWithLogitsLoss()(logits, references)
    else:
        references = references / references.sum(1, keepdim=True)
        entropy_and_divergence = functional.cross_entropy(logits, references)
    (expected,) = torch.autograd.grad(entropy_and_divergence, logits)
    (gradient,) = torch.autograd.grad(reference_divergence(logits, references, findings), logits)
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("findings", [False, True])
def test_half_precision_is_computed_in_full(dtype, findings) -> None:
    logits = torch.tensor([[30.0, -30.0]], dtype=dtype)
    references = torch.tensor([[0.0, 1.0]])
    loss = reference_divergence(logits, references, findings)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(30 if findings else 60, rel=1e-3)
    labels = torch.tensor([[0.0, 1.0]]) if findings else torch.tensor([1])
    assert mean_outputs(logits, labels, findings).dtype == torch.float32


@pytest.mark.parametrize(("one", "other"), [((2, 3), (2, 2)), ((2,), (2,))])
def test_outputs_of_another_shape_raise(one, other) -> None:
    with pytest.raises(ValueError, match="logits and references should both be B × C"):
        reference_divergence(torch.zeros(one), torch.zeros(other))


# ---- training


def by_hand(kind, original, network, held_out, forgotten):
    """The divergence of a forget batch, sample by sample and by the definition."""
    (unseen_images, unseen_labels), (images, labels) = held_out, forgotten
    with torch.no_grad():
        unseen_logits = original.eval()(unseen_images)
    total = 0
    for row, true in zip(network(images), labels):
        if kind in ("classes", "two_outputs"):
            q = torch.stack([z.softmax(0) for z, y in zip(unseen_logits, unseen_labels) if y == true]).mean(0)
            total = total + (q * (q.log() - row.log_softmax(0))).sum()
            continue
        known = [j for j in range(len(row)) if not true[j].isnan()]
        for j in known:
            q = torch.stack([z[j].sigmoid() for z, y in zip(unseen_logits, unseen_labels) if y[j] == true[j]]).mean()
            p = row[j].sigmoid()
            total = total + (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()) / len(known)
    return total / len(labels)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_float64_training_equals_a_hand_written_loop(
    make_trainer, make_network, forget, records, unseen, kind, alpha
) -> None:
    outputs, _, loss = LABELS[kind]
    data, other = in_double(with_labels(records, kind)), in_double(unseen(kind).dataset)
    network = make_network(classes=outputs).double()
    original, expected = copy.deepcopy(network), copy.deepcopy(network)
    handler = ReferenceGuided(forget, held_out_loader=DataLoader(other, batch_size=5), alpha=alpha)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    make_trainer([handler], network=network, dataset=data, batch_size=6, shuffle=False, max_epochs=2,
                 loss_function=loss, optimizer=optimizer).run()  # fmt: skip

    retain_batches = [RETAIN[0:6], RETAIN[6:12], RETAIN[12:18], RETAIN[18:20]]
    forget_batches = [FORGET[0:6], FORGET[6:10]]
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    expected.train()
    for step in range(8):
        images, labels = batch_of(data, retain_batches[step % 4])
        optimizer.zero_grad()
        retain_loss = loss(expected(images), labels)
        forgotten = batch_of(data, forget_batches[step % 2])
        divergence = by_hand(kind, original, expected, batch_of(other, range(12)), forgotten)
        (retain_loss + alpha * divergence).backward()
        optimizer.step()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-9, atol=1e-11)
    assert handler.cost.samples == handler.cost.forward == 12 + 4 * 10
    assert handler.cost.backward == 4 * 10
    assert handler.cost.seconds > 0


def test_with_alpha_0_it_is_fine_tuning_to_the_bit_and_meets_neither_forget_nor_held_out_samples(
    make_trainer, make_network, forget, snapshot, same_bits
) -> None:
    class Untouched(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise AssertionError("nothing should be taken from here")

    network, plain = make_network(), make_network()
    untouched = DataLoader(Untouched())
    handler = ReferenceGuided(forget, held_out_loader=untouched, forget_loader=untouched, alpha=0)
    make_trainer([handler], network=network).run()
    make_trainer([FineTune(forget)], network=plain).run()
    assert same_bits(snapshot(network), snapshot(plain))
    assert handler.cost.samples == 0


def test_the_retain_order_is_that_of_the_other_methods_with_two_loaders(make_trainer, forget, unseen, on) -> None:
    orders = []
    for handler in (ReferenceGuided(forget, held_out_loader=unseen()), NegGradPlus(forget)):
        order: list[int] = []
        keep = on(Events.ITERATION_COMPLETED, lambda engine, o=order: o.extend(engine.state.batch["index"].tolist()))
        make_trainer([handler, keep]).run()
        orders.append(order)
    assert orders[0] == orders[1]
    assert not set(orders[0]) & set(FORGET)


@pytest.mark.parametrize("size", [2, 12])
def test_batches_and_order_of_the_held_out_samples_do_not_matter(make_trainer, make_network, forget, unseen, size):
    tables = []
    for data in (unseen().dataset.data, unseen().dataset.data[::-1]):
        handler = ReferenceGuided(forget, held_out_loader=DataLoader(Dataset(data), batch_size=size))
        network = make_network()
        trainer = make_trainer([handler], network=network)
        trainer.add_event_handler(Events.EPOCH_STARTED, lambda _, h=handler, t=tables: t.append(h._table.clone()))
        trainer.run()
        assert torch.equal(tables[-1], tables[-2])  # the original's, in every epoch
        assert handler._table is None
        assert handler._batches is None
    torch.testing.assert_close(tables[0], tables[-1], rtol=1e-5, atol=1e-6)


def test_making_the_references_leaves_network_and_statistics_alone(
    make_trainer, make_network, forget, unseen, on, snapshot, same_bits
) -> None:
    network = make_network()
    network.insert(2, nn.Dropout(0.5))
    before = snapshot(network)
    network[2].eval()  # a user's own choice

    def look(engine):
        assert same_bits(snapshot(network), before)
        assert not network[2].training
        assert all(parameter.grad is None for parameter in network.parameters())
        engine.terminate()

    make_trainer([ReferenceGuided(forget, held_out_loader=unseen()), on(Events.STARTED, look)], network=network).run()


def test_forget_samples_end_near_the_references(make_trainer, make_network, forget, records, unseen) -> None:
    network = make_network()
    make_trainer([FineTune(ForgetSet([29]))], network=network, max_epochs=15).run()
    images, labels = batch_of(Dataset(records), FORGET)
    with torch.no_grad():
        others, theirs = batch_of(unseen(n=30).dataset, range(30))
        # References far from what the network says of the forget set: of samples whose classes are mixed up.
        table = mean_outputs(network.eval()(others), theirs.roll(1))
    apart = []
    for alpha in (0.0, 5.0):
        one = copy.deepcopy(network)
        data = unseen(n=30).dataset.data
        mixed = Dataset([{**record, "label": theirs.roll(1)[i]} for i, record in enumerate(data)])
        handler = ReferenceGuided(forget, held_out_loader=DataLoader(mixed, batch_size=8), alpha=alpha)
        make_trainer([handler], network=one, max_epochs=10).run()
        with torch.no_grad():
            apart.append(float(reference_divergence(one.eval()(images), table[labels])))
    assert apart[1] < apart[0] / 2


def test_given_loaders_are_used(make_trainer, forget, records, loader_of, unseen) -> None:
    class NoRecords(torch.utils.data.Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, index):
            raise AssertionError("the trainer's own data should not be touched")

    handler = ReferenceGuided(
        forget, held_out_loader=unseen(), loader=loader_of(records[5:12], 3), forget_loader=loader_of(records[:5], 5)
    )
    trainer = make_trainer([handler], dataset=NoRecords())
    trainer.run()
    assert trainer.state.iteration == 6
    assert handler.cost.samples == 12 + 30


def test_masked_weights_do_not_move_and_statistics_hold_retain_samples(
    make_trainer, make_network, forget, unseen
) -> None:
    network = make_network()
    saliency, statistics = SaliencyMask(forget), BatchNormPolicy(forget)
    before = copy.deepcopy(dict(network.named_parameters()))
    make_trainer([ReferenceGuided(forget, held_out_loader=unseen()), saliency, statistics], network=network).run()
    assert statistics.cost.samples == 20
    for name, parameter in network.named_parameters():
        frozen = ~saliency.mask[name]
        assert torch.equal(parameter[frozen], before[name][frozen])
    assert any((parameter != before[name]).any() for name, parameter in network.named_parameters())


@pytest.mark.filterwarnings("ignore::UserWarning")  # autocast and its scaler look for CUDA
def test_loss_scaling_changes_nothing_but_rounding(make_trainer, make_network, forget, unseen, on) -> None:
    def use_scaler(engine):
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    states = []
    for amp in (False, True):
        network = make_network()
        handlers = [on(Events.STARTED, use_scaler), ReferenceGuided(forget, held_out_loader=unseen(), alpha=0.6)]
        make_trainer(handlers, network=network, amp=amp).run()
        states.append(network.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_task_and_network_is_trained(make_trainer, forget, records, unseen, kind, name) -> None:
    task = task_of(records, kind, name)
    network = task["network"]
    before = copy.deepcopy(network)
    handler = ReferenceGuided(forget, held_out_loader=unseen(kind, dims=NETWORKS[name][0], side=8))
    make_trainer([handler], max_epochs=1, **task).run()
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert any((p != q).any() for p, q in zip(network.parameters(), before.parameters()))


# ---- bad input


def test_classes_without_a_held_out_sample_are_counted_and_refused(
    make_trainer, make_network, forget, loader_of, records, snapshot, same_bits
) -> None:
    network = make_network()
    before = snapshot(network)
    of_one_class = loader_of([record for record in records if record["label"] == 1])
    with pytest.raises(ValueError, match=r"but 2 of 3 classes have none. Use more held-out \(validation\) data"):
        make_trainer([ReferenceGuided(forget, held_out_loader=of_one_class)], network=network).run()
    assert same_bits(snapshot(network), before)
    # A class that the forget set does not have needs no reference.
    only = ForgetSet([i for i in range(30) if i % 3 == 1])
    make_trainer([ReferenceGuided(only, held_out_loader=of_one_class)]).run()


def test_answers_of_findings_without_a_held_out_sample_do_not_count_and_are_noted(
    make_trainer, make_network, forget, records, loader_of
) -> None:
    """As if they were not known; a run with nothing left to count is refused."""
    data = with_labels(records, "findings")
    without = loader_of([record for record in data.data if record["label"][0] == 1])
    unknown = with_labels(records, "findings")
    for record in unknown.data:
        if record["patient"] in ("P0", "P3") and record["label"][0] == 0:
            record["label"][0] = NAN
    states, notes = [], []
    for dataset in (data, unknown):
        network = make_network(classes=2)
        handler = ReferenceGuided(forget, held_out_loader=without)
        task = {"dataset": dataset, "loss_function": LABELS["findings"][2], "network": network}
        make_trainer([handler], **task).run()
        states.append(network.state_dict())
        notes.append(handler.notes)
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert [len(own) for own in notes] == [1, 0]
    assert "1 of 4 answers of the forget set" in notes[0][0]
    for record in unknown.data:
        if record["patient"] in ("P0", "P3"):
            record["label"] = torch.tensor([0.0, NAN])
    with pytest.raises(ValueError, match="at least one known finding of which held_out_loader has a sample"):
        make_trainer([ReferenceGuided(forget, held_out_loader=without)], **task).run()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, "alpha should be a number of at least 0, but got -0.1"),
        ({"alpha": NAN}, "alpha should be a number of at least 0"),
        ({"alpha": math.inf}, "alpha should be a number of at least 0"),
        ({"multi_label": "no"}, "multi_label should be true, false or None, but got 'no'"),
        ({"held_out_loader": None}, "held_out_loader should load samples that no model was trained on, but got None"),
    ],
    ids=str,
)
def test_an_argument_outside_its_range_raises(forget, unseen, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ReferenceGuided(forget, **{"held_out_loader": unseen(), **arguments})


def test_a_loss_of_probabilities_is_refused(make_trainer, make_network, forget, records, unseen) -> None:
    network = nn.Sequential(make_network(classes=1), nn.Sigmoid())
    task = {"dataset": with_labels(records, "one_output"), "loss_function": nn.BCELoss(), "network": network}
    with pytest.raises(TypeError, match="outputs are logits, but BCELoss takes probabilities"):
        make_trainer([ReferenceGuided(forget, held_out_loader=unseen("one_output"))], **task).run()


@pytest.mark.parametrize("part", ["retain", "forget"])
def test_a_loader_without_a_batch_raises(make_trainer, forget, records, unseen, part) -> None:
    empty = DataLoader(Dataset(records[:3]), batch_size=8, drop_last=True)
    given = {"loader" if part == "retain" else "forget_loader": empty}
    with pytest.raises(ValueError, match=f"loader of {part} samples should give at least one batch, but gives none"):
        make_trainer([ReferenceGuided(forget, held_out_loader=unseen(), **given)]).run()


def test_held_out_samples_that_are_none_or_not_finite_raise(make_trainer, forget, records, unseen) -> None:
    empty = DataLoader(Dataset(records[:3]), batch_size=8, drop_last=True)
    with pytest.raises(ValueError, match="loader of held-out samples should hold at least one sample, but is empty"):
        make_trainer([ReferenceGuided(forget, held_out_loader=empty)]).run()
    broken = unseen()
    broken.dataset.data[3]["image"] = torch.full((1, 6, 6), NAN)
    with pytest.raises(ValueError, match="outputs on the held-out samples should be finite, but some are NaN"):
        make_trainer([ReferenceGuided(forget, held_out_loader=broken)]).run()


def test_labels_that_are_neither_classes_nor_findings_raise(make_trainer, forget, records, loader_of, unseen) -> None:
    one_hot = loader_of([{**record, "label": torch.eye(3)[i % 3]} for i, record in enumerate(records)])
    with pytest.raises(ValueError, match="outputs of shape B × C and labels that are one class index a sample"):
        make_trainer([ReferenceGuided(forget, held_out_loader=one_hot)]).run()
    too_many = loader_of([{**record, "label": 3} for record in records])
    with pytest.raises(ValueError, match="labels that are one class index a sample"):
        make_trainer([ReferenceGuided(forget, held_out_loader=too_many)]).run()
    with pytest.raises(ValueError, match=r"labels that are findings in \[0, 1\], as many as outputs"):
        make_trainer([ReferenceGuided(forget, held_out_loader=unseen(), multi_label=True)]).run()
