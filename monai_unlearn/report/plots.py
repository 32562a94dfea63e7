"""Plots of a run's figures, as SVG text to stand in the page itself."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from monai_unlearn.report.results import MAIN_FIGURE, PHASES, SPLITS

__all__ = [
    "COLORS",
    "EDGE",
    "MARKERS",
    "WIDTH",
    "accuracy_plot",
    "cost_plot",
    "finding_plot",
    "shorten",
    "svg",
    "values",
]

# Okabe and Ito's colours, told apart by people with any colour vision, and by lightness in print.
COLORS = {"original": "#8a8a8a", "unlearned": "#d55e00", "retrained": "#0072b2"}
MARKERS = {"original": "o", "unlearned": "D", "retrained": "s"}
EDGE = "#333333"  # around bars, some of whose colours are too light for a white page
WIDTH = 5.4  # inches: the page shows a plot about this wide, and a phone not much smaller


def accuracy_plot(models: Mapping[str, Any], task: str = "multi-class", floor: float | None = None) -> str:
    """Accuracy, or mean AUROC of a multi-label task, of each model on each split, as grouped bars.

    Args:
        models: as in the report, those that there are.
        task: the task.
        floor: noise floor in percentage points: a band of this width about the retrained model's figure.
    """
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(models)
    for i, (name, model) in enumerate(models.items()):
        heights = values(model[split][MAIN_FIGURE[task]] for split in SPLITS) * 100
        places = np.arange(len(SPLITS)) + (i - (len(models) - 1) / 2) * width
        bars = axes.bar(places, heights, width * 0.92, color=COLORS[name], edgecolor=EDGE, linewidth=0.5, label=name)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # the dotted line should not strike it out
        axes.bar_label(bars, fmt="%.0f", fontsize=9, padding=2, bbox=box)
        if name == "retrained":
            ends = np.arange(len(SPLITS))[:, None] + np.array([-0.45, 0.45])
            for height, (left, right) in zip(heights, ends):
                axes.hlines(height, left, right, color=EDGE, linewidth=1, linestyle=":")
                if floor is not None:
                    axes.fill_between(
                        [left, right], height - floor, height + floor, color=COLORS[name], alpha=0.25, linewidth=0
                    )
    axes.set_xticks(range(len(SPLITS)), list(SPLITS))
    axes.set_ylabel("accuracy in %" if task == "multi-class" else "mean AUROC in %")
    axes.set_ylim(0, 112)
    figure.legend(loc="outside upper center", ncols=len(models), frameon=False)
    return svg("accuracy", figure, axes)


def finding_plot(models: Mapping[str, Any]) -> str:
    """AUROC of each finding on the test set: a row for each finding, a dot for each model."""
    findings = list(models["original"]["test"]["auroc_per_finding"])
    figure = Figure(figsize=(WIDTH, 1 + 0.3 * len(findings)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(findings))
    for name, model in models.items():
        aurocs = values(model["test"]["auroc_per_finding"][finding] for finding in findings) * 100
        axes.scatter(aurocs, rows, s=42, marker=MARKERS[name], color=COLORS[name], alpha=0.85, label=name, zorder=3)
    axes.set_yticks(rows, [shorten(finding) for finding in findings], parse_math=False)
    axes.set_ylim(len(findings) - 0.4, -0.6)
    axes.grid(axis="y", color="#e3e3e3")
    axes.axvline(50, color="#767676", linewidth=1, linestyle=":")
    axes.set_xlabel("AUROC on the test set in % (dotted: chance)")
    figure.legend(loc="outside upper center", ncols=len(models), frameon=False)
    return svg("finding", figure, axes)


def cost_plot(cost: Mapping[str, Any]) -> str:
    """Seconds of unlearning beside those of retraining, and those of evaluation and caching apart."""
    figure = Figure(figsize=(WIDTH, 2.2), layout="constrained")
    axes = figure.subplots()
    colors = dict(zip(PHASES, ("#e69f00", "#cc79a7", "#d55e00", "#0072b2", "#8a8a8a", "#d9d9d9")))
    bars = {"retrain": "retraining", "evaluation": "apart", "caching": "apart"}
    starts: dict[str, float] = {}
    for phase in PHASES:
        seconds = cost[phase]["seconds"] if cost[phase] is not None else 0
        if seconds:
            bar = bars.get(phase, "unlearning")
            axes.barh(
                bar,
                seconds,
                left=starts.get(bar, 0),
                color=colors[phase],
                edgecolor=EDGE,
                linewidth=0.5,
                label=f"{phase} {seconds:,.1f} s",
            )
            starts[bar] = starts.get(bar, 0) + seconds
    axes.set_xlabel("seconds")
    axes.invert_yaxis()
    if starts:
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return svg("cost", figure, axes)


def values(numbers: Sequence[float | None] | Any) -> np.ndarray:
    """Numbers as an array, NaN for what is undefined."""
    return np.array([np.nan if number is None else number for number in numbers], dtype=float)


def shorten(name: str, length: int = 28) -> str:
    """A name that leaves a plot some room."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def svg(name: str, figure: Figure, *panels: Axes) -> str:
    """A figure as the text of an SVG element.

    Args:
        name: stands in its ids, since several plots stand in one page.
        figure: the figure.
        panels: axes to be drawn without their upper and right side.
    """
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    with rc_context({"svg.hashsalt": name}):  # the same ids each time
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    content = text.getvalue()
    # Fixed size in points makes way for the page's width; the page gives each plot its text alternative.
    content = content[content.index("<svg") :]
    content = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", content)
    head, rest = content.split(">", 1)
    head = " ".join(part for part in head.split() if not part.startswith(("width=", "height=")))
    return f'{head} aria-hidden="true">{rest}'
