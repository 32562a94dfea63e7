"""Rules on metadata (``sex == "F" and 40 <= age < 60``): parsed, never run as code."""

from __future__ import annotations

import ast
import difflib
import functools
import operator
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["check_rule", "columns_of", "rows_where"]

MAX_LENGTH, MAX_DEPTH = 1000, 20

FORM = 'A rule is such as: sex == "F" and 40 <= age < 60, site in ["A", "B"], not `View Position` == "PA".'
NEGATED: dict[type, type] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
MIRRORED: dict[type, type] = {ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE}
COMPARISON = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
ID_COLUMNS = ("patient", "study", "series", "instance", "file")
NUMBERS = {"integer", "floating", "mixed-integer-float", "boolean"}

# Strings are matched too, so that a backtick within one is left alone.
QUOTED = re.compile(r""""(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`([^`]+)`""")


def check_rule(rule: str, place: str = "rule") -> None:
    """Refuse what is no rule, before there is any data.

    Args:
        rule: the rule.
        place: where it stands, for messages; its text is never shown, since it may hold an id.

    Raises:
        ValueError: if it is too long, too deeply nested, or anything but comparisons of columns with values.
    """
    _parse(rule, place)


def columns_of(rule: str) -> set[str]:
    """Names of the columns that a rule asks for.

    Args:
        rule: the rule.

    Raises:
        ValueError: as ``check_rule``.
    """
    return {node.id for node in ast.walk(_parse(rule, "rule")) if isinstance(node, ast.Name)}


def rows_where(rule: str, index: pd.DataFrame, place: str = "rule") -> np.ndarray:
    """Rows of a table that a rule holds for.

    A comparison with a missing value (NaN, None or empty text) never holds, nor does its opposite: ``sex != "F"`` and
    ``not sex == "F"`` leave out rows whose sex is not known.

    Args:
        rule: the rule.
        index: one row an image.
        place: where the rule stands, for messages.

    Returns:
        Boolean array with a value for each row.

    Raises:
        ValueError: as ``check_rule``; if a column is not there, or is compared with a value of another kind, or with
            text that it has nowhere.
    """
    return _rows(_parse(rule, place), False, index, place)


def _parse(rule: str, place: str) -> ast.expr:
    if len(rule) > MAX_LENGTH:
        raise ValueError(f"{place} should have at most {MAX_LENGTH:,} characters, but has {len(rule):,}. Shorten it.")
    columns: dict[str, str] = {}

    def stand_in(match: re.Match) -> str:
        if match[1] is None:
            return match[0]
        name = f"quoted_{len(columns)}_"
        columns[name] = match[1]
        return f" {name} "

    try:
        tree = ast.parse(QUOTED.sub(stand_in, rule).strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"{place} should be a rule, but can't be read as one. {FORM}") from None
    _check(tree, 0, place)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = columns.get(node.id, node.id)
    return tree


def _check(node: ast.expr, depth: int, place: str) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"{place} should be nested at most {MAX_DEPTH} deep, but is deeper. Split it into several.")
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check(value, depth + 1, place)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check(node.operand, depth + 1, place)
    elif isinstance(node, ast.Compare):
        for left, comparison, right in _pairs(node):
            if isinstance(comparison, (ast.In, ast.NotIn)):
                is_list = isinstance(right, (ast.List, ast.Tuple, ast.Set)) and len(right.elts) > 0
                valid = isinstance(left, ast.Name) and is_list
            else:
                valid = type(comparison) in COMPARISON and isinstance(left, ast.Name) != isinstance(right, ast.Name)
            if not valid:
                raise ValueError(
                    f"{place} should compare a column with a value by ==, !=, <, <=, > or >=, or by in or not in with "
                    f"a list, but does otherwise. Put text into quotation marks. {FORM}"
                )
            _value(right if isinstance(left, ast.Name) else left, place)
    else:
        raise ValueError(f"{place} should be made of comparisons, and, or and not, but holds something else. {FORM}")


def _pairs(node: ast.Compare) -> Iterator[tuple[ast.expr, ast.cmpop, ast.expr]]:
    """``a < b < c`` as ``a < b`` and ``b < c``."""
    sides = [node.left, *node.comparators]
    return zip(sides, node.ops, sides[1:])


def _value(node: ast.expr, place: str) -> Any:
    """A constant, or the list of several, of one kind."""
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        values = [_value(element, place) for element in node.elts]
        if any(isinstance(value, list) for value in values) or len({isinstance(value, str) for value in values}) > 1:
            raise ValueError(f"{place} should list either text or numbers, but lists both, or lists within a list.")
        return values
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node, sign = node.operand, -1
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float)):
        if sign == 1:
            return node.value
        if not isinstance(node.value, (str, bool)):
            return -node.value
    raise ValueError(
        f"{place} should compare with text, numbers, True or False, but compares with something else. Rows with a "
        f"missing value can't be asked for. {FORM}"
    )


