"""The page that is made of a study's table, on a table whose answers are known."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from monai_unlearn.study.table import COLUMNS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
study = pytest.importorskip("study", reason="benchmarks/ is not there")

SEEDS = (0, 1, 2)
FRACTIONS = (0.02, 0.1, 0.3)


def row(method: str, fraction: float, seed: int, **figures: Any) -> dict[str, Any]:
    """A run on random patients: floor 1 point, untouched original 10."""
    found: dict[str, Any] = dict.fromkeys(COLUMNS)
    found |= {"data": "drawn data", "method": method, "tuned": False, "kind": "random", "fraction": fraction}
    found |= {"seed": seed, "options": "{}", "settings": "{}", "commit": "abc", "device": "CPU", "task": "multi-class"}
    found |= {"finished": "2026-01-01T00:00:00+00:00", "n_forget": 1000 * fraction, "floor": 1.0}
    found |= {"untouched_gap": 10.0, "gap": 10.0, "excess": 9.0, "verdict": "different", "direction": "remembers"}
    found |= {f"{split}_change": 0.0 for split in ("forget", "retain", "validation", "test")}
    found |= {f"retrained_{split}_accuracy_sd": 0.01 for split in ("retain", "test")}
    found |= {"population_attack_difference": 0.2, "share": 0.0, "share_with_tuning": 0.0, "seconds_share": 0.0}
    found |= {"seconds_share_with_tuning": 0.0}
    found |= figures
    found["key"] = "-".join(
        map(
            str,
            (found["data"], method, found["tuned"], found["kind"], fraction, seed, found["options"], found["request"]),
        )
    )
    return found


def rows() -> list[dict[str, Any]]:
    """A good method, a cheap one that gets worse with size, a tuned one, one that fails; and a set without power."""
    found = []
    for seed in SEEDS:
        wobble = (seed - 1) / 10
        for fraction in FRACTIONS:
            found.append(row("nothing", fraction, seed, verdict=None, direction=None))
            good = {"gap": 1.5 + wobble, "excess": 0.5, "share": 0.2, "share_with_tuning": 0.2, "verdict": "equivalent"}
            good |= {"sex_test_difference": 0.1 + wobble, "sex_test_floor": 0.5, "direction": None}
            found.append(row("good_one", fraction, seed, **good))
            worse = {"gap": 12 + wobble, "excess": 11, "share": 0.1, "share_with_tuning": 0.1}
            worse |= {"test_change": -20 * fraction + wobble, "sex_test_difference": 4 + wobble, "sex_test_floor": 0.5}
            found.append(row("saliency", fraction, seed, **worse))
            tuned = {"tuned": True, "gap": 5 + wobble, "excess": 4.0, "share": 0.1, "share_with_tuning": 2.0}
            found.append(row("saliency", fraction, seed, **tuned, test_change=wobble))
        found.append(row("broken", 0.1, seed, error="FloatingPointError: a | b", gap=None))
        flat = {"data": "flat data", "untouched_gap": 1.0}
        found.append(row("nothing", 0.1, seed, **flat, gap=1.0))
        found.append(row("good_one", 0.1, seed, **flat, gap=0.9))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``docs/`` with a table in it."""
    docs = tmp_path / "docs"
    (docs / "results").mkdir(parents=True)
    pd.DataFrame(rows()).to_csv(docs / "results" / "study.csv", index=False)
    return docs


def made(docs: Path) -> str:
    csv, page, images = docs / "results" / "study.csv", docs / "results.md", docs / "images"
    study.main(["--csv", str(csv), "--page", str(page), "--images", str(images)])
    return page.read_text(encoding="utf-8")


