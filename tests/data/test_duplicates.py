"""Equal images under other names."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from monai_unlearn.data import ImageData, ImageFiles, LabeledImages, duplicates, make_split
from monai_unlearn.data.duplicates import equal_to, file_hashes, pixel_hashes

PROPERTIES = settings(deadline=None, derandomize=True, max_examples=60)
SECRET = "Zq7-0042-Xw"


def _picture(seed: int, shape: tuple[int, ...] = (9, 7)) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def _save(path: Path, pixels: np.ndarray, **options: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return str(path)


def _same(hashes: np.ndarray) -> list[list[bool]]:
    """Which image equals which."""
    return [equal_to(hashes, hashes[i : i + 1]).tolist() for i in range(len(hashes))]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded."""
    names: list[str] = []
    load = duplicates.LoadImage.__call__

    def spy(self: object, path: str, *args: object) -> object:
        names.append(Path(path).name)
        return load(self, path, *args)

    monkeypatch.setattr(duplicates.LoadImage, "__call__", spy)
    return names


# In memory


@PROPERTIES
@given(
    images=arrays.arrays(
        st.sampled_from([np.uint8, np.float32]),
        st.tuples(st.integers(1, 12), st.just(2), st.just(1)),
        elements=st.sampled_from([0, 1]),
    ),
    rows=st.lists(st.integers(0, 11), min_size=1, max_size=5),
)
def test_images_in_memory_are_equal_where_their_pixels_are(images: np.ndarray, rows: list[int]) -> None:
    others = images[[row % len(images) for row in rows]]
    slow = [any(np.array_equal(image, other) for other in others) for image in images]
    assert equal_to(pixel_hashes(images), pixel_hashes(others)).tolist() == slow


def test_zero_equals_minus_zero_in_memory() -> None:
    images = np.array([[[0.0, 1]], [[-0.0, 1]], [[0.0, -1]]])
    assert _same(pixel_hashes(images)) == [[True, True, False], [True, True, False], [False, False, True]]


def test_images_in_memory_need_not_be_contiguous() -> None:
    images = np.stack([_picture(0), _picture(1), _picture(0)], axis=-1)  # the images are along the last axis
    assert _same(pixel_hashes(np.moveaxis(images, -1, 0)))[0] == [True, False, True]


@PROPERTIES
@given(st.lists(st.tuples(*[st.integers(0, 2)] * 2), min_size=1, max_size=20), st.data())
def test_hashes_are_compared_as_wholes(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    hashes = np.array(pairs, dtype=duplicates.HASH)
    others = data.draw(st.lists(st.tuples(*[st.integers(0, 2)] * 2), max_size=5))
    found = equal_to(hashes, np.array(others, dtype=duplicates.HASH))
    assert found.tolist() == [pair in others for pair in pairs]


# Files


def test_files_with_equal_bytes_or_pixels_are_equal_whatever_their_name_and_format(tmp_path: Path) -> None:
    pixels = _picture(0)
    paths = [
        _save(tmp_path / "a" / f"{SECRET}.png", pixels),
        _save(tmp_path / "packed.png", pixels, compress_level=9),
        _save(tmp_path / "other.bmp", pixels),
        shutil.copy(tmp_path / "a" / f"{SECRET}.png", tmp_path / "b.png"),
    ]
    assert len({Path(path).read_bytes() for path in paths}) == 3
    changed = pixels.copy()
    changed[3, 3] ^= 1
    paths += [
        _save(tmp_path / "changed.png", changed),
        _save(tmp_path / "colour.png", np.repeat(pixels[..., None], 3, -1)),
        _save(tmp_path / "turned.png", pixels.reshape(7, 9)),
        _save(tmp_path / "long.png", pixels.reshape(1, 63)),
    ]
    same = np.array(_same(file_hashes(paths)))
    expected = np.eye(8, dtype=bool)
    expected[:4, :4] = True
    np.testing.assert_array_equal(same, expected)


def test_volumes_are_equal_whatever_type_their_values_are_stored_in(tmp_path: Path) -> None:
    volume = np.random.RandomState(0).randint(-900, 900, (4, 5, 6))
    paths = []
    for name, kind in (("a.nii", np.int16), ("b.nii.gz", np.int16), ("c.nii", np.float32), ("d.nii", np.int32)):
        nibabel.save(nibabel.Nifti1Image(volume.astype(kind), np.eye(4)), tmp_path / name)
        paths.append(str(tmp_path / name))
    nibabel.save(nibabel.Nifti1Image((volume + 0.5).astype(np.float32), np.eye(4)), tmp_path / "e.nii")
    assert _same(file_hashes([*paths, str(tmp_path / "e.nii")]))[0] == [True, True, True, True, False]


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["png", "bmp"])), min_size=2, max_size=6))
def test_files_are_equal_where_a_pair_by_pair_comparison_says_so(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, str]]
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    paths = [_save(folder / f"{i}.{ending}", _picture(seed, (2, 3))) for i, (seed, ending) in enumerate(drawn)]
    slow = [[np.array_equal(*map(np.asarray, map(Image.open, (a, b)))) for b in paths] for a in paths]
    assert _same(file_hashes(paths)) == slow


