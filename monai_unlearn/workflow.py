"""The stages of a run: original model, retrained models, unlearning, audit, report."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ignite.handlers import ProgressBar
from monai.utils import set_determinism

from monai_unlearn.auditing import (
    NO_TEST_SET,
    audited_figures,
    provenance,
    publish,
    save_record,
    say_results,
    without_names,
    write_report,
)
from monai_unlearn.bundle import Bundle, readable_errors
from monai_unlearn.checkpoint import load_checkpoint, save_atomically
from monai_unlearn.cost import Cost
from monai_unlearn.handlers import on_terminal
from monai_unlearn.leftovers import find
from monai_unlearn.output import check_output_dir, replaced_folder, write_json
from monai_unlearn.report import build_report, percent
from monai_unlearn.run import Run, near_chance, refuse_near_chance
from monai_unlearn.training import notes_of, run_methods, train_model

__all__ = ["Chosen", "train", "unlearn", "unlearn_run"]

logger = logging.getLogger("monai_unlearn")


@dataclass(frozen=True)
class Chosen:
    """What a choice of settings adds to a run's results.

    Args:
        cost: what the choice cost, which is part of the cost of unlearning.
        notes: sentences for the report.
        files: name → text of further files beside the report.
    """

    cost: Cost = field(default_factory=Cost)
    notes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


def train(bundle: Bundle) -> None:
    """Train an original model by the bundle's recipe, keep it, and say how well it does.

    Args:
        bundle: the running bundle.
    """
    with readable_errors():
        if bundle.settings().get("original_checkpoint") is not None:
            raise ValueError("train makes an original model, so it takes no --original_checkpoint. Leave it out.")
        run = Run.start(bundle)
        folder = run.model_folder(run.settings["seed"], forget=False)
        model = train_model(bundle, folder, run.settings["seed"], None, "original")
        checkpoint = load_checkpoint(model.path)
        evaluator, network = bundle.build("evaluator", "network")
        checkpoint.load_into(network)
        parts = {"training": run.loader(run.data.train), "selection": run.loader(*run.parts()["selection"])}
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
        check_output_dir(Path(bundle.settings()["output_dir"]))
        unlearn_run(Run.start(bundle))


def unlearn_run(run: Run, chosen: Chosen | None = None) -> None:
    """The same of a run whose data is at hand.

    Args:
        run: the run.
        chosen: what a choice of its settings cost, and is to be reported.
    """
    output = Path(run.settings["output_dir"])
    logger.info(
        "To forget: %d training images (%.1f %%), by %s; to retain: %d",
        len(run.split.forget),
        100 * len(run.split.forget) / len(run.data.train),
        run.split.unit,
        len(run.split.retain),
    )
    chosen = Chosen() if chosen is None else chosen
    with replaced_folder(output) as folder:
        try:
            report = _unlearn_into(folder, run, chosen)
        except BaseException:
            run.remove_cached_copies()
            raise
        write_report(report, folder)
        for name, text in chosen.files.items():
            (folder / name).write_text(text, encoding="utf-8")
    say_results(report, output, ("unlearned_model.pt", "report.json", "report.html", *chosen.files))
    publish(report, run.bundle.build("report_handlers"))


def _unlearn_into(folder: Path, run: Run, chosen: Chosen) -> dict:
    """Everything between the data and the report, which is returned."""
    settings, bundle, split = run.settings, run.bundle, run.split
    (folder / "private").mkdir()
    run.fill_cache()

    # Whatever is wrong with a setting of the method should show now, not after the models have been trained.
    bundle.build("trainer", "methods", private_dir=str(folder / "private"))
    original_path, checkpoint = run.original()
    evaluator, network = bundle.build("evaluator", "network")
    if on_terminal():  # a large set takes its time; a log file needs no line for each of its parts
        ProgressBar(desc="evaluation").attach(evaluator)
    checkpoint.load_into(network)
    original = run.evaluate(evaluator, network)
    refuse_near_chance(original, run.data.num_classes, run.data.multi_label, original_path)

    if settings["reference"] and settings["original_checkpoint"] is not None:
        logger.info(
            "The retrained model follows the bundle's recipe. If your original was trained by another, write that "
            "into the bundle, or the comparison is between two recipes."
        )
    references = run.retrained()

    set_determinism(settings["seed"])
    trainer, methods = bundle.build(
        "trainer", "methods", private_dir=str(folder / "private"), train_seed=settings["seed"]
    )
    checkpoint.load_into(trainer.network)
    cost = run_methods(trainer, methods)
    cost["tuning"] += chosen.cost
    unlearned_path = folder / "unlearned_model.pt"
    save_atomically(checkpoint.with_state_of(trainer.network), unlearned_path)
    # Evaluated is what was written, read back as a user would.
    load_checkpoint(unlearned_path, checkpoint.key).load_into(network)
    unlearned = run.evaluate(evaluator, network)

    useless = near_chance(unlearned, run.data.num_classes, run.data.multi_label)
    if useless is not None:
        useless = f"The unlearned model has {useless}: it is of no use. Lower the rate, or take another method."
        logger.warning(useless)

    retrained = []
    for reference in references:
        load_checkpoint(reference.path).load_into(network)
        retrained.append(run.evaluate(evaluator, network))
    if references:
        cost["retrain"] = references[0].cost

    if not split.key_is_kept:
        (folder / "private" / "split_key").write_text(split.key + "\n", encoding="utf-8")
    save_record(run, folder, original_path)
    write_json(split.as_hashes(run.data), folder / "split.json")
    figures, audit = audited_figures(run, {"original": [original], "unlearned": [unlearned], "retrained": retrained})
    return build_report(
        method=settings["method"],
        settings={name: without_names(name, value) for name, value in settings.items()},
        models=figures,
        cost={**cost, "evaluation": run.evaluation, "caching": run.caching},
        task="multi-label" if run.data.multi_label else "multi-class",
        request=split.request,
        notes=[
            *chosen.notes,
            *notes_of(methods),
            *([] if useless is None else [useless]),
            *run.data.notes,
            *([NO_TEST_SET] if run.data.test is None else []),
            *run.remove_cached_copies(),
        ],
        audit=audit,
        left=find(
            settings["output_dir"],
            folder,
            original=original_path,
            models_dir=Path(settings["models_dir"]),
            retrained=[reference.path.parent for reference in references],
            shown=[original_path.parent] if settings["original_checkpoint"] is not None else [],
            key_beside_request=split.key_is_kept,
            hidden=run.hidden_names(),
        ),
        measured_together=not references[0].kept if references else None,
        provenance=provenance(
            run,
            original=original_path,
            files={
                "original": [original_path],
                "unlearned": [unlearned_path],
                "retrained": [reference.path for reference in references],
                "split": [folder / "split.json"],
            },
            retrained_on=references[0].machine if references else None,
        ),
    )
