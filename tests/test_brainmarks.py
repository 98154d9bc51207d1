"""The Brainmarks plugin keeps the suite's contract and reads what `embed` reads.

The suite itself is not needed here: its two names that the plugin imports are stood in for.
"""

import importlib.util
import sys
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import bhx
from bhx.data.atlas import load_atlas
from bhx.encode.model import random_model
from bhx.schema import build_cohort

PLUGIN = Path(__file__).parents[1] / "benchmarks" / "brainmarks" / "bhx.py"


@pytest.fixture(scope="module")
def plugin():
    """The plugin's module, and the names it registered."""

    class Embeddings(NamedTuple):
        cls_embeds: object
        reg_embeds: object
        patch_embeds: object

    names = {}
    base, registry = types.ModuleType("base"), types.ModuleType("registry")
    base.Embeddings = Embeddings
    registry.register_model = lambda function: names.setdefault(function.__name__, function)
    stand_ins = {"brainmarks": types.ModuleType("brainmarks"), "brainmarks.models": None}
    stand_ins["brainmarks.models"] = types.ModuleType("brainmarks.models")
    stand_ins |= {"brainmarks.models.base": base, "brainmarks.models.registry": registry}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location("brainmarks.models.bhx", PLUGIN)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    assert set(names) == {"bhx", "bhx_random"}
    return module


def samples(n, volumes, tr=2.0, seed=0):
    make = torch.Generator().manual_seed(seed)
    bold = torch.randn(n, volumes, 400, generator=make)
    level = torch.randn(n, 1, 400, generator=make)
    spread = torch.rand(n, 1, 400, generator=make) + 0.5
    return [
        {"bold": b, "mean": m, "std": s, "tr": tr}
        for b, m, s in zip(bold, level, spread, strict=True)
    ]


def batch_of(plugin, given):
    prepared = [plugin.Prepare()(sample) for sample in given]
    bold = torch.stack([one["bold"] for one in prepared])
    return {"bold": bold, "tr": torch.tensor([one["tr"] for one in prepared])}


@pytest.mark.parametrize("volumes", [8, 40])
def test_shapes_are_the_suites(plugin, volumes):
    _, wrapper = plugin.bhx_random()
    assert wrapper.__space__ == "schaefer400"
    with torch.no_grad():
        cls, registers, patches = wrapper(batch_of(plugin, samples(2, volumes)))
    width = wrapper.config.harmonizer.width
    assert cls.shape == (2, 1, width)
    assert registers.shape == (2, wrapper.config.harmonizer.hubs, width)
    assert patches.shape == (2, 100, width)
    assert torch.isfinite(registers).all()


@pytest.mark.parametrize("volumes", [60, 340])  # in one window and in two of unlike length
def test_registers_are_the_hub_tokens_of_embed(plugin, volumes):
    given = samples(2, volumes)
    _, wrapper = plugin.bhx_random()
    with torch.no_grad():
        _, registers, _ = wrapper(batch_of(plugin, given))
    bold = np.stack([(s["bold"] * s["std"] + s["mean"]).T.numpy() for s in given])
    names = load_atlas("schaefer400", order="17networks").roi.values
    subject = {"subject": ["a", "b"], "participant": ["a", "b"], "site": ["", ""], "tr": [2.0, 2.0]}
    subject |= {"n_volumes": [volumes] * 2, "has_bold": [True, True], "has_t1": [False, False]}
    cohort = build_cohort(
        {"bold": bold}, subject, {"roi": names}, {"atlas": "schaefer400", "source": ""}
    )
    small = bhx.reparcellate(cohort, "schaefer100")
    hub = bhx.embed(small, random_model(device="cpu")).hub
    np.testing.assert_allclose(registers, hub, atol=1e-4)


def test_scans_of_unlike_patches_are_refused_together(plugin):
    _, wrapper = plugin.bhx_random("paper")
    batch = batch_of(plugin, samples(2, 60))
    batch["tr"] = torch.tensor([2.0, 0.8])
    with pytest.raises(
        bhx.errors.InputError, match="Expected scans of equally many patches in a batch"
    ):
        wrapper(batch)


def test_shares_are_means_over_parcels_that_overlap(plugin):
    share = plugin.shares(load_atlas("schaefer100"))
    np.testing.assert_allclose(share.sum(1), 1, atol=1e-5)
    given, wanted = load_atlas("schaefer400", order="17networks"), load_atlas("schaefer100")
    left = share[:, (given.hemi == "L").values].sum(1)
    np.testing.assert_allclose(left, wanted.hemi == "L", atol=1e-5)
    best = given.network.values[share.argmax(1)]
    assert (best == wanted.network.values).mean() > 0.85


def test_wrapper_is_a_module_whose_weights_freeze_and_train(plugin):
    _, wrapper = plugin.bhx_random()
    assert sum(p.numel() for p in wrapper.parameters()) > 1e5
    cls, *_ = wrapper(batch_of(plugin, samples(1, 20)))
    weights = torch.linspace(-1, 1, cls.shape[-1])  # the plain sum of a normed token is constant
    (cls * weights).sum().backward()
    reached = [p.grad is not None and p.grad.abs().sum() > 0 for p in wrapper.parameters()]
    assert sum(reached) > 20
