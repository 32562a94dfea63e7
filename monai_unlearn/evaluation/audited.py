"""What an audit compares: models' outputs on the same splits, and what is known of the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch

from monai_unlearn.evaluation.evaluate import SplitResult
from monai_unlearn.metrics import group_numbers, modified_entropy, sample_loss

__all__ = ["SPLITS", "AuditOptions", "Audited", "Facts"]

SPLITS = ("forget", "retain", "validation", "test")
Outputs = Mapping[str, SplitResult]
# The smallest p-value of R resamples is 2 / (R + 1), and there may be seven attacks.
FEWEST = 300


@dataclass(frozen=True)
class Facts:
    """What is known of a split's images besides the models' outputs.

    Args:
        people: number of the person on each image; None where the data has no patients.
        columns: one row an image, such as sex, age and site; may have no columns.
    """

    people: np.ndarray | None = None
    columns: pd.DataFrame = field(default_factory=pd.DataFrame)


@dataclass(frozen=True)
class AuditOptions:
    """How an audit is made.

    Args:
        matched: columns that the request names: unseen images are matched to the forget set by them, and by class.
        comparable: whether unseen images can stand for the forget set where no model was retrained: false for
            requests by class, sex, site or difficulty, whose images differ from others by what they were chosen by.
        subgroups: columns to break figures down by; None: those of the usual names that the data has.
        resamples: bootstrap resamples, at least 300.
        margin: difference of an attack's AUC from the retrained model's that counts as none.
        specificity: at which sensitivities are compared.
        seed: seed of resamples, folds and permutations.
    """

    matched: Sequence[str] = ()
    comparable: bool = True
    subgroups: Sequence[str] | None = None
    resamples: int = 1000
    margin: float = 0.05
    specificity: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.resamples, int) or self.resamples < FEWEST:
            raise ValueError(
                f"resamples should be a whole number of at least {FEWEST}, but got {self.resamples!r}. By fewer, no "
                "difference could be told from chance once the number of attacks is corrected for."
            )
        for name in ("margin", "specificity"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise ValueError(f"{name} should lie between 0 and 1 (both excluded), but got {value!r}.")


@dataclass(frozen=True)
class Audited:
    """Outputs of the models that are compared, on the same images.

    Args:
        original: split → result of the model before unlearning.
        unlearned: the same of the unlearned model; of several (other seeds) the first is the one that is judged.
        retrained: the same of models trained without the forget set; may be empty.
        facts: split → what is known of its images.
        class_names: names of the classes, or findings.
        multi_label: whether they are findings.
        shadows: scores of shadow models that unlearned an image, and of those that never saw it, S × (forget, then
            validation images) each, NaN where a model is of the other side.

    Raises:
        ValueError: if there is no unlearned model, models were not evaluated on the same images, or their outputs, the
            facts or the shadow models' scores are of other numbers.
    """

    original: Outputs
    unlearned: Sequence[Outputs]
    retrained: Sequence[Outputs]
    facts: Mapping[str, Facts]
    class_names: Sequence[str]
    multi_label: bool
    shadows: tuple[np.ndarray, np.ndarray] | None = None

    def __post_init__(self) -> None:
        if not self.unlearned:
            raise ValueError("unlearned should hold at least one model, but holds none. There is nothing to audit.")
        for split in SPLITS:
            n, classes = self.original[split].n, len(self.class_names)
            for model in (self.original, *self.unlearned, *self.retrained):
                if model[split].logits.shape != (n, classes):
                    raise ValueError(
                        f"All models should give {classes} outputs, one a class or finding, on each of {n} {split} "
                        f"images, but one gives {model[split].logits.shape}."
                    )
                if model[split].n != n or not np.array_equal(
                    model[split].labels, self.original[split].labels, equal_nan=True
                ):
                    raise ValueError(f"All models should be evaluated on the same {split} images in the same order.")
            facts = self.facts[split]
            if facts.people is not None and len(facts.people) != n:
                raise ValueError(f"people of {split} should be {n}, one an image, but are {len(facts.people)}.")
            if len(facts.columns.columns) and len(facts.columns) != n:
                raise ValueError(f"columns of {split} should have {n} rows, but have {len(facts.columns)}.")
        targets = self.original["forget"].n + self.original["validation"].n
        for scores in self.shadows or ():
            if scores.ndim != 2 or scores.shape[1] != targets:
                raise ValueError(
                    f"shadows should have {targets} columns, one for each forget and validation image, but have the "
                    f"shape {scores.shape}."
                )

    @property
    def figure(self) -> str:
        """The figure that the task is judged by."""
        return "auroc" if self.multi_label else "accuracy"

    @property
    def models(self) -> dict[str, Sequence[Outputs]]:
        """Name in the report → its models, of which figures are averaged."""
        found = {"original": [self.original], "unlearned": self.unlearned[:1], "retrained": self.retrained}
        return {name: models for name, models in found.items() if models}

    def in_one_order(self) -> Audited:
        """The same, with the images of each split in an order that does not depend on that of the loader.

        So resamples, folds and sums are the same, bit for bit, whatever the order was.
        """
        models = (self.original, *self.unlearned, *self.retrained)
        orders = {split: _order([model[split] for model in models], self.facts[split]) for split in SPLITS}
        shadows, targets = (
            self.shadows,
            np.concatenate([orders["forget"], len(orders["forget"]) + orders["validation"]]),
        )
        return replace(
            self,
            original=_reordered(self.original, orders),
            unlearned=[_reordered(model, orders) for model in self.unlearned],
            retrained=[_reordered(model, orders) for model in self.retrained],
            facts={split: _facts_reordered(self.facts[split], orders[split]) for split in SPLITS},
            shadows=None if shadows is None else (shadows[0][:, targets], shadows[1][:, targets]),
        )


def member_scores(result: SplitResult) -> dict[str, np.ndarray]:
    """Kind of score → score of each image, higher: more likely a member; NaN where there is none."""
    logits, labels = torch.from_numpy(result.logits), torch.from_numpy(result.labels)
    return {
        "log_odds": result.scores,
        "modified_entropy": -modified_entropy(logits, labels).numpy(),
        "loss": -sample_loss(logits, labels).numpy(),
    }


def _order(results: Sequence[SplitResult], facts: Facts) -> np.ndarray:
    """Order of images by outputs and labels, and of those that are alike in them by what else is known."""
    labels = results[0].labels if results[0].labels.ndim == 2 else results[0].labels[:, None]
    keys = np.column_stack([np.nan_to_num(labels, nan=-1), *(result.logits for result in results[::-1])])
    order = np.lexsort(keys.T)
    if (keys[order[1:]] == keys[order[:-1]]).all(axis=1).any():
        columns = [pd.factorize(facts.columns[name].astype(str), sort=True)[0] for name in facts.columns]
        order = np.lexsort([*columns, *keys.T])
    return order


def _reordered(outputs: Outputs, orders: Mapping[str, np.ndarray]) -> dict[str, SplitResult]:
    arrays = ("scores", "difficulty", "logits", "labels")
    return {
        split: replace(outputs[split], **{name: getattr(outputs[split], name)[order] for name in arrays})
        for split, order in orders.items()
    }


def _facts_reordered(facts: Facts, order: np.ndarray) -> Facts:
    return Facts(
        people=None if facts.people is None else group_numbers(np.asarray(facts.people)[order], len(order)),
        columns=facts.columns.iloc[order].reset_index(drop=True) if len(facts.columns.columns) else facts.columns,
    )
