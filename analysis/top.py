"""The contexts in which a neuron or dimension is most active, with their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headwater.analysis.engine import ONE_BY_ONE, Analysis, Scan, Steps, analyse, as_run
from headwater.analysis.reducer import Chunk, Reducer, State, need_sites
from headwater.analysis.results import coordinates, provenance
from headwater.store.manifest import RunError
from headwater.store.reader import Run

CONVENTIONS = (
    "The largest values (sign 1) or the smallest (sign −1) of every unit over all real stored positions; of equal ones "
    "the earlier sequence, then the earlier position. value −inf and sequence −1 where there are fewer positions. "
    "token: that of the position. context: the tokens around it, −1 outside its document or row; it is itself at "
    "offset 0."
)


class Top(Reducer):
    """The k largest values of units and where they are.

    Shapes: L leads, U units, k. State: value [L, U, k], falling, −inf where there is none; place [L, U, k, 2], the
    sequence and the stored position.
    """

    name = "top"

    def __init__(self, run: Run, site: str, leads: Sequence[int], units: np.ndarray, k: int, sign: int) -> None:
        self.sites, self.leads = (site,), tuple(leads)
        self._row = run[site].shape[2] * len(units) * 8
        self.units, self.k, self.sign = units, k, sign

    def zero(self) -> State:
        """Make an empty state."""
        assert self.leads is not None
        shape = (len(self.leads), len(self.units), self.k)
        return {"value": np.full(shape, -np.inf), "place": np.full((*shape, 2), -1, np.int64)}

    @property
    def working_bytes(self) -> int:
        """Bytes of the values of one sequence in float64, of their negatives and of their order."""
        return 5 * self._row

    def update(self, state: State, chunk: Chunk) -> None:
        """Add one lead."""
        assert self.leads is not None
        at, site = self.leads.index(chunk.lead), self.sites[0]
        text = chunk.text(site)
        value, place = state["value"][at], state["place"][at]
        for s, values_PD in enumerate(chunk[site]):
            rows = np.flatnonzero(text.real[s])
            if not len(rows):
                continue
            x = self.sign * values_PD[rows][:, self.units].astype(np.float64)
            if not np.isfinite(x).all():
                value[...] = np.nan
                return
            better = np.flatnonzero(x.max(0) > value[:, -1])
            order = np.argsort(-x[:, better], axis=0, kind="stable")[: self.k].T
            new = np.take_along_axis(x[:, better].T, order, 1)
            where = np.stack([np.full(order.shape, chunk.first + s), rows[order]], -1)
            value[better], place[better] = _largest(value[better], place[better], new, where)

    def merge(self, a: State, b: State) -> State:
        """Join two states; of equal values those of the earlier sequences stay."""
        a["value"], a["place"] = _largest(a["value"], a["place"], b["value"], b["place"])
        return a

    def finalise(self, state: State) -> State:
        """Return the state: `top` reads it."""
        return state


def _largest(
    a: np.ndarray, a_place: np.ndarray, b: np.ndarray, b_place: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k largest of two falling lists along the last dimension, with their places; of equal ones a's."""
    value, place = np.concatenate([a, b], -1), np.concatenate([a_place, b_place], -2)
    order = np.argsort(-value, axis=-1, kind="stable")[..., : a.shape[-1]]
    return np.take_along_axis(value, order, -1), np.take_along_axis(place, order[..., None], -2)


