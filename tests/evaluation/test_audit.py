"""The whole audit: what it returns, what its figures do not depend on, and how often it raises a false alarm."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from audit_worlds import FEW, MODELS, one_of, result, rows_of, world
from ignite.metrics import Accuracy, Loss
from monai.data import Dataset
from monai.engines import SupervisedEvaluator
from monai.handlers import ROCAUC, from_engine
from scipy.stats import binom
from torch import nn

from monai_unlearn.auditing import figures_and_audit
from monai_unlearn.cost import Cost
from monai_unlearn.data import make_loader
from monai_unlearn.evaluation import (
    SPLITS,
    Audited,
    AuditOptions,
    Facts,
    audit_outputs,
    evaluate,
    probabilities_and_one_hot,
)
from monai_unlearn.evaluation.attacks import attack_section, verdict_section
from monai_unlearn.provenance import machine, versions
from monai_unlearn.report import build_report, render_html, terminal_table, validate_report

pytestmark = pytest.mark.filterwarnings("error")


def _numbers(found: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Place → number, text, truth value or nothing, of everything in an audit."""
    if isinstance(found, Mapping):
        for key, part in found.items():
            yield from _numbers(part, f"{path}/{key}")
    elif isinstance(found, list):
        for i, part in enumerate(found):
            yield from _numbers(part, f"{path}/{i}")
    else:
        yield path, found


def _text(found: Any) -> str:
    return json.dumps(found, allow_nan=False)


def _close(found: Any, expected: Any, within: float, without: tuple[str, ...] = ()) -> None:
    ours, theirs = dict(_numbers(found)), dict(_numbers(expected))
    assert set(ours) == set(theirs)
    for path, value in ours.items():
        if not any(part in path for part in without):
            same = pytest.approx(theirs[path], abs=within) if isinstance(value, float) else theirs[path]
            assert value == same, path


# ---- what it returns


def _plain(found: Any) -> None:
    if type(found) is dict:
        for key, part in found.items():
            assert type(key) is str
            _plain(part)
    elif type(found) is list:
        for part in found:
            _plain(part)
    else:
        assert type(found) in (str, int, float, bool, type(None)), type(found)


def _report(audited: Audited, options: AuditOptions = FEW) -> dict[str, Any]:
    figures, section = figures_and_audit(audited, options)
    _plain(section)
    return build_report(
        "audit",
        {},
        figures,
        {"evaluation": Cost(1.0)},
        {
            "original_checkpoint": "model.pt",
            "data": {"name": "cells", "sha256": ""},
            "versions": versions(),
            "machine": machine(torch.device("cpu")),
            "retrained_on": None,
            "seeds": {"split": 0, "unlearning": 0, "retrained": 0},
            "hashes": {},
        },
        task="multi-label" if audited.multi_label else "multi-class",
        audit=section,
    )


WORLDS: dict[str, Callable[[], Audited]] = {
    "classes": lambda: world(0, retrained=2),
    "findings": lambda: world(0, retrained=2, multi_label=True),
    "patients": lambda: world(0, retrained=3, patients=True),
    "findings of patients": lambda: world(0, retrained=1, patients=True, multi_label=True),
    "no retrained model": lambda: world(0, retrained=0),
    "findings, no retrained model": lambda: world(0, retrained=0, multi_label=True, patients=True),
    "many models": lambda: world(0, retrained=10, unlearned=6),
    "shadow models": lambda: _with_shadows(world(0, multi_label=True)),
    "one image": lambda: rows_of(world(0, patients=True), {"forget": np.arange(1)}),
    "one image of each split": lambda: rows_of(world(0), {split: np.arange(1) for split in SPLITS}),
    "one patient": lambda: _one_patient(world(0, patients=True)),
    "two images": lambda: rows_of(world(0, retrained=2), {"forget": np.arange(2)}),
    "a single class": lambda: rows_of(world(0), _of_one_class(world(0))),
    "a single finding": lambda: world(0, multi_label=True, classes=1),
    "no known finding": lambda: _without_labels(world(0, multi_label=True, retrained=2, patients=True)),
    "no known finding, no retrained model": lambda: _without_labels(world(0, multi_label=True, retrained=0)),
    "constant outputs": lambda: _changed(world(0, retrained=2), np.zeros_like),
    "constant original": lambda: _constant_original(world(0, retrained=2)),
    "constant outputs of findings": lambda: _changed(world(0, multi_label=True, patients=True), np.zeros_like),
    "sure outputs": lambda: _changed(world(0, retrained=2), lambda z: 1e4 * z),
    "sure outputs of findings": lambda: _changed(world(0, multi_label=True), lambda z: 1e4 * z),
    "noisy labels": lambda: _with_random_labels(world(0, retrained=2)),
    "no columns": lambda: replace(world(0), facts={split: Facts() for split in SPLITS}),
}


