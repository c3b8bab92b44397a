"""What attention gives back, and how causal tiles lie in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch

FLOAT_ROWS = ("attn_entropy", "attn_max", "attn_sink", "attn_distance", "attn_self", "attn_prev")
N_FEATURES = 12


class AttentionOutput(NamedTuple):
    """Attention of T queries over themselves; what was not asked for is None.

    `z` [B, T, N, H] in the type of v. `lse` float32 [B, N, T]: ln Σ exp(score), −inf in rows that see no key.
    A row that sees a score of NaN or +inf, or none but −inf, has no softmax. It is NaN in z, in lse, in the pattern on
    the keys that it sees (hidden ones stay 0), in its statistics (argmax −1) and in the columns of the keys it sees.
    `pattern` [B, N, T, T], or causal tiles [B, N, tile, E, E]. `row`: each row statistic [B, N, T], float32, but int32
    `attn_argmax`. `column`: float32 [B, N, T], the mass that each key receives (`attn_received`). `features`: float32
    [B, N, T, F], the pattern times a table of key features.
    """

    z: torch.Tensor
    lse: torch.Tensor
    pattern: torch.Tensor | None = None
    row: dict[str, torch.Tensor] | None = None
    column: torch.Tensor | None = None
    features: torch.Tensor | None = None


class ResidualOutput(NamedTuple):
    """What one row [..., D] of the residual stream gives, all but the first two float32 or int32 of shape [...].

    `x` the new residual stream; `normed` its LayerNorm (None where there are no weights); `scale` the standard
    deviation by which LayerNorm divides, √(variance + ε); `norm` the Euclidean norm; `cosine` with the previous depth,
    0 where one of the two is zero; `largest` = max |x| and `dimension` where it is (the first of equals); `overflow`
    counts values that are finite and become infinite in the captured type, `nonfinite` those that already are not.
    In a row whose sum is not finite everywhere only `x` and the two counts mean anything.
    """

    x: torch.Tensor
    normed: torch.Tensor | None
    scale: torch.Tensor
    norm: torch.Tensor
    cosine: torch.Tensor
    largest: torch.Tensor
    dimension: torch.Tensor
    overflow: torch.Tensor
    nonfinite: torch.Tensor


def n_causal_tiles(n_positions: int, edge: int) -> int:
    """Return how many tiles of `edge` × `edge` the lower triangle of a T × T pattern needs."""
    # 1 + 2 + … + n, the lower triangle with its diagonal.
    n = -(-n_positions // edge)
    return n * (n + 1) // 2


def tiles_to_square(tiles: torch.Tensor, n_positions: int) -> torch.Tensor:
    """Turn causal tiles [..., tile, E, E] into a square [..., T, T]; tile (i, j) lies at i (i + 1) / 2 + j."""
    edge = tiles.shape[-1]
    n = -(-n_positions // edge)
    square = tiles.new_zeros(*tiles.shape[:-3], n * edge, n * edge)
    for i in range(n):
        for j in range(i + 1):
            rows = slice(i * edge, (i + 1) * edge)
            keys = slice(j * edge, (j + 1) * edge)
            square[..., rows, keys] = tiles[..., i * (i + 1) // 2 + j, :, :]
    return square[..., :n_positions, :n_positions]


def square_to_tiles(square: torch.Tensor, edge: int) -> torch.Tensor:
    """Turn a causal square [..., T, T] into tiles [..., tile, E, E], zero beyond T."""
    n_positions = square.shape[-1]
    n = -(-n_positions // edge)
    padded = torch.nn.functional.pad(square, (0, n * edge - n_positions) * 2)
    parts = [
        padded[..., i * edge : (i + 1) * edge, j * edge : (j + 1) * edge]
        for i in range(n)
        for j in range(i + 1)
    ]
    return torch.stack(parts, -3)
