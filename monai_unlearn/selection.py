"""What choices are made by: a network's outputs on the forget set and on the selection half of the validation data."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from monai_unlearn.cost import Cost, seconds_of
from monai_unlearn.evaluation import SplitResult, evaluate, matching_strata
from monai_unlearn.metrics import Sides, attack_figures, interval
from monai_unlearn.run import Run

__all__ = ["Judgement", "NotComparableError", "SelectionJudge", "judge_of"]

logger = logging.getLogger("monai_unlearn")

FEWEST = 10
MOST_FORGET = 4096
COVERED = 0.5


class NotComparableError(ValueError):
    """Raised where the selection half holds too few images like those to forget to judge by."""


@dataclass(frozen=True)
class Judgement:
    """What the selection half says of a network.

    Args:
        auc: AUC of the population attack, in [0, 1]: the probability that a forget image scores higher (log-odds of
            the true class) than an unseen one of the selection half, those weighted to the forget set's shares of
            each stratum. Above ½ the network remembers, below it over-forgets.
        low: lower end of the AUC's 95 % bootstrap interval, whole patients drawn; NaN where a side has fewer than two
            independent images or patients.
        high: its upper end.
        utility: accuracy on the selection half, or mean AUROC of a multi-label task; NaN where that is undefined.
        forget: figures and outputs on the forget images that were looked at.
        selection: the same of the selection half.
    """

    auc: float
    low: float
    high: float
    utility: float
    forget: SplitResult
    selection: SplitResult

    @property
    def distinguishability(self) -> float:
        """|2 AUC − 1|, in [0, 1]: 0 where forget images can't be told from unseen ones."""
        return abs(2 * self.auc - 1)


