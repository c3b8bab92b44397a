"""Capture with TransformerLens: TransformerBridge.run_with_cache, filtered by name; one safetensors file a batch."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformer_lens.model_bridge import TransformerBridge


def load(model: str) -> Any:
    """Return the bridge; weights are raw, attention is eager."""
    return TransformerBridge.boot_transformers(model, device="cpu")


def states(model: Any) -> list[str]:
    """Return the names of the residual stream at every depth."""
    return ["blocks.0.hook_resid_pre"] + [
        f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)
    ]


def weights(model: Any) -> list[str]:
    """Return the names of every pattern."""
    return [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]


def forward(
    model: Any, tokens: str, out: str, batch: int, names: list[str], reduce: Any = None
) -> None:
    """Run the model over the tokens and store what the names gave, half as wide, or what `reduce` makes of it."""
    ids = torch.from_numpy(np.load(tokens)).long()
    for i, part in enumerate(ids.split(batch)):
        with torch.inference_mode():
            _, cache = model.run_with_cache(part, names_filter=names, return_type=None)
            if reduce is None:
                found = {name: cache[name].to(torch.float16) for name in names}
            else:
                found = {
                    f"{key}.{layer}": value
                    for layer, name in enumerate(names)
                    for key, value in reduce(cache[name]).items()
                }
        save_file(
            {name: value.contiguous() for name, value in found.items()},
            os.path.join(out, f"{i}.safetensors"),
        )


def statistics(p: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return entropy, maximum and the other statistics of patterns [batch, head, query, key]."""
    t = torch.arange(p.shape[-1], dtype=p.dtype)
    largest, place = p.max(-1)
    return {
        "attn_entropy": -torch.xlogy(p, p).sum(-1),
        "attn_max": largest,
        "attn_argmax": place,
        "attn_sink": p[..., 0],
        "attn_distance": t - p @ t,
        "attn_self": p.diagonal(0, -2, -1),
        "attn_prev": torch.nn.functional.pad(p.diagonal(-1, -2, -1), (1, 0)),
        "attn_received": p.sum(-2),
    }


def residual(model: Any, tokens: str, out: str, batch: int) -> None:
    """Store the residual stream at all depths."""
    forward(model, tokens, out, batch, states(model))


def patterns(model: Any, tokens: str, out: str, batch: int) -> None:
    """Store the residual stream and every pattern."""
    forward(model, tokens, out, batch, states(model) + weights(model))


def only_statistics(model: Any, tokens: str, out: str, batch: int) -> None:
    """Store the statistics of every pattern."""
    forward(model, tokens, out, batch, weights(model), statistics)


def read(out: str, site: str, layer: int, sequence: int, position: int, batch: int) -> np.ndarray:
    """Read one vector back: [d_model] of a state, [head, key] of patterns, [head] of statistics."""
    name = "blocks.0.hook_resid_pre"
    if layer:
        name = f"blocks.{layer - 1}.hook_resid_post"
    names = {"resid": name, "pattern": f"blocks.{layer}.attn.hook_pattern"}
    with safe_open(os.path.join(out, f"{sequence // batch}.safetensors"), framework="np") as file:
        part = file.get_slice(names.get(site, f"{site}.{layer}"))
        s = sequence % batch
        return np.asarray(part[s, position] if site == "resid" else part[s, :, position])
