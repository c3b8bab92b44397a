"""A wrong request is refused in one paragraph that says what to do, and nothing is touched."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

GOOD = "--text", "text.txt", "--out", "run"


class Malicious:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.fixture
def place(tiny_gpt2, tiny_text, tmp_path, monkeypatch):
    """Stand in a directory with a model, a text, and a few unusable things."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(tiny_gpt2, "model")
    shutil.copy(tiny_text, "text.txt")
    Path("empty.txt").touch()
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("rows.jsonl").write_text('{"text": "the fox", "n": 1}\n{"text": "the dog", "n": 2}\n')
    Path("torn.jsonl").write_text('{"text": "the fox"}\n{"text": "the')
    Path("bad.toml").write_text("seq_len = \n")
    Path("unknown.toml").write_text("seq_length = 3\n")
    Path("type.toml").write_text('bos = "yes"\n')
    Path("both.toml").write_text('preset = "all"\nsites = ["resid"]\n')
    for name, ids in {
        "big": [[1, 999]],
        "wide": [list(range(40))],
        "cube": [[[1]], [[2]]],
        "float": [[1.5]],
    }.items():
        np.save(f"{name}.npy", np.array(ids))
    np.save("objects.npy", np.array([Malicious()], object), allow_pickle=True)
    return tmp_path


