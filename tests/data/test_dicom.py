"""DICOM archives: headers, labels and pixels, on pydicom's own files and on generated archives."""

from __future__ import annotations

import logging
import pickle
import re
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from monai.data import PydicomReader
from monai.transforms import LoadImaged
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_windowing, get_decoder
from pydicom.uid import (
    UID,
    BasicTextSRStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEGLSLossless,
    generate_uid,
)

from monai_unlearn.data import dicom, dicom_pixels
from monai_unlearn.data.dicom import dicom_index, quiet_pydicom, read_dicom
from monai_unlearn.data.dicom_pixels import DicomViewReader, as_displayed
from monai_unlearn.data.image_data import make_loader
from monai_unlearn.data.image_files import file_dataset

TEST_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
SECRET = "SECRET^7"

Write = Callable[..., pydicom.FileDataset]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a small image into the archive; keywords of DICOM change or, with None, remove elements."""

    def write(
        name: str, pixels: np.ndarray | None = None, syntax: UID = ExplicitVRLittleEndian, **elements: Any
    ) -> Any:
        pixels = np.arange(48, dtype=np.uint16).reshape(6, 8) if pixels is None else pixels
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = syntax, elements.get("SOPClassUID", CTImageStorage)
        meta.MediaStorageSOPInstanceUID = elements.get("SOPInstanceUID") or generate_uid()
        data = pydicom.FileDataset(name, {}, file_meta=meta, preamble=b"\0" * 128)
        values = {
            "SOPClassUID": CTImageStorage,
            "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
            "PatientID": SECRET,
            "PatientName": SECRET,
            "StudyInstanceUID": generate_uid(entropy_srcs=["study"]),
            "SeriesInstanceUID": generate_uid(entropy_srcs=["series"]),
            "Modality": "CT",
            "PatientSex": "F",
            "PatientAge": "045Y",
            "Manufacturer": "Maker",
            "ManufacturerModelName": "Model 1",
            "InstanceNumber": 1,
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "Rows": pixels.shape[0],
            "Columns": pixels.shape[1],
            "BitsAllocated": 16,
            "BitsStored": 16,
            "HighBit": 15,
            "PixelRepresentation": 0 if pixels.dtype == np.uint16 else 1,
            "PixelData": pixels.tobytes(),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some values are wrong on purpose
            for keyword, value in (values | elements).items():
                if value is not None:
                    setattr(data, keyword, value)
            path = tmp_path / "archive" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            data.save_as(path)
        return data

    return write


@pytest.fixture
def archive(tmp_path: Path, write: Write) -> Path:
    """20 patients with two images each in two studies."""
    for p in range(20):
        for s in range(2):
            pixels = np.full((6, 8), 100 * p + s, dtype=np.uint16) + np.arange(8, dtype=np.uint16)
            write(f"{p:02}/{s}/IM", pixels, PatientID=f"P{p:02}", StudyInstanceUID=f"1.2.{p}.{s}")
    return tmp_path / "archive"


def _labels(folder: Path, **columns: Any) -> Path:
    file = folder / "labels.csv"
    pd.DataFrame(columns).to_csv(file, index=False)
    return file


def _by_patient(folder: Path) -> Path:
    return _labels(folder, PatientID=[f"P{p:02}" for p in range(20)], label=["sick", "well"] * 10)


def test_quiet_ends_where_threads_overlap() -> None:
    log = logging.getLogger("pydicom")
    before = log.level, list(warnings.filters)

    def read(_: int) -> int:
        with quiet_pydicom():
            time.sleep(0.001)
            return log.level

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(read, range(40))) == {logging.CRITICAL}
    assert (log.level, warnings.filters) == before


def test_pydicoms_own_files_are_listed_or_counted(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"All .* images should be usable, but got .*--on_broken skip") as error:
        dicom_index(TEST_FILES)
    for reason in ("without a patient ID", "4 multi-frame", "1 with fewer pixels", "1 in palette", "no decoder"):
        assert reason in str(error.value)
    caplog.set_level(logging.INFO)
    index = dicom_index(TEST_FILES, on_broken="skip").set_index("file")
    assert "without an image" in caplog.text
    assert "Left out: " in caplog.text
    ct = index.loc["CT_small.dcm"]
    assert (ct["patient"], ct["modality"], ct["manufacturer"]) == ("1CT1", "CT", "GE MEDICAL SYSTEMS")
    assert (ct["rows"], ct["columns"], ct["photometric"]) == (128, 128, "MONOCHROME2")
    assert index.loc["examples_overlay.dcm", ["sex", "age", "scanner"]].tolist() == ["M", 58, "Avanto"]
    assert index.loc["dicomdirtests/77654033/CR1/6154", "photometric"] == "MONOCHROME1"  # has no ending
    absent = [
        "MR_truncated.dcm",
        "rtdose.dcm",
        "liver_1frame.dcm",
        "test-SR.dcm",
        "examples_palette.dcm",
        "no_meta.dcm",
    ]
    assert not set(absent) & set(index.index)
    # Only a damaged JPEG 2000 stream is found out by decoding alone.
    undecodable = []
    with quiet_pydicom():
        for file in index.index:
            try:
                _ = pydicom.dcmread(TEST_FILES / file).pixel_array
            except RuntimeError:
                undecodable.append(file)
    assert undecodable == ["JPEG2000-embedded-sequence-delimiter.dcm"]


def test_the_index_has_what_the_header_says(tmp_path: Path, write: Write) -> None:
    written = write("deep/er/no_ending", PatientSex="M", PatientAge="018M", PatientID=" 7 ")
    (tmp_path / "archive" / "notes.txt").write_text("no image")
    index = dicom_index(tmp_path / "archive")
    assert index.to_dict("records") == [
        {
            "file": "deep/er/no_ending",
            "patient": "7",
            "study": written.StudyInstanceUID,
            "series": written.SeriesInstanceUID,
            "instance": written.SOPInstanceUID,
            "sex": "M",
            "manufacturer": "Maker",
            "scanner": "Model 1",
            "modality": "CT",
            "photometric": "MONOCHROME2",
            "age": 1.5,
            "frames": 1,
            "rows": 6,
            "columns": 8,
        }
    ]


@pytest.mark.parametrize(
    ("age", "years"),
    [("045Y", 45), ("018M", 1.5), ("052W", 0.997), ("010D", 0.027), ("000Y", 0), ("", None), ("45", None)],
)
def test_ages_are_years(tmp_path: Path, write: Write, age: str, years: float | None) -> None:
    write("a.dcm", PatientAge=age)
    found = dicom_index(tmp_path / "archive")["age"][0]
    assert np.isnan(found) if years is None else found == pytest.approx(years, abs=1e-3)


def test_missing_elements_are_missing_values(tmp_path: Path, write: Write) -> None:
    write("a.dcm", PatientSex=None, PatientAge=None, Manufacturer="", ManufacturerModelName=None)
    row = dicom_index(tmp_path / "archive").loc[0, ["sex", "age", "manufacturer", "scanner"]]
    assert row.isna().all()


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no patient": ({"PatientID": None}, "without a patient ID"),
    "empty patient": ({"PatientID": ""}, "without a patient ID"),
    "frames": ({"NumberOfFrames": 2, "PixelData": bytes(192)}, "multi-frame"),
    "compression": ({"syntax": JPEGLSLossless, "PixelData": pydicom.encaps.encapsulate([b"1234"])}, "no decoder"),
    "unknown syntax": ({"syntax": UID("1.2.3.4")}, "no decoder"),
    "palette": ({"PhotometricInterpretation": "PALETTE COLOR"}, "palette"),
    "few pixels": ({"PixelData": bytes(90)}, "fewer pixels"),
    "no size": ({"Rows": None}, "could not be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_image_is_refused_or_left_out_and_counted(
    tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    elements, reason = BROKEN[case]
    if case == "compression" and get_decoder(JPEGLSLossless).is_available:
        pytest.skip("a decoder of JPEG-LS is installed here")
    write("good.dcm")
    write(f"{SECRET}.dcm", **elements)
    with pytest.raises(ValueError, match=f"All 2 images should be usable, but got 1 .*{reason}") as error:
        dicom_index(tmp_path / "archive")
    assert SECRET not in str(error.value)
    assert dicom_index(tmp_path / "archive", on_broken="skip")["file"].tolist() == ["good.dcm"]
    assert re.search(f"Left out: 1 .*{reason}", caplog.text)
    assert SECRET not in caplog.text


@pytest.mark.parametrize("size", [100, 300, 600])
def test_a_file_that_was_cut_off_is_never_taken(tmp_path: Path, write: Write, size: int) -> None:
    write("good.dcm")
    write("cut.dcm")
    file = tmp_path / "archive" / "cut.dcm"
    whole = file.read_bytes()
    file.write_bytes(whole[: min(size, len(whole) - 10)])
    with pytest.raises(ValueError, match=r"1 could not be read|1 with fewer pixels than the header says"):
        dicom_index(tmp_path / "archive")
    assert dicom_index(tmp_path / "archive", on_broken="skip")["file"].tolist() == ["good.dcm"]


def test_reports_plans_and_segmentations_are_no_broken_images(
    tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write("good.dcm")
    write("report.dcm", Modality="SR", PixelData=None, SOPClassUID=BasicTextSRStorage)
    write("segmentation.dcm", Modality="SEG")
    (tmp_path / "archive" / "table.csv").write_text("a,b")
    assert dicom_index(tmp_path / "archive")["file"].tolist() == ["good.dcm"]
    assert "Of 4 files, these are no images: 2 without an image" in caplog.text
    assert "1 no DICOM files" in caplog.text


def test_a_folder_without_images_says_what_is_in_it(tmp_path: Path, write: Write) -> None:
    with pytest.raises(FileNotFoundError, match="dataset_dir should be a folder"):
        dicom_index(tmp_path / "archive")
    (tmp_path / "archive").mkdir()
    with pytest.raises(ValueError, match="of 0 files none can be used"):
        dicom_index(tmp_path / "archive")
    write("a.dcm", PatientID=None)
    with pytest.raises(ValueError, match="of 1 files none can be used: 1 without a patient ID"):
        dicom_index(tmp_path / "archive", on_broken="skip")


@pytest.mark.parametrize("options", [{"level": "study"}, {"on_broken": "drop"}])
def test_an_unknown_choice_is_refused(tmp_path: Path, options: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} should be"):
        dicom_index(tmp_path, **options)


def test_an_older_pydicom_is_refused_for_colour_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The label environment's tests run pydicom 2.4 itself."""
    for name in ("SC_rgb_small_odd.dcm", "CT_small.dcm"):
        shutil.copy(TEST_FILES / name, tmp_path)
    monkeypatch.setattr(dicom, "PYDICOM", 2)
    monkeypatch.setattr(dicom_pixels, "PYDICOM", 2)
    monkeypatch.setattr(dicom, "_decodable", lambda *_: True)
    with pytest.raises(ValueError, match="1 in colour, for which pydicom"):
        dicom_index(tmp_path)
    assert dicom_index(tmp_path, on_broken="skip")["file"].tolist() == ["CT_small.dcm"]
    with pytest.raises(ImportError, match=r"Colour images need pydicom 3\.0"):
        DicomViewReader().get_data(TEST_FILES / "SC_rgb_small_odd.dcm")


