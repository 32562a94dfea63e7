"""Studies as a site has them: DICOM files or NIfTI volumes of patients, a table of labels, and a quick recipe."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

NETWORK = {
    "_target_": "monai.networks.nets.ResNet",
    "block": "basic",
    "layers": [1, 1, 1, 1],
    "block_inplanes": [8, 8, 16, 16],
    "spatial_dims": 2,
    "n_input_channels": "$@data.channels",
    "num_classes": "$@data.num_classes",
    "conv1_t_size": 3,
    "conv1_t_stride": 1,
    "no_max_pool": True,
}
OPTIONS = {"train_epochs": 6, "train_lr": 0.05, "batch_size": 16, "augmentation": []}
CLASSES = ["normal", "opacity"]


def picture(generator: np.random.Generator, label: int, shape: tuple[int, ...]) -> np.ndarray:
    """Noise, with a bright block in one class; about 12 bits."""
    pixels = generator.normal(1000, 150, shape)
    if label:
        pixels[tuple(slice(n // 4, n // 2) for n in shape)] += 900
    return pixels.clip(0, 4095).astype(np.int16)


def write_dicom(path: Path, patient: str, pixels: np.ndarray, sex: str = "F") -> None:
    """A secondary capture of one patient."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = pydicom.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID, data.SeriesInstanceUID = generate_uid(), generate_uid()
    data.PatientID, data.PatientName, data.PatientSex, data.Modality = patient, f"Name^{patient}", sex, "OT"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.InstanceNumber, data.WindowCenter, data.WindowWidth = 1, 1200, 2400
    data.PixelData = pixels.astype(np.uint16).tobytes()
    data.is_little_endian, data.is_implicit_VR = True, False  # pydicom 2 asks for these
    data.save_as(path, write_like_original=False)


def _split(number: int, patients: int) -> str:
    return "train" if number < 0.6 * patients else "validation" if number < 0.8 * patients else "test"


def write_studies(folder: Path, kind: str = "dicom", patients: int = 80, size: int = 24, seed: int = 0) -> Path:
    """Two images of each patient, ``labels.csv`` and ``site.json`` beside the folder; returns the folder.

    Args:
        folder: made anew.
        kind: ``dicom`` or ``nifti``.
        patients: how many.
        size: edge in pixels.
        seed: of the pixels.
    """
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = []
    for number in range(patients):
        patient = f"PAT-{number:04d}"
        split = _split(number, patients)
        for view in range(2):
            label = int(generator.integers(2))
            name = f"scan{number:04d}{'ab'[view]}"
            if kind == "dicom":
                file = f"{name}.dcm"
                write_dicom(folder / file, patient, picture(generator, label, (size, size)), "FM"[number % 2])
            else:
                file = f"{name}.nii.gz"
                image = nibabel.Nifti1Image(picture(generator, label, (size,) * 3), np.eye(4))
                nibabel.save(image, folder / file)
            rows.append({"file": file, "patient": patient, "label": CLASSES[label], "split": split})
    pd.DataFrame(rows).to_csv(folder.parent / "labels.csv", index=False)
    dims = 2 if kind == "dicom" else 3
    site = {
        "model": "opacity",
        "parts": [kind],
        "labels_file": "labels.csv",
        "class_names": CLASSES,
        "options": {**OPTIONS, "image_size": [size] * dims, "network_def": {**NETWORK, "spatial_dims": dims}},
        "accept": {"test_loss": 0.3},
    }
    (folder.parent / "site.json").write_text(json.dumps(site, indent=1), encoding="utf-8")
    return folder


def write_findings(folder: Path, patients: int = 40, size: int = 16, seed: int = 0) -> Path:
    """DICOM files with two findings, each a bright block of its own; some are not mentioned.

    Args:
        folder: made anew; ``labels.csv`` and ``site.json`` lie beside it.
        patients: how many, with two images each.
        size: edge in pixels.
        seed: of the pixels.
    """
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = []
    for number in range(patients):
        split = _split(number, patients)
        for view in range(2):
            findings = generator.integers(2, size=2)
            pixels = picture(generator, 0, (size, size))
            pixels[: size // 3, : size // 3] += 900 * findings[0].astype(np.int16)
            pixels[-(size // 3) :, -(size // 3) :] += 900 * findings[1].astype(np.int16)
            file = f"scan{number:04d}{'ab'[view]}.dcm"
            write_dicom(folder / file, f"PAT-{number:04d}", pixels.clip(0, 4095), "FM"[number % 2])
            known = ["" if generator.random() < 0.1 else str(value) for value in findings]
            rows.append({"file": file, "split": split, "Cardiomegaly": known[0], "Edema": known[1]})
    pd.DataFrame(rows).to_csv(folder.parent / "labels.csv", index=False)
    site = {
        "model": "chest",
        "labels_file": "labels.csv",
        "class_names": ["Cardiomegaly", "Edema"],
        "multi_label": True,
        "options": {**OPTIONS, "image_size": [size, size], "network_def": NETWORK},
        "accept": {"test_loss": 0.3},
    }
    (folder.parent / "site.json").write_text(json.dumps(site, indent=1), encoding="utf-8")
    return folder
