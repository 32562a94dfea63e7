"""A data set in exactly CheXpert's layout, from real chest X-rays with planted findings: CheXpert can't be shared.

Every finding is a soft spot at a place of its own, of varying strength. Sex changes image and prevalence;
``Scanner`` is drawn at random and changes nothing, for a null control.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageFilter

XRAYS = Path(__file__).parents[2] / "shared" / "data" / "mednist_subset.tar.gz"
NO_XRAYS = "the real chest X-rays are not beside this checkout (shared/data/mednist_subset.tar.gz)"

# Prevalence; row, column and their radii as shares of the image; bright or dark.
FINDINGS = {
    "Enlarged Cardiomediastinum": (0.10, 0.30, 0.50, 0.12, 0.05, 1),
    "Cardiomegaly": (0.22, 0.62, 0.60, 0.09, 0.11, 1),
    "Lung Opacity": (0.30, 0.42, 0.22, 0.09, 0.07, 1),
    "Lung Lesion": (0.10, 0.34, 0.78, 0.04, 0.04, 1),
    "Edema": (0.28, 0.50, 0.34, 0.10, 0.06, 1),
    "Consolidation": (0.20, 0.66, 0.26, 0.06, 0.06, 1),
    "Pneumonia": (0.12, 0.56, 0.76, 0.06, 0.05, 1),
    "Atelectasis": (0.26, 0.74, 0.34, 0.02, 0.12, 1),
    "Pneumothorax": (0.12, 0.16, 0.28, 0.05, 0.07, -1),
    "Pleural Effusion": (0.32, 0.84, 0.82, 0.07, 0.09, 1),
    "Pleural Other": (0.08, 0.50, 0.92, 0.10, 0.03, 1),
    "Fracture": (0.10, 0.24, 0.86, 0.02, 0.05, -1),
    "Support Devices": (0.40, 0.14, 0.52, 0.12, 0.015, 1),
}
COLUMNS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
# How much likelier women are to have a finding than men, as a factor of the odds.
ODDS_OF_WOMEN = {"Edema": 2.0, "Cardiomegaly": 0.5, "Pleural Effusion": 1.6, "Atelectasis": 0.7}
FIRST_VALID = 64541
BATCHES = ("CheXpert-v1.0 batch 2 (train 1)", "CheXpert-v1.0 batch 3 (train 2)", "CheXpert-v1.0 batch 4 (train 3)")
CSV_BATCH = "CheXpert-v1.0 batch 1 (validate & csv)"


def write_chexpert(
    folder: Path,
    n_patients: int = 60,
    seed: int = 0,
    size: int = 64,
    images: str = "synthetic",
    small: bool = True,
    odd_rows: bool = False,
    n_valid: int | None = None,
    strength: float = 1.0,
    noise: float = 0.03,
    uncertain: float = 0.08,
) -> Path:
    """Write the data set and return its ``dataset_dir``. The same arguments give the same images and tables.

    Args:
        folder: where to put it.
        n_patients: patients of ``train.csv``, each with about 2.4 images in about 1.9 studies.
        seed: seed of every draw.
        size: rows and columns of an image.
        images: ``"mednist"`` for real chest X-rays (needs ``XRAYS``), or ``"synthetic"``.
        small: CheXpert-v1.0-small; False for the parts of CheXpert-v1.0.
        odd_rows: a missing file, an empty file, an unknown sex, an age of 0, an odd projection, a colour image.
        n_valid: patients of ``valid.csv``, with one study each; a fifth of ``n_patients`` unless told.
        strength: how clearly the findings show; 1 for a mean AUROC of about 0.85.
        noise: share of the findings that the report gets wrong.
        uncertain: share of the findings that the report is uncertain of.
    """
    random = np.random.RandomState(seed)
    xrays = _real_xrays(size) if images == "mednist" else _synthetic_xrays(random, 64, size)
    root = Path(folder) / "CheXpert-v1.0-small" if small else Path(folder)
    prefix = "CheXpert-v1.0-small" if small else "CheXpert-v1.0"
    csvs = root if small else root / CSV_BATCH
    csvs.mkdir(parents=True, exist_ok=True)
    n_valid = max(4, n_patients // 5) if n_valid is None else n_valid
    for split, first, count in (("train", 1, n_patients), ("valid", FIRST_VALID, n_valid)):
        rows = []
        for patient in range(first, first + count):
            home = csvs / split
            if split == "train" and not small:
                home = root / BATCHES[(patient - 1) * len(BATCHES) // n_patients]
            rows += _patient(random, xrays, f"patient{patient:05d}", home, split, strength)
        table = pd.DataFrame(rows)
        table["Path"] = f"{prefix}/{split}/" + table["Path"]
        if split == "train":
            _as_in_reports(random, table, noise, uncertain)
            if odd_rows:
                _make_odd(table, csvs / "train" if small else root / BATCHES[0])
        columns = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *COLUMNS, "Scanner"]
        table[columns].to_csv(csvs / f"{split}.csv", index=False)
    return root


def _patient(
    random: np.random.RandomState, xrays: np.ndarray, patient: str, home: Path, split: str, strength: float
) -> list[dict]:
    """Write a patient's images and return their rows, with all findings known."""
    woman, scanner, age = random.rand() < 0.45, "AB"[random.randint(2)], random.randint(18, 91)
    body = xrays[random.randint(len(xrays))]
    chances = {}
    for name, (prevalence, *_) in FINDINGS.items():
        odds = prevalence / (1 - prevalence) * (ODDS_OF_WOMEN.get(name, 1.0) if woman else 1.0)
        chances[name] = random.beta(odds / (1 + odds), 1 - odds / (1 + odds))  # a patient tends to keep a finding
    rows = []
    for study in range(1, 2 if split == "valid" else 2 + min(random.poisson(0.9), 4)):
        findings = {name: float(random.rand() < chance) for name, chance in chances.items()}
        ill = any(value for name, value in findings.items() if name != "Support Devices")
        views = ["frontal"] + ["lateral"] * (random.rand() < 0.25)
        for number, view in enumerate(views, start=1):
            file = f"{patient}/study{study}/view{number}_{view}.jpg"
            path = home / file
            path.parent.mkdir(parents=True, exist_ok=True)
            other = xrays[random.randint(len(xrays))]
            Image.fromarray(_picture(random, body, other, findings, woman, strength)).save(path, quality=92)
            rows.append(
                {
                    "Path": file,
                    "Sex": "Female" if woman else "Male",
                    "Age": age + study // 3,
                    "Frontal/Lateral": view.capitalize(),
                    "AP/PA": np.nan if view == "lateral" else "AP" if random.rand() < 0.8 else "PA",
                    "No Finding": float(not ill),
                    **findings,
                    "Scanner": scanner,
                }
            )
    return rows


