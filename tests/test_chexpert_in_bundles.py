"""CheXpert through whole runs of the bundles, on a small data set in exactly its layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import pytest
import torch
from bundle_runs import FEWEST_EPOCHS, METHODS, ONLY_CLASSES, WITHOUT_EPOCHS, Workplace, files_below, messages
from chexpert_layout import write_chexpert
from monai.bundle import ConfigParser
from PIL import Image
from sklearn.metrics import roc_auc_score

from monai_unlearn.bundle import bundle_path
from monai_unlearn.checkpoint import load_checkpoint
from monai_unlearn.data import FileImages, read_chexpert, remove_cached

pytest_plugins = ["bundle_runs"]

SIZE = 24
FINDINGS = ["Cardiomegaly", "Edema", "Pleural Effusion", "Support Devices"]
NETWORK = {
    "network_def": {
        "_target_": "monai.networks.nets.ResNet",
        "block": "basic",
        "layers": [1, 1, 1, 1],
        "block_inplanes": [4, 4, 8, 8],
        "spatial_dims": 2,
        "n_input_channels": "$@data.channels",
        "num_classes": "$@data.num_classes",
        "conv1_t_size": 3,
        "no_max_pool": True,
    }
}
SMALL = {"image_size": SIZE, "train_epochs": 6, "train_lr": 0.02, "batch_size": 16, "num_workers": 0, "device": "cpu"}
REQUEST = {"reference": "case 12", "include": [{"rule": 'sex == "female" and age > 60'}]}


class Hospital:
    """A place that has CheXpert, with an original model of its own."""

    def __init__(self, folder: Path, dataset_dir: Path) -> None:
        self.folder, self.dataset_dir = folder, dataset_dir

    def bundle(self, run_id: str, name: str, **settings: Any) -> None:
        """Run a bundle with the CheXpert part and a small network."""
        (self.folder / "network.json").write_text(json.dumps(NETWORK), encoding="utf-8")
        files = [str(bundle_path(name)), str(bundle_path("chexpert")), str(self.folder / "network.json")]
        own = {"dataset_dir": str(self.dataset_dir), "findings": FINDINGS}
        monai.bundle.run(run_id, config_file=files, **{**own, **SMALL, **settings})

    def unlearn(self, method: str = "random_labeling", request: dict | None = None, **settings: Any) -> dict[str, Any]:
        """Unlearn; returns the report."""
        (self.folder / "request.json").write_text(json.dumps(request or REQUEST), encoding="utf-8")
        own: dict[str, Any] = {"reference": False, "forget_request": "request.json"}
        own |= {} if method in WITHOUT_EPOCHS else {"epochs": FEWEST_EPOCHS.get(method, 1)}
        self.bundle("unlearn", method, **{**own, **settings})
        output = self.folder / settings.get("output_dir", f"runs/{method}")
        return json.loads((output / "report.json").read_text(encoding="utf-8"))

    def original(self) -> Path:
        """The model that was trained here."""
        return next((self.folder / "runs" / "models").glob("*/model.pt"))


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose findings are easily seen, so that a small network learns them at once."""
    return write_chexpert(tmp_path_factory.mktemp("chexpert"), 50, size=SIZE, n_valid=24, strength=3.0, noise=0.0)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, dataset_dir: Path) -> Path:
    """``runs/models`` after a training."""
    hospital = Hospital(tmp_path_factory.mktemp("trained"), dataset_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(hospital.folder)
        hospital.bundle("train", "train")
    return hospital.folder / "runs" / "models"


@pytest.fixture
def hospital(empty_workplace: Workplace, trained: Path, dataset_dir: Path) -> Hospital:
    """A working directory in which the original is there already."""
    shutil.copytree(trained, empty_workplace.models)
    return Hospital(empty_workplace.folder, dataset_dir)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ONLY_CLASSES])
