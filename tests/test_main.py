"""``python -m monai_unlearn``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bundle_runs import CONFIGS

from monai_unlearn.__main__ import main


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


@pytest.mark.parametrize(("arguments", "word"), [(["--help"], "path"), (["path", "--help"], "run unlearn")])
def test_help_says_what_the_command_is_for(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert word in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["path"], ["path", "saliency", "more"]])
def test_a_wrong_command_exits_2_and_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m monai_unlearn" in capsys.readouterr().err