def test_files_with_equal_bytes_are_decoded_once(tmp_path: Path, reads: list[str]) -> None:
    first = _save(tmp_path / "0.png", _picture(0))
    file_hashes([first, first])
    paths = [shutil.copy(first, tmp_path / f"{i}.png") for i in range(1, 200)]
    reads.clear()
    file_hashes(paths)
    assert 1 <= len(reads) <= duplicates.THREADS  # as many as may begin before the first has ended


def _series(folder: Path, *seeds: int) -> str:
    for i, seed in enumerate(seeds):
        _save(folder / f"{i}.png", _picture(seed))
    return str(folder)


def test_a_folder_is_an_image_and_is_read_again_when_a_file_in_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slices:
        def __init__(self, **options: object) -> None: ...

        def __call__(self, folder: str) -> np.ndarray:
            return np.stack([np.asarray(Image.open(file)) for file in sorted(Path(folder).iterdir())])

    monkeypatch.setattr(duplicates, "LoadImage", Slices)
    paths = [_series(tmp_path / "a", 0, 1), _series(tmp_path / "b", 0, 1), _series(tmp_path / "c", 0, 2)]
    cache = tmp_path / "cache"
    assert _same(file_hashes(paths, cache))[0] == [True, True, False]
    before = os.stat(tmp_path / "b").st_mtime_ns
    _save(tmp_path / "b" / "1.png", _picture(5))
    os.utime(tmp_path / "b", ns=(before, before))
    assert _same(file_hashes(paths, cache))[0] == [True, False, False]


# The cache


def _pictures(folder: Path) -> list[str]:
    return [_save(folder / f"{SECRET}-{i}.png", _picture(i % 3)) for i in range(5)]


def test_a_second_scan_decodes_nothing_and_finds_the_same(tmp_path: Path, reads: list[str]) -> None:
    paths, cache = _pictures(tmp_path), tmp_path / "new" / "cache"
    first = file_hashes(paths, cache)
    assert reads
    reads.clear()
    np.testing.assert_array_equal(file_hashes(paths, cache), first)
    np.testing.assert_array_equal(file_hashes(paths[::-1], cache), first[::-1])
    assert not reads
    assert not list(tmp_path.rglob("*.part*"))


def test_a_scan_decodes_only_what_is_new_or_changed_since(tmp_path: Path, reads: list[str]) -> None:
    paths, cache = _pictures(tmp_path), tmp_path / "cache"
    file_hashes(paths, cache)
    reads.clear()

    paths.append(_save(tmp_path / "new.png", _picture(1)))
    assert _same(file_hashes(paths, cache))[5] == [False, True, False, False, True, True]
    assert reads == ["new.png"]
    reads.clear()

    before = os.stat(paths[1])
    _save(Path(paths[1]), _picture(9, (20, 20)))  # another size
    os.utime(paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime(paths[2], ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # another time alone
    assert _same(file_hashes(paths, cache))[4] == [False, False, False, False, True, True]
    assert sorted(reads) == [Path(path).name for path in paths[1:3]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"PK\x03\x04" + content,
        lambda content: content[:-1],
        lambda content: content[:-32],
        lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
    ],
)
def test_a_damaged_cache_is_made_anew(
    tmp_path: Path, damage: Callable[[bytes], bytes], reads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    paths, cache = _pictures(tmp_path), tmp_path / "cache"
    first = file_hashes(paths, cache)
    whole = cache.read_bytes()
    cache.write_bytes(damage(whole))
    reads.clear()
    np.testing.assert_array_equal(file_hashes(paths, cache), first)
    assert reads
    assert "is damaged: searching anew" in caplog.text
    assert cache.read_bytes() == whole


def test_the_cache_names_no_file_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    file_hashes(_pictures(tmp_path / SECRET), cache)
    assert SECRET.encode() not in cache.read_bytes()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600


def test_a_scan_that_fails_keeps_the_old_cache_and_no_part_of_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, cache = _pictures(tmp_path), tmp_path / "cache"
    file_hashes(paths[:2], cache)
    before = cache.read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        file_hashes(paths, cache)
    assert cache.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_files_that_can_not_be_read_are_counted_and_not_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], reads: list[str]
) -> None:
    paths, cache = _pictures(tmp_path), tmp_path / "cache"
    Path(paths[1]).write_bytes(b"")
    Path(paths[3]).write_bytes(Path(paths[3]).read_bytes()[:40])
    with caplog.at_level("DEBUG"), pytest.raises(ValueError, match="2 of 5 image files could not be read") as caught:
        file_hashes(paths, cache)
    printed = capfd.readouterr()
    assert SECRET not in str(caught.value) + printed.out + printed.err
    assert caught.value.__context__ is None
    # What could be read is kept: once they are repaired, they alone are decoded.
    for position in (1, 3):
        _save(Path(paths[position]), _picture(7))
    reads.clear()
    file_hashes(paths, cache)
    assert set(reads) <= {Path(paths[1]).name, Path(paths[3]).name}


