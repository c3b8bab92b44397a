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

from headwater.kernels.cpu.products import multiply_heads
from headwater.kernels.cpu.sharing import even_slices, share
from headwater.kernels.cpu.workspace import Workspace
from headwater.kernels.mask import RowBlock, weigh_values

ROW_STATISTICS = (
    "attn_entropy",
    "attn_max",
    "attn_argmax",
    "attn_sink",
    "attn_distance",
    "attn_self",
    "attn_prev",
)
STATISTICS = (*ROW_STATISTICS, "attn_received")
PEAK_STATISTICS = {"attn_entropy", "attn_max", "attn_argmax"}
POINT_STATISTICS = {"attn_sink", "attn_self", "attn_prev"}
LOWEST = -1e30
ENOUGH = 1 << 21
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
    and argmax −1. Rows that see a score of NaN or +inf, or none but −inf, are NaN (see `AttentionOutput`).
    """
    wanted = statistics or {}
    calls = on_scores, on_pattern, edit_scores, edit_pattern
    for b in range(q_BTNH.shape[0]):
        q, k, v = (x[b].transpose(0, 1) for x in (q_BTNH, k_BTNH, v_BTNH))
        of_sequence = {name: value[b] for name, value in wanted.items()}
        if wanted:
            sums = _Statistics(of_sequence, row_start_BT[b], q.dtype)
        else:
            sums = None
        for block in blocks[b]:
            _attend_rows(b, block, q, k, v, z_BTNH, scale, workspace, sums, calls)
        if sums is not None:
            sums.finish()


def _attend_rows(
    b: int,
    block: RowBlock,
    q_NTH: torch.Tensor,
    k_NTH: torch.Tensor,
    v_NTH: torch.Tensor,
    z_BTNH: torch.Tensor,
    scale: float,
    workspace: Workspace,
    sums: _Statistics | None,
    calls: tuple[OnRows | None, OnRows | None, EditRows | None, EditRows | None],
) -> None:
    on_scores, on_pattern, edit_scores, edit_pattern = calls
    n_head, _, d_head = q_NTH.shape
    # The pattern's buffer is reused by every block: N · rows · keys values, the largest thing alive here. A
    # second one for scores is needed only where the entropy or the argmax wants them after the softmax.
    n_rows = block.last - block.first
    n_keys = block.last - block.key
    rows = slice(block.first, block.last)
    keys = slice(block.key, block.last)
    q = q_NTH[:, rows]
    peaks = sums is not None and sums.peaks
    # −inf times a probability of 0 is NaN in Σ p s; a finite score this low has probability 0 as well.
    lowest = -math.inf
    if peaks and on_scores is None:
        lowest = LOWEST
    pattern = workspace.get("pattern", (n_head, n_rows, n_keys), q.dtype)
    if peaks:
        scores = workspace.get("scores", (n_head, n_rows, n_keys), q.dtype)
    else:
        scores = pattern
    multiply_heads(q, k_NTH[:, keys].transpose(1, 2), scores, scale)
    if block.hidden is None:
        # Causal: only the square at the end of the block, where queries meet themselves, has hidden keys.
        scores[:, :, -n_rows:].add_(_triangle(n_rows, q.dtype, lowest))
    else:
        scores.add_(block.hidden.clamp(min=lowest))
    shown = on_scores is not None or edit_scores is not None
    if shown:
        # NaN − inf is NaN: where others look at the scores, hidden keys are hidden by position, too.
        scores.masked_fill_(~block.seen(), lowest)
    if edit_scores is not None:
        edit_scores(b, block, scores)
    if on_scores is not None:
        on_scores(b, block, scores)
    torch.softmax(scores, -1, out=pattern)
    # The softmax of a row that is hidden everywhere is uniform or NaN; what it means is zeros.
    if block.empty is not None:
        pattern[:, block.empty] = 0
    lost = peaks and _sees_only_lowest(block, scores)
    broken = lost or (edit_pattern is not None and bool(pattern.isnan().any()))
    values = workspace.get("values", (n_head, n_rows, d_head), q.dtype)
    if not broken and edit_pattern is None:
        multiply_heads(pattern, v_NTH[:, keys], values)
        # One sum tells of all rows: NaN in the pattern is NaN in z, and 0 · NaN is NaN, too.
        broken = not math.isfinite(values.sum())
    if broken:
        if not shown:
            multiply_heads(q, k_NTH[:, keys].transpose(1, 2), scores, scale)
        if peaks or not shown:
            scores.masked_fill_(~block.seen(), -math.inf)
            torch.softmax(scores, -1, out=pattern)
        pattern.masked_fill_(~block.seen(), 0)
    if edit_pattern is not None and edit_pattern(b, block, pattern) and peaks:
        # The entropy is that of the edited pattern.
        torch.log(pattern, out=scores).clamp_(min=LOWEST)
    if broken or edit_pattern is not None:
        multiply_heads(pattern, v_NTH[:, keys], values)
        if not v_NTH[:, keys].isfinite().all():
            values = weigh_values(pattern, v_NTH[:, keys], block.seen())
    # z is [T, N, H] for the next matrix product, the products are by head.
    z_BTNH[b, rows] = values.transpose(0, 1)
    if sums is not None:
        if broken:
            sums.spoil(block, pattern)
        if peaks and on_scores is not None:
            (scores if block.hidden is not None else scores[:, :, -n_rows:]).clamp_(min=LOWEST)
        sums.add(block, scores, pattern)
    if on_pattern is not None:
        on_pattern(b, block, pattern)


def _sees_only_lowest(block: RowBlock, scores_NQK: torch.Tensor) -> bool:
    """Say whether a row may see only scores as low as those of hidden keys, among which its softmax then spreads.

    A row that sees any key sees its own, so that only those scores need to be looked at.
    """
    own = scores_NQK.numpy().diagonal(block.first - block.key, 1, 2)
    if block.empty is not None:
        own = np.delete(own, block.empty, 1)
    return bool((own <= LOWEST).any())


class _Statistics:
    """The wanted statistics of one sequence, each [N, T], filled by one row block after another.

    A thread takes all it needs of some heads in one go, by numpy, whose argmax and vecdot vectorise where torch's do
    not; a block of less than ENOUGH values takes no longer on one thread than it takes others to wake. Entropy needs
    no logarithm of the pattern: H = max s − ln max p − Σ p s. The largest s and p and Σ p s are kept until `finish`,
    which takes the logarithms of a whole sequence at once.
    """

    def __init__(
        self, wanted: dict[str, torch.Tensor], row_start_T: torch.Tensor, dtype: torch.dtype
    ) -> None:
        self.peaks = not PEAK_STATISTICS.isdisjoint(wanted)
        self._wanted = wanted
        self._out = {name: value.numpy() for name, value in wanted.items()}
        self._starts = row_start_T.numpy()
        self._empty: list[int] = []
        self._broken: list[tuple[slice, torch.Tensor]] = []
        of_rows = next(iter(wanted.values())).shape
        self._score, self._largest, self._mean = (torch.empty(of_rows, dtype=dtype) for _ in "spm")
        if "attn_received" in wanted:
            wanted["attn_received"].zero_()

    def add(self, block: RowBlock, scores_NQK: torch.Tensor, pattern_NQK: torch.Tensor) -> None:
        """Take one row block; scores, which only the largest ones need, are at least LOWEST."""
        if block.empty is not None:
            self._empty += (block.first + block.empty).tolist()
        scores = scores_NQK.numpy()
        pattern = pattern_NQK.numpy()
        rows = slice(block.first, block.last)

        def take(heads: slice) -> None:
            out = {name: value[heads, rows] for name, value in self._out.items()}
            if self.peaks:
                self._add_peaks(heads, rows, block.key, scores[heads], pattern[heads])
            if "attn_distance" in out:
                _fill_distance(block, pattern[heads], out["attn_distance"])
            _fill_points(block, pattern[heads], self._starts[rows], out)

        if "attn_received" in self._wanted:
            self._wanted["attn_received"][:, block.key : block.last].add_(pattern_NQK.sum(1))
        if len(self._out) > ("attn_received" in self._out):
            share(take, even_slices(len(pattern), 1 + pattern.size // ENOUGH))

    def spoil(self, block: RowBlock, pattern_NQK: torch.Tensor) -> None:
        """Make the statistics of a block's rows NaN where the pattern is."""
        self._broken.append((slice(block.first, block.last), pattern_NQK.isnan().any(-1)))

    def _add_peaks(
        self, heads: slice, rows: slice, key: int, scores_NQK: np.ndarray, pattern_NQK: np.ndarray
    ) -> None:
        # The largest score and the largest probability are in one place, so one argmax and two gathers serve
        # max p, argmax and the entropy; `at` is that place in the flattened block.
        place = scores_NQK.argmax(-1)
        n_rows = pattern_NQK.size // pattern_NQK.shape[2]
        n_keys = pattern_NQK.shape[2]
        at = place + np.arange(0, n_rows * n_keys, n_keys).reshape(place.shape)
        self._largest.numpy()[heads, rows] = pattern_NQK.reshape(-1).take(at)
        if "attn_argmax" in self._out:
            self._out["attn_argmax"][heads, rows] = place + key
        if "attn_entropy" in self._out:
            self._score.numpy()[heads, rows] = scores_NQK.reshape(-1).take(at)
            mean = self._mean.numpy()[heads, rows]
            with np.errstate(invalid="ignore"):
                np.vecdot(pattern_NQK, scores_NQK, out=mean)
                if np.isnan(mean).any():  # 0 · (−inf)
                    np.vecdot(pattern_NQK, np.maximum(scores_NQK, LOWEST), out=mean)

    def finish(self) -> None:
        """Store what needs every row block: the largest, the entropy, and rows that see no key."""
        if "attn_max" in self._wanted:
            self._wanted["attn_max"].copy_(self._largest)
        if "attn_entropy" in self._wanted:
            # ln Σ e^s = max s − ln max p, since max p = e^(max s) / Σ e^s; then H = lse − Σ p s. Rounding can leave
            # it a little below 0.
            lse = self._score - self._largest.log_().clamp_(min=LOWEST)
            torch.sub(lse, self._mean, out=self._wanted["attn_entropy"]).clamp_(min=0)
        for name in self._wanted.keys() & set(ROW_STATISTICS):
            self._wanted[name][:, self._empty] = -1 if name == "attn_argmax" else 0
            nothing = -1 if name == "attn_argmax" else math.nan
            for rows, broken in self._broken:
                self._wanted[name][:, rows].masked_fill_(broken, nothing)


