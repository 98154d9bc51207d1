"""A modality of one file goes the whole way: from a table beside the scans to the explorer."""

from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from morphometry import MEASURES, MORPHOMETRY
from tiny_runs import QUICK, tiny_cohort

import bhx
from bhx.data.files import READERS
from bhx.modalities.table import MODALITIES
from bhx.schema import build_cohort, dims_of

pytestmark = pytest.mark.filterwarnings("ignore:The representation is collapsing")  # of course
NAMES = ["bold", "t1", "morphometry"]
# importing it has put it into both tables; other tests do not know of it
READER = READERS.pop(MORPHOMETRY.name)
del MODALITIES[MORPHOMETRY.name]


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Both tables with it, as long as these tests run."""
    name = MORPHOMETRY.name
    with patch.dict(MODALITIES, {name: MORPHOMETRY}), patch.dict(READERS, {name: READER}):
        yield


@pytest.fixture(scope="module")
def cohort():
    """The tiny cohort with morphometry of all but one, thicker where people are of site B."""
    plain, random = tiny_cohort(), np.random.default_rng(5)
    n, rois = plain.sizes["subject"], plain.sizes["roi"]
    values = random.normal([2.5, 600], [0.2, 60], (n, rois, 2)).astype("float32")
    has = np.arange(n) != 8
    values[~has] = np.nan
    subject = {k: c.values for k, c in plain.coords.items() if c.dims == ("subject",)}
    roi = {k: c.values for k, c in plain.coords.items() if c.dims == ("roi",)}
    data = {"bold": plain.bold.values, "t1": plain.t1.values, "morphometry": values}
    return build_cohort(data, subject | {"has_morphometry": has}, roi, plain.attrs)


@pytest.fixture(scope="module")
def model(cohort, tmp_path_factory):
    """All stages trained on it."""
    out = tmp_path_factory.mktemp("run")
    for stage in ("structure", "dynamics", "harmonizer"):
        made = bhx.pretrain(cohort, stage=stage, out=out, **QUICK)
    return made


@pytest.fixture(scope="module")
def latents(cohort, model):
    keep = ("attention", MORPHOMETRY.tokens)
    return bhx.embed(cohort, model, keep=keep).compute()


def test_it_stands_in_the_table():
    assert list(MODALITIES) == ["bold", "coupling", "t1", "cubes", MORPHOMETRY.name]
    assert dims_of("cohort")["morphometry"] == ("subject", "roi", "measure")


def test_a_table_beside_the_scans_becomes_a_variable_of_the_cohort(tmp_path):
    atlas, random = bhx.load_atlas("schaefer100"), np.random.default_rng(0)
    rows, written = [], {}
    for i in range(3):
        scan, table = tmp_path / f"{i}_bold.csv", tmp_path / f"{i}_morphometry.csv"
        half = random.standard_normal((60, 50)).cumsum(0)  # left and right partners are alike
        both = np.hstack([half, half]) + 0.2 * random.standard_normal((60, 100))
        series = pd.DataFrame(both, columns=atlas.roi.values)
        series.to_csv(scan, index=False)
        each = pd.DataFrame(random.uniform(1, 4, (100, 2)), atlas.roi.values, MEASURES)
        each.iloc[::-1].rename_axis("parcel").to_csv(table)  # in another order of parcels
        rows.append({"subject": f"s{i}", "bold": str(scan), "morphometry": str(table), "tr": 2.0})
        written[f"s{i}"] = each
    rows.append({"subject": "s3", "bold": str(scan), "morphometry": "", "tr": 2.0})
    made = bhx.prepare(pd.DataFrame(rows), tmp_path / "c.zarr", atlas="schaefer100", denoising=None)
    assert made.morphometry.dims == ("subject", "roi", "measure")
    assert made.has_morphometry.values.tolist() == [True, True, True, False]
    assert made.measure.values.tolist() == MEASURES
    for subject, each in written.items():
        found = made.morphometry.sel(subject=subject).to_pandas()
        np.testing.assert_allclose(found.loc[each.index], each, rtol=1e-5)
    assert np.isnan(made.morphometry.sel(subject="s3")).all()


def test_it_is_trained_and_kept_with_the_weights(model, cohort):
    assert model.config.harmonizer.modalities == tuple(NAMES)
    assert model.config.harmonizer.numbers == (0, 0, 2)
    embedding = model.networks.encoder("morphometry")
    assert embedding.mean.shape == (100, 2)
    np.testing.assert_allclose(embedding.mean.mean(0), [2.5, 600], rtol=0.05)
    start = torch.linalg.svdvals(embedding.proj.weight)
    assert not torch.allclose(start, torch.ones(2), atol=1e-4)  # it learned along


def test_it_is_read_by_the_hub_tokens(latents, cohort, model):
    assert latents.modality.values.tolist() == NAMES
    np.testing.assert_allclose(latents.modality_share.sum("modality"), 1, rtol=1e-5)
    np.testing.assert_allclose(
        latents.hub_to_morphometry.sum("roi"),
        latents.modality_share.sel(modality="morphometry"),
        rtol=1e-5,
    )
    assert (latents.modality_share.sel(modality="morphometry", subject="s08") == 0).all()
    tokens = latents[MORPHOMETRY.tokens]
    assert tokens.dims == ("subject", "roi", "feature")
    assert tokens.notnull().all(("roi", "feature")).equals(cohort.has_morphometry)
    without = bhx.embed(cohort.drop_vars("morphometry"), model).hub
    assert not np.allclose(without, latents.hub, atol=1e-4)
    np.testing.assert_allclose(
        without.sel(subject="s08"), latents.hub.sel(subject="s08"), atol=1e-5
    )


def test_permuted_parcels_change_nothing(latents, cohort, model):
    order = np.random.default_rng(1).permutation(100)
    with pytest.warns(UserWarning, match="aligned by name"):
        mixed = bhx.embed(cohort.isel(roi=order), model).hub.compute()
    np.testing.assert_allclose(mixed, latents.hub, atol=1e-5)


def test_lesions_and_gradients_reach_it(cohort, model, latents):
    gone = bhx.lesion(cohort, model, modality="morphometry", intact=latents)
    assert (gone.relative.sel(subject="s00") > 0).all()
    assert np.allclose(gone.moved.sel(subject="s08"), 0, atol=1e-5)
    parcels = cohort.roi.values[:10]
    some = bhx.lesion(cohort, model, roi=parcels, intact=latents)
    assert (some.moved.sel(subject="s00") > 0).all()
    found = bhx.integrated_gradients(cohort, model, "s00", 1, steps=8)
    assert found.morphometry_part.dims == ("roi",)
    assert abs(found.attrs["gap"]) < 0.02


def test_its_map_is_drawn_and_explored(latents, cohort):
    values = bhx.region_map(latents, token=1, of="morphometry")
    expected = latents.hub_to_morphometry.isel(token=1, subject=latents.has_morphometry.values)
    np.testing.assert_allclose(values, expected.mean("subject"), rtol=1e-5)
    assert len(bhx.plot_surface(values).data) == 4
    assert any(t.name == "morphometry" for t in bhx.plot_tokens(latents).data)
    explorer = bhx.explore(latents, cohort)
    explorer.select_token(1)
    assert explorer.shares().shape == (4, 3)


def test_a_store_keeps_it(cohort, tmp_path):
    path = bhx.save_cohort(cohort, tmp_path / "c.zarr")
    xr.testing.assert_allclose(bhx.open_cohort(path).compute(), cohort)