def test_a_file_that_is_not_there_is_not_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"An image file can't be read .No such file or directory.") as caught:
        file_hashes([str(tmp_path / f"{SECRET}.png")])
    assert SECRET not in str(caught.value)


# In a split


def _files(folder: Path, name: str, seeds: list[int], patients: list[str]) -> ImageFiles:
    files = [f"{name}/{i}.png" for i in range(len(seeds))]
    for file, seed in zip(files, seeds):
        _save(folder / file, _picture(seed))
    labels = np.arange(len(seeds), dtype=np.int64) % 2
    return ImageFiles(folder, np.array(files, dtype=object), labels, pd.DataFrame({"patient": patients}), name=name)


def _in_memory(part: ImageFiles) -> LabeledImages:
    images = np.stack([np.asarray(Image.open(path)) for path in part.paths])
    return LabeledImages(images, part.labels, part.attributes)


@pytest.fixture
def data(tmp_path: Path) -> ImageData:
    """Image 0 of patient A has copies with B, in validation and in test."""
    return ImageData(
        "files",
        ("a", "b"),
        _files(tmp_path, "train", [0, 1, 0, 2, 3, 4], ["A", "A", "B", "B", "C", "C"]),
        _files(tmp_path, "validation", [10, 11, 0, 12, 13, 14], ["V", "V", "W", "W", "X", "X"]),
        _files(tmp_path, "test", [20, 1, 21], ["T", "T", "U"]),
    )


def _split(data: ImageData, tmp_path: Path, **options: object) -> object:
    (tmp_path / "request.txt").write_text("A\n")
    return make_split(data, forget_patients=tmp_path / "request.txt", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("in_memory", [True, False])
def test_copies_follow_the_forgotten_image_and_leave_the_evaluation(
    data: ImageData, tmp_path: Path, in_memory: bool
) -> None:
    if in_memory:
        data = ImageData(data.name, data.class_names, *map(_in_memory, data.parts().values()))
    split = _split(data, tmp_path, find_duplicates=not in_memory, cache_dir=tmp_path / "models")
    assert split.forget.tolist() == [0, 1, 2]
    assert 2 not in split.selection
    assert 2 not in split.validation
    assert len(split.selection) + len(split.validation) == 5
    assert split.test.tolist() == [0, 2]
    assert split.request["duplicates"] == {"training": 1, "evaluation": 2}
    # B loses one of two images only because it is a copy.
    assert (split.request["images"], split.request["patients"], split.request["partly_forgotten"]) == (3, 2, 1)
    assert (tmp_path / "models" / "duplicates.hashes").exists() is not in_memory


def test_without_a_scan_files_are_not_opened(data: ImageData, tmp_path: Path, reads: list[str]) -> None:
    split = _split(data, tmp_path)
    assert split.forget.tolist() == [0, 1]
    assert split.request["duplicates"] is None
    assert split.request["partly_forgotten"] == 0
    assert not reads


def test_parts_in_memory_and_on_disk_may_be_mixed(data: ImageData, tmp_path: Path) -> None:
    mixed = ImageData(data.name, data.class_names, _in_memory(data.train), data.validation, data.test)
    split = _split(mixed, tmp_path)
    assert split.forget.tolist() == [0, 1, 2]


def test_all_but_copies_leaves_no_one_to_retain(data: ImageData, tmp_path: Path) -> None:
    for path in data.train.paths[1:]:
        shutil.copy(data.train.paths[0], path)
    with pytest.raises(ValueError, match="all 6 images of the training data are to be forgotten"):
        _split(data, tmp_path, find_duplicates=True)
