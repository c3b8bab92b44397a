"""Where a massive activation is made: the direct contribution of every component and neuron, and the weights behind.

The residual stream at depth d is the sum of the two embeddings and of what the attention and the MLP of the layers
before d add, so one of its coordinates is the sum of theirs. The sums are computed in float64 and checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.analysis.engine.analysis import (
    Figures,
    ModelAnalysis,
    Plot,
    as_function,
    rounded_one,
)
from headwater.analysis.engine.options import COUNT, setting
from headwater.analysis.engine.results import provenance
from headwater.analysis.measures.massive import LEVELS, massive_dimensions
from headwater.extractor.settings import MODEL, TEXT, one_of
from headwater.store.reader import Run

if TYPE_CHECKING:
    import torch
    import xarray

    from headwater.extractor.model.weights import Checkpoint

EXACT = 1e-10
LARGEST = "largest"
MODEL_HELP = "the run's model, where it has moved"
MOST_EVENTS = 8
CONVENTIONS = (
    "Everything in float64 with raw weights, at one dimension of one position; position counts in the stored row, "
    "text_position from the first token that it sees, 0 for that token itself, wherever padding or other documents put "
    "it. resid[d] = token_embedding + "
    "position_embedding + Σ over layers before d of (attn_out + mlp_out); attn_out = Σ head_out + attn_bias; mlp_out = "
    "Σ neurons + mlp_bias, of which the n largest by |contribution| are listed; neuron_rest is the sum of the others. "
    "A neuron's contribution is its activation (mlp_post) × its weight, the entry of W_out at the dimension. "
    "w_out_sigma: the two largest singular values of W_out; w_out_alignment: the entry of its first right singular "
    "vector at the dimension, with the sign that makes the vector's largest entry positive. closure: the largest "
    "|sum − whole| of these sums; stored_error: the largest |stored − computed| residual at the depths the run holds."
)


@dataclass(frozen=True)
class Event:
    """An activation: a dimension of the residual stream at a position of a sequence."""

    dimension: int
    sequence: int
    position: int


def massive_events(run: Run, result: Any, level: str = "large") -> list[Event]:
    """Name the largest activation of every dimension that is massive at a level, the largest dimension first.

    With the level `largest` it is the largest activation of all, massive or not.
    """
    if level not in (*LEVELS, LARGEST):
        raise ValueError(f"level is {level!r}; expected one of {', '.join((*LEVELS, LARGEST))}.")
    dimensions = massive_dimensions(result, level) if level in LEVELS else []
    if level == LARGEST:
        dimensions = [
            int(result["max_dimension"].values.ravel()[result["max_size"].values.argmax()])
        ]
    events = []
    for dimension in dimensions[:MOST_EVENTS]:
        one = {
            name: result[name].values[..., dimension]
            for name in ("peak", "peak_sequence", "peak_position")
        }
        at = np.unravel_index(np.abs(one["peak"]).argmax(), one["peak"].shape)
        sequence, place = (int(one[name][at]) for name in ("peak_sequence", "peak_position"))
        events.append(
            Event(dimension, sequence, _position(run, str(result.attrs["site"]), sequence, place))
        )
    return events


@dataclass(frozen=True)
class OriginAnalysis(ModelAnalysis):
    """Split massive activations into the contributions of embeddings, heads, MLPs and neurons.

    `events` are given, or are those of a `massive` result of the residual stream at a level: large or strict, or
    largest, the one largest activation; by default large where there are such, else largest. At most 8 are taken.
    `model` is the run's model by default; ValueError if its weights are not those of the run, or where there is no
    event. Only the tokens up to the position are run again.

    Returns a dataset: token_embedding, position_embedding [event]; resid [event, depth]; attn_out, mlp_out, mlp_bias,
    attn_bias [event, layer]; head_out [event, layer, head]; neuron, neuron_contribution, neuron_activation,
    neuron_weight [event, layer, rank]; neuron_rest, w_out_alignment [event, layer]; w_out_sigma [layer, sigma].
    """

    name = "massive_origin"
    title = "which heads, MLPs and neurons make the massive activations (runs the model)"
    needs = (("resid",),)
    section = "Massive activations"
    after = "massive"
    plots = (
        Plot(
            "massive_made",
            "Which components and neurons add to the largest of these activations; the sums are exact.",
            "headwater.analysis.plots.massive:massive_made",
            together=False,
        ),
    )

    model: str | None = setting(None, TEXT, MODEL_HELP, "MODEL", leads=MODEL)
    events: Sequence[Event] = ()
    level: str | None = setting(
        None,
        one_of(*LEVELS, LARGEST),
        "large, strict or largest; by default large, or largest where none is",
        "LEVEL",
    )
    n_neurons: int = setting(
        10, COUNT, "neurons of a layer that are listed", "NEURONS", flag="--neurons"
    )

    def compute(self, run: Run, result: xarray.Dataset | None = None) -> xarray.Dataset:
        """Run the tokens up to each event again, and take its sum apart."""
        level = self.level
        if level is None:
            level = (
                "large" if result is not None and massive_dimensions(result, "large") else LARGEST
            )
        chosen = list(self.events) or ([] if result is None else massive_events(run, result, level))
        if not chosen:
            raise ValueError(
                f"no activation of {run.path} is massive at level {level}. Give events=, or another level."
            )
        from headwater.analysis.engine.positions import PositionTap
        from headwater.extractor.model.batch import make_batch
        from headwater.extractor.model.forward import Model

        checkpoint = load_run_model(run, self.model)
        compute = Model(checkpoint, "fp64")
        tokens = run.plain("tokens")
        row_start = run.plain("row_start")
        captured: dict[bytes, PositionTap] = {}
        found = []
        for event in chosen:
            ids = _prefix(tokens, row_start, event)
            if ids.tobytes() not in captured:
                batch = make_batch(ids[None], np.zeros((1, len(ids)), np.int32))
                captured[ids.tobytes()] = PositionTap(len(ids) - 1)
                compute.run(batch, captured[ids.tobytes()])
            values = captured[ids.tobytes()].values
            found.append(
                _split(checkpoint, values, event, int(ids[-1]), len(ids) - 1, self.n_neurons)
            )
        return _dataset(
            run, checkpoint, chosen, found, {"level": level, "n_neurons": self.n_neurons}
        )

    @staticmethod
    def headline(result: xarray.Dataset) -> Figures:
        """Return where the largest event is, and the MLP and the neuron that add most to it."""
        one = result.isel(event=0)
        mlp = int(np.abs(one.mlp_out.values).argmax())
        largest = one.neuron_contribution.isel(rank=0)
        layer = int(np.abs(largest.values).argmax())  # need not be in the layer of the largest MLP
        return {
            "dimension": int(one.dimension),
            "position": int(one.position),
            "token_of_its_text": int(one.text_position),
            "largest_mlp": f"layer {mlp}: {rounded_one(one.mlp_out[mlp])}",
            "largest_neuron": f"L{layer}N{int(one.neuron[layer, 0])}: {rounded_one(largest[layer])}",
        }


massive_origin = as_function(OriginAnalysis)


def load_run_model(run: Run, model: str | None = None) -> Checkpoint:
    """Load the model of a run, by its recorded name unless another is given; raise ValueError if the weights differ."""
    from headwater.extractor.model.weights import load_checkpoint

    made = run.manifest.model
    revision = made["revision"] if model is None else None
    checkpoint = load_checkpoint(model or made["name"], revision, made["config"]["activation"])
    if checkpoint.digest != run.manifest.model["digest"]:
        raise ValueError(
            f"the weights of {checkpoint.name} are not those that {run.path} was made with "
            f"({run.manifest.model['name']}). Name that model with model=."
        )
    return checkpoint


def _position(run: Run, site: str, sequence: int, place: int) -> int:
    """Return the position in the row of a place along a site's stored positions."""
    if "selected_position" not in run.spec(site).dims:
        return place
    position = int(run.plain("selected_position")[place])
    row_start = run.plain("row_start")[sequence]
    return (
        position
        if position >= 0
        else int(np.flatnonzero(row_start <= np.arange(len(row_start)))[-1])
    )


