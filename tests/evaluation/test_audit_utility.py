"""Figures of use and how they changed, against scikit-learn and slow loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from audit_worlds import (
    FEW,
    MODELS,
    auroc_of,
    calibration,
    drawn_images,
    figures_of,
    mean_defined,
    models,
    pairs,
    percentiles,
    questions,
    result,
    rows_of,
    sensitivity_of,
    shares,
    world,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    brier_score_loss,
    confusion_matrix,
    roc_auc_score,
)

from monai_unlearn.evaluation import Audited, SplitResult
from monai_unlearn.evaluation.utility import Predictions, reliability_section, utility_section

pytestmark = pytest.mark.filterwarnings("error")
# Shrinking would take minutes, and a smaller seed is no smaller world.
FEW_EXAMPLES = settings(deadline=None, derandomize=True, max_examples=12, phases=[Phase.explicit, Phase.generate])
UTILITY = ("retain", "validation", "test")
FIGURES = ("accuracy", "auroc", "sensitivity", "brier", "ece")
WORLDS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "sizes": st.fixed_dictionaries({split: st.integers(6, 40) for split in UTILITY}),
        "classes": st.integers(2, 4),
        "multi_label": st.booleans(),
        "patients": st.booleans(),
        "retrained": st.integers(0, 3),
    }
)


def _close(found: float, expected: float, within: float = 1e-9) -> None:
    assert found == pytest.approx(expected, abs=within, nan_ok=True)


@FEW_EXAMPLES
@given(WORLDS)
def test_figures_are_scikit_learns_averaged_over_models(kind_of_world: dict[str, Any]) -> None:
    audited = world(**kind_of_world)
    section = utility_section(audited, FEW)
    assert set(section) == set(UTILITY)
    for split in UTILITY:
        each = {name: [figures_of(outputs[split]) for outputs in group] for name, group in models(audited).items()}
        for name in MODELS:
            found = section[split]["models"][name]
            if name not in each:
                assert found is section[split]["changes"][name] is None
                continue
            assert set(found) == set(FIGURES)
            for figure in FIGURES:
                _close(found[figure], np.mean([one[figure] for one in each[name]]))
        for other in set(each) - {"unlearned"}:
            for figure in FIGURES:
                mean = np.mean([one[figure] for one in each[other]])
                _close(section[split]["changes"][other][figure]["difference"], each["unlearned"][0][figure] - mean)


def test_the_brier_score_of_two_classes_is_twice_scikit_learns() -> None:
    audited = world(0, classes=2)
    section = utility_section(audited, FEW)
    outputs = audited.unlearned[0]["test"]
    expected = 2 * brier_score_loss(outputs.labels, shares(outputs)[:, 1])
    _close(section["test"]["models"]["unlearned"]["brier"], expected)


@FEW_EXAMPLES
@given(WORLDS)
def test_figures_of_each_class_or_finding_are_scikit_learns(kind_of_world: dict[str, Any]) -> None:
    audited = world(**kind_of_world)
    section = utility_section(audited, FEW)
    for split in UTILITY:
        classes = section[split]["classes"]
        assert list(classes) == list(audited.class_names)
        for c, found in enumerate(classes.values()):
            missed, positives = {}, 0
            for name in MODELS:
                group = models(audited).get(name)
                if group is None:
                    assert found["models"][name] is found["false_negatives"][name] is None
                    continue
                each = [questions(outputs[split])[c] for outputs in group]
                positives = int(each[0][2].sum())
                _close(found["models"][name]["auroc"], np.mean([auroc_of(score, there) for _, score, there in each]))
                expected = np.mean([sensitivity_of(score, there) for _, score, there in each])
                _close(found["models"][name]["sensitivity"], expected)
                negatives = []
                for outputs, (rows, _, there) in zip(group, each):
                    z = outputs[split].logits
                    said = z[rows, c] > 0 if audited.multi_label else z.argmax(1) == c
                    table = confusion_matrix(there, said, labels=[False, True])
                    negatives.append(table[1, 0])
                missed[name] = np.mean(negatives)
                _close(found["models"][name]["false_negatives"], missed[name])
            assert found["positives"] == positives
            for other in set(missed) - {"unlearned"}:
                change = found["false_negatives"][other]
                if not positives:
                    assert change is None
                else:
                    _close(change["difference"], 100 * (missed["unlearned"] - missed[other]) / positives)


# ---- intervals


def _resampled(audited: Audited, split: str, figure: Callable[[SplitResult], Any]) -> dict[str, np.ndarray]:
    """Model → figure of its models in each resample of whole people, averaged over them."""
    n, people = audited.original[split].n, audited.facts[split].people
    draws = drawn_images(people, n, FEW.resamples, np.random.default_rng(FEW.seed))

    def drawn(outputs: SplitResult, rows: np.ndarray) -> SplitResult:
        return replace(outputs, logits=outputs.logits[rows], labels=outputs.labels[rows], n=len(rows))

    return {
        name: np.array([np.mean([figure(drawn(o[split], rows)) for o in group], axis=0) for rows in draws])
        for name, group in models(audited).items()
    }


def _accuracy(outputs: SplitResult) -> float:
    if outputs.labels.ndim == 1:
        return float(np.mean(outputs.logits.argmax(1) == outputs.labels))
    known = ~np.isnan(outputs.labels) & (outputs.labels != 0.5)
    return float(np.mean((outputs.logits > 0)[known] == (outputs.labels > 0.5)[known]))


def _brier(outputs: SplitResult) -> float:
    p = shares(outputs)
    if outputs.labels.ndim == 1:
        return float(np.mean(((p - np.eye(p.shape[1])[outputs.labels]) ** 2).sum(1)))
    known = ~np.isnan(outputs.labels).all(1)
    return float(np.mean([np.nanmean((a - b) ** 2) for a, b in zip(p[known], outputs.labels[known].astype(float))]))


@pytest.mark.parametrize("retrained", [1, 2])
@pytest.mark.parametrize("patients", [False, True])
@pytest.mark.parametrize("multi_label", [False, True])
def test_intervals_are_those_of_a_slow_paired_bootstrap(multi_label: bool, patients: bool, retrained: int) -> None:
    audited = world(7, multi_label=multi_label, patients=patients, retrained=retrained, sizes={"test": 40})
    changes = utility_section(audited, FEW)["test"]["changes"]
    for figure, slow in (("accuracy", _accuracy), ("brier", _brier), ("ece", lambda o: calibration(*pairs(o)))):
        drawn = _resampled(audited, "test", slow)
        for other in ("original", "retrained"):
            found = changes[other][figure]["low"], changes[other][figure]["high"]
            assert found == pytest.approx(percentiles(drawn["unlearned"] - drawn[other]), abs=1e-9)


@pytest.mark.parametrize("patients", [False, True])
@pytest.mark.parametrize("multi_label", [False, True])
def test_intervals_of_sensitivities_keep_the_thresholds_of_the_whole_split(multi_label: bool, patients: bool) -> None:
    audited = world(4, multi_label=multi_label, patients=patients, retrained=2, sizes={"validation": 50})
    section = utility_section(audited, FEW)["validation"]
    n, people = 50, audited.facts["validation"].people
    draws = drawn_images(people, n, FEW.resamples, np.random.default_rng(FEW.seed))
    drawn: dict[str, Any] = {}
    missed: dict[str, Any] = {}
    for name, group in models(audited).items():
        each, each_missed = [], []
        for outputs in group:
            found, there_all, lost = np.zeros((n, 3)), np.zeros((n, 3)), np.zeros((n, 3))
            for c, (rows, score, there) in enumerate(questions(outputs["validation"])):
                # The highest score that has to be passed so that nine in ten of the others are below.
                others = np.sort(score[~there])
                needed = others[int(np.ceil(FEW.specificity * len(others) - 1e-9)) - 1]
                found[rows, c], there_all[rows, c] = there & (score > needed), there
                z = outputs["validation"].logits
                said = z[rows, c] > 0 if multi_label else z.argmax(1) == c
                lost[rows, c] = there & ~said
            with np.errstate(invalid="ignore"):
                each.append([mean_defined(found[rows].sum(0) / there_all[rows].sum(0)) for rows in draws])
                each_missed.append([lost[rows].sum(0) / there_all[rows].sum(0) for rows in draws])
        drawn[name], missed[name] = np.mean(each, axis=0), 100 * np.mean(each_missed, axis=0)
    for other in ("original", "retrained"):
        change = section["changes"][other]["sensitivity"]
        assert (change["low"], change["high"]) == pytest.approx(
            percentiles(drawn["unlearned"] - drawn[other]), abs=1e-9
        )
        for c, name in enumerate(audited.class_names):
            change = section["classes"][name]["false_negatives"][other]
            expected = percentiles((missed["unlearned"] - missed[other])[:, c])
            assert (change["low"], change["high"]) == pytest.approx(expected, abs=1e-9)


def _placements(score: np.ndarray, there: np.ndarray, people: np.ndarray) -> np.ndarray:
    """Share of the other side that an image beats, pair by pair, beyond what is expected.

    Divided by the number of images on its own side, and by the root of (n - 1) / n of the n people on it.
    """
    beats = (score[:, None] > score) + 0.5 * (score[:, None] == score)
    auroc = roc_auc_score(there, score)
    own = np.where(there, beats[:, ~there].mean(1), 1 - beats[:, there].mean(1))
    for side in (there, ~there):
        n = len(set(people[side].tolist()))
        own[side] = (own[side] - auroc) / side.sum() * np.sqrt(n / (n - 1))
    return own


@pytest.mark.parametrize("retrained", [1, 3])
@pytest.mark.parametrize("patients", [False, True])
@pytest.mark.parametrize("multi_label", [False, True])
def test_intervals_of_aurocs_are_delongs_paired_and_by_patient(
    multi_label: bool, patients: bool, retrained: int
) -> None:
    audited = world(11, multi_label=multi_label, patients=patients, retrained=retrained, sizes={"test": 60})
    changes = utility_section(audited, FEW)["test"]["changes"]
    n, people = 60, audited.facts["test"].people
    whose = np.arange(n) if people is None else people
    share = {}
    for name, group in models(audited).items():
        parts = np.zeros((len(group), 3, n))
        for i, outputs in enumerate(group):
            for c, (rows, score, there) in enumerate(questions(outputs["test"])):
                parts[i, c, rows] = _placements(score, there, whose[rows])
        share[name] = parts.mean(axis=(0, 1))
    for other in ("original", "retrained"):
        contribution = share["unlearned"] - share[other]
        variance = sum(contribution[whose == person].sum() ** 2 for person in np.unique(whose))
        change = changes[other]["auroc"]
        assert change["high"] - change["difference"] == pytest.approx(1.96 * np.sqrt(variance), rel=1e-9)
        assert change["difference"] - change["low"] == pytest.approx(1.96 * np.sqrt(variance), rel=1e-9)


def test_delongs_interval_is_about_that_of_resampling() -> None:
    audited = world(5, classes=2, sizes={"test": 250}, shift=(0, 0, 0), noise=1.0)
    change = utility_section(audited, FEW)["test"]["changes"]["original"]["auroc"]
    drawn = _resampled(audited, "test", lambda o: roc_auc_score(o.labels, shares(o)[:, 1]))
    low, high = percentiles(drawn["unlearned"] - drawn["original"])
    assert change["high"] - change["low"] == pytest.approx(high - low, rel=0.15)


# ---- reliability


@pytest.mark.parametrize("multi_label", [False, True])
def test_reliability_is_scikit_learns_calibration_curve(multi_label: bool) -> None:
    audited = world(6, multi_label=multi_label, retrained=3, sizes={"test": 300})
    if multi_label:  # scikit-learn knows no soft labels
        split = audited.original["test"]
        known = np.flatnonzero((np.isnan(split.labels) | (split.labels == 0) | (split.labels == 1)).all(1))
        audited = rows_of(audited, {"test": known})
    section = reliability_section(audited)["test"]
    for name, group in models(audited).items():
        confidence, happened = pairs(group[0]["test"])  # of retrained models the first
        right, predicted = calibration_curve(happened, confidence, n_bins=15)
        assert section[name]["confidence"] == pytest.approx(predicted.tolist())
        assert section[name]["accuracy"] == pytest.approx(right.tolist())
        assert sum(section[name]["n"]) == len(confidence)
        assert all(type(n) is int for n in section[name]["n"])


def test_without_a_retrained_model_it_has_no_curve() -> None:
    section = reliability_section(world(0, retrained=0))["test"]
    assert section["retrained"] is None
    assert section["unlearned"] is not None


# ---- what may be wrong with data


def test_a_class_that_is_absent_leaves_the_aurocs_undefined_and_the_rest_defined() -> None:
    audited = world(0, sizes={"test": 60})
    seen = np.flatnonzero(audited.original["test"].labels != 2)
    section = utility_section(rows_of(audited, {"test": seen}), FEW)["test"]
    for name in MODELS:
        assert np.isnan(section["models"][name]["auroc"])
        assert not np.isnan([section["models"][name][figure] for figure in set(FIGURES) - {"auroc"}]).any()
    assert np.isnan(section["changes"]["original"]["auroc"]["low"])
    absent = section["classes"]["c2"]
    assert absent["positives"] == 0
    assert absent["false_negatives"] == dict.fromkeys(("original", "retrained"))
    assert np.isnan(absent["models"]["unlearned"]["auroc"])
    assert not np.isnan(section["classes"]["c0"]["models"]["unlearned"]["auroc"])


def test_a_single_class_leaves_what_needs_two_undefined() -> None:
    audited = world(0, sizes={"test": 60})
    one = np.flatnonzero(audited.original["test"].labels == 1)
    section = utility_section(rows_of(audited, {"test": one}), FEW)["test"]
    figures = section["models"]["unlearned"]
    assert np.isnan(figures["auroc"])
    assert 0 <= figures["accuracy"] <= 1
    assert np.isnan(figures["sensitivity"])
    change = section["changes"]["retrained"]
    assert np.isnan([change["sensitivity"]["difference"], change["sensitivity"]["low"]]).all()
    assert change["brier"]["low"] <= change["brier"]["difference"] <= change["brier"]["high"]


def test_findings_of_which_none_is_known_are_undefined_throughout() -> None:
    audited = world(0, multi_label=True, retrained=2)
    unknown = {split: np.flatnonzero(np.isnan(audited.original[split].labels).all(1)) for split in UTILITY}
    section = utility_section(rows_of(audited, unknown), FEW)
    for split in UTILITY:
        assert np.isnan(list(section[split]["models"]["unlearned"].values())).all()
        for change in section[split]["changes"].values():
            assert all(np.isnan(list(figure.values())).all() for figure in change.values())
        assert all(found["positives"] == 0 for found in section[split]["classes"].values())


def test_a_single_image_has_figures_and_its_own_interval() -> None:
    audited = rows_of(world(0), {"test": np.arange(1)})
    section = utility_section(audited, FEW)["test"]
    change = section["changes"]["original"]["accuracy"]
    assert change["low"] == change["difference"] == change["high"]
    assert np.isnan(section["models"]["unlearned"]["auroc"])


def test_constant_outputs_tell_nothing_and_are_no_error() -> None:
    audited = world(0, sizes={"test": 30})

    def constant(outputs: dict) -> dict:
        return {split: result(np.zeros_like(one.logits), one.labels) for split, one in outputs.items()}

    audited = replace(audited, unlearned=[constant(audited.unlearned[0])])
    section = utility_section(audited, FEW)["test"]
    figures = section["models"]["unlearned"]
    assert figures["auroc"] == 0.5
    assert figures["sensitivity"] == 0
    assert figures["accuracy"] == pytest.approx(1 / 3)  # all for the first class
    assert figures["ece"] == pytest.approx(0, abs=1e-12)
    assert figures["brier"] == pytest.approx(2 / 3)
    assert section["classes"]["c0"]["models"]["unlearned"]["false_negatives"] == 0
    assert section["classes"]["c1"]["models"]["unlearned"]["false_negatives"] == 10
    change = section["changes"]["retrained"]["ece"]
    assert change["low"] <= change["difference"] <= change["high"]


def test_an_answer_on_the_line_is_absent_and_so_missed() -> None:
    audited = world(0, multi_label=True)
    flat = {split: result(np.zeros_like(one.logits), one.labels) for split, one in audited.unlearned[0].items()}
    section = utility_section(replace(audited, unlearned=[flat]), FEW)["test"]
    for found in section["classes"].values():
        assert found["models"]["unlearned"]["false_negatives"] == found["positives"] > 0


def test_resamples_sort_confidence_on_an_edge_into_the_bin_of_the_figure_itself() -> None:
    logits = np.array([[0.0] * 5, [0.1, 0, 0, 0, 0]] * 8)  # a fifth is the upper end of the third of fifteen bins
    outputs = result(logits, np.array([0, 1] * 8))
    sums, pairs_of = Predictions(outputs, False).calibration
    error = np.abs(sums.sum(0)).sum() / pairs_of.sum()
    assert error == pytest.approx(calibration(*pairs(outputs)))
    assert error == pytest.approx(Predictions(outputs, False).figures(slice(None), 0.9)["ece"])
    assert error > 0.5  # in one bin they would make up for each other
