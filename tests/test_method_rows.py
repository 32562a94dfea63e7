"""The study's figures on the methods' pages and in the README are those of the table that is kept."""

from __future__ import annotations

import csv
import re
import shutil
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
method_rows = pytest.importorskip("method_rows", reason="benchmarks/ is not there")
TABLE = ROOT / "docs" / "results" / "study.csv"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """README and methods' pages, to be written to."""
    shutil.copytree(ROOT / "docs" / "methods", tmp_path / "docs" / "methods")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def _pages(folder: Path) -> dict[str, str]:
    files = [folder / "README.md", *(folder / "docs" / "methods").glob("*.md")]
    return {file.name: file.read_text(encoding="utf-8") for file in files}


def _column(table: str, name: str) -> list[str]:
    """The cells of a column of a Markdown table."""
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    return [row[head.index(name)] for row in rows]


def _readme_table(page: str) -> str:
    found = re.search(r"^\| method \| handlers \|(?:.*\n\|)*.*\n", page, re.M)
    assert found is not None
    return found[0]


def test_the_pages_hold_the_figures_of_the_table(copy: Path) -> None:
    method_rows.main(["--root", str(copy)])
    assert _pages(copy) == _pages(ROOT), "run python benchmarks/method_rows.py"


def test_figures_that_were_changed_by_hand_or_lost_are_written_anew(copy: Path) -> None:
    page, front = copy / "docs" / "methods" / "saliency_mask.md", copy / "README.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r"## In the study\n.*?(?=^## )", "", text, flags=re.M | re.S), encoding="utf-8")
    assert "In the study" not in page.read_text(encoding="utf-8")
    front.write_text(front.read_text(encoding="utf-8").replace("differ by 1", "differ by 7"), encoding="utf-8")
    method_rows.main(["--root", str(copy)])
    assert _pages(copy) == _pages(ROOT)


def test_a_table_that_is_not_there_is_told(copy: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        method_rows.main(["--root", str(copy), "--csv", "nowhere.csv"])
    assert "there is no nowhere.csv" in capsys.readouterr().err
    assert _pages(copy) == _pages(ROOT)


def test_a_methods_row_by_hand() -> None:
    """Mean and deviation over seeds of the last finished run of each, from the file itself."""
    last: dict[str, dict[str, str]] = {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            plain = row["kind"] == "random" and row["fraction"] == "0.1" and row["tuned"].lower() == "false"
            named = row["data"] == "PneumoniaMNIST" and row["method"] == "saliency" and row["options"] == "{}"
            if plain and named and not row["error"] and row["finished"] >= last.get(row["key"], row)["finished"]:
                last[row["key"]] = row
    gaps = [float(row["gap"]) for row in last.values()]
    page = (ROOT / "docs" / "methods" / "saliency_mask.md").read_text(encoding="utf-8")
    section = page.split("## In the study\n")[1].split("\n\n")[0]
    number = _column(section, "data").index("PneumoniaMNIST")
    assert _column(section, "settings")[number] == "default"
    assert _column(section, "seeds")[number] == str(len(gaps))
    assert _column(section, "gap")[number] == f"{statistics.mean(gaps):.1f} ({statistics.stdev(gaps):.1f})"


def test_the_readmes_table_of_the_recommended_method_by_hand() -> None:
    """Smallest and largest mean over seeds of the forget sets with power, from the file itself."""
    last: dict[tuple[str, ...], dict[str, str]] = {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        for row in sorted(csv.DictReader(file), key=lambda row: row["finished"]):
            if row["data"] == "embedded" and row["method"] == "auto" and row["options"] == "{}" and not row["error"]:
                last[row["kind"], row["fraction"], row["seed"], row["request"]] = row
    gaps: dict[tuple[str, str], list[dict[str, str]]] = {}
    for (kind, fraction, *_), row in last.items():
        gaps.setdefault((kind, fraction), []).append(row)
    means = [
        statistics.mean(float(row["gap"]) for row in rows)
        for rows in gaps.values()
        if statistics.mean(float(row["untouched_gap"]) for row in rows)
        >= 3 * statistics.mean(float(row["floor"]) for row in rows)
    ]
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^\| data \| forget sets \|(?:.*\n\|)*.*\n", page, re.M)
    assert found is not None
    place = _column(found[0], "data").index("embedded set")
    assert _column(found[0], "`auto` (seeds)")[place] == f"{min(means):.1f} to {max(means):.1f} (5)"
    assert len(means) == 6


def test_the_readme_and_the_results_have_the_same_levels() -> None:
    front, results = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md"))
    said = re.search(r"retrained models differ by ([\d.]+) there, and the untouched original is ([\d.]+) away", front)
    section = results.split("\n### embedded: random, 10 %\n")[1]
    found = re.search(r"Noise floor ([\d.]+), untouched original ([\d.]+) points", section)
    assert said is not None
    assert found is not None
    assert said.groups() == found.groups()


def test_powerless_audits_are_told_apart_from_others() -> None:
    """Of single patients no attack tells even the original: none told apart is then no success."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^\| embedded set \| single patients \|.*$", page, re.M)
    with TABLE.open(encoding="utf-8", newline="") as file:
        last = {
            (row["seed"], row["request"]): row["verdict"]
            for row in sorted(csv.DictReader(file), key=lambda row: row["finished"])
            if (row["data"], row["method"], row["kind"]) == ("embedded", "auto", "patients") and not row["error"]
        }
    assert set(last.values()) == {"powerless"}
    assert line.endswith(f"| 0 of {len(last)} (all powerless) |")


def test_the_readmes_table_is_sorted_and_has_every_method_once() -> None:
    table = _readme_table((ROOT / "README.md").read_text(encoding="utf-8"))
    bundles = re.findall(r"`(\w+)\.json`", table)
    shipped = {file.stem for file in (ROOT / "bundles").glob("*.json") if '"search_space"' in file.read_text()}
    assert sorted(bundles) == sorted({*shipped, "retrain", "auto"})
    assert set(_column(table, "use")) == {"recommended", "baseline", "research"}
    exact, *gaps = _column(table, "gap")
    assert exact == "exact"
    known = [float(gap.split(" ")[0]) for gap in gaps if gap != "–"]
    assert known == sorted(known)
    assert gaps[: len(known)] == [gap for gap in gaps if gap != "–"], "what is not measured comes last"
