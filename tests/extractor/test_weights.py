"""Every way a GPT-2 checkpoint lies about on a disk gives the tensors that transformers has, or one clear paragraph."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from headwater.extractor.model.weights import CheckpointError, load_checkpoint, read_config

LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SIZES = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 8,
    "n_positions": 16,
    "vocab_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
NEWER = (
    "model_type",
    "architectures",
    "n_inner",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "tie_word_embeddings",
    "add_cross_attention",
    "dtype",
    "transformers_version",
)


def make_model(**changes):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SIZES | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def tensors_of(model):
    """The model's state dict under canonical names; a tied head is left out."""
    tensors = {
        name.removeprefix("transformer."): t.clone() for name, t in model.state_dict().items()
    }
    if torch.equal(tensors["lm_head.weight"], tensors["wte.weight"]):
        del tensors["lm_head.weight"]
    return tensors


def prefixed(tensors):
    return {
        name if name.startswith("lm_head") else f"transformer.{name}": t
        for name, t in tensors.items()
    }


def edit_json(path, remove=(), **changes):
    raw = {k: v for k, v in json.loads(path.read_text()).items() if k not in remove} | changes
    path.write_text(json.dumps(raw))


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items()
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    make_model().save_pretrained(path)
    return path


@pytest.fixture
def home(saved, tmp_path):
    """A directory as `save_pretrained` leaves it, to be changed by the test."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def as_bin(home, tensors, **options):
    (home / "model.safetensors").unlink()
    torch.save(tensors, home / "pytorch_model.bin", **options)


def as_shards(home, tensors):
    (home / "model.safetensors").unlink()
    parts, weight_map = [dict(list(tensors.items())[i::3]) for i in range(3)], {}
    for i, part in enumerate(parts):
        shard = f"pytorch_model-{i + 1:05d}-of-00003.bin"
        torch.save(part, home / shard)
        weight_map |= dict.fromkeys(part, shard)
    (home / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def with_buffers(tensors):
    masks = {"score.weight": torch.ones(2, 8)}
    masks |= {
        f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril().bool() for i in range(2)
    }
    return (
        prefixed(tensors)
        | masks
        | {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    )


LAYOUTS = {
    "safetensors": lambda home, t: None,
    "sharded safetensors": lambda home, t: (
        (home / "model.safetensors").unlink(),
        make_model().save_pretrained(home, max_shard_size="2KB"),
    ),
    "bin": lambda home, t: as_bin(home, prefixed(t)),
    "bin before zip": lambda home, t: as_bin(
        home, prefixed(t), _use_new_zipfile_serialization=False
    ),
    "sharded bin": lambda home, t: as_shards(home, prefixed(t)),
    "bin without prefix, with buffers": lambda home, t: as_bin(
        home, {n.removeprefix("transformer."): x for n, x in with_buffers(t).items()}
    ),
    "bin with buffers and head": lambda home, t: as_bin(
        home, with_buffers(t) | {"lm_head.weight": t["wte.weight"]}
    ),
    "safetensors without prefix": lambda home, t: safetensors.torch.save_file(
        t, home / "model.safetensors"
    ),
    "old config": lambda home, t: edit_json(home / "config.json", remove=NEWER),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_tensors_and_digest_of_transformers(home, saved, layout):
    expected = tensors_of(make_model())
    LAYOUTS[layout](home, expected)
    if layout.startswith("sharded"):
        assert len([p for p in home.iterdir() if "-of-" in p.name]) > 1
    checkpoint = load_checkpoint(str(home))
    assert same(checkpoint.tensors, expected)
    assert {n: tuple(t.shape) for n, t in expected.items()} == checkpoint.config.shapes()
    assert checkpoint.digest == load_checkpoint(str(saved)).digest
    assert checkpoint.config == read_config(str(home))


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_function": "relu", "n_inner": 20, "layer_norm_epsilon": 1e-3},
        {"n_head": 4, "scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"tie_word_embeddings": False},
        {"n_head": 1, "n_embd": 12, "n_layer": 1},
    ],
)
def test_every_switch_is_read(tmp_path, changes):
    model = make_model(**changes)
    model.half().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    checkpoint, hf = load_checkpoint(str(tmp_path)), model.config
    config = checkpoint.config
    assert same(checkpoint.tensors, tensors_of(model)) and checkpoint.tokenizer == tmp_path
    assert (config.n_layer, config.n_head, config.d_model, config.d_head) == (
        hf.n_layer,
        hf.n_head,
        hf.n_embd,
        hf.n_embd // hf.n_head,
    )
    assert (config.d_mlp, config.n_ctx, config.d_vocab) == (hf.n_inner or 4 * hf.n_embd, 16, 32)
    assert (config.activation, config.layer_norm_epsilon) == (
        hf.activation_function,
        hf.layer_norm_epsilon,
    )
    for name in (
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",
    ):
        assert getattr(config, name) is getattr(hf, name)
    assert (config.tied, config.bos_token_id, config.eos_token_id) == (hf.tie_word_embeddings, 1, 1)


def test_a_head_that_differs_is_used_as_transformers_uses_it(home):
    stored = prefixed(tensors_of(make_model())) | {"lm_head.weight": torch.randn(32, 8)}
    safetensors.torch.save_file(stored, home / "model.safetensors", {"format": "pt"})
    checkpoint = load_checkpoint(str(home))
    assert not checkpoint.config.tied
    assert same(checkpoint.tensors, tensors_of(GPT2LMHeadModel.from_pretrained(home)))
    stored["transformer.ln_f.bias"][0] += 1
    safetensors.torch.save_file(stored, home / "model.safetensors")
    assert load_checkpoint(str(home)).digest != checkpoint.digest


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_file(tmp_path, bias):
    expected = tensors_of(make_model())
    stored = {
        name: t.t().contiguous() if name.endswith(LINEAR) else t
        for name, t in expected.items()
        if bias or not name.endswith(".bias")
    }
    stored = prefixed(stored) | {
        "lm_head.weight": stored["wte.weight"],
        "transformer.h.0.attn.bias": torch.ones(9),
    }
    sizes = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 8,
        "block_size": 16,
        "vocab_size": 32,
        "bias": bias,
        "dropout": 0.0,
    }
    torch.save(
        {
            "model": {f"_orig_mod.{n}": t for n, t in stored.items()},
            "model_args": sizes,
            "iter_num": 5,
            "optimizer": {"state": {}},
            "best_val_loss": torch.tensor(2.0),
        },
        tmp_path / "ckpt.pt",
    )
    checkpoint = load_checkpoint(str(tmp_path / "ckpt.pt"))
    if not bias:
        expected |= {n: torch.zeros_like(t) for n, t in expected.items() if n.endswith(".bias")}
    assert same(checkpoint.tensors, expected)
    assert (checkpoint.config.activation, checkpoint.config.tied, checkpoint.tokenizer) == (
        "gelu",
        True,
        None,
    )
    with pytest.raises(CheckpointError, match=r"For a nanoGPT checkpoint name the file .*ckpt\.pt"):
        load_checkpoint(str(tmp_path))


def change_tensor(name, function):
    def damage(home):
        tensors = prefixed(tensors_of(make_model()))
        safetensors.torch.save_file(
            tensors | {name: function(tensors.get(name))}, home / "model.safetensors"
        )

    return damage


DAMAGES = {
    "wrong shape": (
        change_tensor("transformer.h.1.mlp.c_fc.weight", lambda t: t.t().contiguous()),
        r"h\.1\.mlp\.c_fc\.weight has shape \[32, 8\], expected \[8, 32\]",
    ),
    "nan": (
        change_tensor("transformer.ln_f.bias", lambda t: t / 0),
        r"ln_f\.bias has 8 of 8 values that are NaN",
    ),
    "integers": (
        change_tensor("transformer.ln_f.bias", lambda t: t.to(torch.int8)),
        "stored as torch.int8",
    ),
    "foreign": (
        change_tensor("transformer.h.0.lora_A", lambda t: torch.ones(1)),
        r"does not have: h\.0\.lora_A",
    ),
    "untied without head": (
        {"tie_word_embeddings": False},
        r"lacks lm_head\.weight; tie_word_embeddings is false",
    ),
    "family": ({"model_type": "gpt_neox"}, "model_type is 'gpt_neox', expected 'gpt2'"),
    "class": ({"architectures": ["GPTBigCodeForCausalLM"]}, "architectures is"),
    "activation": (
        {"activation_function": "mish"},
        "activation_function is 'mish'.*expected one of gelu, ",
    ),
    "cross": ({"add_cross_attention": True}, "add_cross_attention is True"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    "heads": ({"n_head": 3}, "n_embd 8 is not a multiple of n_head 3"),
    "count": ({"n_layer": "2"}, "n_layer is '2'; expected a positive whole number"),
    "switch": ({"scale_attn_weights": 1}, "scale_attn_weights is 1; expected true or false"),
    "epsilon": ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
    "json": (
        lambda h: (h / "config.json").write_text('{"n_la'),
        r"config\.json cannot be read as JSON",
    ),
    "no config": (lambda h: (h / "config.json").unlink(), "has no config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_input_is_refused_in_one_paragraph(home, damage):
    change, message = DAMAGES[damage]
    edit_json(home / "config.json", **change) if isinstance(change, dict) else change(home)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(str(home))
    assert (
        str(home) in str(caught.value)
        and "\n" not in str(caught.value)
        and len(str(caught.value)) < 600
    )
