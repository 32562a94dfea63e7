"""The audit as a command, and what every run ends with: figures, verdict and what is left."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.bundle import ConfigParser

from monai_unlearn.bundle import Bundle, readable_errors
from monai_unlearn.checkpoint import Checkpoint, file_hash, load_checkpoint
from monai_unlearn.cost import Cost, seconds_of
from monai_unlearn.evaluation import SPLITS, Audited, AuditOptions, SplitResult, audit_outputs
from monai_unlearn.handlers import on_terminal
from monai_unlearn.leftovers import find
from monai_unlearn.output import check_output_dir, replaced_folder, write_json
from monai_unlearn.provenance import machine, versions
from monai_unlearn.relearn import forget_loss, relearn_steps
from monai_unlearn.report import (
    build_report,
    forget_size_rows,
    read_report,
    render_html,
    scalars,
    terminal_table,
)
from monai_unlearn.run import Run, refuse_near_chance
from monai_unlearn.shadow import shadow_hash, shadow_scores
from monai_unlearn.training import find_model

__all__ = [
    "NO_TEST_SET",
    "RunRecord",
    "audit",
    "audited_figures",
    "figures_and_audit",
    "provenance",
    "publish",
    "save_record",
    "say_results",
    "without_names",
    "without_pages",
    "write_report",
]

logger = logging.getLogger("monai_unlearn")

NO_TEST_SET = "There is no test set: the figures on validation and test set are those of the same images."
RECORD = "settings.json"
POSITIONS = "forget_indices.txt"
REQUESTS = ("forget_indices", "forget_patients", "forget_request")
PATHS = ("_file", "_dir", "_checkpoint", "_indices", "_patients", "_request")
Outputs = Mapping[str, SplitResult]
_pages = True


def audit(bundle: Bundle) -> None:
    """Audit any original and unlearned model, whatever made them; see docs/audit.md.

    Args:
        bundle: the running bundle.
    """
    with readable_errors():
        settings = bundle.settings()
        output = Path(settings["output_dir"])
        check_output_dir(output)
        earlier = None if settings["run"] is None else RunRecord.read(Path(settings["run"]))
        run = Run.start(bundle) if earlier is None else earlier.start(bundle.build("device"), settings["subgroups"])
        with replaced_folder(output) as folder:
            (folder / "private").mkdir()
            try:
                run.fill_cache()
                report = _Audit(run, settings, earlier).report(folder)
            finally:
                notes = run.remove_cached_copies()
            report["notes"] += notes
            write_report(report, folder)
        say_results(report, output, ("report.json", "report.html"))
        publish(report, bundle.build("report_handlers"))


def audited_figures(
    run: Run, results: Mapping[str, Sequence[Outputs]], shadows: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of each model and the audit, from the models' outputs.

    Args:
        run: the run.
        results: ``original``, ``unlearned`` and ``retrained`` → for each of their models its outputs on each split.
        shadows: scores of shadow models, if there are any.

    Returns:
        What ``build_report`` takes as ``models`` and as ``audit``.
    """
    audited = Audited(
        original=results["original"][0],
        unlearned=results["unlearned"],
        retrained=results["retrained"],
        facts=run.facts(),
        class_names=run.data.class_names,
        multi_label=run.data.multi_label,
        shadows=shadows,
    )
    named = run.split.named_columns
    options = AuditOptions(
        matched=named, comparable=not named, subgroups=run.settings.get("subgroups"), seed=run.settings["seed"]
    )
    return figures_and_audit(audited, options)


