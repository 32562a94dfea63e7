"""Who is in which split."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_unlearn.data import BatchedImages, ImageData, Split, make_split, people

PROPERTIES = settings(deadline=None, derandomize=True, max_examples=60)
MakeData = Callable[..., ImageData]
FRACTIONS = st.floats(0.01, 0.95)
SEEDS = st.integers(0, 2**31)


def _request(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def _check_partition(split: Split, n: int) -> None:
    assert len(split.forget) > 0
    assert len(split.retain) > 0
    np.testing.assert_array_equal(np.sort(np.concatenate([split.forget, split.retain])), np.arange(n))
    for part in (split.forget, split.retain, split.selection, split.validation):
        assert (np.diff(part) > 0).all()


@PROPERTIES
@given(n=st.integers(2, 80), fraction=FRACTIONS, seed=SEEDS)
def test_a_fraction_draws_just_so_many_images_where_there_are_no_patients(
    make_data: MakeData, n: int, fraction: float, seed: int
) -> None:
    data = make_data(n)
    wanted = math.ceil(fraction * n - 1e-9)
    if wanted == n:
        with pytest.raises(ValueError, match="retain set should hold at least one image"):
            make_split(data, seed, fraction)
        return
    split = make_split(data, seed, fraction)
    _check_partition(split, n)
    assert len(split.forget) == wanted
    assert split.unit == "image"


@PROPERTIES
@given(patients=st.lists(st.integers(0, 11), min_size=2, max_size=60), fraction=FRACTIONS, seed=SEEDS)
def test_a_fraction_draws_whole_patients_and_no_more_than_needed(
    make_data: MakeData, patients: list[int], fraction: float, seed: int
) -> None:
    ids = np.array([f"P{patient}" for patient in patients])
    data = make_data(patients=ids)
    # Slow oracle: patients in the order of a hash, until the share is reached.
    order = sorted(set(ids), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    drawn: set[str] = set()
    while np.isin(ids, list(drawn)).mean() < fraction - 1e-9:
        drawn.add(order[len(drawn)])
    if drawn == set(ids):
        with pytest.raises(ValueError, match="retain set should hold at least one image"):
            make_split(data, seed, fraction)
        return
    split = make_split(data, seed, fraction)
    _check_partition(split, len(ids))
    assert split.unit == "patient"
    assert set(ids[split.forget]) == drawn
    assert not drawn & set(ids[split.retain])
    last = order[len(drawn) - 1]
    assert len(split.forget) >= fraction * len(ids) - 1e-6
    assert (ids[split.forget] != last).sum() < fraction * len(ids)


@PROPERTIES
@given(images_of=st.lists(st.integers(1, 4), min_size=10, max_size=20), seed=SEEDS, shuffle=SEEDS)
def test_the_patients_drawn_do_not_depend_on_the_order_of_the_images(
    make_data: MakeData, images_of: list[int], seed: int, shuffle: int
) -> None:
    ids = np.repeat([f"P{patient}" for patient in range(len(images_of))], images_of)
    mixed = np.random.RandomState(shuffle).permutation(ids)
    one, two = (make_split(make_data(patients=names), seed, 0.2) for names in (ids, mixed))
    assert set(ids[one.forget]) == set(mixed[two.forget])


def test_the_same_seed_gives_the_same_split_and_another_seed_another(make_data: MakeData, cells: ImageData) -> None:
    for data in (make_data(), cells):
        digests = [make_split(data, seed).digest() for seed in (0, 1, 2, 3, 0)]
        assert digests[0] == digests[4]
        assert len(set(digests)) == 4


def test_the_split_is_the_same_on_every_platform(make_data: MakeData) -> None:
    """Written down once; a change of these changes every user's split."""
    images = make_split(make_data(1000), seed=0)
    assert images.forget[:6].tolist() == GOLDEN_FORGET
    assert images.digest() == GOLDEN_IMAGES
    ids = [f"P{i // 3:05d}" for i in range(300)]
    data = make_data(patients=ids, validation_patients=ids)
    patients = make_split(data, seed=7, forget_fraction=0.25, overlap="keep")
    assert patients.digest() == GOLDEN_PATIENTS
    halves = ",".join(map(str, patients.selection))
    assert hashlib.sha256(halves.encode()).hexdigest() == GOLDEN_SELECTION


GOLDEN_FORGET = [15, 36, 44, 46, 76, 87]
GOLDEN_IMAGES = "71eb746b941409e078e02dcafd28cf64f6e37edf69b12fb39421c9b6939efb3a"
GOLDEN_PATIENTS = "861d2d4194f39e1ad31f6bd4bf0597108e4de79e04764f4728f64298590f1156"
GOLDEN_SELECTION = "0b423ab406ddb4df32cc1e69097091240fb1c26b774623c938d157898edfd3d8"


