"""Scale what is at a place over a grid and see what depends on it: loss, attention sinks, norms; and the gradients.

The derivative of loss and shares with respect to the scale is exact (forward-mode) and checked by a central difference.
Shapes: B sequences, T positions, N heads, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

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
from headwater.extractor.model.weights import Checkpoint, ModelConfig
from headwater.extractor.sites import SITES

if TYPE_CHECKING:
    import xarray

    from headwater.analysis.engine.results import Variables

# Of a batch, whose residual streams are kept for the cosines: for GPT-2 small 13 depths × 4096 × 768 × 4 bytes, 164 MB.
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
# Of the central difference, whose error in float64 is about STEP² from its shape and 1e-16/STEP from rounding.
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
        self.share = np.zeros((2, n_layer, n_head))
        self.n_share = np.zeros(2)
        self.norm = np.zeros((2, n_layer + 1))
        self.cosine = np.zeros((2, n_layer + 1))
        self.n = np.zeros((2, n_layer + 1))
        self.clean: dict[int, torch.Tensor] = {}
        self.keep = False

    def begin(self, batch: Batch) -> None:
        """Say which batch comes."""
        t = torch.arange(batch.row_start.shape[1])
        real = batch.row_start <= t
        first = real & (batch.row_start == t)
        at = QUERY_SETS.index("second_half")
        half = np.stack([query_sets(row.numpy())[at] for row in batch.row_start])
        self._groups = (first, real & ~first)
        self._queries = (real, torch.from_numpy(half))

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
                if layer == 0:
                    self.n_share[i] += int(mask.sum())
        else:
            if self.keep:
                self.clean[layer] = value.clone()
            for i, mask in enumerate(self._groups):
                x = value[mask]
                y = self.clean[layer][mask]
                norm = torch.linalg.vector_norm(x, dim=-1)
                cosine = torch.nn.functional.cosine_similarity(x, y, -1)
                self.norm[i, layer] += float(norm.double().sum())
                self.cosine[i, layer] += float(cosine.double().sum())
                self.n[i, layer] += len(x)

    def mean_loss(self) -> float:
        """Return the mean over tokens of all rows, nats."""
        return sum(self.losses) / max(sum(self.counts), 1)

    def loss_error(self, other: Measure | None = None) -> float:
        """Return the standard error of the mean loss over rows, or of its difference from that of the same rows."""
        total = np.array(self.losses)
        if other is not None:
            total = total - np.array(other.losses)
        return float(_error_of_ratio(total, np.array(self.counts)))

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
) -> xarray.Dataset:
    """Measure rows of tokens [sequence, position] with `target` scaled by each of `scales`; return a dataset.

    `target` is an edit whose op and value don't matter. `sweep` takes the chosen depths (layers), positions, heads or
    dims of the target one at a time. `edits` apply besides, and at scale 1 too. `hold` scales what is there without the
    change, so that a coordinate of the residual stream is kept at its scaled value at every chosen depth.
    """
    import xarray

    c = checkpoint.config
    n_positions = tokens.shape[1]
    starts = np.zeros_like(tokens)
    if row_start is not None:
        starts = row_start
    targets = sweep_targets(target, sweep, c, n_positions)
    model = Model(checkpoint, compute)
    scales = [float(s) for s in scales]
    found: dict[str, list[list[np.ndarray]]] = {}
    for one in targets:
        op = "freeze" if hold else "scale"
        changed = [replace(one, op=op, value=scale) for scale in scales]
        measures = _measure(model, tokens, starts, changed, edits)
        for name in measures[0].figures():
            found.setdefault(name, []).append([m.figures()[name] for m in measures])
        unchanged = measures[0]
        errors = [np.array(m.loss_error()) for m in measures]
        change_errors = [np.array(m.loss_error(unchanged)) for m in measures]
        found.setdefault("loss_error", []).append(errors)
        found.setdefault("loss_change_error", []).append(change_errors)
    tails: dict[str, tuple[str, ...]] = {
        "loss": (),
        "loss_error": (),
        "loss_change_error": (),
        "share": ("layer", "head"),
        "share_second_half": ("layer", "head"),
        "norm": ("group", "depth"),
        "cosine": ("group", "depth"),
    }
    data: Variables = {}
    for name, values in found.items():
        # The first of each target is the run without the change, the same for all targets.
        array = np.array(values)
        data[name] = ("target", "scale", *tails[name]), array[:, 1:]
        if name not in ("cosine", "loss_change_error"):
            data[f"{name}_unchanged"] = tails[name], array[0, 0]
    from_zero = not starts[tokens >= 0].any()
    if gradient and target.site in GRADIENT_SITES and from_zero:
        replay = Replay(checkpoint, "fp64")
        slopes = [derivatives(replay, tokens, one, hold, edits) for one in targets]
        for name in ("dloss", "dloss_error", "dloss_check"):
            data[name] = ("target",), np.stack([slope[name] for slope in slopes])
        share = np.stack([slope["dshare"] for slope in slopes])
        data["dshare"] = ("target", "layer", "head"), share
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


def _measure(
    model: Model,
    tokens: np.ndarray,
    starts: np.ndarray,
    changed: Sequence[Edit],
    edits: Sequence[Edit],
) -> list[Measure]:
    """Run all rows without the change and with each of the changes; return what each run measured."""
    c = model.config
    n_positions = tokens.shape[1]
    editors = [Editor(edits, model, n_positions)]
    editors += [Editor([*edits, edit], model, n_positions) for edit in changed]
    measures = [Measure(c.n_layer, c.n_head) for _ in editors]
    measures[0].keep = True
    step = max(TOKENS_AT_ONCE // n_positions, 1)
    # All runs of a batch before the next batch: the cosines need the unchanged states of one batch only.
    for first in range(0, len(tokens), step):
        batch = make_batch(tokens[first : first + step], starts[first : first + step])
        clean: dict[int, torch.Tensor] = {}
        for editor, measure in zip(editors, measures, strict=True):
            measure.begin(batch)
            measure.clean = clean
            model.run(editor.hook(batch, first), measure)
    return measures


def sweep_targets(
    target: Edit, sweep: str | None, config: ModelConfig, n_positions: int
) -> list[Edit]:
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
    field = SWEEPS[sweep]
    if sweep == "position" and place.positions is not None:
        parts = [text.strip() for text in str(target.positions).split(",")]
        # `first` and `last` are other positions in every row, and stay words.
        values = [part for part in parts if part in ("first", "last")]
        values += [str(i) for i in place.positions.absolute]
    else:
        chosen: dict[str, Sequence[int] | None] = {
            "at": place.at,
            "positions": range(n_positions),
            "heads": place.heads or range(config.n_head),
            "dims": place.dims,
        }
        indices = chosen[field]
        if indices is None:
            raise ValueError(
                f"--sweep {sweep} over all of {target.site} takes too many runs; choose some with dim=."
            )
        values = [str(i) for i in indices]
    found = []
    for value in values:
        change: dict[str, Any] = {field: value}
        found.append(replace(target, **change))
    return found


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
    c = replay.config
    dloss = np.zeros(())
    check = np.zeros(())
    dshare = np.zeros((c.n_layer, c.n_head))
    slopes = []
    counts = []
    n_loss = int((tokens[:, 1:] >= 0).sum())
    n_rows = int((tokens >= 0).sum())
    one = torch.ones((), dtype=replay.dtype)
    for row in tokens:
        ids = torch.from_numpy(row[row >= 0].astype(np.int64))[None]

        def both(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return _scaled(replay, ids, place, scale, hold)  # noqa: B023 (called at once)

        # Forward mode: one pass gives the derivatives of the loss and of all shares by the one scale.
        with torch.no_grad():
            loss, share = torch.func.jvp(both, (one,), (one,))[1]
            up, _ = both(one + STEP)
            down, _ = both(one - STEP)
        dloss += float(loss) / n_loss
        check += float(up - down) / (2 * STEP) / n_loss
        dshare += share.numpy() / n_rows
        slopes.append(float(loss))
        counts.append(max(len(ids[0]) - 1, 0))
    return {
        "dloss": dloss,
        "dloss_check": check,
        "dshare": dshare,
        "dloss_error": _error_of_ratio(np.array(slopes), np.array(counts)),
    }


def _error_of_ratio(total: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Return the standard error of Σ total / Σ n over rows; see `ratio_error`."""
    products = np.stack([(total**2).sum(), (total * n).sum(), (n**2).sum()])
    n_rows = np.array((n > 0).sum())
    return ratio_error(np.array(total.sum()), np.array(n.sum()), products, n_rows)