def test_every_method_unlearns_findings(hospital: Hospital, method: str) -> None:
    before = files_below(hospital.dataset_dir) | files_below(hospital.folder)
    # Three images to select on are too few to rewind by.
    report = hospital.unlearn(method, **({"rewind": False} if method == "scrub" else {}))
    after = files_below(hospital.dataset_dir) | files_below(hospital.folder)
    assert {path: after[path] for path in before if path != "request.json"} == {
        path: digest for path, digest in before.items() if path != "request.json"
    }
    assert report["task"] == "multi-label"
    assert report["request"]["unit"] == "patient"
    assert report["request"]["reference"] == "case 12"
    data = read_chexpert(hospital.dataset_dir, FINDINGS)
    women = data.train.attributes.query("sex == 'female' and age > 60")["patient"].unique()
    forgotten = data.train.attributes["patient"].isin(women)
    assert report["models"]["unlearned"]["forget"]["n"] == forgotten.sum() > 0
    assert report["models"]["unlearned"]["retain"]["n"] == (~forgotten).sum()
    assert report["models"]["unlearned"]["test"]["n"] == len(data.test)


@pytest.mark.parametrize("method", ONLY_CLASSES)
def test_a_method_of_classes_alone_refuses_findings_before_anything_is_trained(hospital: Hospital, method: str) -> None:
    kept = files_below(hospital.folder / "runs" / "models")
    with pytest.raises(RuntimeError) as caught:
        hospital.unlearn(method, reference=True)
    assert "multi_label should be false with" in messages(caught.value)
    assert "say." in messages(caught.value), "another method is named"
    assert not (hospital.folder / "runs" / method).exists()
    assert files_below(hospital.folder / "runs" / "models") == kept


def test_figures_per_finding_are_scikit_learns_of_the_written_model(hospital: Hospital) -> None:
    report = hospital.unlearn("saliency", batchnorm="frozen")
    data = read_chexpert(hospital.dataset_dir, FINDINGS)
    parser = ConfigParser({**NETWORK, "data": data})
    network = parser.get_parsed_content("network_def").eval()
    load_checkpoint(hospital.folder / "runs/saliency/unlearned_model.pt").load_into(network)
    pixels = np.stack([np.asarray(Image.open(Path(data.test.root) / file).convert("L")) for file in data.test.files])
    with torch.no_grad():
        logits = network(torch.from_numpy(pixels[:, None] / 127.5 - 1).float()).numpy()
    test = report["models"]["unlearned"]["test"]
    assert list(test["auroc_per_finding"]) == FINDINGS
    expected = {}
    for column, name in enumerate(FINDINGS):
        truth = data.test.labels[:, column]
        expected[name] = roc_auc_score(truth, logits[:, column]) if len(set(truth)) == 2 else None
        assert test["auroc_per_finding"][name] == (expected[name] and pytest.approx(expected[name]))
    assert test["auroc"] == pytest.approx(np.mean([value for value in expected.values() if value is not None]))


