"""What users hand over as a model is read as they mean it, or refused by what it is and what to do."""

from __future__ import annotations

import copy
import json
import os
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import headwater
from headwater.extractor.model.activations import ACTIVATIONS, SMOOTH
from headwater.extractor.model.weights import CheckpointError, load_checkpoint, read_config
from headwater.extractor.plan import geometry
from headwater.extractor.sites import PRESETS, SITES, RequestError, parse_site
from headwater.store.place import place_of

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 32, "vocab_size": 300}
LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
IDS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 20))


def make_model(**changes):
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**SIZES | special | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model"
    make_model().save_pretrained(path)
    return path


def last_resid(model, ids=IDS):
    """Return what enters ln_f of a transformers model, in float64."""
    got = []
    model = model.double().eval()
    handle = model.transformer.ln_f.register_forward_pre_hook(lambda _, x: got.append(x[0]))
    with torch.no_grad():
        model(torch.as_tensor(ids))
    handle.remove()
    return got[0].numpy()


def close(found, expected):
    return np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def nanogpt_file(path, model, bias=True):
    """Write a model as nanoGPT would: linear weights as [out, in]."""
    state = {}
    for name, tensor in model.state_dict().items():
        linear = name.endswith(".weight") and any(part in name for part in LINEAR)
        state[f"_orig_mod.{name}"] = tensor.t().contiguous() if linear else tensor
    arguments = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 32, "vocab_size": 300}
    torch.save({"model": state, "model_args": arguments | {"bias": bias, "dropout": 0.0}}, path)


# Names of tensors


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module.", "model.", "base_model.model.", "policy.", "_orig_mod.module."],
)
def test_a_prefix_is_taken_off_and_named(saved, prefix):
    digest = load_checkpoint(str(saved)).digest
    file = saved / "model.safetensors"
    save_file({prefix + name: t for name, t in load_file(file).items()}, file)
    found = load_checkpoint(str(saved))
    assert found.digest == digest
    assert prefix.split(".")[0] in found.notes[0] and "was taken off" in found.notes[0]


