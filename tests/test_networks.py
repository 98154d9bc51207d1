"""Laws of the bare networks: the published numbers, packing, patches, kernels, masks and sizes.

`data/golden.npz` holds small instances of the published modules with what they gave in double
precision (structure tokens: every tenth; decoder: the first 16 channels).
"""

import math
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bhx.errors import InputError
from bhx.modalities import bold as bold_file
from bhx.modalities.bold import BOLD, GRID_SECONDS, autocovariance, jepa_masks, wiener
from bhx.modalities.t1 import cubes, volume
from bhx.model.checkpoints import load_strictly
from bhx.model.config import PRESETS, RELEASE, Harmonix, build
from bhx.model.dynamics import (
    DynamicsConfig,
    DynamicsEncoder,
    DynamicsPredictor,
    jepa_loss,
    resizing,
)
from bhx.model.harmonizer import Harmonizer, HarmonizerConfig, line_positions
from bhx.model.layers import (
    Attention,
    attend_alike,
    attention_weights,
    initialize,
    normalized,
    packed_attention,
    sincos,
)
from bhx.model.structure import (
    StructureConfig,
    StructureEncoder,
    cube_positions,
    mae_loss,
    reconstruct,
)

GOLDEN = np.load(Path(__file__).parent / "data" / "golden.npz")
TRS = (0.735, 0.8, 1.5, 2.0, 3.0)
BOUND = {torch.float64: 1e-9, torch.float32: 2e-5}
RESIZED = 2e-5  # the published kernels were resized in single precision on some processor
EXACT = DynamicsConfig(parcels=6, harmonics=7, gradients=5, width=24, depth=2, heads=2,
                       predictor_width=12, predictor_depth=1, predictor_heads=2)  # fmt: skip
TAPE = replace(EXACT, patching="tape")


def golden(key, dtype=torch.float64):
    value = torch.from_numpy(GOLDEN[key])
    return value.to(dtype) if value.is_floating_point() else value


def state(prefix):
    """The published state dict below a prefix, without its position tables."""
    keys = [k for k in GOLDEN.files if k.startswith(prefix)]
    tables = ("_sample", "emb_h_encoder", "emb_h_decoder")
    return {k.removeprefix(prefix): golden(k) for k in keys if not k.endswith(tables)}


def near(found, key, bound):
    assert (found.double() - golden(key)).abs().max() <= bound


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def patchify(bold, tr, config):
    return torch.from_numpy(bold_file.patchify(bold.numpy(), tr, config))


def cubes_of(t1, edge):
    return torch.from_numpy(cubes(t1.numpy(), edge))


def each_token(encoder, inputs, keep=None):
    """Tokens (B, n, width) of inputs that have as many."""
    tokens, lengths = encoder(list(inputs), keep)
    return torch.stack(tokens.split(lengths))


# The published numbers ---------------------------------------------------------------------------


@pytest.fixture(params=BOUND, ids=("float64", "float32"), scope="module")
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def published_f(dtype):
    """BrainHarmonix-F and its predictor at the golden size."""
    config = DynamicsConfig(parcels=12, patching="tape", max_patches=5, harmonics=7, gradients=5,
                            width=48, depth=2, heads=4, predictor_width=36, predictor_depth=2,
                            predictor_heads=4, predictor_eps=1e-5)  # fmt: skip
    tables = {"harmonics": golden("geo"), "gradients": golden("grad")}
    made = []
    for make, prefix, place in (
        (DynamicsEncoder, "F/encoder_ema.", "pos_embed"),
        (DynamicsPredictor, "F/decoder.", "predictor_pos_embed"),
    ):
        part = make(config, *tables.values()).to(dtype)
        load_strictly(part, state(prefix) | {f"{place}.{k}": v for k, v in tables.items()}, prefix)
        made.append(part.eval().requires_grad_(False))
    return made


@pytest.mark.parametrize("tr", TRS)
def test_resized_kernels_are_the_published_ones(published_f, dtype, tr):
    encoder, _ = published_f
    k = encoder.config.patch_volumes(tr)
    assert k == golden(f"dyn_ps_{tr}")
    near(encoder.kernel(k).T[:, None, None], f"dyn_w_{tr}", RESIZED)


