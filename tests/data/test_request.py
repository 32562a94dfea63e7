"""Deletion requests: what a file may say, and which images that is."""

from __future__ import annotations

import csv
import errno
import hashlib
import hmac
import io
import json
import math
import os
import pickle
import stat
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from monai_unlearn.data import request as module
from monai_unlearn.data.request import (
    DeletionRequest,
    Resolution,
    Selector,
    hashed_order,
    read_request,
    resolve_request,
)

PROPERTIES = settings(deadline=None, derandomize=True, max_examples=25)
SECRET = "Erika Mustermann"

INDEX = pd.DataFrame(
    {
        "patient": ["A", "A", "B", "C", "C", "C", "D", "E"],
        "study": ["1.1", "1.2", "2.1", "3.1", "3.1", "3.2", "4.1", "5.1"],
        "series": ["s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7"],
        "file": [
            "train/A/study1/view1_frontal.jpg",
            "train/A/study2/view1_frontal.jpg",
            "train/B/study1/view1_frontal.jpg",
            "train/C/study1/view1_frontal.jpg",
            "train/C/study1/view2_lateral.jpg",
            "train/C/study2/view1_frontal.jpg",
            "train/D/study1/scan[1].jpg",
            "train/E/study1/scan1.jpg",
        ],
        "sex": ["F", "F", "M", "M", "M", "M", None, "F"],
        "age": [30.0, 31.0, 50.0, 70.0, 70.0, 71.0, np.nan, 45.0],
        "View Position": ["PA", "AP", "PA", "PA", "LL", "AP", "PA", "PA"],
        "difficulty": [0.1, 0.5, 0.3, 0.9, 0.9, 0.2, 0.8, 0.4],
    }
)


def _find(*include: Selector, index: pd.DataFrame = INDEX, allow_partial: bool = False, **arguments: Any) -> Resolution:
    return resolve_request(DeletionRequest(include, **arguments), index, allow_partial=allow_partial)


def _rows(*include: Selector, **arguments: Any) -> list[int]:
    return _find(*include, **arguments).positions.tolist()


