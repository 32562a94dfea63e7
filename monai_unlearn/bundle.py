"""The running bundle: its settings checked, its components built anew as often as a run needs them."""

from __future__ import annotations

import copy
import difflib
import hashlib
import inspect
import json
import logging
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from types import FrameType
from typing import Any, cast

import torch
from monai.bundle import ComponentLocator, ConfigParser, ConfigWorkflow
from monai.utils import ensure_tuple

__all__ = [
    "Bundle",
    "bundle_path",
    "components",
    "device_of",
    "hint",
    "readable_errors",
    "running_workflow",
    "typed",
    "unwrapped",
]

# Keys that a bundle may have beside those of its file, given by MONAI's own command.
COMMON_KEYS = {"bundle_root", "workflow_type", "_meta_", "_requires_"}
# What does not change which model a recipe gives.
NOT_RECIPE = {
    *("data", "split", "forget", "bundle", "device", "seed", "train_seed", "cache", "cache_dir", "num_workers"),
    *("output_dir", "private_dir"),
}
POSITIVE = ("lr", "epochs", "batch_size", "train_lr", "train_epochs")


def bundle_path(name: str) -> Path:
    """Path of one of the package's bundle configs, from a wheel or from a clone.

    Args:
        name: ``"saliency"``, for instance.

    Raises:
        ValueError: if there is none of that name.
    """
    folder = _bundle_folder()
    names = sorted(file.stem for file in folder.glob("*.json") if file.stem != "metadata")
    if name not in names:
        raise ValueError(f"There is no bundle {name!r}.{hint(name, names)} There are: {', '.join(names)}.")
    return folder / f"{name}.json"


def _bundle_folder() -> Path:
    inside = Path(str(resources.files("monai_unlearn"))) / "bundles"
    return inside if inside.is_dir() else inside.parent.parent / "bundles"


