"""Random labeling: which labels the network is trained on, and that nothing else changes."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Events
from monai.data import CacheDataset, DataLoader, Dataset, MetaTensor, ThreadDataLoader
from monai.losses import FocalLoss
from scipy.stats import binomtest, chisquare
from torch import nn
from torch.nn import functional

from monai_unlearn import ForgetSet
from monai_unlearn.loss import MaskedBCEWithLogitsLoss
from monai_unlearn.methods import RandomLabeling
from monai_unlearn.methods.random_labeling import other_findings, other_labels

NAN = float("nan")
IS_FORGET = torch.tensor([i // 5 in (0, 3) for i in range(30)])


@pytest.fixture
def seen_labels(on):
    """Handler that keeps, for each iteration, index → label that was trained on."""

    class Seen:
        def __init__(self):
            self.batches = []

        def attach(self, engine):
            on(Events.ITERATION_COMPLETED, self.keep).attach(engine)

        def keep(self, engine):
            labels = engine.state.output["label"].reshape(-1).tolist()
            self.batches.append(dict(zip(engine.state.batch["index"].tolist(), labels)))

    return Seen()


def test_float64_training_equals_a_hand_written_loop(make_trainer, make_network, forget, double) -> None:
    network = make_network().double()
    expected = copy.deepcopy(network)
    trainer = make_trainer(
        [RandomLabeling(forget, seed=5)], network=network, dataset=double, batch_size=30, shuffle=False, max_epochs=3
    )
    trainer.run()

    images = torch.stack([record["image"] for record in double.data])
    true = torch.tensor([int(record["label"]) for record in double.data])
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        labels = true.clone()
        labels[IS_FORGET] = (true[IS_FORGET] + torch.randint(1, 3, (10,), generator=generator)) % 3
        optimizer.zero_grad()
        functional.cross_entropy(expected(images), labels).backward()
        optimizer.step()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-13, atol=1e-14)


def test_retain_labels_are_untouched_and_forget_labels_are_wrong_and_redrawn(
    make_trainer, forget, records, seen_labels
) -> None:
    make_trainer([RandomLabeling(forget), seen_labels], max_epochs=20).run()
    drawn = {i: [batch[i] for batch in seen_labels.batches if i in batch] for i in range(30)}
    for i, record in enumerate(records):
        assert len(drawn[i]) == 20
        if IS_FORGET[i]:
            assert set(drawn[i]) == {0, 1, 2} - {int(record["label"])}
        else:
            assert set(drawn[i]) == {int(record["label"])}


@pytest.mark.parametrize("classes", [2, 3, 8])
def test_other_labels_are_uniform_over_the_other_classes(classes) -> None:
    labels = torch.arange(classes).repeat_interleave(6000)
    drawn = other_labels(labels, classes, torch.Generator().manual_seed(0))
    counts = torch.zeros(classes, classes)
    counts.index_put_((labels, drawn), torch.ones(len(labels)), accumulate=True)
    assert counts.diagonal().eq(0).all()
    for true in range(classes):
        others = counts[true][torch.arange(classes) != true]
        assert others.sum() == 6000
        assert classes == 2 or chisquare(others.numpy()).pvalue > 0.001


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (0,)])
def test_other_labels_keep_type_and_shape_and_the_given_labels(dtype, shape) -> None:
    labels = torch.arange(shape[0]).remainder(3).to(dtype).view(shape)
    given = labels.clone()
    drawn = other_labels(labels, 3, torch.Generator().manual_seed(0))
    assert drawn.dtype == dtype
    assert drawn.shape == shape
    assert torch.equal(labels, given)
    assert (drawn != labels).all()


@pytest.mark.parametrize("labels", [[0.0, 0.5], [-1.0, 0.0], [0.0, 3.0]])
def test_labels_that_are_no_class_raise(labels) -> None:
    with pytest.raises(ValueError, match="whole numbers in \\[0, 2\\]"):
        other_labels(torch.tensor(labels), 3, torch.Generator())


@pytest.mark.parametrize("classes", [1, 0, -3])
def test_fewer_than_two_classes_raise(forget, classes) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        RandomLabeling(forget, num_classes=classes)
    with pytest.raises(ValueError, match="at least 2"):
        other_labels(torch.zeros(1), classes, torch.Generator())


def test_one_output_and_labels_of_shape_b_1_are_flipped(
    make_trainer, make_network, forget, records, seen_labels
) -> None:
    true = [float(i % 2) for i in range(30)]
    dataset = Dataset([{**record, "label": torch.tensor([true[i]])} for i, record in enumerate(records)])
    shapes = set()
    seen = seen_labels.keep
    seen_labels.keep = lambda engine: (shapes.add(tuple(engine.state.output["label"].shape[1:])), seen(engine))
    make_trainer(
        [RandomLabeling(forget), seen_labels],
        network=make_network(classes=1),
        dataset=dataset,
        loss_function=nn.BCEWithLogitsLoss(),
    ).run()
    assert shapes == {(1,)}
    for batch in seen_labels.batches:
        assert all(label == (1 - true[i] if IS_FORGET[i] else true[i]) for i, label in batch.items())


def test_a_repeated_batch_is_replaced_and_cached_records_stay(make_trainer, forget, records, seen_labels, on) -> None:
    dataset = CacheDataset(records, transform=[], progress=False)
    loader = ThreadDataLoader(dataset, repeats=2, batch_size=30, shuffle=False)
    true = torch.tensor([int(record["label"]) for record in records])
    given = []
    trainer = make_trainer(
        [on(Events.GET_BATCH_COMPLETED, lambda e: given.append(e.state.batch)), RandomLabeling(forget), seen_labels],
        train_data_loader=loader,
        epoch_length=2,
        max_epochs=3,
    )
    trainer.run()
    assert given[0] is given[1]
    assert len(given) == 6
    assert all(torch.equal(batch["label"], true) for batch in given)
    assert [int(record["label"]) for record in dataset] == true.tolist()
    assert len({tuple(batch.values()) for batch in seen_labels.batches}) > 1
    for batch in seen_labels.batches:
        assert [batch[i] != true[i] for i in range(30)] == IS_FORGET.tolist()


def test_classes_are_counted_from_the_networks_outputs(make_trainer, make_network, forget, seen_labels) -> None:
    make_trainer([RandomLabeling(forget), seen_labels], network=make_network(classes=5), max_epochs=10).run()
    assert {label for batch in seen_labels.batches for label in batch.values()} == {0, 1, 2, 3, 4}


def test_num_classes_limits_the_draw(make_trainer, make_network, forget, seen_labels) -> None:
    handlers = [RandomLabeling(forget, num_classes=4), seen_labels]
    make_trainer(handlers, network=make_network(classes=5), max_epochs=10).run()
    assert {label for batch in seen_labels.batches for label in batch.values()} == {0, 1, 2, 3}


def test_counting_the_classes_leaves_no_trace(make_trainer, make_network, forget, snapshot, same_bits) -> None:
    states = []
    for num_classes in (None, 3):
        network = make_network()
        network.insert(2, nn.Dropout(0.5))
        make_trainer([RandomLabeling(forget, num_classes=num_classes)], network=network).run()
        states.append(snapshot(network))
    assert same_bits(*states)


def test_the_seed_decides_the_draw(make_trainer, forget, seen_labels) -> None:
    runs = []
    for seed in (0, 0, 1):
        seen_labels.batches = []
        make_trainer([RandomLabeling(forget, seed=seed), seen_labels]).run()
        runs.append(seen_labels.batches)
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("rows", [[0, 1, 0], [[0, 1, 0]]])
@pytest.mark.parametrize(
    ("loss", "multi_label"), [(nn.CrossEntropyLoss(), None), (FocalLoss(), None), (nn.BCEWithLogitsLoss(), False)]
)
def test_one_hot_targets_are_not_taken_for_findings(make_trainer, forget, records, rows, loss, multi_label) -> None:
    dataset = Dataset([{**record, "label": torch.tensor(rows, dtype=torch.float32)} for record in records])
    trainer = make_trainer([RandomLabeling(forget, multi_label=multi_label)], dataset=dataset, loss_function=loss)
    with pytest.raises(ValueError, match=r"one class index a sample.*pass multi_label=True"):
        trainer.run()


@pytest.mark.parametrize("rows", [[[0, 1, 0]], [[[0.0]], [[1.0]]]])
def test_findings_of_another_shape_are_refused(make_trainer, forget, records, rows) -> None:
    dataset = Dataset([{**record, "label": torch.tensor(rows, dtype=torch.float32)} for record in records])
    trainer = make_trainer([RandomLabeling(forget)], dataset=dataset, loss_function=nn.BCEWithLogitsLoss())
    with pytest.raises(ValueError, match=r"should hold findings, shape B × L, but got \(8, "):
        trainer.run()


def test_a_label_key_without_a_tensor_is_refused(make_trainer, forget) -> None:
    with pytest.raises(ValueError, match="but got list for 8 samples"):
        make_trainer([RandomLabeling(forget, label_key="patient")]).run()


def test_another_label_key_is_relabeled(make_trainer, forget, records, on) -> None:
    dataset = Dataset([{**record, "grade": record["label"]} for record in records])
    changed = set()

    def compare(engine):
        batch = engine.state.batch
        changed.update(batch["index"][batch["grade"] != batch["label"]].tolist())

    make_trainer(
        [RandomLabeling(forget, label_key="grade"), on(Events.ITERATION_STARTED, compare)], dataset=dataset
    ).run()
    assert changed == set(IS_FORGET.nonzero().view(-1).tolist())


def test_a_run_that_meets_no_forget_sample_raises(make_trainer, forget, records) -> None:
    retain = [record for i, record in enumerate(records) if not IS_FORGET[i]]
    batches = list(DataLoader(Dataset(retain), batch_size=8))  # no records, so only the run itself can tell
    with pytest.raises(RuntimeError, match="met no forget sample in 6 iterations"):
        make_trainer([RandomLabeling(forget)], train_data_loader=batches).run()


def test_a_batch_without_the_key_raises(make_trainer) -> None:
    with pytest.raises(KeyError, match="The batch has no 'study'"):
        make_trainer([RandomLabeling(ForgetSet(["P0"], key="study"))]).run()


def test_a_request_that_is_only_partly_in_the_data_is_refused(make_trainer) -> None:
    trainer = make_trainer([RandomLabeling(ForgetSet([1, 999]))])
    with pytest.raises(ValueError, match="1 of the 2 ids to forget are not in the training data"):
        trainer.run()


# ---- findings


def others(row):
    """Every other vector of hard findings that a row may become."""
    choices = [[y] if math.isnan(y) or y == 0.5 else [y, 1 - y] for y in row]
    return [other for other in itertools.product(*choices) if str(other) != str(tuple(row))]


@pytest.mark.parametrize("known", [1, 2, 3, 5])
@pytest.mark.parametrize("unknown", [0, 2])
def test_other_findings_are_uniform_over_the_other_vectors(known, unknown) -> None:
    true = [float(i % 2) for i in range(known)]
    for i in range(unknown):
        true.insert(2 * i, (NAN, 0.5)[i])
    n = 40 * 2**known * 8
    drawn = other_findings(torch.tensor([true]).repeat(n, 1), torch.Generator().manual_seed(0))
    expected = others(true)
    assert len(expected) == 2**known - 1
    counts = {str(other): 0 for other in expected}
    for row in drawn.tolist():
        counts[str(tuple(row))] += 1  # a KeyError where a vector is drawn that is none of them
    assert known == 1 or chisquare(list(counts.values())).pvalue > 0.001


@pytest.mark.parametrize("findings", [1, 2, 10, 61, 62, 63, 64, 65, 300])
def test_each_finding_is_flipped_as_often_as_it_should(findings) -> None:
    n = 4000
    labels = torch.ones(n, findings)
    flipped = other_findings(labels, torch.Generator().manual_seed(1)) == 0
    assert flipped.any(1).all()
    share = 2.0 ** (findings - 1) / (2.0**findings - 1)
    for finding in {0, findings // 2, findings - 1}:
        assert binomtest(int(flipped[:, finding].sum()), n, share).pvalue > 0.001


def test_a_row_of_coins_that_all_failed_is_drawn_from_the_same_distribution(monkeypatch) -> None:
    """With two findings a quarter of all rows; here all, so that the second draw stands alone."""
    draw = torch.randint
    monkeypatch.setattr(
        torch, "randint", lambda *a, **k: torch.zeros(a[1], dtype=torch.long) if a[0] == 2 else draw(*a, **k)
    )
    drawn = other_findings(torch.zeros(7 * 500, 3), torch.Generator().manual_seed(2))
    numbers = (drawn * torch.tensor([1, 2, 4])).sum(1).long()
    counts = torch.bincount(numbers, minlength=8)
    assert counts[0] == 0
    assert chisquare(counts[1:].numpy()).pvalue > 0.001
    many = other_findings(torch.zeros(500, 100), torch.Generator().manual_seed(2))
    assert (many[:, :62].sum(1) > 0).all()


ENTRIES = st.sampled_from([0.0, 1.0, 0.25, 0.5, 0.9, NAN])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.integers(1, 8).flatmap(
        lambda size: st.lists(st.lists(ENTRIES, min_size=size, max_size=size), min_size=1, max_size=6)
    ),
    st.integers(0, 2**40),
)
def test_other_findings_differ_where_they_can_and_only_by_flips(rows, seed) -> None:
    labels = torch.tensor(rows, dtype=torch.float64)
    given_labels = labels.clone()
    drawn = other_findings(labels, torch.Generator().manual_seed(seed))
    again = other_findings(labels, torch.Generator().manual_seed(seed))
    np.testing.assert_array_equal(labels, given_labels)
    np.testing.assert_array_equal(drawn, again)
    for true, other in zip(labels.tolist(), drawn.tolist()):
        assert all(y == z or y == 1 - z or (math.isnan(y) and math.isnan(z)) for y, z in zip(true, other))
        may_differ = any(not math.isnan(y) and y != 0.5 for y in true)
        assert any(y != z for y, z in zip(true, other) if not math.isnan(y)) == may_differ


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16, torch.float32])
def test_other_findings_keep_type_and_shape(dtype) -> None:
    labels = torch.tensor([[0, 1, 0], [1, 1, 1]]).to(dtype)
    drawn = other_findings(labels, torch.Generator().manual_seed(0))
    assert drawn.dtype == dtype
    assert drawn.shape == labels.shape
    assert (drawn != labels).any(1).all()
    assert other_findings(labels[:0], torch.Generator()).shape == (0, 3)


def test_other_findings_take_the_labels_that_monai_gives() -> None:
    labels = MetaTensor(torch.tensor([[0.0, 1.0], [NAN, 1.0]]))
    drawn = other_findings(labels, torch.Generator().manual_seed(0))
    assert drawn[1, 1] == 0
    assert drawn[1, 0].isnan()


@pytest.mark.parametrize("bad", [-1.0, 2.0, math.inf])
def test_findings_outside_their_range_raise(bad) -> None:
    with pytest.raises(ValueError, match=r"labels should lie in \[0, 1\]"):
        other_findings(torch.tensor([[0.0, NAN, bad]]), torch.Generator())


@pytest.mark.parametrize("shape", [(3,), (3, 2, 2), ()])
def test_findings_that_are_no_table_raise(shape) -> None:
    with pytest.raises(ValueError, match="labels should be N × L"):
        other_findings(torch.zeros(shape), torch.Generator())


@pytest.fixture
def findings(records):
    """The records with five findings each, of which some are unknown or soft."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(2, (30, 5), generator=generator).float()
    labels[torch.rand(30, 5, generator=generator) < 0.3] = NAN
    labels[3, 0] = 0.7
    labels[IS_FORGET.nonzero()[1, 0]] = NAN  # a forget sample of which nothing is known
    return Dataset([{**record, "label": label} for record, label in zip(records, labels)])


