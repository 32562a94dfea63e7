"""Bad input: each row says what is wrong, changes nothing, and leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundle_runs import PATIENTS, TRAIN, Workplace, files_below, medmnist_arrays, messages, sha256, with_patients

pytest_plugins = ["bundle_runs"]

Row = Callable[[Workplace], dict[str, Any]]


def _settings(**settings: Any) -> Row:
    return lambda workplace: settings


def _request(text: str, key: str = "forget_indices") -> Row:
    def prepare(workplace: Workplace) -> dict[str, Any]:
        (workplace.folder / "request.txt").write_text(text)
        return {key: "request.txt"}

    return prepare


def _json(request: Any, **settings: Any) -> Row:
    """A deletion request, with the key that an earlier run has left beside it."""

    def prepare(workplace: Workplace) -> dict[str, Any]:
        text = request if isinstance(request, str) else json.dumps(request)
        (workplace.folder / "request.json").write_text(text)
        (workplace.folder / "request.json.key").write_text("0123456789abcdef" * 4)
        return {"forget_request": "request.json", **settings}

    return prepare


def _damaged_key(workplace: Workplace) -> dict[str, Any]:
    (workplace.folder / "request.json.key").write_text("not a key")
    return {}


def _include(selector: Any, **settings: Any) -> Row:
    return _json({"include": [selector]}, **settings)


def _data(**changes: Any) -> Row:
    """A data file with other arrays; None leaves one out."""

    def prepare(workplace: Workplace) -> dict[str, Any]:
        arrays = {key: value for key, value in (medmnist_arrays() | changes).items() if value is not None}
        np.savez(workplace.folder / "other.npz", **arrays)
        return {"dataset_file": "other.npz"}

    return prepare


def _bytes(change: Callable[[bytes], bytes], name: str, setting: str) -> Row:
    """A file that is there, with changed content."""

    def prepare(workplace: Workplace) -> dict[str, Any]:
        source = workplace.data if setting == "dataset_file" else workplace.kept()["original"]
        (workplace.folder / name).write_bytes(change(source.read_bytes()))
        return {setting: name}

    return prepare


def _checkpoint(make: Callable[[Workplace], Any], **settings: Any) -> Row:
    def prepare(workplace: Workplace) -> dict[str, Any]:
        torch.save(make(workplace), workplace.folder / "mine.pt")
        return {"original_checkpoint": "mine.pt", **settings}

    return prepare


class _Code:
    """What a malicious checkpoint holds: a call that unpickling makes."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


def _pickle(workplace: Workplace) -> dict[str, Any]:
    (workplace.folder / "mine.pt").write_bytes(pickle.dumps({"model": _Code()}))
    return {"original_checkpoint": "mine.pt"}


def _nan_image(value: float) -> np.ndarray:
    images = medmnist_arrays()["train_images"] / 255
    images[7, 3, 3] = value
    return images


def _without_last(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(state.items())[:-1])


def _folder(name: str, content: dict[str, str]) -> Row:
    def prepare(workplace: Workplace) -> dict[str, Any]:
        (workplace.folder / name).mkdir(parents=True)
        for file, text in content.items():
            (workplace.folder / name / file).write_text(text)
        return {"output_dir": name}

    return prepare


