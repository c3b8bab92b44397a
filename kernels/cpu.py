"""Attention on a CPU that gives its pattern, or its statistics, back: row blocks whose work buffer is the pattern.

Block i of the queries is computed only against its first i + 1 blocks of keys, so half of the square is never
touched. Scores, softmax and statistics have the dtype of q, k and v: float32, or float64 for a reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch

from headwater.kernels.mask import RowBlock
from headwater.kernels.products import multiply_heads
from headwater.kernels.sharing import even_slices, share
from headwater.kernels.workspace import Workspace

ROW_STATISTICS = ("attn_entropy", "attn_max", "attn_argmax", "attn_sink", "attn_distance", "attn_self", "attn_prev")
STATISTICS = (*ROW_STATISTICS, "attn_received")
PEAK_STATISTICS = {"attn_entropy", "attn_max", "attn_argmax"}
LOWEST = -1e30
OnRows = Callable[[int, RowBlock, torch.Tensor], None]
EditRows = Callable[[int, RowBlock, torch.Tensor], bool]


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
    edit_scores: EditRows | None = None,
    edit_pattern: EditRows | None = None,
) -> None:
    """Write softmax(scale · q kᵀ) v into `z_BTNH`, and what was asked for besides.

    `blocks` are the row blocks of each sequence. Each wanted statistic is a tensor [B, N, T] to fill (of q's dtype,
    `attn_argmax` int32). `on_pattern(b, block, pattern_NQK)` sees each row block of probabilities, `on_scores` the
    scores with −inf at hidden keys; both tensors are reused after the call. `edit_scores` and `edit_pattern` may change
    them in place before they are used, and say whether they did. Rows that see no key have z = 0, a pattern of zeros
    and argmax −1.
    """
    wanted = dict(statistics or {})
    if "attn_received" in wanted:
        wanted["attn_received"].zero_()
    calls = on_scores, on_pattern, edit_scores, edit_pattern
    for b in range(q_BTNH.shape[0]):
        q, k, v = (x[b].transpose(0, 1) for x in (q_BTNH, k_BTNH, v_BTNH))
        for block in blocks[b]:
            _attend_rows(b, block, q, k, v, z_BTNH, scale, row_start_BT[b], workspace, wanted, calls)


def _attend_rows(
    b: int,
    block: RowBlock,
    q_NTH: torch.Tensor,
    k_NTH: torch.Tensor,
    v_NTH: torch.Tensor,
    z_BTNH: torch.Tensor,
    scale: float,
    row_start_T: torch.Tensor,
    workspace: Workspace,
    wanted: dict[str, torch.Tensor],
    calls: tuple[OnRows | None, OnRows | None, EditRows | None, EditRows | None],
) -> None:
    on_scores, on_pattern, edit_scores, edit_pattern = calls
    n_head, _, d_head = q_NTH.shape
    n_rows, n_keys = block.last - block.first, block.last - block.key
    rows, keys = slice(block.first, block.last), slice(block.key, block.last)
    q = q_NTH[:, rows]
    peaks = bool(wanted.keys() & PEAK_STATISTICS)
    pattern = workspace.get("pattern", (n_head, n_rows, n_keys), q.dtype)
    scores = workspace.get("scores", (n_head, n_rows, n_keys), q.dtype) if peaks else pattern
    multiply_heads(q, k_NTH[:, keys].transpose(1, 2), scores, scale)
    if block.hidden is None:
        scores[:, :, -n_rows:].add_(_triangle(n_rows, q.dtype, -math.inf if on_scores or not peaks else LOWEST))
    else:
        scores.add_(block.hidden)
    if edit_scores is not None:
        edit_scores(b, block, scores)
    if on_scores is not None:
        on_scores(b, block, scores)
    torch.softmax(scores, -1, out=pattern)
    if block.empty is not None:
        pattern[:, block.empty] = 0
    if edit_pattern is not None and edit_pattern(b, block, pattern) and peaks:
        torch.log(pattern, out=scores).clamp_(min=LOWEST)  # the entropy is that of the edited pattern
    values = workspace.get("values", (n_head, n_rows, d_head), q.dtype)
    multiply_heads(pattern, v_NTH[:, keys], values)
    z_BTNH[b, rows] = values.transpose(0, 1)
    if wanted:
        if peaks and (block.hidden is not None or on_scores is not None):
            (scores if block.hidden is not None else scores[:, :, -n_rows:]).clamp_(min=LOWEST)
        _fill_reductions(b, block, scores if peaks else None, pattern, wanted)
        _fill_points(b, block, pattern, row_start_T, wanted)
        if block.empty is not None:
            for name in wanted.keys() & set(ROW_STATISTICS):
                wanted[name][b, :, block.first + block.empty] = -1 if name == "attn_argmax" else 0
    if on_pattern is not None:
        on_pattern(b, block, pattern)


def _fill_reductions(
    b: int, block: RowBlock, scores_NQK: torch.Tensor | None, pattern_NQK: torch.Tensor, wanted: dict[str, torch.Tensor]
) -> None:
    """Reduce one row block to what needs every key: largest probability, its key, entropy, mean distance, column sums.

    numpy's argmax and vecdot vectorise where torch's do not; the heads are shared among as many threads as torch has.
    Entropy needs no logarithm of the pattern: H = max s − ln max p − Σ p s. `scores_NQK`, at least LOWEST, are needed
    for all that depends on the largest.
    """
    n_head, n_rows, n_keys = pattern_NQK.shape
    rows, of_rows = slice(block.first, block.last), (n_head, n_rows)
    place = torch.empty(of_rows, dtype=torch.int64)
    mean_score, mean_back = (torch.empty(of_rows, dtype=pattern_NQK.dtype) for _ in range(2))
    pattern, places, mean_scores, mean_backs = (x.numpy() for x in (pattern_NQK, place, mean_score, mean_back))
    scores = pattern if scores_NQK is None else scores_NQK.numpy()
    back = np.arange(n_keys, 0, -1, dtype=pattern.dtype)
    entropy, distance = "attn_entropy" in wanted, "attn_distance" in wanted

    def reduce(heads: slice) -> None:
        if scores_NQK is not None:
            np.argmax(scores[heads], -1, out=places[heads])
        if entropy:
            np.vecdot(pattern[heads], scores[heads], out=mean_scores[heads])
        if distance:
            np.vecdot(pattern[heads], back, out=mean_backs[heads])

    if scores_NQK is not None or distance:
        share(reduce, even_slices(n_head))
    if "attn_received" in wanted:
        wanted["attn_received"][b, :, block.key : block.last].add_(pattern_NQK.sum(1))
    if distance:
        away = mean_back + (torch.arange(block.first, block.last) - block.last)
        wanted["attn_distance"][b, :, rows] = away.clamp_(min=0)
    if scores_NQK is not None:
        _fill_peaks(b, rows, block.key, place, mean_score, scores_NQK, pattern_NQK, wanted)


def _fill_peaks(
    b: int,
    rows: slice,
    key: int,
    place_NQ: torch.Tensor,
    mean_score_NQ: torch.Tensor,
    scores_NQK: torch.Tensor,
    pattern_NQK: torch.Tensor,
    wanted: dict[str, torch.Tensor],
) -> None:
    """Store each row's largest probability, its key and its entropy, from the place of the largest and Σ p s."""
    largest = pattern_NQK.gather(2, place_NQ[..., None])[..., 0]
    if "attn_argmax" in wanted:
        wanted["attn_argmax"][b, :, rows] = place_NQ + key
    if "attn_max" in wanted:
        wanted["attn_max"][b, :, rows] = largest
    if "attn_entropy" in wanted:
        score = scores_NQK.gather(2, place_NQ[..., None])[..., 0]
        wanted["attn_entropy"][b, :, rows] = (score - largest.log().clamp_(min=LOWEST) - mean_score_NQ).clamp_(min=0)


