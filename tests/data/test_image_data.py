"""Images in memory and loaders over them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from monai_unlearn.data import BatchedImages, ImageData, LabeledImages, RandomFlip, RandomShift, make_loader

KINDS = {
    "grey bytes": ((), np.uint8),
    "colour bytes": ((3,), np.uint8),
    "one channel": ((1,), np.uint8),
    "grey float32": ((), np.float32),
    "colour float64": ((3,), np.float64),
}


def _images(n: int = 23, kind: str = "grey bytes") -> LabeledImages:
    channels, dtype = KINDS[kind]
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (n, 6, 5, *channels))
    images = images.astype(np.uint8) if dtype == np.uint8 else (images / 255).astype(dtype)
    return LabeledImages(images, np.arange(n, dtype=np.int64) % 4)


def _oracle(source: LabeledImages, row: int) -> np.ndarray:
    """One image, channel first, in [-1, 1], in float64."""
    image = source.images[row].astype(np.float64)
    image = image / 127.5 - 1 if source.images.dtype == np.uint8 else 2 * image - 1
    return image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_hold_what_one_image_at_a_time_would_give(kind: str) -> None:
    source = _images(kind=kind)
    dataset = BatchedImages(source)
    rows = [4, 0, 22, 4]
    batch = dataset.__getitems__(rows)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    np.testing.assert_allclose(batch["image"], np.stack([_oracle(source, row) for row in rows]), atol=1e-6)
    assert batch["label"].tolist() == source.labels[rows].tolist()
    assert batch["index"].tolist() == rows
    for place, row in enumerate(rows):
        one = dataset[row]
        assert torch.equal(one["image"], batch["image"][place])
        assert (int(one["label"]), int(one["index"])) == (source.labels[row], row)


def test_black_and_white_are_minus_one_and_one() -> None:
    source = LabeledImages(np.array([[[0, 255]]], np.uint8), np.array([0]))
    assert BatchedImages(source)[0]["image"].tolist() == [[[-1.0, 1.0]]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_source_is_never_changed(kind: str) -> None:
    source = _images(kind=kind)
    before = source.images.copy()
    dataset = BatchedImages(source, [RandomFlip(), RandomShift()])
    for batch in make_loader(dataset, 7, shuffle=True):
        batch["image"].zero_()
        batch["label"].zero_()
        batch["index"].zero_()
    np.testing.assert_array_equal(source.images, before)
    np.testing.assert_array_equal(source.labels, np.arange(23) % 4)
    assert dataset[22]["index"] == 22


def test_augmentations_are_applied_in_order_with_the_data_sets_own_generator() -> None:
    source, steps = _images(), [RandomFlip(), RandomShift(2)]
    generator = torch.Generator().manual_seed(11)
    rows = list(range(23))
    plain = BatchedImages(source).__getitems__(rows)["image"]
    expected = steps[1](steps[0](plain, generator), generator)
    state = torch.get_rng_state()
    assert torch.equal(BatchedImages(source, steps, seed=11).__getitems__(rows)["image"], expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_decides_the_augmentation_and_each_epoch_has_another() -> None:
    def epochs(seed: int) -> list[torch.Tensor]:
        loader = make_loader(BatchedImages(_images(), [RandomShift(2)], seed=seed), 8)
        return [torch.cat([batch["image"] for batch in loader]) for _ in range(2)]

    one, two, other = epochs(3), epochs(3), epochs(4)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], other[0])


def test_without_random_shares_the_images_and_leaves_the_original_as_it_is() -> None:
    source = _images()
    dataset, untouched = (BatchedImages(source, [RandomShift(2)], seed=5) for _ in range(2))
    plain = dataset.without_random()
    assert plain._images.data_ptr() == dataset._images.data_ptr()
    np.testing.assert_allclose(plain[3]["image"], _oracle(source, 3), atol=1e-6)
    assert plain.data == dataset.data == [{"index": row} for row in range(23)]
    assert len(dataset.augmentation) == 1
    # Reading the plain one draws no random number of the original.
    rows = list(range(23))
    assert torch.equal(dataset.__getitems__(rows)["image"], untouched.__getitems__(rows)["image"])
    assert not torch.equal(dataset.__getitems__(rows)["image"], plain.__getitems__(rows)["image"])


@pytest.mark.parametrize(("n", "batch_size"), [(23, 8), (17, 8), (16, 8), (9, 4), (2, 8), (1, 8), (5, 1)])
def test_shuffled_training_never_sees_a_batch_of_one_image_but_leaves_out_no_other(n: int, batch_size: int) -> None:
    loader = make_loader(BatchedImages(_images(n)), batch_size, shuffle=True)
    left_out: Counter = Counter()
    for _ in range(12):
        batches = [batch["index"].tolist() for batch in loader]
        seen = [index for batch in batches for index in batch]
        assert len(set(seen)) == len(seen)
        if n > 1 and batch_size > 1:
            assert min(map(len, batches)) > 1
        assert n - len(seen) == (1 if n > 1 and n % batch_size == 1 else 0)
        left_out.update(set(range(n)) - set(seen))
    assert len(left_out) != 1  # not the same image every time
    assert len(loader) == len(batches)


@pytest.mark.parametrize("n", [17, 1])
def test_in_order_every_image_comes_once(n: int) -> None:
    indices = torch.cat([batch["index"] for batch in make_loader(BatchedImages(_images(n)), 8)])
    assert indices.tolist() == list(range(n))


def test_the_seed_decides_the_order_and_each_epoch_has_another() -> None:
    def order(loader: DataLoader) -> list[int]:
        return torch.cat([batch["index"] for batch in loader]).tolist()

    dataset = BatchedImages(_images())
    one, two, other = (make_loader(dataset, 6, shuffle=True, seed=seed) for seed in (1, 1, 2))
    first = order(one)
    torch.manual_seed(99)
    assert order(two) == first
    assert order(other) != first
    assert order(one) != first


def test_a_subset_loads_the_rows_it_names() -> None:
    source, rows = _images(), [20, 3, 3, 7, 11]
    batches = list(make_loader(Subset(BatchedImages(source), rows), 2))
    assert torch.cat([batch["index"] for batch in batches]).tolist() == rows
    expected = np.stack([_oracle(source, row) for row in rows])
    np.testing.assert_allclose(torch.cat([batch["image"] for batch in batches]), expected, atol=1e-6)


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, None, "4"])
def test_a_batch_of_no_size_is_refused(batch_size: object) -> None:
    with pytest.raises(ValueError, match="batch_size should be an integer of at least 1"):
        make_loader(BatchedImages(_images()), batch_size)  # type: ignore[arg-type]


def test_a_loader_over_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="should hold at least one image, but got none"):
        make_loader(Subset(BatchedImages(_images()), []), 4)


GREY = np.zeros((3, 4, 4), np.uint8)
LABELS = np.array([0, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GREY[:0], LABELS[:0]), "at least one image, but got none"),
        ((GREY[0], LABELS), r"N × H × W .* N = 3"),
        ((GREY[:2], LABELS), r"N = 3 \(the number of labels\), but got shape \(2, 4, 4\)"),
        ((GREY.astype(np.int16), LABELS), "should be uint8 or floating point, but got int16"),
        ((GREY.astype(bool), LABELS), "should be uint8 or floating point, but got bool"),
        ((GREY + np.float32(1.5), LABELS), r"should lie in \[0, 1\]"),
        ((GREY - np.float32(0.5), LABELS), r"should lie in \[0, 1\]"),
        ((np.where(np.eye(4), np.nan, GREY), LABELS), "3 of 3 hold NaN or infinity"),
        ((np.where(np.arange(3)[:, None, None] == 1, np.inf, GREY), LABELS), "1 of 3 hold NaN or infinity"),
        ((GREY, LABELS.astype(float)), "labels should be N integers, but got float64"),
        ((GREY, LABELS[:, None]), r"of shape \(3, 1\)"),
        ((GREY, LABELS, pd.DataFrame({"patient": ["a"]})), "attributes should have 3 rows, but got 1"),
    ],
)
def test_images_that_do_not_fit_together_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabeledImages(*arguments)


def _data(**changes: Any) -> ImageData:
    parts = {
        name: LabeledImages(GREY, LABELS, pd.DataFrame({"patient": list("aab")})) for name in ("train", "validation")
    }
    return ImageData(
        **{"name": "small", "class_names": ("x", "y"), **parts, "test": LabeledImages(GREY, LABELS), **changes}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ("x",)}, r"labels of train should lie in \[0, 0\] for 1 classes, but got \[0, 1\]"),
        ({"test": LabeledImages(GREY, np.array([0, -1, 0]))}, r"labels of test .* got \[-1, 0\]"),
        ({"validation": LabeledImages(np.zeros((3, 4, 5), np.uint8), LABELS)}, r"those of validation have \(4, 5\)"),
        ({"test": LabeledImages(np.zeros((3, 4, 4, 3), np.uint8), LABELS)}, r"those of test have \(4, 4, 3\)"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _data(**changes)


def test_the_digest_is_of_every_image_label_and_patient() -> None:
    digest = _data().digest()
    assert _data(name="other", class_names=("u", "v")).digest() == digest
    pixel = GREY.copy()
    pixel[2, 3, 3] = 1
    patients = pd.DataFrame({"patient": list("abb")})
    changed = [
        _data(test=LabeledImages(pixel, LABELS)),
        _data(test=LabeledImages(GREY, np.array([1, 0, 1]))),
        _data(test=LabeledImages(GREY[:2], LABELS[:2])),
        _data(train=LabeledImages(GREY, LABELS, patients)),
        _data(train=LabeledImages(GREY, LABELS)),
    ]
    assert len({digest, *(data.digest() for data in changed)}) == 6


def test_the_digest_does_not_depend_on_the_memory_layout() -> None:
    random = np.random.RandomState(0).randint(0, 256, (3, 4, 4)).astype(np.uint8)
    one = _data(test=LabeledImages(random, LABELS))
    two = _data(test=LabeledImages(np.asfortranarray(random), LABELS))
    assert one.digest() == two.digest()