def test_wrappers_between_the_parts_of_a_name_are_taken_off(saved):
    digest = load_checkpoint(str(saved)).digest
    file = saved / "model.safetensors"
    save_file({n.replace(".h.", ".h._orig_mod."): t for n, t in load_file(file).items()}, file)
    assert load_checkpoint(str(saved)).digest == digest


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda n: f"policy.{n}".replace("h.1", "x"), r"lacks h\.1\.ln_1\.weight.*it holds h\.0"),
        (lambda n: n.replace("wte", "tok"), r"lacks wte\.weight.*it holds h\.0\.attn"),
        (lambda n: n.replace("c_fc.", "c_fc.lora_A."), "merge_and_unload"),
    ],
)
def test_incomplete_names_are_listed(saved, rename, message):
    file = saved / "model.safetensors"
    save_file({rename(name): t for name, t in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(str(saved))


def test_two_models_in_one_file_are_refused(saved):
    file = saved / "model.safetensors"
    tensors = load_file(file)
    both = {f"{p}.{name}": t.clone() for p in ("policy", "value") for name, t in tensors.items()}
    save_file(both, file)
    with pytest.raises(CheckpointError, match=r"several models.*'policy\.', 'value\.'"):
        load_checkpoint(str(saved))


# What is no checkpoint, or not one by itself


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.gguf", b"GGUF\3\0\0\0", "llama.cpp.*Name the Hugging Face directory"),
        ("weights", b"GGUF\3\0\0\0", "GGUF"),
        ("tf_model.h5", b"\x89HDF\r\n", "TensorFlow.*from_tf=True"),
        ("flax_model.msgpack", b"\x85", "Flax.*from_flax=True"),
        ("model.onnx", b"\x08", "ONNX"),
        ("model.safetensors", b"\x08", "Name the directory"),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content * 40)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(str(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tf_model.h5", r"Its tf_model\.h5 holds TensorFlow weights.*from_tf"),
        ("flax_model.msgpack", "Flax"),
        ("model.fp16.safetensors", r"has model\.fp16\.safetensors.*link it as model\.safetensors"),
        ("model.safetensors.incomplete", "download that did not end"),
        ("model.gguf", "GGUF"),
        ("notes.txt", r"It holds config\.json.*notes\.txt"),
    ],
)
def test_a_directory_without_weights_says_what_it_has(saved, name, message):
    (saved / "model.safetensors").rename(saved / name)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(str(saved))


def test_a_folder_of_the_hub_cache_stands_for_its_snapshot(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digest = load_checkpoint(str(saved)).digest
    folder = tmp_path / "models--org--ok"
    (folder / "snapshots").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no snapshot.*Name the hub id, org/ok"):
        read_config(str(folder))
    saved.rename(folder / "snapshots" / "abc")
    assert load_checkpoint("models--org--ok").digest == digest
    (folder / "snapshots" / "def").mkdir()
    with pytest.raises(CheckpointError, match=r"2 snapshots \(abc, def\)"):
        read_config(str(folder))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    assert load_checkpoint(str(folder)).digest == digest


def test_a_folder_that_hides_a_hub_id_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(CheckpointError, match=r"'gpt2' is a directory here that is empty.*rename"):
        read_config("gpt2")
    (tmp_path / "gpt2" / "zarr.json").write_text("{}")
    with pytest.raises(CheckpointError, match="'gpt2' is a directory here that has no config"):
        read_config("gpt2")


class Refusing(BaseHTTPRequestHandler):
    """A hub that knows no token, and no model."""

    def do_GET(self):
        token = "Authorization" in self.headers
        self.send_response(401 if token else 404)
        if token:
            self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
        else:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments):
        """Keep quiet."""


def test_a_refused_token_and_a_misspelt_name_are_explained(tmp_path):
    asking = (
        "import sys; from headwater.extractor.model.weights import read_config as r\n"
        + "\n".join(["try: r(sys.argv[1])", "except ValueError as e: print(e)"])
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path),
        }
        running = [
            subprocess.Popen(
                [sys.executable, "-c", asking, model],
                env=environment | token,
                stdout=subprocess.PIPE,
                text=True,
            )
            for model, token in (("org/ok", {"HF_TOKEN": "hf_dummy"}), ("dmeo", {}))
        ]
        refused, misspelt = (process.communicate(timeout=120)[0] for process in running)
        server.shutdown()
    for words in ("Invalid credentials", "variable HF_TOKEN", "expired", "hf auth login"):
        assert words in refused
    assert "Did you mean 'demo'?" in misspelt


# Sizes


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_embd": 2 * 10**8, "n_head": 2 * 10**8},
        {"n_layer": 2**31},
        {"n_positions": 2**40},
        {"n_inner": 10**12},
        {"vocab_size": 10**15},
    ],
)
def test_impossible_sizes_are_refused_at_once(saved, cli, tmp_path, sizes):
    edit_json(saved / "config.json", **sizes)
    (tmp_path / "a.txt").write_text("the cat")
    start = time.monotonic()
    answer = cli("plan", "--model", str(saved), "--text", str(tmp_path / "a.txt"))
    assert answer.code == 2 and "expected at most" in answer.err
    assert time.monotonic() - start < 10


