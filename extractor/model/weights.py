"""Read GPT-2 weights and their configuration: Hugging Face directories, nanoGPT files, hub ids, the packaged demo.

Nothing in a checkpoint is executed: pickled files go through torch's loader for tensors only.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from headwater.extractor.model import hub
from headwater.extractor.model.activations import ACTIVATIONS
from headwater.extractor.model.adapter import adapter_of, apply_adapter
from headwater.extractor.model.weight_files import (
    CheckpointError,
    canonical,
    read_config_json,
    read_directory,
    show,
    some,
    tensors_in,
    unpickle,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ModelConfig",
    "load_checkpoint",
    "read_config",
]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
    "quantization_config": None,
    "pruned_heads": {},
    "auto_map": None,
}
MOST = {
    "n_layer": 1 << 12,
    "n_head": 1 << 14,
    "n_embd": 1 << 17,
    "n_inner": 1 << 20,
    "n_positions": 1 << 20,
    "vocab_size": 1 << 24,
}
UNSAID_BY_NANOGPT = "gelu"
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
    def from_hf(raw: dict[str, Any], where: str, activation: str | None = None) -> ModelConfig:
        """Translate the contents of a `config.json`; keys that are absent take transformers' defaults.

        Dropout is left out: it does nothing at inference. Of a list of end-of-text ids the first counts; an id outside
        the vocabulary becomes None. `activation` is the user's, for a configuration that names none. Raises
        CheckpointError for another model family, an impossible size, and any switch that would change the numbers and
        is not computed here; `where` names the file in the message.
        """
        _check_family(raw, where)
        for key, neutral in NEUTRAL.items():
            if raw.get(key, neutral) not in (neutral, None):
                raise CheckpointError(
                    f"{where}: {key} is {show(raw[key])}, which Headwater does not compute; expected "
                    f"{neutral!r} or nothing. Use a plain GPT-2 checkpoint without it."
                )
        d_model = _count(raw, where, 768, "n_embd", "hidden_size")
        n_head = _count(raw, where, 12, "n_head", "num_attention_heads")
        if d_model % n_head:
            raise CheckpointError(
                f"{where}: n_embd {d_model} is not a multiple of n_head {n_head}, so it cannot be "
                "divided among the heads. Correct config.json."
            )
        epsilon = raw.get("layer_norm_epsilon", 1e-5)
        if (
            isinstance(epsilon, bool)
            or not isinstance(epsilon, int | float)
            or not 0 <= epsilon <= 1
        ):
            raise CheckpointError(
                f"{where}: layer_norm_epsilon is {show(epsilon)}; expected a small number such as "
                "1e-05. Correct config.json."
            )
        d_vocab = _count(raw, where, 50257, "vocab_size")
        return ModelConfig(
            n_layer=_count(raw, where, 12, "n_layer", "num_hidden_layers"),
            n_head=n_head,
            d_model=d_model,
            d_head=d_model // n_head,
            d_mlp=4 * d_model if raw.get("n_inner") is None else _count(raw, where, 0, "n_inner"),
            n_ctx=_count(raw, where, 1024, "n_positions", "max_position_embeddings"),
            d_vocab=d_vocab,
            activation=_activation(raw, where, activation),
            layer_norm_epsilon=float(epsilon),
            scale_attn_weights=_switch(raw, where, "scale_attn_weights", True),
            scale_attn_by_inverse_layer_idx=_switch(
                raw, where, "scale_attn_by_inverse_layer_idx", False
            ),
            reorder_and_upcast_attn=_switch(raw, where, "reorder_and_upcast_attn", False),
            tied=_switch(raw, where, "tie_word_embeddings", True),
            eos_token_id=_token_id(raw.get("eos_token_id", 50256), d_vocab),
            bos_token_id=_token_id(raw.get("bos_token_id", 50256), d_vocab),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """List every tensor of the model by its canonical name, with its shape; linear weights are [in, out]."""
        d = self.d_model
        m = self.d_mlp
        block = {
            "ln_1": (d,),
            "attn.c_attn": (d, 3 * d),
            "attn.c_proj": (d, d),
            "ln_2": (d,),
            "mlp.c_fc": (d, m),
            "mlp.c_proj": (m, d),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "wte.weight": (self.d_vocab, d),
            "wpe.weight": (self.n_ctx, d),
        }
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
    tokenizer.json, or vocab.json and merges.txt. `notes` say what was done to the stored tensors, or assumed.
    """

    name: str
    config: ModelConfig
    tensors: dict[str, torch.Tensor]
    digest: str
    tokenizer: Path | None
    notes: tuple[str, ...] = ()


