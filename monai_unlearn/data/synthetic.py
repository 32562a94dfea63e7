"""The embedded data set: synthetic cells that look like TissueMNIST, with patients and their attributes."""

from __future__ import annotations

import numpy as np
import pandas as pd

from monai_unlearn.data.image_data import ImageData, LabeledImages

__all__ = ["synthetic_cells"]

SIZE = 28
# Share of each class. Unbalanced roughly as tissue types are: one class in three, one in thirty.
CLASS_SHARE = np.array([0.28, 0.06, 0.05, 0.10, 0.08, 0.06, 0.22, 0.15])
# One row a class: radius of the cell in pixels, elongation, spatial frequency of the texture in cycles per
# image, contrast of the texture, brightness of the rim against the body, number of bright granules.
APPEARANCE = np.array(
    [
        [6.0, 1.05, 4.0, 0.20, 0.10, 0.0],
        [7.0, 1.10, 5.0, 0.26, 0.35, 1.0],
        [8.0, 1.30, 4.0, 0.30, 0.20, 3.0],
        [6.5, 1.50, 6.5, 0.24, 0.10, 1.0],
        [7.5, 1.70, 5.0, 0.20, 0.35, 0.0],
        [9.0, 1.15, 7.0, 0.28, 0.45, 2.0],
        [8.5, 1.00, 3.0, 0.20, 0.20, 1.0],
        [7.0, 1.25, 8.0, 0.34, 0.05, 2.0],
    ]
)
PATIENTS = {"train": 480, "validation": 170, "test": 160}


def synthetic_cells(seed: int = 0, images_per_patient: float = 5.0) -> ImageData:
    """Draw the embedded data set: 28×28 grey images of cells in eight overlapping, unbalanced classes.

    Every patient has a sex, an age band and a site, which shift the look of that patient's cells slightly, and
    one or more images. An image's ``difficulty`` in [0, 1] is how far its appearance was moved towards that of
    another class: at 0 it is typical, at 1 it looks like the other class, and only memorising gets it right.

    Args:
        seed: seed of every draw; the same seed gives the same images.
        images_per_patient: mean number of images a patient; at least 1.

    Returns:
        Train, validation and test images of disjoint patients; values 0 to 255 (uint8).
    """
    if images_per_patient < 1:
        raise ValueError(
            f"images_per_patient should be at least 1, but got {images_per_patient!r}. Every patient has an image."
        )
    # RandomState rather than Generator: NumPy promises its streams never change between versions.
    random = np.random.RandomState(seed)
    splits = {}
    first_patient = 0
    for name, n_patients in PATIENTS.items():
        splits[name] = _draw_split(random, first_patient, n_patients, images_per_patient)
        first_patient += n_patients
    return ImageData(
        name="synthetic cells",
        class_names=tuple(f"cell type {letter}" for letter in "ABCDEFGH"),
        embedded=True,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
    )


def _draw_split(
    random: np.random.RandomState, first_patient: int, n_patients: int, images_per_patient: float
) -> LabeledImages:
    images_of = 1 + random.poisson(images_per_patient - 1, n_patients)
    patient = np.repeat(np.arange(n_patients), images_of)
    n = len(patient)
    sex = random.choice(["female", "male"], n_patients)
    age_band = random.choice(["18-39", "40-59", "60-79", "80+"], n_patients, p=[0.2, 0.35, 0.35, 0.1])
    site = random.choice(["north", "south", "west"], n_patients, p=[0.5, 0.3, 0.2])

    label = random.choice(len(CLASS_SHARE), n, p=CLASS_SHARE)
    other = (label + random.randint(1, len(CLASS_SHARE), n)) % len(CLASS_SHARE)
    difficulty = random.beta(0.6, 1.5, n)
    mixing = 0.92 * difficulty[:, None]
    appearance = (1 - mixing) * APPEARANCE[label] + mixing * APPEARANCE[other]
    appearance *= 1 + 0.04 * random.randn(n, appearance.shape[1])

    # What belongs to the patient: a stain of their own, and small effects of sex, age and site.
    brightness = 0.45 + 0.05 * random.randn(n_patients) + 0.02 * (site == "south") - 0.02 * (age_band == "80+")
    size = 1 + 0.03 * random.randn(n_patients) + 0.02 * (sex == "male")
    noise = 0.035 + 0.010 * (site == "west")
    appearance[:, 0] *= size[patient]
    images = _draw_cells(random, appearance, brightness[patient], noise[patient])
    return LabeledImages(
        images=images,
        labels=label,
        attributes=pd.DataFrame(
            {
                "patient": [f"P{first_patient + p:05d}" for p in patient],
                "sex": sex[patient],
                "age_band": age_band[patient],
                "site": site[patient],
                "difficulty": difficulty.round(4),
            }
        ),
    )


def _draw_cells(
    random: np.random.RandomState, appearance: np.ndarray, brightness: np.ndarray, noise: np.ndarray
) -> np.ndarray:
    """Paint one cell an image, N × 28 × 28, from N rows of appearance parameters."""
    n = len(appearance)
    radius, elongation, frequency, contrast, rim, granules = (column[:, None, None] for column in appearance.T)
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    angle = random.uniform(0, np.pi, (n, 1, 1))
    x0, y0 = random.uniform(-2, 2, (2, n, 1, 1))
    along = (x - x0) * np.cos(angle) + (y - y0) * np.sin(angle)
    across = -(x - x0) * np.sin(angle) + (y - y0) * np.cos(angle)
    distance = np.hypot(along / np.sqrt(elongation), across * np.sqrt(elongation)) / radius
    body = 1 / (1 + np.exp((distance - 1) * radius / 0.8))
    edge = np.exp(-(((distance - 0.9) * radius / 1.2) ** 2))

    # Texture: white noise kept in a ring of spatial frequencies, with unit standard deviation.
    wave = np.hypot(*np.meshgrid(*[np.fft.fftfreq(SIZE) * SIZE] * 2))
    spectrum = np.fft.fft2(random.randn(n, SIZE, SIZE)) * np.exp(-(((wave - frequency) / 1.0) ** 2))
    texture = np.fft.ifft2(spectrum).real
    texture /= texture.std(axis=(1, 2), keepdims=True)

    spots = np.zeros((n, SIZE, SIZE))
    for index in range(4):
        turn, reach = random.uniform(0, 2 * np.pi, (n, 1, 1)), random.uniform(0.1, 0.7, (n, 1, 1)) * radius
        spot = np.exp(-((x - x0 - reach * np.cos(turn)) ** 2 + (y - y0 - reach * np.sin(turn)) ** 2) / 1.8)
        spots += np.clip(granules - index, 0, 1) * spot

    picture = brightness[:, None, None] * body * (1 + contrast * texture) + 0.35 * rim * edge + 0.30 * spots
    picture += 0.08 + noise[:, None, None] * random.randn(n, SIZE, SIZE)
    return (255 * np.clip(picture, 0, 1)).round().astype(np.uint8)
