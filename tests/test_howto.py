"""The how-to pages, run as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bundle_runs import files_below
from zoo_bundles import IMAGES, train, write_bundle, write_images

from monai_unlearn.bundle import bundle_path

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


def _in_a_shell(commands: str, folder: Path) -> str:
    """Run commands of a page in a folder, ``python`` being this one; returns what they print."""
    (folder / "bin").mkdir(exist_ok=True)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "-e", "-c", commands],
        cwd=folder,
        env={**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_the_page_on_a_zoo_bundle_runs_and_leaves_the_bundle_as_it_was(tmp_path: Path) -> None:
    """Both doors, then the bundle's own evaluation and inference with the result."""
    write_images(tmp_path / "images")
    theirs = tmp_path / "their_bundle"
    train(write_bundle(theirs, tmp_path / "images"))
    before = files_below(theirs)
    (tmp_path / "request.json").write_text(*_blocks("howto_zoo_bundle.md", "json"), encoding="utf-8")
    overlay, second, own = _blocks("howto_zoo_bundle.md", "bash")

    printed = _in_a_shell(overlay, tmp_path)
    assert "Wrote runs/unlearned/unlearned_model.pt" in printed, "though the bundle has no logging.conf"
    assert "Engine run" not in printed
    report = json.loads((tmp_path / "runs" / "unlearned" / "report.json").read_text(encoding="utf-8"))
    assert (report["request"]["patients"], report["request"]["images"]) == (2, 2 * IMAGES)
    assert report["request"]["reference"] == "case 12"

    printed += _in_a_shell(second, tmp_path)
    again = json.loads((tmp_path / "runs" / "unlearned" / "report.json").read_text(encoding="utf-8"))
    assert again["models"]["retrained"] is not None
    assert again["provenance"]["hashes"]["unlearned"] == report["provenance"]["hashes"]["unlearned"]
    assert (tmp_path / "runs" / "unlearned.1" / "report.json").is_file()

    assert printed.count("Wrote runs/unlearned/unlearned_model.pt") == 2
    assert "Zoo-0" not in printed
    _in_a_shell(own, tmp_path)
    assert files_below(theirs) == before


def test_the_page_on_a_zoo_bundle_has_every_setting_and_its_default() -> None:
    page = (DOCS / "howto_zoo_bundle.md").read_text(encoding="utf-8")
    table = page.split("## Settings")[1].split("## Limits")[0]
    rows = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`|none) \|", table, re.M)
    shipped = json.loads(bundle_path("overlay").read_text(encoding="utf-8"))["unlearning"]
    written = {key: "" if value is None else str(value).replace("False", "false") for key, value in shipped.items()}
    assert dict(rows) == written