def test_the_questions_are_answered_by_the_figures(folder: Path) -> None:
    text = made(folder)
    assert "- Nearest to retraining of the 3 methods on a forget set: good one on 3 of 3." in text
    assert "- Within 2 noise floors of retraining: good one on 3 of 3." in text
    assert "beyond the seeds' spread: saliency on 3 of 3." in text
    assert "falls by 5.6 from the smallest to the largest | 2 of 3 |" in text  # 20 × (.3 − .02)
    assert text.count("| none that these seeds show | 0 of 3 |") == 2  # the good one and the tuned one
    assert "| good one | 3 | 0 | – |" in text
    assert "| saliency | 0 | 0 | random, 2 %, test +4.0; random, 10 %, test +4.0; random, 30 %, test +4.0 |" in text
    assert "| saliency, tuned | 3 | 200 | 10 | 0 |" in text
    assert "| good one | 3 of 3 | 3 of 3 | 3 of 3 | 3 of 3 | 9 × equivalent |" in text
    assert "| saliency | 0 of 3 | 0 of 3 | 3 of 3 | 1 of 3 | 9 × different (remembers) |" in text
    assert "| broken | random, 10 % | 0 | FloatingPointError: a / b |" in text


def test_methods_on_few_seeds_stand_in_the_tables_of_forget_sets_only(tmp_path: Path) -> None:
    each = [row(method, 0.1, seed) for seed in SEEDS for method in ("nothing", "good_one")]
    each += [row("hasty", 0.1, 0, gap=0.1), row("nothing", 0.1, 0, data="other"), row("hasty", 0.1, 0, data="other")]
    pd.DataFrame(each).to_csv(tmp_path / "study.csv", index=False)
    table = study.load(tmp_path / "study.csv")
    sets = {str(name): study.Data(str(name), own) for name, own in table.groupby("data")}
    drawn, other = sets["drawn data"], sets["other"]
    assert (drawn.unanswered, other.unanswered) == (["hasty"], [])  # where no method has enough seeds, all are answered
    assert [line[0] for line in drawn.targets()] == ["good one"]
    assert drawn.effectiveness()[0] == "Nearest to retraining of the 1 methods on a forget set: good one on 1 of 1."
    assert drawn.cells[0].table()[0][0] == "hasty"
    assert [line[0] for line in other.cost()] == ["hasty"]


def test_cells_are_sorted_and_have_intervals(folder: Path) -> None:
    text = made(folder)
    section = text[text.index("### drawn data: random, 10 %") :]
    section = section[: section.index("###", 4)]
    lines = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert [line[0] for line in lines] == ["| good one", "| saliency, tuned", "| untouched original", "| saliency"]
    half = stats.sem([1.4, 1.5, 1.6]) * stats.t.ppf(0.975, 2)
    assert lines[0][2] == f"1.5 ({1.5 - half:.1f} to {1.5 + half:.1f})"
    assert lines[1][-1] == "200 % (10 % without search and judging) |"


def test_a_forget_set_without_power_compares_nothing(folder: Path) -> None:
    text = made(folder)
    assert "No forget set of flat data has power" in text
    assert "### flat data: without power" in text
    assert "### flat data: random" not in text
    assert "The untouched original is within 3 noise floors" in text


