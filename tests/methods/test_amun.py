"""AMUN: the nearest images that are answered wrong, and training on them beside the data."""

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
from torch import nn
from torch.nn import functional

from monai_unlearn import ForgetSet
from monai_unlearn.methods import AMUN, BatchNormPolicy, FineTune, SaliencyMask
from monai_unlearn.methods.amun import nearest_adversarial, normalised_step

NAN = float("nan")
FORGET = IS_FORGET.nonzero().view(-1).tolist()
RETAIN = [i for i in range(30) if not IS_FORGET[i]]
CLASSES = [kind for kind in LABELS if kind != "findings"]


def batch_of(dataset, positions):
    images = torch.stack([dataset.data[i]["image"] for i in positions])
    return images, torch.stack([torch.as_tensor(dataset.data[i]["label"]) for i in positions])


def in_double(dataset):
    def label(value):
        return value.double() if value.is_floating_point() else value

    return Dataset([{**r, "image": r["image"].double(), "label": label(r["label"])} for r in dataset.data])


@pytest.fixture
def trained(make_trainer, make_network, records):
    """A network that was trained for a while: one that answers all alike has no adversarial examples."""

    def make(kind="classes"):
        outputs, _, loss = LABELS[kind]
        network = make_network(classes=outputs)
        make_trainer(network=network, dataset=with_labels(records, kind), loss_function=loss, max_epochs=15).run()
        network.zero_grad()
        return network

    return make


