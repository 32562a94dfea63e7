"""Unlearning in somebody else's training bundle, by one config file that is added to it."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from ignite.engine import Events
from ignite.handlers import ProgressBar
from ignite.metrics import Accuracy, EpochMetric, Loss, Metric
from monai.bundle import ConfigParser
from monai.data import PersistentDataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ROCAUC, from_engine
from monai.utils import CommonKeys, set_determinism
from torch import nn
from torch.utils.data import DataLoader, Subset

from monai_unlearn.auditing import figures_and_audit, say_results, write_report
from monai_unlearn.bundle import bundle_path, hint, readable_errors, running_workflow, typed
from monai_unlearn.checkpoint import file_hash, load_checkpoint, save_atomically
from monai_unlearn.cost import Cost, seconds_of
from monai_unlearn.data import ID_COLUMNS, DeletionRequest, Resolution, people, read_request, resolve_request
from monai_unlearn.evaluation import (
    SPLITS,
    Audited,
    AuditOptions,
    Facts,
    SplitResult,
    evaluate,
    probabilities_and_one_hot,
)
from monai_unlearn.foreign import (
    FLAG,
    ForeignBundle,
    TaggedDataset,
    index_of,
    loader_of,
    repeats_of,
    with_dataset,
    with_repeats,
)
from monai_unlearn.forget_set import ForgetSet
from monai_unlearn.handlers import on_terminal
from monai_unlearn.leftovers import find
from monai_unlearn.loss import MaskedBCEWithLogitsLoss
from monai_unlearn.methods import BatchNormPolicy, RandomLabeling, Retrain, SaliencyMask
from monai_unlearn.metrics import known_accuracy, mean_auroc
from monai_unlearn.output import check_output_dir, replaced_folder, write_json
from monai_unlearn.provenance import machine, versions
from monai_unlearn.report import build_report
from monai_unlearn.run import refuse_near_chance
from monai_unlearn.training import notes_of, run_methods, run_trainer

__all__ = ["unlearn"]

logger = logging.getLogger("monai_unlearn")
# Takes the place of the engines' own loggers: each evaluation would say that a run starts, ends and is the best so far.
quiet = logging.getLogger("monai_unlearn.engines")
quiet.addFilter(lambda record: record.levelno >= logging.WARNING)  # a logging.conf would undo a level

METHODS = ("random_labeling", "saliency", "retrain")
OVERLAP = ("refuse", "drop", "keep")
BINARY = (nn.BCEWithLogitsLoss, nn.BCELoss, MaskedBCEWithLogitsLoss)


def unlearn(settings: Mapping[str, Any]) -> None:
    """Carry out a deletion request in the bundle that MONAI is running; see docs/howto_zoo_bundle.md.

    Args:
        settings: the section ``unlearning`` of the config.
    """
    workflow, _ = running_workflow()
    _heard()
    with readable_errors():
        config = cast(dict, workflow.parser.config)
        chosen = _checked(settings)
        check_output_dir(chosen["output_dir"])
        bundle = ForeignBundle(config, chosen["trainer"], chosen["evaluator"])
        root = Path(str(workflow.parser.get_parsed_content("bundle_root", default=".")))
        with replaced_folder(chosen["output_dir"]) as folder:
            report = _Run(bundle, chosen, root).into(folder)
            write_report(report, folder)
        files = ("unlearned_model.pt", "report.json", "report.html")
        say_results(report, Path(chosen["output_dir"]), files)
        logger.info("The bundle's own configs load it where they name the original's file: nothing of it was changed.")


def _heard() -> None:
    """Have the run's lines printed, which a bundle's own logging.conf, if there is one, need not provide for."""
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler(sys.stdout))


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with their types, misspelt ones refused."""
    shipped = ConfigParser.load_config_file(str(bundle_path("overlay")))["unlearning"]
    for key in settings:
        if key not in shipped:
            raise ValueError(
                f"There is no setting unlearning::{key}.{hint(key, shipped)} Settings: {', '.join(shipped)}."
            )
    chosen = {key: typed(key, settings.get(key, value), value) for key, value in shipped.items()}
    for key, known in {"method": METHODS, "overlap": OVERLAP}.items():
        if chosen[key] not in known:
            raise ValueError(f"unlearning::{key} should be one of {', '.join(known)}, but got {chosen[key]!r}.")
    if chosen["lr"] is not None and not (isinstance(chosen["lr"], (int, float)) and chosen["lr"] > 0):
        raise ValueError(f"unlearning::lr should be a number greater than 0, but got {chosen['lr']!r}.")
    if chosen["forget_request"] is None:
        raise ValueError("Name who is to be forgotten: --unlearning::forget_request FILE (see docs/requests.md).")
    return chosen