def figures_and_audit(audited: Audited, options: AuditOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of each model and the audit, from outputs.

    Args:
        audited: outputs of the models.
        options: how to audit.

    Returns:
        What ``build_report`` takes as ``models`` and as ``audit``.
    """
    cost = Cost()
    with seconds_of(cost, None):
        section = audit_outputs(audited, options)
    section["evaluation_seconds"] = round(cost.seconds, 3)
    attack = section["attacks"]["population"]["log_odds"]["models"]
    figures = {
        name: {split: _averaged([outputs[split].as_dict() for outputs in group]) for split in SPLITS}
        | {"attack": {key: attack[name][key] for key in ("auc", "low", "high")}}
        for name, group in audited.models.items()
    }
    return figures, section


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write ``report.json`` and, but within ``without_pages``, ``report.html``.

    Args:
        report: the report.
        folder: where they go.
    """
    write_json(report, folder / "report.json")
    if _pages:
        (folder / "report.html").write_text(render_html(report), encoding="utf-8")


@contextmanager
def without_pages() -> Iterator[None]:
    """Within this block no page is rendered: of many runs nobody reads it, and each takes seconds for its plots."""
    global _pages
    before, _pages = _pages, False
    try:
        yield
    finally:
        _pages = before


def say_results(report: Mapping[str, Any], output: Path, files: Sequence[str]) -> None:
    """Log the table, what was written and what is left."""
    logger.info("\n%s\n", terminal_table(report))
    for name in files:
        if (output / name).exists():
            logger.info("Wrote %s", output / name)
    ours = sum(entry["ours"] for entry in report["left"])
    if ours:
        logger.info(
            "%d things of ours still hold forget data or weights from before (report: What is left): keep them as "
            "private as these, or remove them with `python -m monai_unlearn finalise %s`.",
            ours,
            output,
        )


def publish(report: Mapping[str, Any], handlers: Sequence[Any]) -> None:
    """Hand the report's numbers to MONAI's own handlers for TensorBoard or MLflow, as the metrics of one epoch.

    Args:
        report: the report.
        handlers: such as ``monai.handlers.TensorBoardStatsHandler`` or ``MLFlowHandler``.
    """
    if not handlers:
        return
    engine = Engine(lambda *_: [{}])  # nothing to log of an iteration
    numbers = scalars(report)
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: engine.state.metrics.update(numbers))
    for handler in handlers:
        handler.attach(engine)
    engine.run([0], max_epochs=1)


def save_record(run: Run, folder: Path, original: Path) -> None:
    """Keep what a later audit of this run needs, in its private folder.

    The positions of the forget images take the place of the request, whose path may name a patient.

    Args:
        run: the run.
        folder: the run's folder.
        original: the original model's file.
    """
    config = copy.deepcopy(run.bundle.config) | dict.fromkeys(REQUESTS)
    for key, value in config.items():
        if isinstance(value, str) and key.endswith(PATHS) and not value.startswith(("$", "@", "%")):
            config[key] = os.path.abspath(value)
    split = run.split
    record = {
        "config": config,
        "original": os.path.abspath(original),
        "request": split.request,
        "named_columns": split.named_columns,
        "key_is_kept": split.key_is_kept,
    }
    try:
        text = json.dumps(record, indent=2, ensure_ascii=False)
    except TypeError:
        return  # a workflow that was given finished objects can't be repeated from a file
    (folder / "private" / RECORD).write_text(text + "\n", encoding="utf-8")
    (folder / "private" / POSITIONS).write_text("".join(f"{row}\n" for row in split.forget), encoding="utf-8")