def _json(folder: Path, content: object, name: str = "request.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def _csv(folder: Path, text: str) -> Path:
    path = folder / "request.csv"
    path.write_text(text, encoding="utf-8")
    return path


# --- what each kind selects


@pytest.mark.parametrize(
    ("selector", "patient", "image"),
    [
        (Selector("patient", ("A", "C")), [0, 1, 3, 4, 5], [0, 1, 3, 4, 5]),
        (Selector("study", ("3.1",)), [3, 4, 5], [3, 4]),
        (Selector("series", ("s1",)), [0, 1], [1]),
        (Selector("file", ("train/A/study1/view1_frontal.jpg",)), [0, 1], [0]),
        (Selector("file", ("B/study1/view1_frontal.jpg",)), [2], [2]),
        (Selector("file", ("**/view2_*.jpg",)), [3, 4, 5], [4]),
        (Selector("index", (1, 6)), [0, 1, 6], [1, 6]),
        (Selector("rule", ('sex == "M" and age > 70',)), [3, 4, 5], [5]),
        (Selector("hardest", (25,)), [3, 4, 5], [3, 4]),
        (Selector("easiest", (25,)), [0, 1, 3, 4, 5], [0, 5]),
    ],
    ids=lambda value: value.by if isinstance(value, Selector) else "",
)
def test_each_kind_selects_whole_patients_or_images(selector: Selector, patient: list[int], image: list[int]) -> None:
    assert _rows(selector, unit="patient") == patient
    assert _rows(selector, unit="image") == image
    assert _rows(selector) == (image if selector.by in ("index", "hardest", "easiest") else patient)


def test_include_is_a_union_and_exclude_takes_off() -> None:
    include = (Selector("patient", ("A",)), Selector("rule", ('sex == "M"',)))
    assert _rows(*include) == [0, 1, 2, 3, 4, 5]
    assert _rows(*include, exclude=(Selector("study", ("3.2",)),)) == [0, 1, 2]
    assert _rows(*include, exclude=(Selector("study", ("3.2",)),), unit="image") == [0, 1, 2, 3, 4]
    kept = _find(*include, exclude=(Selector("index", (0,)),))
    assert kept.positions.tolist() == [1, 2, 3, 4, 5]
    assert (kept.unit, kept.patients, kept.partly_forgotten) == ("mixed", 3, 1)


def test_the_counts_of_a_report() -> None:
    found = _find(Selector("study", ("1.1", "3.1", "3.1")), Selector("index", (6,)))
    assert found.as_dict() == {
        "images": 6,
        "unit": "mixed",
        "matched": 4,
        "patients": 3,
        "partly_forgotten": 0,
        "entries": 3,
        "unmatched": 0,
    }
    assert found.positions.dtype == np.int64
    part = _find(Selector("hardest", (30,)))
    assert (part.unit, part.patients, part.partly_forgotten) == ("image", 2, 1)
    json.dumps(part.as_dict())


PATIENTS = st.lists(st.sampled_from(["A", "B", "C", "D", "", None]), min_size=2, max_size=30)


@PROPERTIES
@given(patients=PATIENTS, wanted=st.sets(st.sampled_from("ABCD"), min_size=1), data=st.data())
def test_patients_are_completed_as_a_slow_loop_does(patients: list, wanted: set, data: st.DataObject) -> None:
    index = pd.DataFrame({"patient": pd.Series(patients, dtype=object)})
    if data.draw(st.booleans()):
        index["patient"] = index["patient"].astype("category")
    images = data.draw(st.sets(st.integers(0, len(patients) - 1)))
    include = [Selector("patient", tuple(sorted(wanted)))] + ([Selector("index", tuple(images))] if images else [])
    unit = data.draw(st.sampled_from(["patient", "image"]))
    rows = {i for i, patient in enumerate(patients) if patient in wanted} | images
    if unit == "patient":
        rows |= {i for i, p in enumerate(patients) for j in rows if p and p == patients[j]}
    request = DeletionRequest(tuple(include), unit=unit)
    if not rows or len(rows) == len(patients):
        with pytest.raises(ValueError, match=r"Nothing to forget|retain set"):
            resolve_request(request, index, allow_partial=True)
        return
    found = resolve_request(request, index, allow_partial=True)
    assert found.positions.tolist() == sorted(rows)
    names = {patients[i] or i for i in rows}  # an image without a patient is one of its own
    assert found.patients == len(names)
    assert found.partly_forgotten == len({p for i, p in enumerate(patients) if i not in rows} & names)
    assert found.unmatched == len(wanted - set(patients))


@pytest.mark.parametrize("column", [[7, 7, 8, 9], ["7", "7", "8", "9"], [7.0, 7.0, 8.0, np.nan], ["7", 7, 8, "9"]])
@pytest.mark.parametrize("categorical", [False, True])
def test_ids_are_compared_as_text(column: list, categorical: bool) -> None:
    patients = pd.Series(column)
    index = pd.DataFrame({"patient": patients.astype("category") if categorical else patients})
    assert _rows(Selector("patient", (7,)), index=index) == [0, 1]
    assert _rows(Selector("patient", ("7",)), index=index) == [0, 1]
    assert _rows(Selector("index", (0,)), index=index, unit="patient") == [0, 1]
    assert _find(Selector("index", (0,)), index=index).partly_forgotten == 1
    with pytest.raises(ValueError, match="1 of 1 match none"):
        _find(Selector("patient", ("07",)), index=index)


def test_nullable_and_unused_categories_are_no_patients() -> None:
    index = pd.DataFrame({"patient": pd.array([1, 1, None, 2], dtype="Int64")})
    assert _rows(Selector("patient", ("1",)), index=index) == [0, 1]
    index = pd.DataFrame({"patient": pd.Categorical(["A", "B", None], ["A", "B", "gone", ""])})
    with pytest.raises(ValueError, match="1 of 2 match none"):
        _find(Selector("patient", ("A", "gone")), index=index)


def test_images_without_a_patient_are_never_completed_together() -> None:
    index = pd.DataFrame({"patient": ["A", None, None, ""], "site": ["x", "y", "z", "z"]})
    found = _find(Selector("rule", ('site == "y"',)), index=index)
    assert (found.positions.tolist(), found.patients, found.partly_forgotten) == ([1], 1, 0)


def test_without_patients_images_are_forgotten_unless_patients_are_asked_for() -> None:
    index = INDEX.drop(columns="patient")
    found = _find(Selector("study", ("3.1",)), index=index)
    assert (found.positions.tolist(), found.unit, found.patients, found.partly_forgotten) == (
        [3, 4],
        "image",
        None,
        None,
    )
    with pytest.raises(ValueError, match="the request asks for patient and the training data has no"):
        _find(Selector("study", ("3.1",)), index=index, unit="patient")
    with pytest.raises(ValueError, match=r"include\[0\] needs a column 'patient', but the training data has none"):
        _find(Selector("patient", ("A",)), index=index)


# --- fractions


def _slow_order(names: list, seed: int) -> list[int]:
    return sorted(range(len(names)), key=lambda i: hashlib.sha256(f"{seed}:{names[i]}".encode()).digest())


@PROPERTIES
@given(names=st.lists(st.one_of(st.integers(), st.text()), max_size=40), seed=st.integers(-5, 2**40))
def test_the_order_is_that_of_the_hashes(names: list, seed: int) -> None:
    assert hashed_order(names, seed).tolist() == _slow_order(names, seed)


@PROPERTIES
@given(
    patients=st.lists(st.integers(0, 9), min_size=3, max_size=60),
    fraction=st.floats(0.01, 0.95),
    seed=st.integers(0, 99),
    form=st.sampled_from(["text", "int", "category"]),
)
def test_a_fraction_draws_patients_until_the_share_is_reached(
    patients: list[int], fraction: float, seed: int, form: str
) -> None:
    column = pd.Series(patients).astype({"text": str, "int": int, "category": "category"}[form])
    names = np.unique(patients)
    drawn: list[int] = []
    for position in _slow_order(names.tolist(), seed):
        if np.isin(patients, drawn).sum() >= math.ceil(fraction * len(patients) - 1e-9):
            break
        drawn.append(names[position])
    rows = np.flatnonzero(np.isin(patients, drawn)).tolist()
    request = DeletionRequest((Selector("fraction", (fraction,), seed=seed),))
    if len(rows) == len(patients):
        with pytest.raises(ValueError, match="retain set should hold at least one image"):
            resolve_request(request, pd.DataFrame({"patient": column}))
        return
    assert resolve_request(request, pd.DataFrame({"patient": column})).positions.tolist() == rows


def test_a_fraction_of_images_and_of_patients_that_are_not_all_known() -> None:
    images = _rows(Selector("fraction", (0.4,), seed=3), index=INDEX, unit="image")
    assert images == sorted(_slow_order(list(range(8)), 3)[:4])
    index = pd.DataFrame({"patient": [None] * 50 + ["A"] * 50})
    sizes = [len(_rows(Selector("fraction", (0.2,), seed=seed), index=index)) for seed in range(40)]
    assert min(sizes) == 20  # images without a patient alone, or with all of A's
    assert set(sizes) - {20} <= set(range(50, 70))


# --- difficulty


@PROPERTIES
@given(scores=st.lists(st.integers(-3, 3), min_size=4, max_size=40), percent=st.floats(0.5, 60), hardest=st.booleans())
def test_the_easiest_and_hardest_are_those_of_a_sorted_list(scores: list[int], percent: float, hardest: bool) -> None:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i] if hardest else scores[i], i))
    expected = sorted(order[: math.ceil(percent / 100 * len(scores) - 1e-9)])
    selector = Selector("hardest" if hardest else "easiest", (percent,), score="loss")
    assert _rows(selector, index=pd.DataFrame({"loss": scores})) == expected


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.1, np.nan, np.inf, 0.2], "2 of 4 in column 'loss' are NaN or infinite"),
        (["a", "b", "c", "d"], "needs a column of numbers, but 'loss' holds something else"),
        (
            None,
            r"needs a column 'loss', but the training data has none; it has \['other'\]. Name a column with a score",
        ),
    ],
)
def test_scores_that_rank_nothing_are_refused(scores: list | None, message: str) -> None:
    index = pd.DataFrame({"other": range(4)}) if scores is None else pd.DataFrame({"loss": scores})
    with pytest.raises(ValueError, match=message):
        _find(Selector("hardest", (50,), score="loss"), index=index)


