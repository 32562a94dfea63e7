"""The saliency mask: which weights it chooses, and that all others stay bit-identical whatever the optimizer does."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Events
from monai.data import CacheDataset, Dataset, PersistentDataset
from monai.engines.utils import IterationEvents
from monai.handlers import CheckpointLoader
from monai.losses import FocalLoss
from monai.transforms import Compose, EnsureTyped, MapTransform, OneOf, RandFlipd, RandGaussianNoised, ScaleIntensityd
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from monai_unlearn.loss import MaskedBCEWithLogitsLoss
from monai_unlearn.methods import BatchNormPolicy, RandomLabeling, SaliencyMask
from monai_unlearn.methods.saliency_mask import summed_gradient, summed_loss, top_fraction

IS_FORGET = [i // 5 in (0, 3) for i in range(30)]

SGD, ADAM, ADAMW, RMSPROP = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
OPTIMIZERS = {
    "sgd": (SGD, {"lr": 0.1}),
    "sgd_decay": (SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd_momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "sgd_dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    "sgd_nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    "sgd_maximize": (SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "maximize": True}),
    "sgd_foreach": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "foreach": True}),
    "sgd_fused": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "fused": True}),
    "adam": (ADAM, {"lr": 0.01, "weight_decay": 0.1}),
    "adam_no_eps": (ADAM, {"lr": 0.01, "weight_decay": 0.1, "eps": 0.0}),
    "adam_amsgrad": (ADAM, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "adam_foreach": (ADAM, {"lr": 0.01, "weight_decay": 0.1, "foreach": True}),
    "adam_fused": (ADAM, {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
    "adamw": (ADAMW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw_amsgrad": (ADAMW, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "adamw_maximize": (ADAMW, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    "adamw_foreach": (ADAMW, {"lr": 0.01, "weight_decay": 0.1, "foreach": True}),
    "adamw_tensor_lr": (ADAMW, {"lr": torch.tensor(0.01), "weight_decay": 0.1}),
    "rmsprop": (RMSPROP, {"lr": 0.01, "weight_decay": 0.1}),
    "rmsprop_momentum": (RMSPROP, {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "centered": True}),
    "rmsprop_foreach": (RMSPROP, {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "foreach": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.01, "weight_decay": 0.1}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
}


def build(name, network):
    kind, options = OPTIMIZERS[name]
    return kind(network.parameters(), **options)


def weights(network):
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def bits(values):
    return values.detach().contiguous().view({4: torch.int32, 8: torch.int64}[values.element_size()])


def check_frozen(before, network, mask, moved=0.9):
    """Masked-out weights are bit-identical, and of the others at least a share has moved."""
    after = dict(network.named_parameters())
    assert mask.keys() == before.keys() == after.keys()
    for name in before:
        same = bits(before[name]) == bits(after[name])
        assert same[~mask[name]].all(), name
    changed = sum(int((bits(before[n]) != bits(after[n])).sum()) for n in before)
    assert changed >= moved * sum(int(m.sum()) for m in mask.values()) > 0


def oracle(network, records, loss=functional.cross_entropy):
    """|Σ over the samples of each one's own gradient|, in float64 and evaluation mode; flat."""
    network = copy.deepcopy(network).double().eval()
    parameters = [p for p in network.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for record in records:
        image, label = record["image"][None].double(), torch.as_tensor(record["label"])[None]
        for i, gradient in enumerate(torch.autograd.grad(loss(network(image), label), parameters)):
            total[i] += gradient
    return torch.cat([t.abs().view(-1) for t in total])


def start(trainer):
    """Let the handlers do what they do before the first iteration."""
    trainer.fire_event(Events.STARTED)


def flat(mask):
    return torch.cat([m.reshape(-1) for m in mask.values()])


def mask_of(make_trainer, make_network, saliency, **changes):
    start(make_trainer([saliency], network=changes.pop("network", None) or make_network(), **changes))
    return saliency.mask


@pytest.fixture
def forget_records(records):
    return [record for i, record in enumerate(records) if IS_FORGET[i]]


class ExplosionError(Exception):
    pass


@pytest.fixture
def bomb(on):
    """A handler that raises in the third iteration."""

    def explode(engine):
        if engine.state.iteration == 3:
            raise ExplosionError

    return lambda event=Events.ITERATION_COMPLETED: on(event, explode)


# ---- which weights are chosen


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_mask_equals_a_float64_oracle(make_trainer, make_network, forget, double, ratio) -> None:
    network = make_network().double()
    expected = oracle(network, [r for i, r in enumerate(double.data) if IS_FORGET[i]])
    mask = flat(mask_of(make_trainer, make_network, SaliencyMask(forget, ratio=ratio), network=network, dataset=double))
    count = math.floor(ratio * len(expected) + 0.5)
    assert mask.sum() == count
    assert set(mask.nonzero().view(-1).tolist()) == set(expected.argsort(descending=True)[:count].tolist())


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_mask_of_findings_equals_a_float64_oracle_whatever_is_unknown(
    make_trainer, make_network, forget, double, loader_of, batch_size
) -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(2, (30, 3), generator=generator).double()
    labels[torch.rand(30, 3, generator=generator) < 0.4] = torch.nan
    labels[IS_FORGET.index(True)] = torch.nan
    records = [{**record, "label": label} for record, label in zip(double.data, labels)]
    forget_records = [record for i, record in enumerate(records) if IS_FORGET[i]]

    def known_findings(logits, label):  # of one sample
        known = ~label.isnan()
        each = functional.binary_cross_entropy_with_logits(logits[known], label[known], reduction="sum")
        return each / max(int(known.sum()), 1)

    network = make_network().double()
    expected = oracle(network, forget_records, known_findings)
    saliency = SaliencyMask(forget, loader=loader_of(forget_records, batch_size))
    trainer = make_trainer(
        [saliency], network=network, dataset=Dataset(records), loss_function=MaskedBCEWithLogitsLoss()
    )
    start(trainer)
    mask = flat(saliency.mask)
    count = math.floor(0.5 * len(expected) + 0.5)
    assert set(mask.nonzero().view(-1).tolist()) == set(expected.argsort(descending=True)[:count].tolist())


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("reverse", [False, True])
def test_mask_does_not_depend_on_batch_size_and_order(
    make_trainer, make_network, forget, forget_records, loader_of, batch_size, reverse
) -> None:
    saliency = SaliencyMask(forget, loader=loader_of(forget_records[:: -1 if reverse else 1], batch_size))
    mask = flat(mask_of(make_trainer, make_network, saliency))
    size = oracle(make_network(), forget_records)
    count = math.floor(0.5 * len(size) + 0.5)
    threshold = size.sort(descending=True).values[count - 1]
    clear = (size - threshold).abs() > 1e-5 * threshold
    assert clear.float().mean() > 0.9
    assert torch.equal(mask[clear], (size > threshold)[clear])
    assert mask.sum() == count


def test_mask_of_the_trainers_own_data_equals_that_of_a_loader(
    make_trainer, make_network, forget, forget_records, loader_of
) -> None:
    own = mask_of(make_trainer, make_network, SaliencyMask(forget))
    given = mask_of(make_trainer, make_network, SaliencyMask(forget, loader=loader_of(forget_records)))
    assert own.keys() == given.keys()
    assert all(torch.equal(own[name], given[name]) for name in own)


def test_mask_uses_the_true_labels_whatever_stands_before_it(make_trainer, make_network, forget) -> None:
    alone, after = SaliencyMask(forget), SaliencyMask(forget)
    start(make_trainer([alone]))
    start(make_trainer([RandomLabeling(forget), after]))
    assert torch.equal(flat(alone.mask), flat(after.mask))


@pytest.mark.parametrize("ratio", [0, 1e-9, 0.013, 0.25, 1 / 3, 0.5, 0.999, 1, 1.0])
def test_exactly_the_asked_share_is_chosen(make_trainer, make_network, forget, ratio) -> None:
    mask = flat(mask_of(make_trainer, make_network, SaliencyMask(forget, ratio=ratio)))
    assert mask.dtype == torch.bool
    assert mask.sum() == math.floor(ratio * len(mask) + 0.5)


def test_of_equal_gradients_the_first_are_chosen(make_trainer, forget, records) -> None:
    class AllAlike(nn.Module):  # each weight has the same gradient
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return (self.first.sum() + self.second.sum()).expand(len(x), 1)

    saliency = SaliencyMask(forget, ratio=0.5)
    dataset = Dataset([{**r, "label": r["label"][None].float()} for r in records])
    network = AllAlike()
    start(make_trainer([saliency], network=network, dataset=dataset, loss_function=nn.MSELoss()))
    assert flat(saliency.mask).tolist() == [True] * 6 + [False] * 5


def test_frozen_and_unreached_parameters_are_left_out_of_the_choice(make_trainer, make_network, forget) -> None:
    plain = make_network()
    network = make_network()
    network[0].bias.requires_grad_(False)
    network.unused = nn.Linear(3, 3)
    network.forward = lambda x: nn.Sequential(*list(network)[:6])(x)
    for parameter in network.unused.parameters():  # an earlier gradient, so that the optimizer would let it decay
        parameter.grad = torch.zeros_like(parameter)
    network[0].bias.grad = torch.zeros_like(network[0].bias)
    before = weights(network)
    saliency = SaliencyMask(forget, ratio=0.5)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.5)
    make_trainer([saliency], network=network, optimizer=optimizer).run()

    left_out = {"0.bias", "unused.weight", "unused.bias"}
    assert not any(saliency.mask[name].any() for name in left_out)
    size = sum(p.numel() for n, p in plain.named_parameters() if n not in left_out)
    assert flat(saliency.mask).sum() == math.floor(size / 2 + 0.5)
    assert list(saliency.mask) == [name for name, _ in network.named_parameters()]
    check_frozen(before, network, saliency.mask)


