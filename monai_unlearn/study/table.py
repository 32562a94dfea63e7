"""The study's table: a row for each run, tidy, added to by later runs."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import monai_unlearn
from monai_unlearn.bundle import bundle_path
from monai_unlearn.evaluation import SPLITS
from monai_unlearn.report import MAIN_FIGURE
from monai_unlearn.study.requests import group_of_sex

__all__ = ["COLUMNS", "FLOORS", "Table", "code_version", "figures_of", "floors_of", "key_of"]

# What a row is of.
IDENTITY = (
    *("data", "method", "tuned", "kind", "fraction", "seed", "request", "options", "settings", "key", "commit"),
    *("device", "finished", "error", "notes"),
)
SIZES = ("task", *(f"n_{split}" for split in SPLITS), "patients", "unseen_effective")
FIGURES = ("accuracy", "auroc")
ATTACKS = ("population", "patient", "ratio", "classifier")
STRATA = ("female", "male", "easiest", "middle", "hardest")
# Pairs of strata that should be treated alike: the first less the second.
PAIRS = {"sex": ("female", "male"), "difficulty": ("hardest", "easiest")}
CHANGED = ("forget", "test")
COST = ("samples", "forward", "backward", "seconds")


def _columns() -> Iterator[str]:
    yield from (*IDENTITY, *SIZES)
    for split in SPLITS:
        for figure in FIGURES:
            yield from (f"{split}_{figure}", f"retrained_{split}_{figure}", f"retrained_{split}_{figure}_sd")
    yield from ("gap", "floor", "untouched_gap", "excess", "js_forget", "js_forget_floor")
    yield from (f"{split}_change" for split in SPLITS)
    yield from ("harm_retain", "harm_test", "verdict", "direction")
    for attack in ATTACKS:
        names = ("auc", "difference", "low", "high", "low_90", "high_90", "answer", "floor")
        yield from (f"{attack}_attack_{name}" for name in names)
        yield f"retrained_{attack}_attack_auc"
    for split in CHANGED:
        for stratum in STRATA:
            yield from (f"{stratum}_{split}_{name}" for name in ("n", "change", "floor"))
        for pair in PAIRS:
            yield from (f"{pair}_{split}_{name}" for name in ("difference", "floor"))
    for stratum in STRATA:
        yield from (f"{stratum}_attack_auc", f"retrained_{stratum}_attack_auc")
    yield from COST
    yield from (f"tuning_{name}" for name in COST)
    yield from ("retrain_samples", "retrain_seconds", "share", "share_with_tuning", "seconds_share")
    yield "seconds_share_with_tuning"


COLUMNS = tuple(_columns())
# What the retrained models differ by among themselves, the same for all rows of one forget set.
FLOORS = tuple(column for column in COLUMNS if column.endswith(("_sd", "_floor")) and column != "js_forget_floor")


def figures_of(report: Mapping[str, Any], retrain: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The columns of a report: figures of the unlearned model, and of the retrained ones beside them.

    Changes, gaps and harm are in percentage points, accuracies and AUCs in [0, 1]. A change is the unlearned model's
    figure (accuracy; mean AUROC of findings) minus the retrained ones'.

    Args:
        report: ``task``, ``models``, ``audit``, ``cost`` and ``request``, as ``build_report`` gives them.
        retrain: cost of retraining, where the report does not have it.
    """
    models, audit = report["models"], report["audit"]
    own, reference = models["unlearned"], models["retrained"]
    figure = MAIN_FIGURE[report["task"]]
    row: dict[str, Any] = {"task": report["task"], "patients": (report["request"] or {}).get("patients")}
    row |= {"unseen_effective": audit["attacks"]["unseen"]["effective"], "notes": " ".join(report["notes"])}
    for split in SPLITS:
        row[f"n_{split}"] = own[split]["n"]
        for name in FIGURES:
            row[f"{split}_{name}"] = own[split][name]
            row[f"retrained_{split}_{name}"] = reference[split][name]
        row[f"{split}_change"] = _points(own[split][figure], reference[split][figure])
    distance = audit["distance"]
    gap = distance["average_gap"]
    row |= {"gap": gap["unlearned"], "floor": gap["floor"], "untouched_gap": gap["original"]}
    js = distance["splits"]["forget"]["js_divergence"]
    row |= {"excess": distance["excess"], "js_forget": js["unlearned"], "js_forget_floor": js["floor"]}
    row |= {f"harm_{split}": distance["harm"][split] for split in ("retain", "test")}
    row |= {"verdict": audit["verdict"]["answer"], "direction": audit["verdict"]["direction"]}
    row |= _attacks(audit["attacks"])
    row |= _strata(audit["subgroups"])
    return row | _cost(report["cost"], retrain)


