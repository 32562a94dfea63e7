"""What the study measured of each method, written into its page under docs/methods and into the README's table.

    python benchmarks/method_rows.py

From docs/results/study.csv alone: a tenth of the training images forgotten at random, on every data set that has it.
Only the section "In the study" of a page is written, the gaps, the order and the levels of the README's table of
methods, and its table of the recommended one beside the study's.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from study import NOTHING, ROOT, Cell, Data, add_csv, load, number, per_seed

KIND, FRACTION = "random", 0.1
FIRST = "embedded"  # the data set by which the README's table is sorted
NAMES = {"embedded": "embedded set", "CheXpert layout": "CheXpert's layout, synthetic"}
HEADER = (
    "data",
    "settings",
    "seeds",
    "gap",
    "noise floor",
    "untouched",
    "forget",
    "retain",
    "test",
    "attack AUC",
    "cost",
)
COLUMNS = ["gap", "floor", "untouched_gap", "forget_change", "retain_change", "test_change"]
EXPLAINED = textwrap.fill(
    "A tenth of the training images forgotten at random, whole patients where there are any; mean over seeds, in "
    "brackets the standard deviation. *Gap*: mean distance to the retrained models, in points, of accuracy (mean AUROC "
    "of findings) on forget, retain and test images and of the attack's AUC; *noise floor*: that of two retrained "
    "models; *untouched*: that of the original. *Forget*, *retain* and *test*: change against retraining, in points. "
    "*Cost*: share of retraining's samples, with the search where settings were searched for. Made by `python "
    "benchmarks/method_rows.py` from [study.csv](../results/study.csv); more in [the results](../results.md).",
    width=130,
    break_on_hyphens=False,
)
COMPARED = ("auto", "saliency", "saliency, tuned")  # arms in the README's table of the recommended one
MISSING = "Not measured yet."
SECTION = "## In the study"
BEFORE = ("## Differs", "## Cost", "## Source")  # where the section goes in a page that has none


def chosen(table: pd.DataFrame, method: str, tuned: bool = False) -> pd.DataFrame:
    """The rows of a method with its default settings, or those searched for, on the forget sets above.

    Where rows of one method differ in their options, those of the untouched original are the plain ones.
    """
    rows = table[(table["kind"] == KIND) & (table["fraction"] == FRACTION) & (table["error"] == "")]
    plain = set(rows.loc[rows["method"] == NOTHING, ["data", "options"]].itertuples(index=False, name=None))
    own = rows[(rows["method"] == method) & (rows["tuned"].astype(str).str.lower() == str(tuned).lower())]
    keep = [(data, options) in plain for data, options in zip(own["data"], own["options"])]
    return own[pd.Series(keep, index=own.index, dtype=bool)]


def row_of(data: str, settings: str, rows: pd.DataFrame) -> str:
    """A line of a page's table."""
    levels = per_seed(rows, [*COLUMNS, "population_attack_auc", "share_with_tuning"])
    cells = [NAMES.get(data, data), settings, str(len(levels)), _with_deviation(levels["gap"])]
    cells += [number(levels[name].mean()) for name in ("floor", "untouched_gap")]
    cells += [_with_deviation(levels[name], sign=True) for name in ("forget_change", "retain_change", "test_change")]
    cells += [number(levels["population_attack_auc"].mean(), 2), number(levels["share_with_tuning"].mean(), 2)]
    return "| " + " | ".join(cells) + " |"


def section(table: pd.DataFrame, methods: Sequence[str]) -> str:
    """The section of a page, on all methods that it describes."""
    lines = []
    for method in methods:
        for tuned in (False, True):
            for data, rows in chosen(table, method, tuned).groupby("data", sort=True):
                what = "searched for" if tuned else "default"
                lines.append(row_of(str(data), f"`{method}`, {what}" if len(methods) > 1 else what, rows))
    if not lines:
        return f"{SECTION}\n\n{MISSING}\n"
    head = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    return "\n".join([SECTION, "", *head, *lines, "", EXPLAINED, ""])


def with_section(page: str, text: str) -> str:
    """A page with its section written anew."""
    found = re.search(rf"^{SECTION}\n.*?(?=^## |\Z)", page, re.M | re.S)
    if found:
        return page[: found.start()] + text + "\n" + page[found.end() :]
    place = min(page.index(f"\n{title}") for title in BEFORE if f"\n{title}" in page) + 1
    return page[:place] + text + "\n" + page[place:]


