"""Influence unlearning: the step is the equation's, its inverse is WoodFisher's, and what it leaves alone."""

from __future__ import annotations

import copy
import logging
from weakref import finalize

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Events
from method_tasks import IS_FORGET, LABELS, NETWORKS, task_of, with_labels
from monai.data import DataLoader, Dataset
from monai.handlers import CheckpointSaver
from monai.inferers import Inferer
from monai.losses import FocalLoss
from monai.transforms import Compose, EnsureTyped, RandGaussianNoised
from torch import nn
from torch.nn import functional
from torch.utils.data import SubsetRandomSampler

from monai_unlearn import ForgetSet
from monai_unlearn.methods import BatchNormPolicy, FineTune, InfluenceUnlearning, RandomLabeling, influence
from monai_unlearn.methods.influence import inverse_fisher_product, removal_gradient
from monai_unlearn.training import run_trainer

FORGET = [i for i in range(30) if IS_FORGET[i]]
RETAIN = [i for i in range(30) if not IS_FORGET[i]]
NAN = float("nan")


def gradients_of(network, records, loss=functional.cross_entropy):
    """One row a record: the gradient of its loss alone, in evaluation mode and float64."""
    network = copy.deepcopy(network).double().eval()
    rows = []
    for record in records:
        network.zero_grad()
        loss(network(record["image"][None].double()), torch.as_tensor(record["label"])[None]).backward()
        rows.append(np.concatenate([p.grad.numpy().ravel() for p in network.parameters() if p.requires_grad]))
    return np.array(rows)


def stepped(network, records, alpha=1.0, damping=0.03, drawn=RETAIN, loss=functional.cross_entropy):
    """All trainable weights after the step, with a dense Fisher matrix in NumPy."""
    of_forget = gradients_of(network, [records[i] for i in range(len(records)) if i in FORGET], loss)
    of_retain = gradients_of(network, [records[i] for i in range(len(records)) if i not in FORGET], loss)
    of_drawn = gradients_of(network, [records[i] for i in drawn if i < len(records)], loss)
    n_f, n_r = len(of_forget), len(of_retain)
    fisher = damping * np.eye(of_drawn.shape[1]) + of_drawn.T @ of_drawn / len(of_drawn)
    vector = n_f / (n_f + n_r) * (of_forget.mean(0) - of_retain.mean(0))
    weights = np.concatenate([p.detach().double().numpy().ravel() for p in network.parameters() if p.requires_grad])
    return weights + alpha * np.linalg.solve(fisher, vector)


def flat(network):
    return np.concatenate([p.detach().numpy().ravel() for p in network.parameters() if p.requires_grad])


def woodfisher(gradients, vector, damping):
    """N updates of rank one of the inverse itself, as in Singh & Alistarh."""
    inverse = torch.eye(len(vector), dtype=torch.float64) / damping
    for gradient in gradients:
        towards = inverse @ gradient
        inverse = inverse - torch.outer(towards, towards) / (len(gradients) + gradient @ towards)
    return inverse @ vector


