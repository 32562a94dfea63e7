"""Ids, paths and orders: the rows of a table that they mean."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import pandas as pd

__all__ = ["Names", "hashed_order", "match_glob", "match_plain", "normal_path"]


def hashed_order(names: Collection, seed: int) -> np.ndarray:
    """Positions of the names in a pseudo-random order that depends on nothing but the seed and the names.

    The order is that of SHA-256 of seed and name, so that it is the same on every platform.
    """
    digests = (hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in names)
    words = np.fromiter(digests, dtype="S32", count=len(names)).view(">u8").reshape(-1, 4)
    return np.lexsort(words.T[::-1]).astype(np.int64)  # by the first word, then the second, …


class Names:
    """A column of ids as text, each once, and the code of each row's id; -1 where it is missing."""

    def __init__(self, column: pd.Series) -> None:
        if isinstance(column.dtype, pd.CategoricalDtype):
            codes, values = column.cat.codes.to_numpy(), column.cat.categories
        else:
            codes, values = pd.factorize(column)
        self.codes = codes
        self.names = np.asarray(values, dtype=object)
        if pd.api.types.infer_dtype(self.names) != "string":
            # 7 and "7" are one id; 7.0 is what pandas makes of 7 in a column with missing values.
            texts = np.array([_text(name) for name in self.names], dtype=object)
            merged, self.names = pd.factorize(texts)
            self.codes = np.append(merged, -1)[codes]
        empty = np.flatnonzero(self.names == "")
        if len(empty):
            self.codes = np.where(self.codes == empty[0], -1, self.codes)

    def find(self, wanted: Iterable[str]) -> tuple[np.ndarray, set[str]]:
        """Rows with one of the ids, and the ids that are there."""
        there = np.bincount(self.codes + 1, minlength=len(self.names) + 1)[1:] > 0  # a category may have no row
        hits = pd.Series(self.names).isin(list(wanted)).to_numpy() & there
        return self._rows(hits), set(self.names[hits])

    def complete(self, rows: np.ndarray) -> np.ndarray:
        """All rows of the ids that have one of the rows; a row without an id stands for itself."""
        hits = np.zeros(len(self.names), dtype=bool)
        codes = self.codes[rows]
        hits[codes[codes >= 0]] = True
        return self._rows(hits) | rows

    def count(self, rows: np.ndarray) -> tuple[int, int]:
        """Number of ids with one of the rows, and of those that have others too."""
        total = np.bincount(self.codes + 1, minlength=len(self.names) + 1)
        chosen = np.bincount(self.codes[rows] + 1, minlength=len(self.names) + 1)
        some = chosen[1:] > 0
        return int(some.sum() + chosen[0]), int((some & (chosen[1:] < total[1:])).sum())

    def draw(self, wanted: int, seed: int) -> np.ndarray:
        """Rows of whole ids, in an order fixed by the seed, until there are so many."""
        counts = np.bincount(self.codes + 1, minlength=len(self.names) + 1)[1:]
        alone = np.flatnonzero(self.codes < 0)  # an image without an id is drawn by itself
        there = np.flatnonzero(counts)
        order = hashed_order([*self.names[there], *(f"image {row}" for row in alone)], seed)
        sizes = np.concatenate([counts[there], np.ones(len(alone), dtype=counts.dtype)])
        drawn = order[: 1 + int(np.searchsorted(np.cumsum(sizes[order]), wanted))]
        hits = np.zeros(len(self.names), dtype=bool)
        hits[there[drawn[drawn < len(there)]]] = True
        rows = self._rows(hits)
        rows[alone[drawn[drawn >= len(there)] - len(there)]] = True
        return rows

    def _rows(self, hits: np.ndarray) -> np.ndarray:
        return np.append(hits, False)[self.codes]  # code -1 takes the last


def match_plain(paths: Sequence[str], wanted: Collection[str]) -> dict[str, list[int]]:
    """Positions of the paths that equal a wanted one or, where none does, end in it, folder by folder.

    One pass over the paths, however many are wanted.

    Args:
        paths: paths with ``/``; empty where there is none.
        wanted: paths as ``normal_path`` gives them.
    """
    wanted = set(wanted)
    last = {path.rpartition("/")[2] for path in wanted}
    depths = sorted({path.count("/") + 1 for path in wanted})
    equal: dict[str, list[int]] = {}
    ending: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        if not path or path.rpartition("/")[2] not in last:
            continue
        if path in wanted:
            equal.setdefault(path, []).append(i)
        for depth in depths:
            parts = path.rsplit("/", depth)
            if len(parts) <= depth:
                break
            end = "/".join(parts[1:])
            if end in wanted:
                ending.setdefault(end, []).append(i)
    return {**ending, **equal}


def match_glob(paths: Sequence[str], glob: str) -> list[int]:
    """Positions of the paths whose last folders match a pattern, as in ``pathlib``.

    ``*``, ``?`` and ``[…]`` stay within a folder, ``**`` is any number of folders.

    Raises:
        ValueError: if the pattern can't be read.
    """
    try:
        pattern = re.compile(_pattern(glob), re.DOTALL)
    except re.error:
        raise ValueError("A pattern should have its ranges in order, such as [0-9], but has not.") from None
    return [i for i, path in enumerate(paths) if path and pattern.fullmatch(path)]


def normal_path(path: str) -> str:
    """A path with ``/`` between folders and without empty ones."""
    first, *others = path.replace("\\", "/").split("/")
    return "/".join([first] * (first != "." or not others) + [part for part in others if part not in ("", ".")])


def _pattern(glob: str) -> str:
    parts = glob.split("/")
    pattern = {"": "", "**": "/?"}.get(parts[0], "(?:.*/)?")  # a path may be absolute
    for i, part in enumerate(parts):
        final = i == len(parts) - 1
        if part == "**":
            pattern += ".+" if final else "(?:[^/]+/)*"
        else:
            pattern += _component(part) + ("" if final else "/")
    return pattern


def _component(part: str) -> str:
    pattern = ""
    for piece in re.findall(r"\*+|\?|\[!?\]?[^\]]*\]|.", part, re.DOTALL):
        if piece[0] == "*":
            pattern += "[^/]*"
        elif piece == "?":
            pattern += "[^/]"
        elif piece[0] == "[" and len(piece) > 1:
            inside = re.sub(r"([\\^\[\]&~|])", r"\\\1", piece[1:-1].removeprefix("!"))
            pattern += f"(?!/)[{'^' if piece[1] == '!' else ''}{inside}]"
        else:
            pattern += re.escape(piece)
    return pattern


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, (float, np.floating)) and value.is_integer() else str(value)
