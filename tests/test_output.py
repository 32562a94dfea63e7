"""Folders that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from monai_unlearn.output import check_output_dir, new_folder, replaced_folder, write_json


def _run(output: Path, name: str) -> None:
    """What a run does, in short."""
    with replaced_folder(output) as folder:
        write_json({"schema_version": "1.0", "name": name}, folder / "report.json")
        (folder / "private").mkdir()
        (folder / "private" / "mask").write_text(name)


def _name(folder: Path) -> str:
    return json.loads((folder / "report.json").read_text())["name"]


def _left(folder: Path) -> set[str]:
    return set(os.listdir(folder))


def _dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def _abandoned(output: Path, pid: int, host: str | None = None) -> Path:
    folder = output.with_name(f".{output.name}.part-{host or socket.gethostname()}-{pid}")
    (folder / "private").mkdir(parents=True)
    (folder / "private" / "mask").write_text("half")
    return folder


def test_nothing_is_seen_of_a_folder_before_it_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "saliency"
    with replaced_folder(output) as folder:
        (folder / "a").write_text("1")
        assert not output.exists()
        assert folder.parent == output.parent
        assert folder.name.startswith(".")
    assert _left(output) == {"a"}
    assert _left(tmp_path / "runs") == {"saliency"}


def test_earlier_runs_are_kept_with_a_number(tmp_path: Path) -> None:
    output = tmp_path / "saliency"
    for name in ("first", "second", "third", "fourth"):
        _run(output, name)
    names = {"saliency": "fourth", "saliency.1": "third", "saliency.2": "second", "saliency.3": "first"}
    assert _left(tmp_path) == set(names)
    for folder, name in names.items():
        assert _name(tmp_path / folder) == name
        assert (tmp_path / folder / "private" / "mask").read_text() == name


def test_a_gap_in_the_numbers_is_filled(tmp_path: Path) -> None:
    output = tmp_path / "saliency"
    for name in ("first", "second", "third"):
        _run(output, name)
    (tmp_path / "saliency.1").rename(tmp_path / "elsewhere")
    _run(output, "fourth")
    assert [_name(tmp_path / f"saliency{end}") for end in ("", ".1", ".2")] == ["fourth", "third", "first"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "saliency").mkdir()
    _run(tmp_path / "saliency", "first")
    assert _left(tmp_path) == {"saliency"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("thesis.docx", "years of work"),
        ("report.json", "not JSON"),
        ("report.json", "{}"),
        ("report.json", "[1]"),
        ("report.json", "3"),
        (".hidden", ""),
    ],
)
def test_somebody_elses_files_are_refused_and_left_alone(tmp_path: Path, name: str, content: str) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / name).write_text(content)
    for use in (check_output_dir, lambda path: _run(path, "x")):
        with pytest.raises(FileExistsError, match=r"no run of monai_unlearn wrote.*--output_dir"):
            use(output)
    assert (output / name).read_text() == content
    assert _left(tmp_path) == {"mine"}


def test_files_that_appear_during_the_run_are_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "mine"

    def run() -> None:
        with replaced_folder(output) as folder:
            (folder / "report.json").write_text("{}")
            output.mkdir()
            (output / "theirs").write_text("x")

    with pytest.raises(FileExistsError, match="now holds files of another program"):
        run()
    assert _left(output) == {"theirs"}
    assert _left(tmp_path) == {"mine"}


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(FileExistsError, match=r"should be a folder, but .* is a file"):
        check_output_dir(tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "x"


def test_a_file_in_the_place_of_a_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PermissionError, match=r"can't be written.*--output_dir"):
        check_output_dir(tmp_path / "file" / "runs" / "mine")


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_after_an_error_nothing_is_left_and_the_earlier_run_stays(tmp_path: Path, error: BaseException) -> None:
    output = tmp_path / "saliency"
    _run(output, "first")

    def run() -> None:
        with replaced_folder(output) as folder:
            (folder / "half").write_text("half")
            raise error

    with pytest.raises(type(error)):
        run()
    assert _left(tmp_path) == {"saliency"}
    assert _name(output) == "first"


def test_checking_writes_nothing_but_the_parents(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "saliency"
    assert check_output_dir(str(output)) == output
    assert _left(tmp_path) == {"runs"}
    assert _left(tmp_path / "runs") == set()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_place_that_can_not_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """By a stand-in for the system's answer, since tests may run as root, whom no permission stops."""

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), str(self))

    output = tmp_path / "saliency"
    _run(output, "first")
    monkeypatch.setattr(Path, "mkdir", refuse)
    entered = False
    with pytest.raises(PermissionError, match=rf"can't be written \({os.strerror(code)}\)"), replaced_folder(output):
        entered = True
    assert not entered
    assert _left(tmp_path) == {"saliency"}
    assert _name(output) == "first"


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    output = tmp_path / "saliency"
    left = _abandoned(output, _dead_pid())
    _run(output, "first")
    assert not left.exists()
    assert _left(tmp_path) == {"saliency"}


