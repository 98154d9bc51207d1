"""Hub tokens of a scan while it is measured."""

from __future__ import annotations

import dask.array as da
import numpy as np
import torch
import xarray as xr

from bhx.data.atlas import parcel_labels
from bhx.encode.embed import Options, aligned_to, filled, scaling_of, template_of
from bhx.encode.inputs import Reading, run_networks
from bhx.encode.model import Model, check_model
from bhx.errors import InputError, check_choice, listed
from bhx.modalities.bold import BOLD, check_parcels, check_tr
from bhx.modalities.running import Running
from bhx.modalities.t1 import ANATOMY
from bhx.schema import build_cohort


def stream(
    model: Model,
    *,
    tr: float,
    roi=None,
    t1: xr.DataArray | None = None,
    subject: str = "stream",
    keep=(),
    scaling: str | xr.Dataset | None = None,
    missing_parcels: str = "refuse",
) -> Stream:
    """Read a scan while it is measured: volumes in, hub tokens out.

    Parameters
    ----------
    model : from load_model, with patches that are exact in time
    tr : repetition time [s]
    roi : names of the parcels in the volumes to come; by default the model's, in its order
    t1 : the person's T1 (x, y, z), as in a cohort, where there is one
    subject : id that the latents have
    keep, scaling, missing_parcels : as of `bhx.embed`

    Returns
    -------
    Stream
        `add` takes volumes; `latents` gives what there is so far. After the last volume it equals
        `bhx.embed` of the whole scan within 1e-5. What a model reads of coupling alone takes the
        same memory however long the scan is; one with an encoder of BOLD keeps all patches.

    Examples
    --------
    >>> stream = bhx.stream(model, tr=0.72)
    >>> for volume in scanner:  # (roi,)
    ...     latents = stream.add(volume)
    ...     if latents is not None:  # a patch of 35.28 s has become whole
    ...         show(bhx.region_map(latents, token=17))
    """
    check_model(model)
    check_tr(tr)
    check_choice("missing_parcels", missing_parcels, ("refuse", "leave out"))
    config = model.config
    if config.dynamics.patching != "exact":
        fact = f"Expected a model with patches that are exact in time, found '{config.name}'"
        raise InputError(fact, "Take another, such as bhx.load_model('workshop')")
    if BOLD.variable not in {m.variable for m in config.modalities.values()}:
        fact = f"Expected a model that reads {BOLD.variable}, found one of "
        raise InputError(fact + listed(config.modalities), "Take another: bhx.load_model()")
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    options = Options(model, keep, scaling_of(scaling, model), missing_parcels, "last", "float32")
    return Stream(options, float(tr), model.atlas.roi.values if roi is None else roi, t1, subject)


