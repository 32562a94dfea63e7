"""Several runs on the same data: what the size of the forget set changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai_unlearn.report.results import MAIN_FIGURE

__all__ = ["forget_size_rows"]


def forget_size_rows(
    reports: Sequence[Mapping[str, Any]], this: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The rows of ``audit.forget_size``: one a report, by share of the training images to be forgotten.

    ``test_change`` is accuracy (of a multi-label task mean AUROC) on the test set, unlearned − retrained; with its
    interval where the report has an audit, and null where it has no retrained model.

    Args:
        reports: reports of earlier runs, as ``read_report`` reads them.
        this: the report of this run, if it is to be among them.

    Returns:
        Rows sorted by share, then method.

    Raises:
        ValueError: if the reports are of different data or tasks, or do not say on what data they were made.
    """
    everything = [*reports, *([] if this is None else [this])]
    for what, found in {
        "data": {report["provenance"]["data"].get("sha256") for report in everything},
        "task": {report["task"] for report in everything},
    }.items():
        if None in found and len(everything) > 1:
            raise ValueError("The reports should name their data by its hash, but some do not. Leave them out.")
        if len(found) > 1:
            raise ValueError(
                f"The reports should be of one {what}, but are of {len(found)} different ones. A curve over the size "
                "of the forget set needs runs that differ in nothing else."
            )
    rows = [_row(report, report is this) for report in everything]
    return sorted(rows, key=lambda row: (row["fraction"], row["method"]))


def _row(report: Mapping[str, Any], this: bool) -> dict[str, Any]:
    unlearned, retrained = report["models"]["unlearned"], report["models"]["retrained"]
    forget, retain = unlearned["forget"]["n"], unlearned["retain"]["n"]
    return {
        "fraction": forget / (forget + retain),
        "images": forget,
        "method": report["method"],
        "test_change": None if retrained is None else _test_change(report),
        "gap": report["gap_to_retrained"],
        "attack": unlearned["attack"]["auc"],
        "this": this,
    }


def _test_change(report: Mapping[str, Any]) -> dict[str, float | None] | None:
    figure = MAIN_FIGURE[report["task"]]
    utility = None if report["audit"] is None else report["audit"]["utility"].get("test")
    if utility is not None and (changes := utility["changes"]["retrained"]) and changes.get(figure):
        return dict(changes[figure])
    values = [report["models"][name]["test"][figure] for name in ("unlearned", "retrained")]
    if None in values:
        return None
    return {"difference": values[0] - values[1], "low": None, "high": None}
