"""Networks on named splits, against scikit-learn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ignite.metrics import Accuracy, EpochMetric, Loss
from monai.engines import SupervisedEvaluator
from monai.handlers import ROCAUC, from_engine
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, roc_auc_score
from torch import nn
from torch.utils.data import DataLoader

from monai_unlearn.data import BatchedImages, LabeledImages, make_loader
from monai_unlearn.evaluation import SplitResult, evaluate, probabilities_and_one_hot
from monai_unlearn.loss import MaskedBCEWithLogitsLoss
from monai_unlearn.metrics import finding_log_odds, known_accuracy, log_odds, mean_auroc

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


# ---- several findings an image


def _findings(n: int = 41, findings: int = 3, seed: int = 0) -> LabeledImages:
    random = np.random.RandomState(seed)
    labels = random.randint(0, 2, (n, findings)).astype(np.float32)
    labels[random.rand(n, findings) < 0.3] = np.nan
    return LabeledImages(random.randint(0, 256, (n, 6, 6)).astype(np.uint8), labels)


def _findings_evaluator(loader: DataLoader, network: nn.Module) -> SupervisedEvaluator:
    both = from_engine(["pred", "label"])
    epoch = {"output_transform": both, "check_compute_fn": False}
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=loader,
        network=network,
        decollate=False,
        key_val_metric={"accuracy": EpochMetric(known_accuracy, **epoch)},
        additional_metrics={
            "auroc": EpochMetric(mean_auroc, **epoch),
            "loss": Loss(MaskedBCEWithLogitsLoss(), output_transform=both),
        },
    )


def _run_findings(network: nn.Module, part: LabeledImages, batch_size: int = 10, names: object = None) -> SplitResult:
    loader = _loader(part, batch_size)
    return evaluate(_findings_evaluator(loader, network), network, {"test": loader}, names)["test"]


@pytest.mark.parametrize("findings", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 10, 41])
def test_the_figures_of_findings_are_scikit_learns(
    make_network: Callable[..., nn.Module], findings: int, batch_size: int
) -> None:
    network, part = make_network(findings), _findings(findings=findings)
    part.labels[7] = np.nan
    names = ["edema", "fracture", "nodule"][:findings]
    result = _run_findings(network, part, batch_size, names)
    logits = _logits(network, part)
    known = ~np.isnan(part.labels)
    truth, found = part.labels[known] > 0, logits.numpy()[known] > 0
    assert result.n == 41
    assert result.accuracy == pytest.approx(accuracy_score(truth, found))
    assert result.balanced_accuracy is None
    each = [roc_auc_score(part.labels[rows, i], logits[torch.from_numpy(rows), i]) for i, rows in enumerate(known.T)]
    assert result.auroc_per_finding == pytest.approx(dict(zip(names, each)))
    assert result.auroc == pytest.approx(np.mean(each))
    losses = [
        log_loss(row > 0, z[k].double().sigmoid().numpy(), labels=[False, True]) if k.any() else 0.0
        for row, z, k in ((labels[k], z, k) for labels, z, k in zip(part.labels, logits, known))
    ]
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert result.scores.dtype == np.float64
    np.testing.assert_allclose(result.scores, finding_log_odds(logits, torch.from_numpy(part.labels)), atol=1e-5)
    assert np.isnan(result.scores).nonzero()[0].tolist() == (~known.any(1)).nonzero()[0].tolist()
    assert result.as_dict()["auroc_per_finding"] == result.auroc_per_finding


def test_a_finding_of_one_class_is_none_and_left_out_of_the_mean(make_network: Callable[..., nn.Module]) -> None:
    network, part = make_network(3), _findings()
    part.labels[:, 1] = np.where(np.isnan(part.labels[:, 1]), np.nan, 1)
    aurocs = _run_findings(network, part)
    assert aurocs.auroc_per_finding is not None
    assert list(aurocs.auroc_per_finding) == ["finding 1", "finding 2", "finding 3"]
    first, missing, last = aurocs.auroc_per_finding.values()
    assert missing is None
    assert aurocs.auroc == pytest.approx((first + last) / 2)
    part.labels[:] = np.where(np.isnan(part.labels), np.nan, 0)
    nothing = _run_findings(network, part)
    assert nothing.auroc is None
    assert nothing.accuracy is not None
    part.labels[:] = np.nan
    unknown = _run_findings(network, part)
    assert (unknown.auroc, unknown.accuracy) == (None, None)
    assert np.isnan(unknown.scores).all()


@pytest.mark.parametrize(("names", "message"), [(["a", "b"], "but are 2"), (["a", "b", "a"], "but are 3, 2 of them")])
def test_names_that_do_not_fit_the_findings_are_refused(
    make_network: Callable[..., nn.Module], names: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=f"findings should be 3 different names.*{message}"):
        _run_findings(make_network(3), _findings(), names=names)


def test_the_figures_of_classes_have_no_findings(make_network: Callable[..., nn.Module]) -> None:
    result = _run(make_network(4), test=_split())["test"]
    assert result.auroc_per_finding is None
    assert "auroc_per_finding" not in result.as_dict()