def test_json_that_is_nested_or_long_without_end_is_refused(saved):
    (saved / "config.json").write_text("[" * 10**6)
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_config(str(saved))
    with (saved / "config.json").open("wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(CheckpointError, match="more than"):
        read_config(str(saved))


def test_headers_and_pickles_ask_for_no_more_than_there_is(saved, tmp_path):
    file = saved / "model.safetensors"
    with file.open("wb") as sparse:
        sparse.write(struct.pack("<Q", 90_000_000))
        sparse.truncate(100_000_000)
    with pytest.raises(CheckpointError, match="its header asks for 90,000,000 bytes"):
        load_checkpoint(str(saved))
    file.unlink()
    huge = torch.zeros(1).expand(10**6, 10**6)
    torch.save({"transformer.wte.weight": huge}, saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="more elements than are stored"):
        load_checkpoint(str(saved))


# Adapters


def write_adapter(directory, modules, rank=2, alpha=6, **config):
    """Write an adapter as peft does, and return each module's B A, [out, in]."""
    tensors, products = {}, {}
    chance = torch.Generator().manual_seed(1)
    for module, (n_out, n_in) in modules.items():
        a = torch.randn(rank, n_in, generator=chance)
        b = 0.1 * torch.randn(n_out, rank, generator=chance)
        name = f"base_model.model.{module}"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        products[module] = b.double() @ a.double()
    save_file(tensors, directory / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": rank}
    config = plain | {"lora_alpha": alpha, "bias": "none"} | config
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return products


MODULES = {
    "transformer.h.0.attn.c_attn": (24, 8),
    "transformer.h.1.attn.c_proj": (8, 8),
    "transformer.h.1.mlp.c_fc": (32, 8),
    "lm_head": (300, 8),
}


@pytest.mark.parametrize(
    ("config", "scale"), [({}, 3.0), ({"use_rslora": True, "fan_in_fan_out": True}, 6 / 2**0.5)]
)
def test_an_adapter_beside_the_weights_is_applied(saved, config, scale):
    base = load_checkpoint(str(saved))
    products = write_adapter(saved, MODULES, **config)
    model = make_model().double()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for module, delta in products.items():
            weight = model.get_submodule(module).weight
            weight += scale * (delta if module == "lm_head" else delta.T)
    found = load_checkpoint(str(saved))
    assert found.digest != base.digest and not found.config.tied
    assert "LoRA adapter of rank 2" in found.notes[0]
    for name, tensor in found.tensors.items():
        full = name if name.startswith("lm_head") else f"transformer.{name}"
        expected = model.state_dict()[full]
        assert torch.allclose(tensor.double(), expected, atol=1e-5), name
    assert close(headwater.capture(str(saved), IDS, ["resid"]).resid.values[-1], last_resid(model))


def test_a_run_of_an_adapted_model_says_so(saved, cli, tmp_path):
    write_adapter(saved, {"transformer.h.0.attn.c_attn": (24, 8)})
    np.save(tmp_path / "ids.npy", IDS)
    request = ["--model", str(saved), "--tokens", str(tmp_path / "ids.npy")]
    plan = cli("plan", *request)
    answer = cli("extract", *request, "--out", str(tmp_path / "run"))
    assert "LoRA adapter of rank 2" in plan.out and "LoRA adapter of rank 2" in answer.out
    (saved / "adapter_model.safetensors").unlink()
    (saved / "adapter_config.json").unlink()
    refused = cli("extract", *request, "--out", str(tmp_path / "run"))
    assert refused.code == 2 and "model weights" in refused.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["wte"]}, "modules_to_save"),
        ({"alpha_pattern": {"c_attn": 4}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
    ],
)
def test_more_than_plain_lora_is_refused_by_name(saved, change, message):
    write_adapter(saved, {"transformer.h.0.attn.c_attn": (24, 8)}, **change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(str(saved))


@pytest.mark.parametrize(
    ("modules", "extra", "message"),
    [
        ({"transformer.h.9.attn.c_attn": (24, 8)}, {}, r"changes h\.9\.attn\.c_attn, which"),
        ({"transformer.h.0.attn.c_attn": (8, 8)}, {}, r"has shape \[8, 8\], but"),
        ({}, {"base_model.model.transformer.wte.lora_embedding_A": (2, 300)}, "more than plain"),
        ({}, {"base_model.model.h.0.attn.c_attn.lora_A.weight": (2, 8)}, "do not fit each other"),
    ],
)
def test_an_adapter_of_another_model_is_refused(saved, modules, extra, message):
    write_adapter(saved, modules)
    file = saved / "adapter_model.safetensors"
    save_file(load_file(file) | {name: torch.ones(shape) for name, shape in extra.items()}, file)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(str(saved))


def test_an_adapter_alone_names_its_base(tmp_path):
    write_adapter(tmp_path, {})
    with pytest.raises(CheckpointError, match="only an adapter, for the base model 'org/base'"):
        load_checkpoint(str(tmp_path))


# Activation functions that a checkpoint does not name


def test_nanogpt_is_exact_gelu_unless_another_is_asked_for(tmp_path, cli):
    nanogpt_file(tmp_path / "ckpt.pt", make_model())
    np.save(tmp_path / "ids.npy", IDS)
    path, resid = str(tmp_path / "ckpt.pt"), {}
    for name in ("gelu_new", "gelu", "relu"):
        expected = last_resid(make_model(activation_function=name))
        resid[name] = headwater.capture(path, IDS, ["resid"], activation=name).resid.values[-1]
        assert np.abs(resid[name] - expected).max() < 1e-5
    default = headwater.capture(path, IDS, ["resid"])
    assert np.array_equal(default.resid.values[-1], resid["gelu"])
    assert len({load_checkpoint(path, None, name).digest for name in ("gelu", "gelu_new")}) == 2

    request = ["--model", path, "--tokens", str(tmp_path / "ids.npy"), "--dtype", "float32"]
    out = str(tmp_path / "run")
    assert "give --activation gelu_new" in cli("plan", *request).out
    answer = cli("extract", *request, "--out", out, "--activation", "gelu_new")
    assert "activation function is gelu_new, as asked" in answer.out
    run = headwater.open_run(out)
    assert np.array_equal(run["resid"][-1], resid["gelu_new"])
    assert cli("extract", "--out", out).code == 0  # as it was made
    assert cli("extract", *request, "--out", out).code == 2
    assert cli("ablate", "--run", out, "--target", "z[1]", "--scales", "0").code == 0


def test_an_activation_that_contradicts_the_configuration_is_refused(saved, tmp_path):
    for same in (name for name, f in ACTIVATIONS.items() if f is ACTIVATIONS["gelu_new"]):
        assert load_checkpoint(str(saved), None, same).config.activation == "gelu_new"
    with pytest.raises(CheckpointError, match="is 'gelu_new', but 'relu' was asked for"):
        load_checkpoint(str(saved), None, "relu")
    with pytest.raises(CheckpointError, match="'tanhh', which Headwater does not compute"):
        load_checkpoint(str(saved), None, "tanhh")
    raw = json.loads((saved / "config.json").read_text())
    del raw["activation_function"]
    (saved / "config.json").write_text(json.dumps(raw))
    assert load_checkpoint(str(saved), None, "relu").config.activation == "relu"
    assert load_checkpoint(str(saved)).config.activation == "gelu_new"


# What capture takes


class NanoBlock(torch.nn.Module):
    """A block with the parts of nanoGPT's, by name."""

    def __init__(self, function):
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)
        self.attn, self.mlp = torch.nn.Module(), NanoMLP(function)
        self.attn.c_attn, self.attn.c_proj = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)


