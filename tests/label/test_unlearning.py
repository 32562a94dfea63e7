"""A deletion request's way, with real training and unlearning on DICOM files, and every place where it may break."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from folder import Folder
from hypothesis import given, settings
from hypothesis import strategies as st
from studies import write_studies

from monai_unlearn.label.images import UnknownImagesError
from monai_unlearn.label.queue import QueuedRequest, UnknownRequestError
from monai_unlearn.label.site import Accept, Site, read_site
from monai_unlearn.label.unlearning import (
    AlreadyWithdrawnError,
    BusyError,
    Options,
    RunFailedError,
    Unlearning,
    read_options,
)
from monai_unlearn.label.versions import NoModelError

METHODS = ("auto", "saliency")
QUICK = Options(method="saliency", epochs=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site with a trained model."""
    root = tmp_path_factory.mktemp("site")
    write_studies(root / "studies", patients=40, size=16)
    unlearning = _of(root)
    assert unlearning.train(Folder(root / "studies"), {"train_epochs": 12}).name == "0001"
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "site"))


@pytest.fixture
def unlearning(root: Path) -> Unlearning:
    return _of(root)


@pytest.fixture
def folder(root: Path) -> Folder:
    return Folder(root / "studies")


def _of(root: Path, **changes: Any) -> Unlearning:
    return Unlearning(dataclasses.replace(read_site(root / "studies", {"site": str(root / "site.json")}), **changes))


def _weights(unlearning: Unlearning) -> dict[str, torch.Tensor]:
    return torch.load(unlearning.versions.served().path, weights_only=True)


def _states(request: QueuedRequest) -> list[str]:
    return [step["state"] for step in request.history]


@pytest.mark.pages
def test_from_a_request_to_the_served_model(
    unlearning: Unlearning, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "pydicom")
    before = _weights(unlearning)
    queued = unlearning.receive(folder, "train", images=["scan0003a"], options={"budget": 1.0})
    assert queued.state == "resolved"
    assert len(folder.list_images()) == 78
    (done,) = unlearning.run(folder, Options(budget=1.0))
    assert _states(done) == ["received", "resolved", "unlearning", "audited", "served"]
    assert "test accuracy" in done.message
    served = unlearning.versions.served()
    assert (served.name, served.made, served.requests) == ("0002", "unlearned", (queued.id,))
    assert any(not torch.equal(value, before[name]) for name, value in _weights(unlearning).items())
    assert not list(unlearning.site.folder.glob("quarantine/*"))
    assert not unlearning.work.exists()
    report = json.loads((unlearning.report_folder(queued.id) / "report.json").read_text())
    assert report["method"] == "auto"
    assert (unlearning.report_folder(queued.id) / "report.html").is_file()
    assert report["models"]["original"]["forget"]["n"] == 2
    for path in unlearning.site.folder.rglob("*"):
        if path.is_file():
            assert b"PAT-0003" not in path.read_bytes(), path
            assert b"scan0003" not in path.read_bytes(), path
    assert "PAT-0003" not in caplog.text
    assert "scan0003" not in caplog.text