def test_the_columns_that_difficulty_needs_are_known_beforehand() -> None:
    request = DeletionRequest(
        (Selector("hardest", (1,), score="loss"), Selector("patient", ("A",))), (Selector("easiest", (1,)),)
    )
    assert request.score_columns == {"loss", "difficulty"}


# --- files


@PROPERTIES
@given(
    paths=st.lists(st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=4).map("/".join), max_size=15),
    wanted=st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=3).map("/".join),
)
def test_a_path_matches_itself_or_else_what_ends_in_it(paths: list[str], wanted: str) -> None:
    index = pd.DataFrame({"file": [*paths, "x/y"]})
    parts = PurePosixPath(wanted).parts
    ends = [i for i, path in enumerate(paths) if PurePosixPath(path).parts[-len(parts) :] == parts]
    expected = [i for i in ends if paths[i] == wanted] or ends
    different = len({paths[i] for i in expected})
    if different == 1:
        assert _rows(Selector("file", (wanted,)), index=index) == expected
        assert _rows(Selector("file", (wanted,)), index=index.astype("category")) == expected
    else:
        message = "1 of 1 match none" if different == 0 else rf"1 of 1 match several: .* {different} files\)"
        with pytest.raises(ValueError, match=message):
            _find(Selector("file", (wanted,)), index=index)


