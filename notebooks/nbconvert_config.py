"""How `make notebooks` stores what it has executed: cell tags stay, widget state and times go.

A stamp of the code and the weights that made the outputs comes in; tests/test_notebooks.py refuses
a notebook whose code or weights have changed since.
"""

import hashlib
import json
from pathlib import Path

from nbconvert.preprocessors import Preprocessor

WEIGHTS = Path(__file__).resolve().parents[1] / "bhx" / "weights"


def stamp(cells) -> str:
    """Digest of a notebook's code and of the shipped weights as they are now."""
    parts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    described = sorted(WEIGHTS.glob("*/config.json"))
    parts += [json.loads(path.read_text(encoding="utf-8"))["sha256"] for path in described]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


class Stamp(Preprocessor):
    """Runs last, after execution and cleaning."""

    enabled = True

    def preprocess(self, nb, resources):
        nb.metadata["made_from"] = stamp(nb.cells)
        for output in [o for cell in nb.cells for o in cell.get("outputs", [])]:
            if "image/png" in output.get("data", {}):  # stands where the widget was
                output["data"].pop("application/vnd.jupyter.widget-view+json", None)
        return nb, resources


c = get_config()  # noqa: F821

c.NotebookExporter.preprocessors = [Stamp]
c.ExecutePreprocessor.timeout = 600  # s a cell
c.ExecutePreprocessor.record_timing = False
c.ExecutePreprocessor.store_widget_state = False
c.ClearMetadataPreprocessor.enabled = True
c.ClearMetadataPreprocessor.clear_cell_metadata = False
c.ClearMetadataPreprocessor.preserve_nb_metadata_mask = {"kernelspec", ("language_info", "name")}
