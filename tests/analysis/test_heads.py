"""Heads compared: closed forms, definitions row by row, inverted pairs."""

import math

import numpy as np
import pytest

from headwater.analysis.engine.scan import Scan
from headwater.analysis.measures.head_rows import (
    benjamini_hochberg,
    conditional_information,
    kendall,
    pair_figures,
    rest_keys,
    student_tail,
)
from headwater.analysis.measures.heads import Heads, heads, inverted_pairs, sampled_queries


def softmax(scores):
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_opposite_orders_and_copies():
    p = softmax(np.random.default_rng(0).normal(size=(1, 9)))
    keys = [np.arange(9)]
    opposite = np.sort(p)[:, ::-1][:, p[0].argsort().argsort()]
    assert (p[0].argsort() == opposite[0].argsort()[::-1]).all()
    rows = np.stack([p[0], opposite[0], p[0]])[None]
    cosine, js, same, tau = pair_figures(rows, rows, keys)[:, 0]
    np.testing.assert_allclose(tau, [[1, -1, 1], [-1, 1, -1], [1, -1, 1]], 1e-12)
    assert same[0].tolist() == [1, 0, 1]
    np.testing.assert_allclose([cosine[0, 2], js[0, 2]], [1, 0], atol=1e-12)
    apart = np.eye(4)[None, :2]
    np.testing.assert_allclose(
        pair_figures(apart, apart, [np.arange(3)])[:2, 0, 0, 1], [0, math.log(2)]
    )
    assert np.isnan(pair_figures(apart, apart, [np.arange(3)])[3]).all()


def test_tau_b_with_ties_is_its_definition():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 4, (2, 3, 12)).astype(float)
    b[2] = 1
    got = kendall(a, b)
    for i, j in np.ndindex(3, 3):
        x, y = np.subtract.outer(a[i], a[i]), np.subtract.outer(b[j], b[j])
        scale = np.sqrt((x != 0).sum() * (y != 0).sum())
        want = np.nan if j == 2 else (np.sign(x) * np.sign(y)).sum() / scale
        np.testing.assert_allclose(got[i, j], want, 1e-12)


