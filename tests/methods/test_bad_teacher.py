"""Bad teacher: which teacher each sample has, and that neither changes."""

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
from torch.distributions import Bernoulli, Categorical, kl_divergence

from monai_unlearn import ForgetSet
from monai_unlearn.methods import BadTeacher, BatchNormPolicy, FineTune, SaliencyMask
from monai_unlearn.methods.bad_teacher import bad_teaching_loss

NAN = float("nan")
FORGET = IS_FORGET.nonzero().view(-1).tolist()
RETAIN = [i for i in range(30) if not IS_FORGET[i]]
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


@pytest.fixture
def untrained(make_network):
    """A function that makes a network of other random weights."""
    return lambda classes=3: make_network(classes=classes, seed=9)


@pytest.fixture
def met(on):
    """The indices of each batch, and the handler that keeps them."""
    batches: list[list[int]] = []
    return batches, on(Events.ITERATION_COMPLETED, lambda engine: batches.append(engine.state.batch["index"].tolist()))


def images_of(dataset, positions):
    return torch.stack([dataset.data[i]["image"] for i in positions])


# ---- the loss


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 5), st.floats(0.1, 20), st.booleans())
def test_the_loss_is_a_loop_over_the_rows(seed, n, outputs, temperature, findings) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teachers = (5 * torch.randn(n, outputs, generator=generator, dtype=torch.float64) for _ in range(2))
    is_forget = torch.rand(n, generator=generator) < 0.5
    expected = 0.0
    for i in range(n):
        p, q = teachers[i].numpy() / temperature, student[i].numpy() / temperature
        if findings:
            expected += (rel_entr(expit(p), expit(q)) + rel_entr(expit(-p), expit(-q))).sum()
        else:
            expected += rel_entr(softmax(p), softmax(q)).sum()
    result = bad_teaching_loss(
        student, teachers[is_forget], teachers[~is_forget], is_forget, temperature, findings=findings
    )
    assert math.isclose(result.item(), temperature**2 * expected / n, rel_tol=1e-9, abs_tol=1e-9)


def test_rows_of_one_teacher_too_few_raise() -> None:
    with pytest.raises(ValueError, match="student and teacher should both be B × C"):
        bad_teaching_loss(
            torch.zeros(4, 3), torch.zeros(1, 3), torch.zeros(2, 3), torch.tensor([True] * 2 + [False] * 2), 1.0
        )


# ---- training


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_float64_training_equals_a_hand_written_loop(
    make_trainer, make_network, forget, records, untrained, met, kind, temperature
) -> None:
    outputs, _, loss = LABELS[kind]
    data = Dataset(
        [
            {**r, "image": r["image"].double(), "label": r["label"].double() if r["label"].ndim else r["label"]}
            for r in with_labels(records, kind).data
        ]
    )
    network, bad = make_network(classes=outputs).double(), untrained(outputs).double()
    student, good = copy.deepcopy(network), copy.deepcopy(network).eval()
    batches, keep = met
    handler = BadTeacher(forget, initial_state=bad, share=0.5, temperature=temperature)
    make_trainer([handler, keep], network=network, dataset=data, batch_size=6, loss_function=loss,
                 optimizer=torch.optim.SGD(network.parameters(), **SGD)).run()  # fmt: skip

    bad.eval()
    optimizer = torch.optim.SGD(student.parameters(), **SGD)
    kinds = Categorical if kind in ("classes", "two_outputs") else Bernoulli
    assert [len(batch) for batch in batches] == 2 * [6, 6, 6, 2]
    for batch in batches:
        total = 0
        ours = student.train()(images_of(data, batch))
        for row, i in zip(ours, batch):
            with torch.no_grad():
                theirs = (bad if i in FORGET else good)(images_of(data, [i]))[0]
            apart = kl_divergence(kinds(logits=theirs / temperature), kinds(logits=row / temperature))
            total += temperature**2 * apart.sum()
        optimizer.zero_grad()
        (total / len(batch)).backward()
        optimizer.step()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-10, atol=1e-11)
    assert handler.cost.samples == handler.cost.forward == 40
    assert handler.cost.backward == 0