def _fill_distance(block: RowBlock, pattern_NQK: np.ndarray, out_NQ: np.ndarray) -> None:
    """Write Σ p (query − key): keys are counted back from the end of the block, then from each query."""
    n_keys = pattern_NQK.shape[2]
    # Σ p (query − key) = Σ p (end − key) + (query − end) Σ p with Σ p = 1: one vector for all rows of a block
    # instead of a matrix of distances.
    back = np.arange(n_keys, 0, -1, dtype=pattern_NQK.dtype)
    ahead = np.arange(block.first - block.last, 0, dtype=pattern_NQK.dtype)
    np.maximum(np.vecdot(pattern_NQK, back) + ahead, 0, out=out_NQ)


def _fill_points(
    block: RowBlock,
    pattern_NQK: np.ndarray,
    starts_Q: np.ndarray,
    out: dict[str, np.ndarray],
) -> None:
    """Pick the probability on one key a row: the first visible one, the query's own, the one before."""
    if out.keys().isdisjoint(POINT_STATISTICS):
        return
    if block.hidden is None:
        # Row i of the block is query first + i, whose own key is column i of the last square.
        square = pattern_NQK[:, :, block.first - block.key :]
        if "attn_sink" in out:
            out["attn_sink"][:] = pattern_NQK[:, :, 0]
        if "attn_self" in out:
            out["attn_self"][:] = square.diagonal(0, 1, 2)
        if "attn_prev" in out:
            out["attn_prev"][:, 0] = pattern_NQK[:, 0, block.first - 1] if block.first else 0
            out["attn_prev"][:, 1:] = square.diagonal(-1, 1, 2)
        return
    # Keys are counted from block.key in the buffer; −1 stands for a key that the row does not see.
    query = np.arange(block.first, block.last)
    points = {
        "attn_sink": starts_Q,
        "attn_self": query,
        "attn_prev": np.where(query > starts_Q, query - 1, -1),
    }
    for name in out.keys() & points.keys():
        place = np.clip(points[name] - block.key, -1, pattern_NQK.shape[2] - 1)
        picked = pattern_NQK[:, np.arange(len(place)), np.maximum(place, 0)]
        out[name][:] = np.where(place < 0, 0, picked)


@lru_cache
def _triangle(n: int, dtype: torch.dtype, above: float) -> torch.Tensor:
    return torch.full((n, n), above, dtype=dtype).triu_(1)