def test_plots_and_links_are_there(folder: Path) -> None:
    text = made(folder)
    plots = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert plots == ["images/study-size-drawn-data.svg", "images/study-cost-drawn-data.svg"]
    before = {plot: (folder / plot).read_bytes() for plot in plots}
    assert all(content.startswith(b"<?xml") for content in before.values())
    headings = {re.sub(r"[^a-z0-9]+", "-", line.lower()).strip("-") for line in re.findall(r"^#+ (.+)$", text, re.M)}
    for link in re.findall(r"(?<!!)\[[^]]+\]\(([^)]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in headings
        else:
            assert (folder / link).exists() or (ROOT / "docs" / link).exists()
    made(folder)  # the same again
    assert {plot: (folder / plot).read_bytes() for plot in plots} == before


def test_of_each_key_the_run_that_finished_last_counts(tmp_path: Path) -> None:
    old = row("good_one", 0.1, 0, gap=1.0)
    new = {**old, "commit": "def", "finished": "2026-02-01T00:00:00+00:00", "gap": 2.0}
    pd.DataFrame([new, old, row("nothing", 0.1, 0)]).to_csv(tmp_path / "study.csv", index=False)
    table = study.load(tmp_path / "study.csv")
    assert sorted(table["gap"]) == [2.0, 10.0]


def test_runs_of_one_method_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    each = [
        row("auto", 0.1, 0, options='{"budget": 0.1, "train_epochs": 9}'),
        row("auto", 0.1, 0, options='{"budget": 0.2, "train_epochs": 9}'),
        row("good_one", 0.1, 0, options='{"train_epochs": 9, "trials": 5}', tuned=True),
        row("good_one", 0.1, 0, options='{"train_epochs": 9}'),
        row("nothing", 0.1, 0, options='{"train_epochs": 9}'),
    ]
    pd.DataFrame(each).to_csv(tmp_path / "study.csv", index=False)
    names = ["auto, budget 0.1", "auto, budget 0.2", "good one", "good one, tuned", "untouched original"]
    assert sorted(study.load(tmp_path / "study.csv")["arm"]) == names


def test_variants_of_a_method_are_compared_on_the_seeds_that_they_share(tmp_path: Path) -> None:
    each = [
        row("auto", 0.1, 0, gap=4.0, share_with_tuning=0.3, share=0.25),
        row("auto", 0.1, 1, gap=100.0, share_with_tuning=0.3, share=0.25),
        row("auto", 0.1, 0, gap=8.0, share_with_tuning=0.1, share=0.1, options='{"budget": 0.1}'),
        row("auto", 0.3, 0, gap=100.0),
        *(row("nothing", fraction, seed) for fraction in (0.1, 0.3) for seed in (0, 1)),
    ]
    pd.DataFrame(each).to_csv(tmp_path / "study.csv", index=False)
    cell, lines = study.Data("drawn", study.load(tmp_path / "study.csv")).frontier()
    assert (cell.name, list(lines)) == ("random, 10 %", ["auto"])
    assert sorted(lines["auto"]) == [pytest.approx((10, 8 / cell.floor, 10)), pytest.approx((30, 4 / cell.floor, 25))]


def test_the_excess_is_compared_on_the_seeds_that_both_have(tmp_path: Path) -> None:
    each = [row("nothing", 0.1, seed) for seed in range(5)]
    each += [row("auto", 0.1, seed, gap=1.5, excess=0.5 if seed < 3 else 50.0) for seed in range(5)]
    each += [row("saliency", 0.1, seed, tuned=True, excess=4.0) for seed in range(3)]
    pd.DataFrame(each).to_csv(tmp_path / "study.csv", index=False)
    lines = study.Data("drawn", study.load(tmp_path / "study.csv")).targets()
    assert {line[0]: line[2] for line in lines} == {"auto": "1 of 1", "saliency, tuned": "0 of 1"}


def test_a_set_of_retrained_models_counts_once_however_many_methods_met_it(tmp_path: Path) -> None:
    each = [row(method, 0.1, 0, floor=1.0) for method in ("nothing", "good_one", "auto")]
    each += [row("finetune", 0.1, 0, floor=3.0)]  # made on another machine
    pd.DataFrame(each).to_csv(tmp_path / "study.csv", index=False)
    (cell,) = study.Data("drawn", study.load(tmp_path / "study.csv")).cells
    assert cell.floor == 2.0


def test_seeds_without_a_gap_are_not_counted(tmp_path: Path) -> None:
    """AUROC has no value on a single image: where a seed forgets such patients alone, nothing is known of its gap."""
    each = [row("nothing", 0.1, seed) for seed in range(3)]
    each += [row("auto", 0.1, seed, gap=None if seed == 1 else 2.0 * seed) for seed in range(3)]
    pd.DataFrame(each).to_csv(tmp_path / "study.csv", index=False)
    (cell,) = study.Data("drawn", study.load(tmp_path / "study.csv")).cells
    assert cell.seeds_of("auto") == {0, 2}
    assert [line[1] for line in cell.table()] == ["2", "3"]


def test_a_loss_that_no_table_shows_is_no_harm_and_one_of_auroc_is(tmp_path: Path) -> None:
    sure = {"retrained_retain_accuracy_sd": 0.0, "retrained_test_auroc_sd": 0.01, "retrained_test_auroc": 0.9}
    each = [row("nothing", 0.1, 0)]
    each += [row("rounded", 0.1, 0, **sure, retain_change=-0.05, test_auroc=0.9)]
    each += [row("worse", 0.1, 0, **sure, retain_change=-0.2, test_auroc=0.87)]
    pd.DataFrame(each).to_csv(tmp_path / "study.csv", index=False)
    (cell,) = study.Data("drawn", study.load(tmp_path / "study.csv")).cells
    assert (cell.harms("rounded"), cell.harms("worse")) == ([], ["retain", "test_auroc"])


def test_what_has_no_floor_is_neither_within_nor_beyond_it(tmp_path: Path) -> None:
    each = [row("auto", 0.1, seed, sex_forget_difference=-20.0 + seed, sex_forget_floor=None) for seed in SEEDS]
    pd.DataFrame([*each, *(row("nothing", 0.1, seed) for seed in SEEDS)]).to_csv(tmp_path / "study.csv", index=False)
    assert study.Data("drawn", study.load(tmp_path / "study.csv")).alike("sex") == []


def test_methods_have_colours_and_markers_of_their_own() -> None:
    assert len({study._style(i) for i in range(96)}) == 96


def test_single_patients_count_once_a_seed() -> None:
    each = [
        row("auto", 0.1, seed, request=i, gap=gap)
        for seed, gaps in enumerate(((1, 3), (5, 7, 9)))
        for i, gap in enumerate(gaps)
    ]
    means = study.per_seed(pd.DataFrame(each), ["gap"])["gap"]
    assert means.tolist() == [2, 7]


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [0.0, 0.0, 3.0, 5.0, np.nan]])
def test_intervals_are_those_of_students_t(values: list[float]) -> None:
    known = [value for value in values if not np.isnan(value)]
    expected = stats.t.interval(0.95, len(known) - 1, np.mean(known), stats.sem(known))
    mean, low, high = study.interval(values)
    assert (low, high) == pytest.approx(expected)
    assert mean == pytest.approx(np.mean(known))


