"""A scan read while it is measured equals the scan read afterwards."""

from __future__ import annotations

import numpy as np
import pytest

import bhx

MODEL = bhx.load_model("workshop")


@pytest.fixture(scope="module", params=[0.8, 2.0, 9.0], ids="TR {:g}".format)
def one(request):
    """A person with BOLD of four minutes and T1, in memory."""
    cohort = bhx.synthetic_cohort(3, seed=8, tr=request.param, minutes=4.0, missing=0.0)
    return cohort.isel(subject=[1]).load()


def volumes_of(cohort):
    n = int(cohort.n_volumes[0])
    return cohort.bold.values[0, :, :n].T.astype(float)


def begin(cohort, model=MODEL, **options):
    t1 = options.pop("t1", cohort.t1[0])
    return bhx.stream(model, tr=float(cohort.tr[0]), roi=cohort.roi.values, t1=t1, **options)


def close(a, b, of="hub", tol=1e-5):
    size = np.abs(b[of].values[np.isfinite(b[of].values)]).max()
    np.testing.assert_allclose(a[of].values, b[of].values, rtol=0, atol=tol * size)


def first(cohort, n):
    """The first n volumes of a cohort of one."""
    short = cohort.isel(time=slice(n))
    return short.assign_coords(n_volumes=("subject", [n]))


def test_equals_embed_whenever_it_is_asked(one):
    volumes, stream = volumes_of(one), begin(one, keep="attention")
    n = len(volumes)
    for stop in (int(n * 0.4), int(n * 0.7), n):
        stream.add(volumes[stream.volumes : stop])
        expected = bhx.embed(first(one, stop), MODEL, keep="attention").compute()
        found = stream.latents()
        for name in expected.data_vars:
            close(found, expected, name)
        assert found.n_volumes.item() == stop
        assert {k: found.attrs[k] for k in ("model", "weights_sha256", "scaling", "trs")} == {
            k: expected.attrs[k] for k in ("model", "weights_sha256", "scaling", "trs")
        }


def test_latents_come_with_each_patch_and_blocks_change_nothing(one):
    volumes, single, blocks = volumes_of(one), begin(one), begin(one)
    came = [i + 1 for i, v in enumerate(volumes) if single.add(v) is not None]
    patches = MODEL.config.dynamics.patch_count(len(volumes), float(one.tr[0]))
    assert len(came) == patches - 1  # two are needed for a coupling
    assert np.allclose(np.diff(came) * float(one.tr[0]), 35.28, atol=float(one.tr[0]))
    for part in np.array_split(volumes, 5):
        blocks.add(part)
    assert np.array_equal(single.latents().hub, blocks.latents().hub)


@pytest.mark.parametrize("name", ["paper", "encoders"])
def test_models_with_encoders(name):
    model = bhx.load_model("paper") if name == "paper" else small_base()
    cohort = bhx.synthetic_cohort(2, seed=4, tr=2.0, minutes=13.0, missing=0.0).isel(subject=[0])
    expected = bhx.embed(cohort, model, keep="dynamics").compute()  # longer than a window
    stream = begin(cohort.load(), model, keep="dynamics")
    stream.add(volumes_of(cohort))
    found = stream.latents()
    close(found, expected, tol=1e-4)
    close(found, expected, "dynamics", tol=1e-4)
    assert np.array_equal(found.onset, expected.onset)


def small_base():
    """Every modality: coupling and cubes beside the tokens of encoders."""
    from bhx.model.config import _WORKSHOP, relational

    return bhx.random_model(relational("all", _WORKSHOP, hubs=8, width=96, depth=1, heads=4))


def test_volumes_that_were_not_measured(one):
    volumes = volumes_of(one)
    at = len(volumes) // 3
    volumes[at : at + 2] = np.nan
    holed = one.copy(deep=True)
    holed.bold[0, :, : len(volumes)] = volumes.T
    expected = bhx.embed(holed, MODEL, missing_parcels="leave out").compute()
    stream = begin(one, missing_parcels="leave out")
    stream.add(volumes)
    close(stream.latents(), expected)


def test_other_parcel_order_and_no_t1(one):
    shuffled = one.isel(roi=np.random.default_rng(0).permutation(one.sizes["roi"]))
    stream = begin(shuffled, t1=None)
    stream.add(volumes_of(shuffled))
    close(stream.latents(), bhx.embed(one.drop_vars(["t1", "has_t1"]), MODEL).compute())
    assert not stream.latents().has_t1.any()


def test_robust_scaling(one):
    many = bhx.synthetic_cohort(12, seed=8, tr=2.0, minutes=3.0, missing=0.0)
    rng = np.random.default_rng(0)
    many["bold"] = many.bold + rng.normal(size=(12, 100, 1)).astype("f4")
    scaling = bhx.robust_scaling(many)
    stream = begin(one, scaling=scaling)
    stream.add(volumes_of(one))
    close(stream.latents(), bhx.embed(one, MODEL, scaling=scaling).compute())


def test_memory_is_flat_over_four_hours():
    stream, rng = bhx.stream(MODEL, tr=2.0), np.random.default_rng(0)

    def size():
        kept = vars(stream._running).values()
        return sum(v.nbytes for v in kept if isinstance(v, np.ndarray))

    sizes = []
    for _minute in range(0, 240, 10):
        for volume in rng.normal(size=(300, 100)) + 1000:
            stream._running.add(volume)
        sizes.append(size())
    assert stream._running.patches == pytest.approx(4 * 3600 / 35.28, abs=2)
    assert max(sizes) - min(sizes) < 100 * 8 * 30  # a patch of volumes, at most
    found = stream.latents()
    assert np.isfinite(found.hub.values).all()


@pytest.mark.parametrize(
    "volumes, seconds, says",
    [
        (np.ones(99), None, "volumes of 100 parcels, found .1, 99."),
        (np.where(np.arange(100) == 7, np.nan, 1.0), None, "found 1 without in 1 of 1: #7"),
        (np.ones(100), 12.0, r"a volume at 4 s .number 2 at TR 2 s., found 12 s: \+4.0 volumes"),
        (np.ones((2, 3, 100)), None, r"found \(2, 3, 100\)"),
    ],
    ids=["few parcels", "NaN parcel", "gap", "3D"],
)
def test_bad_volumes_are_refused_and_the_scan_goes_on(volumes, seconds, says):
    stream = bhx.stream(MODEL, tr=2.0)
    stream.add(np.ones((2, 100)))
    with pytest.raises(bhx.InputError, match=says):
        stream.add(volumes, seconds=seconds)
    assert stream.volumes == 2
    stream.add(np.ones(100), seconds=4.3)
    assert stream.volumes == 3


def test_many_parcels_and_no_volume_yet():
    stream = bhx.stream(bhx.random_model("workshop", atlas="schaefer400"), tr=2.0)
    assert stream.volumes == 0


def test_refusals_at_the_start():
    with pytest.raises(bhx.InputError, match="found 2000.*milliseconds"):
        bhx.stream(MODEL, tr=2000)
    with pytest.raises(bhx.InputError, match="exact in time, found 'stand-in'"):
        bhx.stream(bhx.random_model(bhx.STAND_IN), tr=2.0)
    with pytest.raises(bhx.InputError, match="2 patches .70.56 s. at least, found 0 in 0.00 s"):
        bhx.stream(MODEL, tr=2.0).latents()
    flat = bhx.stream(MODEL, tr=2.0)
    with pytest.raises(bhx.InputError, match="a constant series in 100 of 100"):
        flat.add(np.ones((60, 100)))
