"""Thousands of inputs nobody thought of: each is read as an independent reading says, or refused.

An outcome is a value or an InputError; anything else fails. `CASES` counts them: more than 10,000
in a run.
"""

from __future__ import annotations

import json
import math
import re

import nibabel as nib
import numpy as np
import pandas as pd
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bhx.data.bold import read_tr
from bhx.data.catalog import Entry, read_entry, shipped_folder
from bhx.data.files import check_affine, entities, space_of
from bhx.data.labels import coded, tidy, typed
from bhx.data.prepare import check_rows
from bhx.data.tables import Table, read_text, take_parcels
from bhx.errors import InputError
from bhx.schema import MISSING, check_names, is_missing
from bhx.train.recipes import Recipe

CASES = {"tables": 1500, "axes": 1200, "labels": 2500, "rows": 500, "names": 2000}
CASES |= {"sidecars": 700, "headers": 800, "entries": 700, "settings": 1500}


def fuzz(kind):
    """As many cases as `CASES` says, the same in every run."""
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
    how = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": slow}
    return settings(max_examples=CASES[kind], **how)


def said_of(act) -> str:
    """What a refusal says, or "" where nothing is refused."""
    try:
        act()
    except InputError as error:
        return str(error)
    return ""


def test_enough_is_tried():
    assert sum(CASES.values()) > 10_000


# Tables ---

WORD = (
    st.text("abcXYZ_ -.é", min_size=1, max_size=8)
    .map(str.strip)
    .filter(lambda w: re.search("[a-zA-Zé]", w) and w.lower() not in (*MISSING, "inf", "infinity"))
)
NUMBER = st.floats(-1e6, 1e6).map(lambda x: round(x, 4))


@st.composite
def tables(draw):
    """Numbers with or without names of columns and rows, as text with one separator."""
    n, m = draw(st.integers(3, 7)), draw(st.integers(3, 7))
    flat = draw(st.lists(NUMBER, min_size=n * m, max_size=n * m))
    values = np.array(flat).reshape(n, m)
    columns = draw(st.none() | st.lists(WORD, min_size=m, max_size=m, unique=True))
    rows = draw(st.none() | st.lists(WORD, min_size=n, max_size=n, unique=True))
    separator = draw(st.sampled_from(["\t", ",", ";"]))
    front = draw(st.sampled_from(["", "\ufeff"])) + draw(st.sampled_from(["", "\n", " \n"]))
    return values, columns, rows, separator, front


@fuzz("tables")
@given(tables())
def test_tables_of_text(tmp_path_factory, drawn):
    values, columns, rows, separator, front = drawn
    path = tmp_path_factory.getbasetemp() / "fuzz.txt"
    lines = [separator.join([*([""] if rows else []), *columns])] if columns else []
    for i, row in enumerate(values.tolist()):
        lines.append(separator.join([*([rows[i]] if rows else []), *map(repr, row)]))
    path.write_text(front + "\n".join(lines) + "\n", encoding="utf-8")
    found = read_text(path)  # whole tables are never refused
    np.testing.assert_array_equal(found.values, values)
    assert found.rows == (rows or None)
    assert found.columns == columns


@fuzz("axes")
@given(st.integers(2, 9), st.integers(2, 9), st.data())
def test_numbered_columns_are_put_in_number_order_or_refused(n, m, data):
    prefix = data.draw(st.sampled_from(["", "ROI", "ROI_", "parcel-", "V "]))
    numbers = data.draw(st.lists(st.integers(0, 12), min_size=m, max_size=m))
    values = np.random.default_rng(n).normal(size=(n, m))
    table = Table(values, None, [f"{prefix}{k}" for k in numbers])
    whole = sorted(numbers) in (list(range(m)), list(range(1, m + 1)))
    try:
        names, found, _ = take_parcels(table, None, parcels_in="columns")
    except InputError:
        assert not whole
        return
    assert whole
    assert names == [str(i + 1) for i in range(m)]
    np.testing.assert_array_equal(found, values.T[np.argsort(numbers)])


# Labels of people ---

