"""What a wheel has to hold and to ask for."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import sys
from pathlib import Path

import pytest

import monai_unlearn

ROOT = Path(__file__).parents[1]
# Import name → distribution, where they differ.
DISTRIBUTION = {"PIL": "pillow", "ignite": "pytorch-ignite", "sklearn": "scikit-learn", "yaml": "pyyaml"}

tomllib = pytest.importorskip("tomllib", reason="tomllib is new in Python 3.11")


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=~! ;]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


def test_the_wheel_holds_every_bundle_and_its_logging(pyproject: dict) -> None:
    included = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    there = {f"bundles/{file.name}" for file in (ROOT / "bundles").glob("*.json")} | {"bundles/logging.conf"}
    assert len(there) > 4
    assert included == {file: f"monai_unlearn/{file}" for file in there}


def test_no_file_in_the_repository_shadows_the_bundles_of_the_wheel() -> None:
    assert not (ROOT / "monai_unlearn" / "bundles").exists()


def test_one_version_stands_in_package_bundles_and_changelog() -> None:
    metadata = json.loads((ROOT / "bundles" / "metadata.json").read_text(encoding="utf-8"))
    assert metadata["version"] == monai_unlearn.__version__
    assert monai_unlearn.__version__ in metadata["changelog"]
    assert importlib.metadata.version("monai_unlearn") == monai_unlearn.__version__


def test_the_versions_in_the_metadata_are_the_constrained_ones() -> None:
    metadata = json.loads((ROOT / "bundles" / "metadata.json").read_text(encoding="utf-8"))
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split(";")[0].strip() for line in lines if "==" in line and not line.startswith("#")]
    constrained = dict(pin.split("==") for pin in pins)
    assert constrained["monai"] == metadata["monai_version"]
    assert constrained["torch"] == metadata["pytorch_version"]
    assert constrained["numpy"] == metadata["numpy_version"]
    for name, version in metadata["required_packages_version"].items():
        assert constrained[name] == version


def test_every_third_party_module_imported_is_a_declared_dependency(pyproject: dict) -> None:
    project = pyproject["project"]
    declared = _names(
        [
            *project["dependencies"],
            *(one for extra in ("tune", "label") for one in project["optional-dependencies"][extra]),
        ]
    )
    imported: dict[str, str] = {}
    for file in sorted((ROOT / "monai_unlearn").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file.name}: imports are absolute here"
                modules = [node.module or ""]
            else:
                continue
            imported |= {module.split(".")[0]: file.name for module in modules}
    third_party = {name: at for name, at in imported.items() if name not in sys.stdlib_module_names}
    assert {"torch", "monai", "ignite"} <= set(third_party)
    undeclared = {
        name: at
        for name, at in third_party.items()
        if name != "monai_unlearn" and DISTRIBUTION.get(name, name) not in declared
    }
    assert not undeclared


def test_nothing_imports_torchvision() -> None:
    for file in [*(ROOT / "monai_unlearn").rglob("*.py"), *(ROOT / "bundles").glob("*.json")]:
        assert "torchvision" not in file.read_text(encoding="utf-8"), file.name


def test_the_report_template_is_inside_the_package() -> None:
    templates = list((ROOT / "monai_unlearn" / "report" / "templates").glob("*.j2"))
    assert templates


def test_the_oldest_python_is_the_one_that_the_linter_holds(pyproject: dict) -> None:
    oldest = pyproject["project"]["requires-python"].removeprefix(">=")
    assert pyproject["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
