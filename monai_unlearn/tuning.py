"""The command ``tune``: settings of a method searched for on the selection half, and then used."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.utils import set_determinism
from tqdm import tqdm

from monai_unlearn.bundle import Bundle, hint, readable_errors
from monai_unlearn.checkpoint import file_hash
from monai_unlearn.cost import Cost
from monai_unlearn.handlers import CostClock, on_terminal
from monai_unlearn.output import check_output_dir, scratch_folder
from monai_unlearn.report import tuning_page
from monai_unlearn.run import Run, refuse_near_chance
from monai_unlearn.selection import Judgement, SelectionJudge
from monai_unlearn.training import costs_of, run_trainer
from monai_unlearn.trials import SIGN_OF_LIFE, SharedStudy, optuna_module, quiet, shown_storage
from monai_unlearn.workflow import Chosen, unlearn_run

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

__all__ = ["objective", "pareto_front", "tune"]

logger = logging.getLogger("monai_unlearn")

RANGE = {"low", "high", "log"}
PARTS = ("objective", "distinguishability", "utility_loss", "auc", "low", "high", "utility")
COLUMNS = {"low": "auc_low", "high": "auc_high", "epochs": "epochs_done"}  # others than settings may be called
COSTS = ("seconds", "samples", "forward", "backward")


def tune(bundle: Bundle) -> None:
    """Search for a method's settings, then unlearn with the best; see docs/tuning.md.

    Args:
        bundle: the running bundle.
    """
    with readable_errors():
        settings = bundle.settings()
        if settings["trials"] < 1:
            raise ValueError(
                f"trials should be at least 1, but got {settings['trials']}. Without a search, run unlearn."
            )
        optuna_module()
        space = search_space(bundle)
        output = Path(settings["output_dir"])
        if settings["finish"]:
            check_output_dir(output)
        run = Run.start(bundle)
        try:
            run.fill_cache()
            with scratch_folder(output) as scratch:
                search = _Search(run, space, scratch)
                search.make_trials()
            best = search.shared.best()
            if best is None and settings["finish"]:
                last = next((row["state"] for row in search.rows()[::-1] if row["trial"]), "")
                raise ValueError(
                    f"At least one trial should be completed, but of {settings['trials']} none was: the last one "
                    f"{last}. Narrow search_space, lower rates above all."
                )
        except BaseException:
            run.remove_cached_copies()
            raise
        if best is None or not settings["finish"]:
            logger.info("Left to the process that finishes: the run with the chosen setting. Nothing was written.")
            return
        chosen = search.chosen(best)
        bundle.config.update(best.params)
        bundle.config["storage"] = shown_storage(search.storage)  # it is recorded, and may hold a password
        unlearn_run(replace(run, settings=bundle.settings()), chosen)


def objective(judgement: Judgement, original: float) -> tuple[float, float]:
    """What is made small, in two parts whose sum it is.

    Args:
        judgement: what the selection half says of the unlearned network.
        original: the original's utility, in [0, 1].

    Returns:
        |2 AUC − 1|, how well forget images can be told from matched unseen ones; and the loss of utility against the
        original, max(0, original's − its own). Each in [0, 1].
    """
    return judgement.distinguishability, max(0.0, original - judgement.utility)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point is at least as small in both parts and smaller in one.

    Args:
        points: the two parts of each.
    """
    return [
        not any(a <= x and b <= y and (a < x or b < y) for a, b in points) and not any(map(math.isnan, (x, y)))
        for x, y in points
    ]


def search_space(bundle: Bundle) -> dict[str, BaseDistribution]:
    """The bundle's ``search_space``: setting → distribution.

    Raises:
        ValueError: if there is none, or it names what is no setting of the method, or values of another type.
    """
    space = bundle.config.get("search_space")
    if space is None:
        raise ValueError(
            f"The bundle of {bundle.config.get('method')!r} has no search_space. If that is retrain or auto, there is "
            "nothing to tune: run it without tune.json. If it is your own, add the settings and the values to try."
        )
    if not isinstance(space, Mapping) or not space:
        raise ValueError(
            f"search_space should name settings and the values to try, but got {space!r}. Every method's bundle that "
            "has something to tune has one: give its file first, and tune.json after it."
        )
    return {name: _distribution(bundle, name, values) for name, values in space.items()}


def _distribution(bundle: Bundle, name: str, values: Any) -> BaseDistribution:
    kinds = optuna_module().distributions
    tunable = _tunable(bundle)
    if name not in tunable:
        raise ValueError(
            f"search_space should name settings of the method, but names {name!r}.{hint(name, tunable)} Those that "
            f"only the method depends on: {', '.join(tunable)}."
        )
    if isinstance(values, Mapping) and values:
        if unknown := sorted(set(values) - RANGE):
            raise ValueError(
                f"search_space of {name} should have low, high and log, but has {unknown[0]!r}."
                f"{hint(unknown[0], RANGE)}"
            )
        ends = values.get("low"), values.get("high")
        log = values.get("log", False)
        low, high = (end if isinstance(end, (int, float)) and not isinstance(end, bool) else math.nan for end in ends)
        if not (-math.inf < low < high < math.inf) or not isinstance(log, bool) or (log and low <= 0):
            raise ValueError(
                f"search_space of {name} should have low < high, both numbers (above 0 with log), but got {values!r}."
            )
        for end in (low, high):
            bundle.typed(name, end)
        if isinstance(bundle.config[name], int) and isinstance(low, int) and isinstance(high, int):
            return kinds.IntDistribution(low, high, log=log)
        return kinds.FloatDistribution(float(low), float(high), log=log)
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(
            f"search_space of {name} should be a list of values, or a range with low and high, but got {values!r}."
        )
    if any(value is not None and not isinstance(value, (bool, int, float, str)) for value in values):
        raise ValueError(f"search_space of {name} should list plain values, but got {values!r}.")
    return kinds.CategoricalDistribution([bundle.typed(name, value) for value in values])


def _tunable(bundle: Bundle) -> list[str]:
    """Settings that change what the method does, and neither who is forgotten nor the models it is compared with."""
    return [
        key
        for key, value in bundle.config.items()
        if (value is None or isinstance(value, (bool, int, float, str)))
        and not (isinstance(value, str) and value.startswith(("$", "@", "%")))
        and key != "output_dir"
        and any(bundle.depends_on(part, key) for part in ("trainer", "methods"))
        and not any(bundle.depends_on(part, key) for part in ("recipe", "split"))
    ]


class _Search:
    """The trials of one run: what they start from, what they are judged by, and what they have in common."""

    def __init__(self, run: Run, space: Mapping[str, BaseDistribution], scratch: Path) -> None:
        bundle = run.bundle
        self.run, self.space, self._private = run, dict(space), scratch / "private"
        self.storage = str(bundle.build("storage"))
        self.seed = bundle.build("sampler_seed")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"sampler_seed should be a whole number of at least 0, but got {self.seed!r}.")
        # Whatever is wrong with a setting of the method should show now, and not as a failure of each trial.
        self._build({})
        path, self.checkpoint = run.original()
        parts = run.parts()
        self.name = "tuning-" + bundle.recipe_hash(
            run.data_digest,
            run.split.digest(),
            hashlib.sha256(parts["selection"][1].tobytes()).hexdigest(),
            file_hash(path),
            json.dumps(bundle.config["search_space"], sort_keys=True),
            str((self.seed, run.settings["seed"])),
            of=("trainer", "methods"),
        )
        self.shared = SharedStudy(
            self.storage,
            self.name,
            trials=run.settings["trials"],
            space=space,
            sampler=lambda seed: bundle.build("sampler", sampler_seed=seed),
            pruner=bundle.build("pruner"),
            seed=self.seed,
        )
        self.judge = SelectionJudge(run)
        self.original = self._original(path)

    def _original(self, path: Path) -> dict[str, Any]:
        """What the selection half says of the original, judged once a study."""
        study, run = self.shared.study, self.run
        if (kept := study.user_attrs.get("original")) is not None:
            return kept
        evaluator, network = run.bundle.build("evaluator", "network")
        self.checkpoint.load_into(network)
        seen = {name: run.loader(*run.parts()[name]) for name in ("forget", "retain")}
        refuse_near_chance(run.evaluate(evaluator, network, seen), run.data.num_classes, run.data.multi_label, path)
        judgement = self.judge.evaluate(network)
        if math.isnan(judgement.utility):
            raise ValueError(
                "The selection half of the validation images should have images with and without a finding, but has "
                "none for which an AUROC is defined. Use more validation data."
            )
        figures = _figures(judgement, judgement.utility)
        with quiet():
            study.set_user_attr("original", figures | {"cost": self.judge.cost.as_dict()})
        return study.user_attrs["original"]

    def make_trials(self) -> None:
        """Make trials until all processes together have made as many as there should be."""
        shared, total = self.shared, self.shared.trials
        logger.info(
            "Tuning %s on the selection half: %d comparable unseen images, matched by %s; %d of %d trials made (%s)",
            ", ".join(self.space),
            self.judge.n_unseen,
            ", ".join(self.judge.matched_on),
            len(shared.counted()),
            total,
            shown_storage(self.storage),
        )
        bar = tqdm(total=total, desc="trials", initial=len(shared.counted())) if on_terminal() else None
        try:
            while (trial := shared.ask(wait=self.run.settings["finish"])) is not None:
                line = f"{self._make(trial)} ({len(shared.counted())} of {total} made"
                best = shared.best()
                line += ")" if best is None else f"; best: trial {best.number + 1}, {best.value:.3f})"
                if bar is None:
                    logger.info("%s", line)
                else:
                    bar.n = len(shared.counted())
                    bar.set_postfix_str("" if best is None else f"best {best.value:.3f}: {_words(best.params)}")
        finally:
            if bar is not None:
                bar.close()

    def _make(self, trial: Trial) -> str:
        """One trial, from beginning to end; returns a line on it."""
        optuna = optuna_module()
        start = f"Trial {trial.number + 1}: {_words(trial.params)}"
        one = _Trial(self, trial)
        try:
            with _without_engine_errors():
                judgement = one.judgement()
            value = sum(objective(judgement, self.original["utility"]))
            how, said = (
                "complete",
                (f"{value:.3f} (attack AUC {judgement.auc:.3f}, utility {100 * judgement.utility:.1f} %)"),
            )
        except optuna.TrialPruned:
            value, how, said = None, "pruned", f"pruned after epoch {one.epoch}"
        except optuna.exceptions.UpdateFinishedTrialError:
            return f"{start}: given up by another process, which took this one for gone"
        except (FloatingPointError, RuntimeError, ValueError) as error:
            value, how = None, type(error).__name__
            said = f"failed: {_harmless(error, self.run)}"
        finally:
            shutil.rmtree(self._private, ignore_errors=True)
        try:
            one.keep_cost()
            self.shared.end(trial, how, value)
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
            return f"{start}: given up by another process, which took this one for gone"
        return f"{start}: {said}, {one.cost().seconds:.1f} s"

    def _build(self, settings: Mapping[str, Any]) -> tuple[Any, list[Any]]:
        """A trainer and the method's handlers, with these settings."""
        self._private.mkdir(exist_ok=True)
        return self.run.bundle.build(
            "trainer", "methods", private_dir=str(self._private), train_seed=self.run.settings["seed"], **settings
        )

    def rows(self) -> list[dict[str, Any]]:
        """A row for the original and each trial, of all processes; those that were killed too, for their cost."""
        rows = [
            {"trial": 0, "state": "original", "settings": {}, "objective": sum(self._parts(self.original))}
            | {name: self.original.get(name) for name in PARTS[1:]}
            | {"epochs": 0, "cost": self.original["cost"]}
        ]
        for trial in self.shared.all():
            attributes = trial.user_attrs
            if "ended" not in attributes and "cost" not in attributes:
                continue  # it never began
            how = attributes.get("ended", "stopped")
            known = how == "complete"
            rows.append(
                {
                    "trial": trial.number + 1,
                    "state": how if how in ("complete", "pruned", "stopped") else f"failed ({how})",
                    "settings": {name: trial.params.get(name) for name in self.space},
                    "objective": trial.value if known else None,
                    **{name: attributes.get(name) if known else None for name in PARTS[1:]},
                    "epochs": max(trial.intermediate_values, default=0),
                    "cost": attributes.get("cost", Cost().as_dict()),
                }
            )
        complete = [row for row in rows[1:] if row["state"] == "complete"]
        front = pareto_front([self._parts(row) for row in complete])
        best = self.shared.best()
        for row in rows:
            row["on_front"] = any(row is other and on for other, on in zip(complete, front))
            row["chosen"] = best is not None and row["trial"] == best.number + 1
        return rows

    @staticmethod
    def _parts(figures: Mapping[str, Any]) -> tuple[float, float]:
        return figures["distinguishability"], figures["utility_loss"]

    def chosen(self, best: FrozenTrial) -> Chosen:
        """What the run with the chosen setting reports of the search."""
        rows, judge = self.rows(), self.judge
        states = [row["state"] for row in rows[1:]]
        failed, pruned = (sum(state.startswith(how) for state in states) for how in ("failed", "pruned"))
        original, value = rows[0]["objective"], float(best.value or 0.0)
        notes = [
            f"The setting {_words(best.params)} was chosen in {len(self.shared.counted())} trials ({pruned} of them "
            f"pruned, {failed} failed) on the selection half of the validation images: {judge.n_unseen} of them are "
            f"comparable to the forget set, matched by {', '.join(judge.matched_on)}. Objective (|2 AUC − 1| and loss "
            f"of utility): {value:.3f}, of the original {original:.3f}. No retrained model was looked at. The trials' "
            "cost is that of tuning."
        ]
        if value >= original:
            notes.append("No trial had a smaller objective than the original model itself: nothing was gained by it.")
        if judge.unmatched:
            notes.append(
                f"The request goes by {', '.join(judge.unmatched)}, which validation images do not have: the search "
                "compared with images that may differ in it."
            )
        logger.info("\nChosen: %s (trial %d, objective %.3f)", _words(best.params), best.number + 1, value)
        logger.info("Not bettered in both parts (trial, |2 AUC − 1|, loss of utility):")
        for row in sorted((row for row in rows if row["on_front"]), key=self._parts):
            logger.info("  %3d  %.3f  %.3f  %s", row["trial"], *self._parts(row), _words(row["settings"]))
        cost = sum((Cost(**row["cost"]) for row in rows), Cost())
        table = pd.DataFrame(
            [
                {
                    "trial": row["trial"],
                    "state": row["state"],
                    **{name: row["settings"].get(name) for name in self.space},
                }
                | {COLUMNS.get(name, name): row[name] for name in (*PARTS, "epochs")}
                | {name: row["cost"][name] for name in COSTS}
                | {"on_front": row["on_front"], "chosen": row["chosen"]}
                for row in rows
            ]
        )
        page = tuning_page(self.run.settings["method"], rows, notes)
        return Chosen(cost, tuple(notes), {"tuning.csv": table.to_csv(index=False), "tuning.html": page})


