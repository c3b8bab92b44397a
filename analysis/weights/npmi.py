"""How often tokens stand near each other: normalised pointwise mutual information over Boolean sliding windows.

P(i) is the share of windows that hold token i, P(i, j) of those that hold both; NPMI = ln(P(i, j) / P(i)P(j)) /
−ln P(i, j) (Röder, Both & Hinneburg 2015). A pair that shares no window counts −1, the limit. Pairs that chance would
put together in fewer than 5 windows say nothing and are left out; sets of tokens are compared with sets of tokens that
are as frequent, because the NPMI of unrelated tokens rises with their frequency.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

WINDOW = 10
WINDOWS_AT_ONCE = 1 << 16
MIN_EXPECTED = 5.0
MIN_PAIRS = 0.25
REACH = 60

# Tokens in the table of pairs, which takes 4 bytes a pair for the count and 4 for the NPMI: 2 × 144 MB.
MOST_TOKENS = 6000


@dataclass(frozen=True)
class Corpus:
    """Token ids of a reference text, int32 [n], and the indices behind the last token of each of its pieces.

    Windows lie inside a piece. `name` says where it comes from.
    """

    name: str
    tokens: np.ndarray
    stops: np.ndarray

    @property
    def digest(self) -> str:
        """sha256 of the ids and of the pieces."""
        ids = self.tokens.astype("<i4").tobytes()
        pieces = self.stops.astype("<i8").tobytes()
        return hashlib.sha256(ids + pieces).hexdigest()


def join_pieces(name: str, pieces: Sequence[np.ndarray]) -> Corpus:
    """Make a corpus of pieces of token ids."""
    empty = np.zeros(0, np.int32)
    tokens = np.concatenate([empty, *pieces]).astype(np.int32)
    lengths = [len(piece) for piece in pieces]
    return Corpus(name, tokens, np.cumsum(lengths, dtype=np.int64))


@dataclass(frozen=True)
class Table:
    """How often tokens share windows: `single` [V] counts windows that hold a token, in `n_windows` windows.

    Tokens are ranked by that count, the most frequent first: `rank` [V], `token` [V] its inverse. `npmi` [R, R] holds
    the NPMI of the first R ranks, NaN where the expected joint count is below 5 and on the diagonal. Rarer tokens than
    these are in no pair that counts.
    """

    n_windows: int
    single: np.ndarray
    rank: np.ndarray
    token: np.ndarray
    npmi: np.ndarray

    def coherence(self, ranks: np.ndarray) -> np.ndarray:
        """Return the mean NPMI over the pairs of sets of ranks [..., n], NaN where under a quarter of them count."""
        i, j = np.triu_indices(ranks.shape[-1], 1)
        # Beyond the table, one more row and column of NaN stand for all rarer tokens.
        known = len(self.npmi)
        clipped = np.minimum(ranks, known)
        cell = clipped[..., i] * (known + 1) + clipped[..., j]
        values = self._padded.ravel()[cell]
        there = ~np.isnan(values)
        n = there.sum(-1)
        total = np.where(there, values, 0).sum(-1, dtype=np.float64)
        enough = n >= MIN_PAIRS * len(i)
        return np.where(enough, total / np.maximum(n, 1), np.nan)

    @cached_property
    def _padded(self) -> np.ndarray:
        return np.pad(self.npmi, ((0, 1), (0, 1)), constant_values=np.nan)

    def matched(self, ranks: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draw n sets of tokens that are as frequent: each of ranks [..., k] moves by up to ± 60 ranks, [n, ..., k].

        At either end of the ranks the reach is as short on the other side too, so that no end gets rarer or more
        frequent tokens than it had.
        """
        to_last = len(self.rank) - 1 - ranks
        to_nearer_end = np.minimum(ranks, to_last)
        reach = np.minimum(to_nearer_end, REACH)
        moves = rng.integers(-REACH, REACH + 1, (n, *ranks.shape))
        scaled = np.rint(moves * (reach / REACH)).astype(np.int64)
        return np.asarray(ranks + scaled)


