"""The stages of a run: original model, retrained model, unlearning, evaluation, report."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ignite.handlers import ProgressBar
from monai.utils import set_determinism
from torch.utils.data import DataLoader, Subset

from monai_unlearn.bundle import Bundle, device_of, readable_errors
from monai_unlearn.checkpoint import Checkpoint, file_hash, load_checkpoint, save_atomically
from monai_unlearn.cost import Cost
from monai_unlearn.data import ImageData, ImageFiles, LabeledImages, Split, people, read_request, remove_cached
from monai_unlearn.evaluation import SplitResult, evaluate
from monai_unlearn.handlers import SCORES, on_terminal, read_history
from monai_unlearn.metrics import attack_auc, attack_auc_interval
from monai_unlearn.output import check_output_dir, replaced_folder, write_json
from monai_unlearn.provenance import machine, versions
from monai_unlearn.report import build_report, percent, render_html, terminal_table
from monai_unlearn.training import HISTORY, find_model, run_trainer, train_model

__all__ = ["refuse_near_chance", "train", "unlearn"]

logger = logging.getLogger("monai_unlearn")

NO_TEST_SET = "There is no test set: the figures on validation and test set are those of the same images."
# Balanced accuracy on its own training data, as the share of the way from chance to 1, below which something is
# wrong with the transforms, the labels' order or the checkpoint rather than with the model.
NEAR_CHANCE = 0.1


@dataclass(frozen=True)
class _Run:
    """What both commands begin with."""

    bundle: Bundle
    settings: dict[str, Any]
    data: ImageData
    data_digest: str
    device: torch.device

    @classmethod
    def start(cls, bundle: Bundle) -> _Run:
        set_determinism(bundle.settings()["seed"])
        data = bundle.build("data")
        bundle.share(data=data)
        device = device_of(bundle.build("device"))
        bundle.share(device=device)
        if not bundle.depends_on("train_dataset", "train_seed"):  # files, perhaps in a cache: made once for all runs
            bundle.share(train_dataset=bundle.build("train_dataset"))
        first = bundle.build("evaluation_dataset", evaluation_part=data.train)[0]["image"][None]
        _check_network(bundle.build("network"), first, data.num_classes)
        patients = data.train.patients
        logger.info(
            "Data: %s, %d %s, %d training images%s",
            data.name,
            data.num_classes,
            ("finding" if data.num_classes == 1 else "findings") if data.multi_label else "classes",
            len(data.train),
            "" if patients is None else f" of {len(np.unique(people(patients)))} patients",
        )
        run = cls(bundle, bundle.settings(), data, data.digest(), device)
        bundle.share(difficulty=_difficulty(run))
        bundle.share(split=bundle.build("split"))
        return run

    @cached_property
    def split(self) -> Split:
        """Who is in which part."""
        return self.bundle.build("split")

    def model_folder(self, seed: int, forget: bool) -> Path:
        parts = [self.data_digest, self.split.digest() if forget else "all", str(seed)]
        return Path(self.settings["models_dir"]) / self.bundle.recipe_hash(*parts)

    def loader(self, part: LabeledImages | ImageFiles, rows: np.ndarray | None = None) -> DataLoader:
        """Images for evaluation: as in training, in order and without augmentation."""
        dataset = self.bundle.build("evaluation_dataset", evaluation_part=part)
        return self.bundle.build(
            "evaluation_loader", evaluation_dataset=dataset if rows is None else Subset(dataset, rows.tolist())
        )

    def loaders(self) -> dict[str, DataLoader]:
        """The splits of the report and the selection half."""
        data, split = self.data, self.split
        held_out = data.validation if data.test is None else data.test
        return {
            "forget": self.loader(data.train, split.forget),
            "retain": self.loader(data.train, split.retain),
            "selection": self.loader(data.validation, split.selection),
            "validation": self.loader(data.validation, split.validation),
            "test": self.loader(held_out, split.test),
        }

    def evaluate(self, evaluator: Any, network: torch.nn.Module, loaders: dict[str, DataLoader]) -> dict:
        """Figures of a network on each of the loaders."""
        return evaluate(evaluator, network, loaders, self.data.class_names if self.data.multi_label else None)


def train(bundle: Bundle) -> None:
    """Train an original model by the bundle's recipe, keep it, and say how well it does.

    Args:
        bundle: the running bundle.
    """
    with readable_errors():
        if bundle.settings().get("original_checkpoint") is not None:
            raise ValueError("train makes an original model, so it takes no --original_checkpoint. Leave it out.")
        run = _Run.start(bundle)
        folder = run.model_folder(run.settings["seed"], forget=False)
        model = train_model(bundle, folder, run.settings["seed"], None, "original")
        checkpoint = load_checkpoint(model.path)
        evaluator, network = bundle.build("evaluator", "network")
        checkpoint.load_into(network)
        parts = {"training": run.loader(run.data.train), "selection": run.loaders()["selection"]}
        for name, result in run.evaluate(evaluator, network, parts).items():
            figure = (
                f"AUROC {percent(result.auroc)}" if run.data.multi_label else f"accuracy {percent(result.accuracy)}"
            )
            logger.info("  %-10s %s %%  (n = %d)", name, figure, result.n)
        if bundle.depends_on("data", "original_checkpoint"):  # naming it says that somebody else trained it
            logger.info("\nTo unlearn from it, use the same data, seed and settings of training: it is found then.")
        else:
            logger.info("\nUnlearn it with --original_checkpoint %s and the same data and seed.", model.path)


def unlearn(bundle: Bundle) -> None:
    """Unlearn the forget set and report what that did; see docs/quickstart.md for what it writes.

    Args:
        bundle: the running bundle.
    """
    with readable_errors():
        output = Path(bundle.settings()["output_dir"])
        check_output_dir(output)
        run = _Run.start(bundle)
        logger.info(
            "To forget: %d training images (%.1f %%), by %s; to retain: %d",
            len(run.split.forget),
            100 * len(run.split.forget) / len(run.data.train),
            run.split.unit,
            len(run.split.retain),
        )
        with replaced_folder(output) as folder:
            try:
                report, scores = _unlearn_into(folder, run)
            except BaseException:
                _without_cached_copies(run)
                raise
            write_json(report, folder / "report.json")
            (folder / "report.html").write_text(render_html(report, scores), encoding="utf-8")
        logger.info("\n%s\n", terminal_table(report))
        for name in ("unlearned_model.pt", "report.json", "report.html"):
            logger.info("Wrote %s", output / name)
        logger.info(
            "%s holds functions of the forgotten images: keep it as private as these, or delete it.", output / "private"
        )


def _unlearn_into(folder: Path, run: _Run) -> tuple[dict, dict]:
    """Everything between the data and the report; returns the report and the images' scores."""
    settings, bundle, split = run.settings, run.bundle, run.split
    (folder / "private").mkdir()
    loaders = {name: loader for name, loader in run.loaders().items() if name != "selection"}

    # Whatever is wrong with a setting of the method should show now, not after the models have been trained.
    bundle.build("trainer", "methods", private_dir=str(folder / "private"))
    original_path, checkpoint = _original(run)
    evaluator, network = bundle.build("evaluator", "network")
    if on_terminal():  # a large set takes its time; a log file needs no line for each of its parts
        ProgressBar(desc="evaluation").attach(evaluator)
    checkpoint.load_into(network)
    results = {"original": run.evaluate(evaluator, network, loaders)}
    refuse_near_chance(results["original"], run.data.num_classes, run.data.multi_label, original_path)

    reference = None
    if settings["reference"]:
        seed = bundle.build("reference_seed")
        if settings["original_checkpoint"] is not None:
            logger.info(
                "The retrained model follows the bundle's recipe. If your original was trained by another, write that "
                "into the bundle, or the comparison is between two recipes."
            )
        reference = train_model(bundle, run.model_folder(seed, forget=True), seed, split.forget_set(), "retrained")

    set_determinism(settings["seed"])
    trainer, methods = bundle.build(
        "trainer", "methods", private_dir=str(folder / "private"), train_seed=settings["seed"]
    )
    checkpoint.load_into(trainer.network)
    cost = {"mask": Cost(), "tuning": Cost(), "unlearn": run_trainer(trainer, "unlearning")}
    for method in methods:
        if hasattr(method, "cost"):
            cost[method.cost_phase] += method.cost
    save_atomically(checkpoint.with_state_of(trainer.network), folder / "unlearned_model.pt")
    # Evaluated is what was written, read back as a user would.
    load_checkpoint(folder / "unlearned_model.pt", checkpoint.key).load_into(network)
    results["unlearned"] = run.evaluate(evaluator, network, loaders)

    if reference is not None:
        cost["retrain"] = reference.cost
        load_checkpoint(reference.path).load_into(network)
        results["retrained"] = run.evaluate(evaluator, network, loaders)

    if not split.key_is_kept:
        (folder / "private" / "split_key").write_text(split.key + "\n", encoding="utf-8")
    write_json(split.as_hashes(run.data), folder / "split.json")
    figures = {
        name: {part: result.as_dict() for part, result in splits.items()} | {"attack": _attack(splits, run)}
        for name, splits in results.items()
    }
    report = build_report(
        method=settings["method"],
        settings={name: _without_names(name, value) for name, value in settings.items()},
        models=figures,
        cost=cost,
        task="multi-label" if run.data.multi_label else "multi-class",
        request=split.request,
        notes=[*run.data.notes, *([NO_TEST_SET] if run.data.test is None else []), *_without_cached_copies(run)],
        provenance={
            "original_checkpoint": str(original_path),
            "data": {"name": run.data.name, "sha256": run.data_digest},
            "versions": versions(),
            "machine": machine(run.device),
            "retrained_on": None if reference is None else reference.machine,
            "seeds": {
                "split": settings["seed"],
                "unlearning": settings["seed"],
                "retrained": None if reference is None else seed,
            },
            "hashes": {
                "original": file_hash(original_path),
                "unlearned": file_hash(folder / "unlearned_model.pt"),
                "retrained": None if reference is None else file_hash(reference.path),
                "split": file_hash(folder / "split.json"),
            },
        },
    )
    scores = {
        name: {part: splits[part].scores for part in ("forget", "validation")} for name, splits in results.items()
    }
    return report, scores


