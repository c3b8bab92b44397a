"""Sinks: closed forms, definitions in float64, transitions, and patterns against statistics."""

import numpy as np
import pytest

import headwater
from headwater.analysis.measures.sink_rows import (
    Words,
    pattern_figures,
    query_sets,
    ratio_error,
    row_figures,
    segments,
)
from headwater.analysis.measures.sinks import attn_word, sinks
from headwater.analysis.measures.transition import find_transition
from headwater.store.manifest import RunError

GPT2_SMALL = (0.0007, 0.003, 0.104, 0.342, 0.367, 0.486, 0.493, 0.543, 0.534, 0.625, 0.535, 0.550)
MGM = (0.0354, 0.0608, 0.0570, 0.1039, 0.2036, 0.0502, 0.2782, 0.2893)


def test_transitions_are_those_of_the_field():
    for values, expected in ((GPT2_SMALL, 3), (MGM, 6)):
        found = find_transition(values)
        assert (found.kind, found.into, found.out) == ("steps", expected, None), found
        assert found.r2_steps > found.r2_line and found.jump >= 0.1
    rise_and_fall = find_transition([0.01, 0.02, 0.5, 0.5, 0.5, 0.52, 0.05])
    assert (rise_and_fall.into, rise_and_fall.out) == (2, 6) and rise_and_fall.jump > 0.4
    for high in (4, 8):
        planted = find_transition([0.05, 0.07, *[0.5, 0.52] * (high // 2), 0.06, 0.04])
        assert (planted.into, planted.out) == (2, 2 + high), planted
    spread = find_transition(1 - np.array([0.96, 0.95, 0.96, 0.37, 0.38, 0.39, 0.4, 0.37]))
    assert (spread.kind, spread.into) == ("steps", 3)
    for n in (8, 12, 24):
        assert find_transition(np.linspace(0, 0.7, n)).kind == "ramp"
    for values in ([0.3] * 6, [0.01, 0.02, 0.01, 0.015, 0.02, 0.05], [0, 1, 0, 1, 0, 1, 0, 1, 0]):
        assert find_transition(values).kind == "none"
    for values in ([], [0.2], [0.5, 0.4, 0.3]):
        assert find_transition(values).kind == "too few layers"


@pytest.mark.parametrize("n_layer", [4, 6, 8, 12])
def test_noise_and_noisy_ramps_have_no_steps(n_layer):
    rng = np.random.default_rng(n_layer)
    noise = [find_transition(0.4 + 0.15 * rng.normal(size=n_layer)).kind for _ in range(300)]
    assert np.mean(np.array(noise) == "steps") <= 0.05 + 2 * (0.05 * 0.95 / 300) ** 0.5
    ramps = [
        find_transition(np.linspace(0.1, 0.7, n_layer) + 0.05 * rng.normal(size=n_layer)).kind
        for _ in range(100)
    ]
    assert np.mean(np.array(ramps) == "steps") <= 0.05


def test_errors_are_those_of_a_mean_over_sequences():
    rng = np.random.default_rng(0)
    total, n = rng.normal(1, 0.3, (40, 2)), np.ones((40, 2))
    products = np.stack([(total**2).sum(0), (total * n).sum(0), (n**2).sum(0)])
    error = ratio_error(total.sum(0), n.sum(0), products, n.sum(0))
    np.testing.assert_allclose(error, total.std(0, ddof=1) / 40**0.5, 1e-9)
    assert np.isnan(ratio_error(total[0], n[0], products, n[0])).all()


def make_run(home, oracle, ids, change, **config):
    """Extract a run of ids from a random GPT-2 whose weights `change` edits."""
    import torch

    model = oracle.gpt2(n_head=2, n_embd=16, n_positions=64)
    with torch.no_grad():
        change(model)
    model.save_pretrained(home / "model")
    np.save(home / "ids.npy", ids.astype(np.int32))
    settings = {"preset": "all", "dtype": "float32", "block": 2, "top_k": 1} | config
    return headwater.extract(
        headwater.RunConfig(
            model=str(home / "model"),
            tokens=str(home / "ids.npy"),
            out=str(home / "run"),
            **settings,
        )
    )


@pytest.mark.parametrize("source", ["pattern", "statistics"])
def test_without_queries_attention_is_uniform(tmp_path, oracle, source):
    def no_queries(model):
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :16] = 0
            block.attn.c_attn.bias[:16] = 0

    n = 40
    run = make_run(tmp_path, oracle, np.random.default_rng(0).integers(0, 31, (3, n)), no_queries)
    got = sinks(run, source=source, epsilon=0.1, window=n)
    harmonic = np.concatenate([[0], np.cumsum(1 / np.arange(1, n + 1))])
    k = np.arange(n)
    alpha = (harmonic[n] - harmonic[k]) / (n - k)
    np.testing.assert_allclose(got.received, np.broadcast_to(alpha, got.received.shape), 1e-5)
    np.testing.assert_allclose(got.entropy_normalised, 1, 1e-5)
    np.testing.assert_allclose(got.entropy_non_sink, 1, 2e-5)
    for name, low in (("all", 0), ("second_half", n // 2), ("last_64", 0)):
        one = got.sel(query_set=name)
        assert one.n_rows == 3 * (n - low)
        np.testing.assert_allclose(
            one.first_token_share, (harmonic[n] - harmonic[low]) / (n - low), 1e-5
        )
        np.testing.assert_allclose(one.entropy, np.log(k[low:] + 1).mean(), 1e-5)
        np.testing.assert_allclose(one.distance, k[low:].mean() / 2, 1e-5)
    for rate in (got.sink_rate, got.sink_rate_window):
        np.testing.assert_array_equal(rate, np.broadcast_to(alpha > 0.1, rate.shape))
    np.testing.assert_array_equal(got.sink_metric, alpha > 0.1)
    np.testing.assert_array_equal(got.few_rows, k > n - 16)


def test_one_token_without_positions_is_the_same_everywhere(tmp_path, oracle):
    run = make_run(
        tmp_path, oracle, np.full((2, 30), 7), lambda model: model.transformer.wpe.weight.zero_()
    )
    resid = run["resid"][:]
    np.testing.assert_allclose(resid, np.broadcast_to(resid[:, :, :1], resid.shape), 1e-4, 1e-4)
    got = sinks(run)
    np.testing.assert_allclose(got.entropy_normalised, 1, 1e-5)
    np.testing.assert_allclose(
        got.first_token_share.sel(query_set="all"), (1 / np.arange(1, 31)).mean(), 1e-5
    )


def random_pattern(n_head, row_start, seed=0):
    """Return a random pattern [N, T, T] that a row_start allows, float64."""
    rng = np.random.default_rng(seed)
    t = np.arange(len(row_start))
    seen = (t <= t[:, None]) & (t >= row_start[:, None])
    p = rng.gamma(0.3, size=(n_head, len(t), len(t))) * seen + 1e-9 * seen
    return p / np.maximum(p.sum(-1, keepdims=True), 1e-300)


ROWS = {
    "plain": np.zeros(200, int),
    "packed": np.repeat([0, 3, 4, 90], [3, 1, 86, 50]),
    "right": np.where(np.arange(150) < 70, 0, np.arange(150) + 1),
    "left": np.where(np.arange(150) < 70, np.arange(150) + 1, 70),
}


@pytest.mark.parametrize("kind", ROWS)
def test_row_figures_are_their_definitions(kind):
    row_start = ROWS[kind]
    p = random_pattern(2, row_start)
    got, received = pattern_figures(p, row_start)
    np.testing.assert_allclose(received, p.sum(1), 1e-12)
    t = np.arange(len(row_start))
    for h in range(2):
        for q in t[row_start <= t]:
            row, n = p[h, q, row_start[q] : q + 1], q - row_start[q] + 1
            entropy = -(row * np.log(row)).sum()
            rest = row[1:] / row[1:].sum() if n > 1 else None
            want = [
                row[0],
                entropy,
                entropy / np.log(n) if n > 1 else np.nan,
                -(rest * np.log(rest)).sum() / np.log(n - 1)
                if n > 2 and row[0] <= 0.999
                else np.nan,
                (row * np.arange(n)[::-1]).sum(),
            ]
            np.testing.assert_allclose(got[:, h, q], want, 1e-9, 1e-12)
    entropy, share, distance = got[1], got[0], got[4]
    again = row_figures(entropy, share, distance, t - row_start + 1)
    real = row_start <= t
    np.testing.assert_allclose(again[:, :, real], got[:, :, real], 1e-8, 1e-8)


def test_segments_and_query_sets():
    assert {kind: segments(row_start) for kind, row_start in ROWS.items()} == {
        "plain": [(0, 200)],
        "packed": [(0, 3), (3, 4), (4, 90), (90, 140)],
        "right": [(0, 70)],
        "left": [(70, 150)],
    }
    assert segments(np.arange(5) + 1) == []
    members = query_sets(ROWS["packed"])
    assert [m.sum() for m in members] == [140, 1 + 0 + 43 + 25, 3 + 1 + 64 + 50]
    assert np.flatnonzero(query_sets(ROWS["left"])[1]).tolist() == list(range(110, 150))


@pytest.mark.parametrize("layout", ["plain", "packed", "padded"])
def test_a_run_gives_the_means_of_its_rows(analysis_run, layout):
    run = analysis_run(layout)
    got, stored = sinks(run, window=8, words=False), sinks(run, window=8, source="statistics")
    row_start, pattern = run.plain("row_start"), run["pattern"][:].astype(np.float64)
    member = np.concatenate([query_sets(starts) for starts in row_start], 1)
    for layer, patterns in enumerate(pattern):
        found = [
            pattern_figures(p, starts)[0] for p, starts in zip(patterns, row_start, strict=True)
        ]
        figures = np.concatenate(found, -1)
        for name, quantity in (("first_token_share", 0), ("entropy_non_sink", 3), ("distance", 4)):
            want = np.stack([np.nanmean(figures[quantity][:, chosen], -1) for chosen in member])
            np.testing.assert_allclose(got[name][:, layer], want, 1e-10, err_msg=name)
    pieces = [(s, *piece) for s, starts in enumerate(row_start) for piece in segments(starts)]
    for k in (0, 1, 5):
        alphas = np.stack(
            [pattern[:, s, :, a + k : b, a + k].mean(-1) for s, a, b in pieces if b - a > k]
        )
        np.testing.assert_allclose(got.received[..., k], alphas.mean(0), 1e-10)
        np.testing.assert_array_equal(got.sink_rate[..., k], (alphas > 0.3).mean(0))
        windows = np.stack(
            [pattern[:, s, :, a + k : a + 8, a + k].mean(-1) for s, a, b in pieces if b - a >= 8]
        )
        np.testing.assert_array_equal(got.sink_rate_window[..., k], (windows > 0.3).mean(0))
    for name in (
        "first_token_share",
        "entropy",
        "entropy_normalised",
        "entropy_non_sink",
        "distance",
        "received",
    ):
        np.testing.assert_allclose(stored[name], got[name], 1e-5, 1e-5, err_msg=name)
    assert "sink_rate_window" not in stored
    assert np.isnan(got.l_in) and got.l_in.transition == "too few layers"
    assert got["key"].values.tolist() == list(range(got.sizes["key"]))
    for layer, patterns in enumerate(pattern):
        shares = np.concatenate(
            [
                pattern_figures(p, starts)[0][:1, :, query_sets(starts)[0]].mean(-1)
                for p, starts in zip(patterns, row_start, strict=True)
            ]
        )
        if layout == "plain":
            want = shares.std(0, ddof=1) / len(shares) ** 0.5
            np.testing.assert_allclose(got.first_token_share_error[0, layer], want, 1e-9)
    assert (got.share_by_layer_error.values > 0).all() and got.n_sequences[0] == len(row_start)


def test_float16_patterns_agree_with_the_statistics(tmp_path, oracle):
    ids = np.random.default_rng(1).integers(0, 31, (3, 60))
    run = make_run(tmp_path, oracle, ids, lambda model: None, dtype="float16")
    patterns, statistics = (sinks(run, source=source) for source in ("pattern", "statistics"))
    for name in (
        "first_token_share",
        "entropy",
        "entropy_normalised",
        "entropy_non_sink",
        "received",
    ):
        np.testing.assert_allclose(patterns[name], statistics[name], 2e-3, 2e-3, err_msg=name)
    np.testing.assert_allclose(patterns.distance, statistics.distance, 2e-3)


def test_word_share_is_one_for_position_alone_and_counts_same_word_mass():
    words = Words(np.array([True, False, True]), np.array([True, False, False]))
    assert words.continues(np.array([0, 0, 2, 0, 1, 0, -1])).tolist() == [
        False,
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    n = np.array([[4.0, 2, 0], [8, 2, 5]])
    by_distance = np.array([[0.3, 0.1, 0]])
    assert attn_word(np.stack([by_distance * n[0], by_distance * n[1]]), n) == pytest.approx(1)
    assert attn_word(np.stack([3 * by_distance * n[0], by_distance * n[1]]), n) == pytest.approx(3)
    assert np.isnan(attn_word(np.zeros((2, 1, 3)), np.zeros((2, 3))))


def test_word_share_of_a_run(analysis_run):
    from headwater.extractor.tokenizer import load_tokenizer

    run = analysis_run("packed")
    got = sinks(run)
    strings = [load_tokenizer(run.path / "tokenizer.json").token_strings(row) for row in run.tokens]
    row_start, pattern = run.plain("row_start"), run["pattern"][:].astype(np.float64)
    mass, n = np.zeros((2, *got.attn_word.shape, 24)), np.zeros((2, 24))
    for s, texts in enumerate(strings):
        for q in range(24):
            for k in range(row_start[s, q] + 1, q):
                joined = all(
                    texts[i][:1].isalnum() and texts[i - 1][-1:].isalnum()
                    for i in range(k + 1, q + 1)
                )
                mass[0 if joined else 1, :, :, q - k] += pattern[:, s, :, q, k]
                n[0 if joined else 1, q - k] += 1
    both = (n > 0).all(0) & (np.arange(24) <= 16)
    want = mass[0][..., both].sum(-1) / (mass[1][..., both] / n[1, both] * n[0, both]).sum(-1)
    assert n[0].sum() > 5
    np.testing.assert_allclose(got.attn_word, want, 1e-9)


def test_bad_requests_say_what_to_extract(analysis_run, tmp_path, oracle):
    with pytest.raises(ValueError, match="epsilon is 3"):
        sinks(analysis_run("plain"), epsilon=3)
    with pytest.raises(RunError, match="attn_word needs stored patterns"):
        sinks(analysis_run("plain"), words=True)
    with pytest.raises(ValueError, match="8 is out of range; there are 3 layers"):
        sinks(analysis_run("plain"), layers=[8])
    some = sinks(analysis_run("plain"), layers=[0, 2]).l_in
    assert np.isnan(some) and some.transition == "not all layers are there"
    run = make_run(tmp_path, oracle, np.zeros((1, 8)), lambda model: None, preset="residual")
    with pytest.raises(RunError, match=r"sinks need pattern or attn_entropy.*--preset statistics"):
        sinks(run)
