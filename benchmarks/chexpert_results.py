"""Women and men forgotten from a set in CheXpert's layout, with a second, random column as a null control.

    python benchmarks/chexpert_results.py --seeds 0 1 2 --csv docs/results/chexpert_layout.csv

The images are real chest X-rays with planted findings and a planted "sex" (tests/chexpert_layout.py): the figures say
how the methods treat such an attribute, and nothing about men and women. Prints the tables of docs/results_first.md.
Runs whose report is in ``--work_dir`` already are not repeated: seeds can run side by side, and then be put together.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
from results import cells, run

from monai_unlearn.bundle import bundle_path
from monai_unlearn.metrics import average_gap
from monai_unlearn.report import gap_figures
from monai_unlearn.report.results import SPLITS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from chexpert_layout import write_chexpert

# A share of all patients, less those of the other group: about a tenth of the images each.
FORGET = {
    "women": (0.22, 'sex == "male"'),
    "men": (0.18, 'sex == "female"'),
    "scanner A": (0.2, 'scanner == "B"'),
    "scanner B": (0.2, 'scanner == "A"'),
}
FLOOR = ("women", "scanner A")  # where two retrained models are compared
METHODS = ("saliency", "random_labeling", "retrain")
# Without augmentation the original memorises, so that there is something to be forgotten.
RECIPE = {
    "findings": "all",
    "image_size": 64,
    "train_epochs": 15,
    "train_lr": 0.001,
    "num_workers": 0,
    "cache": "memory",
    "augmentation": "[]",
}


def row(forget: str, method: str, seed: int, model: dict, report: dict) -> dict:
    """One line of the table: a model of a report."""
    reference = report["models"]["retrained"]
    phases = ("mask", "tuning", "unlearn")
    return {
        "forget": forget,
        "method": method,
        "seed": seed,
        **{f"{split}_auroc": model[split]["auroc"] for split in SPLITS},
        "attack_auc": model["attack"]["auc"],
        "attack_excess": model["attack"]["auc"] - reference["attack"]["auc"],
        "gap": average_gap(gap_figures(model, "multi-label"), gap_figures(reference, "multi-label")),
        "test_change": 100 * (model["test"]["auroc"] - reference["test"]["auroc"]),
        "seconds": 0.0 if method == "untouched original" else sum(report["cost"][name]["seconds"] for name in phases),
        "seconds_of_retraining": report["cost"]["retrain"]["seconds"],
        "n_forget": model["forget"]["n"],
        "patients": report["request"]["patients"],
    }


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work_dir", type=Path, default=Path("runs/chexpert_layout"))
    parser.add_argument("--csv", type=Path, help="where to keep a row for each run")
    chosen = parser.parse_args()
    work = chosen.work_dir
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "data").exists():
        write_chexpert(work / "data", 1300, images="mednist", size=64, n_valid=300)
    # The network of the other tables of docs/results_first.md, in the place of the part's DenseNet121.
    network = json.loads(bundle_path("saliency").read_text(encoding="utf-8"))["network_def"]
    (work / "network.json").write_text(json.dumps({"network_def": network}), encoding="utf-8")

    options = [f"--{name}={value}" for name, value in RECIPE.items()]
    options += [f"--dataset_dir={work / 'data'}", f"--models_dir={work / 'models'}"]
    parts = [str(bundle_path("chexpert")), str(work / "network.json")]
    rows = []
    for seed in chosen.seeds:
        run("train", "train", seed, options, parts)
        for name, (share, others) in FORGET.items():
            request = {"include": [{"fraction": share, "seed": seed}], "exclude": [{"rule": others}]}
            file = work / f"{name.replace(' ', '_')}-{seed}.json"
            file.write_text(json.dumps(request), encoding="utf-8")
            for method in METHODS:
                if method == "retrain" and name not in FLOOR:
                    continue
                output = work / f"{method}-{file.stem}"
                if not (output / "report.json").exists():
                    own = [f"--forget_request={file}", f"--output_dir={output}"]
                    run("unlearn", method, seed, [*options, *own], parts)
                report = json.loads((output / "report.json").read_text(encoding="utf-8"))
                if method == METHODS[0]:
                    rows.append(row(name, "untouched original", seed, report["models"]["original"], report))
                rows.append(row(name, method, seed, report["models"]["unlearned"], report))
                if chosen.csv:
                    chosen.csv.parent.mkdir(parents=True, exist_ok=True)
                    pd.DataFrame(rows).round(5).to_csv(chosen.csv, index=False)
    print(markdown(pd.DataFrame(rows)))


def markdown(table: pd.DataFrame) -> str:
    """Mean ± standard deviation over the seeds, and what two opposite groups differ by, seed by seed."""
    columns = {
        "forget %": ("forget_auroc", 100, 1),
        "retain %": ("retain_auroc", 100, 1),
        "validation %": ("validation_auroc", 100, 1),
        "test %": ("test_auroc", 100, 1),
        "attack AUC": ("attack_auc", 1, 2),
        "gap, points": ("gap", 1, 1),
        "test against retrained, points": ("test_change", 1, 1),
        "seconds": ("seconds", 1, 0),
    }
    lines = ["| forgotten | method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for (group, method), runs in table.groupby(["forget", "method"], sort=False):
        lines.append(f"| {group} | {method} | {cells(runs, columns)} |")
    lines += [
        "",
        "| difference | method | attack AUC, less the retrained model's | gap, points | test, points |",
        "|---" * 5 + "|",
    ]
    figures = {"attack_excess": 3, "gap": 1, "test_change": 1}
    wide = table.pivot(index=["method", "seed"], columns="forget", values=list(figures))
    for one, other in (("women", "men"), ("scanner A", "scanner B")):
        for method in ("untouched original", "saliency", "random_labeling"):
            differences = []
            for figure, n in figures.items():
                values = wide.loc[method, (figure, one)] - wide.loc[method, (figure, other)]
                seeds = ", ".join(f"{value:+.{n}f}" for value in values)
                differences.append(f"{values.mean():+.{n}f} ({seeds})")
            lines.append(f"| {one} less {other} | {method} | " + " | ".join(differences) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