def test_nothing_is_said_of_ids_even_where_pydicom_would_quote_them(
    tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    caplog.set_level(logging.INFO)
    uid = f"1.2.{SECRET}"
    write("a.dcm", PatientID=SECRET * 20, StudyInstanceUID=uid, SOPInstanceUID=uid, PatientAge=SECRET)
    with pytest.warns(UserWarning, match="Invalid value for VR UI"):  # otherwise this test would show nothing
        _ = pydicom.dcmread(tmp_path / "archive" / "a.dcm").StudyInstanceUID
    caplog.clear()
    recwarn.clear()
    data = dicom_index(tmp_path / "archive")
    DicomViewReader().get_data(str(tmp_path / "archive" / "a.dcm"))
    assert data["study"][0] == uid
    assert SECRET not in caplog.text
    assert not [warning for warning in recwarn if SECRET in str(warning.message)]


def test_metadata_of_loaded_images_has_no_ids(tmp_path: Path, write: Write) -> None:
    write("a.dcm", PatientID=SECRET)
    image = LoadImaged("image", reader=DicomViewReader())({"image": str(tmp_path / "archive" / "a.dcm")})["image"]
    assert SECRET not in str(image.meta)
    assert image.shape == (8, 6)


def test_labels_of_patients_go_to_all_their_images(archive: Path, tmp_path: Path) -> None:
    data = read_dicom(archive, _by_patient(tmp_path))
    assert data.class_names == ("sick", "well")
    assert data.channels == 1
    patients = []
    for part in data.parts().values():
        for file, label, patient in zip(part.files, part.labels, part.patients):
            assert file.split("/")[0] == patient[1:]
            assert label == int(patient[1:]) % 2
        patients.append(set(part.patients))
    assert sum(map(len, patients)) == 20
    assert not set.intersection(patients[0], patients[1]) | set.intersection(patients[1], patients[2])
    columns = ["patient", "study", "series", "instance", "sex", "manufacturer", "scanner", "modality", "age"]
    assert list(data.train.attributes) == columns
    assert "file" in data.train.index()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("patient", lambda row: row["patient"]),
        ("StudyInstanceUID", lambda row: row["study"]),
        ("SOPInstanceUID", lambda row: row["instance"]),
        ("file", lambda row: "./" + row["file"].replace("/", "\\")),
    ],
)
def test_a_label_belongs_to_whatever_its_table_names(archive: Path, tmp_path: Path, column: str, value: Any) -> None:
    index = dicom_index(archive)
    rows = index if column != "patient" else index.drop_duplicates("patient")
    labels = {value(row): i % 2 for i, (_, row) in enumerate(rows.iterrows())}
    data = read_dicom(archive, _labels(tmp_path, **{column: list(labels), "label": list(labels.values())}))
    full = index.set_index("file")
    for part in data.parts().values():
        for file, label in zip(part.files, part.labels):
            assert label == labels[value({**full.loc[file], "file": file})]


