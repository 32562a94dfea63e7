"""Reading images from disk against plain MONAI, and reading the tables of a set as large as CheXpert.

Images have the size of CheXpert-v1.0-small's or of the originals', drawn as in tests/chexpert_layout.py; each
comparison alternates both sides, so that a busy machine slows both. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from monai.data import CacheDataset, DataLoader, Dataset, PersistentDataset
from monai.transforms import EnsureChannelFirstd, EnsureTyped, LoadImaged, RandAffined, Resized, ScaleIntensityRanged
from monai.utils import set_determinism

from monai_unlearn.data import GreyImage, ImageFiles, file_dataset, make_loader, read_chexpert
from monai_unlearn.provenance import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from chexpert_layout import COLUMNS, FIRST_VALID, write_chexpert

# CheXpert's own numbers: patients, studies and images of train.csv.
PATIENTS, STUDIES, IMAGES = 64_540, 187_641, 223_414


def preprocessing(size: int) -> list:
    """The transforms of bundles/chexpert.json."""
    return [
        LoadImaged("image", ensure_channel_first=True, reverse_indexing=False, converter=GreyImage(size)),
        ScaleIntensityRanged("image", 0, 255, -1, 1),
        EnsureTyped("image", track_meta=False),
    ]


def usual_preprocessing(size: int) -> list:
    """The same by the transforms that MONAI's examples use."""
    return [
        LoadImaged("image", reverse_indexing=False),
        EnsureChannelFirstd("image"),
        Resized("image", (size, size)),
        ScaleIntensityRanged("image", 0, 255, -1, 1),
    ]


def augmentation(size: int) -> list:
    """The augmentation of bundles/chexpert.json."""
    return [
        RandAffined(
            "image",
            prob=1.0,
            rotate_range=0.2618,
            translate_range=[0.05 * size] * 2,
            scale_range=[0.05, 0.05],
            padding_mode="zeros",
            spatial_size=(size, size),
            cache_grid=True,
        ),
        EnsureTyped("image", track_meta=False),
    ]


def rate(loader: torch.utils.data.DataLoader) -> float:
    """Images a second in one pass."""
    start = time.perf_counter()
    images = sum(len(batch["label"]) for batch in loader)
    return images / (time.perf_counter() - start)


def compare(name: str, ours: torch.utils.data.DataLoader, theirs: torch.utils.data.DataLoader, pairs: int) -> None:
    """Print the rates of both, and their ratio, over alternating passes."""
    rates = [(rate(ours), rate(theirs)) for _ in range(pairs + 1)][1:]
    first, second = (statistics.median(values) for values in zip(*rates))
    ratios = [a / b for a, b in rates]
    print(
        f"{name:<66} {statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {pairs} pairs; "
        f"{first:.0f} against {second:.0f} images a second)",
        flush=True,
    )


def loading(part: ImageFiles, size: int, what: str, pairs: int) -> None:
    """One pass over images on disk, ours against MONAI's data sets with the same and with the usual transforms."""
    records = part.records()
    fixed, random = preprocessing(size), augmentation(size)

    def ours(steps: list, **options: object) -> torch.utils.data.DataLoader:
        workers = options.pop("num_workers", 0)
        return make_loader(file_dataset(part, steps, **options), 64, num_workers=workers)

    def theirs(dataset: Dataset, workers: int = 0) -> DataLoader:
        return DataLoader(dataset, batch_size=64, num_workers=workers, persistent_workers=workers > 0)

    with tempfile.TemporaryDirectory() as folder:
        for name, one, other in (
            ("decoded / MONAI, same transforms", ours(fixed), theirs(Dataset(records, fixed))),
            (
                "decoded and augmented / MONAI, same transforms",
                ours(fixed + random),
                theirs(Dataset(records, fixed + random)),
            ),
            (
                "decoded / MONAI, same transforms, 2 workers",
                ours(fixed, num_workers=2),
                theirs(Dataset(records, fixed), 2),
            ),
            (
                "decoded / MONAI, LoadImaged and Resized",
                ours(fixed),
                theirs(Dataset(records, usual_preprocessing(size))),
            ),
            (
                "cache in memory / CacheDataset",
                ours(fixed + random, cache="memory"),
                theirs(CacheDataset(records, fixed + random, progress=False)),
            ),
            (
                "cache on disk / PersistentDataset",
                ours(fixed, cache="disk", cache_dir=f"{folder}/ours"),
                theirs(PersistentDataset(records, fixed, f"{folder}/theirs")),
            ),
        ):
            compare(f"{what}: {name}", one, other, pairs)