def top_analysis(
    run: Run,
    site: str,
    units: Iterable[int] | None = None,
    at: Iterable[int] | None = None,
    k: int = 10,
    sign: int = 1,
    reach: int = 8,
) -> Analysis:
    """Describe `top` for the engine; it takes one pass."""
    need_sites(run, site)
    spec = run.spec(site)
    if spec.axis is None or len(spec.dims) != 4 or spec.dims[-1] not in ("d_model", "d_mlp"):
        raise RunError(f"top takes a site of vectors by depth or layer, such as mlp_post; {site} has {spec.dims}.")
    width, stored = spec.shape[-1], run.leads(site)
    chosen = np.arange(width) if units is None else np.unique(np.array(list(units), np.int64))
    wanted = stored if at is None else list(at)
    if not len(chosen) or not 0 <= chosen[0] <= chosen[-1] < width:
        raise ValueError(f"units are {chosen.tolist()}; {site} has 0 to {width - 1}.")
    if not wanted or set(wanted) - set(stored):
        raise RunError(f"{run.path} holds {site} at {spec.axis} {stored}, but {wanted} was asked for.")
    if k < 1 or sign not in (1, -1) or reach < 0:
        raise ValueError(f"k, sign, reach are {k}, {sign}, {reach}; expected at least 1, one of 1 and -1, at least 0.")
    leads = [stored.index(lead) for lead in wanted]

    def steps() -> Steps:
        (state,) = yield [Top(run, site, leads, chosen, k, sign)]
        return _dataset(run, site, leads, chosen, sign, reach, state, analysis)

    listed = "all" if units is None else chosen.tolist()
    arguments = {"site": site, "units": listed, "at": wanted, "k": k, "sign": sign, "reach": reach}
    analysis = Analysis(f"top_{site}", 1, steps, arguments)
    return analysis


def top(
    run: Run | str | Path,
    site: str,
    units: Iterable[int] | None = None,
    at: Iterable[int] | None = None,
    k: int = 10,
    sign: int = 1,
    reach: int = 8,
    scan: Scan = ONE_BY_ONE,
) -> Any:
    """Find the k positions where units of a vector site are most active, in one pass.

    Returns a dataset: value, sequence, position, token [lead, unit, rank], context [lead, unit, rank, offset] with
    offset −reach … reach, and token_text and context_text where the run has a tokenizer.
    """
    run = as_run(run)
    return analyse(run, [top_analysis(run, site, units, at, k, sign, reach)], scan)[0]


def _positions(run: Run, site: str, sequence: np.ndarray, place: np.ndarray, row_start_ST: np.ndarray) -> np.ndarray:
    """Return positions in the row for places along a site's stored positions."""
    if "selected_position" not in run.spec(site).dims:
        return place
    position = run.plain("selected_position")[place]
    t = np.arange(row_start_ST.shape[1])
    last = np.where(row_start_ST <= t, t, 0).max(1)
    return np.asarray(np.where(position < 0, last[sequence], position))


def _dataset(
    run: Run, site: str, leads: list[int], units: np.ndarray, sign: int, reach: int, state: State, analysis: Analysis
) -> Any:
    import xarray

    axis = str(run.spec(site).axis)
    tokens, row_start = run.plain("tokens"), run.plain("row_start")
    sequence, place = state["place"][..., 0], state["place"][..., 1]
    there = sequence >= 0
    position = np.where(there, _positions(run, site, sequence, np.maximum(place, 0), row_start), -1)
    around = position[..., None] + np.arange(-reach, reach + 1)
    inside = there[..., None] & (around >= 0) & (around < tokens.shape[1])
    around = np.where(inside, around, 0)
    start = row_start[sequence[..., None], around]
    own = row_start[sequence, position][..., None]
    inside &= (start <= around) & (start == own)
    context = np.where(inside, tokens[sequence[..., None], around], -1)
    dims = (axis, "unit", "rank")
    variables: dict[str, Any] = {
        "value": (dims, sign * state["value"]),
        "sequence": (dims, sequence),
        "position": (dims, position),
        "token": (dims, context[..., reach]),
        "context": ((*dims, "offset"), context),
    }
    path = run.path / "tokenizer.json"
    if path.is_file():
        from headwater.extractor.tokenizer import load_tokenizer

        ids, back = np.unique(context, return_inverse=True)
        strings = np.array(load_tokenizer(path).token_strings(ids), dtype=object)[back.reshape(context.shape)]
        variables["token_text"] = dims, strings[..., reach]
        variables["context_text"] = (*dims, "offset"), strings
    coords = coordinates(run, site, leads) | {"unit": units, "offset": np.arange(-reach, reach + 1)}
    attributes = provenance(run, analysis.name, analysis.arguments, analysis.passes, CONVENTIONS)
    return xarray.Dataset(variables, coords, attributes | {"site": site})
