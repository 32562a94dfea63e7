"""Figures of each group and the largest difference between groups, against slow loops."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from audit_worlds import FEW, MODELS, drawn_images, figures_of, models, one_of, percentiles, world
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from monai_unlearn.evaluation import SPLITS, Audited, Facts
from monai_unlearn.evaluation.subgroups import subgroup_section

pytestmark = pytest.mark.filterwarnings("error")
# Shrinking would take minutes, and a smaller seed is no smaller world.
FEW_EXAMPLES = settings(deadline=None, derandomize=True, max_examples=5, phases=[Phase.explicit, Phase.generate])
WORLDS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "sizes": st.fixed_dictionaries({split: st.integers(6, 40) for split in SPLITS}),
        "classes": st.integers(2, 3),
        "multi_label": st.booleans(),
        "patients": st.booleans(),
        "retrained": st.integers(0, 3),
    }
)
DIFFICULTY = ("easiest third", "middle third", "hardest third")


def _band(age: float) -> str:
    bands = {"0-17": (0, 18), "18-39": (18, 40), "40-59": (40, 60), "60-79": (60, 80), "80+": (80, 151)}
    return next(name for name, (low, high) in bands.items() if low <= age < high)


def _groups(audited: Audited, column: str) -> dict[str, list[str]]:
    """Split → group of each image; of one image in all there is no group."""
    if column == "difficulty":
        found = {}
        for split in SPLITS:
            compared = [audited.unlearned[0], *(audited.retrained or [audited.original])]
            scores = np.mean([outputs[split].difficulty for outputs in compared], axis=0)
            known = [i for i in np.argsort(scores, kind="stable") if not np.isnan(scores[i])]
            size, rest = divmod(len(known), 3)
            ends = np.cumsum([size + (k < rest) for k in range(3)])
            found[split] = [""] * len(scores)
            for place, i in enumerate(known):
                found[split][i] = DIFFICULTY[int(np.searchsorted(ends, place, side="right"))]
    else:
        found = {split: [str(value) for value in audited.facts[split].columns[column]] for split in SPLITS}
        if column == "age":
            found = {split: [_band(float(value)) for value in values] for split, values in found.items()}
    names = list(itertools.chain(*found.values()))
    return {split: [name if names.count(name) > 1 else "" for name in values] for split, values in found.items()}


def _share_right(outputs: Any) -> np.ndarray:
    """Share of each image's known answers that are right."""
    z, labels = outputs.logits, outputs.labels
    if labels.ndim == 1:
        return (z.argmax(1) == labels).astype(float)
    found = []
    for row, truth in zip(z, labels):
        answers = [(a > 0) == (b > 0.5) for a, b in zip(row, truth) if not np.isnan(b) and b != 0.5]
        found.append(np.mean(answers) if answers else np.nan)
    return np.array(found)


def _change(audited: Audited, split: str, other: str) -> np.ndarray:
    theirs = np.mean([_share_right(outputs[split]) for outputs in models(audited)[other]], axis=0)
    return _share_right(audited.unlearned[0][split]) - theirs


def _close(found: Any, expected: Any, within: float = 1e-9) -> None:
    assert found == pytest.approx(expected, abs=within, nan_ok=True)


def _identical(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)


@FEW_EXAMPLES
@given(WORLDS)
def test_figures_of_groups_are_those_of_their_images_alone(kind_of_world: dict[str, Any]) -> None:
    audited = world(**kind_of_world)
    section = subgroup_section(audited, FEW)
    assert list(section) == ["sex", "age", "site", "difficulty"]
    for column, part in section.items():
        groups = _groups(audited, column)
        names = {name for values in groups.values() for name in values if name}
        order = list(DIFFICULTY) if column == "difficulty" else sorted(names)
        assert list(part["groups"]) == [name for name in order if name in names]
        for name, split in itertools.product(part["groups"], SPLITS):
            found = part["groups"][name][split]
            rows = np.flatnonzero(np.array(groups[split]) == name)
            assert found["n"] == len(rows)
            people = audited.facts[split].people
            assert found["patients"] == (None if people is None else len(set(people[rows].tolist())))
            for model in MODELS:
                group = models(audited).get(model)
                if group is None:
                    assert found["models"][model] is found["change"][model] is None
                    continue
                each = [figures_of(one_of(outputs[split], rows)) for outputs in group]
                for figure, value in found["models"][model].items():
                    _close(value, np.mean([one[figure] for one in each]))
                if split == "forget":
                    unseen = np.array(groups["validation"]) == name
                    _close(found["attack"][model], _attack(group, rows, unseen))
            if split != "forget":
                assert found["attack"] is None
            for other in set(models(audited)) - {"unlearned"}:
                change = found["change"][other]
                if not len(rows):
                    assert change is None
                else:
                    values = _change(audited, split, other)[rows]
                    known = values[~np.isnan(values)]
                    _close(change["difference"], known.mean() if len(known) else float("nan"))


