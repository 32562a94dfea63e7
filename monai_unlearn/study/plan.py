"""What a study runs: settings checked, forget sets and runs listed, before anything is trained."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any

from monai.bundle import ConfigParser

from monai_unlearn.bundle import Bundle, bundle_path, components, hint
from monai_unlearn.checkpoint import file_hash
from monai_unlearn.data import ImageData
from monai_unlearn.study.requests import KINDS, SINGLE, WITHOUT_FRACTION, pooled, requests_of
from monai_unlearn.study.table import key_of

__all__ = ["NOTHING", "Group", "Plan", "PlannedRun", "make_plan"]

logger = logging.getLogger("monai_unlearn")

NOTHING = "nothing"  # the untouched original, as if it were a method
# What the study gives each run itself, and where a user says it.
OWN = {
    **{"seed": "--seeds", "reference_models": "--reference_models", "models_dir": "--models_dir"},
    **{"output_dir": "--output_dir", "forget_fraction": "--fractions", "forget_request": "--kinds"},
    **{"forget_indices": "--kinds", "forget_patients": "--kinds", "reference": "--reference_models"},
    "reference_seed": "--seeds",
}
# Options that say where and how fast, but not what.
WITHOUT_EFFECT = ("device", "num_workers", "cache", "cache_dir", "dataset_dir", "dataset_file", "labels_file")
PATHS = ("_file", "_dir", "_checkpoint")
# The retrained models' seeds lie apart from those of the originals, and those of two runs apart from each other, so
# that no two models that a run compares are the same, and runs of two seeds share none.
FIRST_REFERENCE, STRIDE = 10_000, 100


@dataclass(frozen=True)
class PlannedRun:
    """One run.

    Args:
        key: its name, the same whenever the same is asked for.
        method: name of the method.
        files: config files, the method's first.
        tuned: whether its settings are searched for.
        settings: settings of the run, beside those that the study gives each run.
        options: of these, what tells it from others.
        request: number of the forget set within its group.
    """

    key: str
    method: str
    files: tuple[str, ...]
    tuned: bool
    settings: Mapping[str, Any]
    options: Mapping[str, Any]
    request: int | None = None


@dataclass(frozen=True)
class Group:
    """Runs that share their original and retrained models.

    Args:
        kind: kind of forget set.
        fraction: its size, None where the kind has none.
        seed: seed of the forget set, the original and unlearning.
        requests: files that say who is forgotten, one a forget set.
        pooled: the file that says whom the retrained models never saw.
        cells: the runs, those on the untouched original first.
    """

    kind: str
    fraction: float | None
    seed: int
    requests: tuple[str, ...]
    pooled: str
    cells: tuple[PlannedRun, ...]

    def __str__(self) -> str:
        size = "" if self.fraction is None else f" {100 * self.fraction:g} %"
        return f"{self.kind}{size}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A study.

    Args:
        groups: what is run.
        base: config files of the data and the recipe.
        base_settings: settings of the data and the recipe.
        settings: settings of the study.
        data_name: what the table calls the data.
    """

    groups: tuple[Group, ...]
    base: tuple[str, ...]
    base_settings: Mapping[str, Any]
    settings: Mapping[str, Any]
    data_name: str

    def first_reference(self, seed: int) -> int:
        """Seed of the first retrained model of a group."""
        return FIRST_REFERENCE + STRIDE * seed


@dataclass(frozen=True)
class _Method:
    """A method and whether it is tuned, with the options that its configs take.

    Args:
        name: its name.
        own: the config files that make it, a whole one first; none for the untouched original.
        parts: those that are added to every method.
    """

    name: str
    own: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    tuned: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> tuple[str, ...]:
        """All config files of a run; none for the untouched original."""
        if not self.own:
            return ()
        return (*self.own, *self.parts, *((str(bundle_path("tune")),) if self.tuned else ()))