def test_a_folder_left_by_a_process_of_our_own_id_is_in_nobodys_way(tmp_path: Path) -> None:
    """Every process of a container may have the id 1."""
    output = tmp_path / "saliency"
    _abandoned(output, os.getpid())
    assert check_output_dir(output) == output
    _abandoned(output, os.getpid())
    _run(output, "first")
    assert _left(tmp_path) == {"saliency"}


def test_what_others_are_writing_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "saliency"
    kept = [
        _abandoned(output, os.getppid()),  # alive
        _abandoned(output, _dead_pid(), host="another-machine"),
        _abandoned(tmp_path / "other", _dead_pid()),
        _abandoned(tmp_path / "saliency.part", _dead_pid()),
    ]
    strange = tmp_path / f".saliency.part-{socket.gethostname()}-notes"
    strange.mkdir()
    _run(output, "first")
    assert all((folder / "private" / "mask").is_file() for folder in kept)
    assert strange.is_dir()


def test_a_killed_run_leaves_the_earlier_one_and_a_rerun_works(tmp_path: Path) -> None:
    output = tmp_path / "saliency"
    _run(output, "first")
    program = (
        "import os, sys, signal; from monai_unlearn.output import replaced_folder\n"
        "with replaced_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'half').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    # The module alone, without the package's slow imports.
    stub = tmp_path / "stub"
    (stub / "monai_unlearn").mkdir(parents=True)
    (stub / "monai_unlearn" / "__init__.py").touch()
    source = Path(sys.modules["monai_unlearn.output"].__file__ or "")
    (stub / "monai_unlearn" / "output.py").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    process = subprocess.run([sys.executable, "-c", program, str(output)], cwd=stub, check=False)
    assert process.returncode < 0
    assert _name(output) == "first"
    assert len(_left(tmp_path)) == 3  # the run, the stub, and what was killed
    _run(output, "second")
    assert _left(tmp_path) == {"saliency", "saliency.1", "stub"}


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "models" / "abc"
    with new_folder(path) as folder:
        (folder / "model.pt").write_text("1")
        assert not path.exists()
    assert (path / "model.pt").read_text() == "1"
    assert _left(tmp_path / "models") == {"abc"}


def test_of_two_new_folders_of_a_name_the_first_stays(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    with new_folder(path) as folder:
        (folder / "model.pt").write_text("second")
        path.mkdir()
        (path / "model.pt").write_text("first")
    assert (path / "model.pt").read_text() == "first"
    assert _left(tmp_path) == {"abc"}


def test_a_new_folder_can_not_take_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_text("x")
    with pytest.raises(OSError, match="abc"), new_folder(tmp_path / "abc") as folder:
        (folder / "model.pt").write_text("second")
    assert (tmp_path / "abc").read_text() == "x"
    assert _left(tmp_path) == {"abc"}


def test_a_new_folder_is_gone_after_an_error(tmp_path: Path) -> None:
    left = _abandoned(tmp_path / "abc", _dead_pid())

    def run() -> None:
        with new_folder(tmp_path / "abc"):
            assert not left.exists()
            raise KeyError("x")

    with pytest.raises(KeyError):
        run()
    assert _left(tmp_path) == set()


def test_json_is_readable_and_strict(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json({"name": "Grüße", "value": None}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "Grüße", "value": None}
    assert "Grüße" in path.read_text(encoding="utf-8")
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json({"value": value}, path)
    assert json.loads(path.read_text(encoding="utf-8"))["value"] is None
