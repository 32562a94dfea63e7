"""Folders that appear whole or not at all, and never over somebody's files."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

__all__ = [
    "check_output_dir",
    "earlier_runs",
    "is_abandoned",
    "is_run",
    "is_unfinished",
    "new_folder",
    "replaced_folder",
    "scratch_folder",
    "write_json",
]

# A folder with this file was written by a run, and may be moved aside by the next.
MARKER = "report.json"
# What a folder is called before it is whole.
UNFINISHED = re.compile(r"\.(?P<name>.+?)\.part-(?P<host>.+)-(?P<pid>[0-9]{1,9})")


def check_output_dir(output_dir: str | os.PathLike) -> Path:
    """Refuse an output folder that is a file, holds somebody's files, or can't be written, before any work is done.

    Raises:
        FileExistsError: if it is there and is no earlier run.
        PermissionError: if it can't be written.
    """
    path = Path(os.path.abspath(output_dir))
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"output_dir should be a folder, but {str(output_dir)!r} is a file. Choose another.")
    if path.is_dir() and any(path.iterdir()) and not is_run(path):
        raise FileExistsError(
            f"output_dir {str(output_dir)!r} holds files that no run of monai_unlearn wrote. They are left as they "
            "are: choose another folder with --output_dir."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)  # a container's process may have the id that a killed one had
        probe = _unfinished(path)
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise PermissionError(
            f"output_dir {str(output_dir)!r} can't be written ({error.strerror}). Choose another with --output_dir."
        ) from error
    return path


@contextmanager
def replaced_folder(output_dir: str | os.PathLike) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``output_dir`` when the block ends without an error.

    An earlier run there is kept as ``….1``, one before that as ``….2``, and so on. After an error nothing is
    left; after a kill a hidden folder ``.….part-…`` is, which the next run removes.
    """
    path = check_output_dir(output_dir)
    _remove_abandoned(path)
    unfinished = _unfinished(path)
    unfinished.mkdir()
    try:
        yield unfinished
        if path.is_dir() and any(path.iterdir()):
            if not is_run(path):  # written there while the run was at work
                raise FileExistsError(f"output_dir {str(output_dir)!r} now holds files of another program.")
            _move_aside(path)
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``path`` when the block ends without an error; the first one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    unfinished = _unfinished(path)
    unfinished.mkdir()
    try:
        yield unfinished
        try:
            os.rename(unfinished, path)
        except OSError:
            if not path.is_dir():  # otherwise another run has just made the same
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def scratch_folder(output_dir: str | os.PathLike) -> Iterator[Path]:
    """A hidden folder beside ``output_dir`` for what is not to stay; after a kill, the next run removes it."""
    path = Path(os.path.abspath(output_dir))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    folder = _unfinished(path)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(content: object, path: Path) -> None:
    """Write standard JSON: NaN and infinity are an error, since no strict reader takes them."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def is_run(path: Path) -> bool:
    """Whether a folder was written by a run."""
    try:
        return "schema_version" in json.loads((path / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def earlier_runs(output_dir: str | os.PathLike, replaced: bool) -> list[tuple[Path, Path]]:
    """Earlier runs that are kept beside a run's folder as ``….1``, ``….2`` and so on, in this order.

    Args:
        output_dir: the run's folder.
        replaced: whether a new run is about to take its place, so that what is there now will be ``….1``.

    Returns:
        For each of them, where it lies now and where it will lie.
    """
    path = Path(output_dir)
    moves = dict(_moves(path)) if replaced and is_run(path) else {}
    now = {path} if moves else set()
    if path.parent.is_dir():
        pattern = re.compile(re.escape(path.name) + r"\.\d+")
        now |= {path.with_name(name) for name in os.listdir(path.parent) if pattern.fullmatch(name)}
    pairs = [(run, moves.get(run, run)) for run in now if is_run(run)]
    return sorted(pairs, key=lambda pair: int(pair[1].name.rpartition(".")[2]))


def _moves(path: Path) -> list[tuple[Path, Path]]:
    """What goes where to make room for a new run, in an order in which nothing is overwritten."""
    last = 1
    while path.with_name(f"{path.name}.{last}").exists():
        last += 1
    names = [path.name, *(f"{path.name}.{number}" for number in range(1, last + 1))]
    return [(path.with_name(name), path.with_name(then)) for name, then in pairwise(names)][::-1]


def _move_aside(path: Path) -> None:
    for now, then in _moves(path):
        os.replace(now, then)


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.part-{socket.gethostname()}-{os.getpid()}")


def is_unfinished(path: Path) -> bool:
    """Whether a folder's name is one that runs give to a folder before it is whole."""
    return UNFINISHED.fullmatch(path.name) is not None


def is_abandoned(path: Path) -> bool:
    """Whether such a folder was left by a killed run on this machine: nobody writes into it any more."""
    found = UNFINISHED.fullmatch(path.name)
    if found is None or found["host"] != socket.gethostname():
        return False
    return int(found["pid"]) == os.getpid() or not _is_alive(int(found["pid"]))


def _remove_abandoned(path: Path) -> None:
    """Remove what killed runs on this machine left behind; it may hold functions of forgotten data."""
    for left in path.parent.iterdir():
        if left.name.startswith(f".{path.name}.part-{socket.gethostname()}-") and is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
