"""``finalise`` removes what is listed and ours, and nothing else, whatever a report says."""

from __future__ import annotations

import datetime
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from site_of_runs import (
    MODELS,
    ORIGINAL,
    OURS,
    OWN,
    SHADOW,
    change_report,
    everything,
    keep_model,
    keep_shadow,
    make_site,
    read_report,
    save_network,
    write_run,
)

from monai_unlearn.finalise import finalise
from monai_unlearn.leftovers import find
from monai_unlearn.output import write_json

KEPT = MODELS / ORIGINAL
SHADOWS = MODELS / "shadow" / SHADOW


def _page(report: dict[str, Any]) -> str:
    return f"<p>{len(report['left'])} left, {report['finalised']}</p>"


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which runs were started."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


class _Finalised:
    """A call of finalise, with what it said."""

    def __init__(self, run: str | Path = OWN, render: Callable = _page, **options: Any) -> None:
        self.lines: list[str] = []
        self.done = finalise(run, render, say=self.lines.append, **options)
        self.text = "\n".join(self.lines)


def _entry(path: str | Path, ours: bool = True) -> dict[str, Any]:
    return {"what": "something", "path": str(path), "ours": ours, "holds": "something"}


def _changed(before: dict[str, bytes], root: Path) -> set[str]:
    """Paths that are gone, new or other than before."""
    after = everything(root)
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def _within(paths: set[str], folders: list[str]) -> bool:
    return all(any(path == folder or path.startswith(f"{folder}/") for folder in folders) for path in paths)


# --- What it does ---


def test_ours_is_removed_and_everything_else_stays(site: Path) -> None:
    save_network(site / "theirs/model.pt")
    make_site(site)
    before = everything(site)
    call = _Finalised()
    assert call.done
    assert not any((site / path).exists() for path in OURS)
    changed = _changed(before, site)
    assert _within(changed, [*OURS, "runs/saliency/report.json", "runs/saliency/report.html"])
    assert Path("runs/saliency/unlearned_model.pt").is_file()
    assert (MODELS / "fedcba9876543210" / "model.pt").is_file()


def test_the_report_is_written_anew_and_the_page_with_it(site: Path) -> None:
    make_site(site)
    old = read_report()
    os.chmod(OWN / "report.json", 0o640)
    _Finalised()
    new = read_report()
    assert new["left"] == []
    assert datetime.date.fromisoformat(new["finalised"]) <= datetime.date.today()
    assert {key: value for key, value in new.items() if key not in ("left", "finalised")} == {
        key: value for key, value in old.items() if key != "left"
    }
    assert (OWN / "report.html").read_text() == f"<p>0 left, {new['finalised']}</p>"
    assert (OWN / "report.json").stat().st_mode & 0o777 == 0o640
    assert not list(OWN.glob(".*"))


def test_each_is_said_with_its_size_before_it_goes(site: Path) -> None:
    make_site(site)
    call = _Finalised()
    for path in OURS:
        assert any(path in line for line in call.lines), path
    (line,) = [line for line in call.lines if "duplicates.hashes" in line]
    assert "(48 bytes)" in line
    (line,) = [line for line in call.lines if f"  {KEPT}:" in line]
    assert "Other runs may use it too" in line
    assert "Removed: " in call.text
    assert call.lines[-1] == "Nothing of ours is left."


def test_a_second_call_finds_nothing_and_changes_nothing(site: Path) -> None:
    make_site(site)
    _Finalised()
    change_report(finalised="2024-02-29")
    before = everything(site)
    call = _Finalised()
    assert call.done
    assert call.lines == ["Nothing of ours is left."]
    assert everything(site) == before


def test_a_dry_run_says_the_same_and_removes_nothing(site: Path) -> None:
    make_site(site)
    before = everything(site)
    dry = _Finalised(dry_run=True)
    assert everything(site) == before
    assert dry.done
    assert "Would be removed:" in dry.text
    assert "Nothing of ours is left" not in dry.text
    real = _Finalised()
    assert [line for line in dry.lines if line.startswith("  ")] == [
        line for line in real.lines if line.startswith("  ")
    ]


