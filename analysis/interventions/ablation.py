"""Scale what is at a place over a grid and see what depends on it: loss, attention sinks, norms; and the gradients.

The derivative of loss and shares with respect to the scale is exact (forward-mode) and checked by a central difference.
Shapes: B sequences, T positions, N heads, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from headwater.analysis.interventions.replay import Replay
from headwater.analysis.measures.sink_rows import QUERY_SETS, query_sets, ratio_error
from headwater.extractor.edits.apply import Editor
from headwater.extractor.edits.grammar import Edit
from headwater.extractor.edits.places import Place, place_edits
from headwater.extractor.model.batch import Batch, make_batch
from headwater.extractor.model.forward import Model
from headwater.extractor.model.tap import NoTap
from headwater.extractor.model.weights import Checkpoint
from headwater.extractor.sites import SITES

TOKENS_AT_ONCE = 4096
SWEEPS = {"depth": "at", "layer": "at", "position": "positions", "head": "heads", "dim": "dims"}
GRADIENT_SITES = (
    "resid",
    "resid_mid",
    "attn_out",
    "mlp_out",
    "mlp_pre",
    "mlp_post",
    "q",
    "k",
    "v",
    "z",
)
STEP = 1e-4
CONVENTIONS = (
    "The value at the target is multiplied by `scale` (with hold: kept at `scale` × what it is unchanged, at every "
    "chosen depth). loss: mean next-token loss, nats. share: first-token share, mean over all queries of the pattern's "
    "first visible key, by layer and head; share_second_half over the second half, from ⌈n/2⌉ of the n positions that "
    "a row or packed document has. loss_error: standard error of the loss over rows; loss_change_error: that of its "
    "difference from the unchanged run on the same rows; dloss_error: that of dloss. norm, cosine: of the "
    "residual stream by depth, the cosine with the run at scale 1, apart for first positions and the others. dloss, "
    "dshare: derivatives with respect to the scale at 1, in float64 by forward-mode differentiation; dloss_check is "
    "the central difference. A negative dloss says that a larger value would lower the loss."
)


class Measure(NoTap):
    """A tap that adds up what `ablate` reports; the run at scale 1 leaves its states for the cosines."""

    def __init__(self, n_layer: int, n_head: int) -> None:
        self.losses: list[float] = []
        self.counts: list[int] = []
        self.share, self.n_share = np.zeros((2, n_layer, n_head)), np.zeros(2)
        self.norm, self.cosine, self.n = (np.zeros((2, n_layer + 1)) for _ in range(3))
        self.clean: dict[int, torch.Tensor] = {}
        self.keep = False

    def begin(self, batch: Batch) -> None:
        """Say which batch comes."""
        t = torch.arange(batch.row_start.shape[1])
        real = batch.row_start <= t
        first = real & (batch.row_start == t)
        at = QUERY_SETS.index("second_half")
        half = np.stack([query_sets(row.numpy())[at] for row in batch.row_start])
        self._groups, self._queries = (first, real & ~first), (real, torch.from_numpy(half))

    def wants(self, site: str, layer: int) -> bool:
        """Want loss, shares and the residual stream."""
        return site in ("loss", "attn_sink", "resid")

    def take(self, site: str, layer: int, value: torch.Tensor) -> None:
        """Reduce a value."""
        if site == "loss":
            known = ~value.isnan()
            self.losses += torch.where(known, value, 0).double().sum(-1).tolist()
            self.counts += known.sum(-1).tolist()
        elif site == "attn_sink":
            for i, mask in enumerate(self._queries):
                self.share[i, layer] += value.transpose(1, 2)[mask].double().sum(0).numpy()
                self.n_share[i] += int(mask.sum()) if layer == 0 else 0
        else:
            if self.keep:
                self.clean[layer] = value.clone()
            for i, mask in enumerate(self._groups):
                x = value[mask]
                y = self.clean[layer][mask]
                self.norm[i, layer] += float(torch.linalg.vector_norm(x, dim=-1).double().sum())
                self.cosine[i, layer] += float(
                    torch.nn.functional.cosine_similarity(x, y, -1).double().sum()
                )
                self.n[i, layer] += len(x)

    def mean_loss(self) -> float:
        """Return the mean over tokens of all rows, nats."""
        return sum(self.losses) / max(sum(self.counts), 1)

    def loss_error(self, other: Measure | None = None) -> float:
        """Return the standard error of the mean loss over rows, or of its difference from that of the same rows."""
        n = np.array(self.counts)
        total = np.array(self.losses) - (0.0 if other is None else np.array(other.losses))
        products = np.stack([(total**2).sum(), (total * n).sum(), (n**2).sum()])
        return float(
            ratio_error(np.array(total.sum()), np.array(n.sum()), products, np.array((n > 0).sum()))
        )

    def figures(self) -> dict[str, np.ndarray]:
        """Return the means."""
        with np.errstate(invalid="ignore"):
            share = self.share / self.n_share[:, None, None]
            return {
                "loss": np.array(self.mean_loss()),
                "share": share[0],
                "share_second_half": share[1],
                "norm": self.norm / self.n,
                "cosine": self.cosine / self.n,
            }


def ablate(
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    target: Edit,
    scales: Sequence[float],
    row_start: np.ndarray | None = None,
    sweep: str | None = None,
    hold: bool = False,
    edits: Sequence[Edit] = (),
    compute: str = "fp32",
    gradient: bool = True,
) -> Any:
    """Measure rows of tokens [sequence, position] with `target` scaled by each of `scales`; return a dataset.

    `target` is an edit whose op and value don't matter. `sweep` takes the chosen depths (layers), positions, heads or
    dims of the target one at a time. `edits` apply besides, and at scale 1 too. `hold` scales what is there without the
    change, so that a coordinate of the residual stream is kept at its scaled value at every chosen depth.
    """
    import xarray

    c = checkpoint.config
    n_positions = tokens.shape[1]
    starts = np.zeros_like(tokens) if row_start is None else row_start
    targets = sweep_targets(target, sweep, c, n_positions)
    model = Model(checkpoint, compute)
    scales = [float(s) for s in scales]
    found: dict[str, list[list[np.ndarray]]] = {}
    for one in targets:
        op = "freeze" if hold else "scale"
        changed = [replace(one, op=op, value=scale) for scale in scales]
        tries = [None, *(Editor([*edits, edit], model, n_positions) for edit in changed)]
        plain = Editor(edits, model, n_positions)
        measures = [Measure(c.n_layer, c.n_head) for _ in tries]
        step = max(TOKENS_AT_ONCE // n_positions, 1)
        for first in range(0, len(tokens), step):
            batch = make_batch(tokens[first : first + step], starts[first : first + step])
            clean: dict[int, torch.Tensor] = {}
            for editor, measure in zip(tries, measures, strict=True):
                measure.begin(batch)
                measure.keep = editor is None
                measure.clean = clean
                model.run((plain if editor is None else editor).hook(batch, first), measure)
        for name in measures[0].figures():
            found.setdefault(name, []).append([m.figures()[name] for m in measures])
        errors = [(m.loss_error(), m.loss_error(measures[0])) for m in measures]
        for i, name in enumerate(("loss_error", "loss_change_error")):
            found.setdefault(name, []).append([np.array(pair[i]) for pair in errors])
    tails = {
        "loss": (),
        "loss_error": (),
        "loss_change_error": (),
        "share": ("layer", "head"),
        "share_second_half": ("layer", "head"),
        "norm": ("group", "depth"),
        "cosine": ("group", "depth"),
    }
    data: dict[str, Any] = {}
    for name, values in found.items():
        array = np.array(values)
        data[name] = ("target", "scale", *tails[name]), array[:, 1:]
        if name not in ("cosine", "loss_change_error"):
            data[f"{name}_unchanged"] = tails[name], array[0, 0]
    if gradient and target.site in GRADIENT_SITES and not starts[tokens >= 0].any():
        slopes = [
            derivatives(Replay(checkpoint, "fp64"), tokens, one, hold, edits) for one in targets
        ]
        for name, dims in (
            ("dloss", ()),
            ("dloss_error", ()),
            ("dloss_check", ()),
            ("dshare", ("layer", "head")),
        ):
            data[name] = ("target", *dims), np.stack([s[name] for s in slopes])
    coords = {
        "target": [_name(one, sweep) for one in targets],
        "scale": scales,
        "layer": np.arange(c.n_layer),
        "depth": np.arange(c.n_layer + 1),
        "head": np.arange(c.n_head),
        "group": ["first", "others"],
    }
    attributes = {
        "analysis": "ablate",
        "conventions": CONVENTIONS,
        "edited": str(replace(target, op="scale", value=1)),
        "sweep": sweep or "",
        "hold": int(hold),
        "n_sequences": len(tokens),
        "n_positions": n_positions,
        "edits": [str(e) for e in edits],
    }
    return xarray.Dataset(data, coords, attributes)


def sweep_targets(target: Edit, sweep: str | None, config: Any, n_positions: int) -> list[Edit]:
    """Return the targets of a sweep: one for each chosen depth, layer, position, head or dim."""
    target = replace(target, op="scale", value=1.0, factor=1.0)
    (place,) = place_edits([target], config, n_positions)
    if sweep is None:
        return [target]
    dims = SITES[target.site].dims
    if sweep not in SWEEPS or (sweep in ("depth", "layer", "head") and sweep not in dims):
        has = ", ".join(dim for dim in dims if dim != "sequence")
        raise ValueError(
            f"--sweep is {sweep!r}, but {target.site} has {has}; expected one of {', '.join(SWEEPS)} that it has."
        )
    if sweep == "position" and place.positions is not None:
        values = [
            text.strip()
            for text in str(target.positions).split(",")
            if text.strip() in ("first", "last")
        ]
        values += [str(i) for i in place.positions.absolute]
    else:
        size = {"position": n_positions, "head": config.n_head}.get(sweep, 0)
        chosen = {
            "at": place.at,
            "positions": range(n_positions),
            "heads": place.heads or range(size),
            "dims": place.dims,
        }[SWEEPS[sweep]]
        if chosen is None:
            raise ValueError(
                f"--sweep {sweep} over all of {target.site} takes too many runs; choose some with dim=."
            )
        values = [str(i) for i in chosen]
    changes: list[dict[str, Any]] = [{SWEEPS[sweep]: value} for value in values]
    return [replace(target, **change) for change in changes]


def derivatives(
    replay: Replay, tokens: np.ndarray, target: Edit, hold: bool = False, edits: Sequence[Edit] = ()
) -> dict[str, np.ndarray]:
    """Differentiate loss and first-token shares with respect to the scale at 1, over whole rows from position 0.

    Returns dloss, its standard error over rows and its central difference dloss_check, [], and dshare [layer, head].
    Rows may be padded at the right.
    """
    if edits:
        raise ValueError(
            "derivatives are taken of the model as it is; leave --edit out, or give gradient=False."
        )
    (place,) = place_edits([target], replay.config, tokens.shape[1])
    total = {
        "dloss": np.zeros(()),
        "dloss_check": np.zeros(()),
        "dshare": np.zeros((replay.config.n_layer, replay.config.n_head)),
    }
    slopes = []
    counts = []
    n_loss = int((tokens[:, 1:] >= 0).sum())
    n_rows = int((tokens >= 0).sum())
    for row in tokens:
        ids = torch.from_numpy(row[row >= 0].astype(np.int64))[None]
        one = torch.ones((), dtype=replay.dtype)

        def both(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return _scaled(replay, ids, place, scale, hold)  # noqa: B023 (called at once)

        with torch.no_grad():
            loss, share = torch.func.jvp(both, (one,), (one,))[1]
            up, down = (both(one + sign * STEP)[0] for sign in (1, -1))
        total["dloss"] += float(loss) / n_loss
        slopes.append(float(loss))
        counts.append(max(len(ids[0]) - 1, 0))
        total["dloss_check"] += float(up - down) / (2 * STEP) / n_loss
        total["dshare"] += share.numpy() / n_rows
    n = np.array(counts)
    t = np.array(slopes)
    products = np.stack([(t**2).sum(), (t * n).sum(), (n**2).sum()])
    return total | {
        "dloss_error": ratio_error(
            np.array(t.sum()), np.array(n.sum()), products, np.array((n > 0).sum())
        )
    }


def _scaled(
    replay: Replay, ids_BT: torch.Tensor, place: Place, scale: torch.Tensor, hold: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss and the summed first-token share [layer, head] with a place scaled."""
    site = place.edit.site
    where = _mask(place, ids_BT, replay.config)
    shares = list[torch.Tensor]()
    clean: dict[int, torch.Tensor] = {}
    if hold:
        with torch.no_grad():
            replay.run(
                replay.embed(ids_BT)[:, None],
                0,
                look=lambda s, at, v: (
                    clean.update({at: v.clone()}) if s == site and at in place.at else None
                ),
            )

    def look(name: str, at: int, value: torch.Tensor) -> torch.Tensor | None:
        if name == "pattern":
            shares.append(value[0, 0, :, :, 0].sum(-1))
        if name != site or at not in place.at:
            return None
        return torch.where(where, scale * (clean[at] if hold else value), value)

    end = replay.run(replay.embed(ids_BT)[:, None], 0, look=look)
    log_p = torch.log_softmax(replay.logits(end[:, 0, :-1]), -1)
    return -log_p.gather(-1, ids_BT[:, 1:, None]).sum(), torch.stack(shares)


