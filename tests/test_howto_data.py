"""The how-to pages on CheXpert and on DICOM and NIfTI, run as they stand by a shell, with a small network."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path

import fire
import monai.bundle
import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from chexpert_layout import write_chexpert
from pydicom.uid import generate_uid

pytest_plugins = ["bundle_runs"]
pytestmark = [pytest.mark.pages, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
PATIENTS = 24
# Appended to each command, so that it takes seconds: the pages' own settings are for real images.
NETWORK = {
    "_target_": "monai.networks.nets.ResNet",
    "block": "basic",
    "layers": [1, 1, 1, 1],
    "block_inplanes": [4, 4, 8, 8],
    "n_input_channels": "$@data.channels",
    "num_classes": "$@data.num_classes",
    "conv1_t_size": 3,
    "no_max_pool": True,
}


class Shell:
    """A site's folder, in which a page's commands have small settings; bundles run in this process: it is quicker."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str], spatial_dims: int, **options: object) -> None:
        self.folder, self._capfd = folder, capfd
        (folder / "bundles").symlink_to(ROOT / "bundles")
        network = {"network_def": {**NETWORK, "spatial_dims": spatial_dims}}
        (folder / "network.json").write_text(json.dumps(network), encoding="utf-8")
        small = {"device": "cpu", "network_def": "%network.json::network_def", "num_workers": 0, **options}
        self._small = [f"--{name}={value}" for name, value in small.items()]
        self.printed = ""

    def run(self, block: str, *options: str) -> str:
        """Run a block of a page; returns what it prints."""
        self._capfd.readouterr()
        for command in re.split(r"(?m)^(?=python )", block.replace("\\\n", " ")):
            if command.startswith("python -m monai.bundle run"):
                given = shlex.split(command)[3:]
                fire.Fire({"run": monai.bundle.run}, [*given, *self._small, *options])
            else:
                subprocess.run(["bash", "-e", "-c", command], cwd=self.folder, check=True)
        printed = "".join(self._capfd.readouterr())
        self.printed += printed
        return printed

    def keep_original(self, name: str) -> None:
        """Put the model that was trained where the page has somebody's model."""
        model = next(path for path in (self.folder / "runs" / "models").glob("*/model.pt"))
        model.rename(self.folder / name)

    def report(self, run: str) -> dict:
        """The report of a run."""
        return json.loads((self.folder / "runs" / run / "report.json").read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _logging_as_before: None) -> Path:
    """The working directory of a page's commands."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def test_chexpert(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_chexpert(folder, 50, size=24, n_valid=24, strength=3.0, noise=0.0)
    shell = Shell(folder, capfd, 2, image_size=24, train_epochs=6, train_lr=0.02, batch_size=16)
    request, own, theirs, held_out = _blocks("howto_chexpert.md", "bash")
    shell.run(request)
    printed = shell.run(own)
    assert "it is found then" in printed
    assert "Wrote runs/saliency/report.html" in printed
    report = shell.report("saliency")
    assert report["request"]["patients"] == 2
    assert set(report["models"]) == {"original", "unlearned", "retrained"}
    shutil.copy(report["provenance"]["original_checkpoint"], "model.pt")
    shell.run(theirs)
    assert "valid.csv" in " ".join(shell.report("theirs")["notes"])
    unseen = sorted(path.name for path in (folder / "CheXpert-v1.0-small" / "train").iterdir())[-12:]
    (folder / "unseen.txt").write_text("\n".join(unseen))
    shell.run(held_out)
    assert "of the held-out patients" in " ".join(shell.report("theirs")["notes"])
    given: dict = {}
    exec("\n".join(_blocks("howto_chexpert.md", "python")), given)
    assert given["data"].train.labels.shape[1] == 2
    assert not [name for name in ("patient00003", "patient00021", *unseen) if name in shell.printed + str(report)]


def _dicom_archive(folder: Path) -> None:
    """Copies of pydicom's CT_small.dcm under other patients, with a bright block left or right."""
    real = pydicom.dcmread(Path(pydicom.__file__).parent / "data" / "test_files" / "CT_small.dcm")
    rows = []
    for patient in range(PATIENTS):
        real.PatientID = f"Dcm{patient:04d}"
        real.StudyInstanceUID, real.SeriesInstanceUID = generate_uid(), generate_uid()
        for number in range(3):
            real.SOPInstanceUID = real.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            real.InstanceNumber = number + 1
            pixels = np.array(real.pixel_array)
            side = patient % 2
            pixels[20:108, 10 + 64 * side : 54 + 64 * side] += 1500 + 10 * number
            copy = pydicom.dcmread(real.filename)
            copy.update(real)
            copy.PixelData = pixels.tobytes()
            file = folder / f"p{patient:02d}" / f"IM{number}"
            file.parent.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                copy.save_as(file)
        part = "train" if patient < 14 else "validation" if patient < 20 else "test"
        rows.append((real.PatientID, ["left", "right"][patient % 2], part))
    pd.DataFrame(rows, columns=["PatientID", "label", "split"]).to_csv(folder.parent / "labels.csv", index=False)


