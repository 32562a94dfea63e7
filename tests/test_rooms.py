"""The rooms of the package: which part may know of which."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import monai_unlearn

ROOT = Path(monai_unlearn.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# What a room or a module of the top level may import of the package, besides itself.
SMALL = {"forget_set", "cost", "loss", "checkpoint", "output", "placement", "provenance"}
COMMANDS = {
    "workflow",
    "auditing",
    "run",
    "selection",
    "trials",
    "tuning",
    "training",
    "shadow",
    "relearn",
    "bundle",
    "foreign",
    "overlay",
    "study",
    "leftovers",
    "finalise",
}
ROOMS = {"data", "methods", "metrics", "handlers", "evaluation", "report"}
ALLOWED = {
    "data": SMALL,
    "methods": SMALL,
    "metrics": set(),
    "handlers": SMALL | {"data", "methods", "metrics"},
    "evaluation": SMALL | {"data", "methods", "metrics"},
    "report": {"metrics", "cost"},
    **{name: set() for name in SMALL},
    "leftovers": {"checkpoint", "output"},
    "finalise": {"leftovers", "checkpoint", "output"},
    "bundle": set(),
    "training": SMALL | ROOMS | {"bundle"},
    "shadow": SMALL | ROOMS | {"bundle", "training"},
    "relearn": SMALL | ROOMS | {"bundle", "training"},
    "run": SMALL | ROOMS | {"bundle", "training"},
    "selection": SMALL | ROOMS | {"bundle", "training", "run"},
    "auditing": SMALL | ROOMS | {"bundle", "training", "run", "shadow", "relearn", "leftovers"},
    "workflow": SMALL | ROOMS | {"bundle", "training", "run", "auditing", "leftovers"},
    "trials": set(),
    "tuning": SMALL | ROOMS | {"bundle", "training", "run", "selection", "trials", "workflow"},
    "foreign": SMALL | {"bundle", "methods"},
    "overlay": SMALL | ROOMS | COMMANDS,
    "study": SMALL | ROOMS | {"bundle", "training", "run", "auditing"},
    "label": SMALL | ROOMS | {"bundle", "training", "run", "workflow"},
    "label_app": {"label"},
    "__main__": COMMANDS | {"report"},
    "__init__": {"forget_set"},
}
# What MONAI Label sees of the package, which imports it.
MONAI_LABELS = ["monai_unlearn.label.app", "monai_unlearn.label.routes", "monai_unlearn.label.tasks"]
ENGINES = ("ignite", "monai.engines", "monai.handlers", "monai.bundle")


def _name(path: Path) -> str:
    """The room of a module, or the module itself where it stands in none."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also within functions and for annotations."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports should be absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _own(path: Path) -> set[str]:
    """The rooms and top-level modules of the package that a file imports, besides its own."""
    parts = [name.split(".") for name in _imports(path)]
    names = {part[1] for part in parts if part[0] == "monai_unlearn" and len(part) > 1}
    return {name for name in names if (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()} - {_name(path)}


def test_every_part_of_the_package_has_its_place() -> None:
    assert {_name(path) for path in MODULES} == set(ALLOWED)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    assert _own(path) <= ALLOWED[_name(path)]


def test_the_rooms_that_know_nothing_of_each_other() -> None:
    """Said once more without the table, so that a slip in it shows."""
    for one in ("data", "methods", "metrics"):
        for path in (ROOT / one).rglob("*.py"):
            assert not _own(path) & (ROOMS | COMMANDS)
    for path in MODULES:
        if _own(path) & COMMANDS:
            assert _name(path) in COMMANDS | {"__main__", "label"}


@pytest.mark.parametrize("room", ["metrics", "report", "data"])
def test_figures_report_and_data_know_no_engine(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for name in _imports(path):
            assert not any(name == engine or name.startswith(f"{engine}.") for engine in ENGINES), f"{path}: {name}"


def test_a_method_is_known_by_the_package_but_knows_no_data_set() -> None:
    for path in (ROOT / "methods").rglob("*.py"):
        assert not any(name.split(".")[0] in {"medmnist", "pandas", "matplotlib"} for name in _imports(path))


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_is_used_through_its_door(room: str) -> None:
    """Outside a room, names come from the room itself, not from a module within it."""
    for path in MODULES:
        if _name(path) != room:
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            sources = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
            sources += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
            assert not [source for source in sources if source.startswith(f"monai_unlearn.{room}.")]


def test_only_what_monai_label_sees_imports_it() -> None:
    for path in MODULES:
        name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        if name not in MONAI_LABELS:
            assert not any(one.split(".")[0] in ("monailabel", "fastapi") for one in _imports(path)), path


def test_nothing_of_ours_imports_torchvision() -> None:
    for path in MODULES:
        assert not any(name.split(".")[0] == "torchvision" for name in _imports(path)), path


def test_everything_imports_where_torchvision_is_not_there() -> None:
    """MONAI tries to import it by itself and does without; nothing else may try."""
    program = """
import importlib, pkgutil, sys, traceback

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            files = [frame.filename for frame in traceback.extract_stack() if "importlib" not in frame.filename]
            if not files[-2].replace("\\\\", "/").endswith("monai/utils/module.py"):
                print("imported by", files[-2])
            raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

sys.meta_path.insert(0, Absent())
import monai_unlearn
names = [module.name for module in pkgutil.walk_packages(monai_unlearn.__path__, "monai_unlearn.")]
names = [name for name in names if name not in sys.argv[1:]]
for name in names:
    importlib.import_module(name)
assert "torchvision" not in sys.modules
print(len(names), "modules")
"""
    left_out = [] if find_spec("monailabel") else MONAI_LABELS
    done = subprocess.run([sys.executable, "-c", program, *left_out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Besides the package itself, and the app's file, which stands in no package.
    assert done.stdout.split() == [str(len(MODULES) - 2 - len(left_out)), "modules"]