def test_the_teachers_are_the_original_and_the_initial_state_and_stay_so(
    make_trainer, make_network, forget, untrained, on
) -> None:
    network = make_network()
    original, start = copy.deepcopy(network), untrained()
    handler = BadTeacher(forget, initial_state=start)
    start = copy.deepcopy(start)
    seen = []

    def check(engine):
        for teacher, expected in ((handler._competent, original), (handler._incompetent, start)):
            assert teacher is not engine.network
            assert not any(module.training for module in teacher.modules())
            assert not any(parameter.requires_grad for parameter in teacher.parameters())
            assert all(torch.equal(v, expected.state_dict()[name]) for name, v in teacher.state_dict().items())
        seen.append(engine.state.iteration)

    make_trainer([handler, on(Events.ITERATION_COMPLETED, check)], network=network).run()
    assert len(seen) == 4
    assert all((p != q).any() for p, q in zip(network.parameters(), original.parameters()))
    assert handler._competent is None
    assert handler._incompetent is None


@pytest.mark.parametrize("batch_size", [1, 4, 30])
def test_each_sample_passes_its_own_teacher_and_no_other(
    make_trainer, make_network, forget, records, untrained, met, on, batch_size
) -> None:
    batches, keep = met
    handler = BadTeacher(forget, initial_state=untrained(), share=1.0)
    seen: dict[str, list] = {"_incompetent": [], "_competent": []}

    def watch(engine):
        for name, kept in seen.items():
            hook = lambda module, inputs, kept=kept: kept.append(inputs[0])  # noqa: E731
            getattr(handler, name).register_forward_pre_hook(hook)

    started = on(Events.EPOCH_STARTED, watch)
    make_trainer([handler, keep, started], network=make_network(), batch_size=batch_size, max_epochs=1).run()
    order = [i for batch in batches for i in batch]
    for name, is_own in (("_incompetent", True), ("_competent", False)):
        assert all(len(images) for images in seen[name])
        expected = [i for i in order if (i in FORGET) == is_own]
        assert torch.equal(torch.cat(seen[name]), images_of(Dataset(records), expected))


def test_no_label_is_used(make_trainer, make_network, forget, records, untrained, snapshot, same_bits) -> None:
    states = []
    for label in (0, 2):
        network = make_network()
        dataset = Dataset([{**record, "label": torch.tensor(label)} for record in records])
        make_trainer([BadTeacher(forget, initial_state=untrained())], network=network, dataset=dataset).run()
        states.append(snapshot(network))
    assert same_bits(*states)


def test_a_finding_that_is_not_known_counts_like_any_other(
    make_trainer, make_network, forget, records, untrained, snapshot, same_bits
) -> None:
    states = []
    for fill in (NAN, 1.0):
        network = make_network(classes=2)
        data = with_labels(records, "findings").data
        dataset = Dataset([{**record, "label": record["label"].nan_to_num(fill)} for record in data])
        make_trainer([BadTeacher(forget, initial_state=untrained(2))], network=network, dataset=dataset,
                     loss_function=LABELS["findings"][2]).run()  # fmt: skip
        states.append(snapshot(network))
    assert same_bits(*states)


