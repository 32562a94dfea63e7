"""What is left of the time before: listed completely, and without a name of a patient."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from site_of_runs import (
    MODELS,
    ORIGINAL,
    OURS,
    OWN,
    RETRAINED,
    everything,
    keep_model,
    make_site,
    optimizer_state,
    save_network,
    write_run,
)

from monai_unlearn import leftovers
from monai_unlearn.leftovers import find
from monai_unlearn.output import earlier_runs, replaced_folder, write_json

FORGET_SET = "weights that saw the forget set"


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which runs are started."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def _paths(entries: list[dict], ours: bool | None = None) -> list[str]:
    return [entry["path"] for entry in entries if ours is None or entry["ours"] is ours]


def _of(entries: list[dict], path: str | Path) -> dict[str, Any]:
    (entry,) = [entry for entry in entries if entry["path"] == str(path)]
    return entry


def test_all_that_runs_leave_is_listed_and_nothing_is_changed(site: Path) -> None:
    left = make_site(site)
    assert sorted(_paths(left)) == sorted(OURS)
    assert all(entry["ours"] for entry in left)
    before = everything(site)
    find(OWN, original=MODELS / ORIGINAL / "model.pt", models_dir=MODELS, shown=[Path()])
    assert everything(site) == before


def test_what_each_is_and_holds_is_said(site: Path) -> None:
    left = make_site(site)
    assert _of(left, OWN / "private")["what"] == "saliency mask and key of the hashes"
    assert _of(left, MODELS / ORIGINAL) == {
        "what": "original model",
        "path": f"runs/models/{ORIGINAL}",
        "ours": True,
        "holds": FORGET_SET,
    }
    assert all(isinstance(value, (str, bool)) and value != "" for entry in left for value in entry.values())


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ([], None),
        (["split_key"], "key of the hashes"),
        (["settings.json", "split_key", "saliency_mask.safetensors"], "saliency mask, key of the hashes and settings"),
        (["another"], "private folder"),
    ],
)
def test_a_private_folder_is_listed_by_what_is_in_it(files: list[str], what: str | None) -> None:
    (OWN / "private").mkdir(parents=True)
    for name in files:
        (OWN / "private" / name).write_text("x")
    found = [entry["what"] for entry in find(OWN)]
    assert len(found) == (what is not None)
    assert all(text.startswith(str(what)) for text in found)


def test_where_nothing_is_nothing_is_listed(site: Path) -> None:
    assert find(OWN) == []
    assert find(OWN, models_dir=MODELS, shadow=[MODELS / "x"], shown=[], caches=[Path("cache")]) == []
    assert everything(site) == {}


def test_retrained_models_never_saw_the_forget_set_and_others_are_counted(site: Path) -> None:
    make_site(site)
    arguments = {"original": MODELS / ORIGINAL / "model.pt", "models_dir": MODELS}
    keep_model(MODELS / ("0" * 16), "original", 7)
    keep_model(MODELS / ("1" * 16), "retrained", 8)
    others = _of(find(OWN, retrained=[MODELS / RETRAINED], **arguments), MODELS)
    assert others["what"] == "other kept models (2)"
    assert others["ours"] is False
    assert _of(find(OWN, **arguments), MODELS)["what"] == "other kept models (3)"


@pytest.mark.parametrize("broken", ["retrained", "changed", "no record", "another name"])
def test_an_original_is_ours_only_as_a_run_has_kept_it(broken: str) -> None:
    folder = keep_model(MODELS / ORIGINAL, "retrained" if broken == "retrained" else "original")
    original = folder / "model.pt"
    if broken == "changed":
        save_network(original, 99)
    elif broken == "no record":
        (folder / "training.json").unlink()
    elif broken == "another name":
        original = original.rename(folder / "best.pt")
    entry = _of(find(OWN, original=original), original)
    assert (entry["what"], entry["ours"]) == ("original checkpoint", False)
    assert entry["holds"] == f"{FORGET_SET}, without the state of an optimizer"


# --- Earlier runs, which are moved when a run takes its place ---


@pytest.mark.parametrize("earlier", [0, 1, 3])
@pytest.mark.parametrize("gap", [False, True])
def test_earlier_runs_are_listed_where_they_will_lie(earlier: int, gap: bool, site: Path) -> None:
    for number in range(earlier):
        with replaced_folder(OWN) as folder:
            (folder / "private").mkdir()
            (folder / "private" / "split_key").write_text(str(number))
            save_network(folder / "unlearned_model.pt", number)
            write_json({"schema_version": "1.2"}, folder / "report.json")
    if gap and earlier == 3:
        Path("runs/saliency.1").rename(site / "elsewhere")
    with replaced_folder(OWN) as folder:
        (folder / "private").mkdir()
        (folder / "private" / "split_key").write_text("new")
        expected = _paths(find(OWN, folder))
        write_json({"schema_version": "1.2"}, folder / "report.json")
    numbers = range(1, earlier + (not gap or earlier < 3))
    assert expected == [
        "runs/saliency/private",
        *(f"runs/saliency.{number}/{name}" for number in numbers for name in ("private", "unlearned_model.pt")),
    ]
    assert _paths(find(OWN)) == expected
    assert all(Path(path).exists() for path in expected)


@pytest.mark.parametrize("there", ["nothing", "an empty folder"])
def test_earlier_runs_stay_where_they_are_if_there_is_nothing_to_move_aside(there: str) -> None:
    write_run(OWN.with_name("saliency.1"), 0)
    if there == "an empty folder":
        OWN.mkdir()
    with replaced_folder(OWN) as folder:
        left = find(OWN, folder)
        write_json({"schema_version": "1.2"}, folder / "report.json")
    assert _paths(left) == ["runs/saliency.1/private", "runs/saliency.1/unlearned_model.pt"]
    assert _paths(find(OWN)) == _paths(left)


def test_other_folders_beside_a_run_are_no_earlier_runs() -> None:
    write_run(OWN, 0)
    for name in ("saliency.1", "saliency.old", "saliency.1.1", "saliency-1", "xsaliency.1"):
        write_run(OWN.with_name(name), 1)
    (OWN.with_name("saliency.2") / "private").mkdir(parents=True)
    (OWN.with_name("saliency.2") / "private" / "diary").write_text("somebody's")
    write_run(OWN.with_name("saliency.12"), 1)
    assert [now.name for now, _ in earlier_runs(OWN, replaced=False)] == ["saliency.1", "saliency.12"]
    assert {Path(path).parent.name for path in _paths(find(OWN))} == {"saliency", "saliency.1", "saliency.12"}


def test_a_model_that_was_unlearned_once_more_is_listed_once() -> None:
    """A second request begins where the first one ended, and takes its folder."""
    write_run(OWN, 0)
    original = OWN / "unlearned_model.pt"
    with replaced_folder(OWN) as folder:
        left = find(OWN, folder, original=original, shown=[OWN])
        write_json({"schema_version": "1.2"}, folder / "report.json")
    assert _paths(left) == ["runs/saliency.1/private", "runs/saliency.1/unlearned_model.pt"]
    assert _of(left, "runs/saliency.1/unlearned_model.pt")["holds"] == FORGET_SET


def test_what_killed_runs_have_not_finished_is_listed(site: Path) -> None:
    make_site(site)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead, other = f"part-{socket.gethostname()}-{process.pid}", "part-another-machine-7"
    names = {f"runs/.saliency.{other}": False, f"runs/models/.{ORIGINAL}.{dead}": True}
    for name in (*names, f"runs/.other.{dead}", f".saliency.{dead}"):
        (site / name / "private").mkdir(parents=True)
    writing = site / f"runs/.saliency.part-{socket.gethostname()}-{os.getpid()}"
    writing.mkdir()
    left = find(OWN, writing, models_dir=MODELS)
    found = {entry["path"]: entry["ours"] for entry in left if "unfinished" in entry["what"]}
    assert found == names


# --- Paths ---


def test_paths_are_told_as_given_so_that_a_report_names_no_home(site: Path) -> None:
    assert all(not os.path.isabs(path) for path in _paths(make_site(site)))


@pytest.mark.parametrize("kind", ["absolute", "up", "here"])
def test_they_are_absolute_where_the_runs_folder_does_not_tell_where_it_was_started(
    kind: str, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_site(site)
    output = {"absolute": str(site / OWN), "up": "../site/runs/saliency", "here": "."}[kind]
    start = site / OWN if kind == "here" else site
    monkeypatch.chdir(start)
    models = Path(os.path.relpath(site / MODELS, start))
    left = find(output, original=models / ORIGINAL / "model.pt", models_dir=models)
    wanted = {str(site / path) for path in OURS if "shadow" not in path}
    assert {path for path in _paths(left, ours=True)} == wanted


def test_the_key_beside_the_request_is_told_without_the_requests_name() -> None:
    (entry,) = find(OWN, key_beside_request=True)
    assert not entry["ours"]
    assert entry["path"].startswith("(")


@pytest.mark.parametrize("full", [True, False])
def test_a_cache_is_listed_as_long_as_something_is_in_it(full: bool) -> None:
    cache = Path("cache")
    cache.mkdir()
    if full:
        (cache / "ab-cd-ef.pt").write_text("x")
    assert _paths(find(OWN, caches=[cache])) == ["cache"] * full


# --- The user's folders ---


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ({"optimizer": {}}, "with"),
        ({"opt": optimizer_state()}, "with"),  # as MONAI's CheckpointSaver writes it, under any name
        ({"optimizer_states": [optimizer_state()]}, "with"),  # as Lightning does
        ({"all": {"of": optimizer_state()}}, "with"),
        ({"epoch": 3, "state": 1}, "without"),
        ({}, "without"),
    ],
)
def test_a_checkpoint_is_looked_into_for_the_state_of_an_optimizer(content: dict, answer: str) -> None:
    original = save_network(Path("theirs/model.pt"), **content)
    assert find(OWN, original=original)[0]["holds"] == f"{FORGET_SET}, {answer} the state of an optimizer"


@pytest.mark.parametrize("kind", ["old format", "code", "damaged", "text", "empty", "script", "missing", "link"])
def test_what_can_not_be_read_is_not_looked_into(kind: str) -> None:
    path = Path("theirs/model.pt")
    save_network(Path("theirs/good.pt"), opt=optimizer_state())
    if kind == "old format":
        torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    elif kind == "code":
        torch.save(torch.nn.Linear(2, 2), path)
    elif kind == "damaged":
        path.write_bytes(Path("theirs/good.pt").read_bytes()[:-400] + bytes(400))
    elif kind == "script":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    elif kind == "link":
        path.symlink_to("good.pt")
    elif kind != "missing":
        path.write_text("x" if kind == "text" else "")
    wanted = "a link, not followed" if kind == "link" else "not looked into"
    assert find(OWN, original=path)[0]["holds"] == f"{FORGET_SET}; {wanted}"


def test_weights_are_not_read_to_see_what_a_checkpoint_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may hold hundreds of large ones."""
    original = save_network(Path("theirs/model.pt"), opt=optimizer_state())
    load = torch.load
    options: list[dict] = []
    monkeypatch.setattr(torch, "load", lambda *a, **k: options.append(k) or load(*a, **k))
    find(OWN, original=original)
    assert [(given["mmap"], given["weights_only"]) for given in options] == [(True, True)]