class SelectionJudge:
    """Judge networks by the forget set and the selection half of the validation data, and by nothing else.

    Unseen images are matched to the forget set as in the audit: by class (of findings: how many an image has) and by
    the columns that the request names, as far as both sides have them. What can be known before a network is seen is
    checked and computed once; a judgement then costs a forward pass of the images and a bootstrap.

    A network is left as it was: weights, training mode of each module, and PyTorch's random state. Nothing depends on
    how often, or between which steps, it is judged.

    Args:
        run: the run.
        resamples: number of bootstrap resamples, at least 0; none: no interval.
        most_forget: of a larger forget set so many images, drawn once, are looked at, at least 1; None: all. At 4096
            images their share in the standard error of the AUC is below .005.
        fewest: number of comparable unseen images below which nothing is judged, at least 1.

    Attributes:
        cost: what judging has cost so far. It is part of a method's tuning; the caller may replace it by a new one.
            The clock of a training run stands still between epochs, so that nothing is counted twice there.
        matched_on: what unseen images are matched by.
        unmatched: columns that the request names and the selection half does not have, such as a difficulty that the
            original model itself gave; comparisons are blind to them.
        n_unseen: number of comparable unseen images: those of a stratum with forget images.
        n_unseen_people: number of patients that they are of; None where the data has no patients.
        n_forget: number of forget images that have a comparable one.
        covered: share of the forget images that have a comparable one, in [½, 1].

    Raises:
        NotComparableError: a ``ValueError``: fewer than ``fewest`` unseen images are comparable, or fewer than half of
            the forget images have one that is.
    """

    def __init__(
        self, run: Run, *, resamples: int = 200, most_forget: int | None = MOST_FORGET, fewest: int = FEWEST
    ) -> None:
        _at_least("resamples", resamples, 0)
        _at_least("fewest", fewest, 1)
        if most_forget is not None:
            _at_least("most_forget", most_forget, 1)
        self.cost = Cost()
        self._run, self._resamples, self._seed = run, resamples, run.settings["seed"]
        parts, facts = run.parts(), run.facts()
        (forget_part, forget_rows), (unseen_part, unseen_rows) = parts["forget"], parts["selection"]
        drawn = np.arange(len(forget_rows))
        if most_forget is not None and len(drawn) > most_forget:
            drawn = np.sort(np.random.default_rng(self._seed).choice(drawn, most_forget, replace=False))
        ours, theirs = facts["forget"], facts["selection"]
        labels = forget_part.labels[forget_rows], unseen_part.labels[unseen_rows]
        matched_on, strata = matching_strata(labels, (ours, theirs), run.split.named_columns)
        self.matched_on = tuple(matched_on)
        self.unmatched = tuple(name for name in run.split.named_columns if name not in matched_on)
        self._sides = Sides(
            None if ours.people is None else ours.people[drawn], theirs.people, strata[0][drawn], strata[1]
        )
        known = [_has_a_score(labels[0][drawn]), _has_a_score(labels[1])]
        self._keep = known
        weights = self._kept().weights(int(known[0].sum()), int(known[1].sum()))
        self.n_forget, self.n_unseen = (int((side > 0).sum()) for side in weights)
        self.covered = self.n_forget / max(1, len(weights[0]))
        self.n_unseen_people = None
        if theirs.people is not None:
            self.n_unseen_people = len(np.unique(theirs.people[known[1]][weights[1] > 0]))
        if self.n_unseen < fewest or self.covered < COVERED:
            raise NotComparableError(
                f"The selection half of the validation images should hold at least {fewest} that are comparable to "
                f"those to forget (matched by {', '.join(matched_on)}), and for half of the forget set at least, but "
                f"of {len(unseen_rows)} images {self.n_unseen} are comparable, to {100 * self.covered:.0f} % of the "
                "forget set. Nothing can be chosen by them: use more validation data of that kind."
            )
        with _random_state_kept(run.device):
            self._evaluator, _ = run.bundle.build("evaluator", "network")
            with seconds_of(run.caching, "cpu"):
                self._loaders = {
                    "forget": run.loader(forget_part, forget_rows[drawn]),
                    "selection": run.loader(unseen_part, unseen_rows),
                }

    @property
    def samples(self) -> int:
        """How many samples a judgement passes through the network."""
        datasets: list[Any] = [loader.dataset for loader in self._loaders.values()]
        return sum(len(dataset) for dataset in datasets)

    def evaluate(self, network: nn.Module) -> Judgement:
        """Judge a network, on the clock.

        Args:
            network: the network; its outputs are taken in evaluation mode.

        Raises:
            ValueError: if its outputs are not finite.
        """
        run = self._run
        modes = [(module, module.training) for module in network.modules()]
        names = run.data.class_names if run.data.multi_label else None
        with seconds_of(self.cost, run.device), _random_state_kept(run.device):
            try:
                results = evaluate(self._evaluator, network, self._loaders, names)
            finally:
                for module, training in modes:  # MONAI sets the whole network back to one mode
                    module.training = training
            scores = [results[name].scores[keep][None] for name, keep in zip(("forget", "selection"), self._keep)]
            figures = attack_figures(scores[0], scores[1], self._kept(), self._resamples, self._seed)
        n = results["forget"].n + results["selection"].n
        self.cost.samples += n
        self.cost.forward += n
        low, high = interval(figures.resampled["auc"][:, 0]) if figures.resampled else (float("nan"), float("nan"))
        utility = results["selection"].auroc if run.data.multi_label else results["selection"].accuracy
        return Judgement(
            auc=float(figures.values["auc"][0]),
            low=low,
            high=high,
            utility=float("nan") if utility is None else utility,
            forget=results["forget"],
            selection=results["selection"],
        )

    def _kept(self) -> Sides:
        """Groups and strata of the images that have a score."""
        sides, (ours, theirs) = self._sides, self._keep
        return Sides(
            None if sides.member_groups is None else sides.member_groups[ours],
            None if sides.non_member_groups is None else sides.non_member_groups[theirs],
            None if sides.member_strata is None else sides.member_strata[ours],
            None if sides.non_member_strata is None else sides.non_member_strata[theirs],
        )


def judge_of(run: Run) -> SelectionJudge | None:
    """A run's judge, or None where the selection half holds nothing that is comparable to the forget set.

    Nothing is, too, where the request goes by a column that only the training data has, such as a difficulty that the
    original model gave: unseen images of any difficulty would be no match for the hardest.

    It looks at no more forget images than there are unseen ones: what it takes is missing from a budget. The price is
    an interval of the AUC that is up to √2 times as wide as with all of them.

    Args:
        run: the run.
    """
    _, unseen = run.parts()["selection"]
    try:
        judge = SelectionJudge(run, most_forget=max(1, min(MOST_FORGET, len(unseen))))
    except NotComparableError as error:
        logger.info("%s", error)
        return None
    if judge.unmatched:
        logger.info("The validation data has no %s, by which the request goes.", ", ".join(judge.unmatched))
        return None
    return judge


def _has_a_score(labels: np.ndarray) -> np.ndarray:
    """Images of which at least one finding is known."""
    return np.ones(len(labels), dtype=bool) if labels.ndim == 1 else ~np.isnan(labels).all(axis=1)


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """A loader draws a seed from PyTorch's generator each time, and a new network its weights."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} should be a whole number of at least {least}, but got {value!r}.")
