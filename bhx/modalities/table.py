"""The table of modalities, in the order in which their tokens stand. A new one is a line here."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from bhx.errors import check_choice
from bhx.modalities.base import Modality
from bhx.modalities.bold import BOLD
from bhx.modalities.coupling import COUPLING
from bhx.modalities.cubes import CUBES
from bhx.modalities.t1 import ANATOMY

MODALITIES: dict[str, Modality] = {m.name: m for m in (BOLD, COUPLING, ANATOMY, CUBES)}


def register(modality: Modality) -> Modality:
    """Add a modality, or put another in the place of its name; everything then walks over it."""
    MODALITIES[modality.name] = modality
    return modality


def modality(name: str) -> Modality:
    """The modality of that name, or a refusal."""
    check_choice("the modality", name, MODALITIES)
    return MODALITIES[name]


def by_variable(variables: Iterable[Hashable]) -> dict[str, Modality]:
    """Variables of a cohort -> the first modality that reads each, in the table's order."""
    there = set(variables)
    return {m.variable: m for m in reversed(MODALITIES.values()) if m.variable in there}
