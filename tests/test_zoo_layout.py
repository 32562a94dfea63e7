"""The bundle of our own in the model zoo's layout: MONAI's checks, and the commands of its README as they stand."""

from __future__ import annotations

import csv
import json
import logging
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from bundle_runs import files_below, sha256
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.networks.nets import ResNet

import monai_unlearn
from monai_unlearn.bundle import bundle_path
from monai_unlearn.data import read_request, resolve_request, synthetic_cells

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles" / "synthetic_cells"
# Appended to the README's runs, so that they take seconds: an image a patient and few epochs.
SMALL = {
    "train": "--epochs 4 --batch_size 16 --val_interval 4",
    "unlearn": "--unlearning::epochs 1 --batch_size 16",
    "all": "--cells::images_per_patient 1.0",
}


@contextmanager
def _logging_kept() -> Iterator[None]:
    """A bundle sets logging up for its process, which is that of other tests too."""
    loggers = [logging.getLogger(), logging.getLogger("monai_unlearn")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before):
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


def _commands() -> list[list[str]]:
    """The commands of the README, without ``python -m``."""
    text = (BUNDLE / "docs" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line.strip() and not line.startswith("#")]
    assert all(command[:3] == ["python", "-m", "monai.bundle"] for command in commands)
    return [command[3:] for command in commands]


def _small(command: list[str]) -> list[str]:
    if command[0] != "run":
        return command
    whole = command[1:] == ["--config_file", "configs/train.json", "--bundle_root", "."]
    kind = "unlearn" if command[1] == "unlearn" else "train" if whole else "other"
    return [*command, *SMALL.get(kind, "").split(), *SMALL["all"].split()]


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle in which every command of its README has been run."""
    folder = tmp_path_factory.mktemp("zoo layout") / "synthetic_cells"
    shutil.copytree(BUNDLE, folder)
    with pytest.MonkeyPatch.context() as patch, _logging_kept():
        patch.chdir(folder)
        for command in _commands():
            before = files_below(folder)
            patch.setattr(sys, "argv", ["monai.bundle", *_small(command)])
            runpy.run_module("monai.bundle", run_name="__main__")
            now = files_below(folder)
            assert {file: now.get(file) for file in before} == before, "a command changed a file that was there"
            assert now != before or command[0] == "verify_net_in_out" or "evaluate.json" in " ".join(command)
    return folder


def test_every_file_of_the_layout_is_there() -> None:
    configs = {"evaluate.json", "inference.json", "logging.conf", "metadata.json", "train.json", "unlearn.json"}
    wanted = {"LICENSE", "docs/README.md", "docs/request.json", *(f"configs/{name}" for name in configs)}
    assert not [name for name in wanted if not (BUNDLE / name).is_file()]
    assert (BUNDLE / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_its_unlearning_is_the_overlay_that_is_shipped() -> None:
    assert sha256(BUNDLE / "configs" / "unlearn.json") == sha256(bundle_path("overlay"))


def test_the_metadata_has_the_versions_that_the_package_is_tested_with() -> None:
    metadata = json.loads((BUNDLE / "configs" / "metadata.json").read_text(encoding="utf-8"))
    package = json.loads((ROOT / "bundles" / "metadata.json").read_text(encoding="utf-8"))
    for key in ("monai_version", "pytorch_version", "numpy_version"):
        assert metadata[key] == package[key]
    required = metadata["required_packages_version"]
    assert required["monai_unlearn"] == monai_unlearn.__version__
    assert all(package["required_packages_version"].get(name, required[name]) == required[name] for name in required)
    assert metadata["version"] in metadata["changelog"]
    classes = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert list(classes.values()) == list(synthetic_cells(images_per_patient=1).class_names)


@pytest.mark.parametrize(("kind", "config"), [("train", "train"), ("infer", "inference")])
def test_no_property_that_a_workflow_needs_is_missing(kind: str, config: str) -> None:
    configs = BUNDLE / "configs"
    workflow = ConfigWorkflow(
        config_file=str(configs / f"{config}.json"),
        meta_file=str(configs / "metadata.json"),
        logging_file=False,
        workflow_type=kind,
        bundle_root=str(BUNDLE),
    )
    workflow.initialize()
    assert workflow.check_properties() == []


def test_train_and_inference_have_one_network_and_one_preprocessing() -> None:
    files = [str(BUNDLE / "configs" / f"{name}.json") for name in ("train", "inference")]
    train, infer = map(ConfigParser.load_config_file, files)
    assert train["network_def"] == infer["network_def"]
    assert train["validate"]["preprocessing"] == infer["preprocessing"]


def test_the_request_asks_for_patients_who_are_in_the_training_data(tmp_path: Path) -> None:
    request = read_request(shutil.copy(BUNDLE / "docs" / "request.json", tmp_path))  # its key is made beside it
    assert resolve_request(request, synthetic_cells().train.index()).patients == 2


def test_the_readme_runs_every_config_and_check() -> None:
    text = " ".join(" ".join(command) for command in _commands())
    for name in ("train", "evaluate", "inference", "unlearn"):
        assert f"configs/{name}.json" in text
    for check in ("verify_net_in_out", "ckpt_export"):
        assert check in text


def test_the_exported_network_is_the_trained_one(used: Path) -> None:
    exported = torch.jit.load(used / "models" / "model.ts").eval()
    parser = ConfigParser()
    parser.read_config(str(used / "configs" / "inference.json"))
    network = parser.get_parsed_content("network_def")
    assert isinstance(network, ResNet)
    network.load_state_dict(torch.load(used / "models" / "model.pt", weights_only=True))
    images = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        assert torch.allclose(exported(images), network.eval()(images), atol=1e-5)


def _predictions(file: Path) -> list[list[float]]:
    with open(file, newline="", encoding="utf-8") as lines:
        return [[float(value) for value in row[1:]] for row in csv.reader(lines)]


def test_inference_takes_the_unlearned_model_in_the_place_of_the_original(used: Path) -> None:
    original, unlearned = (_predictions(used / name / "predictions.csv") for name in ("eval", "eval_unlearned"))
    assert len(original) == len(unlearned) == len(synthetic_cells(images_per_patient=1.0).test.labels)
    for row in (*original, *unlearned):
        assert len(row) == 8
        assert sum(row) == pytest.approx(1, abs=1e-4)
    assert original != unlearned


def test_the_report_names_the_model_that_was_written_and_the_original(used: Path) -> None:
    report = json.loads((used / "runs" / "unlearned" / "report.json").read_text(encoding="utf-8"))
    assert report["provenance"]["hashes"]["original"] == sha256(used / "models" / "model.pt")
    assert report["provenance"]["hashes"]["unlearned"] == sha256(used / "runs" / "unlearned" / "unlearned_model.pt")
    assert report["request"]["patients"] == 2
    assert report["request"]["reference"] == "example"
    original = torch.load(used / "models" / "model.pt", weights_only=True)
    unlearned = torch.load(used / "runs" / "unlearned" / "unlearned_model.pt", weights_only=True)
    assert original.keys() == unlearned.keys()
    assert any(not torch.equal(value, unlearned[name]) for name, value in original.items())