@dataclass(frozen=True)
class _Task:
    """What the network is trained for, as the first validation batch and the loss tell."""

    multi_label: bool
    num_classes: int
    probabilities: bool


class _Run:
    """One request in one bundle."""

    def __init__(self, bundle: ForeignBundle, settings: dict[str, Any], root: Path) -> None:
        self.bundle, self.settings, self.root = bundle, settings, root

    def into(self, folder: Path) -> dict:
        """Unlearn, and write everything but the report, which is returned."""
        settings = self.settings
        (folder / "private").mkdir()
        request = read_request(settings["forget_request"])
        set_determinism(settings["seed"])
        trainer, theirs = self._engines(keep_schedules=settings["method"] == "retrain")
        index = index_of(loader_of(trainer), settings["image_key"], settings["patient_key"])
        resolution = _resolved(request, index, theirs, settings)
        held_out, shared = _held_out(index, resolution, theirs, settings)
        logger.info(
            "To forget: %d of %d training images, by %s", len(resolution.positions), len(index), resolution.unit
        )

        task = self._prepare(trainer, theirs, index, resolution)
        forget = ForgetSet.flagged(FLAG)
        path = Path(settings["original_checkpoint"] or self.bundle.original(self.root))
        methods = self._methods(forget, trainer, task, folder, path)  # a trainer that they refuse is refused now
        checkpoint = load_checkpoint(path, settings["network_key"])
        logger.info("Original model: %s", path)
        loaders = {
            "forget": forget.forget_loader(trainer.data_loader),
            "retain": forget.retain_loader(trainer.data_loader, training=False),
            "validation": held_out,
        }
        evaluator = _evaluator(trainer, theirs, task, settings["label_key"])
        evaluation = Cost()

        def figures(network: nn.Module) -> dict[str, SplitResult]:
            with seconds_of(evaluation, trainer.state.device):
                results = evaluate(evaluator, network, loaders)
            evaluation.samples += sum(result.n for result in results.values())
            evaluation.forward = evaluation.samples
            return {**results, "test": results["validation"]}

        checkpoint.load_into(trainer.network)
        original = figures(trainer.network)
        refuse_near_chance(original, task.num_classes, task.multi_label, path)
        own = {"before": _own_metrics(theirs)}

        set_determinism(settings["seed"])
        cost = run_methods(trainer, methods)
        save_atomically(checkpoint.with_state_of(trainer.network), folder / "unlearned_model.pt")
        # Evaluated is what was written, read back as the bundle's own configs would.
        load_checkpoint(folder / "unlearned_model.pt", checkpoint.key).load_into(trainer.network)
        unlearned = figures(trainer.network)
        own["after"] = _own_metrics(theirs)

        retrained = []
        if settings["reference"]:
            network, cost["retrain"] = self._retrained(index, resolution, forget, path)
            retrained.append(figures(network))

        if not request.key_is_kept:
            (folder / "private" / "split_key").write_text(request.key + "\n", encoding="utf-8")
        names = [index["file"][i] if "file" in index else i for i in resolution.positions]
        write_json(
            {"unit": resolution.unit, "forget": {"n": len(names), "images": [request.hashed(name) for name in names]}},
            folder / "split.json",
        )
        audited = Audited(
            original=original,
            unlearned=[unlearned],
            retrained=retrained,
            facts=self._facts(index, resolution, theirs, held_out),
            class_names=[f"{'finding' if task.multi_label else 'class'} {i + 1}" for i in range(task.num_classes)],
            multi_label=task.multi_label,
        )
        named = request.named_columns
        models, audit = figures_and_audit(
            audited, AuditOptions(matched=named, comparable=not named, seed=settings["seed"])
        )
        report = build_report(
            method=settings["method"],
            settings={key: value for key, value in settings.items() if key != "forget_request"},
            models=models,
            cost={**cost, "evaluation": evaluation},
            task="multi-label" if task.multi_label else "multi-class",
            audit=audit,
            left=find(
                settings["output_dir"],
                folder,
                original=path,
                shown=[path.parent],
                caches=_caches(loader_of(trainer).dataset),
                key_beside_request=request.key_is_kept,
                hidden=_hidden(index, resolution),
            ),
            measured_together=True if settings["reference"] else None,
            request={
                "reference": request.reference,
                **resolution.as_dict(),
                "duplicates": None,
                "allow_partial": settings["allow_partial"],
                "overlap": shared,
            },
            notes=[*notes_of(methods), *_notes(loader_of(trainer).dataset, own, compared=shared is not None)],
            provenance={
                "original_checkpoint": str(path),
                "data": {"name": self.root.resolve().name, "sha256": None},
                "versions": versions(),
                "machine": machine(trainer.state.device),
                "retrained_on": machine(trainer.state.device) if settings["reference"] else None,
                "seeds": {
                    "split": None,
                    "unlearning": settings["seed"],
                    "retrained": settings["seed"] if settings["reference"] else None,
                },
                "hashes": {
                    "original": file_hash(path),
                    "unlearned": file_hash(folder / "unlearned_model.pt"),
                    "retrained": None,
                    "split": file_hash(folder / "split.json"),
                },
            },
        )
        return report

    def _prepare(
        self, trainer: SupervisedTrainer, theirs: SupervisedEvaluator, index: pd.DataFrame, resolution: Resolution
    ) -> _Task:
        """Tag the forget samples, set epochs and learning rate, and see what the task is."""
        _tag(trainer, index, resolution)
        loader = loader_of(trainer)
        sample = loader.dataset[0]
        keys = sample[0] if isinstance(sample, list) else sample
        if self.settings["label_key"] not in keys:
            raise ValueError(
                f"The training samples have no {self.settings['label_key']!r}; they have "
                f"{', '.join(str(key) for key in keys if key != FLAG)}. Name the label's key with "
                "--unlearning::label_key."
            )
        if isinstance(keys.get(self.settings["image_key"]), (str, os.PathLike)):
            raise ValueError(
                f"The training samples hold the path of {self.settings['image_key']!r} and no image. Give the bundle's "
                "training data set its transforms, with LoadImaged among them."
            )
        if self.settings["method"] != "retrain":
            trainer.state.max_epochs = self.settings["epochs"]
            trainer.state.epoch_length = len(loader) * repeats_of(loader)  # a pass over the data, whatever theirs is
        if self.settings["lr"] is not None:
            for group in trainer.optimizer.param_groups:
                group["lr"] = self.settings["lr"]
        return _task(trainer, theirs)

    def _engines(self, keep_schedules: bool) -> tuple[SupervisedTrainer, SupervisedEvaluator]:
        engines = self.bundle.engines(keep_schedules)
        for engine in engines:
            engine.logger = quiet
        return engines

    def _methods(
        self, forget: ForgetSet, trainer: SupervisedTrainer, task: _Task, folder: Path, original: Path
    ) -> list[Any]:
        settings = self.settings
        methods: list[Any] = []
        if settings["method"] == "retrain":
            self._start_again(trainer, forget, original)
        else:
            methods = [
                RandomLabeling(
                    forget,
                    num_classes=None if task.multi_label else task.num_classes,
                    label_key=settings["label_key"],
                    seed=settings["seed"],
                    multi_label=task.multi_label,
                )
            ]
            if settings["method"] == "saliency":
                mask = folder / "private" / "saliency_mask.safetensors"
                methods.append(SaliencyMask(forget, ratio=settings["saliency_ratio"], path=mask))
            if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in trainer.network.modules()):
                methods.append(BatchNormPolicy(forget, policy=settings["batchnorm"]))
        for method in methods:
            method.attach(trainer)
        return methods

    def _start_again(self, trainer: SupervisedTrainer, forget: ForgetSet, original: Path) -> None:
        """Have a trainer train by its recipe without the forget samples.

        It starts where the bundle's own training does: from a checkpoint that it loads, or the network as it is made.
        """
        loader = loader_of(trainer)
        retain = with_repeats(forget.retain_loader(loader, training=True), loader)
        # Where an epoch of theirs is no pass over their data, it stays the same part of a pass.
        length = max(1, math.ceil((trainer.state.epoch_length or len(loader)) * len(retain) / len(loader)))
        start = self.bundle.initial_checkpoint(original) or trainer.network.state_dict()
        Retrain(forget, initial_state=start, loader=retain).attach(trainer)

        def set_length() -> None:
            trainer.state.epoch_length = length

        trainer.add_event_handler(Events.STARTED, set_length)

    def _retrained(
        self, index: pd.DataFrame, resolution: Resolution, forget: ForgetSet, original: Path
    ) -> tuple[nn.Module, Cost]:
        """A network trained by the bundle's own recipe, schedules included, without the forget samples."""
        set_determinism(self.settings["seed"])
        trainer, _ = self._engines(keep_schedules=True)
        _tag(trainer, index, resolution)
        self._start_again(trainer, forget, original)
        return trainer.network, run_trainer(trainer, "retrained")

    def _facts(
        self, index: pd.DataFrame, resolution: Resolution, theirs: SupervisedEvaluator, held_out: DataLoader
    ) -> dict[str, Facts]:
        """What is known of the images of each part: of people, and columns of the bundle's own records."""
        forget = np.zeros(len(index), dtype=bool)
        forget[resolution.positions] = True
        tables: dict[str, pd.DataFrame | None] = {"forget": index[forget], "retain": index[~forget]}
        validation = _validation_index(theirs, self.settings)
        if validation is not None and len(validation) != len(cast(Any, held_out.dataset)):
            validation = validation.iloc[cast(Any, held_out.dataset).indices]  # without people to be forgotten
        tables["validation"] = tables["test"] = validation
        found = {}
        for split in SPLITS:
            table = tables[split]
            if table is None:
                found[split] = Facts()
                continue
            columns = table.drop(columns=[c for c in table if c in (*ID_COLUMNS, self.settings["patient_key"])])
            plain = [c for c in columns if columns[c].map(lambda value: isinstance(value, (str, int, float))).all()]
            found[split] = Facts(
                people=people(table["patient"].to_numpy()) if "patient" in table else None,
                columns=columns[plain].reset_index(drop=True),
            )
        return found


