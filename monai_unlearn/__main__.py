"""``python -m monai_unlearn``: what does not run a network; everything that does is a bundle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m monai_unlearn", description=__doc__.split(":", 1)[1].strip())
    commands = parser.add_subparsers(dest="command", required=True)
    path = commands.add_parser(
        "path",
        help="print where a bundle config lies",
        description="Print the path of a bundle config, for `python -m monai.bundle run unlearn --config_file PATH`.",
    )
    path.add_argument("name", help="train, retrain, random_labeling, saliency, …")
    chosen = parser.parse_args(arguments)

    from monai_unlearn.bundle import bundle_path  # only now: --help should not wait for PyTorch

    try:
        print(bundle_path(chosen.name))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
