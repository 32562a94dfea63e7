"""What every method promises, whichever it is, and that none comes without its test, page and export."""

from __future__ import annotations

import copy
import importlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import GanTrainer, SupervisedTrainer
from monai.handlers import CheckpointLoader
from torch import nn

from monai_unlearn import ForgetSet, methods

ROOT = Path(__file__).parents[2]

# Each public handler in every way in which it differs, as (class, arguments that need the network).
VARIANTS: dict[str, tuple[type, Callable[[nn.Module], dict]]] = {
    "batch_norm_retain": (methods.BatchNormPolicy, lambda network: {}),
    "batch_norm_frozen": (methods.BatchNormPolicy, lambda network: {"policy": "frozen"}),
    "batch_norm_plain": (methods.BatchNormPolicy, lambda network: {"policy": "plain"}),
    "perturb_and_recover": (methods.PerturbAndRecover, lambda network: {"budget": 1.0}),
    "random_labeling": (methods.RandomLabeling, lambda network: {}),
    "retrain": (methods.Retrain, lambda network: {"initial_state": network.state_dict()}),
    "saliency_mask": (methods.SaliencyMask, lambda network: {"ratio": 0.5}),
    "finetune": (methods.FineTune, lambda network: {}),
    "gradient_ascent": (methods.GradientAscent, lambda network: {}),
    "neg_grad_plus": (methods.NegGradPlus, lambda network: {}),
    "scrub": (methods.SCRUB, lambda network: {"forget_epochs": 1}),
    "influence": (methods.InfluenceUnlearning, lambda network: {}),
    "rum": (methods.RUM, lambda network: {}),
    "rum_scores": (methods.RUM, lambda network: {"middle": "random_labeling", "scores": {"P0": 1, "P3": 2}}),
    "synaptic_dampening": (methods.SelectiveSynapticDampening, lambda network: {"alpha": 1.5}),
    "masked_small_gradients": (methods.MaskedSmallGradients, lambda network: {}),
    "conv_transpose": (methods.ConvTranspose, lambda network: {}),
    "weight_noise": (methods.WeightNoise, lambda network: {}),
    "l1_sparse": (methods.L1Sparse, lambda network: {}),
    "l1_sparse_penalty": (methods.L1Sparse, lambda network: {"retain": False}),
    "last_layers_cf": (methods.LastLayers, lambda network: {"k": 1}),
    "last_layers_eu": (methods.LastLayers, lambda network: {"k": 1, "initial_state": network.state_dict()}),
    "bad_teacher": (methods.BadTeacher, lambda network: {"initial_state": other_weights(network)}),
    "delete": (methods.DELETE, lambda network: {}),
    "reference_guided": (methods.ReferenceGuided, lambda network: {"held_out_loader": unseen_loader()}),
    "boundary_shrink": (methods.BoundaryShrink, lambda network: {}),
    "amun": (methods.AMUN, lambda network: {}),
    "amun_examples_alone": (methods.AMUN, lambda network: {"true_labels": False}),
    "scrub_rewind": (methods.SCRUB, lambda network: {"forget_epochs": 1, "rewind_loader": unseen_loader()}),
}


def other_weights(network):
    """Weights that are not the network's own."""
    return {name: value + 1 if value.is_floating_point() else value for name, value in network.state_dict().items()}


def unseen_loader():
    """Six unseen samples, two of each class."""
    images = torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    return DataLoader(Dataset([{"image": image, "label": i % 3} for i, image in enumerate(images)]), batch_size=4)


every_method = pytest.mark.parametrize("variant", VARIANTS)
# Those whose run has iterations.
TRAINING = [name for name, (kind, _) in VARIANTS.items() if not getattr(kind, "takes_no_step", False)]


def build(variant, forget, network, **more):
    kind, arguments = VARIANTS[variant]
    return kind(forget, **arguments(network), **more)


class StopError(Exception):
    pass


