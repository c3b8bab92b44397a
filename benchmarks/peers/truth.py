"""What peers' values must be: states and patterns of transformers' eager forward in float64, at a few places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from headwater.benchmarks.lib.rows import Row

ABSOLUTE = 1e-4
RELATIVE = 1e-3
STATISTICS = (
    "attn_entropy",
    "attn_max",
    "attn_argmax",
    "attn_sink",
    "attn_distance",
    "attn_self",
    "attn_prev",
    "attn_received",
)
Place = tuple[str, int, int, int]


class Truth:
    """Float64 values of one model on given ids at a few positions of every sequence."""

    def __init__(self, values: dict[str, np.ndarray]) -> None:
        self.values = values
        self.positions = values["positions"]

    @staticmethod
    def of(model: Path, tokens: Path, file: Path, n_positions: int = 8) -> Truth:
        """Load the reference from `file`, or compute it and keep it there."""
        if not file.exists():
            values: Row = _compute(model, np.load(tokens), n_positions)
            np.savez(file, **values)
        with np.load(file) as stored:
            return Truth(dict(stored))

    def places(self, sites: tuple[str, ...], limit: int, seed: int = 0) -> list[Place]:
        """Choose up to `limit` places (site, layer or depth, sequence, position) of every site."""
        random = np.random.default_rng(seed)
        chosen: list[Place] = []
        for site in sites:
            n_layer = len(self.values["resid"]) - (site != "resid")
            n = len(self.positions)
            every = [
                (site, layer, s, int(p))
                for layer in range(n_layer)
                for s in range(n)
                for p in self.positions[s]
            ]
            take = random.permutation(len(every))[:limit]
            chosen += [every[i] for i in sorted(take)]
        return chosen

    def problem(self, place: Place, got: np.ndarray) -> str | None:
        """Say how a value differs from the reference by more than 1e-4 + 1e-3 · |reference|, or return None."""
        site, layer, sequence, position = place
        at = int(np.flatnonzero(self.positions[sequence] == position)[0])
        right = self.expected(site, layer, sequence, at)
        if site == "attn_argmax":  # another key that is as large is as right
            row = self.values["pattern"][layer, sequence, at]
            got = np.take_along_axis(row, np.asarray(got, np.int64)[:, None], 1)[:, 0]
            right = row.max(-1)
        if got.shape != right.shape:
            return f"{place}: shape {got.shape}, expected {right.shape}"
        error = np.abs(got.astype(np.float64) - right)
        over = error - (ABSOLUTE + RELATIVE * np.abs(right))
        if not (over <= 0).all():
            worst = 0
            if np.isfinite(over).any():
                worst = int(np.nanargmax(over))
            return f"{place}: {got.flat[worst]} where {right.flat[worst]} is right"
        return None

    def expected(self, site: str, layer: int, sequence: int, at: int) -> np.ndarray:
        """Return the reference at one place: [d_model], [head, key] or [head]."""
        if site in ("resid", "pattern", "attn_received"):
            return np.asarray(self.values[site][layer, sequence, at])
        row = self.values["pattern"][layer, sequence, at]
        position = int(self.positions[sequence][at])
        key = np.arange(row.shape[-1])
        of: Row = {
            "attn_entropy": lambda: (
                -np.where(row > 0, row * np.log(np.where(row > 0, row, 1)), 0).sum(-1)
            ),
            "attn_max": lambda: row.max(-1),
            "attn_argmax": lambda: row.argmax(-1),
            "attn_sink": lambda: row[:, 0],
            "attn_distance": lambda: (row * (position - key)).sum(-1),
            "attn_self": lambda: row[:, position],
            "attn_prev": lambda: row[:, position - 1] if position else np.zeros(len(row)),
        }
        return np.asarray(of[site]())


def _compute(model: Path, ids: np.ndarray, n_positions: int) -> dict[str, np.ndarray]:
    from transformers import GPT2Model

    loaded: Any = GPT2Model.from_pretrained(model, attn_implementation="eager", dtype=torch.float64)
    loaded.train(False)
    n, length = ids.shape
    random = np.random.default_rng(1)
    middle = [np.sort(1 + random.permutation(length - 2)[: n_positions - 2]) for _ in ids]
    positions = np.stack([np.r_[0, chosen, length - 1] for chosen in middle])
    seen: dict[str, list[list[np.ndarray]]] = {"resid": [], "pattern": [], "attn_received": []}

    def states(module: Any, inputs: Any) -> None:
        seen["resid"][-1].append(inputs[0][0][at].numpy())

    def weights(module: Any, inputs: Any, output: Any) -> None:
        seen["pattern"][-1].append(output[1][0].transpose(0, 1)[at].numpy())
        seen["attn_received"][-1].append(output[1][0].sum(-2).T[at].numpy())

    for block in loaded.h:
        block.register_forward_pre_hook(states)
        block.attn.register_forward_hook(weights)
    loaded.ln_f.register_forward_pre_hook(states)
    with torch.inference_mode():
        for s in range(n):
            at = torch.from_numpy(positions[s])
            for found in seen.values():
                found.append([])
            loaded(torch.from_numpy(ids[s : s + 1]).long(), use_cache=False)
    return {
        "positions": positions,
        **{name: np.array(v).swapaxes(0, 1) for name, v in seen.items()},
    }
