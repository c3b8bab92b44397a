"""Hugging Face models on these kernels: `register()`, then `attn_implementation="headwater"`.

Two functions are registered. The mask function turns padding, packed position_ids and sliding windows into row starts
(without it transformers drops padding silently). Where the mask isn't of that kind, or queries and keys differ in
number (a KV cache), both fall back to plain attention with the same result. Forward only: with gradients or dropout
the plain path runs, too. In transformers 4, GPT-2 and GPT-NeoX do not hand `output_attentions=True` on to an attention
function: set `model.config.output_attentions = True` there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch

from headwater.kernels.attention import attention
from headwater.kernels.output import AttentionOutput

NAME = "headwater"
LEAST = (4, 57)  # releases before gave attention functions other arguments
MASK_ROWS = 512
REFUSED = ("softcap", "s_aux", "position_bias")


class _Collector:
    """What `collect` asks of every layer, and the layers' outputs."""

    def __init__(self, statistics: bool, pattern: Any, edge: int) -> None:
        self.request = {"statistics": statistics, "pattern": pattern, "edge": edge}
        self.layers: dict[int, AttentionOutput] = {}


_COLLECTORS: list[_Collector] = []


def register() -> None:
    """Register the attention and the mask function "headwater" with transformers.

    Raises ImportError where its version is too old.
    """
    found = version("transformers")
    if tuple(map(int, found.split(".")[:2])) < LEAST:
        least = ".".join(map(str, LEAST))
        raise ImportError(
            f"transformers {found} is installed, but Headwater's attention needs {least} or newer: "
            f"pip install --upgrade 'transformers>={least}'"
        )
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)


@contextmanager
def collect(
    *, statistics: bool = True, pattern: str | None = None, edge: int = 128
) -> Iterator[dict[int, AttentionOutput]]:
    """Collect what every layer's attention gives besides its output, layer → AttentionOutput, during one forward pass.

    Patterns and statistics are those of `headwater.kernels.attention`. Layers that fall back are refused with a
    RuntimeError, so that nothing is missing silently.
    """
    collector = _Collector(statistics, pattern, edge)
    _COLLECTORS.append(collector)
    try:
        yield collector.layers
    finally:
        _COLLECTORS.remove(collector)


def attention_forward(
    module: torch.nn.Module,
    query_BNTH: torch.Tensor,
    key_BGTH: torch.Tensor,
    value_BGTH: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute one layer's attention: z [B, T, N, H] and, with `output_attentions`, the pattern [B, N, T, T].

    `attention_mask` is what `make_mask` returned: int32 row starts [B, T], None for plain causal attention, or a mask
    [B, 1, T, S] that is added to the scores. Raises ValueError for options that would change the result.
    """
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f'attn_implementation="headwater" does not support {name}; load the model with "eager"'
            )
    if scaling is None:
        scale = query_BNTH.shape[-1] ** -0.5
    else:
        scale = float(scaling)
    wants_pattern = _wants_pattern(module, kwargs)
    if not _is_fast(module, query_BNTH, key_BGTH, value_BGTH, attention_mask, dropout):
        if _COLLECTORS:
            raise RuntimeError(
                "attention fell back to the plain path (a KV cache, gradients, dropout or a mask that "
                "is no range of keys); nothing can be collected. Call the model with use_cache=False "
                "under torch.no_grad(), in eval mode"
            )
        return _plain(module, query_BNTH, key_BGTH, value_BGTH, attention_mask, scale, dropout)
    q, k, v = (x.transpose(1, 2) for x in (query_BNTH, key_BGTH, value_BGTH))
    request: dict[str, Any] = _COLLECTORS[-1].request if _COLLECTORS else {}
    if wants_pattern:
        request = {**request, "pattern": "square", "pattern_dtype": q.dtype}
    out = attention(q, k, v, scale=scale, row_start=attention_mask, **request)
    if _COLLECTORS:
        _COLLECTORS[-1].layers[int(getattr(module, "layer_idx", len(_COLLECTORS[-1].layers)))] = out
    return out.z, out.pattern if wants_pattern else None


def _wants_pattern(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    """Say whether attentions were asked for; GPT-2 takes the argument out and leaves it to transformers' collector."""
    if kwargs.get("output_attentions") or getattr(
        getattr(module, "config", None), "output_attentions", False
    ):
        return True
    try:
        capturing: Any = import_module("transformers.utils.output_capturing")
    except ImportError:
        return False
    return "attentions" in (capturing._active_collector.get() or {})


def _is_fast(
    module: torch.nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
) -> bool:
    if mask is not None:
        causal = mask.ndim == 2
    else:
        causal = bool(getattr(module, "is_causal", True))
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return (
        causal
        and q.shape[2] == k.shape[2]
        and q.shape[3] == v.shape[3]
        and not dropout
        and not learns
    )


def _plain(
    module: torch.nn.Module,
    q_BNTH: torch.Tensor,
    k_BGSH: torch.Tensor,
    v_BGSH: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention as transformers' eager functions do, under any mask."""
    group = q_BNTH.shape[1] // k_BGSH.shape[1]
    k = k_BGSH.repeat_interleave(group, 1)
    v = v_BGSH.repeat_interleave(group, 1)
    scores = q_BNTH @ k.transpose(2, 3) * scale
    n_queries, n_keys = scores.shape[-2:]
    if mask is not None and mask.ndim == 2:
        mask = _additive(_seen(mask)[:, None], scores.dtype)
    elif mask is None and n_queries > 1 and getattr(module, "is_causal", True):
        seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=scores.device).tril(
            n_keys - n_queries
        )
        mask = _additive(seen, scores.dtype)
    if mask is not None:
        scores = scores + mask
    p = torch.softmax(scores, -1, dtype=torch.float32).to(q_BNTH.dtype)
    p = torch.nn.functional.dropout(p, dropout, module.training)
    return (p @ v).transpose(1, 2).contiguous(), p


def _seen(row_start: torch.Tensor) -> torch.Tensor:
    key = torch.arange(row_start.shape[-1], device=row_start.device)
    return (key >= row_start[..., None]) & (key <= key[:, None])


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, torch.finfo(dtype).min
    )