def _rows(node: Any, negated: bool, index: pd.DataFrame, place: str) -> np.ndarray:
    # Negation is carried down to the comparisons, so that a missing value does not come to match by a `not`.
    if isinstance(node, ast.UnaryOp):
        return _rows(node.operand, not negated, index, place)
    if isinstance(node, ast.BoolOp):
        parts = [_rows(value, negated, index, place) for value in node.values]
        all_hold = isinstance(node.op, ast.And) != negated
    else:
        parts = [_compare(*pair, negated, index, place) for pair in _pairs(node)]
        all_hold = not negated
    return functools.reduce(np.logical_and if all_hold else np.logical_or, parts)


def _compare(
    left: Any, comparison: ast.cmpop, right: Any, negated: bool, index: pd.DataFrame, place: str
) -> np.ndarray:
    kind: type = type(comparison)
    if isinstance(left, ast.Name):
        name, wanted = left.id, _value(right, place)
    else:
        name, wanted, kind = right.id, _value(left, place), MIRRORED.get(kind, kind)
    kind = NEGATED[kind] if negated else kind
    if name not in index:
        # A name that is no column may be a value whose quotation marks are missing: it is not shown.
        columns = sorted(map(str, index.columns))
        nearest = difflib.get_close_matches(name, columns, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{place} should name columns of the data, but one is none.{hint} There are: {columns}.")
    column = index[name]
    if isinstance(column.dtype, pd.CategoricalDtype):
        hits = _holds(column.cat.categories.to_numpy(), kind, wanted, name, place)
        return np.append(hits, False)[column.cat.codes.to_numpy()]  # code -1, missing, takes the last
    return _holds(column.to_numpy(), kind, wanted, name, place)


def _holds(values: np.ndarray, kind: type, wanted: Any, name: str, place: str) -> np.ndarray:
    """For which of a column's values a comparison holds."""
    held = pd.api.types.infer_dtype(values, skipna=True)
    known = ~pd.isna(values)
    holds = np.zeros(len(values), dtype=bool)
    if not known.any():
        return holds
    is_text = isinstance(wanted[0] if isinstance(wanted, list) else wanted, str)
    if held != "string" and held not in NUMBERS:
        raise ValueError(
            f"{place} should ask for columns of either text or numbers, but column {name!r} holds something else "
            f"({held}). Convert the column."
        )
    if is_text != (held == "string"):
        raise ValueError(
            f"{place} should compare text with text and numbers with numbers, but column {name!r} holds "
            f"{'text' if held == 'string' else 'numbers'} and is compared with {'text' if is_text else 'a number'}. "
            f"{'Put the value into quotation marks' if held == 'string' else 'Leave the quotation marks out'}, or "
            "convert the column."
        )
    if is_text and kind not in (ast.Eq, ast.NotEq, ast.In, ast.NotIn):
        raise ValueError(
            f"{place} should compare text by ==, !=, in or not in, but asks for the order of column {name!r}, which "
            "holds text (where '9' comes after '10'). List the values, or convert the column to numbers."
        )
    if is_text:
        known[known] = values[known] != ""
    found = values[known]
    if not is_text and found.dtype == object:
        found = np.array(found.tolist())
    if is_text:
        _refuse_unknown(wanted if isinstance(wanted, list) else [wanted], found, name, place)
    if kind in COMPARISON:
        holds[known] = COMPARISON[kind](found, wanted)
    else:
        holds[known] = pd.Series(found).isin(wanted).to_numpy() == (kind is ast.In)
    return holds


def _refuse_unknown(wanted: list[str], found: np.ndarray, name: str, place: str) -> None:
    """A value that occurs nowhere is a slip, and with ``!=`` or ``or`` it would select the wrong people unnoticed."""
    values = pd.unique(found)
    unknown = set(wanted) - set(values)
    if not unknown or not len(values):
        return
    # Values that many rows share are names of groups, not of people.
    groups = name not in ID_COLUMNS and len(values) <= 20 and len(found) >= 5 * len(values)
    raise ValueError(
        f"{place} should compare column {name!r} with values that it has, but {len(unknown)} of {len(set(wanted))} it "
        "has nowhere. Upper and lower case differ."
        + (f" There are: {', '.join(map(repr, sorted(values)))}." if groups else " Correct them, or leave them out.")
    )