def readme(text: str, table: pd.DataFrame) -> str:
    """The README with its tables filled in: of methods, the nearest to retraining first, and of the recommended one."""
    lines = text.splitlines(keepends=True)
    start, end = _table_after(lines, "| method | handlers |")
    columns = [name.strip() for name in lines[start - 2].strip().strip("|").split("|")]
    rows = []
    for line in lines[start:end]:
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        method = re.search(r"`(\w+)\.json`", line)
        assert method is not None, line
        gaps, tuned = (_gaps(table, method[1], searched) for searched in (False, True))
        exact = method[1] == "retrain"
        cells[columns.index("gap")] = "exact" if exact else _with_seeds(gaps)
        cells[columns.index("tuned")] = _with_seeds(tuned)
        rows.append((not exact, gaps.mean() if len(gaps) else float("inf"), "| " + " | ".join(cells) + " |\n"))
    rows.sort(key=lambda row: row[:2])
    lines[start:end] = [line for *_, line in rows]
    start, end = _table_after(lines, "| data | forget sets |")
    lines[start:end] = recommended(table)
    cell = Cell(table[(table["data"] == FIRST) & (table["kind"] == KIND) & (table["fraction"] == FRACTION)])
    return re.sub(
        r"(retrained models differ by )[\d.–]+( there, and the untouched original is )[\d.–]+( away)",
        rf"\g<1>{number(cell.floor)}\g<2>{number(cell.untouched)}\g<3>",
        "".join(lines),
    )


def recommended(table: pd.DataFrame) -> list[str]:
    """Lines on the recommended method beside the study's: of each data set, forget sets with power and without."""
    lines = []
    for name, rows in table.groupby("data", sort=True):
        data = Data(str(name), rows)
        for cells in (data.powered, data.powerless):
            own = [cell for cell in cells if "auto" in cell.arms]
            if not own:
                continue
            line = [NAMES.get(str(name), str(name)), _sizes(own)]
            line += [_range([cell.floor for cell in own]), _range([cell.untouched for cell in own])]
            for arm in COMPARED:
                gaps = [cell.mean(arm, "gap") for cell in own if arm in cell.arms]
                seeds = [len(cell.seeds_of(arm)) for cell in own if arm in cell.arms]
                line.append(f"{_range(gaps)} ({_range(seeds, 0)})" if gaps else "–")
            audits = pd.concat([cell.arms["auto"] for cell in own])["verdict"]
            told = f"{(audits == 'different').sum()} of {len(audits)}"
            powerless = (audits == "powerless").sum()
            line.append(f"{told} ({'all' if powerless == len(audits) else powerless} powerless)" if powerless else told)
            lines.append("| " + " | ".join(line) + " |\n")
    return lines


def _table_after(lines: Sequence[str], header: str) -> tuple[int, int]:
    """First and one past the last of the lines below a table's header."""
    start = next(i for i, line in enumerate(lines) if line.startswith(header)) + 2
    return start, next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))


def _sizes(cells: Sequence[Cell]) -> str:
    """``random 2, 10, 30 %; all women``: what forget sets are called, sizes of one kind together."""
    sizes: dict[str, list[str]] = {}
    for cell in cells:
        kind, _, size = cell.name.partition(", ")
        sizes.setdefault(kind, []).append(size.removesuffix(" %"))
    return "; ".join(f"{kind} {', '.join(own)} %" if own[0] else kind for kind, own in sizes.items())


def _range(values: Sequence[float], digits: int = 1) -> str:
    """``1.0 to 2.1``, or a single number."""
    ends = number(min(values), digits), number(max(values), digits)
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _gaps(table: pd.DataFrame, method: str, tuned: bool) -> pd.Series:
    """A method's gap for each seed of the first data set."""
    own = chosen(table, method, tuned)
    return per_seed(own[own["data"] == FIRST], ["gap"])["gap"]


def _with_seeds(values: pd.Series) -> str:
    return "–" if values.empty else f"{number(values.mean())} ({len(values)})"


def _with_deviation(values: pd.Series, sign: bool = False) -> str:
    mean = number(values.mean(), sign=sign)
    return mean if len(values) < 2 else f"{mean} ({number(values.std(ddof=1))})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the pages and the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_csv(parser)
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of README.md and docs")
    given = parser.parse_args(arguments)
    table = load(given.csv)
    changed = []
    for path in sorted((given.root / "docs" / "methods").glob("*.md")):
        page = path.read_text(encoding="utf-8")
        shown = re.search(r"^\*\*Bundles?\.\*\*.*?(?=\n\n)", page, re.M | re.S)
        methods = re.findall(r"`bundles/(\w+)\.json`", shown[0]) if shown else []
        if not methods or path.stem in ("batch_norm", "retrain"):
            continue
        text = with_section(page, section(table, methods))
        if text != page:
            path.write_text(text, encoding="utf-8")
            changed.append(path.name)
    front = given.root / "README.md"
    page = front.read_text(encoding="utf-8")
    text = readme(page, table)
    if text != page:
        front.write_text(text, encoding="utf-8")
        changed.append(front.name)
    print(f"Wrote {', '.join(changed)}." if changed else "All pages hold these figures already.")


if __name__ == "__main__":
    main()