def make_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int = 0,
    kv_offset: int = 0,
    cache_position: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> torch.Tensor:
    """Return row starts, int32 [B, T], where every query sees a range of keys up to itself, else an additive mask.

    Positions that `attention_mask` [B, T] pads see nothing. The square is looked at in blocks of rows, never whole.
    transformers says which queries there are by `q_length` and `q_offset`, before 5.4 by their positions,
    `cache_position` [T], and its own mask functions take the same.
    """
    if cache_position is not None:
        q_length = len(cache_position)
        q_offset = int(cache_position[0])
    assert q_length is not None

    def queries(first: int, n: int) -> dict[str, Any]:
        if cache_position is not None:
            return {"cache_position": cache_position[first : first + n]}
        return {"q_length": n, "q_offset": q_offset + first}

    masks: Any = import_module("transformers.masking_utils")
    sizes: dict[str, Any] = {
        "batch_size": batch_size,
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "attention_mask": attention_mask,
    }
    whole = q_length == kv_length and int(q_offset) == 0 and int(kv_offset) == 0
    if whole:
        options = {
            **kwargs,
            "allow_is_causal_skip": False,
            "allow_is_bidirectional_skip": False,
            "allow_torch_fix": False,
        }
        starts = []
        for first in range(0, q_length, MASK_ROWS):
            n_rows = min(MASK_ROWS, q_length - first)
            seen = masks.sdpa_mask(**queries(first, n_rows), **sizes, **options)
            if attention_mask is None:
                padded = None
            else:
                padded = ~attention_mask[:, first : first + n_rows].bool()
            start = _row_starts(seen[:, 0], first, padded)
            if start is None:
                break
            starts.append(start)
        else:
            return torch.cat(starts, 1).contiguous()
    mask: torch.Tensor = masks.eager_mask(**queries(0, q_length), **sizes, dtype=dtype, **kwargs)
    return mask


def _row_starts(
    seen_BQK: torch.Tensor, first: int, padded_BQ: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the first key that each query sees, t + 1 where it sees none; None where it sees no range up to t."""
    n_rows, n_keys = seen_BQK.shape[1:]
    t = torch.arange(first, first + n_rows, device=seen_BQK.device)
    if padded_BQ is not None:
        seen_BQK = seen_BQK & ~padded_BQ[..., None]
    count = seen_BQK.sum(-1)
    start = torch.where(count > 0, seen_BQK.int().argmax(-1), t + 1)
    key = torch.arange(n_keys, device=seen_BQK.device)
    ends = torch.where(seen_BQK, key, -1).amax(-1)
    ranges = (count == 0) | ((ends == t) & (count == t - start + 1))
    if bool(ranges.all()):
        return start.int()
    return None