def _prefix(tokens_ST: np.ndarray, row_start_ST: np.ndarray, event: Event) -> np.ndarray:
    """Return the tokens that an event's position sees, up to itself."""
    if not (0 <= event.sequence < len(tokens_ST) and 0 <= event.position < tokens_ST.shape[1]):
        raise ValueError(
            f"{event} lies outside the run, which has {tokens_ST.shape} sequences and positions."
        )
    start = int(row_start_ST[event.sequence, event.position])
    if start > event.position:
        raise ValueError(f"{event} is padding. Name a position that holds a token.")
    return np.ascontiguousarray(tokens_ST[event.sequence, start : event.position + 1])


def _split(
    checkpoint: Checkpoint,
    values: dict[str, dict[int, torch.Tensor]],
    event: Event,
    token: int,
    position: int,
    n: int,
) -> dict[str, np.ndarray]:
    import torch

    c = checkpoint.config
    d = event.dimension
    t = checkpoint.tensors
    if not 0 <= d < c.d_model:
        raise ValueError(f"{event}: the residual stream has dimensions 0 to {c.d_model - 1}.")
    layers = range(c.n_layer)
    resid = torch.stack([values["resid"][depth][d] for depth in range(c.n_layer + 1)])
    attn, mlp = (
        torch.stack([values[site][i][d] for i in layers]) for site in ("attn_out", "mlp_out")
    )
    w_o = torch.stack([t[f"h.{i}.attn.c_proj.weight"][:, d] for i in layers]).double()
    z = torch.stack([values["z"][i] for i in layers])
    head = (z * w_o.view(c.n_layer, c.n_head, c.d_head)).sum(-1)
    w_out = torch.stack([t[f"h.{i}.mlp.c_proj.weight"][:, d] for i in layers]).double()
    activation = torch.stack([values["mlp_post"][i] for i in layers])
    part = activation * w_out
    order = part.abs().argsort(dim=1, descending=True, stable=True)[:, :n]
    listed = part.gather(1, order)
    bias = {
        name: torch.stack([t[f"h.{i}.{name}.c_proj.bias"][d] for i in layers]).double()
        for name in ("attn", "mlp")
    }
    embedding = [
        t[name][at, d].double() for name, at in (("wte.weight", token), ("wpe.weight", position))
    ]
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), (attn + mlp).cumsum(0)]) + sum(embedding)
    closure = max(
        float((sums - resid).abs().max()),
        float((head.sum(1) + bias["attn"] - attn).abs().max()),
        float((part.sum(1) + bias["mlp"] - mlp).abs().max()),
    )
    if closure > EXACT * max(1.0, float(part.abs().sum()), float(resid.abs().max())):
        raise ArithmeticError(
            f"the contributions to {event} miss the residual stream by {closure:g}."
        )
    out = {
        "token_embedding": embedding[0],
        "position_embedding": embedding[1],
        "resid": resid,
        "attn_out": attn,
        "mlp_out": mlp,
        "attn_bias": bias["attn"],
        "mlp_bias": bias["mlp"],
        "head_out": head,
        "neuron": order,
        "neuron_contribution": listed,
        "neuron_activation": activation.gather(1, order),
        "neuron_weight": w_out.gather(1, order),
        "neuron_rest": part.sum(1) - listed.sum(1),
    }
    return {name: value.numpy() for name, value in out.items()} | {"closure": np.array(closure)}


