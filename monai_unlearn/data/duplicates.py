"""Equal images under other names: hashes of pixels, of images in memory or of files, and who equals whom."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from monai.transforms import LoadImage
from tqdm import tqdm

__all__ = ["equal_to", "file_hashes", "pixel_hashes"]

logger = logging.getLogger("monai_unlearn")

# 128 bits as two whole numbers, which NumPy sorts and compares; bytes would lose zeros at their end.
HASH = np.dtype([("high", "<u8"), ("low", "<u8")])
SIZE = HASH.itemsize
THREADS = 8
SAVE_EVERY = 20_000


def pixel_hashes(images: np.ndarray) -> np.ndarray:
    """Hash of each image in memory.

    Args:
        images: N × H × W or N × H × W × C, finite.

    Returns:
        N hashes of 128 bits; two are equal where the pixels are.
    """
    floating = np.issubdtype(images.dtype, np.floating)
    rows = (np.ascontiguousarray(image + 0 if floating else image) for image in images)  # −0 + 0 is 0, which it equals
    return _as_hashes([_digest(row.data) for row in rows])


def file_hashes(
    paths: Sequence[str], cache_file: Path | None = None, read_pixels: Callable[[str], np.ndarray] | None = None
) -> np.ndarray:
    """Hash of the decoded pixels of each file, with a progress bar on a terminal.

    Pixels are equal where shape and values are, whatever the file's format and the values' type. Files that are equal
    in bytes are decoded once. What was scanned is kept in ``cache_file`` under a hash of path, size and time of change,
    so that a later scan decodes new and changed files only. The cache holds no name, but hashes of images: it is
    readable by its owner alone.

    Args:
        paths: the files; a folder is an image of several files.
        cache_file: where to keep the hashes; None keeps nothing.
        read_pixels: function that reads a file; by default MONAI's ``LoadImage``.

    Returns:
        As ``pixel_hashes``; comparable with one another only.

    Raises:
        ValueError: if files can't be read; how many, not which.
    """
    logging.getLogger("LoadImage").setLevel(logging.WARNING)  # at INFO it writes names of files
    read = read_pixels or LoadImage(image_only=True, dtype=None)
    keys = [_key(path) for path in paths]
    known = {} if cache_file is None else _read_cache(cache_file)
    missing = [i for i, key in enumerate(keys) if key not in known]
    decoded: dict[bytes, bytes] = {}

    def scan(position: int) -> bytes | None:
        path = paths[position]
        try:
            content = keys[position] if os.path.isdir(path) else _digest(Path(path).read_bytes())
            if content not in decoded:
                decoded[content] = _pixel_digest(np.asarray(read(path)))
            return decoded[content]
        except Exception:  # whatever a reader trips over; its message would name the file
            return None

    unreadable = 0
    bar = tqdm(total=len(missing), desc="looking for duplicates", disable=not sys.stderr.isatty())
    with bar, ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(missing), SAVE_EVERY):
            part = missing[start : start + SAVE_EVERY]
            for position, digest in zip(part, pool.map(scan, part)):
                bar.update()
                if digest is None:
                    unreadable += 1
                else:
                    known[keys[position]] = digest
            if cache_file is not None:
                _write_cache(cache_file, known)
    if unreadable:
        raise ValueError(
            f"{unreadable} of {len(paths)} image files could not be read in the search for duplicates. "
            "Repair or remove them."
        )
    return _as_hashes([known[key] for key in keys])


def equal_to(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which images are equal to any of some others.

    Args:
        hashes: N hashes, as ``pixel_hashes`` or ``file_hashes`` return them.
        others: hashes of the others.

    Returns:
        Boolean array of shape N.
    """
    # Half of each hash first: plain numbers are compared far faster than pairs.
    equal = np.isin(hashes["high"], others["high"])
    equal[equal] = np.isin(hashes[equal], others)
    return equal


def _digest(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=SIZE).digest()


def _pixel_digest(pixels: np.ndarray) -> bytes:
    """Hash of shape and values: 8 bits and 16 bits may hold the same image, so all count as float64."""
    sha = hashlib.blake2b(str(pixels.shape).encode(), digest_size=SIZE)
    for row in pixels:  # piece by piece: a whole volume as float64 may be large
        sha.update((np.ascontiguousarray(row, dtype=np.float64) + 0).data)
    return sha.digest()


def _as_hashes(digests: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), dtype=HASH)


def _key(path: str) -> bytes:
    """Hash of path, size and time of change; of a folder, of all files in it."""
    try:
        files = sorted(entry.path for entry in os.scandir(path)) if os.path.isdir(path) else [path]
        status = [(os.path.abspath(file), os.stat(file)) for file in files]
    except OSError as error:
        raise ValueError(f"An image file can't be read ({error.strerror}). Repair or remove it.") from None
    return _digest("\0".join(f"{name}\0{s.st_size}\0{s.st_mtime_ns}" for name, s in status).encode())


def _read_cache(file: Path) -> dict[bytes, bytes]:
    """What an earlier scan has kept: a hash of all that follows, then pairs of key and hash."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return {}
    pairs = content[SIZE:]
    if _digest(pairs) != content[:SIZE] or len(pairs) % (2 * SIZE):
        logger.warning("What an earlier search for duplicates has kept is damaged: searching anew.")
        return {}
    return {pairs[i : i + SIZE]: pairs[i + SIZE : i + 2 * SIZE] for i in range(0, len(pairs), 2 * SIZE)}


def _write_cache(file: Path, known: dict[bytes, bytes]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pairs = b"".join(key + value for key, value in known.items())
    handle, unfinished = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.part-")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(_digest(pairs) + pairs)
        os.replace(unfinished, file)
    finally:
        Path(unfinished).unlink(missing_ok=True)