def test_a_network_without_trainable_parameters_raises(make_trainer, make_network, forget) -> None:
    network = make_network().requires_grad_(False)
    with pytest.raises(RuntimeError, match="no parameter that requires a gradient"):
        start(make_trainer([SaliencyMask(forget)], network=network))


def test_the_mask_pass_leaves_no_trace(make_trainer, make_network, forget, snapshot, same_bits) -> None:
    network = make_network()
    network.insert(2, nn.Dropout(0.5))
    network.train()
    network[1].eval()
    for i, parameter in enumerate(network.parameters()):
        parameter.grad = torch.full_like(parameter, float(i))
    saliency = SaliencyMask(forget)
    trainer = make_trainer([saliency], network=network)
    before, flags = snapshot(network), [module.training for module in network.modules()]
    random, order = torch.get_rng_state(), trainer.data_loader.generator.get_state()
    optimizer_state = copy.deepcopy(trainer.optimizer.state_dict())
    with torch.no_grad():
        start(trainer)
        assert not torch.is_grad_enabled()
    assert len(saliency.mask) == len(before) - 3
    assert same_bits(before, snapshot(network))
    assert [module.training for module in network.modules()] == flags
    assert all(bool((p.grad == i).all()) for i, p in enumerate(network.parameters()))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(trainer.data_loader.generator.get_state(), order)
    assert trainer.optimizer.state_dict() == optimizer_state


