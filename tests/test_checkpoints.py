"""Laws of weights: what is written is read, what does not fit is refused by name, nothing runs."""

import argparse
import csv
import json
import os
import pickle
import zlib
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bhx
from bhx.data.atlas import load_atlas
from bhx.encode.inputs import Reading, encode_readings, sequences
from bhx.errors import InputError
from bhx.model import checkpoints
from bhx.model import checkpoints as checkpoints_file
from bhx.model import released as released_file
from bhx.model.checkpoints import read_weights
from bhx.model.config import PRESETS, RELEASE, Harmonix, HarmonixConfig, build

TINY = replace(
    PRESETS["paper"],
    name="tiny",
    structure=replace(PRESETS["paper"].structure, width=24, depth=1, heads=2, decoder_width=12,
                      decoder_depth=1, decoder_heads=2),
    dynamics=replace(PRESETS["paper"].dynamics, width=24, depth=1, heads=2, predictor_width=12,
                     predictor_depth=1, predictor_heads=2, harmonics=9, gradients=4),
    harmonizer=replace(PRESETS["paper"].harmonizer, hubs=4, width=24, depth=1, heads=2,
                       decoder_width=12, decoder_depth=1, decoder_heads=2, target_width=24),
)  # fmt: skip


def model(seed=0, config=TINY):
    tables = np.random.default_rng(0).standard_normal((100, 13)).astype("float32")
    return build(config, tables[:, :9], tables[:, 9:], seed)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@torch.no_grad()
def hub(networks):
    """Hub tokens of one scan with both modalities."""
    random, config = np.random.default_rng(0), networks.config
    scan = random.standard_normal((config.dynamics.parcels, 100)).astype("float32")
    t1 = random.standard_normal(config.structure.shape).astype("float32")
    reading, facts = Reading(), {"tr": 2.0, "n_volumes": 100}
    for name, values in {"bold": scan, "t1": t1}.items():
        reading.add(config.modalities[name], config.modalities[name].cut(values, facts, config))
    tokens = encode_readings(networks, [reading], "cpu")
    return networks.harmonizer(sequences(config, [reading], tokens).subjects)


# Our own format ----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    return checkpoints_file.save_weights(model(), tmp_path / "model", {"source": "a test"})


def test_what_is_written_is_read(saved):
    read = read_weights(saved)
    assert same(read, model())
    assert torch.equal(hub(read), hub(model()))
    assert read.config == TINY
    assert read.provenance["source"] == "a test"
    assert read.provenance["weights_sha256"] == checkpoints_file.sha256(saved / "model.safetensors")
    assert not read.training


def test_weights_are_three_plain_things(saved):
    """Tensors, a JSON file, nothing else; the configuration says which atlas is read."""
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]
    about = json.loads((saved / "config.json").read_text())
    assert about["config"]["atlas"] == "schaefer100"
    assert HarmonixConfig.from_dict(about["config"]) == TINY
    assert load_file(saved / "model.safetensors").keys() == model().state_dict().keys()
    assert len({p.stat().st_mode for p in saved.iterdir()}) == 1  # whoever reads one reads both


def test_seeds_make_models_and_leave_the_random_state_alone():
    before = torch.get_rng_state()
    assert same(model(), model())
    assert not same(model(), model(seed=1))
    assert torch.equal(before, torch.get_rng_state())


STAGES_OF = {"workshop": {"harmonizer"}, "paper": {"structure", "dynamics", "harmonizer"}}


@pytest.mark.parametrize("name", STAGES_OF)
def test_shipped_weights_are_small_whole_and_of_the_preset(name):
    shipped = read_weights(name)
    assert shipped.config == PRESETS[name]
    assert all(v.isfinite().all() for v in shipped.state_dict().values())
    assert sum(p.stat().st_size for p in (checkpoints_file.SHIPPED / name).iterdir()) < 10e6
    assert shipped.provenance["stages"].keys() == STAGES_OF[name]


def altered(change):
    def damage(folder):
        weights = folder / "model.safetensors"
        state = load_file(weights)
        change(state)
        save_file(state, weights)

    return damage