def _points(own: float | None, other: float | None) -> float | None:
    return None if own is None or other is None else 100 * (own - other)


def _attacks(attacks: Mapping[str, Any]) -> dict[str, Any]:
    population = attacks["population"]
    entries = {
        "population": population["log_odds"],
        "patient": attacks["patient"],
        "ratio": attacks["ratio"],
        "classifier": population["classifier"],
    }
    row: dict[str, Any] = {}
    for name, entry in entries.items():
        if entry is None:
            continue
        for prefix, model in (("", "unlearned"), ("retrained_", "retrained")):
            if entry["models"][model] is not None:
                row[f"{prefix}{name}_attack_auc"] = entry["models"][model]["auc"]
        found = entry["difference"] or {}
        for column, key in (("difference", "difference"), ("low", "low_95"), ("high", "high_95")):
            row[f"{name}_attack_{column}"] = found.get(key)
        row |= {f"{name}_attack_{key}": found.get(key) for key in ("low_90", "high_90", "answer")}
    return row


def _strata(subgroups: Mapping[str, Any]) -> dict[str, Any]:
    """Change of the accuracy on images of each sex and difficulty, and what two strata differ by."""
    groups: dict[str, Mapping[str, Any]] = {}
    for column, content in subgroups.items():
        for group, found in content["groups"].items():
            name = group.split()[0] if column == "difficulty" else group_of_sex(group)
            if name in STRATA and (column == "difficulty" or str(column).lower() in ("sex", "gender")):
                groups.setdefault(str(name), found)
    row: dict[str, Any] = {}
    for name, found in groups.items():
        for split in CHANGED:
            change = found[split]["change"]["retrained"]
            row[f"{name}_{split}_n"] = found[split]["n"]
            row[f"{name}_{split}_change"] = None if change is None else _points(change["difference"], 0)
        attack = found["forget"]["attack"] or {}
        row |= {f"{name}_attack_auc": attack.get("unlearned")}
        row |= {f"retrained_{name}_attack_auc": attack.get("retrained")}
    for pair, (one, other) in PAIRS.items():
        for split in CHANGED:
            first, second = (row.get(f"{name}_{split}_change") for name in (one, other))
            row[f"{pair}_{split}_difference"] = None if first is None or second is None else first - second
    return row


def _cost(cost: Mapping[str, Any], retrain: Mapping[str, Any] | None) -> dict[str, Any]:
    """What unlearning cost, tuning beside it, and both as shares of retraining."""
    retrain = cost["retrain"] if retrain is None else retrain
    tuning = {name: (cost["tuning"] or {}).get(name, 0) for name in COST}
    own = {name: sum(cost[phase][name] for phase in ("mask", "unlearn") if cost[phase]) for name in COST}
    row: dict[str, Any] = {**own, **{f"tuning_{name}": value for name, value in tuning.items()}}
    for name, column in (("samples", "share"), ("seconds", "seconds_share")):
        whole = (retrain or {}).get(name)
        row[f"retrain_{name}"] = whole
        row[column] = own[name] / whole if whole else None
        row[f"{column}_with_tuning"] = (own[name] + tuning[name]) / whole if whole else None
    return row


