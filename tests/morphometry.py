"""A modality of one file: thickness [mm] and area [mm2] of each parcel, from a table beside the
scans. Everything else in bhx takes it from here."""

import pandas as pd
import xarray as xr

from bhx.data.files import reader_of
from bhx.modalities.base import Modality
from bhx.modalities.table import register

MEASURES = ["thickness", "area"]


class Morphometry(Modality):
    """Measures of parcels (roi, measure); a token is a parcel."""

    name = "morphometry"
    files = ("morphometry",)


MORPHOMETRY = register(Morphometry())


@reader_of(MORPHOMETRY)
def read_table(row, options):
    """A CSV of parcels with their measures."""
    table = pd.read_csv(row["morphometry"], index_col="parcel")
    values = xr.DataArray(
        table[MEASURES].to_numpy("float32"),
        {"roi": table.index.to_numpy(str), "measure": MEASURES},
        MORPHOMETRY.dims,
    )
    return values, {}, []
