"""Removal of what a run left and its report lists as ours, and of nothing else."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_unlearn.checkpoint import file_hash
from monai_unlearn.leftovers import MODEL_FILES, PRIVATE_FILES, SCAN, SHADOW_FILES, UNLEARNED, contents, read_record
from monai_unlearn.output import is_abandoned, is_run, is_unfinished

__all__ = ["finalise"]

# What else may lie in a folder that a killed run has not finished.
RUN_FILES = (UNLEARNED, "split.json", "report.json", "report.html")
YOURS = (
    "These are yours, and you have to decide on them: finalise removes only what this package has written. Copies and "
    "backups in other places are not known here."
)


def finalise(
    run: str | os.PathLike,
    render: Callable[[dict[str, Any]], str],
    *,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> bool:
    """Remove what the report of a run lists as left and ours, and write the report anew.

    The list is not trusted: what goes has to be of the kinds that this package writes, to belong to this run, and to
    hold nothing else. Symbolic links are not followed. What was killed half-way is finished by the next call.

    Args:
        run: the run's folder.
        render: makes report.html of the report.
        dry_run: say what would be removed, and remove nothing.
        say: takes each line for the user.

    Returns:
        Whether nothing of ours stays; in a dry run, whether nothing would.

    Raises:
        ValueError: if the folder is no run, or its report lists nothing or is damaged.
        PermissionError: if the report can't be written anew; nothing is removed then.
    """
    folder = Path(os.path.realpath(run))
    report = _report(folder, run)
    items = [_Item.of(entry, Path(os.path.abspath(run)), folder, report) for entry in report["left"]]
    for item in items:
        if item.gone:
            say(f"{item.name}: no longer there.")
    to_remove = [item for item in items if item.paths]
    if to_remove:
        say("Would be removed:" if dry_run else "To be removed:")
    for item in to_remove:
        say(f"  {item.name}: {item.entry['what']} ({_size(item.size)}).{item.remark}")
    if not dry_run and (to_remove or _after(report, items) != report):
        with _report_files(folder) as files:
            render(_after(report, items))  # a report that can't be written anew should show before anything is gone
            for item in to_remove:
                item.remove()
            new = _after(report, items)
            _write(new, render(new), files, folder)
        say(f"Removed: {_size(sum(item.size for item in to_remove if item.gone))}.")
    stay = [item for item in items if item.problem]
    for item in stay:
        say(f"{item.name} stays: {item.problem}")
    if not stay and not (dry_run and to_remove):
        say("Nothing of ours is left.")
    theirs = [item for item in items if not item.entry["ours"] and not item.gone]
    if theirs:
        say("Left, and not ours to remove:")
        for item in theirs:
            say(f"  {item.name}: {item.entry['what']} ({item.entry['holds']})")
        say(YOURS)
    return not stay


def _after(report: dict[str, Any], items: list[_Item]) -> dict[str, Any]:
    """The report as it should be, with what is no longer there off its list."""
    left = [item.entry for item in items if not item.gone]
    done = report.get("finalised")
    if done is None and not any(entry["ours"] for entry in left):
        done = datetime.date.today().isoformat()
    return {**report, "left": left, "finalised": done}


class _NotOursError(Exception):
    """Why something stays."""


@dataclass
class _Item:
    """An entry of the report, and what a look at the disk says of it.

    Args:
        entry: the entry.
        paths: what has to go, in this order; nothing where it stays.
        gone: whether it is no longer there.
        problem: why it stays though the report says that it is ours.
        remark: what the user should know before it goes.
        size: what it takes up, in bytes.
    """

    entry: dict[str, Any]
    paths: tuple[Path, ...] = ()
    gone: bool = False
    problem: str = ""
    remark: str = ""
    size: int = 0

    @classmethod
    def of(cls, entry: dict[str, Any], given: Path, run: Path, report: Mapping[str, Any]) -> _Item:
        """Look at what an entry names.

        Args:
            entry: the entry.
            given: the run's folder as the user names it, made absolute.
            run: the same without symbolic links.
            report: the run's report.
        """
        item = cls(entry)
        if not entry["ours"] and entry["path"].startswith("("):  # words in the place of a path
            return item
        place = _located(entry["path"], report, given, run)
        if place is None:
            if entry["ours"]:
                item.problem = "the run was moved since, so that it can't be told where this is. Remove it by hand."
            return item
        output = _setting(report, "output_dir")
        if output is not None and run.name != output.name and _is_earlier(Path(entry["path"]), output):
            if entry["ours"]:
                item.problem = f"the runs were moved aside since. Finalise {output}, whose report lists it."
            return item
        item.gone = not os.path.lexists(place)
        if item.gone or not entry["ours"]:
            return item
        path = Path(os.path.realpath(place.parent)) / place.name
        try:
            item.paths = tuple(_ours(path, run, _models_dir(report, given, run), report))
            status = [path.lstat() for path in item.paths if not path.is_dir()]
        except _NotOursError as reason:
            item.problem = str(reason)
        except OSError as error:
            item.paths, item.problem = (), f"it can't be read ({error.strerror})."
        else:
            item.size = sum(one.st_size for one in status)
            if any(path.name == MODEL_FILES[-1] for path in item.paths):
                item.remark = " Other runs may use it too, and will have to train it anew."
            if any(one.st_nlink > 1 for one in status):
                item.remark += " It has another name too (a hard link), under which it will stay."
        return item

    @property
    def name(self) -> str:
        """Its path, as the report has it."""
        return self.entry["path"]

    def remove(self) -> None:
        """Remove it; what goes wrong becomes its problem, and keeps no other from being removed."""
        try:
            for path in self.paths:
                with suppress(FileNotFoundError):  # a list may name it twice
                    (os.rmdir if path.is_dir() and not path.is_symlink() else os.unlink)(path)
            self.gone = True
        except OSError as error:
            self.problem = f"it could not be removed ({error.strerror})."


def _report(folder: Path, run: str | os.PathLike) -> dict[str, Any]:
    report = read_record(folder / "report.json")
    if not is_run(folder) or not report:
        raise ValueError(
            f"RUN should be the folder of a run, with its report.json, but {str(run)!r} is none. Give what the run had "
            "as --output_dir."
        )
    left = report.get("left")
    if left is None:
        raise ValueError(
            f"The report in {str(run)!r} is of an earlier version ({report['schema_version']}), which lists nothing "
            "that is left. Carry out the request once more, or remove by hand what docs/limits.md names."
        )
    if not isinstance(left, list) or not all(map(_is_entry, left)):
        raise ValueError(f"The list of what is left in the report in {str(run)!r} is damaged. Nothing was removed.")
    return report


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("ours"), bool):
        return False
    texts = [entry.get(key) for key in ("what", "path", "holds")]
    return all(isinstance(text, str) and text and "\0" not in text for text in texts)


def _setting(report: Mapping[str, Any], name: str) -> Path | None:
    settings = report.get("settings")
    value = settings.get(name) if isinstance(settings, dict) else None
    return Path(value) if isinstance(value, str) and "\0" not in value else None


def _located(text: str, report: Mapping[str, Any], given: Path, run: Path) -> Path | None:
    """Where a path of the report is now; None where that can't be told."""
    path, output = Path(text), _setting(report, "output_dir")
    if output is not None and output.name and path.is_relative_to(output):
        return run / path.relative_to(output)  # the run's own, wherever the run is
    if path.is_absolute() or output is None or output.is_absolute() or ".." in output.parts:
        return path if path.is_absolute() else None
    # It was started where the path of its folder, as it was given, leads to where that is.
    above = output.parent.parts
    for place in (given.parent.parts, run.parent.parts):
        start = len(place) - len(above)
        if start > 0 and place[start:] == above:
            return Path(*place[:start]) / path
    return None