def floors_of(
    figures: Sequence[Mapping[str, Mapping[str, Any]]], held_out: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """What retrained models differ by among themselves.

    Args:
        figures: for each of them split → ``accuracy`` and ``auroc``.
        held_out: for each of them the row of a report in which it stands in the place of the unlearned model, and the
            other retrained ones are the yardstick.

    Returns:
        For each figure of a split its standard deviation over the models, in [0, 1]; for each change and difference
        of ``held_out`` its mean absolute value, in its own unit.
    """
    found: dict[str, float | None] = {}
    for split in SPLITS:
        for name in FIGURES:
            values = [model[split][name] for model in figures]
            known = len(values) > 1 and None not in values
            found[f"retrained_{split}_{name}_sd"] = float(np.std(values, ddof=1)) if known else None
    for column in FLOORS:
        if column.endswith("_floor"):
            stem = column.removesuffix("_floor")
            source = next(name for name in (f"{stem}_change", f"{stem}_difference") if name in COLUMNS)
            values = [row.get(source) for row in held_out]
            found[column] = float(np.mean(np.abs(values))) if values and None not in values else None
    return found


def key_of(**parts: Any) -> str:
    """Name of a run: a hash of all that was asked for, 16 hex digits; the same for every version of the code."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def code_version() -> str:
    """The last commit that changed the package or its configs; ``…+`` and a hash of the files where they differ.

    Without a clone: the package's version.
    """
    root = Path(monai_unlearn.__file__).parent
    version = f"version {monai_unlearn.__version__}"
    bundles = bundle_path("train").parent
    where = ["--", str(root), str(bundles)]
    try:
        commit = _git(root, "log", "-1", "--format=%h", "--abbrev=10", *where)
        changed = _git(root, "status", "--porcelain", *where)
    except (OSError, subprocess.CalledProcessError):
        return version
    if not commit or not changed:
        return commit or version  # installed into a folder within somebody else's repository
    sha = hashlib.sha256()
    for folder in (root, bundles):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".json", ".j2"):
                sha.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return f"{commit}+{sha.hexdigest()[:8]}"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)  # noqa: S603 (fixed words)
    return done.stdout.strip()


class Table:
    """The results file.

    Args:
        path: a CSV file, which may not be there yet.

    Raises:
        ValueError: if it is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read()

    def finished(self) -> set[tuple[str, str]]:
        """(key, commit) of the runs that are there and did not fail."""
        return {(row["key"], row["commit"]) for row in self._read() if not row["error"]}

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows, each in the place of an earlier one of the same key and commit; other rows stay as they are.

        The file is there whole at any time, also where several studies add to it at once.
        """
        new = [{column: _text(row.get(column)) for column in COLUMNS} for row in rows]
        names = {(row["key"], row["commit"]) for row in new}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.parent):
            kept = [row for row in self._read() if (row["key"], row["commit"]) not in names]
            columns = list(COLUMNS) + [name for name in (kept[0] if kept else ()) if name not in COLUMNS]
            text = io.StringIO()
            writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows([*kept, *new])
            part = self.path.with_name(f".{self.path.name}.part-{os.getpid()}")
            part.write_text(text.getvalue(), encoding="utf-8")
            os.replace(part, self.path)

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        if not self.path.is_file():
            raise ValueError(f"results_file should be a CSV file, but {str(self.path)!r} is a folder. Name another.")
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
        except (csv.Error, UnicodeDecodeError):
            rows = [{}]
        if rows and not {"key", "commit", "error"} <= rows[0].keys():
            raise ValueError(
                f"results_file should be a study's table, but {self.path.name!r} is something else. Name another."
            )
        return rows


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process adds to a table in this folder; the lock ends with the process that has it."""
    try:
        import fcntl
    except ImportError:  # Windows, where two studies should not write into one file
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _text(value: Any) -> str:
    """A cell: nothing for what is undefined, and numbers in no more digits than they are worth."""
    if value is None or (isinstance(value, (float, np.floating)) and not math.isfinite(value)):
        return ""
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value)).lower()
    if isinstance(value, (float, np.floating)):
        return repr(round(float(value), 6))
    return str(value)
