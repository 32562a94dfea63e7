"""Plots of the audit's figures, as SVG text to stand in the page itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from monai_unlearn.report.plots import COLORS, EDGE, MARKERS, WIDTH, shorten, svg, values

__all__ = [
    "attack_plot",
    "curve_plot",
    "distance_plot",
    "group_plot",
    "reliability_plot",
    "roc_plot",
    "score_plot",
]

CHANCE: dict[str, Any] = {"color": "#767676", "linewidth": 1, "linestyle": ":"}


def score_plot(histogram: Mapping[str, Any], task: str) -> str:
    """Distribution of the score of forget and of unseen images, a panel for each model.

    Args:
        histogram: ``edges``, and ``models`` → ``forget`` and ``unseen`` → share of the images in each bin.
        task: the task.
    """
    edges = values(histogram["edges"])
    models = {name: parts for name, parts in histogram["models"].items() if parts is not None}
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    panels = figure.subplots(1, max(len(models), 1), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, parts) in zip(panels, models.items()):
        axes.stairs(100 * values(parts["forget"]), edges, fill=True, color=COLORS[name], alpha=0.55)
        axes.stairs(100 * values(parts["unseen"]), edges, color=EDGE, linewidth=1.6)
        axes.set_title(name, fontsize=11)
    panels[0].set_ylabel("% of images")
    score = "log-odds of the true class" if task == "multi-class" else "mean log-odds of the true findings"
    figure.supxlabel(f"score ({score})", fontsize=10)
    handles = [Line2D([], [], color=EDGE, linewidth=1.6), Patch(color="#b0b0b0")]
    names = ["never seen (outline)", "to be forgotten (filled)"]
    figure.legend(handles, names, loc="outside upper center", ncols=2, frameon=False)
    return svg("score", figure, *panels)


def roc_plot(curves: Mapping[str, Any]) -> str:
    """ROC of the population attack, both axes logarithmic, so that low false positive rates can be seen.

    Args:
        curves: model → ``fpr`` and ``tpr``.
    """
    figure = Figure(figsize=(WIDTH, 4), layout="constrained")
    axes = figure.subplots()
    points = {name: (values(curve["fpr"]), values(curve["tpr"])) for name, curve in curves.items() if curve is not None}
    rates = np.concatenate([fpr for fpr, _ in points.values()]) if points else np.ones(1)
    lowest = 10.0 ** np.floor(np.log10(np.min(rates, where=rates > 0, initial=0.1)))
    for name, (fpr, tpr) in points.items():
        seen = (fpr > 0) & (tpr > 0)
        axes.plot(fpr[seen], tpr[seen], color=COLORS[name], linewidth=1.8, linestyle=_line(name), label=name)
    axes.plot([lowest, 1], [lowest, 1], label="guessing", **CHANCE)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(lowest, 1)
    axes.set_ylim(lowest, 1.05)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(color="#e3e3e3")
    axes.set_xlabel("false positive rate (unseen images taken for the others)")
    axes.set_ylabel("true positive rate")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return svg("roc", figure, axes)


def attack_plot(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """AUC of each attack on each model with its interval, as a forest.

    Args:
        rows: attack → model → ``auc``, ``low``, ``high``; a model that has none is None.
    """
    figure = Figure(figsize=(WIDTH, 1.2 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, model in enumerate(COLORS):
        attacks = [models.get(model) for models in rows.values()]
        if any(attack is not None for attack in attacks):
            _intervals(
                axes,
                [{} if attack is None else {**attack, "difference": attack["auc"]} for attack in attacks],
                np.arange(len(rows)) + 0.22 * (i - 1),
                model,
            )
    axes.axvline(0.5, **CHANCE)
    _rows(axes, list(rows))
    axes.set_xlabel("AUC with 95 % interval (dotted: guessing)")
    _legend(figure, axes)
    return svg("attack", figure, axes)


def group_plot(name: str, groups: Mapping[str, Mapping[str, Any]], against: str) -> str:
    """Change of accuracy in each group, on images to be forgotten and on new ones, as a forest of two panels.

    Args:
        name: of the plot, for its ids.
        groups: group → split → ``change`` → ``against`` → ``difference``, ``low``, ``high``.
        against: the model that the unlearned one is compared with.
    """
    figure = Figure(figsize=(WIDTH, 1.3 + 0.32 * len(groups)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, split, title in zip(panels, ("forget", "test"), ("images to be forgotten", "new images (test)")):
        changes = [(parts.get(split) or {}).get("change", {}).get(against) or {} for parts in groups.values()]
        _intervals(axes, changes, np.arange(len(groups)), "unlearned", scale=100)
        axes.axvline(0, **CHANCE)
        axes.set_title(title, fontsize=11)
        _rows(axes, list(groups))
    figure.supxlabel(f"accuracy: unlearned − {against}, in points, with 95 % interval", fontsize=10)
    return svg(name, figure, *panels)


def reliability_plot(models: Mapping[str, Any], task: str = "multi-class") -> str:
    """How often each model is right against how sure it is; of findings how often they are there.

    Args:
        models: model → ``confidence`` and ``accuracy`` of each bin, None where it is empty.
        task: the task.
    """
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], label="as sure as right", **CHANCE)
    for name, model in models.items():
        if model is not None:
            sure, right = 100 * values(model["confidence"]), 100 * values(model["accuracy"])
            known = ~np.isnan(sure) & ~np.isnan(right)
            axes.plot(
                sure[known],
                right[known],
                color=COLORS[name],
                marker=MARKERS[name],
                markersize=5,
                linestyle=_line(name),
                label=name,
            )
    axes.set_xlim(0, 101)
    axes.set_ylim(0, 101)
    multi_label = task == "multi-label"
    axes.set_xlabel(
        "probability that the model gives a finding, in %" if multi_label else "how sure the model is, in %"
    )
    axes.set_ylabel("how often it is there, in %" if multi_label else "how often it is right, in %")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return svg("reliability", figure, axes)


def distance_plot(distance: Mapping[str, Any]) -> str:
    """Average gap and Jensen-Shannon divergence to the retrained model, with the noise floor of each.

    Args:
        distance: ``average_gap`` and ``splits`` of the audit.
    """
    figure = Figure(figsize=(WIDTH, 3), layout="constrained")
    panels = figure.subplots(1, 2, width_ratios=(1, 2.4))
    splits = {name: part["js_divergence"] for name, part in distance["splits"].items()}
    columns = ({"average gap": distance["average_gap"]}, splits)
    for axes, bars, label in zip(panels, columns, ("percentage points", "JS divergence")):
        for i, name in enumerate(("original", "unlearned")):
            heights = values(part[name] for part in bars.values())
            places = np.arange(len(bars)) + (i - 0.5) * 0.4
            axes.bar(places, heights, 0.36, color=COLORS[name], edgecolor=EDGE, linewidth=0.5, label=name)
        floors = values(part["floor"] for part in bars.values())
        for place, floor in enumerate(floors):
            if not np.isnan(floor):
                axes.hlines(floor, place - 0.45, place + 0.45, color=COLORS["retrained"], linewidth=2.2)
        axes.set_xticks(range(len(bars)), list(bars))
        axes.set_ylabel(label)
    handles: list[Artist] = [Patch(facecolor=COLORS[name], edgecolor=EDGE) for name in ("original", "unlearned")]
    names = ["original", "unlearned"]
    if any(part["floor"] is not None for bars in columns for part in bars.values()):
        handles.append(Line2D([], [], color=COLORS["retrained"], linewidth=2.2))
        names.append("noise floor")
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    return svg("distance", figure, *panels)


def curve_plot(rows: Sequence[Mapping[str, Any]], figure_name: str) -> str:
    """Change on new images and gap to the retrained model against the size of the forget set, a line a method.

    Args:
        rows: as ``forget_size_rows`` makes them.
        figure_name: of the figure whose change is shown, for the axis.
    """
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    panels = figure.subplots(1, 2)
    colors = (COLORS["unlearned"], COLORS["retrained"], "#009e73", "#cc79a7", "#8a8a8a", "#e69f00")
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = [row for row in rows if row["method"] == method]
        sizes = 100 * values(row["fraction"] for row in own)
        changes = [row["test_change"] or {} for row in own]
        for axes, heights in zip(
            panels,
            (100 * values(change.get("difference") for change in changes), values(row["gap"] for row in own)),
        ):
            axes.plot(
                sizes,
                heights,
                color=colors[i % len(colors)],
                marker="oDs^vP"[i % 6],
                linestyle=("-", "--", "-.", ":")[i % 4],
                label=shorten(method.replace("_", " "), 18),
            )
            this = np.array([bool(row["this"]) for row in own])
            axes.plot(sizes[this], heights[this], "o", markersize=13, markerfacecolor="none", markeredgecolor=EDGE)
        low, high = (100 * values(change.get(end) for change in changes) for end in ("low", "high"))
        panels[0].vlines(sizes, low, high, color=colors[i % len(colors)], linewidth=1.2)
    panels[0].axhline(0, **CHANCE)
    panels[0].set_ylabel(f"{figure_name} on the test set:\nunlearned − retrained, in points")
    panels[1].set_ylabel("average gap in points")
    figure.supxlabel("share of the training images to be forgotten, in %", fontsize=10)
    handles, names = panels[0].get_legend_handles_labels()
    handles.append(Line2D([], [], linestyle="", marker="o", markersize=11, markerfacecolor="none", color=EDGE))
    figure.legend(handles, [*names, "this run"], loc="outside upper center", ncols=3, frameon=False)
    return svg("curve", figure, *panels)


def _intervals(axes: Axes, rows: Sequence[Mapping[str, Any]], places: np.ndarray, model: str, scale: float = 1) -> None:
    """A marker for each row's difference and a line for its interval."""
    centres, low, high = (scale * values(row.get(name) for row in rows) for name in ("difference", "low", "high"))
    axes.hlines(places, low, high, color=COLORS[model], linewidth=1.8)
    axes.scatter(centres, places, s=34, marker=MARKERS[model], color=COLORS[model], zorder=3, label=model)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [shorten(name) for name in names], parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", color="#ececec")
    axes.set_axisbelow(True)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)


def _line(model: str) -> str:
    return {"original": ":", "unlearned": "-"}.get(model, "--")
