"""Names of forgotten people and files: nowhere in what a run writes or prints, whether it ends well or not."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import easy_images
from PIL import Image
from safetensors.torch import save_file

from monai_unlearn.bundle import bundle_path

PATIENTS = [f"Zq7-{number:04d}-Xw" for number in range(16)]
FORGOTTEN, BY_UID, BY_FILE = PATIENTS[3], PATIENTS[4], PATIENTS[5]
UNKNOWN = "Vk9-0099-Yp"
# A site's own data as a part to be added to a bundle: image files named after people, a cache on disk.
SITE = {
    "labels_file": "labels.csv",
    "cache_dir": "cache",
    "data": {
        "_target_": "monai_unlearn.data.table.read_table",
        "dataset_dir": "@dataset_dir",
        "labels_file": "@labels_file",
    },
    "preprocessing": [
        {"_target_": "monai.transforms.LoadImaged", "keys": "image", "ensure_channel_first": True},
        {"_target_": "monai.transforms.ScaleIntensityRanged", "keys": "image", "a_min": 0, "a_max": 255},
    ],
    "augmentation": [{"_target_": "monai.transforms.RandFlipd", "keys": "image", "prob": 0.5}],
    "train_dataset": {
        "_target_": "monai_unlearn.data.file_dataset",
        "source": "$@data.train",
        "transform": "$@preprocessing + @augmentation",
        "cache": "disk",
        "cache_dir": "@cache_dir",
    },
    "evaluation_dataset": {
        "_target_": "monai_unlearn.data.file_dataset",
        "source": "@evaluation_part",
        "transform": "@preprocessing",
        "cache": "disk",
        "cache_dir": "@cache_dir",
    },
    "network_def::block_inplanes": [4, 4, 8, 8],
    "network_def::layers": [1, 1, 1, 1],
    "train_epochs": 12,
    "batch_size": 10,
    "device": "cpu",
    "dataset_dir": "archive",
}


def _uid(patient: int) -> str:
    return f"1.2.826.0.1.3680043.8.498.44170{patient:03d}"


def _prepare(folder: Path) -> None:
    """A site: eighty images of sixteen patients in folders named after people, studies and scans."""
    images, labels = easy_images(80, 0)
    rows = []
    for i, (image, label) in enumerate(zip(images, labels)):
        patient = i // 5
        file = f"{PATIENTS[patient]}/{_uid(patient)}/scanQx{i:04d}Jd.png"
        (folder / "archive" / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "archive" / file)
        part = "train" if patient < 10 else "validation" if patient < 14 else "test"
        rows.append((file, PATIENTS[patient], _uid(patient), label, part))
    columns = ["file", "PatientID", "StudyInstanceUID", "label", "split"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "labels.csv", index=False)
    (folder / "site.json").write_text(json.dumps(SITE))


def _write_request(folder: Path, *others: dict) -> None:
    selectors = [{"patient": FORGOTTEN}, {"study": _uid(4)}, {"file": f"{BY_FILE}/**/scanQx*Jd.png"}, *others]
    (folder / "request.json").write_text(json.dumps({"reference": "ticket 7", "include": selectors}))


def _run(folder: Path, command: str, bundle: str, *options: str) -> subprocess.Popen:
    files = f"['{bundle_path(bundle)}','site.json']"
    return subprocess.Popen(
        [sys.executable, "-m", "monai.bundle", "run", command, "--config_file", files, *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _end(process: subprocess.Popen) -> tuple[int, bytes]:
    printed = process.communicate()[0]
    return process.returncode, printed


def _contents(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """A file's bytes and, of an archive (which .pt and .npz are), those of all that is packed in it."""
    yield name, content
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.namelist():
                yield f"{name}/{member}", archive.read(member)


