"""How much the loss needs each head and MLP: directly, through the output alone, and in total, with all that follows.

Shapes: B sequences, T positions, D d_model, V d_vocab.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    import xarray

# A component: its site, layer and head.
Component = tuple[str, int, int]
NOTHING: Component = ("", 0, 0)
EMBEDDING: Component = ("embed", 0, 0)

# Rows of logits at once: 512 × 50,257 × 4 bytes are 103 MB.
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
) -> xarray.Dataset:
    """Return direct and total effects of every head and MLP on the loss over rows of tokens [sequence, position]."""
    import xarray

    c = checkpoint.config
    model = Model(checkpoint, compute)
    starts = np.zeros_like(tokens)
    if row_start is not None:
        starts = row_start
    loss_without, n_loss = _direct(model, Replay(checkpoint, compute), tokens, starts)
    base = loss_without[NOTHING] / n_loss
    direct = np.zeros((c.n_layer, c.n_head))
    direct_mlp = np.zeros(c.n_layer)
    total = np.zeros((c.n_layer, c.n_head))
    total_mlp = np.zeros(c.n_layer)
    for layer in range(c.n_layer):
        for head in range(c.n_head):
            direct[layer, head] = loss_without["z", layer, head] / n_loss - base
            edit = Edit("z", "zero", at=layer, heads=head)
            total[layer, head] = _total(model, edit, tokens, starts) - base
        direct_mlp[layer] = loss_without["mlp_out", layer, 0] / n_loss - base
        edit = Edit("mlp_out", "zero", at=layer)
        total_mlp[layer] = _total(model, edit, tokens, starts) - base
    data = {
        "direct": (("layer", "head"), direct),
        "direct_mlp": ("layer", direct_mlp),
        "total": (("layer", "head"), total),
        "total_mlp": ("layer", total_mlp),
        "direct_embedding": loss_without[EMBEDDING] / n_loss - base,
        "loss": base,
    }
    coords = {"layer": np.arange(c.n_layer), "head": np.arange(c.n_head)}
    attributes = {"analysis": "effects", "conventions": CONVENTIONS, "n_targets": n_loss}
    return xarray.Dataset(data, coords, attributes)


def _direct(
    model: Model, replay: Replay, tokens: np.ndarray, starts: np.ndarray
) -> tuple[dict[Component, float], int]:
    """Return the summed loss without each component in the last residual stream, and how many losses that is."""
    c = model.config
    wanted = {(site, at) for site in ("z", "mlp_out") for at in range(c.n_layer)}
    wanted |= {("resid", 0), ("resid", c.n_layer)}
    found: dict[Component, float] = {}
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
                found[name] = found.get(name, 0.0) + _loss(replay, end - part, targets)
    return found, n_loss


def _components(
    replay: Replay, record: RecordHook, known: torch.Tensor
) -> Iterator[tuple[Component, torch.Tensor]]:
    """Yield each component's name and what it wrote into the residual stream, [n, D]; nothing first."""
    c = replay.config
    yield NOTHING, torch.zeros((), dtype=replay.dtype)
    yield EMBEDDING, record.kept["resid", 0][known]
    for layer in range(c.n_layer):
        # attn_out = Σ over heads of z W_O, and the bias: a head's part is its rows of W_O.
        weight = replay.weights[f"h.{layer}.attn.c_proj.weight"]
        w_o_NHD = weight.view(c.n_head, c.d_head, c.d_model)
        z = record.kept["z", layer][known]
        for head in range(c.n_head):
            yield ("z", layer, head), z[:, head] @ w_o_NHD[head]
        yield ("mlp_out", layer, 0), record.kept["mlp_out", layer][known].to(replay.dtype)


def _loss(replay: Replay, x_nD: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the summed loss of rows of the last residual stream."""
    total = 0.0
    for x, target in zip(torch.split(x_nD, ROWS), torch.split(targets, ROWS), strict=True):
        logits = replay.logits(x)
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        total += float(loss.double())
    return total


def _total(model: Model, edit: Edit, tokens: np.ndarray, starts: np.ndarray) -> float:
    """Return the mean loss with an edit."""
    measure = _LossOnly()
    editor = Editor([edit], model, tokens.shape[1])
    step = max(TOKENS_AT_ONCE // tokens.shape[1], 1)
    for first in range(0, len(tokens), step):
        batch = make_batch(tokens[first : first + step], starts[first : first + step])
        model.run(editor.hook(batch, first), measure)
    return measure.mean_loss()


class _LossOnly(Measure):
    """A tap that wants the loss alone."""

    def __init__(self) -> None:
        super().__init__(0, 0)

    def wants(self, site: str, layer: int) -> bool:
        """Want the loss."""
        return site == "loss"
