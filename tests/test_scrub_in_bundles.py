"""SCRUB's rewind in a bundle: on the selection half alone, on the clock, and refused where nothing is comparable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bundle_runs import Workplace, checked_bundle, messages

from monai_unlearn.data import ImageData, LabeledImages, matched_rows

pytest_plugins = ["bundle_runs"]


def cost_of(output: Path) -> dict:
    return json.loads((output / "report.json").read_text())["cost"]


def test_the_rewind_is_counted_as_tuning_and_the_teacher_as_unlearning(workplace: Workplace) -> None:
    cost = cost_of(workplace.unlearn("scrub", reference=False, epochs=3, forget_epochs=2))
    bundle = checked_bundle("scrub", dataset_file=str(workplace.data))
    split = bundle.build("split")
    forgotten, retained = len(split.forget), len(split.retain)
    steps = 3 * retained + 2 * forgotten
    statistics = retained  # BatchNorm's, in the end
    assert cost["unlearn"]["samples"] == 2 * steps + statistics
    assert cost["unlearn"]["backward"] == steps
    assert cost["tuning"]["samples"] == cost["tuning"]["forward"] == 3 * forgotten + len(split.selection)
    assert cost["tuning"]["backward"] == 0
    assert cost["tuning"]["seconds"] > 0


def test_without_the_rewind_nothing_is_tuned(workplace: Workplace) -> None:
    assert cost_of(workplace.unlearn("scrub", reference=False, rewind="false"))["tuning"]["samples"] == 0


def test_the_unseen_images_are_matched_ones_of_the_selection_half(workplace: Workplace) -> None:
    bundle = checked_bundle("scrub", dataset_file=str(workplace.data), device="cpu", batch_size=16)
    data = bundle.build("data")
    bundle.share(data=data)
    split = bundle.build("split")
    bundle.share(split=split)
    (scrub, _) = bundle.build("methods")
    batches = list(scrub.rewind_loader)
    rows = torch.cat([batch["index"] for batch in batches])
    assert rows.tolist() == matched_rows(data, split).tolist()
    assert set(rows.tolist()) <= set(split.selection)
    assert torch.equal(torch.cat([b["label"] for b in batches]), torch.as_tensor(data.validation.labels[rows]).long())
    pixels = torch.from_numpy(data.validation.images[rows.numpy()])[:, None] / 127.5 - 1
    torch.testing.assert_close(torch.cat([batch["image"] for batch in batches]), pixels.float())


def test_findings_are_told_from_classes(workplace: Workplace) -> None:
    bundle = checked_bundle("scrub", dataset_file=str(workplace.data), device="cpu", rewind=False)
    data = bundle.build("data")
    bundle.share(split=bundle.build("split"))
    assert bundle.build("methods")[0].multi_label is False

    def as_findings(part: LabeledImages) -> LabeledImages:
        return LabeledImages(part.images, torch.eye(3)[part.labels].numpy(), part.attributes)

    parts = [as_findings(part) for part in (data.train, data.validation, data.test)]
    bundle.share(data=ImageData("findings", data.class_names, *parts))
    assert bundle.build("methods")[0].multi_label is True


def test_a_request_by_difficulty_is_refused_before_anything_is_trained(workplace: Workplace) -> None:
    request = workplace.folder / "hard.json"
    request.write_text(json.dumps({"include": [{"hardest": 20}]}))
    options = {"forget_request": str(request), "reference": False}
    with pytest.raises(RuntimeError) as caught:
        workplace.unlearn("scrub", **options)
    assert "goes by difficulty, which the validation images do not have" in messages(caught.value)
    assert not (workplace.folder / "runs" / "scrub").exists()
    workplace.unlearn("scrub", rewind=False, **options)
