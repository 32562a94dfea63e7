"""The whole story over HTTP, on a real MONAI Label server."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from server import PYTHON, REASON, Server
from studies import write_studies

pytestmark = pytest.mark.skipif(PYTHON is None, reason=REASON)

QUICK = {"method": "saliency", "epochs": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site whose server has trained a model."""
    root = tmp_path_factory.mktemp("trained")
    write_studies(root / "studies", patients=40, size=16)
    with Server(root / "studies") as server:
        assert server.get("/unlearn/")["served"] is None
        status, content = server.call("POST", "/infer/opacity?image=scan0001a", form={"params": "{}"})
        assert (status, content["detail"][:26]) == (409, "No model is served yet. Tr")
        status, content = server.call("POST", "/train/unlearn", {"patients": "PAT-0001"})
        assert status == 409
        task = server.train("opacity", {"max_epochs": 12, "device": "cpu"})
        assert task["status"] == "DONE", task["details"]
    return root


@pytest.fixture
def server(trained: Path, tmp_path: Path) -> Iterator[Server]:
    root = Path(shutil.copytree(trained, tmp_path / "site"))
    (root / "log.txt").unlink()
    with Server(root / "studies") as server:
        yield server


def test_the_whole_story(server: Server) -> None:
    before = server.infer("scan0003a")
    assert before["version"] == "0001"
    assert sum(before["scores"].values()) == pytest.approx(1, abs=1e-4)
    # As the option panel of 3D Slicer sends it: everything that /info shows, of lists the first.
    config = server.get("/info/")["trainers"]["unlearn"]["config"]
    assert config["method"][0] == "auto"
    params = {name: value[0] if isinstance(value, list) else value for name, value in config.items()}
    status, task = server.call("POST", "/train/unlearn", {**params, "patients": "PAT-0003", "budget": 1.0})
    assert status == 200, task
    assert set(task) >= {"id", "status", "start_ts", "unlearning"}
    id = task["unlearning"]["id"]
    assert server.get("/datastore/")["total"] == 78
    assert server.call("HEAD", "/datastore/image?image=scan0003a")[0] == 404
    status, content = server.call("POST", "/infer/opacity?image=scan0003a", form={"params": "{}"})
    assert status == 404

    assert server.wait(task["id"])["status"] == "DONE"
    request = server.get(f"/unlearn/{id}")
    assert [step["state"] for step in request["history"]] == ["received", "resolved", "unlearning", "audited", "served"]
    assert (request["n_patients"], request["n_images"], request["version"]) == (1, 2, "0002")
    report = server.get(f"/unlearn/{id}/report.json")
    assert report["models"]["unlearned"]["forget"]["n"] == 2
    assert "<html" in server.get(f"/unlearn/{id}/report.html")
    assert server.infer("scan0005a")["version"] == "0002"

    # A second one, by the datastore's own route, waits for the next run.
    status, content = server.call("DELETE", "/datastore/image?id=scan0005b")
    assert (status, content["unlearning"]["state"]) == (200, "resolved")
    second = content["unlearning"]["id"]
    assert server.train("unlearn", QUICK)["status"] == "DONE"
    assert server.get(f"/unlearn/{second}")["state"] == "served"
    everything = server.get("/unlearn/")
    assert everything["served"]["name"] == "0003"
    assert [one["name"] for one in everything["earlier"]] == ["0002", "0001"]
    assert server.get("/datastore/")["total"] == 76
    assert not list((server.studies / ".unlearning" / "quarantine").iterdir())

    # Back by one step, then for good.
    status, content = server.call("POST", "/unlearn/rollback")
    assert (status, content["served"]["name"], content["undone"]) == (200, "0002", [second])
    assert server.infer("scan0007a")["version"] == "0002"
    assert server.get(f"/unlearn/{second}")["state"] == "failed"
    assert server.call("POST", f"/unlearn/{second}/retry")[0] == 422
    assert server.call("POST", "/unlearn/finalise") == (200, {"removed": 1})
    assert server.call("POST", "/unlearn/rollback")[0] == 409

    log = server.log.read_text()
    assert "Unlearning" in log or "unlearning" in log
    for name in ("PAT-0003", "scan0003", "PAT-0005", "scan0005b"):
        after = log[log.index("/train/unlearn") :]
        assert name not in after.replace("image=scan0003a", ""), name