def count_pairs(corpus: Corpus, d_vocab: int, window: int = WINDOW) -> Table:
    """Count in how many windows each token, and each pair of the more frequent ones, stands.

    Windows have `window` tokens and begin at every token; a piece that is shorter is one window. Memory: two tables of
    at most MOST_TOKENS² entries of 4 bytes, and as much again while counting.
    """
    single = np.zeros(d_vocab, np.int64)
    n_windows = 0
    for ids_Wn, fresh_Wn in _windows(corpus, window):
        n_windows += ids_Wn.shape[1]
        single += np.bincount(ids_Wn[fresh_Wn], minlength=d_vocab)
    token = np.argsort(-single, kind="stable")
    rank = np.empty(d_vocab, np.int64)
    rank[token] = np.arange(d_vocab)

    # Chance puts i and j together in n_i n_j / n windows. A token that does not reach the least of that even with
    # the most frequent token is in no pair that counts, and needs no row.
    falling = single[token].astype(np.float64)
    could_count = falling * falling[0] >= MIN_EXPECTED * max(n_windows, 1)
    size = min(int(could_count.sum()), MOST_TOKENS)

    # Only the half above the diagonal is counted: the more frequent token's row, the other's column.
    joint = np.zeros(size * size, np.int32)
    for ids_Wn, fresh_Wn in _windows(corpus, window):
        ranks_Wn = rank[ids_Wn]
        known_Wn = fresh_Wn & (ranks_Wn < size)
        for a in range(len(ids_Wn)):
            for b in range(a + 1, len(ids_Wn)):
                both = known_Wn[a] & known_Wn[b]
                low = np.minimum(ranks_Wn[a], ranks_Wn[b])[both]
                high = np.maximum(ranks_Wn[a], ranks_Wn[b])[both]
                np.add.at(joint, low * size + high, np.int32(1))
    upper = joint.reshape(size, size)
    npmi = _npmi(upper + upper.T, falling[:size], n_windows)
    return Table(n_windows, single, rank, token, npmi)


def _npmi(joint_RR: np.ndarray, single_R: np.ndarray, n_windows: int) -> np.ndarray:
    """Return the NPMI of counts as float32, NaN where it does not count."""
    out = np.empty(joint_RR.shape, np.float32)
    n = float(max(n_windows, 1))
    # In float64 a row at a time: the whole table would take 288 MB for each value in between.
    for row in range(len(joint_RR)):
        joint = joint_RR[row].astype(np.float64)
        # ln(P_ij / P_i P_j) / −ln P_ij, with P_ij / P_i P_j = joint / expected.
        expected = single_R[row] * single_R / n
        some = (joint > 0) & (joint < n)
        ratio = np.where(some, joint / np.maximum(expected, 1e-300), 1.0)
        share = np.where(some, joint / n, 0.5)
        values = np.log(ratio) / -np.log(share)
        # The limits: −1 for a pair that is never together, 1 for one that is so in every window.
        limit = np.where(joint > 0, 1.0, -1.0)
        values = np.where(some, values, limit)
        out[row] = np.where(expected >= MIN_EXPECTED, values, np.nan)
    np.fill_diagonal(out, np.nan)
    return out


def _windows(corpus: Corpus, window: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield token ids int64 [W, n] of n windows, and which of them are inside and the first of their kind there."""
    starts = np.zeros_like(corpus.stops)
    starts[1:] = corpus.stops[:-1]
    lengths = corpus.stops - starts
    # A piece of n tokens has n − W + 1 windows; one that is shorter, but not empty, has one.
    n_windows = np.maximum(lengths - window + 1, np.minimum(lengths, 1))
    piece = np.repeat(np.arange(len(n_windows)), n_windows)
    first_of_piece = np.cumsum(n_windows) - n_windows
    within = np.arange(len(piece)) - np.repeat(first_of_piece, n_windows)
    begin = within + starts[piece]
    for low in range(0, len(begin), WINDOWS_AT_ONCE):
        here = slice(low, low + WINDOWS_AT_ONCE)
        at_Wn = begin[here] + np.arange(window)[:, None]
        inside_Wn = at_Wn < corpus.stops[piece[here]]
        within_Wn = np.minimum(at_Wn, len(corpus.tokens) - 1)
        ids_Wn = corpus.tokens[within_Wn].astype(np.int64)
        # A window is Boolean: of a token that it holds twice, only the first place counts.
        fresh_Wn = inside_Wn.copy()
        for a in range(window):
            for b in range(a):
                fresh_Wn[a] &= ids_Wn[a] != ids_Wn[b]
        yield ids_Wn, fresh_Wn