def _picture(
    random: np.random.RandomState,
    body: np.ndarray,
    other: np.ndarray,
    findings: dict[str, float],
    woman: bool,
    strength: float,
) -> np.ndarray:
    """The patient's X-ray, a little of another one's, and what is planted; H × W, uint8."""
    size = len(body)
    share = random.uniform(0.15, 0.35)
    picture = (1 - share) * body + share * other
    shift = random.randint(-size // 20, size // 20 + 1, 2)
    picture = np.roll(picture, shift, axis=(0, 1))
    row, column = np.mgrid[:size, :size] / size
    for name, present in findings.items():
        _, y, x, ry, rx, sign = FINDINGS[name]
        y, x = y + random.uniform(-0.03, 0.03), x + random.uniform(-0.03, 0.03)
        if present:
            amount = strength * random.uniform(0.10, 0.50)
            picture += sign * amount * np.exp(-(((row - y) / ry) ** 2) - ((column - x) / rx) ** 2)
    picture += (0.10 if woman else -0.10) * (row - 0.5)
    picture = (picture - 0.5) * random.uniform(0.85, 1.15) + 0.5 + random.uniform(-0.05, 0.05)
    picture += 0.02 * random.randn(size, size)
    return (255 * picture.clip(0, 1)).round().astype(np.uint8)


def _as_in_reports(random: np.random.RandomState, table: pd.DataFrame, noise: float, uncertain: float) -> None:
    """What a labeler makes of reports: mistakes, uncertain findings, and blanks for what is not mentioned."""
    for _, rows in table.groupby(table["Path"].str.rpartition("/")[0], sort=False).groups.items():
        for name in FINDINGS:
            true = table.loc[rows[0], name] == 1
            if random.rand() < noise:
                true = not true
            draw = random.rand()
            if true:
                label = -1.0 if draw < 2 * uncertain else np.nan if draw > 0.95 else 1.0
            else:
                label = -1.0 if draw < uncertain / 2 else 0.0 if draw > 0.8 else np.nan
            table.loc[rows, name] = label
        table.loc[rows, "No Finding"] = 1.0 if table.loc[rows[0], "No Finding"] == 1 else np.nan


def _make_odd(table: pd.DataFrame, home: Path) -> None:
    """Change the images of the first frontal rows, and attributes of other rows."""
    frontal = table.index[table["Frontal/Lateral"] == "Frontal"]
    paths = [home / path.split("/", 2)[2] for path in table.loc[frontal[:3], "Path"]]
    paths[0].unlink()
    paths[1].write_bytes(b"")
    Image.open(paths[2]).convert("RGB").save(paths[2])
    table.loc[frontal[3], "Sex"] = "Unknown"
    table.loc[frontal[4], "Age"] = 0
    table.loc[frontal[5], "AP/PA"] = "LL"


def _real_xrays(size: int) -> np.ndarray:
    """The chest X-rays of MedNIST, N × size × size in [0, 1], in the order of their names."""
    pictures = {}
    with tarfile.open(XRAYS) as archive:
        for member in archive:
            if "/CXR/" in member.name and member.isfile():
                pictures[member.name] = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("L")
    resized = [pictures[name].resize((size, size), Image.Resampling.BILINEAR) for name in sorted(pictures)]
    return np.stack([np.asarray(picture) for picture in resized]).astype(np.float32) / 255


def _synthetic_xrays(random: np.random.RandomState, n: int, size: int) -> np.ndarray:
    """Two dark lungs in a bright body, N × size × size in [0, 1]."""
    row, column = np.mgrid[:size, :size] / size
    pictures = []
    for _ in range(n):
        picture = 0.6 + 0.1 * random.randn()
        for centre in (0.3, 0.7):
            y, x, ry, rx = 0.48, centre, random.uniform(0.28, 0.34), random.uniform(0.13, 0.17)
            picture = picture - 0.35 / (1 + np.exp(8 * (np.hypot((row - y) / ry, (column - x) / rx) - 1)))
        noise = Image.fromarray((255 * random.rand(size, size)).astype(np.uint8))
        picture = picture + np.asarray(noise.filter(ImageFilter.GaussianBlur(size / 20))) / 255 - 0.5
        pictures.append(picture.clip(0, 1))
    return np.stack(pictures).astype(np.float32)
