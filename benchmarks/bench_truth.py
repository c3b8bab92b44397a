"""Measures against planted truths and simulated nulls: what is found of what is there, and of what is not.

    python -m headwater.benchmarks truth [--nulls 500]

Each null is drawn --nulls times; it should be found no more often than 1.2 times the level that the measure names.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from headwater.analysis.measures.favourites import Favourites, random_p_values
from headwater.analysis.measures.head_rows import student_tail
from headwater.analysis.measures.transition import find_transition
from headwater.analysis.weights.chance import spearman_within, step_beyond_line
from headwater.analysis.weights.coherence import score_sets
from headwater.analysis.weights.npmi import Corpus, Table, count_pairs, join_pieces
from headwater.store.reader import Run

ROOM = 1.2
N_TOPICS = 10
Draw = Callable[[np.random.Generator], bool]


@dataclass(frozen=True)
class Line:
    """One simulation: what was found of n draws. `level` is the nominal rate of a null, None for a planted truth."""

    measure: str
    case: str
    n: int
    found: int
    level: float | None

    @property
    def verdict(self) -> str:
        """Say whether a null is found no more often than 1.2 times its level, within two standard errors."""
        if self.level is None:
            return "planted"
        allowed = ROOM * self.level
        error = (allowed * (1 - allowed) / self.n) ** 0.5
        rate = self.found / self.n
        if rate <= allowed:
            return "holds"
        if rate <= allowed + 2 * error:
            return "holds within its error"
        return "fails"


def count(measure: str, case: str, n: int, draw: Draw, level: float | None = None) -> Line:
    """Draw n times, from a seed that the case's name gives."""
    rng = np.random.default_rng(list(f"{measure} {case}".encode()))
    return Line(measure, case, n, sum(draw(rng) for _ in range(n)), level)


def is_step(values: np.ndarray) -> bool:
    """Say whether steps are found in a series over layers."""
    return find_transition(values).kind == "steps"


