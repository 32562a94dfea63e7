"""CheXpert (Irvin et al., AAAI 2019, arXiv:1901.07031): chest X-rays with 14 findings, some of them uncertain."""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from monai_unlearn.data.image_data import ImageData, ImageFiles

__all__ = ["read_chexpert"]

FINDINGS = (
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
COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
POLICIES = {"zeros": 0.0, "ones": 1.0, "ignore": math.nan, "soft": 0.5}
# As in the public baselines jfhealthcare/Chexpert and LibAUC (the latter for all 14). For these two the paper chose
# U-Ones as well; for the others of the competition it chose policies that need a third class or a second training.
BASELINE_ONES = ("Atelectasis", "Edema")

SEX = {"Female": "female", "Male": "male", "Unknown": None}
VIEWS = {"Frontal": "frontal", "Lateral": "lateral"}
OWN_COLUMNS = ("patient", "study", "sex", "age", "view", "projection")
SPLITS = ("train", "valid")
PATIENT = re.compile(r"patient\d+")


def read_chexpert(
    dataset_dir: str | os.PathLike,
    findings: str | Sequence[str] = "competition",
    uncertainty: str | Mapping[str, str] = "baseline",
    blanks: str = "zeros",
    view: str = "frontal",
    projection: str = "all",
    original_checkpoint: str | os.PathLike | None = None,
    heldout_patients: str | os.PathLike | None = None,
    validation_fraction: float = 0.1,
    on_broken: str = "raise",
) -> ImageData:
    """Read ``train.csv`` and ``valid.csv`` of CheXpert-v1.0 or CheXpert-v1.0-small; no image is opened.

    ``valid.csv`` is the test set. Validation images come from ``train.csv``, whole patients at a time: those of
    ``heldout_patients``, or else a share of all patients, drawn by SHA-256 of the patient alone. So a patient is always
    on the same side, whatever the run's seed, the filters and the other rows are.

    Someone else's model (``original_checkpoint``) was trained on all of ``train.csv``. Without ``heldout_patients``,
    the images that it never saw are then those of ``valid.csv``: they are the validation images, there is no test set,
    and ``notes`` says how much weaker that makes the figures.

    ``attributes`` has the columns patient (``patient00001``), study (``patient00001/study1``), sex (female, male), age
    in years, view (frontal, lateral), projection (AP, PA, rarely LL, RL) and, in lower case, the columns of
    ``train.csv`` that CheXpert itself has not. An unknown sex, an age of 0, which stands for one that is not known,
    and an empty projection are missing values.

    Args:
        dataset_dir: the folder that the data was unpacked to: the one with both files, or the one above, in which the
            parts of CheXpert-v1.0 lie side by side.
        findings: ``"competition"`` (the five that the competition scores), ``"all"`` 14, or a list of names.
        uncertainty: what an uncertain label (-1) becomes: ``"zeros"``, ``"ones"``, ``"ignore"`` (not known, so masked
            out of loss and figures), ``"soft"`` (0.5), or ``"baseline"``: ones for Atelectasis and Edema, zeros for the
            others. A mapping names the policy of some findings; the others have ``"baseline"``.
        blanks: what a finding that the report does not mention becomes: ``"zeros"`` or ``"ignore"``.
        view: ``"frontal"``, ``"lateral"`` or ``"all"``.
        projection: ``"AP"``, ``"PA"`` or ``"all"``.
        original_checkpoint: the model to unlearn from, where somebody trained it on all of ``train.csv``.
        heldout_patients: text file with one patient id of ``train.csv`` a line: patients that no model was trained on.
        validation_fraction: share of the patients of ``train.csv`` to validate on, in (0, 1), without
            ``heldout_patients`` and ``original_checkpoint``.
        on_broken: what to do when files are missing or empty: ``"raise"``, or ``"skip"`` these rows and note it.

    Raises:
        FileNotFoundError: if the folder, a CSV file, the file of patients, or every image is not there.
        ValueError: if an option is none, a file is not as CheXpert's are, files are broken, or a part is empty.
    """
    names = _findings(findings)
    policies = _policies(uncertainty)
    _choice("blanks", blanks, ("zeros", "ignore"))
    _choice("view", view, ("frontal", "lateral", "all"))
    _choice("projection", projection, ("all", "AP", "PA"))
    _choice("on_broken", on_broken, ("raise", "skip"))
    if isinstance(validation_fraction, bool) or not 0 < validation_fraction < 1:
        raise ValueError(
            f"validation_fraction should lie between 0 and 1 (both excluded), but got {validation_fraction!r}."
        )
    if dataset_dir is None:  # as the bundle has it when nothing is given
        raise ValueError("dataset_dir should be the folder that CheXpert was unpacked to, but got None.")
    root = Path(dataset_dir)
    folder = _csv_folder(root)
    places = _patient_folders(root)
    tables, notes = {}, []
    for split in SPLITS:
        table = _read_csv(folder / f"{split}.csv", names, _homes(places, split))
        chosen = ((view == "all") | (table["view"] == view)) & (
            (projection == "all") | (table["projection"] == projection)
        )
        if not chosen.any():
            raise ValueError(
                f"No row of {split}.csv is left with view {view!r} and projection {projection!r}. Choose others; "
                "lateral images have no projection."
            )
        sizes = _sizes(root, table["Path"][chosen].tolist())
        notes += _broken(sizes, f"{split}.csv", on_broken)
        tables[split] = (table, np.flatnonzero(chosen)[sizes > 0])

    patients = set(tables["train"][0]["patient"].tolist())
    shared = len(patients.intersection(tables["valid"][0]["patient"].tolist()))
    if shared:
        raise ValueError(
            f"No patient should be in both train.csv and valid.csv, but {shared} are: nobody could tell what a model "
            "was trained on. Remove their rows from one of them."
        )

    def part(split: str, name: str, keep: Collection[str] | None = None) -> ImageFiles:
        table, rows = tables[split]
        table = table.iloc[rows]
        if keep is not None:
            table = table[table["patient"].isin(keep)]
        if len(table) == 0:
            raise ValueError(f"No image of {split}.csv is left for the {name} set. Choose other patients or filters.")
        extra = [column for column in tables["train"][0] if column not in (*OWN_COLUMNS, *FINDINGS, "Path")]
        return ImageFiles(
            root=root,
            files=table["Path"].to_numpy(dtype=object),
            labels=_labels(table, names, policies, blanks),
            attributes=table.reindex(columns=[*OWN_COLUMNS, *extra]).reset_index(drop=True),
            name=name,
        )

    test = None
    if heldout_patients is None and original_checkpoint is not None:
        train, validation = part("train", "train"), part("valid", "validation")
    else:
        if heldout_patients is None:
            held_out = {patient for patient in patients if _share(patient) < validation_fraction}
        else:
            held_out = _read_patients(heldout_patients, patients)
        train, validation = part("train", "train", patients - held_out), part("train", "validation", held_out)
        test = part("valid", "test")
    if original_checkpoint is not None:
        notes.append(_power(validation, len(patients) * validation_fraction, heldout_patients is not None))
    one_sided = [
        name for name, column in zip(names, train.labels.T) if not (column > 0).any() or not (column < 1).any()
    ]
    if one_sided:
        notes.append(
            f"No training image is known to have, or none to lack: {', '.join(one_sided)}. Nothing can be learned of "
            "these findings."
        )
    return ImageData("CheXpert", names, train, validation, test, notes=tuple(notes))


def _choice(name: str, value: Any, options: Collection[str]) -> None:
    if value not in options:
        raise ValueError(f"{name} should be one of {', '.join(options)}, but got {value!r}.{_nearest(value, options)}")


def _nearest(name: Any, options: Iterable[str]) -> str:
    lower = {option.lower(): option for option in options}
    nearest = difflib.get_close_matches(str(name).lower(), list(lower), n=1, cutoff=0.5)
    return f" Did you mean {lower[nearest[0]]!r}?" if nearest else ""


def _findings(findings: str | Sequence[str]) -> tuple[str, ...]:
    """The names of the findings, checked."""
    known = {"competition": COMPETITION, "all": FINDINGS}
    if isinstance(findings, str):
        if findings in known:
            return known[findings]
        if findings not in FINDINGS:
            raise ValueError(
                f"findings should be competition, all, or a list of names, but got {findings!r}."
                f"{_nearest(findings, (*known, *FINDINGS))}"
            )
        return (findings,)
    names = tuple(findings)
    for name in names:
        if name not in FINDINGS:
            raise ValueError(
                f"findings should be among CheXpert's 14, but got {name!r}.{_nearest(name, FINDINGS)} "
                f"There are: {', '.join(FINDINGS)}."
            )
    if not names or len(set(names)) < len(names):
        raise ValueError(f"findings should name at least one finding, and each once, but got {list(names)!r}.")
    return names


def _policies(uncertainty: str | Mapping[str, str]) -> dict[str, str]:
    """The policy of every finding."""
    baseline = {name: "ones" if name in BASELINE_ONES else "zeros" for name in FINDINGS}
    options = ("baseline", *POLICIES)
    if isinstance(uncertainty, str):
        _choice("uncertainty", uncertainty, options)
        return baseline if uncertainty == "baseline" else dict.fromkeys(FINDINGS, uncertainty)
    if not isinstance(uncertainty, Mapping):
        raise ValueError(
            f"uncertainty should be one of {', '.join(options)}, or map findings to them, but got {uncertainty!r}."
        )
    for name, policy in uncertainty.items():
        if name not in FINDINGS:
            raise ValueError(f"uncertainty should map findings, but got {name!r}.{_nearest(name, FINDINGS)}")
        _choice(f"uncertainty of {name}", policy, options)
    return baseline | {name: policy for name, policy in uncertainty.items() if policy != "baseline"}


def _csv_folder(root: Path) -> Path:
    """The folder with both CSV files: the one given, or one of those in it."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"dataset_dir should be the folder that CheXpert was unpacked to, but there is no folder {str(root)!r}."
        )
    for candidates in ([root], sorted(folder for folder in root.iterdir() if folder.is_dir())):
        found = [folder for folder in candidates if all((folder / f"{split}.csv").is_file() for split in SPLITS)]
        if len(found) > 1:
            raise ValueError(
                f"dataset_dir should hold one copy of CheXpert, but {len(found)} of its folders have train.csv and "
                f"valid.csv: {', '.join(folder.name for folder in found)}. Name one of them."
            )
        if found:
            return found[0]
    raise FileNotFoundError(
        f"dataset_dir should be the folder that CheXpert was unpacked to, but neither {str(root)!r} nor a folder in it "
        "has both train.csv and valid.csv. Check the path; CheXpert itself is to be had from Stanford alone."
    )


def _patient_folders(root: Path) -> dict[str, list[str]]:
    """The folders at most two levels down, relative to the root, that hold patients' folders; and these."""
    found = {}
    pending = [("", 0)]
    while pending:
        place, depth = pending.pop()
        with os.scandir(root / place) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
        patients = [name for name in names if PATIENT.fullmatch(name)]
        prefix = f"{place}/" if place else ""
        if patients:
            found[prefix] = patients
        elif depth < 2:
            pending += [(prefix + name, depth + 1) for name in names]
    return found


def _homes(places: Mapping[str, Sequence[str]], split: str) -> dict[str, str]:
    """Where the folder of each patient of a split lies: in one named after it, or in the parts of CheXpert-v1.0."""
    ends = {place: place.rstrip("/").rpartition("/")[2] for place in places}
    chosen = [place for place in places if ends[place] == split]
    chosen = chosen or [place for place in places if ends[place] not in SPLITS]
    homes = {patient: place for place in chosen for patient in places[place]}
    twice = sum(len(places[place]) for place in chosen) - len(homes)
    if twice:
        raise ValueError(
            f"dataset_dir should hold each patient once, but {twice} have folders in more than one place, so that it "
            "can't be told which images are meant. Keep one copy of CheXpert there."
        )
    return homes


def _read_csv(file: Path, findings: Sequence[str], homes: Mapping[str, str]) -> pd.DataFrame:
    """One row an image: attributes, findings as they are, and the image's path under the root in ``Path``."""
    try:
        table = pd.read_csv(file)
    except (ValueError, UnicodeDecodeError) as error:  # what pandas raises for an empty or a damaged file
        raise ValueError(f"{file.name} could not be read as CSV ({str(error).strip()}). Unpack it again.") from None
    own = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA")
    for column in (*own, *findings):
        if column not in table:
            raise ValueError(
                f"{file.name} should have the columns of CheXpert, but has no {column!r}."
                f"{_nearest(column, map(str, table.columns))} Unpack it again."
            )
    if len(table) == 0:
        raise ValueError(f"{file.name} should have a row for each image, but has none. Unpack it again.")
    parts = [str(path).split("/")[-3:] for path in table["Path"].tolist()]
    odd = sum(len(p) < 3 or not PATIENT.fullmatch(p[0]) or not p[1].startswith("study") for p in parts)
    if odd:
        raise ValueError(
            f"Path should end in patientXXXXX/studyX/FILE, but {odd} of {len(table)} rows of {file.name} don't. "
            "Unpack it again."
        )
    given = table[list(findings)]
    values = given.apply(pd.to_numeric, errors="coerce")  # one word makes text of a whole column
    known = values.isin([-1, 0, 1]) | given.isna()
    if not known.to_numpy().all():
        name = known.columns[~known.all()][0]
        raise ValueError(
            f"Findings should be 1, 0, -1 or blank, but {int((~known[name]).sum())} of {len(table)} rows of "
            f"{file.name} have something else for {name!r}. Unpack it again."
        )
    age = pd.to_numeric(table["Age"], errors="coerce")
    _refuse_odd(file, "Age", "a number of years", (age.isna() & table["Age"].notna()) | (age < 0) | (age == math.inf))
    _refuse_odd(file, "Sex", ", ".join(SEX), table["Sex"].notna() & ~table["Sex"].isin(list(SEX)))
    _refuse_odd(file, "Frontal/Lateral", ", ".join(VIEWS), ~table["Frontal/Lateral"].isin(list(VIEWS)))
    result = pd.DataFrame(
        {
            "Path": [f"{homes.get(patient, '')}{patient}/{study}/{name}" for patient, study, name in parts],
            "patient": [patient for patient, _, _ in parts],
            "study": [f"{patient}/{study}" for patient, study, _ in parts],
            "sex": table["Sex"].map(SEX),
            "age": age.where(age > 0),
            "view": table["Frontal/Lateral"].map(VIEWS),
            "projection": table["AP/PA"],
        }
    )
    twice = int(result["Path"].duplicated().sum())
    if twice:
        raise ValueError(
            f"Path should name each image once, but {twice} of {len(table)} rows of {file.name} repeat another. "
            "Remove them."
        )
    for column in table.columns.difference([*own, *FINDINGS], sort=False):
        name = str(column).strip().lower().replace(" ", "_")
        if name.startswith("unnamed:"):  # an index that pandas wrote
            continue
        if name in result or name in ("file", "index"):
            raise ValueError(
                f"Further columns should not be called as the reader's own, but {file.name} has {column!r}. Rename it."
            )
        result[name] = table[column]
    return pd.concat([result, values], axis=1)


def _refuse_odd(file: Path, column: str, rule: str, odd: pd.Series) -> None:
    if odd.any():
        raise ValueError(
            f"{column} should be {rule}, but {int(odd.sum())} of {len(odd)} rows of {file.name} have something else. "
            "Correct them."
        )


def _sizes(root: Path, files: Iterable[str]) -> np.ndarray:
    """Size of each file in bytes, -1 where there is none."""

    def size(path: str) -> int:
        try:
            status = os.stat(path)
        except OSError:
            return -1
        return status.st_size if stat.S_ISREG(status.st_mode) else -1  # a folder has a size as well

    return np.array([size(f"{root}/{file}") for file in files])


def _broken(sizes: np.ndarray, file: str, on_broken: str) -> list[str]:
    """Refuse missing and empty files, or give the note on those that are left out."""
    missing, empty = int((sizes < 0).sum()), int((sizes == 0).sum())
    if missing == len(sizes):
        raise FileNotFoundError(
            f"dataset_dir should be the folder with CheXpert's images, in train and valid or in the parts of "
            f"CheXpert-v1.0, but none of the {missing} images of {file} is there. Check the path."
        )
    if missing + empty == 0:
        return []
    count = f"of the {len(sizes)} images of {file}, {missing} are missing and {empty} are empty files"
    usable = missing + empty < len(sizes)
    if on_broken == "raise" or not usable:
        advice = ", or leave these rows out with --on_broken skip" if usable else ""
        raise ValueError(f"All images should be there, but {count}. Unpack them again{advice}.")
    return [f"Left out: {count}."]


def _labels(table: pd.DataFrame, findings: Sequence[str], policies: Mapping[str, str], blanks: str) -> np.ndarray:
    """N × L labels in [0, 1], NaN where not known."""
    labels = table[list(findings)].to_numpy(dtype=np.float32, copy=True)
    if blanks == "zeros":
        np.nan_to_num(labels, copy=False, nan=0.0)
    for column, name in enumerate(findings):
        labels[labels[:, column] == -1, column] = POLICIES[policies[name]]
    return labels


def _share(patient: str) -> float:
    """A number in [0, 1) that depends on nothing but the patient's id."""
    return int.from_bytes(hashlib.sha256(f"validation:{patient}".encode()).digest()[:6], "big") / 2**48


def _read_patients(file: str | os.PathLike, patients: Collection[str]) -> set[str]:
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"heldout_patients should be an existing text file, but got {str(file)!r}.")
    try:
        names = {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()}
    except UnicodeDecodeError:
        raise ValueError(f"heldout_patients should be a text file, but {path.name!r} is not text.") from None
    unknown = len(names - set(patients))
    if not names or unknown:
        raise ValueError(
            "heldout_patients should name patients of train.csv as patientXXXXX, one a line, but "
            + (f"{unknown} of {len(names)} are not in it." if names else f"{path.name!r} is empty.")
            + " Check the file; ids are not shown to keep them out of logs."
        )
    return names


def _power(validation: ImageFiles, usual_patients: float, held_out: bool) -> str:
    """What a report has to say of images that somebody else's model never saw."""
    patients = len(np.unique(np.asarray(validation.patients, dtype=str)))
    origin = (
        "of the held-out patients"
        if held_out
        else "of valid.csv. Radiologists labelled these, where the labels of train.csv come from reports: a model may "
        "treat them differently for that alone, so compare with the retrained model"
    )
    return (
        "Every other image of train.csv counts as one that the given checkpoint was trained on. Images that it never "
        f"saw: {len(validation)} images of {patients} patients {origin}. Half of them are for choices; the other half, "
        f"about {patients // 2} patients, is for all figures on unseen images. An attack's AUC can be told from 0.5 "
        f"only when it is more than about {_margin(patients):.3f} away (95 %), with few forgotten images even farther. "
        "For a model of one's own, validated on a part of train.csv, that would be "
        f"{_margin(usual_patients):.3f}, from about {round(usual_patients) // 2} patients."
    )


def _margin(patients: float) -> float:
    """1.96 standard errors of an AUC of 0.5, with an image for each of half the patients, against very many images."""
    return 1.96 / math.sqrt(12 * max(patients / 2, 1))
