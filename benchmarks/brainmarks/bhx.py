"""bhx in the Brainmarks suite: hub tokens as registers, CLS, and dynamics tokens as patches.

Lives in the suite's namespace as `brainmarks.models.bhx`: an installed bhx puts it there. The
suite's samples have no T1, so this is the fMRI-only mode. Smoke test: `make brainmarks`, or

    pip install "bhx[brainmarks]" && pip install --no-deps brainmarks
    python -m brainmarks.models.test_models bhx
"""

from __future__ import annotations

import numpy as np
import torch
from brainmarks.models.base import Embeddings
from brainmarks.models.registry import register_model

from bhx.data.atlas import load_atlas, reparcellate
from bhx.encode.inputs import encode_readings, read_subject, sequences
from bhx.encode.model import load_model, random_model
from bhx.errors import InputError, listed
from bhx.modalities.bold import BOLD
from bhx.schema import build_cohort


@register_model
def bhx(source: str = "workshop", **kwargs):
    """(transform, wrapper) of the shipped model, or of `source` as `bhx.load_model` takes it."""
    return Prepare(), Hub(load_model(source, device="cpu"))


@register_model
def bhx_random(preset: str = "workshop", seed: int = 0, **kwargs):
    """The same before any training: what the architecture alone is worth."""
    return Prepare(), Hub(random_model(preset, seed=seed, device="cpu"))


class Prepare:
    """The suite's sample with its level and scale put back, mirrored in time up to `shortest` [s].

    A coupling needs two patches of 35.28 s, so a shorter scan is continued by its mirror image.
    """

    shortest = 72.0

    def __call__(self, sample):
        bold = torch.as_tensor(sample["bold"]).float() * sample["std"] + sample["mean"]
        tr = float(sample["tr"])
        needed = int(np.ceil(self.shortest / tr))
        if len(bold) < needed:
            there_and_back = torch.cat([bold, bold.flip(0)])
            bold = there_and_back.repeat(-(-needed // len(there_and_back)), 1)[:needed]
        return {"bold": bold, "tr": tr}


class Hub(torch.nn.Module):
    """A bhx model as the suite's frozen backbone.

    The suite's Schaefer-400 series, in 17-network order, are aligned by name; a model of another
    Schaefer scale reads means over its parcels.
    """

    __space__ = "schaefer400"

    def __init__(self, model):
        super().__init__()
        self.networks, self.config = model.networks, model.config
        reads = self.config.modalities.items()
        self.reads = next(name for name, m in reads if m.variable == BOLD.variable)
        self.register_buffer("share", torch.tensor(shares(model.atlas)))

    def forward(self, batch) -> Embeddings:
        """{"bold": (B, T, 400), "tr": (B,)} -> mean hub token (B, 1, D), hubs (B, R, D), patches
        (B, L, D).

        A long scan is read in windows; hubs are means weighted by the windows' patches.
        """
        device = self.share.device
        series = batch["bold"].float() @ self.share.T  # (B, T, parcels)
        rows = zip(series.cpu().numpy(), torch.as_tensor(batch["tr"]).tolist(), strict=True)
        readings = [self._read(one.T, tr) for one, tr in rows]
        tokens = encode_readings(self.networks, readings, device)
        read = sequences(self.config, readings, tokens)
        hub = self.networks.harmonizer(read.subjects)  # (windows, R, D)
        weight = torch.zeros(len(readings), len(hub), device=device)  # of each one's windows
        weight[read.owner, range(len(hub))] = read.share.to(device)
        hub = torch.einsum("bw,wrd->brd", weight, hub)
        return Embeddings(hub.mean(1, keepdim=True), hub, self._patches(readings, tokens))

    def _read(self, bold, tr):
        facts = {"tr": tr, "n_volumes": bold.shape[1]}
        return read_subject({BOLD.variable: bold}, facts, self.config, missing="leave out")

    def _patches(self, readings, tokens):
        """All tokens of the BOLD of each subject, zero where a parcel was left out."""
        out, width = [], self.config.harmonizer.width
        for reading, mine in zip(readings, tokens, strict=True):
            full = [
                part.new_zeros(window.shape[:-1].numel(), width).index_copy(
                    0, there.to(part.device), part[:, :width]
                )
                for window, there, part in zip(
                    reading.windows[self.reads], reading.there[self.reads], mine[self.reads],
                    strict=True,
                )
            ]  # fmt: skip
            out.append(torch.cat(full))
        found = sorted({len(one) // len(self.share) for one in out})
        if len(found) > 1:
            raise InputError(
                f"Expected scans of equally many patches in a batch, found {listed(found)}",
                "Batch scans of one TR and length",
            )
        return torch.stack(out)


def shares(atlas):
    """Weight of each Schaefer-400 parcel, 17-network order, in each parcel of `atlas`."""
    names = load_atlas("schaefer400", order="17networks").roi.values
    subject = {"subject": ["unit"], "participant": ["unit"], "site": [""], "tr": [1.0]}
    subject |= {"n_volumes": [400], "has_bold": [True], "has_t1": [False]}
    unit = np.eye(400, dtype=np.float32)[None]  # one volume a parcel
    attrs = {"atlas": "schaefer400", "source": ""}
    cohort = build_cohort({BOLD.variable: unit}, subject, {"roi": names}, attrs)
    wanted = reparcellate(cohort, atlas.attrs["atlas"])
    return wanted[BOLD.variable][0].sel(roi=atlas.name7.values).values
