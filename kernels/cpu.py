"""Attention on a CPU that gives its pattern, or its statistics, back: row blocks whose work buffer is the pattern.

Block i of the queries is computed only against its first i + 1 blocks of keys, so half of the square is never
touched. Scores, softmax and statistics are float32 whatever the inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from headwater.kernels.mask import RowBlock
from headwater.kernels.workspace import Workspace

ROW_STATISTICS = ("attn_entropy", "attn_max", "attn_argmax", "attn_sink", "attn_distance", "attn_self", "attn_prev")
STATISTICS = (*ROW_STATISTICS, "attn_received")
OnRows = Callable[[int, RowBlock, torch.Tensor], None]


def attend(
    q_BTNH: torch.Tensor,
    k_BTNH: torch.Tensor,
    v_BTNH: torch.Tensor,
    z_BTNH: torch.Tensor,
    *,
    scale: float,
    blocks: Sequence[Sequence[RowBlock]],
    row_start_BT: torch.Tensor,
    workspace: Workspace,
    statistics: Mapping[str, torch.Tensor] | None = None,
    on_scores: OnRows | None = None,
    on_pattern: OnRows | None = None,
) -> None:
    """Write softmax(scale · q kᵀ) v into `z_BTNH`, and what was asked for besides.

    `blocks` are the row blocks of each sequence. Each wanted statistic is a tensor [B, N, T] to fill (float32,
    `attn_argmax` int32). `on_pattern(b, block, pattern_NQK)` sees each row block of probabilities, `on_scores` the
    scores with −inf at hidden keys; both tensors are reused after the call. Rows that see no key have z = 0, a
    pattern of zeros and argmax −1.
    """
    wanted = dict(statistics or {})
    if "attn_received" in wanted:
        wanted["attn_received"].zero_()
    for b in range(q_BTNH.shape[0]):
        q, k, v = (x[b].transpose(0, 1) for x in (q_BTNH, k_BTNH, v_BTNH))
        if wanted.keys() & {"attn_entropy", "attn_distance"}:
            v = _widen(v, k, workspace)
        for block in blocks[b]:
            _attend_rows(b, block, q, k, v, z_BTNH, scale, row_start_BT[b], workspace, wanted, on_scores, on_pattern)


def _attend_rows(
    b: int,
    block: RowBlock,
    q_NTH: torch.Tensor,
    k_NTH: torch.Tensor,
    v_NTW: torch.Tensor,
    z_BTNH: torch.Tensor,
    scale: float,
    row_start_T: torch.Tensor,
    workspace: Workspace,
    wanted: dict[str, torch.Tensor],
    on_scores: OnRows | None,
    on_pattern: OnRows | None,
) -> None:
    n_head, _, d_head = q_NTH.shape
    n_rows, n_keys = block.last - block.first, block.last - block.key
    rows, keys = slice(block.first, block.last), slice(block.key, block.last)
    q = q_NTH[:, rows]
    pattern = workspace.get("pattern", (n_head, n_rows, n_keys))
    torch.baddbmm(pattern, q, k_NTH[:, keys].transpose(1, 2), beta=0, alpha=scale, out=pattern)
    if block.hidden is None:
        pattern[:, :, -n_rows:].add_(_triangle(n_rows))
    else:
        pattern.add_(block.hidden)
    if on_scores is not None:
        on_scores(b, block, pattern)
    score_max = pattern.amax(-1) if "attn_entropy" in wanted else None
    torch.softmax(pattern, -1, out=pattern)
    if block.empty is not None:
        pattern[:, block.empty] = 0
    if v_NTW.shape[2] > d_head:
        v_NTW[:, keys, 2 * d_head] = torch.arange(-n_keys, 0, dtype=torch.float32)
    values = workspace.get("values", (n_head, n_rows, v_NTW.shape[2]))
    torch.bmm(pattern, v_NTW[:, keys], out=values)
    z_BTNH[b, rows] = values[:, :, :d_head].transpose(0, 1)
    if wanted:
        _fill_statistics(b, block, pattern, values, q, score_max, scale, row_start_T, wanted)
    if on_pattern is not None:
        on_pattern(b, block, pattern)


def _fill_statistics(
    b: int,
    block: RowBlock,
    pattern_NQK: torch.Tensor,
    values_NQW: torch.Tensor,
    q_NQH: torch.Tensor,
    score_max_NQ: torch.Tensor | None,
    scale: float,
    row_start_T: torch.Tensor,
    wanted: dict[str, torch.Tensor],
) -> None:
    """Reduce one row block of probabilities.

    Entropy needs no logarithm of the pattern: H = max s − ln max p − Σ p s, and Σ_j p_j s_j = scale · q · (P K).
    Mean distance is a value column too: key positions counted from the end of the block, so that near keys are exact.
    """
    rows, d_head = slice(block.first, block.last), q_NQH.shape[2]
    query = torch.arange(block.first, block.last)
    peak: torch.Tensor | None = None
    if "attn_argmax" in wanted:
        peak, place = pattern_NQK.max(-1)
        wanted["attn_argmax"][b, :, rows] = place + block.key
    elif wanted.keys() & {"attn_max", "attn_entropy"}:
        peak = pattern_NQK.amax(-1)
    if "attn_max" in wanted and peak is not None:
        wanted["attn_max"][b, :, rows] = peak
    if score_max_NQ is not None and peak is not None:
        mean_score = (values_NQW[:, :, d_head : 2 * d_head] * q_NQH).sum(-1) * scale
        wanted["attn_entropy"][b, :, rows] = (score_max_NQ - peak.log() - mean_score).clamp_(min=0)
    if "attn_distance" in wanted:
        mean_key = values_NQW[:, :, 2 * d_head]
        wanted["attn_distance"][b, :, rows] = (query - block.last - mean_key).clamp_(min=0)
    points = {
        "attn_sink": row_start_T[rows].long(),
        "attn_self": query,
        "attn_prev": torch.where(query > row_start_T[rows], query - 1, -1),
    }
    for name in wanted.keys() & points.keys():
        place = (points[name] - block.key).clamp_(-1, pattern_NQK.shape[2] - 1)
        picked = pattern_NQK.gather(2, place.clamp(min=0).expand(pattern_NQK.shape[0], -1)[..., None])[..., 0]
        wanted[name][b, :, rows] = picked.masked_fill_(place < 0, 0)
    if block.empty is not None:
        for name in wanted.keys() & set(ROW_STATISTICS):
            wanted[name][b, :, block.first + block.empty] = -1 if name == "attn_argmax" else 0
    if "attn_received" in wanted:
        wanted["attn_received"][b, :, block.key : block.last].add_(pattern_NQK.sum(1))


_TRIANGLES: dict[int, torch.Tensor] = {}


def _triangle(n: int) -> torch.Tensor:
    if n not in _TRIANGLES:
        _TRIANGLES[n] = torch.full((n, n), -math.inf).triu_(1)
    return _TRIANGLES[n]


def _widen(v_NTH: torch.Tensor, k_NTH: torch.Tensor, workspace: Workspace) -> torch.Tensor:
    """Put values, keys and room for key positions side by side: [N, T, 2 H + 16]; one product gives all three."""
    n_head, n, d_head = v_NTH.shape
    wide = workspace.get("wide", (n_head, n, 2 * d_head + 16))
    wide[:, :, :d_head], wide[:, :, d_head : 2 * d_head] = v_NTH, k_NTH
    wide[:, :, 2 * d_head :] = 0
    return wide
