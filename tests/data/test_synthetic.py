"""The embedded data set."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from monai_unlearn.data import ImageData, LabeledImages, synthetic_cells

PARTS = ("train", "validation", "test")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(cells: ImageData) -> None:
    start = time.process_time()
    again = synthetic_cells(0)
    assert time.process_time() - start < 10
    for name in PARTS:
        one, two = getattr(cells, name), getattr(again, name)
        np.testing.assert_array_equal(one.images, two.images)
        np.testing.assert_array_equal(one.labels, two.labels)
        assert one.attributes.equals(two.attributes)
    assert again.digest() == cells.digest()
    assert synthetic_cells(1, images_per_patient=1).digest() != synthetic_cells(2, images_per_patient=1).digest()


def test_no_global_random_state_is_used_or_changed() -> None:
    np.random.seed(3)
    expected = np.random.random_sample(4)
    np.random.seed(3)
    one = synthetic_cells(5, images_per_patient=1)
    np.testing.assert_array_equal(np.random.random_sample(4), expected)
    assert synthetic_cells(5, images_per_patient=1).digest() == one.digest()


@pytest.mark.parametrize("name", PARTS)
def test_each_part_has_grey_bytes_and_all_eight_unbalanced_classes(cells: ImageData, name: str) -> None:
    part: LabeledImages = getattr(cells, name)
    assert part.images.dtype == np.uint8
    assert part.images.shape == (len(part), 28, 28)
    assert part.labels.shape == (len(part),)
    counts = np.bincount(part.labels, minlength=8)
    assert len(counts) == cells.num_classes == 8
    assert counts.min() > 0
    assert counts.max() > 3 * counts.min()


def test_patients_are_disjoint_between_the_parts(cells: ImageData) -> None:
    patients = [set(getattr(cells, name).patients) for name in PARTS]
    assert len(set.union(*patients)) == sum(map(len, patients))


@pytest.mark.parametrize("name", PARTS)
def test_sex_age_and_site_belong_to_the_patient_and_difficulty_to_the_image(cells: ImageData, name: str) -> None:
    attributes = getattr(cells, name).attributes
    by_patient = attributes.groupby("patient")
    for column in ("sex", "age_band", "site"):
        assert (by_patient[column].nunique() == 1).all()
        assert attributes[column].nunique() > 1
    assert attributes["difficulty"].between(0, 1).all()
    assert by_patient.size().max() > 1
    assert by_patient["difficulty"].nunique().max() > 1


def test_every_patient_has_exactly_one_image_at_a_mean_of_one() -> None:
    data = synthetic_cells(0, images_per_patient=1)
    assert data.train.attributes["patient"].is_unique


@pytest.mark.parametrize("value", [0, 0.5, -1])
def test_less_than_one_image_a_patient_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="images_per_patient should be at least 1"):
        synthetic_cells(0, images_per_patient=value)


def _features(part: LabeledImages) -> np.ndarray:
    """Mean, contrast and the low spatial frequencies of each image: enough to learn, not enough to memorise."""
    images = part.images / 255
    mean = images.mean(axis=(1, 2), keepdims=True)
    spectrum = np.abs(np.fft.fft2(images - mean))[:, :10, :10]
    return np.column_stack([mean.ravel(), images.std(axis=(1, 2)), spectrum.reshape(len(images), -1)])


def test_the_classes_can_be_learned_but_overlap(cells: ImageData) -> None:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    model.fit(_features(cells.train), cells.train.labels)
    features, labels = _features(cells.test), cells.test.labels
    right = model.predict(features) == labels
    majority = np.bincount(labels).max() / len(labels)
    assert majority + 0.2 < right.mean() < 0.95
    easy = cells.test.attributes["difficulty"].to_numpy() < np.median(cells.test.attributes["difficulty"])
    assert right[easy].mean() > right[~easy].mean() + 0.1