@pytest.mark.parametrize(("share", "kept"), [(0.01, 1), (0.3, 6), (0.5, 10), (1, 20)])
def test_an_epoch_is_the_forget_set_and_the_same_share_of_the_retain_set(
    make_trainer, forget, untrained, met, share, kept
) -> None:
    batches, keep = met
    trainer = make_trainer([BadTeacher(forget, initial_state=untrained(), share=share), keep], max_epochs=3)
    trainer.run()
    length = trainer.state.epoch_length
    assert len(batches) == 3 * length
    epochs = [[i for batch in batches[length * e : length * (e + 1)] for i in batch] for e in range(3)]
    rows = {i for epoch in epochs for i in epoch}
    assert set(FORGET) <= rows
    assert len(rows) == 10 + kept
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_seed_draws_the_retain_samples(make_trainer, forget, untrained, on) -> None:
    drawn = []
    for seed in (0, 0, 1, 2):
        rows: set[int] = set()
        keep = on(
            Events.ITERATION_COMPLETED, lambda engine, rows=rows: rows.update(engine.state.batch["index"].tolist())
        )
        make_trainer([BadTeacher(forget, initial_state=untrained(), seed=seed), keep]).run()
        drawn.append(rows)
    assert drawn[0] == drawn[1]
    assert len({frozenset(rows) for rows in drawn}) == 3


def test_the_share_is_one_of_the_retain_samples_that_are_at_hand(make_trainer, forget, records, untrained, met) -> None:
    batches, keep = met
    whole = DataLoader(Dataset(records), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0))
    part = forget.with_part_of_retain(whole, 0.5, seed=3)
    make_trainer([BadTeacher(forget, initial_state=untrained(), share=0.4), keep], train_data_loader=part).run()
    rows = {i for batch in batches for i in batch}
    assert len(rows) == 10 + 4
    assert rows <= {record["index"] for record in (part.dataset[i] for i in range(len(part.dataset)))}


def test_the_forget_set_follows_one_teacher_and_the_retain_set_the_other(
    make_trainer, make_network, forget, records, untrained
) -> None:
    network = make_network()
    make_trainer([FineTune(ForgetSet([29]))], network=network, max_epochs=15).run()
    original, bad = copy.deepcopy(network).eval(), untrained().eval()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    handlers = [BadTeacher(forget, initial_state=bad, share=1.0), BatchNormPolicy(forget, policy="frozen")]
    make_trainer(handlers, network=network, optimizer=optimizer, max_epochs=10).run()

    def apart(teacher, student, positions):
        images = images_of(Dataset(records), positions)
        with torch.no_grad():
            p, q = Categorical(logits=teacher.eval()(images)), Categorical(logits=student.eval()(images))
        return float(kl_divergence(p, q).mean())

    assert apart(bad, network, FORGET) < 0.8 * apart(bad, original, FORGET)
    assert apart(bad, network, FORGET) / apart(bad, original, FORGET) < apart(bad, network, RETAIN) / apart(
        bad, original, RETAIN
    )
    assert apart(original, network, RETAIN) < apart(original, network, FORGET)


@pytest.mark.parametrize("form", ["function", "state", "path"])
def test_the_initial_state_is_taken_as_in_retraining(
    make_trainer, make_network, forget, untrained, snapshot, same_bits, tmp_path, form
) -> None:
    torch.save(untrained().state_dict(), tmp_path / "start.pt")
    given = {"function": untrained, "state": untrained().state_dict(), "path": tmp_path / "start.pt"}[form]
    states = []
    for start in (given, untrained()):
        network = make_network()
        make_trainer([BadTeacher(forget, initial_state=start)], network=network).run()
        states.append(snapshot(network))
    assert same_bits(*states)


def test_a_live_state_that_training_changes_stays_what_it_was(
    make_trainer, make_network, forget, on, snapshot, same_bits
) -> None:
    """The bundle's own: the network's first state is given, then the original's weights are loaded into it."""
    network = make_network(seed=9)
    handler = BadTeacher(forget, initial_state=network.state_dict())
    network.load_state_dict(make_network().state_dict())
    seen = []
    trainer = make_trainer([handler], network=network, max_epochs=1)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: seen.append(copy.deepcopy(handler._incompetent))
    )
    trainer.run()
    assert all(torch.equal(v, seen[0].state_dict()[name]) for name, v in make_network(seed=9).state_dict().items())


