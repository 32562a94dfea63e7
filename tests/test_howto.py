"""The how-to pages, run as they stand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)


def test_the_page_on_an_own_script_is_one_script_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    given: dict = {}
    exec("\n".join(_blocks("howto_script.md", "python")), given)
    assert "6 images of 2 patients are to be forgotten" in capsys.readouterr().out
    original = torch.load("model.pt", weights_only=True)
    unlearned = torch.load("unlearned_model.pt", weights_only=True)
    assert original.keys() == unlearned.keys() == {"model"}
    assert original["model"].keys() == unlearned["model"].keys()
    changed = [name for name, value in original["model"].items() if not torch.equal(value, unlearned["model"][name])]
    assert changed
    assert set(given["losses"]) == {"model.pt", "unlearned_model.pt"}
