"""Plots of the report, as SVG text to stand in the page itself."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from monai_unlearn.report.results import MAIN_FIGURE, SPLITS

__all__ = ["accuracy_plot", "cost_plot", "finding_plot", "score_plot"]

# Okabe and Ito's colours, told apart by people with any colour vision, and by lightness in print.
COLORS = {"original": "#8a8a8a", "unlearned": "#d55e00", "retrained": "#0072b2"}


def accuracy_plot(models: Mapping[str, Any], task: str = "multi-class") -> str:
    """Accuracy, or mean AUROC of a multi-label task, of each model on each split, as grouped bars."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(models)
    for i, (name, model) in enumerate(models.items()):
        heights = [_percentage(model[split][MAIN_FIGURE[task]]) for split in SPLITS]
        places = np.arange(len(SPLITS)) + (i - (len(models) - 1) / 2) * width
        bars = axes.bar(places, heights, width * 0.92, color=COLORS[name], label=f"{name} model")
        axes.bar_label(bars, fmt="%.0f", fontsize=9)
    axes.set_xticks(range(len(SPLITS)), [f"{split} set" for split in SPLITS])
    axes.set_ylabel("accuracy in %" if task == "multi-class" else "mean AUROC in %")
    axes.set_ylim(0, 112)
    axes.legend(ncols=len(models), loc="upper center", bbox_to_anchor=(0.5, 1.16), frameon=False)
    return _svg("accuracy", figure, axes)


def finding_plot(models: Mapping[str, Any]) -> str:
    """AUROC of each finding on the test set: a row for each finding, a dot for each model."""
    findings = list(models["original"]["test"]["auroc_per_finding"])
    figure = Figure(figsize=(8, 1 + 0.3 * len(findings)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(findings))
    for (name, model), marker in zip(models.items(), "oDs"):
        values = [_percentage(model["test"]["auroc_per_finding"][finding]) for finding in findings]
        axes.scatter(values, rows, s=42, marker=marker, color=COLORS[name], alpha=0.85, label=f"{name} model", zorder=3)
    names = [finding if len(finding) <= 32 else f"{finding[:31]}…" for finding in findings]
    axes.set_yticks(rows, names, parse_math=False)
    axes.set_ylim(len(findings) - 0.4, -0.6)
    axes.grid(axis="y", color="#e3e3e3")
    axes.axvline(50, color="#b0b0b0", linewidth=1, linestyle=":")
    axes.set_xlabel("AUROC on the test set in % (dotted: chance)")
    figure.legend(loc="outside upper center", ncols=len(models), frameon=False)
    return _svg("finding", figure, axes)


def score_plot(scores: Mapping[str, Mapping[str, np.ndarray]], task: str = "multi-class") -> str:
    """Distribution of the per-sample score of forget and of unseen images, a panel for each model.

    Images without a score (NaN) are left out.
    """
    scores = {
        name: {part: values[~np.isnan(values)] for part, values in parts.items()} for name, parts in scores.items()
    }
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    panels = figure.subplots(1, len(scores), sharex=True, sharey=True, squeeze=False)[0]
    everything = np.concatenate([part for parts in scores.values() for part in parts.values()])
    low, high = np.quantile(everything, [0.005, 0.995]) if len(everything) else (0, 1)
    edges = np.linspace(low, max(high, low + 1e-9), 31)
    for axes, (name, parts) in zip(panels, scores.items()):
        for part, color in (("validation", "#4d4d4d"), ("forget", COLORS[name])):
            values = np.clip(parts[part], edges[0], edges[-1])
            axes.hist(
                values,
                edges,
                weights=np.full(len(values), 100 / max(len(values), 1)),
                histtype="step" if part == "validation" else "stepfilled",
                alpha=1 if part == "validation" else 0.55,
                linewidth=1.6,
                color=color,
            )
        axes.set_title(f"{name} model", fontsize=11)
        axes.set_xlabel(
            "score (log-odds of the true class)"
            if task == "multi-class"
            else "score (mean log-odds of the\ntrue findings)"
        )
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("% of images")
    handles = [Line2D([], [], color="#4d4d4d", linewidth=1.6), Patch(color="#b0b0b0")]
    figure.legend(
        handles,
        ["never seen (outline)", "to be forgotten (filled)"],
        loc="outside upper center",
        ncols=2,
        frameon=False,
    )
    return _svg("score", figure)


def cost_plot(cost: Mapping[str, Any]) -> str:
    """Seconds of unlearning beside those of retraining."""
    figure = Figure(figsize=(8, 1.7), layout="constrained")
    axes = figure.subplots()
    start = 0.0
    for phase, color in (("mask", "#e69f00"), ("tuning", "#cc79a7"), ("unlearn", COLORS["unlearned"])):
        seconds = cost[phase]["seconds"]
        if seconds:
            axes.barh("unlearning", seconds, left=start, color=color, label=f"{phase} {seconds:.1f} s")
        start += seconds
    if cost["retrain"] is not None:
        seconds = cost["retrain"]["seconds"]
        axes.barh("retraining", seconds, color=COLORS["retrained"], label=f"retrain {seconds:.1f} s")
    axes.set_xlabel("seconds")
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg("cost", figure, axes)


def _percentage(share: float | None) -> float:
    return float("nan") if share is None else 100 * share


def _svg(name: str, figure: Figure, axes: Axes | None = None) -> str:
    if axes is not None:
        axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    with rc_context({"svg.hashsalt": name}):  # the same ids each time
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    # Fixed size in points makes way for the page's width; the page gives each plot its text alternative.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)  # several plots stand in one page
    head, rest = svg.split(">", 1)
    head = " ".join(part for part in head.split() if not part.startswith(("width=", "height=")))
    return f'{head} aria-hidden="true">{rest}'
