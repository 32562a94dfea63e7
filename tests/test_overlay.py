"""Deletion requests in training bundles of others, as their owners would run them."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.metrics import Loss
from monai.bundle import ConfigParser, run
from monai.handlers import CheckpointSaver, LrScheduleHandler, StatsHandler, ValidationHandler
from zoo_bundles import IMAGES, PATIENTS, train, write_bundle, write_images

from monai_unlearn.__main__ import main
from monai_unlearn.bundle import bundle_path, unwrapped
from monai_unlearn.foreign import FLAG, ForeignBundle, TaggedDataset
from monai_unlearn.methods import unwrapped_handlers

OVERLAY = str(bundle_path("overlay"))
TRAIN = PATIENTS * IMAGES


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder


@dataclass
class Zoo:
    """A trained bundle, and a folder beside it."""

    config: Path
    folder: Path

    @property
    def root(self) -> Path:
        return self.config.parent.parent

    def request(self, content: dict | None = None) -> str:
        path = self.folder / "request.json"
        path.write_text(json.dumps(content or {"include": [{"patient": ["Zoo-001", "Zoo-004"]}]}))
        return str(path)

    def unlearn(self, request: dict | None = None, overlay_first: bool = False, **settings: Any) -> dict:
        files = [str(self.config), OVERLAY]
        options = {"epochs": 1, "forget_request": self.request(request), "output_dir": str(self.folder / "out")}
        own = {key: settings.pop(key) for key in list(settings) if "::" in key or key in ("dataset_dir", "ckpt_dir")}
        try:
            run(
                run_id="unlearn",
                config_file=files[::-1] if overlay_first else files,
                bundle_root=str(self.root),
                **{f"unlearning::{name}": value for name, value in {**options, **settings}.items()},
                **own,
            )
        except RuntimeError as error:
            raise unwrapped(error) from None
        return json.loads((self.folder / "out" / "report.json").read_text())


def make(tmp_path: Path, images: Path, **options: Any) -> Zoo:
    config = write_bundle(tmp_path / "theirs", images, **options)
    train(config)
    return Zoo(config, tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    return make(tmp_path_factory.mktemp("zoo"), images).config


@pytest.fixture
def zoo(trained: Path, tmp_path: Path) -> Zoo:
    return Zoo(trained, tmp_path)


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("method", ["random_labeling", "saliency", "retrain"])
def test_nothing_of_theirs_changes_and_their_evaluation_loads_the_result(
    method: str, zoo: Zoo, images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = files_of(zoo.root), files_of(images)
    report = zoo.unlearn(method=method)
    assert (files_of(zoo.root), files_of(images)) == before
    forget, retain = (report["models"]["unlearned"][split]["n"] for split in ("forget", "retain"))
    assert (forget, retain) == (2 * IMAGES, TRAIN - 2 * IMAGES)
    assert report["request"]["patients"] == 2
    assert report["cost"]["unlearn"]["backward"] > 0

    parser = ConfigParser()
    parser.read_config([str(zoo.config), str(zoo.config.with_name("evaluate.json"))])
    parser["bundle_root"] = str(zoo.root)
    parser["validate::handlers::0::load_path"] = str(zoo.folder / "out" / "unlearned_model.pt")
    parser.get_parsed_content("run")
    theirs = parser.get_parsed_content("validate::evaluator").state.metrics["val_auc"]
    note = next(note for note in report["notes"] if "val_auc" in note)
    assert f"{theirs:.4f} after" in note
    original = torch.load(zoo.root / "models" / "model.pt", weights_only=True)
    unlearned = torch.load(zoo.folder / "out" / "unlearned_model.pt", weights_only=True)
    assert unlearned.keys() == original.keys()
    assert any(not torch.equal(unlearned[name], value) for name, value in original.items())


def test_no_name_of_a_forgotten_image_is_written_or_printed(zoo: Zoo, capfd: pytest.CaptureFixture[str]) -> None:
    zoo.unlearn()
    printed = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in (zoo.folder / "out").rglob("*") if path.is_file())
    for name in ("Zoo-0", "view1.png", "view1"):
        assert name not in printed.out + printed.err
        assert name.encode() not in written


VARIANTS: dict[str, dict[str, Any]] = {
    "yaml with the trainer at the top": {"suffix": ".yaml", "trainer_at": "trainer"},
    "densenet and a summed loss": {
        "network": "densenet",
        "loss": {"_target_": "torch.nn.CrossEntropyLoss", "reduction": "sum"},
    },
    "seresnet": {"network": "seresnet"},
    "batches given twice": {"loader": {"_target_": "ThreadDataLoader", "repeats": 2, "num_workers": 0}},
    "workers": {"loader": {"num_workers": 2}},
    "plain data set": {"dataset": {"_target_": "Dataset"}},
    "mixed precision": {"trainer": {"amp": True}},
    "metric logger in the checkpoint": {"save_dict": "{'model': @network, 'log': monai.handlers.MetricLogger()}"},
    "two findings": {"labels": "findings", "loss": {"_target_": "torch.nn.BCEWithLogitsLoss"}},
    "one finding": {"labels": "finding", "loss": {"_target_": "torch.nn.BCEWithLogitsLoss"}, "network": "one output"},
    "persistent data set": {"dataset": {"_target_": "PersistentDataset", "cache_dir": "@cache_dir"}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_bundles_of_many_kinds(name: str, tmp_path: Path, images: Path) -> None:
    report = make(tmp_path, images, **VARIANTS[name]).unlearn(method="saliency")
    assert report["models"]["unlearned"]["forget"]["n"] == 2 * IMAGES
    assert report["request"]["images"] == 2 * IMAGES


def test_images_in_nifti_files(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ".nii.gz")
    report = make(tmp_path, tmp_path / "images").unlearn({"include": [{"file": ["**/Zoo-002/*.nii.gz"]}]})
    assert report["request"]["images"] == IMAGES


def test_what_writes_loads_stops_or_schedules_is_set_aside(zoo: Zoo) -> None:
    parser = ConfigParser()
    parser.read_config(str(zoo.config))
    bundle = ForeignBundle(parser.config)
    aside = (CheckpointSaver, LrScheduleHandler, StatsHandler, ValidationHandler)
    engines = bundle.engines()
    found = [h for engine in engines for event in engine._event_handlers for h in unwrapped_handlers(engine, event)]
    assert not [handler for handler in found if isinstance(handler, aside)]
    assert any(isinstance(handler, Loss) for handler in found), "their metrics stay"
    trainer, _ = bundle.engines(keep_schedules=True)
    kept = [h for event in trainer._event_handlers for h in unwrapped_handlers(trainer, event)]
    assert any(isinstance(handler, LrScheduleHandler) for handler in kept)


def test_their_dataset_keeps_what_it_has_cached(zoo: Zoo) -> None:
    """Tagging copies items: a cache of theirs would otherwise carry the flag, and hand it to the next run."""
    parser = ConfigParser()
    parser.read_config(str(zoo.config))
    trainer, _ = ForeignBundle(parser.config).engines()
    dataset = trainer.data_loader.dataset
    tagged = TaggedDataset(dataset, [i == 0 for i in range(TRAIN)])
    assert [tagged[i][FLAG] for i in range(3)] == [True, False, False]
    assert all(FLAG not in item for item in dataset._cache)
    assert FLAG not in dataset[0]
    assert FLAG not in dataset.data[0]


def test_a_subset_is_tagged_where_it_is(zoo: Zoo) -> None:
    """A partition: positions in the subset are not those in the data below."""
    half = {"train::dataloader::dataset": "$torch.utils.data.Subset(@train::dataset, list(range(47, 3, -1)))"}
    report = zoo.unlearn({"include": [{"patient": ["Zoo-002"]}]}, **half)
    assert report["models"]["unlearned"]["forget"]["n"] == IMAGES
    assert report["models"]["unlearned"]["retain"]["n"] == 44 - IMAGES


def test_requests_by_path_and_by_rule(zoo: Zoo) -> None:
    report = zoo.unlearn({"unit": "image", "include": [{"file": ["Zoo-003/view1.png", "Zoo-005/view2.png"]}]})
    assert report["request"]["images"] == 2
    report = zoo.unlearn({"include": [{"rule": ['sex == "F"']}]}, overlap="keep")
    assert report["request"]["images"] == TRAIN // 2


def test_a_reference_is_trained_by_their_recipe(zoo: Zoo) -> None:
    report = zoo.unlearn(reference=True)
    assert report["cost"]["retrain"]["backward"] == 4 * (TRAIN - 2 * IMAGES)
    assert report["gap_to_retrained"] is not None
    assert report["models"]["retrained"]["retain"]["n"] == TRAIN - 2 * IMAGES


def test_an_original_elsewhere_is_named(zoo: Zoo, tmp_path: Path) -> None:
    state = torch.load(zoo.root / "models" / "model.pt", weights_only=True)
    torch.save({"epoch": 3, "weights": state}, tmp_path / "mine.pt")
    zoo.unlearn(original_checkpoint=str(tmp_path / "mine.pt"), network_key="weights")
    assert torch.load(tmp_path / "out" / "unlearned_model.pt", weights_only=True).keys() == {"weights"}


REFUSED: dict[str, tuple[dict, str]] = {
    "misspelt": ({"methods": "saliency"}, "no setting unlearning::methods. Did you mean 'method'"),
    "unknown method": ({"method": "salun"}, "method should be one of random_labeling, saliency, retrain"),
    "no request": ({"forget_request": None}, "--unlearning::forget_request FILE"),
    "no such trainer": ({"trainer": "train#trainr"}, r"no train::trainr.*there are: train::trainer"),
    "no such evaluator": ({"evaluator": "validat"}, r"no validat.*there are: validate::evaluator"),
    "no such patient key": ({"patient_key": "mrn"}, "The records have no 'mrn'; they have image, label, patient_id"),
    "no original": ({"original_checkpoint": "nowhere.pt"}, "does not exist"),
    "lr of zero": ({"lr": 0}, "unlearning::lr should be a number greater than 0"),
    "another network": ({"network_def::block_inplanes": [8, 8, 8, 8]}, "of another network"),
    "image key": ({"image_key": "img", "request": {"include": [{"file": ["a.png"]}]}}, "'file'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_is_refused_with_what_there_is(name: str, zoo: Zoo) -> None:
    settings, message = REFUSED[name]
    before = files_of(zoo.root)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        zoo.unlearn(**settings)
    assert files_of(zoo.root) == before
    assert not (zoo.folder / "out").exists()


def test_an_ambiguous_name_is_refused(zoo: Zoo) -> None:
    with pytest.raises(ValueError, match=r"should match one file.*16 files"):
        zoo.unlearn({"include": [{"file": ["view1.png"]}]})


def test_a_validation_image_is_refused(zoo: Zoo) -> None:
    with pytest.raises(ValueError, match="1 files of the request are validation images"):
        zoo.unlearn({"include": [{"file": ["Zoo-013/view1.png"]}]})


def changed(zoo: Zoo, **parts: Any) -> Zoo:
    """The same bundle with other parts in its training config, and the same trained model."""
    content = json.loads(zoo.config.read_text())
    for key, value in parts.items():
        content[key] = {**content[key], **value} if key in ("train", "validate") else value
    config = zoo.folder / "changed" / "configs" / "train.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps(content))
    shutil.copytree(zoo.root / "models", config.parent.parent / "models")
    return Zoo(config, zoo.folder)


def test_a_patient_in_their_validation_data_is_refused_dropped_or_kept(zoo: Zoo) -> None:
    content = json.loads(zoo.config.read_text())
    dataset, extra = content["validate"]["dataset"], content["train"]["dataset"]["data"].removeprefix("$")
    other = changed(zoo, validate={"dataset": {**dataset, "data": f"{dataset['data']} + {extra}[:2]"}})
    request = {"include": [{"patient": ["Zoo-000"]}]}
    with pytest.raises(ValueError, match="2 validation images are of people to be forgotten"):
        other.unlearn(request)
    dropped, kept = (other.unlearn(request, overlap=overlap) for overlap in ("drop", "keep"))
    assert dropped["models"]["original"]["validation"]["n"] == 4 * IMAGES
    assert kept["models"]["original"]["validation"]["n"] == 4 * IMAGES + 2
    assert dropped["request"]["overlap"] == {"option": "drop", "patients": 1, "images": 2}


UNET = {
    "_target_": "UNet",
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 2,
    "channels": [4, 8],
    "strides": [2],
}
GAN = {
    "_target_": "GanTrainer",
    "device": "@device",
    "max_epochs": 1,
    "train_data_loader": "@train::dataloader",
    "g_network": "@network",
    "g_optimizer": "@optimizer",
    "g_loss_function": "@loss",
    "d_network": "@network",
    "d_optimizer": "@optimizer",
    "d_loss_function": "@loss",
}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"network_def": UNET}, r"gives \(8, 2, 32, 32\) for labels of \(8,\).*not for segmentation"),
        ({"loss": {"_target_": "torch.nn.BCEWithLogitsLoss"}}, r"gives \(8, 2\) for labels of \(8,\)"),
        ({"train": {"trainer": GAN}}, "but is a GanTrainer: it does not fire"),
        ({"train": {"trainer": "own iteration"}}, "but is a SupervisedTrainer with an iteration_update of its own"),
    ],
    ids=["segmentation", "labels that do not fit", "GAN", "own iteration"],
)
def test_what_unlearning_can_not_work_in_is_refused_with_the_reason(parts: dict, message: str, zoo: Zoo) -> None:
    if parts.get("train", {}).get("trainer") == "own iteration":
        trainer = json.loads(zoo.config.read_text())["train"]["trainer"]
        parts = {"train": {"trainer": {**trainer, "iteration_update": "$lambda engine, batch: {}"}}}
    with pytest.raises(ValueError, match=message):
        changed(zoo, **parts).unlearn()


def test_the_second_door_finds_the_parts_itself(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    output = zoo.folder / "out"
    arguments = ["bundle", str(zoo.root), "--method", "saliency", "--forget_request", zoo.request(), "--epochs", "1"]
    assert main([*arguments, "--output_dir", str(output), "--train::dataloader::batch_size", "6"]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["request"]["images"] == 2 * IMAGES
    assert main(["bundle", str(zoo.folder), "--forget_request", "x.json"]) == 2
    assert "Name the training config with --config_file" in capsys.readouterr().err
    assert main([*arguments, "--batch_size"]) == 2
    assert "pairs of --key value" in capsys.readouterr().err
