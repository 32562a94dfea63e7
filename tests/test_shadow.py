"""Shadow models: who is in which, what each is trained on, and that they are kept."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import PATIENTS, files_below, sha256, with_patients
from chexpert_layout import write_chexpert
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from monai.utils import set_determinism
from sklearn.metrics import roc_auc_score

import monai_unlearn.shadow
from monai_unlearn.bundle import Bundle, bundle_path
from monai_unlearn.cost import Cost
from monai_unlearn.data import ImageData, ImageFiles, LabeledImages, Split, make_split, read_chexpert
from monai_unlearn.metrics import lira_scores, log_odds
from monai_unlearn.output import new_folder
from monai_unlearn.shadow import ShadowScores, shadow_hash, shadow_scores
from monai_unlearn.training import run_trainer

SMALL = {
    "train_epochs": 2,
    "batch_size": 16,
    "device": "cpu",
    "augmentation": [],  # so that images are known by their pixels
    "network_def": "$torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, 2), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), "
    "torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, @data.num_classes))",
}
LINEAR = "$torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 2))"
# MONAI's image loaders say this where a GPU decoder of DICOM is not installed, whatever they are to read.
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")
FINDINGS = ["Cardiomegaly", "Edema"]


class Audit:
    """A bundle, its data and who is forgotten; the targets are the forget and the validation images."""

    def __init__(self, data: ImageData, split: Split, files: tuple[str, ...] = ("saliency",), **changes: Any) -> None:
        configs = [str(bundle_path(name)) for name in files]
        parser = ConfigParser(ConfigParser.load_config_files(configs))
        own = {} if files[0] == "retrain" else {"epochs": 1}
        parser.update({**SMALL, **own, **changes})
        self.bundle = Bundle(parser, ConfigParser.load_config_files(configs))
        self.bundle.check()
        self.bundle.share(data=data, device=torch.device("cpu"), split=split)
        self.data, self.split = data, split

    def __call__(self, folder: Path, models: int = 4, **changes: Any) -> ShadowScores:
        given = {"forget_rows": self.split.forget, "unseen_rows": self.split.validation, "models": models, **changes}
        return shadow_scores(self.bundle, self.data, self.split, folder=folder, **given)

    def people(self) -> np.ndarray:
        """Patient of each target."""
        assert self.data.train.patients is not None
        assert self.data.validation.patients is not None
        return np.concatenate(
            [self.data.train.patients[self.split.forget], self.data.validation.patients[self.split.validation]]
        )

    def hash(self, **changes: Any) -> str:
        given = {"data_digest": self.data.digest(), "split": self.split, "seed": 0}
        given |= {"forget_rows": self.split.forget, "unseen_rows": self.split.validation}
        return shadow_hash(self.bundle, **{**given, **changes})


def _audit(*files: str, **changes: Any) -> Audit:
    data = with_patients()
    return Audit(data, make_split(data, 0, 0.3), files or ("saliency",), **changes)


def _multi_label() -> tuple[ImageData, Split]:
    """The small data with two findings instead of classes, some not known."""
    data = with_patients()
    random = np.random.RandomState(0)

    def part(old: LabeledImages) -> LabeledImages:
        labels = np.column_stack([old.labels == 0, old.labels == 1]).astype(np.float32)
        labels[random.rand(*labels.shape) < 0.1] = np.nan
        labels[0] = np.nan
        return replace(old, labels=labels)

    assert data.test is not None
    data = replace(data, class_names=("a", "b"), **{name: part(old) for name, old in data.parts().items()})
    return data, make_split(data, 0, 0.3)


class Recorder:
    """The images that each training run was given, as the pixels of the data."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, set[bytes]]] = []

    def __call__(self, trainer: Any, what: str) -> Cost:
        from ignite.engine import Events

        seen: set[bytes] = set()

        def record(engine: Any) -> None:
            pixels = ((engine.state.batch["image"] + 1) * 127.5).round().to(torch.uint8)
            seen.update(image.numpy().tobytes() for image in pixels)

        trainer.add_event_handler(Events.ITERATION_STARTED, record)
        cost = run_trainer(trainer, what)
        self.runs.append((what, seen))
        return cost


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(monai_unlearn.shadow, "run_trainer", recorder)
    return recorder


@pytest.fixture(scope="module")
def audit() -> Audit:
    return _audit("random_labeling")


