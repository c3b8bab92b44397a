"""What `sinks` accumulates: rows of attention, the mass that keys receive, and mass inside words.

Shapes: N heads, T positions, Q queries, K keys, L layers, W window, R distances. A segment is the run of positions of
one sequence that share their first visible key: a document of a packed row, the real part of a padded one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headwater.analysis.engine.reducer import Chunk, Reducer, State
from headwater.store.reader import Run

QUERY_SETS = ("all", "second_half", "last_64")
ROW_QUANTITIES = ("share", "entropy", "entropy_normalised", "entropy_non_sink", "distance")
STATISTIC_SITES = ("attn_entropy", "attn_sink", "attn_distance", "attn_received")
MIN_REST = 1e-3
ROWS = 128
WORD_REACH = 16


@dataclass(frozen=True)
class Words:
    """Whether each token id begins, and ends, with a letter or digit: bool [V]."""

    begins: np.ndarray
    ends: np.ndarray

    def continues(self, tokens_T: np.ndarray) -> np.ndarray:
        """Say which positions go on with the word of the position before: bool [T]."""
        token = np.maximum(tokens_T, 0)
        return np.concatenate([[False], self.begins[token[1:]] & self.ends[token[:-1]]]) & (
            tokens_T >= 0
        )


def ratio_error(
    total: np.ndarray, n: np.ndarray, products: np.ndarray, n_sequences: np.ndarray
) -> np.ndarray:
    """Return the standard error of total / n over sequences, which need not be equally long.

    √(S/(S − 1) · Σ (t − r·m)²) / Σ m for the totals t and counts m of S sequences and r = Σt/Σm, the linearised error
    of a ratio; NaN for fewer than two sequences. `products` holds Σt², Σtm and Σm².
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = total / n
        square = products[0] - 2 * ratio * products[1] + ratio**2 * products[2]
        error = np.sqrt(np.maximum(square, 0) * n_sequences / (n_sequences - 1)) / n
    return np.where(n_sequences > 1, error, np.nan)


def segments(row_start_T: np.ndarray) -> list[tuple[int, int]]:
    """List the segments of one sequence as [first, last)."""
    t = np.arange(len(row_start_T))
    real = row_start_T <= t
    changed = ~real[:-1] | (np.diff(row_start_T) != 0)
    edges = np.flatnonzero(real & np.concatenate([[True], changed]))
    found = []
    for i, first in enumerate(edges):
        limit = int(edges[i + 1]) if i + 1 < len(edges) else len(t)
        found.append((int(first), int(first + real[first:limit].sum())))
    return found


