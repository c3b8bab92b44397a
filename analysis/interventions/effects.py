"""How much the loss needs each head and MLP: directly, through the output alone, and in total, with all that follows.

Shapes: B sequences, T positions, D d_model, V d_vocab.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from headwater.analysis.interventions.ablation import TOKENS_AT_ONCE, Measure
from headwater.analysis.interventions.replay import Replay
from headwater.extractor.edits.apply import Editor
from headwater.extractor.edits.grammar import Edit
from headwater.extractor.model.batch import make_batch
from headwater.extractor.model.forward import Model
from headwater.extractor.model.hook import RecordHook
from headwater.extractor.model.tap import NoTap
from headwater.extractor.model.weights import Checkpoint

ROWS = 512
CONVENTIONS = (
    "Increase of the mean next-token loss, nats, when a component's output is set to zero at every position. direct: "
    "only the last residual stream lacks it, so all that follows it works as before (ln_f divides by the new scale); "
    "total: the component is gone from the forward pass. Components are the heads (z W_O, without the attention's "
    "bias) and the MLPs (mlp_out). direct_embedding: without the token and position embeddings."
)


def effects(
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    row_start: np.ndarray | None = None,
    compute: str = "fp32",
) -> Any:
    """Return direct and total effects of every head and MLP on the loss over rows of tokens [sequence, position]."""
    import xarray

    c = checkpoint.config
    model = Model(checkpoint, compute)
    replay = Replay(checkpoint, compute)
    starts = np.zeros_like(tokens) if row_start is None else row_start
    wanted = {(site, at) for site in ("z", "mlp_out") for at in range(c.n_layer)}
    wanted |= {("resid", 0), ("resid", c.n_layer)}
    direct: dict[tuple[str, int, int], float] = {}
    n_loss = 0
    step = max(TOKENS_AT_ONCE // tokens.shape[1], 1)
    for first in range(0, len(tokens), step):
        batch = make_batch(tokens[first : first + step], starts[first : first + step])
        record = RecordHook(wanted)
        with torch.inference_mode():
            model.run(replace(batch, hook=record), NoTap())
            known = batch.targets >= 0
            targets = batch.targets[known]
            end = record.kept["resid", c.n_layer][known]
            n_loss += len(targets)
            for name, part in _components(replay, record, known):
                direct[name] = direct.get(name, 0.0) + _loss(replay, end - part, targets)
    base = direct[("", 0, 0)] / n_loss
    heads = (
        np.array([[direct["z", i, h] for h in range(c.n_head)] for i in range(c.n_layer)]) / n_loss
        - base
    )
    mlps = np.array([direct["mlp_out", i, 0] for i in range(c.n_layer)]) / n_loss - base
    edits = [
        [Edit("z", "zero", at=i, heads=h) for h in range(c.n_head)]
        + [Edit("mlp_out", "zero", at=i)]
        for i in range(c.n_layer)
    ]
    total = (
        np.array([[_total(model, edit, tokens, starts) for edit in row] for row in edits]) - base
    )
    data = {
        "direct": (("layer", "head"), heads),
        "direct_mlp": ("layer", mlps),
        "total": (("layer", "head"), total[:, :-1]),
        "total_mlp": ("layer", total[:, -1]),
        "direct_embedding": direct["embed", 0, 0] / n_loss - base,
        "loss": base,
    }
    coords = {"layer": np.arange(c.n_layer), "head": np.arange(c.n_head)}
    return xarray.Dataset(
        data, coords, {"analysis": "effects", "conventions": CONVENTIONS, "n_targets": n_loss}
    )


def _components(
    replay: Replay, record: RecordHook, known: torch.Tensor
) -> Iterator[tuple[tuple[str, int, int], torch.Tensor]]:
    """Yield each component's name and what it wrote into the residual stream, [n, D]; nothing first."""
    c = replay.config
    yield ("", 0, 0), torch.zeros((), dtype=replay.dtype)
    yield ("embed", 0, 0), record.kept["resid", 0][known]
    for layer in range(c.n_layer):
        w_o = replay.weights[f"h.{layer}.attn.c_proj.weight"].view(c.n_head, c.d_head, c.d_model)
        z = record.kept["z", layer][known]
        for head in range(c.n_head):
            yield ("z", layer, head), z[:, head] @ w_o[head]
        yield ("mlp_out", layer, 0), record.kept["mlp_out", layer][known].to(replay.dtype)


def _loss(replay: Replay, x_nD: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the summed loss of rows of the last residual stream."""
    total = 0.0
    for x, target in zip(torch.split(x_nD, ROWS), torch.split(targets, ROWS), strict=True):
        total += float(
            torch.nn.functional.cross_entropy(replay.logits(x), target, reduction="sum").double()
        )
    return total


def _total(model: Model, edit: Edit, tokens: np.ndarray, starts: np.ndarray) -> float:
    """Return the mean loss with an edit."""
    measure = _LossOnly()
    editor = Editor([edit], model, tokens.shape[1])
    step = max(TOKENS_AT_ONCE // tokens.shape[1], 1)
    for first in range(0, len(tokens), step):
        model.run(
            editor.hook(
                make_batch(tokens[first : first + step], starts[first : first + step]), first
            ),
            measure,
        )
    return measure.mean_loss()


class _LossOnly(Measure):
    """A tap that wants the loss alone."""

    def __init__(self) -> None:
        super().__init__(0, 0)

    def wants(self, site: str, layer: int) -> bool:
        """Want the loss."""
        return site == "loss"
