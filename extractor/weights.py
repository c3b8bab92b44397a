"""Read GPT-2 weights and their configuration: Hugging Face directories, nanoGPT files, hub ids, the packaged demo.

Nothing in a checkpoint is executed: pickled files go through torch's loader for tensors only.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from headwater.extractor import hub
from headwater.extractor.hub import CheckpointError, show, some

__all__ = ["ACTIVATIONS", "Checkpoint", "CheckpointError", "ModelConfig", "load_checkpoint", "read_config"]

ACTIVATIONS = ("gelu", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu",
               "swish", "tanh")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NEUTRAL: dict[str, Any] = {"add_cross_attention": False, "quantization_config": None, "pruned_heads": {},
                           "auto_map": None}
TRANSPOSED = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass needs to know about a GPT-2; sizes in elements, `activation` one of ACTIVATIONS."""

    n_layer: int
    n_head: int
    d_model: int
    d_head: int
    d_mlp: int
    n_ctx: int
    d_vocab: int
    activation: str
    layer_norm_epsilon: float
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    reorder_and_upcast_attn: bool
    tied: bool
    eos_token_id: int | None
    bos_token_id: int | None

    @staticmethod
    def from_hf(raw: dict[str, Any], where: str) -> ModelConfig:
        """Translate the contents of a `config.json`; keys that are absent take transformers' defaults.

        Dropout is left out: it does nothing at inference. Of a list of end-of-text ids the first counts; an id outside
        the vocabulary becomes None. Raises CheckpointError for another model family, an impossible size, and any
        switch that would change the numbers and is not computed here; `where` names the file in the message.
        """
        _check_family(raw, where)
        for key, neutral in NEUTRAL.items():
            if raw.get(key, neutral) not in (neutral, None):
                raise CheckpointError(f"{where}: {key} is {show(raw[key])}, which Headwater does not compute; expected "
                                      f"{neutral!r} or nothing. Use a plain GPT-2 checkpoint without it.")
        d_model = _count(raw, where, 768, "n_embd", "hidden_size")
        n_head = _count(raw, where, 12, "n_head", "num_attention_heads")
        if d_model % n_head:
            raise CheckpointError(f"{where}: n_embd {d_model} is not a multiple of n_head {n_head}, so it cannot be "
                                  "divided among the heads. Correct config.json.")
        activation = raw.get("activation_function", "gelu_new")
        if activation not in ACTIVATIONS:
            raise CheckpointError(f"{where}: activation_function is {show(activation)}, which Headwater does not "
                                  f"compute; expected one of {', '.join(ACTIVATIONS)}. Use another checkpoint.")
        epsilon = raw.get("layer_norm_epsilon", 1e-5)
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon < math.inf:
            raise CheckpointError(f"{where}: layer_norm_epsilon is {show(epsilon)}; expected a small number such as "
                                  "1e-05. Correct config.json.")
        d_vocab = _count(raw, where, 50257, "vocab_size")
        return ModelConfig(
            n_layer=_count(raw, where, 12, "n_layer", "num_hidden_layers"),
            n_head=n_head,
            d_model=d_model,
            d_head=d_model // n_head,
            d_mlp=4 * d_model if raw.get("n_inner") is None else _count(raw, where, 0, "n_inner"),
            n_ctx=_count(raw, where, 1024, "n_positions", "max_position_embeddings"),
            d_vocab=d_vocab,
            activation=activation,
            layer_norm_epsilon=float(epsilon),
            scale_attn_weights=_switch(raw, where, "scale_attn_weights", True),
            scale_attn_by_inverse_layer_idx=_switch(raw, where, "scale_attn_by_inverse_layer_idx", False),
            reorder_and_upcast_attn=_switch(raw, where, "reorder_and_upcast_attn", False),
            tied=_switch(raw, where, "tie_word_embeddings", True),
            eos_token_id=_token_id(raw.get("eos_token_id", 50256), d_vocab),
            bos_token_id=_token_id(raw.get("bos_token_id", 50256), d_vocab),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """List every tensor of the model by its canonical name, with its shape; linear weights are [in, out]."""
        d, m = self.d_model, self.d_mlp
        block = {"ln_1": (d,), "attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "ln_2": (d,), "mlp.c_fc": (d, m),
                 "mlp.c_proj": (m, d)}
        shapes: dict[str, tuple[int, ...]] = {"wte.weight": (self.d_vocab, d), "wpe.weight": (self.n_ctx, d)}
        for i in range(self.n_layer):
            for name, shape in block.items():
                shapes[f"h.{i}.{name}.weight"], shapes[f"h.{i}.{name}.bias"] = shape, shape[-1:]
        shapes |= {"ln_f.weight": (d,), "ln_f.bias": (d,)}
        return shapes if self.tied else shapes | {"lm_head.weight": (self.d_vocab, d)}


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights under their canonical names, checked against its configuration, in the file's dtype.

    Names and shapes are those of `config.shapes()`. `digest` is a sha256 over the configuration and the names, dtypes,
    shapes and bytes of the tensors, so it does not depend on the layout of the files. `tokenizer` is a directory with
    tokenizer.json, or vocab.json and merges.txt.
    """

    name: str
    config: ModelConfig
    tensors: dict[str, torch.Tensor]
    digest: str
    tokenizer: Path | None


def load_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Load a model: "demo", a Hugging Face directory, a nanoGPT `ckpt.pt`, or a hub id such as "gpt2".

    An existing path comes before a hub id of the same name; "demo" is always the packaged model. `revision` is a
    branch, tag or commit of a hub id. safetensors are preferred to pickled files.

    The output head is as in transformers 5: the embedding serves for both when `tie_word_embeddings` is true (the
    default), but a stored `lm_head.weight` that differs from it is used all the same, and then `config.tied` is False.
    (transformers 4 ignores such a head.) Only logits and loss depend on it.

    Raises CheckpointError if anything is missing, damaged, of the wrong shape or not finite.
    """
    source = hub.locate(model, revision)
    if source.is_file():
        home, (config, tensors) = source.parent, _read_nanogpt(source)
    else:
        home, config = source, ModelConfig.from_hf(hub.read_config_json(source), str(source / "config.json"))
        hub.fetch_weights(model, source)
        tensors = hub.read_directory(source)
    config, tensors = _settle_head(config, tensors)
    _check_tensors(config, tensors, str(source))
    return Checkpoint(model, config, tensors, _digest(config, tensors), hub.find_tokenizer(home))


def read_config(model: str, revision: str | None = None) -> ModelConfig:
    """Read only the configuration of a model that `load_checkpoint` would load.

    `tied` is what the configuration says; a stored head that differs is seen only when the weights are loaded.
    """
    source = hub.locate(model, revision)
    if source.is_file():
        return _nanogpt_config(hub.unpickle(source), source)[0]
    return ModelConfig.from_hf(hub.read_config_json(source), str(source / "config.json"))


def _read_nanogpt(path: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Read a nanoGPT checkpoint: linear weights are transposed to [in, out], absent biases become zeros.

    The activation is exact GELU, as nanoGPT has computed it since June 2023; the file does not say.
    """
    raw = hub.unpickle(path)
    config, has_bias = _nanogpt_config(raw, path)
    stored = {name.removeprefix("_orig_mod."): t for name, t in hub.tensors_in(raw["model"], path).items()}
    tensors = {name: t.t().contiguous() if TRANSPOSED.fullmatch(name) and t.ndim == 2 else t
               for name, t in hub.canonical(stored, path).items()}
    if not has_bias and "wte.weight" in tensors:
        for name, shape in config.shapes().items():
            if name.endswith(".bias") and name not in tensors:
                tensors[name] = torch.zeros(shape, dtype=tensors["wte.weight"].dtype)
    return config, tensors


def _nanogpt_config(raw: Any, path: Path) -> tuple[ModelConfig, bool]:
    """Return the configuration in a nanoGPT checkpoint, and whether its layers have biases."""
    arguments = raw.get("model_args") if isinstance(raw, dict) else None
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    if not isinstance(arguments, dict) or "model" not in raw or not all(name in arguments for name in names):
        raise CheckpointError(f"{path} is not a nanoGPT checkpoint; expected 'model' and 'model_args' with "
                              f"{', '.join(names)}. If it belongs to a Hugging Face model, name its directory.")
    settings = {name: arguments[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    settings |= {"model_type": "gpt2", "n_positions": arguments["block_size"], "activation_function": "gelu",
                 "eos_token_id": None, "bos_token_id": None}
    return ModelConfig.from_hf(settings, f"{path} (model_args)"), _switch(arguments, str(path), "bias", True)


def _settle_head(
    config: ModelConfig, tensors: dict[str, torch.Tensor]
) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Drop an output head that equals the embedding; keep one that differs and call the model untied."""
    head = tensors.get("lm_head.weight")
    if head is None or not config.tied:
        return config, tensors
    embedding = tensors.get("wte.weight", head)
    if head.dtype != embedding.dtype or not torch.equal(head, embedding):
        return replace(config, tied=False), tensors
    rest = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    return config, rest | {"wte.weight": embedding}


def _check_tensors(config: ModelConfig, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Refuse missing, foreign, misshapen, quantised and non-finite tensors by name."""
    shapes = config.shapes()
    if missing := [name for name in shapes if name not in tensors]:
        hint = ("tie_word_embeddings is false, so the model needs an output head of its own; "
                if missing == ["lm_head.weight"] else "")
        raise CheckpointError(f"{where} lacks {some(missing)}; {hint}expected every tensor of a GPT-2 with "
                              f"{config.n_layer} layers. Use a complete checkpoint with its own config.json.")
    if foreign := sorted(name for name in tensors if name not in shapes):
        raise CheckpointError(f"{where} holds tensors that a GPT-2 with {config.n_layer} layers does not have: "
                              f"{some(foreign)}. Leaving them out could change the numbers; use the config.json that "
                              "belongs to the weights, or a plain GPT-2.")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{where}: {name} has shape {list(tensor.shape)}, expected {list(shape)} from the "
                                  "configuration. Use the config.json that belongs to the weights.")
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise CheckpointError(f"{where}: {name} is stored as {tensor.dtype}, {tensor.layout}; expected dense "
                                  "float64, float32, float16 or bfloat16. Use a checkpoint that is not quantised.")
        if not all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):
            count = int((~tensor.isfinite()).sum())
            raise CheckpointError(f"{where}: {name} has {count} of {tensor.numel()} values that are NaN or infinite. "
                                  "The training failed or the file is damaged; use another checkpoint.")


def _digest(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> str:
    """Return the sha256 that identifies a configuration with its weights."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_family(raw: dict[str, Any], where: str) -> None:
    """Refuse the configuration of anything but a GPT-2."""
    family, classes = raw.get("model_type"), raw.get("architectures") or []
    advice = "Headwater reads GPT-2 only; name another model."
    if family not in (None, "gpt2"):
        raise CheckpointError(f"{where}: model_type is {show(family)}, expected 'gpt2'. {advice}")
    if not isinstance(classes, list) or not all(re.match(r"(TF|Flax)?GPT2", str(name)) for name in classes):
        raise CheckpointError(f"{where}: architectures is {show(classes)}, expected GPT-2 classes such as "
                              f"'GPT2LMHeadModel'. {advice}")
    if family is None and not classes and not raw.keys() & {"n_embd", "n_layer", "n_head"}:
        raise CheckpointError(f"{where} has neither model_type nor architectures nor a size such as n_embd, so it is "
                              f"not the configuration of a GPT-2. {advice}")


def _count(raw: dict[str, Any], where: str, default: int, *names: str) -> int:
    """Return a positive whole number of the configuration, under the first of its names that is there."""
    key = next((name for name in names if name in raw), names[0])
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{where}: {key} is {show(value)}; expected a positive whole number. Correct it.")
    return value


def _switch(raw: dict[str, Any], where: str, name: str, default: bool) -> bool:
    """Return a true-or-false entry of the configuration."""
    value = raw.get(name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {name} is {show(value)}; expected true or false. Correct it.")
    return value


def _token_id(value: Any, d_vocab: int) -> int | None:
    """Return a token id, of a list the first, or None if it is not in the vocabulary."""
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) and not isinstance(first, bool) and 0 <= first < d_vocab else None