@pytest.mark.parametrize("tr", TRS)
def test_dynamics_tokens_are_the_published_ones(published_f, dtype, tr):
    """Theirs pads to 5 patches and masks; ours computes the patches that are there."""
    encoder, _ = published_f
    patches = [patchify(x.to(dtype), tr, encoder.config) for x in golden(f"dyn_x_{tr}")]
    assert all(p.shape[1] == 4 for p in patches)
    tokens, lengths = encoder(patches)
    ours = torch.stack(tokens.split(lengths)).unflatten(1, (12, 4))
    theirs = golden(f"dyn_y_{tr}").unflatten(1, (12, 5))[:, :, :4]
    bound = BOUND[dtype] if tr == 0.735 else max(BOUND[dtype], RESIZED)
    assert (ours - theirs).abs().max() <= bound


def test_positions_are_the_published_ones(published_f, dtype):
    positions = published_f[0].pos_embed
    near(positions(5).flatten(0, 1)[None], "dyn_pos_encoder", BOUND[dtype])
    near(positions.predictor(5).flatten(0, 1)[None], "dyn_pos_decoder", BOUND[dtype])


def test_predictions_are_the_published_ones(published_f, dtype):
    encoder, predictor = published_f
    keep, hide = ([golden(k)] * 2 for k in ("pred_ctx_idx", "pred_tgt_idx"))
    patches = [patchify(x.to(dtype), 0.735, encoder.config) for x in golden("pred_x")]
    context, lengths = encoder(patches, keep)
    near(torch.stack(context.split(lengths)), "pred_ctx", BOUND[dtype])
    near(predictor(context, keep, hide, [5, 5]).unflatten(0, (2, -1)), "pred_y", BOUND[dtype])


def test_structure_tokens_are_the_published_ones(dtype):
    encoder = StructureEncoder(StructureConfig(width=48, depth=2, heads=4)).to(dtype)
    load_strictly(encoder, state("S/"), "S")
    t1 = np.random.default_rng(zlib.crc32(b"t1")).standard_normal((1, 1, 160, 192, 160))
    with torch.no_grad():
        voxels = torch.from_numpy(cubes(t1.astype("float32")[0], 16)).to(dtype)
        tokens = each_token(encoder, voxels)
    near(tokens[:, ::10], "str_y", BOUND[dtype])
    near(encoder.pos_embed[:, ::100], "S/pos_embed_sample", 1e-6)


def test_hub_tokens_and_decoder_are_the_published_ones(dtype):
    c = HarmonizerConfig(
        *(("bold", "t1"), (7200, 1200), (0, 0)),
        *(8, 48, 2, 4, 32, 1, 4, 16),  # hubs, width, depth, heads, the decoder's three, target
    )
    harmonizer = Harmonizer(c).to(dtype)
    ours = {k: v for k, v in harmonizer.named_buffers() if k in harmonizer.state_dict()}
    load_strictly(harmonizer, state("H/") | ours, "H")
    near(harmonizer.pos_embed[:, ::600], "H/pos_embed_sample", 1e-6)
    near(harmonizer.decoder_pos_embed[:, ::600], "H/decoder_pos_embed_sample", 1e-6)
    tokens = np.random.default_rng(zlib.crc32(b"tokens")).standard_normal((8400, 48))
    tokens = torch.from_numpy(tokens.astype("float32")).to(dtype)
    valid = torch.arange(400)[:, None] * 18 + torch.arange(int(GOLDEN["har_valid_patches"]))
    places = {"bold": valid.flatten(), "t1": torch.arange(1200)}
    subject = {
        "bold": (tokens[places["bold"]], places["bold"]),
        "t1": (tokens[7200:], places["t1"]),
    }
    with torch.no_grad():
        hub = harmonizer.norm(harmonizer.encode([subject]))
        decoded = harmonizer.decode(hub, [torch.arange(1, 1 + c.data_tokens)])
    near(hub, "har_hub", BOUND[dtype])
    near(decoded[None, ::700], "har_rec_sample", BOUND[dtype])