def test_one_seed_has_no_interval_and_none_no_figure() -> None:
    assert study.with_interval([1.234]) == "1.2"
    assert study.with_interval([np.nan]) == "–"
    assert study.number(-0.26, 1, sign=True) == "−0.3"


def test_a_run_that_was_made_anew_takes_the_place_of_the_old_one_under_another_key(tmp_path: Path) -> None:
    old = row("good_one", 0.1, 0, gap=9.0)
    new = {**old, "key": "another", "commit": "def", "gap": 2.0, "finished": "2026-02-01T00:00:00+00:00"}
    pd.DataFrame([row("nothing", 0.1, 0), new, old]).to_csv(tmp_path / "study.csv", index=False)
    table = study.load(tmp_path / "study.csv")
    assert table.loc[table["method"] == "good_one", "gap"].tolist() == [2.0]


def test_data_of_one_name_with_two_recipes_is_two_data_sets(tmp_path: Path) -> None:
    short = {"options": '{"train_epochs": 3}', "floor": 50.0}
    more = [row("nothing", 0.1, 0, **short), row("good_one", 0.1, 0, **short)]
    pd.DataFrame([row("nothing", 0.1, 0), row("good_one", 0.1, 0), *more]).to_csv(tmp_path / "study.csv", index=False)
    table = study.load(tmp_path / "study.csv")
    assert sorted(set(table["data"])) == ["drawn data", "drawn data, train_epochs 3"]
    cells = {name: study.Cell(own) for name, own in table.groupby("data")}
    assert [cell.floor for cell in cells.values()] == [1.0, 50.0]


def test_a_page_may_lie_anywhere_and_a_missing_table_is_told(folder: Path, capsys: pytest.CaptureFixture) -> None:
    page = folder.parent / "elsewhere" / "page.md"
    csv = folder / "results" / "study.csv"
    study.main(["--csv", str(csv), "--page", str(page), "--images", str(folder.parent / "pictures")])
    text = page.read_text(encoding="utf-8")
    assert "](../docs/results/study.csv)" in text
    assert "](../pictures/" in text
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    with pytest.raises(SystemExit):
        study.main(["--csv", "nowhere.csv"])
    assert "there is no nowhere.csv" in capsys.readouterr().err
