"""Time and memory of finding the images that a deletion request means.

    python benchmarks/deletion_requests.py

Prints the figures that docs/requests.md records. Each case runs in a process of its own, so that its peak memory,
which includes Python, the package's imports and the table of the images, is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from monai_unlearn.data.request import read_request, resolve_request


def table(n: int, categorical: bool, files: bool) -> pd.DataFrame:
    """A table of images: about three a patient, with metadata and, if asked, a study and a file name each.

    Args:
        n: number of images.
        categorical: text as pandas categories, rather than as text in each row.
        files: with columns study and file.
    """
    generator = np.random.default_rng(0)
    patient = np.sort(generator.integers(0, n // 3, n, dtype=np.int32))
    columns: dict = {}

    def text(name: str, codes: np.ndarray, values: list[str]) -> None:
        column = pd.Categorical.from_codes(codes, values)
        columns[name] = column if categorical else np.array(values, dtype=object)[codes]

    text("patient", patient, [f"patient{number:08d}" for number in range(n // 3)])
    text("sex", generator.integers(0, 2, n, dtype=np.int8), ["F", "M"])
    text("site", generator.integers(0, 20, n, dtype=np.int8), [f"site {number}" for number in range(20)])
    columns["age"] = generator.integers(18, 90, n, dtype=np.int8)
    columns["difficulty"] = generator.random(n, dtype=np.float32)
    if files:
        view = np.arange(n) - np.searchsorted(patient, patient)
        columns["study"] = [f"1.2.826.0.1.{number}.1" for number in patient]
        columns["file"] = [
            f"train/patient{number:08d}/study1/view{i + 1}_frontal.jpg" for number, i in zip(patient, view)
        ]
    return pd.DataFrame(columns)


def request(kind: str, index: pd.DataFrame, entries: int) -> dict:
    """A request for so many entries of a kind."""
    rows = np.linspace(0, len(index) - 1, entries).astype(int)
    if kind in ("patient", "study", "file"):
        return {kind: sorted({str(index[kind].iloc[row]) for row in rows})}
    kinds: dict[str, dict] = {
        "index": {"index": rows.tolist()},
        "glob": {"file": "**/view2_*.jpg"},
        "rule": {"rule": 'sex == "F" and 40 <= age < 60 and site in ["site 1", "site 2"]'},
        "fraction": {"fraction": 0.1},
        "hardest": {"hardest": 10},
    }
    return kinds[kind]


def measure(kind: str, n: int, entries: int, categorical: bool, repeats: int) -> None:
    """Print one case's figures as JSON."""
    index = table(n, categorical, files=kind in ("study", "file", "glob"))
    before = peak_gib()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "request.json"
        path.write_text(json.dumps({"include": [request(kind, index, entries)]}), encoding="utf-8")
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            resolution = resolve_request(read_request(path), index)
            times.append(time.perf_counter() - start)
    print(json.dumps({"times": times, "peak": peak_gib(), "before": before, **resolution.as_dict()}))


def peak_gib() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        kind, n, entries, form = chosen.case
        measure(kind, int(n), int(entries), form == "categories", chosen.repeats)
        return
    print(f"{Path(__file__).name}, {platform.machine()}, {os.cpu_count()} cores, pandas {pd.__version__}\n")
    small = [(kind, 223_414, 10_000, "text") for kind in ("patient", "study", "file", "index")]
    small += [(kind, 223_414, 1, "text") for kind in ("glob", "rule", "fraction", "hardest")]
    large = [(kind, 10_000_000, 10_000, "categories") for kind in ("patient", "index")]
    large += [(kind, 10_000_000, 1, "categories") for kind in ("rule", "fraction", "hardest")]
    large += [("patient", 10_000_000, 10_000, "text"), ("file", 10_000_000, 10_000, "categories")]
    for case in small + large:
        kind, n, entries, form = case
        command = [sys.executable, __file__, "--repeats", str(chosen.repeats), "--case", *map(str, case)]
        done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        times = done["times"]
        print(
            f"{n:>10,} images ({form}), {entries:>6,} × {kind:<8} {statistics.median(times):6.2f} s "
            f"({min(times):.2f} to {max(times):.2f}, {len(times)} runs), {done['peak']:.2f} GiB at the peak "
            f"({done['before']:.2f} before), {done['images']:,} images",
            flush=True,
        )


if __name__ == "__main__":
    main()
