"""The study's questions, put to the audit: whom does unlearning hurt, and does it hurt more the more is forgotten?

    python benchmarks/questions.py --seeds 0 1 2 --csv docs/results/questions.csv

Forgets about a tenth of the images of the embedded data's women or men, the easiest or the hardest tenth, and growing
shares of all images, by each method, and prints the tables of docs/bias.md from the runs' audits. Beside each stand the
untouched original and the noise floor, the same figure between two retrained models.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
from results import run

METHODS = ("random_labeling", "saliency")
# The tenth of the images that whole patients of one sex make up: a fifth of all, without the other sex.
KINDS = {
    "female": {"include": [{"fraction": 0.2}], "exclude": [{"rule": 'sex == "male"'}]},
    "male": {"include": [{"fraction": 0.2}], "exclude": [{"rule": 'sex == "female"'}]},
    "easiest": {"include": [{"easiest": 10}]},
    "hardest": {"include": [{"hardest": 10}]},
    "2 %": {"include": [{"fraction": 0.02}]},
    "10 %": {"include": [{"fraction": 0.1}]},
    "30 %": {"include": [{"fraction": 0.3}]},
}


def rows_of(kind: str, seed: int, method: str, report: dict) -> list[dict]:
    """Lines of the table: the unlearned model and, once for each request, the original."""
    audit = report["audit"]
    main = audit["attacks"]["population"]["log_odds"]["models"]
    lines = []
    for name in ("unlearned", "original") if method == METHODS[0] else ("unlearned",):
        models = report["models"]
        line = {
            "kind": kind,
            "seed": seed,
            "model": method if name == "unlearned" else "untouched original",
            "n_forget": models[name]["forget"]["n"],
            "forget_accuracy": models[name]["forget"]["accuracy"],
            "retrained_forget_accuracy": models["retrained"]["forget"]["accuracy"],
            "test_change": 100 * (models[name]["test"]["accuracy"] - models["retrained"]["test"]["accuracy"]),
            "attack_auc": main[name]["auc"],
            "retrained_attack_auc": main["retrained"]["auc"],
            "gap": audit["distance"]["average_gap"][name],
            "floor": audit["distance"]["average_gap"]["floor"],
            "js_forget": audit["distance"]["splits"]["forget"]["js_divergence"][name],
            "js_floor": audit["distance"]["splits"]["forget"]["js_divergence"]["floor"],
        }
        if name == "unlearned":
            line["verdict"] = audit["verdict"]["answer"]
            line["direction"] = audit["verdict"]["direction"]
            for column, groups in (("sex", ("female", "male")), ("difficulty", ("easiest third", "hardest third"))):
                for group in groups:
                    change = audit["subgroups"][column]["groups"][group]["test"]["change"]["retrained"]
                    line[f"test_change_{group.split()[0]}"] = 100 * change["difference"]
                line[f"p_{column}"] = audit["subgroups"][column]["largest"]["test"]["p"]
        lines.append(line)
    return lines


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work_dir", type=Path, default=Path("runs/questions"))
    parser.add_argument("--csv", type=Path, help="where to keep a row for each run")
    chosen = parser.parse_args()
    chosen.work_dir.mkdir(parents=True, exist_ok=True)

    rows = []
    for seed in chosen.seeds:
        for kind, request in KINDS.items():
            name = f"{kind.replace(' %', 'percent')}-{seed}"
            file = chosen.work_dir / f"{name}.json"
            include = [{**part, "seed": seed} if "fraction" in part else part for part in request["include"]]
            file.write_text(json.dumps({**request, "include": include}), encoding="utf-8")
            for method in METHODS:
                output = chosen.work_dir / f"{name}-{method}"
                options = ["--forget_request", str(file), "--models_dir", str(chosen.work_dir / "models")]
                run("unlearn", method, seed, [*options, "--output_dir", str(output)])
                report = json.loads((output / "report.json").read_text(encoding="utf-8"))
                rows += rows_of(kind, seed, method, report)
    table = pd.DataFrame(rows)
    if chosen.csv:
        chosen.csv.parent.mkdir(parents=True, exist_ok=True)
        table.round(5).to_csv(chosen.csv, index=False)
    print(markdown(table))


FORGETTING = {
    "forget %": ("forget_accuracy", 100, 1),
    "retrained": ("retrained_forget_accuracy", 100, 1),
    "attack AUC": ("attack_auc", 1, 2),
    "retrained ": ("retrained_attack_auc", 1, 2),
    "gap, points": ("gap", 1, 1),
    "floor": ("floor", 1, 1),
}
HARM = {
    "all": ("test_change", 1, 1),
    "women": ("test_change_female", 1, 1),
    "men": ("test_change_male", 1, 1),
    "easiest third": ("test_change_easiest", 1, 1),
    "hardest third": ("test_change_hardest", 1, 1),
}


def markdown(table: pd.DataFrame) -> str:
    """Two tables: how forgetting went, and the change of test accuracy against the retrained models."""
    return f"{lines_of(table, FORGETTING, verdicts=True)}\n\n{lines_of(table, HARM, verdicts=False)}"


def lines_of(table: pd.DataFrame, columns: dict[str, tuple[str, int, int]], verdicts: bool) -> str:
    """Mean ± standard deviation over the seeds, a line for each request and model."""
    head = ["forgotten", "model", "n", *columns, *(["verdicts"] if verdicts else [])]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (kind, model), runs in table.groupby(["kind", "model"], sort=False):
        cells = [kind, model.replace("_", " "), f"{runs['n_forget'].mean():.0f}"]
        for column, scale, digits in columns.values():
            known = scale * runs[column].dropna()
            cells.append("–" if known.empty else f"{known.mean():.{digits}f} ± {known.std():.{digits}f}")
        if verdicts:
            told = [
                f"{answer} ({direction})" if isinstance(direction, str) and direction else answer
                for answer, direction in zip(runs["verdict"], runs["direction"])
                if isinstance(answer, str)
            ]
            cells.append(", ".join(f"{told.count(answer)} × {answer}" for answer in dict.fromkeys(told)) or "–")
        lines.append(f"| {' | '.join(cells)} |".replace("| -", "| −"))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