@pytest.fixture(scope="module")
def kept(audit: Audit, tmp_path_factory: pytest.TempPathFactory) -> ShadowScores:
    """Four shadow models that were trained at once."""
    return audit(tmp_path_factory.mktemp("kept") / "shadow")


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return np.array_equal(one, other, equal_nan=True)


# ------------------------------------------------------------------------------------------------------------ halves
def test_each_target_is_in_half_of_the_models_and_never_apart_from_its_patient(
    audit: Audit, kept: ShadowScores
) -> None:
    inside = ~np.isnan(kept.in_scores)
    assert inside.shape == (4, len(audit.split.forget) + len(audit.split.validation))
    assert np.array_equal(inside, np.isnan(kept.out_scores))
    assert (inside.sum(0) == 2).all()
    for pair in (0, 2):
        assert np.array_equal(inside[pair], ~inside[pair + 1])
    for patient in np.unique(audit.people()):
        assert len(np.unique(inside[:, audit.people() == patient], axis=1).T) == 1
    forget = np.arange(inside.shape[1]) < len(audit.split.forget)
    for half in inside:  # to within a patient, of five images here
        assert abs(half[forget].sum() - forget.sum() / 2) <= 2.5
        assert abs(half[~forget].sum() - (~forget).sum() / 2) <= 2.5