def make_plan(config: Mapping[str, Any], private: Path) -> Plan:
    """Check all settings, and list what is to be run.

    Args:
        config: the study's settings.
        private: folder of the request files, which are written here once all settings are right.

    Raises:
        ValueError: if a setting is none that the methods or the data can take.
    """
    settings = _checked(config)
    base, *methods = _methods(settings)
    data: ImageData = Bundle.from_files(base.files, **base.settings).build("data")
    digest = data.digest()
    parts = [_content(part) for part in base.parts]
    # What the untouched original depends on: not how others unlearn from it.
    known = _keys((str(bundle_path("train")), *base.parts))
    plain = {key: value for key, value in settings["options"].items() if _top(key) in known}
    arms = (_Method(NOTHING, options=_told(plain)), *methods)
    # What stands for a method in a key; reads its files, so once for all forget sets.
    stands = [" + ".join(map(_content, method.own)) or method.name for method in arms]
    requests: dict[Path, list[dict]] = {}
    groups = []
    for seed in settings["seeds"]:
        for kind in settings["kinds"]:
            for fraction in (None,) if kind in WITHOUT_FRACTION else settings["fractions"]:
                size = "" if fraction is None else f"-{fraction:g}"
                folder = private / f"{kind}{size}-{seed}-{digest[:8]}"
                requests[folder] = requests_of(data, kind, fraction, seed, settings["patients"])
                several = kind == SINGLE
                asked = {
                    **{"data": digest, "kind": kind, "fraction": fraction, "seed": seed},
                    "patients": len(requests[folder]) if several else None,
                    **{"reference_models": settings["reference_models"], "parts": parts},
                }
                cells = [
                    PlannedRun(
                        key=key_of(
                            **asked,
                            method=stand,
                            tuned=method.tuned,
                            options=method.options,
                            request=number,
                        ),
                        method=method.name,
                        files=method.files,
                        tuned=method.tuned,
                        settings=method.settings,
                        options=method.options,
                        request=number,
                    )
                    for method, stand in zip(arms, stands)
                    for number in (range(len(requests[folder])) if several else (None,))
                ]
                files = [str(folder / f"{number}.json") for number in range(len(requests[folder]))]
                together = str(folder / "all.json") if several else files[0]
                groups.append(Group(kind, fraction, seed, tuple(files), together, tuple(cells)))
    for folder, contents in requests.items():
        folder.mkdir(parents=True, exist_ok=True)
        named = {str(number): content for number, content in enumerate(contents)}
        if len(contents) > 1:
            named["all"] = pooled(contents)
        for name, content in named.items():
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return Plan(tuple(groups), base.files, base.settings, settings, settings["data_name"] or data.name)


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, single values as lists of one."""
    settings = dict(config)
    for name in ("methods", "parts", "kinds", "fractions", "seeds", "tuned"):
        value = settings[name]
        settings[name] = list(value) if isinstance(value, (list, tuple)) else [value]
        if name == "tuned":  # on a command line true and false, as JSON has them, are words
            words = {"true": True, "false": False}
            settings[name] = [words.get(entry, entry) if isinstance(entry, str) else entry for entry in settings[name]]
        if len(set(map(str, settings[name]))) < len(settings[name]):
            raise ValueError(f"{name} should name each once, but got {value!r}. Leave out what repeats.")
        if not settings[name] and name != "parts":
            raise ValueError(f"{name} should have at least one entry, but is empty. There is nothing to run.")
    rules = {
        "fractions": (lambda v: _number(v, (int, float)) and 0 < v < 1, "numbers between 0 and 1 (both excluded)"),
        "seeds": (lambda v: _number(v, int) and v >= 0, "whole numbers of at least 0"),
        "tuned": (lambda v: isinstance(v, bool), "true, false or both"),
        "kinds": (lambda v: v in KINDS, f"some of {', '.join(KINDS)}"),
    }
    for name, (right, rule) in rules.items():
        for value in settings[name]:
            if not right(value):
                known = KINDS if name == "kinds" else ()
                raise ValueError(f"{name} should be {rule}, but got {value!r}.{hint(str(value), known)}")
    for name, least in (("reference_models", 2), ("patients", 2), ("workers", 1)):
        value = settings[name]
        if (value is not None or name != "workers") and (not _number(value, int) or value < least):
            raise ValueError(f"{name} should be a whole number of at least {least}, but got {value!r}.")
    if settings["reference_models"] > STRIDE:
        raise ValueError(f"reference_models should be at most {STRIDE}, but got {settings['reference_models']}.")
    if not isinstance(settings["options"], Mapping):
        raise ValueError(f"options should be a dict of settings and values, but got {settings['options']!r}.")
    return settings


def _number(value: Any, types: Any) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _methods(settings: Mapping[str, Any]) -> list[_Method]:
    """The methods, the plain ones first, with the options that each of them takes."""
    parts = tuple(_config(part, "parts") for part in settings["parts"])
    for name, part in zip(settings["parts"], parts):
        if "bundle" in ConfigParser.load_config_file(part):
            raise ValueError(
                f"parts should be configs that are added to each method, but {str(name)!r} stands by itself. Name "
                "methods with --methods."
            )
    plain = [_method(entry, parts) for entry in settings["methods"]]
    names = [method.name for method in plain]
    for method in plain:
        name, ours = method.name, _shipped(method.own[-1]) and len(method.own) == 1
        if name == NOTHING or names.count(name) > 1 or (not ours and _is_shipped_name(name)):
            raise ValueError(f"methods should have names of their own, but {name!r} is taken. Rename the config file.")
    tried = []
    if True in settings["tuned"]:
        for method in plain:
            if "search_space" in _keys(method.files):
                tried.append(replace(method, tuned=True))
            else:
                logger.info("%s has no search_space, so it is not tuned.", method.name)
    wanted = [*(plain if False in settings["tuned"] else []), *tried]
    if not wanted:
        raise ValueError("tuned should leave a run to be made, but no method has a search_space. Add false to --tuned.")
    options: Mapping[str, Any] = settings["options"]
    known = {method.files: _keys(method.files) for method in (*plain, *wanted)}
    everything = set().union(*known.values())
    for key in options:
        if _top(key) in OWN:
            raise ValueError(f"options should not hold {key!r}, which the study sets. Use {OWN[_top(key)]}.")
        if _top(key) not in everything:
            raise ValueError(f"options should be the methods' settings, but has {key!r}.{hint(key, everything)}")
    complete = []
    for method in (plain[0], *wanted):  # the first one gives data and recipe
        taken = {key: value for key, value in options.items() if _top(key) in known[method.files]}
        bundle = Bundle.from_files(method.files, **taken)
        complete.append(replace(method, settings=taken, options=_told(taken)))
        recipe = bundle.recipe_hash()
        if method is plain[0]:
            first = recipe
        elif recipe != first:
            raise ValueError(
                f"methods should share the recipe of original and retrained models, but {method.name} has another than "
                f"{plain[0].name}. Study them one by one."
            )
    return complete


def _method(entry: Any, parts: tuple[str, ...]) -> _Method:
    """A method by its config, or by a whole config and what is changed in it; it is called as the last one is."""
    names = [str(name) for name in entry] if isinstance(entry, (list, tuple)) and entry else [str(entry)]
    own = tuple(_config(name, "methods") for name in names)
    name = Path(names[-1]).stem
    whole = ConfigParser.load_config_file(own[0])
    if "unlearn" not in whole or "methods" not in whole or "bundle" not in whole:
        raise ValueError(
            f"methods should be configs with a method, but {Path(names[0]).stem!r} is none. Name what is added to each "
            "method with --parts, and what makes a method of another one behind that: ['finetune','mine.json']."
        )
    return _Method(name, own, parts)


def _config(name: str, setting: str) -> str:
    """Path of a shipped config, or of one's own."""
    path = Path(name)
    if path.suffix in (".json", ".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"{setting} should name configs that are there, but got {name!r}. Check the path.")
        return os.path.abspath(path)
    try:
        return str(bundle_path(name))
    except ValueError as error:
        raise ValueError(f"{setting} should name shipped configs, or files of your own (x.json). {error}") from None


def _content(file: str) -> str:
    """What stands for a config in a key: the name of a shipped one; of another name and hash, and those of its code."""
    path = Path(file)
    sources = sorted({str(component["_target_"]) for _, component in components(ConfigParser.load_config_file(path))})
    hashes = [file_hash(source) for source in filter(None, map(_source, sources))]
    if _shipped(file) and not hashes:
        return path.stem
    return " ".join([path.stem, *(found[:16] for found in (file_hash(path), *dict.fromkeys(hashes)))])


def _shipped(file: str) -> bool:
    """Whether a config lies where the package's own do."""
    return Path(file).parent == bundle_path("train").parent


def _is_shipped_name(name: str) -> bool:
    try:
        return bundle_path(name).is_file()
    except ValueError:
        return False


def _source(target: str) -> Path | None:
    """The file of a class or function that a user wrote; None for those of installed packages and of this one."""
    try:
        found = inspect.getsourcefile(locate(target))  # type: ignore[arg-type]
    except (TypeError, ErrorDuringImport):  # built in, or wrong: the bundle's check says so
        return None
    path = Path(found or "").resolve()
    installed = (Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib")), Path(__file__).parents[1])
    return None if found is None or any(folder.resolve() in path.parents for folder in installed) else path


def _keys(files: Sequence[str]) -> set[str]:
    """The top-level keys of config files."""
    return {_top(key) for file in files for key in ConfigParser.load_config_file(file)}


def _top(key: str) -> str:
    return key.lstrip("+").replace("#", "::").split("::")[0]


def _told(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the table says of options: no paths, but the hash of a file whose content is not the data's."""
    found = {}
    for key, value in options.items():
        if _top(key) in WITHOUT_EFFECT or value is None:
            continue
        if _top(key).endswith(PATHS):
            if not Path(str(value)).is_file():
                continue
            value = file_hash(Path(str(value)))[:16]
        found[key] = value
    return found
