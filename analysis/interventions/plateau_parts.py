"""Where plateaus come from: widths again with parts of the network frozen or made linear, one by one and together.

What bends a path is the softmax, the MLPs' activation function and LayerNorm's division; with all three held the map
is affine and d(α) = α exactly. Shapes: P pairs, S steps, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from headwater.analysis.interventions.plateau import Sweep, check_depths, over_pairs
from headwater.analysis.interventions.plateau_paths import TAU, make_path, sharpness, width
from headwater.analysis.interventions.prompts import Pair
from headwater.analysis.interventions.replay import SWITCHES, Replay, Switch

if TYPE_CHECKING:
    import xarray

    from headwater.analysis.engine.results import Variables

SCENARIOS: dict[str, tuple[str, ...]] = {
    "nothing held": (),
    **{f"{name} held": (name,) for name in SWITCHES},
    "softmax alone": ("mlp_linear", "ln_scale"),
    "mlp alone": ("pattern", "ln_scale"),
    "layernorm alone": ("pattern", "mlp_linear"),
    "all held": ("pattern", "mlp_linear", "ln_scale"),
}
OUTPUTS = ("resid", "logits")
CONVENTIONS = (
    "Switches hold a part at what it is for A (α = 0): attn_out, pattern and mlp_out are frozen, mlp_linear replaces "
    "the activation function by its tangent there, ln_scale freezes what LayerNorm divides by (ln_f's too). A scenario "
    "holds its switches in every layer from the depth on; `… alone` leaves one of the three things that bend a path: "
    "the pattern's softmax, the activation function, LayerNorm's division. layer_width: one switch in one layer. "
    "*_mean and *_error: over the n_pairs pairs. Outputs: the last depth of the residual stream, and the logits. A "
    "line has width 2τ and sharpness 1."
)

JACOBIAN = (
    "The Jacobian of the last residual stream by the state that is moved, along the straight path. along: ‖J (b − a)‖"
    " / ‖b − a‖, exact. frobenius: ‖J‖_F, from n_probes random normal output directions v as the mean of ‖Jᵀv‖² "
    "(Hutchinson), with its standard error. Both are constant where the map is linear."
)


def attribute(
    replay: Replay,
    pairs: Sequence[Pair],
    depths: Sequence[int] | None = None,
    n_steps: int = 50,
    n_last: int = 1,
    tau: float = TAU,
    by_layer: bool = True,
) -> xarray.Dataset:
    """Return widths and sharpness by scenario, and by switch and layer, for straight paths of pairs."""
    import xarray

    depths = check_depths(depths, replay.config.n_layer)
    n_layer = replay.config.n_layer
    sweep = Sweep(replay, pairs, n_steps, n_last)
    alpha = torch.from_numpy(sweep.alpha).to(replay.dtype)
    size = (len(pairs), len(depths))
    curve = np.full((*size, len(SCENARIOS), 2, n_steps), np.nan)
    mirror = curve.copy()
    layers = np.full((2, *size, len(SWITCHES), n_layer, 2), np.nan)

    for i, depth in enumerate(depths):
        a, b = sweep.ends(depth)
        for part in sweep.parts():
            point = sweep.a.point(depth, part)
            states = make_path(a[part], b[part], alpha, "linear")

            def ends(held: frozenset[Switch]) -> tuple[np.ndarray, np.ndarray]:
                d, back, _, _ = sweep.outputs(depth, part, states, held, point)  # noqa: B023 (called at once)
                return d[:, -2:], back[:, -2:]

            for j, names in enumerate(SCENARIOS.values()):
                held = frozenset((name, at) for name in names for at in range(depth, n_layer + 1))
                curve[part, i, j], mirror[part, i, j] = ends(held)
            for j, name in enumerate(SWITCHES if by_layer else ()):
                for layer in range(depth, n_layer):
                    d, back = ends(frozenset({(name, layer)}))
                    layers[0, part, i, j, layer] = width(d, back, sweep.alpha, tau)
                    layers[1, part, i, j, layer] = sharpness(d, sweep.alpha)
    dims = ("pair", "depth", "scenario", "out", "step")
    data: Variables = {
        "curve": (dims, curve),
        "width": (dims[:-1], width(curve, mirror, sweep.alpha, tau)),
        "sharpness": (dims[:-1], sharpness(curve, sweep.alpha)),
    }
    if by_layer:
        by = ("pair", "depth", "switch", "layer", "out")
        data |= {"layer_width": (by, layers[0]), "layer_sharpness": (by, layers[1])}
    averaged = [name for name in data if name.endswith(("width", "sharpness"))]
    data |= over_pairs(data, averaged)
    coords = {
        "pair": [pair.label for pair in pairs],
        "depth": depths,
        "scenario": list(SCENARIOS),
        "out": list(OUTPUTS),
        "switch": list(SWITCHES),
        "layer": np.arange(n_layer),
        "alpha": ("step", sweep.alpha),
    }
    attributes = {"analysis": "plateau_parts", "conventions": CONVENTIONS, "tau": tau}
    return xarray.Dataset(data, coords, attributes)


def jacobian(
    replay: Replay,
    pairs: Sequence[Pair],
    depth: int,
    n_steps: int = 11,
    n_probes: int = 8,
    seed: int = 0,
) -> xarray.Dataset:
    """Measure the Jacobian of the last residual with respect to the moved one along straight paths.

    along: ‖J (b − a)‖/‖b − a‖, exact. frobenius: ‖J‖_F, from `n_probes` random normal output directions v as the mean
    of ‖Jᵀv‖² (Hutchinson), with its standard error; both would be constant if the map were linear.
    """
    import xarray

    check_depths([depth], replay.config.n_layer)
    sweep = Sweep(replay, pairs, n_steps)
    alpha = torch.from_numpy(sweep.alpha).to(replay.dtype)
    rng = np.random.default_rng(seed)
    along = np.full((len(pairs), n_steps), np.nan)
    square = along.copy()
    error = along.copy()
    a, b = sweep.ends(depth)
    for part in sweep.parts():
        x = sweep.place(depth, part, make_path(a[part], b[part], alpha, "linear"))

        def last(x: torch.Tensor) -> torch.Tensor:
            return replay.run(x, depth, sweep.a.before(part))  # noqa: B023 (called at once)

        step = (b - a)[part][:, None, None].expand_as(x)
        tangent: torch.Tensor = torch.func.jvp(last, (x,), (step.contiguous(),))[1]
        length = torch.linalg.vector_norm(step, dim=-1)
        stretched = torch.linalg.vector_norm(tangent, dim=-1) / length
        along[part] = stretched[..., 0].numpy()

        # E ‖Jᵀv‖² = ‖J‖_F² for v ~ N(0, I) (Hutchinson 1989).
        out, pull, *_ = torch.func.vjp(last, x)
        squares = []
        for _ in range(n_probes):
            probe = torch.from_numpy(rng.standard_normal(tuple(out.shape))).to(out)
            pulled = pull(probe)[0]
            squares.append(pulled.square().sum(-1)[..., 0].numpy())
        square[part] = np.mean(squares, 0)
        if n_probes > 1:
            error[part] = np.std(squares, 0, ddof=1) / np.sqrt(n_probes)
    dims = ("pair", "step")
    # d‖J‖ = d(‖J‖²) / 2‖J‖ carries the error over to the root.
    data = {
        "along": (dims, along),
        "frobenius": (dims, np.sqrt(square)),
        "frobenius_error": (dims, error / (2 * np.sqrt(square))),
    }
    coords = {"pair": [pair.label for pair in pairs], "alpha": ("step", sweep.alpha)}
    attributes = {
        "analysis": "plateau_jacobian",
        "depth": depth,
        "conventions": JACOBIAN,
        "seed": seed,
    }
    return xarray.Dataset(data, coords, attributes)