def test_a_given_loader_leaves_the_global_random_state_alone(
    make_trainer, make_network, forget, forget_records, on
) -> None:
    shuffled = torch.utils.data.DataLoader(Dataset(forget_records), batch_size=4, shuffle=True)
    random = torch.get_rng_state()
    trainer = make_trainer([SaliencyMask(forget, loader=shuffled)])
    torch.set_rng_state(random)
    start(trainer)
    assert torch.equal(torch.get_rng_state(), random)


def test_the_mask_pass_is_counted(make_trainer, forget) -> None:
    saliency = SaliencyMask(forget)
    make_trainer([saliency]).run()
    assert (saliency.cost.samples, saliency.cost.forward, saliency.cost.backward) == (10, 10, 10)
    assert saliency.cost.seconds > 0


# ---- where the forget samples come from


class Counting(MapTransform):
    """Keeps which samples were decoded."""

    def __init__(self, keys):
        super().__init__(keys)
        self.indices = []

    def __call__(self, data):
        self.indices.append(data["index"])
        return data


@pytest.mark.parametrize(
    "random",
    [
        RandFlipd("image", prob=1.0),
        Compose([RandGaussianNoised("image", prob=1.0, std=3.0)]),
        OneOf([RandFlipd("image", prob=1.0), RandGaussianNoised("image", prob=1.0, std=3.0)]),
    ],
    ids=["transform", "nested", "one_of"],
)
@pytest.mark.parametrize("kind", ["Dataset", "CacheDataset", "PersistentDataset"])
def test_random_transforms_are_dropped_and_other_samples_are_not_decoded(
    make_trainer, make_network, forget, records, tmp_path, random, kind
) -> None:
    counting = Counting("image")

    def dataset(*transforms):
        chain = Compose([ScaleIntensityd("image"), *transforms])
        if kind == "CacheDataset":
            return CacheDataset(records, chain, progress=False)
        return (
            PersistentDataset(records, chain, cache_dir=tmp_path)
            if kind == "PersistentDataset"
            else Dataset(records, chain)
        )

    plain = mask_of(make_trainer, make_network, SaliencyMask(forget), dataset=dataset())
    augmented_data = dataset(counting, random)
    counting.indices.clear()  # a CacheDataset decodes all of it once
    augmented = mask_of(make_trainer, make_network, SaliencyMask(forget), dataset=augmented_data)
    assert counting.indices == [i for i in range(30) if IS_FORGET[i]]
    assert torch.equal(flat(plain), flat(augmented))


class Plain(torch.utils.data.Dataset):
    """A data set of the user's own, without records."""

    def __init__(self, records):
        self.items = records

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_data_without_records_asks_for_a_loader_and_works_with_one(
    make_trainer, make_network, forget, records, forget_records, loader_of
) -> None:
    with pytest.raises(ValueError, match=r"in a Plain.*Give the method a loader of its own"):
        make_trainer([SaliencyMask(forget)], dataset=Plain(records)).run()
    network = make_network()
    before, saliency = weights(network), SaliencyMask(forget, loader=loader_of(forget_records))
    make_trainer([saliency], dataset=Plain(records), network=network).run()
    check_frozen(before, network, saliency.mask)


def test_a_callable_that_may_be_random_is_refused(make_trainer, forget, records) -> None:
    def my_augmentation(data):
        return data

    dataset = Dataset(records, Compose([EnsureTyped("image"), my_augmentation]))
    with pytest.raises(ValueError, match=r"my_augmentation is random can't be told.*a loader of its own"):
        make_trainer([SaliencyMask(forget)], dataset=dataset).run()


