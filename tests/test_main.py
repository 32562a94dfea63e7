"""``python -m monai_unlearn``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bundle_runs import CONFIGS
from site_of_runs import OURS, OWN, change_report, everything, make_site, read_report, save_network

from monai_unlearn.__main__ import main
from monai_unlearn.cost import Cost
from monai_unlearn.report import build_report, validate_report


def test_the_module_prints_where_a_bundle_lies_from_any_directory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "monai_unlearn", "path", "saliency"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = Path(done.stdout.removesuffix("\n"))
    assert printed.is_absolute()
    assert printed.is_file()
    assert printed.name == "saliency.json"


@pytest.mark.parametrize("name", CONFIGS)
def test_path_prints_the_file_of_each_bundle_and_nothing_else(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["path", name]) == 0
    printed = capsys.readouterr()
    assert Path(printed.out.removesuffix("\n")).is_file()
    assert printed.out.count("\n") == 1
    assert printed.err == ""


@pytest.mark.parametrize(("name", "nearest"), [("salincy", "saliency"), ("re-train", "retrain"), ("tran", "train")])
def test_an_unknown_name_exits_2_with_the_nearest_one(
    name: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["path", name]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"There is no bundle {name!r}. Did you mean {nearest!r}?" in printed.err


@pytest.mark.parametrize("name", ["metadata", "generate", "logging", "../bundles/saliency", "saliency.json", ""])
def test_what_is_no_bundle_is_not_printed_though_a_file_may_be_there(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["path", name]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(known in printed.err.split("There are:")[1] for known in CONFIGS)
    assert "metadata" not in printed.err.split("There are:")[1]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--help"], "path"),
        (["--help"], "finalise"),
        (["path", "--help"], "run unlearn"),
        (["finalise", "--help"], "--output_dir"),
        (["finalise", "--help"], "--dry_run"),
        (["finalise", "--help"], "no way back"),
    ],
)
def test_help_says_what_the_command_is_for(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert word in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["path"],
        ["path", "saliency", "more"],
        ["finalise"],
        ["finalise", "one", "two"],
        ["finalise", "runs/saliency", "--dry-run"],  # misspelt, so that nothing may go
        ["finalise", "runs/saliency", "--dry_run", "true"],
    ],
)
def test_a_wrong_command_exits_2_and_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m monai_unlearn" in capsys.readouterr().err


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What runs leave, with a report as a run writes it."""
    monkeypatch.chdir(tmp_path)
    save_network(Path("theirs/model.pt"))
    make_site(tmp_path)
    old = read_report()
    theirs = {"what": "original checkpoint", "path": "theirs/model.pt", "ours": False, "holds": "weights"}
    splits = ("forget", "retain", "validation", "test")
    model = {split: {"accuracy": 0.5, "auroc": 0.5, "loss": 1.0, "n": 40} for split in splits}
    models = {name: {**model, "attack": {"auc": 0.5, "low": 0.4, "high": 0.6}} for name in ("original", "unlearned")}
    report = build_report(
        "saliency",
        old["settings"],
        models,
        {phase: Cost(1.0, 2, 3, 4, 5) for phase in ("mask", "tuning", "unlearn")},
        {
            "original_checkpoint": "theirs/model.pt",
            "data": {"name": "cells", "sha256": None},
            "versions": {"python": "3.11"},
            "machine": {"device": "a processor", "cores": 2},
            "retrained_on": None,
            "seeds": {"split": 0, "unlearning": 0, "retrained": None},
            "hashes": {**old["provenance"]["hashes"], "retrained": None, "split": "ab" * 32},
        },
        left=[*old["left"], theirs],
    )
    validate_report(report)
    change_report(**report)
    return tmp_path


def test_finalise_removes_ours_and_writes_report_and_page_anew(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finalise", str(OWN)]) == 0
    printed = capsys.readouterr()
    assert not any((site / path).exists() for path in OURS)
    assert Path("theirs/model.pt").is_file()
    assert "theirs/model.pt" in printed.out
    assert "you have to decide" in printed.out
    assert printed.err == ""
    page = (OWN / "report.html").read_text(encoding="utf-8")
    assert "theirs/model.pt" in page
    assert not any(path in page for path in OURS)
    assert main(["finalise", str(OWN)]) == 0
    assert "Nothing of ours is left." in capsys.readouterr().out


def test_a_finalised_report_follows_the_schema(site: Path) -> None:
    assert main(["finalise", str(OWN)]) == 0
    validate_report(read_report())


def test_finalise_dry_runs(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(site)
    assert main(["finalise", str(OWN), "--dry_run"]) == 0
    assert everything(site) == before
    assert all(path in capsys.readouterr().out for path in OURS[:1])


def test_finalise_exits_2_where_something_of_ours_stays(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (OWN / "private" / "notes.txt").write_text("somebody's")
    assert main(["finalise", str(OWN)]) == 2
    assert f"{OWN / 'private'} stays" in capsys.readouterr().out
    assert (OWN / "private" / "notes.txt").is_file()


@pytest.mark.parametrize("run", ["nowhere", "theirs", "theirs/model.pt"])
def test_finalise_exits_2_with_one_line_where_there_is_no_run(
    run: str, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(site)
    assert main(["finalise", run]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("monai_unlearn: RUN should be the folder of a run")
    assert printed.err.count("\n") == 1
    assert everything(site) == before