class NanoMLP(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.c_fc, self.c_proj = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)
        self.function, self.dropout = function, torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.c_proj(self.function(self.c_fc(x))))


def nanogpt_module(model, function):
    """Build nanoGPT's module around the weights of a transformers model."""
    module = torch.nn.Module()
    module.transformer = torch.nn.ModuleDict(
        {
            "wte": torch.nn.Embedding(300, 8),
            "wpe": torch.nn.Embedding(32, 8),
            "h": torch.nn.ModuleList([NanoBlock(function) for _ in range(2)]),
            "ln_f": torch.nn.LayerNorm(8),
        }
    )
    module.lm_head = torch.nn.Linear(8, 300, bias=False)
    state = {}
    for name, tensor in model.state_dict().items():
        linear = name.endswith(".weight") and any(part in name for part in LINEAR)
        state[name] = tensor.t() if linear else tensor
    module.load_state_dict(state)
    module.config = SimpleNamespace(n_layer=2, n_head=2, n_embd=8, block_size=32, vocab_size=300)
    return module.train()


def test_a_model_in_memory_is_captured_as_it_is():
    model = make_model()
    expected = last_resid(copy.deepcopy(model))
    for module in (
        model,
        model.transformer,
        torch.nn.DataParallel(model),
        copy.deepcopy(model).bfloat16(),
    ):
        found = headwater.capture(module, IDS, ["resid", "loss"])
        if found.attrs["model"] != "GPT2LMHeadModel" or module is model:
            assert close(found.resid.values[-1], expected)
    assert not close(found.resid.values[-1], expected)
    assert found.attrs["model"] == "GPT2LMHeadModel"
    with pytest.raises(CheckpointError, match="on the device meta, which holds no values"):
        headwater.capture(copy.deepcopy(model).to("meta"), IDS)
    with pytest.raises(CheckpointError, match="Linear in memory; expected a path, a hub id"):
        headwater.capture(torch.nn.Linear(2, 2), IDS)
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        model.transformer.h[0].attn.c_attn = torch.nn.ModuleDict(
            {"lora_A": torch.nn.Linear(2, 2), "base_layer": model.transformer.h[0].attn.c_attn}
        )
        headwater.capture(model, IDS)


