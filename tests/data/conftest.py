"""Small data sets for the tests of readers, splits and loaders."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import pytest

from monai_unlearn.data import ImageData, LabeledImages, synthetic_cells


@pytest.fixture(scope="session")
def cells() -> ImageData:
    """The embedded data set."""
    return synthetic_cells(0)


def _part(n: int, classes: int, random: np.random.RandomState, patients: Sequence | None) -> LabeledImages:
    attributes = pd.DataFrame() if patients is None else pd.DataFrame({"patient": list(patients)})
    labels = np.arange(n, dtype=np.int64) % classes
    return LabeledImages(random.randint(0, 256, (n, 5, 4)).astype(np.uint8), labels, attributes)


@pytest.fixture(scope="session")
def make_data() -> Callable[..., ImageData]:
    """Random images; the number of patients' ids, where given, is the number of images."""

    def make(
        n: int = 60,
        n_validation: int = 40,
        classes: int = 3,
        patients: Sequence | None = None,
        validation_patients: Sequence | None = None,
    ) -> ImageData:
        random = np.random.RandomState(0)
        return ImageData(
            name="random",
            class_names=tuple("abcdefgh"[:classes]),
            train=_part(n if patients is None else len(patients), classes, random, patients),
            validation=_part(
                n_validation if validation_patients is None else len(validation_patients),
                classes,
                random,
                validation_patients,
            ),
            test=_part(9, classes, random, None),
        )

    return make
