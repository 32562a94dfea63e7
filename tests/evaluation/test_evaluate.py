"""Networks on named splits, against scikit-learn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ignite.metrics import Accuracy, Loss
from monai.engines import SupervisedEvaluator
from monai.handlers import ROCAUC, from_engine
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, roc_auc_score
from torch import nn
from torch.utils.data import DataLoader

from monai_unlearn.data import BatchedImages, LabeledImages, make_loader
from monai_unlearn.evaluation import SplitResult, evaluate, probabilities_and_one_hot
from monai_unlearn.metrics import log_odds

FIGURES = ("accuracy", "auroc", "loss", "balanced_accuracy")


def _split(n: int = 41, classes: int = 4, seed: int = 0) -> LabeledImages:
    random = np.random.RandomState(seed)
    labels = random.permutation(np.arange(n) % classes) if classes > 1 else np.zeros(n, dtype=np.int64)
    return LabeledImages(random.randint(0, 256, (n, 6, 6)).astype(np.uint8), labels)


def _loader(part: LabeledImages, batch_size: int = 10) -> DataLoader:
    return make_loader(BatchedImages(part), batch_size)


def _evaluator(loader: DataLoader, network: nn.Module) -> SupervisedEvaluator:
    """As the bundles have it."""
    both = from_engine(["pred", "label"])
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=loader,
        network=network,
        decollate=False,
        key_val_metric={"accuracy": Accuracy(output_transform=both)},
        additional_metrics={
            "auroc": ROCAUC(output_transform=probabilities_and_one_hot),
            "loss": Loss(nn.CrossEntropyLoss(), output_transform=both),
        },
    )


def _run(network: nn.Module, **parts: LabeledImages) -> dict[str, SplitResult]:
    loaders = {name: _loader(part) for name, part in parts.items()}
    return evaluate(_evaluator(next(iter(loaders.values())), network), network, loaders)


@torch.no_grad()
def _logits(network: nn.Module, part: LabeledImages) -> torch.Tensor:
    network.eval()
    return network(BatchedImages(part).__getitems__(list(range(len(part))))["image"])


@pytest.mark.parametrize("seed", range(4))
def test_the_figures_are_scikit_learns(make_network: Callable[..., nn.Module], seed: int) -> None:
    network, part = make_network(4, seed), _split(seed=seed)
    result = _run(network, test=part)["test"]
    logits = _logits(network, part)
    shares = logits.double().softmax(1).numpy()
    guesses = logits.argmax(1).numpy()
    assert result.n == 41
    assert result.accuracy == pytest.approx(accuracy_score(part.labels, guesses))
    assert result.balanced_accuracy == pytest.approx(balanced_accuracy_score(part.labels, guesses))
    assert result.loss == pytest.approx(log_loss(part.labels, shares), rel=1e-4)
    one_hot = np.eye(4)[part.labels]
    assert result.auroc == pytest.approx(roc_auc_score(one_hot, shares, average="macro"), abs=1e-6)
    assert result.scores.dtype == np.float64
    np.testing.assert_allclose(result.scores, log_odds(logits, torch.from_numpy(part.labels)), atol=1e-5)
    assert result.as_dict() == {"accuracy": result.accuracy, "auroc": result.auroc, "loss": result.loss, "n": 41}


@pytest.mark.parametrize("batch_size", [1, 7, 40, 41, 100])
def test_the_figures_do_not_depend_on_the_batch_size(make_network: Callable[..., nn.Module], batch_size: int) -> None:
    network, part = make_network(4), _split()
    one, other = (
        evaluate(_evaluator(loader, network), network, {"test": loader})["test"]
        for loader in (_loader(part, 41), _loader(part, batch_size))
    )
    np.testing.assert_allclose(other.scores, one.scores, atol=1e-5)
    for name in FIGURES:
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-5)


def test_each_split_is_evaluated_for_itself(make_network: Callable[..., nn.Module]) -> None:
    network, parts = make_network(4), {"forget": _split(9), "retain": _split(41, seed=1), "test": _split(17, seed=2)}
    together = _run(network, **parts)
    assert list(together) == ["forget", "retain", "test"]
    for name, part in parts.items():
        alone = _run(network, **{name: part})[name]
        np.testing.assert_array_equal(together[name].scores, alone.scores)
        assert [getattr(together[name], f) for f in FIGURES] == [getattr(alone, f) for f in FIGURES]


def test_one_evaluator_serves_several_networks(make_network: Callable[..., nn.Module]) -> None:
    part = _split()
    first, second = make_network(4, 0), make_network(4, 1)
    loader = _loader(part)
    evaluator = _evaluator(loader, first)
    results = [evaluate(evaluator, network, {"test": loader})["test"] for network in (first, second, first)]
    np.testing.assert_array_equal(results[0].scores, results[2].scores)
    assert not np.array_equal(results[0].scores, results[1].scores)
    np.testing.assert_array_equal(results[1].scores, _run(second, test=part)["test"].scores)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("classes", [1, 3])
def test_an_absent_class_leaves_the_auroc_undefined_and_the_rest_defined(
    make_network: Callable[..., nn.Module], classes: int
) -> None:
    result = _run(make_network(4), test=_split(classes=classes))["test"]
    assert result.auroc is None
    assert result.accuracy is not None
    assert result.loss is not None
    assert 0 <= result.balanced_accuracy <= 1


def test_a_metric_that_the_evaluator_lacks_is_none(make_network: Callable[..., nn.Module]) -> None:
    network, loader = make_network(4), _loader(_split())
    accuracy = {"accuracy": Accuracy(output_transform=from_engine(["pred", "label"]))}
    evaluator = SupervisedEvaluator(
        device="cpu", val_data_loader=loader, network=network, decollate=False, key_val_metric=accuracy
    )
    result = evaluate(evaluator, network, {"test": loader})["test"]
    assert (result.auroc, result.loss) == (None, None)
    assert result.accuracy is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_outputs_that_are_not_finite_are_refused(make_network: Callable[..., nn.Module], value: float) -> None:
    network = make_network(4)
    with torch.no_grad():
        network[-1].bias[1] = value
    with pytest.raises(ValueError, match="outputs on the forget set should be finite"):
        _run(network, forget=_split())


def _handlers(evaluator: SupervisedEvaluator) -> dict:
    return {event: [entry[0] for entry in entries] for event, entries in evaluator._event_handlers.items() if entries}


def test_nothing_is_left_on_the_evaluator_after_a_run_or_an_error(make_network: Callable[..., nn.Module]) -> None:
    network, loader = make_network(4), _loader(_split())
    evaluator = _evaluator(loader, network)
    before = _handlers(evaluator)
    evaluate(evaluator, network, {"test": loader})
    assert _handlers(evaluator) == before
    with torch.no_grad():
        network[-1].bias[0] = float("nan")
    with pytest.raises(ValueError, match="should be finite"):
        evaluate(evaluator, network, {"test": loader})
    assert _handlers(evaluator) == before


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_as_it_was(make_network: Callable[..., nn.Module], training: bool) -> None:
    network = make_network(4).train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    _run(network, test=_split())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(module.training == training for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_random_state_is_left_alone(make_network: Callable[..., nn.Module]) -> None:
    network = make_network(4)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    _run(network, test=_split())
    state = torch.get_rng_state()
    assert torch.equal(state, before)