def test_an_empty_loader_raises(make_trainer, forget) -> None:
    with pytest.raises(ValueError, match="loader of forget samples should hold at least one sample"):
        make_trainer([SaliencyMask(forget, loader=[])]).run()


def test_a_nan_gradient_raises(make_trainer, forget, records) -> None:
    records[2]["image"] = torch.full_like(records[2]["image"], float("nan"))
    with pytest.raises(RuntimeError, match="gradient over the forget samples should be finite"):
        make_trainer([SaliencyMask(forget)]).run()


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), True, "0.5", None])
def test_a_ratio_outside_its_range_raises(forget, ratio) -> None:
    with pytest.raises(ValueError, match="ratio should lie in \\[0, 1\\]"):
        SaliencyMask(forget, ratio=ratio)


def test_a_place_before_a_checkpoint_loader_is_refused(make_trainer, make_network, forget, tmp_path) -> None:
    torch.save({"net": make_network(seed=7).state_dict()}, tmp_path / "original.pt")
    network = make_network()
    loader = CheckpointLoader(str(tmp_path / "original.pt"), {"net": network})
    with pytest.raises(RuntimeError, match="SaliencyMask stands before a CheckpointLoader"):
        make_trainer([SaliencyMask(forget), loader], network=network).run()


def test_a_place_after_a_checkpoint_loader_sees_the_loaded_weights(
    make_trainer, make_network, forget, tmp_path
) -> None:
    torch.save({"net": make_network(seed=7).state_dict()}, tmp_path / "original.pt")
    network = make_network()
    loader = CheckpointLoader(str(tmp_path / "original.pt"), {"net": network})
    saliency = SaliencyMask(forget)
    start(make_trainer([loader, saliency], network=network))
    of_loaded = mask_of(make_trainer, make_network, SaliencyMask(forget), network=make_network(seed=7))
    of_fresh = mask_of(make_trainer, make_network, SaliencyMask(forget))
    assert torch.equal(flat(saliency.mask), flat(of_loaded))
    assert not torch.equal(flat(saliency.mask), flat(of_fresh))


def test_the_file_holds_the_mask(make_trainer, forget, tmp_path) -> None:
    saliency = SaliencyMask(forget, path=tmp_path / "private" / "mask.safetensors")
    make_trainer([saliency]).run()
    stored = load_file(tmp_path / "private" / "mask.safetensors")
    assert stored.keys() == saliency.mask.keys()
    assert all(torch.equal(stored[name], saliency.mask[name]) for name in stored)
    assert {value.dtype for value in stored.values()} == {torch.bool}
    assert [file.name for file in (tmp_path / "private").iterdir()] == ["mask.safetensors"]


# ---- wrapped and unusual networks


class Unwrapped(nn.Module):
    """A network that itself calls a part of it `module`."""

    def __init__(self, body):
        super().__init__()
        self.module, self.head = body, nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.module(x))


def test_a_part_that_is_called_module_is_not_taken_for_the_network(
    make_trainer, make_network, forget, forget_records
) -> None:
    network = Unwrapped(make_network())
    expected = oracle(network, forget_records)
    before, saliency = weights(network), SaliencyMask(forget, ratio=0.3)
    make_trainer([saliency], network=network).run()
    count = math.floor(0.3 * len(expected) + 0.5)
    assert set(flat(saliency.mask).nonzero().view(-1).tolist()) == set(
        expected.argsort(descending=True)[:count].tolist()
    )
    for name, mask in zip(before, saliency.mask.values()):
        assert torch.equal(bits(before[name])[~mask], bits(dict(network.named_parameters())[name])[~mask])


def test_data_parallel_prefixes_are_left_out(make_trainer, make_network, forget) -> None:
    network = make_network()
    before, saliency = weights(network), SaliencyMask(forget)
    make_trainer([RandomLabeling(forget), saliency, BatchNormPolicy(forget)], network=nn.DataParallel(network)).run()
    check_frozen(before, network, saliency.mask)
    plain = mask_of(make_trainer, make_network, SaliencyMask(forget))
    assert all(torch.equal(saliency.mask[name], plain[name]) for name in plain)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel_trains_with_the_plain_networks_mask(make_trainer, make_network, forget) -> None:
    network = make_network()
    before, saliency = weights(network), SaliencyMask(forget)
    wrapped, calls = nn.parallel.DistributedDataParallel(network), []
    wrapped.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    trainer = make_trainer([RandomLabeling(forget), saliency, BatchNormPolicy(forget)], network=wrapped)
    trainer.run()
    assert len(calls) == trainer.state.iteration  # the methods' own passes go past the wrapper
    check_frozen(before, network, saliency.mask)
    plain = mask_of(make_trainer, make_network, SaliencyMask(forget))
    assert all(torch.equal(saliency.mask[name], plain[name]) for name in plain)