def test_the_finest_column_counts_and_coarser_ones_must_agree(archive: Path, tmp_path: Path) -> None:
    index = dicom_index(archive)
    columns = {"study": index["study"], "patient": index["patient"], "label": [0, 1] * 20}
    data = read_dicom(archive, _labels(tmp_path, **columns))
    assert (data.train.labels.mean(), data.validation.labels.mean()) == (0.5, 0.5)
    columns["patient"] = index["patient"].replace("P03", "P04")
    with pytest.raises(ValueError, match="agree on the patient of each study, but don't for 2 of 40") as error:
        read_dicom(archive, _labels(tmp_path, **columns))
    assert "P03" not in str(error.value)


def test_a_column_of_the_table_takes_the_place_of_the_headers(archive: Path, tmp_path: Path) -> None:
    ids = [f"P{p:02}" for p in range(20)]
    file = _labels(tmp_path, patient=ids, label=[0, 1] * 10, sex=["M"] * 20, age=range(20), site=["007"] * 20)
    attributes = read_dicom(archive, file).train.attributes
    assert (attributes["sex"] == "M").all()
    assert attributes["age"].tolist() == [int(patient[1:]) for patient in attributes["patient"]]
    assert (attributes["site"] == "007").all()


def test_images_and_labels_that_do_not_match_are_refused_or_counted(
    archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [f"P{p:02}" for p in range(2, 20)] + ["P77", None]
    file = _labels(tmp_path, patient=ids, label=[0, 1] * 8 + [1, None, 0, 1])
    reasons = "6 images without a label, 1 labels without a value for patient, 1 labels without an image"
    with pytest.raises(ValueError, match=f"40 images and 19 labels should belong together, but got {reasons}"):
        read_dicom(archive, file)
    data = read_dicom(archive, file, on_broken="skip")
    assert sum(map(len, data.parts().values())) == 34
    assert data.notes == (f"Left out: {reasons} (by patient).",)
    assert reasons in caplog.text
    with pytest.raises(ValueError, match="none of 40 images has a label by patient") as error:
        read_dicom(archive, _labels(tmp_path, patient=["Q1", "Q2"], label=[0, 1]), on_broken="skip")
    assert "Q1" not in str(error.value)


def test_a_table_that_names_no_level_is_refused_without_its_columns(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a column file, instance, series, study or patient") as error:
        read_dicom(archive, _labels(tmp_path, **{SECRET: ["P01"], "label": [1]}))  # a file without a header
    assert SECRET not in str(error.value)


def _slices(write: Write, folder: str, n: int = 5, **elements: Any) -> None:
    for z in range(n):
        elements = {"SeriesInstanceUID": f"1.2.{sum(map(ord, folder))}", **elements}
        position = {"ImagePositionPatient": [0, 0, 2.5 * z], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        pixels = np.full((6, 8), z, dtype=np.uint16)
        # Names in another order than the slices.
        values = {"InstanceNumber": z + 1, "PixelSpacing": [1, 1], **position, **elements}
        write(f"{folder}/{9 - z}.dcm", pixels, **values)


def test_a_series_is_one_volume_in_the_order_of_its_slices(tmp_path: Path, write: Write) -> None:
    _slices(write, "a", n=5, WindowCenter=2.5, WindowWidth=5, PatientID="A")
    _slices(write, "b", n=3, PatientID="B")
    (tmp_path / "archive" / "a" / "notes.txt").write_text("no slice")
    index = dicom_index(tmp_path / "archive", level="series")
    assert index[["file", "patient", "slices"]].values.tolist() == [["a", "A", 5], ["b", "B", 3]]
    assert not {"instance", "frames", "number"} & set(index)
    load = LoadImaged("image", reader=DicomViewReader())
    volume = load({"image": str(tmp_path / "archive" / "a")})["image"]
    assert volume.shape == (8, 6, 5)
    assert volume.affine[2, 2] == 2.5
    expected = np.clip((np.arange(5) - 2) / 4 + 0.5, 0, 1)  # PS3.3 C.11.2.1.2.1
    np.testing.assert_allclose(volume[3, 3].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda write: write("a/x.dcm", SeriesInstanceUID="1.2.9"), "not alone in one folder"),
        (lambda write: _slices(write, "a/below", PatientID="B"), "not alone in one folder"),
        (lambda write: write("z/x.dcm", SeriesInstanceUID="1.2.97", InstanceNumber=8), "not alone in one folder"),
        (lambda write: write("a/x.dcm", SeriesInstanceUID="1.2.97", PatientID=None), "a file that can't be used"),
        (lambda write: write("a/x.dcm", PixelData=None, SOPClassUID=BasicTextSRStorage), "a file that can't be used"),
        (
            lambda write: write("a/x.dcm", np.zeros((5, 8), np.uint16), SeriesInstanceUID="1.2.97", InstanceNumber=8),
            "several sizes",
        ),
        (lambda write: write("a/x.dcm", SeriesInstanceUID="1.2.97", InstanceNumber=2), "different instance numbers"),
        (lambda write: write("a/x.dcm", SeriesInstanceUID="1.2.97", InstanceNumber=None), "different instance numbers"),
    ],
)
def test_a_series_that_monai_would_not_load_as_one_volume_is_broken(
    tmp_path: Path, write: Write, change: Callable, reason: str
) -> None:
    _slices(write, "a")
    _slices(write, "good")
    change(write)
    index = dicom_index(tmp_path / "archive", level="series", on_broken="skip")
    assert "a" not in index["file"].tolist()
    assert "good" in index["file"].tolist()
    with pytest.raises(ValueError, match=f"{reason}|without a patient ID"):
        dicom_index(tmp_path / "archive", level="series")


def test_a_single_slice_is_no_volume(tmp_path: Path, write: Write) -> None:
    write("a/x.dcm")
    with pytest.raises(ValueError, match="1 series of one slice"):
        dicom_index(tmp_path / "archive", level="series")


def _oracle(file: Path) -> np.ndarray:
    """The picture by pydicom alone: rescaled, windowed, and turned over where small values are bright."""
    header = pydicom.dcmread(file)
    values = apply_modality_lut(header.pixel_array, header).astype(np.float64)
    if "WindowCenter" in header:
        values = apply_windowing(values, header)
        low = -(2 ** (header.BitsStored - 1)) if header.PixelRepresentation else 0
        ends = np.array([low, low + 2**header.BitsStored - 1]) * float(header.get("RescaleSlope", 1))
        low, high = ends + float(header.get("RescaleIntercept", 0))
    else:
        low, high = values.min(), values.max()
    values = (values - low) / (high - low)
    return 1 - values if header.PhotometricInterpretation == "MONOCHROME1" else values


def _shown(file: Path, **options: Any) -> np.ndarray:
    pixels, _ = DicomViewReader(swap_ij=False, **options).get_data(str(file))
    assert pixels.dtype == np.float32
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    return pixels


@pytest.mark.parametrize(
    "name",
    ["CT_small.dcm", "MR_small.dcm", "MR_small_bigendian.dcm", "J2K_pixelrep_mismatch.dcm", "examples_overlay.dcm",
     "693_J2KI.dcm", "dicomdirtests/77654033/CR1/6154", "dicomdirtests/98892003/MR1/15820"],
)  # fmt: skip
def test_real_images_look_as_pydicom_shows_them(name: str) -> None:
    np.testing.assert_allclose(_shown(TEST_FILES / name), _oracle(TEST_FILES / name), atol=1e-5)


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_every_window_function_is_pydicoms(tmp_path: Path, write: Write, function: str | None, kind: type) -> None:
    pixels = np.random.RandomState(0).randint(0, 4000, (6, 8)).astype(kind)
    window = {"WindowCenter": [300, 1], "WindowWidth": [900, 2], "VOILUTFunction": function}
    write("a", pixels, RescaleSlope="0.5", RescaleIntercept="-100", **window)
    shown, expected = _shown(tmp_path / "archive" / "a"), _oracle(tmp_path / "archive" / "a")
    np.testing.assert_allclose(shown, expected, atol=1e-5)
    assert 0 < shown.mean() < 1


def test_ct_small_in_a_window_of_ones_own() -> None:
    shown = _shown(TEST_FILES / "CT_small.dcm", window=(40, 400))
    header = pydicom.dcmread(TEST_FILES / "CT_small.dcm")
    units = header.pixel_array * float(header.RescaleSlope) + float(header.RescaleIntercept)
    expected = np.empty(units.shape)
    for row, column in np.ndindex(*units.shape):  # PS3.3 C.11.2.1.2.1
        x = units[row, column]
        expected[row, column] = 0 if x <= 39.5 - 399 / 2 else 1 if x > 39.5 + 399 / 2 else (x - 39.5) / 399 + 0.5
    np.testing.assert_allclose(shown, expected, atol=1e-6)
    assert (shown == 0).any()
    assert ((shown > 0) & (shown < 1)).any()


@pytest.mark.parametrize("window", [None, (2000, 1000)])
@pytest.mark.parametrize("in_file", [{}, {"WindowCenter": 1500, "WindowWidth": 2000}])
def test_monochrome1_gives_the_picture_of_monochrome2(tmp_path: Path, write: Write, window: Any, in_file: dict) -> None:
    pixels = np.random.RandomState(1).randint(0, 4096, (6, 8)).astype(np.uint16)
    turned = (4095 - pixels).astype(np.uint16)
    write("two", pixels, **in_file)
    # The window of the turned values: LINEAR ones are from centre - 0.5.
    turned_window = {"WindowCenter": 4096 - 1500, "WindowWidth": 2000} if in_file else {}
    write("one", turned, PhotometricInterpretation="MONOCHROME1", **turned_window)
    own = None if window is None else (4096 - window[0], window[1])
    two = _shown(tmp_path / "archive" / "two", window=window)
    one = _shown(tmp_path / "archive" / "one", window=own)
    np.testing.assert_allclose(one, two, atol=1e-6)
    theirs = PydicomReader(swap_ij=False)
    raw, _ = theirs.get_data(theirs.read(str(tmp_path / "archive" / "one")))
    assert np.corrcoef(raw.ravel(), two.ravel())[0, 1] < -0.8  # what MONAI's own reader gives


def test_a_voi_lut_comes_before_the_window(tmp_path: Path, write: Write) -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [4, 10, 12], [0, 4095, 819, 1638]
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "US"
    pixels = np.array([[0, 10, 11, 12, 13, 999]], dtype=np.uint16)
    write("a", pixels, VOILUTSequence=[table], WindowCenter=1, WindowWidth=9, RescaleSlope=1, RescaleIntercept=0)
    np.testing.assert_allclose(_shown(tmp_path / "archive" / "a"), [[0, 0, 1, 0.2, 0.4, 0.4]], atol=1e-6)
    windowed = _shown(tmp_path / "archive" / "a", window=(10.5, 2))
    np.testing.assert_allclose(windowed, [[0, 0.5, 1, 1, 1, 1]], atol=1e-6)


@pytest.mark.parametrize("window", [{"WindowCenter": 5, "WindowWidth": 0}, {"WindowCenter": 5}, {"WindowWidth": ""}])
def test_a_window_that_is_none_is_smallest_to_largest_value(tmp_path: Path, write: Write, window: dict) -> None:
    write("a", np.array([[5, 10, 25]], dtype=np.uint16), **window)
    np.testing.assert_allclose(_shown(tmp_path / "archive" / "a"), [[0, 0.25, 1]], atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.integers(-32768, 32767), min_size=1, max_size=20),
    center=st.floats(-1e4, 1e4),
    width=st.floats(1, 1e4),
)
def test_a_window_keeps_order_and_range(values: list[int], center: float, width: float) -> None:
    header = pydicom.Dataset()
    header.PhotometricInterpretation = "MONOCHROME2"
    shown = as_displayed(np.array(sorted(values)), header, (center, width))
    assert (np.diff(shown) >= 0).all()
    assert shown.min() >= 0
    assert shown.max() <= 1
    header.PhotometricInterpretation = "MONOCHROME1"
    np.testing.assert_allclose(as_displayed(np.array(sorted(values)), header, (center, width)), 1 - shown, atol=1e-6)


