"""What tests of the forward pass share: random GPT-2 models, and a float64 oracle of every site from transformers."""

import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # threads that wait must not spin where tests share the machine

import copy
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from headwater.extractor.in_memory import run_in_memory
from headwater.extractor.model.forward import Model
from headwater.extractor.model.weights import Checkpoint, ModelConfig
from headwater.extractor.plan import Geometry, make_plan
from headwater.extractor.request import RunConfig
from headwater.extractor.sites import SITES

SIZES = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "n_positions": 64,
    "vocab_size": 31,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TOP_K = 4
TESTS = Path(__file__).parent
SLOW = (
    "analysis/coherence",
    "analysis/commands",
    "analysis/memory",
    "analysis/report",
    "analysis/reproduce",
    "benchmarks/",
    "cli/interventions",
    "cli/process",
    "cluster/ray",
    "cluster/workers",
    "docs",
    "extractor/cases",
    "extractor/edits",
    "extractor/hub",
    "extractor/kernel_model",
    "extractor/model",
    "extractor/resume",
    "extractor/same_bytes",
    "extractor/texts_of_users",
    "extractor/transfer",
    "kernels/aot",
    "kernels/interpreter",
    "service/",
    "store/crash",
    "store/disk_full",
    "store/object_store",
    "store/verify",
    "versions",
)
CHOICES = {
    "attn_argmax": ("pattern", "attn_max"),
    "resid_argmax": ("resid", "resid_max"),
    "top_tokens": ("logits", "top_logits"),
}