def _fill_points(
    b: int, block: RowBlock, pattern_NQK: torch.Tensor, row_start_T: torch.Tensor, wanted: dict[str, torch.Tensor]
) -> None:
    """Pick the probability on one key a row: the first visible one, the query's own, the one before."""
    rows = slice(block.first, block.last)
    if block.hidden is None:
        square = pattern_NQK[:, :, block.first - block.key :]
        for name, value in (("attn_sink", pattern_NQK[:, :, 0]), ("attn_self", square.diagonal(0, 1, 2))):
            if name in wanted:
                wanted[name][b, :, rows] = value
        if "attn_prev" in wanted:
            wanted["attn_prev"][b, :, block.first] = pattern_NQK[:, 0, block.first - 1] if block.first else 0
            wanted["attn_prev"][b, :, block.first + 1 : block.last] = square.diagonal(-1, 1, 2)
        return
    query, starts = torch.arange(block.first, block.last), row_start_T[rows].long()
    points = {"attn_sink": starts, "attn_self": query, "attn_prev": torch.where(query > starts, query - 1, -1)}
    for name in wanted.keys() & points.keys():
        place = (points[name] - block.key).clamp_(-1, pattern_NQK.shape[2] - 1)
        picked = pattern_NQK.gather(2, place.clamp(min=0).expand(pattern_NQK.shape[0], -1)[..., None])[..., 0]
        wanted[name][b, :, rows] = picked.masked_fill_(place < 0, 0)


@lru_cache
def _triangle(n: int, dtype: torch.dtype, above: float) -> torch.Tensor:
    return torch.full((n, n), above, dtype=dtype).triu_(1)
