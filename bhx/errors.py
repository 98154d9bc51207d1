"""The one error of bhx, and how its sentences list names. Imports nothing of bhx."""

from __future__ import annotations


class InputError(ValueError):
    """Something given to bhx does not fit: one sentence of fact, one of help."""

    def __init__(self, fact: str, help: str):
        self.fact, self.help = fact.rstrip("."), help.rstrip(".")
        super().__init__(f"{self.fact}. {self.help}.")

    def __reduce__(self):  # survives the way back from a worker process
        return type(self), (self.fact, self.help)


def check_choice(what: str, value, known) -> None:
    """Refuse a value that is not among the known ones."""
    if value not in known:
        found = f"'{value}'" if isinstance(value, str) else repr(value)
        fact = f"Expected {what} to be {listed(known, 12)}, found {found}"
        raise InputError(fact, "Choose one of them")


def listed(names, at_most: int = 5) -> str:
    """Names for a sentence: the first few, and how many more."""
    names = [str(n) for n in names]
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more} more" if more > 0 else "")