def test_a_channels_last_network_gets_the_same_mask(make_trainer, make_network, forget) -> None:
    network = make_network().to(memory_format=torch.channels_last)
    before, saliency = weights(network), SaliencyMask(forget)
    make_trainer([saliency], network=network).run()
    check_frozen(before, network, saliency.mask)
    plain = mask_of(make_trainer, make_network, SaliencyMask(forget))
    assert torch.equal(flat(plain), flat(saliency.mask))


# ---- frozen means bit-identical


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_out_weights_stay_bit_identical(make_trainer, make_network, forget, name) -> None:
    network = make_network()
    before, saliency = weights(network), SaliencyMask(forget)
    optimizer = build(name, network)
    make_trainer([RandomLabeling(forget), saliency], network=network, optimizer=optimizer, max_epochs=3).run()
    check_frozen(before, network, saliency.mask)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ratio_zero_keeps_the_original_weights_to_the_sign_of_zero(make_trainer, make_network, forget, name) -> None:
    network = make_network()
    with torch.no_grad():
        network[0].weight[0, 0, 0] = -0.0  # as pruning leaves them
        network[5].weight[0, :2] = -0.0
    before = weights(network)
    optimizer = build(name, network)
    make_trainer([SaliencyMask(forget, ratio=0)], network=network, optimizer=optimizer).run()
    assert all(torch.equal(bits(before[n]), bits(p)) for n, p in network.named_parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ratio_one_equals_no_mask(make_trainer, make_network, forget, double, name, snapshot) -> None:
    states = []
    for handlers in ([], [SaliencyMask(forget, ratio=1)]):
        network = make_network().double()
        make_trainer(
            [RandomLabeling(forget), *handlers], network=network, optimizer=build(name, network), dataset=double
        ).run()
        states.append(snapshot(network))
    exact = name.startswith("sgd")
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=0 if exact else 1e-12, atol=0 if exact else 1e-14)


@pytest.mark.parametrize("name", ["sgd_nesterov", "sgd_maximize", "adam_amsgrad", "adamw", "adamw_maximize"])
def test_masked_step_equals_a_step_with_frozen_weights_put_back(
    make_trainer, make_network, forget, double, name
) -> None:
    results = []
    for own in (False, True):
        network = make_network().double()
        kind, options = OPTIMIZERS[name]
        if own:  # an optimizer that is not known
            kind = type("Own", (kind,), {})
        optimizer = kind(network.parameters(), **options)
        make_trainer([SaliencyMask(forget)], network=network, optimizer=optimizer, dataset=double).run()
        results.append(weights(network))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-12, atol=1e-14)


def test_float64_steps_equal_a_hand_written_loop(make_trainer, make_network, forget, double) -> None:
    network = make_network().double()
    expected = copy.deepcopy(network)
    saliency = SaliencyMask(forget, ratio=0.4)
    make_trainer([saliency], network=network, dataset=double, batch_size=30, shuffle=False, max_epochs=3).run()

    images = torch.stack([record["image"] for record in double.data])
    labels = torch.tensor([int(record["label"]) for record in double.data])
    velocity = [torch.zeros_like(p) for p in expected.parameters()]
    for _ in range(3):
        loss = functional.cross_entropy(expected(images), labels)
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for p, v, g, mask in zip(expected.parameters(), velocity, gradients, saliency.mask.values()):
                v.mul_(0.9).add_((g + 0.01 * p) * mask)
                p.sub_(0.1 * v)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_of_an_earlier_run_do_not_move_masked_out_weights(make_trainer, make_network, forget, name) -> None:
    network = make_network()
    optimizer = build(name, network)
    make_trainer([], network=network, optimizer=optimizer).run()
    before, saliency = weights(network), SaliencyMask(forget)
    make_trainer([saliency], network=network, optimizer=optimizer).run()
    check_frozen(before, network, saliency.mask)


@pytest.mark.parametrize("name", ["sgd_momentum", "adamw", "rmsprop_momentum"])
def test_gradient_accumulation_keeps_masked_out_weights(
    make_trainer, make_network, forget, name, snapshot, same_bits
) -> None:
    states = []
    for ratio in (0.5, 1.0, None):
        network = make_network()
        before = weights(network)
        handlers = [] if ratio is None else [SaliencyMask(forget, ratio=ratio)]
        make_trainer(
            handlers, network=network, optimizer=build(name, network), batch_size=7, accumulation_steps=2
        ).run()
        states.append(snapshot(network))
        if ratio is not None:
            check_frozen(before, network, handlers[0].mask)
    assert same_bits(states[1], states[2])


class Clip:
    """A gradient clipping handler as users write it."""

    def attach(self, engine):
        engine.add_event_handler(
            IterationEvents.BACKWARD_COMPLETED,
            lambda e: nn.utils.clip_grad_norm_(e.network.parameters(), 0.01, error_if_nonfinite=True),
        )