def device_of(name: str | torch.device) -> torch.device:
    """The device of a name.

    Raises:
        ValueError: if there is no such device.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device should be cpu, or a GPU that is there (cuda:0), but got {name!r}.") from error
    return device


class Bundle:
    """What ``python -m monai.bundle run`` is running.

    MONAI resolves each component of a config once. A run trains the same recipe several times (the original model,
    the retrained ones), so it asks the bundle to build components anew, with other seeds but the same data.

    Args:
        parser: the workflow's parser, command-line overrides included.
        shipped: the config as the package's own files give it, without overrides.
        added: the top-level keys of the user's own files, with their values.
    """

    def __init__(self, parser: ConfigParser, shipped: dict, added: Mapping[str, Any] | None = None) -> None:
        self._parser = parser
        self._shipped = shipped
        self._added = {key: value for key, value in (added or {}).items() if key not in shipped}
        self._shared: dict[str, Any] = {}

    @classmethod
    def running(cls) -> Bundle:
        """The bundle that MONAI's ``ConfigWorkflow`` is running, with its settings checked and typed.

        Raises:
            RuntimeError: if none is running.
            ValueError: if a key is misspelt or a setting has the wrong type.
        """
        workflow, files = running_workflow()
        with readable_errors():
            bundle = cls._of(workflow.parser, files)
            bundle.check()
        return bundle

    @classmethod
    def from_files(cls, files: Sequence[str], **settings: Any) -> Bundle:
        """What ``monai.bundle run`` would make of config files and settings, checked, without running anything.

        Args:
            files: config files, the method's first.
            settings: what would be given on the command line.

        Raises:
            ValueError: if a key is misspelt or a setting has the wrong type.
        """
        _without_warnings_of_gpu_decoders()
        parser = ConfigParser()
        parser.read_config(list(files))
        parser.update(settings)
        bundle = cls._of(parser, files)
        bundle.check()
        return bundle

    @classmethod
    def _of(cls, parser: ConfigParser, files: Sequence[str] | None) -> Bundle:
        if files is None:  # a workflow made in Python: what it was given can't be told from what was changed
            return cls(parser, copy.deepcopy(cast(dict, parser.config)))
        if "bundle" not in ConfigParser.load_config_file(files[0]):
            raise ValueError(
                f"--config_file should name the method's bundle first, but {Path(files[0]).name} is a part that "
                "changes another. Turn the files round."
            )
        ours = _bundle_folder().resolve()
        own = [file for i, file in enumerate(files) if i == 0 or Path(file).resolve().parent == ours]
        added: dict[str, Any] = {}
        for file in (file for file in files if file not in own):
            for key, value in ConfigParser.load_config_file(file).items():
                top, *within = key.lstrip("+").replace("#", "::").split("::")
                added[top] = {} if within else value
        return cls(parser, ConfigParser.load_config_files(own), added)

    @property
    def config(self) -> dict:
        """The config with the command line's overrides, as read."""
        return cast(dict, self._parser.config)

    def check(self) -> None:
        """Check the names of all keys and arguments, and the types of the settings.

        Raises:
            ValueError: with the nearest valid key.
        """
        base = self._shipped
        text = json.dumps(self.config, default=str)
        for key in self.config:
            if key in base or key in COMMON_KEYS or (key in self._added and f"@{key}" in text):
                continue
            others = [name for name in (*base, *self._added) if name != key]
            known = ", ".join(name for name in self._settings() if name != key)
            raise ValueError(f"There is no setting {key!r}.{hint(key, others)} Settings: {known}.")
        for path, component in components(self.config):
            _check_arguments(path, component)
        for key in self._settings():
            self.config[key] = self.typed(key, self.config[key])

    def _settings(self) -> list[str]:
        """The top-level keys that hold a plain value: what a user sets on the command line."""
        return [
            key
            for key, value in {**self._shipped, **self._added}.items()
            if not isinstance(value, (dict, list)) and not _is_expression(value) and not key.startswith("_")
        ]

    def typed(self, key: str, value: Any) -> Any:
        """Another value for a setting, as the type that it has in the config.

        Raises:
            ValueError: if it is of another.
        """
        return typed(key, value, self._shipped.get(key, self._added.get(key)))

    def settings(self) -> dict[str, Any]:
        """The settings and their values, those of expressions too."""
        values = {key: self.config[key] for key in self._settings()}
        for key, value in values.items():
            if _is_expression(value):
                values[key] = self.typed(key, self.build(key))
        return values

    def share(self, **objects: Any) -> None:
        """Hand finished objects to every later build, in the place of the config's components of these names."""
        self._shared.update(objects)

    def build(self, *ids: str, **overrides: Any) -> Any:
        """Make components anew, together with all that they refer to.

        Args:
            ids: ids of components, such as ``"trainer"`` or ``"recipe::trainer"``, resolved together.
            overrides: top-level keys to be replaced, by values or finished objects.

        Returns:
            One component, or a tuple of as many as there are ids.

        Raises:
            KeyError: if the config has no such id.
            Exception: what the component itself raised, without MONAI's wrapping.
        """
        config = copy.deepcopy(self.config)
        parser = ConfigParser({**config, **self._shared, **overrides})
        # Where MONAI's classes are, which takes as long to find as many a component to make; it is the same for all.
        parser.locator = self._parser.locator
        try:
            built = tuple(parser.get_parsed_content(id) for id in ids)
        except Exception as error:
            raised = unwrapped(error)
            raise raised from raised.__cause__
        return built[0] if len(built) == 1 else built

    def recipe_hash(self, *parts: str, of: Sequence[str] = ("recipe",)) -> str:
        """Hash of everything in the config that the recipe's model depends on, and of further parts.

        Args:
            parts: what else it depends on: data, split and seed.
            of: the components that make the model, where these are not the recipe alone.
        """
        keys = set().union(*(self._references(key, NOT_RECIPE) for key in of))
        relevant = {key: self.config[key] for key in keys}
        content = json.dumps([relevant, parts], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def depends_on(self, key: str, other: str) -> bool:
        """Whether a component of the config refers to another, directly or through others."""
        return other in self._references(key)

    def _references(self, key: str, without: Collection[str] = ()) -> set[str]:
        """The top-level keys that one refers to, directly or through others, and itself."""
        found: set[str] = set()
        pending = [key]
        while pending:
            key = pending.pop()
            if key not in found and key not in without and key in self.config:
                found.add(key)
                pending += re.findall(r"@(\w+)", json.dumps(self.config[key], default=str))
        return found


def _without_warnings_of_gpu_decoders() -> None:
    """Each of MONAI's image loaders warns where a GPU decoder of DICOM is not installed, whatever it is to read."""
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader")


def running_workflow() -> tuple[ConfigWorkflow, Sequence[str] | None]:
    """The workflow that MONAI is running, and its config files where it was started with ``monai.bundle run``.

    A config has no way to reach the workflow that reads it but the call stack.

    Raises:
        RuntimeError: if none is running.
    """
    _without_warnings_of_gpu_decoders()
    workflow = None
    for frame in _frames():
        if workflow is None and isinstance(frame.f_locals.get("self"), ConfigWorkflow):
            workflow = frame.f_locals["self"]
        if workflow is not None and frame.f_locals.get("config_file"):
            return workflow, ensure_tuple(frame.f_locals["config_file"])
    if workflow is None:
        raise RuntimeError("No bundle is running. Start it with `python -m monai.bundle run`.")
    return workflow, None


@contextmanager
def readable_errors() -> Iterator[None]:
    """Under ``python -m monai.bundle``, end on what the user can mend with its message instead of a traceback.

    MONAI wraps every error of a config in others, so that the message that helps stands in the middle of sixty
    lines. In Python code, errors are raised as they are.
    """
    command = Path(sys.argv[0]).parts[-3:] == ("monai", "bundle", "__main__.py")
    if command:
        logging.getLogger("ignite").setLevel(logging.CRITICAL)  # it says each error once more
    try:
        yield
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        if not command or (type(error) is RuntimeError and not _of_this_package(error)):
            raise
        # What a process that loads images raised comes with its traceback, of which the last line is the message.
        text = str(error)
        if text.startswith("Caught ") and "\nOriginal Traceback" in text:
            text = text.strip().rpartition("\n")[2].partition(": ")[2]
        raise SystemExit(f"\nmonai_unlearn: {text}") from error


def _of_this_package(error: BaseException) -> bool:
    """Whether an error was raised here, with a message for users, and not by torch or MONAI."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and str(place.tb_frame.f_globals.get("__name__", "")).startswith("monai_unlearn")


def unwrapped(error: BaseException) -> BaseException:
    """What a component raised, out of the errors in which MONAI wraps it; its own cause stays with it."""
    while (
        type(error) is RuntimeError
        and str(error).startswith(("Failed to instantiate", "Failed to evaluate"))
        and error.__cause__ is not None
    ):
        error = error.__cause__
    return error


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def hint(key: str, known: Iterable[str]) -> str:
    """The nearest of the known names as the end of a message, or nothing."""
    nearest = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def _is_expression(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("$", "@", "%"))


def components(config: Any, path: str = "") -> Iterator[tuple[str, dict]]:
    """Every component of a config with its id."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield path, config
        items: Iterable = config.items()
    elif isinstance(config, list):
        items = enumerate(config)
    else:
        return
    for key, value in items:
        yield from components(value, f"{path}::{key}" if path else str(key))


def _check_arguments(path: str, component: dict) -> None:
    target = component["_target_"]
    if not isinstance(target, str) or _is_expression(target) or component.get("_disabled_"):
        return
    full = target
    if "." not in target:
        module = ComponentLocator().get_component_module_name(target)
        full = f"{module[0] if isinstance(module, list) else module}.{target}"  # of several MONAI takes the first too
    try:
        found = locate(full)
    except ErrorDuringImport as error:
        reason = f"{type(error.value).__name__}: {error.value}"
        raise ValueError(f"{path} ({target}): {Path(str(error.filename)).name} can't be imported: {reason}") from error
    if found is None:
        raise ValueError(
            f"{path} should name a class or function that is there, but got {target!r}. Check its spelling, and that "
            "its module lies in the folder in which you run, or is installed."
        )
    try:
        parameters = inspect.signature(found).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for key in component:
        if key not in parameters and not (key.startswith("_") and key.endswith("_")):
            raise ValueError(
                f"{path} ({target}) has no argument {key!r}.{hint(key, parameters)} Arguments: {', '.join(parameters)}."
            )


def typed(key: str, value: Any, shipped: Any) -> Any:
    """A setting from the command line as the type that it has in the config.

    Raises:
        ValueError: if it is of another.
    """
    if _is_expression(value):
        return value
    if isinstance(shipped, bool):
        words = {"true": True, "1": True, "false": False, "0": False}
        if str(value).lower() not in words:
            raise ValueError(f"{key} should be true or false, but got {value!r}.")
        return words[str(value).lower()]
    if isinstance(shipped, (int, float)):
        whole = isinstance(shipped, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ValueError(f"{key} should be a {'whole ' if whole else ''}number, but got {value!r}.")
        if key in POSITIVE and value <= 0:
            raise ValueError(f"{key} should be greater than 0, but got {value!r}.")
    if value is not None and key.endswith(("_file", "_dir", "_checkpoint", "_indices", "_patients")):
        return str(value)  # a file named 7 is not a number
    return value