def _models_dir(report: Mapping[str, Any], given: Path, run: Path) -> Path | None:
    folder = _setting(report, "models_dir")
    place = None if folder is None else _located(str(folder), report, given, run)
    return None if place is None else Path(os.path.realpath(place))


def _ours(path: Path, run: Path, models_dir: Path | None, report: Mapping[str, Any]) -> list[Path]:
    """What has to go for a path to be gone, where all of it is ours.

    Raises:
        _NotOursError: where it is not.
    """
    if path.is_symlink():
        raise _NotOursError("it is a symbolic link, and these are not followed. Remove by hand what it leads to.")
    if path.name == "private" and path.is_dir() and _is_this_or_earlier(path.parent, run):
        return _with_folder(path, PRIVATE_FILES)
    if path.name == UNLEARNED and path.parent != run and _is_this_or_earlier(path.parent, run):
        return _earlier_model(path)
    if is_unfinished(path) and path.is_dir():
        return _unfinished(path)
    if path.name == SCAN and path.parent == models_dir and path.is_file():
        return _scan(path)
    if re.fullmatch("[0-9a-f]{16}", path.name) and path.is_dir():
        if models_dir is not None and path.parent == models_dir / "shadow":
            return _shadows(path)
        return _kept_model(path, report)
    raise _NotOursError("it is nothing that this run has written. Remove it by hand, if it should go.")


def _is_this_or_earlier(folder: Path, run: Path) -> bool:
    """Whether a folder is the run's, or that of one which was moved aside for it."""
    earlier = folder.parent == run.parent and _is_numbered(folder.name, run.name)
    return folder == run or (earlier and is_run(folder))


def _is_earlier(path: Path, output: Path) -> bool:
    """Whether a path of the report is in a run that was an earlier one then."""
    return not path.is_relative_to(output) and _is_numbered(path.parent.name, output.name)


def _is_numbered(name: str, run: str) -> bool:
    return re.fullmatch(re.escape(run) + r"\.[0-9]+", name) is not None