# ---- the functions


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10**6), st.floats(0, 3), st.sampled_from([1e-30, 1.0, 1e30]))
def test_a_step_is_a_tenth_of_the_radius_along_the_gradient_within_ball_and_range(seed, radius, size) -> None:
    generator = torch.Generator().manual_seed(seed)
    images, gradients, away = (torch.randn(2, 1, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    radius = torch.full((2, 1, 1, 1), radius, dtype=torch.float64)
    start = images + radius * away / 4
    result = normalised_step(start, size * gradients, images, radius)
    for image, gradient, begin, end, r in zip(images, gradients, start, result, radius.flatten()):
        aim = begin + r / 10 * gradient / gradient.norm()
        if (aim - image).norm() > r:
            aim = image + r * (aim - image) / (aim - image).norm()
        torch.testing.assert_close(end, aim.clamp(image.min(), image.max()), rtol=1e-9, atol=1e-9)
        assert (end - image).norm() <= r + 1e-9
    assert torch.equal(normalised_step(images, torch.zeros_like(images), images, radius), images)


def search_by_hand(network, image, true, epsilon, steps):
    """The search for one image, by the definition; None where there is nothing to be found."""
    low, high = image.min(), image.max()
    while True:
        moved = image.clone()
        for step in range(steps + 1):
            moved = moved.detach().requires_grad_()
            logits = network(moved[None])[0]
            if int(logits.argmax()) != true:
                return moved.detach(), int(logits.argmax())
            if step == steps:
                break
            (slope,) = torch.autograd.grad(-logits.log_softmax(0)[true], moved)
            with torch.no_grad():
                radius = epsilon * (high - low)
                moved = moved + radius / 10 * slope / slope.norm()
                away = moved - image
                moved = image + away * min(1.0, float(radius / away.norm()))
                moved = moved.clamp(low, high)
        if epsilon >= math.sqrt(image.numel()):
            return None
        epsilon *= 2


@pytest.mark.parametrize(("epsilon", "steps"), [(0.04, 20), (0.5, 3), (30.0, 15)])
def test_the_search_is_that_of_a_loop_over_single_images(trained, records, epsilon, steps) -> None:
    network = trained().double().eval()
    images, labels = batch_of(in_double(Dataset(records)), range(30))
    examples, answers, found = nearest_adversarial(network, images, labels, epsilon, steps)
    wrong_already = 0
    for image, true, example, answer, some in zip(images, labels.tolist(), examples, answers.tolist(), found.tolist()):
        expected = search_by_hand(network, image, true, epsilon, steps)
        assert some == (expected is not None)
        if expected is None:
            assert torch.equal(example, image)
            continue
        torch.testing.assert_close(example, expected[0], rtol=1e-9, atol=1e-10)
        assert answer == expected[1] != true
        wrong_already += torch.equal(example, image)
    assert 0 < wrong_already < found.sum()


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.01, 0.35), st.sampled_from([0.01, 0.04, 0.2]))
def test_of_a_linear_network_it_is_as_near_as_the_boundary(seed, distance, epsilon) -> None:
    """In closed form: with two classes the way is straight, to a distance of the margin over the weights' norm."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, generator=generator, dtype=torch.float64)
    weight[:2] = 0
    weight /= weight.norm()
    # Black and white at places that do not count, so that the range is [0, 1] and nothing is cut.
    image = torch.tensor([0, 1, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    bias = distance - weight @ image

    def classify(x):
        z = x @ weight + bias
        return torch.stack([torch.zeros_like(z), 3 * z], 1)

    examples, answers, found = nearest_adversarial(classify, image[None], torch.tensor([1]), epsilon)
    assert found.tolist() == [True]
    assert answers.tolist() == [0]
    gone = float((examples[0] - image).norm())
    assert distance - 1e-9 <= gone <= max(1.2 * distance, distance + epsilon / 10) + 1e-9
    torch.testing.assert_close((image - examples[0]) / gone, weight, rtol=1e-6, atol=1e-6)


def test_it_is_the_same_search_in_any_units(trained, records) -> None:
    network = trained().double().eval()
    images, labels = batch_of(in_double(Dataset(records)), range(30))
    examples, answers, found = nearest_adversarial(network, images, labels, 0.04, 10)
    other = nearest_adversarial(lambda x: network((x - 3) / 20), 20 * images + 3, labels, 0.04, 10)
    torch.testing.assert_close(other[0], 20 * examples + 3, rtol=1e-8, atol=1e-8)
    assert torch.equal(other[1], answers)
    assert torch.equal(other[2], found)


def test_where_there_is_none_it_ends_and_says_so() -> None:
    calls = []

    def always_the_first(x):
        calls.append(len(x))
        return torch.stack([x.sum((1, 2, 3)) * 0 + 1, x.sum((1, 2, 3)) * 0], 1)

    images = torch.rand(3, 1, 4, 4)
    examples, answers, found = nearest_adversarial(always_the_first, images, torch.tensor([0, 0, 1]), 0.5, 2)
    assert found.tolist() == [False, False, True]  # the last is answered wrong as it is
    assert torch.equal(examples, images)
    assert answers.tolist() == [0, 0, 0]
    assert calls == [3, 2, 2, *([2] * 3 * 3)]  # radii of 0.5, 1, 2, and 4, which is the diagonal


def test_the_search_leaves_network_and_images_alone(make_network) -> None:
    network, images = make_network().eval(), torch.randn(5, 1, 6, 6)
    before, pixels = copy.deepcopy(network.state_dict()), images.clone()
    nearest_adversarial(network, images, torch.tensor([0, 1, 2, 0, 1]))
    assert torch.equal(images, pixels)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# ---- training


def two_columns(network):
    """A network of one output as one of two classes."""
    return lambda x: torch.cat([0 * network(x), network(x)], 1)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(("true_labels", "alpha"), [(True, None), (False, None), (True, 0.7), (False, 0.0)])
def test_float64_training_equals_a_hand_written_loop(
    make_trainer, trained, forget, records, kind, true_labels, alpha
) -> None:
    outputs, _, loss = LABELS[kind]
    data = in_double(with_labels(records, kind))
    network = trained(kind).double()
    original, expected = copy.deepcopy(network).eval(), copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    handler = AMUN(forget, steps=10, true_labels=true_labels, alpha=alpha, seed=3)
    make_trainer([handler], network=network, dataset=data, batch_size=10, shuffle=False, max_epochs=2,
                 loss_function=loss, optimizer=optimizer).run()  # fmt: skip

    images, labels = batch_of(data, FORGET)
    answer = original if outputs > 1 else two_columns(original)
    found = [search_by_hand(answer, x, int(y), 0.04, 10) for x, y in zip(images, labels)]
    labels, found = labels[[one is not None for one in found]], [one for one in found if one is not None]
    number = len(found)
    assert number >= 5
    examples = torch.stack([one[0] for one in found])
    wrong = torch.tensor([one[1] for one in found]).to(labels.dtype).reshape(labels.shape)
    assert (wrong != labels).all()
    part = list(range(30)) if true_labels else RETAIN
    weight = len(part) / (len(part) + number) if alpha is None else alpha
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    steps = [part[i : i + 10] for i in range(0, len(part), 10)]
    for rows in 2 * steps:
        own, true = batch_of(data, rows)
        order = torch.randperm(number, generator=generator)
        optimizer.zero_grad()
        own_loss = loss(expected(own), true)
        adversarial_loss = loss(expected(examples[order]), wrong[order])
        (weight * own_loss + (1 - weight) * adversarial_loss).backward()
        optimizer.step()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-9, atol=1e-11)
    assert handler.examples == number
    searched = handler.cost.samples - 2 * len(steps) * number
    assert searched >= 10
    assert handler.cost.forward == handler.cost.backward == handler.cost.samples, "each pass of the search counts"
    assert handler.cost.seconds > 0


def test_the_default_weight_lets_every_sample_count_the_same(make_trainer, make_network, forget, records) -> None:
    """The gradient over an epoch is that of one set of training samples and examples."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()
    start = copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    data = in_double(Dataset(records))
    make_trainer([AMUN(forget)], network=network, dataset=data, batch_size=30, max_epochs=1, optimizer=optimizer).run()
    images, labels = batch_of(data, range(30))
    found = [search_by_hand(start, images[i], int(labels[i]), 0.04, 50) for i in FORGET]
    everything = torch.cat([images, torch.stack([one[0] for one in found])])
    answers = torch.cat([labels, torch.tensor([one[1] for one in found])])
    gradients = torch.autograd.grad(functional.cross_entropy(start(everything), answers), list(start.parameters()))
    for parameter, before, gradient in zip(network.parameters(), start.parameters(), gradients):
        torch.testing.assert_close(parameter, before - gradient, rtol=1e-9, atol=1e-10)


