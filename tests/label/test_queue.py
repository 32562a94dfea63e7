"""The queue of deletion requests: states, names, crashes, and several processes at once."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_unlearn.label.queue import NEXT, STATES, Queue, QueuedRequest, UnknownRequestError


def test_a_request_survives_in_its_file(tmp_path: Path) -> None:
    queued = Queue(tmp_path / "q").add("train", patients=["P1"], images=["a", "b"], options={"budget": 0.2})
    again = Queue(tmp_path / "q").get(queued.id)
    assert again == queued
    assert again.state == "received"
    assert stat.S_IMODE(os.stat(tmp_path / "q" / "queue.json").st_mode) == 0o600
    assert stat.S_IMODE(os.stat(tmp_path / "q").st_mode) == 0o700


def test_the_ids_of_requests_say_nothing(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    ids = {queue.add("train", patients=["P1"]).id for _ in range(20)}
    assert len(ids) == 20
    assert not any("P1" in id for id in ids)


def test_only_states_that_follow_can_be_reached() -> None:
    for state in STATES:
        for after in STATES:
            request = QueuedRequest(id="r", source="train", state=state)
            if after in NEXT[state]:
                request.go(after)
                assert request.history[-1]["state"] == after
            else:
                with pytest.raises(ValueError, match=f"{state} can't become {after}"):
                    request.go(after)


def test_nothing_is_kept_of_a_change_that_fails(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    id = queue.add("train").id
    with pytest.raises(ZeroDivisionError), queue.change(id) as request:  # noqa: PT012
        request.go("resolved")
        raise ZeroDivisionError
    assert queue.get(id).state == "received"


def test_once_served_it_holds_salted_hashes_alone(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "one")
    id = queue.add("train", patients=["PAT-1"], images=["scan-1"]).id
    assert queue.served(["PAT-1"]) == set()
    queue.forget_names(id)
    queue.forget_names(id)  # a second time hashes no hashes
    text = (tmp_path / "one" / "queue.json").read_text()
    assert "PAT-1" not in text
    assert "scan-1" not in text
    assert queue.served(["PAT-1", "PAT-2"]) == {"PAT-1"}
    assert Queue(tmp_path / "two").hash("PAT-1") != queue.hash("PAT-1")  # another site's key
    assert Queue(tmp_path / "one").hash("PAT-1") == queue.hash("PAT-1")


def test_what_is_shown_has_numbers_instead_of_names(tmp_path: Path) -> None:
    shown = Queue(tmp_path).add("train", patients=["PAT-1"], images=["scan-1", "scan-2"]).public()
    assert "PAT-1" not in json.dumps(shown)
    assert "scan-1" not in json.dumps(shown)
    assert (shown["n_patients"], shown["n_images"]) == (1, 2)


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '[{"id": 1}]', '{"a": 1}', '[{"id": "r", "source": "t", "state": "x"}]']
)
def test_a_damaged_file_is_named_and_left_as_it_is(tmp_path: Path, content: str) -> None:
    (tmp_path / "queue.json").write_text(content)
    queue = Queue(tmp_path)
    with pytest.raises(ValueError, match=r"queue.json of the deletion requests is damaged"):
        queue.requests()
    with pytest.raises(ValueError, match="Nothing was changed"):
        queue.add("train")
    assert (tmp_path / "queue.json").read_text() == content


def test_an_unknown_request_is_an_error(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    for act in (queue.get, queue.remove, queue.forget_names):
        with pytest.raises(UnknownRequestError, match="There is no deletion request 'r0'"):
            act("r0")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(tmp_path)
    id = queue.add("train").id

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"), queue.change(id) as request:
            request.go("resolved")
    assert queue.get(id).state == "received"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["queue.json", "queue.lock"]


def test_several_processes_add_without_losing_one(tmp_path: Path) -> None:
    code = f"from monai_unlearn.label.queue import Queue\nfor _ in range(20): Queue({str(tmp_path)!r}).add('train')"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    requests = Queue(tmp_path).requests()
    assert len({request.id for request in requests}) == 60


def test_several_threads_add_without_losing_one(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        added = list(pool.map(lambda _: queue.add("train").id, range(80)))
    assert sorted(added) == sorted(request.id for request in queue.requests())


@given(names=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5, unique=True))
@settings(max_examples=20, deadline=None)
def test_any_name_makes_the_round_trip_or_becomes_a_hash(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    queue = Queue(tmp_path_factory.mktemp("queue"))
    names = [name.encode("utf-8", "replace").decode() for name in names]
    id = queue.add("train", patients=names).id
    assert queue.get(id).patients == names
    queue.forget_names(id)
    assert queue.served(names) == set(names)
