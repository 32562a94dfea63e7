"""The file of a deletion request, JSON or CSV, and the key beside it."""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import json
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema.exceptions import ValidationError

__all__ = ["DIFFICULTY", "IDS", "KINDS", "key_beside", "read_csv", "read_json"]

IDS = ("patient", "study", "series")
DIFFICULTY = ("easiest", "hardest")
KINDS = (*IDS, "file", "index", "rule", "fraction", *DIFFICULTY)
# MONAI Label needs jsonschema 3; the schema has nothing that the two drafts take for different things.
Validator: Any = getattr(jsonschema, "Draft202012Validator", jsonschema.Draft7Validator)


def read_json(text: str) -> dict[str, Any]:
    """The arguments of a request, each selector as a dict of its own, from JSON.

    Raises:
        ValueError: if the text does not follow request.schema.json; shows the place and no value.
    """
    repeated: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        return dict(pairs)

    try:
        document = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"The request should be JSON, but line {error.lineno}, column {error.colno} is not: {error.msg}."
        ) from None
    except (ValueError, RecursionError):
        raise ValueError("The request should be JSON, but is nested too deeply or has too long a number.") from None
    if repeated:
        raise ValueError(f"Each key of the request should stand once, but {len(repeated)} repeat. Remove them.")
    schema = json.loads(Path(__file__).with_name("request.schema.json").read_text(encoding="utf-8"))
    del schema["$id"]  # jsonschema 3 would look for its parts there
    errors = list(Validator(schema).iter_errors(document))
    if errors:
        # An unknown key is the cause of what else is wrong at its place.
        raise ValueError(_schema_message(min(errors, key=lambda error: error.validator != "additionalProperties")))

    made: dict[str, Any] = {"include": [], "exclude": []}
    for side, selectors in made.items():
        for item in document.get(side, []):
            by = next(kind for kind in KINDS if kind in item)
            values = item[by] if isinstance(item[by], list) else [item[by]]
            values = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
            options = {
                name: int(item[name]) if name == "seed" else item[name] for name in ("seed", "score") if name in item
            }
            selectors.append({"by": by, "values": tuple(values), **options})
    return {**made, "unit": document.get("unit"), "reference": document.get("reference")}


def _schema_message(error: ValidationError) -> str:
    """What is wrong where, without any value: the place comes from the schema's own keys."""
    place = ""
    for step in error.absolute_path:
        if isinstance(step, str):
            place += f".{step}" if place else step
        else:
            place += f" entry {step + 1}" if "." in place else f"[{step}]"
    place = place or "The request"
    rule = error.schema.get("description", "as the schema says")
    if error.validator == "additionalProperties":
        known = error.schema["properties"]
        unknown = [key for key in error.instance if key not in known]
        return f"{place} should have no keys but {', '.join(known)}, but has others.{_nearest(unknown[0], known)}"
    if error.validator in ("required", "anyOf", "oneOf"):
        return f"{place} should be {rule}, but is not."
    hint = ""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    found = kinds.get(type(error.instance), "another number")
    if found == "another number" and error.absolute_path and error.absolute_path[-1] in ("fraction", *DIFFICULTY):
        found = repr(error.instance)
    elif error.instance in ("", [], {}):
        found = "an empty one"
    elif error.validator == "enum" and found == "text":
        hint = _nearest(error.instance, error.validator_value)
    return f"{place} should be {rule}, but got {found}.{hint}"


def read_csv(text: str) -> dict[str, Any]:
    """As ``read_json``, from CSV: columns ``by,value`` and perhaps ``action``, or one column named after a kind.

    Raises:
        ValueError: if the text is neither; shows the line and no value.
    """
    first = text.lstrip().partition("\n")[0]
    delimiter = ";" if ";" in first and "," not in first else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    groups: dict[tuple, list] = {}
    header: list[str] | None = None
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if header is None:
                header = _csv_header(cells)
                continue
            while len(cells) > len(header) and not cells[-1]:
                cells.pop()
            line = f"Line {reader.line_num} of the request"
            if len(cells) > len(header):
                raise ValueError(
                    f"{line} should have {len(header)} columns, but has {len(cells)}. Put values with a {delimiter!r} "
                    "in them into quotation marks."
                )
            side, by, value = _csv_entry(dict(zip(header, cells)), line)
            # A number alone makes a selector; other entries of a kind make one together.
            group = (side, by, len(groups)) if by in ("fraction", *DIFFICULTY) else (side, by)
            groups.setdefault(group, []).append(value)
    except csv.Error:
        raise ValueError(
            f"Line {reader.line_num} of the request should be CSV, but can't be read. Check the quotation marks."
        ) from None
    if not groups:
        raise ValueError("The request should have a header and at least one line, but has not. Nothing to forget.")
    made: dict[str, list[dict]] = {"include": [], "exclude": []}
    for (side, by, *_), values in groups.items():
        made[side].append({"by": by, "values": tuple(values)})
    return made