def test_a_tag_withdraws_too(server: Server) -> None:
    status, _ = server.call(
        "PUT", "/datastore/label?image=scan0002a&tag=forget", form={"params": "{}", "label": ("x.json", b"{}")}
    )
    assert status == 200
    (request,) = server.get("/unlearn/")["requests"]
    assert (request["source"], request["state"], request["n_images"]) == ("tag", "resolved", 2)
    assert server.call("DELETE", f"/unlearn/{request['id']}") == (200, {"returned": 2})
    assert server.get("/datastore/")["total"] == 80
    assert server.get("/unlearn/")["requests"] == []


def test_the_one_button_of_ohif_unlearns_where_somebody_is_named(server: Server) -> None:
    """It sends the options that were changed, by the trainer's name, to all trainers at once."""
    status, content = server.call(
        "POST", "/train/", {"unlearn": {"patients": "PAT-0003", "method": "saliency", "epochs": "1"}}
    )
    assert status == 200, content
    assert list(content) == ["unlearn"]
    task = content["unlearn"]["result"]
    assert server.running()["id"] == task["id"]
    assert server.wait(task["id"])["status"] == "DONE"
    assert server.get(f"/unlearn/{task['unlearning']['id']}")["state"] == "served"
    assert "PAT-0003" not in server.log.read_text()
    status, content = server.call("POST", "/train/", {"opacity": {"max_epochs": 1}})
    assert (status, list(content)) == (200, ["opacity"])
    assert server.running()["id"] == content["opacity"]["result"]["id"]
    assert server.call("DELETE", "/train/")[0] == 200


def test_killed_in_the_middle_it_goes_on_after_a_restart(server: Server) -> None:
    status, task = server.call("POST", "/train/unlearn", {"patients": ["PAT-0003"], **QUICK})
    assert status == 200
    id = task["unlearning"]["id"]
    server.until(id, "unlearning")
    server.kill()
    server.start()
    request = server.until(id, "served", "failed")
    assert request["state"] == "served", request
    assert [step["state"] for step in request["history"]].count("unlearning") == 2
    assert server.infer("scan0005a")["version"] == "0002"


def test_stopped_by_its_owner_it_can_be_tried_again(server: Server) -> None:
    status, task = server.call("POST", "/train/unlearn", {"patients": ["PAT-0003"], **QUICK})
    id = task["unlearning"]["id"]
    server.until(id, "unlearning")
    assert server.call("DELETE", "/train/")[0] == 200
    assert server.get(f"/unlearn/{id}")["state"] == "failed"
    assert server.infer("scan0005a")["version"] == "0001"
    for wrong in ({"epoch": 1}, {"dry_run": True}, []):
        assert server.call("POST", f"/unlearn/{id}/retry", wrong)[0] == 422
    status, task = server.call("POST", f"/unlearn/{id}/retry", {"method": "random_labeling"})
    assert status == 200
    request = server.until(id, "served", "failed")
    assert (request["state"], request["options"]) == ("served", {**QUICK, "method": "random_labeling"})
    assert server.get(f"/unlearn/{id}/report.json")["method"] == "random_labeling"


def test_a_request_while_one_runs_waits_behind_it(server: Server) -> None:
    _, first = server.call("POST", "/train/unlearn", {"patients": ["PAT-0003"], **QUICK})
    status, second = server.call("POST", "/train/unlearn", {"patients": ["PAT-0005"], **QUICK})
    assert status == 200
    for task in (first, second):
        assert server.wait(task["id"])["status"] == "DONE"
        assert server.get(f"/unlearn/{task['unlearning']['id']}")["state"] == "served"
    status, content = server.call("POST", "/train/unlearn", QUICK)
    assert (status, content["detail"]) == (404, "No deletion request waits. Name images or patients.")


def test_scores_go_into_the_datastore_and_the_most_exposed_image_is_shown(server: Server) -> None:
    status, task = server.call("POST", "/scoring/membership?run_sync=true", {})
    assert (status, task) == (200, {"executed": 80, "skipped": 0})
    info = {f"scan{n:04d}a": server.get(f"/datastore/image/info?image=scan{n:04d}a") for n in range(5)}
    assert all(isinstance(one["membership"]["score"], float) for one in info.values())
    shown = []
    for _ in range(3):
        status, sample = server.call("POST", "/activelearning/most_exposed", {})
        assert status == 200
        shown.append((sample["membership"]["score"], sample["id"]))
    assert shown == sorted(shown, reverse=True)
    assert len(set(shown)) == 3


def test_a_request_by_rules(server: Server) -> None:
    order = {"request": {"include": [{"rule": 'sex == "M" and label == "opacity"'}]}, "dry_run": True}
    status, content = server.call("POST", "/train/unlearn", order)
    assert (status, content["dry_run"]) == (200, True)
    assert 10 <= content["n_images"] <= 40
    assert server.get("/datastore/")["total"] == 80
    wrong = {"request": {"include": [{"rule": "__import__('os')"}]}, "dry_run": True}
    assert server.call("POST", "/train/unlearn", wrong)[0] == 422