def test_a_directory_that_was_written_anew_is_read_anew(tmp_path):
    first, second = make_model(), make_model(activation_function="relu")
    for model in (first, second):
        model.save_pretrained(tmp_path)
        found = headwater.capture(str(tmp_path), IDS).resid.values[-1]
        assert close(found, last_resid(model))


@pytest.mark.parametrize(("name", "function"), sorted(SMOOTH.items()))
def test_the_activation_of_a_nanogpt_in_memory_is_found(name, function):
    model = make_model(activation_function=name)
    module = nanogpt_module(model, function)
    assert close(headwater.capture(module, IDS).resid.values[-1], last_resid(model))


def test_a_nanogpt_with_another_mlp_is_refused():
    module = nanogpt_module(make_model(), torch.sin)
    with pytest.raises(CheckpointError, match="computes none of gelu"):
        headwater.capture(module, IDS)


def test_token_ids_of_every_kind_are_taken():
    model = make_model()
    rows = [[1, 2, 3], [4, 5, 6]]
    expected = headwater.capture(model, np.array(rows)).resid.values
    mask = [[1, 1, 1], [1, 1, 1]]
    for given in (
        rows,
        tuple(map(tuple, rows)),
        torch.tensor(rows),
        np.array(rows, np.uint16),
        [np.array(row) for row in rows],
        [torch.tensor(row) for row in rows],
        {"input_ids": rows, "attention_mask": mask},
        BatchEncoding({"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}),
    ):
        assert np.array_equal(headwater.capture(model, given).resid.values, expected)
    for given in (rows[0], torch.tensor(rows[0]), np.array(rows[0]), range(1, 4)):
        assert np.array_equal(headwater.capture(model, given).resid.values, expected[:, :1])
    ragged = headwater.capture(model, [[1, 2, 3], [4, 5]])
    assert ragged.token.values.tolist() == [[1, 2, 3], [4, 5, -1]]
    left = headwater.capture(
        model, {"input_ids": [[0, 4, 5], [1, 2, 3]], "attention_mask": [[0, 1, 1], [1, 1, 1]]}
    )
    assert left.token.values.tolist() == [[-1, 4, 5], [1, 2, 3]]
    assert np.allclose(left.resid.values[:, 0, 1:], ragged.resid.values[:, 1, :2], atol=1e-5)


def test_what_a_tokenizer_returns_is_taken():
    home = files("headwater.extractor") / "demo"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(home / "tokenizer.json"))
    tokenizer.pad_token = "<|endoftext|>"
    texts = ["the cat sat on the mat", "Hello"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    found, plain = (headwater.capture("demo", given) for given in (batch, texts))
    assert found.equals(plain)
    assert found.token_string.values[1, -1] == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": ["a"]}, "is a dict with text; expected"),
        ({}, "with nothing"),
        (pandas.DataFrame({"text": ["a"]}), "is a DataFrame; expected.*one column as a list"),
        ({"input_ids": [[1]], "token_type_ids": [[0]]}, "token_type_ids would change"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1]]},
            r"shape \[1, 1\], but input_ids \[1, 2\]",
        ),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "padding"),
        (b"text", "is a bytes"),
        (Path("a.txt"), "Path"),
        (7, "is a int"),
        ([], "is an empty list"),
        ("half \ud83d", "text 0 holds a lone surrogate, .* at character 5"),
        (["a", "\ud83d"], "text 1 holds a lone surrogate"),
        (["a", 3], "item 1 of the texts is a int"),
        ([1, "a"], "item among lists of token ids is a int"),
        ([[1], "a"], "item among lists of token ids is a str"),
        ([[1.5]], "dtype float64"),
        ([[1, [2]]], "expected"),
        ([[[1]]], r"shape \[1, 1\]"),
        ([[]], "dtype float64"),
        (torch.tensor([[1.0]]), "dtype float32"),
        (np.ones((1, 1, 1), int), r"shape \[1, 1, 1\]"),
        (np.array([True]), "dtype bool"),
        ([[10**30]], "expected"),
        ([[10**6]], "token id 1000000"),
        (None, "NoneType"),
    ],
)
def test_other_input_is_refused_in_words(given, message):
    with pytest.raises(ValueError, match=message):
        headwater.capture("demo", given)


