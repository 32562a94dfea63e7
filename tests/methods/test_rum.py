"""RUM: who is in which third, what is done with it and when, and that no forget sample keeps its true label."""

from __future__ import annotations

import logging
import math
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Events
from method_tasks import IS_FORGET, LABELS, NETWORKS, task_of, with_labels
from monai.data import Dataset
from torch import nn
from torch.nn import functional

from monai_unlearn import ForgetSet
from monai_unlearn.methods import RUM, BatchNormPolicy, FineTune, RandomLabeling, SaliencyMask
from monai_unlearn.methods.rum import error_norm, shared_out, strata
from monai_unlearn.metrics import el2n

FORGET = [i for i in range(30) if IS_FORGET[i]]
RETAIN = [i for i in range(30) if not IS_FORGET[i]]
NAN = float("nan")
# Of the forget samples by their index, so that the thirds are known: 0 to 3, 4 and 15 and 16, 17 to 19.
SCORES = {i: float(i) for i in FORGET}
LOW, MIDDLE, HIGH = [0, 1, 2, 3], [4, 15, 16], [17, 18, 19]


@pytest.fixture
def by_index() -> ForgetSet:
    """The forget set of the fixture ``forget``, image by image."""
    return ForgetSet(FORGET, key="index")


@pytest.fixture
def seen(on):
    """A handler that notes (epoch, index, label trained on, position of the iteration) of each sample."""
    rows = []

    def note(engine):
        batch = engine.state.batch
        for index, label in zip(batch["index"].tolist(), batch["label"].tolist()):
            rows.append((engine.state.epoch, index, label, engine.state.iteration))

    handler = on(Events.ITERATION_COMPLETED, note)
    handler.rows = rows
    return handler


# The pure functions


