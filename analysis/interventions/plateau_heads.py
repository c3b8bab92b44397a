"""What heads do while a state moves: their pattern, their output split into three terms, and a token's own score.

Shapes: P pairs, S steps, N heads, L earlier positions, H d_head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from headwater.analysis.interventions.plateau import Sweep, check_depths
from headwater.analysis.interventions.plateau_paths import make_path, own_score
from headwater.analysis.interventions.prompts import Pair
from headwater.analysis.interventions.replay import Replay

if TYPE_CHECKING:
    import xarray

TERMS = ("pattern", "value", "cross")
MOVED = ("query", "key", "both")
CONVENTIONS = (
    "At the last position, by layer (from the depth on) and head. pattern_change: ½ Σ|p(α) − p(0)| over keys. z_change "
    "‖z(α) − z(0)‖. Δz = ΔP V(0) + P(0) ΔV + ΔP ΔV, the pattern, value and cross terms: term is the norm of each, "
    "term_share ⟨term, Δz⟩/‖Δz‖², which add up to 1. Earlier positions do not move, so the value term is the "
    "position's own. At the layer that reads the moved state: scores and pattern along the path (of the first pair), "
    "own_pattern, and own_score, the score of the position with itself, LayerNorm frozen at A, while only the query "
    "moves, only the key, or both: (1−α)² s_AA + α(1−α)(s_AB + s_BA) + α² s_BB, curvature 2 Δq·Δk × the scale of "
    "scores; own_score_measured is with LayerNorm at work. Against earlier keys the curvature is 0."
)


def head_response(
    replay: Replay, pairs: Sequence[Pair], depths: Sequence[int] | None = None, n_steps: int = 50
) -> xarray.Dataset:
    """Follow every head along straight paths; return a dataset of CONVENTIONS' quantities."""
    import xarray

    c = replay.config
    depths = check_depths(depths, replay.config.n_layer)
    sweep = Sweep(replay, pairs, n_steps)
    alpha = torch.from_numpy(sweep.alpha).to(replay.dtype)
    watch = _Watch(sweep, depths)
    ends = np.full((5, len(pairs), len(depths), c.n_head), np.nan)
    for i, depth in enumerate(depths):
        a, b = sweep.ends(depth)
        ends[:, :, i] = _own_ends(replay, depth, a, b).numpy()
        for part in sweep.parts():
            watch.place(i, depth, part)
            with torch.no_grad():
                x = sweep.place(depth, part, make_path(a[part], b[part], alpha, "linear"))
                replay.run(x, depth, sweep.a.before(part), look=watch)
    aa, ab, ba, bb, curvature = ends
    query_moves = _line(sweep.alpha, aa, ba)
    key_moves = _line(sweep.alpha, aa, ab)
    both_move = own_score(sweep.alpha, aa, ab, ba, bb)
    scores = np.stack([query_moves, key_moves, both_move], -2)
    by_head = ("pair", "depth", "layer", "head")
    at_depth = ("pair", "depth", "head")
    data = {
        "pattern_change": ((*by_head, "step"), watch.changes[0]),
        "z_change": ((*by_head, "step"), watch.changes[1]),
        "term": ((*by_head, "term_of", "step"), watch.terms[0]),
        "term_share": ((*by_head, "term_of", "step"), watch.terms[1]),
        "own_score": ((*at_depth, "moved", "step"), scores),
        "own_score_measured": ((*at_depth, "step"), watch.own[0]),
        "own_pattern": ((*at_depth, "step"), watch.own[1]),
        "curvature": (at_depth, curvature),
        "scores": (("depth", "head", "step", "key"), watch.picture[0]),
        "pattern": (("depth", "head", "step", "key"), watch.picture[1]),
    }
    coords = {
        "pair": [pair.label for pair in pairs],
        "depth": depths,
        "layer": np.arange(c.n_layer),
        "head": np.arange(c.n_head),
        "term_of": list(TERMS),
        "moved": list(MOVED),
        "alpha": ("step", sweep.alpha),
        "key": np.arange(watch.picture.shape[-1]),
    }
    return xarray.Dataset(data, coords, {"analysis": "plateau_heads", "conventions": CONVENTIONS})


