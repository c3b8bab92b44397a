"""Checkpoints come whole from a hub, its cache or a directory, and what is damaged or hostile is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headwater.extractor.model import hub
from headwater.extractor.model.weight_files import read_directory
from headwater.extractor.model.weights import (
    CheckpointError,
    ModelConfig,
    load_checkpoint,
    read_config,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "model_type": "gpt2",
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 4,
    "n_positions": 8,
    "vocab_size": 16,
}
TENSORS = {
    name: torch.rand(shape) for name, shape in ModelConfig.from_hf(CONFIG, "test").shapes().items()
}
CLIENT = """
import json, sys, time
from headwater.extractor.model.weight_files import read_directory
from headwater.extractor.model.weights import CheckpointError, load_checkpoint, read_config
results = []
for model, revision, whole in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        found = load_checkpoint(model, revision) if whole else None
        result = [found.digest, str(found.tokenizer)] if found else [read_config(model, revision).d_vocab]
    except CheckpointError as error:
        result = [str(error)]
    results.append([*result, time.monotonic() - start])
print(json.dumps(results))
"""


def save_shards(home, whole, save, **index):
    """Split the tensors between two files, with the index that belongs to them or another one."""
    names, files = sorted(TENSORS), [whole.replace(".", f"-0000{i}-of-00002.") for i in (1, 2)]
    for i, file in enumerate(files):
        save({name: TENSORS[name] for name in names[i::2]}, home / file)
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    (home / f"{whole}.index.json").write_text(json.dumps({"weight_map": weight_map} | index))


def put_adapter(home):
    """Put a LoRA adapter beside a model's weights."""
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_{}.weight"
    factors = {name.format("A"): torch.ones(1, 4), name.format("B"): torch.ones(12, 1)}
    save_file(factors, home / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": None, "r": 1, "lora_alpha": 1}
    (home / "adapter_config.json").write_text(json.dumps(config))


def make_repositories(root):
    for name in ("safe", "shards", "bin", "bins"):
        home = root / "org" / name
        home.mkdir(parents=True)
        (home / "config.json").write_text(json.dumps(CONFIG))
        (home / "tokenizer.json").write_text("{}")
        if name != "bins":
            torch.save(TENSORS, home / "pytorch_model.bin")
    save_file(TENSORS, root / "org/safe/model.safetensors")
    shutil.copytree(root / "org/safe", root / "org/lora")
    put_adapter(root / "org/lora")
    shutil.copytree(root / "org/safe", root / "org/tf")
    (root / "org/tf/model.safetensors").rename(root / "org/tf/tf_model.h5")
    (root / "org/tf/pytorch_model.bin").unlink()
    save_shards(root / "org/shards", "model.safetensors", save_file)
    save_shards(root / "org/bins", "pytorch_model.bin", torch.save)


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that a download needs, for the repositories in `root`."""

    def do_GET(self):
        route = r"/(?:api/models/)?(\w+/[\w-]+)/?(\w*)/?(\w*)/?([^?]*).*"
        name, kind, commit, file = re.fullmatch(route, self.path).groups()
        home, body, headers = self.root / name, b"", {"ETag": f'"{file}"', "X-Repo-Commit": COMMIT}
        self.seen.append(f"{self.command} {file}")
        if name == "org/gated" or not home.is_dir() or commit not in ("", "main", COMMIT):
            code = (
                "GatedRepo"
                if name == "org/gated"
                else "RevisionNotFound"
                if home.is_dir()
                else "RepoNotFound"
            )
            headers = {"X-Error-Code": code}
        elif kind == "resolve":
            body = (home / file).read_bytes()
        else:
            files = sorted(home.iterdir())
            tree = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                for f in files
            ]
            info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}
            body = json.dumps(tree if kind == "tree" else info).encode()
        self.send_response(404 if "X-Error-Code" in headers else 200)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    do_HEAD = do_GET

    def log_message(self, *arguments):
        """Keep quiet."""


def ask(home, endpoint, wishes, **settings):
    """Start a process that loads models from `endpoint` with the cache in `home`; return a function for its answers."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()
    }
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **settings,
    }
    command = [sys.executable, "-c", CLIENT, json.dumps(wishes)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    return lambda: json.loads(process.communicate(timeout=300)[0].splitlines()[-1])


def test_hub_id_from_server_then_cache_then_clear_errors(tmp_path):
    make_repositories(tmp_path / "hub")
    handler = type("Handler", (Hub,), {"root": tmp_path / "hub", "seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        wishes = [
            ["org/safe", None, False],
            ["org/safe", None, True],
            ["org/shards", COMMIT, True],
            ["org/bin", "main", True],
            ["org/bins", None, True],
            ["org/lora", None, True],
            ["org/tf", None, True],
            ["org/none", None, True],
            ["org/safe", "v9", True],
            ["org/gated", None, True],
            ["org/a--b", None, True],
        ]
        found = ask(tmp_path / "home", endpoint, wishes)()
        server.shutdown()
    digest = load_checkpoint(str(tmp_path / "hub/org/safe")).digest
    adapted = load_checkpoint(str(tmp_path / "hub/org/lora")).digest
    assert [result[0] for result in found[:6]] == [16, *[digest] * 4, adapted]
    assert all(COMMIT in result[1] for result in found[1:6])
    for result, message in zip(
        found[6:],
        (
            "Its tf_model.h5 holds TensorFlow weights",
            "'org/none' does not exist on http",
            "at revision 'v9' does not exist",
            "'org/gated' is gated",
            "'org/a--b' is not a possible hub id",
        ),
        strict=True,
    ):
        assert message in result[0] and "\n" not in result[0]
    assert (
        handler.seen.count("GET model.safetensors")  # of org/safe and org/lora
        == 2 * handler.seen.count("GET pytorch_model.bin")
        == 2
    )

    wishes = [
        ["org/safe", None, True],
        ["org/bins", COMMIT, True],
        ["org/new", None, True],
        ["org/new", COMMIT, True],
    ]
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, never answers
        port = silent.getsockname()[1]
        runs = {
            "HF_HUB_OFFLINE forbids": ask(tmp_path / "home", endpoint, wishes, HF_HUB_OFFLINE="1"),
            "Connection refused": ask(tmp_path / "home", endpoint, wishes),
            "timed out": ask(
                tmp_path / "home", f"http://127.0.0.1:{port}", wishes, HF_HUB_ETAG_TIMEOUT="1"
            ),
        }
        for message, answers in runs.items():
            result = answers()
            assert [r[0] for r in result[:2]] == [digest] * 2
            assert all(message in r[0] and "\n" not in r[0] for r in result[2:])
            assert max(r[-1] for r in result) < 15


class Bomb(str):
    def __reduce__(self):
        return Path.touch, (
            Path(str(self)),
        )  # from 3.13 on a path is pickled with what it was made of


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize(
    "save",
    [
        torch.save,
        lambda x, path: torch.save(x, path, _use_new_zipfile_serialization=False),
        lambda x, path: path.write_bytes(pickle.dumps(x)),
        lambda x, path: path.write_bytes(pickle.dumps(x, 2)),
    ],
)
def test_no_code_of_a_checkpoint_runs(tmp_path, save):
    marker = tmp_path / "marker"
    save({"wte.weight": Bomb(marker)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"runs no code from checkpoints|not what torch\.save writes"
    ):
        read_directory(tmp_path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()


def put(name, content, cut=None):
    def write(home):
        if isinstance(content, str):
            (home / name).write_text(content)
        else:
            (save_file if name.endswith("safetensors") else torch.save)(content, home / name)
            (home / name).write_bytes((home / name).read_bytes()[:cut])

    return write


def index(weight_map):
    return lambda home: save_shards(home, "pytorch_model.bin", torch.save, weight_map=weight_map)


DAMAGES = [
    (put("model.safetensors", TENSORS, -9), r"model\.safetensors \(\d+ bytes\) cannot be read"),
    (put("pytorch_model.bin", TENSORS, -9), r"\(\d+ bytes\) cannot be read"),
    (put("pytorch_model.bin", "<html>"), r"not what torch\.save writes"),
    (
        put("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid"),
        "Git LFS pointer.*git lfs pull",
    ),
    (put("pytorch_model.bin", [torch.ones(1)]), "does not hold a plain table of named tensors"),
    (
        put("model.safetensors", {"a": torch.ones(1), "transformer.a": torch.ones(1)}),
        r"holds a twice, as transformer\.a",
    ),
    (lambda home: None, "no weights; expected one of model.safetensors"),
    (
        index({"wte.weight": "pytorch_model-00003-of-00002.bin"}),
        r"00003-of-00002\.bin is missing, though",
    ),
    (index({"z": "pytorch_model-00001-of-00002.bin"}), r"00001-of-00002\.bin lacks z, though"),
    (index({"z": "../z.bin"}), r"places z in '\.\./z\.bin'"),
    (index(None), "has no weight_map"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_damaged_files_are_named_with_what_to_do(tmp_path, damage, message):
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_directory(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_nowhere_is_said_to_be_nowhere(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"no file or directory 'missing\.pt'"):
        read_config("missing.pt")
    with pytest.raises(CheckpointError, match="only hub ids have revisions"):
        load_checkpoint(str(tmp_path), "main")
    monkeypatch.setattr(hub, "files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="'demo' is not part of this installation"):
        load_checkpoint("demo")
    make_repositories(tmp_path / "hub")
    (tmp_path / "hub/org/safe").rename(tmp_path / "demo")
    assert load_checkpoint("demo").tokenizer == tmp_path / "demo"