BAD = {
    "nobody": ({"patients": "PAT-9999"}, 404, "1 of 1 patients are not in the datastore"),
    "no image": ({"images": ["../../../etc/passwd"]}, 404, "1 of 1 images are not in the datastore"),
    "10,000 ids": ({"images": [f"x{i}" for i in range(10_000)]}, 404, "10000 of 10000 images"),
    "too many ids": ({"images": ["x"] * 100_001}, 422, "at most 100000 ids"),
    "misspelt": ({"patients": "PAT-0003", "methd": "auto"}, 422, "Did you mean 'method'"),
    "method": ({"patients": "PAT-0003", "method": "magic"}, 422, "method should be one of auto"),
    "budget": ({"patients": "PAT-0003", "budget": 0}, 422, "budget should be a number above 0"),
    "kind": ({"patients": 3}, 422, "patients"),
    "no request": ({"request": "r000000000000"}, 404, "no deletion request 'r000000000000'"),
    "empty rule": ({"request": {"include": []}}, 422, "include"),
    "dry": ({"dry_run": True}, 422, "A dry run should name images or patients"),
}


def test_bad_input_is_said_and_changes_nothing(server: Server) -> None:
    for case, (body, status, message) in BAD.items():
        got, content = server.call("POST", "/train/unlearn", body)
        assert got == status, (case, got, content)
        assert message in json.dumps(content), (case, content)
    assert server.call("POST", "/train/unlearn", raw=b'{"patients": ')[0] == 422
    assert server.call("POST", "/train/unlearn", raw=b"[1, 2]")[0] == 422
    for path in (
        "/unlearn/..%2F..%2Fkey",
        "/unlearn/r0/report.json",
        "/unlearn/nothing",
        "/unlearn/r000000000000/report.exe",
    ):
        assert server.call("GET", path)[0] in (404, 422), path
    assert server.call("GET", "/unlearn/r000000000000")[0] == 404
    assert server.call("DELETE", "/datastore/image?id=../x")[0] == 404
    assert server.call("DELETE", "/datastore/image?id=")[0] == 422
    assert server.get("/datastore/")["total"] == 80
    assert server.get("/unlearn/")["requests"] == []
    assert server.call("GET", "/train/")[0] == 404  # no task was started


def test_a_corrupt_checkpoint_is_said_and_the_request_waits(server: Server) -> None:
    path = server.studies / ".unlearning" / "versions" / "0001" / "model.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    status, content = server.call("POST", "/infer/opacity?image=scan0001a", form={"params": "{}"})
    assert status == 500
    assert "could not be read as a checkpoint" in content["detail"]
    status, task = server.call("POST", "/train/unlearn", {"patients": "PAT-0003", **QUICK})
    id = task["unlearning"]["id"]
    request = server.until(id, "failed")
    assert "could not be read as a checkpoint" in request["message"]
    path.write_bytes(whole)
    server.call("POST", f"/unlearn/{id}/retry")
    assert server.until(id, "served", "failed")["state"] == "served"


@pytest.fixture
def disk(trained: Path, tmp_path: Path) -> Iterator[Server]:
    """The site's server, its studies on a disk of their own of 64 MB."""
    root = Path(shutil.copytree(trained, tmp_path / "site"))
    (root / "studies").rename(root / "copy")
    (root / "studies").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(root / "studies")]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a disk of a limited size can't be mounted here (needs root)")
    try:
        shutil.copytree(root / "copy", root / "studies", dirs_exist_ok=True)
        with Server(root / "studies") as server:
            yield server
    finally:
        subprocess.run(["umount", str(root / "studies")], check=True)