def _hidden(index: pd.DataFrame, resolution: Resolution) -> set[str]:
    """Patients and file names of the forget set, which nothing that is written may show."""
    rows = index.iloc[resolution.positions]
    names = {str(value) for value in rows["patient"].dropna()} if "patient" in rows else set()
    if "file" in rows:
        names |= {Path(str(file)).name.partition(".")[0] for file in rows["file"].dropna()}
    return names - {""}


def _tag(trainer: SupervisedTrainer, index: pd.DataFrame, resolution: Resolution) -> None:
    flags = np.zeros(len(index), dtype=bool)
    flags[resolution.positions] = True
    loader = loader_of(trainer)
    trainer.data_loader = with_dataset(loader, TaggedDataset(loader.dataset, flags.tolist()))


def _resolved(
    request: DeletionRequest, index: pd.DataFrame, theirs: SupervisedEvaluator, settings: dict[str, Any]
) -> Resolution:
    """Which training images a request means; a file that is, or is also, a validation image is an error."""
    files = tuple(selector for selector in request.include if selector.by == "file")
    validation = _validation_index(theirs, settings)
    if files and validation is not None and "file" in validation and "file" in index:
        both = pd.concat([index[["file"]], validation[["file"]]], ignore_index=True)
        asked = replace(request, include=files, exclude=(), unit=None)
        found = resolve_request(asked, both, allow_partial=True, what="the training and validation data").positions
        held_out = int((found >= len(index)).sum())
        if held_out:
            raise ValueError(
                f"{held_out} files of the request are validation images, of which the network learned nothing; the "
                "figures need them unseen. Take them off the request, and out of the bundle's validation list."
            )
    return resolve_request(request, index, allow_partial=settings["allow_partial"])


