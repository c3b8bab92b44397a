"""The specification: attention, its statistics and the residual tap in plain torch, in any float type.

Everything is materialised and nothing is clever; float64 inputs give the figures that the other paths are tested
against. Shapes: B sequences, T positions, N heads, G key heads, H d_head, Q query, K key, F features, D d_model.
"""

from __future__ import annotations

import torch

from headwater.kernels.mask import visible, weigh_values
from headwater.kernels.output import FLOAT_ROWS, AttentionOutput, ResidualOutput, square_to_tiles


def exact_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type that a reference computes in: float64 stays, everything else is float32."""
    if dtype == torch.float64:
        return torch.float64
    return torch.float32


def attention_reference(
    q_BTNH: torch.Tensor,
    k_BTGH: torch.Tensor,
    v_BTGH: torch.Tensor,
    *,
    scale: float,
    row_start: torch.Tensor | None = None,
    pattern: str | None = None,
    edge: int = 128,
    statistics: bool = False,
    features: torch.Tensor | None = None,
    pattern_dtype: torch.dtype | None = None,
) -> AttentionOutput:
    """Compute softmax(scale · q kᵀ) v by its definition; shapes and meanings as in `headwater.kernels.attention`."""
    n, n_positions, n_head, _ = q_BTNH.shape
    dtype = exact_type(q_BTNH.dtype)
    group = n_head // k_BTGH.shape[2]
    q = q_BTNH.to(dtype).transpose(1, 2)
    k, v = (x.to(dtype).transpose(1, 2).repeat_interleave(group, 1) for x in (k_BTGH, v_BTGH))
    if row_start is None:
        start = torch.zeros(n, n_positions, dtype=torch.int32, device=q.device)
    else:
        start = row_start
    seen = visible(start)[:, None]
    # p = exp(s − lse), 0 where hidden; −inf − −inf of an empty row is NaN, but all of its keys are hidden.
    scores = (scale * (q @ k.transpose(-1, -2))).masked_fill(~seen, -torch.inf)
    empty = ~seen.any(-1)
    lse = torch.logsumexp(scores, -1)
    # A row that sees NaN, +inf or only −inf has no softmax: exp(inf − inf) is NaN.
    lse = lse.masked_fill(lse.isinf() & ~empty, torch.nan)
    p = torch.where(seen, torch.exp(scores - lse[..., None]), 0.0)
    z = weigh_values(p, v, seen).transpose(1, 2).to(v_BTGH.dtype)
    if pattern_dtype is None:
        kept = p
    else:
        kept = p.to(pattern_dtype)
    if pattern == "tiles":
        kept = square_to_tiles(kept, edge)
    out = AttentionOutput(z, lse)
    if pattern:
        out = out._replace(pattern=kept)
    if statistics:
        out = out._replace(row=row_statistics(p, start), column=p.sum(-2))
    if features is not None:
        table = features.to(dtype).expand(n, *features.shape[-2:])[:, None]
        out = out._replace(features=p @ table)
    return out


def row_statistics(p_BNQK: torch.Tensor, row_start_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Reduce a pattern to what is stored of each row: [B, N, T] in the pattern's type, `attn_argmax` int32.

    Entropy −Σ p ln p in nats; sink: mass on the row's first visible key; distance: Σ p (query − key); prev: mass on the
    key before the query, 0 where the row does not see it. Rows that see no key: 0, and argmax −1. Rows without a
    softmax, whose p are NaN on the keys that they see: NaN, and argmax −1.
    """
    n_positions = p_BNQK.shape[-1]
    t = torch.arange(n_positions, device=p_BNQK.device)
    empty = (row_start_BT > t)[:, None].expand(p_BNQK.shape[:-1])
    sink = (
        row_start_BT.clamp(0, n_positions - 1)
        .long()[:, None, :, None]
        .expand(*p_BNQK.shape[:-1], 1)
    )
    # The diagonal below the main one is p of the key before; the first query has none.
    previous = torch.zeros_like(p_BNQK[..., 0])
    previous[..., 1:] = p_BNQK.diagonal(-1, -2, -1)
    largest, place = p_BNQK.max(-1)
    broken = largest.isnan()
    row = {
        "attn_entropy": -torch.special.xlogy(p_BNQK, p_BNQK).sum(-1),
        "attn_max": largest,
        "attn_argmax": place.masked_fill(empty | broken, -1).int(),
        "attn_sink": p_BNQK.gather(-1, sink)[..., 0],
        "attn_distance": (p_BNQK * (t[:, None] - t)).sum(-1),
        "attn_self": p_BNQK.diagonal(0, -2, -1).clone(),
        "attn_prev": previous,
    }
    for name in FLOAT_ROWS:
        row[name] = row[name].masked_fill(broken, torch.nan)
    return row


def residual_reference(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    epsilon: float = 1e-5,
    previous: torch.Tensor | None = None,
    capture_dtype: torch.dtype | None = None,
) -> ResidualOutput:
    """Add `delta` to the residual stream [..., D] and describe the sum, by definition; see `ResidualOutput`.

    `previous` is the state that the cosine is taken with (x before the addition where it is None), `capture_dtype` the
    type in which values may overflow (the stream's own where it is None).
    """
    dtype = exact_type(x.dtype)
    before = x.to(dtype)
    if delta is None:
        added = before
    else:
        added = before + delta.to(dtype)
    # What the model goes on with is rounded to the stream's type, and the statistics are of that.
    y = added.to(x.dtype).to(dtype)
    if previous is None:
        other = before
    else:
        other = previous.to(dtype)
    captured = added.to(capture_dtype or x.dtype)
    centred = y - y.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1) + epsilon).sqrt()
    normed = None
    if weight is not None:
        normed = centred / scale[..., None] * weight.to(dtype)
        if bias is not None:
            normed = normed + bias.to(dtype)
        normed = normed.to(x.dtype)
    norm = y.norm(dim=-1)
    norm_other = other.norm(dim=-1)
    product = norm * norm_other
    cosine = torch.where(
        product > 0, (y * other).sum(-1) / product.clamp(min=torch.finfo(dtype).tiny), 0.0
    )
    largest, dimension = y.abs().max(-1)
    return ResidualOutput(
        added.to(x.dtype),
        normed,
        scale,
        norm,
        cosine,
        largest,
        dimension.int(),
        (added.isfinite() & captured.isinf()).sum(-1).int(),
        (~added.isfinite()).sum(-1).int(),
    )