def test_other_checkpoints_in_a_folder_that_was_shown_are_listed(site: Path) -> None:
    original = save_network(Path("theirs/model.pt"))
    endings = ("pt", "PTH", "ckpt", "safetensors", "tar", "bin", "ts", "onnx")
    wanted = [f"theirs/last.{ending}" for ending in endings]
    wanted += ["theirs/old/last.pt", "theirs/old/older/last.pt"]
    unwanted = ["theirs/old/older/oldest/last.pt", "theirs/notes.txt", "theirs/pt", "elsewhere/last.pt"]
    for name in (*wanted, *unwanted):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text("x")
    Path("elsewhere/below").mkdir()
    Path("elsewhere/below/last.pt").write_text("x")
    Path("theirs/link").symlink_to(site / "elsewhere")
    left = find(OWN, original=original, shown=[original.parent])
    assert sorted(_paths(left)) == sorted(["theirs/model.pt", *wanted])
    assert not any(entry["ours"] for entry in left)


def test_what_is_listed_already_is_not_listed_as_the_users(site: Path) -> None:
    """A checkpoint in the working directory shows all that is below, runs included."""
    save_network(site / "model.pt")
    Path("cache").mkdir()
    Path("cache/ab-cd-ef.pt").write_text("x")
    left = make_site(site, original=Path("model.pt"), shown=[Path()], caches=[Path("cache")])
    save_network(site / "runs/other/unlearned_model.pt")
    again = find(OWN, original=Path("model.pt"), models_dir=MODELS, shown=[Path()], caches=[Path("cache")])
    for entries, others in ((left, []), (again, ["runs/other/unlearned_model.pt"])):
        paths = _paths(entries)
        assert len(paths) == len(set(paths))
        assert [entry["path"] for entry in entries if entry["what"] == "possible checkpoint"] == others