def _original(run: _Run) -> tuple[Path, Checkpoint]:
    """The original model: the user's, one that an earlier run trained, or for the embedded data a new one."""
    settings = run.settings
    if settings["original_checkpoint"] is not None:
        path = Path(settings["original_checkpoint"])
        return path, load_checkpoint(path, settings["network_key"])
    folder = run.model_folder(settings["seed"], forget=False)
    if find_model(folder) is None:
        if not run.data.embedded:
            raise ValueError(
                f"There is no original model of {run.data.name} to unlearn from. Name yours with "
                "--original_checkpoint FILE, or train one with the same data, seed and settings: the same command with "
                "`run train`, and bundles/train.json in the place of the method's file."
            )
        logger.info("No --original_checkpoint given: training an original model on the embedded data first.")
    path = train_model(run.bundle, folder, settings["seed"], None, "original").path
    return path, load_checkpoint(path)


def _difficulty(run: _Run) -> pd.DataFrame | None:
    """Scores that the request asks for and the data does not have: recorded in training, or from the original model."""
    file = run.settings.get("forget_request")
    wanted = set() if file is None else read_request(file).score_columns - set(run.data.train.index())
    unknown = sorted(wanted - {"difficulty", *SCORES})
    if unknown:
        raise ValueError(
            f"The request should go by a score that there is, but goes by {', '.join(unknown)}. The data has no such "
            f"column; without one there are difficulty, {', '.join(SCORES)} (see docs/difficulty.md)."
        )
    if not wanted:
        return None
    path, checkpoint = _original(run)
    n = len(run.data.train)
    scores = pd.DataFrame(index=range(n))
    recorded = sorted(wanted - {"difficulty"})
    if recorded:
        history = path.parent / HISTORY
        if not history.is_file():
            raise ValueError(
                f"The request goes by {', '.join(recorded)}, which the training of the original model records, but no "
                f"{HISTORY} lies beside {path.name}. Train the original with bundles/train.json, or take the score "
                "difficulty."
            )
        scores[recorded] = read_history(history, n)[recorded]
    if "difficulty" in wanted:
        evaluator, network = run.bundle.build("evaluator", "network")
        checkpoint.load_into(network)
        result = run.evaluate(evaluator, network, {"training": run.loader(run.data.train)})
        scores["difficulty"] = result["training"].difficulty
        logger.info("Difficulty of the training images: as the original model sees them (see docs/difficulty.md)")
    return scores


