"""The audit as a command: any pair of checkpoints, earlier runs, shadow models, and what else users can do with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import Workplace, files_below, messages, unfinished_below
from monai.handlers import MLFlowHandler, TensorBoardStatsHandler

from monai_unlearn import shadow
from monai_unlearn.__main__ import main
from monai_unlearn.auditing import publish
from monai_unlearn.report import read_report, scalars, validate_report

pytest_plugins = ["bundle_runs"]

SPLITS = ("forget", "retain", "validation", "test")
ATTACKS = ("log_odds", "modified_entropy", "loss", "classifier")


def _report(output: Path) -> dict[str, Any]:
    report = read_report(output / "report.json")
    validate_report(report)
    return report


def _without_times(audit: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in audit.items() if key != "evaluation_seconds"}


def _copy(source: Path, target: Path, change: float = 0.0) -> str:
    """A checkpoint, as somebody else's program may have written it."""
    state = torch.load(source, weights_only=True)
    torch.save({"model": {name: value + change * torch.ones_like(value) for name, value in state.items()}}, target)
    return str(target)


@pytest.fixture
def checkpoints(workplace: Workplace) -> dict[str, str]:
    """An original, an unlearned and a retrained model, each in a file of its own."""
    kept = workplace.kept()
    return {
        "original": _copy(kept["original"], workplace.folder / "original.pt"),
        "unlearned": _copy(kept["original"], workplace.folder / "unlearned.pt", 1e-3),
        "retrained": _copy(kept["retrained"], workplace.folder / "retrained.pt"),
    }


# ---- of an earlier run


@pytest.mark.parametrize("method", ["saliency", "retrain"])
def test_the_audit_of_a_run_is_the_one_it_ended_with(method: str, workplace: Workplace) -> None:
    run = workplace.unlearn(method, reference_models=2)
    before = files_below(run)
    found = _report(workplace.audit(run=str(run)))
    ended = _report(run)
    assert files_below(run) == before
    assert found["method"] == method
    relearn = found["audit"]["distance"].pop("relearn")
    assert ended["audit"]["distance"].pop("relearn") is None
    assert set(relearn["steps"]) == {"unlearned", "retrained", "second_retrained"}
    assert _without_times(found["audit"]) == _without_times(ended["audit"])
    assert found["models"] == ended["models"]
    for key in ("mask", "tuning", "unlearn", "retrain"):
        assert found["cost"][key] == ended["cost"][key]
    assert found["request"] == ended["request"]