def test_further_inputs_of_the_network_go_with_their_rows(make_trainer, make_network, forget, records) -> None:
    class Two(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.image = make_network(seed=seed)

        def forward(self, images, age, *, scale):
            return self.image(images) * scale + age

    def prepare(batch, device, non_blocking, **kwargs):
        return batch["image"], batch["label"], (batch["index"].double()[:, None] / 30,), {"scale": 2.0}

    data = Dataset([{**record, "image": record["image"].double()} for record in records])
    network, bad = Two(0).double(), Two(9).double().eval()
    expected, good = copy.deepcopy(network), copy.deepcopy(network).eval()
    make_trainer([BadTeacher(forget, initial_state=bad, share=1.0)], network=network, dataset=data, batch_size=30,
                 shuffle=False, prepare_batch=prepare, max_epochs=1).run()  # fmt: skip
    images, age = images_of(data, range(30)), torch.arange(30).double()[:, None] / 30
    optimizer = torch.optim.SGD(expected.parameters(), **SGD)
    with torch.no_grad():
        theirs = torch.where(IS_FORGET[:, None], bad(images, age, scale=2.0), good(images, age, scale=2.0))
    ours = expected.train()(images, age, scale=2.0)
    kl_divergence(Categorical(logits=theirs), Categorical(logits=ours)).mean().backward()
    optimizer.step()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-10, atol=1e-11)


def test_accumulated_gradients_are_those_of_a_larger_batch(
    make_trainer, make_network, forget, double, untrained
) -> None:
    states = []
    for batch_size, steps in ((10, 2), (20, 1)):
        network = make_network().double()
        handlers = [BadTeacher(forget, initial_state=untrained(), share=0.5), BatchNormPolicy(forget, policy="frozen")]
        trainer = make_trainer(handlers, network=network, dataset=double, batch_size=batch_size, shuffle=False)
        trainer.accumulation_steps = steps
        trainer.run()
        states.append(network.state_dict())
    torch.testing.assert_close(*states, rtol=1e-10, atol=1e-11)


@pytest.mark.filterwarnings("ignore::UserWarning")  # autocast and its scaler look for CUDA
def test_loss_scaling_changes_nothing_but_rounding(make_trainer, make_network, forget, untrained, on) -> None:
    def use_scaler(engine):
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    states = []
    for amp in (False, True):
        network = make_network()
        handlers = [on(Events.STARTED, use_scaler), BadTeacher(forget, initial_state=untrained())]
        make_trainer(handlers, network=network, amp=amp).run()
        states.append(network.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)


def test_masked_weights_do_not_move(make_trainer, make_network, forget, untrained) -> None:
    network = make_network()
    saliency, statistics = SaliencyMask(forget), BatchNormPolicy(forget)
    before = copy.deepcopy(dict(network.named_parameters()))
    make_trainer([BadTeacher(forget, initial_state=untrained()), saliency, statistics], network=network).run()
    assert saliency.cost.samples == 10
    for name, parameter in network.named_parameters():
        frozen = ~saliency.mask[name]
        assert torch.equal(parameter[frozen], before[name][frozen])
    assert any((parameter != before[name]).any() for name, parameter in network.named_parameters())


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_task_and_network_is_taught(make_trainer, forget, records, kind, name) -> None:
    task = task_of(records, kind, name)
    network = task["network"]
    before = copy.deepcopy(network)
    torch.manual_seed(5)
    start = NETWORKS[name][1](LABELS[kind][0])
    make_trainer([BadTeacher(forget, initial_state=start)], max_epochs=1, **task).run()
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert any((p != q).any() for p, q in zip(network.parameters(), before.parameters()))


# ---- loaders and bad input


