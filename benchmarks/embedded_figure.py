"""Draw docs/images/embedded.png: what the embedded data set looks like.

python benchmarks/embedded_figure.py docs/images/embedded.png
"""

from __future__ import annotations

import sys

import numpy as np
from matplotlib.figure import Figure

from monai_unlearn.data import synthetic_cells


def main(path: str) -> None:
    """A row for each class; from left to right, images of growing difficulty."""
    data = synthetic_cells()
    train = data.train
    difficulty = train.attributes["difficulty"].to_numpy()
    levels = np.linspace(0, 1, 9)
    figure = Figure(figsize=(9, 8.2), layout="constrained")
    axes = figure.subplots(data.num_classes, len(levels))
    for label, row in enumerate(axes):
        members = np.flatnonzero(train.labels == label)
        for level, cell in zip(levels, row):
            chosen = members[np.abs(difficulty[members] - level).argmin()]
            cell.imshow(train.images[chosen], cmap="gray", vmin=0, vmax=255)
            cell.set_xticks([])
            cell.set_yticks([])
            if label == 0:
                cell.set_title(f"{difficulty[chosen]:.2f}", fontsize=9)
        share = 100 * len(members) / len(train)
        row[0].set_ylabel(f"{data.class_names[label]}\n{share:.0f} %", rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle("difficulty: how far the image was moved towards another class", fontsize=10)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main(sys.argv[1])