@PROPERTIES
@given(n=st.integers(2, 90), classes=st.integers(2, 6))
def test_the_halves_of_single_images_differ_by_at_most_one_image_a_class(
    make_data: MakeData, n: int, classes: int
) -> None:
    data = make_data(n_validation=n, classes=classes)
    split = make_split(data)
    np.testing.assert_array_equal(np.sort(np.concatenate([split.selection, split.validation])), np.arange(n))
    counts = [
        np.bincount(data.validation.labels[half], minlength=classes) for half in (split.selection, split.validation)
    ]
    assert np.abs(counts[0] - counts[1]).max() <= 1


@PROPERTIES
@given(patients=st.lists(st.integers(0, 15), min_size=2, max_size=60))
def test_the_halves_cover_the_validation_data_by_whole_patients(make_data: MakeData, patients: list[int]) -> None:
    ids = np.array([f"V{patient}" for patient in patients])
    data = make_data(validation_patients=ids)
    if len(set(patients)) == 1:
        with pytest.raises(ValueError, match="at least two patients, but comes from one"):
            make_split(data)
        return
    split = make_split(data)
    np.testing.assert_array_equal(np.sort(np.concatenate([split.selection, split.validation])), np.arange(len(ids)))
    assert not set(ids[split.selection]) & set(ids[split.validation])


def test_the_halves_of_patients_have_nearly_the_same_share_of_each_class(cells: ImageData) -> None:
    split = make_split(cells)
    labels = cells.validation.labels
    shares = [np.bincount(labels[half], minlength=8) / len(half) for half in (split.selection, split.validation)]
    assert np.abs(shares[0] - shares[1]).max() < 0.02
    assert abs(len(split.selection) - len(split.validation)) < 0.02 * len(labels)
    patients = cells.validation.patients
    assert patients is not None
    assert not set(patients[split.selection]) & set(patients[split.validation])


def test_the_halves_depend_on_neither_the_seed_nor_the_request(cells: ImageData, tmp_path: Path) -> None:
    request = _request(tmp_path / "request.txt", 0, 5)
    splits = [make_split(cells), make_split(cells, 9), make_split(cells, 1, 0.5)]
    splits.append(make_split(cells, 2, forget_indices=request))
    for split in splits[1:]:
        np.testing.assert_array_equal(split.selection, splits[0].selection)
        np.testing.assert_array_equal(split.validation, splits[0].validation)


def test_one_validation_image_can_not_be_halved(make_data: MakeData) -> None:
    with pytest.raises(ValueError, match="at least two images, but holds 1"):
        make_split(make_data(n_validation=1))


@pytest.mark.parametrize("value", [0, 1, -1, 1.0, 2, float("nan"), float("inf"), True, "0.1", None, [0.1]])
def test_a_fraction_outside_its_range_is_refused(make_data: MakeData, value: object) -> None:
    with pytest.raises(ValueError, match="forget_fraction should lie between 0 and 1"):
        make_split(make_data(), forget_fraction=value)  # type: ignore[arg-type]


def test_a_fraction_of_one_image_at_least_is_forgotten(make_data: MakeData) -> None:
    assert len(make_split(make_data(), forget_fraction=1e-7).forget) == 1


