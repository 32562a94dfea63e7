"""Original and retrained models: trained by the bundle's recipe once, and kept with what they cost."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.utils import set_determinism

from monai_unlearn.bundle import Bundle
from monai_unlearn.checkpoint import file_hash, load_checkpoint, save_atomically
from monai_unlearn.cost import Cost
from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.handlers import CostClock, FiniteLoss, Progress, SampleHistory
from monai_unlearn.methods import Retrain, unwrapped_handlers
from monai_unlearn.output import new_folder, write_json
from monai_unlearn.provenance import machine

__all__ = [
    "HISTORY",
    "TrainedModel",
    "costs_of",
    "find_model",
    "notes_of",
    "run_methods",
    "run_trainer",
    "train_model",
]

logger = logging.getLogger("monai_unlearn")

# How each training image fared in the training of an original model, by its position; beside the model.
HISTORY = "history.csv"


@dataclass(frozen=True)
class TrainedModel:
    """A trained model on disk.

    Args:
        path: its checkpoint, a bare state dict.
        cost: what its training cost, as measured then.
        machine: fingerprint of the machine on which that was.
        kept: whether an earlier run trained it.
    """

    path: Path
    cost: Cost
    machine: dict
    kept: bool = True


def find_model(folder: Path) -> TrainedModel | None:
    """The model that an earlier run kept in a folder, or None.

    Raises:
        ValueError: if its file was changed or damaged since.
    """
    if not folder.is_dir():
        return None
    path, record = folder / "model.pt", folder / "training.json"
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        intact = file_hash(path) == content["sha256"]
        model = TrainedModel(path, Cost(**content["cost"]), content["machine"])
    except (OSError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise ValueError(f"The model kept in {folder} was changed or damaged since. Remove that folder to train anew.")
    return model


def train_model(
    bundle: Bundle, folder: Path, seed: int, forget: ForgetSet | None, what: str, name: str | None = None
) -> TrainedModel:
    """Train by the bundle's recipe, or take the model that an earlier run has trained and kept.

    Args:
        bundle: the running bundle.
        folder: where the model is kept, named by a hash of all that it depends on.
        seed: seed of initialisation, order and augmentation.
        forget: retrain without these samples; None trains on all.
        what: what it is: original or retrained.
        name: what progress and messages call it; by default the same.
    """
    name = what if name is None else name
    kept = find_model(folder)
    if kept is not None:
        logger.info("%s: taken from %s", _title(name), kept.path)
        return kept
    set_determinism(seed)
    trainer = bundle.build("recipe::trainer", train_seed=seed)
    if forget is not None:
        Retrain(forget, initial_state=trainer.network.state_dict()).attach(trainer)
    history = SampleHistory()
    if forget is None:
        history.attach(trainer)
    cost = run_trainer(trainer, name)
    here = machine(trainer.state.device)
    with new_folder(folder) as unfinished:
        state = {name: value.cpu().contiguous() for name, value in trainer.network.state_dict().items()}
        save_atomically(state, unfinished / "model.pt")
        load_checkpoint(unfinished / "model.pt")  # a model that can't be read back, or is not finite, is not kept
        content = {"what": what, "cost": cost.as_dict(), "machine": here, "sha256": file_hash(unfinished / "model.pt")}
        write_json(content, unfinished / "training.json")
        if forget is None:
            history.frame().to_csv(unfinished / HISTORY, index=False)
    logger.info("%s: trained in %.0f s, kept in %s", _title(name), cost.seconds, folder / "model.pt")
    return TrainedModel(folder / "model.pt", cost, here, kept=False)


def _title(name: str) -> str:
    name = name[0].upper() + name[1:]
    return name if "model" in name else f"{name} model"


def run_trainer(
    trainer: SupervisedTrainer, what: str, *, clock: CostClock | None = None, progress: bool = True
) -> Cost:
    """Run a trainer with a progress bar, a check of the loss and a clock.

    Args:
        trainer: the trainer.
        what: what it does, for progress and messages.
        clock: a clock that the caller can read after an error too; None: a new one.
        progress: whether to show progress.

    Returns:
        What its iterations cost.

    Raises:
        RuntimeError: if it did not take a single step, and no handler of it ``takes_no_step`` by its nature.
    """
    clock = CostClock() if clock is None else clock
    clock.attach(trainer)
    FiniteLoss().attach(trainer)
    if progress:
        Progress(what).attach(trainer)
    trainer.run()
    by_nature = any(getattr(handler, "takes_no_step", False) for handler in unwrapped_handlers(trainer, Events.STARTED))
    if not clock.cost.backward and not by_nature:
        raise RuntimeError(
            f"The {what} run took no step: its loader gives no batch. Use a smaller batch size, or more data."
        )
    return clock.cost


def run_methods(trainer: SupervisedTrainer, methods: Iterable[object]) -> dict[str, Cost]:
    """Unlearn with a trainer and the methods that it was built with.

    Args:
        trainer: the trainer.
        methods: its handlers.

    Returns:
        Phase (``mask``, ``tuning``, ``unlearn``) → what it cost, iterations included.
    """
    iterations = run_trainer(trainer, "unlearning")
    cost = costs_of(methods)
    cost["unlearn"] += iterations
    return cost


def costs_of(methods: Iterable[Any]) -> dict[str, Cost]:
    """What methods have cost beside the iterations, by phase."""
    cost = {"mask": Cost(), "tuning": Cost(), "unlearn": Cost()}
    for method in methods:
        if hasattr(method, "cost"):
            cost[method.cost_phase] += method.cost
        if hasattr(method, "tuning_cost"):
            cost["tuning"] += method.tuning_cost
    return cost


def notes_of(methods: Iterable[Any]) -> list[str]:
    """What methods have to say for a report."""
    return [note for method in methods for note in getattr(method, "notes", ())]
