"""What it costs to record a SampleHistory: trainings of the saliency bundle's recipe with and without, in turn.

python benchmarks/sample_history.py --pairs 10
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from monai.bundle import ConfigParser

from monai_unlearn.bundle import bundle_path
from monai_unlearn.data import synthetic_cells
from monai_unlearn.handlers import SampleHistory


def seconds(recorded: bool, epochs: int) -> float:
    """Seconds of processor time of a training on the embedded data: other programs on the machine do not count."""
    parser = ConfigParser(ConfigParser.load_config_file(bundle_path("saliency")))
    parser.update({"train_epochs": epochs, "data": synthetic_cells(), "device": torch.device("cpu")})
    trainer = parser.get_parsed_content("recipe::trainer")
    if recorded:
        SampleHistory().attach(trainer)
    start = time.process_time()
    trainer.run()
    return time.process_time() - start


def main() -> None:
    """Print the ratio of each pair's times: median, smallest and largest."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--pairs", type=int, default=10)
    options.add_argument("--epochs", type=int, default=2)
    given = options.parse_args()
    seconds(True, 1)  # warm up
    ratios = []
    for pair in range(given.pairs):  # the order alternates: whatever else the machine does hits both
        times = {recorded: seconds(recorded, given.epochs) for recorded in ((True, False), (False, True))[pair % 2]}
        ratios.append(times[True] / times[False])
        print(f"{times[False] / given.epochs:.2f} s an epoch without, {times[True] / given.epochs:.2f} s with")
    print(f"ratio {np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
