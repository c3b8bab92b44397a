"""Direct logit attribution: what every embedding, head and MLP adds to the logit of the next token.

The final LayerNorm is linear once its scale is given, so the logit is a sum over what the components wrote into the
residual stream. The sums are checked against the logit itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.analysis.engine.analysis import (
    Figures,
    ModelAnalysis,
    Plot,
    as_function,
    rounded,
    rounded_one,
)
from headwater.analysis.engine.options import COUNT, setting
from headwater.analysis.engine.results import provenance
from headwater.analysis.engine.scan import committed_blocks
from headwater.analysis.measures.origin import MODEL_HELP, load_run_model
from headwater.extractor.settings import MODEL, TEXT
from headwater.store.reader import Run

if TYPE_CHECKING:
    import torch
    import xarray

    from headwater.analysis.engine.positions import PositionTap
    from headwater.extractor.model.weights import Checkpoint

EXACT = 1e-9
POSITION_SETS = ("all", "without_first")
DIMS = {"head_contribution": ("layer", "head"), "attn_bias": ("layer",), "mlp": ("layer",)}
CONVENTIONS = (
    "Direct contributions to the logit of the next token minus the mean logit of the vocabulary, in float64 with raw "
    "weights; the scale of ln_f is held at its value. logit = token_embedding + position_embedding + Σ "
    "head_contribution + Σ attn_bias + Σ mlp (with its bias) + constant (the bias of ln_f). Means over `positions` "
    "evenly spaced positions of `sequences` evenly spaced rows, those that are real and have a next token; *_std is "
    "the standard deviation over them. position_set without_first: a row's first visible key is left out. closure: the "
    "largest |sum − logit|."
)


@dataclass(frozen=True)
class AttributionAnalysis(ModelAnalysis):
    """Split the logit of the next token into direct contributions, on sampled tokens that are run again.

    `model` is the run's model by default; ValueError if its weights are not those of the run. Returns a dataset by
    position_set: token_embedding, position_embedding, constant, logit; head_contribution [layer, head]; attn_bias,
    mlp [layer]; each with its *_std, and n_tokens.
    """

    name = "attribution"
    title = "direct logit attribution of every head, MLP and embedding (runs the model)"
    section = "What writes the output"
    plots = (
        Plot(
            "attribution",
            "Direct contributions to the logit of the next token, less the vocabulary's "
            "mean; the sums are exact.",
            "headwater.analysis.plots.output:attribution",
            together=False,
        ),
    )

    model: str | None = setting(None, TEXT, MODEL_HELP, "MODEL", leads=MODEL)
    n_sequences: int = setting(16, COUNT, "sampled rows", "SEQUENCES", flag="--sequences")
    n_positions: int = setting(
        32, COUNT, "sampled positions of a row", "POSITIONS", flag="--positions"
    )

    def compute(self, run: Run, result: xarray.Dataset | None = None) -> xarray.Dataset:
        """Run the sampled rows again, and take their logits apart."""
        import torch

        from headwater.analysis.engine.positions import PositionTap
        from headwater.extractor.model.batch import make_batch
        from headwater.extractor.model.forward import Model

        n_sequences = self.n_sequences
        n_positions = self.n_positions
        if n_sequences < 1 or n_positions < 1:
            raise ValueError(
                f"n_sequences, n_positions are {n_sequences}, {n_positions}; expected at least 1 each."
            )
        checkpoint = load_run_model(run, self.model)
        compute = Model(checkpoint, "fp64")
        unembedding, mean = _unembedding(checkpoint)
        ranges = [run.manifest.block_range(block) for block in committed_blocks(run, partial=True)]
        there = np.concatenate([np.arange(*ends) for ends in ranges])
        chosen = there[
            np.unique(
                np.linspace(0, len(there) - 1, min(n_sequences, len(there))).round().astype(int)
            )
        ]
        tokens = run.plain("tokens")
        row_start = run.plain("row_start")
        found: list[dict[str, np.ndarray]] = []
        first: list[np.ndarray] = []
        for sequence in chosen:
            batch = make_batch(tokens[sequence : sequence + 1], row_start[sequence : sequence + 1])
            has_next = np.flatnonzero(batch.targets[0].numpy() >= 0)
            if not len(has_next):
                continue
            at = has_next[
                np.unique(np.linspace(0, len(has_next) - 1, n_positions).round().astype(int))
            ]
            tap = PositionTap(torch.from_numpy(at))
            compute.run(batch, tap)
            target = batch.targets[0, at]
            embedded = [
                checkpoint.tensors["wte.weight"][batch.tokens[0, at]].double(),
                checkpoint.tensors["wpe.weight"][batch.positions[0, at]].double(),
            ]
            found.append(
                _contributions(checkpoint, tap, unembedding[target].double() - mean, embedded)
            )
            first.append(row_start[sequence][at] == at)
        if not found:
            raise ValueError(
                f"{run.path} has no token with a next one among the sampled rows. Take more --sequences."
            )
        values = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
        return _dataset(run, checkpoint, values, np.concatenate(first), n_sequences, n_positions)

    @staticmethod
    def headline(result: xarray.Dataset) -> Figures:
        """Return the mean logit, what the MLPs add, and the head that adds most."""
        head = result["head_contribution"][0].values
        layer, best = np.unravel_index(head.argmax(), head.shape)
        return {
            "logit": rounded_one(result.logit[0]),
            "mlp": rounded(result.mlp[0]),
            "largest_head": f"L{layer}H{best}: {rounded_one(head[layer, best])}",
        }


attribution = as_function(AttributionAnalysis)


def _unembedding(checkpoint: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W_U [V, D] and the mean of its rows in float64."""
    matrix = checkpoint.tensors["wte.weight" if checkpoint.config.tied else "lm_head.weight"]
    return matrix, matrix.double().mean(0)


