"""The page on a search for settings."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from monai_unlearn.report import tuning_page

COST = {"seconds": 1.25, "samples": 4321, "forward": 4321, "backward": 4000, "peak_bytes": None}


def _row(trial: int, state: str, settings: dict[str, Any], parts: tuple | None, **more: Any) -> dict[str, Any]:
    names = ("distinguishability", "utility_loss")
    figures = dict.fromkeys(("objective", *names, "auc", "low", "high", "utility"))
    if parts is not None:
        figures |= {"objective": sum(parts), **dict(zip(names, parts)), "auc": 0.61, "utility": 0.875}
    return {"trial": trial, "state": state, "settings": settings, **figures, "epochs": 2, "cost": COST} | {
        "on_front": False,
        "chosen": False,
        **more,
    }


ROWS = [
    _row(0, "original", {}, (0.22, 0.0)),
    _row(1, "complete", {"lr": 0.00123456, "mode": "<i>"}, (0.1, 0.05), on_front=True, chosen=True),
    _row(2, "failed (FloatingPointError)", {"lr": 10.0, "mode": None}, None),
    _row(3, "complete", {"lr": 0.5, "mode": "b"}, (0.3, 0.2)),
]


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_the_table_has_every_trial() -> None:
    page = _Cells()
    page.feed(tuning_page("saliency", ROWS, ["A note with <b>."]))
    header, original, first, failed, last = page.rows
    assert header[:4] == ["trial", "state", "lr", "mode"]
    assert original[:6] == ["0", "original", "–", "–", "0.220", "0.220"]
    assert first[:7] == ["1 (chosen)", "complete", "0.00123", "<i>", "0.150", "0.100", "0.050"]
    assert first[7:] == ["0.61 (too few for an interval)", "87.5", "2", "1.2", "4,321"]
    assert failed[1] == "failed (FloatingPointError)"
    assert failed[4:9] == ["–"] * 5
    assert last[0] == "3"
    assert not {"i", "b", "script", "link", "img"} & page.tags
    assert "svg" in page.tags


def test_the_same_page_each_time_and_nothing_is_loaded() -> None:
    one, other = (tuning_page("saliency", ROWS, []) for _ in range(2))
    assert one == other
    assert "http://" not in one.replace('xmlns:xlink="http://www.w3.org', "").replace('xmlns="http://www.w3.org', "")


@pytest.mark.parametrize("rows", [ROWS[:1], [ROWS[0], ROWS[2]]])
def test_a_search_without_a_complete_trial(rows: list) -> None:
    assert tuning_page("saliency", rows, []).count("<svg") == 2