def test_information_of_copies_exclusive_and_independent_heads():
    n, k = 4000, 5
    a = np.tile(np.arange(k), n // k)[:, None]
    np.testing.assert_allclose(
        conditional_information(a, a), math.log(k) + (k - 1) / (2 * n), 1e-12
    )
    pairs = np.array([(i, j) for i in range(k) for j in range(k) if i != j])
    many = np.tile(pairs, (500, 1))
    exclusive = conditional_information(many[:, :1], many[:, 1:])
    np.testing.assert_allclose(exclusive, math.log(k / (k - 1)), atol=2e-3)
    rng = np.random.default_rng(2)
    position = np.arange(12)
    independent = rng.integers(0, k, (2, 300, 12)) + position
    assert abs(conditional_information(*independent)) < 0.005
    pooled = conditional_information(*(x.reshape(-1, 1) for x in independent))
    assert pooled > 0.5
    a = np.array([[3, -1], [3, -1]])
    assert conditional_information(a, a) == 0 and np.isnan(conditional_information(a[:1], a[:1]))


def test_tails_and_adjusted_p_values():
    np.testing.assert_allclose(student_tail(np.array([-1.0, 1.0]), 1), [0.25, 0.75], 1e-10)
    np.testing.assert_allclose(student_tail(-np.sqrt(2.0), 2), (1 - 1 / np.sqrt(2)) / 2, 1e-10)
    np.testing.assert_allclose(student_tail(-2.0, 1e6), math.erfc(math.sqrt(2)) / 2, 1e-5)
    np.testing.assert_allclose(student_tail(-40.0, 3), 1.7174e-5, 1e-3)
    assert np.isnan(student_tail(-1.0, 0)) and np.isnan(student_tail(np.nan, 5))
    q = benjamini_hochberg(np.array([0.01, np.nan, 0.04, 0.03, 0.005]))
    np.testing.assert_allclose(q, [0.02, np.nan, 0.04, 0.04, 0.02])


def test_rest_keys_leave_out_sink_and_self():
    assert rest_keys(2, 7, 128).tolist() == [3, 4, 5, 6]
    assert rest_keys(0, 11, 4).tolist() == [1, 4, 7, 10] and not len(rest_keys(0, 1, 4))


@pytest.mark.parametrize("layout", ["plain", "packed", "padded"])
def test_means_are_those_of_the_rows(analysis_run, layout):
    run = analysis_run(layout)
    got = heads(run, [1], n_sequences=1000, n_queries=12, n_keys=1000)
    pattern, row_start = run["pattern"][1].astype(np.float64), run.plain("row_start")
    n, queries = len(row_start), np.linspace(1, row_start.shape[1] - 1, 12).round().astype(int)
    for null in (0, 1):
        found = {"cosine": [], "js": [], "same_argmax": [], "tau": []}
        for s in range(n):
            other = (s ^ 1) if null else s
            for q in queries:
                first = row_start[s, q]
                if first >= q or other >= n or row_start[other, q] != first:
                    continue
                a, b = (pattern[i][:, q, : q + 1] for i in (s, other))
                x, y = a[0], b[1]
                m = (x + y) / 2
                found["cosine"].append(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
                found["js"].append(
                    sum((v[v > 0] * np.log(v[v > 0] / m[v > 0])).sum() for v in (x, y)) / 2
                )
                found["same_argmax"].append(x.argmax() == y.argmax())
                if q - first - 1 >= 4:
                    found["tau"].append(kendall(a[:1, first + 1 : q], b[1:2, first + 1 : q])[0, 0])
        for name, values in found.items():
            mean = got[name + "_null" * null][0, 0, 1]
            np.testing.assert_allclose(
                mean, np.mean(values) if values else np.nan, 1e-9, 1e-12, err_msg=name
            )
    start = row_start[:, queries]
    first = pattern[:, 0][np.arange(n)[:, None], queries, np.minimum(start, queries)]
    np.testing.assert_allclose(got.non_sink_mass[0, 0], 1 - first[start < queries].mean(), 1e-9)
    assert got.identical(
        heads(run, [1], n_sequences=1000, n_queries=12, n_keys=1000, scan=Scan(2, "threads"))
    )


class Memory:
    """A chunk out of memory: pattern [S, N, Q, K] of one layer."""

    def __init__(self, pattern, first):
        self.pattern, self.first, self.lead = pattern, first, 0
        self.row_start_ST = np.zeros((len(pattern), pattern.shape[-1]), np.int32)

    def __getitem__(self, site):
        return self.pattern


def test_an_inverted_pair_is_found_and_an_independent_head_is_not(analysis_run, monkeypatch):
    rng = np.random.default_rng(3)
    n, length = 10, 40
    run = analysis_run("plain")
    scores = rng.normal(size=(n, 3, 1, length))
    scores[:, 1] = -scores[:, 0]
    hidden = np.triu(np.ones((length, length), bool), 1)
    pattern = softmax(np.where(hidden, -np.inf, np.broadcast_to(scores, (n, 3, length, length))))

    def update(self, state, chunk, real=Heads.update):
        here = Memory(pattern[chunk.first : chunk.last], chunk.first)
        here.lead = chunk.lead
        real(self, state, here)

    monkeypatch.setattr(Heads, "update", update)
    got = heads(run, layers=[1])
    assert inverted_pairs(got) == [(1, 0, 1)]
    np.testing.assert_allclose(got.tau[0, 0, 1], -1, 1e-12)
    assert abs(got.tau[0, 0, 2]) < 0.3 and got.q[0, 0, 2] > 0.05
    assert np.abs(got.tau_null[0]).max() < 0.3
    assert (got.n_pairs == 5).all() and got.tau_error[0, 0, 1] < 1e-6 < got.tau_error[0, 0, 2]
    largest = pattern[:, :, sampled_queries(40, 32)].argmax(-1)
    by_pair = (largest[:, 0] == largest[:, 2]).reshape(5, -1).mean(-1)
    error = np.std(by_pair, ddof=1) / 5**0.5
    np.testing.assert_allclose(got.same_argmax_error[0, 0, 2], error, 1e-9)
    pattern[4, 2, 20, 3] = np.nan
    with pytest.raises(ValueError, match="hold NaN or infinite values in sequences 4 to 5"):
        heads(run, layers=[1], n_queries=40)


def test_bad_requests_say_what_is_wrong(analysis_run, tmp_path):
    run = analysis_run("plain")
    with pytest.raises(ValueError, match="7 is out of range"):
        heads(run, layers=[7])
    with pytest.raises(ValueError, match="expected at least 1, 1 and 4"):
        heads(run, n_keys=3)