@pytest.mark.parametrize("name", ["sgd_nesterov", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_gradient_clipping_keeps_masked_out_weights(make_trainer, make_network, forget, name, place) -> None:
    network = make_network()
    before, saliency = weights(network), SaliencyMask(forget)
    handlers = [Clip(), saliency] if place == "before" else [saliency, Clip()]
    make_trainer(handlers, network=network, optimizer=build(name, network)).run()
    check_frozen(before, network, saliency.mask)


@pytest.mark.parametrize("name", ["sgd_momentum", "sgd_fused", "adam", "adam_fused", "adamw", "rmsprop_momentum"])
@pytest.mark.parametrize("overflow", [False, True], ids=["finite", "overflow"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # autocast and its scaler look for CUDA
def test_loss_scaling_keeps_masked_out_weights(make_trainer, make_network, forget, on, name, overflow) -> None:
    scales = []

    def use_scaler(engine):
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def overflow_once(engine):
        scales.append(engine.scaler.get_scale())
        if overflow and engine.state.iteration == 3:
            for parameter in engine.network.parameters():
                parameter.grad.view(-1)[0] = float("inf")

    results = []
    for handlers in ([], [SaliencyMask(forget, ratio=1.0)], [SaliencyMask(forget)]):
        network = make_network()
        before = weights(network)
        scaling = [on(Events.STARTED, use_scaler), on(IterationEvents.BACKWARD_COMPLETED, overflow_once)]
        optimizer = build(name, network)
        make_trainer([*scaling, *handlers], network=network, optimizer=optimizer, amp=True).run()
        results.append((weights(network), [bool(p.isfinite().all()) for p in network.parameters()]))
        assert optimizer.param_groups[0]["weight_decay"] == 0.1
        assert all(results[-1][1])
    check_frozen(before, network, handlers[0].mask)
    assert scales[0] == 1024
    assert (scales[3] == 512) is overflow
    for key, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][key], rtol=1e-5, atol=1e-6)


def test_parameters_of_others_in_the_optimizer_are_treated_as_without_a_mask(
    make_trainer, make_network, forget
) -> None:
    results = []
    for handlers in ([], [SaliencyMask(forget)]):
        network = make_network()
        other = nn.Parameter(torch.ones(3))
        other.grad = torch.ones(3)
        optimizer = torch.optim.AdamW([*network.parameters(), other], lr=0.01, weight_decay=0.1)
        make_trainer(handlers, network=network, optimizer=optimizer).run()
        results.append(other.detach())
    assert (results[0] != 1).all()
    assert torch.equal(*results)


# ---- what is left of a run


def two_groups(network, kind):
    head, body = list(network[5].parameters()), list(network[0].parameters()) + list(network[1].parameters())
    return kind([{"params": body, "weight_decay": 0.3}, {"params": head}], lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("kind", [SGD, ADAM, ADAMW, RMSPROP])
@pytest.mark.parametrize("event", [IterationEvents.BACKWARD_COMPLETED, Events.ITERATION_COMPLETED, None])
def test_weight_decay_of_the_groups_is_put_back(make_trainer, make_network, forget, bomb, kind, event) -> None:
    network = make_network()
    optimizer = two_groups(network, kind)
    handlers = [SaliencyMask(forget), *([bomb(event)] if event else [])]
    trainer = make_trainer(handlers, network=network, optimizer=optimizer)
    if event:
        with pytest.raises(ExplosionError):
            trainer.run()
    else:
        trainer.run()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.1]


@pytest.mark.parametrize("kind", [SGD, ADAM, ADAMW, RMSPROP])
@pytest.mark.parametrize("ending", ["completed", "exception"])
def test_after_a_run_the_optimizer_works_by_hand_as_if_never_hooked(
    make_trainer, make_network, forget, bomb, kind, ending
) -> None:
    network = make_network()
    optimizer = two_groups(network, kind)
    trainer = make_trainer([SaliencyMask(forget), bomb()], network=network, optimizer=optimizer)
    if ending == "exception":
        with pytest.raises(ExplosionError):
            trainer.run()
    else:
        trainer.state.max_epochs, trainer.state.epoch_length = 1, 2
        trainer.run()
    other = copy.deepcopy(network)
    never_hooked = two_groups(other, kind)
    never_hooked.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, opt in ((network, optimizer), (other, never_hooked)):
        for i, parameter in enumerate(net.parameters()):
            parameter.grad = torch.full_like(parameter, i + 1.0)
        before = weights(net)
        opt.step()
        assert all((before[name] != p).all() for name, p in net.named_parameters())
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), other.parameters()))


def test_another_trainer_with_the_same_optimizer_is_not_masked(make_trainer, make_network, forget, bomb) -> None:
    network = make_network()
    trainer = make_trainer([SaliencyMask(forget, ratio=0), bomb()], network=network)
    with pytest.raises(ExplosionError):
        trainer.run()
    before = weights(network)
    make_trainer([], network=network, optimizer=trainer.optimizer).run()
    assert all((before[name] != p).any() for name, p in network.named_parameters())


