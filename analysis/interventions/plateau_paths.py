"""Paths between two states, and how flat what comes of them is: distances, width, sharpness.

Shapes: P pairs, S steps, D d_model. Definitions after Heimersheim & Mendel and Janiak et al. (arXiv 2409.17113).
"""

from __future__ import annotations

import math

import numpy as np
import torch

PATHS = ("linear", "slerp")
BASELINES = ("random", "covariance")
TAU = 0.1


def make_path(
    a_PD: torch.Tensor, b_PD: torch.Tensor, alpha_S: torch.Tensor, kind: str
) -> torch.Tensor:
    """Return states [P, S, D] from a (α = 0) to b (α = 1): on the straight line, or on the arc (slerp).

    slerp turns the direction at a constant rate and interpolates the norm; states in one line fall back to the line.
    """
    a = a_PD[:, None]
    b = b_PD[:, None]
    alpha = alpha_S[None, :, None]
    line = torch.lerp(a, b, alpha)
    if kind == "linear":
        return line
    norm_a = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
    norm_b = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    u = a / norm_a
    v = b / norm_b

    # The angle ω by its tangent, which is exact near 0 and π, where arccos of the cosine is not.
    cosine = (u * v).sum(-1, keepdim=True)
    across = v - cosine * u
    angle = torch.atan2(torch.linalg.vector_norm(across, dim=-1, keepdim=True), cosine)

    # Shoemake 1985: (sin((1 − α)ω) u + sin(αω) v) / sin ω has length 1.
    sine = torch.sin(angle)
    turned = torch.sin((1 - alpha) * angle) * u + torch.sin(alpha * angle) * v
    arc = turned / sine
    norm = torch.lerp(norm_a, norm_b, alpha)
    path: torch.Tensor = torch.where(sine > 1e-6, norm * arc, line)

    # The ends are the states themselves, to the bit.
    path[:, 0] = a[:, 0]
    path[:, -1] = b[:, 0]
    return path


def baseline_ends(
    a_PD: torch.Tensor, b_PD: torch.Tensor, directions_PD: torch.Tensor
) -> torch.Tensor:
    """Return ends as far from a as b is, in other directions."""
    length = torch.linalg.vector_norm(b_PD - a_PD, dim=-1, keepdim=True)
    drawn = torch.linalg.vector_norm(directions_PD, dim=-1, keepdim=True)
    end: torch.Tensor = a_PD + directions_PD * (length / drawn)
    return end


def distances(o_PSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return d = ‖o − o_A‖/‖o_B − o_A‖, its mirror ‖o − o_B‖/‖o_B − o_A‖ and d_A/(d_A + d_B), [P, S] each."""
    to_a = torch.linalg.vector_norm(o_PSD - o_PSD[:, :1], dim=-1)
    to_b = torch.linalg.vector_norm(o_PSD - o_PSD[:, -1:], dim=-1)
    return relative(to_a, to_b)


def relative(
    to_a: torch.Tensor, to_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turn distances [..., S] from both ends into parts of the whole way, and d_A/(d_A + d_B)."""
    whole = to_a[..., -1:]
    return to_a / whole, to_b / whole, to_a / (to_a + to_b)


def width(d: np.ndarray, mirror: np.ndarray, alpha: np.ndarray, tau: float = TAU) -> np.ndarray:
    """Return w_A + w_B of curves [..., S]: how far from each end the output stays within τ of that end's.

    The crossing is interpolated between steps. A line gives 2τ, a step 1.
    """
    from_a = first_above(d, alpha, tau)
    from_b = first_above(mirror[..., ::-1], 1 - alpha[::-1], tau)
    return np.asarray(from_a + from_b)


def first_above(d: np.ndarray, alpha: np.ndarray, tau: float) -> np.ndarray:
    """Return where curves [..., S] first exceed τ, linear between steps; 1 where they never do, NaN for NaN."""
    above = d > tau
    at = np.clip(above.argmax(-1), 1, None)
    low = np.take_along_axis(d, at[..., None] - 1, -1)[..., 0]
    high = np.take_along_axis(d, at[..., None], -1)[..., 0]
    before = alpha[at - 1]
    step = alpha[at] - before
    with np.errstate(invalid="ignore", divide="ignore"):
        part_of_step = np.clip((tau - low) / (high - low), 0, 1)
    crossing = before + step * part_of_step
    found = np.where(above.any(-1), crossing, 1.0)
    return np.where(np.isnan(d).any(-1), np.nan, found)


def sharpness(d: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return the largest slope |Δd/Δα| of curves [..., S] on the grid; a line gives 1."""
    slope = np.diff(d, axis=-1) / np.diff(alpha)
    return np.asarray(np.abs(slope).max(-1))


def softmax_curve(alpha: np.ndarray, s: float, n: int) -> np.ndarray:
    """Return the weight of the key moved to, for a query moved between two of n orthonormal keys at score scale s.

    p = e^{αS} / (e^{(1−α)S} + e^{αS} + n − 2); no plateau at small S, a step at large S.
    """
    left = np.exp((1 - alpha) * s)
    reached = np.exp(alpha * s)
    others = n - 2
    return np.asarray(reached / (left + reached + others))


def softmax_width(s: float, tau: float = TAU) -> float:
    """Return the width of the softmax's plateau with two keys, in closed form."""
    # With two keys p(α) = σ((2α − 1)S), from σ(−S) to σ(S), so d(α) = (p(α) − σ(−S)) / tanh(S/2). The plateau ends
    # where d = τ, at p = σ(−S) + τ tanh(S/2), that is at α = ½ + ln(p/(1 − p)) / 2S, and likewise from the other end.
    start = 1 / (1 + math.exp(s))
    p = start + tau * math.tanh(s / 2)
    end_of_plateau = 0.5 + math.log(p / (1 - p)) / (2 * s)
    return 2 * end_of_plateau


def norm_curve(alpha: np.ndarray) -> np.ndarray:
    """Return d(α) behind LayerNorm alone, for centred orthogonal ends of equal norm: √2 sin(½ atan2(α, 1 − α))."""
    # The direction turns by φ = atan2(α, 1 − α), the chord of which is 2 sin(φ/2); the whole chord is √2.
    turned = np.arctan2(alpha, 1 - alpha)
    return np.asarray(np.sqrt(2) * np.sin(0.5 * turned))


def own_score(
    alpha: np.ndarray, s_aa: np.ndarray, s_ab: np.ndarray, s_ba: np.ndarray, s_bb: np.ndarray
) -> np.ndarray:
    """Return a token's score with itself [..., S] while its state moves from A to B and LayerNorm is frozen.

    (1−α)² s_AA + α(1−α)(s_AB + s_BA) + α² s_BB: bilinear, for query and key both move.
    """
    aa = np.asarray(s_aa)[..., None]
    mixed = np.asarray(s_ab)[..., None] + np.asarray(s_ba)[..., None]
    bb = np.asarray(s_bb)[..., None]
    score = (1 - alpha) ** 2 * aa
    score = score + alpha * (1 - alpha) * mixed
    score = score + alpha**2 * bb
    return np.asarray(score)
