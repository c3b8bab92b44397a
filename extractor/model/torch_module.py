"""Take a GPT-2 that is a torch module in memory as a checkpoint: transformers' or nanoGPT's, known by what it has."""

from __future__ import annotations

import copy
from typing import Any

import torch

from headwater.extractor.model.activations import SMOOTH
from headwater.extractor.model.weight_files import CheckpointError, canonical, tensors_in
from headwater.extractor.model.weights import Checkpoint, ModelConfig, read_nanogpt, settle

NANOGPT = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
PROBES = 64
SAME = 1e-3


def checkpoint_of(module: Any, activation: str | None = None) -> Checkpoint:
    """Return the checkpoint of a module that has `config` and `state_dict`; its weights are shared, not copied.

    A configuration with `block_size` is nanoGPT's, whose activation function is found by trying its MLP; any other is
    read as transformers'. `digest` is empty: nobody asks for it. Raises CheckpointError for anything else.
    """
    where = f"the {type(module).__name__} in memory"
    if isinstance(module, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        module = module.module
    config = getattr(module, "config", None)
    state = getattr(module, "state_dict", None)
    if config is None or not callable(state):
        raise CheckpointError(
            f"model is {where}; expected a path, a hub id, a Model, or a torch module with config and "
            "state_dict(), as transformers' GPT2LMHeadModel and nanoGPT's GPT are. Save its weights "
            "in Hugging Face's format and name the directory."
        )
    if any(tensor.is_meta for tensor in state().values()):
        raise CheckpointError(
            f"{where} has weights on the device meta, which holds no values. Load them first."
        )
    stored = {name: tensor.detach().cpu() for name, tensor in state().items()}
    if hasattr(config, "block_size"):
        arguments = {name: getattr(config, name, None) for name in NANOGPT}
        arguments["bias"] = getattr(config, "bias", True)
        found = activation or _activation_of(module, where)
        raw = {"model": stored, "model_args": arguments}
        sizes, tensors, notes = read_nanogpt(raw, where, found)
    else:
        as_table = getattr(config, "to_dict", None)
        sizes = ModelConfig.from_hf(
            as_table() if callable(as_table) else dict(vars(config)), where, activation
        )
        tensors, notes = canonical(tensors_in(stored, where), where)
    sizes, tensors = settle(sizes, tensors, where)
    return Checkpoint(type(module).__name__, sizes, tensors, "", None, tuple(notes))


def _activation_of(module: Any, where: str) -> str:
    """Return the activation function with which the first block's own MLP gives what it gives."""
    inner = getattr(module, "_orig_mod", module)
    try:
        mlp = copy.deepcopy(inner.transformer.h[0].mlp).cpu().double().eval()
        x = torch.linspace(-3, 3, PROBES * mlp.c_fc.in_features, dtype=torch.float64)
        with torch.inference_mode():
            x = x.view(-1, PROBES).T.contiguous()
            wanted = mlp(x)
            before = mlp.c_fc(x)
            off = {
                name: float((mlp.c_proj(function(before)) - wanted).abs().max())
                for name, function in SMOOTH.items()
            }
    except (AttributeError, IndexError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"the activation function of {where} cannot be tried ({error}). Say it with activation=."
        ) from error
    best = min(off, key=lambda name: off[name])
    if off[best] > SAME * float(wanted.abs().max()) / PROBES:
        raise CheckpointError(
            f"the MLP of {where} computes none of {', '.join(sorted(SMOOTH))}. Headwater does not "
            "compute it; use another model."
        )
    return best