def query_sets(row_start_T: np.ndarray) -> np.ndarray:
    """Say which queries of one sequence are in each of QUERY_SETS: bool [3, T].

    second_half and last_64 are those of each segment; the second half of n positions begins at ⌈n/2⌉.
    """
    member = np.zeros((3, len(row_start_T)), bool)
    for first, last in segments(row_start_T):
        member[0, first:last] = True
        member[1, first + (last - first + 1) // 2 : last] = True
        member[2, max(first, last - 64) : last] = True
    return member


def row_figures(
    entropy: np.ndarray, share: np.ndarray, distance: np.ndarray, n_visible_T: np.ndarray
) -> np.ndarray:
    """Return ROW_QUANTITIES of every row from stored statistics: [5, N, T], NaN where one is not defined."""
    rest = 1 - share
    with np.errstate(divide="ignore", invalid="ignore"):
        binary = -np.where(share > 0, share * np.log(share), 0) - np.where(
            rest > 0, rest * np.log(rest), 0
        )
        return _normalise(entropy, share, (entropy - binary) / rest, rest, distance, n_visible_T)


def pattern_figures(
    pattern_NQK: np.ndarray, row_start_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return ROW_QUANTITIES [5, N, T] and the mass that each key receives [N, T], computed from a pattern."""
    n_head, n, _ = pattern_NQK.shape
    out = np.full((5, n_head, n), np.nan)
    received = np.zeros((n_head, n))
    n_visible = np.arange(n) - row_start_T + 1
    for low in range(0, n, ROWS):
        high = min(low + ROWS, n)
        queries = np.arange(low, high)
        p = pattern_NQK[:, low:high, :high].astype(np.float64)
        p *= (row_start_T[low:high] <= queries)[:, None]
        received[:, :high] += p.sum(1)
        first = np.minimum(row_start_T[low:high], high - 1)
        share = p[:, queries - low, first]
        distance = np.einsum("nqk,qk->nq", p, queries[:, None] - np.arange(high)[None, :])
        p[:, queries - low, first] = 0
        rest = p.sum(-1)
        logs = np.log(p, out=np.zeros_like(p), where=p > 0)
        rest_sum = -np.einsum("nqk,nqk->nq", p, logs)
        entropy = rest_sum - np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            non_sink = rest_sum / rest + np.log(rest)
            out[..., low:high] = _normalise(
                entropy, share, non_sink, rest, distance, n_visible[low:high]
            )
    return out, received


def _normalise(
    entropy: np.ndarray,
    share: np.ndarray,
    non_sink: np.ndarray,
    rest: np.ndarray,
    distance: np.ndarray,
    n_visible_T: np.ndarray,
) -> np.ndarray:
    """Divide the entropies by ln of the number of keys, and leave out rows with too few keys or too little rest."""
    n = np.maximum(n_visible_T, 1).astype(np.float64)
    normalised = np.where(n >= 2, entropy / np.log(n), np.nan)
    kept = (n >= 3) & (rest >= MIN_REST)
    spread = np.where(kept, non_sink / np.log(np.maximum(n - 1, 2)), np.nan)
    return np.stack([share, entropy, normalised, spread, distance])


class Sinks(Reducer):
    """Sums over rows and keys, from stored patterns or stored statistics.

    State: total and n [5, 3, L, N], and what the error of their ratio over sequences takes: products [3, 5, 3, L, N]
    (of a sequence's total and n: total², total·n, n²), n_sequences [5, 3, L, N], and for the share averaged over heads
    layer_products [3, 3, L]; received, above [L, N, T] and rows, n_received [L, T] by key relative to its
    segment; above_window [L, N, W] and n_window [L]; word, n_word [2, L, N or none, R] (same word, another).
    """

    name = "sinks"
    tokens = 1

    def __init__(
        self,
        run: Run,
        source: str,
        epsilon: float,
        window: int,
        layers: Sequence[int],
        words: Words | None,
    ) -> None:
        self.source = source
        self.epsilon = epsilon
        self.window = window
        self.words = words
        self.sites = ("pattern",) if source == "pattern" else STATISTIC_SITES
        self.leads = tuple(layers)
        self.n_head, self.n_key = run[self.sites[0]].shape[2], run.manifest.n_positions

    def zero(self) -> State:
        """Make an empty state."""
        assert self.leads is not None
        n_layer = len(self.leads)
        n_head = self.n_head
        n_key = self.n_key
        state: State = {name: np.zeros((5, 3, n_layer, n_head)) for name in ("total", "n")}
        state |= {
            "products": np.zeros((3, 5, 3, n_layer, n_head)),
            "n_sequences": np.zeros((5, 3, n_layer, n_head)),
            "layer_products": np.zeros((3, 3, n_layer)),
        }
        state |= {name: np.zeros((n_layer, n_head, n_key)) for name in ("received", "above")}
        state |= {name: np.zeros((n_layer, n_key)) for name in ("rows", "n_received")}
        state |= {
            "above_window": np.zeros((n_layer, n_head, self.window)),
            "n_window": np.zeros(n_layer),
        }
        state["word"] = np.zeros((2, n_layer, n_head, WORD_REACH))
        return state | {"n_word": np.zeros((2, n_layer, WORD_REACH))}

    @property
    def working_bytes(self) -> int:
        """Bytes of a block of rows in float64, a few times, and of the row figures."""
        return 8 * self.n_head * self.n_key * (4 * min(ROWS, self.n_key) + 4 * len(ROW_QUANTITIES))

    def update(self, state: State, chunk: Chunk) -> None:
        """Add one layer."""
        assert self.leads is not None
        at = self.leads.index(chunk.lead)
        for s, row_start in enumerate(chunk.row_start_ST):
            if self.source == "pattern":
                pattern = chunk["pattern"][s]
                figures, received = pattern_figures(pattern, row_start)
                self._windows(state, at, pattern, row_start)
                if self.words is not None:
                    self._words(
                        state, at, pattern, row_start, self.words.continues(chunk.tokens_ST[s])
                    )
            else:
                entropy, share, distance, received = (
                    chunk[site][s].astype(np.float64) for site in self.sites
                )
                figures = row_figures(
                    entropy, share, distance, np.arange(self.n_key) - row_start + 1
                )
                if self.window >= self.n_key:
                    self._received(state, at, received, row_start, windowed=True)
            self._rows(state, at, figures, query_sets(row_start))
            self._received(state, at, received, row_start)

    def _rows(self, state: State, at: int, figures: np.ndarray, member: np.ndarray) -> None:
        there = ~np.isnan(figures)
        there[[ROW_QUANTITIES.index(name) for name in ("share", "entropy", "distance")]] = True
        real = np.where(there, figures, 0)
        for i, chosen in enumerate(member):
            total = real[..., chosen].sum(-1)
            n = there[..., chosen].sum(-1)
            state["total"][:, i, at] += total
            state["n"][:, i, at] += n
            state["products"][:, :, i, at] += total**2, total * n, n**2
            state["n_sequences"][:, i, at] += n > 0
            mean = total[0].mean()
            rows = n[0, 0]
            state["layer_products"][:, i, at] += mean**2, mean * rows, rows**2

    def _received(
        self,
        state: State,
        at: int,
        received: np.ndarray,
        row_start: np.ndarray,
        windowed: bool = False,
    ) -> None:
        """Add α_k of every segment; `windowed`, count the segments of exactly the window's length as windows."""
        for first, last in segments(row_start):
            n = last - first
            rows = n - np.arange(n)
            alpha = received[:, first:last] / rows
            if windowed:
                if n == self.window:
                    state["above_window"][at] += alpha > self.epsilon
                    state["n_window"][at] += 1
                continue
            state["received"][at, :, :n] += alpha
            state["above"][at, :, :n] += alpha > self.epsilon
            state["rows"][at, :n] += rows
            state["n_received"][at, :n] += 1

    def _windows(self, state: State, at: int, pattern: np.ndarray, row_start: np.ndarray) -> None:
        """Count α_k > ε over the first `window` positions of every segment that is as long."""
        for first, last in segments(row_start):
            if last - first >= self.window:
                end = first + self.window
                received = pattern[:, first:end, first:end].sum(1, dtype=np.float64)
                state["above_window"][at] += (
                    received / (self.window - np.arange(self.window)) > self.epsilon
                )
                state["n_window"][at] += 1

    def _words(
        self,
        state: State,
        at: int,
        pattern: np.ndarray,
        row_start: np.ndarray,
        continues: np.ndarray,
    ) -> None:
        """Add the mass on earlier tokens by distance, of the same word and of others, without first visible keys."""
        t = np.arange(self.n_key)
        word = np.cumsum(~(continues & (row_start < t)))
        for distance in range(1, min(WORD_REACH, self.n_key - 1) + 1):
            query = t[distance:]
            key = t[:-distance]
            seen = (row_start[query] < key) & (row_start[query] <= query)
            mass = pattern[:, query, key].astype(np.float64)
            for i, chosen in enumerate(
                (seen & (word[query] == word[key]), seen & (word[query] != word[key]))
            ):
                state["word"][i, at, :, distance - 1] += mass[:, chosen].sum(-1)
                state["n_word"][i, at, distance - 1] += chosen.sum()

    def finalise(self, state: State) -> State:
        """Return the state: `sinks` reads it."""
        return state
