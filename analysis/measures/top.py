"""The contexts in which a neuron, a dimension, a direction or a head is most active, with their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.analysis.engine.analysis import Analysis, Figures, rounded_one
from headwater.analysis.engine.options import COUNT, SIGN, SITE, SOME, required, setting
from headwater.analysis.engine.reducer import (
    Chunk,
    Reducer,
    State,
    chosen_indices,
    chosen_leads,
    need_sites,
)
from headwater.analysis.engine.results import coordinates, load, provenance
from headwater.analysis.engine.scan import ONE_BY_ONE, Prepared, Scan, Steps, analyse, as_run
from headwater.analysis.measures.contexts import contexts_html
from headwater.analysis.measures.top_units import Units, basis_of, keys_of
from headwater.extractor.settings import INDICES, SWITCH, count_from
from headwater.store.manifest import RunError
from headwater.store.reader import Run

if TYPE_CHECKING:
    import xarray

KEEP = 16
VECTORS = ("mlp_post", "resid", "mlp_out", "attn_out", "resid_mid", "mlp_pre", "z", "pattern")
MARGIN = 8  # tokens beside a context in which a character of its ends may begin or end
CONVENTIONS = (
    "Units are the dimensions of a vector site, or directions: (x − mean) · direction of an svd result, centred and "
    "without first positions; for q, k, v, z they are heads, with the norm of the vector; for pattern heads too, with "
    "the largest weight on a key that is neither the first visible one nor the query's own, and key is its position. "
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

    def __init__(
        self, run: Run, site: str, leads: Sequence[int], units: Units, k: int, sign: int
    ) -> None:
        self.sites, self.leads = (site,), tuple(leads)
        self.units = units
        self.k = k
        self.sign = sign
        self.tokens = 1 if units.dims[-1] == "key" else 4096
        length = run.manifest.n_positions
        inner = (
            length * length if units.dims[-1] == "key" else run[site].shape[2] * run[site].shape[-1]
        )
        self._row = 8 * max(
            length * len(units.units), inner * (len(units.units) if len(units.dims) == 5 else 1)
        )

    def zero(self) -> State:
        """Make an empty state."""
        assert self.leads is not None
        shape = (len(self.leads), len(self.units.units), self.k)
        return {"value": np.full(shape, -np.inf), "place": np.full((*shape, 2), -1, np.int64)}

    @property
    def working_bytes(self) -> int:
        """Bytes of the values of one sequence in float64, of their negatives and of their order."""
        return 5 * self._row

    def update(self, state: State, chunk: Chunk) -> None:
        """Add one lead."""
        assert self.leads is not None
        at = self.leads.index(chunk.lead)
        site = self.sites[0]
        text = chunk.text(site)
        value = state["value"][at]
        place = state["place"][at]
        for s, values in enumerate(chunk[site]):
            rows = np.flatnonzero(text.real[s])
            if not len(rows):
                continue
            x = self.sign * self.units.values(at, values, chunk.row_start_ST[s])[rows]
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
    value = np.concatenate([a, b], -1)
    place = np.concatenate([a_place, b_place], -2)
    order = np.argsort(-value, axis=-1, kind="stable")[..., : a.shape[-1]]
    return np.take_along_axis(value, order, -1), np.take_along_axis(place, order[..., None], -2)


def prepare_top(
    run: Run,
    site: str,
    units: str | Iterable[int] | None = None,
    at: str | Iterable[int] | None = None,
    k: int = 10,
    sign: int = 1,
    reach: int = 8,
    directions: Any = None,
    keep: int | None = None,
) -> Prepared:
    """Make `top` ready for the engine; it takes one pass."""
    need_sites(run, site)
    spec = run.spec(site)
    per_head = spec.dims[-1] in ("d_head", "key")
    if (
        spec.axis is None
        or spec.dims[-1] not in ("d_model", "d_mlp", "d_head", "key")
        or site == "attn_scores"
    ):
        raise RunError(
            f"top takes a site of vectors by depth or layer, or pattern; {site} has {spec.dims}."
        )
    stored = run.leads(site)
    wanted = chosen_leads(run, site, at, "at")
    basis, mean = (None, None) if directions is None else basis_of(run, site, wanted, directions)
    numbers = (
        run.plain("head")
        if per_head
        else np.arange(spec.shape[-1] if basis is None else basis.shape[1])
    )
    n = int(run.manifest.model["config"]["n_head"]) if per_head else len(numbers)
    chosen = numbers if units is None else np.array(chosen_indices(units, n, "units"))
    if missing := sorted(set(chosen.tolist()) - set(numbers.tolist())):
        raise ValueError(f"units are {missing}; {run.path} holds {site} of {numbers.tolist()}.")
    if k < 1 or sign not in (1, -1) or reach < 0:
        raise ValueError(
            f"k, sign, reach are {k}, {sign}, {reach}; expected at least 1, one of 1 and -1, at least 0."
        )
    leads = [stored.index(lead) for lead in wanted]
    places = np.searchsorted(numbers, chosen)
    measure = Units(run, site, places, basis if basis is None else basis[:, places], mean)

    def steps() -> Steps:
        (state,) = yield [Top(run, site, leads, measure, k, sign)]
        kept = np.arange(len(chosen)) if keep is None else _outstanding(state["value"], keep)
        state = {name: value[:, kept] for name, value in state.items()}
        return _dataset(run, site, leads, chosen[kept], sign, reach, state, prepared)

    arguments = {
        "site": site,
        "units": "all" if units is None else chosen.tolist(),
        "at": wanted,
        "k": k,
        "sign": sign,
        "reach": reach,
        "keep": keep,
        "directions": None if directions is None else str(directions.attrs["arguments"]),
    }
    name = f"top_{site}" if directions is None else f"top_{site}_directions"
    prepared = Prepared(name, 1, steps, arguments)
    return prepared


def top(
    run: Run | str | Path,
    site: str,
    units: str | Iterable[int] | None = None,
    at: str | Iterable[int] | None = None,
    k: int = 10,
    sign: int = 1,
    reach: int = 8,
    directions: Any = None,
    keep: int | None = None,
    scan: Scan = ONE_BY_ONE,
) -> Any:
    """Find the k positions where units of a site are most active, in one pass.

    Units are dimensions or neurons, heads for q, k, v, z and pattern, or the ranks of `directions`, an `svd` result of
    the site; see CONVENTIONS. `keep` keeps the units whose peaks stand out most among those of their layer or depth.

    Returns a dataset: value, sequence, position, token [lead, unit, rank], context [lead, unit, rank, offset] with
    offset −reach … reach, and token_text and context_text where the run has a tokenizer; key, key_token, key_text for
    pattern.
    """
    run = as_run(run)
    return analyse(
        run, [prepare_top(run, site, units, at, k, sign, reach, directions, keep)], scan
    )[0]


@dataclass(frozen=True)
class TopAnalysis(Analysis):
    """Find the contexts in which units are most active, as `top` does; `directions` are those of the kept `svd`.

    Where no units are named, the KEEP most outstanding ones are kept.
    """

    name = "top"
    title = "contexts in which units are most active, with their tokens"
    needs = tuple((site,) for site in VECTORS)
    section = "Where units are active"

    site: str = required(
        SITE, "site; by default the first that is there of mlp_post, resid and so on", "SITE"
    )
    units: str | Iterable[int] | None = setting(
        None,
        INDICES,
        "neurons, dimensions, heads or directions; by default those that stand out",
        "UNITS",
    )
    at: str | Iterable[int] | None = setting(
        None, INDICES, "layers or depths: 0,4:8, -1; by default all that are stored", "AT"
    )
    k: int = setting(10, SOME, "contexts of a unit", "K")
    sign: int = setting(1, SIGN, "1 for the largest values, -1 for the smallest", "SIGN")
    reach: int = setting(8, count_from(0, 1000), "tokens shown on either side", "REACH")
    directions: bool = setting(
        False, SWITCH, "units are the directions of the kept svd of the site"
    )
    keep: int | None = setting(
        None, COUNT, "units that are kept, those that stand out most; by default 16", "N"
    )

    def prepare(self, run: Run, state_bytes: int = 0) -> Prepared:
        """Make it ready for the engine; it takes one pass."""
        found = _kept_svd(run, self.site) if self.directions else None
        keep = self.keep
        if keep is None and self.units is None:
            keep = KEEP
        return prepare_top(
            run, self.site, self.units, self.at, self.k, self.sign, self.reach, found, keep
        )

    @staticmethod
    def headline(result: xarray.Dataset) -> Figures:
        """Return the largest value, where it is, and its token."""
        value = result.value[..., 0].values
        lead, unit = np.unravel_index(np.nanargmax(value), value.shape)
        axis = result["value"].dims[0]
        figures = {
            "site": result.attrs["site"],
            "largest": rounded_one(value[lead, unit]),
            "at": f"{axis} {int(result[axis][lead])}, unit {int(result.unit[unit])}",
        }
        if "token_text" in result:
            figures["token"] = repr(str(result.token_text.values[lead, unit, 0]))
        return figures

    @staticmethod
    def page(result: xarray.Dataset) -> str:
        """Return the contexts as a table."""
        return contexts_html(result)


def _kept_svd(run: Run, site: str) -> Any:
    try:
        return load(run, "svd" if site == "resid" else f"svd_{site}")
    except FileNotFoundError:
        raise RunError(
            f"{run.path} has no svd of {site} beside it. Make it with `headwater analyze {run.path} svd --site {site}`."
        ) from None


def _outstanding(value_LUK: np.ndarray, n: int) -> np.ndarray:
    """Return the n units whose largest value is largest relative to the median unit of its lead, in order."""
    peak = np.where(np.isfinite(value_LUK[..., 0]), value_LUK[..., 0], 0)
    middle = np.median(np.abs(peak), axis=1, keepdims=True)
    return np.sort(np.argsort(-(peak / np.where(middle > 0, middle, 1)).max(0), kind="stable")[:n])


def _positions(
    run: Run, site: str, sequence: np.ndarray, place: np.ndarray, row_start_ST: np.ndarray
) -> np.ndarray:
    """Return positions in the row for places along a site's stored positions."""
    if "selected_position" not in run.spec(site).dims:
        return place
    position = run.plain("selected_position")[place]
    t = np.arange(row_start_ST.shape[1])
    last = np.where(row_start_ST <= t, t, 0).max(1)
    return np.asarray(np.where(position < 0, last[sequence], position))