def test_the_folder_of_a_kept_original_is_ours_and_no_folder_of_the_user(site: Path) -> None:
    left = make_site(site, shown=[MODELS / ORIGINAL])
    assert sorted(_paths(left)) == sorted(OURS)


@pytest.mark.parametrize(("number", "more"), [(5, 0), (6, 1), (9, 4)])
def test_of_many_the_first_are_listed_and_the_rest_counted(
    number: int, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "MOST_TOLD", 5)
    for i in range(number):
        Path("theirs").mkdir(exist_ok=True)
        Path(f"theirs/epoch-{i}.pt").write_text("x")
    left = find(OWN, shown=[Path("theirs")])
    assert _paths(left)[:5] == [f"theirs/epoch-{i}.pt" for i in range(5)]
    assert [entry["what"] for entry in left[5:]] == [f"… and {more} more possible checkpoints"] * bool(more)


def test_a_huge_folder_is_not_searched_to_its_end_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "MOST_SEEN", 20)
    Path("theirs").mkdir()
    for i in range(30):
        Path(f"theirs/{i}.png").write_text("x")
    assert [entry["what"] for entry in find(OWN, shown=[Path("theirs")])] == ["… and further files and folders"]


def test_a_folder_that_can_not_be_read_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("theirs").mkdir()

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(leftovers.os, "scandir", refuse)
    (entry,) = find(OWN, shown=[Path("theirs")])
    assert "not readable" in entry["holds"]


