"""bhx: scans -> cohort -> model -> latents -> explore / evaluate.

Only names live here: the public ones, each loaded from its file at first use, so that `import bhx`
costs nothing; the version; and the two folders of the user's machine. No computation may be here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from .atlas import load_atlas as load_atlas
    from .atlas import reparcellate as reparcellate
    from .cohort import open_cohort as open_cohort
    from .cohort import prepare as prepare
    from .cohort import save_cohort as save_cohort
    from .cohort import scan as scan
    from .cohort import split as split
    from .encoding import embed as embed
    from .encoding import load_model as load_model
    from .evaluation import compare as compare
    from .evaluation import connectome as connectome
    from .evaluation import probe as probe
    from .explorer import explore as explore
    from .fine_tuning import fine_tune as fine_tune
    from .latents import lesion as lesion
    from .latents import neighbours as neighbours
    from .latents import pool as pool
    from .latents import project as project
    from .latents import region_map as region_map
    from .reporting import report as report
    from .surface import plot_latents as plot_latents
    from .surface import plot_surface as plot_surface
    from .surface import plot_tokens as plot_tokens
    from .surface import plot_volume as plot_volume
    from .synthetic import synthetic_cohort as synthetic_cohort
    from .training import pretrain as pretrain

__version__ = "0.1.0"

# file -> its public names; tests/test_layout.py holds this table and the imports above together
PUBLIC = {
    "atlas": ("load_atlas", "reparcellate"),
    "synthetic": ("synthetic_cohort",),
    "cohort": ("open_cohort", "prepare", "save_cohort", "scan", "split"),
    "encoding": ("load_model", "embed"),
    "training": ("pretrain",),
    "latents": ("pool", "project", "neighbours", "region_map", "lesion"),
    "surface": ("plot_surface", "plot_volume", "plot_tokens", "plot_latents"),
    "explorer": ("explore",),
    "evaluation": ("probe", "compare", "connectome"),
    "fine_tuning": ("fine_tune",),
    "reporting": ("report",),
}
_FILE_OF = {name: file for file, names in PUBLIC.items() for name in names}
__all__ = [*_FILE_OF, "folders"]


def __getattr__(name: str):
    if name not in _FILE_OF:
        raise AttributeError(f"bhx has no '{name}'. dir(bhx) lists the public names.")
    from importlib import import_module

    try:
        file = import_module(f"{__name__}.{_FILE_OF[name]}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith(f"{__name__}."):
            raise AttributeError(f"bhx.{name} is not there: no file {error.name}.") from error
        raise
    globals()[name] = found = getattr(file, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_FILE_OF})


def folders() -> dict[str, Path]:
    """The two folders of this machine that bhx may write to when not told otherwise.

    Returns
    -------
    dict
        "data" (cohorts and downloads; environment variable BHX_DATA) and "cache" (what can be made
        again; BHX_CACHE). Both stand below ~/.cache/bhx by default and are not created here.
    """
    import os
    from pathlib import Path

    home = Path("~/.cache/bhx").expanduser()
    return {
        "data": Path(os.environ.get("BHX_DATA") or home / "data").expanduser(),
        "cache": Path(os.environ.get("BHX_CACHE") or home / "cache").expanduser(),
    }
