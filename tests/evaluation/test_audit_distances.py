"""How far from retrained models, against SciPy and formulas that are written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
from audit_worlds import FEW, models, rows_of, shares, world
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from monai_unlearn.evaluation import SPLITS, Audited, audit_outputs
from monai_unlearn.evaluation.distances import distance_section

pytestmark = pytest.mark.filterwarnings("error")
# Shrinking would take minutes, and a smaller seed is no smaller world.
FEW_EXAMPLES = settings(deadline=None, derandomize=True, max_examples=15, phases=[Phase.explicit, Phase.generate])
WORLDS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "classes": st.integers(2, 4),
        "multi_label": st.booleans(),
        "retrained": st.integers(1, 3),
        "shift": st.tuples(*[st.sampled_from([-1.0, 0.0, 0.5, 2.0])] * 3),
    }
)
AUCS = {"original": [0.8], "unlearned": [0.35], "retrained": [0.5, 0.52, 0.47, 0.55, 0.44, 0.6]}


def _aucs(audited: Audited) -> dict[str, list[float]]:
    return {name: AUCS[name][: len(group)] for name, group in models(audited).items()}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _beside(audited: Audited, distance: Callable[[Any, Any], float]) -> dict[str, float | None]:
    """Mean over the retrained models; the floor is the mean over their pairs."""
    group = audited.retrained
    return {
        "original": _mean([distance(audited.original, other) for other in group]),
        "unlearned": _mean([distance(audited.unlearned[0], other) for other in group]),
        "floor": _mean([distance(one, other) for one, other in combinations(group, 2)]),
    }


def _js(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.nan_to_num(jensenshannon(p, q)) ** 2)


def _close(found: Any, expected: Any) -> None:
    if expected is None:
        assert found is None
    else:
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@FEW_EXAMPLES
@given(WORLDS)
def test_distances_of_outputs_are_scipys(kind_of_world: dict[str, Any]) -> None:
    audited = world(**kind_of_world)
    section = distance_section(audited, _aucs(audited))
    assert section is not None
    for split in SPLITS:

        def divergence(one: Any, other: Any, split: str = split) -> float:
            rows = zip(shares(one[split]), shares(other[split]))
            if not audited.multi_label:
                return float(np.mean([_js(p, q) for p, q in rows]))
            return float(
                np.mean([_js(np.array([a, 1 - a]), np.array([b, 1 - b])) for p, q in rows for a, b in zip(p, q)])
            )

        def distance(one: Any, other: Any, split: str = split) -> float:
            return float(np.mean([np.linalg.norm(p - q) for p, q in zip(shares(one[split]), shares(other[split]))]))

        def alike(one: Any, other: Any, split: str = split) -> float:
            z, w = one[split].logits, other[split].logits
            return float(np.mean((z > 0) == (w > 0) if audited.multi_label else z.argmax(1) == w.argmax(1)))

        found = section["splits"][split]
        for name, expected in (("js_divergence", divergence), ("activation_distance", distance), ("agreement", alike)):
            for model, value in _beside(audited, expected).items():
                _close(found[name][model], value)


@FEW_EXAMPLES
@given(WORLDS)
def test_gaps_are_those_of_the_formulas(kind_of_world: dict[str, Any]) -> None:
    audited = world(**kind_of_world)
    aucs = _aucs(audited)
    section = distance_section(audited, aucs)
    assert section is not None
    figure = "auroc" if audited.multi_label else "accuracy"

    def figures(name: str, i: int) -> np.ndarray:
        outputs = models(audited)[name][i]
        return np.array([getattr(outputs[split], figure) for split in ("forget", "retain", "test")] + [aucs[name][i]])

    retrained = [figures("retrained", i) for i in range(len(audited.retrained))]
    mean = np.mean(retrained, axis=0)
    own = {"original": figures("original", 0), "unlearned": figures("unlearned", 0)}

    def beside(distance: Callable[[np.ndarray, np.ndarray], float]) -> dict[str, float | None]:
        floor = _mean([distance(one, other) for one, other in permutations(retrained, 2)])
        return {name: float(distance(values, mean)) for name, values in own.items()} | {"floor": floor}

    expected = {
        "average_gap": beside(lambda a, b: 100 * np.abs(a - b).mean()),
        "tug_of_war": beside(lambda a, b: np.prod(1 - np.abs(a - b)[:3])),
        "retention_deviation": beside(lambda a, b: np.abs(a / b - 1)[:3].sum()),
    }
    for name, values in expected.items():
        assert set(section[name]) == set(values)
        for model, value in values.items():
            _close(section[name][model], value)
    gap = expected["average_gap"]
    floor = gap["floor"]
    _close(section["excess"], None if floor is None else max(0, gap["unlearned"] - floor))
    assert section["power"] is (None if floor is None else bool(gap["original"] >= 3 * floor))
    for split, place in (("retain", 1), ("test", 2)):
        _close(section["harm"][split], 100 * max(0, mean[place] - own["unlearned"][place]))
    for name, values in aucs.items():
        _close(section["indiscernibility"][name], np.mean([1 - abs(auc - 0.5) / 0.5 for auc in values]))


def test_the_noise_floor_is_that_of_each_pair_and_not_of_the_mean() -> None:
    audited = world(3, retrained=2)
    first, third = audited.retrained
    twice = replace(audited, retrained=[first, first, third])
    floors = [
        distance_section(replace(audited, retrained=pair), {**AUCS, "retrained": [0.5, 0.5]})
        for pair in ([first, first], [first, third], [first, third])
    ]
    found = distance_section(twice, {**AUCS, "retrained": [0.5, 0.5, 0.5]})
    for figure in ("js_divergence", "activation_distance", "agreement"):
        each = [section["splits"]["test"][figure]["floor"] for section in floors]
        assert found["splits"]["test"][figure]["floor"] == pytest.approx(np.mean(each))
    assert floors[0]["average_gap"]["floor"] == 0
    assert floors[0]["excess"] > 0


def test_a_gap_below_the_noise_floor_has_no_excess() -> None:
    audited = world(3, retrained=3, shift=(2, 0, 0))
    aucs = {"original": [0.8], "unlearned": [0.5], "retrained": [0.45, 0.5, 0.55]}
    section = distance_section(replace(audited, unlearned=audited.retrained[1:2]), aucs)
    assert section["average_gap"]["unlearned"] < section["average_gap"]["floor"]
    assert section["excess"] == 0


def test_without_a_retrained_model_there_is_no_distance() -> None:
    audited = world(0, retrained=0)
    assert distance_section(audited, _aucs(audited)) is None
    assert audit_outputs(audited, FEW)["distance"] is None


def test_what_is_undefined_is_none_and_the_rest_is_there() -> None:
    audited = world(0, retrained=2)
    section = distance_section(audited, {**_aucs(audited), "unlearned": [float("nan")]})
    assert section["average_gap"]["unlearned"] is section["excess"] is None
    assert section["average_gap"]["original"] > 0
    assert section["indiscernibility"]["unlearned"] is None
    assert section["tug_of_war"]["unlearned"] > 0
    # A single finding that every test image has leaves the AUROC there undefined.
    findings = world(1, retrained=2, multi_label=True, classes=1)
    present = np.flatnonzero(findings.original["test"].labels[:, 0] > 0.5)
    section = distance_section(rows_of(findings, {"test": present}), _aucs(findings))
    assert section["average_gap"] == section["tug_of_war"] == dict.fromkeys(("original", "unlearned", "floor"))
    assert section["power"] is section["excess"] is section["harm"]["test"] is None
    assert section["harm"]["retain"] is not None
    assert section["splits"]["test"]["js_divergence"]["unlearned"] > 0


# ---- several models


@pytest.mark.parametrize("multi_label", [False, True])
def test_klom_is_the_divergence_of_numpys_histograms(multi_label: bool) -> None:
    audited = world(2, multi_label=multi_label, unlearned=6, retrained=11, shift=(2, 1, 0))
    section = distance_section(audited, {**AUCS, "retrained": [0.5] * 11})

    def expected(split: str, ours: Sequence, theirs: Sequence) -> float:
        found = []
        for one, other in zip(*(np.stack([outputs[split].scores for outputs in g]).T for g in (ours, theirs))):
            if np.isnan(one).any():
                continue
            edges = np.linspace(min(one.min(), other.min()), max(one.max(), other.max()), 21)
            p, q = np.histogram(one, edges)[0] / len(one), np.histogram(other, edges)[0] / len(other)
            found.append(entropy(p, np.where((p > 0) & (q == 0), 1e-5, q)))
        return float(np.mean(found))

    assert set(section["klom"]) == {*SPLITS, "floor"}
    for split in SPLITS:
        assert section["klom"][split] == pytest.approx(expected(split, audited.unlearned, audited.retrained), rel=1e-6)
        floor = expected(split, audited.retrained[:5], audited.retrained[5:10])
        assert section["klom"]["floor"][split] == pytest.approx(floor, rel=1e-6)


@pytest.mark.parametrize("multi_label", [False, True])
def test_epsilon_is_the_best_of_all_thresholds(multi_label: bool) -> None:
    audited = world(2, multi_label=multi_label, unlearned=6, retrained=7, shift=(2, 1, 0))
    section = distance_section(audited, {**AUCS, "retrained": [0.5] * 7})
    points, epsilons = [], []
    groups = [np.stack([outputs["forget"].scores for outputs in g]).T for g in (audited.unlearned, audited.retrained)]
    for ours, theirs in zip(*groups):
        if np.isnan(ours).any():
            continue
        best = 0.0
        for threshold in (*ours, *theirs, np.inf):
            for one, other in ((ours, theirs), (theirs, ours)):
                fpr, fnr = np.mean(one >= threshold), np.mean(other < threshold)
                if (fpr == 0) != (fnr == 0):
                    continue
                if fpr == fnr == 0:
                    best = 50.0
                    continue
                for a, b in ((fpr, fnr), (fnr, fpr)):
                    if 1 - 1e-5 - a > 0:
                        best = max(best, np.log(1 - 1e-5 - a) - np.log(b))
        spread = sorted([np.ptp(ours), np.ptp(theirs)])
        epsilons.append(50.0 if spread[0] < 0.01 * spread[1] else min(best, 50.0))
        points.append(2 ** -np.floor(epsilons[-1] / 0.5))
    assert section["epsilon"]["mean"] == pytest.approx(np.mean(epsilons))
    assert section["epsilon"]["quality"] == pytest.approx(np.mean(points))
    score = np.mean(points)
    figure = "auroc" if multi_label else "accuracy"
    for split in ("retain", "test"):
        ours, theirs = (
            np.mean([getattr(outputs[split], figure) for outputs in g]) for g in (audited.unlearned, audited.retrained)
        )
        score *= ours / theirs
    assert section["epsilon"]["score"] == pytest.approx(score)


@pytest.mark.parametrize(("unlearned", "retrained"), [(1, 6), (4, 6), (6, 4), (5, 5), (6, 9)])
def test_figures_of_many_models_appear_from_five_of_each_on(unlearned: int, retrained: int) -> None:
    audited = world(0, unlearned=unlearned, retrained=retrained)
    section = distance_section(audited, {**AUCS, "retrained": [0.5] * retrained})
    there = min(unlearned, retrained) >= 5
    assert (section["klom"] is not None) is (section["epsilon"] is not None) is there
    if there:
        assert section["klom"]["floor"] is None  # needs two halves of five


def test_unlearned_models_besides_the_first_count_for_figures_of_many_alone() -> None:
    audited = world(0, unlearned=6, retrained=6)
    several, one = (
        distance_section(part, {**AUCS, "retrained": [0.5] * 6})
        for part in (audited, replace(audited, unlearned=audited.unlearned[:1]))
    )
    assert several["klom"] is not None
    assert {**several, "klom": None, "epsilon": None} == one


def test_findings_of_which_none_is_known_leave_figures_of_many_models_undefined() -> None:
    audited = world(0, unlearned=5, retrained=5, multi_label=True)
    unknown = np.flatnonzero(np.isnan(audited.original["forget"].scores))
    section = distance_section(rows_of(audited, {"forget": unknown}), {**AUCS, "retrained": [float("nan")] * 5})
    assert section["klom"]["forget"] is section["epsilon"] is None
    assert section["klom"]["retain"] > 0
