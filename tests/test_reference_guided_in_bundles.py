"""ReGUn in a bundle: its references are of the selection half alone, and what it costs is on the clock."""

from __future__ import annotations

import json

import torch
from bundle_runs import Workplace, checked_bundle

pytest_plugins = ["bundle_runs"]


def test_the_unseen_images_are_those_of_the_selection_half_as_they_are_evaluated(workplace: Workplace) -> None:
    bundle = checked_bundle("reference_guided", dataset_file=str(workplace.data), device="cpu", batch_size=16)
    data = bundle.build("data")
    bundle.share(data=data)
    split = bundle.build("split")
    bundle.share(split=split)
    method = bundle.build("methods")[0]
    batches = list(method.held_out_loader)
    rows = torch.cat([batch["index"] for batch in batches])
    assert rows.tolist() == split.selection.tolist()
    assert not set(rows.tolist()) & set(split.validation)
    assert torch.equal(torch.cat([b["label"] for b in batches]), torch.as_tensor(data.validation.labels[rows]).long())
    pixels = torch.from_numpy(data.validation.images[rows.numpy()])[:, None] / 127.5 - 1
    torch.testing.assert_close(torch.cat([batch["image"] for batch in batches]), pixels.float())
    assert method.multi_label is False


def test_the_references_and_the_forget_batches_are_counted_as_unlearning(workplace: Workplace) -> None:
    output = workplace.unlearn("reference_guided", reference=False, epochs=2)
    cost = json.loads((output / "report.json").read_text())["cost"]
    split = checked_bundle("reference_guided", dataset_file=str(workplace.data)).build("split")
    forgotten, retained = len(split.forget), len(split.retain)
    assert forgotten < 16  # one batch
    steps = 2 * -(-retained // 16)
    trained = 2 * retained + steps * forgotten
    assert cost["unlearn"]["backward"] == trained
    assert cost["unlearn"]["samples"] == trained + len(split.selection) + retained  # BatchNorm's statistics at last
    assert cost["tuning"]["samples"] == 0
