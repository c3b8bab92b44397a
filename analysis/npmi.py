"""How often tokens stand near each other: normalised pointwise mutual information over Boolean sliding windows.

P(i) is the share of windows that hold token i, P(i, j) of those that hold both; NPMI = ln(P(i, j) / P(i)P(j)) /
−ln P(i, j) (Röder, Both & Hinneburg 2015). A pair that shares no window counts −1, the limit. (With the paper's
ε = 1e-12 inside the logarithms, pairs of rare tokens would read near 0, and tokens that the corpus lacks as coherent.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 10
WINDOWS_AT_ONCE = 1 << 16


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
        return hashlib.sha256(self.tokens.astype("<i4").tobytes() + self.stops.astype("<i8").tobytes()).hexdigest()


def join_pieces(name: str, pieces: Sequence[np.ndarray]) -> Corpus:
    """Make a corpus of pieces of token ids."""
    tokens = np.concatenate([np.zeros(0, np.int32), *pieces]).astype(np.int32)
    return Corpus(name, tokens, np.cumsum([len(piece) for piece in pieces], dtype=np.int64))


@dataclass(frozen=True)
class Counts:
    """Windows, windows that hold each token [V], and windows that hold each of the pairs `keys`, falling in order.

    The key of the tokens i ≤ j is i · V + j.
    """

    n_windows: int
    single: np.ndarray
    keys: np.ndarray
    joint: np.ndarray

    def npmi(self, keys: np.ndarray) -> np.ndarray:
        """Return the NPMI of pairs, which must be among those counted."""
        joint = self.joint[np.searchsorted(self.keys, keys)]
        first, second = (self.single[part] for part in np.divmod(keys, len(self.single)))
        there = (joint > 0) & (joint < self.n_windows)
        p = np.where(there, joint, 1) / max(self.n_windows, 1)
        ratio = np.where(there, p / np.maximum(first * second, 1) * float(max(self.n_windows, 1)) ** 2, 1.0)
        values = np.log(ratio) / -np.log(np.where(there, p, 0.5))
        return np.where(there, values, np.where(joint > 0, 1.0, -1.0))


def pair_keys(tokens: np.ndarray, d_vocab: int) -> np.ndarray:
    """Return the keys of all pairs of each list of tokens: int64 [..., n(n − 1)/2] from [..., n]."""
    i, j = np.triu_indices(tokens.shape[-1], 1)
    a, b = tokens[..., i].astype(np.int64), tokens[..., j].astype(np.int64)
    return np.asarray(np.minimum(a, b) * d_vocab + np.maximum(a, b))


def count_windows(corpus: Corpus, keys: np.ndarray, d_vocab: int, window: int = WINDOW) -> Counts:
    """Count in how many windows each token, and each pair of `keys`, stands.

    Windows have `window` tokens and begin at every token; a piece that is shorter is one window. Memory: the counts
    and about 60 MB.
    """
    wanted = np.unique(keys)
    single, joint, n = np.zeros(d_vocab, np.int64), np.zeros(len(wanted), np.int64), 0
    for ids_Wn, fresh_Wn in _windows(corpus, window):
        n += ids_Wn.shape[1]
        single += np.bincount(ids_Wn[fresh_Wn], minlength=d_vocab)
        found = [
            (np.minimum(ids_Wn[a], ids_Wn[b]) * d_vocab + np.maximum(ids_Wn[a], ids_Wn[b]))[fresh_Wn[a] & fresh_Wn[b]]
            for a in range(len(ids_Wn))
            for b in range(a + 1, len(ids_Wn))
        ]
        if not found or not len(wanted):
            continue
        seen, times = np.unique(np.concatenate(found), return_counts=True)
        place = np.minimum(np.searchsorted(wanted, seen), len(wanted) - 1)
        hit = wanted[place] == seen
        joint[place[hit]] += times[hit]
    return Counts(n, single, wanted, joint)


def _windows(corpus: Corpus, window: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield token ids int64 [W, n] of n windows, and which of them are inside and the first of their kind there."""
    starts = np.concatenate([[0], corpus.stops[:-1]]) if len(corpus.stops) else corpus.stops
    full = np.maximum(corpus.stops - starts - window + 1, np.minimum(corpus.stops - starts, 1))
    piece = np.repeat(np.arange(len(full)), full)
    begin = np.arange(len(piece)) - np.repeat(np.cumsum(full) - full, full) + starts[piece]
    for low in range(0, len(begin), WINDOWS_AT_ONCE):
        here = slice(low, low + WINDOWS_AT_ONCE)
        at_Wn = begin[here] + np.arange(window)[:, None]
        inside_Wn = at_Wn < corpus.stops[piece[here]]
        ids_Wn = corpus.tokens[np.minimum(at_Wn, len(corpus.tokens) - 1)].astype(np.int64)
        fresh_Wn = inside_Wn.copy()
        for a in range(window):
            for b in range(a):
                fresh_Wn[a] &= ids_Wn[a] != ids_Wn[b]
        yield ids_Wn, fresh_Wn
