"""The figures by flat names."""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Callable
from typing import Any

import pytest
from audit_samples import VARIANTS, sample_audit

from monai_unlearn.report import scalars

Make = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_are_finite_numbers_with_names_that_tensorboard_and_mlflow_take(make_variant: Make, variant: str) -> None:
    found = scalars(make_variant(variant))
    assert len(found) > 30
    for name, value in found.items():
        assert type(value) is float
        assert math.isfinite(value)
        assert re.fullmatch(r"[/\w. -]+", name)
        assert posixpath.normpath(name) == name
        assert not name.startswith("/")


def test_the_figures_stand_under_their_names(make_variant: Make) -> None:
    found = scalars(make_variant("classes"))
    for name, value in {
        "models/original/forget/accuracy": 0.99,
        "models/unlearned/attack/auc": 0.52,
        "gap_to_retrained": 3.75,
        "cost/retrain/seconds": 61.4,
        "cost/ratio/samples": 3031 / 26900,
        "audit/attack/log_odds/unlearned/auc": 0.52,
        "audit/attack/patient/retrained/auc": 0.53,
        "audit/attack/ratio/references": 1,
        "audit/attack/u_lira/difference/low_90": -0.012,
        "audit/sanity/memorisation": 0.27,
        "audit/images/forget/patients": 7,
        "audit/verdict/detectable": 0.06,
        "audit/distance/average_gap/floor": 1.2,
        "audit/distance/splits/forget/js_divergence/unlearned": 0.06,
        "audit/utility/test/changes/retrained/accuracy/difference": -0.07,
        "audit/utility/test/classes/pneumonia/false_negatives/original/high": 10.2,
        "audit/subgroups/sex/groups/F/test/change/retrained/difference": -0.055,
        "audit/subgroups/age band/largest/test/p_holm": 0.052,
        "audit/evaluation_seconds": 12.3,
    }.items():
        assert found[name] == pytest.approx(value), name
    assert not any(word in name for name in found for word in ("options", "histogram", "/roc/", "settings", "detected"))


def test_what_is_undefined_has_no_name(make_report: Make, figures: dict[str, dict]) -> None:
    figures["unlearned"]["test"]["accuracy"] = float("nan")
    found = scalars(make_report(audit=sample_audit(reference=False), reference=False))
    assert "models/unlearned/test/accuracy" not in found
    assert "gap_to_retrained" not in found
    assert not any("retrained" in name for name in found if "options" not in name)


def test_names_that_become_alike_stay_apart(make_report: Make) -> None:
    audit = sample_audit()
    group = audit["subgroups"]["sex"]["groups"]["F"]
    names = ["<65", ">65", "_65", "a/b", "..", ".", "", " ", "é"]
    audit["subgroups"] = {"age": {"groups": {name: group for name in names}, "largest": {}}}
    found = scalars(make_report(audit=audit))
    start = "audit/subgroups/age/groups/"
    written = [name.removeprefix(start).split("/")[0] for name in found if name.startswith(start)]
    assert len(set(written)) == len(names)
    assert {"_65", "_65_2", "_65_3", "a_b", "é"} <= set(written)
    assert all(posixpath.normpath(name) == name for name in found)
