"""The three methods beside the untouched original, on one data set over several seeds.

    python benchmarks/results.py --dataset_file pneumoniamnist.npz --seeds 0 1 2

Runs the bundles as a user would, one process each, and prints the Markdown table of docs/results_first.md; a row for
each run goes into ``--csv``. Without ``--dataset_file`` it runs on the embedded data.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from monai_unlearn.bundle import bundle_path
from monai_unlearn.metrics import average_gap
from monai_unlearn.report import gap_figures
from monai_unlearn.report.results import SPLITS

METHODS = ("saliency", "random_labeling", "retrain")


def run(run_id: str, bundle: str, seed: int, options: list[str], parts: Sequence[str] = ()) -> None:
    """Run a bundle, with further config files added to it, and stop where it fails."""
    files = [str(bundle_path(bundle)), *parts]
    command = [sys.executable, "-m", "monai.bundle", "run", run_id]
    command += ["--config_file", str(files) if parts else files[0]]
    subprocess.run([*command, "--seed", str(seed), *options], check=True, stdout=sys.stderr)


def row(name: str, seed: int, model: dict, report: dict, reference: dict) -> dict:
    """One line of the table: a model of a report."""
    cost = report["cost"]
    seconds = sum(cost[phase]["seconds"] for phase in ("mask", "tuning", "unlearn"))
    samples = sum(cost[phase]["samples"] for phase in ("mask", "tuning", "unlearn"))
    untouched = name == "untouched original"
    return {
        "method": name,
        "seed": seed,
        **{f"{split}_accuracy": model[split]["accuracy"] for split in SPLITS},
        "test_auroc": model["test"]["auroc"],
        "attack_auc": model["attack"]["auc"],
        "gap": average_gap(gap_figures(model), gap_figures(reference)),
        "test_change": 100 * (model["test"]["accuracy"] - reference["test"]["accuracy"]),
        "seconds": 0.0 if untouched else seconds,
        "samples": 0 if untouched else samples,
        "seconds_of_retraining": cost["retrain"]["seconds"],
        "n_forget": model["forget"]["n"],
    }


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_file", help="a MedMNIST .npz file; by default the embedded data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--forget_fraction", type=float, default=0.1)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/results"))
    parser.add_argument("--csv", type=Path, help="where to keep a row for each run")
    chosen = parser.parse_args()

    rows = []
    for seed in chosen.seeds:
        data = ["--models_dir", str(chosen.work_dir / "models")]
        if chosen.dataset_file:
            data += ["--dataset_file", str(chosen.dataset_file)]
            run("train", "train", seed, data)
        for method in METHODS:
            output = chosen.work_dir / f"{method}-{chosen.forget_fraction}-{seed}"
            run(
                "unlearn",
                method,
                seed,
                [*data, "--forget_fraction", str(chosen.forget_fraction), "--output_dir", str(output)],
            )
            report = json.loads((output / "report.json").read_text(encoding="utf-8"))
            models = report["models"]
            if method == METHODS[0]:
                rows.append(row("untouched original", seed, models["original"], report, models["retrained"]))
            rows.append(row(method, seed, models["unlearned"], report, models["retrained"]))
    table = pd.DataFrame(rows)
    if chosen.csv:
        chosen.csv.parent.mkdir(parents=True, exist_ok=True)
        table.round(5).to_csv(chosen.csv, index=False)
    print(markdown(table))


def markdown(table: pd.DataFrame) -> str:
    """Mean ± standard deviation over the seeds."""
    columns = {
        "forget %": ("forget_accuracy", 100, 1),
        "retain %": ("retain_accuracy", 100, 1),
        "validation %": ("validation_accuracy", 100, 1),
        "test %": ("test_accuracy", 100, 1),
        "test AUROC %": ("test_auroc", 100, 1),
        "attack AUC": ("attack_auc", 1, 2),
        "gap, points": ("gap", 1, 1),
        "test against retrained, points": ("test_change", 1, 1),
        "seconds": ("seconds", 1, 0),
        "samples": ("samples", 1, 0),
    }
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, runs in table.groupby("method", sort=False):
        lines.append(f"| {name} | {cells(runs, columns)} |")
    return "\n".join(lines)


def cells(runs: pd.DataFrame, columns: Mapping[str, tuple[str, float, int]]) -> str:
    """Mean ± standard deviation of columns, each with a scale and a number of digits."""
    return " | ".join(
        f"{scale * runs[column].mean():.{digits}f} ± {scale * runs[column].std():.{digits}f}"
        for column, scale, digits in columns.values()
    )


if __name__ == "__main__":
    main()