def load_checkpoint(
    model: str, revision: str | None = None, activation: str | None = None
) -> Checkpoint:
    """Load a model: "demo", a Hugging Face directory, a nanoGPT `ckpt.pt`, or a hub id such as "gpt2".

    An existing path comes before a hub id of the same name; "demo" is always the packaged model. `revision` is a
    branch, tag or commit of a hub id. safetensors are preferred to pickled files. A LoRA adapter beside the weights is
    merged into them. `activation` is for a checkpoint that does not say which it has; nanoGPT's is exact GELU without.

    The output head is as in transformers 5: the embedding serves for both when `tie_word_embeddings` is true (the
    default), but a stored `lm_head.weight` that differs from it is used all the same, and then `config.tied` is False.
    (transformers 4 ignores such a head.) Only logits and loss depend on it.

    Raises CheckpointError if anything is missing, damaged, of the wrong shape or not finite.
    """
    source = hub.locate(model, revision)
    home = source.parent if source.is_file() else source
    if source.is_file():
        config, tensors, notes = read_nanogpt(unpickle(source), source, activation)
    else:
        config = _read_hf_config(source, activation)
        tensors, notes = read_directory(source, hub.fetch_weights(model, source))
        tensors = apply_adapter(source, tensors)
    config, tensors = settle(config, tensors, str(source))
    return Checkpoint(
        model,
        config,
        tensors,
        _digest(config, tensors),
        hub.find_tokenizer(home),
        (*describe_source(source, config, activation), *notes),
    )


def read_config(
    model: str, revision: str | None = None, activation: str | None = None
) -> ModelConfig:
    """Read only the configuration of a model that `load_checkpoint` would load.

    `tied` is what the configuration says; a stored head that differs is seen only when the weights are loaded.
    """
    source = hub.locate(model, revision)
    if source.is_file():
        return _nanogpt_config(unpickle(source), source, activation)[0]
    return _read_hf_config(source, activation)


def describe_source(source: Path, config: ModelConfig, activation: str | None) -> tuple[str, ...]:
    """Say what is known of a checkpoint without its weights: an adapter, or an activation that it does not name."""
    if source.is_dir():
        adapter = adapter_of(source)
        return () if adapter is None else (adapter,)
    if activation is not None:
        return (f"the activation function is {activation}, as asked; the checkpoint does not say",)
    return (
        f"the activation function is {config.activation}, since the checkpoint does not say; give "
        "--activation gelu_new for one that was trained with tanh",
    )


