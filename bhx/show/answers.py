"""Answers to a lesson's exercises: right, wrong in a way that is known, or not there yet."""

from __future__ import annotations

import numpy as np

from bhx.errors import InputError


def check_answer(given, right, hints=None, *, within: float = 0.0) -> None:
    """Print "right", the hint to a mistake that is known, or "not yet".

    Parameters
    ----------
    given : number, word, list or array; None as long as there is no answer
    right : the answer that is right
    hints : a sentence -> the wrong answer that it explains
    within : how far numbers may be off

    Raises
    ------
    InputError
        A hint's answer is right.
    """
    hints = hints or {}
    if wrong := [hint for hint, answer in hints.items() if _same(answer, right, within)]:
        fact = f"Expected hints to wrong answers, found the right one: {wrong[0]}"
        raise InputError(fact, "Give each hint the answer of somebody who made the mistake")
    known = {"right": right} | hints
    print(next((say for say, answer in known.items() if _same(given, answer, within)), "not yet"))


def _same(one, other, within):
    one, other = np.asarray(one), np.asarray(other)
    if one.shape != other.shape:
        return False
    if {one.dtype.kind, other.dtype.kind} <= set("biuf"):
        return bool((abs(one.astype(float) - other) <= within).all())
    return bool((one == other).all())
