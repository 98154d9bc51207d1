"""Laws of the door between labels and tensors: alignment, scaling, what is left out, embed."""

import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from test_checkpoints import TINY
from tiny_runs import HUB, tiny_cohort

import bhx
from bhx.data.atlas import load_atlas
from bhx.encode import embed as embed_file
from bhx.encode import inputs as inputs_file
from bhx.encode.embed import embed, robust_scaling
from bhx.encode.inputs import read_subject
from bhx.encode.model import Model, random_model
from bhx.errors import InputError
from bhx.modalities.bold import BOLD, patchify, wiener
from bhx.modalities.t1 import CROP, MNI_SHAPE, t1_grid
from bhx.modalities.t1 import scale_t1 as scaled_t1
from bhx.model.config import HarmonixConfig
from bhx.schema import ROI_COORDS, build_cohort, check

SUBJECTS = {  # TR [s], volumes, has T1
    "short": (2.0, 40, True),
    "quick": (0.72, 300, True),
    "long": (3.0, 300, True),  # 25 patches: two windows
    "bold": (2.0, 40, False),
    "t1": (np.nan, 0, True),
    "other": (0.8, 120, True),
}
KEEP = ("dynamics", "structure", "attention")


def make_cohort(subjects=SUBJECTS, seed=0, attrs=None):
    """Noise in every label's place: BOLD of brains' size, T1 zero outside a ball."""
    rng = np.random.default_rng(seed)
    atlas = load_atlas("schaefer100")
    n, longest = len(subjects), max(v for _, v, _ in subjects.values()) + 7
    bold = np.full((n, 100, longest), np.nan, np.float32)
    grid = t1_grid(4.0)
    ball = sum(a**2 for a in np.meshgrid(*grid.values(), indexing="ij")) < 60**2
    t1 = np.full((n, *ball.shape), np.nan, np.float32)
    for i, (_, volumes, has_t1) in enumerate(subjects.values()):
        slow = rng.standard_normal((100, volumes)).cumsum(1) * 20 + rng.normal(1e4, 1e3, (100, 1))
        bold[i, :, :volumes] = slow + rng.standard_normal((100, volumes)) * 50
        if has_t1:
            t1[i] = ball * rng.normal(800, 200, ball.shape)
    ids = list(subjects)
    volumes = np.array([v for _, v, _ in subjects.values()])
    return build_cohort(
        {"bold": bold, "t1": t1},
        {"subject": ids, "participant": ids, "site": list("ABCDEF")[:n],
         "tr": [tr for tr, _, _ in subjects.values()],
         "n_volumes": volumes, "has_bold": volumes > 0,
         "has_t1": [t for *_, t in subjects.values()], "age": np.arange(n) + 20.5},
        {k: atlas[k].values for k in ("roi", *ROI_COORDS)},
        attrs or {"atlas": "schaefer100", "source": "noise", "licence": "none"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def cohort():
    return make_cohort()


def tiny(patching="exact", **changes):
    return replace(TINY, dynamics=replace(TINY.dynamics, patching=patching), **changes)


@pytest.fixture(scope="module")
def model():
    return random_model(TINY, device="cpu")


@pytest.fixture(scope="module")
def tape():
    return random_model(tiny("tape"), device="cpu")


@pytest.fixture(scope="module")
def quick(cohort):
    return cohort.sel(subject=["quick"])


@pytest.fixture(scope="module")
def full(cohort, model):
    """Everything embed can keep, in memory."""
    return embed(cohort, model, keep=KEEP, attention="mean").compute()


def close(a, b, bound=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=bound)


def scaled(cohort, subject):
    """One scan as embed scales it."""
    series = bhx.scan(cohort, subject)
    return series.copy(data=BOLD.scale(series.values))


# What comes out ----------------------------------------------------------------------------------


def test_labels_travel_and_attributes_say_what_made_them(full, cohort, model):
    check(full, "latents")
    for name in ("subject", "participant", "site", "tr", "n_volumes", "age", "has_bold", "has_t1"):
        np.testing.assert_array_equal(full[name], cohort[name])
    for name in ("roi", *ROI_COORDS):
        assert full[name].values.tolist() == model.atlas[name].values.tolist()
    assert HarmonixConfig.from_dict(json.loads(full.attrs["config"])) == TINY
    assert full.attrs["trs"] == [0.72, 0.8, 2.0, 3.0]
    assert (full.attrs["scaling"], full.attrs["atlas"]) == ("zscore", "schaefer100")
    assert full.attrs["weights"] == "random weights, seed 0"
    assert json.loads(full.attrs["cohort"])["licence"] == "none"


def test_what_is_kept_has_its_place(full):
    assert full.hub.dims == ("subject", "token", "feature")
    assert dict(full.sizes) == {"subject": 6, "token": 4, "feature": 24, "roi": 100, "patch": 25,
                                "cx": 5, "cy": 6, "cz": 5, "modality": 2}  # fmt: skip
    patches = {"short": 2, "quick": 6, "long": 25, "bold": 2, "t1": 0, "other": 2}
    assert full.valid.sum("patch").values.tolist() == list(patches.values())
    for subject, count in patches.items():
        there = full.dynamics.sel(subject=subject).notnull().all(("roi", "feature"))
        assert there.values.tolist() == [p < count for p in range(25)]
    assert full.structure.notnull().all(("cx", "cy", "cz", "feature")).equals(full.has_t1)
    close(full.onset, np.arange(25) * 35.28)
    close(full.cx.diff("cx"), -32)


def test_attention_is_shared_out(full):
    shares = full.modality_share
    close(shares.sum("modality"), 1)
    close(full.hub_to_roi.sum("roi"), shares.sel(modality="bold"))
    close(full.hub_to_t1.sum(("cx", "cy", "cz")), shares.sel(modality="t1"))
    assert (shares.sel(subject="bold", modality="t1") == 0).all()
    assert (shares.sel(subject="t1", modality="bold") == 0).all()
    assert (full.hub_to_roi >= 0).all()


def test_embed_is_its_three_networks_on_scaled_data(full, cohort, model):
    t1 = cohort.t1.sel(subject="short").compute()
    structure = model.structure(t1.copy(data=scaled_t1(t1.values, 4.0)))
    dynamics = model.dynamics(scaled(cohort, "short"))
    close(full.structure.sel(subject="short"), structure)
    close(full.dynamics.sel(subject="short").isel(patch=slice(0, 2)), dynamics)
    close(full.hub.sel(subject="short"), model.harmonize(dynamics, structure))
    close(full.hub.sel(subject="bold"), model.harmonize(full.dynamics.sel(subject="bold")[:, :2]))
    close(full.hub.sel(subject="t1"), model.harmonize(None, full.structure.sel(subject="t1")))


def test_a_scan_longer_than_the_positions_is_its_windows(full, cohort, model):
    """Dynamics tokens are joined; hub tokens are the mean over windows, weighted by patches."""
    structure = full.structure.sel(subject="long")
    windows = [full.dynamics.sel(subject="long").isel(patch=p) for p in (range(13), range(13, 25))]
    hubs = [model.harmonize(w, structure) for w in windows]
    close(full.hub.sel(subject="long"), (13 * hubs[0] + 12 * hubs[1]) / 25)


def test_windows_joined_are_the_windows(tape):
    """Under TAPE a window is a piece of the scan, so it can be given alone."""
    series = scaled(make_cohort({"long": (3.0, 12 * 26, False)}), "long")
    whole = tape.dynamics(series)
    parts = [tape.dynamics(p, tr=3.0) for p in (series[:, : 12 * 13], series[:, 12 * 13 :])]
    close(whole, xr.concat(parts, "patch", coords="minimal", compat="override"))


def test_t1_only_and_fmri_only_cohorts(cohort, full, model):
    for only, keep in (("bold", "dynamics"), ("t1", "structure")):
        rows = cohort[f"has_{only}"]
        one = cohort[[only]].isel(subject=np.flatnonzero(rows))
        hub = embed(one, model, keep=keep).compute()
        assert hub.hub.notnull().all()
        close(hub[keep], full[keep].sel(subject=one.subject))
        for subject in one.subject.values:
            alone = one.sel(subject=[subject]).assign_coords({f"has_{only}": ("subject", [True])})
            close(embed(alone, model).hub[0], hub.hub.sel(subject=subject))


@pytest.mark.parametrize("patching", ["exact", "tape"])
def test_everything_can_be_kept_of_a_cohort_without_bold(cohort, patching, tmp_path):
    one = cohort[["t1"]].sel(subject=["t1"])
    model = random_model(tiny(patching), device="cpu")
    kept = embed(one, model, keep=KEEP, store=tmp_path / "a.zarr", progress=False).load()
    assert kept.sizes["patch"] == 0
    np.testing.assert_allclose(kept.modality_share.sel(modality="t1"), 1, rtol=1e-6)
    xr.testing.assert_equal(kept, embed(one, model, keep=KEEP).compute())


# What changes nothing ----------------------------------------------------------------------------


@pytest.mark.parametrize("patching", ["exact", "tape"])
def test_neither_company_nor_padding_changes_a_subject(cohort, patching):
    model = random_model(tiny(patching), device="cpu")
    together = embed(cohort, model, keep=KEEP).compute()
    padded = cohort.pad(time=(0, 50)).assign_coords(time=np.arange(cohort.sizes["time"] + 50))
    small = embed(padded, model, keep=KEEP, tokens_at_once=1).compute()
    for name in together.data_vars:
        close(together[name], small[name])
    for subject in cohort.subject.values:
        alone = embed(cohort.sel(subject=[subject]), model).hub[0]
        close(together.hub.sel(subject=subject), alone)


def test_permuted_subjects_permute_the_latents(cohort, full, model):
    order = [4, 2, 0, 5, 1, 3]
    permuted = embed(cohort.isel(subject=order), model, keep=KEEP, attention="mean").compute()
    for name in full.data_vars:
        close(permuted[name], full[name].isel(subject=order))
    xr.testing.assert_equal(permuted.subject, full.subject.isel(subject=order))


def test_permuted_parcels_are_aligned_by_name_and_said_so(cohort, full, model):
    order = np.random.default_rng(0).permutation(100)
    with pytest.warns(UserWarning, match="aligned by name to schaefer100, 7networks"):
        permuted = embed(cohort.isel(roi=order), model, keep=KEEP, attention="mean").compute()
    for name in full.data_vars:
        close(permuted[name], full[name])
    xr.testing.assert_equal(permuted.roi, full.roi)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed(cohort, model)
    dynamics = model.dynamics(scaled(cohort, "short"))
    close(model.dynamics(scaled(cohort.isel(roi=order), "short")), dynamics)
    close(model.harmonize(dynamics.isel(roi=order)), model.harmonize(dynamics))


def test_either_naming_of_schaefer400_is_read():
    """A model in the 17-network order reads a scan under 7-network names as its own."""
    c = tiny("tape", atlas="schaefer400", order="17networks")
    c = replace(c, dynamics=replace(c.dynamics, parcels=400),
                harmonizer=replace(c.harmonizer, places=(7200, 150)))  # fmt: skip
    model, seven = random_model(c, device="cpu"), load_atlas("schaefer400")
    series = np.random.default_rng(0).standard_normal((400, 40)).astype("float32")
    theirs = xr.DataArray(series, {"roi": seven.roi.values}, ("roi", "time"))
    place = seven.indexes["roi"].get_indexer(model.atlas.name7.values)
    ours = xr.DataArray(series[place], {"roi": model.atlas.roi.values}, ("roi", "time"))
    assert (place != np.arange(400)).sum() > 390
    close(model.dynamics(theirs, tr=2.0), model.dynamics(ours, tr=2.0))


def test_scanner_units_do_not_matter(cohort, full, model):
    gain = xr.DataArray(np.random.default_rng(0).uniform(0.1, 9, 100), dims="roi")
    other = cohort.assign(bold=(cohort.bold * gain + 100 * gain).astype("float32"))
    other["t1"] = cohort.t1 * 3
    close(embed(other, model).hub, full.hub, 1e-3)


def test_half_precision_is_near(cohort, full, model):
    rough = embed(cohort, model, precision="bfloat16")
    close(rough.hub, full.hub, 0.1)
    assert rough.attrs["precision"] == "bfloat16"


def test_a_relational_hub_in_half_precision_is_near(cohort):
    hub = random_model(HUB, device="cpu")
    whole, rough = (embed(tiny_cohort(), hub, precision=p).hub for p in ("float32", "bfloat16"))
    close(rough, whole, 0.1)
    assert not np.array_equal(rough, whole)


@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
@pytest.mark.parametrize("alike", [True, False])
def test_the_faster_precision_is_taken_if_hub_tokens_stay_alike(
    cohort, model, tmp_path, monkeypatch, faster, alike
):
    clock = iter([0, 1, 0, 2] if faster == "float32" else [0, 2, 0, 1])
    monkeypatch.setattr(embed_file, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(embed_file, "computes_bfloat16", lambda device: True)
    monkeypatch.setattr(embed_file, "ALIKE", 0.9 if alike else 1.1)
    chosen = faster if alike else "float32"
    store = tmp_path / "a.zarr"
    found = embed(cohort, model, precision="auto", store=store, progress=False)
    assert found.attrs["precision"] == chosen
    again = embed(cohort, model, precision="auto", store=store, progress=False)  # asks no clock
    xr.testing.assert_identical(again.load(), found.load())
    xr.testing.assert_equal(found, embed(cohort, model, precision=chosen).compute())


def test_a_processor_without_half_precision_keeps_the_whole(cohort, model, monkeypatch):
    monkeypatch.setattr(embed_file, "computes_bfloat16", lambda device: False)
    assert embed(cohort, model, precision="auto").attrs["precision"] == "float32"


def test_a_batch_without_room_is_halved_and_said(cohort, full, model, monkeypatch):
    encode = embed_file.run_networks
    monkeypatch.setattr(embed_file, "run_networks", with_room_for(2, encode))
    with pytest.warns(UserWarning, match="no room for a whole batch, which was halved"):
        found = embed(cohort, model, tokens_at_once=10**6).hub.compute()
    close(found, full.hub)
    monkeypatch.setattr(embed_file, "run_networks", with_room_for(0, encode))
    with pytest.raises(InputError, match="room for one subject on cpu, found too little: CUDA out"):
        embed(cohort.isel(subject=[0]), model).compute()


def with_room_for(few, encode):
    """Networks on a device that has room for so many subjects."""

    def run(networks, readings, *more):
        if len(readings) > few:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return encode(networks, readings, *more)

    return run


# What is left out --------------------------------------------------------------------------------


def broken(cohort, **values):
    """A cohort of one with some numbers replaced: name=(index, value)."""
    out = cohort.copy(deep=True)
    for name, (index, value) in values.items():
        out[name][(0, *index)] = value
    return out


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("patching", ["exact", "tape"])
def test_volumes_that_are_missing_leave_out_exactly_their_tokens(quick, patching, value):
    model = random_model(tiny(patching), device="cpu")
    hole = broken(quick, bold=((7, slice(100, 103)), value))
    kept = embed(hole, model, keep=KEEP, missing_parcels="leave out").sel(subject="quick").compute()
    expected = np.ones((100, 7), bool)[:, : int(kept.valid.sum())]
    if patching == "tape":
        expected[7, [100 // 49, 102 // 49]] = False
    else:
        reads = wiener(0.72, 300, 6 * 48)[0].reshape(6, -1)
        expected[7] = [not (set(range(100, 103)) & set(p)) for p in reads]
    there = kept.dynamics.isel(patch=slice(0, expected.shape[1])).notnull().all("feature")
    assert not expected.all()
    np.testing.assert_array_equal(there, expected)
    assert kept.hub.notnull().all()
    without = kept.dynamics.isel(patch=slice(0, expected.shape[1]))
    close(model.harmonize(without, kept.structure), kept.hub)


@pytest.mark.parametrize("value", [np.nan, 5.0, -np.inf])
def test_parcels_without_signal_leave_out_exactly_their_tokens(quick, model, value):
    hole = broken(quick, bold=((slice(3, 5),), value))
    kept = embed(hole, model, keep=KEEP, missing_parcels="leave out").compute()
    there = kept.dynamics.sel(subject="quick").isel(patch=slice(0, 6)).notnull().all("feature")
    np.testing.assert_array_equal(there, np.isin(np.arange(100), [3, 4], invert=True)[:, None] &
                                  np.ones((1, 6), bool))  # fmt: skip
    assert (kept.hub_to_roi.sel(subject="quick").isel(roi=[3, 4]) == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_missing_leave_out_exactly_their_cubes(quick, model, value):
    kept = embed(broken(quick, t1=((8, 17, 39), value)), model, keep=KEEP).sel(subject="quick")
    there = kept.structure.notnull().all("feature").compute()
    assert not there[1, 2, 4]
    assert there.sum() == 149
    assert (kept.hub_to_t1[:, 1, 2, 4] == 0).all()


def test_bold_that_is_all_missing_is_no_bold(quick, full, model):
    hole = broken(quick, bold=((), np.nan))
    kept = embed(hole, model, keep=KEEP, missing_parcels="leave out").sel(subject="quick")
    close(kept.hub, model.harmonize(None, full.structure.sel(subject="quick")))
    assert not kept.valid.any()


def test_a_subject_without_any_data_is_refused(quick, model):
    hole = broken(quick, bold=((), np.nan)).drop_vars("t1")
    with pytest.raises(InputError, match="Subject 'quick': .*finite data, found none"):
        embed(hole, model, missing_parcels="leave out").compute()


# Scaling -----------------------------------------------------------------------------------------


def test_parcels_are_scored_in_time():
    bold = np.random.default_rng(0).normal(1e4, 30, (5, 300))
    out = BOLD.scale(bold)
    close(out.mean(1), 0)
    close(out.std(1), 1)
    bold[2, 50] = np.nan
    partly = BOLD.scale(bold, missing="leave out")
    close(np.delete(partly, 2, 0), np.delete(out, 2, 0))
    close(np.nanstd(partly[2]), 1)


def test_t1_is_scored_over_the_whole_volume_then_cropped():
    """Background and cropped margin count, as in the release."""
    x, y, z = (slice(c, n - c) for c, n in zip(CROP, MNI_SHAPE, strict=True))
    whole = np.zeros(MNI_SHAPE)
    rng = np.random.default_rng(0)
    whole[x, y, z][30:130, 40:150, 30:120] = rng.normal(700, 100, (100, 110, 90))
    by_hand = ((whole - whole.mean()) / (whole.std() + 1e-9))[x, y, z]
    close(scaled_t1(whole[x, y, z].astype("float32"), 1.0), by_hand)


def test_the_released_scaling_is_fitted_on_the_subjects_given(cohort, model):
    has = cohort.isel(subject=[0, 1, 2, 3])
    fit = robust_scaling(has)
    means = has.bold.mean("time").values
    low, middle, high = np.quantile(means, [0.25, 0.5, 0.75], axis=0)
    np.testing.assert_allclose(fit["median"], middle, rtol=1e-5)
    np.testing.assert_allclose(fit["iqr"], high - low, rtol=1e-4)
    latents = embed(cohort, model, scaling=fit, keep="dynamics")
    series = bhx.scan(cohort, "short")
    by_hand = (series - fit["median"].drop_vars(fit.coords)) / fit["iqr"].drop_vars(fit.coords)
    dynamics = model.dynamics(by_hand.transpose("roi", "time").astype("float32"), tr=2.0)
    close(latents.dynamics.sel(subject="short").isel(patch=slice(0, 2)), dynamics, 1e-4)
    assert latents.attrs["scaling"].startswith("cohort-robust ")
    order = np.random.default_rng(0).permutation(100)
    close(embed(cohort, model, scaling=fit.isel(roi=order)).hub, latents.hub)


def test_series_without_a_mean_cannot_be_scaled_as_released(cohort):
    flat = cohort.assign(bold=cohort.bold * 0)
    with pytest.raises(InputError, match="mean differs between subjects, found constant"):
        robust_scaling(flat)


# What is refused, before any work ----------------------------------------------------------------


def unread(cohort):
    """The cohort with data that must not be read."""
    import dask.array as da

    def fail(block):
        raise AssertionError("data were read")

    return cohort.map(
        lambda v: v.copy(data=da.from_array(v.values, chunks=(1, -1, -1, -1)[: v.ndim]).map_blocks(
            fail, dtype="float32", meta=np.zeros((0,) * v.ndim, "float32")))
    )  # fmt: skip


def renamed(cohort, **changes):
    names = cohort.roi.values.astype(object)
    for i, name in changes.items():
        names[int(i[1:])] = name
    return cohort.assign_coords(roi=names.astype(str))


def with_coord(cohort, name, subject, value):
    values = cohort[name].values.copy()
    values[list(SUBJECTS).index(subject)] = value
    return cohort.assign_coords({name: ("subject", values)})


def ids(cohort, *names):
    return cohort.assign_coords(subject=list(names))


REFUSED = {
    "unknown name": (lambda c: renamed(c, r3="V1"), "100 parcels of schaefer100, .*unknown: V1"),
    "repeated name": (
        lambda c: renamed(c, r3=str(c.roi.values[4])), "unique parcel names on the dim 'roi'"
    ),
    "missing names": (
        lambda c: c.isel(roi=slice(2, None)), "found 98 names; missing: 7Networks_LH_Vis_1, 7Netw"
    ),
    "another atlas": (
        lambda c: c.assign_attrs(atlas="schaefer200"),
        r"schaefer100 \(100\), which these weights were trained on, found schaefer200",
    ),
    "numbered parcels": (lambda c: c.assign_coords(roi=np.arange(100)), "unknown: 0, 1, 2, 3, 4"),
    "no tr": (lambda c: with_coord(c, "tr", "quick", np.nan), "time .* found nan of quick"),
    "zero tr": (lambda c: with_coord(c, "tr", "quick", 0), "above 0 .* found 0 of quick"),
    "milliseconds": (
        lambda c: with_coord(c, "tr", "quick", 720), "found 720 of quick; .*milliseconds"
    ),
    "no tr at all": (lambda c: c.drop_vars("tr"), "the coordinate 'tr' on subject"),
    "short scan": (
        lambda c: with_coord(c, "n_volumes", "bold", 17),
        r"one patch \(35.28 s\), found 17 volumes at TR 2 s = 34.0 s in 'bold'",
    ),
    "other t1": (
        lambda c: c.isel(x=slice(1, None)), r"a T1 of \(40, 48, 40\) voxels of 4 mm, found \(39"
    ),
    "flipped t1": (
        lambda c: c.isel(x=slice(None, None, -1)), "'x' from 77.5 to -78.5 mm, .*axis is flipped"
    ),
    "shifted t1": (lambda c: c.assign_coords(y=c.y + 2), "'y' from -111.5 .*Resample it"),
    "t1 without coordinates": (lambda c: c.drop_vars("z"), "MNI coordinates .* on 'z', found none"),
    "empty": (lambda c: c.isel(subject=[]), "at least one subject, found none"),
    "same ids": (
        lambda c: ids(c, "a", "b", "a", "d", "e", "f"), "unique subject ids, found a more than once"
    ),
    "no ids": (lambda c: c.drop_vars("subject"), "unique ids on the dim 'subject', found no ids"),
    "no data": (lambda c: c.drop_vars(["bold", "t1"]), "cohort with 'bold' or 't1', found none"),
    "an array": (lambda c: c.bold, "as an xarray.Dataset, found DataArray"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_cohort_that_does_not_fit_is_refused_unread(cohort, model, name, tmp_path):
    change, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        embed(change(unread(cohort)), model, store=tmp_path / "a.zarr")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep": "tokens"}, "keep to be dynamics, structure, attention, found 'tokens'"),
        ({"keep": ("dynamics", 3)}, "found 3"),
        ({"missing_parcels": "ignore"}, "missing_parcels to be refuse, leave out, found 'ignore'"),
        ({"precision": "float16"}, "precision to be float32, bfloat16, auto, found 'float16'"),
        ({"attention": "first"}, "attention to be last, mean, rollout, found 'first'"),
        ({"scaling": "robust"}, "'zscore' or a Dataset of robust_scaling, found 'robust'"),
    ],
)
def test_unknown_options_are_refused(cohort, model, options, message):
    with pytest.raises(InputError, match=message):
        embed(unread(cohort), model, **options)


@pytest.mark.parametrize(
    "index, value, message",
    [
        ((7, 4), np.nan, "NaN or infinite values in 1 of 100 .*LH_Vis_8"),
        ((7, 4), np.inf, "NaN or infinite values in 1 of 100"),
        ((slice(0, 3),), 5.0, r"a constant series in 3 of 100 \(7Networks_LH_Vis_1, .*Vis_3\)"),
        ((slice(0, 7),), np.nan, "in 7 of 100 .*and 2 more"),
    ],
)
def test_parcels_without_signal_are_refused(quick, model, index, value, message):
    with pytest.raises(InputError, match="Subject 'quick': .*" + message):
        embed(broken(quick, bold=(index, value)), model).compute()


def test_a_constant_t1_is_refused(quick, model):
    with pytest.raises(InputError, match="Subject 'quick': .*some contrast"):
        embed(broken(quick, t1=((), 0)), model).compute()


def test_bare_networks_refuse_what_does_not_fit(cohort, model):
    series, t1 = scaled(cohort, "short"), cohort.t1.sel(subject="short")
    for call, message in (
        (lambda: model.dynamics(series.T), r"dims \('roi', 'time'\), found \('time', 'roi'\)"),
        (lambda: model.dynamics(series.drop_vars("time")), "the scan's TR, found none"),
        (lambda: model.dynamics(series, tr=2000), "found 2000; this looks like milliseconds"),
        (lambda: model.dynamics(series[:, :1]), "the scan's TR, found none"),
        (lambda: model.dynamics(series[:50]), "found 50 names; missing"),
        (lambda: model.structure(t1[1:]), r"T1 of \(40, 48, 40\) voxels of 4 mm, found \(39"),
        (lambda: model.structure(t1[:, ::-1]), "'y' .*axis is flipped"),
        (lambda: model.harmonize(), "a subject with data tokens, found none"),
        (lambda: model.kernels(0), "repetition time in seconds"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    long = model.dynamics(scaled(cohort, "long"))
    with pytest.raises(InputError, match=r"at most \(100, 18\) on .*, found \(100, 25\)"):
        model.harmonize(long)


def test_a_finer_t1_is_averaged(cohort, model, full):
    fine = cohort.t1.isel(subject=[0]).fillna(0)
    fine = np.repeat(np.repeat(np.repeat(fine.values, 2, 1), 2, 2), 2, 3)
    labels = {k: c.values[:1] for k, c in cohort.coords.items() if c.dims == ("subject",)}
    fine = build_cohort({"t1": fine}, labels)
    kept = embed(fine, model, keep="structure")
    close(kept.structure[0], full.structure[0])


# Stores ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(cohort, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "a.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed(cohort, model, keep=KEEP, attention="mean", store=path, progress=False)
    return path


def test_stored_equals_lazy(stored, full, cohort, model):
    lazy = embed(cohort, model, keep=KEEP, attention="mean")
    assert all(v.chunks for v in lazy.data_vars.values())
    again = embed(cohort, model, keep=KEEP, attention="mean", store=stored, progress=False)
    xr.testing.assert_equal(again.load(), full)
    assert again.attrs == full.attrs
    assert again.participant.dtype == full.participant.dtype


def test_latents_open_with_xarray_alone(stored, full):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = xr.open_zarr(stored, consolidated=False).load()
    xr.testing.assert_equal(plain, full)
    check(plain, "latents")
    types = {name: str(a.metadata.data_type) for name, a in zarr.open_group(stored).arrays()}
    assert {types[n] for n in ("subject", "site", "roi", "modality")} == {"VariableLengthUTF8()"}
    assert zarr.open_group(stored)["hub"].chunks == (1, 4, 24)


KILLED = """
import os, signal, sys, time
from pathlib import Path
from bhx.encode import embed as embed_file, inputs as inputs_file, model as model_file
from test_encoding import TINY, make_cohort
calls, encode = [], inputs_file.run_networks
def killing(*args):
    calls.append(0)
    if len(calls) == 4:  # the first three are being written meanwhile
        while len(list(Path(sys.argv[1]).glob("*/written/*-*"))) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*args)
embed_file.run_networks = killing
model = model_file.random_model(TINY, device="cpu")
embed_file.embed(make_cohort(), model, store=sys.argv[1], keep=("dynamics", "attention"),
               tokens_at_once=1, progress=False)
"""


def test_a_killed_store_continues_and_equals_an_unbroken_one(cohort, model, tmp_path, monkeypatch):
    path, options = tmp_path / "a.zarr", {"keep": ("dynamics", "attention"), "tokens_at_once": 1}
    folders = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(bhx.__path__[0])])
    run = subprocess.run(
        [sys.executable, "-c", KILLED, path],
        env={**os.environ, "PYTHONPATH": folders}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == -signal.SIGKILL, run.stderr
    with pytest.raises(InputError, match="still being written. Run the same call again"):
        check(xr.open_zarr(path, consolidated=False), "latents")
    written = {p: p.stat().st_mtime_ns for p in path.glob("hub/c/*/0/0")}
    assert len(written) == 3
    lost = sorted(path.glob("*/written/*-*"))[1]
    lost.unlink()  # as if killed before the row was whole

    computed, encode = [], inputs_file.run_networks
    monkeypatch.setattr(
        embed_file, "run_networks", lambda n, r, *a: computed.append(len(r)) or encode(n, r, *a)
    )
    continued = embed(cohort, model, store=path, progress=False, **options)
    assert computed == [1] * 4  # that row and the three that were never begun
    unbroken = embed(cohort, model, store=tmp_path / "b.zarr", progress=False, **options)
    xr.testing.assert_identical(continued.load(), unbroken.load())
    kept = [p for p in written if p.parts[-3] != lost.name.partition("-")[0]]
    assert len(kept) == 2
    assert all(p.stat().st_mtime_ns == written[p] for p in kept)
    computed.clear()
    embed(cohort, model, store=path, progress=False, **options)
    assert not computed


def test_a_store_killed_at_its_birth_is_begun_again(quick, model, tmp_path):
    (tmp_path / "a.zarr.part" / "hub").mkdir(parents=True)
    (tmp_path / "a.zarr.part" / "zarr.json").write_text("{")
    kept = embed(quick, model, store=tmp_path / "a.zarr", progress=False)
    assert kept.hub.notnull().all()
    assert {p.name for p in tmp_path.iterdir()} == {"a.zarr", ".a.zarr.lock"}


OTHERS = {
    "weights": lambda c, m: (c, random_model(TINY, seed=1, device="cpu"), {}),
    "config": lambda c, m: (c, random_model(tiny("tape"), device="cpu"), {}),
    "cohort": lambda c, m: (c.assign_attrs(seed=5), m, {}),
    "subjects": lambda c, m: (ids(c, *"abcdef"), m, {}),
    "scaling": lambda c, m: (c, m, {"scaling": robust_scaling(c)}),
    "keep": lambda c, m: (c, m, {"keep": ()}),
    "attention": lambda c, m: (c, m, {"attention": "last"}),
    "precision": lambda c, m: (c, m, {"precision": "bfloat16"}),
    "missing_parcels": lambda c, m: (c, m, {"missing_parcels": "leave out"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_store_of_something_else_is_not_continued(stored, cohort, model, name):
    other, by, options = OTHERS[name](cohort, model)
    options = {"keep": KEEP, "attention": "mean"} | options
    with pytest.raises(InputError, match=f"found another .*{name}"):
        embed(unread(other), by, store=stored, progress=False, **options)


def test_two_robust_fits_are_told_apart(cohort, model):
    fits = [robust_scaling(cohort.isel(subject=i)) for i in ([0, 1, 2], [1, 2, 3])]
    one, two = (embed(cohort, model, scaling=f).attrs["scaling"] for f in fits)
    assert one != two


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_store_is_left_alone(cohort, model, tmp_path, kind):
    path = tmp_path / "there"
    path.mkdir() if kind == "folder" else path.write_text("precious")
    with pytest.raises(InputError, match="latents or nothing at .*there', found something else"):
        embed(unread(cohort), model, store=path)
    assert path.is_dir() if kind == "folder" else path.read_text() == "precious"


MEMORY = """
import resource, sys, tempfile
import dask.array as da, numpy as np
from bhx import embed, random_model
from test_encoding import TINY, make_cohort
model = random_model(TINY, device="cpu")
one = make_cohort({"a": (2.0, 40, True)})
long = np.full((1, 100, 40_000), np.nan, "float32")  # 16 MB a subject, nearly all padding
long[:, :, :47] = one.bold.values

def cohort(n):
    names = [f"s{i}" for i in range(n)]
    rows = one.drop_vars(["bold", "t1", "time"]).isel(subject=[0] * n).assign_coords(subject=names)
    bold = da.concatenate([da.from_delayed(dask.delayed(long.copy)(), long.shape, "float32")] * n)
    return rows.assign(bold=(one.bold.dims, bold)), rows

import dask
def peak(n):
    data, _ = cohort(n)
    data = data.assign_coords(has_t1=("subject", [False] * n))
    with tempfile.TemporaryDirectory() as folder:
        embed(data, model, store=folder + "/a.zarr", tokens_at_once=900, progress=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
few = peak(8)
print(few, peak(32))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource is not there")
def test_memory_does_not_grow_with_the_cohort():
    folders = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(bhx.__path__[0])])
    run = subprocess.run(
        [sys.executable, "-c", MEMORY],
        env={**os.environ, "PYTHONPATH": folders}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    few, many = map(float, run.stdout.split())
    assert many - few < 150  # MB; 24 more subjects hold 384


# The model itself --------------------------------------------------------------------------------


def test_a_model_travels_to_another_process(cohort, full, model):
    other = pickle.loads(pickle.dumps(model))
    close(embed(cohort, other).hub, full.hub)


def test_what_a_model_says_of_itself(model, tape):
    assert "4 hub tokens x 24" in repr(model)
    about = model.describe()
    assert json.loads(about.attrs["config"]) == json.loads(json.dumps(asdict(TINY)))
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in model.networks.named_children()}
    assert dict(zip(about.part.values.tolist(), about.parameters.values, strict=True)) == sizes


@pytest.mark.parametrize("tr, k", [(0.735, 48), (2.0, 18), (3.0, 12)])
def test_kernels_are_those_the_patches_meet(model, tape, tr, k):
    kernel = tape.kernels(tr)
    assert kernel.dims == ("feature", "seconds")
    close(kernel.seconds, np.arange(k) * tr)
    series = np.random.default_rng(0).standard_normal((100, 3 * k)).astype("float32")
    patches = torch.from_numpy(patchify(series, tr, tape.config.dynamics))
    with torch.no_grad():
        embedded = tape.networks.dynamics.embed(patches)
    bias = tape.networks.dynamics.patch_embed.proj.bias.detach()
    by_hand = series.reshape(100, 3, k) @ kernel.values.T
    close(embedded - bias, by_hand, 1e-4)
    assert model.kernels(tr).sizes["seconds"] == 48
    assert model.kernels(tr).equals(model.kernels(0.735))


def test_a_reading_can_be_made_without_labels(model):
    """read_subject is what training and attributions use."""
    bold = np.random.default_rng(0).normal(1e4, 30, (100, 300))
    reading = read_subject({"bold": bold}, {"tr": 3.0, "n_volumes": 300}, model.config)
    assert [w.shape for w in reading.windows["bold"]] == [(100, 13, 48), (100, 12, 48)]
    assert [len(k) for k in reading.there["bold"]] == [1300, 1200]
    assert list(reading.windows) == ["bold"]


def test_models_need_no_grid_of_their_own():
    assert isinstance(random_model("paper", device="cpu"), Model)
    with pytest.raises(InputError, match="Shipped weights are"):
        bhx.load_model("no such model")


# Many workers ---


def bytes_of(store):
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}


def test_workers_write_what_one_process_writes(cohort, model, tmp_path):
    from distributed import Client

    how = {"keep": ("attention",), "tokens_at_once": 1, "progress": False}
    embed(cohort, model, store=tmp_path / "alone.zarr", **how)
    with Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        embed(cohort, model, store=tmp_path / "shared.zarr", client=client, **how)
        address = client.scheduler.address
        embed(cohort, model, store=tmp_path / "again.zarr", client=address, **how)
    alone = bytes_of(tmp_path / "alone.zarr")
    assert bytes_of(tmp_path / "shared.zarr") == alone
    assert bytes_of(tmp_path / "again.zarr") == alone


def test_a_cluster_that_does_not_answer_is_said(cohort, model, tmp_path):
    with pytest.raises(InputError, match="a Dask cluster that answers, found .*correct the addr"):
        embed(cohort, model, store=tmp_path / "a.zarr", client="tcp://127.0.0.1:9", progress=False)
    with pytest.raises(InputError, match="a store for the workers"):
        embed(cohort, model, client="tcp://127.0.0.1:9")