def test_an_audit_takes_its_run_from_any_directory_and_without_the_request(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = workplace.folder / "withdrawn.json"
    request.write_text(json.dumps({"include": [{"index": [0, 3, 4, 9, 50, 51]}], "reference": "ticket 7"}))
    run = workplace.unlearn(forget_request=str(request.relative_to(workplace.folder)))
    request.unlink()
    (workplace.folder / "elsewhere").mkdir()
    monkeypatch.chdir(workplace.folder / "elsewhere")
    output = workplace.folder / "audited"
    workplace.audit(run="../runs/saliency", output_dir=str(output))
    found = _report(output)
    assert found["request"]["reference"] == "ticket 7"
    assert _without_times(found["audit"])["verdict"] == _report(run)["audit"]["verdict"]
    assert found["models"] == _report(run)["models"]


def test_a_run_whose_private_part_is_gone_says_what_to_do(workplace: Workplace) -> None:
    run = workplace.unlearn(reference=False)
    shutil.rmtree(run / "private")
    with pytest.raises(FileNotFoundError, match=r"it was finalised, or was made by an older version.*--original,"):
        _audit(workplace, run=str(run))


def test_a_folder_that_is_no_run_is_refused(workplace: Workplace) -> None:
    with pytest.raises(FileNotFoundError, match="run should be the folder of an earlier run"):
        _audit(workplace, run=str(workplace.folder))


def test_a_damaged_record_is_refused(workplace: Workplace) -> None:
    run = workplace.unlearn(reference=False)
    (run / "private" / "settings.json").write_text('{"config"')
    with pytest.raises(ValueError, match=r"private/settings.json of .* is damaged"):
        _audit(workplace, run=str(run))


def test_data_that_changed_since_the_run_is_refused(workplace: Workplace) -> None:
    import numpy as np

    run = workplace.unlearn(reference=False)
    arrays = dict(np.load(workplace.data))
    arrays["test_images"][0, 0, 0] += 1
    np.savez(workplace.data, **arrays)
    with pytest.raises(ValueError, match="The data are not those of the earlier run"):
        _audit(workplace, run=str(run), reference=False)
    assert not (workplace.folder / "runs" / "audit").exists()


def _audit(workplace: Workplace, **settings: Any) -> Path:
    """Run an audit that should fail, and raise what it raised itself."""
    try:
        return workplace.audit(**settings)
    except RuntimeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None and type(cause) is RuntimeError:
            cause = cause.__cause__
        raise cause from None


# ---- of any checkpoints


@pytest.mark.pages
def test_any_pair_of_checkpoints_is_audited(workplace: Workplace, checkpoints: dict[str, str]) -> None:
    found = _report(workplace.audit(original=checkpoints["original"], unlearned=checkpoints["unlearned"]))
    assert found["method"] == "audit"
    assert found["models"]["retrained"] is None
    assert found["gap_to_retrained"] is None
    audit = found["audit"]
    assert audit["distance"] is None
    assert audit["attacks"]["ratio"] is None
    assert all(audit["attacks"]["population"][attack]["models"]["retrained"] is None for attack in ATTACKS)
    assert audit["attacks"]["population"]["log_odds"]["difference"]["against"] == "0.5"
    assert found["cost"]["unlearn"] is None
    assert found["cost"]["evaluation"]["forward"] == 2 * sum(found["models"]["original"][s]["n"] for s in SPLITS)
    page = (workplace.folder / "runs" / "audit" / "report.html").read_text(encoding="utf-8")
    assert "No model was retrained" in page or "no retrained model" in page


def test_several_models_of_each_kind_are_taken(workplace: Workplace, checkpoints: dict[str, str]) -> None:
    retrained = [checkpoints["retrained"]]
    unlearned = [checkpoints["unlearned"]]
    for i in range(1, 5):
        retrained.append(_copy(Path(workplace.kept()["retrained"]), workplace.folder / f"r{i}.pt", 1e-3 * i))
        unlearned.append(_copy(Path(workplace.kept()["original"]), workplace.folder / f"u{i}.pt", 1e-3 * (i + 1)))
    found = _report(
        workplace.audit(original=checkpoints["original"], unlearned=unlearned, retrained=retrained, relearn_epochs=0)
    )
    distance = found["audit"]["distance"]
    assert found["audit"]["options"]["retrained_models"] == found["audit"]["options"]["unlearned_models"] == 5
    assert distance["klom"]["forget"] >= 0
    assert 0 <= distance["epsilon"]["quality"] <= 1
    assert distance["relearn"] is None
    assert found["audit"]["attacks"]["ratio"]["references"] == 4
    assert len([name for name in found["provenance"]["hashes"] if name.startswith("retrained")]) == 5


def test_each_network_passes_over_each_split_once(
    workplace: Workplace, checkpoints: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from monai_unlearn import run as module

    passes: list[tuple[str, ...]] = []
    evaluate = module.evaluate
    monkeypatch.setattr(
        module, "evaluate", lambda e, n, loaders, names: passes.append(tuple(loaders)) or evaluate(e, n, loaders, names)
    )
    workplace.audit(**checkpoints, relearn_epochs=0)
    assert passes == [SPLITS] * 3


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("unlearned", "Name the unlearned model's checkpoint with --unlearned"),
        ("original", "Name the original model's"),
    ],
)
def test_a_model_that_is_missing_is_asked_for(
    left_out: str, message: str, workplace: Workplace, checkpoints: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=message):
        _audit(workplace, **{name: path for name, path in checkpoints.items() if name != left_out})


def test_one_file_in_two_places_is_refused(workplace: Workplace, checkpoints: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="should be different files, but one is given twice"):
        _audit(workplace, original=checkpoints["original"], unlearned=checkpoints["original"])