def test_colour_becomes_luma() -> None:
    header = pydicom.dcmread(TEST_FILES / "SC_rgb_small_odd.dcm")
    expected = (header.pixel_array * [0.299, 0.587, 0.114]).sum(axis=-1) / 255
    np.testing.assert_allclose(_shown(TEST_FILES / "SC_rgb_small_odd.dcm"), expected, atol=1e-6)
    image = LoadImaged("image", reader=DicomViewReader(), ensure_channel_first=True)
    assert image({"image": str(TEST_FILES / "SC_rgb_small_odd.dcm")})["image"].shape == (1, 3, 3)


def test_axes_are_those_of_monais_reader(tmp_path: Path, write: Write) -> None:
    write("a", WindowCenter=24, WindowWidth=48)
    file = {"image": str(tmp_path / "archive" / "a")}
    ours = LoadImaged("image", reader=DicomViewReader())(file)["image"]
    theirs = LoadImaged("image", reader=PydicomReader())(file)["image"]
    assert ours.shape == theirs.shape == (8, 6)
    np.testing.assert_array_equal(np.argsort(ours.numpy().ravel()), np.argsort(theirs.numpy().ravel()))
    assert _shown(tmp_path / "archive" / "a").shape == (6, 8)


@pytest.mark.parametrize("window", [(40,), (40, 0), (float("nan"), 400), (1, 2, 3)])
def test_a_wrong_window_is_refused(window: tuple) -> None:
    with pytest.raises(ValueError, match="window should be centre and width"):
        DicomViewReader(window=window)