@pytest.fixture
def seen_findings(on):
    """index → the findings that were trained on, for each time."""
    seen: dict[int, list[torch.Tensor]] = {i: [] for i in range(30)}

    def keep(engine):
        for i, label in zip(engine.state.batch["index"].tolist(), engine.state.output["label"]):
            seen[i].append(label.clone())

    return seen, on(Events.ITERATION_COMPLETED, keep)


@pytest.mark.parametrize(
    ("loss", "multi_label"), [(MaskedBCEWithLogitsLoss(), None), (MaskedBCEWithLogitsLoss("sum"), True)]
)
def test_forget_findings_are_redrawn_and_all_others_stay(
    make_trainer, make_network, forget, findings, seen_findings, loss, multi_label
) -> None:
    seen, keep = seen_findings
    before = [record["label"].clone() for record in findings.data]
    handler = RandomLabeling(forget, num_classes=1 if multi_label else None, multi_label=multi_label)
    make_trainer(
        [handler, keep], network=make_network(classes=5), dataset=findings, loss_function=loss, max_epochs=8
    ).run()
    for i, true in enumerate(before):
        np.testing.assert_array_equal(findings.data[i]["label"], true)
        assert len(seen[i]) == 8
        drawn = torch.stack(seen[i])
        known = ~true.isnan()
        assert drawn[:, ~known].isnan().all()
        if IS_FORGET[i] and known.any():
            assert (drawn[:, known] != true[known]).any(1).all()
            assert known.sum() == 1 or len(drawn[:, known].unique(dim=0)) > 1
        else:
            np.testing.assert_array_equal(drawn, true.repeat(8, 1))