def test_a_second_request_does_not_bring_back_the_first(
    unlearning: Unlearning, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = unlearning.receive(folder, "train", patients=["PAT-0003"])
    unlearning.run(folder, QUICK)
    tables = []
    real = Unlearning._bundle
    monkeypatch.setattr(
        Unlearning,
        "_bundle",
        lambda self, config, work, table, *rest: (tables.append(table), real(self, config, work, table, *rest))[1],
    )
    second = unlearning.receive(folder, "datastore", patients=["PAT-0005"])
    unlearning.run(folder, QUICK)
    (table,) = tables
    assert "PAT-0003" not in set(table["patient"])
    assert table.loc[table["patient"] == "PAT-0005", "split"].tolist() == ["train", "train"]
    trained_on = unlearning.versions.trained_on(unlearning.versions.served())
    assert not {unlearning.queue.hash(f"scan000{n}{v}") for n in (3, 5) for v in "ab"} & set(trained_on)
    assert len(trained_on) == 76
    assert [unlearning.queue.get(one.id).state for one in (first, second)] == ["served", "served"]
    assert unlearning.queue.served(["PAT-0003", "PAT-0005", "PAT-0007"]) == {"PAT-0003", "PAT-0005"}


def test_several_that_wait_are_one_run(unlearning: Unlearning, folder: Folder) -> None:
    ids = [unlearning.receive(folder, "datastore", images=[image]).id for image in ("scan0001a", "scan0002b")]
    done = unlearning.run(folder, Options(method="saliency", epochs=1))
    assert [one.id for one in done] == ids
    assert {one.version for one in done} == {"0002"}
    assert unlearning.versions.served().requests == tuple(ids)


def test_who_was_not_trained_on_needs_no_run(unlearning: Unlearning, folder: Folder) -> None:
    queued = unlearning.receive(folder, "train", patients=["PAT-0039"])
    (done,) = unlearning.run(folder, Options())
    assert done.state == "served"
    assert "not trained on any of these" in done.message
    assert unlearning.versions.served().name == "0001"
    assert not list(unlearning.site.folder.glob("quarantine/*"))
    assert unlearning.queue.get(queued.id).hashed


def test_images_that_came_after_training_play_no_part(unlearning: Unlearning, folder: Folder) -> None:
    shutil.copy(folder.path / "scan0001a.dcm", folder.path / "later.dcm")
    folder.refresh()
    folder.update_image_info("later", {"label": "opacity", "split": "train", "patient": "LATER"})
    unlearning.receive(folder, "train", patients=["PAT-0003"])
    unlearning.run(folder, QUICK)
    assert unlearning.queue.hash("later") not in unlearning.versions.trained_on(unlearning.versions.served())
    unlearning.receive(folder, "train", patients=["LATER"])
    assert "not trained on any" in unlearning.run(folder, Options())[0].message


@pytest.mark.pages
def test_a_model_that_is_not_accepted_is_not_served(root: Path, folder: Folder) -> None:
    strict = _of(root, accept=Accept(verdicts=("equivalent",)))
    queued = strict.receive(folder, "train", patients=["PAT-0003"])
    (done,) = strict.run(folder, QUICK)
    assert _states(done) == ["received", "resolved", "unlearning", "audited", "failed"]
    assert "Not accepted: the audit's verdict" in done.message
    assert strict.versions.served().name == "0001"
    assert len(strict.quarantine.rows(queued.id)) == 2
    assert (strict.report_folder(queued.id) / "report.html").is_file()
    # With other thresholds the same request is tried again.
    easy = _of(root)
    easy.retry(queued.id, folder)
    assert easy.run(folder, QUICK)[0].state == "served"


REFUSED = {
    "test_loss": (Accept(test_loss=0.05), (0.9, 0.84), (0.4, 0.6), "test accuracy fell from 90.0 to 84.0"),
    "attack": (Accept(attack_auc=0.6), (0.9, 0.9), (0.7, 0.8), "AUC of at least 0.700, above the 0.6"),
    "over-forgotten": (Accept(attack_auc=0.6), (0.9, 0.9), (0.1, 0.2), "AUC of at least 0.800, above the 0.6"),
    "verdict": (Accept(verdicts=("equivalent",)), (0.9, 0.9), (0.4, 0.6), "verdict is different"),
    "nothing": (Accept(test_loss=0.07, attack_auc=0.7, verdicts=("different",)), (0.9, 0.84), (0.7, 0.8), None),
    "no figures": (Accept(test_loss=0.0, attack_auc=0.5), (None, None), (None, None), None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_every_threshold(tmp_path: Path, case: str) -> None:
    accept, (before, after), (low, high), message = REFUSED[case]
    report = {
        "task": "multi-class",
        "models": {
            "original": {"test": {"accuracy": before}},
            "unlearned": {"test": {"accuracy": after}, "attack": {"low": low, "high": high}},
        },
        "audit": {"verdict": {"answer": "different"}},
    }
    unlearning = Unlearning(Site(tmp_path, accept=accept))
    found = unlearning._refusal(report)
    assert (found is None) if message is None else (message in found)
    said = " ".join(unlearning._not_judged(report))
    assert ("`test_loss` of `accept` was not judged" in said) == (after is None)
    assert ("`attack_auc` of `accept` was not judged" in said) == (low is None)


def test_a_run_that_fails_leaves_everything_as_it_was(
    unlearning: Unlearning, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("The loss of scan0003a.dcm is not finite")

    queued = unlearning.receive(folder, "train", patients=["PAT-0003"])
    with monkeypatch.context() as patched:
        patched.setattr("monai_unlearn.label.unlearning.unlearn", failing)
        with pytest.raises(RuntimeError):
            unlearning.run(folder, Options())
    failed = unlearning.queue.get(queued.id)
    assert failed.state == "failed"
    assert failed.message == "RuntimeError: The loss of … is not finite"
    assert unlearning.versions.served().name == "0001"
    assert not unlearning.work.exists()
    assert unlearning.cancel(queued.id, folder).id == queued.id
    assert len(folder.list_images()) == 80
    assert unlearning.queue.requests() == []


def test_a_corrupt_checkpoint_is_said_and_nothing_is_served_in_its_place(
    unlearning: Unlearning, folder: Folder
) -> None:
    path = unlearning.versions.served().path
    path.write_bytes(path.read_bytes()[:500])
    queued = unlearning.receive(folder, "train", patients=["PAT-0003"])
    with pytest.raises(RunFailedError, match=r"model.pt could not be read as a checkpoint"):
        unlearning.run(folder, Options())
    assert "could not be read as a checkpoint" in unlearning.queue.get(queued.id).message
    assert len(unlearning.quarantine.rows(queued.id)) == 2


@pytest.mark.parametrize("state", ["unlearning", "audited"])
def test_a_run_that_was_killed_starts_again(root: Path, unlearning: Unlearning, folder: Folder, state: str) -> None:
    queued = unlearning.receive(folder, "train", patients=["PAT-0003"], options={"budget": 1.0})
    with unlearning.queue.change(queued.id) as request:
        request.go("unlearning")
        if state == "audited":
            request.go("audited")
    (unlearning.work / "run").mkdir(parents=True)
    again = _of(root)
    (interrupted,) = again.recover(folder)
    assert (interrupted.id, interrupted.state, interrupted.options) == (queued.id, "resolved", {"budget": 1.0})
    assert again.run(folder, QUICK)[0].state == "served"


def test_killed_between_publishing_and_serving_it_is_served(
    root: Path, unlearning: Unlearning, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued = unlearning.receive(folder, "train", patients=["PAT-0003"])
    with monkeypatch.context() as patched:
        patched.setattr(Unlearning, "_serve", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            unlearning.run(folder, QUICK)
    assert unlearning.versions.served().name == "0002"
    assert unlearning.queue.get(queued.id).state == "audited"
    again = _of(root)
    assert again.recover(folder) == []
    done = again.queue.get(queued.id)
    assert (done.state, done.version, done.hashed) == ("served", "0002", True)
    assert again.quarantine.rows(queued.id) == []
    assert again.recover(folder) == []


def test_rollback_undoes_and_finalise_makes_it_impossible(unlearning: Unlearning, folder: Folder) -> None:
    before = _weights(unlearning)
    queued = unlearning.receive(folder, "train", patients=["PAT-0003"])
    unlearning.run(folder, QUICK)
    version, undone = unlearning.rollback()
    assert (version.name, undone) == ("0001", [queued.id])
    assert all(torch.equal(value, before[name]) for name, value in _weights(unlearning).items())
    request = unlearning.queue.get(queued.id)
    assert request.state == "failed"
    assert "was trained on these images" in request.message
    with pytest.raises(ValueError, match="Its images were erased"):
        unlearning.retry(queued.id, folder)
    unlearning.receive(folder, "train", patients=["PAT-0005"])
    unlearning.run(folder, QUICK)
    assert unlearning.finalise() == 1
    with pytest.raises(NoModelError, match="no earlier version"):
        unlearning.rollback()


def test_only_one_run_at_a_time(unlearning: Unlearning, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_unlearn.label.unlearning.PATIENCE", 0.1)
    unlearning.receive(folder, "train", patients=["PAT-0003"])
    assert not unlearning.running()
    with FileLock(str(unlearning.site.folder / "run.lock")):
        assert unlearning.running()
        for act in (
            lambda: unlearning.run(folder, Options()),
            lambda: unlearning.train(folder, {}),
            unlearning.rollback,
            unlearning.finalise,
        ):
            with pytest.raises(BusyError, match="at work"):
                act()
        assert unlearning.recover(folder) == []
    assert unlearning.run(folder, QUICK)[0].state == "served"


def test_a_request_that_is_open_is_named_when_it_comes_again(unlearning: Unlearning, folder: Folder) -> None:
    queued = unlearning.receive(folder, "train", patients=["PAT-0003"])
    with pytest.raises(AlreadyWithdrawnError, match=f"Request {queued.id} has withdrawn these already; it is resolved"):
        unlearning.receive(folder, "train", images=["scan0003b"])
    unlearning.stopped("x")  # what is not at work is not touched
    assert unlearning.queue.get(queued.id).state == "resolved"


def test_who_means_nobody(unlearning: Unlearning, folder: Folder) -> None:
    with pytest.raises(UnknownImagesError, match="this one means nobody"):
        unlearning.receive(folder, "train")
    with pytest.raises(UnknownImagesError, match="1 of 1 patients"):
        unlearning.receive(folder, "train", patients=["PAT-9999"])
    assert unlearning.queue.requests() == []
    assert unlearning.run(folder, Options()) == []
    for act in (
        lambda id: unlearning.retry(id, folder),
        unlearning.report_folder,
        lambda id: unlearning.cancel(id, folder),
    ):
        with pytest.raises(UnknownRequestError):
            act("r0")


def test_a_patient_who_withdraws_while_a_run_is_at_work_does_not_disturb_it(
    unlearning: Unlearning, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    import monai_unlearn.label.unlearning as module

    real, later = module.unlearn, []

    def unlearn(bundle: object) -> None:
        later.append(unlearning.receive(Folder(folder.path), "train", patients=["PAT-0007"]).id)
        real(bundle)

    monkeypatch.setattr(module, "unlearn", unlearn)
    unlearning.receive(folder, "train", patients=["PAT-0003"])
    assert unlearning.run(folder, QUICK)[0].state == "served"
    assert unlearning.queue.get(later[0]).state == "resolved"
    monkeypatch.setattr(module, "unlearn", real)
    assert unlearning.run(folder, QUICK)[0].id == later[0]


def test_a_withdrawal_that_broke_off_is_finished_by_the_next_try(
    root: Path, unlearning: Unlearning, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(type(unlearning.quarantine), "take", full)
        with pytest.raises(OSError, match="No space"):
            unlearning.receive(folder, "train", patients=["PAT-0003"])
    (request,) = unlearning.queue.requests()
    assert request.state == "failed"
    assert len(folder.list_images()) == 80
    unlearning.retry(request.id, folder)
    assert len(folder.list_images()) == 78
    # Nothing is ever served of which the images are not at hand.
    unlearning.quarantine.erase(request.id)
    with pytest.raises(RunFailedError, match="are missing in quarantine"):
        unlearning.run(folder, QUICK)
    with pytest.raises(ValueError, match="are missing, in the datastore and in quarantine"):
        unlearning.retry(request.id, folder)
    # Killed before anything was moved: the restart says so.
    (folder.path / "scan0003a.dcm").write_bytes(b"x")
    with unlearning.queue._all() as requests:
        requests[0].state = "received"
    assert _of(root).recover(folder) == []
    assert unlearning.queue.get(request.id).state == "failed"


def test_a_request_that_a_run_has_begun_can_not_be_taken_back(unlearning: Unlearning, folder: Folder) -> None:
    queued = unlearning.receive(folder, "datastore", patients=["PAT-0003"])
    assert unlearning.queue.claim() == [queued.id]
    assert unlearning.queue.claim() == []
    with pytest.raises(ValueError, match="that is unlearning can't be taken back"):
        unlearning.cancel(queued.id, folder)
    unlearning.stopped("It was killed.")
    assert unlearning.queue.get(queued.id).message == "It was killed."
    shutil.copy(folder.path / "scan0001a.dcm", folder.path / "scan0003a.dcm")  # sent again meanwhile
    with pytest.raises(ValueError, match="1 of 2 images can't return"):
        unlearning.cancel(queued.id, folder)
    (folder.path / "scan0003a.dcm").unlink()
    unlearning.cancel(queued.id, folder)
    assert len(folder.list_images()) == 80


def test_a_model_trained_anew_without_them_serves_those_who_were_rolled_back(
    unlearning: Unlearning, folder: Folder
) -> None:
    queued = unlearning.receive(folder, "train", patients=["PAT-0003"])
    unlearning.run(folder, QUICK)
    unlearning.rollback()
    assert unlearning.queue.get(queued.id).state == "failed"
    version = unlearning.train(folder, {"train_epochs": 1})
    assert version.name == "0003"  # numbers are not used again
    request = unlearning.queue.get(queued.id)
    assert (request.state, request.version) == ("served", "0003")
    assert unlearning.rollback()[1] == [queued.id]


def test_images_without_a_label_are_left_out_of_training(unlearning: Unlearning, folder: Folder) -> None:
    for name in ("new1", "new2"):
        shutil.copy(folder.path / "scan0001a.dcm", folder.path / f"{name}.dcm")
    folder.refresh()
    assert unlearning.train(folder, {"train_epochs": 1}).made == "trained"


def test_without_a_model_the_request_waits(tmp_path: Path) -> None:
    write_studies(tmp_path / "studies", patients=10, size=8)
    unlearning, folder = _of(tmp_path), Folder(tmp_path / "studies")
    queued = unlearning.receive(folder, "datastore", patients=["PAT-0003"])
    with pytest.raises(NoModelError, match="No model is served yet"):
        unlearning.run(folder, Options())
    assert unlearning.queue.get(queued.id).state == "resolved"


def test_a_model_of_the_sites_own_is_imported(root: Path, folder: Folder, tmp_path: Path) -> None:
    checkpoint = tmp_path / "theirs.pt"
    shutil.copy(_of(root).versions.served().path, checkpoint)
    shutil.rmtree(root / "studies" / ".unlearning")
    unlearning = _of(root, checkpoint=checkpoint)
    version = unlearning.import_model(folder)
    assert (version.made, version.class_names, version.channels) == ("imported", ("normal", "opacity"), 1)
    unlearning.receive(folder, "train", patients=["PAT-0003"])
    assert unlearning.run(folder, QUICK)[0].state == "served"

    torch.save({"other.weight": torch.zeros(2)}, checkpoint)
    with pytest.raises(ValueError, match="of another network"):
        unlearning.import_model(folder)
    with pytest.raises(ValueError, match="names no checkpoint"):
        _of(root).import_model(folder)


def test_options_as_clients_send_them() -> None:
    slicer = {"method": ["auto", "saliency"], "budget": "0.2", "epochs": 3.0, "reference": "False", "device": ["cpu"]}
    assert read_options({**slicer, "client_id": "x"}, METHODS) == Options(budget=0.2, epochs=3, device="cpu")
    assert read_options({}, ("saliency",)).method == "saliency"


WRONG = [
    ({"methd": 1}, "no option 'methd'. Did you mean 'method'"),
    ({"patiens": ["x"]}, "no option 'patiens'. Did you mean 'patients'"),
    ({"method": "magic"}, "method should be one of auto, saliency, but got 'magic'"),
    ({"budget": 0}, "budget should be a number above 0, but got 0"),
    ({"budget": "nan"}, "budget should be a number above 0"),
    ({"budget": True}, "budget should be a number above 0"),
    ({"epochs": 1.5}, "epochs should be a number above 0, but got 1.5"),
    ({"ratio": 1.1}, "ratio should be a number above 0 and at most 1, but got 1.1"),
    ({"reference": "maybe"}, "reference should be true or false"),
    ({"device": 3}, "device should be a name"),
]


@pytest.mark.parametrize(("given_", "message"), WRONG)
def test_wrong_options_are_said(given_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options(given_, METHODS)


@given(
    st.dictionaries(
        st.sampled_from(sorted(Options.__dataclass_fields__)),
        st.one_of(st.floats(), st.text(), st.booleans(), st.integers(), st.none(), st.lists(st.integers())),
    )
)
@settings(max_examples=200, deadline=None)
def test_options_are_right_or_refused(values: dict) -> None:
    try:
        options = read_options(values, METHODS)
    except ValueError:
        return
    assert options.method in METHODS
    assert 0 < options.budget < float("inf")
    assert options.epochs >= 1
    assert 0 < options.ratio <= 1