def test_what_is_the_users_is_named_and_stays_theirs_to_decide(site: Path) -> None:
    save_network(site / "theirs/model.pt")
    save_network(site / "theirs/epoch_1.pt", opt={})
    make_site(site, original=Path("theirs/model.pt"), shown=[Path("theirs")], key_beside_request=True)
    call = _Finalised()
    assert call.done
    assert Path("theirs/model.pt").is_file()
    assert {entry["path"] for entry in read_report()["left"] if "theirs" in entry["path"]} == {
        "theirs/model.pt",
        "theirs/epoch_1.pt",
    }
    assert read_report()["finalised"] is not None
    assert "you have to decide" in call.lines[-1]
    assert "  theirs/model.pt: original checkpoint (weights that saw the forget set" in call.text

    Path("theirs/model.pt").unlink()
    call = _Finalised()
    assert "theirs/model.pt: no longer there." in call.lines
    assert "theirs/model.pt" not in [entry["path"] for entry in read_report()["left"]]


@pytest.mark.parametrize("path", OURS)
def test_what_was_removed_by_hand_is_no_error(path: str, site: Path) -> None:
    make_site(site)
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
    call = _Finalised()
    assert call.done
    assert f"{path}: no longer there." in call.lines
    assert read_report()["left"] == []


@pytest.mark.parametrize("kind", ["relative", "absolute", "elsewhere", "link", "in it"])
def test_a_run_is_found_from_anywhere(kind: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_site(site)
    run: str | Path = {"relative": "runs/../runs/saliency/", "in it": "."}.get(kind, str(site / OWN))
    if kind == "elsewhere":
        monkeypatch.chdir("/")
    elif kind == "in it":
        monkeypatch.chdir(OWN)
    elif kind == "link":
        Path("short").symlink_to(OWN)
        run = "short"
    assert _Finalised(run).done
    assert not any((site / path).exists() for path in OURS)


def test_folders_may_lie_behind_a_link_that_the_user_made(site: Path) -> None:
    """As where results go to a larger disk; the links themselves stay."""
    disk = site.parent / "disk"
    disk.mkdir()
    Path("runs").symlink_to(disk)
    make_site(site)
    assert _Finalised().done
    assert not any((site / path).exists() for path in OURS)
    assert Path("runs").is_symlink()


def test_absolute_paths_are_followed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_site(site, str(site / OWN))
    monkeypatch.chdir("/")
    assert _Finalised(site / OWN).done
    assert not any((site / path).exists() for path in OURS)


def test_a_tree_that_was_moved_as_a_whole_is_followed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_site(site)
    moved = site.parent / "moved"
    monkeypatch.chdir("/")
    site.rename(moved)
    assert _Finalised(moved / OWN).done
    assert not any((moved / path).exists() for path in OURS)


def test_of_a_run_that_was_moved_alone_only_its_own_is_removed(site: Path) -> None:
    """Where it was started can't be told any more, and a folder of the same name elsewhere may be anybody's."""
    make_site(site)
    Path("archive").mkdir()
    shutil.move(OWN, "archive/kept")
    before = everything(site)
    call = _Finalised("archive/kept")
    assert not call.done
    assert _within(_changed(before, site), ["archive/kept"])
    assert not Path("archive/kept/private").exists()
    left = read_report(Path("archive/kept"))
    assert [entry["path"] for entry in left["left"]] == [path for path in OURS if path != "runs/saliency/private"]
    assert left["finalised"] is None
    assert "can't be told where this is" in call.text


def test_a_run_that_was_moved_aside_takes_its_own_and_not_the_latest_ones(site: Path) -> None:
    make_site(site)
    Path("runs/saliency.1").rename("runs/saliency.2")
    OWN.rename("runs/saliency.1")
    write_run(OWN, 5)
    before = everything(site)
    call = _Finalised("runs/saliency.1")
    assert not call.done
    gone = ["runs/saliency.1", *(path for path in OURS if path.startswith("runs/models"))]
    assert _within(_changed(before, site), gone)
    assert not Path("runs/saliency.1/private").exists()
    assert Path("runs/saliency.1/unlearned_model.pt").is_file()
    assert (OWN / "private" / "split_key").is_file()
    assert "Finalise runs/saliency" in call.text


def test_a_hard_link_is_told_since_the_content_stays_under_it(site: Path) -> None:
    make_site(site)
    os.link(KEPT / "model.pt", site / "copy.pt")
    call = _Finalised()
    assert [line for line in call.lines if "hard link" in line] == [line for line in call.lines if f"  {KEPT}:" in line]
    assert Path("copy.pt").is_file()


# --- What it refuses ---


def _foreign_file(folder: str) -> Callable[[Path], str]:
    def make(site: Path) -> str:
        (site / folder / "thesis.docx").write_text("years of work")
        return folder

    return make


def _foreign_folder(folder: str) -> Callable[[Path], str]:
    def make(site: Path) -> str:
        (site / folder / "data").mkdir()
        return folder

    return make


def _link_inside(folder: str, name: str) -> Callable[[Path], str]:
    def make(site: Path) -> str:
        (site / "precious").write_text("precious")
        (site / folder / name).unlink()
        (site / folder / name).symlink_to(site / "precious")
        return folder

    return make


def _link_instead(path: str) -> Callable[[Path], str]:
    def make(site: Path) -> str:
        (site / path).rename(site / "moved away")
        (site / path).symlink_to(site / "moved away")
        return path

    return make


def _other_content(path: str, folder: str | None = None) -> Callable[[Path], str]:
    def make(site: Path) -> str:
        (site / path).write_bytes(b"another" + (site / path).read_bytes())
        return folder or path

    return make


def _record(folder: str, name: str, **changes: Any) -> Callable[[Path], str]:
    def make(site: Path) -> str:
        file = site / folder / name
        write_json({**json.loads(file.read_text()), **changes}, file)
        return folder

    return make


REFUSED = {
    "a file in private": _foreign_file("runs/saliency/private"),
    "a folder in private": _foreign_folder("runs/saliency/private"),
    "a link in private": _link_inside("runs/saliency/private", "split_key"),
    "private is a link": _link_instead("runs/saliency/private"),
    "a file in an earlier private": _foreign_file("runs/saliency.1/private"),
    "an earlier private is a link": _link_instead("runs/saliency.1/private"),
    "another earlier model": _other_content("runs/saliency.1/unlearned_model.pt"),
    "an earlier model is a link": _link_instead("runs/saliency.1/unlearned_model.pt"),
    "a file beside the original": _foreign_file(str(KEPT)),
    "a folder beside the original": _foreign_folder(str(KEPT)),
    "the original is a link": _link_inside(str(KEPT), "model.pt"),
    "its folder is a link": _link_instead(str(KEPT)),
    "another original": _other_content(f"{KEPT}/model.pt", str(KEPT)),
    "a retrained model": _record(str(KEPT), "training.json", what="retrained"),
    "an original with another hash": _record(str(KEPT), "training.json", sha256="0" * 64),
    "a file among the shadows": _foreign_file(str(SHADOWS)),
    "a folder among the shadows": _foreign_folder(str(SHADOWS)),
    "a file in a shadow": lambda site: _foreign_file(f"{SHADOWS}/shadow-001")(site) and str(SHADOWS),
    "a link in a shadow": lambda site: _link_inside(f"{SHADOWS}/shadow-001", "scores.npz")(site) and str(SHADOWS),
    "other scores": _other_content(f"{SHADOWS}/shadow-001/scores.npz", str(SHADOWS)),
    "a shadow is a link": lambda site: _link_instead(f"{SHADOWS}/shadow-001")(site) and str(SHADOWS),
    "another search": _other_content("runs/models/duplicates.hashes"),
    "the search is a link": _link_instead("runs/models/duplicates.hashes"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_is_not_wholly_ours_stays_and_the_rest_goes(name: str, dry_run: bool, site: Path) -> None:
    make_site(site)
    path = REFUSED[name](site)
    before = everything(site)
    call = _Finalised(dry_run=dry_run)
    assert not call.done
    assert any(line.startswith(f"{path} stays: ") for line in call.lines)
    assert "thesis" not in call.text  # it may be named after a patient
    others = [other for other in OURS if other != path]
    changed = _changed(before, site)
    if dry_run:
        assert not changed
    else:
        assert _within(changed, [*others, "runs/saliency/report.json", "runs/saliency/report.html"])
        assert not any((site / other).exists() for other in others)
        assert [entry["path"] for entry in read_report()["left"]] == [path]
        assert read_report()["finalised"] is None


def test_once_the_reason_is_gone_the_rest_is_removed(site: Path) -> None:
    make_site(site)
    _foreign_file("runs/saliency/private")(site)
    _Finalised()
    (OWN / "private" / "thesis.docx").rename("thesis.docx")
    assert _Finalised().done
    assert not (OWN / "private").exists()
    assert read_report()["finalised"] is not None


# --- Reports that were tampered with, or copied ---


def _their_site(root: Path) -> None:
    """Another project beside, with runs of its own."""
    root.mkdir()
    write_run(root / OWN, 11)
    keep_model(root / MODELS / ("a" * 16), "original", 12)
    keep_shadow(root / MODELS / "shadow" / ("b" * 16) / "shadow-000")
    (root / MODELS / "duplicates.hashes").write_bytes((Path(MODELS) / "duplicates.hashes").read_bytes())
    for name in ("private", "documents", "0123456789abcdef", "empty"):
        (root / name).mkdir()
    (root / "private" / "split_key").write_text("a key of theirs")
    (root / "documents" / "thesis.docx").write_text("years of work")


TAMPERED = [
    "../theirs",
    "../theirs/private",
    "../theirs/documents",
    "../theirs/documents/thesis.docx",
    "../theirs/empty",
    "../theirs/runs/saliency/private",
    "../theirs/runs/saliency/unlearned_model.pt",
    "../theirs/runs/saliency/report.json",
    f"../theirs/runs/models/{'a' * 16}",
    f"../theirs/runs/models/{'a' * 16}/model.pt",
    f"../theirs/runs/models/shadow/{'b' * 16}",
    "../theirs/runs/models/duplicates.hashes",
    "../theirs/runs/models",
    "runs/saliency/../../../theirs/private",
    "runs/saliency/unlearned_model.pt",
    "runs/saliency/report.json",
    "runs/saliency",
    "runs/saliency.1",
    "runs/saliency.1/report.json",
    "runs/saliency.1/private/..",
    "runs/other/private",
    "runs/saliency.x/private",
    "runs/saliency.7/private",
    f"runs/models/{'f' * 16}",
    "runs/models/fedcba9876543210",
    f"runs/models/{ORIGINAL}/model.pt",
    "runs/models/shadow",
    "runs/models",
    "runs",
    "link/private",
    "private",
    ".",
    "..",
    "/",
    "runs/saliency/private/split_key",
    "runs/saliency/private/.",
]


@pytest.mark.parametrize("path", TAMPERED)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_tampered_list_makes_nothing_else_go(path: str, absolute: bool, site: Path) -> None:
    make_site(site)
    _their_site(site.parent / "theirs")
    write_run(Path("runs/other"), 6)
    write_run(Path("runs/saliency.x"), 6)
    (Path("runs/saliency.7") / "private").mkdir(parents=True)  # no run
    keep_model(MODELS / ("f" * 16), "original", 7)  # of another request
    Path("link").symlink_to(site.parent / "theirs")
    Path("private").mkdir()
    change_report(left=[_entry(os.path.join(site, path) if absolute else path)])
    before = everything(site.parent)
    call = _Finalised()
    allowed = ["site/runs/saliency/report.json", "site/runs/saliency/report.html"]
    if os.path.normpath(path) == "runs/saliency/private":
        allowed.append("site/runs/saliency/private")
    else:
        assert not call.done
    assert _within(_changed(before, site.parent), allowed)


@pytest.mark.parametrize("changed", ["output_dir", "models_dir"])
def test_settings_that_were_tampered_with_take_no_file_of_another_kind(changed: str, site: Path) -> None:
    make_site(site)
    _their_site(site.parent / "theirs")
    theirs = site.parent / "theirs"
    settings = {"output_dir": str(OWN), "models_dir": str(MODELS), changed: str(theirs)}
    left = [_entry(theirs / name) for name in ("private", "documents", "0123456789abcdef", "empty", "runs")]
    change_report(settings=settings, left=left)
    before = everything(theirs)
    _Finalised()
    # An empty folder that is named like a kept model is one whose removal was killed.
    assert _within(_changed(before, theirs), ["0123456789abcdef"])


def test_a_copied_report_takes_only_what_is_beside_its_copy(site: Path) -> None:
    make_site(site)
    copy = site.parent / "copy"
    write_run(copy / OWN, 9)
    shutil.copy(OWN / "report.json", copy / OWN / "report.json")
    before = everything(site)
    _Finalised(copy / OWN)
    assert everything(site) == before
    assert not (copy / OWN / "private").exists()


@pytest.mark.parametrize("owned", [True, False])
def test_what_a_killed_run_left_goes_if_it_is_dead_and_only_ours(owned: bool, site: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead = MODELS / f".{ORIGINAL}.part-{socket.gethostname()}-{process.pid}"
    alive = MODELS / f".{ORIGINAL}.part-{socket.gethostname()}-{os.getppid()}"
    for folder in (dead, alive):
        (folder / "private").mkdir(parents=True)
        (folder / "private" / "saliency_mask.safetensors").write_text("mask")
        (folder / "model.pt.part123").write_text("half")
    if not owned:
        (dead / "thesis.docx").write_text("years of work")
    make_site(site)
    change_report(left=[_entry(dead), _entry(alive)])
    _Finalised()
    assert dead.exists() is not owned
    assert (alive / "model.pt.part123").is_file()


def test_a_shadow_that_was_killed_in_training_goes_with_the_others(site: Path) -> None:
    make_site(site)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    unfinished = SHADOWS / f".shadow-002.part-{socket.gethostname()}-{process.pid}"
    (unfinished / "private").mkdir(parents=True)
    (unfinished / "private" / "saliency_mask.safetensors").write_text("mask")
    change_report(left=find(OWN, models_dir=MODELS, shadow=[SHADOWS]))
    assert _Finalised().done
    assert not SHADOWS.exists()


# --- Kills and errors in the middle ---


def _steps(site: Path) -> int:
    """How many files and folders go."""
    return sum(len([Path(path), *Path(path).rglob("*")]) for path in OURS)


def _die_at(number: int) -> None:
    """Have this process end without another word at its so many-th removal or renaming."""
    done = 0

    def wrap(real: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            if done == number:
                os._exit(9)
            done += 1
            return real(*arguments, **options)

        return call

    for name in ("unlink", "rmdir", "replace"):
        setattr(os, name, wrap(getattr(os, name)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_kill_anywhere_the_next_call_ends_the_work(site: Path) -> None:
    make_site(site)
    steps = _steps(site)
    shutil.copytree(site, site.parent / "whole")
    for number in range(steps + 2):
        root = site.parent / f"killed-{number}"
        shutil.copytree(site.parent / "whole", root)
        child = os.fork()
        if child == 0:
            _die_at(number)
            finalise(root / OWN, _page, say=lambda _: None)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, number
        killed = read_report(root / OWN)
        assert killed["left"], number  # the old one, whole, until all is done
        call = _Finalised(root / OWN)
        assert call.done, (number, call.text)
        assert not any((root / path).exists() for path in OURS)
        assert read_report(root / OWN)["left"] == []
        assert (root / OWN / "report.html").read_text() == _page(read_report(root / OWN))
        assert not list((root / OWN).glob(".*")), number
        shutil.rmtree(root)


def test_what_can_not_be_removed_stays_on_the_list_and_the_rest_goes(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_site(site)
    real = os.unlink

    def unlink(path: Path) -> None:
        if path.name == "model.pt":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        real(path)

    monkeypatch.setattr(os, "unlink", unlink)
    call = _Finalised()
    assert not call.done
    assert f"{KEPT} stays: it could not be removed (Permission denied)." in call.lines
    assert [entry["path"] for entry in read_report()["left"]] == [str(KEPT)]
    assert [path for path in OURS if Path(path).exists()] == [str(KEPT)]
    monkeypatch.undo()
    monkeypatch.chdir(site)
    assert _Finalised().done
    assert not KEPT.exists()


def test_where_the_report_can_not_be_written_nothing_is_removed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_site(site)
    before = everything(site)

    def refuse(**_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("monai_unlearn.finalise.tempfile.mkstemp", refuse)
    with pytest.raises(PermissionError, match=r"Read-only file system.*Nothing was removed"):
        _Finalised()
    assert everything(site) == before


def test_an_archived_run_of_which_nothing_is_left_need_not_be_written(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_site(site)
    _Finalised()
    monkeypatch.setattr("monai_unlearn.finalise.tempfile.mkstemp", lambda **_: pytest.fail("written"))
    assert _Finalised().done


def test_what_goes_wrong_with_the_page_leaves_the_old_report_for_the_next_call(site: Path) -> None:
    make_site(site)

    def fail(_: dict) -> str:
        raise KeyError("template")

    with pytest.raises(KeyError):
        _Finalised(render=fail)
    assert len(read_report()["left"]) == len(OURS)
    assert not list(OWN.glob(".*"))
    assert _Finalised().done
    assert read_report()["left"] == []


# --- What is no run, or an older one ---


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "foreign", "damaged", "list", "link to nothing"])
def test_what_is_no_run_is_refused(kind: str, site: Path) -> None:
    run = Path("mine")
    if kind == "file":
        run.write_text("x")
    elif kind == "link to nothing":
        run.symlink_to("nowhere")
    elif kind != "missing":
        (run / "private").mkdir(parents=True)
        (run / "private" / "split_key").write_text("x")
        content = {"foreign": "{}", "damaged": "{", "list": '["schema_version"]'}.get(kind)
        if content is not None:
            (run / "report.json").write_text(content)
    before = everything(site)
    with pytest.raises(ValueError, match=r"RUN should be the folder of a run.*--output_dir"):
        _Finalised(run)
    assert everything(site) == before


def test_a_report_of_an_earlier_version_lists_nothing_and_that_is_an_error(site: Path) -> None:
    write_run(OWN, 0, settings={"output_dir": str(OWN)})
    change_report(schema_version="1.1")
    before = everything(site)
    with pytest.raises(ValueError, match=r"earlier version \(1\.1\)"):
        _Finalised()
    assert everything(site) == before


@pytest.mark.parametrize(
    "left",
    [
        {},
        "runs",
        [1],
        [None],
        [{}],
        [{"what": "x", "path": "runs/saliency/private", "ours": True}],
        [_entry("runs/saliency/private") | {"path": 3}],
        [_entry("runs/saliency/private") | {"ours": 1}],
        [_entry("")],
        [_entry("a\0b")],
    ],
)
def test_a_damaged_list_is_refused_as_a_whole(left: Any, site: Path) -> None:
    make_site(site)
    change_report(left=left if not isinstance(left, list) else [_entry("runs/saliency.1/private"), *left])
    before = everything(site)
    with pytest.raises(ValueError, match="damaged"):
        _Finalised()
    assert everything(site) == before


@pytest.mark.parametrize("settings", [None, [], {}, {"output_dir": 3}, {"output_dir": "\0"}, {"output_dir": ".."}])
@pytest.mark.parametrize("provenance", [None, [], {"hashes": None}])
def test_a_report_without_settings_or_hashes_takes_nothing_by_guessing(
    settings: Any, provenance: Any, site: Path
) -> None:
    make_site(site)
    change_report(settings=settings, provenance=provenance)
    before = everything(site)
    call = _Finalised()
    assert not call.done
    assert _within(_changed(before, site), ["runs/saliency/report.json", "runs/saliency/report.html"])