@pytest.mark.pages
def test_a_finding_of_one_class_is_left_out_by_name(
    hospital: Hospital, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("one_class")
    root = shutil.copytree(hospital.dataset_dir, folder / "chexpert")
    table = (root / "valid.csv").read_text().splitlines()
    column = table[0].split(",").index("Edema")
    rows = [line.split(",") for line in table]
    for row in rows[1:]:
        row[column] = "0.0"
    (root / "valid.csv").write_text("\n".join(",".join(row) for row in rows) + "\n")
    hospital.dataset_dir = root
    hospital.bundle("train", "train")
    test = hospital.unlearn()["models"]["unlearned"]["test"]
    assert test["auroc_per_finding"]["Edema"] is None
    others = [value for value in test["auroc_per_finding"].values() if value is not None]
    assert test["auroc"] == pytest.approx(np.mean(others))
    page = (hospital.folder / "runs/random_labeling/report.html").read_text()
    assert "Edema" in page


@pytest.mark.pages
def test_someone_elses_model_is_compared_on_valid_csv_and_the_report_says_what_that_costs(hospital: Hospital) -> None:
    report = hospital.unlearn(original_checkpoint=str(hospital.original()))
    data = read_chexpert(hospital.dataset_dir, FINDINGS, original_checkpoint="model.pt")
    assert len(data.train) > len(read_chexpert(hospital.dataset_dir, FINDINGS).train)
    figures = report["models"]["original"]
    assert figures["forget"]["n"] + figures["retain"]["n"] == len(data.train)
    assert figures["validation"]["n"] < len(data.validation) == 24
    assert figures["validation"] == figures["test"]
    assert "There is no test set" in " ".join(report["notes"])
    assert "valid.csv" in " ".join(report["notes"])
    assert "can be told from 0.5 only when" in " ".join(report["notes"])
    assert "Every other image of train.csv" in (hospital.folder / "runs/random_labeling/report.html").read_text()


def test_patients_held_out_from_someone_elses_model_are_the_unseen_ones(hospital: Hospital) -> None:
    held_out = [f"patient{number:05d}" for number in range(1, 13)]
    (hospital.folder / "unseen.txt").write_text("\n".join(held_out))
    report = hospital.unlearn(original_checkpoint=str(hospital.original()), heldout_patients="unseen.txt")
    figures = report["models"]["original"]
    data = read_chexpert(hospital.dataset_dir, FINDINGS)
    table = [*data.train.attributes["patient"], *data.validation.attributes["patient"]]
    rest = sum(patient not in held_out for patient in table)
    assert figures["forget"]["n"] + figures["retain"]["n"] == rest
    assert figures["test"]["n"] == 24
    assert not [patient for patient in held_out if patient in json.dumps(report)]


def test_the_kept_original_is_found_again_without_being_named(
    hospital: Hospital, capsys: pytest.CaptureFixture[str]
) -> None:
    hospital.bundle("train", "train")
    assert "--original_checkpoint" not in capsys.readouterr().out.partition("To unlearn from it")[2]
    report = hospital.unlearn()
    assert Path(report["provenance"]["original_checkpoint"]) == hospital.original().relative_to(hospital.folder)


def test_without_an_original_the_message_tells_how_to_train_one(hospital: Hospital) -> None:
    with pytest.raises(RuntimeError) as caught:
        hospital.unlearn(train_epochs=7)
    assert "`run train`, and bundles/train.json in the place of the method's file" in messages(caught.value)


@pytest.mark.parametrize("cache", ["none", "memory", "disk"])
def test_a_cache_changes_nothing_but_the_time(hospital: Hospital, cache: str) -> None:
    plain = hospital.unlearn(output_dir="runs/plain")
    report = hospital.unlearn(cache=cache, cache_dir="cache", output_dir="runs/cached")
    first, second = (
        torch.load(hospital.folder / f"runs/{name}/unlearned_model.pt", weights_only=True)
        for name in ("plain", "cached")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert plain["models"] == report["models"]


def test_decoded_copies_of_the_forgotten_go_from_the_cache_on_disk(hospital: Hospital) -> None:
    report = hospital.unlearn(cache="disk", cache_dir="cache")
    original = report["models"]["original"]
    left = sum(original[name]["n"] for name in ("retain", "validation", "test"))
    assert len(list((hospital.folder / "cache").iterdir())) == left
    forgotten = original["forget"]["n"]
    assert f"{forgotten} decoded copies" in " ".join(report["notes"])


def test_a_run_that_fails_leaves_no_decoded_copy_of_the_forgotten(hospital: Hospital) -> None:
    data = read_chexpert(hospital.dataset_dir, FINDINGS)
    with pytest.raises(RuntimeError) as caught:
        hospital.unlearn(cache="disk", cache_dir="cache", lr=1e30)
    assert "finite" in messages(caught.value)
    left = len(list((hospital.folder / "cache").iterdir()))
    assert 0 < left < sum(map(len, data.parts().values()))
    assert remove_cached(data.train, range(len(data.train)), hospital.folder / "cache") < len(data.train)
    assert (hospital.folder / "cache").stat().st_mode & 0o077 == 0


def test_one_finding_is_enough(hospital: Hospital) -> None:
    hospital.bundle("train", "train", findings=["Edema"])
    report = hospital.unlearn("saliency", findings=["Edema"])
    assert list(report["models"]["unlearned"]["test"]["auroc_per_finding"]) == ["Edema"]


def test_the_number_of_workers_belongs_to_no_recipe(hospital: Hospital) -> None:
    report = hospital.unlearn(num_workers=1)
    assert Path(report["provenance"]["original_checkpoint"]) == hospital.original().relative_to(hospital.folder)


def test_each_image_is_decoded_once_with_a_cache(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read_chexpert(hospital.dataset_dir, FINDINGS)
    decoded = 0
    convert = Image.Image.resize

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return convert(*args, **options)

    monkeypatch.setattr(Image.Image, "resize", counting)
    hospital.unlearn(cache="memory")
    assert decoded <= sum(map(len, data.parts().values()))


def test_nothing_is_decoded_that_a_step_does_not_need(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    take = FileImages.__getitem__
    monkeypatch.setattr(FileImages, "__getitem__", lambda self, i: decoded.append(i) or take(self, i))
    with pytest.raises(RuntimeError) as caught:
        hospital.unlearn(request={"include": [{"patient": "patient99999"}]})
    assert "match" in messages(caught.value)
    assert len(decoded) == 1  # the one that the network is tried with


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda path: path.unlink(), "1 are missing and 0 are empty"),
    "empty file": (lambda path: path.write_bytes(b""), "0 are missing and 1 are empty"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_files_end_the_run_or_are_left_out_and_noted(hospital: Hospital, case: str, tmp_path: Path) -> None:
    hospital.dataset_dir = shutil.copytree(hospital.dataset_dir, tmp_path / "odd" / "chexpert")
    damage, message = ODD[case]
    damage(sorted(hospital.dataset_dir.glob("train/*/*/view1_frontal.jpg"))[-1])
    with pytest.raises(RuntimeError) as caught:
        hospital.unlearn()
    assert message in messages(caught.value)
    assert "--on_broken skip" in messages(caught.value)
    hospital.bundle("train", "train", on_broken="skip")
    report = hospital.unlearn(on_broken="skip")
    assert message in " ".join(report["notes"])


def test_a_damaged_image_is_told_by_position_alone(hospital: Hospital, tmp_path: Path) -> None:
    hospital.dataset_dir = shutil.copytree(hospital.dataset_dir, tmp_path / "odd" / "chexpert")
    file = sorted(hospital.dataset_dir.glob("train/*/*/view1_frontal.jpg"))[-1]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RuntimeError) as caught:
        hospital.bundle("train", "train")
    text = messages(caught.value)
    assert "of the train images, counted from 0, could not be read" in text
    assert file.parts[-3] not in text
    assert not (hospital.folder / "runs/random_labeling").exists()


@pytest.mark.parametrize("part", [None, "resnet18", "resnet50"])
def test_monais_networks_take_a_step(hospital: Hospital, part: str | None) -> None:
    files = [bundle_path("train"), bundle_path("chexpert"), *([] if part is None else [bundle_path(part)])]
    parser = ConfigParser(ConfigParser.load_config_files([str(file) for file in files]))
    data = read_chexpert(hospital.dataset_dir, FINDINGS)
    parser.update({"data": data, "image_size": 32, "num_workers": 0, "batch_size": 4})
    network = parser.get_parsed_content("network_def")
    assert type(network).__name__ == ("DenseNet121" if part is None else "ResNet")
    loader, loss = parser.get_parsed_content("train_loader"), parser.get_parsed_content("loss_function")
    batch = next(iter(loader))
    value = loss(network(batch["image"]), batch["label"])
    value.backward()
    assert batch["image"].shape == (4, 1, 32, 32)
    assert torch.isfinite(value)
    assert all(weight.grad is not None for weight in network.parameters())