def test_a_dicom_archive(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _dicom_archive(folder / "archive")
    (folder / "forget.txt").write_text("Dcm0003\nDcm0006\n")
    unlearn, train, _, _ = _blocks("howto_dicom.md", "bash")
    settings = {"train_epochs": 6, "batch_size": 8, "image_size": [32, 32], "augmentation": "[]"}
    shell = Shell(folder, capfd, 2, **settings)
    shell.run(train)
    shell.keep_original("model.pt")
    shell.run(unlearn, "--reference=false")
    report = shell.report("saliency")
    assert report["request"]["patients"] == 2
    assert report["models"]["unlearned"]["forget"]["n"] == 6
    assert "Dcm00" not in shell.printed + str(report)


def test_dicom_series_as_volumes(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _dicom_archive(folder / "archive")
    (folder / "forget.txt").write_text("Dcm0003\n")
    _, train, series, _ = _blocks("howto_dicom.md", "bash")
    settings = {"train_epochs": 8, "train_lr": 0.1, "batch_size": 4, "image_size": [24, 24, 4], "augmentation": "[]"}
    shell = Shell(folder, capfd, 3, **settings)
    shell.run(train, "--level=series")
    shell.keep_original("model3d.pt")
    shell.run(series, "--reference=false")
    assert shell.report("saliency")["models"]["unlearned"]["forget"]["n"] == 1
    weights = torch.load(folder / "runs/saliency/unlearned_model.pt", weights_only=True)
    assert weights["conv1.weight"].ndim == 5


def test_nifti_volumes(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    real = nibabel.load(Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii")
    rows = []
    for patient in range(PATIENTS):
        values = real.get_fdata()
        half = slice(0, 16) if patient % 2 else slice(16, 33)
        values[half] += values.max() * (1 + patient / 100)
        file = f"sub-{patient:02d}/anat.nii"
        (folder / "volumes" / file).parent.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), real.affine), folder / "volumes" / file)
        part = "train" if patient < 14 else "validation" if patient < 20 else "test"
        rows.append((file, f"sub-{patient:02d}", patient % 2, 60 + patient, part))
    columns = ["file", "participant_id", "label", "age", "split"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "labels.tsv", sep="\t", index=False)
    (folder / "forget.txt").write_text("sub-03\n")
    _, train, _, unlearn = _blocks("howto_dicom.md", "bash")
    settings = {"train_epochs": 8, "train_lr": 0.1, "batch_size": 4, "image_size": [16, 16, 16], "augmentation": "[]"}
    shell = Shell(folder, capfd, 3, **settings)
    for one, other in (("dicom.json", "nifti.json"), ("archive", "volumes"), ("labels.csv", "labels.tsv")):
        train = train.replace(one, other)
    shell.run(train)
    shell.keep_original("model.pt")
    shell.run(unlearn, "--reference=false")
    assert shell.report("saliency")["request"]["images"] == 1
    assert "sub-03" not in shell.printed