CELL = st.one_of(
    st.none(),
    st.sampled_from([*MISSING, "n/a", "NA", "N/A", " "]),
    st.integers(-5, 120),
    st.floats(-50, 200).map(lambda x: round(x, 2)),
    st.sampled_from(["F", "M", "89+", ">89", "1.0", "01", "true", "False", "A B", "1e3", "x"]),
    st.booleans(),
)


def plainly(cell):
    """Independent reading of one cell: a number, a word, or None where it is missing."""
    text = "" if cell is None else str(cell).strip()
    if text.lower() in MISSING:
        return None
    bound = re.fullmatch(r"[<>]?(\d+)\+?", text)
    try:
        return float(bound[1]) if bound else float(text)
    except ValueError:
        return text


@fuzz("labels")
@given(st.lists(CELL, min_size=1, max_size=14))
def test_labels_have_one_type(cells):
    plain = [plainly(cell) for cell in cells]
    try:
        found, _ = typed(pd.Series(cells, dtype=object), "label")
    except InputError:
        assert len({v for v in plain if isinstance(v, float)}) > 10
        assert any(isinstance(v, str) for v in plain)
        return
    gone = [value is None for value in plain]
    assert is_missing(found.to_numpy()).tolist() == gone
    if found.dtype == float:
        expected = [math.nan if v is None else v for v in plain]
        np.testing.assert_array_equal(found, np.array(expected, float))
    else:
        assert all(isinstance(value, str) for value in found)
        kept = [str(c).strip() for c, away in zip(cells, gone, strict=True) if not away]
        kept = [str(int(float(t))) if re.fullmatch(r"-?\d+\.0", t) else t for t in kept]
        assert [*found[~np.array(gone)]] == kept or any(isinstance(c, str) for c in cells)
    again, _ = typed(found, "label")  # what is typed stays as it is
    pd.testing.assert_series_equal(again, found)


@fuzz("labels")
@given(st.lists(st.sampled_from([0, 1, 1.0, "0", "1", "F", "M", None, "n/a", 7]), min_size=1))
def test_codings(cells):
    try:
        found, notes = coded(pd.Series(cells, dtype=object), "sex", {"0": "F", "1": "M"})
    except InputError:
        assert {c for c in cells if c not in (None, "n/a")} == {7}
        return
    words = {"0": "F", "1": "M", "1.0": "M", "F": "F", "M": "M"}
    assert found.tolist() == [words.get(str(c), "") for c in cells]
    assert bool(notes) == (7 in cells)


@fuzz("rows")
@given(
    st.lists(st.sampled_from(["a", "b", "c", " a", "01", 1, 1.0, None, ""]), max_size=5),
    st.sampled_from(["age", "hub", "fold", "prediction", "site", "my label", "dx"]),
    st.lists(CELL, min_size=5, max_size=5),
)
def test_rows_of_scans(ids, name, cells):
    table = pd.DataFrame({"subject": ids, name: cells[: len(ids)]})
    words = [plainly(i) for i in ids]
    words = [str(int(w)) if isinstance(w, float) and ids[k] in (1, 1.0) else str(ids[k]).strip()
             for k, w in enumerate(words)]  # fmt: skip
    try:
        rows, _ = check_rows(table)
    except InputError:
        return
    assert [row["subject"] for row in rows] == sorted(words)
    assert name not in ("hub", "fold", "prediction")


# Names of files and labels ---

ENTITY = st.sampled_from(["sub", "ses", "task", "run", "dir", "acq", "echo", "space", "cohort"])


@fuzz("names")
@given(st.lists(st.tuples(ENTITY, st.text("abz019+", min_size=1, max_size=6)), max_size=6))
def test_entities_of_file_names(pairs):
    name = "_".join([*(f"{key}-{value}" for key, value in pairs), "bold.nii.gz"])
    assert entities(name) == dict(pairs)
    space, cohort = dict(pairs).get("space"), dict(pairs).get("cohort")
    assert space_of(name) == (f"{space}:{cohort}" if space and cohort else space or "")


@fuzz("names")
@given(st.text(max_size=30))
def test_any_name_is_taken_or_refused(name):
    assert all(name.count(f"{key}-{value}") for key, value in entities(name).items())
    said = said_of(lambda: check_names({name}))
    assert name in (said or name)


# Time and place ---

