"""Attention for tensors on the CPU: what the Triton kernels give, from row blocks (`headwater.kernels.cpu.rows`)."""

from __future__ import annotations

import torch

from headwater.kernels.cpu.rows import STATISTICS, attend
from headwater.kernels.cpu.workspace import Workspace
from headwater.kernels.mask import RowBlock, split_rows
from headwater.kernels.output import AttentionOutput, n_causal_tiles

ROWS = 128


def attention_cpu(
    q_BTNH: torch.Tensor,
    k_BTGH: torch.Tensor,
    v_BTGH: torch.Tensor,
    *,
    scale: float,
    row_start: torch.Tensor | None,
    edge: int,
    statistics: bool,
    features: torch.Tensor | None,
    pattern_dtype: torch.dtype,
) -> AttentionOutput:
    """Compute attention in float32 row blocks; `edge` is 0 for no pattern, −1 for a square, else that of the tiles."""
    n, n_positions, n_head, d_head = q_BTNH.shape
    group = n_head // k_BTGH.shape[2]
    q = q_BTNH.float()
    k = _widened(k_BTGH, group)
    v = _widened(v_BTGH, group)
    if row_start is None:
        start = torch.zeros(n, n_positions, dtype=torch.int32)
    else:
        start = row_start
    if edge > 0 and (edge <= ROWS or edge % ROWS == 0):
        # Row blocks divide tiles, or are a whole tile: so a block never straddles two rows of tiles.
        rows = min(edge, ROWS)
    else:
        rows = max(edge, 0) or ROWS
    z = torch.empty(n, n_positions, n_head, d_head)
    lse = torch.empty(n, n_head, n_positions)
    table = None
    mass = None
    if features is not None:
        table = features.float().expand(n, *features.shape[-2:])
        mass = torch.empty(n, n_head, n_positions, table.shape[-1])
    pattern = _make_pattern(n, n_head, n_positions, edge, pattern_dtype)

    def on_scores(b: int, block: RowBlock, scores_NQK: torch.Tensor) -> None:
        # lse = max s − ln max p, in two steps: the scores' maximum here, the pattern's below, since both buffers are
        # reused for the next block.
        torch.amax(scores_NQK, -1, out=lse[b, :, block.first : block.last])

    def on_pattern(b: int, block: RowBlock, p_NQK: torch.Tensor) -> None:
        lse[b, :, block.first : block.last] -= p_NQK.amax(-1).log_()
        if table is not None and mass is not None:
            mass[b, :, block.first : block.last] = p_NQK @ table[b, block.key : block.last]
        if pattern is not None:
            _keep(pattern[b], block, p_NQK, edge)

    wanted = {}
    if statistics:
        wanted = {name: _row(name, n, n_head, n_positions) for name in STATISTICS}
    blocks = [split_rows(starts, rows) for starts in start]
    attend(
        q,
        k,
        v,
        z,
        scale=scale,
        blocks=blocks,
        row_start_BT=start,
        workspace=Workspace(),
        statistics=wanted,
        on_scores=on_scores,
        on_pattern=on_pattern,
    )
    # A row that sees no key has no sum.
    lse.masked_fill_((start > torch.arange(n_positions))[:, None], -torch.inf)
    column = wanted.pop("attn_received", None)
    return AttentionOutput(z.to(v_BTGH.dtype), lse, pattern, wanted or None, column, mass)


def _widened(x_BTGH: torch.Tensor, group: int) -> torch.Tensor:
    if group > 1:
        return x_BTGH.float().repeat_interleave(group, 2)
    return x_BTGH.float()


def _row(name: str, n: int, n_head: int, n_positions: int) -> torch.Tensor:
    dtype = torch.float32
    if name == "attn_argmax":
        dtype = torch.int32
    return torch.empty(n, n_head, n_positions, dtype=dtype)


def _make_pattern(
    n: int, n_head: int, n_positions: int, edge: int, dtype: torch.dtype
) -> torch.Tensor | None:
    if edge == 0:
        return None
    if edge < 0:
        return torch.zeros(n, n_head, n_positions, n_positions, dtype=dtype)
    return torch.zeros(n, n_head, n_causal_tiles(n_positions, edge), edge, edge, dtype=dtype)


def _keep(pattern: torch.Tensor, block: RowBlock, p_NQK: torch.Tensor, edge: int) -> None:
    """Copy one row block into a square [N, T, T] or into causal tiles [N, tile, E, E]."""
    if edge < 0:
        pattern[:, block.first : block.last, block.key : block.last] = p_NQK
        return
    # Tile (i, j) lies at i (i + 1) / 2 + j; keys before block.key are seen by no row and stay zero.
    i = block.first // edge
    rows = slice(block.first - i * edge, block.last - i * edge)
    for j in range(block.key // edge, i + 1):
        first = max(j * edge, block.key)
        last = min((j + 1) * edge, block.last)
        part = p_NQK[:, :, first - block.key : last - block.key]
        pattern[:, i * (i + 1) // 2 + j, rows, first - j * edge : last - j * edge] = part
