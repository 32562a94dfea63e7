"""Versions of the served model: published, rolled back, finalised, damaged."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from monai_unlearn.label.versions import NoModelError, Version, Versions

ABOUT = {"class_names": ("a", "b"), "channels": 1, "multi_label": False}


@pytest.fixture
def publish(tmp_path: Path):
    versions = Versions(tmp_path / "versions")

    def make(value: float, made: str = "trained", requests: tuple[str, ...] = ()) -> Version:
        torch.save({"weight": torch.full((2,), value)}, tmp_path / "new.pt")
        return versions.publish(tmp_path / "new.pt", made, {"hash": "train"}, requests=requests, **ABOUT)

    make.versions = versions  # type: ignore[attr-defined]
    return make


def _value(version: Version) -> float:
    return float(torch.load(version.path, weights_only=True)["weight"][0])


def test_before_any_there_is_none(tmp_path: Path) -> None:
    versions = Versions(tmp_path)
    assert versions.current() is None
    assert versions.earlier() == []
    with pytest.raises(NoModelError, match="No model is served yet"):
        versions.served()
    with pytest.raises(NoModelError, match="no earlier version"):
        versions.rollback()
    assert versions.finalise() == 0


def test_a_new_version_stands_beside_the_old_and_is_served(publish) -> None:
    first, second = publish(1.0), publish(2.0, "unlearned", ("r1",))
    versions = publish.versions
    assert versions.served() == second
    assert [version.name for version in versions.earlier()] == [first.name]
    assert (_value(first), _value(second)) == (1.0, 2.0)
    assert (second.made, second.requests, second.class_names) == ("unlearned", ("r1",), ("a", "b"))
    assert versions.trained_on(second) == {"hash": "train"}


def test_rollback_serves_the_one_before_and_removes_the_other(publish) -> None:
    first, second = publish(1.0), publish(2.0)
    assert publish.versions.rollback() == first
    assert not second.path.exists()
    with pytest.raises(NoModelError):
        publish.versions.rollback()
    assert publish(3.0).name != first.name


def test_finalise_leaves_the_served_one_alone(publish) -> None:
    publish(1.0), publish(2.0)
    third = publish(3.0)
    versions = publish.versions
    assert versions.finalise(timedelta(days=1)) == 0
    assert len(versions.earlier()) == 2
    assert versions.finalise() == 2
    assert versions.earlier() == []
    assert versions.served() == third
    assert sorted(path.name for path in versions.folder.iterdir()) == ["0003", "served.json"]
    with pytest.raises(NoModelError, match="finalised"):
        versions.rollback()


def test_a_damaged_checkpoint_is_not_published(publish, tmp_path: Path) -> None:
    first = publish(1.0)
    (tmp_path / "bad.pt").write_bytes(first.path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        publish.versions.publish(tmp_path / "bad.pt", "trained", {}, **ABOUT)
    assert publish.versions.served() == first


def test_rollback_to_a_damaged_checkpoint_is_refused(publish) -> None:
    first, second = publish(1.0), publish(2.0)
    first.path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="damaged"):
        publish.versions.rollback()
    assert publish.versions.served() == second


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"current": "0009", "earlier": [], "since": "x"}'])
def test_a_damaged_pointer_is_named(publish, content: str) -> None:
    publish(1.0)
    (publish.versions.folder / "served.json").write_text(content)
    with pytest.raises(NoModelError, match=r"[Rr]estore"):
        publish.versions.served()


def test_a_folder_that_was_not_finished_is_no_version(publish, monkeypatch: pytest.MonkeyPatch) -> None:
    first = publish(1.0)
    with monkeypatch.context() as patched:
        patched.setattr(
            "monai_unlearn.label.versions.write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
        )
        with pytest.raises(OSError, match="full"):
            publish(2.0)
    assert publish.versions.served() == first
    assert json.loads((publish.versions.folder / "served.json").read_text())["current"] == first.name