class _Watch:
    """Look at the attention of a run of the sweep and keep what CONVENTIONS names."""

    def __init__(self, sweep: Sweep, depths: Sequence[int]) -> None:
        c = sweep.replay.config
        n_steps = len(sweep.alpha)
        n_keys = int(sweep.a.lengths.max())
        size = (sweep.n, len(depths), c.n_layer, c.n_head)
        at_depth = (sweep.n, len(depths), c.n_head, n_steps)
        first_pair = (len(depths), c.n_head, n_steps, n_keys)
        self.changes = np.full((2, *size, n_steps), np.nan, np.float32)
        self.terms = np.full((2, *size, len(TERMS), n_steps), np.nan, np.float32)
        self.own = np.full((2, *at_depth), np.nan)
        self.picture = np.full((2, *first_pair), np.nan, np.float32)
        self._sweep = sweep
        self._seen: dict[str, torch.Tensor] = {}

    def place(self, at: int, depth: int, part: slice) -> None:
        """Say which depth (the `at`-th) and which pairs come next."""
        self._at = at
        self._depth = depth
        self._part = part

    def __call__(self, site: str, layer: int, value: torch.Tensor) -> None:
        """Receive a site [P, S, N, 1, …]."""
        if site not in ("v", "attn_scores", "pattern", "z"):
            return
        now = value[:, :, :, -1]
        self._seen[site] = now
        if layer == self._depth and site in ("attn_scores", "pattern"):
            kind = int(site == "pattern")
            self.own[kind, self._part, self._at] = now[..., -1].transpose(1, 2).numpy()
            if self._part.start == 0:
                self.picture[kind, self._at] = now[0].transpose(0, 1).numpy()
        if site == "z":
            prefix = self._sweep.a.before(self._part)
            earlier = None
            if prefix is not None:
                earlier = prefix.values[layer]
            found = _split(self._seen["pattern"], self._seen["v"], now, earlier)
            for target, part in zip((*self.changes, *self.terms), found, strict=True):
                target[self._part, self._at, layer] = part.numpy()


def _line(alpha: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return the straight line between two values, [..., S]."""
    return np.asarray((1 - alpha) * start[..., None] + alpha * end[..., None])


def _split(
    pattern_PSNK: torch.Tensor,
    own_PSNH: torch.Tensor,
    z_PSNH: torch.Tensor,
    earlier_PNLH: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return total variation and |Δz| as [P, N, S], and norms and shares of the three terms as [P, N, 3, S]."""
    # z = P V, so Δz = ΔP V(0) + P(0) ΔV + ΔP ΔV exactly. Only the position's own value moves: ΔV has one row.
    pattern_change = pattern_PSNK - pattern_PSNK[:, :1]
    own_change = own_PSNH - own_PSNH[:, :1]
    mine_change = pattern_change[..., -1:]
    by_pattern = mine_change * own_PSNH[:, :1]
    if earlier_PNLH is not None:
        by_earlier = torch.einsum("psnk,pnkh->psnh", pattern_change[..., :-1], earlier_PNLH)
        by_pattern = by_earlier + by_pattern
    by_value = pattern_PSNK[:, :1, :, -1:] * own_change
    crossed = mine_change * own_change
    terms_3PSNH = torch.stack([by_pattern, by_value, crossed])

    # The shares ⟨term, Δz⟩ / ‖Δz‖² add up to 1.
    delta_PSNH = z_PSNH - z_PSNH[:, :1]
    square_PSN = delta_PSNH.square().sum(-1)
    along = (terms_3PSNH * delta_PSNH).sum(-1)
    share = torch.where(square_PSN > 0, along / square_PSN, torch.nan)
    norms = torch.linalg.vector_norm(terms_3PSNH, dim=-1)
    variation = pattern_change.abs().sum(-1) / 2
    return (
        variation.transpose(1, 2),
        square_PSN.sqrt().transpose(1, 2),
        norms.permute(1, 3, 0, 2),
        share.permute(1, 3, 0, 2),
    )


def _own_ends(replay: Replay, depth: int, a_PD: torch.Tensor, b_PD: torch.Tensor) -> torch.Tensor:
    """Return s_AA, s_AB (A's query, B's key), s_BA, s_BB and the curvature, [5, P, N], LayerNorm frozen at A."""
    c = replay.config
    w = replay.weights
    name = f"h.{depth}."
    variance = a_PD.var(-1, correction=0, keepdim=True)
    deviation = (variance + c.layer_norm_epsilon).sqrt()

    def project(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / deviation * w[name + "ln_1.weight"] + w[name + "ln_1.bias"]
        qkv = normed @ w[name + "attn.c_attn.weight"] + w[name + "attn.c_attn.bias"]
        q, k, _ = (part.view(-1, c.n_head, c.d_head) for part in qkv.chunk(3, -1))
        return q * replay.scale(depth), k

    q_a, k_a = project(a_PD)
    q_b, k_b = project(b_PD)
    s_aa = (q_a * k_a).sum(-1)
    s_ab = (q_a * k_b).sum(-1)
    s_ba = (q_b * k_a).sum(-1)
    s_bb = (q_b * k_b).sum(-1)
    # The second derivative of own_score by α: 2 (s_AA − s_AB − s_BA + s_BB) = 2 Δq · Δk.
    curvature = 2 * ((q_b - q_a) * (k_b - k_a)).sum(-1)
    return torch.stack([s_aa, s_ab, s_ba, s_bb, curvature])