def test_a_second_run_of_the_same_trainer_equals_a_trainer_of_its_own(
    make_trainer, make_network, forget, snapshot, same_bits
) -> None:
    states, masks = [], []
    for reuse in (True, False):
        network = make_network()
        optimizer = build("sgd_momentum", network)
        saliency = SaliencyMask(forget)
        trainer = make_trainer([RandomLabeling(forget), saliency], network=network, optimizer=optimizer)
        trainer.run()
        if not reuse:
            saliency = SaliencyMask(forget)
            trainer = make_trainer([RandomLabeling(forget), saliency], network=network, optimizer=optimizer)
        before = weights(network)
        trainer.data_loader.generator.manual_seed(3)
        trainer.run()
        check_frozen(before, network, saliency.mask)
        states.append(snapshot(network))
        masks.append(flat(saliency.mask))
    assert same_bits(*states)
    assert torch.equal(*masks)


def test_an_optimizer_exchanged_during_the_run_raises(make_trainer, make_network, forget, on) -> None:
    network = make_network()

    def exchange(engine):
        engine.optimizer = build("adam", network)

    with pytest.raises(RuntimeError, match="optimizer was exchanged during the run"):
        make_trainer([SaliencyMask(forget), on(Events.EPOCH_STARTED, exchange)], network=network).run()


def test_a_run_without_a_step_raises(make_trainer, forget, on) -> None:
    with pytest.raises(RuntimeError, match="without one optimizer step"):
        make_trainer([SaliencyMask(forget), on(Events.STARTED, lambda engine: engine.terminate())]).run()


# ---- the functions


class DoubledError(nn.MSELoss):
    """A loss that is derived from one of PyTorch's, but is another."""

    def forward(self, prediction, target):
        return 2 * super().forward(prediction, target) + 1


LOSSES = {
    "cross_entropy": (nn.CrossEntropyLoss(), "classes"),
    "cross_entropy_sum": (nn.CrossEntropyLoss(reduction="sum"), "classes"),
    "cross_entropy_none": (nn.CrossEntropyLoss(reduction="none"), "classes"),
    "cross_entropy_smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), "classes"),
    "cross_entropy_soft": (nn.CrossEntropyLoss(), "soft"),
    "cross_entropy_pixels": (nn.CrossEntropyLoss(), "pixels"),
    "cross_entropy_pixels_sum": (nn.CrossEntropyLoss(reduction="sum"), "pixels"),
    "nll": (nn.NLLLoss(), "classes"),
    "bce": (nn.BCEWithLogitsLoss(), "soft"),
    "bce_one_column": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0])), "column"),
    "bce_sum": (nn.BCEWithLogitsLoss(reduction="sum"), "soft"),
    "bce_none": (nn.BCEWithLogitsLoss(reduction="none"), "soft"),
    "mse": (nn.MSELoss(), "soft"),
    "mse_vector": (nn.MSELoss(), "vector"),
    "l1": (nn.L1Loss(), "soft"),
    "huber": (nn.HuberLoss(), "column"),
    "focal": (FocalLoss(use_softmax=True), "soft"),
    "function": (lambda prediction, target: (prediction - target).abs().pow(1.5).mean(), "soft"),
    "subclass": (DoubledError(), "soft"),
}


def predictions(kind, n=5):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if kind == "pixels":
        return draw(n, 3, 4, 2).requires_grad_(), torch.randint(3, (n, 4, 2), generator=generator)
    shape = {"column": (n, 1), "vector": (n,)}.get(kind, (n, 3))
    target = torch.arange(n) % 3 if kind == "classes" else draw(*shape).sigmoid()
    return draw(*shape).requires_grad_(), target


@pytest.mark.parametrize("name", LOSSES)
def test_summed_loss_equals_a_loop_over_the_samples(name) -> None:
    loss, kind = LOSSES[name]
    prediction, target = predictions(kind)
    total = summed_loss(loss, prediction, target)
    expected = sum(loss(prediction[i : i + 1], target[i : i + 1]).mean() for i in range(len(target)))
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(total, prediction)[0], torch.autograd.grad(expected, prediction)[0], rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_class_weights_count_in_the_summed_loss(kind, reduction) -> None:
    weight = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)
    prediction, target = predictions("classes")
    loss = kind(weight=weight, reduction=reduction)
    each = kind(reduction="none")(prediction, target)
    torch.testing.assert_close(summed_loss(loss, prediction, target), (weight[target] * each).sum(), rtol=1e-12, atol=0)
    assert loss.reduction == reduction


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 4), st.sampled_from(["mean", "sum"]), st.booleans())
def test_summed_loss_of_findings_equals_a_loop_over_the_samples(seed, n, findings, reduction, weighted) -> None:
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randn(n, findings, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(3, (n, findings), generator=generator).double() / 2
    target[torch.rand(n, findings, generator=generator) < 0.5] = torch.nan
    loss = MaskedBCEWithLogitsLoss(reduction, [0.5 + i for i in range(findings)] if weighted else None)
    total = summed_loss(loss, prediction, target)
    expected = sum(loss(prediction[i : i + 1], target[i : i + 1]) for i in range(n))
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(total, prediction)[0], torch.autograd.grad(expected, prediction)[0], rtol=1e-12, atol=1e-15
    )
    assert loss.reduction == reduction


