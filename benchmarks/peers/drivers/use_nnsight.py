"""Capture with nnsight: one trace a batch that saves what is wanted; zarr-python arrays, a chunk a batch."""

from __future__ import annotations

from typing import Any

import nnsight
import numpy as np
import torch
import zarr
from nnsight import NNsight
from transformers import GPT2Model


def load(model: str) -> Any:
    """Return two wrapped models: SDPA for states, eager for patterns, which SDPA does not return."""
    return [
        NNsight(GPT2Model.from_pretrained(model, attn_implementation=how).eval())
        for how in ("sdpa", "eager")
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


def store(group: Any, name: str, layer: int, first: int, n: int, value: torch.Tensor) -> None:
    """Store one layer of a batch; the array is made when it is first met."""
    shape = value.shape[1:]
    if name not in group:
        layers = group.attrs["layers"] + (name == "resid")
        chunks = (1, value.shape[0], *shape)
        group.create_array(
            name,
            shape=(layers, n, *shape),
            chunks=chunks,
            dtype=value.numpy().dtype,
            compressors=None,
        )
    group[name][layer, first : first + value.shape[0]] = value.numpy()


def residual(model: Any, tokens: str, out: str, batch: int) -> None:
    """Store the residual stream at all depths."""
    model = model[0]
    group = zarr.open_group(out, mode="a")
    ids = torch.from_numpy(np.load(tokens)).long()
    group.attrs["layers"] = len(model.h)
    for first in range(0, len(ids), batch):
        with torch.inference_mode(), model.trace(ids[first : first + batch], use_cache=False):
            kept = nnsight.save([])
            for block in model.h:
                kept.append(block.input.to(torch.float16))
            kept.append(model.ln_f.input.to(torch.float16))
        for depth, value in enumerate(kept):
            store(group, "resid", depth, first, len(ids), value)


def patterns(model: Any, tokens: str, out: str, batch: int) -> None:
    """Store the residual stream and every pattern."""
    model = model[1]
    group = zarr.open_group(out, mode="a")
    ids = torch.from_numpy(np.load(tokens)).long()
    group.attrs["layers"] = len(model.h)
    for first in range(0, len(ids), batch):
        with torch.inference_mode(), model.trace(ids[first : first + batch], use_cache=False):
            kept = nnsight.save([])
            weights = nnsight.save([])
            for block in model.h:
                kept.append(block.input.to(torch.float16))
                weights.append(block.attn.output[1].to(torch.float16))
            kept.append(model.ln_f.input.to(torch.float16))
        for name, values in (("resid", kept), ("pattern", weights)):
            for layer, value in enumerate(values):
                store(group, name, layer, first, len(ids), value)


def only_statistics(model: Any, tokens: str, out: str, batch: int) -> None:
    """Store the statistics of every pattern."""
    model = model[1]
    group = zarr.open_group(out, mode="a")
    ids = torch.from_numpy(np.load(tokens)).long()
    group.attrs["layers"] = len(model.h)
    for first in range(0, len(ids), batch):
        with torch.inference_mode(), model.trace(ids[first : first + batch], use_cache=False):
            kept = nnsight.save([])
            for block in model.h:
                kept.append(statistics(block.attn.output[1]))
        for layer, values in enumerate(kept):
            for name, value in values.items():
                store(group, name, layer, first, len(ids), value.contiguous())


def read(out: str, site: str, layer: int, sequence: int, position: int, batch: int) -> np.ndarray:
    """Read one vector back: [d_model] of a state, [head, key] of patterns, [head] of statistics."""
    array: Any = zarr.open_array(out, path=site, mode="r")
    return np.asarray(
        array[layer, sequence, position] if site == "resid" else array[layer, sequence, :, position]
    )
