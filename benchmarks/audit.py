"""What an audit costs beyond the networks' own forward passes, at TissueMNIST's size.

    python benchmarks/audit.py

Outputs of an original, an unlearned and two retrained models are drawn for 165,466 training, 11,820 validation (the
half that is reported) and 47,280 test images of eight classes; a tenth of the training images is forgotten. Timed are
all figures, 1,000 resamples included; peak memory is that of the whole process. Each case runs in a process of its
own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import torch

from monai_unlearn.evaluation import Audited, AuditOptions, Facts, SplitResult, audit_outputs
from monai_unlearn.metrics import el2n, log_odds

SIZES = {"forget": 16_547, "retain": 148_919, "validation": 11_820, "test": 47_280}
CLASSES = 8


def result(logits: np.ndarray, labels: np.ndarray) -> SplitResult:
    """What an evaluation of these outputs gives."""
    outputs, truth = torch.from_numpy(logits).float(), torch.from_numpy(labels)
    return SplitResult(
        accuracy=float((outputs.argmax(1) == truth).double().mean()),
        auroc=0.9,
        loss=1.0,
        n=len(labels),
        balanced_accuracy=0.5,
        scores=log_odds(outputs, truth).numpy(),
        difficulty=el2n(outputs, truth).numpy(),
        logits=outputs.numpy(),
        labels=labels,
    )


def outputs(patients: bool) -> Audited:
    """Models that agree on what an image looks like, and of which the original knows its training images."""
    random = np.random.default_rng(0)
    labels = {split: random.integers(0, CLASSES, n) for split, n in SIZES.items()}
    truth = {split: np.eye(CLASSES)[values] for split, values in labels.items()}
    looks = {split: random.normal(size=values.shape) + 1.5 * values for split, values in truth.items()}
    known = {"original": ("forget", "retain"), "unlearned": ("retain",), "first": ("retain",), "second": ("retain",)}
    models = {
        name: {
            split: result(
                looks[split] + random.normal(0, 0.5, looks[split].shape) + 2 * truth[split] * (split in trained),
                labels[split],
            )
            for split in SIZES
        }
        for name, trained in known.items()
    }
    facts = {}
    for split, n in SIZES.items():
        person = np.arange(n) // 5 if patients else np.arange(n)
        size = person.max() + 1
        columns = {
            "sex": random.choice(["female", "male"], size),
            "age": random.integers(10, 95, size),
            "site": random.choice(["north", "south", "west"], size),
        }
        facts[split] = Facts(
            people=person if patients else None,
            columns=pd.DataFrame({name: values[person] for name, values in columns.items()}),
        )
    names = [f"class {i}" for i in range(CLASSES)]
    return Audited(models["original"], [models["unlearned"]], [models["first"], models["second"]], facts, names, False)


def main() -> None:
    """Run each case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=("images", "patients"), help="run this one here")
    chosen = parser.parse_args()
    if chosen.case is None:
        for case in ("images", "patients"):
            subprocess.run([sys.executable, __file__, "--case", case], check=True)
        return
    audited = outputs(chosen.case == "patients")
    start = time.perf_counter()
    found = audit_outputs(audited, AuditOptions(matched=["sex"]))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    verdict = found["verdict"]["answer"]
    print(f"by {chosen.case}: {seconds:.1f} s, {peak:.2f} GiB at the peak of the process, verdict {verdict}")


if __name__ == "__main__":
    main()