def transition_lines(n: int) -> Iterator[Line]:
    """Steps over layers: noise, ramps, and planted changes."""
    name = "transition: steps"
    for layers in (4, 6, 8, 12, 24):
        yield count(
            name,
            f"white noise, {layers} layers",
            n,
            lambda r: is_step(0.4 + 0.15 * r.normal(size=layers)),  # noqa: B023 (called at once)
            0.05,
        )
    yield count(
        name,
        "uniform noise, 8 layers",
        n,
        lambda r: is_step(r.uniform(size=8)),
        0.05,
    )
    for layers, rise in ((8, 0.6), (12, 0.6), (12, 0.3)):
        ramp = np.linspace(0.1, 0.1 + rise, layers)
        yield count(
            name,
            f"ramp of {rise} with noise of .05, {layers} layers",
            n,
            lambda r: is_step(ramp + 0.05 * r.normal(size=len(ramp))),  # noqa: B023 (called at once)
            0.05,
        )
    for low, high, end in ((3, 9, 0), (2, 4, 2), (2, 8, 2)):
        planted = np.repeat([0.05, 0.5, 0.05], [low, high, end])
        wanted = (low, low + high if end else None)

        def recovered(r: np.random.Generator, f: np.ndarray = planted, at: Any = wanted) -> bool:
            found = find_transition(f + 0.03 * r.normal(size=len(f)))
            return bool((found.into, found.out) == at)

        yield count(name, f"{low} low, {high} high, {end} low, noise of .03", n // 5, recovered)


def step_lines(n: int) -> Iterator[Line]:
    """A change at l_in beside a trend over depth."""
    name = "change at l_in: p ≤ .05"

    def found(values: np.ndarray) -> bool:
        return step_beyond_line(values, len(values) // 2, 1000).p <= 0.05

    for layers in (6, 8, 12, 24):
        trend = np.linspace(0.05, 0.5, layers)
        yield count(
            name,
            f"noisy trend, {layers} layers",
            n,
            lambda r: found(trend + 0.05 * r.normal(size=layers)),  # noqa: B023 (called at once)
            0.05,
        )
        yield count(
            name,
            f"fractions of 30 directions on a trend, {layers} layers",
            n,
            lambda r: found(r.binomial(30, trend) / 30),  # noqa: B023 (called at once)
            0.05,
        )
    for layers in (8, 12):
        step = np.repeat([0.1, 0.4], layers // 2)
        yield count(
            name,
            f"step of .3 with noise of .05, {layers} layers",
            n // 5,
            lambda r: found(step + 0.05 * r.normal(size=layers)),  # noqa: B023 (called at once)
        )
    yield count(
        "share and coherence within layers: p ≤ .05",
        "independent heads, 8 layers of 8",
        n,
        lambda r: spearman_within(r.normal(size=(8, 8)), r.normal(size=(8, 8)), 400)[2] <= 0.05,
        0.05,
    )


def zipf_corpus(
    rng: np.random.Generator, d_vocab: int = 1200, n_pieces: int = 2500
) -> tuple[Corpus, np.ndarray]:
    """Make a text with Zipf's frequencies, topics of 20 tokens and bursts, a tenth of all tokens coming again soon.

    Returns it and the topic of each token, −1 for none.
    """
    frequency = 1 / (np.arange(d_vocab) + 10)
    topic_of = np.full(d_vocab, -1)
    chosen = rng.permutation(np.arange(60, 800))[: N_TOPICS * 20]
    topic_of[chosen] = np.repeat(np.arange(N_TOPICS), 20)
    pieces = []
    for _ in range(n_pieces):
        here = topic_of == rng.integers(N_TOPICS)
        # seven times as frequent in its topic and rarer elsewhere, the same on the whole
        weight = frequency * np.where(here, 7.0, np.where(topic_of < 0, 1.0, 1 / 3))
        piece = rng.choice(d_vocab, 60, p=weight / weight.sum())
        again = rng.random(60) < 0.1
        again[0] = False
        for at in np.flatnonzero(again):
            piece[at] = piece[at - rng.integers(1, min(int(at), 8) + 1)]
        pieces.append(piece)
    return join_pieces("simulated", pieces), topic_of


def coherence_lines(n: int) -> Iterator[Line]:
    """Sets of tokens: as frequent as each other without a topic, and topics."""
    rng = np.random.default_rng(0)
    corpus, topic_of = zipf_corpus(rng)
    table: Table = count_pairs(corpus, len(topic_of))
    plain = table.token[topic_of[table.token] < 0]
    name = "coherent direction"
    for among, tokens, ranks in (
        ("any tokens", table.token, (0, 60)),
        ("any tokens", table.token, (0, 200)),
        ("any tokens", table.token, (50, 250)),
        ("tokens without a topic", plain, (0, 60)),
        ("tokens without a topic", plain, (0, 200)),
    ):
        sets = np.stack([rng.permutation(tokens[slice(*ranks)])[:20] for _ in range(2 * n)])
        got = score_sets(table, sets.reshape(2, n, 20)).coherent
        told = got[np.isfinite(got)]
        case = f"{among}, ranks {ranks[0]} to {ranks[1]}"
        yield Line(name, case, max(len(told), 1), int(told.sum()), 0.01)
    topics = np.stack([np.flatnonzero(topic_of == topic) for topic in range(N_TOPICS)])
    got = score_sets(table, np.stack([topics, topics])).coherent
    told = got[np.isfinite(got)]
    yield Line(name, "topics of 20 tokens", max(len(told), 1), int(told.sum()), None)


def head_lines(n: int) -> Iterator[Line]:
    """Heads without preferences on tokens of Zipf's frequencies, and p-values over pairs of sequences."""
    rng = np.random.default_rng(1)
    length = 24
    n_sequences = 96
    d_vocab = 20
    share = 1 / np.arange(1, d_vocab + 1)
    tokens = rng.choice(d_vocab, (n_sequences, length), p=share / share.sum())
    run = _Shapes(n_sequences, n, length)
    queries = np.arange(3, length, 3)
    reducer = Favourites(cast(Run, run), [0], n_sequences, queries, np.arange(10))
    state = reducer.zero()
    for sequence in range(n_sequences):
        state_chunk = _Chunk(sequence, tokens[sequence], rng.random((1, n, length, length)))
        reducer.update(state, cast(Any, state_chunk))
    p = random_p_values(state, 20)
    for measure, values in p.items():
        told = values[np.isfinite(values)]
        what = f"{measure.replace('_', ' ')} against random attention: p ≤ .05"
        yield Line(what, "heads that attend at random", len(told), int((told <= 0.05).sum()), 0.05)
    tau = rng.normal(0, 0.2, (n, 64)) - rng.normal(0, 0.2, (n, 64))
    t = tau.mean(1) / (tau.std(1, ddof=1) / 8)
    below = student_tail(t, np.full(n, 63.0)) <= 0.05
    yield Line("inverted heads: p ≤ .05", "independent orders, 64 pairs", n, int(below.sum()), 0.05)


class _Shapes:
    """What `Favourites` asks of a run: its sizes."""

    def __init__(self, n_sequences: int, n_head: int, length: int) -> None:
        self.manifest = SimpleNamespace(n_positions=length, n_sequences=n_sequences)
        self._pattern = SimpleNamespace(shape=(1, n_sequences, n_head, length, length))

    def __getitem__(self, site: str) -> SimpleNamespace:
        return self._pattern


class _Chunk:
    """A sequence whose rows of attention are given."""

    def __init__(self, sequence: int, tokens_T: np.ndarray, pattern: np.ndarray) -> None:
        self.first = sequence
        self.lead = 0
        self.pattern = pattern
        self.row_start_ST = np.zeros((1, len(tokens_T)), np.int32)
        self.tokens_ST = tokens_T[None]

    def __getitem__(self, site: str) -> np.ndarray:
        return self.pattern


def simulate(n: int) -> list[Line]:
    """Run all simulations with n draws of each null."""
    parts = (transition_lines, step_lines, coherence_lines, head_lines)
    return [line for part in parts for line in part(n)]


def table(lines: list[Line]) -> str:
    """Write the lines as a table of Markdown."""
    rows = ["| measure | simulated | draws | found | level | |", "|---|---|---|---|---|---|"]
    for line in lines:
        if line.level is None:
            level = ""
        else:
            level = f"{line.level:g}"
        rate = f"{line.found / line.n:.3f}"
        rows.append(
            f"| {line.measure} | {line.case} | {line.n} | {rate} | {level} | {line.verdict} |"
        )
    return "\n".join(rows)


def main(arguments: list[str]) -> int:
    """Print the table; fail where a null is found too often."""
    parser = argparse.ArgumentParser(prog="python -m headwater.benchmarks truth")
    parser.add_argument("--nulls", type=int, default=500, help="draws of each null (default: 500)")
    n = parser.parse_args(arguments).nulls
    if n < 20:
        parser.error(f"--nulls is {n}; expected at least 20.")
    lines = simulate(n)
    print(table(lines))
    return int(any(line.verdict == "fails" for line in lines))