def test_the_seed_decides_the_draw_of_findings(make_trainer, make_network, forget, findings) -> None:
    states = []
    for seed in (0, 0, 1):
        network = make_network(classes=5)
        handlers = [RandomLabeling(forget, seed=seed)]
        make_trainer(handlers, network=network, dataset=findings, loss_function=MaskedBCEWithLogitsLoss()).run()
        states.append(network[-1].weight.detach().clone())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("columns", [0, 1])
@pytest.mark.parametrize("multi_label", [None, True])
def test_one_finding_is_flipped_and_what_is_unknown_stays(
    make_trainer, make_network, forget, records, seen_findings, columns, multi_label
) -> None:
    true = [NAN if i % 7 == 0 else (0.75 if i == 1 else float(i % 2)) for i in range(30)]
    shape = (1,) * columns
    dataset = Dataset([{**record, "label": torch.tensor(true[i]).view(shape)} for i, record in enumerate(records)])
    seen, keep = seen_findings
    loss = MaskedBCEWithLogitsLoss()
    make_trainer(
        [RandomLabeling(forget, multi_label=multi_label), keep],
        network=make_network(classes=1),
        dataset=dataset,
        # MONAI's step gives the loss labels of shape B as they are.
        loss_function=loss if columns else type("Flat", (MaskedBCEWithLogitsLoss,), {"forward": flat_forward})(),
    ).run()
    for i, drawn in seen.items():
        expected = 1 - true[i] if IS_FORGET[i] else true[i]
        np.testing.assert_array_equal(torch.stack(drawn).reshape(-1), [expected] * 2)