# The pure functions


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 12),
    size=st.integers(1, 9),
    rows=st.integers(1, 12),
    damping=st.sampled_from([1e-4, 1e-2, 1.0, 30.0]),
    seed=st.integers(0, 10**6),
)
def test_the_inverse_is_that_of_rank_one_updates_in_any_order_and_blocks(samples, size, rows, damping, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(samples, size, dtype=torch.float64, generator=generator)
    vector = torch.randn(size, dtype=torch.float64, generator=generator)
    before = vector.clone()
    found = inverse_fisher_product(gradients.split(rows), vector, damping)
    assert torch.equal(vector, before)
    shuffled = gradients[torch.randperm(samples, generator=generator)]
    fisher = damping * torch.eye(size, dtype=torch.float64) + gradients.T @ gradients / samples
    # Its entries are up to 1 / damping, and what the gradients span is far less: rounding is relative to the former.
    rounding = {"rtol": 1e-8, "atol": 1e-10 / damping}
    torch.testing.assert_close(found, woodfisher(gradients, vector, damping), **rounding)
    torch.testing.assert_close(found, woodfisher(shuffled, vector, damping), **rounding)
    torch.testing.assert_close(fisher @ found, vector, rtol=1e-7, atol=1e-9)


def test_a_block_is_made_anew_when_it_is_needed_and_no_more_than_two_are_held(monkeypatch) -> None:
    monkeypatch.setattr(influence, "PIECE", 3)
    held, most, made = [0], [0], []
    gradients = torch.randn(10, 8)

    class Counted:
        def __len__(self):
            return 4

        def __getitem__(self, i):
            made.append(i)
            block = gradients[3 * i : 3 * i + 3].clone()
            held[0] += 1
            most[0] = max(most[0], held[0])
            finalize(block, lambda: held.__setitem__(0, held[0] - 1))
            return block

    vector = torch.randn(8)
    found = inverse_fisher_product(Counted(), vector, 0.1)
    torch.testing.assert_close(found, woodfisher(gradients.double(), vector.double(), 0.1), rtol=1e-10, atol=1e-10)
    assert most[0] == 2
    assert sorted(made) == [0] * 2 + [1] * 3 + [2] * 4 + [3] * 4  # 0 to 3, 1 to 3, 2 and 3, 3; and 2, 1, 0


def test_a_weak_damping_of_steep_gradients_needs_float64_and_has_it() -> None:
    gradients, vector = 1e4 * torch.randn(50, 200), torch.randn(200)
    expected = woodfisher(gradients.double(), vector.double(), 1e-3)
    kernel = gradients @ gradients.T + 50 * 1e-3 * torch.eye(50)
    in_float32 = (vector - gradients.T @ torch.linalg.solve(kernel, gradients @ vector)) / 1e-3
    found = inverse_fisher_product([gradients], vector, 1e-3)
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert (gradients.double() @ found).norm() < 1e-3 * (gradients @ in_float32).norm()


def test_the_recursion_of_public_code_only_takes_a_multiple_of_the_first_gradient_off() -> None:
    """It keeps one vector for all updates, so what comes out is no product with an inverse of that matrix."""
    gradients = torch.randn(20, 6, dtype=torch.float64)
    vector = torch.randn(6, dtype=torch.float64)
    k, o = vector.clone(), gradients[0].clone()
    for gradient in gradients[1:]:
        k, o = (
            k - (k @ gradient) / (20 + o @ gradient) * o,
            o - (o @ gradient) / (20 + o @ gradient) * o,
        )
    taken = vector - k
    assert torch.allclose(taken / taken.norm(), gradients[0] / gradients[0].norm() * torch.sign(taken @ gradients[0]))
    assert (k - inverse_fisher_product([gradients], vector, 1.0)).norm() > 0.1 * vector.norm()


def test_the_step_is_the_derivative_of_the_minimum_by_the_samples_weights() -> None:
    """Least squares, where all is known: the minimum without the forget set, to first order in its share."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, dtype=torch.float64, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + torch.randn(
        4000, dtype=torch.float64, generator=generator
    )
    everything, retained = (torch.linalg.lstsq(x[n:], y[n:, None]).solution[:, 0] for n in (0, 4))
    gradients = (x @ everything - y)[:, None] * x
    hessian = x.T @ x / 4000
    step = torch.linalg.solve(hessian, removal_gradient(gradients[:4].sum(0), gradients[4:].sum(0), 4, 3996))
    assert (everything + step - retained).norm() < 0.02 * (everything - retained).norm()
    assert gradients[:4].sum(0) @ step > 0  # the forget loss goes up


# The handler


@pytest.mark.parametrize("block_rows", [20, 7, 1])
@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize(("alpha", "damping"), [(1.0, 0.1), (3.0, 1e-4)])
def test_weights_are_those_of_the_equation(
    make_trainer, make_network, forget, records, double, monkeypatch, block_rows, at_once, alpha, damping
) -> None:
    network = make_network().double()
    network[1].running_mean.normal_()
    size = sum(parameter.numel() for parameter in network.parameters())
    monkeypatch.setattr(influence, "BLOCK_BYTES", block_rows * size * 8)
    monkeypatch.setattr(influence, "_most_at_once", lambda engine, parameters: at_once)
    expected = stepped(network, records, alpha, damping)
    before = flat(network)
    make_trainer([InfluenceUnlearning(forget, alpha=alpha, damping=damping)], network=network, dataset=double).run()
    np.testing.assert_allclose(flat(network) - before, expected - before, rtol=1e-7, atol=1e-9)
    assert np.abs(expected - before).max() > 1e-3


def test_the_forget_loss_goes_up_and_the_retain_loss_down(make_trainer, make_network, forget, double, records) -> None:
    network = make_network().double()

    def losses():
        with torch.no_grad():
            out = copy.deepcopy(network).eval()(torch.stack([record["image"].double() for record in records]))
        each = functional.cross_entropy(out, torch.arange(30) % 3, reduction="none")
        return float(each[IS_FORGET].mean() - each[~IS_FORGET].mean())

    before = losses()
    make_trainer([InfluenceUnlearning(forget, alpha=0.05, damping=1.0)], network=network, dataset=double).run()
    assert losses() > before


def test_the_samples_are_drawn_with_a_seed_from_all_of_the_retain_set(
    make_trainer, make_network, forget, records, double
) -> None:
    """Public code takes the first ones, which in data that is sorted are all of one class."""
    drawn = {}
    for seed in (0, 1):
        network = make_network().double()
        before = flat(network)
        order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:5].tolist()
        drawn[seed] = [RETAIN[i] for i in order]
        expected = stepped(network, records, drawn=drawn[seed])
        handler = InfluenceUnlearning(forget, samples=5, seed=seed)
        make_trainer([handler], network=network, dataset=double, batch_size=3).run()
        np.testing.assert_allclose(flat(network) - before, expected - before, rtol=1e-7, atol=1e-9)
        assert handler.cost.samples == 30 + 5
    assert set(drawn[0]) != set(drawn[1]) != set(RETAIN[:5])


def test_without_strength_every_weight_keeps_its_bits(make_trainer, make_network, forget, snapshot, same_bits) -> None:
    network = make_network()
    network[5].bias.data = torch.tensor([-0.0, 0.0, 1.0])
    before = snapshot(network)
    make_trainer([InfluenceUnlearning(forget, alpha=0)], network=network).run()
    assert same_bits(before, snapshot(network))


def test_an_infinite_damping_is_a_gradient_step(make_trainer, make_network, forget, records, double) -> None:
    """F⁻¹ → I / λ: the strength over λ times the difference of the mean gradients."""
    network = make_network().double()
    before = flat(network)
    of_forget, of_retain = (gradients_of(network, [records[i] for i in part]).mean(0) for part in (FORGET, RETAIN))
    make_trainer([InfluenceUnlearning(forget, alpha=1e9, damping=1e9)], network=network, dataset=double).run()
    np.testing.assert_allclose(flat(network) - before, (of_forget - of_retain) / 3, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("augmented", [False, True])
def test_neither_batch_size_order_nor_augmentation_matters(make_trainer, make_network, forget, double, augmented):
    weights = []
    noise = [RandGaussianNoised("image", prob=1, std=3.0)] if augmented else []
    for batch_size, order in ((1, range(30)), (7, range(30)), (30, np.random.RandomState(0).permutation(30))):
        network = make_network().double()
        dataset = Dataset(
            [double.data[i] for i in order], transform=Compose([EnsureTyped("image", dtype=torch.float64), *noise])
        )
        handler = InfluenceUnlearning(forget)
        make_trainer([handler], network=network, dataset=dataset, batch_size=batch_size).run()
        weights.append(flat(network))
    np.testing.assert_allclose(weights[0], weights[1], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(weights[0], weights[2], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("at_once", [1, 4])
def test_cost_and_events(make_trainer, make_network, forget, on, monkeypatch, at_once) -> None:
    monkeypatch.setattr(influence, "_most_at_once", lambda engine, parameters: at_once)
    fired = []
    handler = InfluenceUnlearning(forget)
    events = (Events.EPOCH_STARTED, Events.ITERATION_STARTED, Events.COMPLETED)
    trainer = make_trainer([handler, *(on(event, lambda e, name=event.name: fired.append(name)) for event in events)])
    trainer.run()
    assert fired == ["COMPLETED"]
    assert trainer.state.iteration == 0
    # Both sets once, and the 20 retain samples once more.
    vectorised = 20 if at_once == 4 else 0
    assert (handler.cost.samples, handler.cost.forward, handler.cost.backward) == (50, 50 + vectorised, 50)
    assert handler.cost.seconds > 0


def test_recomputed_gradients_are_counted(make_trainer, make_network, forget, monkeypatch) -> None:
    network = make_network()
    size = sum(parameter.numel() for parameter in network.parameters())
    monkeypatch.setattr(influence, "BLOCK_BYTES", 10 * size * 4)
    handler = InfluenceUnlearning(forget)
    make_trainer([handler], network=network).run()
    assert handler.cost.backward == 30 + 10 + 10 + 10 + 10  # both, the second once more; the first for the end


def test_run_trainer_takes_a_run_without_a_step_from_it(make_trainer, forget) -> None:
    cost = run_trainer(make_trainer([InfluenceUnlearning(forget)]), "unlearning")
    assert (cost.samples, cost.backward) == (0, 0)


def test_buffers_stay_unless_a_policy_estimates_them(make_trainer, make_network, forget, snapshot) -> None:
    for policy, moved in ((), False), ((BatchNormPolicy(forget),), True):
        network = make_network()
        before = snapshot(network)
        make_trainer([InfluenceUnlearning(forget), *policy], network=network).run()
        after = snapshot(network)
        assert torch.equal(before["1.running_mean"], after["1.running_mean"]) is not moved
        assert network.training
        assert all(parameter.grad is None for parameter in network.parameters())


def test_a_checkpoint_saver_writes_what_is_left(make_trainer, make_network, forget, tmp_path) -> None:
    network = make_network()
    saver = CheckpointSaver(str(tmp_path), {"net": network}, save_final=True)
    make_trainer([InfluenceUnlearning(forget), saver], network=network).run()
    (path,) = tmp_path.glob("*.pt")
    saved = torch.load(path, weights_only=True)
    assert all(torch.equal(saved[name], value) for name, value in network.state_dict().items())


def test_frozen_parameters_stay_bit_identical_and_out_of_the_matrix(
    make_trainer, make_network, forget, double, records
) -> None:
    network = make_network().double()
    for parameter in network[0].parameters():
        parameter.requires_grad_(False)
    before = [parameter.clone() for parameter in network[0].parameters()]
    expected = stepped(network, records)
    make_trainer([InfluenceUnlearning(forget)], network=network, dataset=double).run()
    assert all(torch.equal(one, other) for one, other in zip(before, network[0].parameters()))
    np.testing.assert_allclose(flat(network), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("at_once", [1, 4])
def test_weights_in_another_memory_layout(make_trainer, make_network, forget, records, double, monkeypatch, at_once):
    monkeypatch.setattr(influence, "_most_at_once", lambda engine, parameters: at_once)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 3)).double()
    expected = stepped(network, records)
    network = network.to(memory_format=torch.channels_last)
    assert not network[2].weight.is_contiguous()
    make_trainer([InfluenceUnlearning(forget)], network=network, dataset=double).run()
    np.testing.assert_allclose(flat(network), expected, rtol=1e-8, atol=1e-10)


def test_an_unused_layer_stays_bit_identical(make_trainer, make_network, forget) -> None:
    network = make_network()
    network.unused = nn.Linear(2, 2)
    network.unused.weight.data.fill_(-0.0)
    network.forward = lambda x: [x := layer(x) for name, layer in network.named_children() if name != "unused"][-1]
    before = [parameter.clone() for parameter in network.unused.parameters()]
    make_trainer([InfluenceUnlearning(forget)], network=network).run()
    for one, other in zip(before, network.unused.parameters()):
        assert torch.equal(one.view(torch.int32), other.detach().view(torch.int32))


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_two_and_three_dimensions_and_all_kinds_of_labels(
    make_trainer, forget, records, monkeypatch, name, kind
) -> None:
    networks = []
    for at_once in (1, 3):
        monkeypatch.setattr(influence, "_most_at_once", lambda engine, parameters, n=at_once: n)
        torch.manual_seed(1)
        task = task_of(records, kind, name)
        network = task["network"].double()
        task["dataset"] = Dataset([{**r, "image": r["image"].double()} for r in task["dataset"].data])
        before = flat(network)
        make_trainer([InfluenceUnlearning(forget, samples=6)], **task).run()
        assert np.isfinite(flat(network)).all()
        assert (flat(network) != before).any()
        networks.append(flat(network))
    np.testing.assert_allclose(*networks, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["one_output", "findings"])
def test_findings_follow_the_same_equation(make_trainer, make_network, forget, records, double, kind) -> None:
    outputs, _, loss = LABELS[kind]
    dataset = with_labels(double.data, kind)
    network = make_network(outputs).double()
    expected = stepped(network, dataset.data, loss=loss)
    make_trainer([InfluenceUnlearning(forget)], network=network, dataset=dataset, loss_function=loss).run()
    np.testing.assert_allclose(flat(network), expected, rtol=1e-8, atol=1e-10)


def test_a_loss_of_ones_own_is_taken_sample_by_sample(make_trainer, make_network, forget, double, records) -> None:
    network = make_network().double()
    dataset = Dataset([{**r, "label": functional.one_hot(torch.tensor(i % 3), 3)} for i, r in enumerate(double.data)])
    expected = stepped(network, dataset.data, loss=FocalLoss())
    make_trainer([InfluenceUnlearning(forget)], network=network, dataset=dataset, loss_function=FocalLoss()).run()
    np.testing.assert_allclose(flat(network), expected, rtol=1e-8, atol=1e-10)


def test_a_network_that_vmap_cant_take_goes_one_at_a_time(
    make_trainer, forget, records, double, caplog, monkeypatch
) -> None:
    class ByValue(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(36, 3)

        def forward(self, x):
            x = x.flatten(1)
            return self.head(torch.where(x.mean(1, keepdim=True) > 1, -x, x) if len(x) > 1 or bool(x.mean() > 9) else
                             (-x if bool(x.mean() > 1) else x))  # fmt: skip

    monkeypatch.setattr(influence, "_most_at_once", lambda engine, parameters: 8)
    network = ByValue().double()
    expected = stepped(network, records)
    with caplog.at_level(logging.INFO, logger="monai_unlearn"):
        make_trainer([InfluenceUnlearning(forget)], network=network, dataset=double).run()
    assert caplog.text.count("torch.vmap can't take the network") == 1
    np.testing.assert_allclose(flat(network), expected, rtol=1e-8, atol=1e-10)


def test_shared_weights_and_inferers_of_ones_own_go_one_at_a_time(make_trainer, make_network, forget) -> None:
    class Doubling(Inferer):
        def __call__(self, inputs, network, *args, **kwargs):
            return network(2 * inputs, *args, **kwargs)

    shared = make_network()
    shared.add_module("again", shared[5])
    somewhere_else = [nn.Parameter(torch.zeros(1, device="meta"))]
    assert influence._most_at_once(make_trainer(network=make_network()), somewhere_else) == influence.MOST_AT_ONCE
    assert influence._most_at_once(make_trainer(network=shared), somewhere_else) == 1
    assert influence._most_at_once(make_trainer(inferer=Doubling()), somewhere_else) == 1
    assert influence._most_at_once(make_trainer(), list(shared.parameters())) == 1


def test_further_inputs_of_the_network_go_with_their_sample(make_trainer, forget, double) -> None:
    class WithAge(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(36, 3)

        def forward(self, x, age, factor=1.0):
            return self.head(x.flatten(1)) * (1 + age[:, None]) * factor

    def prepare(batch, device, non_blocking, **kwargs):
        return batch["image"], batch["label"], (batch["index"].double() / 10,), {"factor": 0.5}

    class Scaled(nn.Module):
        """The same with the age in the images."""

        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, x):
            age = x[:, 0, 0, 6]
            return self.head(x[..., :6].flatten(1)) * (1 + age[:, None]) * 0.5

    network = WithAge().double()
    aged = [
        {**r, "image": torch.cat([r["image"], torch.full((1, 6, 1), i / 10, dtype=torch.float64)], 2)}
        for i, r in enumerate(double.data)
    ]
    expected = stepped(Scaled(copy.deepcopy(network.head)), aged)
    make_trainer([InfluenceUnlearning(forget)], network=network, dataset=double, prepare_batch=prepare).run()
    np.testing.assert_allclose(flat(network), expected, rtol=1e-7, atol=1e-9)


def test_loaders_of_ones_own(make_trainer, make_network, forget, records, double, loader_of) -> None:
    network = make_network().double()
    expected = stepped(network, records)
    handler = InfluenceUnlearning(
        forget,
        loader=loader_of([double.data[i] for i in RETAIN], 3),
        forget_loader=loader_of([double.data[i] for i in FORGET], 4),
    )
    make_trainer([handler], network=network, dataset=double).run()
    np.testing.assert_allclose(flat(network), expected, rtol=1e-8, atol=1e-10)


# Bad input


@pytest.mark.parametrize("alpha", [-1.0, NAN, float("inf")])
def test_a_strength_that_is_none_raises(forget, alpha) -> None:
    with pytest.raises(ValueError, match="alpha should be a number of at least 0, but got"):
        InfluenceUnlearning(forget, alpha=alpha)


@pytest.mark.parametrize("damping", [0, -0.1, NAN, float("inf")])
def test_a_damping_that_is_none_raises(forget, damping) -> None:
    with pytest.raises(ValueError, match="damping should be a number above 0, but got"):
        InfluenceUnlearning(forget, damping=damping)


@pytest.mark.parametrize("samples", [0, -1, 2.5, True])
def test_a_number_of_samples_that_is_none_raises(forget, samples) -> None:
    with pytest.raises(ValueError, match="samples should be a whole number of at least 1, but got"):
        InfluenceUnlearning(forget, samples=samples)


def test_a_step_out_of_range_raises_and_changes_nothing(
    make_trainer, make_network, forget, snapshot, same_bits
) -> None:
    network = make_network()
    before = snapshot(network)
    with pytest.raises(RuntimeError, match=r"stay finite, but with alpha = 1e\+300.*Lower alpha, or raise damping"):
        make_trainer([InfluenceUnlearning(forget, alpha=1e300)], network=network).run()
    assert same_bits(before, snapshot(network))


def test_a_step_too_small_for_any_weight_raises(make_trainer, forget) -> None:
    with pytest.raises(RuntimeError, match=r"With alpha = 1e-300 .*no weight would change.*Raise alpha"):
        make_trainer([InfluenceUnlearning(forget, alpha=1e-300)]).run()


def test_gradients_that_are_not_finite_raise_and_change_nothing(
    make_trainer, make_network, forget, records, snapshot, same_bits
) -> None:
    for bad in (0, 7):  # in the forget set, and in the retain set
        broken = [{**r, "image": r["image"] * (NAN if i == bad else 1)} for i, r in enumerate(records)]
        network = make_network()
        before = snapshot(network)
        with pytest.raises(RuntimeError, match=r"gradients of all samples should be finite.*Check the images"):
            make_trainer([InfluenceUnlearning(forget)], network=network, dataset=Dataset(broken)).run()
        assert same_bits(before, snapshot(network))


def test_a_damping_below_rounding_raises() -> None:
    gradients = torch.ones(3, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"can't be inverted with damping = 1e-300. Raise damping"):
        inverse_fisher_product([1e3 * gradients], torch.ones(4), 1e-300)


@pytest.mark.parametrize("other", [FineTune, RandomLabeling])
def test_another_method_in_the_same_trainer_raises(make_trainer, forget, other) -> None:
    for handlers in ([InfluenceUnlearning(forget), other(forget)], [other(forget), InfluenceUnlearning(forget)]):
        with pytest.raises(RuntimeError, match=f"InfluenceUnlearning ends the run.*{other.__name__} would do nothing"):
            make_trainer(handlers).run()


def test_a_network_without_anything_to_change_raises(make_trainer, make_network, forget) -> None:
    trainer = make_trainer([InfluenceUnlearning(forget)])
    trainer.network.requires_grad_(False)
    with pytest.raises(RuntimeError, match="no parameter that requires a gradient"):
        trainer.run()


@pytest.mark.parametrize("part", ["loader", "forget_loader"])
def test_an_empty_loader_raises(make_trainer, forget, loader_of, part) -> None:
    name = "retain" if part == "loader" else "forget"
    with pytest.raises(ValueError, match=f"The loader of {name} samples should hold at least one sample"):
        make_trainer([InfluenceUnlearning(forget, **{part: loader_of([])})]).run()


def test_a_loader_of_a_part_of_its_data_raises(make_trainer, forget, records) -> None:
    """Its positions would be those of other samples, forgotten ones among them."""
    loader = DataLoader(Dataset(records), batch_size=4, sampler=SubsetRandomSampler(RETAIN))
    with pytest.raises(ValueError, match="each sample of its data set once, but gives 20"):
        make_trainer([InfluenceUnlearning(forget, loader=loader)]).run()


def test_ids_that_are_not_there_raise(make_trainer) -> None:
    with pytest.raises(ValueError, match="in the forget set"):
        make_trainer([InfluenceUnlearning(ForgetSet(["nobody"], key="patient"))]).run()


def test_a_part_of_the_retain_set_stands_for_all_of_it(make_trainer, make_network, forget, double, loader_of) -> None:
    """Every retain sample twice over: half of them, told how many there were, give the step that all of them give."""
    some, gone = ([double.data[i] for i in rows] for rows in (RETAIN, FORGET))
    states = []
    for retain, told in ((some, 2 * len(some)), (some + some, None)):
        network = make_network().double()
        loaders = {"loader": loader_of(retain, 8), "forget_loader": loader_of(gone, 5)}
        method = InfluenceUnlearning(forget, retained=told, **loaders)
        make_trainer([method], network=network, dataset=double).run()
        states.append(network.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-9, atol=1e-12)


def test_fewer_retain_samples_than_there_are_raise(make_trainer, forget) -> None:
    with pytest.raises(ValueError, match=r"retained should be at least 20, .* but got 19"):
        make_trainer([InfluenceUnlearning(forget, retained=19)]).run()