@settings(max_examples=100, deadline=None)
@given(scores=st.lists(st.floats(-5, 5), min_size=3, max_size=40).filter(lambda values: len(set(values)) > 1))
def test_the_strata_are_thirds_in_the_order_of_the_scores(scores) -> None:
    parts = strata(scores)
    assert sorted(chain(*parts)) == list(range(len(scores)))
    assert all(part == sorted(part) for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for lower, higher in pairwise(parts):
        assert len(lower) >= len(higher) >= 1
        assert max(scores[i] for i in lower) <= min(scores[i] for i in higher)
        ties = [i for i in lower if scores[i] == min(scores[j] for j in higher)]
        assert all(i < j for i in ties for j in higher if scores[j] == scores[i])


def test_the_norm_of_the_error_is_the_difficulty_that_requests_go_by() -> None:
    logits = 3 * torch.randn(6, 3)
    classes = torch.tensor([0, 1, 2, 2, 1, 0])
    findings = torch.tensor([[0, 1, NAN], [NAN, NAN, NAN], [1, 1, 0], [0.5, 0, 0], [1, NAN, NAN], [0, 0, 0]])
    assert torch.equal(error_norm(logits, classes[:, None]), el2n(logits, classes))
    found = error_norm(logits, findings, findings=True)
    torch.testing.assert_close(found, el2n(logits, findings), rtol=0, atol=0, equal_nan=True)
    one = error_norm(logits[:, :1], findings[:, 0], findings=True)
    torch.testing.assert_close(one, el2n(logits[:, :1], findings[:, :1]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("labels", "findings"), [((6, 3), False), ((6,), True), ((6, 2), True)])
def test_labels_of_another_form_raise(labels, findings) -> None:
    with pytest.raises(ValueError, match=r"outputs \(6, 3\) and labels .*Give it scores"):
        error_norm(torch.zeros(6, 3), torch.zeros(labels), findings)


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_a_score_that_is_none_raises(bad) -> None:
    with pytest.raises(ValueError, match="finite score, but 2 of 5 have none"):
        strata([0.1, bad, 0.3, bad, 0.2])


def test_too_few_samples_and_equal_scores_raise() -> None:
    with pytest.raises(ValueError, match=r"at least one sample, but there are 2 in all.*another method"):
        strata([0.1, 0.2])
    with pytest.raises(ValueError, match=r"should differ, but all 4 are 0.5"):
        strata([0.5] * 4)


@given(parts=st.integers(1, 3), more=st.integers(0, 20))
def test_epochs_are_shared_out_evenly_and_the_last_get_the_rest(parts, more) -> None:
    shares = shared_out(parts + more, parts)
    assert sum(shares) == parts + more
    assert len(shares) == parts
    assert shares == sorted(shares)
    assert 1 <= min(shares) >= max(shares) - 1


# The handler


@pytest.mark.parametrize("scores", [SCORES, None])
def test_each_stratum_is_treated_in_its_epochs(make_trainer, by_index, seen, scores) -> None:
    handler = RUM(by_index, low="finetune", middle="random_labeling", scores=scores)
    make_trainer([handler, seen], max_epochs=7).run()
    trained = {epoch: {i for e, i, *_ in seen.rows if e == epoch} for epoch in range(1, 8)}
    for epoch in (1, 2):
        assert trained[epoch] == set(RETAIN)
    for epochs in ((3, 4), (5, 6, 7)):
        parts = [trained[epoch] - set(RETAIN) for epoch in epochs]
        assert all(part == parts[0] for part in parts)
        assert len(parts[0]) == 3
        if scores is not None:
            assert parts[0] == set(MIDDLE if epochs[0] == 3 else HIGH)
        assert all(set(RETAIN) <= trained[epoch] for epoch in epochs)


@pytest.mark.parametrize("low", ["nothing", "finetune", "random_labeling"])
@pytest.mark.parametrize("middle", ["nothing", "finetune", "random_labeling"])
@pytest.mark.parametrize("high", ["nothing", "finetune", "random_labeling"])
def test_no_forget_sample_is_ever_trained_on_with_its_true_label(make_trainer, by_index, seen, low, middle, high):
    """Public code goes on training on the strata whose turn is still to come."""
    treatments = (low, middle, high)
    if set(treatments) == {"nothing"}:
        with pytest.raises(ValueError, match="should be another treatment than nothing"):
            RUM(by_index, low=low, middle=middle, high=high)
        return
    handler = RUM(by_index, low=low, middle=middle, high=high, scores=SCORES)
    make_trainer([handler, seen], max_epochs=4, batch_size=5).run()
    wrong = [(index, label) for _, index, label, _ in seen.rows if index in FORGET]
    assert all(label != index % 3 for index, label in wrong)
    assert all(label == index % 3 for _, index, label, _ in seen.rows if index in RETAIN)
    relabeled = {i for part, how in zip((LOW, MIDDLE, HIGH), treatments) if how == "random_labeling" for i in part}
    assert {index for index, _ in wrong} == relabeled


def test_a_run_is_two_loops_one_after_the_other(make_trainer, make_network, by_index, double, records) -> None:
    """Fine-tuning, then random labels for the highest third, with one optimizer, by hand in float64."""
    network = make_network().double()
    handler = RUM(by_index, scores=SCORES, seed=5)
    make_trainer([handler], network=network, dataset=double, shuffle=False, batch_size=12).run()

    expected = make_network().double()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    drawn = torch.Generator().manual_seed(5)
    for part in (RETAIN, sorted(RETAIN + HIGH)):
        for start in range(0, len(part), 12):
            rows = part[start : start + 12]
            labels = torch.tensor([int(records[i]["label"]) for i in rows])
            hit = torch.tensor([i in HIGH for i in rows])
            if hit.any():
                labels[hit] = (labels[hit] + torch.randint(1, 3, (int(hit.sum()),), generator=drawn)) % 3
            optimizer.zero_grad()
            output = expected.train()(torch.stack([records[i]["image"].double() for i in rows]))
            functional.cross_entropy(output, labels).backward()
            optimizer.step()
    for one, other in zip(network.state_dict().values(), expected.state_dict().values()):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stratum", ["low", "middle", "high"])
def test_fine_tuning_alone_is_fine_tuning_bit_by_bit(
    make_trainer, make_network, by_index, snapshot, same_bits, stratum
) -> None:
    states = []
    treatments = {name: "finetune" if name == stratum else "nothing" for name in ("low", "middle", "high")}
    for handler in (RUM(by_index, **treatments), FineTune(by_index)):
        network = make_network()
        make_trainer([handler], network=network, max_epochs=3).run()
        states.append(snapshot(network))
    assert same_bits(*states)


def test_all_strata_but_one_left_out_is_random_labeling_of_that_one(
    make_trainer, make_network, by_index, records, snapshot, same_bits
) -> None:
    states = []
    others = Dataset([records[i] for i in range(30) if i not in LOW + MIDDLE])
    runs = [
        (RUM(by_index, middle="nothing", scores=SCORES), None),
        (RandomLabeling(ForgetSet(HIGH, key="index")), others),
    ]
    for handler, dataset in runs:
        network = make_network()
        make_trainer([handler], network=network, max_epochs=3, **({"dataset": dataset} if dataset else {})).run()
        states.append(snapshot(network))
    assert same_bits(*states)


def test_a_shorter_epoch_ends_where_the_others_do(make_trainer, by_index, seen, on) -> None:
    ends = []
    end = on(Events.EPOCH_COMPLETED, lambda engine: ends.append((engine.state.iteration, engine.state.epoch_length)))
    trainer = make_trainer([RUM(by_index, scores=SCORES), seen, end], max_epochs=4, batch_size=4)
    trainer.run()
    assert ends == [(6, 6), (12, 6), (18, 6), (24, 6)]  # 5 steps over 20 retain samples, 6 over 23
    assert [len({row[3] for row in seen.rows if row[0] == epoch}) for epoch in (1, 2, 3, 4)] == [5, 5, 6, 6]
    assert all(sum(row[0] == epoch for row in seen.rows) == (20 if epoch < 3 else 23) for epoch in (1, 2, 3, 4))


def test_the_score_is_the_originals_norm_of_the_error(make_trainer, make_network, by_index, records, seen) -> None:
    network = make_network()
    with torch.no_grad():
        outputs = make_network().eval()(torch.stack([records[i]["image"] for i in FORGET]))
    errors = (outputs.softmax(1) - functional.one_hot(torch.tensor(FORGET) % 3, 3)).norm(dim=1)
    order = [FORGET[i] for i in errors.argsort().tolist()]
    handler = RUM(by_index)
    make_trainer([handler, seen], network=network).run()
    assert {index for epoch, index, *_ in seen.rows if index in FORGET} == set(order[7:])
    assert (handler.cost.samples, handler.cost.forward, handler.cost.backward) == (10, 10, 0)


def test_scores_go_by_the_key_of_the_forget_set(make_trainer, records, seen) -> None:
    """By patient: all images of the harder one come last, and one of the five is in the middle third."""
    forget = ForgetSet(["P0", "P3"], key="patient")
    make_trainer([RUM(forget, scores={"P0": 2.0, "P3": 1.0, "P9": 5.0}), seen]).run()
    hardest = {index for _, index, *_ in seen.rows if index in FORGET}
    assert hardest == {2, 3, 4}


def test_a_forget_set_by_flag_needs_no_scores(make_trainer, records, seen) -> None:
    flagged = Dataset([{**record, "is_forget": i in FORGET} for i, record in enumerate(records)])
    make_trainer([RUM(ForgetSet.flagged()), seen], dataset=flagged).run()
    assert len({index for _, index, *_ in seen.rows if index in FORGET}) == 3
    with pytest.raises(ValueError, match=r"known by a flag, 'is_forget'.*by an id"):
        make_trainer([RUM(ForgetSet.flagged(), scores=SCORES)], dataset=flagged).run()


def test_a_part_of_the_retain_set(make_trainer, by_index, seen, records) -> None:
    trainer = make_trainer([RUM(by_index, scores=SCORES), seen])
    trainer.data_loader = by_index.with_part_of_retain(trainer.data_loader, 0.5)
    trainer.run()
    indices = {index for _, index, *_ in seen.rows}
    assert indices & set(FORGET) == set(HIGH)
    assert len(indices - set(FORGET)) == 10


def test_the_policy_still_finds_the_retain_samples(make_trainer, by_index) -> None:
    statistics = BatchNormPolicy(by_index)
    make_trainer([RUM(by_index), statistics]).run()
    assert statistics.cost.samples == 20


def test_with_a_saliency_mask_frozen_weights_stay_bit_identical(make_trainer, make_network, by_index, snapshot):
    network = make_network()
    before = snapshot(network)
    mask = SaliencyMask(by_index, ratio=0.5)
    trainer = make_trainer([RUM(by_index), mask], network=network)
    masks = {}
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: masks.update(mask.mask))
    trainer.run()
    for name, value in network.named_parameters():
        assert torch.equal(value.detach()[~masks[name]], before[name][~masks[name]])
    assert any((value.detach() != before[name]).any() for name, value in network.named_parameters())


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_two_and_three_dimensions_and_all_kinds_of_labels(
    make_trainer, by_index, records, seen, name, kind
) -> None:
    task = task_of(records, kind, name)
    start = [parameter.detach().clone() for parameter in task["network"].parameters()]
    scores = SCORES if name == "densenet_3d" else None  # untrained it answers all images alike
    make_trainer([RUM(by_index, scores=scores), seen], **task).run()
    assert any((one != other).any() for one, other in zip(start, task["network"].parameters()))
    true = {i: LABELS[kind][1](i).tolist() for i in range(30)}
    met = [(index, label) for _, index, label, _ in seen.rows if index in FORGET]
    assert met
    # Where one of two findings is not known, NaN is no true label.
    assert all(label != true[index] for index, label in met if not any(map(math.isnan, _listed(true[index]))))


def _listed(value):
    return value if isinstance(value, list) else [value]


def test_scores_of_findings_are_taken_over_the_known_ones(make_trainer, make_network, by_index, records, seen) -> None:
    dataset = with_labels(records, "findings")
    network = make_network(2)
    with torch.no_grad():
        outputs = make_network(2).eval()(torch.stack([records[i]["image"] for i in FORGET])).sigmoid()
    labels = torch.stack([LABELS["findings"][1](i) for i in FORGET])
    errors = (outputs - labels).square().nanmean(1)
    order = [FORGET[i] for i in errors.argsort().tolist()]
    make_trainer([RUM(by_index), seen], network=network, dataset=dataset, loss_function=LABELS["findings"][2]).run()
    assert {index for _, index, *_ in seen.rows if index in FORGET} == set(order[7:])


def test_no_id_reaches_the_log(make_trainer, records, caplog) -> None:
    names = Dataset([{**record, "patient": f"Zq7-{i:04d}"} for i, record in enumerate(records)])
    forget = ForgetSet([f"Zq7-{i:04d}" for i in FORGET], key="patient")
    scores = {f"Zq7-{i:04d}": float(i) for i in FORGET}
    with caplog.at_level(logging.DEBUG):
        make_trainer([RUM(forget, scores=scores)], dataset=names).run()
        with pytest.raises(ValueError, match="1 of 10 are not there") as error:
            make_trainer([RUM(forget, scores=dict(list(scores.items())[1:]))], dataset=names).run()
    assert "thirds of 4, 3, 3 samples" in caplog.text
    assert "Zq7" not in caplog.text + str(error.value)


# Bad input


@pytest.mark.parametrize("stratum", ["low", "middle", "high"])
def test_a_treatment_that_is_none_raises(by_index, stratum) -> None:
    with pytest.raises(ValueError, match=rf"{stratum} should be one of nothing, finetune, .*but got 'retrain'"):
        RUM(by_index, **{stratum: "retrain"})


def test_scores_that_are_no_mapping_raise(by_index) -> None:
    with pytest.raises(ValueError, match="scores should map ids to numbers, but got a list"):
        RUM(by_index, scores=[1.0, 2.0])


def test_labels_that_can_not_be_redrawn_raise_at_once(by_index) -> None:
    with pytest.raises(ValueError, match="num_classes should be at least 2"):
        RUM(by_index, num_classes=1)


def test_fewer_epochs_than_strata_raise(make_trainer, by_index) -> None:
    with pytest.raises(ValueError, match=r"epochs should be at least 2, one for each of middle, high, but .* has 1"):
        make_trainer([RUM(by_index)], max_epochs=1).run()


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_a_forget_sample_without_a_score_raises(make_trainer, by_index, bad) -> None:
    with pytest.raises(ValueError, match="finite score, but 1 of 10 have none"):
        make_trainer([RUM(by_index, scores={**SCORES, 16: bad})]).run()
    make_trainer([RUM(by_index, scores={**SCORES, 5: bad})]).run()  # a retain sample's does not matter


def test_too_small_a_forget_set_raises_and_changes_nothing(make_trainer, make_network, snapshot, same_bits) -> None:
    network = make_network()
    before = snapshot(network)
    with pytest.raises(ValueError, match="at least one sample, but there are 2 in all"):
        make_trainer([RUM(ForgetSet([3, 4]))], network=network).run()
    assert same_bits(before, snapshot(network))


def test_a_network_that_answers_nan_has_no_scores(make_trainer, make_network, by_index) -> None:
    network = make_network()
    network[5].bias.data.fill_(NAN)
    with pytest.raises(ValueError, match="finite score, but 10 of 10 have none"):
        make_trainer([RUM(by_index)], network=network).run()


def test_probabilities_are_refused(make_trainer, make_network, by_index, records) -> None:
    network = nn.Sequential(make_network(1), nn.Sigmoid())
    task = {"network": network, "dataset": with_labels(records, "one_output"), "loss_function": nn.BCELoss()}
    with pytest.raises(TypeError, match="outputs are logits, but BCELoss takes probabilities"):
        make_trainer([RUM(by_index)], **task).run()
    make_trainer([RUM(by_index, scores=SCORES)], **task).run()


def test_the_record_of_a_training_gives_the_scores(make_trainer, by_index, seen, tmp_path) -> None:
    from monai_unlearn.handlers import SampleHistory, read_history

    make_trainer([SampleHistory(tmp_path / "history.csv")]).run()
    scores = read_history(tmp_path / "history.csv", 30)["mean_loss"]
    make_trainer([RUM(by_index, scores=scores.to_dict()), seen]).run()
    hardest = sorted(FORGET, key=lambda i: scores[i])[7:]
    assert {index for _, index, *_ in seen.rows if index in FORGET} == set(hardest)