def test_summed_loss_of_findings_is_one_call(monkeypatch) -> None:
    calls = []
    forward = MaskedBCEWithLogitsLoss.forward
    monkeypatch.setattr(MaskedBCEWithLogitsLoss, "forward", lambda *a: (calls.append(1), forward(*a))[1])
    summed_loss(MaskedBCEWithLogitsLoss(), torch.zeros(5, 2), torch.zeros(5, 2))
    assert len(calls) == 1


def test_summed_gradient_equals_the_gradient_of_the_sum() -> None:
    shared, delta, unused, scaled = (nn.Parameter(torch.randn(3, 2)) for _ in range(4))
    parameters = [shared, delta, unused, scaled]
    inputs = [torch.randn(4, 2) for _ in range(3)]

    def losses():
        # The first two are added, so that autograd gives both the same tensor; the last one's is an expanded number.
        return [(x @ (shared + delta).T).pow(2).sum() + scaled.sum() for x in inputs]

    for parameter in parameters:
        parameter.grad = torch.full((3, 2), 7.0)
    gradient, reached = summed_gradient(parameters, losses())
    expected = torch.autograd.grad(sum(losses()), [shared, delta, scaled])
    assert reached == [True, True, False, True]
    pieces = [piece.view(3, 2) for piece in gradient.split(6)]
    torch.testing.assert_close([pieces[0], pieces[1], pieces[3]], list(expected))
    assert pieces[2].eq(0).all()
    assert all((p.grad == 7).all() for p in parameters)


def first_largest(values, ratio):
    """By sorting: the largest ones, of equal ones the first."""
    count = math.floor(ratio * len(values) + 0.5)
    chosen = set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])
    return [i in chosen for i in range(len(values))]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    values=st.lists(
        st.sampled_from([0.0, 1e-40, 0.5, 1.0, 3.0]) | st.floats(0, 2.0**100, width=32), min_size=1, max_size=40
    ),
    ratio=st.floats(0, 1) | st.sampled_from([0, 0.25, 0.5, 1]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_top_fraction_equals_a_sort(values, ratio, dtype) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    given_values = tensor.clone()
    mask = top_fraction(tensor, ratio)
    assert mask.dtype == torch.bool
    assert mask.tolist() == first_largest(values, ratio)
    assert torch.equal(tensor, given_values)


SHAPES = {
    "normal": lambda n, g: torch.randn(n, generator=g).abs(),
    "sorted": lambda n, g: torch.randn(n, generator=g).abs().sort().values,
    "ties": lambda n, g: torch.randint(7, (n,), generator=g).float(),
    "equal": lambda n, g: torch.full((n,), 0.25),
    "mostly_zero": lambda n, g: torch.rand(n, generator=g) * (torch.rand(n, generator=g) > 0.9),
    "one_large": lambda n, g: torch.cat([torch.zeros(n - 1), torch.ones(1)]),
    "periodic": lambda n, g: (torch.arange(n) % 15 == 0).float() + torch.rand(n, generator=g) * 1e-3,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_top_fraction_of_many_values_equals_a_stable_sort(shape) -> None:
    values = SHAPES[shape](150_001, torch.Generator().manual_seed(0))
    order = np.argsort(-values.numpy(), kind="stable")
    for ratio in (1e-5, 0.05, 0.5, 0.93, 1 - 1e-5):
        expected = np.zeros(len(values), dtype=bool)
        expected[order[: math.floor(ratio * len(values) + 0.5)]] = True
        assert np.array_equal(top_fraction(values, ratio).numpy(), expected), ratio


def test_a_second_mask_on_a_trainer_is_refused(make_trainer, forget) -> None:
    with pytest.raises(RuntimeError, match="should have one SaliencyMask"):
        make_trainer([SaliencyMask(forget), SaliencyMask(forget)])


@pytest.mark.parametrize("kind", ["spread", "half zero", "nearly all zero", "many ties", "sorted"])
@pytest.mark.parametrize("ratio", [0.001, 0.3, 0.5, 0.9999])
def test_the_largest_of_many_values_equal_those_of_a_sort(kind: str, ratio: float) -> None:
    values = torch.randn(150_000).abs()
    if kind == "many ties":
        values = (3 * values).round()
    elif kind == "sorted":
        values = values.sort().values
    elif kind != "spread":
        values[torch.rand(150_000) < (0.5 if kind == "half zero" else 0.97)] = 0
    mask = top_fraction(values, ratio)
    assert int(mask.sum()) == round(150_000 * ratio)
    order = torch.sort(values, descending=True, stable=True).indices[: round(150_000 * ratio)]
    assert torch.equal(torch.nonzero(mask).view(-1), order.sort().values)
