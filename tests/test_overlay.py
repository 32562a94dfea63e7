"""Deletion requests in training bundles of others, as their owners would run them."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.metrics import Loss
from monai.bundle import ConfigParser, run
from monai.data import Dataset, ThreadDataLoader
from monai.handlers import CheckpointSaver, LrScheduleHandler, StatsHandler, ValidationHandler
from zoo_bundles import IMAGES, PATIENTS, train, write_bundle, write_images

from monai_unlearn.__main__ import HELP, main
from monai_unlearn.bundle import bundle_path, unwrapped
from monai_unlearn.foreign import FLAG, ForeignBundle, TaggedDataset, with_repeats
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


@pytest.mark.pages
def test_no_name_of_a_forgotten_image_is_written_or_printed(
    zoo: Zoo, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    zoo.unlearn()
    assert not [record for record in caplog.records if record.name.startswith(("ignite", "monai_unlearn.engines"))]
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
    "two findings": {"labels": "findings", "loss": {"_target_": "torch.nn.BCEWithLogitsLoss"}},
    "one finding": {"labels": "finding", "loss": {"_target_": "torch.nn.BCEWithLogitsLoss"}, "network": "one output"},
    "persistent data set": {"dataset": {"_target_": "PersistentDataset", "cache_dir": "@cache_dir"}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_bundles_of_many_kinds(name: str, tmp_path: Path, images: Path) -> None:
    report = make(tmp_path, images, **VARIANTS[name]).unlearn(method="saliency")
    assert report["models"]["unlearned"]["forget"]["n"] == 2 * IMAGES
    assert report["request"]["images"] == 2 * IMAGES


def test_a_checkpoint_with_a_filled_metric_logger_is_read(tmp_path: Path, images: Path) -> None:
    """Losses are MetaTensors, metrics NumPy's numbers in a defaultdict; the handlers' list refers to the logger."""
    config = write_bundle(tmp_path / "theirs", images)
    content = json.loads(config.read_text())
    loss = "$lambda output: output['loss']"
    content["log"] = {"_target_": "MetricLogger", "loss_transform": loss, "evaluator": "@validate::evaluator"}
    content["train"]["handlers"][:0] = ["@log"]
    content["train"]["handlers"][4]["save_dict"] = "${'model': @network, 'optimizer': @optimizer, 'log': @log}"
    config.write_text(json.dumps(content))
    train(config)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(config.parents[1] / "models" / "final.pt", weights_only=True)
    Zoo(config, tmp_path).unlearn(original_checkpoint=str(config.parents[1] / "models" / "final.pt"))
    assert torch.load(tmp_path / "out" / "unlearned_model.pt", weights_only=True).keys() == {"model"}


def test_batches_given_twice_are_given_twice_to_the_reference_too(zoo: Zoo) -> None:
    twice = {"_target_": "ThreadDataLoader", "dataset": "@train::dataset", "batch_size": 8, "repeats": 2}
    other = changed(zoo, train={"dataloader": {**twice, "shuffle": True, "num_workers": 0}})
    report = other.unlearn(reference=True)
    assert report["cost"]["unlearn"]["backward"] == 2 * TRAIN, "an epoch is a whole pass"
    assert report["cost"]["retrain"]["backward"] == 4 * (TRAIN - 2 * IMAGES), "by their recipe, half a pass"
    like = ThreadDataLoader(Dataset([{"a": i} for i in range(8)]), batch_size=2, repeats=2, num_workers=0)
    part = torch.utils.data.DataLoader(Dataset([{"a": i} for i in range(5)]), batch_size=2)
    assert [batch["a"].tolist() for batch in with_repeats(part, like)] == [[0, 1], [0, 1], [2, 3], [2, 3], [4], [4]]
    assert with_repeats(part, part) is part


def test_an_epoch_of_theirs_that_is_no_pass_stays_so_in_the_reference_alone(zoo: Zoo) -> None:
    report = zoo.unlearn(reference=True, **{"train::trainer::epoch_length": 2})
    assert report["cost"]["unlearn"]["backward"] == TRAIN
    assert report["cost"]["retrain"]["backward"] == 4 * 2 * 8


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


def data_of(zoo: Zoo) -> str:
    return json.loads(zoo.config.read_text())["train"]["dataset"]["data"].removeprefix("$")


def test_a_plain_list_of_loaded_images_will_do(zoo: Zoo) -> None:
    """There are no records then; the file is what the reader noted, the patient stands in the items."""
    made = f"$[@train::preprocessing(record) for record in {data_of(zoo)}]"
    other = changed(zoo, train={"dataset": made})
    report = other.unlearn()
    assert report["models"]["unlearned"]["forget"]["n"] == 2 * IMAGES
    report = other.unlearn({"unit": "image", "include": [{"file": ["Zoo-002/view1.png"]}]})
    assert report["request"]["images"] == 1
    half = {"train::dataloader::dataset": "$torch.utils.data.Subset(@train::dataset, list(range(24)))"}
    assert other.unlearn(**half)["models"]["unlearned"]["retain"]["n"] == 24 - 2 * IMAGES


def test_a_partition_of_their_list_is_what_a_request_finds_images_in(zoo: Zoo) -> None:
    part = f"$monai.data.partition_dataset({data_of(zoo)}, num_partitions=2, shuffle=True)[0]"
    report = zoo.unlearn({"include": [{"patient": ["Zoo-001"]}]}, **{"train::dataset::data": part})
    figures = report["models"]["unlearned"]
    assert 0 < figures["forget"]["n"] < IMAGES
    assert figures["forget"]["n"] + figures["retain"]["n"] == TRAIN // 2


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
    "no such patient key": ({"patient_key": "mrn"}, "no 'mrn'; they have image, label, patient_id.*::patient_key"),
    "no such image key": ({"image_key": "img"}, "no 'img'; they have image, label, patient_id.*::image_key"),
    "no such label key": ({"label_key": "class"}, "no 'class'; they have image, label, patient_id.*::label_key"),
    "no path in the records": ({"image_key": "sex", "request": {"include": [{"file": ["a.png"]}]}}, "match none"),
    "no original": ({"original_checkpoint": "nowhere.pt"}, "does not exist"),
    "lr of zero": ({"lr": 0}, "unlearning::lr should be a number greater than 0"),
    "another network": ({"network_def::block_inplanes": [8, 8, 8, 8]}, "of another network"),
    "no transforms": ({"train::preprocessing::transforms": []}, "hold the path of 'image' and no image"),
}


def test_what_fails_in_a_run_is_raised_though_a_saver_of_theirs_would_have_caught_it(zoo: Zoo) -> None:
    """As long as there is a handler of exceptions, even none any more under its event, Ignite raises nothing."""
    with pytest.raises(FloatingPointError, match="loss should be finite"):
        zoo.unlearn(lr=1e30)
    assert not (zoo.folder / "out").exists()


@pytest.mark.parametrize("kind", ["CacheDataset", "Dataset"])
def test_an_image_that_is_gone_already_is_not_named(
    kind: str, zoo: Zoo, images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = zoo.folder / "images"
    shutil.copytree(images, copy)
    (copy / "Zoo-001" / "view0.png").unlink()
    dataset = {"_target_": kind, "data": f"${data_of(zoo)}", "transform": "@train::preprocessing"}
    with pytest.raises(ValueError, match="can't be read") as error:
        zoo.unlearn(dataset_dir=str(copy), **{"train::dataset": dataset})
    shown = "".join(traceback.format_exception(error.value))
    assert "view0" not in shown + "".join(capfd.readouterr())


def test_a_reference_does_not_start_from_the_original(zoo: Zoo) -> None:
    loader = {"_target_": "CheckpointLoader", "load_path": "$@ckpt_dir + '/model.pt'", "load_dict": None}
    handlers = [*json.loads(zoo.config.read_text())["train"]["handlers"], loader]
    other = changed(zoo, train={"handlers": handlers})
    with pytest.raises(ValueError, match=r"the original itself.*--train::handlers::5::_disabled_ True"):
        other.unlearn(reference=True)
    assert other.unlearn()["models"]["retrained"] is None
    report = other.unlearn(reference=True, **{"train::handlers::5::_disabled_": True})
    assert report["models"]["retrained"] is not None


def test_an_original_that_is_not_there_is_asked_for_with_what_is(zoo: Zoo) -> None:
    other = changed(zoo)
    (other.root / "models" / "model.pt").rename(other.root / "models" / "best.pt")
    (other.root / "models" / "final.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"--unlearning::original_checkpoint FILE.*there are: .*best\.pt"):
        other.unlearn()


def test_validation_data_without_records_is_used_and_noted(zoo: Zoo) -> None:
    loaded = "$Bare(@validate::dataset)"
    bare = "$from test_overlay import Bare"
    content = json.loads(zoo.config.read_text())
    loader = {**content["validate"]["dataloader"], "dataset": loaded}
    other = changed(zoo, imports=[*content["imports"], bare], validate={"dataloader": loader})
    report = other.unlearn()
    assert any("was not checked" in note for note in report["notes"])
    assert report["request"]["overlap"] is None


class Bare(torch.utils.data.Dataset):
    """A data set of which nothing is known but its items."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]


def test_the_overlay_may_stand_first(zoo: Zoo) -> None:
    assert zoo.unlearn(overlay_first=True)["request"]["images"] == 2 * IMAGES


def test_the_second_door_has_every_setting() -> None:
    assert list(HELP) == list(json.loads(Path(OVERLAY).read_text())["unlearning"])


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