PARAMETERS = {
    "release": (88_203_264, 27_715_584, 85_256_640, 11_401_920, 111_327_232),
    "paper": (385_056, 139_648, 353_120, 125_312, 456_608),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        parts = dict(Harmonix((PRESETS | {"release": RELEASE})[name]).named_children())
    counts = {k: sum(p.numel() for p in part.parameters()) for k, part in parts.items()}
    order = ("structure", "structure_decoder", "dynamics", "dynamics_predictor", "harmonizer")
    assert counts == dict(zip(order, PARAMETERS[name], strict=True))


# Layers ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99))
def test_packed_attention_is_explicit_attention_in_each_sequence(lengths, seed):
    q, k, v = random(3, sum(lengths), 2, 4, seed=seed).unbind()
    each = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    slow = [torch.einsum("hqk,khd->qhd", attention_weights(a, b), c) for a, b, c in each]
    torch.testing.assert_close(packed_attention(q, k, v, tuple(lengths)), torch.cat(slow))


def test_positions_are_sines_then_cosines():
    table = sincos(torch.arange(5), 6)
    for p in range(5):
        for j in range(3):
            angle = p * 10000 ** (-j / 3)
            assert table[p, j] == pytest.approx(math.sin(angle), abs=1e-12)
            assert table[p, 3 + j] == pytest.approx(math.cos(angle), abs=1e-12)


def test_cube_positions_leave_cls_and_surplus_channels_zero():
    table = cube_positions((2, 3, 4), 20)[0]
    assert table.shape == (25, 20)
    assert not table[0].any()
    assert not table[:, 18:].any()
    assert len(torch.unique(table[1:], dim=0)) == 24  # every cube has its own
    assert not line_positions(4, 6)[0, 0].any()


def test_dropping_paths_skips_whole_sequences_in_training_only():
    block = structure_encoder().blocks[0]
    block.drop_path = 0.5
    x, lengths = random(12, 24), (3, 4, 5)
    torch.testing.assert_close(block(x, lengths), structure_encoder().blocks[0](x, lengths))
    block.train()
    torch.manual_seed(0)
    keep = block._keep(x, lengths)
    for one in keep.split(lengths, dim=1):
        assert ((one == one[:, :1]) & ((one == 0) | (one == 2))).all()
    many = torch.cat([block._keep(x, lengths)[:, :1] for _ in range(400)])
    assert many.mean() == pytest.approx(1, abs=0.15)  # the expectation is kept


# Structure ---------------------------------------------------------------------------------------


SMALL = StructureConfig(voxel_mm=8.0, shape=(8, 12, 8), cube=4, width=24, depth=2, heads=2,
                        decoder_width=12, decoder_depth=1, decoder_heads=2)  # fmt: skip


def structure_encoder():
    torch.manual_seed(0)
    return StructureEncoder(SMALL).eval().requires_grad_(False)


@settings(deadline=None, max_examples=30)
@given(st.tuples(*[st.integers(1, 4)] * 3), st.integers(1, 5), st.integers(1, 3))
def test_cubes_put_together_are_the_volume(grid, edge, batch):
    t1 = random(batch, *(n * edge for n in grid))
    assert np.array_equal(volume(cubes(t1.numpy(), edge), grid, edge), t1)


def test_cube_embedding_is_the_convolution():
    encoder, t1 = structure_encoder(), random(2, *SMALL.shape)
    proj = encoder.patch_embed.proj
    ours = cubes_of(t1, SMALL.cube) @ proj.weight.flatten(1).T + proj.bias
    torch.testing.assert_close(ours, proj(t1[:, None]).flatten(2).transpose(1, 2))


def test_hidden_cubes_do_not_reach_visible_tokens():
    encoder, voxels = structure_encoder(), cubes_of(random(2, *SMALL.shape), SMALL.cube)
    visible = torch.tensor([[0, 3, 5], [1, 2, 11]])
    changed = voxels.clone()
    for row, seen in zip(changed, visible, strict=True):
        row[[i for i in range(len(row)) if i not in seen]] = 1e3
    seen = each_token(encoder, voxels, visible)
    assert torch.equal(seen, each_token(encoder, changed, visible))
    assert not torch.allclose(seen, each_token(encoder, voxels)[:, :3])
    few = encoder(list(voxels), [visible[0], visible[1][:1]])[0]  # different numbers together
    torch.testing.assert_close(few[:3], seen[0], atol=1e-5, rtol=0)


def test_masked_autoencoder_scores_removed_cubes_only():
    torch.manual_seed(0)
    networks = Harmonix(replace(PRESETS["paper"], structure=SMALL, dynamics=EXACT))
    encoder, decoder = networks.structure, networks.structure_decoder
    voxels = cubes_of(random(2, *SMALL.shape), SMALL.cube)
    hidden = torch.zeros(2, SMALL.tokens)
    hidden[0, [1, 4, 7]] = hidden[1, [0, 2, 11]] = 1
    guess, target = reconstruct(encoder, decoder, voxels, hidden), normalized(voxels)
    by_hand = [((g - t)[h == 1] ** 2).mean() for g, t, h in zip(guess, target, hidden, strict=True)]
    torch.testing.assert_close(mae_loss(encoder, decoder, voxels, hidden), torch.stack(by_hand))
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, SMALL.tokens), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(-1), torch.ones(2, SMALL.tokens), atol=1e-4, rtol=0)