def _with_folder(folder: Path, known: Mapping[str, str] | tuple[str, ...]) -> list[Path]:
    """A folder and its files, in the order of the known names, where it holds no others."""
    names = list(known)
    with os.scandir(folder) as entries:
        there = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    strange = sum(name not in names or not is_file for name, is_file in there.items())
    if strange:  # their names may be anybody's
        raise _NotOursError(f"it holds files, folders or links that no run writes there ({strange}). Take them out.")
    return [*(folder / name for name in names if name in there), folder]


def _unfinished(folder: Path) -> list[Path]:
    if not is_abandoned(folder):
        raise _NotOursError("a run may be at work there, perhaps on another machine. Remove it by hand if none is.")
    known = {*PRIVATE_FILES, *MODEL_FILES, *SHADOW_FILES, *RUN_FILES}
    found: list[Path] = []
    for path in [*contents(folder / "private"), *contents(folder)]:
        name = re.sub(r"\.part[0-9]+$", "", path.name)
        ours = path.parent == folder and name == "private" if path.is_dir() else path.is_file() and name in known
        if path.is_symlink() or not ours:
            raise _NotOursError("it holds files, folders or links that no run writes there. Take them out.")
        found.append(path)
    return [*found, folder]


def _kept_model(folder: Path, report: Mapping[str, Any]) -> list[Path]:
    paths = _with_folder(folder, MODEL_FILES)
    record = read_record(folder / MODEL_FILES[-1])
    if len(paths) > 1 and record.get("what") != "original":
        raise _NotOursError("it holds no original model that a run has trained and kept.")
    if paths[0].name == MODEL_FILES[0]:  # otherwise its removal was killed
        if file_hash(paths[0]) != record.get("sha256"):
            raise _NotOursError("the model in it was changed or damaged since. Remove it by hand.")
        if record["sha256"] != _hashes(report).get("original"):
            raise _NotOursError("it is another model than the one that this run has unlearned.")
    return paths


def _shadows(folder: Path) -> list[Path]:
    found: list[Path] = []
    for path in contents(folder):
        if path.is_symlink() or not path.is_dir():
            raise _NotOursError("it holds files or links that no run writes there. Take them out.")
        if is_unfinished(path):
            found += _unfinished(path)
            continue
        if re.fullmatch(r"shadow-[0-9]+", path.name) is None:
            raise _NotOursError("it holds folders that no run writes there. Take them out.")
        paths = _with_folder(path, SHADOW_FILES)
        record = read_record(path / SHADOW_FILES[-1])
        if paths[0].name == SHADOW_FILES[0] and file_hash(paths[0]) != record.get("sha256"):
            raise _NotOursError("scores in it were changed or damaged since. Remove it by hand.")
        found += paths
    return [*found, folder]


def _earlier_model(file: Path) -> list[Path]:
    if not file.is_file() or file_hash(file) != _hashes(read_record(file.parent / "report.json")).get("unlearned"):
        raise _NotOursError("it is not what that run has written there. Remove it by hand.")
    return [file]


def _scan(file: Path) -> list[Path]:
    """It begins with a hash of all that follows."""
    with open(file, "rb") as stream:
        first = stream.read(16)
        rest = hashlib.blake2b(digest_size=16)
        while block := stream.read(1 << 20):
            rest.update(block)
    if first != rest.digest():
        raise _NotOursError("it is damaged, or no search for equal images. Remove it by hand.")
    return [file]


def _hashes(report: Mapping[str, Any]) -> Mapping[str, Any]:
    provenance = report.get("provenance")
    hashes = provenance.get("hashes") if isinstance(provenance, dict) else None
    return hashes if isinstance(hashes, dict) else {}


@contextmanager
def _report_files(folder: Path) -> Iterator[dict[str, Path]]:
    """Empty files beside page and report, to become these: made first, since without them nothing should be removed."""
    files: dict[str, Path] = {}
    try:
        try:
            for name in ("report.html", "report.json"):
                for old in folder.glob(f".{name}.part-*"):  # of a finalise that was killed
                    old.unlink()
                handle, made = tempfile.mkstemp(dir=folder, prefix=f".{name}.part-")
                os.close(handle)
                files[name] = Path(made)
        except OSError as error:
            raise PermissionError(
                f"RUN should be a folder that can be written, since its report changes, but {str(folder)!r} can't "
                f"({error.strerror}). Nothing was removed."
            ) from error
        yield files
    finally:
        for path in files.values():
            path.unlink(missing_ok=True)


def _write(report: dict[str, Any], page: str, files: Mapping[str, Path], folder: Path) -> None:
    text = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    # The report last: as long as it is the old one, the next finalise writes both.
    for name, content in (("report.html", page), ("report.json", text)):
        place = folder / name
        files[name].write_text(content, encoding="utf-8")
        os.chmod(files[name], place.stat().st_mode & 0o777 if place.is_file() else 0o644)
        os.replace(files[name], place)


def _size(size: int) -> str:
    if size < 10_000:
        return f"{size} bytes"
    return f"{size / 1e6:.2f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"
