"""Masked small gradients: which weights are drawn anew, and how the others' gradients are scaled."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Events
from monai.data import Dataset
from monai.engines.utils import IterationEvents
from monai.networks.nets import DenseNet, ResNet
from scipy.stats import kstest
from torch import nn
from torch.nn import functional

from monai_unlearn import ForgetSet
from monai_unlearn.loss import MaskedBCEWithLogitsLoss
from monai_unlearn.methods import FineTune, MaskedSmallGradients
from monai_unlearn.methods._weights import convolution_weights
from monai_unlearn.methods.masked_small_gradients import ADAPTIVE, drawn_anew, smallest_fraction

IS_FORGET = [i // 5 in (0, 3) for i in range(30)]
FORGET = [i for i in range(30) if IS_FORGET[i]]
RETAIN = [i for i in range(30) if not IS_FORGET[i]]


def start(trainer):
    """Let the handlers do what they do before the first iteration."""
    trainer.fire_event(Events.STARTED)


def two_convolutions(seed=0, outputs=3):
    torch.manual_seed(seed)
    # No ReLU: where a channel is dead, its gradients are zero, and which of equal ones is the smallest is no matter.
    first = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 4, 2, bias=False), nn.Tanh()]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(36, outputs))


def retain_positions(size, seed):
    """The retain samples of the gradient, by the seed."""
    order = torch.randperm(len(RETAIN), generator=torch.Generator().manual_seed(seed))[:size]
    return [RETAIN[i] for i in order.tolist()]


def oracle_gradient(network, records, loss=functional.cross_entropy, seed=0):
    """|mean gradient over the retain samples drawn − that over forget samples|, one sample at a time, in float64."""
    network = copy.deepcopy(network).double().eval()
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    total = [torch.zeros_like(weight) for weight in weights]
    for positions, sign in ((retain_positions(len(FORGET), seed), 1), (FORGET, -1)):
        for i in positions:
            image, label = records[i]["image"][None].double(), torch.as_tensor(records[i]["label"])[None]
            for t, g in zip(total, torch.autograd.grad(loss(network(image), label), weights)):
                t += sign * g / len(positions)
    return [t.abs().numpy() for t in total]


# The pure functions


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0]) | st.floats(0, 10), min_size=1, max_size=40),
    share=st.floats(0, 1),
)
def test_the_smallest_share_is_marked_exactly(values, share) -> None:
    mask = smallest_fraction(torch.tensor(values, dtype=torch.float64), share).numpy()
    assert abs(mask.sum() - share * len(values)) <= 0.5 + 1e-9
    values = np.array(values)
    if 0 < mask.sum() < len(values):
        assert values[mask].max() <= values[~mask].min()


def test_new_values_are_kaimings_normal_with_fan_out_and_the_others_stay() -> None:
    weight = torch.full((64, 8, 3, 3), 5.0)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    result = drawn_anew(weight, mask, torch.Generator().manual_seed(0))
    assert torch.equal(result[~mask], weight[~mask])
    assert kstest(result[mask].numpy() / np.sqrt(2 / (64 * 9)), "norm").pvalue > 0.01


def test_that_is_the_initialisation_of_monais_resnet() -> None:
    network = ResNet("basic", [1, 1, 1, 1], [16, 16, 16, 16], 2, 1, num_classes=2)
    weight = network.layer1[0].conv1.weight.detach()
    drawn = drawn_anew(weight, torch.ones_like(weight, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert float(drawn.std() / weight.std()) == pytest.approx(1, abs=0.06)


def test_a_new_value_depends_on_the_seed_and_not_on_the_mask() -> None:
    weight = torch.zeros(4, 3, 3, 3)
    whole = drawn_anew(weight, torch.ones_like(weight, dtype=torch.bool), torch.Generator().manual_seed(2))
    mask = torch.arange(weight.numel()).view(weight.shape) % 3 == 0
    part = drawn_anew(weight, mask, torch.Generator().manual_seed(2))
    assert torch.equal(part, torch.where(mask, whole, weight))


# Which weights


@pytest.mark.parametrize("per_layer", [True, False])
@pytest.mark.parametrize("batch_size", [1, 7, 30])
def test_the_weights_with_the_smallest_gradient_are_drawn_anew(
    make_trainer, forget, records, double, per_layer, batch_size
) -> None:
    network = two_convolutions().double()
    network[1].running_mean.normal_()
    gradients = oracle_gradient(network, records, seed=4)
    before = [network[i].weight.detach().clone() for i in (0, 3)]
    handler = MaskedSmallGradients(forget, share=0.3, per_layer=per_layer, seed=4)
    start(make_trainer([handler], network=network, dataset=double, batch_size=batch_size))
    changed = [(network[i].weight != weight).numpy() for i, weight in zip((0, 3), before)]
    if per_layer:
        expected = [g <= np.sort(g.ravel())[round(0.3 * g.size) - 1] for g in gradients]
    else:
        both = np.sort(np.concatenate([g.ravel() for g in gradients]))
        expected = [g <= both[round(0.3 * both.size) - 1] for g in gradients]
    for one, other in zip(changed, expected):
        np.testing.assert_array_equal(one, other)


def test_nothing_but_convolution_weights_changes_at_the_start(make_trainer, forget, snapshot) -> None:
    network = two_convolutions()
    before = snapshot(network)
    start(make_trainer([MaskedSmallGradients(forget, share=1)], network=network))
    after = snapshot(network)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"0.weight", "3.weight"}
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_share_0_and_scale_1_is_fine_tuning(make_trainer, forget, snapshot, same_bits) -> None:
    states = []
    for handler in (MaskedSmallGradients(forget, share=0, scale=1), FineTune(forget)):
        network = two_convolutions()
        make_trainer([handler], network=network).run()
        states.append(snapshot(network))
    assert same_bits(*states)


def test_the_seed_decides_the_new_values(make_trainer, forget, snapshot, same_bits) -> None:
    states = []
    for seed in (0, 0, 1):
        network = two_convolutions()
        start(make_trainer([MaskedSmallGradients(forget, seed=seed)], network=network))
        states.append(snapshot(network))
    assert same_bits(states[0], states[1])
    assert not same_bits(states[0], states[2])


def test_frozen_convolutions_stay_bit_identical(make_trainer, forget) -> None:
    network = two_convolutions()
    network[0].weight.requires_grad_(False)
    before = [network[i].weight.detach().clone() for i in (0, 3)]
    make_trainer([MaskedSmallGradients(forget)], network=network).run()
    assert torch.equal(network[0].weight, before[0])
    assert not torch.equal(network[3].weight, before[1])


def test_the_gradient_is_that_of_the_trainers_own_loaders(make_trainer, forget, records, loader_of) -> None:
    masks = []
    for batch_size in (2, 10):
        network = two_convolutions()
        before = network[3].weight.detach().clone()
        own = {
            "loader": loader_of([records[i] for i in RETAIN], batch_size),
            "forget_loader": loader_of([records[i] for i in FORGET], 3),
        }
        handler = MaskedSmallGradients(forget, **own)
        start(make_trainer([handler], network=network))
        assert (handler.cost.samples, handler.cost.forward, handler.cost.backward) == (20, 20, 20)
        masks.append(network[3].weight != before)
    assert torch.equal(*masks)


def test_its_passes_are_counted_and_only_as_many_retain_samples_as_forget_samples(make_trainer, forget) -> None:
    handler = MaskedSmallGradients(forget)
    make_trainer([handler], network=two_convolutions()).run()
    assert (handler.cost.samples, handler.cost.forward, handler.cost.backward) == (20, 20, 20)
    assert handler.cost.seconds > 0


# Training


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_float64_training_equals_a_hand_written_loop(make_trainer, forget, records, double, momentum) -> None:
    network = two_convolutions().double()
    expected = copy.deepcopy(network)
    settings = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.01}
    make_trainer(
        [MaskedSmallGradients(forget, share=0.4, scale=0.2, seed=5)],
        network=network, dataset=double, batch_size=20, shuffle=False, max_epochs=3,
        optimizer=torch.optim.SGD(network.parameters(), **settings),
    ).run()  # fmt: skip

    images = torch.stack([double.data[i]["image"] for i in RETAIN])
    labels = torch.tensor([int(double.data[i]["label"]) for i in RETAIN])
    generator = torch.Generator().manual_seed(5)
    factors = {}
    for index, gradient in zip((0, 3), oracle_gradient(expected, records, seed=5)):
        weight = expected[index].weight
        small = torch.from_numpy(gradient <= np.sort(gradient.ravel())[round(0.4 * gradient.size) - 1])
        fan_out = weight.shape[0] * weight[0, 0].numel()
        draw = torch.randn(weight.shape, generator=generator) * (2 / fan_out) ** 0.5
        weight.data = torch.where(small, draw.double(), weight.detach())
        factors[weight] = torch.where(small, 1.0, 0.2)
    optimizer = torch.optim.SGD(expected.parameters(), **settings)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(expected(images), labels).backward()
        for weight, factor in factors.items():
            weight.grad *= factor
        optimizer.step()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-6, atol=1e-7)


class Steps:
    """Keeps the gradients that the optimizer saw, in each of its steps."""

    def __init__(self, network):
        self.network = network
        self.seen = []

    def attach(self, engine):
        engine.add_event_handler(Events.STARTED, self.start)

    def start(self, engine):
        engine.optimizer.register_step_pre_hook(self.keep)

    def keep(self, *_):
        self.seen.append({name: p.grad.clone() for name, p in self.network.named_parameters()})


def run(make_trainer, forget, scale, handlers=(), scaler=None, **changes):
    """The gradients of each step, and where the convolutions' weights were drawn anew."""
    network = two_convolutions()
    before = {name: value.detach().clone() for name, value in convolution_weights(network).items()}
    drawn = {}

    class Look:
        def attach(self, engine):
            engine.add_event_handler(Events.STARTED, self.look)

        def look(self, engine):
            drawn.update({name: value != before[name] for name, value in convolution_weights(network).items()})

    steps = Steps(network)
    own = [MaskedSmallGradients(forget, scale=scale), Look(), steps, *handlers]
    trainer = make_trainer(own, network=network, shuffle=False, max_epochs=1, **changes)
    if scaler is not None:
        trainer.scaler = scaler
    trainer.run()
    return steps.seen, drawn