def _images(n: int, patients: list[str | None] | None, first: int = 0) -> LabeledImages:
    images = np.zeros((n, 2, 2), dtype=np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.arange(first, first + n) % 256, np.arange(first, first + n) // 256
    attributes = pd.DataFrame() if patients is None else pd.DataFrame({"patient": patients})
    return LabeledImages(images, np.arange(n) % 2, attributes)


def _halves(
    monkeypatch: pytest.MonkeyPatch,
    train: LabeledImages,
    validation: LabeledImages,
    models: int,
    folder: Path,
    seed: int = 0,
) -> np.ndarray:
    """Which targets are inside which shadow where all but one training and two validation images are targets."""

    def train_nothing(bundle: Bundle, data: ImageData, *_: Any) -> tuple[torch.nn.Module, Cost]:
        return torch.nn.Identity(), Cost()

    def all_zero(evaluator: Any, network: Any, loaders: dict, findings: Any) -> dict:
        return {name: type("Result", (), {"scores": np.zeros(loader)}) for name, loader in loaders.items()}

    class NoBundle:
        config: ClassVar[dict] = {"evaluator": {}}

        def build(self, *ids: str, evaluation_part: Any = None, evaluation_dataset: int = 0) -> Any:
            if ids == ("evaluator",):
                return type("Evaluator", (), {"state": type("State", (), {"device": torch.device("cpu")})})
            return len(evaluation_part) if evaluation_part is not None else evaluation_dataset

        def recipe_hash(self, *parts: str, of: Any) -> str:
            return hashlib.sha256("".join(parts).encode()).hexdigest()

    data = ImageData("halves", ("a", "b"), train, validation, None)
    n, m = len(train), len(validation)
    rows = {"forget": np.arange(1, n), "retain": np.array([0]), "selection": np.array([0, 1])}
    split = replace(make_split(with_patients(), 0, 0.3), **rows, validation=np.arange(2, m))
    with monkeypatch.context() as patch:
        patch.setattr(monai_unlearn.shadow, "_train", train_nothing)
        patch.setattr(monai_unlearn.shadow, "evaluate", all_zero)
        scores = shadow_scores(NoBundle(), data, split, split.forget, split.validation, folder, models, seed)  # type: ignore[arg-type]
    return scores.in_scores == 0


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=30),
    st.lists(st.integers(3, 9), min_size=1, max_size=30),
    st.sampled_from([4, 6]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_halves_of_any_patients(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    forget: list[int],
    unseen: list[int],
    models: int,
) -> None:
    """Patients 3 to 6 may be on both sides."""
    person = np.array(forget + unseen)
    train = _images(1 + len(forget), ["retained", *map(str, forget)])
    validation = _images(2 + len(unseen), ["chosen on", "chosen on", *map(str, unseen)], first=100)
    folder = tmp_path_factory.mktemp("halves")
    if len(set(person)) == 1:
        with pytest.raises(ValueError, match="at least two patients"):
            _halves(monkeypatch, train, validation, models, folder)
        return
    inside = _halves(monkeypatch, train, validation, models, folder)
    assert inside.shape == (models, len(person))
    assert np.array_equal(inside[0::2], ~inside[1::2])
    assert inside.any(1).all()  # nobody to unlearn, or nobody outside, in none of them
    for one in set(person):
        assert (inside[:, person == one] == inside[:, person == one][:, :1]).all()
    sides = (np.isin(person, forget), ~np.isin(person, forget))
    for side in sides:
        sizes = np.bincount(person[side], minlength=1)
        assert (abs(inside[:, side].sum(1) - side.sum() / 2) <= sizes.max() / 2).all()


def test_halves_differ_from_pair_to_pair_and_do_not_go_by_the_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = _images(41, None), _images(42, None, first=100)
    inside = _halves(monkeypatch, *parts, 40, tmp_path / "0")[0::2]
    other = _halves(monkeypatch, *parts, 40, tmp_path / "1", seed=1)[0::2]
    assert len(np.unique(np.concatenate([inside, other]), axis=0)) == 40
    assert (inside[:, :40].sum(1) == 20).all()
    assert (inside[:, 40:].sum(1) == 20).all()
    # Of 20 fair coins a target: the chance that one of 80 falls outside this is under 1 in 1000.
    assert inside.sum(0).min() >= 2
    assert inside.sum(0).max() <= 18


def test_equal_images_are_never_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train, validation = _images(21, None), _images(22, None, first=100)
    train.images[7], validation.images[9], validation.images[15] = train.images[3], train.images[3], train.images[4]
    train.labels[7] = validation.labels[9] = train.labels[3]
    validation.labels[15] = train.labels[4]
    inside = _halves(monkeypatch, train, validation, 10, tmp_path)
    forget, unseen = inside[:, :20], inside[:, 20:]
    assert np.array_equal(forget[:, 2], forget[:, 6])
    assert np.array_equal(forget[:, 2], unseen[:, 7])
    assert np.array_equal(forget[:, 3], unseen[:, 13])
    assert not np.array_equal(forget[:, 2], forget[:, 3])


def test_one_forgotten_patient_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train = _images(4, ["a", "b", "b", "b"])
    inside = _halves(monkeypatch, train, _images(6, ["c", "c", "d", "d", "d", "d"], first=100), 4, tmp_path)
    assert inside.sum(0).tolist() == [2] * 7
    assert inside.sum(1).tolist() in ([3, 4, 3, 4], [3, 4, 4, 3])


# ------------------------------------------------------------------------------------------------- what is trained on
@pytest.mark.parametrize(
    ("method", "case"), [("random_labeling", "two types"), ("saliency", "shared"), ("retrain", "plain")]
)
def test_each_trains_on_the_retain_set_and_its_half_and_nothing_else(
    recorder: Recorder, tmp_path: Path, method: str, case: str
) -> None:
    audit = _audit(method, batch_size=10)  # sizes here are multiples of 5: no last image is left out
    data, split = audit.data, audit.split
    if case == "shared":  # as a run does with files: a finished data set of all training images
        audit.bundle.share(train_dataset=audit.bundle.build("train_dataset"))
    if case == "two types":
        fractions = (data.validation.images / 255).astype(np.float32)
        audit.data = replace(data, validation=replace(data.validation, images=fractions))
    result = audit(tmp_path)
    retain = {data.train.images[row].tobytes() for row in split.retain}
    targets = [data.train.images[row].tobytes() for row in split.forget]
    targets += [data.validation.images[row].tobytes() for row in split.validation]
    assert len(retain.union(targets)) == len(split.retain) + len(targets)  # told apart by their pixels
    assert [what for what, _ in recorder.runs[:2]] == ["shadow model 1 of 4", "shadow model 1 of 4, unlearning"]
    for k in range(4):
        inside = {targets[i] for i in np.flatnonzero(~np.isnan(result.in_scores[k]))}
        (_, trained), (_, unlearned) = recorder.runs[2 * k : 2 * k + 2]
        assert trained == retain | inside
        assert unlearned == (retain if method == "retrain" else retain | inside)


@pytest.mark.parametrize("method", ["saliency", "retrain"])
def test_scores_are_those_of_a_model_made_by_hand(tmp_path: Path, method: str) -> None:
    """The whole process of shadow 2 again, written out, with plain forward passes at the end."""
    audit = _audit(method)
    data, split, bundle = audit.data, audit.split, audit.bundle
    result = audit(tmp_path / "shadow")
    inside = ~np.isnan(result.in_scores[2])
    forget = split.forget[inside[: len(split.forget)]]
    unseen = split.validation[inside[len(split.forget) :]]
    part = LabeledImages(
        np.concatenate([data.train.images[split.retain], data.train.images[forget], data.validation.images[unseen]]),
        np.concatenate([data.train.labels[split.retain], data.train.labels[forget], data.validation.labels[unseen]]),
    )
    seed = int.from_bytes(hashlib.sha256(b"shadow:0:2").digest()[:4], "big") // 2
    positions = np.arange(len(split.retain), len(part))
    own = {
        "data": ImageData("by hand", data.class_names, part, data.validation, data.test),
        "split": replace(split, forget=positions, retain=np.arange(len(split.retain))),
        "seed": seed,
        "train_seed": seed,
    }
    set_determinism(seed)
    original = bundle.build("recipe::trainer", **own)
    original.run()
    set_determinism(seed)
    trainer = bundle.build("trainer", private_dir=str(tmp_path), **own)
    trainer.network.load_state_dict(original.network.state_dict())
    trainer.run()

    pixels = np.concatenate([data.train.images[split.forget], data.validation.images[split.validation]])
    labels = np.concatenate([data.train.labels[split.forget], data.validation.labels[split.validation]])
    trainer.network.eval()
    with torch.no_grad():
        logits = trainer.network(torch.from_numpy(pixels)[:, None].float() / 127.5 - 1)
    expected = log_odds(logits, torch.from_numpy(labels)).numpy()
    scores = np.where(inside, result.in_scores[2], result.out_scores[2])
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)