class NoRecords(torch.utils.data.Dataset):
    """A data set that can't say what is in it."""

    def __init__(self, records):
        self.items = records

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_a_given_loader_is_used(make_trainer, forget, records, loader_of, untrained, met) -> None:
    batches, keep = met
    loader = loader_of([records[i] for i in [*FORGET, 7, 25]], 5)
    handler = BadTeacher(forget, initial_state=untrained(), loader=loader)
    make_trainer([handler, keep], dataset=NoRecords(records)).run()
    assert batches == 2 * [FORGET[:5], FORGET[5:], [7, 25]]


def test_a_run_that_meets_no_forget_sample_raises(make_trainer, forget, records, untrained) -> None:
    loader = DataLoader(NoRecords(records[5:12]), batch_size=7)
    with pytest.raises(RuntimeError, match="BadTeacher met no forget sample in 2 iterations, so nothing was unlearned"):
        make_trainer([BadTeacher(forget, initial_state=untrained(), loader=loader)]).run()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_part_of_the_request_that_is_not_there_raises(make_trainer, untrained, share) -> None:
    forget = ForgetSet(["P0", "P7"], key="patient")
    with pytest.raises(ValueError, match="1 of the 2 ids to forget are not in the training data"):
        make_trainer([BadTeacher(forget, initial_state=untrained(), share=share)]).run()


def test_a_loader_without_a_batch_raises(make_trainer, forget, records, untrained) -> None:
    empty = DataLoader(NoRecords(records[:3]), batch_size=8, drop_last=True)
    with pytest.raises(ValueError, match="loader of forget and retain samples should give at least one batch"):
        make_trainer([BadTeacher(forget, initial_state=untrained(), loader=empty)]).run()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0}, r"share should lie in \(0, 1\], but got 0"),
        ({"share": 1.1}, r"share should lie in \(0, 1\], but got 1.1"),
        ({"share": NAN}, r"share should lie in \(0, 1\]"),
        ({"share": True}, r"share should lie in \(0, 1\], but got True"),
        ({"temperature": 0}, "temperature should be greater than 0, but got 0"),
        ({"temperature": math.inf}, "temperature should be greater than 0"),
        ({"multi_label": "no"}, "multi_label should be true, false or None, but got 'no'"),
    ],
    ids=str,
)
def test_an_argument_outside_its_range_raises(forget, untrained, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        BadTeacher(forget, initial_state=untrained(), **arguments)


def test_the_original_itself_is_no_bad_teacher(make_trainer, make_network, forget) -> None:
    network = make_network()
    with pytest.raises(ValueError, match="knows nothing, but they are the original's own"):
        make_trainer([BadTeacher(forget, initial_state=network)], network=network).run()


def test_a_state_of_another_network_raises(make_trainer, make_network, forget, untrained, snapshot, same_bits) -> None:
    network = make_network()
    before = snapshot(network)
    with pytest.raises(ValueError, match="exactly the network's 9 parameters and buffers, but 0 are missing, 2 have"):
        make_trainer([BadTeacher(forget, initial_state=untrained(4))], network=network).run()
    assert same_bits(snapshot(network), before)


def test_a_loss_of_probabilities_is_refused(make_trainer, make_network, forget, records) -> None:
    network = nn.Sequential(make_network(classes=1), nn.Sigmoid())
    handler = BadTeacher(forget, initial_state=nn.Sequential(make_network(classes=1, seed=9), nn.Sigmoid()))
    dataset = with_labels(records, "one_output")
    with pytest.raises(TypeError, match="BadTeacher should be given a network whose outputs are logits, but BCELoss"):
        make_trainer([handler], network=network, dataset=dataset, loss_function=nn.BCELoss()).run()


def test_a_single_class_is_refused(make_trainer, make_network, forget, records, untrained) -> None:
    handler = BadTeacher(forget, initial_state=untrained(1), multi_label=False)
    dataset, loss = with_labels(records, "one_output"), LABELS["one_output"][2]
    with pytest.raises(ValueError, match="multi_label should be true for a network with one output"):
        make_trainer([handler], network=make_network(classes=1), dataset=dataset, loss_function=loss).run()
