"""Images on disk as data sets: grey images, caches, what is removed from them, and errors that name nobody."""

from __future__ import annotations

import errno
import gc
import itertools
import logging
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from monai.data import Dataset as MonaiDataset
from monai.transforms import (
    Compose,
    EnsureTyped,
    Lambdad,
    LoadImaged,
    OneOf,
    RandFlipd,
    RandGaussianNoised,
    RandLambdad,
    ScaleIntensityRanged,
    Transform,
)
from monai.utils import set_determinism
from PIL import Image
from torch.utils.data import Subset

from monai_unlearn.data.image_data import ImageFiles, make_loader
from monai_unlearn.data.image_files import FileImages, GreyImage, file_dataset, remove_cached

SECRETS = ("Smith", "Stdy", "Vw")  # of each file's path
CACHES = ["none", "memory", "disk"]


def _write(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (11, 9)).astype(np.uint8)
    Image.fromarray(pixels).save(file)


def _files(
    root: Path, patients: Sequence[Any], name: str = "train", start: int = 0, with_patients: bool = True
) -> ImageFiles:
    """An image for each entry, each of another study; all images of a patient in the patient's folder."""
    files = [f"Smith{patient}/Stdy{start + i}/Vw.png" for i, patient in enumerate(patients)]
    for i, file in enumerate(files):
        if not (root / file).exists():
            _write(root / file, start + i)
    labels = np.arange(len(files)) % 2
    attributes = pd.DataFrame({"patient": [f"Smith{patient}" for patient in patients]})
    return ImageFiles(root, np.array(files), labels, attributes if with_patients else pd.DataFrame(), name=name)


@pytest.fixture
def source(tmp_path: Path) -> ImageFiles:
    """Six images of three patients."""
    return _files(tmp_path / "hospital", [0, 1, 2, 0, 1, 2])


def _steps(size: int = 8, **options: Any) -> list[Callable]:
    return [
        LoadImaged("image", ensure_channel_first=True, reverse_indexing=False, converter=GreyImage(size), **options),
        ScaleIntensityRanged("image", 0, 255, -1, 1),
        EnsureTyped("image", track_meta=False),
    ]


def _augmentation() -> list[Callable]:
    return [RandGaussianNoised("image", prob=1), RandFlipd("image", prob=0.5)]


