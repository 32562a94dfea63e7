"""Random augmentation of whole batches: MONAI's per-image transforms, without their cost for each image."""

from __future__ import annotations

import torch

__all__ = ["RandomFlip", "RandomShift"]


class RandomFlip:
    """Flip each image of a batch along one axis with a given probability, as ``monai.transforms.RandFlip`` does.

    Args:
        spatial_axis: 0 for the first spatial axis (top to bottom), 1 for the second (left to right), and so on.
        prob: probability for each image, in [0, 1].
    """

    def __init__(self, spatial_axis: int = 1, prob: float = 0.5) -> None:
        if not 0 <= prob <= 1:
            raise ValueError(f"prob should lie in [0, 1], but got {prob!r}.")
        if spatial_axis < 0:
            raise ValueError(f"spatial_axis should be 0 or more, but got {spatial_axis!r}.")
        self.spatial_axis = spatial_axis
        self.prob = prob

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return a new batch of the same shape, B × C × spatial."""
        flip = torch.rand(len(images), generator=generator, device=images.device) < self.prob
        flip = flip.view(-1, *[1] * (images.ndim - 1))
        return torch.where(flip, images.flip(self.spatial_axis + 2), images)


class RandomShift:
    """Move each 2-D image of a batch by up to ``pixels`` along both axes; the border repeats.

    Args:
        pixels: largest shift, an integer of at least 1.
    """

    def __init__(self, pixels: int = 1) -> None:
        if not isinstance(pixels, int) or pixels < 1:
            raise ValueError(f"pixels should be an integer of at least 1, but got {pixels!r}.")
        self.pixels = pixels

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return a new batch of the same shape, B × C × H × W."""
        n, _, height, width = images.shape
        shift = torch.randint(-self.pixels, self.pixels + 1, (2, n, 1), generator=generator, device=images.device)
        rows = (torch.arange(height, device=images.device) + shift[0]).clamp_(0, height - 1)
        columns = (torch.arange(width, device=images.device) + shift[1]).clamp_(0, width - 1)
        batch = torch.arange(n, device=images.device)
        return images[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
