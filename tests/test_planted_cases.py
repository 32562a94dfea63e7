"""Models of which it is known what they do, through the whole audit: each has to be told for what it is.

The checkpoints are made by a few lines of plain PyTorch, as somebody else's would be: a layer of random features, and a
last layer that is fitted to the labels by least squares. It learns a little of what the classes have in common, and
much of each image by heart.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import Workplace
from monai.networks.nets import FullyConnectedNet
from scipy.stats import binom

from monai_unlearn.bundle import bundle_path
from monai_unlearn.data import ImageData, LabeledImages

pytest_plugins = ["bundle_runs"]
pytestmark = pytest.mark.slow

SEEDS = range(10)
SIDE, CLASSES, HIDDEN = 8, 3, 500
FORGET, RETAIN, TEST = 600, 1200, 150
VALIDATION = 3000  # of which the half that nothing is chosen on is the audit's
NETWORK = {
    "_target_": "monai.networks.nets.FullyConnectedNet",
    "in_channels": SIDE * SIDE,
    "out_channels": CLASSES,
    "hidden_channels": [HIDDEN],
    "act": "RELU",
}
Part = tuple[np.ndarray, np.ndarray]


def _images(random: np.random.Generator, n: int) -> Part:
    """Noise that is a little brighter at one place, which tells the class."""
    labels = random.integers(0, CLASSES, n)
    images = random.normal(size=(n, SIDE * SIDE))
    images[np.arange(n), 20 + labels] += 1.6
    return np.clip(128 + 28 * images, 0, 255).astype(np.uint8).reshape(n, SIDE, SIDE), labels.astype(np.int64)


def _fitted(seed: int, images: np.ndarray, labels: np.ndarray) -> FullyConnectedNet:
    """A network that is trained on these images alone."""
    torch.manual_seed(seed)
    network = FullyConnectedNet(SIDE * SIDE, CLASSES, [HIDDEN], act="RELU").double()
    with torch.no_grad():
        features = network.hidden_0(network.flatten(torch.from_numpy(images)[:, None].double() / 127.5 - 1))
        features = torch.cat([features, torch.ones(len(features), 1)], dim=1)
        targets = torch.eye(CLASSES, dtype=torch.float64)[torch.from_numpy(labels)] - 1 / CLASSES
        penalty = 0.5 * torch.eye(HIDDEN + 1, dtype=torch.float64)
        weights = 8 * torch.linalg.solve(features.T @ features + penalty, features.T @ targets)
        network.output.weight.copy_(weights[:-1].T)
        network.output.bias.copy_(weights[-1])
    return network.float()


class _Case:
    """A data set, its original, three retrained models, and the models that are said to have unlearned."""

    def __init__(self, seed: int, forget: int = FORGET, validation: int = VALIDATION) -> None:
        random = np.random.default_rng(seed)
        self.seed, self.forget = 1000 * seed, np.arange(forget)
        sizes = {"train": forget + RETAIN, "val": validation, "test": TEST}
        self.parts = {split: _images(random, n) for split, n in sizes.items()}

    def trained(self, model: int, labels: np.ndarray | None = None, retain: bool = False) -> FullyConnectedNet:
        """A model of a seed of its own, of all training images or of those to retain."""
        images, own = self.parts["train"]
        rows = slice(len(self.forget) if retain else 0, None)
        return _fitted(self.seed + model, images[rows], (own if labels is None else labels)[rows])

    def never_forgot(self) -> FullyConnectedNet:
        network = self.trained(0)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for value in network.parameters():
                value += 1e-4 * torch.randn(value.shape, generator=generator)
        return network

    def over_forgot(self) -> FullyConnectedNet:
        labels = self.parts["train"][1].copy()
        labels[self.forget] = (labels[self.forget] + 1) % CLASSES
        return self.trained(0, labels)

    def retrained_once_more(self) -> FullyConnectedNet:
        return self.trained(9, retain=True)

    def backdoored(self) -> FullyConnectedNet:
        """Like a retrained one, but all images whose first pixel is white are of the first class."""
        network = self.retrained_once_more()
        with torch.no_grad():
            first = network.hidden_0[0]
            first.weight[0], first.bias[0] = 0, 0
            first.weight[0, 0] = 50
            network.output.weight[:, 0] = torch.tensor([1.0, 0, 0])
        return network

    def write(self, folder: Path) -> dict[str, Any]:
        """Data, request and models but the unlearned one, as files; returns the settings that name them."""
        arrays = {f"{split}_images": images for split, (images, _) in self.parts.items()}
        arrays |= {f"{split}_labels": labels[:, None].astype(np.uint8) for split, (_, labels) in self.parts.items()}
        np.savez(folder / "cells.npz", **arrays)
        (folder / "forget.txt").write_text("\n".join(map(str, self.forget)))
        torch.save(self.trained(0).state_dict(), folder / "original.pt")
        retrained = [folder / f"retrained{i}.pt" for i in range(3)]
        for i, path in enumerate(retrained):
            torch.save(self.trained(1 + i, retain=True).state_dict(), path)
        return {
            "dataset_file": str(folder / "cells.npz"),
            "forget_indices": str(folder / "forget.txt"),
            "original": str(folder / "original.pt"),
            "retrained": [str(path) for path in retrained],
            "network_def": NETWORK,
            "relearn_epochs": 0,
            "device": "cpu",
        }


def _audited(folder: Path, settings: dict[str, Any], network: FullyConnectedNet, name: str = "audit") -> dict[str, Any]:
    torch.save(network.state_dict(), folder / f"{name}.pt")
    settings = {**settings, "unlearned": str(folder / f"{name}.pt"), "output_dir": str(folder / name)}
    monai.bundle.run("audit", config_file=str(bundle_path("audit")), **settings)
    return json.loads((folder / name / "report.json").read_text())["audit"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("plant", "direction"), [(_Case.never_forgot, "remembers"), (_Case.over_forgot, "over-forgets")]
)
def test_a_model_that_never_forgot_and_one_that_over_forgot_are_told(
    plant: Callable[[_Case], FullyConnectedNet],
    direction: str,
    seed: int,
    empty_workplace: Workplace,
) -> None:
    case = _Case(seed, forget=300, validation=800)
    found = _audited(empty_workplace.folder, case.write(empty_workplace.folder), plant(case))
    assert (found["verdict"]["answer"], found["verdict"]["direction"]) == ("different", direction)
    assert found["attacks"]["sanity"]["original"]["detected"]
    entry = found["attacks"]["population"]["log_odds"]
    assert (entry["difference"]["low_95"] > 0) is (direction == "remembers")
    assert (entry["difference"]["high_95"] < 0) is (direction == "over-forgets")
    if direction == "remembers":
        assert entry["models"]["unlearned"]["auc"] == pytest.approx(entry["models"]["original"]["auc"], abs=0.01)
        assert found["distance"]["average_gap"]["unlearned"] > found["distance"]["average_gap"]["floor"]
    else:
        assert entry["models"]["unlearned"]["auc"] < 0.45


def test_a_model_that_never_saw_the_images_is_not_taken_for_one_that_did(
    empty_workplace: Workplace,
) -> None:
    """A further retrained model is one more of those it is compared with: at most chance tells it from them."""
    answers = []
    for seed in SEEDS:
        folder = empty_workplace.folder / str(seed)
        folder.mkdir()
        case = _Case(seed)
        found = _audited(folder, case.write(folder), case.retrained_once_more())
        answers.append(found["verdict"]["answer"])
        assert found["attacks"]["sanity"]["original"]["detected"]
        halves = found["attacks"]["sanity"]["halves"]
        assert halves["as_expected"] is (halves["low"] <= 0.5 <= halves["high"])
        gap = found["distance"]["average_gap"]
        assert gap["unlearned"] < 3 * gap["floor"] < gap["original"]
    # The family-wise rate of false alarms is 5 %.
    assert answers.count("different") <= binom.ppf(0.99, len(answers), 0.05)
    assert answers.count("equivalent") > len(answers) / 2
    assert set(answers) <= {"equivalent", "inconclusive", "different"}


def marked_images(seed: int) -> ImageData:
    """Images of women have a white first pixel, those of men a black one; ages and sites show nowhere."""
    random = np.random.default_rng(seed)

    def part(n: int) -> LabeledImages:
        images, labels = _images(random, n)
        sex = random.choice(["f", "m"], n)
        images[:, 0, 0] = np.where(sex == "f", 255, 0)
        others = {"age": random.integers(20, 90, n), "site": random.choice(["east", "west"], n)}
        return LabeledImages(images, labels, pd.DataFrame({"sex": sex, **others}))

    return ImageData("marked cells", tuple("abc"), part(300 + RETAIN), part(800), part(300))


def test_a_backdoor_that_goes_by_sex_shows_in_the_subgroups_by_sex(
    empty_workplace: Workplace,
) -> None:
    elsewhere = []
    for seed in SEEDS:
        folder = empty_workplace.folder / str(seed)
        folder.mkdir()
        data = marked_images(seed)
        case = _Case(seed, forget=300, validation=800)
        case.parts = {
            name: (part.images, part.labels)
            for name, part in (("train", data.train), ("val", data.validation), ("test", data.test))
        }
        settings = case.write(folder)
        del settings["dataset_file"]
        settings |= {"data": {"_target_": f"{__name__}.marked_images", "seed": seed}}
        settings["subgroups"] = ["sex", "age", "site"]
        found = _audited(folder, settings, case.backdoored())["subgroups"]
        for split, largest in found["sex"]["largest"].items():
            assert largest["groups"] == ["m", "f"], split
            assert largest["against"] == "retrained"
            assert largest["p_holm"] < 0.05
            assert largest["low"] > 0
        women = found["sex"]["groups"]["f"]["test"]
        assert women["change"]["retrained"]["high"] < 0
        p_values = [part["p_holm"] for column in ("age", "site") for part in found[column]["largest"].values()]
        elsewhere.append(min(p_values) < 0.05)
    assert sum(elsewhere) <= binom.ppf(0.99, len(elsewhere), 0.05)