def _contributions(
    checkpoint: Checkpoint, tap: PositionTap, toward_nD: torch.Tensor, embedded: list[torch.Tensor]
) -> dict[str, np.ndarray]:
    """Return every component's part of the centred logit at n positions: [n, …]."""
    import torch

    c = checkpoint.config
    t = checkpoint.tensors
    values = tap.values
    x = values["resid"][c.n_layer]
    centred = x - x.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + c.layer_norm_epsilon).sqrt()
    direction = toward_nD * t["ln_f.weight"].double()
    constant = toward_nD @ t["ln_f.bias"].double()
    logit = (centred / scale * direction).sum(1) + constant
    direction = (direction - direction.mean(1, keepdim=True)) / scale
    out = {"token_embedding": embedded[0], "position_embedding": embedded[1]}
    parts = {name: (value * direction).sum(1) for name, value in out.items()}
    head = []
    bias = []
    mlp = []
    for layer in range(c.n_layer):
        w_o = t[f"h.{layer}.attn.c_proj.weight"].double().view(c.n_head, c.d_head, c.d_model)
        head.append(torch.einsum("nhd,hdm,nm->nh", values["z"][layer], w_o, direction))
        bias.append(direction @ t[f"h.{layer}.attn.c_proj.bias"].double())
        mlp.append((values["mlp_out"][layer] * direction).sum(1))
    parts |= {
        "head_contribution": torch.stack(head, 1),
        "attn_bias": torch.stack(bias, 1),
        "mlp": torch.stack(mlp, 1),
    }
    parts |= {"constant": constant}
    total = torch.stack(
        [value.flatten(1).sum(1) if value.ndim > 1 else value for value in parts.values()]
    ).sum(0)
    closure = (total - logit).abs()
    if closure.max() > EXACT * max(1.0, float(x.abs().max()) * float(direction.abs().sum(1).max())):
        raise ArithmeticError(f"the contributions miss the logit by {closure.max():g}.")
    return {
        name: value.numpy()
        for name, value in (parts | {"logit": logit, "closure": closure}).items()
    }


def _dataset(
    run: Run,
    checkpoint: Checkpoint,
    values: dict[str, np.ndarray],
    first: np.ndarray,
    n_rows: int,
    n_positions: int,
) -> xarray.Dataset:
    import xarray

    sets = (np.ones(len(first), bool), ~first)
    variables: dict[str, Any] = {
        "n_tokens": (("position_set",), np.array([kept.sum() for kept in sets]))
    }
    variables["closure"] = (), values.pop("closure").max()
    for name, value in values.items():
        dims = ("position_set", *DIMS.get(name, ()))
        empty = np.full(value.shape[1:], np.nan)
        for tail, figure in (("", np.mean), ("_std", np.std)):
            variables[name + tail] = (
                dims,
                np.stack([figure(value[k], 0) if k.any() else empty for k in sets]),
            )
    c = checkpoint.config
    layers = np.arange(c.n_layer)
    coords = {
        "position_set": list(POSITION_SETS),
        "layer": layers,
        "head": np.arange(c.n_head),
        "layer_fraction": ("layer", (layers + 0.5) / c.n_layer),
    }
    arguments = {"sequences": n_rows, "positions": n_positions}
    return xarray.Dataset(
        variables, coords, provenance(run, "attribution", arguments, 0, CONVENTIONS)
    )