class _Trial:
    """One trial: the method with these settings, judged after each epoch and at its end."""

    def __init__(self, search: _Search, trial: Trial) -> None:
        self._search, self._trial = search, trial
        self._clock = CostClock()
        self._methods: list[Any] = []
        self._last = time.monotonic()
        self.epoch = 0
        search.judge.cost = Cost()

    def judgement(self) -> Judgement:
        """Run it.

        Raises:
            TrialPruned: if the pruner says so.
        """
        search = self._search
        set_determinism(search.run.settings["seed"])
        trainer, self._methods = search._build(self._trial.params)
        search.checkpoint.load_into(trainer.network)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._after_epoch)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._live)
        run_trainer(trainer, "tuning", clock=self._clock, progress=False)
        judgement = search.judge.evaluate(trainer.network)
        self.epoch = trainer.state.epoch
        with quiet():
            for name, value in _figures(judgement, search.original["utility"]).items():
                self._trial.set_user_attr(name, value)
            self._report(judgement)
        return judgement

    def cost(self) -> Cost:
        """What it has cost so far: steps, what the method does beside them, and judging."""
        return sum(costs_of(self._methods).values(), self._clock.cost + self._search.judge.cost)

    def keep_cost(self) -> None:
        """Put the cost into the storage, where it stays if this process is killed."""
        with quiet():
            self._trial.set_user_attr("cost", self.cost().as_dict())

    def _after_epoch(self, engine: SupervisedTrainer) -> None:
        self.epoch = engine.state.epoch
        self._live(engine, now=True)
        if self.epoch == engine.state.max_epochs:
            return  # judged when the method's last handlers are through
        self._report(self._search.judge.evaluate(engine.network))
        self.keep_cost()
        with quiet():
            if self._trial.should_prune():
                raise optuna_module().TrialPruned

    def _report(self, judgement: Judgement) -> None:
        with quiet():
            self._trial.report(sum(objective(judgement, self._search.original["utility"])), self.epoch)

    def _live(self, engine: Engine, now: bool = False) -> None:
        """A sign of life for processes on other machines."""
        if now or time.monotonic() - self._last > SIGN_OF_LIFE:
            self._last = time.monotonic()
            with quiet():
                self._trial.set_user_attr("seen", time.time())


def _figures(judgement: Judgement, original: float) -> dict[str, Any]:
    """The parts of the objective and what they are made of; None for what is undefined."""
    distinguishability, loss = objective(judgement, original)
    figures = {
        "distinguishability": distinguishability,
        "utility_loss": loss,
        **{name: getattr(judgement, name) for name in ("auc", "low", "high", "utility")},
    }
    return {name: None if math.isnan(value) else value for name, value in figures.items()}


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {format(value, '.3g') if isinstance(value, float) else value}" for name, value in settings.items()
    )


def _harmless(error: BaseException, run: Run) -> str:
    """An error's first line, unless it names one of those to be forgotten."""
    text = str(error).strip().partition("\n")[0][:200]
    known = any(name in text for name in run.hidden_names())
    return type(error).__name__ if known or not text else f"{type(error).__name__}: {text}"


@contextmanager
def _without_engine_errors() -> Iterator[None]:
    """Ignite says each error that ends a run, also the one by which a trial is pruned."""
    log = logging.getLogger("ignite")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)