def random_gpt2(seed=0, **changes):
    """Make a GPT-2 in which every weight matters: no zero bias, no LayerNorm weight of 1."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**SIZES | changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(
                0.0, 1.0 if "wte" in name else 0.25 if weight.ndim == 1 else weight.shape[0] ** -0.5
            )
            if ".ln_" in name and name.endswith("weight"):
                weight.add_(1)
    return model


def checkpoint_of(model):
    """Hand a model of transformers to Headwater without a file."""
    config = ModelConfig.from_hf(model.config.to_dict(), "config")
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()
    }
    return Checkpoint("", config, {name: tensors[name] for name in config.shapes()}, "", None)


def random_rows(n, length, layout, seed=0, d_vocab=SIZES["vocab_size"]):
    """Return tokens (−1 at padding) and row starts, int32 [n, length], in one of the layouts of a run."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, d_vocab, (n, length)).astype(np.int32)
    t, start = np.arange(length), np.zeros((n, length), np.int64)
    for b in range(n):
        cut = int(rng.integers(0, length))
        if layout == "left":
            start[b] = np.where(t < cut, t + 1, cut)
        elif layout == "right":
            start[b] = np.where(t <= cut, 0, t + 1)
        elif layout == "documents":
            start[b] = np.maximum.accumulate(np.where(rng.random(length) < 0.1, t, 0))
    if layout == "documents":
        start[-1, length - length // 3 :] = t[length - length // 3 :] + 1
    tokens[start > t] = -1
    return tokens, start.astype(np.int32)


def capture(model, tokens, row_start, compute="fp32", wide=False, **selection):
    """Run Headwater in memory; return its plan and its arrays. `wide` keeps them in float64."""
    loaded = Model(checkpoint_of(model), compute)
    sites = {} if {"preset", "sites"} & selection.keys() else {"sites": tuple(SITES)}
    config = RunConfig(out=".", top_k=TOP_K, dtype="float32", **sites | selection)
    plan = make_plan(
        config, loaded.config, Geometry(tokens.shape[1], len(tokens), len(tokens)), len(tokens)
    )
    if wide:
        vars(plan)["arrays"] = tuple(
            replace(s, dtype=s.dtype.replace("float32", "float64")) for s in plan.arrays
        )
    return plan, run_in_memory(loaded, plan, tokens, row_start).arrays


def reference(model, tokens, row_start):
    """Compute every site in float64 [as stored]: each stretch of text alone, from position 0.

    HF's reorder_and_upcast_attn is float32 only, and without it the same in exact arithmetic, so it is switched off.
    """
    model = copy.deepcopy(model).double().requires_grad_(False)
    model.set_attn_implementation("eager")
    for block in model.transformer.h:
        block.attn.reorder_and_upcast_attn = False
    c = ModelConfig.from_hf(model.config.to_dict(), "config")
    sizes = {
        "layer": c.n_layer,
        "depth": c.n_layer + 1,
        "sequence": len(tokens),
        "head": c.n_head,
        "rank": TOP_K,
        "d_head": c.d_head,
        "d_model": c.d_model,
        "d_mlp": c.d_mlp,
        "d_vocab": c.d_vocab,
    }
    dims = {name: site.dims for name, site in SITES.items()}
    sites = {
        name: np.full([sizes.get(d, tokens.shape[1]) for d in dims[name]], SITES[name].fill)
        for name in dims
    }
    for b, (ids, starts) in enumerate(zip(tokens, row_start, strict=True)):
        for start in np.unique(starts[ids >= 0]):
            span = slice(int(start), int(np.flatnonzero((starts == start) & (ids >= 0))[-1]) + 1)
            for name, value in _run_alone(
                model, c, torch.from_numpy(ids[span].astype(np.int64))
            ).items():
                at = {"sequence": b, "position": span, "query": span, "key": span}
                sites[name][tuple(at.get(d, slice(None)) for d in dims[name])] = value
            sites["attn_argmax"][:, b, :, span] += start
    return sites


def _run_alone(model, c, ids):
    """Run one stretch of text and return its sites, without the sequence dimension."""
    seen, handles = defaultdict(list), []

    def keep(module, name, before=False):
        def hook(module, inputs, output=None):
            value = inputs if before else output
            seen[name].append((value[0] if isinstance(value, tuple) else value)[0])

        handles.append(
            (module.register_forward_pre_hook if before else module.register_forward_hook)(hook)
        )

    for block in model.transformer.h:
        keep(block, "resid", before=True)
        keep(block.ln_1, "ln1_out")
        keep(block.ln_2, "ln2_out")
        keep(block.attn.c_attn, "qkv")
        keep(block.attn.c_proj, "z", before=True)
        keep(block.attn, "attn_out")
        keep(block.ln_2, "resid_mid", before=True)
        keep(block.mlp.c_fc, "mlp_pre")
        keep(block.mlp.act, "mlp_post")
        keep(block.mlp, "mlp_out")
    keep(model.transformer.ln_f, "resid", before=True)
    out = model(ids[None], output_attentions=True, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    s = {name: torch.stack(values) for name, values in seen.items()}
    torch.testing.assert_close(model.transformer.ln_f(s["resid"][-1]), out.hidden_states[-1][0])
    s["q"], s["k"], s["v"] = s.pop("qkv").unflatten(-1, (3, c.n_head, c.d_head)).unbind(2)
    s["z"] = s["z"].unflatten(-1, (c.n_head, c.d_head))
    w_o = torch.stack([block.attn.c_proj.weight for block in model.transformer.h])
    w_o = w_o.unflatten(1, (c.n_head, c.d_head))
    s["attn_result"] = torch.einsum("lqnh,lnhd->lqnd", s["z"], w_o)
    biases = torch.stack([block.attn.c_proj.bias for block in model.transformer.h])
    torch.testing.assert_close(s["attn_result"].sum(2) + biases[:, None], s["attn_out"])
    s["ln_final_out"] = out.hidden_states[-1][0]
    scale = torch.tensor([block.attn.scaling for block in model.transformer.h], dtype=torch.float64)
    future = torch.ones(len(ids), len(ids)).triu(1).bool()
    scores = torch.einsum("lqnh,lknh,l->lnqk", s["q"], s["k"], scale)
    s["attn_scores"] = scores.masked_fill(future, torch.nan)
    s["pattern"] = torch.stack([a[0] for a in out.attentions])
    torch.testing.assert_close(scores.masked_fill(future, -torch.inf).softmax(-1), s["pattern"])
    s |= _attention_statistics(s["pattern"]) | _resid_statistics(s["resid"])
    for name, source in (
        ("ln1_scale", s["resid"][:-1]),
        ("ln2_scale", s["resid_mid"]),
        ("ln_final_scale", s["resid"][-1]),
    ):
        s[name] = (source.var(-1, correction=0) + c.layer_norm_epsilon).sqrt()
    s["logits"] = out.logits[0]
    s["loss"] = torch.full((len(ids),), torch.nan, dtype=torch.float64)
    s["loss"][:-1] = torch.nn.functional.cross_entropy(
        out.logits[0, :-1], ids[1:], reduction="none"
    )
    s["top_logits"], s["top_tokens"] = out.logits[0].topk(TOP_K)
    return s


def _attention_statistics(p):
    n = p.shape[-1]
    distance = torch.arange(n)[:, None] - torch.arange(n)
    return {
        "attn_entropy": -torch.xlogy(p, p).sum(-1),
        "attn_max": p.amax(-1),
        "attn_argmax": p.argmax(-1),
        "attn_sink": p[..., 0],
        "attn_distance": (p * distance).sum(-1),
        "attn_self": p.diagonal(0, -2, -1),
        "attn_prev": torch.nn.functional.pad(p.diagonal(-1, -2, -1), (1, 0)),
        "attn_received": p.sum(-2),
    }


def _resid_statistics(x):
    cosine = torch.nn.functional.cosine_similarity(x[1:], x[:-1], -1, eps=0)
    return {
        "resid_norm": x.norm(dim=-1),
        "resid_max": x.abs().amax(-1),
        "resid_argmax": x.abs().argmax(-1),
        "resid_cosine": torch.cat([torch.full_like(cosine[:1], torch.nan), cosine]),
    }


def assert_sites(got, want, atol=1e-4, rtol=1e-3):
    """Compare captured arrays with the oracle's; an index may name another place that is as large."""
    for name, value in got.items():
        expected = want[name]
        assert value.shape == expected.shape, name
        if name in CHOICES:
            values, largest = (want[other] for other in CHOICES[name])
            values = np.abs(values) if name == "resid_argmax" else values
            places = value if name == "top_tokens" else value[..., None]
            np.testing.assert_array_equal(value < 0, expected < 0, name)
            value, expected = (
                np.take_along_axis(values, np.maximum(places, 0), -1).reshape(value.shape),
                largest,
            )
            value, expected = (
                np.where(want[name] < 0, 0, value),
                np.where(want[name] < 0, 0, expected),
            )
        np.testing.assert_allclose(value, expected, rtol, atol, err_msg=name)


def pytest_collection_modifyitems(items):
    """Mark as slow what starts clusters, servers, browsers and interpreters of kernels, or is killed, or takes long."""
    for item in items:
        place = item.path.relative_to(TESTS).with_suffix("").as_posix()
        if place.replace("/test_", "/").removeprefix("test_").startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def oracle():
    """The functions above; importlib mode has no other way to share them."""
    return SimpleNamespace(
        gpt2=random_gpt2,
        rows=random_rows,
        capture=capture,
        reference=reference,
        assert_sites=assert_sites,
        checkpoint=checkpoint_of,
        top_k=TOP_K,
    )


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory):
    """A Hugging Face directory of a random GPT-2 (2 layers, 32 positions) with its own byte-level tokenizer."""
    from safetensors.torch import save_file
    from tokenizers import ByteLevelBPETokenizer

    home = tmp_path_factory.mktemp("tiny") / "gpt2"
    home.mkdir()
    coder = ByteLevelBPETokenizer()
    coder.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog"] * 4, 280, 2, False, ["<|endoftext|>"]
    )
    coder.save(str(home / "tokenizer.json"))
    config = {
        "model_type": "gpt2",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "n_positions": 32,
        "vocab_size": coder.get_vocab_size(),
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    (home / "config.json").write_text(json.dumps(config))
    make = torch.Generator().manual_seed(0)
    shapes = ModelConfig.from_hf(config, "config").shapes().items()
    save_file(
        {name: torch.randn(shape, generator=make) / 8 for name, shape in shapes},
        home / "model.safetensors",
    )
    return home


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory):
    """A plain text of some 400 tokens of `tiny_gpt2`."""
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(
        "".join(f"the quick brown fox {i} jumps over the lazy dog.\n" for i in range(24))
    )
    return path