ROWS: dict[str, tuple[Row, str]] = {
    # The request
    "empty request": (_request(" \n\n"), "should name at least one entry.*Nothing to forget"),
    "no such request": (_settings(forget_indices="nowhere.txt"), "existing text file.*'nowhere.txt'"),
    "no part": (_settings(forget_fraction=0.0), "forget_fraction should lie between 0 and 1"),
    "every part": (_settings(forget_fraction=1.0), "forget_fraction should lie between 0 and 1"),
    "negative part": (_settings(forget_fraction=-0.1), r"forget_fraction should lie between 0 and 1 .*-0\.1"),
    "part that is no number": (_settings(forget_fraction=float("nan")), "forget_fraction should lie .*nan"),
    "all but none": (_settings(forget_fraction=0.9999), f"all {TRAIN} images of the training data are to be forgotten"),
    "everything": (
        _request("\n".join(map(str, range(TRAIN)))),
        f"all {TRAIN} images of the training data are to be forgotten",
    ),
    "index too large": (_request(f"1\n{TRAIN}\n"), rf"should lie in \[0, {TRAIN - 1}\], but 1 of 2 do not"),
    "negative index": (_request("-1\n"), "should lie in .* but 1 of 1 do not"),
    "index twice": (_request("5\n6\n5\n"), "name each entry once"),
    "index twice, written otherwise": (_request("5\n05\n"), "name each image once, but 1 repeat"),
    "index that is no number": (_request("5\nsix\n"), "one whole number a line"),
    "patients where there are none": (_request("P1\n", "forget_patients"), "has none. Use --forget_indices"),
    "both kinds of request": (
        _settings(forget_indices="a.txt", forget_patients="b.txt"),
        "forget_indices or forget_patients, not both",
    ),
    # The request in JSON
    "no such JSON request": (_settings(forget_request="no.json"), "The request should be an existing file.*'no.json'"),
    "request of another kind": (_settings(forget_request="tiny.npz"), "should be a .json or .csv file, but got '.npz'"),
    "request that is no JSON": (_json('{"include": ['), r"The request should be JSON, but line 1, column \d+ is not"),
    "request of nothing": (_json({}), "The request should be .*include"),
    "request of no selector": (_json({"include": []}), "include should be .*but got an empty one"),
    "request of no value": (_include({"index": []}), r"include\[0\].index should be .* but got an empty one"),
    "misspelt key": (_json({"includes": [{"index": 1}]}), "should have no keys but .* Did you mean 'include'?"),
    "misspelt selector": (_include({"idnex": 1}), r"include\[0\] should have no keys but .* Did you mean 'index'?"),
    "value of another type": (_include({"index": "three"}), r"include\[0\].index .*should be .* but got text"),
    "request that matches nothing": (_include({"index": [400, 500]}), "2 of 2 match none.*Nothing to forget"),
    "request that matches in part": (
        _include({"index": [3, 500]}),
        r"1 of 2 match none: include\[0\] entry 2 \(index [0-9a-f]{12}\).*--allow_partial true",
    ),
    "request that matches nothing, in part": (_include({"index": 500}, allow_partial=True), "Nothing to forget"),
    "request for everything": (_include({"index": list(range(TRAIN))}), f"all {TRAIN} images of the training data"),
    "request that excludes all": (
        _json({"include": [{"index": [1, 2]}], "exclude": [{"index": [1, 2]}]}),
        "exclude takes off all 2 that include selects",
    ),
    "rule that does not parse": (_include({"rule": "sex == "}), r"include\[0\] entry 1 .*should"),
    "rule on no column": (_include({"rule": 'sex == "F"'}), r"include\[0\] entry 1 should name columns of the data"),
    "ids for data without": (_include({"study": "1.2.3"}), r"include\[0\] needs a column 'study', but .* has none"),
    "patients asked for": (_json({"unit": "patient", "include": [{"index": 1}]}), "has no column 'patient'"),
    "score that is nowhere": (_include({"hardest": 10, "score": "mean_los"}), "goes by mean_los. The data has no such"),
    "more than all hardest": (_include({"hardest": 110}), r"include\[0\].hardest should be .* but got 110"),
    "request and shortcut": (_include({"index": 1}, forget_indices="a"), "forget_indices or forget_request, not both"),
    "no such overlap": (_settings(overlap="ignore"), "overlap should be one of refuse, drop, keep, but got 'ignore'"),
    "damaged key": (
        lambda workplace: {**_include({"index": 1})(workplace), **_damaged_key(workplace)},
        "'request.json.key' beside the request should hold 64 hexadecimal digits",
    ),
    # The data
    "no such data": (_settings(dataset_file="nowhere.npz"), "existing .npz file.*'nowhere.npz'.*--download"),
    "data without a key": (_data(val_labels=None), "has no 'val_labels'"),
    "data of other shape": (_data(test_images=np.zeros((30, 12, 10), np.uint8)), "should have the shape"),
    "fewer labels than images": (_data(train_labels=np.zeros((9, 1), np.uint8)), r"N = 9 \(the number of labels\)"),
    "multi-label data": (_data(train_labels=np.zeros((TRAIN, 4), np.uint8)), "Multi-label tasks are not supported"),
    "data of one class": (
        _data(**{f"{split}_labels": medmnist_arrays()[f"{split}_labels"] * 0 for split in ("train", "val", "test")}),
        "at least two classes",
    ),
    "NaN in an image": (_data(train_images=_nan_image(float("nan"))), f"1 of {TRAIN} hold NaN or infinity"),
    "infinity in an image": (_data(train_images=_nan_image(float("inf"))), f"1 of {TRAIN} hold NaN or infinity"),
    "image out of range": (_data(train_images=_nan_image(3.5)), r"should lie in \[0, 1\]"),
    "pickled array": (_data(train_labels=np.array([{}] * TRAIN)), "could not be read"),
    "data cut off": (_bytes(lambda b: b[: len(b) // 2], "half.npz", "dataset_file"), "half.npz could not be read"),
    "data that is no archive": (_bytes(lambda b: b"text" * 99, "text.npz", "dataset_file"), "text.npz could not be"),
    "empty data": (_bytes(lambda b: b"", "empty.npz", "dataset_file"), "empty.npz could not be read"),
    "file and download": (_settings(download="tissuemnist"), "dataset_file or download, not both"),
    "no such download": (_settings(dataset_file=None, download="tisuemnist"), "2-D set of MedMNIST, but got 'tisuemni"),
    # The checkpoint
    "no such checkpoint": (_settings(original_checkpoint="nowhere.pt"), "'nowhere.pt' does not exist"),
    "checkpoint that is a folder": (_settings(original_checkpoint="runs"), "'runs' does not exist"),
    "checkpoint cut off": (
        _bytes(lambda b: b[: len(b) // 2], "half.pt", "original_checkpoint"),
        "half.pt could not be read as a checkpoint. It is damaged",
    ),
    "empty checkpoint": (_bytes(lambda b: b"", "empty.pt", "original_checkpoint"), "empty.pt could not be read"),
    "text for a checkpoint": (_bytes(lambda b: b"hello", "text.pt", "original_checkpoint"), "text.pt could not be"),
    "checkpoint with code": (_checkpoint(lambda w: {"model": _Code()}), "would run code from the file"),
    "plain pickle with code": (_pickle, "mine.pt (holds more than tensors|could not be read)"),
    "whole network for a checkpoint": (_checkpoint(lambda w: w.network()), "holds more than tensors"),
    "checkpoint without a network": (_checkpoint(lambda w: {"epoch": 3}), "no network state.*--network_key"),
    "checkpoint of a list": (_checkpoint(lambda w: [1, 2]), "no network state.*list"),
    "checkpoint of another network": (
        _checkpoint(lambda w: torch.nn.Linear(3, 3).state_dict()),
        "another network: .* missing, 2 unknown",
    ),
    "checkpoint with a part missing": (
        _checkpoint(lambda w: _without_last(w.original())),
        "another network: 1 entries are missing, 0 unknown",
    ),
    "checkpoint with other classes": (
        _checkpoint(lambda w: w.network(classes=5).state_dict()),
        r"fc.weight is \(5, 8\) in the checkpoint and \(3, 8\) here.*number of classes",
    ),
    "checkpoint with other channels": (
        _checkpoint(lambda w: w.network(channels=3).state_dict()),
        "of another shape .*conv1.weight.*channels",
    ),
    "network of fewer classes than the data": (
        _checkpoint(lambda w: w.network(classes=2).state_dict(), **{"network_def::num_classes": 2}),
        r"3 classes, shape \(1, 3\) for one image, but gives \(1, 2\)",
    ),
    "network of more classes than the data": (
        _checkpoint(lambda w: w.network(classes=5).state_dict(), **{"network_def::num_classes": 5}),
        r"3 classes, shape \(1, 3\) for one image, but gives \(1, 5\)",
    ),
    "wrong key": (_checkpoint(lambda w: {"net": w.original()}, network_key="mine"), "no 'mine'; it holds .'net'"),
    "checkpoint near chance": (
        _checkpoint(lambda w: {name: value * 0 for name, value in w.original().items()}),
        "mine.pt has a balanced accuracy of 0.333 on its own training data, near the chance of 0.333. Check that the",
    ),
    "NaN in the checkpoint": (
        _checkpoint(lambda w: {**w.original(), "fc.bias": torch.tensor([0, float("nan"), 0])}),
        "1 tensors hold NaN or infinity",
    ),
    "network of another number of channels": (
        _settings(**{"network_def::n_input_channels": 3}),
        r"network_def does not take images of shape \(1, 12, 12\)",
    ),
    # The method
    "ratio above one": (_settings(saliency_ratio=1.5), r"ratio should lie in \[0, 1\], but got 1.5"),
    "negative ratio": (_settings(saliency_ratio=-0.5), r"ratio should lie in \[0, 1\], but got -0.5"),
    "no such policy": (_settings(batchnorm="none"), "one of retain, frozen, plain, but got 'none'"),
    "NaN loss": (_settings(lr=1e9, epochs=3), "loss should be finite, but is nan.*Lower the learning rate"),
    "loss that overflows at once": (_settings(lr=1e38), "loss should be finite"),
    "no such device": (_settings(device="gpu"), "device should be cpu, or a GPU that is there .*'gpu'"),
    # The output folder
    "output with someone's files": (_folder("mine", {"thesis.tex": "x"}), "no run of monai_unlearn wrote"),
    "output with someone's report": (_folder("mine", {"report.json": '{"a": 1}'}), "no run of monai_unlearn wrote"),
    "output with a broken report": (_folder("mine", {"report.json": "{"}), "no run of monai_unlearn wrote"),
    "output that is a file": (_settings(output_dir="tiny.npz"), "output_dir should be a folder, but 'tiny.npz' is a f"),
    "output below a file": (_settings(output_dir="tiny.npz/out"), "'tiny.npz/out' can't be written"),
    "output in the models' folder": (_settings(output_dir="runs/models"), "no run of monai_unlearn wrote"),
    "output in the working directory": (_settings(output_dir="."), "output_dir '.' holds files"),
}


def _everything(folder: Path) -> tuple[dict[str, str], set[str]]:
    return files_below(folder), {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("row", ROWS)
def test_bad_input_is_refused_and_leaves_everything_as_it_was(row: str, workplace: Workplace) -> None:
    prepare, message = ROWS[row]
    settings = prepare(workplace)
    before = _everything(workplace.folder)

    with pytest.raises((RuntimeError, OSError)) as caught:
        workplace.unlearn(**settings)

    assert re.search(message, messages(caught.value), re.DOTALL)
    assert _everything(workplace.folder) == before


def test_an_unknown_patient_is_refused_without_being_named(
    empty_workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("monai_unlearn.data.load.synthetic_cells", with_patients)
    (empty_workplace.folder / "request.txt").write_text(f"{PATIENTS[0]}\nNobody-77\n")
    with pytest.raises(RuntimeError) as caught:
        empty_workplace.unlearn(dataset_file=None, forget_patients="request.txt")
    assert "match an image of the training data, but 1 of 2 match none" in messages(caught.value)
    printed = capfd.readouterr()
    assert "Nobody-77" not in messages(caught.value) + printed.out + printed.err
    assert not list((empty_workplace.folder / "runs").iterdir())


def test_no_code_of_a_checkpoint_runs(workplace: Workplace) -> None:
    settings = _checkpoint(lambda _: {"model": _Code()})(workplace)
    with pytest.raises(RuntimeError):
        workplace.unlearn(**settings)
    assert not (workplace.folder / "executed").exists()
    torch.load(workplace.folder / "mine.pt", weights_only=False)  # the file would have done it
    assert (workplace.folder / "executed").exists()


def test_an_output_folder_that_cannot_be_written_is_refused_before_any_work(
    empty_workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def locked(path: Path, *args: Any, **kwargs: Any) -> None:  # root may write whatever the mode of a folder is
        if "locked" in path.parts[:-1]:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        mkdir(path, *args, **kwargs)

    (empty_workplace.folder / "locked").mkdir()
    monkeypatch.setattr(Path, "mkdir", locked)
    before = _everything(empty_workplace.folder)
    with pytest.raises(RuntimeError) as caught:  # no model is there either: this comes first
        empty_workplace.unlearn(output_dir="locked/out")
    assert "output_dir 'locked/out' can't be written (Permission denied)" in messages(caught.value)
    assert _everything(empty_workplace.folder) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"saliency_ratio": 2.0}, "ratio should lie in [0, 1], but got 2.0"),
        ({"batchnorm": "none"}, "one of retain, frozen, plain, but got 'none'"),
        ({"device": "gpu"}, "device should be cpu"),
        ({"output_dir": "request.txt"}, "output_dir should be a folder"),
        ({"network_def::num_classes": 7}, "for one image, but gives (1, 7)"),
    ],
    ids=str,
)
def test_a_wrong_setting_shows_before_a_model_is_trained(
    settings: dict, message: str, empty_workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monai_unlearn.data.load.synthetic_cells", with_patients)
    (empty_workplace.folder / "request.txt").write_text(PATIENTS[0])
    before = files_below(empty_workplace.folder)
    with pytest.raises(RuntimeError) as caught:
        empty_workplace.unlearn(dataset_file=None, forget_patients="request.txt", **settings)
    assert message in messages(caught.value)
    assert files_below(empty_workplace.folder) == before


def test_an_earlier_runs_folder_is_kept_when_the_next_run_fails(workplace: Workplace) -> None:
    output = workplace.unlearn()
    before = _everything(workplace.folder)
    with pytest.raises(RuntimeError) as caught:
        workplace.unlearn(lr=1e9, epochs=3)
    assert "loss should be finite" in messages(caught.value)
    assert _everything(workplace.folder) == before
    assert json.loads((output / "report.json").read_text())["settings"]["epochs"] == 1


def test_an_empty_folder_is_taken_as_output(workplace: Workplace) -> None:
    (workplace.folder / "mine").mkdir()
    workplace.unlearn(output_dir="mine")
    assert (workplace.folder / "mine" / "report.json").is_file()
    assert not (workplace.folder / "mine.1").exists()


@pytest.mark.pages
def test_files_written_there_during_the_run_are_kept(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    from monai_unlearn import auditing

    def meanwhile(*args: Any) -> str:
        (workplace.folder / "mine").mkdir()
        (workplace.folder / "mine" / "thesis.tex").write_text("x")
        return "<html></html>"

    monkeypatch.setattr(auditing, "render_html", meanwhile)
    with pytest.raises(RuntimeError) as caught:
        workplace.unlearn(output_dir="mine")
    assert "now holds files of another program" in messages(caught.value)
    assert [path.name for path in (workplace.folder / "mine").iterdir()] == ["thesis.tex"]
    assert not list(workplace.folder.glob(".mine*"))


def test_a_training_that_diverges_keeps_no_model(empty_workplace: Workplace) -> None:
    with pytest.raises(RuntimeError) as caught:
        empty_workplace.train(train_lr=1e9)
    assert "loss should be finite" in messages(caught.value)
    assert not list(empty_workplace.folder.rglob("*.pt*"))
    before = sha256(empty_workplace.data)
    empty_workplace.train()
    empty_workplace.unlearn(reference=False)
    assert sha256(empty_workplace.data) == before


@pytest.mark.parametrize("method", ["random_labeling", "retrain"])
def test_other_methods_refuse_a_loss_that_is_no_number_too(method: str, workplace: Workplace) -> None:
    rate = {"train_lr": 1e9} if method == "retrain" else {"lr": 1e9, "epochs": 3}
    original = str(workplace.kept()["original"])
    before = _everything(workplace.folder)
    with pytest.raises(RuntimeError) as caught:
        workplace.unlearn(method, reference=False, original_checkpoint=original, **rate)
    assert "loss should be finite" in messages(caught.value)
    assert _everything(workplace.folder) == before
