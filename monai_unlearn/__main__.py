"""``python -m monai_unlearn``: bundle configs, unlearning in a bundle of your own, removal of what a run left."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

APP = "label_app"
HELP = {
    "method": "random_labeling, saliency or retrain",
    "forget_request": "JSON or CSV file that says who is to be forgotten (docs/requests.md)",
    "allow_partial": "true goes on where a part of the request matches nothing",
    "overlap": "refuse, drop or keep validation images of forgotten people",
    "original_checkpoint": "the trained model; by default what the bundle's savers wrote, or models/model.pt",
    "network_key": "key of the network in that file",
    "reference": "true also trains a model without the forget set, by the bundle's own recipe",
    "epochs": "passes over the training data",
    "lr": "learning rate; by default the optimizer's own",
    "saliency_ratio": "share of the weights that may change, in (0, 1]",
    "batchnorm": "retain, frozen or plain",
    "seed": "seed of the run",
    "trainer": "key of the trainer; by default train::trainer or trainer",
    "evaluator": "key of the evaluator; by default the ValidationHandler's",
    "image_key": "key of the image in records and batches",
    "label_key": "key of the label in batches",
    "patient_key": "key of the patient's id in the records",
    "output_dir": "folder to write; nothing of the bundle is changed",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m monai_unlearn", description=__doc__.split(":", 1)[1].strip())
    commands = parser.add_subparsers(dest="command", required=True)
    path = commands.add_parser(
        "path",
        help="print where a bundle config or the MONAI Label app lies",
        description="Print the path of a bundle config, for `python -m monai.bundle run unlearn --config_file PATH`, "
        "or of the MONAI Label app, for `python -m monailabel.main start_server --app PATH`.",
    )
    path.add_argument("name", help="train, retrain, auto, saliency, overlay, …; label_app")
    bundle = commands.add_parser(
        "bundle",
        help="carry out a deletion request in a training bundle of your own",
        description="Carry out a deletion request in a MONAI training bundle, of which nothing is changed. Further "
        "options such as --dataset_dir DIR or --train::trainer::amp false override the bundle's config.",
    )
    bundle.add_argument("root", type=Path, help="the bundle's folder, with configs/train.json or .yaml")
    bundle.add_argument("--config_file", help="its training config, if it is another")
    for name, text in HELP.items():
        bundle.add_argument(f"--{name}", help=text, required=name == "forget_request")
    finalise = commands.add_parser(
        "finalise",
        help="remove what a run left that holds forget data, or weights from before",
        description="Remove what the report of a run lists as left and ours: masks and keys, the original model where "
        "a run has trained it, scores of shadow models, searches for equal images, earlier runs' models. Nothing of "
        "yours is touched: your own checkpoints are named, and you decide on them. The report is written anew. There "
        "is no way back: --dry_run shows first what would go.",
    )
    finalise.add_argument("run", metavar="RUN", help="folder of the run, that is its --output_dir")
    finalise.add_argument("--dry_run", action="store_true", help="say what would be removed, and remove nothing")
    chosen, further = parser.parse_known_args(arguments)
    if further and chosen.command != "bundle":
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    try:
        if chosen.command == "path":
            from monai_unlearn.bundle import bundle_path  # only now: --help should not wait for PyTorch

            app = Path(__file__).resolve().parent / APP
            print(app if chosen.name == APP else bundle_path(chosen.name))
        elif chosen.command == "finalise":
            from monai_unlearn.finalise import finalise as remove
            from monai_unlearn.report import render_html, validate_report

            def page(report: dict[str, Any]) -> str:
                validate_report(report)
                return render_html(report)

            return 0 if remove(chosen.run, page, dry_run=chosen.dry_run) else 2
        else:
            _unlearn(chosen, _overrides(further))
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"monai_unlearn: {error}", file=sys.stderr)
        return 2
    return 0


def _unlearn(chosen: argparse.Namespace, overrides: dict[str, object]) -> None:
    root = chosen.root.resolve()
    config = _config_of(root) if chosen.config_file is None else Path(chosen.config_file)
    settings = ((name, getattr(chosen, name)) for name in HELP)
    overrides |= {f"unlearning::{name}": _value(value) for name, value in settings if value is not None}
    from monai.bundle import run

    from monai_unlearn.bundle import bundle_path, unwrapped

    sys.path.insert(0, str(root))  # where a bundle's configs import their `scripts` from
    metadata, logging = (config.with_name(name) for name in ("metadata.json", "logging.conf"))
    if not logging.is_file():
        logging = bundle_path("overlay").with_name("logging.conf")
    try:
        run(
            run_id="unlearn",
            config_file=[str(config), str(bundle_path("overlay"))],
            meta_file=str(metadata) if metadata.is_file() else None,
            logging_file=str(logging),
            bundle_root=str(root),
            **overrides,  # type: ignore[arg-type]
        )
    except RuntimeError as error:
        raised = unwrapped(error)
        raise raised from raised.__cause__


def _config_of(root: Path) -> Path:
    places = [root / "configs" / f"train.{ending}" for ending in ("json", "yaml", "yml")]
    for place in places:
        if place.is_file():
            return place
    there = sorted(path.name for path in (root / "configs").glob("*.*")) if root.is_dir() else []
    raise FileNotFoundError(
        f"There is no {' or '.join(str(place.relative_to(root)) for place in places)} in {root}. Name the training "
        f"config with --config_file FILE; there are: {', '.join(there) or 'none'}."
    )


def _overrides(arguments: Sequence[str]) -> dict[str, object]:
    """``--key value`` pairs for the bundle's own config."""
    names, values = list(arguments[::2]), list(arguments[1::2])
    wrong = next((name for name in names if not name.startswith("--")), None)
    if wrong is not None or len(names) != len(values):
        raise ValueError(f"Overrides of the bundle should be pairs of --key value, but {wrong or names[-1]!r} is none.")
    return {name[2:]: _value(value) for name, value in zip(names, values)}


def _value(text: str) -> object:
    """A number, list or dict where the text is one, as MONAI's own command reads it."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    sys.exit(main())