def _with_shadows(audited: Audited) -> Audited:
    random = np.random.default_rng(0)
    targets = audited.original["forget"].n + audited.original["validation"].n
    inside = np.array([random.permutation(6) < 3 for _ in range(targets)]).T
    scores = random.normal(size=(6, targets)) + inside
    return replace(audited, shadows=(np.where(inside, scores, np.nan), np.where(inside, np.nan, scores)))


def _one_patient(audited: Audited) -> Audited:
    audited.facts["forget"].people[:] = 1
    return audited


def _of_one_class(audited: Audited) -> dict[str, np.ndarray]:
    return {split: np.flatnonzero(audited.original[split].labels == 1) for split in SPLITS}


def _mapped(audited: Audited, change: Callable[[str, Any], Any]) -> Audited:
    """The same with other results: of a split's name and its result."""

    def all_of(outputs: Mapping[str, Any]) -> dict[str, Any]:
        return {split: change(split, outputs[split]) for split in SPLITS}

    return replace(
        audited,
        original=all_of(audited.original),
        unlearned=[all_of(outputs) for outputs in audited.unlearned],
        retrained=[all_of(outputs) for outputs in audited.retrained],
    )


def _changed(audited: Audited, change: Callable[[np.ndarray], np.ndarray]) -> Audited:
    return _mapped(audited, lambda _, one: result(change(one.logits), one.labels))


def _constant_original(audited: Audited) -> Audited:
    return replace(audited, original=_changed(audited, np.zeros_like).original)


def _without_labels(audited: Audited) -> Audited:
    return _mapped(audited, lambda _, one: result(one.logits, np.full_like(one.labels, np.nan)))


def _with_random_labels(audited: Audited) -> Audited:
    random = np.random.default_rng(0)
    labels = {split: random.permutation(audited.original[split].labels) for split in SPLITS}
    return _mapped(audited, lambda split, one: result(one.logits, labels[split]))


@pytest.mark.parametrize("name", WORLDS)
def test_any_audit_is_plain_json_that_the_report_takes_and_shows(name: str) -> None:
    report = _report(WORLDS[name]())
    validate_report(report)
    assert json.loads(_text(report)) == report
    # A group that is not there, or a class that is absent, has no figures: nowhere is a NaN in their place.
    assert "NaN" not in json.dumps(report)
    assert "Verdict" in terminal_table(report) or report["audit"]["verdict"]["answer"] in terminal_table(report)


@pytest.mark.parametrize("name", ["one image of each split", "no known finding", "constant outputs", "many models"])
def test_what_is_hardly_defined_has_a_page_too(name: str) -> None:
    assert "<html" in render_html(_report(WORLDS[name]()))


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("one image", "powerless"),
        ("one image of each split", "powerless"),
        ("one patient", "powerless"),
        ("no known finding", "powerless"),
        ("constant outputs", "powerless"),
        ("constant outputs of findings", "powerless"),
        ("noisy labels", "powerless"),
    ],
)
def test_where_nothing_can_be_seen_that_is_the_verdict(name: str, answer: str) -> None:
    assert audit_outputs(WORLDS[name](), FEW)["verdict"]["answer"] == answer