def test_settings_take_the_integers_of_numpy_and_ranges():
    config = headwater.RunConfig(
        out="x", seq_len=np.int64(16), layers=range(2), depths=np.array([0, 2]), heads=np.int32(1)
    )
    assert (config.seq_len, config.layers, config.depths, config.heads) == (16, "0,1", "0,2", "1")
    assert type(config.seq_len) is int
    found = headwater.capture("demo", [[1, 2]], ["resid"], depths=range(2))
    assert found.depth.values.tolist() == [0, 1]
    for settings in ({"seq_len": True}, {"seq_len": 1.5}, {"seq_len": np.True_}, {"layers": 1.5}):
        with pytest.raises(ValueError, match=r"--(seq-len|layers) is"):
            headwater.RunConfig(out="x", **settings)


# Sites by the names of other libraries


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("blocks.0.ln2.hook_normalized", ("ln2_out", 0)),
        ("ln1.hook_normalized", ("ln1_out", None)),
        ("ln_final.hook_normalized", ("ln_final_out", None)),
        ("blocks.3.attn.hook_result", ("attn_result", 3)),
        ("logits", ("logits", None)),
        ("transformer.h.0.mlp", ("mlp_out", 0)),
        ("transformer.h.2", ("resid", 3)),
        ("h.1.ln_1", ("ln1_out", 1)),
        ("transformer.h.1.attn", ("attn_out", 1)),
        ("h.1.mlp.c_fc", ("mlp_pre", 1)),
        ("transformer.h.1.mlp.act", ("mlp_post", 1)),
        ("transformer.ln_f", ("ln_final_out", None)),
        ("transformer.drop", ("resid", 0)),
        ("lm_head", ("logits", None)),
    ],
)
def test_names_of_hooks_and_modules_lead_to_sites(name, site):
    assert parse_site(name) == site


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hook_embed", r"W_E\[token\] or W_pos\[position\]"),
        ("hook_pos_embed", "resid at depth 0"),
        ("transformer.wte", "a row of the weights"),
        ("blocks.0.hook_q_input", "ask for resid at the depth.*ln1_out"),
        ("blocks.1.hook_mlp_in", "ask for resid_mid.*ln2_out"),
        ("h.0.attn.c_attn", "ask for q, k and v"),
        ("blocks.0.attn.hook_rot_q", "no rotary"),
        ("transformer.h.0.mlpp", "there is no site 'transformer.h.0.mlpp'"),
    ],
)
def test_what_is_no_site_says_how_to_have_it(name, message):
    with pytest.raises(RequestError, match=message):
        parse_site(name)


