"""Whole runs of the bundles: what they write, what they reuse, what they never touch."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundle_runs import (
    METHODS,
    PATIENTS,
    TEST,
    TINY,
    TRAIN,
    VALIDATION,
    Workplace,
    checked_bundle,
    files_below,
    messages,
    sha256,
    unfinished_below,
    with_patients,
)
from monai.utils import set_determinism
from safetensors.torch import load_file

from monai_unlearn.data import make_split, read_medmnist

pytest_plugins = ["bundle_runs"]

FORGET = TRAIN // 10
RETAIN = TRAIN - FORGET
SPLITS = {"forget", "retain", "validation", "test"}
FIGURES = {"accuracy", "auroc", "loss", "n"}
COST = {"seconds", "samples", "forward", "backward", "peak_bytes"}


def _report(output: Path) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads((output / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)


def _state(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "unlearned_model.pt", weights_only=True)


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _leaves(part)
    else:
        yield value


# Training an original model


def test_training_prints_the_models_path_and_unlearning_then_finds_it(
    empty_workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    empty_workplace.train()
    printed = capsys.readouterr().out
    path = re.search(r"--original_checkpoint (\S+\.pt) ", printed)
    assert path is not None, printed
    original = empty_workplace.folder / path[1]
    assert original.is_file()
    empty_workplace.network().load_state_dict(torch.load(original, weights_only=True), strict=True)
    before = files_below(empty_workplace.models)

    output = empty_workplace.unlearn(reference=False)
    provenance = _report(output)["provenance"]
    assert empty_workplace.folder / provenance["original_checkpoint"] == original
    assert provenance["hashes"]["original"] == sha256(original)
    assert files_below(empty_workplace.models) == before

    named = empty_workplace.unlearn(reference=False, original_checkpoint=path[1], output_dir="named")
    assert _same(_state(named), _state(output))


def test_training_says_how_well_the_model_does(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    workplace.train()
    printed = capsys.readouterr().out
    assert f"(n = {TRAIN})" in printed
    assert f"(n = {VALIDATION // 2})" in printed or f"(n = {VALIDATION // 2 + 1})" in printed
    assert "Original model: taken from" in printed


def test_training_twice_trains_once(workplace: Workplace) -> None:
    kept = workplace.kept()["original"]
    before = files_below(workplace.models), kept.stat().st_mtime_ns
    workplace.train()
    assert (files_below(workplace.models), kept.stat().st_mtime_ns) == before


def test_training_is_reproducible_and_depends_on_the_seed(workplace: Workplace) -> None:
    workplace.train(models_dir="again")
    workplace.train(models_dir="again", seed=1)
    states = [torch.load(path, weights_only=True) for path in (workplace.folder / "again").glob("*/model.pt")]
    assert len(states) == 2
    assert sorted(_same(state, workplace.original()) for state in states) == [False, True]


def test_a_file_without_a_model_or_checkpoint_raises_and_says_what_to_do(empty_workplace: Workplace) -> None:
    with pytest.raises(RuntimeError) as caught:
        empty_workplace.unlearn()
    text = messages(caught.value)
    assert "There is no original model of tiny to unlearn from" in text
    assert "--original_checkpoint FILE" in text
    assert "`run train`, and bundles/train.json in the place of" in text
    assert not (empty_workplace.folder / "runs" / "saliency").exists()
    assert not unfinished_below(empty_workplace.folder)


def test_a_model_that_was_changed_since_is_not_used(workplace: Workplace) -> None:
    kept = workplace.kept()["original"]
    state = torch.load(kept, weights_only=True)
    torch.save({name: value + 1 for name, value in state.items()}, kept)
    with pytest.raises(RuntimeError) as caught:
        workplace.unlearn()
    assert "was changed or damaged since. Remove that folder to train anew." in messages(caught.value)


# What a run writes

# One of each kind: a mask, a teacher and a rewind, no step at all, the recipe's own trainer. That all run by themselves
# comes first, and what their handlers promise is in tests/methods.
KINDS = ("saliency", "scrub", "synaptic_dampening", "retrain", "auto")


@pytest.mark.pages
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_by_itself_from_another_directory(
    method: str, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = workplace.folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    workplace.unlearn(method, models_dir=str(workplace.models))
    output = elsewhere / "runs" / method
    written = {path.name for path in output.iterdir()}
    assert written == {"unlearned_model.pt", "report.json", "report.html", "split.json", "private"}
    assert sorted(path.name for path in elsewhere.iterdir()) == ["runs"]
    assert sorted(path.name for path in (elsewhere / "runs").iterdir()) == [method]
    workplace.network().load_state_dict(_state(output), strict=True)


@pytest.mark.parametrize("method", KINDS)
def test_report_has_exactly_the_promised_nesting(method: str, workplace: Workplace) -> None:
    output = workplace.unlearn(method)
    report = _report(output)
    assert set(report) == {
        "schema_version",
        "method",
        "task",
        "settings",
        "request",
        "notes",
        "findings_left_out",
        "models",
        "gap_to_retrained",
        "cost",
        "provenance",
        "audit",
        "left",
        "finalised",
    }
    assert report["method"] == method
    assert set(report["models"]) == {"original", "unlearned", "retrained"}
    for model in report["models"].values():
        assert set(model) == SPLITS | {"attack"}
        assert all(set(model[split]) == FIGURES for split in SPLITS)
        assert {split: model[split]["n"] for split in SPLITS} == {
            "forget": FORGET,
            "retain": RETAIN,
            "validation": model["validation"]["n"],
            "test": TEST,
        }
        assert model["validation"]["n"] in (VALIDATION // 2 - 1, VALIDATION // 2, VALIDATION // 2 + 1)
        assert set(model["attack"]) == {"auc", "low", "high"}
        assert 0 <= model["attack"]["low"] <= model["attack"]["auc"] <= model["attack"]["high"] <= 1
        assert all(0 <= model[split][figure] <= 1 for split in SPLITS for figure in ("accuracy", "auroc"))
    assert set(report["cost"]) == {"mask", "tuning", "unlearn", "retrain", "evaluation", "caching", "ratio"}
    assert all(set(phase) == COST for name, phase in report["cost"].items() if name != "ratio")
    assert set(report["provenance"]) >= {"original_checkpoint", "versions", "machine", "seeds", "hashes", "data"}
    assert set(report["provenance"]["hashes"]) == {"original", "unlearned", "retrained", "split"}
    assert 0 <= report["gap_to_retrained"] <= 100
    assert not any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in _leaves(report))


def test_report_without_a_reference_has_null_where_it_would_be(workplace: Workplace) -> None:
    workplace.kept()["retrained"].parent.rename(workplace.folder / "set aside")
    output = workplace.unlearn(reference="false")
    report = _report(output)
    assert report["settings"]["reference"] is False
    assert report["models"]["retrained"] is None
    assert report["gap_to_retrained"] is None
    assert report["cost"]["retrain"] is None
    assert report["provenance"]["hashes"]["retrained"] is None
    assert len(list(workplace.models.iterdir())) == 1


def test_report_agrees_with_the_files_and_the_settings(workplace: Workplace) -> None:
    output = workplace.unlearn("saliency", epochs=2, lr=0.03125, seed=0)
    report = _report(output)
    kept = workplace.kept()
    assert report["provenance"]["hashes"] == {
        "original": sha256(kept["original"]),
        "unlearned": sha256(output / "unlearned_model.pt"),
        "retrained": sha256(kept["retrained"]),
        "split": sha256(output / "split.json"),
    }
    assert report["provenance"]["data"] == {"name": "tiny", "sha256": read_medmnist(workplace.data).digest()}
    given = {"epochs": 2, "lr": 0.03125, "batch_size": TINY["batch_size"], "dataset_file": str(workplace.data)}
    assert report["settings"].items() >= given.items()
    assert (output / "private" / "saliency_mask.safetensors").is_file()


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        # Mask: each forget image forward and backward. Unlearning: two epochs, then BatchNorm's retain pass.
        ("saliency", {"mask": (FORGET, FORGET), "unlearn": (2 * TRAIN + RETAIN, 2 * TRAIN)}),
        ("random_labeling", {"mask": (0, 0), "unlearn": (2 * TRAIN + RETAIN, 2 * TRAIN)}),
        ("retrain", {"mask": (0, 0), "unlearn": (4 * RETAIN, 4 * RETAIN)}),
    ],
)
def test_report_counts_every_pass(method: str, passes: dict, workplace: Workplace) -> None:
    cost = _report(workplace.unlearn(method, **({} if method == "retrain" else {"epochs": 2})))["cost"]
    for phase, (forward, backward) in {**passes, "tuning": (0, 0), "retrain": (4 * RETAIN, 4 * RETAIN)}.items():
        assert (cost[phase]["samples"], cost[phase]["forward"], cost[phase]["backward"]) == (forward, forward, backward)
        assert (cost[phase]["seconds"] > 0) == (forward > 0)


def test_the_original_is_described_alike_whatever_the_method(workplace: Workplace) -> None:
    described = [_report(workplace.unlearn(method))["models"]["original"] for method in KINDS]
    assert all(one == described[0] for one in described)


def test_the_split_is_written_as_keyed_hashes(workplace: Workplace) -> None:
    output = workplace.unlearn()
    data = read_medmnist(workplace.data)
    key = (output / "private" / "split_key").read_text().strip()
    written = json.loads((output / "split.json").read_text())
    assert written == dataclasses.replace(make_split(data, seed=0, forget_fraction=0.1), key=key).as_hashes(data)
    assert written["forget"]["n"] == FORGET
    assert json.loads((workplace.unlearn() / "split.json").read_text())["forget"]["hash"] != written["forget"]["hash"]


@pytest.mark.pages
def test_the_run_ends_with_a_table_and_the_paths(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    output = workplace.unlearn()
    printed = capsys.readouterr().out
    for word in ("original", "unlearned", "retrained", *SPLITS, "Cost:"):
        assert word in printed
    for name in ("unlearned_model.pt", "report.json", "report.html"):
        path = re.search(rf"Wrote (\S*{name})", printed)
        assert path is not None
        assert (workplace.folder / path[1]).samefile(output / name)
    assert re.search(r"still hold forget data or weights from before.*finalise runs/saliency`", printed)


def test_a_run_draws_progress_of_its_epochs(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    workplace.unlearn("random_labeling", epochs=2)
    assert "unlearning" in capsys.readouterr().err


# What a run reuses and keeps


def test_a_second_run_reuses_the_models_and_keeps_the_earlier_output(empty_workplace: Workplace) -> None:
    empty_workplace.train()
    output = empty_workplace.unlearn()
    first, models = files_below(output), files_below(empty_workplace.models)
    times = {path: path.stat().st_mtime_ns for path in empty_workplace.models.rglob("*")}
    empty_workplace.unlearn(lr=0.5)
    second = files_below(output)
    empty_workplace.unlearn()

    assert len(models) == 5  # two models, their costs, and the history of the original
    assert files_below(empty_workplace.models) == models
    assert {path: path.stat().st_mtime_ns for path in empty_workplace.models.rglob("*")} == times
    assert files_below(output.with_name("saliency.2")) == first
    assert files_below(output.with_name("saliency.1")) == second
    assert second["unlearned_model.pt"] != first["unlearned_model.pt"]
    assert _report(output)["cost"]["retrain"] == _report(output.with_name("saliency.2"))["cost"]["retrain"]
    assert sorted(path.name for path in output.parent.iterdir()) == ["models", "saliency", "saliency.1", "saliency.2"]


@pytest.mark.parametrize("method", KINDS)
def test_the_same_seed_gives_bit_identical_weights(method: str, workplace: Workplace) -> None:
    first = _state(workplace.unlearn(method))
    torch.manual_seed(99)  # whatever the process did before
    np.random.seed(99)
    second = _state(workplace.unlearn(method, reference=False))
    assert _same(first, second)


def test_another_seed_gives_other_weights(workplace: Workplace) -> None:
    original = str(workplace.kept()["original"])
    states = [
        _state(workplace.unlearn("random_labeling", seed=seed, original_checkpoint=original, reference=False))
        for seed in (0, 1)
    ]
    assert not _same(*states)


def test_an_unlearned_model_that_is_of_no_use_is_told(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    """DELETE with a rate that is too high; and nothing of the kind where the model is as good as before."""
    found = {}
    for method, settings in {"finetune": {"lr": 1e-6}, "delete": {"lr": 3.0, "epochs": 5}}.items():
        capsys.readouterr()
        folder = workplace.unlearn(method, reference=False, **settings)
        notes = json.loads((folder / "report.json").read_text(encoding="utf-8"))["notes"]
        found[method] = [note for note in notes if note.startswith("The unlearned model has")]
        printed = "".join(capsys.readouterr())
        assert ("The unlearned model has a balanced accuracy of" in printed) == bool(found[method])
    assert found["finetune"] == []
    (note,) = found["delete"]
    assert "near the chance of 0.333: it is of no use." in note


def test_output_goes_where_output_dir_says(workplace: Workplace) -> None:
    workplace.unlearn(output_dir="deep/er/here")
    assert (workplace.folder / "deep/er/here/report.json").is_file()
    assert not (workplace.folder / "runs" / "saliency").exists()
    assert (workplace.folder / "deep/er/here/private/saliency_mask.safetensors").is_file()
    assert not unfinished_below(workplace.folder)


def test_the_request_is_taken_from_the_file(workplace: Workplace) -> None:
    wanted = [3, 17, 90, 91]
    request = workplace.folder / "withdrawn.txt"
    request.write_text("\n".join(map(str, wanted)))
    report = _report(workplace.unlearn(reference=False, forget_indices="withdrawn.txt"))
    assert report["models"]["unlearned"]["forget"]["n"] == len(wanted)
    assert report["models"]["unlearned"]["retain"]["n"] == TRAIN - len(wanted)
    assert report["cost"]["mask"]["samples"] == len(wanted)
    assert report["settings"]["forget_indices"] == "a file"
    assert request.read_text() == "\n".join(map(str, wanted))


# What the methods do in a run


def test_the_retrain_bundle_gives_the_model_that_is_the_others_reference(workplace: Workplace) -> None:
    unlearned = _state(workplace.unlearn("retrain", reference=False))
    assert _same(unlearned, torch.load(workplace.kept()["retrained"], weights_only=True))


def test_the_reference_of_the_retrain_bundle_has_another_seed(workplace: Workplace) -> None:
    before = set(workplace.models.iterdir())
    output = workplace.unlearn("retrain", seed=0)
    report = _report(output)
    assert report["provenance"]["seeds"] == {"split": 0, "unlearning": 0, "retrained": 1}
    (new,) = set(workplace.models.iterdir()) - before
    reference = torch.load(new / "model.pt", weights_only=True)
    assert report["provenance"]["hashes"]["retrained"] == sha256(new / "model.pt")
    assert not _same(reference, _state(output))
    assert report["models"]["retrained"]["validation"]["loss"] != report["models"]["unlearned"]["validation"]["loss"]


@pytest.mark.parametrize("method", ["saliency", "random_labeling"])
def test_the_reference_of_the_other_bundles_has_the_runs_seed(method: str, workplace: Workplace) -> None:
    seeds = _report(workplace.unlearn(method))["provenance"]["seeds"]
    assert seeds == {"split": 0, "unlearning": 0, "retrained": 0}


def test_weights_outside_the_saliency_mask_are_those_of_the_original(workplace: Workplace) -> None:
    output = workplace.unlearn("saliency", epochs=2, lr=0.1, saliency_ratio=0.25)
    mask = load_file(output / "private" / "saliency_mask.safetensors")
    original, unlearned = workplace.original(), _state(output)
    changed = 0
    for name, may_change in mask.items():
        moved = original[name] != unlearned[name]
        assert not bool((moved & ~may_change).any()), name
        changed += int(moved.sum())
    total = sum(value.numel() for value in mask.values())
    assert sum(int(value.sum()) for value in mask.values()) == math.floor(0.25 * total + 0.5)
    assert changed > 0


# Of the tiny ResNet's 13 layers: layer3.0 has its first convolution frozen, and the others not.
FROZEN = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.0.conv1.", "layer3.0.bn1.")


@pytest.mark.parametrize("method", ["cf_k", "eu_k"])
def test_frozen_layers_stay_bit_identical_in_the_bundles_as_shipped(method: str, workplace: Workplace) -> None:
    original, unlearned = workplace.original(), _state(workplace.unlearn(method))
    same = {name for name in original if torch.equal(original[name], unlearned[name])}
    assert same == {name for name in original if name.startswith(FROZEN)}


def test_eu_k_starts_its_last_layers_where_the_original_of_that_seed_began(workplace: Workplace) -> None:
    data = {**TINY, "dataset_file": str(workplace.data)}
    set_determinism(0)
    start = checked_bundle("train", **data).build("recipe::trainer", train_seed=0).network.state_dict()
    unlearned = _state(workplace.unlearn("eu_k", lr=1e-30))
    for name, _ in workplace.network().named_parameters():
        state = workplace.original() if name.startswith(FROZEN) else start
        torch.testing.assert_close(unlearned[name], state[name], rtol=0, atol=1e-20, msg=name)


@pytest.mark.parametrize(
    ("batchnorm", "follow"), [("frozen", False), ("plain", True), ("retain", True)], ids=["frozen", "plain", "retain"]
)
def test_batch_norm_statistics_follow_the_policy(batchnorm: str, follow: bool, workplace: Workplace) -> None:
    original, unlearned = workplace.original(), _state(workplace.unlearn(batchnorm=batchnorm))
    names = [name for name in original if name.endswith(("running_mean", "running_var"))]
    assert names
    assert all(torch.equal(original[name], unlearned[name]) != follow for name in names)


# The user's checkpoint


def _forms(state: dict[str, torch.Tensor]) -> dict[str, tuple[dict, str | None, str]]:
    """Name → content of a file, key of the network in it, and prefix of the names."""
    traces = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    parallel = {f"module.{name}": value for name, value in state.items()}
    return {
        "bare": (OrderedDict(state), None, ""),
        "network and optimizer": ({"network": state, "optimizer": traces}, "network", ""),
        "model, averaged copy, trainer": (
            {"model": state, "ema": state, "trainer": {"iteration": 3, "epoch_length": 8}},
            "model",
            "",
        ),
        "distributed": ({"state_dict": parallel}, "state_dict", "module."),
        "key of one's own": ({"weights": state, "optimizer": traces}, "weights", ""),
    }


@pytest.mark.parametrize("form", list(_forms({})))
def test_a_checkpoint_comes_out_in_the_form_it_came_in(form: str, workplace: Workplace) -> None:
    content, key, prefix = _forms(workplace.original())[form]
    mine = workplace.folder / "mine.pt"
    torch.save(content, mine)
    before = sha256(mine)
    output = workplace.unlearn(
        original_checkpoint="mine.pt", reference=False, **({"network_key": key} if key == "weights" else {})
    )

    assert sha256(mine) == before
    written = _state(output)
    assert key is None or set(written) == {key}
    state = written if key is None else written[key]
    assert list(state) == [prefix + name for name in workplace.original()]
    workplace.network().load_state_dict({name[len(prefix) :]: value for name, value in state.items()}, strict=True)
    provenance = _report(output)["provenance"]
    assert provenance["original_checkpoint"] == "mine.pt"
    assert provenance["hashes"]["original"] == before
    bare = _state(workplace.unlearn(reference=False, output_dir="bare"))
    assert all(torch.equal(state[prefix + name], value) for name, value in bare.items())


# Patients


@pytest.mark.pages
@pytest.mark.parametrize("method", ["saliency", "retrain"])
def test_no_patient_id_leaves_the_run(
    method: str, empty_workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("monai_unlearn.data.load.synthetic_cells", with_patients)
    request = empty_workplace.folder / "request.txt"
    request.write_text(f"{PATIENTS[3]}\n{PATIENTS[7]}\n")
    output = empty_workplace.unlearn(method, dataset_file=None, forget_patients="request.txt")
    printed = capfd.readouterr()

    assert "training an original model on the embedded data first" in printed.out
    assert "60 training images of 12 patients" in printed.out
    report = _report(output)
    assert report["models"]["unlearned"]["forget"]["n"] == 10
    assert json.loads((output / "split.json").read_text())["unit"] == "patient"
    written = {path: path.read_bytes() for path in (empty_workplace.folder / "runs").rglob("*") if path.is_file()}
    assert len(written) > 6
    for patient in PATIENTS:
        assert patient not in printed.out + printed.err
        for path, content in written.items():
            assert patient not in str(path)
            assert patient.encode() not in content, path.name
            assert patient.encode("utf-16-le") not in content, path.name


@pytest.mark.pages
def test_a_request_named_after_a_patient_is_not_named_in_the_results(
    empty_workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monai_unlearn.data.load.synthetic_cells", with_patients)
    request = empty_workplace.folder / f"{PATIENTS[3]}.txt"
    request.write_text(PATIENTS[3])
    output = empty_workplace.unlearn(dataset_file=None, forget_patients=request.name, reference=False)
    assert all(PATIENTS[3].encode() not in path.read_bytes() for path in output.rglob("*") if path.is_file())


def test_a_fraction_forgets_whole_patients(empty_workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_unlearn.data.load.synthetic_cells", with_patients)
    output = empty_workplace.unlearn(dataset_file=None, forget_fraction=0.1, reference=False)
    assert _report(output)["models"]["unlearned"]["forget"]["n"] == 10


def test_the_split_of_a_run_is_that_of_make_split() -> None:
    bundle = checked_bundle("saliency", seed=3, forget_fraction=0.25)
    data = with_patients()
    bundle.share(data=data)
    built, made = bundle.build("split"), make_split(data, seed=3, forget_fraction=0.25)
    assert np.array_equal(built.forget, made.forget)
    assert np.array_equal(built.validation, made.validation)
