"""The quality page: nothing is left out, the odd come first, and no name can run as code."""

import re

import numpy as np
import pytest
from test_prepare import cohort_of

from bhx.data.quality_page import quality_page
from bhx.errors import InputError

NASTY = "<script>alert('x')</script>"


def judged(n=4):
    """A cohort as `prepare` leaves it, its third subject with a warning."""
    cohort = cohort_of(n, t1=[0]).isel(roi=slice(0, 100))
    bold = cohort.bold.copy()
    bold[2, :10] = bold[2, :10] * 0
    return cohort.assign(bold=bold).assign_coords(
        coverage=("subject", np.r_[1, 1, 0.9, 1][:n]),
        mean_fd=("subject", np.r_[0.1, 0.2, 0.1, 0.9][:n]),
        warnings=("subject", np.array(["", "", f"no signal in {NASTY}", ""][:n])),
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    cohort = judged().assign_attrs(refused={NASTY: "Expected a file, found <b>nothing</b>."})
    return quality_page(cohort, tmp_path_factory.mktemp("page") / "q.html", pictures=2).read_text()


def test_the_page_needs_nothing_else(page):
    assert not re.search(r"(src|href)=(?!\"data:)", page)
    assert "<script" not in page
    assert page.count("data:image/png") == 3  # coverage and two subjects


def test_names_and_reasons_are_text(page):
    assert "&lt;script&gt;" in page
    assert "found &lt;b&gt;nothing&lt;/b&gt;." in page


def test_the_odd_come_first_and_none_is_missing(page):
    drawn = re.findall(r"<h3>(.*?)</h3>", page)
    assert drawn == ["sub-02", "sub-03"]  # a warning, then the farthest from the others
    rows = page[page.index("Every subject") :]
    assert [rows.index(f"sub-0{i}") > 0 for i in range(4)] == [True] * 4


def test_parcels_without_signal_are_named_with_their_share(page):
    assert "7Networks_LH_Vis_1 75%" in page


def test_any_cohort_has_a_page(tmp_path):
    bare = cohort_of(2)
    assert "with BOLD" in quality_page(bare, tmp_path / "a.html").read_text()
    t1_only = cohort_of(2, t1=[0, 1]).drop_vars("bold").drop_dims(["roi", "time"])
    t1_only = t1_only.assign_coords(has_bold=("subject", [False, False]))
    assert "Where there is signal" not in quality_page(t1_only, tmp_path / "b.html").read_text()
    with pytest.raises(InputError, match="at least one subject"):
        quality_page(bare.isel(subject=[]), tmp_path / "c.html")