# Dynamics: patches -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.floats(0.3, 6), st.integers(1, 400))
def test_tape_patches_put_together_are_the_scan(tr, extra):
    volumes = TAPE.patch_volumes(tr) + extra
    bold = random(3, volumes)
    patches = patchify(bold, tr, TAPE)
    assert patches.shape[1:] == (TAPE.patch_count(volumes, tr), TAPE.patch_volumes(tr))
    assert np.array_equal(patches.flatten(1)[:, :volumes], bold)


@settings(deadline=None, max_examples=40)
@given(st.floats(0.3, 6), st.integers(1, 6))
def test_exact_patches_are_counted_in_seconds(tr, patches):
    volumes = math.ceil(patches * EXACT.patch_seconds / tr)
    assert patchify(random(2, volumes), tr, EXACT).shape == (2, patches, 48)
    np.testing.assert_allclose(EXACT.patch_onsets(3, tr), [0, 35.28, 70.56])


def test_at_the_kernels_own_tr_exact_patches_are_the_volumes():
    bold = random(3, 48 * 4 + 5)
    exact, tape = patchify(bold, 0.735, EXACT), patchify(bold[:, : 48 * 4], 0.735, TAPE)
    torch.testing.assert_close(exact, tape, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [EXACT, TAPE], ids=("exact", "tape"))
@pytest.mark.parametrize("volumes, tr", [(17, 2.0), (47, 0.735), (2, 3.0), (1, 10.0)])
def test_scans_shorter_than_a_patch_are_refused(config, volumes, tr):
    seconds = re.escape(f"(35.28 s), found {volumes} volumes at TR {tr:g} s")
    with pytest.raises(InputError, match="at least one patch " + seconds):
        patchify(random(6, volumes), tr, config)


@pytest.mark.parametrize("tr", [0.5, 0.72, 1.4, 2.0, 3.0])
def test_wiener_weights_are_the_best_linear_interpolation(tr):
    """No other weights on the same volumes have a smaller expected error under the prior."""
    index, weights = wiener(tr, 60, 40)
    grid = np.arange(40) * GRID_SECONDS
    rng = np.random.default_rng(0)
    for at, near_by, w in zip(grid, index, weights, strict=True):
        among = autocovariance(tr * np.subtract.outer(near_by, near_by))
        towards = autocovariance(at - near_by * tr)
        error = 1 - 2 * w @ towards + w @ among @ w
        for other in w + rng.normal(0, 0.05, (20, len(w))):
            assert 1 - 2 * other @ towards + other @ among @ other >= error
    assert (index >= 0).all()
    assert (index < 60).all()


# Dynamics: kernels -------------------------------------------------------------------------------


def dynamics_encoder(config=EXACT, seed=0):
    torch.manual_seed(seed)
    tables = random(config.parcels, config.harmonics), random(config.parcels, config.gradients)
    return DynamicsEncoder(config, *tables).eval()


@pytest.mark.parametrize("k", [5, 12, 18, 24, 44, 48, 49, 60])
def test_a_resized_kernel_answers_a_resized_patch(k):
    """The least-squares equivalence of FlexiViT: exact when nothing is lost (k >= 48)."""
    resized = torch.nn.functional.interpolate(
        torch.eye(48, dtype=torch.float64)[:, None, None], (1, k), mode="bicubic", antialias=True
    )[:, 0, 0]
    back = resized @ resizing(48, k)
    torch.testing.assert_close(back @ back, back, atol=1e-10, rtol=0)  # a projection
    torch.testing.assert_close(back, back.T, atol=1e-10, rtol=0)  # the orthogonal one
    assert torch.linalg.matrix_rank(back, tol=1e-3) == min(k, 48)


def test_the_inverse_is_computed_once_and_kernels_follow_the_weights():
    encoder, before = dynamics_encoder(TAPE), resizing.cache_info().misses
    patches = [patchify(random(6, 200), tr, TAPE) for tr in (1.7, 1.3, 1.7, 0.735)]
    with torch.no_grad():
        first, _ = encoder(patches)
        encoder.patch_embed.proj.weight *= 2
        after, _ = encoder(patches[::-1])
    assert resizing.cache_info().misses == before + 2
    assert not torch.allclose(first, after)
    encoder.embed(patches[0]).sum().backward()
    assert encoder.patch_embed.proj.weight.grad.any()