def test_a_file_that_is_not_there_is_named(workplace: Workplace, checkpoints: dict[str, str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"'gone\.pt' does not exist"):
        _audit(workplace, original=checkpoints["original"], unlearned="gone.pt")


@pytest.mark.parametrize("which", ["original", "unlearned", "retrained"])
def test_a_checkpoint_of_an_unlike_network_is_named(
    which: str, workplace: Workplace, checkpoints: dict[str, str]
) -> None:
    torch.save(torch.nn.Linear(3, 2).state_dict(), checkpoints[which])
    with pytest.raises(ValueError, match=rf"The {which} model {which}\.pt: The checkpoint is of another network"):
        _audit(workplace, **checkpoints)
    assert not unfinished_below(workplace.folder)


def test_an_original_near_chance_is_refused(workplace: Workplace, checkpoints: dict[str, str]) -> None:
    torch.save({"model": workplace.network().state_dict()}, checkpoints["original"])
    with pytest.raises(ValueError, match=r"(near|below) the chance of"):
        _audit(workplace, **checkpoints)


def test_a_broken_model_is_refused(workplace: Workplace, checkpoints: dict[str, str]) -> None:
    _copy(workplace.kept()["original"], Path(checkpoints["unlearned"]), float("nan"))
    with pytest.raises(ValueError, match=r"unlearned\.pt: .* hold NaN or infinity"):
        _audit(workplace, **checkpoints)


def test_a_misspelt_setting_is_named(workplace: Workplace, checkpoints: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"'retrainde'.*Did you mean 'retrained'"):
        _audit(workplace, retrainde="x.pt", **checkpoints)


def test_a_column_that_is_not_there_is_named(workplace: Workplace, checkpoints: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="there is no 'sex'"):
        _audit(workplace, subgroups=["sex"], **checkpoints)


def test_originals_are_only_read(workplace: Workplace, checkpoints: dict[str, str]) -> None:
    before = {name: Path(path).read_bytes() for name, path in checkpoints.items()}
    workplace.audit(**checkpoints)
    assert {name: Path(path).read_bytes() for name, path in checkpoints.items()} == before


@pytest.mark.parametrize("rows", [[5], [5, 6]])
def test_a_request_of_one_or_two_images_is_audited(
    rows: list[int], workplace: Workplace, checkpoints: dict[str, str]
) -> None:
    request = workplace.folder / "few.json"
    request.write_text(json.dumps({"include": [{"index": rows}]}))
    found = _report(workplace.audit(forget_request=str(request), **checkpoints))
    if len(rows) == 1:
        assert found["audit"]["verdict"]["answer"] == "powerless"
        assert found["audit"]["attacks"]["population"]["log_odds"]["models"]["unlearned"]["low"] is None
        assert set(found["audit"]["distance"]["relearn"]["steps"].values()) <= {0, None}


# ---- shadow models


def test_shadow_models_are_made_once_and_found_again(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    run = workplace.unlearn(train_epochs=4)
    first = _report(workplace.audit(run=str(run), shadow_models=4, relearn_epochs=0))
    printed = capsys.readouterr().out
    assert "Shadow models:" in printed
    entry = first["audit"]["attacks"]["u_lira"]
    assert entry["shadow_models"] == 4
    assert 0 <= entry["models"]["unlearned"]["auc"] <= 1
    listed = [part for part in first["left"] if part["what"] == "scores of shadow models"]
    assert len(listed) == 1
    assert listed[0]["ours"]
    before = files_below(workplace.models / "shadow")
    assert len(before) == 8
    again = _report(workplace.audit(run=str(run), shadow_models=4, relearn_epochs=0))
    assert files_below(workplace.models / "shadow") == before
    assert again["audit"]["attacks"] == first["audit"]["attacks"]


def test_an_audit_that_was_stopped_goes_on_where_it_was(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    run = workplace.unlearn()
    before = files_below(run)
    train, made = shadow._train, []

    def stopped(*arguments: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(1)
        return train(*arguments)

    monkeypatch.setattr(shadow, "_train", stopped)
    with pytest.raises(KeyboardInterrupt):
        workplace.audit(run=str(run), shadow_models=4, relearn_epochs=0)
    assert not (workplace.folder / "runs" / "audit").exists()
    assert not unfinished_below(workplace.folder)
    kept = files_below(workplace.models / "shadow")
    assert len(kept) == 4
    monkeypatch.setattr(shadow, "_train", train)
    workplace.audit(run=str(run), shadow_models=4, relearn_epochs=0)
    assert kept.items() <= files_below(workplace.models / "shadow").items()
    assert files_below(run) == before


def test_shadow_models_need_to_know_the_method(workplace: Workplace, checkpoints: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"shadow_models needs to know how the model was unlearned.*--run DIR"):
        _audit(workplace, shadow_models=4, **checkpoints)


def test_an_odd_number_of_shadow_models_is_refused(workplace: Workplace) -> None:
    run = workplace.unlearn(reference=False)
    with pytest.raises(ValueError, match="even number of at least 4, but got 3"):
        _audit(workplace, run=str(run), shadow_models=3, reference=False)


# ---- several runs, and other people's dashboards


@pytest.mark.pages
def test_runs_of_several_sizes_make_a_curve(workplace: Workplace) -> None:
    small = workplace.unlearn(forget_fraction=0.05, output_dir="runs/small")
    large = workplace.unlearn(forget_fraction=0.3, output_dir="runs/large")
    found = _report(workplace.audit(run=str(small), curve_runs=[str(large)], relearn_epochs=0))
    rows = found["audit"]["forget_size"]
    assert [row["images"] for row in rows] == [6, 36]
    assert [row["this"] for row in rows] == [True, False]
    page = (workplace.folder / "runs" / "audit" / "report.html").read_text(encoding="utf-8")
    assert "forget-size" in page.lower() or "size of the forget set" in page.lower()


def test_the_numbers_go_to_tensorboard_through_monais_handler(workplace: Workplace) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = workplace.folder / "board"
    handler = {"_target_": "monai.handlers.TensorBoardStatsHandler", "log_dir": str(folder)}
    report = _report(workplace.unlearn(report_handlers=[handler]))
    events = EventAccumulator(str(folder))
    events.Reload()
    written = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert written == pytest.approx(scalars(report), rel=1e-5, abs=1e-6)
    assert len(written) > 50


def test_the_numbers_go_to_mlflow_through_monais_handler(workplace: Workplace) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed: it is no requirement of the tests")
    pytest.importorskip("sqlalchemy", reason="MLflow's store in a file needs SQLAlchemy")
    import sqlite3

    store = workplace.folder / "mlflow.db"
    report = _report(workplace.unlearn())
    publish(report, [MLFlowHandler(tracking_uri=f"sqlite:///{store}")])
    with sqlite3.connect(store) as database:
        written = dict(database.execute("select key, value from metrics").fetchall())
    assert written == pytest.approx(scalars(report))


def test_nothing_is_published_unasked(workplace: Workplace) -> None:
    report = _report(workplace.unlearn())
    before = files_below(workplace.folder)
    publish(report, [])
    assert files_below(workplace.folder) == before
    publish(report, [TensorBoardStatsHandler(log_dir=str(workplace.folder / "board"))])
    assert len(files_below(workplace.folder)) == len(before) + 1


def test_messages_of_monai_hold_ours(workplace: Workplace) -> None:
    with pytest.raises(RuntimeError) as caught:
        workplace.audit(original="a.pt")
    assert "Name the unlearned model's checkpoint" in messages(caught.value)


def test_a_report_that_can_not_be_written_anew_costs_nothing(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    run = workplace.unlearn(reference=False)
    report = json.loads((run / "report.json").read_text())
    del report["audit"]["verdict"]
    (run / "report.json").write_text(json.dumps(report))
    before = files_below(workplace.folder)
    assert main(["finalise", str(run)]) == 2
    assert "audit should be as report.schema.json says" in capsys.readouterr().err
    assert files_below(workplace.folder) == before
