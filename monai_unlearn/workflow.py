"""The stages of a run: original model, retrained model, unlearning, evaluation, report."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.handlers import ProgressBar
from monai.utils import set_determinism
from torch.utils.data import DataLoader, Subset

from monai_unlearn.bundle import Bundle, device_of, readable_errors
from monai_unlearn.checkpoint import Checkpoint, file_hash, load_checkpoint, save_atomically
from monai_unlearn.cost import Cost
from monai_unlearn.data import BatchedImages, ImageData, LabeledImages, Split, make_loader
from monai_unlearn.evaluation import SplitResult, evaluate
from monai_unlearn.handlers import on_terminal
from monai_unlearn.metrics import attack_auc, attack_auc_interval
from monai_unlearn.output import check_output_dir, replaced_folder, write_json
from monai_unlearn.provenance import machine, versions
from monai_unlearn.report import build_report, render_html, terminal_table
from monai_unlearn.training import find_model, run_trainer, train_model

__all__ = ["train", "unlearn"]

logger = logging.getLogger("monai_unlearn")

EVALUATION_BATCH = 500
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
    split: Split
    device: torch.device
    image_range: Sequence[float]

    @classmethod
    def start(cls, bundle: Bundle) -> _Run:
        set_determinism(bundle.settings()["seed"])
        data = bundle.build("data")
        bundle.share(data=data)
        split = bundle.build("split")
        bundle.share(split=split)
        device = device_of(bundle.build("device"))
        bundle.share(device=device)
        image_range = bundle.build("image_range")
        first = BatchedImages(data.train, device=device, value_range=image_range)[0]["image"][None]
        _check_network(bundle.build("network"), first, data.num_classes)
        patients = data.train.patients
        logger.info(
            "Data: %s, %d classes, %d training images%s",
            data.name,
            data.num_classes,
            len(data.train),
            "" if patients is None else f" of {len(np.unique(patients))} patients",
        )
        return cls(bundle, bundle.settings(), data, data.digest(), split, device, image_range)

    def model_folder(self, seed: int, forget: bool) -> Path:
        parts = [self.data_digest, self.split.digest() if forget else "all", str(seed)]
        return Path(self.settings["models_dir"]) / self.bundle.recipe_hash(*parts)

    def dataset(self, part: LabeledImages) -> BatchedImages:
        """Images for evaluation: scaled as in training, without augmentation."""
        return BatchedImages(part, device=self.device, value_range=self.image_range)

    def loaders(self) -> dict[str, DataLoader]:
        """The splits of the report and the selection half, in order and without augmentation."""
        train, validation, test = map(self.dataset, (self.data.train, self.data.validation, self.data.test))
        parts = {
            "forget": Subset(train, self.split.forget.tolist()),
            "retain": Subset(train, self.split.retain.tolist()),
            "selection": Subset(validation, self.split.selection.tolist()),
            "validation": Subset(validation, self.split.validation.tolist()),
            "test": test,
        }
        return {name: make_loader(part, EVALUATION_BATCH) for name, part in parts.items()}


def train(bundle: Bundle) -> None:
    """Train an original model by the bundle's recipe, keep it, and say how well it does.

    Args:
        bundle: the running bundle.
    """
    with readable_errors():
        run = _Run.start(bundle)
        folder = run.model_folder(run.settings["seed"], forget=False)
        model = train_model(bundle, folder, run.settings["seed"], None, "original")
        checkpoint = load_checkpoint(model.path)
        evaluator, network = bundle.build("evaluator", "network")
        checkpoint.load_into(network)
        loaders = run.loaders()
        everything = make_loader(run.dataset(run.data.train), EVALUATION_BATCH)
        results = evaluate(evaluator, network, {"training": everything, "selection": loaders["selection"]})
        for name, result in results.items():
            logger.info("  %-10s accuracy %5.1f %%  (n = %d)", name, 100 * (result.accuracy or 0), result.n)
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
            "To forget: %d training images (%.1f %%), drawn by %s; to retain: %d",
            len(run.split.forget),
            100 * len(run.split.forget) / len(run.data.train),
            run.split.unit,
            len(run.split.retain),
        )
        with replaced_folder(output) as folder:
            report, scores = _unlearn_into(folder, run)
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
    results = {"original": evaluate(evaluator, network, loaders)}
    _refuse_near_chance(results["original"], run.data.num_classes, original_path)

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
    results["unlearned"] = evaluate(evaluator, network, loaders)

    if reference is not None:
        cost["retrain"] = reference.cost
        load_checkpoint(reference.path).load_into(network)
        results["retrained"] = evaluate(evaluator, network, loaders)

    key = secrets.token_hex(32)
    (folder / "private" / "split_key").write_text(key + "\n", encoding="utf-8")
    write_json(split.as_hashes(run.data, key), folder / "split.json")
    figures = {
        name: {part: result.as_dict() for part, result in splits.items()} | {"attack": _attack(splits, run)}
        for name, splits in results.items()
    }
    report = build_report(
        method=settings["method"],
        settings={name: _without_names(name, value) for name, value in settings.items()},
        models=figures,
        cost=cost,
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
                "--original_checkpoint FILE, or train one with the same data and seed: "
                "python -m monai.bundle run train --config_file bundles/train.json"
            )
        logger.info("No --original_checkpoint given: training an original model on the embedded data first.")
    path = train_model(run.bundle, folder, settings["seed"], None, "original").path
    return path, load_checkpoint(path)


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


def _refuse_near_chance(original: dict[str, SplitResult], num_classes: int, path: Path) -> None:
    """An original that knows nothing of its own training data was loaded or fed wrongly."""
    worst = max(original[name].balanced_accuracy for name in ("forget", "retain"))
    chance = 1 / num_classes
    if worst < chance + NEAR_CHANCE * (1 - chance):
        raise ValueError(
            f"The original model {path.name} has a balanced accuracy of {worst:.3f} on its own training data, near the "
            f"chance of {chance:.3f}. Check that the images are scaled as in its training (--image_range), that "
            "the labels have the same order, and that the checkpoint is the trained one."
        )


def _attack(splits: dict[str, SplitResult], run: _Run) -> dict[str, float]:
    members, others = splits["forget"].scores, splits["validation"].scores
    train, validation = run.data.train.patients, run.data.validation.patients
    low, high = attack_auc_interval(
        members,
        others,
        None if train is None else train[run.split.forget],
        None if validation is None else validation[run.split.validation],
        seed=run.settings["seed"],
    )
    return {"auc": attack_auc(members, others), "low": low, "high": high}


def _without_names(name: str, value: Any) -> Any:
    """A request's file may be named after a patient."""
    return "a file" if name in ("forget_indices", "forget_patients") and value is not None else value