def _scaled(
    replay: Replay, ids_BT: torch.Tensor, place: Place, scale: torch.Tensor, hold: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss and the summed first-token share [layer, head] with a place scaled."""
    site = place.edit.site
    where = _mask(place, ids_BT, replay.config)
    embedded = replay.embed(ids_BT)[:, None]
    shares: list[torch.Tensor] = []
    clean: dict[int, torch.Tensor] = {}

    def keep(name: str, at: int, value: torch.Tensor) -> None:
        if name == site and at in place.at:
            clean[at] = value.clone()

    def look(name: str, at: int, value: torch.Tensor) -> torch.Tensor | None:
        if name == "pattern":
            shares.append(value[0, 0, :, :, 0].sum(-1))
        if name != site or at not in place.at:
            return None
        return torch.where(where, scale * clean.get(at, value), value)

    if hold:
        with torch.no_grad():
            replay.run(embedded, 0, look=keep)
    end = replay.run(embedded, 0, look=look)
    log_p = torch.log_softmax(replay.logits(end[:, 0, :-1]), -1)
    loss = -log_p.gather(-1, ids_BT[:, 1:, None]).sum()
    return loss, torch.stack(shares)


def _mask(place: Place, ids_BT: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Return a bool mask that broadcasts to a replayed site: [1, 1, T, D], or [1, 1, N, T, H]."""
    n = ids_BT.shape[1]
    dims = SITES[place.edit.site].dims
    widths = {"d_model": config.d_model, "d_head": config.d_head, "d_mlp": config.d_mlp}
    rows = torch.ones(n, dtype=torch.bool)
    if place.positions is not None:
        rows[:] = False
        rows[[i for i in place.positions.absolute if i < n]] = True
        rows[[0] * place.positions.first + [n - 1] * place.positions.last] = True
    if place.tokens is not None:
        rows &= torch.isin(ids_BT[0], torch.tensor(place.tokens))
    columns = _chosen(place.dims, widths[dims[-1]])
    mask = rows[:, None] & columns
    if "head" not in dims:
        return mask
    heads = _chosen(place.heads, config.n_head)
    return heads[:, None, None] & mask


def _chosen(indices: Sequence[int] | None, size: int) -> torch.Tensor:
    """Return a mask of some of `size`, or of all where none are named."""
    if indices is None:
        return torch.ones(size, dtype=torch.bool)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(indices)] = True
    return mask


def _name(edit: Edit, sweep: str | None) -> str:
    if sweep is None:
        return str(replace(edit, op="scale", value=1)).rpartition(" ")[0]
    return f"{sweep} {getattr(edit, SWEEPS[sweep])}"