@pytest.mark.parametrize("text", ["3\n0\n17\n", "3\r\n0\r\n17\r\n", "\ufeff3\n\n 0\n17", "17\n3\n0"])
def test_the_named_indices_are_forgotten(make_data: MakeData, tmp_path: Path, text: str) -> None:
    file = tmp_path / "request.txt"
    file.write_text(text, encoding="utf-8", newline="")
    split = make_split(make_data(), forget_indices=file)
    assert split.forget.tolist() == [0, 3, 17]
    assert split.unit == "image"
    _check_partition(split, 60)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty. Nothing to forget"),
        (["", "  "], "is empty. Nothing to forget"),
        ([1, 2, 1], "1 of 3 lines of 'request.txt' repeat another"),
        ([1, "01"], "name each image once, but 1 repeat"),
        ([60], r"should lie in \[0, 59\], but 1 of 1 do not"),
        ([-1, 3], r"should lie in \[0, 59\], but 1 of 2 do not"),
        ([10**30], "one whole number a line"),
        (["P00017"], "one whole number a line"),
        (["1.5"], "one whole number a line"),
        (["1 2"], "one whole number a line"),
        (range(60), "all 60 images of the training data are to be forgotten"),
    ],
)
def test_indices_that_make_no_request_are_refused(
    make_data: MakeData, tmp_path: Path, lines: list[object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_split(make_data(), forget_indices=_request(tmp_path / "request.txt", *lines))
    assert "P00017" not in str(error.value)


def test_a_request_that_is_no_text_is_refused(make_data: MakeData, tmp_path: Path) -> None:
    (tmp_path / "request.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match=r"'request\.txt' is not text"):
        make_split(make_data(), forget_indices=tmp_path / "request.txt")


PATIENTS = ["anna", "anna", "ben", "carl", "ben", "dora"]


def test_all_images_of_the_named_patients_are_forgotten(make_data: MakeData, tmp_path: Path) -> None:
    split = make_split(make_data(patients=PATIENTS), forget_patients=_request(tmp_path / "request.txt", "dora", "anna"))
    assert split.forget.tolist() == [0, 1, 5]
    assert split.unit == "patient"


def test_patients_whose_ids_are_numbers_are_found(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data(patients=[7, 7, 8, 17, 70])
    assert make_split(data, forget_patients=_request(tmp_path / "request.txt", 7)).forget.tolist() == [0, 1]
    drawn = make_split(data, forget_fraction=0.5)
    assert set(data.train.patients[drawn.forget]).isdisjoint(data.train.patients[drawn.retain])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty. Nothing to forget"),
        (["ben", "ben"], "1 of 2 lines of 'request.txt' repeat another"),
        (["ben", "secret name"], "1 of 2 match none"),
        (["BEN"], "1 of 1 match none"),
        (["be"], "1 of 1 match none"),
        (set(PATIENTS), "all 6 images of the training data are to be forgotten"),
    ],
)
def test_patients_that_make_no_request_are_refused_without_showing_an_id(
    make_data: MakeData, tmp_path: Path, lines: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_split(make_data(patients=PATIENTS), forget_patients=_request(tmp_path / "request.txt", *lines))
    for name in ("secret name", "BEN", *PATIENTS):
        assert name not in str(error.value)


def test_patients_of_data_without_patients_are_refused(make_data: MakeData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs data with patients, but random has none"):
        make_split(make_data(), forget_patients=_request(tmp_path / "request.txt", "anna"))


def test_two_requests_at_once_are_refused(make_data: MakeData) -> None:
    with pytest.raises(ValueError, match="forget_indices or forget_patients, not both"):
        make_split(make_data(), forget_indices="a", forget_patients="b")


@pytest.mark.parametrize("name", ["forget_indices", "forget_patients"])
def test_a_request_that_does_not_exist_is_named(make_data: MakeData, tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{name} should be an existing text file"):
        make_split(make_data(patients=PATIENTS), **{name: tmp_path / "nowhere.txt"})


def test_the_forget_set_recognises_its_rows_in_a_batch(cells: ImageData) -> None:
    split = make_split(cells, 3)
    rows = np.random.RandomState(0).permutation(len(cells.train))
    batch = BatchedImages(cells.train).__getitems__(rows.tolist())
    np.testing.assert_array_equal(split.forget_set().mask(batch).numpy(), np.isin(rows, split.forget))
    assert split.forget_set().positions(BatchedImages(cells.train)) == split.forget.tolist()


def test_the_written_split_holds_keyed_hashes_and_no_patient(cells: ImageData) -> None:
    split = make_split(cells)
    split = dataclasses.replace(split, key="a key")
    table = split.as_hashes(cells)
    text = json.dumps(table)
    assert not any(patient in text for patient in cells.train.patients)
    parts = {name: len(getattr(split, name)) for name in ("forget", "retain", "selection", "validation")}
    for name, n in {**parts, "test": len(cells.test)}.items():
        assert table[name]["n"] == n
    assert len(table["forget"]["images"]) == len(split.forget)
    assert set(table) == {"unit", "forget", "retain", "selection", "validation", "test"}

    row = split.forget[0]
    content = cells.train.images[row].tobytes() + str(cells.train.labels[row]).encode()
    assert table["forget"]["images"][0] == hmac.new(b"a key", content, hashlib.sha256).hexdigest()
    # Without the key, the data alone does not tell who was forgotten.
    assert hashlib.sha256(content).hexdigest() not in text

    assert split.as_hashes(cells) == table
    other = dataclasses.replace(split, key="another key").as_hashes(cells)
    assert set(other["forget"]["images"]).isdisjoint(table["forget"]["images"])
    assert all(other[name]["hash"] != table[name]["hash"] for name in parts)


def test_the_hash_of_a_part_changes_with_its_images(cells: ImageData) -> None:
    one, two = (dataclasses.replace(make_split(cells, seed), key="a key").as_hashes(cells) for seed in (0, 1))
    assert one["forget"]["hash"] != two["forget"]["hash"]
    assert one["retain"]["hash"] != two["retain"]["hash"]
    assert one["test"] == two["test"]


# Images whose patient is not known

UNKNOWN = ["anna", None, "ben", float("nan"), "", "ben", "carl", "anna", None]


def test_an_image_without_a_patient_is_a_person_of_its_own() -> None:
    numbers = people(np.array(UNKNOWN, dtype=object))
    assert len(set(numbers)) == 3 + 4
    assert numbers[0] == numbers[7]
    assert numbers[2] == numbers[5]
    assert len(set(people(np.array(["a", "b", "a"])))) == 2
    assert len(set(people(np.array([np.nan, 1.0, np.nan, 1.0])))) == 3


@pytest.mark.parametrize("missing", [None, float("nan"), ""])
@pytest.mark.parametrize("overlap", ["refuse", "drop", "keep"])
def test_images_without_a_patient_on_both_sides_are_no_overlap(
    make_data: MakeData, tmp_path: Path, missing: object, overlap: str
) -> None:
    data = make_data(patients=["anna", missing, missing, "ben"], validation_patients=["vera", missing, missing, "nan"])
    split = make_split(data, forget_indices=_request(tmp_path / "request.txt", 1), overlap=overlap)
    assert len(split.selection) + len(split.validation) == 4
    assert split.request["overlap"] == {"option": overlap, "patients": 0, "images": 0}
    assert (split.request["patients"], split.request["partly_forgotten"]) == (1, 0)


def test_a_patient_in_both_counts_once_beside_images_without_one(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data(patients=UNKNOWN, validation_patients=["anna", None, "vera", "wim", "anna", None, "xara", "yves"])
    request = _request(tmp_path / "request.txt", 0, 1, 3)
    with pytest.raises(ValueError, match=r"^1 of the 3 patients to forget also have 2 validation or test images"):
        make_split(data, forget_indices=request)
    split = make_split(data, forget_indices=request, overlap="drop")
    assert sorted([*split.selection, *split.validation]) == [1, 2, 3, 5, 6, 7]
    assert split.request["overlap"] == {"option": "drop", "patients": 1, "images": 2}
    assert split.request["partly_forgotten"] == 1


def test_patients_are_the_same_whether_their_ids_are_numbers_or_text(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data(patients=[7.0, float("nan"), 8.0], validation_patients=["7", "8.5", "9"])
    request = _request(tmp_path / "request.txt", 0)
    assert make_split(data, forget_indices=request, overlap="drop").request["overlap"]["images"] == 1


@PROPERTIES
@given(patients=st.lists(st.sampled_from(["anna", "ben", "carl", None, float("nan"), ""]), min_size=4, max_size=40))
def test_images_without_a_patient_are_halved_one_by_one(make_data: MakeData, patients: list) -> None:
    data = make_data(validation_patients=patients, classes=1)
    known = [name for name in patients if name and name == name]
    if len(patients) - len(known) + len(set(known)) < 2:
        return
    split = make_split(data)
    np.testing.assert_array_equal(np.sort([*split.selection, *split.validation]), np.arange(len(patients)))
    assert not {patients[i] for i in split.selection} & {patients[i] for i in split.validation} & set(known)
    largest = max([known.count(name) for name in known], default=1)
    assert abs(len(split.selection) - len(split.validation)) <= largest


# Scores that the data does not have


def _hardest(folder: Path, **selector: object) -> Path:
    (folder / "request.json").write_text(json.dumps({"include": [{"hardest": 10, **selector}]}))
    return folder / "request.json"


def test_the_hardest_go_by_the_scores_that_are_handed_over(make_data: MakeData, tmp_path: Path) -> None:
    scores = np.random.RandomState(0).permutation(60).astype(float)
    split = make_split(make_data(), forget_request=_hardest(tmp_path), difficulty=scores)
    assert sorted(scores[split.forget]) == [54, 55, 56, 57, 58, 59]
    frame = pd.DataFrame({"mean_loss": -scores, "difficulty": scores})
    split = make_split(make_data(), forget_request=_hardest(tmp_path, score="mean_loss"), difficulty=frame)
    assert sorted(scores[split.forget]) == [0, 1, 2, 3, 4, 5]


def test_a_column_of_the_data_goes_before_a_score_of_the_same_name(cells: ImageData, tmp_path: Path) -> None:
    own = cells.train.attributes["difficulty"].to_numpy()
    split = make_split(cells, forget_request=_hardest(tmp_path), difficulty=-own)
    others = np.setdiff1d(np.arange(len(own)), split.forget)
    assert own[split.forget].min() >= own[others].max()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused(make_data: MakeData, tmp_path: Path, value: float) -> None:
    scores = np.arange(60.0)
    scores[[3, 4]] = value
    with pytest.raises(ValueError, match="needs a score of every image, but 2 of 60"):
        make_split(make_data(), forget_request=_hardest(tmp_path), difficulty=scores)


def test_another_word_for_the_overlap_is_refused(make_data: MakeData) -> None:
    with pytest.raises(ValueError, match="overlap should be one of refuse, drop, keep, but got 'ignore'"):
        make_split(make_data(), overlap="ignore")