def _csv_kind(name: str) -> str | None:
    plain = name.lower().replace("_", "").replace(" ", "")
    aliases = {"patientid": "patient", "studyinstanceuid": "study", "seriesinstanceuid": "series"}
    plain = aliases.get(plain, plain)
    return plain if plain in KINDS else None


def _csv_header(cells: list[str]) -> list[str]:
    while cells and not cells[-1]:
        cells.pop()
    names = [cell.lower() for cell in cells]
    if names[:2] == ["by", "value"] and names[2:] in ([], ["action"]):
        return names
    kind = _csv_kind(cells[0]) if len(cells) == 1 else None
    if kind in (*IDS, "file", "index"):
        return [str(kind)]
    hint = "".join(_nearest(cell, (*KINDS, "PatientID", "StudyInstanceUID", "SeriesInstanceUID")) for cell in cells[:1])
    raise ValueError(
        "The first line of the request should be by,value or by,value,action, or the one word patient, study, series, "
        f"file or index (or PatientID, StudyInstanceUID, SeriesInstanceUID), but is something else.{hint}"
    )


def _csv_entry(cells: dict[str, str], line: str) -> tuple[str, str, str | int | float]:
    if "by" in cells:
        kind, value, side = _csv_kind(cells["by"]), cells.get("value", ""), cells.get("action", "").lower() or "include"
    else:
        (kind, value), side = next(iter(cells.items())), "include"
    if kind is None:
        raise ValueError(f"{line} should have in column by one of {', '.join(KINDS)}, but has something else.")
    if side not in ("include", "exclude"):
        raise ValueError(f"{line} should have in column action include, exclude or nothing, but has something else.")
    if not value:
        raise ValueError(f"{line} should have a value, but has none.")
    try:
        if kind == "index":
            number: int | float = int(value)
            valid = number >= 0
        elif kind in ("fraction", *DIFFICULTY):
            number = float(value)
            valid = 0 < number < (1 if kind == "fraction" else 100)
        else:
            return side, kind, value
    except ValueError:
        valid = False
    if not valid:
        rules = {"index": "a whole number of at least 0", "fraction": "a number between 0 and 1 (both excluded)"}
        rule = rules.get(kind, "a percentage between 0 and 100 (both excluded)")
        raise ValueError(f"{line} should have as its value {rule}, with a point for decimals, but has something else.")
    return side, kind, number


def key_beside(path: Path) -> tuple[str, bool]:
    """The key of a request's hashes, and whether it is kept in the file ``….key`` beside the request.

    It is made at the first call, readable for its owner alone. Where it can't be written, it is of this run alone.

    Raises:
        ValueError: if the file holds something else.
        PermissionError: if it is there but can't be read.
    """
    beside = path.with_name(path.name + ".key")
    if not beside.exists():
        unfinished = path.with_name(f".{beside.name}.part-{os.getpid()}")
        key = secrets.token_hex(32)
        try:
            unfinished.unlink(missing_ok=True)
            with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
                file.write(key + "\n")
            _place(unfinished, beside)
        except OSError:
            return key, False
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
    key = beside.read_text(encoding="ascii", errors="replace").strip()
    if not re.fullmatch("[0-9a-f]{64}", key):
        raise ValueError(
            f"{beside.name!r} beside the request should hold 64 hexadecimal digits, but holds something else. Restore "
            "it, or delete it to have a new one made; hashes are then other ones."
        )
    return key, True


def _place(file: Path, where: Path) -> None:
    """Give a file its name, unless another process was first."""
    try:
        os.link(file, where)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(file, where)


def _nearest(key: str, known: Iterable[str]) -> str:
    # Only a key that resembles a known one is shown: any other may be an id in the wrong place.
    nearest = difflib.get_close_matches(key.lower(), list(known), n=1, cutoff=0.7)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
