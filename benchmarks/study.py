"""The page docs/results.md and its plots, made from a study's table alone.

    python benchmarks/study.py --csv docs/results/study.csv

The table is what ``python -m monai.bundle run study`` writes (docs/study.md). Sentences are made from the figures by
the rules that stand in the page itself, so that nothing is said that the table does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy import stats

ROOT = Path(__file__).parents[1]
NOTHING, EXACT = "nothing", "retrain"
POWER = 3  # noise floors that the untouched original has to be away from retraining
NEAR = 2  # noise floors that count as near
CHEAP = 0.3  # share of retraining's samples
EXCESS = 0.25  # of tuned saliency's excess
SEEDS = 3  # on which a method has to have been run for the questions to be answered of it
SHOWN = 0.1  # points below which the tables show nothing; a smaller loss is no harm
RUN = ["data", "method", "tuned", "kind", "fraction", "seed", "request", "options"]
WORDS = {
    "random": "random",
    "patients": "single patients",
    "all_female": "all women",
    "all_male": "all men",
    "one_class": "one class",
    "one_site": "one site",
}
HEADER = (
    *("method", "seeds", "gap", "excess", "forget", "retain", "test", "attack", "verdicts"),
    "cost, share of retraining's samples",
)
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a8a8a")
MARKERS = "osD^vPX*<>hp"


def load(csv: Path) -> pd.DataFrame:
    """The rows that the page is made of: of runs of the same, whatever the code's version, the one that finished last.

    A run that was made anew after a method's code or config changed has another key, and takes the old one's place.
    Data sets of one name on which recipes differ are told apart by what differs.
    """
    table = pd.read_csv(csv, dtype={"key": str, "commit": str, "error": str, "options": str})
    table["error"] = table["error"].fillna("")
    table["data"] = _data_names(table)
    table = table.sort_values("finished", kind="stable").drop_duplicates(RUN, keep="last").copy()
    table["arm"] = _arms(table)
    main = np.where(table["task"] == "multi-label", "auroc", "accuracy")
    for split in ("retain", "test"):  # of the task's main figure, in points
        sd = [table[f"retrained_{split}_{name}_sd"].to_numpy(float) for name in ("accuracy", "auroc")]
        table[f"{split}_sd"] = 100 * np.where(main == "auroc", sd[1], sd[0])
        auroc = [table[f"{before}{split}_auroc"].to_numpy(float) for before in ("", "retrained_")]
        table[f"{split}_auroc_change"], table[f"{split}_auroc_sd"] = 100 * (auroc[0] - auroc[1]), 100 * sd[1]
    return table.reset_index(drop=True)


def _options(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The options of each row."""
    return [json.loads(text) if isinstance(text, str) and text else {} for text in table["options"]]


def _differing(options: Sequence[dict[str, Any]]) -> list[str]:
    """The options in which some rows differ from others."""
    keys = sorted({key for one in options for key in one})
    return [key for key in keys if len({json.dumps(one.get(key)) for one in options}) > 1]


def _data_names(table: pd.DataFrame) -> list[str]:
    """Names of the data sets, with those options of the recipe in which the untouched originals differ."""
    options = _options(table)
    recipes: dict[str, list[dict]] = {}
    for data, method, own in zip(table["data"], table["method"], options):
        if method == NOTHING:
            recipes.setdefault(data, []).append(own)
    differing = {data: _differing(known) for data, known in recipes.items()}
    return [
        ", ".join([str(data), *(f"{key} {own[key]}" for key in differing.get(data, ()) if key in own)])
        for data, own in zip(table["data"], options)
    ]


def _arms(table: pd.DataFrame) -> list[str]:
    """What a row's method is called: with the options in which rows of one method on one data set differ."""
    options = _options(table)
    names = []
    groups = list(zip(table["data"], table["method"], table["tuned"]))
    members: dict[tuple, list[dict]] = {}
    for group, own in zip(groups, options):
        members.setdefault(group, []).append(own)
    differing = {group: _differing(own) for group, own in members.items()}
    for group, method, tuned, own in zip(groups, table["method"], table["tuned"], options):
        name = "untouched original" if method == NOTHING else str(method).replace("_", " ")
        extra = [f"{key} {own[key]}" for key in differing[group] if key in own] if method != NOTHING else []
        if str(tuned).lower() == "true":
            extra.insert(0, "tuned")
        names.append(f"{name}, {', '.join(extra)}" if extra else name)
    return names