def _glob_matches(pattern: tuple[str, ...], path: tuple[str, ...]) -> bool:
    """Slow oracle, one folder at a time by pathlib itself."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        least = 1 if len(pattern) == 1 else 0
        return any(_glob_matches(pattern[1:], path[skip:]) for skip in range(least, len(path) + 1))
    return bool(path) and PurePosixPath(path[0]).match(pattern[0]) and _glob_matches(pattern[1:], path[1:])


@PROPERTIES
@given(
    paths=st.lists(
        st.lists(st.text("ab1.", min_size=1, max_size=3).filter(lambda s: set(s) - {"."}), min_size=1, max_size=4),
        min_size=1,
        max_size=12,
    ),
    pattern=st.lists(
        st.sampled_from(["**", "*", "a*", "?", "[ab]", "[!a]*", "*1", "a", "[0-9]", "*.?"]), min_size=1, max_size=4
    ),
)
def test_a_pattern_matches_the_last_folders_as_pathlib_does(paths: list[list[str]], pattern: list[str]) -> None:
    if pattern == ["a"]:  # a plain path
        return
    index = pd.DataFrame({"file": ["/".join(path) for path in paths] + ["never/matched/é/ü/ö"]})
    index["file"] = index["file"].mask(index.index == len(paths), None)
    expected = [
        i
        for i, path in enumerate(paths)
        if any(_glob_matches(tuple(pattern), tuple(path[start:])) for start in range(len(path)))
    ]
    if expected:
        assert _rows(Selector("file", ("/".join(pattern),)), index=index) == expected
    else:
        with pytest.raises(ValueError, match="1 of 1 match none"):
            _find(Selector("file", ("/".join(pattern),)), index=index)


@pytest.mark.parametrize(
    ("entry", "rows"),
    [
        ("train\\A\\study1\\view1_frontal.jpg", [0]),
        ("./train//A/./study1/view1_frontal.jpg", [0]),
        ("C\\**\\*.jpg", [3, 4, 5]),
        ("train/*/study2/*", [1, 5]),
        ("C/**", [3, 4, 5]),
        ("scan[1].jpg", [6]),  # a name, not the pattern that would match scan1.jpg
        ("scan[0-9].jpg", [7]),
    ],
)
def test_how_a_path_may_be_written(entry: str, rows: list[int]) -> None:
    assert _rows(Selector("file", (entry,)), unit="image") == rows


@pytest.mark.parametrize(
    "entry", ["/train/A/study1/view1_frontal.jpg", "udy1/view1_frontal.jpg", "TRAIN/A/*", ".", "/"]
)
def test_a_path_matches_whole_folders_or_nothing(entry: str) -> None:
    with pytest.raises(ValueError, match="1 of 1 match none"):
        _find(Selector("file", (entry,)), index=INDEX.assign(file=[None, *INDEX["file"][1:]]))


def test_an_ambiguous_path_is_an_error_even_where_parts_are_allowed() -> None:
    with pytest.raises(ValueError, match=r"1 of 2 match several: include\[0\] entry 2 \(file \w{12}, 3 files\)"):
        _find(Selector("file", ("train/C/study2/view1_frontal.jpg", "study1/view1_frontal.jpg")), allow_partial=True)
    twice = pd.concat([INDEX, INDEX[2:3]])  # two rows of one file, of a finding each, say
    assert _rows(Selector("file", ("B/study1/view1_frontal.jpg",)), index=twice, unit="image") == [2, 8]


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="should have its ranges in order"):
        _find(Selector("file", ("scan[9-0].jpg",)))


# --- rules


@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        ('sex == "F"', [0, 1, 7]),
        ("'F' == sex", [0, 1, 7]),
        ('sex != "F"', [2, 3, 4, 5]),
        ('not sex == "F"', [2, 3, 4, 5]),
        ('not (sex == "F" and age < 31)', [1, 2, 3, 4, 5, 7]),
        ('not (sex == "F" or age < 60)', [3, 4, 5]),
        ('sex in ["F"]', [0, 1, 7]),
        ('sex not in ("F",)', [2, 3, 4, 5]),
        ('not sex not in {"F"}', [0, 1, 7]),
        ("31 <= age < 70", [1, 2, 7]),
        ("not 31 <= age < 70", [0, 3, 4, 5]),
        ("70 > age > -1.5", [0, 1, 2, 7]),
        ("age in [30, 31]", [0, 1]),
        ("age not in [30, 31]", [2, 3, 4, 5, 7]),
        ('`View Position` == "PA" and not "M" == sex', [0, 7]),
        ('(sex == "F"\n or sex == "M") and age >= 71', [5]),
        ('patient == "A"', [0, 1]),
        ("flag == True", [0, 2, 4, 6]),
        ("flag != 1", [1, 3, 5, 7]),
    ],
)
@pytest.mark.parametrize("form", ["plain", "category", "nullable"])
def test_what_a_rule_matches(rule: str, rows: list[int], form: str) -> None:
    index = INDEX.assign(flag=[True, False] * 4)
    if form == "category":
        index = index.astype("category")
    elif form == "nullable":
        index = index.convert_dtypes()
    assert _rows(Selector("rule", (rule,)), unit="image", index=index) == rows


ATOMS = st.builds(
    lambda column, comparison, value: f"{column} {comparison} {value}",
    st.sampled_from(["a", "b"]),
    st.sampled_from(["==", "!=", "<", "<=", ">", ">="]),
    st.integers(-1, 3),
)
RULES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        inner.map(lambda rule: f"not ({rule})"),
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda parts: f"({' '.join(parts)})"),
    ),
    max_leaves=5,
)


@PROPERTIES
@given(rule=RULES, values=st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 3)), min_size=2, max_size=20))
def test_a_rule_without_missing_values_means_what_it_means_in_python(rule: str, values: list) -> None:
    index = pd.DataFrame(values, columns=["a", "b"])
    expected = [i for i, (a, b) in enumerate(values) if eval(rule, {"a": a, "b": b})]
    if not expected or len(expected) == len(values):
        with pytest.raises(ValueError, match=r"match none|retain set"):
            _find(Selector("rule", (rule,)), index=index)
    else:
        assert _rows(Selector("rule", (rule,)), index=index) == expected


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("__import__('os').system('true')", "should be made of comparisons"),
        ("sex.upper() == 'F'", "should compare a column with a value"),
        ("[c for c in [1]] == sex", "should compare with text, numbers, True or False"),
        ("(lambda: 1)() == age", "should compare with text, numbers"),
        ("age == 2 ** 99", "should compare with text, numbers"),
        ("f'{sex}' == sex", "should compare with text, numbers"),
        ("sex is 'F'", "should compare a column with a value"),
        ("sex == None", "Rows with a missing value can't be asked for"),
        ("age == 1j", "should compare with text, numbers"),
        ("age == -'1'", "should compare with text, numbers"),
        ("age in [1, 'a']", "lists both, or lists within a list"),
        ("age in [[1], [2]]", "lists both, or lists within a list"),
        ("age in []", "should compare a column with a value"),
        ("age in sex", "should compare a column with a value"),
        ("'F' in sex", "should compare a column with a value"),
        ("age == sex", "should compare a column with a value"),
        ("1 == 1", "should compare a column with a value"),
        ("sex", "should be made of comparisons"),
        ("True", "should be made of comparisons"),
        ("age > 1 if True else False", "should be made of comparisons"),
        ("(age := 1) == 1", "should compare a column with a value"),
        ("sex = 'F'", "can't be read as one"),
        ("sex == 'F", "can't be read as one"),
        ("sex == 'F'; age == 1", "can't be read as one"),
        ("\0", "can't be read as one"),
        ("   ", "can't be read as one"),
        ("(" * 300 + "age == 1" + ")" * 300, "can't be read as one"),
        ("not " * 30 + "age == 1", "nested at most 20 deep"),
        ("age == " + "-" * 900 + "1", "can't be read|should compare with text, numbers"),
        ("age == 1 or " * 100 + "age == 1", "at most 1,000 characters, but has 1,208"),
    ],
)
def test_what_is_no_rule_is_refused_before_there_is_data(rule: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"exclude\[0\] entry 2 should .*{message}|{message}") as caught:
        DeletionRequest((Selector("index", (0,)),), (Selector("rule", ('sex == "F"', rule)),))
    assert "exclude[0] entry 2" in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("sexx == 'F'", r"one is none. Did you mean 'sex'\? There are: \['View Position', 'age'"),
        (f"`{SECRET}` == 'F'", r"one is none. There are"),
        ("age == '30'", "column 'age' holds numbers and is compared with text. Leave the quotation marks out"),
        ("sex in [1, 2]", "column 'sex' holds text and is compared with a number. Put the value into quotation"),
        ("sex < 'M'", "asks for the order of column 'sex'"),
        ("mixed == 1", "column 'mixed' holds something else"),
        ("date == '2020-01-01'", "column 'date' holds something else"),
    ],
)
@pytest.mark.parametrize("categorical", [False, True])
def test_a_rule_that_does_not_suit_the_data_is_refused(rule: str, message: str, categorical: bool) -> None:
    index = INDEX.assign(mixed=["a", 1] * 4, date=pd.Timestamp("2020-01-01"))
    index["mixed"] = index["mixed"].astype(object)
    with pytest.raises(ValueError, match=message) as caught:
        _find(Selector("rule", (rule,)), index=index.astype("category") if categorical else index)
    assert SECRET not in str(caught.value)


def test_a_column_of_missing_values_matches_nothing() -> None:
    index = INDEX.assign(empty=[None] * 8, blank=["", "x"] * 4)
    for rule in ("empty == 1", "empty != 'x'", "not empty in [1]"):
        with pytest.raises(ValueError, match=r"1 of 1 match none: include\[0\] entry 1 \(rule "):
            _find(Selector("rule", (rule,)), index=index)
    rule = Selector("rule", ("blank != 'y'",))
    assert _rows(rule, index=index.assign(blank=["", "x", "y", "x"] * 2), unit="image") == [1, 3, 5, 7]


@pytest.mark.parametrize("rule", ["sex == 'f'", "sex != 'f' and age > 1", "sex in ['F', 'female']", "not sex == ''"])
def test_a_value_that_occurs_nowhere_is_a_slip_and_its_columns_groups_are_named(rule: str) -> None:
    many = pd.concat([INDEX] * 4, ignore_index=True)
    with pytest.raises(
        ValueError, match=r"include\[0\] entry 1 should compare column 'sex' .* it has nowhere"
    ) as caught:
        _find(Selector("rule", (rule,)), index=many, allow_partial=True)
    assert str(caught.value).endswith("There are: 'F', 'M'.")


@pytest.mark.parametrize("name", ["patient", "nickname"])
def test_values_that_may_be_people_are_not_named(name: str) -> None:
    index = INDEX.assign(nickname=[f"N{i}" for i in range(len(INDEX))])
    with pytest.raises(ValueError, match="Correct them, or leave them out") as caught:
        _find(Selector("rule", (f"{name} == 'nobody'",)), index=index)
    assert not [value for value in index[name] if f"'{value}'" in str(caught.value)]


# --- what matches nothing, or in part


def test_entries_that_match_nothing_are_named_by_place_and_hash_alone() -> None:
    request = DeletionRequest(
        (Selector("patient", ("A", SECRET, SECRET)), Selector("index", (3, 8))), (Selector("study", ("9.9",)),)
    )
    with pytest.raises(ValueError, match="but 3 of 5 match none") as caught:
        resolve_request(request, INDEX, what="these images")
    message = str(caught.value)
    wanted = hmac.new(request.key.encode(), SECRET.encode(), hashlib.sha256).hexdigest()
    assert request.hashed(SECRET) == wanted
    assert f"include[0] entry 2 (patient {wanted[:12]})" in message
    assert f"include[1] entry 2 (index {request.hashed(8)[:12]})" in message
    assert f"exclude[0] entry 1 (study {request.hashed('9.9')[:12]})" in message
    assert "these images" in message
    assert "--allow_partial true" in message
    assert SECRET not in message
    found = resolve_request(request, INDEX, allow_partial=True)
    assert (found.entries, found.unmatched, found.positions.tolist()) == (5, 3, [0, 1, 3])


def test_an_entry_that_repeats_another_counts_once() -> None:
    lists = (Selector("patient", ("A", "X")), Selector("patient", ("X", "A", "A")))
    with pytest.raises(ValueError, match=r"1 of 2 match none: include\[0\] entry 2 "):
        _find(*lists)
    found = _find(*lists, allow_partial=True)
    assert (found.entries, found.unmatched, found.positions.tolist()) == (2, 1, [0, 1])


def test_a_long_list_of_unmatched_entries_is_cut() -> None:
    ids = tuple(f"x{i}" for i in range(1000))
    with pytest.raises(ValueError, match=r"1000 of 1001 match none: .* and 995 more\. Correct") as caught:
        _find(Selector("patient", ("A", *ids)))
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("allow_partial", [False, True])
def test_a_request_that_matches_nothing_at_all_never_goes_on(allow_partial: bool) -> None:
    with pytest.raises(ValueError, match=r"2 of 2 match none: .* Nothing to forget"):
        _find(Selector("patient", ("X", "Y")), allow_partial=allow_partial)
    with pytest.raises(ValueError, match=r"include matches none\. Nothing to forget"):
        _find(Selector("patient", ("X",)), exclude=(Selector("patient", ("A",)),), allow_partial=True)


def test_nothing_or_everything_to_forget_is_an_error() -> None:
    with pytest.raises(ValueError, match="exclude takes off all 2 that include selects"):
        _find(Selector("patient", ("A",)), exclude=(Selector("patient", ("A",)),))
    with pytest.raises(ValueError, match="retain set should hold at least one image, but all 8 images"):
        _find(Selector("patient", tuple("ABCDE")))


@pytest.mark.parametrize("kind", ["study", "series", "file"])
def test_a_column_that_is_not_there_is_named(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"exclude\[0\] needs a column '{kind}', .* it has \['age'\]"):
        _find(Selector("index", (0,)), exclude=(Selector(kind, ("x",)),), index=INDEX[["age"]])


# --- in Python


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("patients", ("A",)), "by should be one of patient, study"),
        (("patient", ()), "should be a tuple of at least one"),
        (("patient", SECRET), "should be a tuple of at least one"),
        (("patient", ("",)), "should be text, not empty"),
        (("patient", (1.5,)), "should be text, not empty"),
        (("file", (3,)), "should be text, not empty"),
        (("index", (-1,)), "whole numbers of at least 0"),
        (("index", (True,)), "whole numbers of at least 0"),
        (("index", ("1",)), "whole numbers of at least 0"),
        (("fraction", (1,)), r"between 0 and 1 \(both"),
        (("fraction", (0.1, 0.2)), "one number between 0 and 1"),
        (("fraction", (float("nan"),)), "one number between 0 and 1"),
        (("hardest", (100,)), "between 0 and 100"),
        (("fraction", (0.1,), 1.5), "seed should be a whole number"),
        (("hardest", (1,), 0, ""), "score should be the name of a column"),
    ],
)
def test_a_selector_that_can_select_nothing_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Selector(*arguments)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": ()}, "include should have at least one selector"),
        ({"include": ("A",)}, "include should be a tuple of selectors"),
        ({"exclude": Selector("patient", ("A",))}, "exclude should be a tuple of selectors"),
        ({"unit": "study"}, "unit should be patient, image or None"),
        ({"reference": ""}, "reference should be text or None"),
        ({"key": ""}, "key should be text"),
    ],
)
def test_a_request_that_asks_for_nothing_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeletionRequest(**{"include": (Selector("patient", ("A",)),), **arguments})


def test_a_request_shows_no_id_and_no_key() -> None:
    request = DeletionRequest((Selector("patient", (SECRET,)),), reference=SECRET)
    for shown in (repr(request), str(request), f"{request.include[0]}", repr(_find(Selector("patient", ("A",))))):
        assert SECRET not in shown
        assert request.key not in shown
    assert "1 values" in repr(request)
    assert pickle.loads(pickle.dumps(request)) == request
    assert DeletionRequest(request.include).key != request.key
    assert not request.key_is_kept


# --- files of requests


FULL = {
    "$schema": "request.schema.json",
    "reference": "ticket 7",
    "unit": "patient",
    "include": [
        {"patient": ["A", 12]},
        {"patient": "B"},
        {"study": ["1.2"]},
        {"series": "1.3"},
        {"file": ["a/b.nii.gz", "**/view2_*.jpg"]},
        {"index": [0, 5]},
        {"index": 3},
        {"rule": 'sex == "F" and age >= 60'},
        {"fraction": 0.1, "seed": 4},
        {"hardest": 10, "score": "mean_loss"},
    ],
    "exclude": [{"easiest": 2.5}],
}


def test_a_json_request_with_everything_in_it(tmp_path: Path) -> None:
    request = read_request(_json(tmp_path, FULL))
    assert request.include == (
        Selector("patient", ("A", "12")),
        Selector("patient", ("B",)),
        Selector("study", ("1.2",)),
        Selector("series", ("1.3",)),
        Selector("file", ("a/b.nii.gz", "**/view2_*.jpg")),
        Selector("index", (0, 5)),
        Selector("index", (3,)),
        Selector("rule", ('sex == "F" and age >= 60',)),
        Selector("fraction", (0.1,), seed=4),
        Selector("hardest", (10,), score="mean_loss"),
    )
    assert request.exclude == (Selector("easiest", (2.5,)),)
    assert (request.unit, request.reference) == ("patient", "ticket 7")


def test_a_request_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "request.JSON"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"include": [{"patient": "Müller"}]}, ensure_ascii=False).encode())
    assert read_request(path).include == (Selector("patient", ("Müller",)),)


def test_the_schema_is_one_and_travels_with_the_package() -> None:
    schema = json.loads(Path(module.__file__).with_name("request.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert Draft202012Validator(schema).is_valid(FULL)
    one_of = [option["required"][0] for option in schema["$defs"]["selector"]["oneOf"]]
    assert tuple(one_of) == module.KINDS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "The request should be an object with include"),
        ({}, "The request should be an object with include and, if needed, exclude, unit and reference, but is not"),
        ({"include": []}, "include should be a list of at least one selector, .* but got an empty one"),
        ({"include": {"patient": SECRET}}, "include should be a list of at least one selector, .* but got an object"),
        ({"include": [SECRET]}, r"include\[0\] should be an object with just one of .* but got text"),
        ({"include": [{}]}, r"include\[0\] should be an object with just one of .* but is not"),
        ({"include": [{"patient": SECRET, "study": SECRET}]}, r"include\[0\] should be an object with just one of"),
        ({"include": [{"patients": [SECRET]}]}, r"include\[0\] should have no keys but .* Did you mean 'patient'\?"),
        ({"include": [{"PatientID": [SECRET]}]}, r"include\[0\] should have no keys but .* Did you mean 'patient'\?"),
        ({"include": [{SECRET: 1}]}, r"include\[0\] should have no keys but patient, .* but has others\.$"),
        ({"include": [{"patient": "A"}], "exlude": []}, r"The request should have no keys .* Did you mean 'exclude'\?"),
        ({"include": [{"patient": []}]}, r"include\[0\]\.patient should be an id .* but got an empty one"),
        ({"include": [{"patient": ["A", ""]}]}, r"include\[0\]\.patient entry 2 should be an id .* an empty one"),
        ({"include": [{"patient": [SECRET, None]}]}, r"include\[0\]\.patient entry 2 should be .* but got null"),
        ({"include": [{"patient": [1.5]}]}, r"include\[0\]\.patient entry 1 should be .* but got another number"),
        ({"include": [{"patient": [[SECRET]]}]}, r"include\[0\]\.patient entry 1 should be .* but got a list"),
        ({"include": [{"index": [1, -1]}]}, r"include\[0\]\.index entry 2 should be a whole number of at least 0"),
        ({"include": [{"index": "3"}]}, r"include\[0\]\.index should be a whole number .* but got text"),
        ({"include": [{"rule": 3}]}, r"include\[0\]\.rule should be text"),
        ({"include": [{"fraction": 1}]}, r"include\[0\]\.fraction should be a number between 0 and 1 .* but got 1\."),
        ({"include": [{"fraction": [SECRET]}]}, r"include\[0\]\.fraction should be .* but got a list"),
        ({"include": [{"fraction": True}]}, r"include\[0\]\.fraction should be .* but got true or false"),
        ({"include": [{"hardest": 100}]}, r"include\[0\]\.hardest should be a percentage .* but got 100\."),
        ({"include": [{"hardest": 5, "seed": 1}]}, r"include\[0\] should be without seed, which goes with fraction"),
        ({"include": [{"patient": "A", "score": "x"}]}, r"include\[0\] should be without score, which goes with"),
        ({"include": [{"patient": "A"}], "unit": "patients"}, r"unit should be patient or image, .*'patient'\?"),
        ({"include": [{"patient": "A"}], "unit": SECRET}, r"unit should be patient or image, but got text\.$"),
        ({"include": [{"patient": "A"}], "exclude": [{"study": 1.5}]}, r"exclude\[0\]\.study should be an id"),
        ({"include": [{"rule": ["sex == 'F'", f"{SECRET} =="]}]}, r"include\[0\] entry 2 should be a rule"),
        ('{"include": [{"patient": "A"}], "include": []}', "Each key of the request should stand once, but 1 repeat"),
        ('{"include": [{"patient": "A"}', "The request should be JSON, but line 1, column 30 is not"),
        ("", "The request should be JSON, but line 1"),
        ("[" * 100_000, "should be JSON"),
        ('{"include": [{"index": ' + "9" * 5000 + "}]}", "should be JSON, but is nested too deeply or has too long a"),
        ('{"include": [{"fraction": NaN}]}', "values of fraction should be one number"),
    ],
)
def test_a_json_request_that_is_none_is_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_request(_json(tmp_path, content))
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert not list(tmp_path.glob("*.key"))


@pytest.mark.parametrize(
    ("text", "include", "exclude"),
    [
        ("patient\nA\nB\nA\n", [("patient", ("A", "B", "A"))], []),
        ("PatientID\r\nA\r\n\r\n007\r\n", [("patient", ("A", "007"))], []),
        ("patient_id;\nA;\n", [("patient", ("A",))], []),
        ("\ufeffStudyInstanceUID\n1.2\n", [("study", ("1.2",))], []),
        ('"SeriesInstanceUID"\n"1.2"', [("series", ("1.2",))], []),
        ('file\n"a,b/c.png"\n', [("file", ("a,b/c.png",))], []),
        ("index\n0\n 5 \n", [("index", (0, 5))], []),
        ("by,value\npatient,A\nstudy,1.2\npatient,B\n", [("patient", ("A", "B")), ("study", ("1.2",))], []),
        (
            "By;Value;Action\npatient;A;\nPatientID;B;exclude\nindex;3;Include\n",
            [("patient", ("A",)), ("index", (3,))],
            [("patient", ("B",))],
        ),
        (
            'by,value,action\nrule,"sex == ""F"" and site in [""x"", ""y""]",include\nfraction,0.1\nfraction,0.2\n',
            [("rule", ('sex == "F" and site in ["x", "y"]',)), ("fraction", (0.1,)), ("fraction", (0.2,))],
            [],
        ),
        ("by,value\nhardest,10\neasiest,2.5\n", [("hardest", (10.0,)), ("easiest", (2.5,))], []),
    ],
)
def test_the_forms_of_a_csv_request(tmp_path: Path, text: str, include: list, exclude: list) -> None:
    request = read_request(_csv(tmp_path, text))
    assert request.include == tuple(Selector(*selector) for selector in include)
    assert request.exclude == tuple(Selector(*selector) for selector in exclude)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "header and at least one line"),
        ("patient\n", "header and at least one line"),
        (f"{SECRET}\n{SECRET}\n", "first line of the request should be by,value .* but is something else.$"),
        ("patients\nA\n", r"first line .* Did you mean 'patient'\?"),
        ("PatientID,StudyInstanceUID\nA,1\n", "first line of the request should be"),
        ("by,value,unit\npatient,A,image\n", "first line of the request should be"),
        ("rule\nsex == 'F'\n", "first line of the request should be"),
        (f"file\n\n{SECRET},b.png\n", "Line 3 of the request should have 1 columns, but has 2"),
        (f"by,value\n{SECRET},A\n", "Line 2 of the request should have in column by one of patient, study"),
        (f"by,value,action\npatient,A,{SECRET}\n", "Line 2 of the request should have in column action include"),
        ("by,value,action\npatient,A\npatient\n", "Line 3 of the request should have a value, but has none"),
        ("by,value\npatient,\n", "Line 2 of the request should have a value"),
        (f"index\n1\n{SECRET}\n", "Line 3 of the request should have as its value a whole number of at least 0"),
        ("index\n-1\n", "Line 2 of the request should have as its value a whole number"),
        ("by;value\nfraction;0,1\n", r"between 0 and 1 \(both excluded\), with a point for decimals"),
        ("by,value\nhardest,100\n", r"a percentage between 0 and 100 \(both excluded\)"),
        (f'patient\n"{SECRET}"x\n', "Line 2 of the request should be CSV"),
        (f'patient\n"{SECRET}\n', "Line 2 of the request should be CSV"),
        ("by,value\nrule,sex ==\n", r"include\[0\] entry 1 should be a rule"),
    ],
)
def test_a_csv_request_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_request(_csv(tmp_path, text))
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@PROPERTIES
@given(
    ids=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1), min_size=1, max_size=9)
)
def test_what_a_csv_writer_wrote_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    ids = [name.strip() for name in ids if name.strip()] or ["x"]
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["by", "value"], *(["patient", name] for name in ids)])
    path = tmp_path_factory.mktemp("csv") / "request.csv"
    path.write_bytes(file.getvalue().encode())
    assert read_request(path).include == (Selector("patient", tuple(ids)),)


def test_json_and_csv_of_one_request_resolve_alike(tmp_path: Path) -> None:
    as_json = read_request(_json(tmp_path, {"include": [{"patient": "A"}, {"index": 6}], "exclude": [{"index": 0}]}))
    as_csv = read_request(_csv(tmp_path, "by,value,action\npatient,A,\nindex,6,\nindex,0,exclude\n"))
    assert as_json.include == as_csv.include
    assert resolve_request(as_json, INDEX).positions.tolist() == [1, 6]
    assert resolve_request(as_csv, INDEX).as_dict() == resolve_request(as_json, INDEX).as_dict()


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("missing.json", None, FileNotFoundError, "should be an existing file"),
        ("request.txt", b"A", ValueError, r"should be a \.json or \.csv file, but got '\.txt'"),
        ("request.csv", "patient\nMüller\n".encode("latin-1"), ValueError, "should be text in UTF-8"),
        ("request.json", json.dumps(FULL).encode("utf-16"), ValueError, "should be text in UTF-8"),
    ],
)
def test_a_file_that_is_no_request_is_refused(
    tmp_path: Path, name: str, content: bytes | None, error: type[Exception], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        read_request(tmp_path / name)


# --- the key


def test_the_key_is_made_once_and_kept_beside_the_request(tmp_path: Path) -> None:
    path = _json(tmp_path, FULL)
    first, second = read_request(path), read_request(path)
    beside = tmp_path / "request.json.key"
    assert first.key == second.key == beside.read_text(encoding="ascii").strip()
    assert len(bytes.fromhex(first.key)) == 32
    assert first.key_is_kept
    assert second.key_is_kept
    assert sorted(file.name for file in tmp_path.iterdir()) == ["request.json", "request.json.key"]
    if os.name == "posix":
        assert stat.S_IMODE(beside.stat().st_mode) == 0o600
    other = tmp_path / "other"
    other.mkdir()
    assert read_request(_json(other, FULL)).hashed("A") != first.hashed("A")


@pytest.mark.parametrize("call", ["open", "link"])
def test_where_the_key_can_not_be_kept_it_is_of_this_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    path = _json(tmp_path, FULL)
    monkeypatch.setattr(os, call, refuse)
    if call == "link":  # and a rename fails too
        monkeypatch.setattr(os, "replace", refuse)
    first, second = read_request(path), read_request(path)
    assert first.key != second.key
    assert not first.key_is_kept
    assert [file.name for file in tmp_path.iterdir()] == ["request.json"]


def test_a_file_system_without_links_keeps_the_key_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    path = _json(tmp_path, FULL)
    monkeypatch.setattr(os, "link", refuse)
    assert read_request(path).key == read_request(path).key
    assert sorted(file.name for file in tmp_path.iterdir()) == ["request.json", "request.json.key"]


def test_of_two_processes_that_make_a_key_the_first_one_s_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _json(tmp_path, FULL)
    link = os.link

    def late(source: Path, target: Path) -> None:
        target.write_text("ab" * 32 + "\n", encoding="ascii")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert read_request(path).key == "ab" * 32
    assert sorted(file.name for file in tmp_path.iterdir()) == ["request.json", "request.json.key"]


@pytest.mark.parametrize("content", ["", "abc", SECRET, "é" * 64])
def test_a_key_file_that_holds_something_else_is_left_and_refused(tmp_path: Path, content: str) -> None:
    path = _json(tmp_path, FULL)
    beside = tmp_path / "request.json.key"
    beside.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="should hold 64 hexadecimal digits") as caught:
        read_request(path)
    assert SECRET not in str(caught.value)
    assert beside.read_text(encoding="utf-8") == content