@pytest.mark.parametrize("left", [0, 40_000, 400_000])
def test_a_disk_that_is_really_full_loses_nothing(disk: Server, left: int) -> None:
    """Whether the request itself, what is copied for the run, or the new model no longer fits."""
    filler = disk.studies / ".unlearning" / "filler"
    before = _contents(disk.studies)
    free = shutil.disk_usage(disk.studies).free
    filler.write_bytes(bytes(free))
    os.truncate(filler, free - left)
    status, content = disk.call("POST", "/train/unlearn", {"patients": "PAT-0003", **QUICK})
    if left == 0:
        assert (status, "could not" in content["detail"]) == (507, True), content
    else:
        assert status == 200, content
        request = disk.until(content["unlearning"]["id"], "served", "failed")
        assert (request["state"], "o space left" in request["message"]) == ("failed", True), request["message"]
    assert disk.infer("scan0005a")["version"] == "0001"
    filler.unlink()
    assert before <= _contents(disk.studies)
    requests = disk.get("/unlearn/")["requests"]
    if requests:
        (request,) = requests
        assert disk.call("POST", f"/unlearn/{request['id']}/retry")[0] == 200
    else:
        status, content = disk.call("POST", "/train/unlearn", {"patients": "PAT-0003", **QUICK})
        assert status == 200, content
        request = content["unlearning"]
    assert disk.until(request["id"], "served", "failed")["state"] == "served"
    assert disk.get("/datastore/")["total"] == 78


def _contents(folder: Path) -> set[str]:
    """What the images and models in a folder hold, wherever they lie."""
    return {
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.suffix in (".dcm", ".pt") and path.is_file()
    }


def test_where_images_can_not_be_put_nothing_is_lost(server: Server) -> None:
    """A file in the place of the folder where images go."""
    place = server.studies / ".unlearning" / "quarantine"
    place.rmdir()
    place.write_text("")
    status, content = server.call("POST", "/train/unlearn", {"patients": "PAT-0003"})
    assert status == 507, content
    assert "could not write" in content["detail"]
    assert server.get("/datastore/")["total"] == 80
    assert server.infer("scan0003a")["version"] == "0001"
    (request,) = server.get("/unlearn/")["requests"]
    assert request["state"] == "failed"
    place.unlink()
    assert server.call("POST", f"/unlearn/{request['id']}/retry")[0] == 200
    assert server.until(request["id"], "served", "failed")["state"] == "served"


def test_nobody_sees_quarantine_or_changes_the_served_model(server: Server) -> None:
    _, content = server.call("DELETE", "/datastore/image?id=scan0003a")
    id = content["unlearning"]["id"]
    inside = server.studies / ".unlearning" / "quarantine" / id / "files" / "scan0003a.dcm"
    assert inside.is_file()
    assert server.call("POST", f"/infer/opacity?image={inside}", form={"params": "{}"})[0] == 404
    assert server.call("PUT", "/model/opacity", form={"file": ("model.pt", b"x")})[0] == 409
    assert server.call("DELETE", "/model/opacity")[0] == 409
    # A task that is killed does not leave its request behind.
    _, task = server.call("POST", "/train/unlearn", QUICK)
    server.until(id, "unlearning")
    subprocess.run(["pkill", "-9", "-P", str(server.process.pid), "-f", "interfaces.utils.app"], check=True)
    server.wait(task["id"])
    server.get("/unlearn/")
    request = server.get(f"/unlearn/{id}")
    assert (request["state"], request["message"][:37]) == ("failed", "The run ended before its time: it was")


def test_volumes_of_nifti_files(tmp_path: Path) -> None:
    write_studies(tmp_path / "studies", "nifti", patients=40, size=12)
    with Server(tmp_path / "studies") as server:
        assert server.train("opacity", {"max_epochs": 10})["status"] == "DONE"
        assert server.infer("scan0003a")["version"] == "0001"
        _, task = server.call("POST", "/train/unlearn", {"images": ["scan0003a"], **QUICK})
        assert server.wait(task["id"])["status"] == "DONE"
        assert server.get(f"/unlearn/{task['unlearning']['id']}")["state"] == "served"
        assert server.get("/datastore/")["total"] == 78
        assert server.infer("scan0005a")["version"] == "0002"


def test_infer_goes_on_while_unlearning_runs(server: Server) -> None:
    _, task = server.call("POST", "/train/unlearn", {"patients": "PAT-0003", **QUICK})
    server.until(task["unlearning"]["id"], "unlearning", "audited", "served")
    begun = time.monotonic()
    assert server.infer("scan0005a")["version"] in ("0001", "0002")
    assert time.monotonic() - begun < 60
    server.wait(task["id"])


WRITING = """
from collections import deque
from monai_unlearn.label.routes import _clean

class Busy:
    @property
    def withdrawn(self):
        lines.append("one more line of the task")
        return {"PAT-0003"}

lines = deque(["PAT-0003 is read", "PAT-0005 is read"], maxlen=20)
print(_clean({"id": "t", "details": lines}, Busy())["details"])
"""


def test_progress_is_shown_while_the_task_writes() -> None:
    found = subprocess.run([PYTHON, "-c", WRITING], capture_output=True, text=True)
    assert "['… is read', 'PAT-0005 is read']" in found.stdout, found.stderr
