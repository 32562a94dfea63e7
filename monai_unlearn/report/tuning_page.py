"""The page on a search for settings: every trial, what was chosen, and what it was chosen from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from monai_unlearn.report.html import environment
from monai_unlearn.report.plots import COLORS, EDGE, WIDTH, svg

__all__ = ["tuning_page"]

Rows = Sequence[Mapping[str, Any]]


def tuning_page(method: str, rows: Rows, notes: Sequence[str]) -> str:
    """Render the page.

    Args:
        method: the method's name.
        rows: one for the original (trial 0) and one a trial: ``trial``, ``state``, ``settings``, ``objective``,
            ``distinguishability``, ``utility_loss``, ``auc``, ``utility``, ``epochs``, ``cost``, ``on_front``,
            ``chosen``; None for what is not known.
        notes: sentences that stand first.

    Returns:
        HTML without scripts, which loads nothing.
    """
    complete = [row for row in rows if row["objective"] is not None]
    template = environment().get_template("tuning.html.j2")
    return template.render(
        method=method,
        rows=rows,
        names=list(rows[-1]["settings"]),
        notes=notes,
        plots={"front": _front_plot(complete), "history": _history_plot(complete)},
    )


def _front_plot(rows: Rows) -> str:
    """Both parts of the objective: a dot a trial, those that none betters in both joined by a line."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    front = sorted((row["utility_loss"], row["distinguishability"]) for row in rows if row["on_front"])
    if front:
        axes.plot(*zip(*front), color=EDGE, linewidth=1, linestyle=":", label="not bettered in both", zorder=1)
    _dots(axes, rows, "utility_loss", "distinguishability")
    axes.set_xlabel("loss of accuracy or AUROC against the original")
    axes.set_ylabel("|2 AUC − 1|")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return svg("front", figure, axes)


def _history_plot(rows: Rows) -> str:
    """The objective of each trial, and the smallest until then."""
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axes = figure.subplots()
    trials = [row for row in rows if row["trial"]]
    smallest = [min(row["objective"] for row in trials[: i + 1]) for i in range(len(trials))]
    if trials:
        places = [row["trial"] for row in trials]
        axes.step(places, smallest, where="post", color=EDGE, linewidth=1, linestyle=":", label="smallest so far")
    _dots(axes, rows, "trial", "objective")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trial (0: the original)")
    axes.set_ylabel("objective")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return svg("history", figure, axes)


def _dots(axes: Axes, rows: Rows, x: str, y: str) -> None:
    kinds = {
        "trial": ([r for r in rows if r["trial"] and not r["chosen"]], "o", COLORS["retrained"]),
        "original": ([r for r in rows if not r["trial"]], "s", COLORS["original"]),
        "chosen": ([r for r in rows if r["chosen"]], "D", COLORS["unlearned"]),
    }
    for name, (group, marker, color) in kinds.items():
        if group:
            across, upwards = ([row[axis] for row in group] for axis in (x, y))
            axes.scatter(
                across,
                upwards,
                marker=marker,
                s=46,
                color=color,
                edgecolor=EDGE,
                linewidth=0.5,
                label=name,
                zorder=3,
                alpha=0.85,
            )
