"""The progress bar."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios
from collections.abc import Callable

import pytest
from monai.engines import SupervisedTrainer

from monai_unlearn.handlers import Progress, on_terminal, progress

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
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    make_trainer([Progress("unlearning")]).run()
    out, err = capsys.readouterr()
    assert out == ""
    assert "unlearning" in err
    assert "/4" in err


def test_nothing_is_printed_before_the_run(make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer([Progress("unlearning")])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("columns", "expected"), [(80, True), (0, False)])
def test_a_terminal_without_a_width_counts_as_a_log_file(
    columns: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer, inner = os.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(inner, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert on_terminal() is expected
    os.close(outer)


def test_a_file_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert not on_terminal()
