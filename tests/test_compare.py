"""The page on comparing one's own method, done as it says by somebody who has nothing but the page."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import fire
import monai.bundle
import numpy as np
import pytest
import torch
from bundle_runs import TINY, medmnist_arrays, messages
from torch.nn import functional

from monai_unlearn.bundle import Bundle
from monai_unlearn.tuning import search_space

pytest_plugins = ["bundle_runs"]
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _logging_as_before: None) -> Path:
    """Where the page's reader works."""
    (module,), (config,) = _blocks("python"), _blocks("json")
    (tmp_path / "uniform_outputs.py").write_text(module, encoding="utf-8")
    (tmp_path / "uniform_outputs.json").write_text(config, encoding="utf-8")
    for name in ("bundles", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    np.savez(tmp_path / "tiny.npz", **medmnist_arrays())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
    monkeypatch.delitem(sys.modules, "uniform_outputs", raising=False)
    return tmp_path


def _run(block: str, **options: object) -> None:
    """The bundle command of a block, with further options."""
    given = shlex.split(re.split(r"(?m)^python benchmarks", block.replace("\\\n", " "))[0])[3:]
    more = [f"--{name}={value}" for name, value in options.items()]
    fire.Fire({"run": monai.bundle.run}, [*given, *more])


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "runs" / "study" / "study.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_pages_single_run(folder: Path) -> None:
    small = {"dataset_file": "tiny.npz", **TINY}
    _run("python -m monai.bundle run train --config_file bundles/train.json", **small)
    run = next(block for block in _blocks("bash") if "run unlearn" in block)
    _run(run, **small, epochs=1, strength=2)
    report = json.loads((folder / "runs" / "uniform_outputs" / "report.json").read_text(encoding="utf-8"))
    assert report["settings"]["method"] == "uniform_outputs"
    assert report["settings"]["strength"] == 2
    assert report["models"]["retrained"] is not None


def test_a_setting_of_the_own_config_is_one_like_any_other(folder: Path) -> None:
    files = [str(ROOT / "bundles" / "finetune.json"), str(folder / "uniform_outputs.json")]
    assert Bundle.from_files(files).settings()["strength"] == 1
    assert set(search_space(Bundle.from_files(files))) == {"lr", "epochs", "strength"}
    with pytest.raises(ValueError, match="strength should be a number, but got 'much'"):
        Bundle.from_files(files, strength="much")
    with pytest.raises(ValueError, match=r"no setting 'strenght'\. Did you mean 'strength'"):
        Bundle.from_files(files, strenght=2)


WRONG_MODULES = {
    "no such class": ("", "should name a class or function that is there, but got 'uniform_outputs.UniformOutput'"),
    "no such package": ("import nowhere_to_be_found\n", "can't be imported: ModuleNotFoundError: No module named"),
    "wrong syntax": ("def f(:\n", "can't be imported: SyntaxError"),
}


@pytest.mark.parametrize("name", WRONG_MODULES)
@pytest.mark.parametrize("command", ["unlearn", "study"])
def test_a_module_that_can_not_be_used_is_told_before_any_training(folder: Path, name: str, command: str) -> None:
    before, message = WRONG_MODULES[name]
    module, config = folder / "uniform_outputs.py", folder / "uniform_outputs.json"
    module.write_text(before + module.read_text(encoding="utf-8"), encoding="utf-8")
    if not before:
        config.write_text(config.read_text(encoding="utf-8").replace("UniformOutputs", "UniformOutput"))
    block = next(block for block in _blocks("bash") if f"run {command}" in block)
    given = {"dataset_file": "tiny.npz"}
    with pytest.raises((ValueError, RuntimeError)) as caught:
        _run(block, **(given if command == "unlearn" else {"options": given}))
    assert message in messages(caught.value)
    assert not list(folder.rglob("model.pt"))


def test_a_shipped_name_for_another_method_is_refused(folder: Path) -> None:
    own = folder / "mine" / "gradient_ascent.json"
    own.parent.mkdir()
    own.write_text((folder / "uniform_outputs.json").read_text(encoding="utf-8"), encoding="utf-8")
    study = "python -m monai.bundle run study --config_file bundles/study.json"
    with pytest.raises((ValueError, RuntimeError)) as caught:
        _run(study, methods=["finetune", ["finetune", str(own)]], options={"dataset_file": "tiny.npz"})
    assert "'gradient_ascent' is taken. Rename the config file" in messages(caught.value)


@pytest.mark.slow
def test_the_pages_study_has_a_row_of_the_own_method_and_a_new_one_after_a_change(folder: Path) -> None:
    study = next(block for block in _blocks("bash") if "run study" in block)
    small = {**TINY, "train_epochs": 2, "epochs": 1, "dataset_file": "tiny.npz", "budget": 4}
    more = {"options": small, "reference_models": 2, "commit": "one", "seeds": "[0]", "workers": 1}
    _run(study, **more)
    rows = _rows(folder)
    assert sorted(row["method"] for row in rows) == ["auto", "finetune", "nothing", "uniform_outputs"]
    assert [row["error"] for row in rows] == [""] * 4
    (own,) = [row for row in rows if row["method"] == "uniform_outputs"]
    assert json.loads(own["settings"])["strength"] == 1
    assert float(own["gap"]) >= 0
    assert float(own["share"]) > 0

    module = folder / "uniform_outputs.py"
    module.write_text(module.read_text(encoding="utf-8").replace("0, but", "zero, but"), encoding="utf-8")
    _run(study, **more)
    again = _rows(folder)
    assert again[:4] == rows
    assert [row["method"] for row in again[4:]] == ["uniform_outputs"]
    assert again[4]["key"] != own["key"]

    page = study[study.index("python benchmarks") :].replace("python ", f"{sys.executable} ", 1)
    subprocess.run(["bash", "-e", "-c", page], cwd=folder, check=True)
    assert "uniform outputs" in (folder / "runs" / "study" / "results.md").read_text(encoding="utf-8")


def test_the_pages_loss(folder: Path) -> None:
    """A step's loss by hand: cross entropy on retain rows, the mean of -log p over the classes on forget rows."""
    from uniform_outputs import UniformOutputs, distance_to_uniform

    logits = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = torch.softmax(logits, 1)
    by_hand = torch.stack([-sum(torch.log(p) for p in row) / 3 for row in shares])
    torch.testing.assert_close(distance_to_uniform(logits), by_hand)
    torch.testing.assert_close(
        distance_to_uniform(logits),
        functional.cross_entropy(logits, torch.full((5, 3), 1 / 3, dtype=torch.float64), reduction="none"),
    )
    with pytest.raises(ValueError, match="strength should be at least 0, but got nan"):
        UniformOutputs(None, strength=float("nan"))
