"""The configs, their settings, and what the running bundle builds from them."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import CONFIGS, METHODS, PARTS, TINY, TRAIN, Workplace, checked_bundle, messages
from monai.bundle import ComponentLocator, ConfigParser, ckpt_export

import monai_unlearn
from monai_unlearn import bundle as bundle_module
from monai_unlearn.bundle import Bundle, bundle_path, device_of, readable_errors, running_workflow

pytest_plugins = ["bundle_runs"]

BUNDLES = Path(__file__).parents[1] / "bundles"


# The files


def test_configs_are_what_the_generator_gives(tmp_path: Path) -> None:
    runpy.run_path(str(BUNDLES / "generate.py"))["write"](tmp_path)
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(made) == {f"{name}.json" for name in (*CONFIGS, *PARTS)}
    for name, content in made.items():
        assert (BUNDLES / name).read_bytes() == content, f"{name}: run `python bundles/generate.py`"


def test_every_config_beside_the_metadata_is_generated() -> None:
    assert {file.stem for file in BUNDLES.glob("*.json")} == {*CONFIGS, *PARTS, "metadata"}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_found_by_name(name: str) -> None:
    assert bundle_path(name) == BUNDLES / f"{name}.json"


@pytest.mark.parametrize(("name", "nearest"), [("salency", "saliency"), ("random_labelling", "random_labeling")])
def test_an_unknown_bundle_raises_with_the_nearest_name(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"Did you mean '{nearest}'.*There are: .*retrain"):
        bundle_path(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_pass_their_own_check_and_every_target_exists(name: str) -> None:
    def targets(config: Any) -> list[str]:
        parts = config.values() if isinstance(config, dict) else config if isinstance(config, list) else ()
        found = [target for part in parts for target in targets(part)]
        return found + ([config["_target_"]] if isinstance(config, dict) and "_target_" in config else [])

    found = targets(checked_bundle(name).config)
    assert len(found) > 10
    for target in found:
        module, _, attribute = target.rpartition(".")
        if "Bundle.running" in target:
            module, attribute = "monai_unlearn.bundle", "Bundle"
        assert hasattr(importlib.import_module(module), attribute), target


@pytest.mark.parametrize("name", CONFIGS)
def test_every_setting_is_used_by_the_config_or_the_workflow(name: str) -> None:
    bundle = checked_bundle(name)
    text = json.dumps(bundle.config)
    modules = [Path(monai_unlearn.__file__).parent / f"{module}.py" for module in ("workflow", "run", "auditing")]
    workflow = "".join(path.read_text(encoding="utf-8") for path in modules)
    unused = [key for key in bundle.settings() if f"@{key}" not in text and f'["{key}"]' not in workflow]
    assert not unused


def test_methods_of_a_config_are_the_handlers_of_its_trainer() -> None:
    for name in METHODS:
        assert checked_bundle(name).config["trainer"]["train_handlers"] == "@methods"


@pytest.mark.parametrize("name", CONFIGS)
def test_monai_sees_the_network_in_the_file_as_shipped(name: str, workplace: Workplace) -> None:
    parser = ConfigParser()
    parser.read_config(str(bundle_path(name)))
    parser.update({"dataset_file": str(workplace.data), "device": "cpu"})
    network = parser.get_parsed_content("network_def")
    assert network(torch.zeros(2, 1, 12, 12)).shape == (2, 3)


def test_monais_ckpt_export_takes_the_shipped_file(workplace: Workplace) -> None:
    ckpt_export(
        net_id="network_def",
        filepath=str(workplace.folder / "exported.ts"),
        ckpt_file=str(workplace.kept()["original"]),
        meta_file=str(BUNDLES / "metadata.json"),
        config_file=str(bundle_path("saliency")),
        dataset_file=str(workplace.data),
        **{key: value for key, value in TINY.items() if key.startswith("network_def")},
    )
    network = workplace.network().eval()
    network.load_state_dict(workplace.original())
    images = torch.rand(2, 1, 12, 12)
    torch.testing.assert_close(torch.jit.load(workplace.folder / "exported.ts")(images), network(images))


def test_public_names_differ_from_those_of_monai_so_that_short_targets_stay_clear() -> None:
    own: dict[str, str] = {}
    for found in pkgutil.walk_packages(monai_unlearn.__path__, "monai_unlearn."):
        if found.name.endswith(
            ("__main__", "label.app", "label.routes", "label.tasks")
        ):  # the last three need MONAI Label
            continue
        module = importlib.import_module(found.name)
        own |= {name: getattr(module, name).__module__ for name in module.__all__ if callable(getattr(module, name))}
    locator = ComponentLocator(excludes="monai_unlearn")
    clashes = {name: where for name in own if (where := locator.get_component_module_name(name))}
    assert {"Retrain", "RandomLabeling", "SaliencyMask"} <= set(own)
    assert locator.get_component_module_name("SupervisedTrainer")
    assert not clashes


# Settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"forget_fracton": 0.2}, "There is no setting 'forget_fracton'. Did you mean 'forget_fraction'"),
        ({"saliency_ration": 0.2}, "There is no setting 'saliency_ration'. Did you mean 'saliency_ratio'"),
        ({"epoch": 2}, "There is no setting 'epoch'. Did you mean 'epochs'"),
        ({"original_checkpiont": "m.pt"}, "Did you mean 'original_checkpoint'"),
        ({"zzz": 1}, r"There is no setting 'zzz'\. Settings: .*forget_fraction.*output_dir"),
        ({"trainer::max_epoch": 3}, r"trainer \(monai.engines.SupervisedTrainer\).*'max_epoch'. Did you mean 'max_ep"),
        ({"trainer#max_epoch": 3}, "no argument 'max_epoch'. Did you mean 'max_epochs'"),
        ({"network_def::num_clases": 3}, "no argument 'num_clases'. Did you mean 'num_classes'"),
        ({"recipe::optimizer::momentun": 0.1}, r"recipe::optimizer \(torch.optim.SGD\).*Did you mean 'momentum'"),
        ({"methods::0::num_class": 3}, r"methods::0 .*RandomLabeling.*Did you mean 'num_classes'"),
        ({"traner::max_epochs": 3}, "did you mean 'trainer'"),
        ({"recipe::trainr::max_epochs": 3}, "did you mean 'trainer'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_misspelt_key_raises_with_the_nearest_before_anything_runs(
    empty_workplace: Workplace, override: dict, message: str
) -> None:
    before = sorted(empty_workplace.folder.iterdir())
    with pytest.raises((RuntimeError, KeyError)) as caught:
        empty_workplace.unlearn(**override)
    assert re.search(message, messages(caught.value))
    assert sorted(empty_workplace.folder.iterdir()) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"lr": "abc"}, "lr should be a number, but got 'abc'"),
        ({"lr": 0}, "lr should be greater than 0, but got 0"),
        ({"lr": -0.1}, "lr should be greater than 0, but got -0.1"),
        ({"lr": True}, "lr should be a number, but got True"),
        ({"epochs": 0}, "epochs should be greater than 0, but got 0"),
        ({"epochs": 1.5}, r"epochs should be a whole number, but got 1\.5"),
        ({"epochs": False}, "epochs should be a whole number, but got False"),
        ({"batch_size": 0}, "batch_size should be greater than 0, but got 0"),
        ({"train_epochs": "many"}, "train_epochs should be a whole number, but got 'many'"),
        ({"seed": "x"}, "seed should be a whole number, but got 'x'"),
        ({"seed": None}, "seed should be a whole number, but got None"),
        ({"saliency_ratio": [0.5]}, r"saliency_ratio should be a number, but got \[0\.5\]"),
        ({"forget_fraction": "a tenth"}, "forget_fraction should be a number, but got 'a tenth'"),
        ({"reference": "no"}, "reference should be true or false, but got 'no'"),
        ({"reference": 2}, "reference should be true or false, but got 2"),
        ({"reference": None}, "reference should be true or false, but got None"),
    ],
    ids=str,
)
def test_a_setting_of_the_wrong_type_raises(override: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_bundle("saliency", **override)


@pytest.mark.parametrize(
    ("word", "meaning"),
    [(word, False) for word in (False, "false", "False", "FALSE", 0, "0")]
    + [(word, True) for word in (True, "true", "True", 1, "1")],
    ids=repr,
)
def test_words_for_true_and_false_mean_that(word: Any, meaning: bool) -> None:
    assert checked_bundle("saliency", reference=word).settings()["reference"] is meaning


@pytest.mark.parametrize("value", [1, 0.5, 1e-3])
def test_a_whole_number_is_good_where_a_number_is_asked_for(value: float) -> None:
    assert checked_bundle("saliency", lr=value).settings()["lr"] == value


@pytest.mark.parametrize("key", ["dataset_file", "original_checkpoint", "forget_indices", "forget_patients"])
def test_a_file_may_be_named_like_a_number(key: str) -> None:
    assert checked_bundle("saliency", **{key: 7}).settings()[key] == "7"
    assert checked_bundle("saliency").settings()[key] is None


def test_a_setting_may_be_an_expression_of_the_right_type() -> None:
    assert checked_bundle("saliency", lr="$@train_lr / 5", train_lr=0.5).settings()["lr"] == 0.1
    with pytest.raises(ValueError, match=r"epochs should be a whole number, but got 2\.5"):
        checked_bundle("saliency", epochs="$5 / 2").settings()


def test_settings_are_plain_values_from_the_top_of_the_file() -> None:
    settings = checked_bundle("saliency").settings()
    assert {"seed", "lr", "epochs", "saliency_ratio", "forget_fraction", "output_dir"} <= set(settings)
    assert not any(isinstance(value, (dict, list)) for value in settings.values())


# Overrides


def test_overrides_reach_the_components(workplace: Workplace) -> None:
    given = {"dataset_file": str(workplace.data), "lr": 0.25, "trainer::max_epochs": 7, **TINY}
    bundle = checked_bundle("saliency", **given, saliency_ratio=0.125)
    bundle.share(split=bundle.build("split"))
    trainer, methods = bundle.build("trainer", "methods", private_dir=str(workplace.folder))
    assert trainer.optimizer.param_groups[0]["lr"] == 0.25
    assert trainer.state.max_epochs == 7
    assert trainer.data_loader.batch_size == TINY["batch_size"]
    assert [getattr(method, "ratio", None) for method in methods] == [None, 0.125, None]


def test_the_retrain_bundles_trainer_follows_the_recipes_schedule(workplace: Workplace) -> None:
    bundle = checked_bundle("retrain", **TINY, dataset_file=str(workplace.data))
    trainer, methods = bundle.build("trainer", "methods")
    assert methods[0].lr_scheduler.optimizer is trainer.optimizer
    assert bundle.config["optimizer"] == "@recipe::optimizer"


def test_the_number_of_epochs_can_be_set_at_the_trainer(workplace: Workplace) -> None:
    output = workplace.unlearn("random_labeling", reference=False, **{"trainer::max_epochs": 3, "epochs": 1})
    cost = json.loads((output / "report.json").read_text())["cost"]
    assert cost["unlearn"]["backward"] == 3 * TRAIN


def test_an_overlay_appends_a_handler_to_the_methods(workplace: Workplace) -> None:
    overlay = workplace.folder / "saver.json"
    saver = {
        "_target_": "monai.handlers.CheckpointSaver",
        "save_dir": "mine",
        "save_dict": {"network": "@network"},
        "save_interval": 1,
    }
    overlay.write_text(json.dumps({"+methods": [saver]}))
    output = workplace.unlearn("random_labeling", (overlay,), reference=False, epochs=2)
    saved = sorted(file.name for file in (workplace.folder / "mine").iterdir())
    assert saved == ["network_epoch=1.pt", "network_epoch=2.pt"]
    without = workplace.unlearn("random_labeling", reference=False, epochs=2, output_dir="without")
    states = [torch.load(folder / "unlearned_model.pt", weights_only=True) for folder in (output, without)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_an_overlay_may_bring_a_key_that_it_uses(workplace: Workplace) -> None:
    overlay = workplace.folder / "mine.json"
    overlay.write_text(json.dumps({"my_lr": 0.125, "lr": "@my_lr", "output_dir": "$'my/' + @method"}))
    workplace.unlearn("random_labeling", (overlay,), reference=False)
    report = json.loads((workplace.folder / "my" / "random_labeling" / "report.json").read_text())
    assert report["settings"]["lr"] == 0.125


def test_an_overlay_with_a_misspelt_key_raises(workplace: Workplace) -> None:
    overlay = workplace.folder / "mine.json"
    overlay.write_text(json.dumps({"sede": 3}))
    with pytest.raises(RuntimeError) as caught:
        workplace.unlearn("random_labeling", (overlay,))
    assert "There is no setting 'sede'. Did you mean 'seed'?" in messages(caught.value)


def test_an_overlay_with_a_misspelt_argument_raises(workplace: Workplace) -> None:
    overlay = workplace.folder / "mine.json"
    overlay.write_text(json.dumps({"+methods": [{"_target_": "monai.handlers.StatsHandler", "nam": "x"}]}))
    with pytest.raises(RuntimeError) as caught:
        workplace.unlearn("random_labeling", (overlay,))
    assert "has no argument 'nam'. Did you mean 'name'?" in messages(caught.value)


def write_users_network(folder: Path) -> Path:
    file = folder / "net.json"
    network = {
        "_target_": "monai.networks.nets.Classifier",
        "in_shape": [1, 12, 12],
        "classes": 3,
        "channels": [4, 4],
        "strides": [2, 2],
    }
    file.write_text(json.dumps({"net": network}))
    return file


def test_network_def_can_come_from_a_file_of_the_user(empty_workplace: Workplace) -> None:
    file = write_users_network(empty_workplace.folder)
    shape = {key: value for key, value in TINY.items() if not key.startswith("network_def")}
    bundle = checked_bundle("saliency", **shape, dataset_file=str(empty_workplace.data), network_def=f"%{file}#net")
    bundle._parser.resolve_macro_and_relative_ids()
    assert type(bundle.build("network")).__name__ == "Classifier"


def test_a_whole_run_takes_a_network_of_the_users_file(empty_workplace: Workplace) -> None:
    from monai.bundle import run

    file = write_users_network(empty_workplace.folder)
    given = {key: value for key, value in TINY.items() if not key.startswith("network_def")}
    given |= {"dataset_file": str(empty_workplace.data), "network_def": f"%{file}#net", "train_lr": 0.01}
    run("train", config_file=str(bundle_path("train")), **given)
    run("unlearn", config_file=str(bundle_path("saliency")), **given, epochs=1, reference=False)
    state = torch.load(empty_workplace.folder / "runs/saliency/unlearned_model.pt", weights_only=True)
    own = ConfigParser(json.loads(file.read_text())).get_parsed_content("net")
    own.load_state_dict(state, strict=True)


# What the bundle builds


def test_components_are_built_anew_and_shared_ones_are_not(workplace: Workplace) -> None:
    bundle = checked_bundle("saliency", **TINY, dataset_file=str(workplace.data))
    data = bundle.build("data")
    bundle.share(data=data)
    first, second = bundle.build("network"), bundle.build("network")
    assert first is not second
    assert bundle.build("data") is data
    trainer, network = bundle.build("trainer", "network", private_dir="")
    assert trainer.network is network


def test_a_component_raises_its_own_error_with_its_own_cause(workplace: Workplace) -> None:
    with pytest.raises(FileNotFoundError, match=r"dataset_file should be an existing \.npz file"):
        checked_bundle("saliency", dataset_file="missing.npz").build("data")
    damaged = workplace.folder / "damaged.npz"
    damaged.write_bytes(workplace.data.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"damaged\.npz could not be read.*fetch it again") as caught:
        checked_bundle("saliency", dataset_file=str(damaged)).build("network")
    assert isinstance(caught.value.__cause__, zipfile.BadZipFile)


def test_a_reference_to_nothing_is_named() -> None:
    bundle = checked_bundle("saliency", **{"methods": [{"_target_": "builtins.dict", "forget": "@forgt"}]})
    with pytest.raises(ValueError, match="`@forgt` is not defined") as caught:
        bundle.build("methods")
    assert "did you mean 'forget'" in str(caught.value.__cause__)


def test_building_does_not_change_the_config(workplace: Workplace) -> None:
    bundle = checked_bundle("saliency", **TINY, dataset_file=str(workplace.data))
    before = json.dumps(bundle.config)
    bundle.build("trainer", "evaluator", private_dir="", train_seed=5)
    assert json.dumps(bundle.config) == before


def test_the_same_recipe_has_one_hash_in_every_config() -> None:
    assert len({checked_bundle(name).recipe_hash("data", "7") for name in CONFIGS}) == 1


@pytest.mark.parametrize(
    "override",
    [
        {"lr": 0.5},
        {"epochs": 9},
        {"saliency_ratio": 0.1},
        {"batchnorm": "plain"},
        {"forget_fraction": 0.5},
        {"reference": False},
        {"output_dir": "elsewhere"},
        {"models_dir": "elsewhere"},
        {"dataset_file": "copy.npz"},
        {"device": "cuda"},
        {"seed": 3},
    ],
    ids=str,
)
def test_the_recipes_hash_does_not_depend_on(override: dict) -> None:
    assert checked_bundle("saliency", **override).recipe_hash() == checked_bundle("saliency").recipe_hash()


@pytest.mark.parametrize(
    "override",
    [
        {"train_epochs": 31},
        {"train_lr": 0.01},
        {"batch_size": 32},
        {"network_def::block_inplanes": [16, 32, 64, 64]},
        {"recipe::optimizer::momentum": 0.5},
        {"recipe::lr_scheduler::T_max": 7},
        {"loss_function": {"_target_": "torch.nn.MultiMarginLoss"}},
        {"augmentation": []},
        {"network": "$@network_def.to(@device)"},
    ],
    ids=str,
)
def test_the_recipes_hash_depends_on(override: dict) -> None:
    assert checked_bundle("saliency", **override).recipe_hash() != checked_bundle("saliency").recipe_hash()


def test_the_recipes_hash_depends_on_data_split_and_seed() -> None:
    bundle = checked_bundle("saliency")
    parts = [("a", "b", "0"), ("a", "b", "1"), ("a", "c", "0"), ("ab", "", "0"), ("a", "b"), ()]
    assert len({bundle.recipe_hash(*part) for part in parts}) == len(parts)


def test_no_bundle_runs_outside_of_monais_command() -> None:
    with pytest.raises(RuntimeError, match="No bundle is running"):
        Bundle.running()


def test_a_short_name_that_is_nowhere_is_refused_and_one_of_monai_is_taken(tmp_path: Path) -> None:
    for name, right in (("ScaleIntensityd", True), ("ScaleIntensityyd", False)):
        own = tmp_path / "own.json"
        own.write_text(json.dumps({"augmentation": [{"_target_": name, "keys": "image"}]}), encoding="utf-8")
        files = [str(bundle_path("finetune")), str(own)]
        if right:
            Bundle.from_files(files)
        else:
            with pytest.raises(ValueError, match=r"should name a class or function that is there, but got 'ScaleInt"):
                Bundle.from_files(files)


def test_of_a_short_name_in_several_modules_the_first_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = ["monai.transforms.intensity.dictionary", "monai.nowhere"]
    monkeypatch.setattr(bundle_module.ComponentLocator, "get_component_module_name", lambda self, name: modules)
    bundle_module._check_arguments("here", {"_target_": "ScaleIntensityd", "keys": "image"})
    with pytest.raises(ValueError, match="has no argument 'kyes'"):
        bundle_module._check_arguments("here", {"_target_": "ScaleIntensityd", "kyes": "image"})


# Devices and errors


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "", 5, None, "CPU "])
def test_a_device_that_is_not_there_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="device should be cpu, or a GPU that is there") as caught:
        device_of(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["cpu", torch.device("cpu")])
def test_the_cpu_is_a_device(name: Any) -> None:
    assert device_of(name) == torch.device("cpu")


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, PermissionError, FloatingPointError])
def test_under_monais_command_an_error_ends_in_its_message(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(Path("site-packages", "monai", "bundle", "__main__.py"))])
    with pytest.raises(SystemExit, match="monai_unlearn: the lr is too high"), readable_errors():
        raise error("the lr is too high")


def test_a_runtime_error_of_this_package_ends_in_its_message_and_one_of_torch_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["lib/monai/bundle/__main__.py"])
    with pytest.raises(SystemExit, match="monai_unlearn: No bundle is running"), readable_errors():
        running_workflow()
    with pytest.raises(RuntimeError, match="size of tensor a"), readable_errors():
        torch.zeros(2) + torch.zeros(3)


class _Broken(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise ValueError("Image 0 could not be read. Restore it: a hint.")


def test_an_error_of_a_loading_process_ends_in_its_message_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lib/monai/bundle/__main__.py"])
    with pytest.raises(SystemExit) as caught, readable_errors():
        list(torch.utils.data.DataLoader(_Broken(), num_workers=1))
    assert str(caught.value) == "\nmonai_unlearn: Image 0 could not be read. Restore it: a hint."


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, FloatingPointError, RuntimeError, KeyboardInterrupt])
def test_in_python_an_error_is_raised_as_it_is(error: type[BaseException]) -> None:
    raised = error("the lr is too high")
    with pytest.raises(error) as caught, readable_errors():
        raise raised
    assert caught.value is raised


def test_the_command_ends_on_a_misspelt_key_with_one_message_and_no_traceback(tmp_path: Path) -> None:
    options = ["--config_file", str(bundle_path("saliency")), "--forget_fracton", "0.2"]
    done = subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", "unlearn", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "monai_unlearn: There is no setting 'forget_fracton'. Did you mean 'forget_fraction'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