def shortened(name, size):
    return lambda folder: os.truncate(folder / name, size)


def described(**changes):
    def damage(folder):
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(about | changes))

    return damage


def written(name, text):
    return lambda folder: (folder / name).write_bytes(text)


NORM = "harmonizer.norm.weight"
MANY_PARCELS = asdict(replace(TINY, dynamics=replace(TINY.dynamics, parcels=200)))
DAMAGES = {
    "no folder": (lambda f: (f / "config.json").unlink(), "config.json and model.safetensors, fou"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(), "found none at .*'release:<folder"
    ),
    "empty": (shortened("model.safetensors", 0), "whole weights .* cut short or damaged"),
    "truncated": (shortened("model.safetensors", 90_000), "whole weights .* cut short or damaged"),
    "truncated header": (shortened("model.safetensors", 100), "cut short or damaged"),
    "truncated description": (shortened("config.json", 200), "cut short or damaged"),
    "binary description": (written("config.json", b"\x80\x02\xff"), "cut short or damaged"),
    "another description": (written("config.json", b"[1, 2]"), "cut short or damaged"),
    "missing key": (altered(lambda s: s.pop(NORM)), rf"found 1 missing \({NORM}\) and 0 surplus"),
    "surplus key": (
        altered(lambda s: s.update(more=torch.ones(1))), r"0 missing \(none\) and 1 surplus \(more"
    ),
    "wrong shape": (
        altered(lambda s: s.update({NORM: torch.ones(5)})), rf"'{NORM}' of shape \(24,\) .*\(5,\)"
    ),
    "other numbers": (
        altered(lambda s: s[NORM].add_(1)), "weights with sha256 [0-9a-f]{12}, found"
    ),
    "other digest": (described(sha256="0" * 64), "sha256 000000000000, found"),
    "other atlas": (
        described(config=MANY_PARCELS), r"\(200, .*found \(100, .*another size or atlas"
    ),
    "unknown setting": (
        described(config=asdict(TINY) | {"colour": 1}), "configuration of a bhx model, .*colour"
    ),
    "no settings": (described(config=None), "configuration of a bhx model"),
    "no parts": (described(config={"dynamics": None}), "configuration of a bhx model"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_weights_are_refused(saved, name):
    damage, message = DAMAGES[name]
    damage(saved)
    with pytest.raises(InputError, match=message):
        bhx.load_model(saved)


def test_a_save_that_was_killed_is_noticed(saved):
    """New weights beside the old description: the checksum tells."""
    other = checkpoints_file.save_weights(model(seed=1), saved.parent / "other")
    os.replace(other / "model.safetensors", saved / "model.safetensors")
    with pytest.raises(InputError, match="not the one its config.json describes"):
        read_weights(saved)


def test_tables_of_another_atlas_are_refused():
    atlas = load_atlas("schaefer200")
    with pytest.raises(InputError, match=r"harmonics of shape \(100, 9\), found \(200, 9\)"):
        build(TINY, atlas.harmonics.values[:, :9], atlas.gradients.values[:, :4])


# The released files ------------------------------------------------------------------------------


TINY_RELEASE = replace(TINY, name="release", dynamics=replace(TINY.dynamics, patching="tape"))


def published(networks, value=lambda part, key, tensor: tensor):
    """The three released files' contents for these networks; `value` may replace tensors."""
    c = networks.config
    f, h = c.dynamics, c.harmonizer
    parts = {
        "F": {"encoder.": networks.dynamics, "decoder.": networks.dynamics_predictor,
              "encoder_ema.": networks.dynamics},
        "S": {"": networks.structure},
        "H": {"": networks.harmonizer},
    }  # fmt: skip
    out = {
        part: {
            prefix + k: value(part, prefix + k, v)
            for prefix, network in groups.items()
            for k, v in network.state_dict().items()
            if k not in dict(network.named_buffers())
        }
        for part, groups in parts.items()
    }
    for prefix in ("encoder.pos_embed", "decoder.predictor_pos_embed", "encoder_ema.pos_embed"):
        for name, width in (("encoder", f.width), ("decoder", f.predictor_width)):
            table = torch.zeros(1).expand(f.parcels * 10, width // 2)  # of another patch count
            out["F"][f"{prefix}.emb_h_{name}"] = table
    out["S"]["pos_embed"] = networks.structure.pos_embed
    out["H"]["pos_embed"] = networks.harmonizer.pos_embed
    out["H"]["decoder_pos_embed"] = networks.harmonizer.decoder_pos_embed
    assert h.data_tokens + 1 == out["H"]["pos_embed"].shape[1]
    return out


def write_release(folder, contents, harmonics, gradients):
    files = {
        "harmonix-f/model.pth": contents["F"],
        "harmonix-s/model.pth": {"model": contents["S"]},
        "harmonizer/model.pth": {
            "model": contents["H"], "epoch": 299, "optimizer": {"state": {}, "param_groups": []},
            "args": argparse.Namespace(lr=5e-4, output_dir="out", distributed=True, eps=None),
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, folder / name)
    with open(folder / "schaefer400_roi_eigenmodes.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *(f"mode_{i}" for i in range(harmonics.shape[1]))])
        writer.writerows([f"roi_{i}", *map(repr, row)] for i, row in enumerate(harmonics.tolist()))
    with open(folder / "gradient_mapping_400.csv", "w", newline="") as file:
        csv.writer(file).writerows(gradients.tolist())
    return folder


def test_what_is_written_in_the_released_layout_is_read(tmp_path):
    """Its keys are those of the published files, and it says its own size."""
    networks = model(seed=3, config=replace(TINY_RELEASE, name="other"))
    folder = released_file.write_release(networks, tmp_path / "written")
    for file, keys in zip((F, S, H), published(networks).values(), strict=True):
        found = torch.load(folder / file)
        assert {*found.get("model", found)} == {k for k in keys if ".emb_h_" not in k}
    read = read_weights(f"release:{folder}")
    assert torch.equal(hub(read), hub(networks))
    assert read.config == networks.config
    assert read.provenance["source"] == "other, released layout"
    again = released_file.write_release(networks, tmp_path / "again")
    assert read_weights(f"release:{again}").provenance == read.provenance


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A folder in the published format of a tiny model, and that model."""
    networks = model(seed=3, config=TINY_RELEASE)
    tables = networks.dynamics.pos_embed
    write_release(tmp_path, published(networks), tables.harmonics, tables.gradients)
    monkeypatch.setattr(checkpoints.read_release, "__defaults__", (TINY_RELEASE,))
    return tmp_path, networks


def test_released_files_give_the_released_model(released):
    folder, networks = released
    read = bhx.load_model(f"release:{folder}", device="cpu").networks
    for part in ("structure", "dynamics", "dynamics_predictor", "harmonizer"):
        assert same(getattr(read, part), getattr(networks, part))
    assert torch.equal(hub(read), hub(networks))
    assert read.config.dynamics.patching == "tape"
    assert read.structure_decoder is None  # not in the file
    assert len(read.provenance["weights_sha256"]) == 64


def test_the_moving_average_is_the_encoder(released):
    folder, networks = released
    path = folder / "harmonix-f" / "model.pth"
    state = torch.load(path)
    for key in list(state):
        if key.startswith("encoder."):
            state[key] = torch.full(state[key].shape, 7.0)
    torch.save(state, path)
    assert same(read_weights(f"release:{folder}").dynamics, networks.dynamics)


def test_a_masked_autoencoder_in_the_file_is_kept(released):
    folder, networks = released
    path = folder / "harmonix-s" / "model.pth"
    state = torch.load(path)
    decoder = networks.structure_decoder
    state["model"] |= decoder.state_dict() | {"decoder_pos_embed": decoder.decoder_pos_embed}
    torch.save(state, path)
    assert same(read_weights(f"release:{folder}").structure_decoder, decoder)


def test_released_weights_can_be_kept_in_our_format(released, tmp_path):
    folder, networks = released
    own = checkpoints_file.save_weights(read_weights(f"release:{folder}"), tmp_path / "own")
    assert torch.equal(hub(read_weights(own)), hub(networks))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_stripped_from_released_files(prefix, released):
    folder, networks = released

    def wrapped(content):
        return {prefix + key: value for key, value in content.items()}

    for path in folder.rglob("model.pth"):
        content = torch.load(path, weights_only=False)
        inner = "model" in content
        torch.save({"model": wrapped(content["model"])} if inner else wrapped(content), path)
    assert same(read_weights(f"release:{folder}").dynamics, networks.dynamics)


def test_numbers_of_numpy_beside_released_tensors_are_passed_over(released):
    folder, networks = released
    for path in folder.rglob("model.pth"):
        content = torch.load(path, weights_only=False)
        torch.save({**content, "epoch": np.int64(3), "loss": np.float64(0.5)}, path)
    assert same(read_weights(f"release:{folder}").dynamics, networks.dynamics)


def test_tables_of_positions_in_the_file_replace_ours(released):
    folder, networks = released
    path = folder / "harmonizer" / "model.pth"
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(path)
    state["model"]["pos_embed"] = state["model"]["pos_embed"] + 1
    torch.save(state, path)
    read = read_weights(f"release:{folder}").harmonizer
    torch.testing.assert_close(read.pos_embed, networks.harmonizer.pos_embed + 1)


def changed(name, change):
    def damage(folder):
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(folder / name)
        change(content.get("model", content))
        torch.save(content, folder / name)

    return damage


F, S, H = "harmonix-f/model.pth", "harmonix-s/model.pth", "harmonizer/model.pth"
BROKEN_RELEASES = {
    "no file": (
        lambda f: (f / H).unlink(), f"the released file '{H}' in .* found gradient_mapping"
    ),
    "no table": (
        lambda f: (f / "gradient_mapping_400.csv").unlink(), "gradient_mapping_400.csv' in"
    ),
    "missing F": (
        changed(F, lambda s: s.pop("encoder_ema.norm.bias")),
        r"DynamicsEncoder in .*\(encoder_ema\), found 1 missing \(norm.bias\)",
    ),
    "missing student": (
        changed(F, lambda s: s.pop("encoder.norm.bias")), r"\(encoder\), found 1 missing \(norm"
    ),
    "missing predictor": (
        changed(F, lambda s: s.pop("decoder.mask_token")),
        r"DynamicsPredictor in .*found 1 missing \(mask_token\)",
    ),
    "surplus F": (
        changed(F, lambda s: s.update({"encoder_ema.more": torch.ones(1)})), r"1 surplus \(more\)"
    ),
    "surplus group": (
        changed(F, lambda s: s.update({"head.weight": torch.ones(1)})), "found 'head.weight'"
    ),
    "missing S": (changed(S, lambda s: s.pop("cls_token")), r"1 missing \(cls_token\)"),
    "surplus S": (changed(S, lambda s: s.update(head=torch.ones(1))), r"1 surplus \(head\)"),
    "missing H": (changed(H, lambda s: s.pop("latent_tokens")), r"1 missing \(latent_tokens\)"),
    "wrong shape": (
        changed(H, lambda s: s.update(latent_tokens=torch.ones(9, 24))),
        r"'latent_tokens' of shape \(4, 24\) in .*, found \(9, 24\)",
    ),
    "wrong table": (
        changed(S, lambda s: s.update(pos_embed=torch.ones(1, 3, 24))),
        r"'pos_embed' of shape \(1, 151, 24\) .*found \(1, 3, 24\)",
    ),
    "truncated": (shortened(H, 5000), "file of tensors at .*harmonizer.*damaged"),
    "empty": (shortened(F, 0), "file of tensors at .*harmonix-f.*damaged"),
    "one tensor": (
        lambda f: torch.save(torch.ones(3), f / S), "named tensors at .*found one Tensor"
    ),
    "text in a table": (
        lambda f: (f / "gradient_mapping_400.csv").write_text("1,2,3,4\n1,2,x,4\n"),
        "table of numbers .*could not convert",
    ),
    "ragged table": (
        lambda f: (f / "gradient_mapping_400.csv").write_text("1,2,3,4\n1,2,3\n"),
        "table of numbers",
    ),
    "short table": (
        lambda f: (f / "gradient_mapping_400.csv").write_text("1,2,3,4\n"),
        r"gradients of shape \(100, 4\), found \(1, 4\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_RELEASES)
def test_broken_releases_are_refused(released, name):
    damage, message = BROKEN_RELEASES[name]
    damage(released[0])
    with pytest.raises(InputError, match=message):
        read_weights(f"release:{released[0]}")


class Hostile:
    """Unpickled, it would leave a file behind."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("name", [F, S, H])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "how", ["beside the tensors", "among the tensors", "in args", "bare pickle"]
)
def test_a_hostile_pickle_does_not_run(released, tmp_path, name, how):
    marker, path = tmp_path / "it ran", released[0] / name
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path)
    evil = Hostile(marker)
    if how == "beside the tensors":
        content["x"] = evil
    elif how == "among the tensors":
        content.get("model", content)["encoder.x"] = evil
    elif how == "in args":
        content["args"] = argparse.Namespace(x=evil)
    if how == "bare pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match="holds other objects .*Nothing in it was run"):
        read_weights(f"release:{released[0]}")
    assert not marker.exists()
    if how == "bare pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()  # it would have


def number(key):
    """A number of its own for each key."""
    return zlib.crc32(key.encode()) % 1000 / 1000


def test_the_published_files_load_at_their_full_size(tmp_path):
    """Every tensor holds one number, repeated without being stored, so the files stay small."""
    with torch.device("meta"):
        networks = Harmonix(RELEASE)
    contents = published(
        networks, lambda part, key, v: torch.tensor(number(part + key)).expand(v.shape)
    )
    shapes = {k: v.shape for part in contents.values() for k, v in part.items()}
    assert [len(contents[p]) for p in "FH"] == [399, 255]
    assert shapes["latent_tokens"] == (128, 768)
    assert shapes["decoder_pos_embed"] == (1, 8401, 512)
    for part in ("S", "H"):
        for key in ("pos_embed", "decoder_pos_embed"):
            if key in contents[part]:
                contents[part][key] = torch.tensor(0.5).expand(contents[part][key].shape)
    tables = torch.arange(400.0)[:, None]
    write_release(tmp_path, contents, tables.expand(-1, 200), tables.expand(-1, 30))
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.pth")) < 2e6

    read = bhx.load_model(f"release:{tmp_path}", device="cpu")
    assert (read.config.order, read.config.dynamics.patching) == ("17networks", "tape")
    assert read.atlas.roi.values[0].startswith("17Networks_LH_")
    parts = {"F": ("encoder_ema.", read.networks.dynamics), "S": ("", read.networks.structure),
             "H": ("", read.networks.harmonizer)}  # fmt: skip
    for part, (prefix, network) in parts.items():
        for key, value in network.named_parameters():
            assert value.flatten()[-1] == torch.tensor(number(part + prefix + key))
    assert read.networks.harmonizer.pos_embed[0, -1, -1] == 0.5
    assert torch.equal(read.networks.dynamics.pos_embed.gradients[:, 7], torch.arange(400.0))


def test_tables_beside_shipped_weights_are_read_by_name():
    errors = bhx.weights_table("paper", "held_out_errors")
    assert set(errors.stage) == {"structure", "dynamics", "harmonizer"}
    assert errors.groupby("target").explained.first().eq(0).all()
    for name in STAGES_OF:
        assert "connectome, flattened" in bhx.weights_table(name)
    with pytest.raises(InputError, match="table to be held_out_errors, planted_factors, found 'x'"):
        bhx.weights_table("paper", table="x")
    with pytest.raises(InputError, match="weights to be paper, workshop, found 'mine'"):
        bhx.weights_table("mine")
