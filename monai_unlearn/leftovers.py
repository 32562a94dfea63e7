"""What is left of the time before: files that hold forget data or weights that saw it."""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from monai_unlearn.checkpoint import HARMLESS, file_hash
from monai_unlearn.output import earlier_runs, is_abandoned, is_unfinished

__all__ = [
    "MODEL_FILES",
    "PRIVATE_FILES",
    "SCAN",
    "SHADOW_FILES",
    "UNLEARNED",
    "contents",
    "find",
    "is_kept_original",
    "read_record",
]

# What a run writes into its private folder. Whatever else lies there is somebody's.
PRIVATE_FILES = {
    "saliency_mask.safetensors": "saliency mask",
    "split_key": "key of the hashes",
    "settings.json": "settings of the run",
    "forget_indices.txt": "positions of the forget images",
}
# What it writes into the folder of a kept model, and of a shadow model. The record, which tells whose they are, comes
# last: it is removed last, so that a removal that was killed can be gone on with.
MODEL_FILES = ("model.pt", "history.csv", "training.json")
SHADOW_FILES = ("scores.npz", "record.json")
UNLEARNED = "unlearned_model.pt"
SCAN = "duplicates.hashes"

# Endings of files that may hold a network.
ENDINGS = {".bin", ".ckpt", ".onnx", ".pt", ".pth", ".safetensors", ".tar", ".ts"}
DEPTH = 2
MOST_TOLD = 200
MOST_SEEN = 100_000


def find(
    output_dir: str | os.PathLike,
    written: Path | None = None,
    *,
    original: Path | None = None,
    models_dir: Path | None = None,
    retrained: Collection[Path] = (),
    shadow: Sequence[Path] = (),
    shown: Sequence[Path] = (),
    caches: Sequence[Path] = (),
    key_beside_request: bool = False,
    hidden: Collection[str] = (),
) -> list[dict[str, Any]]:
    """What still holds forget data or weights from before, for the key ``left`` of a report.

    Nothing is changed.

    Args:
        output_dir: the run's folder, as the settings name it.
        written: where it is written until it takes its place; None where it lies there already.
        original: the checkpoint that was unlearned.
        models_dir: where models are kept for later runs.
        retrained: folders of models that never saw the forget set, and so are no leftover.
        shadow: folders with the scores of this run's shadow models.
        shown: folders that the user has shown, by naming a checkpoint in them. What else may be a checkpoint there,
            down to two folders below, is told: the first 200, and how many more.
        caches: folders that still have decoded images of the forget set.
        key_beside_request: whether the key of the hashes is kept beside the request's file.
        hidden: ids and names of files of the forget set. Files in ``shown`` whose names have one of them as a whole
            word are counted and not named.

    Returns:
        Entries with ``what`` it is, its ``path`` (as the settings have it: relative to where the run was started, or
        absolute; in parentheses where it may not be told), whether it is ``ours``, so that ``finalise`` removes it,
        and what it ``holds``. Ours come first.
    """
    output = Path(output_dir)
    # Otherwise finalise could not tell from where the run's folder lies where the others do.
    absolute = output.is_absolute() or ".." in output.parts or not output.name
    if absolute:
        output = Path(os.path.abspath(output))
    here = output if written is None else written
    entries: list[dict[str, Any]] = []

    def add(what: str, path: Path | str, ours: bool, holds: str) -> None:
        shown_as = os.path.abspath(path) if absolute and isinstance(path, Path) else str(path)
        entries.append({"what": what, "path": shown_as, "ours": ours, "holds": holds})

    if contents(here / "private"):
        add(_what_is_private(here / "private"), output / "private", True, "functions of the forget set")
    earlier = earlier_runs(output, replaced=written is not None)
    for now, then in earlier:
        if contents(now / "private"):
            what = f"{_what_is_private(now / 'private')} of an earlier run"
            add(what, then / "private", True, "functions of that run's forget set")
        if (now / UNLEARNED).is_file():
            unlearned_further = original is not None and _real(original) == _real(now / UNLEARNED)
            holds = "weights that saw the forget set" if unlearned_further else "weights that may have seen it"
            add("unlearned model of an earlier run", then / UNLEARNED, True, holds)

    ours = {_real(now / UNLEARNED) for now, _ in earlier}
    kept = None
    if original is not None and original.name == MODEL_FILES[0] and is_kept_original(original.parent):
        kept = original.parent
        add("original model", kept, True, "weights that saw the forget set")
    elif original is not None and _real(original) not in ours:
        add("original checkpoint", original, False, _holds(original, "weights that saw the forget set"))
    for folder in shadow:
        if contents(folder):
            add("scores of shadow models", folder, True, "scores of forget images")
    if models_dir is not None:
        if (models_dir / SCAN).is_file():
            add("search for equal images", models_dir / SCAN, True, "hashes of images, those of the forget set too")
        known = {_real(path) for path in (*retrained, *([] if kept is None else [kept]))}
        others = [path for path in contents(models_dir) if (path / MODEL_FILES[-1]).is_file()]
        if number := sum(_real(path) not in known for path in others):
            holds = "weights that may have seen the forget set: of other seeds, settings, requests or data"
            add(f"other kept models ({number})", models_dir, False, holds)
    for path in _unfinished(output, here, [*([] if models_dir is None else [models_dir]), *shadow]):
        dead = is_abandoned(path)
        what = "left by a killed run" if dead else "of a run at work, or killed on another machine"
        add(f"unfinished folder {what}", path, dead, "perhaps functions of the forget set")
    for folder in caches:
        if contents(folder):
            add("cache of decoded images", folder, False, "copies of forget images")
    if key_beside_request:
        holds = "by which the hashes in split.json can be told from names"
        add("key of the hashes", "(beside the request, under its name with .key)", False, holds)

    own = [here, output, *(now for now, _ in earlier), *caches, *([] if models_dir is None else [models_dir])]
    told = {_real(path) for path in (*own, *([] if original is None else [original]))}
    own_folders = {_real(path) for path in (*own, *([] if kept is None else [kept]))}
    for folder in dict.fromkeys(shown):
        if _real(folder) not in own_folders:
            for what, path, holds in _of_the_user(folder, told, hidden):
                add(what, path, False, holds)
    return sorted(entries, key=lambda entry: not entry["ours"])