def write_full_size(folder: Path) -> Path:
    """CheXpert's tables with as many rows as the real ones, and a file for each row."""
    root = folder / "CheXpert-v1.0-small"
    random = np.random.RandomState(0)
    studies = np.sort(np.concatenate([np.arange(PATIENTS), random.randint(0, PATIENTS, STUDIES - PATIENTS)]))
    study = np.arange(STUDIES) - np.searchsorted(studies, studies) + 1
    has_two = np.zeros(STUDIES, dtype=int)
    has_two[random.choice(STUDIES, IMAGES - STUDIES, replace=False)] = 1
    of = np.repeat(np.arange(STUDIES), 1 + has_two)
    lateral = np.append(of[1:] == of[:-1], False)[np.arange(IMAGES) - 1] & (np.arange(IMAGES) > 0)
    lateral &= np.append(False, of[1:] == of[:-1])
    views = np.where(lateral, "view2_lateral.jpg", "view1_frontal.jpg")
    paths = [f"patient{p + 1:05d}/study{s}/{v}" for p, s, v in zip(studies[of], study[of], views)]
    tables = {"train": paths, "valid": [f"patient{FIRST_VALID + i}/study1/view1_frontal.jpg" for i in range(202)]}
    for split, files in tables.items():
        n = len(files)
        table = pd.DataFrame({"Path": [f"CheXpert-v1.0-small/{split}/{file}" for file in files]})
        table["Sex"] = random.choice(["Female", "Male"], n)
        table["Age"] = random.randint(18, 91, n)
        table["Frontal/Lateral"] = ["Lateral" if "lateral" in file else "Frontal" for file in files]
        table["AP/PA"] = np.where(table["Frontal/Lateral"] == "Lateral", None, random.choice(["AP", "PA"], n))
        for name in COLUMNS:
            table[name] = random.choice([1.0, 0.0, -1.0, np.nan], n, p=[0.2, 0.1, 0.05, 0.65])
        for file in files:
            path = root / split / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\xff")
        table.to_csv(root / f"{split}.csv", index=False)
    return root


def reading(pairs: int) -> None:
    """Reading the tables of a set as large as CheXpert, and making its parts."""
    with tempfile.TemporaryDirectory() as folder:
        root = write_full_size(Path(folder))
        times: dict[str, list[float]] = {"read_csv alone": [], "read_chexpert": [], "digest": []}

        def timed(name: str, work: Callable[[], object]) -> object:
            start = time.perf_counter()
            result = work()
            times[name].append(time.perf_counter() - start)
            return result

        for _ in range(pairs):
            timed("read_csv alone", lambda: pd.read_csv(root / "train.csv"))
            data = timed("read_chexpert", lambda: read_chexpert(root, view="all"))
            timed("digest", data.digest)
        for name, values in times.items():
            print(f"{IMAGES:,} rows: {name:<48} {statistics.median(values):5.2f} s (at most {max(values):.2f} s)")


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", choices=["loading", "reading"])
    chosen = parser.parse_args()
    set_determinism(0)
    print(f"{Path(__file__).name} on {machine(torch.device('cpu'))}, {os.cpu_count()} cores\n")
    if chosen.only != "reading":
        with tempfile.TemporaryDirectory() as folder:
            for name, pixels, size, patients in (("small", 390, 320, 60), ("full size", 2320, 320, 10)):
                data = read_chexpert(write_chexpert(Path(folder) / name, patients, size=pixels))
                loading(data.train, size, name, chosen.pairs)
    if chosen.only != "loading":
        reading(chosen.pairs)


if __name__ == "__main__":
    main()
