"""Choose among the sites of a model: which layers, depths, heads and positions a request takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headwater.extractor.sites import SITES, VECTOR, RequestError, parse_site

if TYPE_CHECKING:  # torch comes with it
    from headwater.extractor.model.weights import ModelConfig


def parse_indices(text: str, size: int, what: str, noun: str = "") -> tuple[int, ...]:
    """Read a selection such as `0,4:8,-1` over `size` items; ranges are half-open, as in Python.

    `what` is the flag, `noun` what it chooses among where that is called otherwise. Returns increasing indices.
    Raises RequestError for anything out of range, empty or malformed.
    """
    chosen: set[int] = set()
    for part in str(text).split(","):
        match = re.fullmatch(
            r"\s*(-?\d{1,9})?\s*(?:(:)\s*(-?\d{1,9})?\s*(?::\s*(\d{1,9}))?)?\s*", part
        )
        if match is None or not part.strip() or int(match[4] or 1) == 0:
            raise RequestError(
                f"--{what} {text!r}: {part!r} is not an index or a range; expected for example 0,4:8."
            )
        if match[2]:
            start, stop = (int(g) if g else None for g in (match[1], match[3]))
            for bound in (start, stop):
                if bound is not None and not -size <= bound <= size:
                    raise RequestError(
                        f"--{what} {text!r}: {bound} is out of range; there are {size} {noun or what}, 0 to {size - 1}."
                    )
            chosen.update(range(size)[start : stop : int(match[4] or 1)])
        else:
            index = int(match[1])
            if not -size <= index < size:
                raise RequestError(
                    f"--{what} {text!r}: {index} is out of range; there are {size} {noun or what}, 0 to {size - 1}."
                )
            chosen.add(index % size)
    if not chosen:
        raise RequestError(
            f"--{what} {text!r} selects nothing of {size} {noun or what}; name at least one."
        )
    return tuple(sorted(chosen))


@dataclass(frozen=True)
class Selection:
    """Which sites, and which of their layers, depths, heads and positions; `last` is the position −1."""

    sites: tuple[str, ...]
    layers: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    positions: tuple[int, ...] | None

    def along(self, axis: str | None) -> tuple[int, ...]:
        """Return the selected indices of a leading dimension; (0,) for sites without one."""
        return {"layer": self.layers, "depth": self.depths, None: (0,)}[axis]


def select(
    config: ModelConfig,
    n_positions: int,
    sites: Sequence[str],
    layers: str | None = None,
    depths: str | None = None,
    heads: str | None = None,
    positions: str | None = None,
) -> Selection:
    """Resolve a request against a model and a sequence length; raise RequestError where they do not fit.

    A site named with its layer or depth (`pattern.5`) selects that layer for every site of the request, and cannot be
    combined with `layers` or `depths`.
    """
    if not sites:
        raise RequestError("no site was asked for; name some with --sites or take a --preset.")
    parsed = {text: parse_site(text) for text in sites}
    names = tuple(name for name in SITES if name in {name for name, _ in parsed.values()})
    _refuse_useless(names, {"layer": layers, "depth": depths, "head": heads, "position": positions})
    return Selection(
        names,
        parse_indices(_along("layer", parsed, layers, config.n_layer), config.n_layer, "layers"),
        parse_indices(
            _along("depth", parsed, depths, config.n_layer + 1), config.n_layer + 1, "depths"
        ),
        parse_indices(":" if heads is None else heads, config.n_head, "heads"),
        _positions(positions, n_positions),
    )


def _along(
    axis: str, parsed: Mapping[str, tuple[str, int | None]], chosen: str | None, size: int
) -> str:
    """Return the selection along an axis: as chosen, or what the sites' own names carry."""
    mine = {text: index for text, (name, index) in parsed.items() if SITES[name].axis == axis}
    carried = {text: index for text, index in mine.items() if index is not None}
    if not carried:
        return ":" if chosen is None else chosen
    for text, index in carried.items():
        if index >= size:
            raise RequestError(
                f"--sites {text!r} is {axis} {index}, which is out of range; there are {size} {axis}s, 0 to {size - 1}."
            )
    bare = [text for text in mine if text not in carried]
    if bare or chosen is not None:
        raise RequestError(
            f"{next(iter(carried))!r} is named with its {axis} and cannot be combined with "
            f"{repr(bare[0]) if chosen is None else f'--{axis}s'}, because all sites share one selection of {axis}s. "
            f"Use --{axis}s for all of them."
        )
    return ",".join(str(index) for index in sorted(set(carried.values())))


def _refuse_useless(names: Sequence[str], chosen: Mapping[str, str | None]) -> None:
    """Refuse a selection along a dimension that no chosen site has; only vector sites select positions."""
    for dim, text in chosen.items():
        groups = [SITES[name].group for name in names if dim in SITES[name].dims]
        if (
            text is None
            or text.strip() == ":"
            or (VECTOR in groups if dim == "position" else groups)
        ):
            continue
        listed = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        who = f"{listed} has no" if len(names) == 1 else f"none of {listed} has"
        what = "positions to select (statistics keep all)" if dim == "position" else f"{dim}s"
        other = {"layer": "depth", "depth": "layer"}.get(dim, "")
        instead = (
            f"Use --{other}s"
            if any(other in SITES[name].dims for name in names)
            else "Leave it out"
        )
        raise RequestError(
            f"--{dim}s {text!r} would select nothing: {who} {what}. {instead}, or ask for other sites."
        )


def _positions(text: str | None, n_positions: int) -> tuple[int, ...] | None:
    if text is None or text.strip() == ":":
        return None
    if text.strip() == "last":
        return (-1,)
    return parse_indices(text, n_positions, "positions")
