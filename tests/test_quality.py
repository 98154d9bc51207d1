"""The quality page: nothing is left out, the conspicuous come first, no name can run as code."""

import re

import numpy as np
import pytest
import xarray as xr
from small_cohorts import brains_of

from bhx.data.quality_page import quality_page
from bhx.errors import InputError

NASTY = "<script>alert('x')</script>"


def checked(n=4):
    """A cohort as `prepare` leaves it, its third subject with a warning."""
    cohort = brains_of(n, t1=[0]).isel(roi=slice(0, 100))
    bold = cohort.bold.copy()
    bold[2, :10] = bold[2, :10] * 0
    return cohort.assign(bold=bold).assign_coords(
        coverage=("subject", np.r_[1, 1, 0.9, 1][:n]),
        mean_fd=("subject", np.r_[0.1, 0.2, 0.1, 0.9][:n]),
        warnings=("subject", np.array(["", "", f"no signal in {NASTY}", ""][:n])),
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    cohort = checked().assign_attrs(refused={NASTY: "Expected a file, found <b>nothing</b>."})
    return quality_page(cohort, tmp_path_factory.mktemp("page") / "q.html", pictures=2).read_text()


def test_the_page_needs_nothing_else(page):
    assert not re.search(r"(src|href)=(?!\"data:)|@import|url\(", page)
    assert "<script" not in page
    assert page.count("data:image/png") == 3  # coverage and two subjects


def test_names_and_reasons_are_text(page):
    assert "&lt;script&gt;" in page
    assert "found &lt;b&gt;nothing&lt;/b&gt;." in page


def test_the_conspicuous_come_first_and_none_is_missing(page):
    drawn = re.findall(r"<h3>(.*?)</h3>", page)
    assert drawn == ["sub-02", "sub-03"]  # a warning, then the farthest from the others
    rows = page[page.index("Every subject") :]
    assert [rows.index(f"sub-0{i}") > 0 for i in range(4)] == [True] * 4


def test_parcels_without_signal_are_named_with_their_share(page):
    assert "7Networks_LH_Vis_1 75%" in page


def test_any_cohort_has_a_page(tmp_path):
    bare = brains_of(2)
    assert "2 with bold" in quality_page(bare, tmp_path / "a.html").read_text()
    t1_only = brains_of(2, t1=[0, 1]).drop_vars("bold").drop_dims(["roi", "time"])
    t1_only = t1_only.assign_coords(has_bold=("subject", [False, False]))
    assert "Where there is signal" not in quality_page(t1_only, tmp_path / "b.html").read_text()
    with pytest.raises(InputError, match="at least one subject"):
        quality_page(bare.isel(subject=[]), tmp_path / "c.html")


def test_what_has_other_dims_is_counted_and_not_drawn(tmp_path):
    values = xr.DataArray(np.ones((2, 100, 3)), dims=("subject", "roi", "measure"))
    cohort = brains_of(2).assign(thickness=values)
    cohort = cohort.assign_coords(has_thickness=("subject", [True, False]))
    text = quality_page(cohort, tmp_path / "a.html").read_text()
    assert "2, 2 with bold, 1 with thickness" in text
    assert text.count("data:image/png") == 3