def test_without_examples_and_true_labels_it_is_fine_tuning_to_the_bit(
    make_trainer, make_network, forget, snapshot, same_bits
) -> None:
    network, plain = make_network(), make_network()
    handler = AMUN(forget, alpha=1, true_labels=False)
    make_trainer([handler], network=network).run()
    make_trainer([FineTune(forget)], network=plain).run()
    assert same_bits(snapshot(network), snapshot(plain))
    assert handler.cost.samples == 0


@pytest.mark.parametrize(("true_labels", "met"), [(True, set(range(30))), (False, set(RETAIN))])
def test_forget_samples_are_met_with_true_labels_only_where_asked_for(
    make_trainer, forget, records, on, true_labels, met
) -> None:
    seen: set[int] = set()

    def look(engine):
        seen.update(engine.state.batch["index"].tolist())
        assert engine.state.batch["label"].tolist() == [i % 3 for i in engine.state.batch["index"].tolist()]

    make_trainer([AMUN(forget, true_labels=true_labels), on(Events.ITERATION_COMPLETED, look)]).run()
    assert seen == met
    assert [int(record["label"]) for record in records] == [i % 3 for i in range(30)]


def test_the_examples_come_round_in_a_new_order_each_time(make_trainer, trained, forget, on) -> None:
    handler, taken = AMUN(forget, true_labels=False), []

    def count(engine):
        def counted(batches):
            for images, targets in batches:
                taken.append([float(image.sum()) for image in images])
                yield images, targets

        handler._batches = counted(handler._batches)

    make_trainer(
        [handler, on(Events.STARTED, count)], network=trained(), batch_size=5, max_epochs=3
    ).run()  # 12 steps, two a round
    rounds = [taken[i] + taken[i + 1] for i in range(0, 12, 2)]
    assert all(sorted(one) == sorted(rounds[0]) for one in rounds)
    assert len(rounds[0]) == 10
    assert len({tuple(one) for one in rounds}) > 3
    assert handler._batches is None


def test_an_image_left_alone_in_a_batch_is_left_out_and_a_single_one_is_not(make_trainer, trained, on) -> None:
    for ids, size, sizes in (([0, 1, 2], 2, {2}), ([0], 4, {1})):
        handler, found = AMUN(ForgetSet(ids), true_labels=False), set()

        def look(engine, handler=handler, found=found):
            found.update(len(next(handler._batches)[0]) for _ in range(6))

        make_trainer([handler, on(Events.STARTED, look)], network=trained(), batch_size=size, max_epochs=1).run()
        assert found == sizes
        assert handler.examples == len(ids)


def test_the_search_is_made_by_the_original_without_augmentation_or_dropout(
    make_trainer, trained, forget, records, on
) -> None:
    network = trained()
    network.insert(2, nn.Dropout(0.5))
    original = copy.deepcopy(network).eval()
    images, labels = batch_of(Dataset(records), FORGET)
    expected, answers, _ = nearest_adversarial(original, images, labels)
    handler = AMUN(forget, true_labels=False, seed=5)

    def look(engine):
        assert all(parameter.grad is None for parameter in network.parameters())
        assert all(torch.equal(value, original.state_dict()[name]) for name, value in network.state_dict().items())
        order = torch.randperm(10, generator=torch.Generator().manual_seed(5))
        found, wrong = next(handler._batches)
        torch.testing.assert_close(found, expected[order], rtol=1e-5, atol=1e-6)
        assert torch.equal(wrong, answers[order])
        assert found.device.type == "cpu"

    make_trainer([handler, on(Events.STARTED, look)], network=network, batch_size=10).run()