@pytest.fixture
def make(source: ImageFiles, tmp_path: Path) -> Callable[..., FileImages]:
    """A data set of the six images, or of others, with the test's folder for a cache on disk."""

    def make(cache: str, transform: Any = None, files: ImageFiles = source, **options: Any) -> FileImages:
        folder = tmp_path / "cache" if cache == "disk" else None
        return file_dataset(files, _steps() if transform is None else transform, cache, folder, **options)

    return make


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the images that were opened, in order."""
    paths: list[str] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **options: paths.append(str(path)) or original(path, **options))
    return paths


@pytest.fixture
def _determinism() -> Iterator[None]:
    """Undone at the end, since it is global."""
    yield
    set_determinism(None)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (
        set(one) == set(other) == {"image", "label", "index"}
        and torch.equal(torch.as_tensor(one["image"]), torch.as_tensor(other["image"]))
        and bool(np.array_equal(one["label"], other["label"], equal_nan=True))
        and one["index"] == other["index"]
    )


def _cached(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "cache"))


# Grey images


def _colour(shape: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (*shape, 3)).astype(np.uint8))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "1"])
@pytest.mark.parametrize("shape", [(20, 24), (5, 7), (8, 8), (90, 40)])
def test_a_grey_image_of_a_png_is_pillows_luma_resized(tmp_path: Path, mode: str, shape: tuple[int, int]) -> None:
    _colour(shape).convert(mode).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == mode
        expected = image.convert("L").resize((8, 8), Image.Resampling.BILINEAR)
    with Image.open(tmp_path / "a.png") as image:
        made = GreyImage(8)(image)
    assert (made.mode, made.size) == ("L", (8, 8))
    np.testing.assert_array_equal(made, expected)
    np.testing.assert_array_equal(GreyImage(8)(made), made)


def test_colour_becomes_luma() -> None:
    image = _colour((8, 8))
    weights = np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(np.asarray(GreyImage(8)(image)), np.asarray(image) @ weights, atol=1)


@pytest.mark.parametrize("size", [8, 20])
def test_sixteen_bits_become_the_eight_that_they_were_made_of(tmp_path: Path, size: int) -> None:
    grey = np.random.RandomState(0).randint(0, 256, (20, 20)).astype(np.uint8)
    grey[0, :2] = 0, 255
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode.startswith("I")
        made = GreyImage(size)(image)
    np.testing.assert_array_equal(made, GreyImage(size)(Image.fromarray(grey)))


def test_sixteen_bits_are_rounded(tmp_path: Path) -> None:
    deep = np.random.RandomState(0).randint(0, 65536, (8, 8)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(GreyImage(8)(image), np.round(deep / 257))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(("factor", "divisor"), [(1, 1), (2, 1), (3, 1), (4, 2), (7, 2), (8, 4), (16, 8), (40, 8)])
def test_a_jpeg_is_decoded_smaller_but_at_twice_the_size_or_more(
    tmp_path: Path, mode: str, factor: int, divisor: int
) -> None:
    side = 16 * factor
    # Smooth, as a radiograph is at this scale: what the decoder averages is what the filter would.
    x = np.linspace(0, 3, side)
    waves = 128 + 60 * np.sin(x)[:, None] + 60 * np.cos(2 * x)[None]
    colours = np.stack([waves, waves[::-1], waves.T], axis=2).clip(0, 255).astype(np.uint8)
    Image.fromarray(colours).convert(mode).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        expected = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BILINEAR), dtype=float)
    with Image.open(tmp_path / "a.jpg") as image:
        made = GreyImage(16)(image)
        assert image.size == (side // divisor, side // divisor)
    difference = np.abs(np.asarray(made, dtype=float) - expected)
    assert difference.max() <= (2 if divisor == 1 else 6)
    assert difference.mean() <= 1.5


@pytest.mark.parametrize("size", [0, -1, 8.0, "8", None, True])
def test_a_grey_image_of_no_size_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=f"size should be an integer of at least 1, but got {re.escape(repr(size))}"):
        GreyImage(size)


# Items


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("cache", CACHES)
def test_items_are_bit_for_bit_those_of_monais_data_set(
    source: ImageFiles, make: Callable[..., FileImages], cache: str, nested: bool, random: bool
) -> None:
    tail = [*_augmentation(), Lambdad("image", func=lambda image: image + 1)] if random else []
    steps = [*_steps(), *tail]
    dataset = make(cache, Compose([Compose(steps[:2]), *steps[2:]]) if nested else steps, num_workers=2)
    plain = MonaiDataset(source.records(), steps)

    def items(of: Any) -> list[dict]:
        for step in tail[:2]:
            step.set_random_state(seed=5)
        return [of[i] for _ in range(2) for i in (3, 0, 5, 0)]

    expected = items(plain)
    assert all(map(_same, items(dataset), expected))
    assert _same(expected[1], expected[3]) is not random
    assert (len(dataset), expected[0]["image"].shape) == (6, (1, 8, 8))


@pytest.mark.parametrize("cache", CACHES)
def test_labels_of_several_findings_are_rows(source: ImageFiles, make: Callable[..., FileImages], cache: str) -> None:
    labels = np.array([[0, 1], [np.nan, 0.5], [1, 1]] * 2, dtype=np.float32)
    dataset = make(cache, files=ImageFiles(source.root, source.files, labels, source.attributes))
    np.testing.assert_array_equal([dataset[i]["label"] for i in range(6)], labels)
    batch = next(iter(make_loader(dataset, 6)))
    np.testing.assert_array_equal(batch["label"], labels)
    assert batch["label"].dtype == torch.float32
    assert batch["index"].tolist() == list(range(6))


@pytest.mark.parametrize("cache", CACHES)
def test_positions_are_those_of_a_sequence(make: Callable[..., FileImages], cache: str) -> None:
    dataset = make(cache)
    assert [item["index"] for item in dataset] == list(range(6))
    assert _same(dataset[-1], dataset[5])
    assert _same(dataset[np.int64(2)], dataset[2])
    for index in (6, -7):
        with pytest.raises(IndexError):
            dataset[index]
    with pytest.raises(TypeError, match="slice"):
        dataset[1:3]  # type: ignore[index]


def test_records_tell_path_and_position_without_a_look_at_the_images(
    source: ImageFiles, make: Callable[..., FileImages], opened: list[str]
) -> None:
    records = make("disk", [*_steps(), *_augmentation()]).data
    assert isinstance(records, Sequence)
    assert list(records) == [{"image": path, "index": i} for i, path in enumerate(source.paths)]
    assert len(records) == 6
    assert opened == []


@pytest.mark.parametrize("cache", CACHES)
def test_data_sets_and_items_can_be_pickled(make: Callable[..., FileImages], cache: str) -> None:
    dataset = make(cache, [*_steps(), *_augmentation()])
    item = dataset[1]
    assert _same(pickle.loads(pickle.dumps(item)), item)
    again = pickle.loads(pickle.dumps(dataset))
    assert list(again.data) == list(dataset.data)
    assert all(_same(again.without_random()[i], dataset.without_random()[i]) for i in range(6))


# Augmentation


def _epochs(dataset: FileImages, workers: int = 0) -> list[dict[str, torch.Tensor]]:
    """Two epochs of training."""
    loader = make_loader(dataset, 2, shuffle=True, seed=1, num_workers=workers)
    epochs = [list(loader) for _ in range(2)]
    return [{key: torch.cat([batch[key] for batch in epoch]) for key in epoch[0]} for epoch in epochs]


def _in_order(epoch: dict[str, torch.Tensor]) -> torch.Tensor:
    return epoch["image"][epoch["index"].argsort()]


@pytest.mark.usefixtures("_determinism")
@pytest.mark.parametrize("workers", [0, 2])
def test_each_epoch_can_be_repeated_whatever_the_cache_and_differs_from_the_one_before(
    make: Callable[..., FileImages], workers: int
) -> None:
    runs = []
    for cache in ("none", "none", "memory", "disk", "disk"):  # the first with disk fills it, the second reads it
        set_determinism(3)
        runs.append(_epochs(make(cache, [*_steps(), *_augmentation()]), workers))
    for run, epoch, key in itertools.product(runs[1:], range(2), ("image", "label", "index")):
        assert torch.equal(run[epoch][key], runs[0][epoch][key])
    first, second = map(_in_order, runs[0])
    assert not any(torch.equal(one, other) for one, other in zip(first, second))
    assert len(first) == len(second) == 6


@pytest.mark.parametrize("cache", CACHES)
def test_in_process_and_in_workers_images_are_the_same(make: Callable[..., FileImages], cache: str) -> None:
    dataset = make(cache)
    loaded = [list(make_loader(dataset, 4, num_workers=workers)) for workers in (2, 0)]
    for one, other in zip(*loaded):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["index"], other["index"])


def _blacken(image: torch.Tensor) -> torch.Tensor:
    return image.fill_(-1)


@pytest.mark.parametrize("cache", ["memory", "disk"])
@pytest.mark.parametrize("random", [True, False])
def test_transforms_in_place_leave_the_cached_copy_alone(
    make: Callable[..., FileImages], cache: str, random: bool
) -> None:
    before = [make("none")[i] for i in range(6)]
    steps = _steps()
    tail = [RandLambdad("image", func=_blacken)] if random else [RandFlipd("image", 0), Lambdad("image", func=_blacken)]
    dataset = make(cache, [*steps, *tail])
    for each in (dataset, dataset.without_random(), dataset):
        black = not (random and each is not dataset)
        assert all((each[i]["image"] == -1).all().item() is black for i in range(6))
    # The transforms changed what they were given, and not what is kept.
    dataset._rest = dataset._rest.only([])
    assert all(_same(dataset[i], before[i]) for i in range(6))


def test_without_random_keeps_the_other_transforms_the_cache_and_the_random_state(
    make: Callable[..., FileImages], opened: list[str]
) -> None:
    def negative(image: torch.Tensor) -> torch.Tensor:
        return -image

    def build() -> FileImages:
        tail = [*_augmentation(), Lambdad("image", func=negative), OneOf([RandFlipd("image", prob=1)])]
        dataset = make("disk", [*_steps(), *tail])
        dataset._rest.set_random_state(seed=5)
        return dataset

    expected = [make("none")[i] for i in range(6)]
    dataset, untouched = build(), build()
    opened.clear()
    plain = dataset.without_random()
    for _ in range(2):
        for i in range(6):
            assert _same({**plain[i], "image": -plain[i]["image"]}, expected[i])
    assert len(opened) == 6
    assert list(plain.data) == list(dataset.data)
    # Reading the plain one draws no random number of the original.
    assert all(_same(dataset[i], untouched[i]) for i in range(6))
    assert not _same(dataset[0], plain[0])
    assert _same(plain.without_random()[1], plain[1])
    assert len(opened) == 6


def _of_mine(item: dict) -> dict:
    return item


@pytest.mark.parametrize("cache", CACHES)
def test_without_random_refuses_what_may_be_random(make: Callable[..., FileImages], cache: str) -> None:
    dataset = make(cache, [*_steps(), _of_mine])
    assert _same(dataset[0], make("none")[0])
    with pytest.raises(ValueError, match=r"Whether _of_mine is random can't be told.*Wrap it in .*Lambdad"):
        dataset.without_random()


# What is decoded


def test_without_a_cache_an_image_is_opened_when_it_is_asked_for_each_time(
    source: ImageFiles, make: Callable[..., FileImages], opened: list[str]
) -> None:
    dataset = make("none", [*_steps(), *_augmentation()])
    loader = make_loader(dataset, 4, shuffle=True)
    _ = dataset.without_random(), len(dataset), len(loader), dataset.data[3]
    assert opened == []
    _ = dataset[3], dataset[1], dataset[3]
    assert opened == [source.paths[i] for i in (3, 1, 3)]


def test_a_cache_in_memory_opens_each_image_once_to_begin_with(
    source: ImageFiles, make: Callable[..., FileImages], opened: list[str]
) -> None:
    dataset = make("memory", [*_steps(), *_augmentation()])
    assert sorted(opened) == sorted(source.paths)
    _epochs(dataset)
    _epochs(dataset.without_random())
    assert len(opened) == 6


def test_a_cache_on_disk_opens_each_image_once_for_training_and_evaluation(
    tmp_path: Path, source: ImageFiles, make: Callable[..., FileImages], opened: list[str]
) -> None:
    order = [4, 2, 0, 5]
    part = ImageFiles(
        source.root, source.files[order], 1 - source.labels[order], source.attributes.iloc[order], name="validation"
    )
    expected = [make("none", files=part)[i] for i in range(4)]
    opened.clear()
    training = make("disk", [*_steps(), *_augmentation()])
    evaluation = make("disk", files=part)
    _ = training.without_random(), training.data, len(evaluation)
    assert opened == _cached(tmp_path) == []
    _ = evaluation[1]
    assert opened == [source.paths[2]]
    _epochs(training)
    assert sorted(opened) == sorted(source.paths)
    # Positions and labels are those of the part that asks, not of the one that filled the cache.
    assert all(_same(evaluation[i], expected[i]) for i in range(4))
    other_augmentation = make("disk", [*_steps(), RandFlipd("image", prob=1)])
    _epochs(other_augmentation)
    assert len(opened) == len(_cached(tmp_path)) == 6


@pytest.mark.parametrize("rows", [[3, 1], np.array([3, 1]), torch.tensor([3, 1])])
def test_a_subset_of_any_kind_of_positions_finds_its_images_in_the_cache(
    make: Callable[..., FileImages], opened: list[str], rows: Any
) -> None:
    loader = make_loader(Subset(make("disk"), rows), 2)
    first, second = (next(iter(loader)) for _ in range(2))
    assert first["index"].tolist() == second["index"].tolist() == [3, 1]
    assert torch.equal(first["image"], second["image"])
    assert len(opened) == 2


# The cache on disk


class _Code:
    """What would be run if a file of the cache were unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.file),)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-200]),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "garbage": lambda file: file.write_bytes(b"no tensor" * 50),
    "code": lambda file: torch.save({"image": _Code(file.with_name("ran"))}, file),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_the_cache_is_made_anew(
    tmp_path: Path, make: Callable[..., FileImages], opened: list[str], damage: str
) -> None:
    dataset = make("disk")
    expected = dataset[2]
    [name] = _cached(tmp_path)
    DAMAGE[damage](tmp_path / "cache" / name)
    assert _same(dataset[2], expected)
    assert len(opened) == 2
    assert _cached(tmp_path) == [name]
    assert _same(dataset[2], expected)
    assert len(opened) == 2


