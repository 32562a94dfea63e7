"""How each sample fares during a training."""

from __future__ import annotations

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.transforms import Compose, EnsureTyped, RandFlipd, RandGaussianNoised
from torch import nn

from monai_unlearn.handlers import SampleHistory, read_history
from monai_unlearn.loss import MaskedBCEWithLogitsLoss

MakeTrainer = Callable[..., SupervisedTrainer]
NAN = float("nan")
COLUMNS = ["index", "seen", "mean_loss", "mean_margin", "last_margin", "forgetting_events", "never_learned"]


class _Outputs:
    """What the network gave for each sample, in the order in which it was asked: for the oracles."""

    def __init__(self) -> None:
        self.of: dict[Any, list[tuple[list[float], Any]]] = defaultdict(list)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        output = engine.state.output
        for key, z, y in zip(engine.state.batch["index"].tolist(), output["pred"].tolist(), output["label"].tolist()):
            self.of[key].append((z, y))


def _oracle(outputs: _Outputs, fare: Callable) -> pd.DataFrame:
    """Slow: one sample after the other, in Python's float64."""
    rows = []
    for key, seen in sorted(outputs.of.items()):
        losses, margins, rights = zip(*(fare(z, y) for z, y in seen))
        events = sum(before and not after for before, after in itertools.pairwise(rights))
        mean = (sum(losses) / len(losses), sum(margins) / len(margins), margins[-1])
        rows.append((key, len(seen), *mean, events, not any(rights)))
    return pd.DataFrame(rows, columns=COLUMNS)


def _class(z: list[float], y: int) -> tuple[float, float, bool]:
    loss = math.log(sum(math.exp(value) for value in z)) - z[y]
    margin = z[y] - max(value for c, value in enumerate(z) if c != y)
    return loss, margin, margin > 0


def _findings(z: list[float], y: list[float]) -> tuple[float, float, bool]:
    known = [(logit, answer) for logit, answer in zip(z, y) if not math.isnan(answer)]
    losses = [math.log1p(math.exp(logit)) - answer * logit for logit, answer in known]
    margins = [(2 * answer - 1) * logit for logit, answer in known]
    right = all((logit > 0) == (answer > 0.5) for logit, answer in known if answer != 0.5)
    return sum(losses) / len(known), sum(margins) / len(known), right


def _augmented(records: list[dict]) -> Dataset:
    steps = [EnsureTyped("image"), RandFlipd("image", prob=0.5), RandGaussianNoised("image", prob=1.0, std=0.5)]
    return Dataset(records, Compose(steps).set_random_state(0))


@pytest.mark.parametrize("decollate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_history_of_classes_equals_a_slow_loop(
    make_trainer: MakeTrainer, make_network: Callable, records: list[dict], decollate: bool, dtype: torch.dtype
) -> None:
    outputs, history = _Outputs(), SampleHistory()
    settings = {"max_epochs": 12, "decollate": decollate, "dataset": _augmented(records), "batch_size": 7}
    network = make_network()
    network.register_forward_hook(lambda _, __, logits: logits.to(dtype))  # half, as under autocast on a GPU
    make_trainer([outputs, history], network=network, **settings).run()
    oracle = _oracle(outputs, _class)
    pd.testing.assert_frame_equal(history.frame(), oracle, rtol=1e-5, atol=1e-5)
    assert (oracle["seen"] == 12).all()
    assert oracle["forgetting_events"].sum() > 5
    assert oracle["forgetting_events"].nunique() > 2


def test_history_of_findings_equals_a_slow_loop(make_trainer: MakeTrainer, records: list[dict]) -> None:
    random = np.random.RandomState(0)
    labels = random.choice([0, 1, 0.5, 0.8, NAN], (30, 4), p=[0.3, 0.3, 0.05, 0.15, 0.2]).astype(np.float32)
    labels[:, 0] = random.randint(0, 2, 30)  # of each sample something is known
    for record, label in zip(records, labels):
        record["label"] = label
    outputs, history = _Outputs(), SampleHistory()
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 4))
    settings = {"network": network, "loss_function": MaskedBCEWithLogitsLoss(), "dataset": _augmented(records)}
    make_trainer([outputs, history], max_epochs=10, **settings).run()
    oracle = _oracle(outputs, _findings)
    pd.testing.assert_frame_equal(history.frame(), oracle, rtol=1e-5, atol=1e-5)
    assert oracle["forgetting_events"].sum() > 5
    assert 0 < oracle["never_learned"].sum() < 30