def all_hooks(network, optimizer):
    """How many hooks of any kind there are on modules, parameters and the optimizer."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    count = sum(len(getattr(module, kind)) for module in network.modules() for kind in kinds)
    for parameter in network.parameters():
        count += len(parameter._backward_hooks or ()) + len(parameter._post_accumulate_grad_hooks or ())
    for kind in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_optimizer_state_dict_pre_hooks"):
        count += len(getattr(optimizer, kind))
    return count


def test_every_public_handler_is_under_this_contract() -> None:
    assert {kind.__name__ for kind, _ in VARIANTS.values()} == {name for name in methods.__all__ if name[0].isupper()}


@every_method
def test_the_same_seed_gives_bit_identical_weights(
    make_trainer, make_network, forget, snapshot, same_bits, variant
) -> None:
    states = []
    for _ in range(2):
        network = make_network()
        network.insert(2, nn.Dropout(0.3))
        torch.manual_seed(4)
        make_trainer([build(variant, forget, network)], network=network).run()
        states.append(snapshot(network))
    assert same_bits(*states)


@every_method
def test_names_shapes_and_types_of_the_state_stay(make_trainer, make_network, forget, variant) -> None:
    network = make_network()
    before = [(name, value.shape, value.dtype) for name, value in network.state_dict().items()]
    trainable = [parameter.requires_grad for parameter in network.parameters()]
    identities = [id(parameter) for parameter in network.parameters()]
    make_trainer([build(variant, forget, network)], network=network).run()
    assert [(name, value.shape, value.dtype) for name, value in network.state_dict().items()] == before
    assert [parameter.requires_grad for parameter in network.parameters()] == trainable
    assert [id(parameter) for parameter in network.parameters()] == identities


@every_method
def test_an_unknown_argument_raises(make_network, forget, variant) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'ration'"):
        build(variant, forget, make_network(), ration=0.5)


@every_method
def test_arguments_other_than_the_forget_set_are_given_by_name(forget, variant) -> None:
    with pytest.raises(TypeError, match="positional argument"):
        VARIANTS[variant][0](forget, 0.5)


@every_method
def test_an_empty_forget_set_raises(make_network, variant) -> None:
    with pytest.raises(ValueError, match="at least one sample to forget, but got none"):
        build(variant, ForgetSet([]), make_network())


@every_method
def test_a_plain_engine_is_refused(make_network, forget, variant) -> None:
    with pytest.raises(TypeError, match=r"should be attached to a monai.engines.SupervisedTrainer, but got Engine"):
        build(variant, forget, make_network()).attach(Engine(lambda engine, batch: None))


@every_method
def test_a_gan_trainer_is_refused(make_network, forget, records, variant) -> None:
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="SupervisedTrainer, but got GanTrainer"):
        GanTrainer(
            "cpu", 1, DataLoader(Dataset(records)), network, optimizer, nn.MSELoss(), network, optimizer, nn.MSELoss(),
            train_handlers=[build(variant, forget, network)],
        )  # fmt: skip


@every_method
def test_a_trainer_with_an_iteration_of_its_own_is_refused(make_trainer, make_network, forget, variant) -> None:
    handler = build(variant, forget, make_network())
    with pytest.raises(TypeError, match=f"{type(handler).__name__} can't work in a trainer with an iteration_update"):
        make_trainer([handler], iteration_update=lambda engine, batch: {})


@every_method
def test_a_subclass_with_an_iteration_of_its_own_is_refused(make_trainer, make_network, forget, variant) -> None:
    class Own(SupervisedTrainer):
        def _iteration(self, engine, batchdata):
            return {}

    network = make_network()
    trainer = Own("cpu", 1, [], network, torch.optim.SGD(network.parameters(), lr=0.1), nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="can't work in a trainer with an iteration_update"):
        build(variant, forget, network).attach(trainer)


@every_method
def test_no_hook_gradient_mode_flag_or_random_state_leaks(make_trainer, make_network, forget, variant) -> None:
    network = make_network()
    trainer = make_trainer([build(variant, forget, network)], network=network)
    hooks = all_hooks(network, trainer.optimizer)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    settings = [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]
    loss = trainer.loss_function
    trainer.run()
    assert all_hooks(network, trainer.optimizer) == hooks == 0
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2][1])
    assert [{k: v for k, v in g.items() if k != "params"} for g in trainer.optimizer.param_groups] == settings
    assert trainer.loss_function is loss


@pytest.mark.parametrize("variant", TRAINING)
@pytest.mark.parametrize("iteration", [1, 3])
def test_after_an_error_in_a_run_the_next_one_is_as_if_there_had_been_none(
    make_trainer, make_network, forget, on, snapshot, same_bits, begin_again, variant, iteration
) -> None:
    def fail(engine):
        if armed and engine.state.iteration == iteration:
            raise StopError("raised by a later handler")

    states = []
    for armed in (True, False):
        network = make_network()
        trainer = make_trainer([build(variant, forget, network), on(Events.ITERATION_COMPLETED, fail)], network=network)
        start, optimizer_start = snapshot(network), copy.deepcopy(trainer.optimizer.state_dict())
        if armed:
            with pytest.raises(StopError, match="raised by a later handler"):
                trainer.run()
            assert trainer.state.iteration == iteration
            armed = False
            network.load_state_dict(start)
            trainer.optimizer.load_state_dict(optimizer_start)
            trainer.optimizer.zero_grad()
            begin_again(trainer)
        trainer.run()
        assert trainer.state.epoch == 2
        assert all_hooks(network, trainer.optimizer) == 0
        states.append(snapshot(network))
    assert same_bits(*states)


@pytest.mark.parametrize(
    ("variant", "event"),
    [(name, event) for name in VARIANTS for event in (Events.STARTED, Events.COMPLETED)]
    + [(name, Events.EPOCH_STARTED) for name in TRAINING],
)
def test_an_error_outside_the_iterations_propagates(make_trainer, make_network, forget, on, variant, event) -> None:
    def fail(engine):
        raise StopError("raised by a later handler")

    network = make_network()
    with pytest.raises(StopError, match="raised by a later handler"):
        make_trainer([build(variant, forget, network), on(event, fail)], network=network).run()


@pytest.mark.parametrize(
    "variant",
    [
        *("finetune", "conv_transpose", "masked_small_gradients", "perturb_and_recover", "weight_noise", "l1_sparse"),
        *("last_layers_cf", "last_layers_eu"),
    ],
)
def test_no_forget_sample_is_trained_on_and_the_policy_still_finds_the_others(
    make_trainer, make_network, forget, on, variant
) -> None:
    network = make_network()
    seen: set[int] = set()
    see = on(Events.ITERATION_COMPLETED, lambda engine: seen.update(engine.state.batch["index"].tolist()))
    statistics = methods.BatchNormPolicy(forget)
    make_trainer([build(variant, forget, network), statistics, see], network=network).run()
    assert seen == {i for i in range(30) if i // 5 not in (0, 3)}
    assert statistics.cost.samples == 20


@pytest.mark.parametrize(
    "variant", [name for name in VARIANTS if not name.startswith("batch_norm") or name == "batch_norm_retain"]
)
def test_samples_that_are_not_there_raise(make_trainer, make_network, variant) -> None:
    network = make_network()
    handler = build(variant, ForgetSet(["nobody"], key="patient"), network)
    with pytest.raises((ValueError, RuntimeError), match=r"in the forget set|met no forget sample"):
        make_trainer([handler], network=network).run()


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("batch_norm")])
def test_a_place_before_a_checkpoint_loader_is_refused(make_trainer, make_network, forget, tmp_path, variant) -> None:
    network = make_network()
    torch.save({"net": network.state_dict()}, tmp_path / "original.pt")
    loader = CheckpointLoader(str(tmp_path / "original.pt"), {"net": network})
    with pytest.raises(RuntimeError, match=r"stands before a CheckpointLoader.*Put it after"):
        make_trainer([build(variant, forget, network), loader], network=network).run()


MODULES = sorted(path.stem for path in Path(methods.__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def test_there_are_methods_to_check() -> None:
    assert {"batch_norm", "random_labeling", "retrain", "saliency_mask"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_every_method_has_a_test_file(module) -> None:
    assert (ROOT / "tests" / "methods" / f"test_{module}.py").is_file()


@pytest.mark.parametrize("module", MODULES)
def test_every_method_has_a_page_in_the_documentation(module) -> None:
    page = ROOT / "docs" / "methods" / f"{module}.md"
    assert page.is_file(), f"write docs/methods/{module}.md"


@pytest.mark.parametrize("module", MODULES)
def test_every_method_is_exported(module) -> None:
    source = importlib.import_module(f"monai_unlearn.methods.{module}")
    exported = [name for name in source.__all__ if name in methods.__all__]
    assert exported, f"export the handler of {module} in monai_unlearn/methods/__init__.py"
    assert all(getattr(methods, name) is getattr(source, name) for name in exported)
    assert all(hasattr(getattr(source, name), "attach") for name in exported)