def test_a_file_of_the_cache_is_there_as_a_whole_or_not_at_all(
    tmp_path: Path, make: Callable[..., FileImages], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make("disk")
    save, seen = torch.save, []

    def full(item: Any, file: Path) -> None:
        save(item, file)
        seen.append(_cached(tmp_path))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            dataset[2]
        patch.setattr(torch, "save", save)
        patch.setattr(os, "replace", lambda *files: seen.append(_cached(tmp_path)) or full(None, Path(os.devnull)))
        with pytest.raises(OSError, match="No space left"):
            dataset[2]
    assert all(len(names) == 1 and names[0].endswith(f".pt.part{os.getpid()}") for names in seen[:2])
    assert _cached(tmp_path) == []
    assert _same(dataset[2], make("none")[2])
    [name] = _cached(tmp_path)
    assert name.endswith(".pt")


def test_other_transforms_or_another_folder_have_copies_of_their_own(
    tmp_path: Path, source: ImageFiles, make: Callable[..., FileImages], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = _files(tmp_path / "other", [0, 1, 2, 0, 1, 2], start=0)
    _write(Path(other.paths[0]), 99)
    variants: list[dict[str, Any]] = [
        {},
        {"transform": _steps(size=9)},
        {"transform": _steps()[:2]},
        {"transform": [*_steps()[:1], ScaleIntensityRanged("image", 0, 255, 0, 1), *_steps()[2:]]},
        {"files": other},
    ]
    for _ in range(2):
        for variant in variants:
            assert _same(make("disk", **variant)[0], make("none", **variant)[0])
    assert len(_cached(tmp_path)) == len(variants)
    monkeypatch.chdir(tmp_path)
    here = ImageFiles(Path("hospital"), source.files, source.labels, source.attributes)
    assert _same(make("disk", files=here)[0], make("none")[0])
    assert len(_cached(tmp_path)) == len(variants)


def test_the_cache_on_disk_names_no_file_or_patient(
    tmp_path: Path, source: ImageFiles, make: Callable[..., FileImages]
) -> None:
    assert all(secret in path for secret in SECRETS for path in source.paths)
    for steps in (_steps(), _steps()[:1]):  # the second gives images with metadata
        dataset = make("disk", [*steps, *_augmentation()])
        list(make_loader(dataset, 3, num_workers=2))
    names = _cached(tmp_path)
    assert len(names) == 12
    for name in names:
        content = (tmp_path / "cache" / name).read_bytes()
        assert b"index" in content  # as it is not compressed, a name would be seen
        for secret in (*SECRETS, "hospital"):
            assert secret not in name
            assert secret.encode() not in content


class _Noted(Transform):
    """Adds something to an item."""

    def __init__(self, note: Any) -> None:
        self.note = note

    def __call__(self, item: dict) -> dict:
        return {**item, "note": self.note}


@pytest.mark.parametrize("note", [3, 0.5, None, {"size": (2, [True])}, torch.arange(3), {"array": np.arange(3)}])
def test_numbers_are_kept_on_disk(make: Callable[..., FileImages], opened: list[str], note: Any) -> None:
    dataset = make("disk", [*_steps(), _Noted(note)])
    assert repr(dataset[0]["note"]) == repr(dataset[0]["note"])
    assert len(opened) == 1


@pytest.mark.parametrize("note", ["Smith", {"meta": ["Smith"]}, b"Smith", np.array(["Smith"]), {"a": Path("Smith")}])
def test_text_is_not_kept_on_disk(tmp_path: Path, make: Callable[..., FileImages], note: Any) -> None:
    steps = [*_steps(), _Noted(note)]
    with pytest.raises(ValueError, match=r"tensors and Python's numbers alone.*patient, but note is neither") as error:
        make("disk", steps)[0]
    assert _named(error.value) == set()
    assert _cached(tmp_path) == []
    assert "note" in make("none", steps)[0]


def test_metadata_beside_an_image_is_not_kept_on_disk(tmp_path: Path, make: Callable[..., FileImages]) -> None:
    with pytest.raises(ValueError, match=r"but image_meta_dict is neither\. Leave image_only of LoadImaged as it is"):
        make("disk", _steps(image_only=False))[0]
    assert _cached(tmp_path) == []


# Removal


def _fill(*datasets: FileImages) -> None:
    for dataset in datasets:
        _ = [dataset[i] for i in range(len(dataset))]


@pytest.mark.parametrize("positions", [[0], (3,), np.array([0, 3, 0]), iter([3, 3])])
def test_all_copies_of_a_patient_go_and_no_others(
    tmp_path: Path, source: ImageFiles, make: Callable[..., FileImages], opened: list[str], positions: Any
) -> None:
    for transform in (_steps(), _steps(size=9)):
        _fill(make("disk", transform, _files(source.root, [1, 3], "validation", start=20)), make("disk", transform))
        # Images of the patient that are in no list any more, of another study.
        _fill(make("disk", transform, _files(source.root, [0], "gone", start=30)))
    (tmp_path / "cache" / "duplicates.hashes").touch()
    before = set(_cached(tmp_path))
    assert len(before) == 2 * (6 + 2 + 1) + 1
    opened.clear()
    assert remove_cached(source, positions, tmp_path / "cache") == 2 * (2 + 1)
    left = set(_cached(tmp_path))
    assert left < before
    assert len(left) == 13
    _fill(make("disk"), make("disk", files=_files(source.root, [1, 3], "validation", start=20)))
    assert opened == [source.paths[0], source.paths[3]]
    assert remove_cached(source, [0], str(tmp_path / "cache")) == 2


def test_what_an_interrupted_write_left_goes_too(
    tmp_path: Path, source: ImageFiles, make: Callable[..., FileImages]
) -> None:
    _fill(make("disk"))
    for name in _cached(tmp_path):
        (tmp_path / "cache" / name.replace(".pt", ".pt.part77")).touch()
    assert remove_cached(source, [4], tmp_path / "cache") == 4
    assert len(_cached(tmp_path)) == 8


def test_patients_are_the_same_in_every_part(tmp_path: Path, source: ImageFiles) -> None:
    parts = [
        ImageFiles(source.root, source.files[:2], source.labels[:2], pd.DataFrame({"patient": patients}))
        for patients in ([7, 8], ["7", "8"], np.array(["8", "9"], dtype=object))
    ]
    for part in parts:
        file_dataset(part, _steps(), "disk", tmp_path / "cache")[0]
    assert len(_cached(tmp_path)) == 2
    assert remove_cached(parts[0], [0], tmp_path / "cache") == 1
    assert remove_cached(parts[1], [1], tmp_path / "cache") == 1


def test_without_patients_the_copies_of_the_files_themselves_go(
    tmp_path: Path, source: ImageFiles, make: Callable[..., FileImages]
) -> None:
    files = _files(source.root, [0, 1, 2, 0, 1, 2], with_patients=False)
    assert files.patients is None
    for transform in (_steps(), _steps(size=9)):
        _fill(make("disk", transform, files))
    other = ImageFiles(files.root, files.files[::-1], files.labels)
    assert remove_cached(other, [5, 1], tmp_path / "cache") == 4
    assert len(_cached(tmp_path)) == 8
    assert remove_cached(files, [0, 4], tmp_path / "cache") == 0


def test_nothing_is_removed_where_there_is_no_folder_and_none_is_made(tmp_path: Path, source: ImageFiles) -> None:
    assert remove_cached(source, [0, 1], tmp_path / "cache") == 0
    assert not (tmp_path / "cache").exists()


def test_nothing_is_removed_for_nobody(tmp_path: Path, source: ImageFiles, make: Callable[..., FileImages]) -> None:
    _fill(make("disk"))
    assert remove_cached(source, [], tmp_path / "cache") == 0
    assert len(_cached(tmp_path)) == 6


# Images that can't be read


BROKEN: dict[str, Callable[[Path], Any]] = {
    "missing": lambda file: file.unlink(),
    "zero bytes": lambda file: file.write_bytes(b""),
    "garbage": lambda file: file.write_bytes(b"no image" * 20),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:60]),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


def _named(error: BaseException) -> set[str]:
    """Secrets in an error or in one that it comes from, whether or not a traceback would show that."""
    found, errors = set(), [error]
    while errors:
        error = errors.pop()
        text = f"{error}{error!r}{getattr(error, '__notes__', '')}"
        found |= {secret for secret in SECRETS if secret in text}
        errors += [other for other in (error.__cause__, error.__context__) if other is not None]
    return found


@pytest.fixture
def _collected() -> Iterator[None]:
    """MONAI's reader leaves a broken file open until its error is collected: a warning in another test."""
    yield
    gc.collect()


@pytest.mark.usefixtures("_collected")
@pytest.mark.parametrize("reader", [None, "PILReader"])  # with one given, MONAI writes the name to a log
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("broken", BROKEN)
def test_an_image_that_cannot_be_read_is_told_by_its_position_and_never_by_its_name(
    source: ImageFiles,
    make: Callable[..., FileImages],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    cache: str,
    broken: str,
    reader: str | None,
) -> None:
    caplog.set_level(logging.DEBUG)
    BROKEN[broken](Path(source.paths[3]))
    with pytest.raises(
        ValueError, match=r"Image 3 of the train images, counted from 0.*data\.train\.files\[3\]"
    ) as error:
        _fill(make(cache, [*_steps(reader=reader), *_augmentation()]))
    assert _named(error.value) == set()
    printed = "".join(capfd.readouterr()) + caplog.text
    assert not any(secret in printed for secret in SECRETS)
    if cache == "none":  # so the names would have been found
        with pytest.raises(RuntimeError) as error_of_monai:
            _fill(MonaiDataset(source.records(), _steps()))  # type: ignore[arg-type]
        assert _named(error_of_monai.value) or broken == "cut short"


@pytest.mark.usefixtures("_collected")
@pytest.mark.parametrize("cache", ["none", "disk"])
@pytest.mark.parametrize("broken", ["missing", "garbage"])
def test_workers_do_not_name_an_image_that_they_cannot_read(
    source: ImageFiles,
    make: Callable[..., FileImages],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    cache: str,
    broken: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    BROKEN[broken](Path(source.paths[3]))
    loader = make_loader(make(cache), 2, num_workers=2)
    with pytest.raises(ValueError, match=r"worker process(.|\n)*Image 3 of the train images") as error:
        list(loader)
    loader._iterator._shutdown_workers()  # or collecting the error, and the loader with it, waits for ten seconds
    assert _named(error.value) == set()
    printed = "".join(capfd.readouterr()) + caplog.text
    assert not any(secret in printed for secret in SECRETS)


def test_other_images_can_be_read_and_a_restored_one_too(
    source: ImageFiles, make: Callable[..., FileImages], tmp_path: Path
) -> None:
    expected, file = make("none")[3], Path(source.paths[3])
    content = file.read_bytes()
    file.write_bytes(b"")
    dataset = make("disk")
    with pytest.raises(ValueError, match="Image 3"):
        dataset[3]
    assert _cached(tmp_path) == []
    _ = dataset[2], dataset[4]
    file.write_bytes(content)
    assert _same(dataset[3], expected)


def test_a_part_without_a_name(source: ImageFiles, make: Callable[..., FileImages]) -> None:
    Path(source.paths[3]).unlink()
    with pytest.raises(ValueError, match=r"Image 3 of the images, .* `data\.PART\.files\[3\]` tells it"):
        make("none", files=ImageFiles(source.root, source.files, source.labels, source.attributes))[-3]


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("too dark", "(ValueError: too dark)"),
        ("Smith2/Stdy2/Vw.png is too dark", "(ValueError)"),
        ("the image of Smith2 is too dark", "(ValueError)"),
        ("Vw is too dark", "(ValueError)"),
        ("Stdy2 is too dark", "(ValueError)"),
        ("patient 0815 is too dark", "(ValueError)"),
    ],
)
def test_the_reason_is_told_where_it_names_nobody(
    source: ImageFiles, make: Callable[..., FileImages], said: str, told: str, random: bool
) -> None:
    def refuse(image: torch.Tensor) -> torch.Tensor:
        raise ValueError(said)

    patients = ["0815"] * 6
    files = ImageFiles(source.root, source.files, source.labels, pd.DataFrame({"patient": patients}), name="test")
    step = RandLambdad("image", func=refuse) if random else Lambdad("image", func=refuse)
    with pytest.raises(ValueError, match="Image 2 of the test images") as error:
        make("none", [*_steps(), step], files)[2]
    assert f"could not be read or transformed {told}." in str(error.value)
    assert _named(error.value) == set()
    assert "0815" not in str(error.value)