class RunRecord:
    """What an earlier run kept of itself.

    Args:
        folder: its folder.
        report: its report.
        content: what it kept in its private folder.
    """

    def __init__(self, folder: Path, report: dict[str, Any], content: dict[str, Any]) -> None:
        self.folder, self.report = folder, report
        self.config: dict[str, Any] = content["config"]
        self.original = Path(content["original"])
        self._split = {name: content[name] for name in ("request", "key_is_kept")}
        self._split["named_columns"] = tuple(content["named_columns"])

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read it.

        Raises:
            FileNotFoundError: if the folder is no run, or its private part was removed.
            ValueError: if it is damaged.
        """
        if not (folder / "report.json").is_file():
            raise FileNotFoundError(
                f"run should be the folder of an earlier run, but {str(folder)!r} has no report.json. Check the path."
            )
        report = read_report(folder / "report.json")
        path = folder / "private" / RECORD
        if not path.is_file() or not path.with_name(POSITIONS).is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} has no private/{RECORD} any more, which says how it was made: it was finalised, or "
                "was made by an older version. Give the same data and request options as it had, with --original, "
                "--unlearned and --retrained."
            )
        try:
            return cls(folder, report, json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"private/{RECORD} of {str(folder)!r} is damaged. Give the options themselves.") from None

    def start(self, device: Any, subgroups: Any) -> Run:
        """The earlier run's data, network and split, on this audit's device.

        Args:
            device: where networks run.
            subgroups: columns to break figures down by; None: those of the earlier run.
        """
        config = copy.deepcopy(self.config) | {"device": str(device)}
        config["forget_indices"] = str(self.folder / "private" / POSITIONS)
        if subgroups is not None:
            config["subgroups"] = subgroups
        bundle = Bundle(ConfigParser(config), copy.deepcopy(config))
        run = Run.start(bundle)
        if run.data_digest != self.report["provenance"]["data"]["sha256"]:
            raise ValueError(
                "The data are not those of the earlier run: their hash differs. Restore them, or audit the checkpoints "
                "by --original, --unlearned and the request's options."
            )
        bundle.share(split=replace(run.split, **self._split))
        return replace(run)


class _Audit:
    """One audit: the models that are compared, and the report on them."""

    def __init__(self, run: Run, settings: Mapping[str, Any], earlier: RunRecord | None) -> None:
        self.run, self.settings, self.earlier = run, settings, earlier
        key = settings["network_key"]
        if key is None and earlier is not None:
            key = earlier.config.get("network_key")
        self.key = key
        self.paths = self._paths()

    def report(self, folder: Path) -> dict[str, Any]:
        """Evaluate everything, and put the report together."""
        run, settings, earlier = self.run, self.settings, self.earlier
        evaluator, network = run.bundle.build("evaluator", "network")
        if on_terminal():
            ProgressBar(desc="evaluation").attach(evaluator)
        results: dict[str, list[Outputs]] = {"original": [], "unlearned": [], "retrained": []}
        checkpoints: dict[str, list[Checkpoint]] = {name: [] for name in results}
        for name, paths in self.paths.items():  # all of them are read before the first is evaluated
            for path in paths:
                # Those of ours are bare state dicts, whatever the form of the user's own.
                own = name == "retrained" and settings["retrained"] is None
                checkpoints[name].append(_loaded(path, None if own else self.key, network, name))
        for name, group in checkpoints.items():
            for path, checkpoint in zip(self.paths[name], group):
                checkpoint.load_into(network)
                results[name].append(run.evaluate(evaluator, network))
                if name == "original":
                    refuse_near_chance(results[name][0], run.data.num_classes, run.data.multi_label, path)
        shadows, shadow_folder = self._shadows()
        figures, section = audited_figures(run, results, shadows)
        if section["distance"] is not None and settings["relearn_epochs"]:
            section["distance"]["relearn"] = self._relearn(checkpoints)
        method = "audit" if earlier is None else earlier.report["method"]
        cost = {} if earlier is None else _costs(earlier.report["cost"])
        original = self.paths["original"][0]
        shown = {path.parent for name in ("original", "unlearned") for path in self.paths[name]}
        report = build_report(
            method=method,
            # What is left lies where the earlier run kept its models, which finalise reads here.
            settings={name: without_names(name, value) for name, value in settings.items()}
            | {"models_dir": run.settings["models_dir"]},
            models=figures,
            cost={**cost, "evaluation": run.evaluation, "caching": run.caching},
            task="multi-label" if run.data.multi_label else "multi-class",
            request=run.split.request,
            notes=[*run.data.notes, *([NO_TEST_SET] if run.data.test is None else [])],
            audit=section,
            left=find(
                settings["output_dir"],
                folder,
                original=original,
                models_dir=Path(run.settings["models_dir"]),
                retrained=[path.parent for path in self.paths["retrained"]],
                shadow=[] if shadow_folder is None else [shadow_folder],
                shown=[path for path in sorted(shown) if earlier is None or path != earlier.folder],
                key_beside_request=run.split.key_is_kept,
                hidden=run.hidden_names(),
            ),
            measured_together=None
            if earlier is None
            else (earlier.report["cost"].get("ratio") or {}).get("measured_together"),
            provenance=provenance(
                run,
                original=original,
                files={**{name: paths for name, paths in self.paths.items()}},
                retrained_on=None if earlier is None else earlier.report["provenance"]["retrained_on"],
            ),
        )
        if settings["curve_runs"] is not None:
            others = [read_report(Path(other) / "report.json") for other in _listed(settings["curve_runs"])]
            report["audit"]["forget_size"] = forget_size_rows(others, report)
        return report

    def _paths(self) -> dict[str, list[Path]]:
        settings, earlier = self.settings, self.earlier
        given = {
            name: [Path(path) for path in _listed(settings[name])] for name in ("original", "unlearned", "retrained")
        }
        if earlier is not None:
            given["original"] = given["original"] or [earlier.original]
            given["unlearned"] = given["unlearned"] or [earlier.folder / "unlearned_model.pt"]
        for name in ("original", "unlearned"):
            if not given[name]:
                raise ValueError(
                    f"Name the {name} model's checkpoint with --{name} FILE, or an earlier run with --run DIR."
                )
        if len(given["original"]) > 1:
            raise ValueError(f"original should be one checkpoint, but got {len(given['original'])}.")
        if not given["retrained"] and earlier is not None and settings["reference"]:
            given["retrained"] = [model.path for model in self.run.retrained()]
        real = [os.path.realpath(path) for paths in given.values() for path in paths]
        if len(set(real)) < len(real):
            raise ValueError(
                "original, unlearned and retrained should be different files, but one is given twice. Compare with "
                "another, or leave it out."
            )
        return given

    def _shadows(self) -> tuple[tuple[np.ndarray, np.ndarray] | None, Path | None]:
        """Scores of shadow models, where there should be any."""
        run, models = self.run, self.settings["shadow_models"]
        if not models:
            return None, None
        if self.earlier is None:
            raise ValueError(
                "shadow_models needs to know how the model was unlearned. Name the run that did it with --run DIR, or "
                "leave --shadow_models 0."
            )
        rows = run.split.forget, run.split.validation
        seed = self.settings["seed"]
        name = shadow_hash(run.bundle, run.data_digest, run.split, *rows, seed)
        folder = Path(run.settings["models_dir"]) / "shadow" / name
        kept = find_model(run.model_folder(run.settings["seed"], forget=False))
        found = shadow_scores(
            run.bundle,
            run.data,
            run.split,
            *rows,
            folder,
            models,
            seed,
            None if kept is None else kept.cost.seconds + self.earlier.report["cost"]["unlearn"]["seconds"],
        )
        return (found.in_scores, found.out_scores), folder

    def _relearn(self, checkpoints: Mapping[str, Sequence[Checkpoint]]) -> dict[str, Any]:
        """Steps until the original's loss on the forget set is regained, by the unlearned and two retrained models."""
        run, settings = self.run, self.settings
        target = forget_loss(run.bundle, checkpoints["original"][0], run.data, run.split, settings["seed"])
        steps = {}
        models = {"unlearned": checkpoints["unlearned"][0]}
        models |= zip(("retrained", "second_retrained"), checkpoints["retrained"])  # what two of these are apart
        for name, checkpoint in models.items():
            steps[name], cost = relearn_steps(
                run.bundle,
                checkpoint,
                run.data,
                run.split,
                target,
                settings["relearn_epochs"],
                settings["seed"],
            )
            run.evaluation.seconds += cost.seconds
        size = int(run.bundle.build("train_loader").batch_size or 1)
        budget = settings["relearn_epochs"] * -(-len(run.split.forget) // size)
        return {"budget": budget, "original_loss": target, "steps": steps}


def provenance(
    run: Run, original: Path, files: Mapping[str, Sequence[Path]], retrained_on: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Where a report's figures come from.

    Args:
        run: the run.
        original: the original model's file, as it was named.
        files: ``original``, ``unlearned``, ``retrained`` → the files of their models; and any others.
        retrained_on: the machine on which retraining was timed.
    """
    hashes: dict[str, str | None] = {"original": None, "unlearned": None, "retrained": None, "split": None}
    for name, paths in files.items():
        for i, path in enumerate(paths):
            hashes[name if i == 0 else f"{name} {i + 1}"] = file_hash(path)
    seed = run.settings["seed"]
    return {
        "original_checkpoint": str(original),
        "data": {"name": run.data.name, "sha256": run.data_digest},
        "versions": versions(),
        "machine": machine(run.device),
        "retrained_on": retrained_on,
        "seeds": {
            "split": seed,
            "unlearning": seed,
            "retrained": run.bundle.build("reference_seed") if files.get("retrained") else None,
        },
        "hashes": hashes,
    }


def _loaded(path: Path, key: str | None, network: Any, name: str) -> Checkpoint:
    """Read a checkpoint and see that it is of this network."""
    checkpoint = load_checkpoint(path, key)
    try:
        checkpoint.load_into(network)
    except ValueError as error:
        raise ValueError(f"The {name} model {path.name}: {error}") from None
    return checkpoint


def _listed(value: Any) -> list[str]:
    """None, one path or a list of them, as a list."""
    if value is None:
        return []
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]


def _costs(parts: Mapping[str, Any]) -> dict[str, Cost]:
    phases = ("mask", "tuning", "unlearn", "retrain")
    return {phase: Cost(**parts[phase]) for phase in phases if parts.get(phase) is not None}


def _averaged(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of each figure over several models; None where one of them has none."""
    found: dict[str, Any] = {}
    for name, value in figures[0].items():
        values = [one[name] for one in figures]
        if isinstance(value, Mapping):
            found[name] = _averaged(values)
        elif name == "n":
            found[name] = value
        else:
            found[name] = None if any(one is None for one in values) else float(np.mean(values))
    return found


def without_names(name: str, value: Any) -> Any:
    """A request's file may be named after a patient."""
    return "a file" if name in REQUESTS and value is not None else value