class Answer(NamedTuple):
    """What a command gave back: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    def error(self, code, *parts):
        """Check that it ended with one paragraph on standard error that says the given things."""
        last = self.err.splitlines()[-1]
        assert self.code == code, self
        assert last.startswith("headwater: error: ") and last.endswith((".", "`", ")")), last
        assert "Traceback" not in self.err and self.err.endswith(last + "\n")
        assert all(part in last for part in parts), last


@pytest.fixture
def cli(capsys):
    """Run the command line in this process; return an Answer."""
    from headwater.cli.entry import main

    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Answer(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def many_blocks(tmp_path_factory, tiny_gpt2):
    """The request of a run of 16 blocks, and the bytes of that run as one process makes them."""
    import headwater
    from headwater.benchmarks.breaking.faults import contents

    home = tmp_path_factory.mktemp("blocks")
    np.save(home / "ids.npy", np.random.default_rng(5).integers(0, 200, (32, 32)).astype(np.int32))
    config = RunConfig(
        out=str(home / "whole"),
        model=str(tiny_gpt2),
        tokens=str(home / "ids.npy"),
        preset="all",
        block=2,
        threads=1,
    )
    return config, contents(headwater.extract(config).path)


@pytest.fixture(scope="session")
def analysis_run(tmp_path_factory, tiny_gpt2):
    """Make float32 runs of every site, each once: "plain" (10 rows of 40 ids), "packed" documents, "padded" ones, and
    "last" and "0:5", padded ones with these positions of the vector sites."""
    import headwater

    home, made = tmp_path_factory.mktemp("analysis"), {}

    def run(layout):
        if layout in made:
            return made[layout]
        rng = np.random.default_rng(3)
        common = {
            "out": str(home / layout),
            "preset": "all",
            "block": 2,
            "dtype": "float32",
            "top_k": 3,
        }
        if layout == "plain":
            random_gpt2(n_layer=3, n_head=3, n_embd=24).save_pretrained(home / "model")
            np.save(home / "ids.npy", rng.integers(0, 31, (10, 40)).astype(np.int32))
            config = RunConfig(model=str(home / "model"), tokens=str(home / "ids.npy"), **common)
        else:
            (home / layout).parent.mkdir(exist_ok=True)
            texts = home / f"{layout}-texts"
            texts.mkdir()
            for i, n in enumerate((1, 7, 3, 12, 2, 5, 9, 4, 20)):
                (texts / f"{i}.txt").write_text(
                    " ".join(rng.choice(["the", "quick", "foxing", "lazily", "do8g"], n))
                )
            mode = {"within_documents": True} if layout == "packed" else {"mode": "document"}
            mode |= {"positions": layout} if layout in ("last", "0:5") else {}
            config = RunConfig(
                model=str(tiny_gpt2), text=(str(texts),), seq_len=24, **mode, **common
            )
        made[layout] = headwater.extract(config)
        return made[layout]

    return run


@pytest.fixture(scope="session")
def mgm_model(pytestconfig):
    """The directory of MGM, a trained GPT-2 that comes in the package microformer-mgm; skip where it cannot be had."""
    import hashlib
    import subprocess
    import sys
    import zipfile

    home = pytestconfig.cache.mkdir("mgm-0.5.8")
    inside = "mgm/resources/general_model"
    if not (home / inside / "pytorch_model.bin").is_file():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(home),
            "microformer-mgm==0.5.8",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(
                f"microformer-mgm cannot be fetched: {done.stderr.strip().splitlines()[-1:]}"
            )
        with zipfile.ZipFile(next(home.glob("*.whl"))) as wheel:
            wheel.extractall(home, [name for name in wheel.namelist() if name.startswith(inside)])
    digest = hashlib.sha256((home / inside / "pytorch_model.bin").read_bytes()).hexdigest()
    assert digest.startswith("7a83b442dcb0cbe2")
    return home / inside
