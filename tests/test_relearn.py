"""Relearn time: steps counted by hand, what is trained on, and what has no answer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundle_runs import with_patients
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.utils import set_determinism
from torch import nn
from torch.utils.data import Subset

import monai_unlearn.relearn
from monai_unlearn.bundle import Bundle, bundle_path
from monai_unlearn.checkpoint import Checkpoint
from monai_unlearn.cost import Cost
from monai_unlearn.data import BatchedImages, ImageData, Split, make_loader, make_split
from monai_unlearn.loss import MaskedBCEWithLogitsLoss
from monai_unlearn.relearn import forget_loss, relearn_steps
from monai_unlearn.training import run_trainer

SMALL = {
    "batch_size": 8,
    "train_epochs": 4,
    "device": "cpu",
    "lr": 0.05,
    "network_def": "$torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, 2), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), "
    "torch.nn.AdaptiveAvgPool2d((3, 1)), torch.nn.Flatten(), torch.nn.Linear(12, @data.num_classes))",
}


class Audit:
    """A bundle, its data, who is forgotten, and a model at its start and when trained."""

    def __init__(self, data: ImageData, split: Split, files: tuple[str, ...] = ("saliency",), **changes: Any) -> None:
        configs = [str(bundle_path(name)) for name in files]
        parser = ConfigParser(ConfigParser.load_config_files(configs))
        parser.update({**SMALL, **changes})
        self.bundle = Bundle(parser, ConfigParser.load_config_files(configs), changes)
        self.bundle.share(data=data, device=torch.device("cpu"), split=split)
        self.data, self.split = data, split
        set_determinism(0)
        trainer = self.bundle.build("recipe::trainer")
        self.fresh = Checkpoint({name: value.clone() for name, value in trainer.network.state_dict().items()})
        trainer.run()
        self.trained = Checkpoint(trainer.network.state_dict())

    def __call__(
        self, checkpoint: Checkpoint, target_loss: float, max_epochs: int = 20, **changes: Any
    ) -> tuple[int | None, Cost]:
        return relearn_steps(self.bundle, checkpoint, self.data, self.split, target_loss, max_epochs, **changes)

    def loss(self, checkpoint: Checkpoint, seed: int = 0) -> float:
        return forget_loss(self.bundle, checkpoint, self.data, self.split, seed)


@pytest.fixture(scope="module")
def audit() -> Audit:
    data = with_patients()
    return Audit(data, make_split(data, 0, 0.3))


def _steps_by_hand(
    audit: Audit,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    target: float,
    most: int,
    rate: float = 0.05,
    seed: int = 0,
    rows: np.ndarray | None = None,
) -> int | None:
    """Plain PyTorch: SGD on the forget images until their loss is at most the target."""
    forget = audit.split.forget
    network = audit.bundle.build("network")
    network.load_state_dict(audit.fresh.state_dict)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, weight_decay=0.0005)
    flip = audit.bundle.build("augmentation")
    images = BatchedImages(audit.data.train, flip, seed=seed)
    loader = make_loader(Subset(images, forget.tolist()), 8, shuffle=True, seed=seed)
    plain = BatchedImages(audit.data.train)
    whole = plain.__getitems__((forget if rows is None else rows).tolist())

    def reached() -> bool:
        network.eval()
        with torch.no_grad():
            loss = loss_of(network(whole["image"]), whole["label"])
        network.train()
        return float(loss) <= target

    steps = 0
    if reached():
        return steps
    while True:
        for batch in loader:
            optimizer.zero_grad()
            loss_of(network(batch["image"]), batch["label"]).backward()
            optimizer.step()
            steps += 1
            if reached():
                return steps
            if steps == most:
                return None


@pytest.mark.parametrize("target", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("seed", [0, 3])
def test_steps_are_those_of_a_plain_loop(audit: Audit, target: float, seed: int) -> None:
    steps, cost = audit(audit.fresh, target, seed=seed)
    assert steps == _steps_by_hand(audit, nn.CrossEntropyLoss(), target, 1000, seed=seed)
    assert steps is not None
    assert steps > 0
    n = len(audit.split.forget)
    assert cost.backward == cost.samples
    assert (steps - 1) * 4 <= cost.backward <= steps * 8
    assert cost.forward == cost.backward + (steps + 1) * n
    assert cost.seconds > 0


def test_the_retrain_bundle_relearns_by_the_recipes_optimizer_without_its_schedule() -> None:
    data = with_patients()
    audit = Audit(data, make_split(data, 0, 0.3), ("retrain",), **{"recipe::optimizer::nesterov": False})
    steps, _ = audit(audit.fresh, 0.4)
    assert steps == _steps_by_hand(audit, nn.CrossEntropyLoss(), 0.4, 1000)


def test_several_findings() -> None:
    data = with_patients()
    random = np.random.RandomState(0)
    parts = {}
    for name, part in data.parts().items():
        labels = np.column_stack([part.labels == 0, part.labels == 1]).astype(np.float32)
        labels[random.rand(*labels.shape) < 0.1] = np.nan
        parts[name] = replace(part, labels=labels)
    data = replace(data, class_names=("a", "b"), **parts)  # type: ignore[arg-type]
    audit = Audit(data, make_split(data, 0, 0.3), ("random_labeling", "multi_label"))
    steps, _ = audit(audit.fresh, 0.3)
    assert steps == _steps_by_hand(audit, MaskedBCEWithLogitsLoss(), 0.3, 1000)
    assert steps


def test_the_loss_is_the_mean_over_the_forget_set(audit: Audit) -> None:
    network = audit.bundle.build("network")
    network.load_state_dict(audit.trained.state_dict)
    batch = BatchedImages(audit.data.train).__getitems__(audit.split.forget.tolist())
    with torch.no_grad():
        expected = nn.functional.cross_entropy(network.eval()(batch["image"]), batch["label"])
    assert math.isclose(audit.loss(audit.trained), float(expected), rel_tol=1e-5)
    assert audit.loss(audit.trained) < audit.loss(audit.fresh)


def test_the_original_needs_no_step_and_a_fresh_network_some(audit: Audit) -> None:
    target = audit.loss(audit.trained)
    steps, cost = audit(audit.trained, target)
    assert steps == 0
    assert (cost.samples, cost.backward, cost.forward) == (0, 0, len(audit.split.forget))
    steps, _ = audit(audit.fresh, target, max_epochs=100)
    assert steps is not None
    assert steps > 5


def test_what_was_only_disturbed_comes_back_sooner_than_what_was_never_known(audit: Audit) -> None:
    torch.manual_seed(1)
    disturbed = {
        name: value + 0.1 * torch.randn_like(value) if name.endswith("weight") else value
        for name, value in audit.trained.state_dict.items()
    }
    target = audit.loss(audit.trained)
    soon, _ = audit(Checkpoint(disturbed), target, max_epochs=100)
    late, _ = audit(audit.fresh, target, max_epochs=100)
    assert soon is not None
    assert late is not None
    assert soon < late


def test_no_more_epochs_than_allowed(audit: Audit, caplog: pytest.LogCaptureFixture) -> None:
    full, _ = audit(audit.fresh, 0.2)
    batches = -(-len(audit.split.forget) // 8)
    assert full is not None
    enough = -(-full // batches)
    assert audit(audit.fresh, 0.2, max_epochs=enough)[0] == full
    with caplog.at_level(logging.INFO, "monai_unlearn"):
        steps, cost = audit(audit.fresh, 0.2, max_epochs=enough - 1)
    assert steps is None
    assert cost.samples == (enough - 1) * len(audit.split.forget)
    assert f"did not get to 0.2 within {enough - 1} epochs" in caplog.text


def test_only_forget_images_are_trained_on_and_no_method_acts(
    audit: Audit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: set[int] = set()

    def recorded(trainer: Any, what: str) -> Cost:
        trainer.add_event_handler(
            Events.ITERATION_STARTED, lambda engine: seen.update(engine.state.batch["index"].tolist())
        )
        return run_trainer(trainer, what)

    monkeypatch.setattr(monai_unlearn.relearn, "run_trainer", recorded)
    before = {name: value.clone() for name, value in audit.trained.state_dict.items()}
    assert audit(audit.trained, -1.0, max_epochs=2)[0] is None
    assert seen == set(audit.split.forget.tolist())
    assert all(torch.equal(value, before[name]) for name, value in audit.trained.state_dict.items())
    assert not list(tmp_path.iterdir())


def test_the_shared_data_set_of_a_run_is_used(audit: Audit) -> None:
    """As with files, perhaps in a cache: made once for all runs."""
    fresh, _ = audit(audit.fresh, 0.4)
    other = Audit(audit.data, audit.split)
    made = other.bundle.build("train_dataset")
    other.bundle.share(train_dataset=made)
    assert other(audit.fresh, 0.4)[0] == fresh
    assert len(made) == len(audit.data.train)


def test_of_a_large_forget_set_a_fixed_draw_tells_the_loss(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monai_unlearn.relearn, "MOST_IMAGES", 9)
    forget = audit.split.forget
    rows = {}
    for seed in (0, 1):
        order = torch.randperm(len(forget), generator=torch.Generator().manual_seed(seed))
        rows[seed] = np.sort(forget[order[:9].numpy()])
        steps, cost = audit(audit.fresh, 0.3, seed=seed)
        assert steps == _steps_by_hand(audit, nn.CrossEntropyLoss(), 0.3, 1000, seed=seed, rows=rows[seed])
        assert steps is not None
        assert cost.forward == cost.backward + 9 * (steps + 1)
        assert audit(audit.trained, audit.loss(audit.trained, seed), seed=seed)[0] == 0
    assert set(rows[0]) != set(rows[1])
    assert audit.loss(audit.trained, 0) == audit.loss(audit.trained, 0) != audit.loss(audit.trained, 1)


def test_one_image_gives_no_answer_but_a_sentence(caplog: pytest.LogCaptureFixture) -> None:
    data = with_patients()
    everything = make_split(data, 0, 0.3)
    rows = np.arange(len(data.train))
    audit = Audit(data, replace(everything, forget=rows[7:8], retain=np.delete(rows, 7)))
    with caplog.at_level(logging.INFO, "monai_unlearn"):
        steps, cost = audit(audit.fresh, -1.0)
    assert steps is None
    assert (cost.samples, cost.forward) == (0, 1)
    assert caplog.messages == ["Relearn time is not known: a forget set of 1 gives no batch to train on."]
    assert audit(audit.fresh, audit.loss(audit.fresh))[0] == 0


def test_a_loader_without_a_batch_gives_no_answer(audit: Audit) -> None:
    loader = {
        "_target_": "torch.utils.data.DataLoader",
        "dataset": "@train_dataset",
        "batch_size": 50,
        "drop_last": True,
        "collate_fn": "$lambda batch: batch",
    }
    few = Audit(audit.data, audit.split, train_loader=loader, train_epochs=1)
    assert few(few.fresh, -1.0)[0] is None


def test_a_loss_that_diverges_gives_no_answer_but_a_sentence(caplog: pytest.LogCaptureFixture) -> None:
    data = with_patients()
    audit = Audit(data, make_split(data, 0, 0.3), lr=1e25)
    with caplog.at_level(logging.INFO, "monai_unlearn"):
        steps, _ = audit(audit.fresh, 1e-3)
    assert steps is None
    assert "Relearn time is not known: the loss diverged." in caplog.text


@pytest.mark.parametrize(("target", "epochs"), [(math.nan, 5), (math.inf, 5), (0.5, 0), (0.5, 2.0), (0.5, True)])
def test_bad_arguments(audit: Audit, target: float, epochs: Any) -> None:
    with pytest.raises(ValueError, match=r"(target_loss|max_epochs) should be"):
        audit(audit.fresh, target, epochs)


def test_a_checkpoint_of_another_network_is_refused(audit: Audit) -> None:
    with pytest.raises(ValueError, match="of another network"):
        audit(Checkpoint({"weight": torch.zeros(1)}), 0.5)
