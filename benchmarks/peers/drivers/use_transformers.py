"""Capture with transformers: forward hooks, and the eager attention where patterns are wanted; numpy.save per batch."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Model


def load(model: str) -> Any:
    """Return the two models a user needs: SDPA for states, eager for patterns, which SDPA does not return."""
    sdpa = GPT2Model.from_pretrained(model).eval()
    eager = GPT2Model.from_pretrained(model, attn_implementation="eager").eval()
    return sdpa, eager


def save(out: str, name: str, value: torch.Tensor, dtype: torch.dtype = torch.float16) -> None:
    """Store one tensor of a batch."""
    np.save(os.path.join(out, f"{name}.npy"), value.to(dtype).numpy())


def save_states(model: Any, out: str, batch: int) -> list[Any]:
    """Hook the residual stream at every depth."""

    def keep(depth: int, module: Any, inputs: Any) -> None:
        save(out, f"resid-{depth}-{batch}", inputs[0])

    blocks = [*model.h, model.ln_f]
    return [
        block.register_forward_pre_hook(partial(keep, depth)) for depth, block in enumerate(blocks)
    ]


def save_patterns(model: Any, out: str, batch: int) -> list[Any]:
    """Hook the attention pattern of every layer."""

    def keep(layer: int, module: Any, inputs: Any, output: Any) -> None:
        save(out, f"pattern-{layer}-{batch}", output[1])

    return [
        block.attn.register_forward_hook(partial(keep, layer))
        for layer, block in enumerate(model.h)
    ]


def save_statistics(model: Any, out: str, batch: int) -> list[Any]:
    """Hook the attention pattern of every layer and keep what its rows and columns say."""

    def keep(layer: int, module: Any, inputs: Any, output: Any) -> None:
        for name, value in statistics(output[1]).items():
            save(out, f"{name}-{layer}-{batch}", value, torch.float32)

    return [
        block.attn.register_forward_hook(partial(keep, layer))
        for layer, block in enumerate(model.h)
    ]


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


def forward(model: Any, tokens: str, out: str, batch: int, hooks: Any) -> None:
    """Run the model over the tokens, with hooks for each batch."""
    ids = torch.from_numpy(np.load(tokens)).long()
    for i, part in enumerate(ids.split(batch)):
        handles = [handle for hook in hooks for handle in hook(model, out, i)]
        with torch.inference_mode():
            model(part, use_cache=False)
        for handle in handles:
            handle.remove()


def residual(model: Any, tokens: str, out: str, batch: int) -> None:
    """Store the residual stream at all depths."""
    forward(model[0], tokens, out, batch, [save_states])


def patterns(model: Any, tokens: str, out: str, batch: int) -> None:
    """Store the residual stream and every pattern."""
    forward(model[1], tokens, out, batch, [save_states, save_patterns])


def only_statistics(model: Any, tokens: str, out: str, batch: int) -> None:
    """Store the statistics of every pattern."""
    forward(model[1], tokens, out, batch, [save_statistics])


def read(out: str, site: str, layer: int, sequence: int, position: int, batch: int) -> np.ndarray:
    """Read one vector back: [d_model] of a state, [head, key] of patterns, [head] of statistics."""
    part = np.load(Path(out, f"{site}-{layer}-{sequence // batch}.npy"), mmap_mode="r")[
        sequence % batch
    ]
    return np.array(part[position] if site == "resid" else part[:, position])
