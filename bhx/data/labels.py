"""Labels of people as tables write them, each to one type: numbers with NaN, or text with "".

What was taken for granted comes back as notes, one sentence each. No file is read here.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from bhx.errors import InputError, listed
from bhx.schema import is_missing

# What tables write for a missing number. The long ones are asked about, the short ones are noted.
CODES = (-9999, -9998, -999, -998, -888, -777, -99, -88, -77, -9, -8, -7, -3, -1)
CODES += (99, 777, 888, 998, 999, 7777, 8888, 9998, 9999, 99999)
OPEN = r"^(?:[<>≤≥~]=?)?\s*(\d+(?:\.\d+)?)\s*\+?$"  # 89+, >89: a number with an open end


def as_words(values) -> pd.Series:
    """Values as text without spaces around, 1.0 as "1", and "" for what is missing."""
    values = pd.Series(values).astype(object)
    gone = is_missing(values)
    plain = [str(int(v)) if isinstance(v, float) and v.is_integer() else v for v in values[~gone]]
    out = pd.Series("", values.index, dtype=object)
    out[~gone] = [str(v).strip() for v in plain]
    return out


def typed(values, name: str, missing=()) -> tuple[pd.Series, list[str]]:
    """One column as float64 with NaN or as text with "", and notes.

    Truths are text. Text is numbers when every word is one; "89+" is 89, with a note; ids of equal
    length with leading zeros stay text. `missing` are further codes of missing values.
    """
    words = as_words(values)
    words = words.mask(words.isin([*as_words(list(missing))]), "")
    known = words[words != ""]
    bounds = known.str.extract(OPEN)[0]
    numbers = bounds.fillna(known).map(_number).astype(float)
    ids = known.str.len().nunique() == 1 and known.str.match(r"0\d\d").any()
    if numbers.notna().all() and not ids:
        bounded = known[bounds.notna() & (bounds != known)]
        says = f"'{name}': {len(bounded)} written as {listed(bounded.unique(), 3)} read as a number"
        return numbers.reindex(words.index).astype(float), [says] if len(bounded) else []
    odd = known[numbers.isna()].unique()
    if numbers.notna().mean() > 0.5 and numbers.nunique() > 10:
        fact = f"Expected numbers or words in '{name}', found {listed(odd, 3)} among numbers"
        raise InputError(fact, "Write each as one number, or n/a")
    return words, []


def coded(values, name: str, coding: dict, missing=()) -> tuple[pd.Series, list[str]]:
    """One column in the words of a coding; codes that it does not have are missing, with a note."""
    words = as_words(values)
    words = words.mask(words.isin([*as_words(list(missing))]), "")
    out = words.map({**{word: word for word in coding.values()}, **coding})
    odd = words[out.isna() & (words != "")]
    says = f"codes of '{name}' among {listed(coding, 12)}, found {listed(odd.unique())}"
    if len(odd) and len(odd) == (words != "").sum():
        raise InputError(f"Expected {says}", "Correct the coding of the catalog entry")
    notes = [f"expected {says} in {len(odd)} rows, which are missing now"] if len(odd) else []
    return out.fillna(""), notes


def tidy(table: pd.DataFrame, missing=None) -> tuple[pd.DataFrame, list[str]]:
    """Every column of a table of labels as `typed` makes it, and notes.

    `missing` are codes of missing values, such as (-9999, 999). None asks: numbers that look like
    such codes are refused, or noted where they are short.
    """
    table, notes = table.copy(), []
    for name in table:
        table[name], says = typed(table[name], name, missing or ())
        notes += says
        if missing is None and table[name].dtype == float:
            notes += _ask(table[name].dropna(), name)
    return table, notes


def _number(word):
    try:
        return float(word)
    except ValueError:
        return np.nan


def _ask(numbers, name):
    """Refuse or note numbers that look like codes of missing values."""
    others = numbers[~numbers.isin(CODES)]
    low = numbers.isin(CODES) & (numbers < 0) & (others.min() >= 0)
    high = numbers.isin(CODES) & (numbers > 0) & (numbers >= 3 * others.max()) & (others.max() > 0)
    found = numbers[low | high]
    if found.empty:
        return []
    codes = f"{listed(as_words(found.unique()))} in {len(found)} rows of '{name}'"
    help = "Name them in bhx.prepare(missing=(-9999,)), or missing=() if they are no codes"
    if found.abs().max() >= 99:
        fact = f"Expected numbers of people, found {codes}, which look like codes"
        raise InputError(fact, help)
    return [f"{codes} look like codes. {help}"]