def test_several_findings(tmp_path: Path) -> None:
    audit = Audit(*_multi_label(), ("random_labeling", "multi_label"))
    result = audit(tmp_path)
    labels = np.concatenate(
        [audit.data.train.labels[audit.split.forget], audit.data.validation.labels[audit.split.validation]]
    )
    known = ~np.isnan(labels).all(1)
    assert not known.all()
    assert np.array_equal(~np.isnan(result.in_scores), ~np.isnan(result.out_scores)[[1, 0, 3, 2]])
    assert ((~np.isnan(result.in_scores)).sum(0) == np.where(known, 2, 0)).all()


@pytest.fixture(scope="module")
def chexpert(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageData, Split]:
    """A few X-rays on disk."""
    data = read_chexpert(write_chexpert(tmp_path_factory.mktemp("chexpert"), 25, size=16, n_valid=4), FINDINGS)
    return data, make_split(data, 0, 0.3)


def _files_audit(data: ImageData, split: Split, **changes: Any) -> Audit:
    small = {"image_size": 16, "train_lr": 0.02, "num_workers": 0, "train_epochs": 1}
    return Audit(data, split, ("random_labeling", "chexpert"), **{**small, **changes})


def test_images_on_disk_wherever_the_validation_images_lie(
    chexpert: tuple[ImageData, Split], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, split = chexpert
    assert isinstance(data.validation, ImageFiles)
    elsewhere = shutil.copytree(data.validation.root, tmp_path / "elsewhere")
    moved = replace(data, validation=replace(data.validation, root=elsewhere))
    with caplog.at_level(logging.INFO, "monai_unlearn"):
        one = _files_audit(data, split)(tmp_path / "one")
        other = _files_audit(moved, split)(tmp_path / "other")
    assert _equal(one.in_scores, other.in_scores)
    assert _equal(one.out_scores, other.out_scores)
    assert "patient" not in caplog.text
    assert np.isfinite(np.where(np.isnan(one.in_scores), one.out_scores, one.in_scores)).all()


def test_a_cache_of_the_run_serves_the_shadows_too(chexpert: tuple[ImageData, Split], tmp_path: Path) -> None:
    """Its copies are known by the same names, so that what removes the forgotten people's finds them all."""
    data, split = chexpert
    audit = _files_audit(data, split, cache="disk", cache_dir=str(tmp_path / "cache"))
    for part in (data.train, data.validation):
        images = audit.bundle.build("evaluation_dataset", evaluation_part=part)
        for i in range(len(part)):
            images[i]
    before = files_below(tmp_path / "cache")
    cached = audit(tmp_path / "cached")
    assert files_below(tmp_path / "cache") == before
    assert _equal(cached.in_scores, _files_audit(data, split)(tmp_path / "plain").in_scores)


def test_parts_of_two_kinds_are_refused(chexpert: tuple[ImageData, Split], tmp_path: Path) -> None:
    data, split = chexpert
    pixels = np.zeros((len(data.validation), 16, 16), dtype=np.uint8)
    memory = LabeledImages(pixels, data.validation.labels, data.validation.attributes)
    with pytest.raises(ValueError, match="of one kind"):
        _files_audit(replace(data, validation=memory), split)(tmp_path)


# -------------------------------------------------------------------------------------------------------- what is kept
def test_a_second_audit_trains_nothing(
    audit: Audit, kept: ShadowScores, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    before = files_below(kept.folder)
    with caplog.at_level(logging.INFO, "monai_unlearn"):
        again = audit(kept.folder)
    assert not recorder.runs
    assert files_below(kept.folder) == before
    assert _equal(again.in_scores, kept.in_scores)
    assert _equal(again.out_scores, kept.out_scores)
    assert again.cost == kept.cost
    assert "4 of 4 taken from" in caplog.text
    assert "training" not in caplog.text


def test_the_same_seed_gives_the_same_scores(audit: Audit, kept: ShadowScores, tmp_path: Path) -> None:
    torch.manual_seed(99)  # the state around it does not matter
    again = audit(tmp_path / "again")
    assert _equal(again.in_scores, kept.in_scores)
    assert _equal(again.out_scores, kept.out_scores)


def test_more_models_keep_those_that_are_there(
    audit: Audit, kept: ShadowScores, tmp_path: Path, recorder: Recorder
) -> None:
    shutil.copytree(kept.folder, tmp_path / "shadow")
    before = files_below(tmp_path / "shadow")
    more = audit(tmp_path / "shadow", models=6)
    assert [what for what, _ in recorder.runs[::2]] == ["shadow model 5 of 6", "shadow model 6 of 6"]
    assert _equal(more.in_scores[:4], kept.in_scores)
    assert files_below(tmp_path / "shadow").items() >= before.items()
    assert more.cost.samples > kept.cost.samples
    fewer = audit(tmp_path / "shadow", models=4)
    assert _equal(fewer.out_scores, kept.out_scores)
    assert fewer.cost == kept.cost


def test_an_audit_that_was_stopped_goes_on_where_it_was(
    audit: Audit, kept: ShadowScores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shadow"

    def stopped(trainer: Any, what: str) -> Cost:
        if what == "shadow model 3 of 4, unlearning":
            raise KeyboardInterrupt
        return run_trainer(trainer, what)

    with monkeypatch.context() as patch:
        patch.setattr(monai_unlearn.shadow, "run_trainer", stopped)
        with pytest.raises(KeyboardInterrupt):
            audit(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["shadow-000", "shadow-001"]
    before = {path: (path.stat().st_mtime_ns, sha256(path)) for path in folder.rglob("*.*") if path.is_file()}
    result = audit(folder)
    assert {path: (path.stat().st_mtime_ns, sha256(path)) for path in before} == before
    assert _equal(result.in_scores, kept.in_scores)
    assert _equal(result.out_scores, kept.out_scores)


def test_what_a_killed_audit_left_half_made_goes(audit: Audit, kept: ShadowScores, tmp_path: Path) -> None:
    folder = shutil.copytree(kept.folder, tmp_path / "shadow")
    shutil.rmtree(folder / "shadow-002")
    with new_folder(folder / "shadow-002") as unfinished:
        left = folder / unfinished.name
        shutil.copytree(unfinished, folder / "aside")
    shutil.rmtree(folder / "shadow-002")
    shutil.move(folder / "aside", left)
    (left / "private").mkdir()
    assert _equal(audit(folder).in_scores, kept.in_scores)
    assert sorted(path.name for path in folder.iterdir()) == [f"shadow-00{k}" for k in range(4)]


def _cut(folder: Path) -> None:
    content = (folder / "scores.npz").read_bytes()
    (folder / "scores.npz").write_bytes(content[: len(content) // 2])


def _change(folder: Path) -> None:
    content = bytearray((folder / "scores.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "scores.npz").write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut": _cut,
    "changed": _change,
    "no scores": lambda folder: (folder / "scores.npz").unlink(),
    "no record": lambda folder: (folder / "record.json").unlink(),
    "no JSON": lambda folder: (folder / "record.json").write_text("{"),
    "a list": lambda folder: (folder / "record.json").write_text("[]"),
    "no cost": lambda folder: (folder / "record.json").write_text(
        json.dumps({**json.loads((folder / "record.json").read_text()), "cost": {"hours": 1}})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shadow_is_named(
    audit: Audit, kept: ShadowScores, tmp_path: Path, recorder: Recorder, damage: str
) -> None:
    folder = shutil.copytree(kept.folder, tmp_path / "shadow")
    DAMAGE[damage](folder / "shadow-001")
    with pytest.raises(ValueError, match=r"shadow-001 was changed or damaged since\. Remove that folder"):
        audit(folder)
    assert not recorder.runs
    shutil.rmtree(folder / "shadow-001")
    assert _equal(audit(folder).in_scores, kept.in_scores)
    assert len(recorder.runs) == 2


def test_shadows_of_another_audit_are_refused(audit: Audit, kept: ShadowScores) -> None:
    message = r"shadow-000 is of other data, another request, method, setting or seed\. Remove"
    with pytest.raises(ValueError, match=message):
        audit(kept.folder, seed=1)
    with pytest.raises(ValueError, match=message):
        audit(kept.folder, unseen_rows=audit.split.validation[1:])
    with pytest.raises(ValueError, match=message):
        _audit("random_labeling", lr=0.02)(kept.folder)
    with pytest.raises(ValueError, match=message):
        _audit("saliency")(kept.folder)


def test_only_scores_are_kept_and_nobody_is_named(audit: Audit, kept: ShadowScores) -> None:
    for k in range(4):
        folder = kept.folder / f"shadow-{k:03d}"
        assert sorted(path.name for path in folder.rglob("*")) == ["record.json", "scores.npz"]
        with np.load(folder / "scores.npz") as stored:
            assert sorted(stored) == ["inside", "scores"]
            assert stored["inside"].dtype == bool
            assert stored["scores"].shape == stored["inside"].shape == (len(audit.people()),)
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        assert sorted(record) == ["cost", "depends_on", "machine", "sha256", "shadow"]
        for path in folder.iterdir():
            assert not any(patient.encode() in path.read_bytes() for patient in PATIENTS)


def test_masks_are_not_kept_but_their_cost_counts(tmp_path: Path) -> None:
    labels, mask = _audit("random_labeling"), _audit("saliency")
    one, other = labels(tmp_path / "labels"), mask(tmp_path / "mask")
    assert not list(tmp_path.rglob("*.safetensors"))
    half = sum((~np.isnan(row)).sum() for row in one.in_scores)
    assert other.cost.backward - one.cost.backward == half  # one backward pass of each image to be unlearned


def test_the_hash_goes_by_what_changes_the_scores(audit: Audit) -> None:
    other = [
        audit.hash(seed=1),
        audit.hash(data_digest="0"),
        audit.hash(split=replace(audit.split, forget=audit.split.forget[1:])),
        audit.hash(forget_rows=audit.split.forget[1:]),
        audit.hash(unseen_rows=audit.split.validation[1:]),
        _audit("saliency").hash(),
        _audit("saliency", saliency_ratio=0.4).hash(),
        _audit("random_labeling", lr=0.02).hash(),
        _audit("random_labeling", epochs=2).hash(),
        _audit("random_labeling", batchnorm="frozen").hash(),
        _audit("random_labeling", train_epochs=3).hash(),
        _audit("random_labeling", **{"evaluator::inferer": {"_target_": "monai.inferers.SliceInferer"}}).hash(),
        _audit("random_labeling", **{"evaluation_dataset::value_range": [0, 1]}).hash(),
        audit.bundle.recipe_hash(),
    ]
    assert len({audit.hash(), *other}) == len(other) + 1
    same = {
        "output_dir": "elsewhere",
        "models_dir": "elsewhere",
        "reference": False,
        "seed": 5,
        "private_dir": "elsewhere",
        "evaluator::key_val_metric": None,
    }
    for name, value in same.items():
        assert _audit("random_labeling", **{name: value}).hash() == audit.hash(), name


# ------------------------------------------------------------------------------------------------- messages, bad input
def test_the_time_is_told_before_it_starts(
    audit: Audit, kept: ShadowScores, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(kept.folder, tmp_path / "shadow")
    told = []
    for seconds in (400, None):
        for k in (1, 3):
            shutil.rmtree(folder / f"shadow-00{k}")
        with caplog.at_level(logging.INFO, "monai_unlearn"):
            audit(folder, seconds_per_model=seconds)
        told.append(caplog.messages[:])
        caplog.clear()
    assert told[0][0] == told[1][0] == f"Shadow models: 2 of 4 taken from {folder}"
    assert told[0][1:] == ["Shadow models: training 2 models, about 13 min (400 s each, as the original took)"]
    assert told[1][1] == "Shadow models: training 2 models; how long that takes is told after the first"
    assert re.fullmatch(r"Shadow models: about \d+ s for the other 1 \(\d+ s each\)", told[1][2])
    assert len(told[1]) == 3


@pytest.mark.parametrize("models", [0, 2, 3, 5, -4, 4.0, True, "4", None])
def test_numbers_of_models_that_are_none(audit: Audit, tmp_path: Path, models: Any) -> None:
    with pytest.raises(ValueError, match="models should be an even number of at least 4"):
        audit(tmp_path, models=models)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("forget_rows", lambda split: split.retain[:3]),
        ("forget_rows", lambda split: np.append(split.forget, split.forget[0])),
        ("forget_rows", lambda split: split.forget[:0]),
        ("forget_rows", lambda split: split.forget[None]),
        ("forget_rows", lambda split: split.forget[0]),
        ("unseen_rows", lambda split: split.selection[:3]),
        ("unseen_rows", lambda split: np.array([-1])),
        ("unseen_rows", lambda split: np.array([10_000])),
        ("unseen_rows", lambda split: np.array([0.5])),
    ],
)
def test_rows_of_other_parts_are_refused(
    audit: Audit, tmp_path: Path, name: str, rows: Callable[[Split], np.ndarray]
) -> None:
    with pytest.raises(ValueError, match=f"{name} should be positions of at least one of the"):
        audit(tmp_path, **{name: rows(audit.split)})
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- does it tell them?
def _noise() -> tuple[ImageData, Split]:
    """Images of noise with labels drawn by a coin: whatever a model knows of them, it has from having seen them."""
    random = np.random.RandomState(3)

    def part(n: int) -> LabeledImages:
        return LabeledImages(random.randint(0, 256, (n, 12, 12)).astype(np.uint8), random.randint(0, 2, n))

    data = ImageData("noise", ("a", "b"), part(90), part(80), None)
    return data, make_split(data, 0, 0.4)


def test_a_method_that_does_nothing_is_told_and_retraining_is_not(tmp_path: Path) -> None:
    """Attack by the shadows on the original model, and on the retrained one."""
    data, split = _noise()
    aucs = {}
    for name, method, changes in (
        ("nothing", "random_labeling", {"lr": 1e-12}),
        ("retraining", "retrain", {}),
    ):
        audit = Audit(data, split, (method,), network_def=LINEAR, train_epochs=15, **changes)
        shadows, bundle = audit(tmp_path / name, models=8), audit.bundle

        set_determinism(7)
        trained = bundle.build("recipe::trainer", train_seed=7)
        trained.run()
        set_determinism(7)
        audited = bundle.build("trainer", train_seed=7, private_dir=str(tmp_path))
        audited.network.load_state_dict(trained.network.state_dict())
        audited.run()
        targets = np.concatenate([data.train.images[split.forget], data.validation.images[split.validation]])
        labels = np.concatenate([data.train.labels[split.forget], data.validation.labels[split.validation]])
        with torch.no_grad():
            logits = audited.network.eval()(torch.from_numpy(targets)[:, None].float() / 127.5 - 1)
        scores = log_odds(logits, torch.from_numpy(labels)).numpy()
        attack = lira_scores(scores, shadows.in_scores, shadows.out_scores)
        aucs[name] = roc_auc_score(np.arange(len(attack)) < len(split.forget), attack)
    assert aucs["nothing"] > 0.9
    assert 0.3 < aucs["retraining"] < 0.7  # ± 2.5 standard errors of an AUC of 36 against 40
