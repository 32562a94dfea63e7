"""Ignite metrics on a user's own evaluator, against scikit-learn and slow loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from ignite.metrics import EpochMetric
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.handlers import from_engine
from monai.transforms import Compose, EnsureTyped
from sklearn.metrics import roc_curve
from torch import nn

from monai_unlearn import handlers
from monai_unlearn.handlers import BrierScore, ExpectedCalibrationError, SensitivityAtSpecificity
from monai_unlearn.metrics import brier, calibration_error, reliability

MakeNetwork = Callable[..., nn.Module]
NAN = float("nan")
TASKS = ["classes", "classes with an axis", "findings", "one finding"]
METRICS = [BrierScore, ExpectedCalibrationError, SensitivityAtSpecificity]


def _records(records: list[dict], task: str) -> list[dict]:
    """The records with labels of a task; of findings, some are soft and some not known."""
    if task == "classes":
        return records
    made = []
    for i, record in enumerate(records):
        label = int(record["label"])
        findings = [float(label > 0), float(label == 1) if i % 5 else NAN, 0.8 if label == 2 else 0.0]
        by_task = {"classes with an axis": [label], "findings": findings, "one finding": findings[1:2]}
        made.append({**record, "label": torch.tensor(by_task[task])})
    return made


def _evaluator(
    network: nn.Module, records: list[dict], *, batch_size: int, decollate: bool, meta: bool = False
) -> SupervisedEvaluator:
    transform = from_engine(["pred", "label"])
    dataset = Dataset(records, transform=Compose([EnsureTyped("image", track_meta=meta)]))
    return SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(dataset, batch_size=batch_size),
        network=network,
        decollate=decollate,
        key_val_metric={"brier": BrierScore(output_transform=transform)},
        additional_metrics={
            "ece": ExpectedCalibrationError(bins=7, output_transform=transform),
            "sensitivity": SensitivityAtSpecificity(0.8, output_transform=transform),
        },
    )


def _expected(network: nn.Module, records: list[dict]) -> dict[str, float]:
    with torch.no_grad():
        z = network.eval()(torch.stack([record["image"] for record in records])).double().numpy()
    y = torch.stack([record["label"] for record in records]).numpy()
    if y.ndim == 2 and y.shape[1] == 1 and z.shape[1] > 1:
        y = y[:, 0]
    if y.ndim == 1:
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        questions = [(p[:, c], y == c) for c in range(z.shape[1])]
    else:
        p = 1 / (1 + np.exp(-z))
        questions = [(p[~np.isnan(y[:, f]), f], y[~np.isnan(y[:, f]), f] > 0.5) for f in range(z.shape[1])]
    sensitivities = []
    for score, present in questions:
        fpr, tpr, _ = roc_curve(present, score, drop_intermediate=False)
        sensitivities.append(tpr[fpr <= 0.2 + 1e-12].max())
    return {
        "brier": float(np.nanmean(brier(p, y))),
        "ece": calibration_error(p, y, 7),
        "sensitivity": float(np.mean(sensitivities)),
    }


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("decollate", [True, False])
def test_on_an_evaluator_they_equal_the_functions_whatever_the_batches(
    records: list[dict], make_network: MakeNetwork, task: str, decollate: bool
) -> None:
    records = _records(records, task)
    network = make_network(1 if task == "one finding" else 3)
    expected = _expected(network, records)
    assert len({round(value, 6) for value in expected.values()}) == 3
    for batch_size in (1, 7, 29, 30):
        evaluator = _evaluator(network, records, batch_size=batch_size, decollate=decollate)
        for _ in range(2):  # a second run starts anew
            evaluator.run()
            assert evaluator.state.metrics == pytest.approx(expected, abs=1e-6)


def test_images_with_meta_data_give_the_same(records: list[dict], make_network: MakeNetwork) -> None:
    network = make_network()
    for decollate in (True, False):
        evaluator = _evaluator(network, records, batch_size=8, decollate=decollate, meta=True)
        evaluator.run()
        assert evaluator.state.metrics == pytest.approx(_expected(network, records), abs=1e-6)


def _run(metric: EpochMetric, logits: torch.Tensor, labels: torch.Tensor, batch_size: int = 4) -> float:
    engine = Engine(lambda engine, rows: (logits[rows], labels[rows]))
    metric.attach(engine, "figure")
    return engine.run(torch.arange(len(labels)).split(batch_size)).metrics["figure"]


@pytest.mark.parametrize("make", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_in_double(make: Callable, dtype: torch.dtype) -> None:
    logits, labels = torch.randn(20, 3).to(dtype), torch.arange(20) % 3
    assert _run(make(), logits, labels) == _run(make(), logits.double(), labels)
    findings = torch.randint(2, (20, 3)).to(dtype)
    assert _run(make(), logits, findings) == _run(make(), logits.double(), findings.double())


def test_sensitivity_does_not_saturate_where_probabilities_round_to_one() -> None:
    logits = torch.tensor([[60.0, 0], [50, 0], [55, 0], [45, 0]])
    labels = torch.tensor([0, 1, 0, 1])
    assert (logits.double().softmax(1)[:, 0] == 1).all()
    assert _run(SensitivityAtSpecificity(1.0), logits, labels) == 1


def test_classes_that_are_absent_are_left_out_and_one_alone_has_no_sensitivity() -> None:
    logits = torch.randn(20, 3)
    two = _run(SensitivityAtSpecificity(), logits, torch.arange(20) % 2)
    assert 0 <= two <= 1
    assert math.isnan(_run(SensitivityAtSpecificity(), logits, torch.zeros(20, dtype=torch.long)))
    assert math.isfinite(_run(BrierScore(), logits, torch.zeros(20, dtype=torch.long)))


@pytest.mark.parametrize("make", METRICS)
def test_findings_none_of_which_is_known_have_no_figure(make: Callable) -> None:
    assert math.isnan(_run(make(), torch.randn(6, 2), torch.full((6, 2), NAN)))


@pytest.mark.parametrize("make", METRICS)
@pytest.mark.parametrize("broken", [NAN, math.inf])
def test_outputs_that_are_no_numbers_are_refused(make: Callable, broken: float) -> None:
    logits = torch.zeros(8, 3)
    logits[5, 1] = broken
    with pytest.raises(ValueError, match="The network's outputs should be finite"):
        _run(make(), logits, torch.arange(8) % 3)


@pytest.mark.parametrize("make", METRICS)
@pytest.mark.parametrize("label", [-1, 3, 0.5])
def test_labels_that_are_no_class_are_refused(make: Callable, label: float) -> None:
    labels = torch.tensor([0, 1, 2, label])
    with pytest.raises(ValueError, match="labels should be whole numbers from 0 to 2"):
        _run(make(), torch.zeros(4, 3), labels)


@pytest.mark.parametrize("make", METRICS)
def test_labels_that_do_not_fit_are_refused(make: Callable) -> None:
    with pytest.raises(ValueError, match=r"both B × L, but got \(4, 3\) and \(4, 2\)"):
        _run(make(), torch.zeros(4, 3), torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("make", "argument", "message"),
    [
        (ExpectedCalibrationError, 0, "bins should be at least 1, but got 0"),
        (SensitivityAtSpecificity, 0, r"specificity should be in \(0, 1\], but got 0"),
        (SensitivityAtSpecificity, 90, r"specificity should be in \(0, 1\], but got 90"),
    ],
)
def test_arguments_are_checked_when_it_is_made(make: Callable, argument: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(argument)


def test_bins_and_specificity_are_used() -> None:
    logits, labels = torch.randn(200, 4), torch.arange(200) % 4
    p = logits.double().softmax(1).numpy()
    for bins in (1, 15):
        assert _run(ExpectedCalibrationError(bins), logits, labels) == calibration_error(p, labels.numpy(), bins)
    assert len(reliability(p, labels.numpy(), 1)["n"]) == 1
    found = [_run(SensitivityAtSpecificity(specificity), logits, labels) for specificity in (0.5, 0.9, 0.99)]
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize("make", METRICS)
def test_the_example_of_the_documentation_runs(
    records: list[dict], make_network: MakeNetwork, make: Callable, capsys: pytest.CaptureFixture
) -> None:
    code = make.__doc__.split("Example::")[1]
    names = {
        "SupervisedEvaluator": SupervisedEvaluator,
        "from_engine": from_engine,
        "device": "cpu",
        "network": make_network(),
        "loader": DataLoader(Dataset(records), batch_size=8),
        **vars(handlers),
    }
    exec("if True:\n" + code, names)
    assert 0 <= float(capsys.readouterr().out) <= 2