class Stream:
    """A scan that is still running; made by `bhx.stream`.

    Attributes
    ----------
    volumes : how many were added
    seconds : their time [s]
    """

    def __init__(self, options: Options, tr: float, roi, t1, subject: str):
        self._options, self._t1, self._subject = options, t1, subject
        self._index = options.model.positions_of(np.asarray(roi))
        config = options.model.config
        self._here = {k: m for k, m in config.modalities.items() if m.variable == BOLD.variable}
        keep_patches = config.encodes(BOLD)
        self._running = Running(tr, config.dynamics, keep_patches)
        self._parcels, self._shown = len(np.asarray(roi)), 0
        fixed = aligned_to(self._cohort().drop_vars(BOLD.variable), options.model)  # checks the T1
        self._t1 = fixed.get(ANATOMY.variable)

    def __repr__(self):
        tr, name = self._running.tr, self._options.model.config.name
        return (
            f"bhx stream into '{name}': {self.volumes} volumes, {self.seconds:g} s at TR {tr:g} s"
        )

    @property
    def volumes(self) -> int:
        return self._running.volumes

    @property
    def seconds(self) -> float:
        return self.volumes * self._running.tr

    def add(self, volumes, seconds: float | None = None) -> xr.Dataset | None:
        """Take the next volume (roi,), or several (time, roi).

        Parameters
        ----------
        volumes : one that is NaN throughout was not measured: patches that read it are left out
        seconds : time [s] of the first of them since the scan began, if known: gaps are refused

        Returns
        -------
        Latents when a patch has become whole, else None.

        Raises
        ------
        InputError
            The volumes do not fit the parcels, the time or one another: then nothing is taken, and
            the scan goes on. Or a patch has become whole and parcels have no signal as yet.
        """
        volumes = np.atleast_2d(np.asarray(volumes, float))
        self._check(volumes, seconds)
        for volume in volumes[:, self._index]:
            self._running.add(volume)
        patches = self._running.config.patch_count(self.volumes, self._running.tr)
        if patches == self._shown or patches < self._least:
            return None
        self._shown = patches
        return self.latents()

    @torch.no_grad()
    def latents(self) -> xr.Dataset:
        """Latents of the scan so far, as of `bhx.embed`, with one subject.

        Raises
        ------
        InputError
            The scan is too short as yet, or parcels have no signal.
        """
        config, options = self._options.model.config, self._options
        if (patches := config.dynamics.patch_count(self.volumes, self._running.tr)) < self._least:
            need = self._least * config.dynamics.patch_seconds
            fact = f"Expected {self._least} patches ({need:.2f} s) at least, found {patches}"
            raise InputError(f"{fact} in {self.seconds:.2f} s", "Add more volumes first")
        middle, width = self._running.level()
        names = options.model.atlas.roi.values
        if options.missing_parcels == "refuse":
            check_parcels(width > 0, np.isfinite(width), names)
        if not isinstance(options.scaling, str):
            middle, width = options.scaling[0], np.where(width > 0, options.scaling[1], 0)
        reading = Reading()
        for name, modality in config.modalities.items():
            if name in self._here:
                reading.add(modality, modality.so_far(self._running, config, middle, width))
            elif self._t1 is not None and modality.variable == ANATOMY.variable:
                values = modality.scale(self._t1.values[0], config)
                reading.add(modality, modality.cut(values, {}, config))
        device, networks = options.model.device, options.model.networks
        done = run_networks(networks, [reading], device, options.keep, options.attention)
        template = template_of(self._cohort(), options)
        values = filled(done, {name: v.shape[1:] for name, v in template.data_vars.items()})
        return template.assign({name: (template[name].dims, v) for name, v in values.items()})

    @property
    def _least(self):
        return max(modality.least for modality in self._here.values())

    def _check(self, volumes, seconds):
        if volumes.ndim != 2 or volumes.shape[1] != self._parcels:
            fact = f"Expected volumes of {self._parcels} parcels, found {volumes.shape}"
            raise InputError(fact, "Give (roi,) or (time, roi), and names as bhx.stream(roi=)")
        partly = np.isfinite(volumes).any(1) & ~np.isfinite(volumes).all(1)
        if partly.any():
            lacking = np.flatnonzero(~np.isfinite(volumes[partly]).all(0))
            fact = f"Expected volumes with a number for each parcel, found {len(lacking)} without"
            fact += f" in {int(partly.sum())} of {len(volumes)}: #{listed(lacking)}"
            raise InputError(fact, "Give a volume that was not measured as NaN throughout")
        if seconds is not None and abs(seconds - self.seconds) > self._running.tr / 2:
            late = (seconds - self.seconds) / self._running.tr
            fact = f"Expected a volume at {self.seconds:g} s (number {self.volumes} at TR "
            fact += f"{self._running.tr:g} s), found {seconds:g} s: {late:+.1f} volumes"
            raise InputError(fact, "Add the missing volumes as NaN, or begin again with another tr")

    def _cohort(self):
        """What of a cohort says who and how long this scan is; its BOLD is not kept."""
        atlas, n = self._options.model.atlas, self.volumes
        data = {BOLD.variable: da.empty((1, atlas.sizes["roi"], n), dtype="float32", chunks=-1)}
        subject = {"subject": [self._subject], "participant": [self._subject], "site": [""]}
        subject |= {"tr": [self._running.tr], "n_volumes": [n]}
        subject |= {BOLD.has: [True], ANATOMY.has: [self._t1 is not None]}
        if self._t1 is not None:
            data[ANATOMY.variable] = self._t1.values.reshape(1, *self._t1.shape[-3:])
        about = {"atlas": self._options.model.config.atlas, "source": "stream"}
        return build_cohort(data, subject, parcel_labels(atlas), about)