def _spectra(checkpoint: Checkpoint) -> tuple[np.ndarray, np.ndarray]:
    """Return the two largest singular values of every W_out [layer, 2] and the first right singular vectors [.., D]."""
    import torch

    sigma = []
    vectors = []
    for i in range(checkpoint.config.n_layer):
        w = checkpoint.tensors[f"h.{i}.mlp.c_proj.weight"].double()
        power, basis = torch.linalg.eigh(w.T @ w)
        v = basis[:, -1]
        sigma.append(power.flip(0)[:2].clamp(min=0).sqrt().numpy())
        vectors.append((v * v[v.abs().argmax()].sign()).numpy())
    return np.stack(sigma), np.stack(vectors)


def _dataset(
    run: Run,
    checkpoint: Checkpoint,
    events: list[Event],
    found: list[dict[str, np.ndarray]],
    arguments: dict[str, Any],
) -> xarray.Dataset:
    import xarray

    c = checkpoint.config
    tails: dict[str, tuple[str, ...]] = {
        name: ("layer",) for name in ("attn_out", "mlp_out", "attn_bias", "mlp_bias", "neuron_rest")
    }
    tails |= {
        name: ("layer", "rank")
        for name in ("neuron", "neuron_contribution", "neuron_activation", "neuron_weight")
    }
    tails |= {"resid": ("depth",), "head_out": ("layer", "head")}
    data: dict[str, Any] = {
        name: (("event", *tails.get(name, ())), np.stack([one[name] for one in found]))
        for name in found[0]
    }
    sigma, vectors = _spectra(checkpoint)
    data["w_out_sigma"] = ("layer", "sigma"), sigma
    data["w_out_alignment"] = (
        ("event", "layer"),
        np.stack([vectors[:, e.dimension] for e in events]),
    )
    error = [
        _stored_error(run, event, one["resid"]) for event, one in zip(events, found, strict=True)
    ]
    data["stored_error"] = ("event",), np.array(error)
    coords: dict[str, Any] = {
        name: ("event", np.array([getattr(e, name) for e in events]))
        for name in ("dimension", "sequence", "position")
    }
    starts = run.plain("row_start")
    inside = [e.position - int(starts[e.sequence, e.position]) for e in events]
    coords["text_position"] = "event", np.array(inside)
    coords |= {
        "layer": np.arange(c.n_layer),
        "depth": np.arange(c.n_layer + 1),
        "head": np.arange(c.n_head),
    }
    attributes = provenance(
        run, "massive_origin", arguments | {"events": [str(e) for e in events]}, 0, CONVENTIONS
    )
    return xarray.Dataset(data, coords, attributes)


def _stored_error(run: Run, event: Event, resid: np.ndarray) -> float:
    """Return the largest |stored − computed|, NaN where the run does not hold every position of the residual."""
    if "resid" not in run.sites or "selected_position" in run.spec("resid").dims:
        return np.nan
    array = run["resid"]
    stored = np.stack([array[at, event.sequence, event.position] for at in range(array.shape[0])])[
        :, event.dimension
    ]
    return float(np.abs(stored.astype(np.float64) - resid[run.leads("resid")]).max())