def flat_forward(self, logits, labels):
    return MaskedBCEWithLogitsLoss.forward(self, logits, labels[:, None])


def test_a_run_in_which_no_forget_sample_has_another_label_raises(make_trainer, make_network, forget, records) -> None:
    labels = [torch.tensor([NAN, 0.5]) if IS_FORGET[i] else torch.tensor([1.0, 0.0]) for i in range(30)]
    dataset = Dataset([{**record, "label": label} for record, label in zip(records, labels)])
    trainer = make_trainer(
        [RandomLabeling(forget)],
        network=make_network(classes=2),
        dataset=dataset,
        loss_function=MaskedBCEWithLogitsLoss(),
    )
    with pytest.raises(RuntimeError, match="None of the 20 forget samples that RandomLabeling met has a finding"):
        trainer.run()


def test_another_loss_takes_findings_when_it_is_told(make_trainer, make_network, forget, records) -> None:
    dataset = Dataset([{**record, "label": torch.tensor([0.0, 1.0, 1.0])} for record in records])
    make_trainer([RandomLabeling(forget, multi_label=True)], dataset=dataset, loss_function=FocalLoss()).run()


@pytest.mark.parametrize("value", ["false", 1, 0.0])
def test_multi_label_that_is_no_truth_value_is_refused(forget, value) -> None:
    with pytest.raises(ValueError, match="multi_label should be true, false or None"):
        RandomLabeling(forget, multi_label=value)