def _dataset(
    run: Run,
    site: str,
    leads: list[int],
    units: np.ndarray,
    sign: int,
    reach: int,
    state: State,
    prepared: Prepared,
) -> xarray.Dataset:
    import xarray

    spec = run.spec(site)
    axis = str(spec.axis)
    tokens = run.plain("tokens")
    row_start = run.plain("row_start")
    sequence = state["place"][..., 0]
    place = state["place"][..., 1]
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
    if spec.dims[-1] == "key":
        key = keys_of(run, leads, units, sequence, position, row_start)
        variables["key"] = dims, key
        variables["key_token"] = dims, np.where(key >= 0, tokens[sequence, np.maximum(key, 0)], -1)
    from headwater.extractor.tokenizer import load_run_tokenizer

    coder = load_run_tokenizer(run)
    if coder is not None:
        text = _strings(coder, tokens, sequence[..., None], np.where(inside, around, -1))
        variables["context_text"] = (*dims, "offset"), text
        variables["token_text"] = dims, text[..., reach]
        if "key" in variables:
            text = _strings(coder, tokens, sequence[..., None], key[..., None])
            variables["key_text"] = dims, text[..., 0]
    coords = {
        name: value for name, value in coordinates(run, site, leads).items() if name != "head"
    }
    coords |= {"unit": units, "offset": np.arange(-reach, reach + 1)}
    attributes = provenance(run, prepared.name, prepared.arguments, prepared.passes, CONVENTIONS)
    return xarray.Dataset(variables, coords, attributes | {"site": site})


def _strings(coder: Any, tokens: np.ndarray, sequence: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return the strings of tokens at places [..., n] of sequences [..., 1], with whole characters; "" at −1.

    Characters are looked for where a string is a part of one: in its row, somewhat further than the places go.
    """
    ids = np.where(place >= 0, tokens[sequence, np.maximum(place, 0)], -1)
    distinct, back = np.unique(ids, return_inverse=True)
    alone = np.array(coder.token_strings(distinct), dtype=object)
    part = np.array([coder.is_piece(int(token)) for token in distinct])
    back = back.reshape(ids.shape)
    text = alone[back]
    for at in zip(*np.nonzero(part[back].any(-1)), strict=True):
        wanted = place[at] >= 0
        row = tokens[sequence[at][0]]
        low = max(int(place[at][wanted].min()) - MARGIN, 0)
        strings = coder.text_strings(row[low : int(place[at].max()) + MARGIN + 1])
        text[at][wanted] = [strings[p - low] for p in place[at][wanted]]
    return text
