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
THREADS = 8
SAVE_EVERY = 20_000


def pixel_hashes(images: np.ndarray) -> np.ndarray:
    """Hash of each image in memory.

    Args:
        images: N × H × W or N × H × W × C.

    Returns:
        N hashes of 128 bits; two are equal where the pixels are.
    """
    rows = np.ascontiguousarray(images)
    return _as_hashes([_digest(row.data) for row in rows])


def file_hashes(
    paths: Sequence[str], cache_file: Path | None = None, read_pixels: Callable[[str], np.ndarray] | None = None
) -> np.ndarray:
    """Hash of the decoded pixels of each file, with a progress bar on a terminal.

    Files that are equal in bytes are decoded once. What was scanned is kept in ``cache_file`` under a hash of path,
    size and time of change, so that a later scan decodes new and changed files only. The cache holds no name, but
    hashes of images: it is readable by its owner alone.

    Args:
        paths: the files.
        cache_file: where to keep the hashes; None keeps nothing.
        read_pixels: function that reads a file; by default MONAI's ``LoadImage``.

    Returns:
        As ``pixel_hashes``.

    Raises:
        ValueError: if files can't be read; how many, not which.
    """
    logging.getLogger("LoadImage").setLevel(logging.WARNING)  # at INFO it writes names of files
    read = read_pixels or LoadImage(image_only=True, dtype=None)
    keys = [_key(path) for path in paths]
    known = {} if cache_file is None else _read_cache(cache_file)
    missing = [i for i, key in enumerate(keys) if key not in known]
    decoded: dict[bytes, bytes] = {}
    unreadable = 0

    def scan(position: int) -> bytes | None:
        try:
            content = _digest(Path(paths[position]).read_bytes()) if os.path.isfile(paths[position]) else keys[position]
            if content not in decoded:
                pixels = np.ascontiguousarray(read(paths[position]))
                decoded[content] = _digest(pixels.data, f"{pixels.shape}{pixels.dtype.str}".encode())
            return decoded[content]
        except Exception:  # whatever a reader trips over; its message would name the file
            return None

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            bar = tqdm(total=len(missing), desc="looking for duplicates", disable=not sys.stderr.isatty())
            for done, (position, digest) in enumerate(zip(missing, pool.map(scan, missing)), 1):
                bar.update()
                if digest is None:
                    unreadable += 1
                else:
                    known[keys[position]] = digest
                if cache_file is not None and done % SAVE_EVERY == 0:
                    _write_cache(cache_file, known)
            bar.close()
    finally:
        if cache_file is not None and missing:
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


def _digest(content: bytes | memoryview, prefix: bytes = b"") -> bytes:
    sha = hashlib.blake2b(prefix, digest_size=16)
    sha.update(content)
    return sha.digest()


def _as_hashes(digests: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), dtype=HASH)


def _key(path: str) -> bytes:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"An image file can't be read ({error.strerror}). Repair or remove it.") from None
    return _digest(f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}".encode())


def _read_cache(file: Path) -> dict[bytes, bytes]:
    try:
        pairs = np.load(file, allow_pickle=False)
        if pairs.dtype != np.uint8 or pairs.ndim != 2 or pairs.shape[1] != 32:
            raise ValueError("another file")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, EOFError):
        logger.warning("The cache of the search for duplicates is damaged and is made anew.")
        return {}
    return {row[:16].tobytes(): row[16:].tobytes() for row in pairs}


def _write_cache(file: Path, known: dict[bytes, bytes]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pairs = np.frombuffer(b"".join(key + value for key, value in known.items()), dtype=np.uint8).reshape(-1, 32)
    handle, unfinished = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.part-")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as stream:
            np.save(stream, pairs)
        os.replace(unfinished, file)
    finally:
        Path(unfinished).unlink(missing_ok=True)
