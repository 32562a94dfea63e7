"""Random augmentation of whole batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.transforms import Flip

from monai_unlearn.data import RandomFlip, RandomShift


def _images(n: int = 12, channels: int = 2) -> torch.Tensor:
    return torch.arange(n * channels * 5 * 4, dtype=torch.float32).reshape(n, channels, 5, 4)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("axis", [0, 1])
def test_each_image_is_either_itself_or_monais_flip(axis: int) -> None:
    images = _images(40)
    flipped = torch.stack([torch.as_tensor(Flip(spatial_axis=axis)(image)) for image in images])
    assert torch.equal(RandomFlip(axis, prob=1)(images, _generator()), flipped)
    assert torch.equal(RandomFlip(axis, prob=0)(images, _generator()), images)
    result = RandomFlip(axis)(images, _generator())
    turned = [torch.equal(result[i], flipped[i]) for i in range(40)]
    kept = [torch.equal(result[i], images[i]) for i in range(40)]
    assert all(one != other for one, other in zip(turned, kept))
    assert 5 < sum(turned) < 35


def _shifted(image: np.ndarray, rows: int, columns: int, pixels: int) -> np.ndarray:
    """Oracle: the window of an image with a repeated border, moved by rows and columns."""
    padded = np.pad(image, [(0, 0), (pixels, pixels), (pixels, pixels)], mode="edge")
    moved = np.roll(padded, (-rows, -columns), axis=(1, 2))
    return moved[:, pixels:-pixels, pixels:-pixels]


@pytest.mark.parametrize("pixels", [1, 2, 3])
def test_each_image_is_moved_by_a_whole_number_of_pixels_and_its_border_repeats(pixels: int) -> None:
    images = _images(60)
    result = RandomShift(pixels)(images, _generator())
    assert result.shape == images.shape
    reach = range(-pixels, pixels + 1)
    seen = set()
    for image, moved in zip(images.numpy(), result.numpy()):
        fits = [(r, c) for r in reach for c in reach if np.array_equal(_shifted(image, r, c, pixels), moved)]
        assert len(fits) == 1
        seen.add(fits[0])
    assert {rows for rows, _ in seen} == set(reach)
    assert {columns for _, columns in seen} == set(reach)


@pytest.mark.parametrize("augment", [RandomFlip(), RandomShift(2)])
def test_the_generator_alone_decides_and_the_batch_stays_as_it_was(augment: RandomFlip | RandomShift) -> None:
    images = _images(30)
    before = images.clone()
    state = torch.get_rng_state()
    one, two, other = (augment(images, _generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("prob", [-0.1, 1.1, float("nan")])
def test_a_probability_outside_its_range_is_refused(prob: float) -> None:
    with pytest.raises(ValueError, match=r"prob should lie in \[0, 1\]"):
        RandomFlip(prob=prob)


def test_a_negative_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="spatial_axis should be 0 or more, but got -1"):
        RandomFlip(-1)


@pytest.mark.parametrize("pixels", [0, -1, 1.5, "2"])
def test_a_shift_by_less_than_a_pixel_is_refused(pixels: object) -> None:
    with pytest.raises(ValueError, match="pixels should be an integer of at least 1"):
        RandomShift(pixels)  # type: ignore[arg-type]