CASES = {
    "no such text": (["--text", "nope.txt"], "no file 'nope.txt'", "Check the path"),
    "glob without files": (["--text", "*.csv"], "matches none"),
    "empty text": (["--text", "empty.txt"], "no tokens", "1 empty document"),
    "not UTF-8": (["--text", "binary.txt"], "binary.txt is not UTF-8", "iconv"),
    "missing column": (["--text", "rows.jsonl", "--column", "body"], "no 'body'", "'text', 'n'"),
    "torn line": (["--text", "torn.jsonl"], "torn.jsonl:2 is not valid JSON"),
    "no text and no tokens": ([], "--text or --tokens", "neither"),
    "text and tokens": (
        ["--text", "text.txt", "--tokens", "big.npy"],
        "--text and --tokens",
        "one of them",
    ),
    "preset and sites": (["--preset", "all", "--sites", "q"], "--preset and --sites"),
    "token id out of range": (
        ["--tokens", "big.npy"],
        "token id 999 at row 0, position 1",
        "0 to 279",
    ),
    "rows longer than the model": (["--tokens", "wide.npy"], "40 positions", "only 32"),
    "tokens in three dimensions": (["--tokens", "cube.npy"], "shape [2, 1, 1]", "one long row"),
    "tokens that are no integers": (["--tokens", "float.npy"], "dtype float64", "integers"),
    "tokens that would run code": (["--tokens", "objects.npy"], "objects.npy cannot be read"),
    "tokens with a text's flag": (
        ["--tokens", "big.npy", "--bos"],
        "--bos says how text becomes sequences",
    ),
    "sequence longer than the model": (
        [*GOOD, "--seq-len", "64"],
        "--seq-len is 64",
        "only 32 positions",
    ),
    "no number": ([*GOOD, "--seq-len", "long"], "--seq-len is 'long'", "whole number"),
    "block": ([*GOOD, "--block", "12"], "--block is 12", "power of two", "8 and 16"),
    "zero": ([*GOOD, "--max-sequences", "0"], "--max-sequences is 0", "from 1 on"),
    "top-k": ([*GOOD, "--sites", "top_tokens", "--top-k", "281"], "--top-k is 281", "280 tokens"),
    "unknown site": (
        [*GOOD, "--sites", "patern"],
        "no site 'patern'; did you mean 'pattern'?",
        "headwater sites",
    ),
    "unknown preset": (
        [*GOOD, "--preset", "full"],
        "--preset is 'full'",
        "residual, patterns, statistics, all",
    ),
    "layer": (
        [*GOOD, "--sites", "q", "--layers", "0,2"],
        "--layers '0,2': 2 is out of range",
        "0 to 1",
    ),
    "layer in a name": ([*GOOD, "--sites", "pattern.7"], "'pattern.7' is layer 7", "0 to 1"),
    "depth": ([*GOOD, "--depths", "3:9"], "9 is out of range", "3 depths"),
    "head": ([*GOOD, "--sites", "z", "--heads", "-3"], "-3 is out of range", "2 heads"),
    "position": ([*GOOD, "--positions", "32"], "32 is out of range", "32 positions"),
    "malformed selection": (
        [*GOOD, "--depths", "1-2"],
        "'1-2' is not an index or a range",
        "0,4:8",
    ),
    "empty selection": ([*GOOD, "--depths", "2:1"], "selects nothing"),
    "selection without effect": ([*GOOD, "--layers", "1"], "resid has no layers", "Use --depths"),
    "compute": ([*GOOD, "--compute", "int8"], "--compute is 'int8'", "fp32, bf16, fp16"),
    "dtype": ([*GOOD, "--dtype", "float64"], "--dtype has 'float64'", "float16, float32"),
    "bfloat16": ([*GOOD, "--dtype", "resid=bfloat16"], "zarr-python has no bfloat16", "--compute"),
    "dtype of no site": ([*GOOD, "--dtype", "rsid=float32"], "no site 'rsid'"),
    "codec": ([*GOOD, "--codec", "gzip"], "--codec has 'gzip'", "none, zstd-1, zstd-3"),
    "mode": ([*GOOD, "--mode", "rows"], "--mode is 'rows'", "pack, document"),
    "foreign tokenizer": (
        [*GOOD, "--tokenizer", "foreign"],
        "id 279",
        "d_vocab is 100",
        "belongs to the model",
    ),
    "no such tokenizer": ([*GOOD, "--tokenizer", "none.json"], "no tokenizer at 'none.json'"),
    "label of plain text": ([*GOOD, "--labels", "author"], "label 'author' is not there"),
    "bad TOML": ([*GOOD, "--config", "bad.toml"], "bad.toml cannot be read", "line 1"),
    "missing TOML": ([*GOOD, "--config", "none.toml"], "none.toml cannot be read", "No such file"),
    "unknown TOML key": (
        [*GOOD, "--config", "unknown.toml"],
        "'seq_length'",
        "did you mean 'seq_len'?",
    ),
    "wrong TOML type": (
        [*GOOD, "--config", "type.toml"],
        "--bos is 'yes'",
        "true or false",
        "in type.toml",
    ),
    "TOML with two of one": ([*GOOD, "--config", "both.toml"], "--preset and --sites", "both.toml"),
    "out is a file": (["--text", "text.txt", "--out", "text.txt"], "text.txt is a file"),
    "out below a file": (
        ["--text", "text.txt", "--out", "text.txt/run"],
        "text.txt/run cannot be made",
        "text.txt)",
    ),
    "out is foreign": (
        ["--text", "text.txt", "--out", "model"],
        "not a Headwater run",
        "'config.json'",
    ),
    "no out": (["--text", "text.txt"], "--out is missing"),
    "revision of a directory": ([*GOOD, "--revision", "main"], "'main'", "only hub ids"),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_requests_leave_nothing_behind(cli, place, name):
    arguments, *parts = CASES[name]
    if name == "foreign tokenizer":
        Path("foreign").mkdir()
        shutil.copy("model/tokenizer.json", "foreign")
        edit_config(vocab_size=100)
    elif "--out" not in arguments and name != "no out":
        arguments = [*arguments, "--out", "new/run"]
    before = tree()
    result = cli("extract", "--model", "model", *arguments)
    result.error(2, *parts)
    assert result.out == "" and tree() == before


def tree():
    return {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()} | {
        path: 0 for path in Path().rglob("*") if path.is_dir()
    }


def edit_config(**changes):
    path = Path("model/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if "vocab_size" in changes:
        weights = load_file("model/model.safetensors")
        weights["wte.weight"] = weights["wte.weight"][: changes["vocab_size"]].clone()
        save_file(weights, "model/model.safetensors")


def spoil_weights(name, function):
    weights = load_file("model/model.safetensors")
    save_file(weights | {name: function(weights[name])}, "model/model.safetensors")


def as_pickle(value):
    Path("model/model.safetensors").unlink()
    torch.save(value, "model/pytorch_model.bin", pickle_module=pickle)


MODELS = {
    "truncated": (
        lambda: os.truncate("model/model.safetensors", 1000),
        "1000 bytes) cannot be read",
        "again",
    ),
    "code": (lambda: as_pickle({"wte.weight": Malicious()}), "objects beyond tensors", "no code"),
    "shape": (
        lambda: spoil_weights("h.1.mlp.c_fc.weight", lambda t: t.T.contiguous()),
        "has shape [64, 16]",
    ),
    "NaN": (
        lambda: spoil_weights("ln_f.bias", lambda t: t / 0),
        "ln_f.bias has 16 of 16 values that are NaN",
    ),
    "no weights": (
        lambda: Path("model/model.safetensors").unlink(),
        "no weights",
        "model.safetensors",
    ),
    "no config": (lambda: Path("model/config.json").unlink(), "no config.json"),
    "another family": (lambda: edit_config(model_type="llama"), "'llama'", "GPT-2 only"),
    "no tokenizer": (
        lambda: Path("model/tokenizer.json").unlink(),
        "without a tokenizer",
        "--tokenizer",
    ),
    "broken tokenizer": (
        lambda: Path("model/tokenizer.json").write_text("{"),
        "tokenizer.json cannot be read",
    ),
    "no directory": (lambda: shutil.rmtree("model"), "hub model 'model'", "HF_HUB_OFFLINE"),
}


@pytest.mark.parametrize("name", MODELS)
def test_unusable_models_are_refused(cli, place, name):
    spoil, *parts = MODELS[name]
    spoil()
    before = tree()
    cli("extract", "--model", "model", *GOOD).error(2, *parts)
    assert tree() == before and not Path("hacked").exists()


USAGE = {
    (): "a command is missing; expected one of extract, plan",
    ("extrat",): "no command 'extrat'; did you mean extract?",
    ("--json",): "'--json' stands where a command is expected",
    ("status",): "required: RUN. See `headwater status --help`",
    (
        "extract",
        "--layer",
        "3",
    ): "'--layer' is not an argument of `headwater extract`; did you mean --layers?",
    (
        "extract",
        "--sites",
        "q",
        "k",
    ): "'k' is not an argument of `headwater extract`. Lists are written with commas",
    ("extract", "--seq-len"): "--seq-len: expected one argument",
    ("verify", "run", "--workers", "x"): "--workers is 'x'; expected a whole number",
    ("sites", "--model", "./none.pt"): "no file or directory './none.pt'",
}


@pytest.mark.parametrize("arguments", USAGE)
def test_a_command_line_that_cannot_be_read(cli, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = cli(*arguments)
    result.error(2, USAGE[arguments])
    assert result.out == "" and result.err.count("\n") == 1