def test_options_and_numbers_of_models_are_said() -> None:
    options = AuditOptions(resamples=321, margin=0.1, specificity=0.8, seed=5)
    section = audit_outputs(world(0, unlearned=2, retrained=3), options)
    assert section["options"] == {
        "resamples": 321,
        "margin": 0.1,
        "specificity": 0.8,
        "seed": 5,
        "unlearned_models": 2,
        "retrained_models": 3,
    }
    assert section["forget_size"] is None


def test_of_several_unlearned_models_the_first_is_judged() -> None:
    audited = world(0, unlearned=6, retrained=6)
    several, one = (audit_outputs(part, FEW) for part in (audited, replace(audited, unlearned=audited.unlearned[:1])))
    assert several["distance"].pop("klom") is not None
    assert several["distance"].pop("epsilon") is not None
    assert one["distance"].pop("klom") is one["distance"].pop("epsilon") is None
    assert (several.pop("options")["unlearned_models"], one.pop("options")["unlearned_models"]) == (6, 1)
    assert several == one


def test_the_seed_is_that_of_all_chance() -> None:
    audited = world(0)
    one, again, other = (audit_outputs(audited, replace(FEW, seed=seed)) for seed in (1, 1, 2))
    assert _text(one) == _text(again)
    assert (
        one["attacks"]["population"]["log_odds"]["models"]["unlearned"]["auc"]
        == (other["attacks"]["population"]["log_odds"]["models"]["unlearned"]["auc"])
    )
    low = [part["attacks"]["population"]["log_odds"]["models"]["unlearned"]["low"] for part in (one, other)]
    assert low[0] != low[1]


def test_random_state_is_left_alone() -> None:
    np.random.seed(1)
    torch.manual_seed(1)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    audit_outputs(world(0), FEW)
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


# ---- what it does not depend on


def _in_another_order(audited: Audited, seed: int) -> Audited:
    random = np.random.default_rng(seed)
    return rows_of(audited, {split: random.permutation(audited.original[split].n) for split in SPLITS})


@pytest.mark.parametrize(
    "name", ["patients", "findings of patients", "shadow models", "constant original", "constant outputs"]
)
def test_the_order_of_images_changes_no_bit(name: str) -> None:
    audited = WORLDS[name]()
    found = _text(audit_outputs(audited, FEW))
    for seed in range(2):
        assert _text(audit_outputs(_in_another_order(audited, seed), FEW)) == found


def test_the_order_of_images_that_look_alike_to_all_models_changes_no_bit() -> None:
    """Copies of an image may still be of different sexes and sites."""
    audited = world(0, sizes={"test": 60})
    twice = np.arange(60) // 4
    columns = audited.facts["test"].columns
    copies = rows_of(audited, {"test": twice})
    copies = replace(copies, facts={**copies.facts, "test": Facts(None, columns)})
    found = _text(audit_outputs(copies, FEW))
    assert _text(audit_outputs(_in_another_order(copies, 1), FEW)) == found


def test_the_numbers_that_people_have_change_no_bit() -> None:
    audited = world(0, patients=True, retrained=2)
    found = _text(audit_outputs(audited, FEW))
    random = np.random.default_rng(0)
    names = {s: random.permutation(200)[facts.people] for s, facts in audited.facts.items()}
    named = {s: Facts(names[s], facts.columns) for s, facts in audited.facts.items()}
    assert _text(audit_outputs(replace(audited, facts=named), FEW)) == found


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_order_of_retrained_models_changes_nothing_but_whose_curve_is_shown(multi_label: bool) -> None:
    audited = world(0, retrained=3, patients=True, multi_label=multi_label)
    found = audit_outputs(audited, FEW)
    other = audit_outputs(replace(audited, retrained=audited.retrained[::-1]), FEW)
    _close(other, found, 1e-9, without=("/reliability/test/retrained",))
    assert len(other["reliability"]["test"]["retrained"]["n"]) <= 15


def _differences(found: Mapping[str, Any], other: str = "retrained") -> dict[str, Any]:
    """All differences from the retrained model, or from the original."""
    differences = {}
    for path, value in _numbers(found):
        parts = path.split("/")
        if parts[-1] not in {"difference", "low", "high", "low_90", "high_90", "low_95", "high_95"}:
            continue
        paired = "changes" in parts or "change" in parts or "false_negatives" in parts
        attack = parts[1] == "attacks" and "difference" in parts[:-1]
        if (paired and other in parts) or (other == "retrained" and (attack or "largest" in parts)):
            differences[path] = value
    return differences