def test_cached_kernels_go_where_the_weights_go():
    encoder, patches = dynamics_encoder(TAPE), patchify(random(6, 60), 2.0, TAPE)
    with torch.no_grad():
        single = encoder.embed(patches)
        double = encoder.double().embed(patches.double())
        encoder.load_state_dict(dynamics_encoder(TAPE, seed=1).state_dict())
        other = encoder.embed(patches.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, atol=1e-5, rtol=0)
    assert not torch.allclose(double, other)


# Dynamics: where attention starts ----------------------------------------------------------------


def test_attention_starts_at_tokens_alike():
    """A token of unit variance scores 20 with itself; what is read is handed on unchanged."""
    torch.manual_seed(0)
    attention = Attention(48, 4)
    initialize(attention)
    attend_alike(attention)
    x = torch.nn.functional.layer_norm(random(7, 48), (48,))
    q, k, v = attention.split(x)
    scores = torch.einsum("qhd,qhd->qh", q, k) * 12**-0.5
    torch.testing.assert_close(scores.mean(1), torch.full((7,), 20.0), atol=1e-2, rtol=0)
    torch.testing.assert_close(attention.proj(v.flatten(1)), x, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_untrained_encoder_reads_the_parcels_that_go_together():
    """Parcel 0 goes with parcel 1 in one scan and with parcel 2 in another; the rest is noise."""
    encoder, read = dynamics_encoder(), {}
    for partner in (1, 2):
        patches = random(6, 3, 48)
        patches[partner] = patches[0] + 0.3 * random(3, 48)
        x = (encoder.embed(patches) + encoder.pos_embed(3)).flatten(0, 1)
        weights = encoder.blocks[0].weights(x, (18,), slice(0, 3))[0].mean(0)  # (3, 18)
        read[partner] = weights.unflatten(1, (6, 3)).diagonal(dim1=0, dim2=2).mean(1)
    assert read[1][1] > 3 * read[2][1]
    assert read[2][2] > 3 * read[1][2]


# Dynamics: one moment at many TRs ----------------------------------------------------------------


def band_limited(tr, seed=0, parcels=24, minutes=10.8, low=0.01, high=0.1, waves=40):
    """Random signals of 0.01-0.1 Hz as functions of time, sampled at `tr` [s]."""
    rng = np.random.default_rng(seed)
    frequency = rng.uniform(low, high, (parcels, waves, 1))
    phase = rng.uniform(0, 2 * np.pi, (parcels, waves, 1))
    seconds = np.arange(int(minutes * 60 / tr)) * tr
    wave = np.sin(2 * np.pi * frequency * seconds + phase).sum(1) / np.sqrt(waves / 2)
    return torch.from_numpy(wave).float()


@pytest.fixture(scope="module")
def tokens_at():
    """TR [s] -> tokens (parcels, 18 patches, width) of both patch rules, by the same weights."""
    config = replace(EXACT, parcels=24, width=48, heads=4)
    exact = dynamics_encoder(config)
    tape = dynamics_encoder(replace(config, patching="tape"))
    tape.load_state_dict(exact.state_dict())

    @torch.no_grad()
    def tokens(tr, encoder, **signal):
        patches = patchify(band_limited(tr, **signal), tr, encoder.config)[:, :18]
        return encoder([patches])[0].unflatten(0, patches.shape[:2])

    return lambda tr, **signal: [tokens(tr, e, **signal) for e in (exact, tape)]


def error_and_cosine(tokens, reference):
    error = (tokens - reference).norm() / reference.norm()
    return error, torch.cosine_similarity(tokens, reference, dim=-1).mean()


@pytest.mark.parametrize("tr", [0.8, 1.5, 2.0, 2.5, 3.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_patches_agree_over_trs_far_better_than_tape(tokens_at, tr, seed):
    """All 18 patches against those at the kernel's own TR. TAPE's rounding makes patches drift
    apart by up to 13 s; exact patches stay in time and lose what the prior takes for noise."""
    ours, theirs = (
        error_and_cosine(*pair)
        for pair in zip(tokens_at(tr, seed=seed), tokens_at(0.735, seed=seed), strict=True)
    )
    assert ours[0] < 0.4
    assert ours[0] < 0.4 * theirs[0]
    assert ours[1] > 0.93
    assert 1 - ours[1] < 0.2 * (1 - theirs[1])


def test_close_to_the_kernels_tr_both_rules_agree(tokens_at):
    """At TR 0.72 s (49 x 0.72 = 35.28 s) TAPE has no drift, and neither rule has an advantage."""
    for tokens, reference in zip(tokens_at(0.72), tokens_at(0.735), strict=True):
        assert error_and_cosine(tokens, reference)[0] < 0.01


def test_exact_patches_do_not_drift(tokens_at):
    """The last patch is as good as the first; with TAPE it is another moment's."""
    ours, theirs = (
        [error_and_cosine(a[:, p], b[:, p])[0] for p in (0, 17)]
        for a, b in zip(tokens_at(2.0), tokens_at(0.735), strict=True)
    )
    assert ours[1] < 1.5 * ours[0]
    assert theirs[1] > 3 * theirs[0]


@pytest.mark.parametrize("tr", [1.4, 2.0, 3.0])
def test_one_sinusoid_at_two_trs_gives_near_equal_tokens(tokens_at, tr):
    one = {"waves": 1, "low": 0.03, "high": 0.03}
    error, cosine = error_and_cosine(tokens_at(tr, **one)[0], tokens_at(0.735, **one)[0])
    assert error < 0.25
    assert cosine > 0.97


# Dynamics: batches and masks ---------------------------------------------------------------------


@pytest.mark.parametrize("config", [EXACT, TAPE], ids=("exact", "tape"))
def test_company_does_not_change_a_scans_tokens(config):
    encoder = dynamics_encoder(config)
    scans = [(0.72, 300), (2.0, 40), (2.0, 40), (3.0, 13), (0.8, 120)]
    patches = [patchify(random(6, n, seed=i), tr, config) for i, (tr, n) in enumerate(scans)]
    tokens, lengths = encoder(patches)
    for alone, together in zip(patches, tokens.split(lengths), strict=True):
        torch.testing.assert_close(encoder([alone])[0], together, atol=1e-5, rtol=0)


def test_left_out_tokens_are_never_read():
    encoder, patches = dynamics_encoder(), patchify(random(6, 200), 0.735, EXACT)
    keep = torch.tensor([0, 3, 5, 11, 20])
    spoilt = torch.full_like(patches, torch.nan).flatten(0, 1)
    spoilt[keep] = patches.flatten(0, 1)[keep]
    one, lengths = encoder([patches], [keep])
    assert lengths == (5,)
    assert torch.equal(one, encoder([spoilt.unflatten(0, patches.shape[:2])], [keep])[0])


def test_more_patches_than_positions_are_refused():
    with pytest.raises(InputError, match="at most 18 patches at once, found 19"):
        dynamics_encoder()([random(6, 19, 48)])


def test_place_is_brought_to_one_by_its_extremes():
    place = dynamics_encoder().pos_embed.place()
    assert place.shape == (6, 12)
    assert place.min() == -1
    torch.testing.assert_close(place.max(), torch.tensor(1.0))


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 60), st.integers(1, 30), st.integers(0, 9999))
def test_masks_of_any_scan_hide_and_show(parcels, patches, seed):
    seen, hidden = jepa_masks(parcels, patches, np.random.default_rng(seed))
    assert len(seen)
    assert len(hidden)
    assert not set(seen) & set(hidden)
    assert max(*seen, *hidden) < parcels * patches


@settings(deadline=None, max_examples=60)
@given(st.integers(20, 60), st.integers(6, 30), st.integers(0, 9999))
def test_masks_have_the_published_shares(parcels, patches, seed):
    seen, hidden = jepa_masks(parcels, patches, np.random.default_rng(seed))
    grid = np.zeros((2, parcels, patches), bool)
    grid[0].flat[seen], grid[1].flat[hidden] = True, True
    window = np.flatnonzero(grid[0].any(0))
    assert window[-1] - window[0] + 1 == len(window) >= round(0.84 * patches)
    assert grid[0].any(1).sum() >= round(0.84 * parcels)
    inside = grid[1][:, window]
    assert round(0.45 * parcels) <= inside.any(1).sum() <= round(0.60 * parcels)
    assert round(0.2 * len(window)) <= inside.any(0).sum() <= round(0.6 * len(window))
    assert (grid[0][:, window] | inside).all(1).sum() >= round(0.84 * parcels)


def test_jepa_scores_hidden_tokens_against_the_teacher_alone():
    networks = build(replace(PRESETS["paper"], dynamics=EXACT), random(6, 7), random(6, 5))
    student, predictor, teacher = networks.dynamics, networks.dynamics_predictor, dynamics_encoder()
    patches = [patchify(random(6, n, seed=n), 0.735, EXACT) for n in (150, 250)]
    masks = [jepa_masks(6, p.shape[1], np.random.default_rng(0)) for p in patches]
    keep, hide = ([torch.from_numpy(m[i]) for m in masks] for i in (0, 1))
    loss = jepa_loss(student, predictor, teacher, patches, keep, hide)
    for i, (kept, hidden) in enumerate(zip(keep, hide, strict=True)):
        whole = teacher([patches[i]])[0]
        target = torch.nn.functional.layer_norm(whole, (24,), eps=1e-5)[hidden]
        context, _ = student([patches[i]], [kept])
        guess = predictor(context, [kept], [hidden], [patches[i].shape[1]])
        distance = (guess - target).abs()
        by_hand = torch.where(distance < 1, distance**2 / 2, distance - 0.5).mean()
        torch.testing.assert_close(loss[i], by_hand)
    loss.sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.pos_embed.geo_harm_proj.weight.grad.any()
    assert not predictor.predictor_pos_embed.geo_harm_proj.weight.grad  # its place is detached


# Harmonizer --------------------------------------------------------------------------------------


FUSED = HarmonizerConfig(("bold", "t1"), (24, 10), (0, 0), hubs=3, width=24, depth=3, heads=2,
                         decoder_width=12, decoder_depth=1, decoder_heads=2,
                         target_width=24)  # fmt: skip


@pytest.fixture(scope="module")
def harmonizer():
    torch.manual_seed(0)
    made = Harmonizer(FUSED).eval().requires_grad_(False)
    for value in (made.decoder_pred.weight, made.mean_tokens):
        torch.nn.init.normal_(value)
    made.spread.copy_(torch.tensor([2.0, 0.5]))
    return made


@pytest.fixture(scope="module")
def batch():
    """Subjects with both modalities, a short scan, one modality each, and few parcels."""
    parcel = 4 * torch.arange(6)[:, None]  # four patches a parcel
    both, short, cube = torch.arange(24), (parcel + torch.arange(2)).flatten(), torch.arange(10)
    places = [{"bold": both, "t1": cube}, {"bold": short, "t1": cube}, {"bold": short},
              {"t1": cube}, {"bold": both[5:9], "t1": cube[2:]}]  # fmt: skip
    return [
        {name: (random(len(at), 24, seed=7 * i + len(name)), at) for name, at in one.items()}
        for i, one in enumerate(places)
    ]


def test_rows_number_every_place_once(harmonizer, batch):
    rows = harmonizer.rows(batch[0])
    assert torch.equal(rows, torch.arange(1, 1 + FUSED.data_tokens))
    assert harmonizer.rows(batch[2]).tolist() == [1, 2, 5, 6, 9, 10, 13, 14, 17, 18, 21, 22]
    assert harmonizer.rows(batch[3]).tolist() == list(range(25, 35))


def test_bold_numbers_the_places_of_a_short_scan_as_the_release_does():
    config = PRESETS["base"]
    rows = BOLD.rows(config, (400, 2))
    assert rows[:4].tolist() == [0, 1, 18, 19]
    assert BOLD.rows(config, BOLD.places(config)).tolist() == list(range(7200))


def test_company_does_not_change_a_subjects_hub_tokens(harmonizer, batch):
    together = harmonizer(batch)
    for one, subject in zip(together, batch, strict=True):
        torch.testing.assert_close(harmonizer([subject])[0], one, atol=1e-5, rtol=0)


def test_order_of_data_tokens_does_not_matter_their_places_do(harmonizer, batch):
    tokens, places = batch[0]["bold"]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    hub = harmonizer([batch[0]])
    moved = batch[0] | {"bold": (tokens[order], places[order])}
    torch.testing.assert_close(harmonizer([moved]), hub, atol=1e-5, rtol=0)
    moved = batch[0] | {"bold": (tokens[order], places)}
    assert (harmonizer([moved]) - hub).abs().max() > 1e-3


def test_a_subject_without_tokens_is_refused(harmonizer):
    with pytest.raises(InputError, match="with data tokens, found none"):
        harmonizer([{}])


def full_attention(harmonizer, subject):
    """Head-averaged weights of every layer over one whole sequence (layers, N, N)."""
    x, lengths = harmonizer.sequence([subject])
    maps = []
    for block in harmonizer.blocks:
        maps.append(block.weights(x, lengths, slice(None))[0])
        mixed = torch.einsum("hqk,khd->qhd", maps[-1], block.before(x)[2])
        explicit = block.after(x, mixed)
        x = block(x, lengths)
        torch.testing.assert_close(explicit, x, atol=1e-5, rtol=0)  # the fused path agrees
    return torch.stack(maps).mean(1)


@pytest.mark.parametrize("method", ["last", "mean", "rollout"])
def test_attention_is_that_of_the_forward_pass(harmonizer, batch, method):
    for subject, kept in zip(batch, harmonizer.attention(batch, method), strict=True):
        each = full_attention(harmonizer, subject)
        if method == "rollout":
            unit = torch.eye(each.shape[-1])
            whole = torch.linalg.multi_dot([(a + unit) / 2 for a in each.flip(0)])
        else:
            whole = {"last": each[-1], "mean": each.mean(0)}[method]
        data, ours = whole[-3:, 1:-3], torch.cat(list(kept.values()), 1)
        assert list(kept) == list(subject)
        torch.testing.assert_close(ours, data / data.sum(1, keepdim=True), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.sum(1), torch.ones(3))


@pytest.mark.parametrize("method", ["first", 0, None])
def test_unknown_attention_is_refused(harmonizer, batch, method):
    with pytest.raises(InputError, match="attention to be last, mean, rollout, found"):
        harmonizer.attention(batch, method)


def test_losses_are_a_term_a_modality_over_the_tokens_that_are_there(harmonizer, batch):
    losses = harmonizer.losses(batch, batch)
    assert {k: len(v) for k, v in losses.items()} == {"loss_bold": 4, "loss_t1": 4}
    spread = {"bold": 2, "t1": 0.5}
    each = {name: iter(losses[f"loss_{name}"]) for name in spread}
    for subject in batch:
        decoded = harmonizer.decode(
            harmonizer.norm(harmonizer.encode([subject])), [harmonizer.rows(subject)]
        )
        sizes = [len(at) for _, at in subject.values()]
        for (name, (tokens, _)), guess in zip(subject.items(), decoded.split(sizes), strict=True):
            by_hand = ((guess - tokens) ** 2).mean() / spread[name]  # in units of the spread
            torch.testing.assert_close(next(each[name]), by_hand, atol=1e-5, rtol=1e-4)


def test_the_decoder_begins_at_the_mean_tokens():
    torch.manual_seed(0)
    fresh, rows = Harmonizer(FUSED), [torch.tensor([3, 7]), torch.tensor([30])]
    torch.nn.init.normal_(fresh.mean_tokens)
    decoded = fresh.decode(random(2, 4, 24), rows)
    torch.testing.assert_close(decoded, fresh.mean_tokens[[2, 6, 29]])


def test_mean_tokens_and_spread_are_those_of_the_subjects(harmonizer, batch):
    fresh = Harmonizer(FUSED)
    fresh.fit_means(batch)
    tokens = torch.stack([s["t1"][0] for s in (batch[0], batch[1], batch[3])])
    torch.testing.assert_close(fresh.mean_tokens[24], tokens[:, 0].mean(0))
    first = torch.stack([batch[0]["bold"][0][2], batch[0]["bold"][0][2]])  # one subject reads it
    torch.testing.assert_close(fresh.mean_tokens[2], first.mean(0))
    assert (fresh.spread > 0).all()


def test_a_hidden_modality_is_still_a_target(harmonizer, batch):
    seen, whole = [{"t1": batch[0]["t1"]}], [batch[0]]
    guessed = harmonizer.losses(seen, whole)
    tokens, places = batch[0]["bold"]
    other = harmonizer.losses(seen, [batch[0] | {"bold": (tokens + 1, places)}])
    assert guessed["loss_bold"] != other["loss_bold"]
    assert torch.equal(guessed["loss_t1"], other["loss_t1"])


def test_the_released_loss_is_one_mean_over_all_places(harmonizer, batch):
    """Places that a scan does not have count as zeros."""
    everywhere = torch.arange(1, 1 + FUSED.data_tokens)
    for loss, subject in zip(harmonizer.release_loss(batch), batch, strict=True):
        guess = harmonizer.decode(harmonizer.norm(harmonizer.encode([subject])), [everywhere])
        target = torch.zeros(FUSED.data_tokens, 24)
        tokens = torch.cat([x for x, _ in subject.values()])
        scaled = tokens - tokens.mean(1, keepdim=True)
        variance = tokens.var(1, keepdim=True)
        target[harmonizer.rows(subject) - 1] = scaled / (variance + 1e-6).sqrt()
        torch.testing.assert_close(loss, ((guess - target) ** 2).mean(), atol=1e-5, rtol=1e-4)
