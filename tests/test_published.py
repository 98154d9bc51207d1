"""Weights by name: from a stand-in of the Hugging Face Hub on this machine, then without it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

import bhx
from bhx.encode.model import save_model

SHA = "0" * 39 + "1"  # of the only commit


@pytest.fixture
def hub(tmp_path):
    """A hub with the repositories below `tmp_path / "hub"`, and what was asked of it."""
    root, asked = tmp_path / "hub", []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *about):
            asked.append(f"{self.command} {self.path}")

        def answer(self, body: bytes, **headers):
            self.send_response(200)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                folder = root / "/".join(parts[2:4])
                files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
                names = [str(p.relative_to(folder)) for p in files]
                if not files:
                    return self.send_error(404)
                if "tree" in parts:
                    tree = [
                        {"type": "file", "path": n, "size": p.stat().st_size, "oid": digest(p)}
                        for n, p in zip(names, files, strict=True)
                    ]
                    return self.answer(json.dumps(tree).encode(), Content_Type="application/json")
                about = {"id": "/".join(parts[2:4]), "sha": SHA, "cardData": {"license": "mit"}}
                about["siblings"] = [{"rfilename": n} for n in names]
                return self.answer(json.dumps(about).encode(), Content_Type="application/json")
            path = root / "/".join(parts[:2]) / "/".join(parts[4:])
            if not path.is_file():
                return self.send_error(404)
            return self.answer(path.read_bytes(), ETag=f'"{digest(path)}"', X_Repo_Commit=SHA)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield root, asked, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def digest(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


def load(source, tmp_path, endpoint, **environment):
    """What a fresh process says when it loads weights by name."""
    code = "import sys, bhx\n"
    code += "try: print(bhx.load_model(sys.argv[1]))\n"
    code += "except bhx.InputError as error: print('refused:', error)"
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    own |= {"BHX_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, source],
        env=os.environ | own | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_downloaded_once_said_and_then_offline(hub, tmp_path):
    root, asked, endpoint = hub
    model = bhx.random_model(seed=3)
    save_model(model.networks, root / "lab" / "weights", {"source": "a lab"})
    said, notes = load("hf:lab/weights", tmp_path, endpoint)
    assert "bhx model 'workshop'" in said
    size = sum(p.stat().st_size for p in (root / "lab" / "weights").iterdir()) / 1e6
    assert f"Downloading {size:,.0f} MB of lab/weights; license: mit" in notes
    assert any(line.startswith("GET /lab/weights/resolve") for line in asked)
    asked.clear()
    again, notes = load("hf:lab/weights", tmp_path, endpoint)
    assert (again, asked) == (said, [])
    assert "Downloading" not in notes


def test_release_by_name(hub, tmp_path):
    root, _, endpoint = hub
    bhx.write_release(bhx.random_model(bhx.STAND_IN).networks, root / "authors" / "harmonix")
    said, notes = load("release", tmp_path, endpoint, BHX_RELEASE="authors/harmonix")
    assert "bhx model 'stand-in'" in said
    assert "MB of authors/harmonix" in notes


def test_changed_weights_are_refused(hub, tmp_path):
    root, _, endpoint = hub
    for seed in (1, 2):
        save_model(bhx.random_model(seed=seed).networks, root / "lab" / "weights", {})
        said, _ = load("hf:lab/weights", tmp_path, endpoint, HF_HOME=str(tmp_path / f"hf{seed}"))
    assert "refused: Expected weights of lab/weights with sha256" in said
    assert "as read first" in said


def test_nothing_there_and_nobody_answers(hub, tmp_path):
    _, _, endpoint = hub
    said, _ = load("hf:lab/none", tmp_path, endpoint)
    assert said.startswith("refused: Expected the files of 'lab/none', found none here")
    said, _ = load("hf:lab/none", tmp_path, "http://127.0.0.1:9")
    assert "none there" in said
    assert "release:<folder>" in said
    said, _ = load("hf:no name", tmp_path, endpoint)
    assert said.startswith("refused: Expected the files of 'no name'")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(bhx.InputError, match=r"pip install 'bhx\[weights\]'"):
        bhx.load_model("release")


def test_folders_and_shipped_names_as_before(tmp_path):
    assert bhx.load_model("workshop").config.name == "workshop"
    with pytest.raises(bhx.InputError, match="folder of weights, found HarmonixConfig.*preset="):
        bhx.load_model(bhx.PRESETS["workshop"])
    with pytest.raises(bhx.InputError, match="Shipped weights are: paper, workshop"):
        bhx.load_model(Path(tmp_path) / "none")
