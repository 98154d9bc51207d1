"""Options as callers give them: names of coordinates and whole numbers, checked at the door."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral

from bhx.errors import InputError, listed
from bhx.schema import subject_coords


def check_name(option: str, found, optional: bool = True) -> None:
    """Refuse what is not one name of a coordinate, or None where it is optional."""
    if not isinstance(found, str) and not (found is None and optional):
        fact = f"Expected {option} as the name of a coordinate, found {found!r}"
        raise InputError(fact, f"Give one name as text: {option}='site'")


def check_names(option: str, found, at_least: int = 0) -> None:
    """Refuse one word, or too few, where a list of names of coordinates is wanted."""
    if isinstance(found, str) or not isinstance(found, Collection) or len(found) < at_least:
        fact = f"Expected {option} as a list of coordinates, found {found!r}"
        raise InputError(fact, f"Write {option}=['name of a coordinate']")


def check_count(option: str, found, at_least: int, example: int) -> None:
    """Refuse what is not a whole number, or too small."""
    if not isinstance(found, Integral) or found < at_least:
        fact = f"Expected {option} as a whole number of at least {at_least}, found {found!r}"
        raise InputError(fact, f"Write for instance {option}={example}")


def check_coords(data, names) -> None:
    """Refuse names that are no coordinates on subject."""
    known = subject_coords(data)
    for name in names:
        if name not in known:
            fact = f"Expected '{name}' as a coordinate on subject, found {listed(known, 20)}"
            raise InputError(fact, f"Assign it: assign_coords({name}=('subject', values))")