def _mask(place: Place, ids_BT: torch.Tensor, config: Any) -> torch.Tensor:
    """Return a bool mask that broadcasts to a replayed site: [1, 1, T, D], or [1, 1, N, T, H]."""
    n = ids_BT.shape[1]
    rows = torch.ones(n, dtype=torch.bool)
    if place.positions is not None:
        rows[:] = False
        rows[[i for i in place.positions.absolute if i < n]] = True
        rows[[0] * place.positions.first + [n - 1] * place.positions.last] = True
    if place.tokens is not None:
        rows &= torch.isin(ids_BT[0], torch.tensor(place.tokens))
    width = {"d_model": config.d_model, "d_head": config.d_head, "d_mlp": config.d_mlp}[
        SITES[place.edit.site].dims[-1]
    ]
    dims = torch.ones(width, dtype=torch.bool)
    if place.dims is not None:
        dims[:] = False
        dims[list(place.dims)] = True
    mask = rows[:, None] & dims
    if "head" not in SITES[place.edit.site].dims:
        return mask
    heads = torch.ones(config.n_head, dtype=torch.bool)
    if place.heads is not None:
        heads[:] = False
        heads[list(place.heads)] = True
    return heads[:, None, None] & mask


def _name(edit: Edit, sweep: str | None) -> str:
    if sweep is None:
        return str(replace(edit, op="scale", value=1)).rpartition(" ")[0]
    return f"{sweep} {getattr(edit, SWEEPS[sweep])}"
