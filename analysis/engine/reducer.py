"""What a reduction over a run is: a state of plain arrays that is started, fed, merged and read off.

Shapes: S sequences of a chunk, P stored positions, T positions of a row, D width of a vector, L layers or depths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater.extractor.selection import parse_indices
from headwater.store.manifest import RunError
from headwater.store.reader import Run

State = dict[str, np.ndarray]
TILE_BYTES = 4 << 20


@dataclass(frozen=True)
class Text:
    """Which stored positions hold a token: `real`, and `first`, the first key that its row sees; bool [S, P]."""

    real: np.ndarray
    first: np.ndarray


class Chunk:
    """Some sequences of one block of a run, read when asked for and kept until `forget`.

    `chunk["resid"]` is the array at the current `lead`, [sequence, …]; `chunk.at("resid", 3)` at a given one. Leads are
    indices along the stored layer or depth dimension. Values are read-only, at padding they are the missing value.
    """

    def __init__(
        self, run: Run, first: int, last: int, tokens: np.ndarray, row_start: np.ndarray
    ) -> None:
        self.run = run
        self.first = first
        self.last = last
        self.lead = 0
        self.tokens_ST = tokens
        self.row_start_ST = row_start
        self._held: dict[tuple[str, int], np.ndarray] = {}

    def __getitem__(self, site: str) -> np.ndarray:
        return self.at(site, self.lead)

    def at(self, site: str, lead: int) -> np.ndarray:
        """Return a site's values at one lead: [sequence, …]."""
        key = site, lead
        if key not in self._held:
            array = self.run[site]
            sequences = slice(self.first, self.last)
            self._held[key] = (
                array[sequences] if array.spec.axis is None else array[lead, sequences]
            )
        return self._held[key]

    def forget(self) -> None:
        """Let go of what was read."""
        self._held.clear()

    def text(self, site: str) -> Text:
        """Say which of a vector site's positions are real and which are first."""
        t = np.arange(self.row_start_ST.shape[1])
        real = self.row_start_ST <= t
        first = self.row_start_ST == t
        if "selected_position" not in self.run[site].dims:
            return Text(real, first)
        place = np.broadcast_to(
            self.run.plain("selected_position"), (len(real), self.run[site].shape[2])
        )
        place = np.where(place < 0, (real * (t + 1)).max(1, keepdims=True) - 1, place)
        return Text(
            *(
                np.take_along_axis(mask, np.maximum(place, 0), 1) & (place >= 0)
                for mask in (real, first)
            )
        )

    def rows(self, site: str, lead: int, keep_SP: np.ndarray) -> np.ndarray:
        """Return the vectors at the chosen positions, dimensions behind the position joined: [n, D], stored dtype."""
        values = self.at(site, lead)
        flat = values.reshape(keep_SP.size, -1)
        return flat if keep_SP.all() else flat[keep_SP.ravel()]


class Reducer(ABC):
    """One reduction: `zero`, `update`, `merge`, `finalise` over states that are dicts of plain arrays.

    `sites` are read; `leads` are the indices along their layer or depth dimension (None: all). A `joint` reducer sees
    all leads of a chunk at once, any other one lead at a time (`chunk.lead`, ascending for each chunk). A chunk holds
    whole sequences, about `tokens` tokens together; what it holds depends on the run's shape and on nothing else, so
    that results do not depend on memory, workers or other reducers. A state holds NaN or +inf only where the data do.
    """

    name: str = "reducer"
    sites: tuple[str, ...] = ()
    leads: tuple[int, ...] | None = None
    joint: bool = False
    tokens: int = 4096

    @abstractmethod
    def zero(self) -> State:
        """Make the state of no data."""

    @abstractmethod
    def update(self, state: State, chunk: Chunk) -> None:
        """Add a chunk to a state, in place."""

    def merge(self, a: State, b: State) -> State:
        """Join the states of earlier and later sequences; both may be used up. Sums, unless overridden."""
        for name, value in a.items():
            value += b[name]
        return a

    @abstractmethod
    def finalise(self, state: State) -> Any:
        """Read a result off a state, and leave the state as it is."""

    @property
    def nbytes(self) -> int:
        """Bytes of one state."""
        return sum(value.nbytes for value in self.zero().values())

    @property
    def working_bytes(self) -> int:
        """Bytes that `update` allocates beside the state and the chunk, at most."""
        return 8 * TILE_BYTES


def need_sites(run: Run, *names: str) -> None:
    """Raise RunError where a run lacks one of the sites, saying what to extract."""
    if missing := [name for name in names if name not in run.sites]:
        raise RunError(
            f"{run.path} has no {missing[0]!r}; it holds {', '.join(run.sites)}. Extract a run with --sites "
            f"{','.join(names)}."
        )


def chosen_indices(asked: str | Iterable[int], size: int, what: str, noun: str = "") -> list[int]:
    """Return the indices below `size` that were asked for, as a list or as a selection such as "0,4:8,-1", in order."""
    text = asked if isinstance(asked, str) else ",".join(str(int(i)) for i in asked)
    return list(parse_indices(text, size, what, noun))


def chosen_leads(
    run: Run, site: str, asked: str | Iterable[int] | None, what: str = "layers"
) -> list[int]:
    """Return the layers or depths of a site that were asked for, all that are stored by default, in order.

    Raises RunError where the run does not hold one of them.
    """
    stored = run.leads(site)
    if asked is None:
        return stored
    n_layer = int(run.manifest.model["config"]["n_layer"])
    axis = run.spec(site).axis
    wanted = chosen_indices(asked, n_layer + (axis == "depth"), what, f"{axis}s")
    if missing := sorted(set(wanted) - set(stored)):
        raise RunError(
            f"{run.path} holds {site} at {axis} {stored}, but {missing} was asked for. Choose among these, or extract "
            "a run with more of them."
        )
    return wanted


def iter_tiles(n: int, row_bytes: int) -> list[slice]:
    """Cut n rows into slices of at most TILE_BYTES (16 rows at least)."""
    step = max(TILE_BYTES // max(row_bytes, 1), 16)
    return [slice(at, min(at + step, n)) for at in range(0, n, step)]