def _attack(group: Any, rows: np.ndarray, unseen: np.ndarray) -> float:
    aucs = []
    for outputs in group:
        ours, theirs = outputs["forget"].scores[rows], outputs["validation"].scores[unseen]
        ours, theirs = ours[~np.isnan(ours)], theirs[~np.isnan(theirs)]
        if not len(ours) or not len(theirs):
            return float("nan")
        truth = np.repeat([1, 0], [len(ours), len(theirs)])
        aucs.append(roc_auc_score(truth, np.concatenate([ours, theirs])))
    return float(np.mean(aucs))


def _holm(p_values: list[float]) -> list[float]:
    """Each p-value times the number of those that are not smaller, and never less than a smaller one's."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


@FEW_EXAMPLES
@given(WORLDS)
def test_the_largest_difference_is_that_between_the_means_and_corrected_for_all_tests(
    kind_of_world: dict[str, Any],
) -> None:
    audited = world(**kind_of_world)
    section = subgroup_section(audited, FEW)
    other = "retrained" if audited.retrained else "original"
    tests = []
    for column, part in section.items():
        groups = _groups(audited, column)
        for split in SPLITS:
            found = part["largest"][split]
            values = _change(audited, split, other)
            means = {}
            for name in set(groups[split]) - {""}:
                own = values[np.array(groups[split]) == name]
                own = own[~np.isnan(own)]
                if len(own) > 1:
                    means[name] = own.mean()
            if len(means) < 2:
                assert found is None
                continue
            tests.append(found)
            assert found["against"] == other
            _close(found["difference"], max(means.values()) - min(means.values()))
            _close(means[found["groups"][0]] - means[found["groups"][1]], found["difference"])
            assert 0 < found["p"] <= 1
    for part, expected in zip(tests, _holm([part["p"] for part in tests])):
        _close(part["p_holm"], expected)


@pytest.mark.parametrize("retrained", [0, 2])
@pytest.mark.parametrize("patients", [False, True])
@pytest.mark.parametrize("multi_label", [False, True])
def test_intervals_are_those_of_a_slow_paired_bootstrap(multi_label: bool, patients: bool, retrained: int) -> None:
    audited = world(5, multi_label=multi_label, patients=patients, retrained=retrained, sizes={"test": 50})
    part = subgroup_section(audited, FEW)["sex"]
    sex = audited.facts["test"].columns["sex"].to_numpy()
    draws = drawn_images(audited.facts["test"].people, 50, FEW.resamples, np.random.default_rng(FEW.seed))
    for other in ("original", "retrained")[: 1 + bool(retrained)]:
        values = _change(audited, "test", other)
        drawn = {name: np.array([np.nanmean(values[rows][sex[rows] == name]) for rows in draws]) for name in ("f", "m")}
        for name, each in drawn.items():
            change = part["groups"][name]["test"]["change"][other]
            assert (change["low"], change["high"]) == pytest.approx(percentiles(each), abs=1e-9)
    largest = part["largest"]["test"]  # by the last one, against which groups are compared
    high, low = largest["groups"]
    assert (largest["low"], largest["high"]) == pytest.approx(percentiles(drawn[high] - drawn[low]), abs=1e-9)


def test_p_values_are_about_scipys() -> None:
    # The unlearned model errs more on the women of the test set.
    def harm(random: np.random.Generator, kind: str, split: str, logits: np.ndarray) -> np.ndarray:
        return logits + 1.3 * random.normal(size=logits.shape) if kind == "unlearned" and split == "test" else logits

    audited = world(1, own=harm, sizes={"test": 60}, retrained=2)
    part = subgroup_section(audited, FEW)["sex"]["largest"]["test"]
    values, sex = _change(audited, "test", "retrained"), audited.facts["test"].columns["sex"].to_numpy()
    exact = stats.permutation_test(
        (values[sex == "f"], values[sex == "m"]),
        lambda a, b: abs(np.mean(a) - np.mean(b)),
        n_resamples=2000,
        alternative="greater",
        rng=np.random.default_rng(0),
    )
    assert part["p"] == pytest.approx(exact.pvalue, abs=0.06)


def test_people_are_permuted_and_not_their_images() -> None:
    """Twelve people with ten equal images each are twelve observations."""
    audited = world(3, sizes={"test": 12}, noise=2.0)
    rows = np.repeat(np.arange(12), 10)
    facts = audited.facts["test"]
    single = subgroup_section(audited, replace(FEW, subgroups=["sex"]))["sex"]["largest"]["test"]
    copies = replace(
        audited,
        original={**audited.original, "test": one_of(audited.original["test"], rows)},
        unlearned=[{**audited.unlearned[0], "test": one_of(audited.unlearned[0]["test"], rows)}],
        retrained=[{**audited.retrained[0], "test": one_of(audited.retrained[0]["test"], rows)}],
        facts={**audited.facts, "test": Facts(rows, facts.columns.iloc[rows].reset_index(drop=True))},
    )
    grouped = subgroup_section(copies, replace(FEW, subgroups=["sex"]))["sex"]["largest"]["test"]
    assert grouped["difference"] == pytest.approx(single["difference"])
    assert grouped["p"] == pytest.approx(single["p"], abs=0.08)
    assert (grouped["low"], grouped["high"]) == pytest.approx((single["low"], single["high"]), abs=0.05)


# ---- which columns


def test_named_columns_are_the_only_ones_in_their_order() -> None:
    audited = world(0)
    for asked, expected in (
        (["site", "sex"], ["site", "sex"]),
        ([], []),
        ("sex", ["sex"]),
        (["difficulty"], ["difficulty"]),
    ):
        assert list(subgroup_section(audited, replace(FEW, subgroups=asked))) == expected


def test_without_columns_there_is_difficulty_alone() -> None:
    audited = world(0)
    bare = replace(audited, facts={split: Facts() for split in SPLITS})
    assert list(subgroup_section(bare, FEW)) == ["difficulty"]


@pytest.mark.parametrize("asked", [["ward"], ["sex", "ward"]])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(asked: list[str]) -> None:
    with pytest.raises(ValueError, match=r"there is no 'ward' in all of its parts.*age, sex, site"):
        subgroup_section(world(0), replace(FEW, subgroups=asked))


def test_a_column_that_one_part_lacks_is_not_there() -> None:
    audited = world(0)
    facts = {**audited.facts, "test": Facts(None, audited.facts["test"].columns.drop(columns="site"))}
    without = replace(audited, facts=facts)
    assert "site" not in subgroup_section(without, FEW)
    with pytest.raises(ValueError, match="no 'site' in all of its parts"):
        subgroup_section(without, replace(FEW, subgroups=["site"]))


def test_text_of_many_values_is_refused_where_it_is_asked_for_and_left_out_where_not() -> None:
    audited = world(0)

    def ids(split: str) -> Facts:
        columns = audited.facts[split].columns
        return Facts(None, columns.assign(site=[f"{split}-{i}" for i in range(len(columns))]))

    many = replace(audited, facts={split: ids(split) for split in SPLITS})
    assert "site" not in subgroup_section(many, FEW)
    with pytest.raises(ValueError, match="'site' is text of more than 12 different ones"):
        subgroup_section(many, replace(FEW, subgroups=["site"]))


def _with(audited: Audited, **columns: Any) -> Audited:
    """Columns with one value for each image of all splits."""
    ends = np.cumsum([audited.original[split].n for split in SPLITS])[:-1]
    parts = {
        name: dict(zip(SPLITS, np.split(np.array(values, dtype=object), ends))) for name, values in columns.items()
    }
    facts = {
        split: Facts(audited.facts[split].people, pd.DataFrame({name: part[split] for name, part in parts.items()}))
        for split in SPLITS
    }
    return replace(audited, facts=facts)


def test_numbers_of_many_values_are_cut_into_thirds_of_all_images() -> None:
    audited = world(0)
    n = sum(audited.original[split].n for split in SPLITS)
    part = subgroup_section(_with(audited, dose=np.arange(n)), replace(FEW, subgroups=["dose"]))["dose"]
    assert set(part["groups"]) == {"lowest third", "middle third", "highest third"}
    first = audited.original["forget"].n
    assert part["groups"]["lowest third"]["forget"]["n"] == first
    assert part["groups"]["lowest third"]["test"]["n"] == 0
    assert part["largest"]["forget"] is None


@pytest.mark.parametrize("scored", [True, False])
def test_a_column_difficulty_takes_the_place_of_el2n(scored: bool) -> None:
    audited = world(0)
    n = sum(audited.original[split].n for split in SPLITS)
    values = np.arange(n) * 0.5 if scored else np.where(np.arange(n) % 2, "hard", "easy")
    part = subgroup_section(_with(audited, difficulty=values), FEW)["difficulty"]
    assert list(part["groups"]) == (list(DIFFICULTY) if scored else ["easy", "hard"])


def test_a_group_of_no_image_or_of_one_is_said_and_not_compared() -> None:
    audited = world(0, retrained=2)
    n = [audited.original[split].n for split in SPLITS]
    # One "x" in forget, none in retain; five in validation and test; a "y" that is the only one of all.
    site = ["x"] + ["a"] * (n[0] - 1) + ["a", "b"] * (n[1] // 2) + (["x"] * 5 + ["a"] * (n[2] - 5))
    site += ["x"] * 5 + ["y"] + ["b"] * (n[3] - 6)
    part = subgroup_section(_with(audited, site=site), FEW)["site"]
    assert set(part["groups"]) == {"a", "b", "x"}
    lone, nobody = part["groups"]["x"]["forget"], part["groups"]["x"]["retain"]
    assert (lone["n"], nobody["n"]) == (1, 0)
    assert lone["models"]["unlearned"]["accuracy"] in (0.0, 1.0)
    assert np.isnan(lone["models"]["unlearned"]["auroc"])
    change = lone["change"]["retrained"]
    assert np.isnan([change["low"], change["high"]]).all()  # it is missing from a third of the resamples
    assert np.isnan(list(nobody["models"]["unlearned"].values())).all()
    assert nobody["change"] == {"original": None, "retrained": None}
    assert part["largest"]["forget"] is None
    assert part["largest"]["validation"]["groups"] in (["a", "x"], ["x", "a"])
    assert np.isnan(part["groups"]["b"]["forget"]["attack"]["unlearned"])


def test_values_that_are_not_known_are_in_no_group() -> None:
    audited = world(0)
    n = sum(audited.original[split].n for split in SPLITS)
    sex = np.where(np.arange(n) % 3 == 0, None, np.where(np.arange(n) % 2, "f", "m"))
    part = subgroup_section(_with(audited, sex=sex), FEW)["sex"]
    assert set(part["groups"]) == {"f", "m"}
    counted = sum(part["groups"][name][split]["n"] for name in ("f", "m") for split in SPLITS)
    assert counted == sum(value is not None for value in sex)


def test_a_column_of_one_value_has_figures_and_nothing_to_compare() -> None:
    audited = world(0)
    n = sum(audited.original[split].n for split in SPLITS)
    section = subgroup_section(_with(audited, sex=["f"] * n, age=[None] * n), FEW)
    assert section["sex"]["largest"] == dict.fromkeys(SPLITS)
    assert section["sex"]["groups"]["f"]["test"]["n"] == audited.original["test"].n
    assert section["age"] == {"groups": {}, "largest": dict.fromkeys(SPLITS)}


# ---- what it is for


def test_harm_to_one_sex_shows_there_and_nowhere_else() -> None:
    elsewhere = 0
    for seed in range(6):
        audited = world(seed, sizes={split: 150 for split in SPLITS}, retrained=2)
        hurt = {}
        for split, one in audited.unlearned[0].items():
            women = (audited.facts[split].columns["sex"] == "f").to_numpy()
            logits = np.where(women[:, None], np.roll(one.logits, 1, axis=1), one.logits)
            hurt[split] = one_of(replace(one, logits=logits), np.arange(one.n))
        section = subgroup_section(replace(audited, unlearned=[hurt]), replace(FEW, subgroups=["sex", "age", "site"]))
        for split in SPLITS:
            assert section["sex"]["largest"][split]["p_holm"] < 0.05
            assert section["sex"]["largest"][split]["groups"] == ["m", "f"]
            assert section["sex"]["largest"][split]["low"] > 0
        others = [section[column]["largest"][split]["p_holm"] for column in ("age", "site") for split in SPLITS]
        elsewhere += min(others) < 0.05
    assert elsewhere <= 1  # one in twenty by chance


@pytest.mark.parametrize("retrained", [0, 2])
def test_ranks_by_difficulty_favour_none_of_the_models_that_are_compared(retrained: int) -> None:
    """Ranked by one of them, the other would do better on what that one finds hard by chance."""
    sizes, found = {"forget": 6, "retain": 6, "validation": 6, "test": 200}, []
    for seed in range(25):
        audited = world(seed, sizes=sizes, retrained=retrained, noise=1.5, shift=(0, 0, 0))
        part = subgroup_section(audited, replace(FEW, subgroups=["difficulty"]))["difficulty"]["largest"]["test"]
        found.append(part["p"] <= 0.05)
    assert sum(found) <= stats.binom.ppf(0.999, 25, 0.05)