def test_a_sample_without_a_known_finding_has_no_loss(make_trainer: MakeTrainer, records: list[dict]) -> None:
    for i, record in enumerate(records):
        record["label"] = np.array([NAN, NAN] if i == 3 else [1, NAN], np.float32)
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    history = SampleHistory()
    make_trainer([history], network=network, loss_function=MaskedBCEWithLogitsLoss()).run()
    frame = history.frame()
    assert frame.index[frame["mean_loss"].isna()].tolist() == [3]
    assert frame.index[frame["mean_margin"].isna()].tolist() == [3]


def test_a_forgetting_event_is_right_and_then_wrong(make_trainer: MakeTrainer, records: list[dict]) -> None:
    rights = {0: "1111", 1: "0000", 2: "0101", 3: "1010", 4: "0011", 5: "1000"}
    for i, record in enumerate(records[:6]):
        record |= {"label": 0, "image": torch.full((1, 6, 6), float(i))}

    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.calls = nn.Parameter(torch.zeros(1)), 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            now = [1.0 if rights[int(i)][self.calls // 2] == "1" else -1.0 for i in images[:, 0, 0, 0]]
            self.calls += 1
            margin = torch.tensor(now)
            return torch.stack([margin, torch.zeros(len(now))], 1) + self.weight

    history = SampleHistory()
    dataset = Dataset(records[:6])
    make_trainer([history], network=Scripted(), dataset=dataset, batch_size=3, max_epochs=4).run()
    frame = history.frame()
    assert frame["forgetting_events"].tolist() == [0, 0, 1, 2, 0, 1]
    assert frame["never_learned"].tolist() == [False, True, False, False, False, False]
    assert frame["last_margin"].tolist() == [1, -1, 1, -1, 1, -1]


@pytest.mark.parametrize("decollate", [False, True])
def test_the_training_is_bit_identical_with_and_without_it(make_trainer: MakeTrainer, decollate: bool) -> None:
    states = []
    for handlers in ([], [SampleHistory()]):
        torch.manual_seed(5)
        trainer = make_trainer(handlers, max_epochs=3, decollate=decollate)
        trainer.run()
        states.append((trainer.network.state_dict(), torch.rand(1)))
    assert all(torch.equal(value, states[1][0][name]) for name, value in states[0][0].items())
    assert torch.equal(states[0][1], states[1][1])


def test_it_sees_no_gradient_and_keeps_no_graph(make_trainer: MakeTrainer) -> None:
    history = SampleHistory()
    trainer = make_trainer([history], max_epochs=1)
    kept: list[bool] = []
    trainer.add_event_handler(
        IterationEvents.BACKWARD_COMPLETED,
        lambda: kept.extend(figures.requires_grad for _, figures in history._waiting),
    )
    trainer.run()
    assert len(kept) == 1 + 2 + 3 + 4
    assert not any(kept)


def test_the_history_is_written_at_the_end_whole_or_not_at_all(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "history.csv"
    history = SampleHistory(path)
    make_trainer([history]).run()
    pd.testing.assert_frame_equal(pd.read_csv(path, float_precision="round_trip"), history.frame())
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        make_trainer([SampleHistory(path)], max_epochs=1).run()
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["history.csv"]


def test_a_new_run_starts_anew_and_a_longer_one_goes_on(make_trainer: MakeTrainer) -> None:
    history = SampleHistory()
    trainer = make_trainer([history])
    trainer.run()
    assert (history.frame()["seen"] == 2).all()
    trainer.state.max_epochs = 5
    trainer.run()
    assert (history.frame()["seen"] == 5).all()
    make_trainer([history], max_epochs=1).run()
    assert (history.frame()["seen"] == 1).all()


def test_samples_may_be_known_by_text_as_long_as_no_file_is_written(
    make_trainer: MakeTrainer, records: list[dict], tmp_path: Path
) -> None:
    for record in records:
        record["scan"] = f"Zq7-{record['index']:02d}"
    history = SampleHistory(key="scan")
    make_trainer([history]).run()
    assert history.frame()["scan"].tolist() == [record["scan"] for record in records]
    with pytest.raises(ValueError, match="known by whole numbers only, as other ids may be personal data") as caught:
        make_trainer([SampleHistory(tmp_path / "history.csv", key="scan")]).run()
    assert "Zq7" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_ids_may_be_a_column_of_a_table(make_trainer: MakeTrainer, records: list[dict]) -> None:
    for record in records:
        record["index"] = torch.tensor([record["index"]])
    history = SampleHistory()
    make_trainer([history]).run()
    assert history.frame()["index"].tolist() == list(range(30))


def test_a_key_that_the_batch_has_not_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(KeyError, match=r"The batch has no 'number'.*It has .'image', 'index', 'label', 'patient'"):
        make_trainer([SampleHistory(key="number")]).run()


def test_a_batch_that_is_no_dict_is_refused(make_trainer: MakeTrainer, records: list[dict]) -> None:
    loader = DataLoader([(record["image"], record["label"]) for record in records], batch_size=8)
    with pytest.raises(TypeError, match="needs batches that are dicts with an id of each sample, but got list"):
        make_trainer(
            [SampleHistory()], train_data_loader=loader, prepare_batch=lambda batch, *_, **__: tuple(batch)
        ).run()


def test_more_ids_than_outputs_are_refused(make_trainer: MakeTrainer) -> None:
    def half(batch: dict, *_: object, **__: object) -> tuple:
        return batch["image"][::2], batch["label"][::2]

    with pytest.raises(ValueError, match="'index' should hold 4 ids, one an output, but holds 8"):
        make_trainer([SampleHistory()], prepare_batch=half).run()


def test_outputs_of_another_kind_are_refused(make_trainer: MakeTrainer) -> None:
    network = nn.Conv2d(1, 3, 1)
    with pytest.raises(ValueError, match=r"needs outputs B × C .* but got outputs \(8, 3, 6, 6\) and labels \(8,\)"):
        make_trainer([SampleHistory()], network=network).run()


def test_outputs_that_are_not_finite_are_refused(make_trainer: MakeTrainer, records: list[dict]) -> None:
    records[7]["image"] = torch.full((1, 6, 6), NAN)
    with pytest.raises(ValueError, match=r"outputs in training should be finite, but hold NaN or infinity. Lower the"):
        make_trainer([SampleHistory()]).run()


def test_a_trainer_that_fires_no_events_of_its_steps_is_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    history = SampleHistory(tmp_path / "history.csv")
    with pytest.raises(RuntimeError, match=r"met no sample. Check .* and that it has no iteration_update of its own"):
        make_trainer([history], iteration_update=lambda engine, batch: {}).run()
    assert not list(tmp_path.iterdir())


# Read back


def _write(path: Path, **columns: list) -> Path:
    default = {"seen": 3, "mean_loss": 0.5, "mean_margin": 1.0, "last_margin": 1.0}
    pd.DataFrame({"index": range(4), "forgetting_events": 0, "never_learned": False, **default, **columns}).to_csv(
        path, index=False
    )
    return path


def test_a_history_is_read_by_position_and_what_was_not_met_has_no_score(tmp_path: Path) -> None:
    losses = [0.1 + 0.2, 1 / 3, 2.0, 0.0]
    scores = read_history(_write(tmp_path / "h.csv", index=[4, 0, 2, 1], mean_loss=losses), 6)
    expected = [losses[1], losses[3], losses[2], NAN, losses[0], NAN]
    np.testing.assert_array_equal(scores["mean_loss"], expected)
    assert list(scores) == ["mean_loss", "forgetting_events"]


def test_what_was_never_learned_is_harder_than_what_was_forgotten(tmp_path: Path) -> None:
    path = _write(tmp_path / "h.csv", forgetting_events=[0, 3, 0, 1], never_learned=[True, False, False, False])
    assert read_history(path, 4)["forgetting_events"].tolist() == [4, 3, 0, 1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"\xff\xfe\x00\x81"),
        lambda path: path.write_text(""),
        lambda path: path.write_text("epoch,loss\n1,0.5\n"),
        lambda path: _write(path, index=[0, 1, 1, 2]),
        lambda path: _write(path, index=[0, 1, 2, 4]),
        lambda path: _write(path, index=[-1, 1, 2, 3]),
        lambda path: _write(path, index=[0.5, 1, 2, 3]),
        lambda path: _write(path, index=["Zq7", 1, 2, 3]),
        lambda path: _write(path, mean_loss=["Zq7", 1, 2, 3]),
    ],
)
def test_what_is_no_history_of_the_data_is_refused(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    damage(tmp_path / "h.csv")
    with pytest.raises(ValueError, match=r"h.csv .* should be its training's history of 4 images, but is") as caught:
        read_history(tmp_path / "h.csv", 4)
    assert "Zq7" not in str(caught.value)