def test_extra_sites_are_in_no_preset_and_not_edited(cli, tmp_path):
    extra = ["ln1_out", "ln2_out", "ln_final_out", "attn_result", "logits"]
    assert [name for name in SITES if SITES[name].extra] == extra
    assert not {name for names in PRESETS.values() for name in names} & set(extra)
    for site, instead in (("attn_result[0]", "edit z"), ("logits", "edit resid")):
        with pytest.raises(RequestError, match=instead):
            headwater.capture("demo", "a", edits=[f"{site} zero"])
    assert "every site but ln1_out" in cli("sites").out


def test_plan_shows_the_size_of_all_logits_first(saved, cli, tmp_path):
    np.save(tmp_path / "ids.npy", np.tile(IDS, (40, 1)))
    request = ["--model", str(saved), "--tokens", str(tmp_path / "ids.npy"), "--sites"]
    plan = json.loads(cli("plan", *request, "lm_head,attn_result", "--json").out)
    assert plan["arrays"]["logits"]["n_bytes"] >= 80 * 20 * 300 * 4
    assert plan["arrays"]["logits"]["dtype"] == "float32"
    assert plan["arrays"]["attn_result"]["sizes"]["d_model"] == 8
    last = json.loads(cli("plan", *request, "logits", "--positions", "last", "--json").out)
    assert last["arrays"]["logits"]["sizes"]["selected_position"] == 1
    narrow = json.loads(cli("plan", *request, "logits", "--dtype", "logits=float16", "--json").out)
    assert narrow["arrays"]["logits"]["dtype"] == "float16"
    assert cli("extract", *request, "logits", "--out", str(tmp_path / "run")).code == 0
    with torch.no_grad():
        expected = make_model().double()(torch.as_tensor(IDS)).logits.numpy()
    assert close(headwater.open_run(tmp_path / "run")["logits"][:2], expected)


def test_wide_sites_are_computed_in_smaller_batches():
    model = read_config("demo")
    shapes = [
        geometry(headwater.RunConfig(out="x", sites=sites, seq_len=64), replace(model, d_vocab=n))
        for sites, n in ((("resid",), 10**6), (("logits",), 10**6), (("logits",), 10**3))
    ]
    assert [shape.micro for shape in shapes] == [32, 1, 32]


# Where a run goes


@pytest.mark.parametrize("form", ["file://{}", "FILE://localhost{}", "file:{}"])
def test_a_file_url_is_its_path(cli, tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "ids.npy", IDS)
    out = form.format(tmp_path / "with%20blank" / "run")
    assert cli("extract", "--tokens", str(tmp_path / "ids.npy"), "--out", out).code == 0
    assert (tmp_path / "with blank" / "run" / "zarr.json").is_file()
    assert cli("status", out).code == 0
    assert not list(tmp_path.glob("[fF]*:*"))


@pytest.mark.parametrize(
    "place", ["memory://run", "http://host/run", "hf://datasets/x", "file://host/run", "s3:/b/run"]
)
def test_a_place_of_another_kind_is_refused(cli, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "ids.npy", IDS)
    answer = cli("extract", "--tokens", str(tmp_path / "ids.npy"), "--out", place)
    assert answer.code == 2 and "expected a" in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["ids.npy"]


def test_the_scheme_of_an_object_store_is_written_in_any_case():
    assert place_of("S3://bucket/Run") == place_of("s3://bucket/Run")
    assert place_of("runs/a:b") == Path("runs/a:b") and place_of("c:/run") == Path("c:/run")