def test_an_unreadable_file_is_an_error_and_no_other_reader_tries(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / f"{SECRET}.dcm").write_bytes(b"no image")
    with pytest.raises(pydicom.errors.InvalidDicomError):
        LoadImaged("image", reader=DicomViewReader())({"image": str(tmp_path / f"{SECRET}.dcm")})
    assert SECRET not in caplog.text


def test_the_reader_has_no_memory(tmp_path: Path) -> None:
    """A cache on disk tells transforms apart by their pickles."""
    reader = DicomViewReader(window=(40, 400))
    before = pickle.dumps(reader)
    reader.get_data(str(TEST_FILES / "CT_small.dcm"))
    assert pickle.dumps(reader) == before


CONFIG = {
    "image_size": [32, 32],
    "window": None,
    "preprocessing": [
        {
            "_target_": "monai.transforms.LoadImaged",
            "keys": "image",
            "reader": {"_target_": "monai_unlearn.data.dicom_pixels.DicomViewReader", "window": "@window"},
        },
        {"_target_": "monai.transforms.EnsureChannelFirstd", "keys": "image"},
        {"_target_": "monai.transforms.Resized", "keys": "image", "spatial_size": "@image_size"},
        {"_target_": "monai.transforms.EnsureTyped", "keys": "image", "dtype": "$torch.float32", "track_meta": False},
    ],
    "augmentation": [{"_target_": "monai.transforms.RandFlipd", "keys": "image", "prob": 0.5, "spatial_axis": 0}],
    "imports": ["$import torch"],
}


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_a_network_takes_a_step_on_real_images(tmp_path: Path, cache: str) -> None:
    names = ["CT_small.dcm", "MR_small.dcm", "JPEG2000.dcm", "SC_rgb_rle.dcm", "examples_overlay.dcm"]
    for name in names:
        (tmp_path / "archive").mkdir(exist_ok=True)
        shutil.copy(TEST_FILES / name, tmp_path / "archive")
    parts = ["train", "train", "validation", "validation", "train"]
    data = read_dicom(tmp_path / "archive", _labels(tmp_path, file=names, label=[0, 1, 0, 1, 1], split=parts))
    assert data.test is None
    parser = ConfigParser(CONFIG)
    dataset = file_dataset(
        data.train,
        [*parser.get_parsed_content("preprocessing"), *parser.get_parsed_content("augmentation")],
        cache=cache,
    )
    batch = next(iter(make_loader(dataset, 3, shuffle=True)))
    assert batch["image"].shape == (3, 1, 32, 32)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2)
    )
    loss = torch.nn.functional.cross_entropy(network(torch.as_tensor(batch["image"])), batch["label"])
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() and parameter.grad.any() for parameter in network.parameters())


def test_series_go_through_a_loader_as_volumes(tmp_path: Path, write: Write) -> None:
    for name in "abcd":
        _slices(write, name, PatientID=name)
    table = _labels(tmp_path, patient=list("abcd"), label=[0, 1, 0, 1], split=["train", "train", "val", "val"])
    data = read_dicom(tmp_path / "archive", table, level="series")
    parser = ConfigParser({**CONFIG, "image_size": [8, 8, 8]})
    dataset = file_dataset(data.train, parser.get_parsed_content("preprocessing"), cache="memory", num_workers=2)
    batch = next(iter(make_loader(dataset, 2)))
    assert batch["image"].shape == (2, 1, 8, 8, 8)
    assert len(data.digest()) == 64