STATED = st.one_of(st.none(), st.floats(), st.integers(-5, 4000), st.sampled_from(["2", "x", []]))


@fuzz("sidecars")
@given(STATED, st.none() | st.floats(0, 5000), st.none() | st.floats(0.1, 5))
def test_repetition_times(tmp_path_factory, stated, header, given_tr):
    folder = tmp_path_factory.getbasetemp()
    sidecar = {} if stated is None else {"RepetitionTime": stated}
    (folder / "tr_bold.json").write_text(json.dumps(sidecar))
    try:
        tr = read_tr(folder / "tr_bold.nii.gz", header, given_tr)
    except InputError:
        return
    assert 0 < tr <= 20
    others = [v for v in (stated, given_tr) if v is not None and v == v]
    if others:  # all agree
        assert all(abs(float(v) - tr) <= 1e-3 * tr for v in others)
    else:
        assert tr in (header, header / 1000)
        assert header != 1


@fuzz("headers")
@given(
    st.lists(st.floats(-4, 4), min_size=9, max_size=9),
    st.sampled_from([0, 1, 4]),
    st.sampled_from([0, 1, 4]),
    st.floats(0, 6) | st.just(0.0),
)
def test_affines(numbers, q_code, s_code, shift):
    affine = np.eye(4)
    affine[:3, :3] = np.array(numbers).reshape(3, 3)
    image = nib.Nifti1Image(np.zeros((2, 2, 2), "f4"), None)
    image.header.set_sform(affine, s_code)
    moved = np.diag([2.0, 2, 2, 1])
    moved[0, 3] = shift
    image.header.set_qform(moved, q_code)
    image = nib.Nifti1Image.from_bytes(image.to_bytes())
    used = affine if s_code else moved if q_code else None
    try:
        check_affine(image, "a.nii")
    except InputError:
        return
    assert used is not None
    axes = used[:3, :3] / np.linalg.norm(used[:3, :3], axis=0)
    assert (np.abs(axes).max(0) > 0.998).all()
    if q_code and s_code:
        assert np.abs(affine - moved).max() <= 1 + 1e-3


# What people write: catalog entries and settings ---

SHIPPED = [yaml.safe_load(p.read_text("utf8")) for p in sorted(shipped_folder().glob("*.yaml"))]
THING = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10), st.floats(), st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=3), st.dictionaries(st.text(max_size=3), st.integers()),
)  # fmt: skip


@fuzz("entries")
@given(st.sampled_from(SHIPPED), st.data())
def test_entries_of_the_catalog(tmp_path_factory, content, data):
    path = tmp_path_factory.getbasetemp() / f"{content['name']}.yaml"
    key = data.draw(st.sampled_from([*Entry.model_fields, "surplus"]))
    changed = {**content, key: data.draw(THING)}
    path.write_text(yaml.safe_dump(changed, allow_unicode=True), encoding="utf-8")
    if said := said_of(lambda: read_entry(path)):
        assert path.name in said
        return
    assert key != "surplus"
    assert read_entry(path).name == content["name"]


@fuzz("settings")
@given(st.sampled_from(sorted(Recipe.model_fields)), THING)
def test_settings_of_a_run(name, value):
    changed = {"stage": "harmonizer", name: value}
    if said := said_of(lambda: Recipe(**changed)):
        assert name in said
        assert value is not None or name not in ("loss", "patience")
        return
    kept = getattr(Recipe(**changed), name)
    assert kept == (tuple(value) if isinstance(value, list) else value)
    assert type(kept) is not bool or isinstance(value, bool)
    assert not isinstance(kept, float) or math.isfinite(kept)


@fuzz("rows")
@given(st.lists(st.integers(0, 100), min_size=3, max_size=12), st.sampled_from([-9999, 999, -1]))
def test_codes_of_missing_numbers_are_named_or_asked_about(ages, code):
    table = pd.DataFrame({"age": [*ages, code]})
    found, _ = tidy(table, (code,))
    assert np.isnan(found.age.iloc[-1])
    assert found.age.iloc[:-1].tolist() == [math.nan if a == code else a for a in ages]
    said = said_of(lambda: tidy(table))
    assert str(code) in (said or str(code))
    assert said or tidy(table)[1] or code >= 0