def check_scaled(plain, scaled, drawn, scale):
    for name, gradient in plain.items():
        factor = torch.where(drawn[name], 1.0, scale) if name in drawn else torch.tensor(1.0)
        torch.testing.assert_close(scaled[name], gradient * factor, rtol=1e-5, atol=1e-9)
    assert all(0 < int(mask.sum()) < mask.numel() for mask in drawn.values())


def test_only_the_other_convolution_weights_gradients_are_scaled(make_trainer, forget) -> None:
    (plain, *_), _ = run(make_trainer, forget, 1)
    (scaled, *_), drawn = run(make_trainer, forget, 0.25)
    check_scaled(plain, scaled, drawn, 0.25)


def test_under_a_scaled_loss_the_gradients_are_the_same(make_trainer, forget) -> None:
    (plain, *_), _ = run(make_trainer, forget, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    (scaled, *_), drawn = run(make_trainer, forget, 0.25, scaler=scaler)
    assert scaler.get_scale() == 2.0**10
    check_scaled(plain, scaled, drawn, 0.25)


def test_accumulated_gradients_are_scaled_once(make_trainer, forget) -> None:
    changes = {"accumulation_steps": 2}
    plain, _ = run(make_trainer, forget, 1, **changes)
    scaled, drawn = run(make_trainer, forget, 0.25, **changes)
    assert len(plain) == len(scaled) == 2  # of three batches
    check_scaled(plain[0], scaled[0], drawn, 0.25)


def test_gradients_are_clipped_before_they_are_scaled(make_trainer, forget, on) -> None:
    def clip(engine):
        nn.utils.clip_grad_norm_(engine.network.parameters(), 0.01)

    clipping = [on(IterationEvents.BACKWARD_COMPLETED, clip)]
    (plain, *_), _ = run(make_trainer, forget, 1, clipping)
    (scaled, *_), drawn = run(make_trainer, forget, 0.25, clipping)
    check_scaled(plain, scaled, drawn, 0.25)


def test_with_scale_0_the_other_weights_stand_still_without_decay(make_trainer, forget) -> None:
    network = two_convolutions()
    before = network[3].weight.detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    make_trainer([MaskedSmallGradients(forget, scale=0)], network=network, optimizer=optimizer).run()
    unchanged = network[3].weight == before
    assert int(unchanged.sum()) == before.numel() - round(0.3 * before.numel())


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("kind", ["resnet", "densenet"])
@pytest.mark.parametrize("task", ["binary", "findings"])
def test_monais_networks(make_trainer, forget, snapshot, spatial_dims, kind, task) -> None:
    outputs = {"binary": 1, "findings": 3}[task]
    if kind == "resnet":
        network: nn.Module = ResNet(
            "basic", [1, 1, 1, 1], [2, 2, 2, 2], spatial_dims, 1, conv1_t_size=3, num_classes=outputs
        )
    else:
        network = DenseNet(spatial_dims, 1, outputs, init_features=2, growth_rate=2, block_config=(1, 1), bn_size=1)
    loss = nn.BCEWithLogitsLoss() if task == "binary" else MaskedBCEWithLogitsLoss()

    def label(i):
        return torch.tensor([float(i % 2)] if task == "binary" else [1.0, float("nan"), float(i % 2)])

    data = [
        {"image": torch.randn(1, *[9] * spatial_dims), "label": label(i), "patient": f"P{i % 6}"} for i in range(12)
    ]
    before = snapshot(network)
    start(make_trainer([MaskedSmallGradients(forget)], network=network, dataset=Dataset(data), loss_function=loss))
    after = snapshot(network)
    for name, weight in convolution_weights(network).items():
        changed = int((before[name] != after[name]).sum())
        assert abs(changed - 0.3 * weight.numel()) <= 0.5 + 1e-9


# Bad input


@pytest.mark.parametrize("name", ["share", "scale"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_shares_and_factors_outside_0_to_1_raise(forget, name, value) -> None:
    with pytest.raises(ValueError, match=rf"{name} should lie in \[0, 1\], but got"):
        MaskedSmallGradients(forget, **{name: value})


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_optimizers_on_which_a_factor_has_no_effect_are_refused_unless_it_is_1(make_trainer, forget, kind) -> None:
    network = two_convolutions()
    optimizer = kind(network.parameters(), lr=0.01)
    with pytest.raises(ValueError, match=rf"scale should be 1 with {kind.__name__}.*but got 0.1.*torch.optim.SGD"):
        make_trainer([MaskedSmallGradients(forget)], network=network, optimizer=optimizer).run()
    trainer = make_trainer([MaskedSmallGradients(forget, scale=1)], network=network, optimizer=optimizer)
    trainer.run()
    assert trainer.state.epoch == 2


def test_a_network_without_convolutions_is_refused(make_trainer, forget) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with pytest.raises(RuntimeError, match="the network has none"):
        make_trainer([MaskedSmallGradients(forget)], network=network).run()


def test_a_gradient_that_is_no_number_raises_and_changes_nothing(make_trainer, records, snapshot, same_bits) -> None:
    broken = [*records[:29], {**records[29], "image": torch.full((1, 6, 6), float("nan"))}]
    network = two_convolutions()
    before = snapshot(network)
    handler = MaskedSmallGradients(ForgetSet(["P5"], key="patient"))
    with pytest.raises(RuntimeError, match="should be finite, but holds NaN"):
        make_trainer([handler], network=network, dataset=Dataset(broken)).run()
    assert same_bits(before, snapshot(network))


def test_an_optimizer_that_is_exchanged_during_the_run_raises(make_trainer, forget, on) -> None:
    def exchange(engine):
        engine.optimizer = torch.optim.SGD(engine.network.parameters(), lr=0.1)

    trainer = make_trainer([MaskedSmallGradients(forget), on(Events.EPOCH_STARTED, exchange)])
    with pytest.raises(RuntimeError, match="without one step of the optimizer that it began with"):
        trainer.run()


def test_an_empty_forget_loader_raises(make_trainer, forget) -> None:
    with pytest.raises(ValueError, match="loader of forget samples should hold at least one sample"):
        make_trainer([MaskedSmallGradients(forget, forget_loader=[])]).run()