def _validation_index(theirs: SupervisedEvaluator, settings: dict[str, Any]) -> pd.DataFrame | None:
    try:
        table = index_of(loader_of(theirs), settings["image_key"])
    except ValueError:
        return None  # a data set without records: it can be evaluated on, but not compared
    name = settings["patient_key"]
    return table if name is None or name not in table else table.assign(patient=table[name])


def _held_out(
    index: pd.DataFrame, resolution: Resolution, theirs: SupervisedEvaluator, settings: dict[str, Any]
) -> tuple[DataLoader, dict | None]:
    """The validation data, without people who are to be forgotten where that is asked for."""
    loader, validation = loader_of(theirs), _validation_index(theirs, settings)
    common = [] if validation is None else [n for n in ("file", "patient") if n in index and n in validation]
    if validation is None or not common:
        return loader, None
    same = np.zeros(len(validation), dtype=bool)
    people: set = set()
    for name in common:
        forgotten = set(index[name].iloc[resolution.positions].dropna())
        hits = validation[name].isin(forgotten).to_numpy()
        same |= hits
        people |= set(validation[name][hits]) if name == "patient" else set()
    if same.any() and settings["overlap"] == "refuse":
        raise ValueError(
            f"{int(same.sum())} validation images are of people to be forgotten, though validation is to show how the "
            "model does on people it never saw. Use --unlearning::overlap drop to leave these images out of the "
            "evaluation, or --unlearning::overlap keep."
        )
    if same.all():
        raise ValueError("No validation image is left without the people to be forgotten. Use more data.")
    if same.any() and settings["overlap"] == "drop":
        part = Subset(loader.dataset, np.flatnonzero(~same).tolist())
        loader = DataLoader(
            part, batch_size=loader.batch_size, num_workers=loader.num_workers, collate_fn=loader.collate_fn
        )
    return loader, {"option": settings["overlap"], "patients": len(people), "images": int(same.sum())}