NAMES = ["Zq7-0003-Xw", "1.2.826.0.1", "archive/P12/scan Ü 4.nii.gz", "17"]


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("Zq7-0003-Xw.pt", False),
        ("zq7-0003-xw_fold1/model.pt", False),
        ("fold1/without-Zq7-0003-Xw-3.pt", False),
        ("1.2.826.0.1.pt", False),
        ("scan ü 4.nii.pt", False),
        ("epoch=17.ckpt", False),
        ("Zq7-0003-Xwy.pt", True),
        ("epoch=170.ckpt", True),
        ("best.pt", True),
    ],
)
def test_a_name_of_the_forget_set_is_not_told(file: str, shown: bool) -> None:
    path = Path("theirs") / file
    path.parent.mkdir(parents=True)
    path.write_text("x")
    left = find(OWN, shown=[Path("theirs")], hidden=NAMES)
    if shown:
        assert _paths(left) == [str(path)]
    else:
        (entry,) = left
        assert entry["path"] == "theirs"
        assert entry["what"].endswith("(1)")


@given(st.text("aB1-_. ", min_size=1, max_size=5), st.text("aB1-_. ", max_size=12))
def test_whole_words_are_found_as_a_search_by_hand_finds_them(name: str, text: str) -> None:
    words = leftovers._words([name])
    found = False
    for word in words:
        for start in range(len(text)):
            end = start + len(word)
            before, after = text[start - 1 : start] if start else "", text[end : end + 1]
            if text[start:end].casefold() == word and not before.isalnum() and not after.isalnum():
                found = True
    assert leftovers._has_one(text, words) == found