def _found(folder: Path, names: list[str]) -> list[tuple[str, str]]:
    """Where which name stands in what was written into a folder: in a file, or in its path."""
    given = {"archive", "labels.csv", "request.json", "site.json"}
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if relative.parts[0] in given:
            continue
        for place, content in _contents(str(relative), path.read_bytes() if path.is_file() else b""):
            found += [(place, name) for name in names if name.encode() in content or name in place]
    return found


def _names() -> list[str]:
    """All that may stand nowhere: ids, UIDs and names of files, of all people of the data."""
    uids = [_uid(patient) for patient in range(16)]
    return [*PATIENTS, *uids, "scanQx", "44170", "Zq7", UNKNOWN, "Vk9"]


@pytest.mark.parametrize("kind", ["text", "path", "npz", "pt", "safetensors"])
def test_the_search_finds_a_name_wherever_it_may_be(kind: str, tmp_path: Path) -> None:
    if kind == "text":
        (tmp_path / "log").write_text(f"read {FORGOTTEN}")
    elif kind == "path":
        (tmp_path / FORGOTTEN).mkdir()
    elif kind == "npz":
        np.savez_compressed(tmp_path / "a.npz", **{FORGOTTEN: np.zeros(3)})
    elif kind == "pt":
        torch.save({"forgotten": [FORGOTTEN]}, tmp_path / "a.pt")
    else:
        save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"who": FORGOTTEN})
    assert FORGOTTEN in [name for _, name in _found(tmp_path, _names())]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int, bytes]]:
    """The site's folder, exit status and print-out of a training, an unlearning, and two that fail."""
    folder = tmp_path_factory.mktemp("runs") / "site"  # a process may make this fixture twice
    _prepare(folder)
    done = {"train": (folder, *_end(_run(folder, "train", "train")))}
    unknown, broken = (folder.with_name(name) for name in ("unknown", "broken"))
    shutil.copytree(folder, unknown)
    shutil.copytree(folder, broken)
    shutil.rmtree(broken / "cache")
    scan = next((broken / "archive" / FORGOTTEN).rglob("*.png"))
    scan.write_bytes(scan.read_bytes()[:60].ljust(scan.stat().st_size))  # of the same size: it is the same data
    for place in (folder, broken):
        _write_request(place)
    _write_request(unknown, {"patient": [UNKNOWN]}, {"file": [f"{UNKNOWN}/scanQx0999Jd.png"]})
    started = {
        "unlearn": (folder, "--find_duplicates", "true", "--epochs", "1"),
        "unknown": (unknown, "--epochs", "1"),
        "broken": (broken, "--epochs", "1"),
    }
    running = {
        name: (place, _run(place, "unlearn", "saliency", "--forget_request", "request.json", *options))
        for name, (place, *options) in started.items()
    }
    return done | {name: (place, *_end(process)) for name, (place, process) in running.items()}


def test_the_runs_do_what_they_are_to_do(runs: dict[str, tuple[Path, int, bytes]]) -> None:
    for name, fails in (("train", False), ("unlearn", False), ("unknown", True), ("broken", True)):
        folder, status, printed = runs[name]
        assert bool(status) is fails, printed.decode()
    folder = runs["unlearn"][0]
    report = json.loads((folder / "runs" / "saliency" / "report.json").read_text())
    assert (report["request"]["images"], report["request"]["patients"]) == (15, 3)
    assert (folder / "runs" / "models" / "duplicates.hashes").is_file()
    assert list((folder / "cache").iterdir())
    assert b"2 of 5 match none" in runs["unknown"][2]
    assert b"could not be read" in runs["broken"][2]


@pytest.mark.parametrize("name", ["train", "unlearn", "unknown", "broken"])
def test_no_name_is_printed(name: str, runs: dict[str, tuple[Path, int, bytes]]) -> None:
    _, _, printed = runs[name]
    assert [word for word in _names() if word.encode() in printed] == []


@pytest.mark.parametrize("name", ["unlearn", "unknown", "broken"])
def test_no_name_is_written(name: str, runs: dict[str, tuple[Path, int, bytes]]) -> None:
    assert _found(runs[name][0], _names()) == []