def _task(trainer: SupervisedTrainer, theirs: SupervisedEvaluator) -> _Task:
    """Refuse what is no classification, by the shapes of a first batch."""
    trainer.network.eval()
    try:
        batch = next(iter(theirs.data_loader))
        inputs, labels, args, kwargs = _prepared(theirs, batch)
        with torch.no_grad():
            outputs = theirs.inferer(inputs, trainer.network, *args, **kwargs)
    except Exception as error:  # its text may name an image, and so perhaps a patient
        raise ValueError(
            f"The bundle's evaluator can't put its first batch through the network ({type(error).__name__}). Run the "
            "bundle's own training for one epoch to see why."
        ) from None
    binary = isinstance(trainer.loss_function, BINARY)
    shape = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
    wanted = tuple(labels.shape) if isinstance(labels, torch.Tensor) else type(labels).__name__
    fits = isinstance(outputs, torch.Tensor) and isinstance(labels, torch.Tensor) and outputs.ndim == 2
    if not fits or labels.numel() != (outputs.numel() if binary else len(outputs)):
        raise ValueError(
            f"The network gives {shape} for labels of {wanted}. Unlearning works for classification so far: one class "
            "index a sample (cross entropy, logits B × C) or findings (binary cross entropy, logits and labels B × L); "
            "not for segmentation, detection or regression."
        )
    return _Task(binary, outputs.shape[1], isinstance(trainer.loss_function, nn.BCELoss))