def test_a_name_with_odd_characters_is_not_told_either(tmp_path: Path) -> None:
    files = ImageFiles(tmp_path, np.array(["Smith\u200b1.png"]), np.array([0]))
    with pytest.raises(ValueError, match=r"transformed \(FileNotFoundError\)\.") as error:
        file_dataset(files, _steps())[0]
    assert _named(error.value) == set()


# Settings


def test_an_unknown_cache_is_refused(make: Callable[..., FileImages]) -> None:
    with pytest.raises(ValueError, match="cache should be none, memory or disk, but got 'ram'"):
        make("ram")


def test_a_cache_on_disk_needs_a_folder(tmp_path: Path, source: ImageFiles) -> None:
    with pytest.raises(ValueError, match="cache_dir should name a folder for a cache on disk, but got none"):
        file_dataset(source, _steps(), "disk")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cache_dir must be a directory"):
        file_dataset(source, _steps(), "disk", tmp_path / "file")
    file_dataset(source, _steps(), "disk", tmp_path / "deep" / "er")[0]
    assert len(os.listdir(tmp_path / "deep" / "er")) == 1


def test_lambdas_that_a_cache_on_disk_would_have_to_tell_apart_are_refused(make: Callable[..., FileImages]) -> None:
    steps = [*_steps(), Lambdad("image", func=lambda image: image + 1)]
    with pytest.raises(ValueError, match=r"pickle can store them, but are not \(.*lambda.*functions of a module"):
        make("disk", steps)
    plain = make("none")[0]["image"]
    for dataset in (make("none", steps), make("memory", steps), make("disk", [*_steps(), *_augmentation(), steps[-1]])):
        assert torch.equal(dataset.without_random()[0]["image"], plain + 1)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("first", [_of_mine, RandFlipd("image", prob=0)])
def test_a_cache_with_nothing_to_keep_is_refused(
    source: ImageFiles, make: Callable[..., FileImages], tmp_path: Path, cache: str, first: Callable
) -> None:
    steps = [_of_mine, *_steps()] if first is _of_mine else [first]
    if cache == "none":
        dataset = make(cache, steps)
        assert dataset.data[0]["image"] == source.paths[0]
    else:
        with pytest.raises(ValueError, match=rf"not random for a cache \({cache}\).*Begin with .*LoadImaged"):
            make(cache, steps)
        assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lazy": True}, "lazy"),
        ({"lazy": None}, "lazy"),
        ({"map_items": False}, "map_items"),
        ({"unpack_items": True, "log_stats": True}, "unpack_items and log_stats"),
        ({"overrides": {"image": {"mode": "nearest"}}, "lazy": True}, "lazy and overrides"),
    ],
)
def test_options_of_a_compose_which_would_be_lost_are_refused(
    make: Callable[..., FileImages], options: dict[str, Any], named: str
) -> None:
    for transform in (Compose(_steps(), **options), [Compose(_steps(), **options), *_augmentation()]):
        with pytest.raises(ValueError, match=f"should have no options, .* but has {named}\\. Give its transforms"):
            make("none", transform)