@pytest.mark.parametrize("patients", [False, True])
@pytest.mark.parametrize("multi_label", [False, True])
def test_a_retrained_model_is_nowhere_different_from_itself(multi_label: bool, patients: bool) -> None:
    audited = world(0, retrained=1, multi_label=multi_label, patients=patients, sizes={"forget": 60, "validation": 60})
    audited = replace(audited, unlearned=audited.retrained)
    found = audit_outputs(audited, FEW)
    differences = _differences(found)
    assert len(differences) > 100
    assert {value for value in differences.values() if value is not None} == {0}
    for split in SPLITS:
        distances = found["distance"]["splits"][split]
        assert distances["js_divergence"]["unlearned"] == distances["activation_distance"]["unlearned"] == 0
        assert distances["agreement"]["unlearned"] == 1
    assert found["distance"]["average_gap"]["unlearned"] == found["distance"]["retention_deviation"]["unlearned"] == 0
    assert found["distance"]["tug_of_war"]["unlearned"] == 1
    assert found["distance"]["harm"] == {"retain": 0, "test": 0}
    assert found["verdict"]["answer"] == "equivalent"
    assert {part["p_holm"] for _, part in _largest(found)} == {1}


def _largest(found: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for column, part in found["subgroups"].items():
        for split, largest in part["largest"].items():
            if largest is not None:
                yield f"{column}/{split}", largest


def test_an_unlearned_model_that_is_the_original_has_changed_nothing_and_remembers() -> None:
    audited = world(0, retrained=2, sizes={"forget": 80, "validation": 80})
    audited = replace(audited, unlearned=[audited.original])
    found = audit_outputs(audited, FEW)
    changes = _differences(found, "original")
    assert len(changes) > 50
    assert {value for value in changes.values() if value is not None} == {0}
    assert (found["verdict"]["answer"], found["verdict"]["direction"]) == ("different", "remembers")
    sanity, entry = found["attacks"]["sanity"]["original"], found["attacks"]["population"]["log_odds"]
    assert sanity["difference"] == entry["difference"]["difference"]
    alone = audit_outputs(replace(audited, retrained=[]), FEW)
    assert {part["difference"] for _, part in _largest(alone)} == {0}


@pytest.mark.parametrize("multi_label", [False, True])
def test_swapped_models_have_differences_of_the_other_sign(multi_label: bool) -> None:
    audited = world(0, retrained=1, multi_label=multi_label, patients=True, shift=(2, 1, 0))
    found = audit_outputs(audited, FEW)
    swapped = audit_outputs(replace(audited, unlearned=audited.retrained, retrained=audited.unlearned), FEW)
    for path, value in _differences(found).items():
        if "largest" in path:
            continue
        *place, end = path.split("/")
        opposite = {"low": "high", "high": "low"}.get(end.split("_")[0], end.split("_")[0])
        other = dict(_numbers(swapped))["/".join([*place, "_".join([opposite, *end.split("_")[1:]])])]
        assert (value is None) is (other is None), path
        if value is not None:
            assert other == pytest.approx(-value, abs=1e-9), path
    for (place, one), (same, other) in zip(_largest(found), _largest(swapped)):
        assert place == same
        assert one["difference"] == pytest.approx(other["difference"], abs=1e-12)
        assert one["p"] == pytest.approx(other["p"], abs=0.08)  # other permutations
    assert found["verdict"]["direction"] != swapped["verdict"]["direction"] or found["verdict"]["direction"] is None


def _loaders(records: list[dict], batch_size: int, workers: int, order: int = 0) -> dict[str, Any]:
    rows = {"forget": range(0, 8), "retain": range(8, 14), "validation": range(14, 22), "test": range(22, 30)}
    random = np.random.default_rng(order)
    parts = {s: [records[i] for i in (random.permutation(part) if order else part)] for s, part in rows.items()}
    return {
        split: make_loader(Dataset([{k: v for k, v in one.items() if k != "patient"} for one in part]), batch_size,
                           num_workers=workers)
        for split, part in parts.items()
    }  # fmt: skip


def _evaluated(make_network: Callable[..., nn.Module], loaders: dict[str, Any]) -> Audited:
    networks = [make_network(seed=seed).eval() for seed in range(3)]
    both = from_engine(["pred", "label"])
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=loaders["test"],
        network=networks[0],
        decollate=False,
        key_val_metric={"accuracy": Accuracy(output_transform=both)},
        additional_metrics={
            "auroc": ROCAUC(output_transform=probabilities_and_one_hot),
            "loss": Loss(nn.CrossEntropyLoss(), output_transform=both),
        },
    )
    original, unlearned, *retrained = (evaluate(evaluator, network, loaders) for network in networks)
    index = {split: [int(one["index"]) for one in loader.dataset.data] for split, loader in loaders.items()}
    facts = {s: Facts(np.array(i) // 2, pd.DataFrame({"sex": ["fm"[k % 2] for k in i]})) for s, i in index.items()}
    return Audited(original, [unlearned], retrained, facts, ["a", "b", "c"], False)


@pytest.mark.parametrize(("batch_size", "workers", "order"), [(1, 0, 0), (3, 0, 1), (5, 2, 0), (30, 0, 2)])
def test_batch_size_workers_and_order_of_the_loaders_change_nothing(
    records: list[dict], make_network: Callable[..., nn.Module], batch_size: int, workers: int, order: int
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than a small machine has cores
        expected = audit_outputs(_evaluated(make_network, _loaders(records, 4, 0)), FEW)
        found = audit_outputs(_evaluated(make_network, _loaders(records, batch_size, workers, order)), FEW)
    _close(found, expected, 1e-5)


# ---- what is refused


def test_models_on_other_images_are_refused() -> None:
    audited = world(0, retrained=2)
    for split in SPLITS:
        n = audited.original[split].n
        other = {**audited.retrained[1], split: one_of(audited.retrained[1][split], np.arange(n)[::-1])}
        with pytest.raises(ValueError, match=f"evaluated on the same {split} images in the same order"):
            replace(audited, retrained=[audited.retrained[0], other])
        fewer = {**audited.unlearned[0], split: one_of(audited.unlearned[0][split], np.arange(n - 1))}
        with pytest.raises(ValueError, match=f"on each of {n} {split} images"):
            replace(audited, unlearned=[fewer])


def test_labels_that_are_not_known_are_the_same_for_all() -> None:
    audited = world(0, multi_label=True)
    labels = audited.original["test"].labels.copy()
    labels[3] = np.nan
    labels[4, 0] = 1 - np.nan_to_num(labels[4, 0])
    other = {**audited.unlearned[0], "test": replace(audited.unlearned[0]["test"], labels=labels)}
    with pytest.raises(ValueError, match="same test images"):
        replace(audited, unlearned=[other])


def test_models_of_other_classes_are_refused() -> None:
    audited = world(0)
    with pytest.raises(ValueError, match=r"All models should give 2 outputs.*but one gives \(24, 3\)"):
        replace(audited, class_names=["a", "b"])
    wider = {s: replace(one, logits=np.pad(one.logits, ((0, 0), (0, 1)))) for s, one in audited.retrained[0].items()}
    with pytest.raises(ValueError, match=r"should give 3 outputs.*but one gives \(24, 4\)"):
        replace(audited, retrained=[wider])


def test_no_unlearned_model_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one model"):
        replace(world(0), unlearned=[])


@pytest.mark.parametrize("split", SPLITS)
def test_facts_of_other_numbers_of_images_are_refused(split: str) -> None:
    audited = world(0)
    n = audited.original[split].n
    for facts, message in (
        (Facts(np.arange(n - 1)), f"people of {split} should be {n}"),
        (Facts(None, pd.DataFrame({"sex": ["f"] * (n + 1)})), f"columns of {split} should have {n} rows"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(audited, facts={**audited.facts, split: facts})


@pytest.mark.parametrize("shape", [(4, 56), (4, 58), (57,)])
def test_scores_of_shadow_models_for_other_images_are_refused(shape: tuple[int, ...]) -> None:
    good = np.zeros((4, 57))
    replace(world(0), shadows=(good, good))
    with pytest.raises(ValueError, match="shadows should have 57 columns"):
        replace(world(0), shadows=(good, np.zeros(shape)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resamples", 299),
        ("resamples", 1000.0),
        ("resamples", True),
        ("margin", 0),
        ("margin", 1),
        ("margin", True),
        ("margin", "0.05"),
        ("specificity", 1.0),
        ("specificity", float("nan")),
    ],
)
def test_options_out_of_their_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} should"):
        AuditOptions(**{name: value})


def test_the_fewest_resamples_suffice_for_a_verdict() -> None:
    """Of seven attacks, each surely different: their smallest p-value, seven times, has to be below 5 %."""
    audited = _with_shadows(
        world(0, patients=True, retrained=2, sizes={"forget": 60, "validation": 60}, shift=(3, 3, 0))
    )
    section = attack_section(audited, AuditOptions(resamples=300))
    entries = [*section["population"].values(), section["patient"], section["ratio"], section["u_lira"]]
    assert len(entries) == 7
    assert 7 * min(entry["difference"]["p"] for entry in entries) < 0.05


# ---- how often chance is taken for more


@pytest.mark.slow
def test_pseudo_forget_sets_raise_false_alarms_no_more_often_than_nominally() -> None:
    """Images that no model saw are drawn at random from a pool and called the forget set, 500 times."""
    draws, alarms = 500, dict.fromkeys(("verdict", "log_odds", "modified_entropy", "loss", "classifier"), 0)
    sides = dict.fromkeys([(kind, end) for kind in alarms for end in ("low", "high")], 0)
    pool = 240
    few = {"forget": 6, "retain": 6, "test": 6}
    worlds = [world(seed, sizes={**few, "validation": pool}, retrained=seed // 2, noise=0.8) for seed in range(3)]
    random = np.random.default_rng(0)
    for i in range(draws):
        drawn = random.permutation(pool)
        audited = _pseudo(worlds[i % 3], drawn[:30], drawn[30:95]).in_one_order()
        section = attack_section(audited, replace(FEW, seed=i))
        alarms["verdict"] += verdict_section(section, audited, FEW)["answer"] == "different"
        for kind, entry in section["population"].items():
            difference = entry["difference"]
            alarms[kind] += difference["answer"] == "different"
            sides[kind, "low"] += difference["low_95"] > 0
            sides[kind, "high"] += difference["high_95"] < 0
    assert alarms["verdict"] <= binom.ppf(0.995, draws, 0.05)
    for kind in section["population"]:
        assert alarms[kind] <= binom.ppf(0.999, draws, 0.05), kind
        # Intervals hold their level: neither too short nor so long that nothing would ever show.
        assert binom.ppf(0.001, draws, 0.03) <= sides[kind, "low"] + sides[kind, "high"], kind
        for end in ("low", "high"):
            assert sides[kind, end] <= binom.ppf(0.999, draws, 0.025), (kind, end)


def _pseudo(audited: Audited, forget: np.ndarray, unseen: np.ndarray) -> Audited:
    """Some unseen images in the place of the forget set, others as unseen ones."""

    def taken(outputs: Mapping[str, Any]) -> dict[str, Any]:
        pool = outputs["validation"]
        return {**outputs, "forget": one_of(pool, forget), "validation": one_of(pool, unseen)}

    return replace(
        audited,
        original=taken(audited.original),
        unlearned=[taken(outputs) for outputs in audited.unlearned],
        retrained=[taken(outputs) for outputs in audited.retrained],
        facts=dict.fromkeys(SPLITS, Facts()),
    )


def test_the_models_of_the_report_are_those_of_the_attack() -> None:
    figures, section = figures_and_audit(world(0, retrained=2), FEW)
    for name in MODELS:
        assert figures[name]["attack"]["auc"] == section["attacks"]["population"]["log_odds"]["models"][name]["auc"]
