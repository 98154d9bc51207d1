"""Tokens of frozen encoders, computed once and kept in zarr as bfloat16 for the harmonizer.

zarr has no bfloat16: the arrays `dynamics` (subject, parcel, patch, feature) and `structure`
(subject, cube, feature) hold its 16 bits as uint16. Rows are written in order, and
`attrs["rows_written"]` says how many there are, so that a cache that was begun is continued.
"""

from __future__ import annotations

from math import ceil
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from bhx.encode.inputs import Reading, autocast, encode_parts
from bhx.errors import InputError, listed
from bhx.train.objectives import digest


class TokenCache:
    """The tokens of a feed's subjects; made or continued at once, then read row by row."""

    def __init__(self, path, feed, networks, device, progress=True):
        if feed.plan.crop or tuple(feed.plan.decimate) != (1,):
            fact = "Expected a recipe without crops and decimation beside a token cache, found "
            fact += f"crop={feed.plan.crop}, decimate={feed.plan.decimate}"
            raise InputError(fact, "Set crop=False, decimate=(1,), or train without cache=")
        self.path, self.config, self._group = Path(path), networks.config, None
        self.patches = _patches(feed)
        group = self._create(feed, networks)
        if group.attrs["rows_written"] < len(self.patches):
            self._fill(group, feed, networks, device, progress)

    @property
    def gigabytes(self) -> float:
        """What the tokens take before compression, which they hardly bear."""
        f, s = self.config.dynamics, self.config.structure
        tokens = f.parcels * int(self.patches.sum()) + s.tokens * int(self.has_t1.sum())
        return 2 * f.width * tokens / 1e9

    def read(self, i: int, random):
        """Tokens (n, width) of a subject, of one window of its scan, and their rows."""
        import zarr

        if self._group is None:
            self._group = zarr.open_group(self.path, mode="r")
        c, tokens, rows = self.config.harmonizer, [], []
        if self.patches[i]:
            window = self._window(int(self.patches[i]), random)
            one = _from_bits(self._group["dynamics"][i, :, window[0] : window[-1] + 1])
            tokens.append(one.flatten(0, 1))
            rows.append(c.dynamics_rows(len(window)))
        if self.has_t1[i]:
            tokens.append(_from_bits(self._group["structure"][i]))
            rows.append(c.structure_rows())
        return torch.cat(tokens), torch.cat(rows)

    def _window(self, patches, random):
        most = self.config.dynamics.max_patches
        windows = np.array_split(np.arange(patches), ceil(patches / most))
        return windows[int(random.integers(len(windows)))]

    def _create(self, feed, networks):
        import zarr

        f, s = self.config.dynamics, self.config.structure
        self.has_t1 = feed.need["t1"]
        about = {
            "subjects": [str(x) for x in feed.labels.subject.values],
            "encoders": digest(networks.dynamics, networks.structure),
            "patches": self.patches.tolist(),
        }
        group = zarr.open_group(self.path, mode="a")
        if "rows_written" in group.attrs:
            if wrong := [k for k, v in about.items() if group.attrs.get(k) != v]:
                fact = f"Expected tokens of these encoders and subjects in '{self.path}', found "
                fact += f"other {listed(wrong)}"
                raise InputError(fact, "Give another path, or delete this cache")
            return group
        n, most = len(self.patches), max(1, int(self.patches.max()))
        shapes = {"dynamics": (f.parcels, most, f.width), "structure": (s.tokens, s.width)}
        for name, shape in shapes.items():
            sizes = {"shape": (n, *shape), "chunks": (1, *shape)}
            group.create_array(name, **sizes, dtype="uint16", overwrite=True)
        group.attrs.update({**about, "rows_written": 0})
        return group

    def _fill(self, group, feed, networks, device, progress):
        start, end = group.attrs["rows_written"], len(self.patches)
        if progress:
            tqdm.write(
                f"Token cache '{self.path}': {self.gigabytes:.3g} GB for {end} subjects, "
                f"{start} of them there"
            )
        for i in tqdm(range(start, end), desc="tokens", unit="subject", disable=not progress):
            try:
                with torch.no_grad(), autocast(device, feed.plan.precision):
                    self._write(group, i, feed, networks, device)
            except InputError as error:
                subject = feed.labels.subject.values[i]
                raise InputError(f"Subject '{subject}': {error.fact}", error.help) from error
            group.attrs["rows_written"] = i + 1

    def _write(self, group, i, feed, networks, device):
        reading = Reading([], [])
        if self.patches[i] or self.has_t1[i]:
            reading = feed.read_whole(i)
        (windows,), (structure,) = encode_parts(networks, [reading], device)
        if windows:
            both = zip(windows, reading.windows, strict=True)
            parts = [tokens.unflatten(0, window.shape[:2]) for tokens, window in both]
            group["dynamics"][i, :, : self.patches[i]] = _bits(torch.cat(parts, 1))
        if structure is not None:
            group["structure"][i] = _bits(structure)

    def __getstate__(self):  # opened again in each worker
        return self.__dict__ | {"_group": None}


def _patches(feed):
    """How many patches each subject's scan has, 0 without BOLD."""
    count = feed.config.dynamics.patch_count
    rows = zip(feed.need["bold"], feed.labels.n_volumes.values, feed.labels.tr.values, strict=True)
    return np.array([count(int(n), float(tr)) if has else 0 for has, n, tr in rows])


def _bits(tokens):
    return tokens.to(torch.bfloat16).cpu().contiguous().view(torch.uint16).numpy()


def _from_bits(values):
    return torch.from_numpy(np.ascontiguousarray(values)).view(torch.bfloat16)