def contents(folder: Path) -> list[Path]:
    """What lies in a folder, in order; nothing where there is no such folder, or it can't be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def read_record(file: Path) -> dict[str, Any]:
    """A JSON object in a file; empty where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_kept_original(folder: Path) -> bool:
    """Whether a folder holds an original model that a run has trained and kept, unchanged since."""
    record = read_record(folder / MODEL_FILES[-1])
    try:
        return record.get("what") == "original" and record.get("sha256") == file_hash(folder / MODEL_FILES[0])
    except OSError:
        return False


def _real(path: Path) -> str:
    return os.path.realpath(path)


def _what_is_private(folder: Path) -> str:
    there = [what for name, what in PRIVATE_FILES.items() if (folder / name).is_file()]
    return " and ".join(filter(None, [", ".join(there[:-1]), *there[-1:]])) or "private folder"


def _unfinished(output: Path, here: Path, folders: Sequence[Path]) -> list[Path]:
    """What runs, killed or at work, have not finished: in the run's place, and in folders of the package."""
    own = [path for path in contents(output.parent) if path.name.startswith(f".{output.name}.part-")]
    paths = [*own, *(path for folder in folders for path in contents(folder))]
    return [path for path in dict.fromkeys(paths) if is_unfinished(path) and _real(path) != _real(here)]


def _of_the_user(folder: Path, told: set[str], hidden: Collection[str]) -> Iterator[tuple[str, Path, str]]:
    """What may be a checkpoint in a user's folder: what it is, where, and what it holds."""
    files, complete = _possible_checkpoints(folder, told)
    words = _words(hidden)
    nameless = 0
    for file in files[:MOST_TOLD]:
        if _has_one(str(file.relative_to(folder)), words):
            nameless += 1
        else:
            yield "possible checkpoint", file, _holds(file, "perhaps weights that saw the forget set")
    if nameless:
        yield f"possible checkpoints whose names may name a patient ({nameless})", folder, "not looked into"
    if len(files) > MOST_TOLD:
        yield f"… and {len(files) - MOST_TOLD} more possible checkpoints", folder, "not looked into"
    if not complete:
        yield "… and further files and folders", folder, "not looked into: too many, or not readable"


def _possible_checkpoints(folder: Path, told: set[str]) -> tuple[list[Path], bool]:
    """Files with a checkpoint's ending, in order, but for those told already; and whether everything was seen."""
    found: list[Path] = []
    complete, seen, level = True, 0, [folder]
    for _ in range(DEPTH + 1):
        below: list[Path] = []
        for place in level:
            try:
                with os.scandir(place) as entries:
                    for entry in entries:
                        seen += 1
                        if seen > MOST_SEEN:
                            return sorted(found), False
                        path = place / entry.name
                        wanted = below if entry.is_dir(follow_symlinks=False) else found
                        if (wanted is below or path.suffix.lower() in ENDINGS) and _real(path) not in told:
                            wanted.append(path)
            except OSError:
                complete = False
        level = [path for path in below if not is_unfinished(path)]
    return sorted(found), complete


def _words(names: Collection[str]) -> set[str]:
    """Names and the last parts of paths, as they would stand in another name."""
    whole = {str(name).casefold() for name in names}
    parts = whole | {Path(name).name for name in whole} | {Path(name).stem for name in whole}
    return {re.sub(r"^[\W_]+|[\W_]+$", "", part) for part in parts} - {""}


def _has_one(text: str, words: set[str]) -> bool:
    """Whether one of the words stands in a text, and not only as a part of a longer word or number."""
    pieces = list(re.finditer(r"[^\W_]+", text.casefold()))
    return any(
        first.string[first.start() : last.end()] in words for i, first in enumerate(pieces) for last in pieces[i:]
    )


def _holds(file: Path, what: str) -> str:
    """What a checkpoint holds, as far as its keys tell."""
    if file.is_symlink():
        return f"{what}; a link, not followed"
    if not file.is_file() or not zipfile.is_zipfile(file):
        return f"{what}; not looked into"
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Mapped into memory, so that what is read are the keys, and not the weights.
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # torch raises whatever a file that is no checkpoint makes it trip over
        return f"{what}; not looked into"
    return f"{what}, {'with' if _has_optimizer(content) else 'without'} the state of an optimizer"


def _has_optimizer(content: Any, depth: int = 3) -> bool:
    """Whether a checkpoint holds what ``state_dict()`` of an optimizer gives, or a key says that it does."""
    if not depth or not isinstance(content, (Mapping, list, tuple)):
        return False
    if not isinstance(content, Mapping):
        return any(_has_optimizer(part, depth - 1) for part in content)
    if {"state", "param_groups"} <= set(content) or any("optim" in str(key).lower() for key in content):
        return True
    return any(_has_optimizer(part, depth - 1) for part in content.values())
