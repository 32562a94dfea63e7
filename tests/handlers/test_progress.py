"""The progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from monai.engines import SupervisedTrainer

from monai_unlearn.handlers import Progress

MakeTrainer = Callable[..., SupervisedTrainer]


def test_a_log_file_gets_one_line_an_epoch(make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer([Progress("unlearning")], max_epochs=3).run()
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split(" [")[0] for line in lines] == [f"unlearning {epoch}/3 epochs" for epoch in (1, 2, 3)]
    assert "<00:00]" in lines[-1]


def test_a_terminal_gets_a_bar_over_the_iterations(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    make_trainer([Progress("unlearning")]).run()
    out, err = capsys.readouterr()
    assert out == ""
    assert "unlearning" in err
    assert "/4" in err


def test_nothing_is_printed_before_the_run(make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer([Progress("unlearning")])
    assert capsys.readouterr() == ("", "")