def settle(
    config: ModelConfig, tensors: dict[str, torch.Tensor], where: str
) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Check tensors against their configuration, and decide whether the output head is the embedding."""
    config, tensors = _settle_head(config, tensors)
    _check_tensors(config, tensors, where)
    return config, tensors


def _read_hf_config(directory: Path, activation: str | None) -> ModelConfig:
    return ModelConfig.from_hf(
        read_config_json(directory), str(directory / "config.json"), activation
    )


def read_nanogpt(
    raw: Any, path: Path | str, activation: str | None
) -> tuple[ModelConfig, dict[str, torch.Tensor], list[str]]:
    """Read the contents of a nanoGPT checkpoint: linear weights become [in, out], absent biases zeros.

    The activation is exact GELU unless another is given, as nanoGPT has computed it since June 2023; the file does not
    say.
    """
    config, has_bias = _nanogpt_config(raw, path, activation)
    stored, notes = canonical(tensors_in(raw["model"], path), str(path))
    tensors = {
        name: t.t().contiguous() if TRANSPOSED.fullmatch(name) and t.ndim == 2 else t
        for name, t in stored.items()
    }
    if not has_bias and "wte.weight" in tensors:
        for name, shape in config.shapes().items():
            if name.endswith(".bias") and name not in tensors:
                tensors[name] = torch.zeros(shape, dtype=tensors["wte.weight"].dtype)
    return config, tensors, notes


def _nanogpt_config(raw: Any, path: Path | str, activation: str | None) -> tuple[ModelConfig, bool]:
    """Return the configuration in a nanoGPT checkpoint, and whether its layers have biases."""
    arguments = raw.get("model_args") if isinstance(raw, dict) else None
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    if (
        not isinstance(arguments, dict)
        or "model" not in raw
        or not all(name in arguments for name in names)
    ):
        raise CheckpointError(
            f"{path} is not a nanoGPT checkpoint; expected 'model' and 'model_args' with "
            f"{', '.join(names)}. If it belongs to a Hugging Face model, name its directory."
        )
    settings = {name: arguments[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    settings |= {
        "model_type": "gpt2",
        "n_positions": arguments["block_size"],
        "eos_token_id": None,
        "bos_token_id": None,
    }
    config = ModelConfig.from_hf(settings, f"{path} (model_args)", activation or UNSAID_BY_NANOGPT)
    return config, _switch(arguments, str(path), "bias", True)


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
        hint = (
            "tie_word_embeddings is false, so the model needs an output head of its own; "
            if missing == ["lm_head.weight"]
            else ""
        )
        if any(".lora_" in name for name in tensors):
            hint += "it holds an adapter that is not merged (call merge_and_unload() first); "
        raise CheckpointError(
            f"{where} lacks {some(missing)}; {hint}expected every tensor of a GPT-2 with "
            f"{config.n_layer} layers, but it holds {some(sorted(tensors)) or 'none'}. Use a complete "
            "checkpoint with its own config.json."
        )
    if foreign := sorted(name for name in tensors if name not in shapes):
        raise CheckpointError(
            f"{where} holds tensors that a GPT-2 with {config.n_layer} layers does not have: "
            f"{some(foreign)}. Leaving them out could change the numbers; use the config.json that "
            "belongs to the weights, or a plain GPT-2."
        )
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(tensor.shape)}, expected {list(shape)} from the "
                "configuration. Use the config.json that belongs to the weights."
            )
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{where}: {name} is stored as {tensor.dtype}, {tensor.layout}; expected dense "
                "float64, float32, float16 or bfloat16. Use a checkpoint that is not quantised."
            )
        if not all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):
            count = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"{where}: {name} has {count} of {tensor.numel()} values that are NaN or infinite. "
                "The training failed or the file is damaged; use another checkpoint."
            )


def _digest(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> str:
    """Return the sha256 that identifies a configuration with its weights."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _activation(raw: dict[str, Any], where: str, asked: str | None) -> str:
    """Return the activation function of a configuration, or what was asked for where it names none."""
    said = raw.get("activation_function")
    for what, name in (("activation_function", said), ("--activation", asked)):
        if name is not None and (not isinstance(name, str) or name not in ACTIVATIONS):
            raise CheckpointError(
                f"{where}: {what} is {show(name)}, which Headwater does not compute; expected one of "
                f"{', '.join(sorted(ACTIVATIONS))}. Use another."
            )
    if said is not None and asked is not None and ACTIVATIONS[said] is not ACTIVATIONS[asked]:
        raise CheckpointError(
            f"{where}: activation_function is {said!r}, but {asked!r} was asked for. Leave the "
            "activation out, or correct config.json if that is wrong."
        )
    return str(said or asked or "gelu_new")


def _check_family(raw: dict[str, Any], where: str) -> None:
    """Refuse the configuration of anything but a GPT-2."""
    family = raw.get("model_type")
    classes = raw.get("architectures") or []
    advice = "Headwater reads GPT-2 only; name another model."
    if family not in (None, "gpt2"):
        raise CheckpointError(f"{where}: model_type is {show(family)}, expected 'gpt2'. {advice}")
    if not isinstance(classes, list) or not all(
        re.match(r"(TF|Flax)?GPT2", str(name)) for name in classes
    ):
        raise CheckpointError(
            f"{where}: architectures is {show(classes)}, expected GPT-2 classes such as "
            f"'GPT2LMHeadModel'. {advice}"
        )
    if family is None and not classes and not raw.keys() & {"n_embd", "n_layer", "n_head"}:
        raise CheckpointError(
            f"{where} has neither model_type nor architectures nor a size such as n_embd, so it is "
            f"not the configuration of a GPT-2. {advice}"
        )


def _count(raw: dict[str, Any], where: str, default: int, *names: str) -> int:
    """Return a positive whole number of the configuration, under the first of its names that is there."""
    key = next((name for name in names if name in raw), names[0])
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"{where}: {key} is {show(value)}; expected a positive whole number. Correct it."
        )
    if value > MOST[names[0]]:
        raise CheckpointError(
            f"{where}: {key} is {show(value)}; expected at most {MOST[names[0]]:,}. Correct it."
        )
    return value


def _switch(raw: dict[str, Any], where: str, name: str, default: bool) -> bool:
    """Return a true-or-false entry of the configuration."""
    value = raw.get(name, default)
    if not isinstance(value, bool):
        raise CheckpointError(
            f"{where}: {name} is {show(value)}; expected true or false. Correct it."
        )
    return value


def _token_id(value: Any, d_vocab: int) -> int | None:
    """Return a token id, of a list the first, or None if it is not in the vocabulary."""
    first = value[0] if isinstance(value, list) and value else value
    return (
        first
        if isinstance(first, int) and not isinstance(first, bool) and 0 <= first < d_vocab
        else None
    )
