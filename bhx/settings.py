"""The version, and the two folders of this machine that bhx may write to. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

__version__ = "0.1.0"
PACKAGE = Path(__file__).parent


def folders() -> dict[str, Path]:
    """The two folders of this machine that bhx writes to when no other is named.

    Returns
    -------
    dict
        "data" (cohorts and downloads; environment variable BHX_DATA) and "cache" (what can be made
        again; BHX_CACHE). Both stand below ~/.cache/bhx by default and are not created here.
    """
    home = Path("~/.cache/bhx").expanduser()
    return {
        "data": Path(os.environ.get("BHX_DATA") or home / "data").expanduser(),
        "cache": Path(os.environ.get("BHX_CACHE") or home / "cache").expanduser(),
    }
