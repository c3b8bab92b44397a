"""Where early distributed attention ends: the step in the first-token share over layers, and the step down after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_R2, MIN_JUMP = 0.5, 0.1


@dataclass(frozen=True)
class Step:
    """A step: the index of the first value after it, the share of variance that it explains, and its height."""

    index: int
    r2: float
    jump: float


def best_step(values: Sequence[float] | np.ndarray, sign: int, min_r2: float, min_jump: float) -> Step | None:
    """Return the step up (sign 1) or down (−1) with the least squared error, None where it does not count.

    It counts where R² ≥ `min_r2` and the means before and after differ by at least `min_jump`.
    """
    f = np.asarray(values, np.float64)
    total = float(((f - f.mean()) ** 2).sum()) if len(f) else 0.0
    if total == 0:
        return None
    fits = []
    for i in range(1, len(f)):
        before, after = f[:i].mean(), f[i:].mean()
        if sign * (after - before) > 0:
            error = float(((f[:i] - before) ** 2).sum() + ((f[i:] - after) ** 2).sum())
            fits.append((error, i, sign * float(after - before)))
    if not fits:
        return None
    error, index, jump = min(fits)
    r2 = 1 - error / total
    return Step(index, r2, jump) if r2 >= min_r2 and jump >= min_jump else None


def transitions(
    share_by_layer: Sequence[float] | np.ndarray, min_r2: float = MIN_R2, min_jump: float = MIN_JUMP
) -> tuple[Step | None, Step | None]:
    """Find l_in and l_out in the second-half first-token share by layer, as indices into it.

    l_in is the best step up; l_out the best step down among the layers from l_in on. None where there is none.
    """
    into = best_step(share_by_layer, 1, min_r2, min_jump)
    if into is None:
        return None, None
    out = best_step(np.asarray(share_by_layer)[into.index :], -1, min_r2, min_jump)
    return into, None if out is None else Step(into.index + out.index, out.r2, out.jump)