def _prepared(engine: SupervisedTrainer | SupervisedEvaluator, batch: Any) -> tuple:
    prepared = engine.prepare_batch(batch, engine.state.device, engine.non_blocking, **engine.to_kwargs)
    return (*prepared, (), {}) if len(prepared) == 2 else tuple(prepared)


def _evaluator(
    trainer: SupervisedTrainer, theirs: SupervisedEvaluator, task: _Task, label_key: str
) -> SupervisedEvaluator:
    """Their evaluator's inputs, inferer and precision with the figures of the report."""

    def prepare_batch(batch: Any, *_: Any, **__: Any) -> tuple:
        inputs, labels, args, kwargs = _prepared(theirs, batch)
        labels = labels.reshape(len(labels), -1).float() if task.multi_label else labels.reshape(len(labels)).long()
        return inputs, labels, args, kwargs

    def inferer(inputs: Any, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        outputs = theirs.inferer(inputs, network, *args, **kwargs).float()
        return torch.logit(outputs, eps=1e-7) if task.probabilities else outputs

    both = from_engine([CommonKeys.PRED, CommonKeys.LABEL])
    accuracy: Metric
    if task.multi_label:
        accuracy = EpochMetric(known_accuracy, output_transform=both, check_compute_fn=False)
        others: dict[str, Metric] = {
            "auroc": EpochMetric(mean_auroc, output_transform=both, check_compute_fn=False),
            "loss": Loss(MaskedBCEWithLogitsLoss(), output_transform=both),
        }
    else:
        accuracy = Accuracy(output_transform=both)
        others = {
            "auroc": ROCAUC(output_transform=probabilities_and_one_hot),
            "loss": Loss(nn.CrossEntropyLoss(), output_transform=both),
        }
    evaluator = SupervisedEvaluator(
        device=theirs.state.device,
        val_data_loader=theirs.data_loader,
        network=trainer.network,
        non_blocking=theirs.non_blocking,
        prepare_batch=prepare_batch,
        inferer=inferer,  # type: ignore[arg-type]  # MONAI calls it, and asks for no more
        key_val_metric={"accuracy": accuracy},
        additional_metrics=others,
        amp=theirs.amp,
        decollate=False,
    )
    evaluator.logger = quiet
    if on_terminal():
        ProgressBar(desc="evaluation").attach(evaluator)
    return evaluator


def _own_metrics(theirs: SupervisedEvaluator) -> dict[str, float]:
    """What the bundle's own evaluator measures on its own validation data."""
    theirs.run()
    return {name: float(value) for name, value in theirs.state.metrics.items() if np.ndim(value) == 0}


def _notes(dataset: Any, own: dict[str, dict[str, float]], compared: bool) -> list[str]:
    notes = [
        "The bundle has no test set: its validation set stands for both. Where the original was chosen on it, its "
        "figures there are optimistic."
    ]
    for name, value in own["before"].items():
        after = own["after"][name]
        notes.append(f"The bundle's own {name} on its validation data: {value:.4f} before, {after:.4f} after.")
    if not compared:
        notes.append(
            "The bundle's validation data has no records of whose images they are: whether there are people of the "
            "request among them was not checked."
        )
    if _caches(dataset):
        notes.append(
            "The bundle keeps decoded images in a cache of its own on disk, those of forgotten images among them. "
            "Nothing of the bundle was changed: delete that cache."
        )
    return notes


def _caches(dataset: Any) -> list[Path]:
    """Folder of the bundle's own cache on disk, if its data set has one."""
    while isinstance(dataset, (Subset, TaggedDataset)):
        dataset = dataset.dataset
    on_disk = isinstance(dataset, PersistentDataset) and dataset.cache_dir is not None
    return [Path(dataset.cache_dir)] if on_disk else []