def per_seed(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Mean of columns for each seed: over the single patients, where there are any."""
    return rows.groupby("seed")[list(columns)].mean()


def interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Mean and 95 % t-interval over seeds; NaN where there is no value, and no ends with a single one."""
    known = np.array([value for value in values if not np.isnan(value)], dtype=float)
    if len(known) == 0:
        return float("nan"), float("nan"), float("nan")
    mean = float(known.mean())
    if len(known) == 1:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / np.sqrt(len(known)))
    return mean, mean - half, mean + half


def number(value: float, digits: int = 1, sign: bool = False) -> str:
    """A number with a true minus; a dash for what is not known."""
    if value is None or np.isnan(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def with_interval(values: Iterable[float], digits: int = 1, sign: bool = False) -> str:
    """``mean (low to high)``."""
    mean, low, high = interval(values)
    if np.isnan(low):
        return number(mean, digits, sign)
    return f"{number(mean, digits, sign)} ({number(low, digits, sign)} to {number(high, digits, sign)})"


def cell_name(kind: str, fraction: float) -> str:
    """What a forget set is called."""
    words = WORDS.get(kind, kind)
    return words if np.isnan(fraction) else f"{words}, {100 * fraction:g} %"


class Cell:
    """All runs on one kind and size of forget set of one data set."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self.kind, self.fraction = rows["kind"].iloc[0], float(rows["fraction"].iloc[0])
        self.name = cell_name(self.kind, self.fraction)
        done = rows[rows["error"] == ""]
        # Rows of one seed that were made apart have retrained models of their own: each set of them counts once.
        names = ["floor", "untouched_gap", "test_sd", "retain_sd"]
        levels = per_seed(done.drop_duplicates(["seed", "request", *names]), names)
        self.floor, self.untouched = levels["floor"].mean(), levels["untouched_gap"].mean()
        self.sd = {split: levels[f"{split}_sd"].mean() for split in ("test", "retain")}
        self.power = bool(self.untouched >= POWER * self.floor)
        self.arms = {arm: own for arm, own in done.groupby("arm", sort=False)}
        self.n = done["n_forget"].mean()

    def mean(self, arm: str, column: str, seeds: Iterable[int] | None = None) -> float:
        """Mean of a column over the seeds, all of the arm's or those given."""
        values = self.values(arm, column)
        return float((values if seeds is None else values[values.index.isin(list(seeds))]).mean())

    def values(self, arm: str, column: str) -> pd.Series:
        """A column for each seed."""
        return per_seed(self.arms[arm], [column])[column]

    def methods(self) -> list[str]:
        """Arms that are neither the untouched original nor retraining itself, nearest to retraining first."""
        own = [arm for arm, rows in self.arms.items() if rows["method"].iloc[0] not in (NOTHING, EXACT)]
        return sorted(own, key=lambda arm: self.mean(arm, "gap"))

    def worse_than_nothing(self, arm: str) -> bool:
        """Whether an arm is further from retraining than the untouched original, beyond the seeds' spread."""
        difference = self.values(arm, "gap") - self.values(arm, "untouched_gap")
        return interval(difference)[1] > 0

    def seeds_of(self, arm: str) -> set[int]:
        """The seeds on which an arm has a gap: a single image, say, has accuracy but no AUROC."""
        return set(self.values(arm, "gap").dropna().index)

    def is_near(self, arm: str) -> bool:
        """Whether an arm's gap is within some floors, those of the retrained models that it was compared with."""
        return self.mean(arm, "gap") <= NEAR * self.mean(arm, "floor")

    def harms(self, arm: str) -> list[str]:
        """Figures that are below the retrained models' by more than their standard deviation, and than is shown."""
        return [
            figure
            for figure in ("retain", "test", "retain_auroc", "test_auroc")
            if self.mean(arm, f"{figure}_change") < -max(self.mean(arm, f"{figure}_sd"), SHOWN)
        ]

    def table(self) -> list[list[str]]:
        """Lines of the cell's table, nearest to retraining first."""
        lines = []
        for arm in sorted(self.arms, key=lambda arm: self.mean(arm, "gap")):
            rows = self.arms[arm]
            tuned = self.mean(arm, "share_with_tuning"), self.mean(arm, "share")
            share = f"{number(100 * tuned[0], 0)} %"
            if tuned[0] > tuned[1]:
                share += f" ({number(100 * tuned[1], 0)} % without search and judging)"
            lines.append(
                [
                    arm,
                    str(len(self.seeds_of(arm))),
                    with_interval(self.values(arm, "gap")),
                    number(self.mean(arm, "excess")),
                    *(with_interval(self.values(arm, f"{s}_change"), sign=True) for s in ("forget", "retain", "test")),
                    with_interval(self.values(arm, "population_attack_difference"), 3, sign=True),
                    verdicts(rows),
                    share,
                ]
            )
        return lines


def verdicts(rows: pd.DataFrame) -> str:
    """How often each verdict was given."""
    told = [
        f"{answer} ({direction})" if isinstance(direction, str) and direction else answer
        for answer, direction in zip(rows["verdict"], rows["direction"])
        if isinstance(answer, str)
    ]
    return ", ".join(f"{told.count(one)} × {one}" for one in dict.fromkeys(sorted(told))) or "–"


def counted(answers: dict[str, list[bool]]) -> str:
    """``a on 2 of 3, b on 1 of 1``, those of most forget sets first; those on none are left out."""
    found = sorted(((sum(own), arm) for arm, own in answers.items() if any(own)), key=lambda pair: (-pair[0], pair[1]))
    return ", ".join(f"{arm} on {n} of {len(answers[arm])}" for n, arm in found) or "none"


class Data:
    """All that the table has of one data set, and what the page says of it."""

    def __init__(self, name: str, rows: pd.DataFrame) -> None:
        self.name, self.rows = name, rows
        self.slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        done = rows[rows["error"] == ""]
        groups = [group for _, group in done.groupby(["kind", "fraction"], dropna=False)]
        order = list(dict.fromkeys(rows["kind"]))
        self.cells = sorted((Cell(group) for group in groups), key=lambda cell: (order.index(cell.kind), cell.fraction))
        self.powered = [cell for cell in self.cells if cell.power]
        self.powerless = [cell for cell in self.cells if not cell.power]
        self.failures = rows[rows["error"] != ""]
        self.figure = "AUROC" if (done["task"] == "multi-label").any() else "accuracy"
        seeds = done.groupby("arm")["seed"].nunique()
        known = {arm for cell in self.cells for arm in cell.methods()}
        enough = {arm for arm in known if seeds[arm] >= SEEDS}
        self.answered = enough or known  # a study of one or two seeds is not left without a word
        self.unanswered = sorted(known - self.answered)

    def facts(self) -> str:
        """On what the figures were made."""
        done = self.rows[self.rows["error"] == ""]
        commits = ", ".join(f"`{commit}`" for commit in sorted(set(done["commit"])))
        devices = ", ".join(sorted(set(done["device"].dropna())))
        shared = self._shared_settings()
        settings = f" Settings that differ from the shipped ones: {shared}." if shared else ""
        return (
            f"{len(done)} runs, seeds {', '.join(map(str, sorted(set(done['seed']))))}; {devices}; "
            f"code {commits}.{settings}"
        )

    def _shared_settings(self) -> str:
        options = [json.loads(text) for text in self.rows["options"] if isinstance(text, str) and text]
        keys = sorted(set().union(*options)) if options else []
        same = [key for key in keys if len({json.dumps(one.get(key)) for one in options if key in one}) == 1]
        values = {key: next(one[key] for one in options if key in one) for key in same}
        return ", ".join(f"`{key}` {json.dumps(value)}" for key, value in values.items())

    def effectiveness(self) -> list[str]:
        """Which methods come near to retraining."""
        if not self.powered:
            return [f"No forget set of {self.name} has power: nothing is said of its methods' effect."]
        first: dict[str, list[bool]] = {}
        near: dict[str, list[bool]] = {}
        worse: dict[str, list[bool]] = {}
        for cell in self.powered:
            for place, arm in enumerate(self._methods([cell])):
                first.setdefault(arm, []).append(place == 0)
                near.setdefault(arm, []).append(cell.is_near(arm))
                worse.setdefault(arm, []).append(cell.worse_than_nothing(arm))
        numbers = sorted({len(self._methods([cell])) for cell in self.powered})
        methods = " to ".join(dict.fromkeys((str(numbers[0]), str(numbers[-1]))))
        return [
            f"Nearest to retraining of the {methods} methods on a forget set: {counted(first)}.",
            f"Within {NEAR} noise floors of retraining: {counted(near)}.",
            f"Further from retraining than the untouched original, beyond the seeds' spread: {counted(worse)}.",
        ]

    def size(self) -> list[list[str]]:
        """For each method its test figure on random forget sets of each size, the trend, and where it harms."""
        cells = self._random()
        lines = []
        for arm in self._methods(self.cells):
            own = [cell for cell in cells if arm in cell.arms]
            changes = [self._test_changes(cell, arm) if arm in cell.arms else "–" for cell in cells]
            word = "–"
            if len(own) > 1:
                trend = own[-1].values(arm, "test_change") - own[0].values(arm, "test_change")
                mean, low, high = interval(trend)
                word = "none that these seeds show"
                if high < 0:
                    word = f"falls by {number(-mean)} from the smallest to the largest"
                elif low > 0:
                    word = f"rises by {number(mean)} from the smallest to the largest"
            known = [cell for cell in self.cells if arm in cell.arms]
            lines.append([arm, *changes, word, f"{sum(bool(cell.harms(arm)) for cell in known)} of {len(known)}"])
        return lines

    def _test_changes(self, cell: Cell, arm: str) -> str:
        """Change of the main figure with its interval; where that is accuracy, AUROC's too."""
        said = with_interval(cell.values(arm, "test_change"), sign=True)
        if self.figure == "AUROC" or np.isnan(cell.mean(arm, "test_auroc_change")):
            return said
        return f"{said}; {number(cell.mean(arm, 'test_auroc_change'), sign=True)}"

    def size_header(self) -> list[str]:
        """Names of the columns of ``size``."""
        return ["method", *(f"{100 * cell.fraction:g} %" for cell in self._random()), "trend", "harmed on"]

    def _random(self) -> list[Cell]:
        return sorted((cell for cell in self.cells if cell.kind == "random"), key=lambda cell: cell.fraction)

    def alike(self, pair: str) -> list[list[str]]:
        """For each method, and the untouched original, on how many forget sets two strata differ, and by how much."""
        lines = []
        untouched = {arm for cell in self.cells for arm, rows in cell.arms.items() if rows["method"].iloc[0] == NOTHING}
        for arm in [*self._methods(self.cells), *sorted(untouched)]:
            parts: dict[str, list[str]] = {}
            for cell in self.cells:
                if arm not in cell.arms:
                    continue
                for split in ("forget", "test"):
                    values = cell.values(arm, f"{pair}_{split}_difference")
                    mean, low, high = interval(values)
                    floor = cell.mean(arm, f"{pair}_{split}_floor")
                    if np.isnan(mean) or np.isnan(floor):
                        continue
                    word = "within"
                    if abs(mean) > floor:
                        word = "beyond" if low > 0 or high < 0 else "not shown"
                    text = f"{cell.name}, {split} {number(mean, sign=True)}"
                    parts.setdefault(word, []).append(text)
            if parts:
                counts = [str(len(parts.get(word, ()))) for word in ("within", "not shown")]
                lines.append([arm, *counts, "; ".join(parts.get("beyond", ())) or "–"])
        return lines

    def between(self, one: str, other: str) -> list[str]:
        """Whether one kind of forget set ends further from retraining than another of the same size."""
        sentences = []
        cells = {(cell.kind, cell.fraction): cell for cell in self.cells}
        for (kind, fraction), cell in cells.items():
            second = cells.get((other, fraction))
            if kind != one or second is None:
                continue
            for arm in self._methods([cell]):
                if arm in second.arms:
                    excess = (cell.values(arm, "excess") - second.values(arm, "excess")).dropna()
                    mean, low, high = interval(excess)
                    word = "no difference that these seeds show"
                    if len(excess) < SEEDS:
                        word = f"too few seeds in common ({len(excess)}) to say anything"
                    elif low > 0 or high < 0:
                        word = f"further from retraining for {one if mean > 0 else other}"
                    sentences.append(
                        f"{arm}, {one} less {other}, {100 * fraction:g} %: excess over the floor "
                        f"{with_interval(excess, sign=True)} points: {word}."
                    )
        return sentences

    def cost(self) -> list[list[str]]:
        """What each method costs in samples, the same without tuning, and in seconds: shares of retraining's, in %."""
        lines = []
        for arm in self._methods(self.cells):
            cells = [cell for cell in self.cells if arm in cell.arms]
            share, whole = (
                100 * np.mean([cell.mean(arm, column) for cell in cells]) for column in ("share", "share_with_tuning")
            )
            seconds = 100 * np.mean([cell.mean(arm, "seconds_share_with_tuning") for cell in cells])
            lines.append([arm, str(len(cells)), number(whole, 0), number(share, 0), number(seconds, 0)])
        return lines

    def targets(self) -> list[list[str]]:
        """For each method on how many forget sets with power it holds what was asked for."""
        tuned = [arm for arm in self._methods(self.powered) if arm.startswith("saliency, tuned")]
        lines = []
        for arm in self._methods(self.powered):
            cells = [cell for cell in self.powered if arm in cell.arms]
            against = [
                cell.mean(arm, "excess", seeds) <= EXCESS * cell.mean(one, "excess", seeds)
                for one in tuned
                for cell in cells
                if one in cell.arms and (seeds := cell.seeds_of(arm) & cell.seeds_of(one))
            ]
            runs = pd.concat([cell.arms[arm] for cell in cells])
            lines.append(
                [
                    arm,
                    f"{sum(cell.is_near(arm) for cell in cells)} of {len(cells)}",
                    f"{sum(against)} of {len(against)}" if against else "–",
                    f"{sum(cell.mean(arm, 'share_with_tuning') <= CHEAP for cell in cells)} of {len(cells)}",
                    f"{sum(not cell.harms(arm) for cell in cells)} of {len(cells)}",
                    verdicts(runs),
                ]
            )
        return lines

    def _methods(self, cells: Iterable[Cell]) -> list[str]:
        """Methods of which the questions are answered; of a single forget set the nearest to retraining first."""
        cells = list(cells)
        found = list(dict.fromkeys(arm for cell in cells for arm in cell.methods() if arm in self.answered))
        return found if len(cells) == 1 else sorted(found)

    def failed(self) -> list[list[str]]:
        """Runs that failed."""
        return [
            [
                row["arm"],
                cell_name(row["kind"], float(row["fraction"])),
                str(row["seed"]),
                row["error"].replace("|", "/"),
            ]
            for _, row in self.failures.iterrows()
        ]

    def plot_size(self, folder: Path) -> str | None:
        """Test change against the share that is forgotten, for random forget sets."""
        cells = self._random()
        arms = [arm for arm in self._methods(cells) if sum(arm in cell.arms for cell in cells) > 1]
        if not arms:
            return None
        figure, axes = _axes(f"test {self.figure} less the retrained models', points", "share forgotten, %")
        places = [100 * cell.fraction for cell in cells]
        sd = np.array([cell.sd["test"] for cell in cells])
        axes.fill_between(places, -sd, sd, color="#bbbbbb", alpha=0.4, linewidth=0, label="retrained models' sd")
        axes.axhline(0, color="#333333", linewidth=0.8)
        for i, arm in enumerate(["untouched original", *arms]):
            own = [cell for cell in cells if arm in cell.arms]
            found = np.array([interval(cell.values(arm, "test_change")) for cell in own])
            if len(own):
                x = np.array([100 * cell.fraction for cell in own]) * (1 + 0.012 * (i - len(arms) / 2))
                _draw(axes, x, found, i, arm)
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
        return _save(figure, folder / f"study-size-{self.slug}.svg")

    def frontier(self) -> tuple[Cell | None, dict[str, list[tuple[float, float, float]]]]:
        """The forget set with power on which most was run; on it, for each method and its variants, points.

        Returns:
            The forget set, and by method a list of: cost with tuning (%), gap in noise floors, cost without (%). Means
            over the seeds that the variants of a method have in common, so that these compare with each other.
        """
        if not self.powered:
            return None, {}
        cell = max(self.powered, key=lambda cell: len(cell.methods()))
        variants: dict[str, list[str]] = {}
        for arm in sorted(cell.methods()):
            variants.setdefault(arm.split(",")[0] + (", tuned" if ", tuned" in arm else ""), []).append(arm)
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for name, arms in variants.items():
            seeds = set.intersection(*map(cell.seeds_of, arms))
            for arm in arms if seeds else ():
                whole, share, gap, floor = (
                    cell.mean(arm, column, seeds) for column in ("share_with_tuning", "share", "gap", "floor")
                )
                if floor > 0:
                    lines.setdefault(name, []).append((100 * whole, gap / floor, 100 * share))
        return cell, lines

    def plot_cost(self, folder: Path) -> str | None:
        """Gap against cost, variants of one method joined."""
        cell, lines = self.frontier()
        if cell is None or not lines:
            return None
        figure, axes = _axes(f"gap to retraining in noise floors ({cell.name})", "share of retraining's samples, %")
        for i, (name, points) in enumerate(lines.items()):
            whole, gap, share = np.array(sorted(points)).T
            color, marker = _style(i)
            axes.plot(whole, gap, color=color, marker=marker, markersize=5, linewidth=1, label=name)
            for x, y, before in zip(whole, gap, share):
                if before < x:  # where it stands without its tuning
                    axes.plot([before, x], [y, y], color=color, linewidth=1, linestyle=":")
                    axes.plot(before, y, color=color, marker=marker, markersize=5, fillstyle="none")
        level = {"linewidth": 0.8, "color": "#8a8a8a"}
        axes.axhline(cell.untouched / cell.floor, **level, linestyle="--", label="untouched original")
        axes.axhline(NEAR, color="#333333", linewidth=0.8, linestyle=":", label=f"{NEAR} floors")
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        return _save(figure, folder / f"study-cost-{self.slug}.svg")


def _axes(y: str, x: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(i: int) -> tuple[str, str]:
    """Colour and marker of a method, another pair for each of the first 96."""
    return COLORS[i % len(COLORS)], MARKERS[(i + 5 * (i // len(COLORS))) % len(MARKERS)]


def _draw(axes: Any, x: np.ndarray, found: np.ndarray, i: int, label: str) -> None:
    """Means with their intervals."""
    mean = found[:, 0]
    ends = np.nan_to_num(np.abs(found[:, 1:].T - mean))
    style = dict(zip(("color", "marker"), _style(i)))
    axes.errorbar(x, mean, yerr=ends, markersize=5, linewidth=1, capsize=2, label=label, **style)


def _save(figure: Figure, path: Path) -> str:
    labels = sum(len(axes.get_legend_handles_labels()[1]) for axes in figure.axes)
    figure.set_figheight(max(4, 0.19 * labels))  # room for all of the legend
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):  # the same file each time
        figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return path.name


def page(table: pd.DataFrame, csv: Path, images: Path, folder: Path) -> str:
    """The page as Markdown, with its plots written.

    Args:
        table: as ``load`` gives it.
        csv: its file.
        images: folder of the plots.
        folder: where the page will lie, from which it points to the others.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    sets = []
    for name, rows in table.groupby("data", sort=False):
        data = Data(str(name), rows)
        plots = {"size": data.plot_size(images), "cost": data.plot_cost(images)}
        sets.append((data, plots))

    def header(names: Sequence[str]) -> str:
        return f"| {' | '.join(names)} |\n" + "|---" * len(names) + "|"

    def below(path: Path) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    return environment.get_template("study.md.j2").render(
        sets=sets,
        csv=below(csv),
        images=below(images),
        doc=lambda name: below(ROOT / "docs" / name),
        number=number,
        power=POWER,
        near=NEAR,
        seeds=SEEDS,
        shown=SHOWN,
        line=lambda cells: f"| {' | '.join(cells)} |",
        cheap=round(100 * CHEAP),
        header=header,
        columns=HEADER,
    )


def add_csv(parser: argparse.ArgumentParser) -> None:
    """Add the option of the table, which has to be there."""

    def table(text: str) -> Path:
        if not Path(text).is_file():
            raise argparse.ArgumentTypeError(f"should be a study's table, but there is no {text}.")
        return Path(text)

    # As text: argparse looks at a default only then.
    parser.add_argument("--csv", type=table, default=str(ROOT / "docs" / "results" / "study.csv"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_csv(parser)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    chosen = parser.parse_args(arguments)
    chosen.page.parent.mkdir(parents=True, exist_ok=True)
    text = page(load(chosen.csv), chosen.csv, chosen.images, chosen.page.parent)
    chosen.page.write_text(text, encoding="utf-8")
    print(f"Wrote {chosen.page}")


if __name__ == "__main__":
    main()