def test_samples_without_an_example_are_left_out_and_counted(make_trainer, trained, forget, records) -> None:
    """Images without any contrast have no other image within their range of values."""
    network = trained().eval()
    flat = {i: torch.full((1, 6, 6), float(records[i]["image"].mean())) for i in (1, 2)}
    with torch.no_grad():
        answers = {i: int(network(image[None]).argmax()) for i, image in flat.items()}
    data = Dataset(
        [
            {**r, **({"image": flat[i], "label": torch.tensor(answers[i])} if i in flat else {})}
            for i, r in enumerate(records)
        ]
    )
    handler = AMUN(forget)
    make_trainer([handler], network=copy.deepcopy(network), dataset=data).run()
    assert handler.examples == 8
    assert handler.notes == [
        "2 of 10 forget images have no adversarial example, so these were not unlearned by any. Use more steps."
    ]
    with pytest.raises(RuntimeError, match="None of the 2 forget samples has an adversarial example, however far"):
        make_trainer([AMUN(ForgetSet([1, 2]))], network=network, dataset=data).run()


def test_the_network_becomes_less_sure_of_the_forget_set(make_trainer, make_network, forget, records) -> None:
    network = make_network()
    make_trainer([FineTune(ForgetSet([29]))], network=network, max_epochs=20).run()
    images, labels = batch_of(Dataset(records), FORGET)
    losses = []
    for handler in (AMUN(forget, true_labels=False, alpha=0.5), FineTune(forget)):
        one = copy.deepcopy(network)
        make_trainer([handler], network=one, max_epochs=8).run()
        with torch.no_grad():
            losses.append(float(functional.cross_entropy(one.eval()(images), labels)))
    assert losses[0] > losses[1] + 0.1


@pytest.mark.filterwarnings("ignore::UserWarning")  # autocast and its scaler look for CUDA
def test_loss_scaling_changes_nothing_but_rounding(make_trainer, make_network, forget, on) -> None:
    def use_scaler(engine):
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    states = []
    for amp in (False, True):
        network = make_network()
        make_trainer([on(Events.STARTED, use_scaler), AMUN(forget)], network=network, amp=amp).run()
        states.append(network.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-6)


def test_masked_weights_do_not_move_and_statistics_hold_retain_samples(make_trainer, make_network, forget) -> None:
    network = make_network()
    saliency, statistics = SaliencyMask(forget), BatchNormPolicy(forget)
    before = copy.deepcopy(dict(network.named_parameters()))
    make_trainer([AMUN(forget), saliency, statistics], network=network).run()
    assert statistics.cost.samples == 20
    for name, parameter in network.named_parameters():
        frozen = ~saliency.mask[name]
        assert torch.equal(parameter[frozen], before[name][frozen])
    assert any((parameter != before[name]).any() for name, parameter in network.named_parameters())