def _check_network(network: torch.nn.Module, image: torch.Tensor, num_classes: int) -> None:
    """A network that does not fit the data should be refused in one sentence."""
    network.eval()
    try:
        with torch.no_grad():
            outputs = network(image)
    except RuntimeError as error:
        raise ValueError(
            f"network_def does not take images of shape {tuple(image.shape[1:])} (channels first): {error}"
        ) from error
    if not isinstance(outputs, torch.Tensor) or outputs.shape != (1, num_classes):
        shape = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise ValueError(
            f"network_def should give one logit for each of the data's {num_classes} classes, shape "
            f"(1, {num_classes}) for one image, but gives {shape}. Set its number of classes to that of the data."
        )


def refuse_near_chance(original: dict[str, SplitResult], num_classes: int, multi_label: bool, path: Path) -> None:
    """Refuse an original that knows nothing of its own training data: it was loaded or fed wrongly.

    Args:
        original: its figures, ``forget`` and ``retain`` among them.
        num_classes: number of classes, or findings.
        multi_label: whether they are findings.
        path: its file.

    Raises:
        ValueError: if it is near chance.
    """
    figure, chance = ("auroc", 0.5) if multi_label else ("balanced_accuracy", 1 / num_classes)
    values = [getattr(original[name], figure) for name in ("forget", "retain")]
    best = max((value for value in values if value is not None), default=1.0)
    if best < chance + NEAR_CHANCE * (1 - chance):
        raise ValueError(
            f"The original model {path.name} has a {figure.replace('_', ' ').replace('auroc', 'mean AUROC')} of "
            f"{best:.3f} on its own training data, near the chance of {chance:.3f}. Check that the images are scaled "
            "as in its training, that the labels have the same order, and that the checkpoint is the "
            "trained one."
        )


def _attack(splits: dict[str, SplitResult], run: _Run) -> dict[str, float]:
    members, others = splits["forget"].scores, splits["validation"].scores
    train, validation = run.data.train.patients, run.data.validation.patients
    low, high = attack_auc_interval(
        members,
        others,
        None if train is None else people(train[run.split.forget]),
        None if validation is None else people(validation[run.split.validation]),
        seed=run.settings["seed"],
    )
    return {"auc": attack_auc(members, others), "low": low, "high": high}


def _without_cached_copies(run: _Run) -> list[str]:
    """Remove the forgotten people's decoded images from a cache on disk, and say so for the report."""
    if run.settings.get("cache") != "disk" or not isinstance(run.data.train, ImageFiles):
        return []
    removed = remove_cached(run.data.train, run.split.forget, run.settings["cache_dir"])
    note = f"{removed} decoded copies of images of the people forgotten were removed from the cache on disk."
    logger.info("%s", note)
    return [note]


def _without_names(name: str, value: Any) -> Any:
    """A request's file may be named after a patient."""
    return "a file" if name in ("forget_indices", "forget_patients", "forget_request") and value is not None else value
