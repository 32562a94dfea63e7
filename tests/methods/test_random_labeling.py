"""Random labeling: which labels the network is trained on, and that nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from ignite.engine import Events
from monai.data import CacheDataset, DataLoader, Dataset, ThreadDataLoader
from scipy.stats import chisquare
from torch import nn
from torch.nn import functional

from monai_unlearn import ForgetSet
from monai_unlearn.methods import RandomLabeling
from monai_unlearn.methods.random_labeling import other_labels

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
def test_one_hot_and_multi_label_targets_are_refused(make_trainer, forget, records, rows) -> None:
    dataset = Dataset([{**record, "label": torch.tensor(rows, dtype=torch.float32)} for record in records])
    trainer = make_trainer([RandomLabeling(forget)], dataset=dataset, loss_function=nn.BCEWithLogitsLoss())
    with pytest.raises(ValueError, match=r"one class index a sample.*one-hot targets are not supported"):
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