@pytest.mark.parametrize("true_labels", [True, False])
def test_given_loaders_are_used(make_trainer, trained, forget, records, loader_of, true_labels) -> None:
    class NoRecords(torch.utils.data.Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, index):
            raise AssertionError("the trainer's own data should not be touched")

    loaders = {"loader": loader_of(records[5:12], 3), "forget_loader": loader_of(records[:5], 5)}
    handler = AMUN(forget, true_labels=true_labels, **loaders)
    trainer = make_trainer([handler], network=trained(), dataset=NoRecords())
    trainer.run()
    assert trainer.state.iteration == 6
    assert handler.examples == 5
    assert handler.cost.samples == handler.cost.forward >= 5 + 6 * 5


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_trained(make_trainer, forget, records, kind, name) -> None:
    task = task_of(records, kind, name)
    network = task["network"]
    before = copy.deepcopy(network)
    make_trainer([AMUN(forget, steps=10)], max_epochs=1, **task).run()
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert any((p != q).any() for p, q in zip(network.parameters(), before.parameters()))


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": 0}, "epsilon should be greater than 0, but got 0"),
        ({"epsilon": NAN}, "epsilon should be greater than 0"),
        ({"steps": 0}, "steps should be a whole number of at least 1, but got 0"),
        ({"steps": 2.5}, "steps should be a whole number"),
        ({"steps": True}, "steps should be a whole number"),
        ({"true_labels": "no"}, "true_labels should be true or false, but got 'no'"),
        ({"alpha": 1.1}, r"alpha should lie in \[0, 1\], or be None, but got 1.1"),
        ({"alpha": NAN}, r"alpha should lie in \[0, 1\], or be None"),
        ({"alpha": 1}, "alpha should be below 1 where forget samples are trained on with their true labels"),
    ],
    ids=str,
)
def test_an_argument_outside_its_range_raises(forget, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        AMUN(forget, **arguments)


def test_findings_are_refused_at_construction_where_that_is_known(forget) -> None:
    with pytest.raises(ValueError, match=r"multi_label should be false with AMUN, .* BoundaryShrink, say"):
        AMUN(forget, multi_label=True)
    with pytest.raises(ValueError, match="multi_label should be true or false, but got None"):
        AMUN(forget, multi_label=None)


def test_findings_are_refused_with_a_remedy(make_trainer, make_network, forget, records) -> None:
    task = {"loss_function": LABELS["findings"][2], "network": make_network(classes=2)}
    with pytest.raises(ValueError, match=r"AMUN needs labels that are one class index a sample.*BoundaryShrink, say"):
        make_trainer([AMUN(forget)], dataset=with_labels(records, "findings"), **task).run()
    one_a_sample = Dataset([{**record, "label": torch.tensor(1)} for record in records])
    with pytest.raises(
        ValueError, match=r"outputs are classes, B × C, but got outputs of shape \(8, 2\) with MaskedBCE"
    ):
        make_trainer([AMUN(forget)], dataset=one_a_sample, **task).run()


def test_labels_that_are_no_classes_raise(make_trainer, make_network, forget, records) -> None:
    for label in (torch.tensor([NAN]), torch.tensor([0.5]), torch.eye(3)[0]):
        dataset = Dataset([{**record, "label": label} for record in records])
        with pytest.raises(ValueError, match="AMUN needs labels that are one class index a sample"):
            make_trainer([AMUN(forget)], dataset=dataset, network=make_network(classes=1)).run()
    dataset = Dataset([{**record, "label": 3} for record in records])
    with pytest.raises(ValueError, match=r"labels should lie in \[0, 2\], but one is 3"):
        make_trainer([AMUN(forget)], dataset=dataset).run()


def test_a_loss_of_probabilities_is_refused(make_trainer, make_network, forget, records) -> None:
    network = nn.Sequential(make_network(classes=1), nn.Sigmoid())
    task = {"dataset": with_labels(records, "one_output"), "loss_function": nn.BCELoss(), "network": network}
    with pytest.raises(TypeError, match="outputs are logits, but BCELoss takes probabilities"):
        make_trainer([AMUN(forget)], **task).run()


def test_a_network_that_takes_more_than_images_is_refused(make_trainer, forget) -> None:
    def prepare_batch(batch, device, non_blocking, **_):
        return batch["image"], batch["label"], (batch["index"],), {}

    with pytest.raises(TypeError, match="can't work with a network that takes more than the images"):
        make_trainer([AMUN(forget)], prepare_batch=prepare_batch).run()


def test_images_that_are_not_finite_raise(make_trainer, forget, records) -> None:
    records[2]["image"] = torch.full((1, 6, 6), NAN)
    with pytest.raises(ValueError, match="outputs on the forget samples should be finite, but some are NaN"):
        make_trainer([AMUN(forget)]).run()


def test_loaders_without_a_sample_or_a_number_of_them_raise(make_trainer, forget, records) -> None:
    empty = DataLoader(Dataset(records[:3]), batch_size=8, drop_last=True)
    with pytest.raises(ValueError, match="loader of forget samples should hold at least one sample, but is empty"):
        make_trainer([AMUN(forget, forget_loader=empty)]).run()
    for true_labels, part in ((True, "training"), (False, "retain")):
        with pytest.raises(ValueError, match=f"loader of {part} samples should give at least one batch"):
            make_trainer([AMUN(forget, true_labels=true_labels, loader=empty)]).run()

    class Batches(list):
        """Batches that nobody has counted the samples of."""

    batches = Batches(DataLoader(Dataset(records), batch_size=8))
    with pytest.raises(ValueError, match="alpha should be given with a Batches, whose number of samples can't be told"):
        make_trainer([AMUN(forget, loader=batches)]).run()
    make_trainer([AMUN(forget, loader=batches, alpha=0.7)]).run()
