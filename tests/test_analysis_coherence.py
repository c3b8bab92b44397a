"""Coherent directions: NPMI by its definition, planted directions found, chance at its rate, the transition."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
import xarray

from headwater.analysis.chance import circular_shift_p, ranks, spearman, spearman_within, thirds, wilson
from headwater.analysis.coherence import KINDS, Settings, coherence, coherence_of
from headwater.analysis.corpora import open_corpus
from headwater.analysis.npmi import count_windows, join_pieces, pair_keys
from headwater.analysis.token_classes import CLASSES, classify

N_TOPICS, PER_TOPIC, V, D = 20, 20, 600, 64


def by_hand(pieces, i, j, window):
    """NPMI from windows held as sets."""
    windows = [set(p[a : a + window]) for p in pieces for a in range(max(len(p) - window + 1, min(len(p), 1)))]
    n, both = len(windows), sum({i, j} <= w for w in windows)
    single = [sum(t in w for w in windows) for t in (i, j)]
    if both in (0, n):
        return -1.0 if both == 0 else 1.0
    return math.log(both * n / single[0] / single[1]) / -math.log(both / n)


def test_npmi_is_its_definition():
    rng = np.random.default_rng(0)
    pieces = [rng.integers(0, 12, n).astype(np.int32) for n in (40, 3, 0, 1, 11, 10)]
    keys = pair_keys(np.arange(14), 15)
    counts = count_windows(join_pieces("x", pieces), keys, 15, 5)
    want = [by_hand([p.tolist() for p in pieces], i, j, 5) for i, j in combinations(range(14), 2)]
    np.testing.assert_allclose(counts.npmi(keys), want, 1e-12)
    assert -1.0 in want and max(want) > 0
    together = count_windows(join_pieces("x", [np.array([1, 2, 1, 2, 1])]), pair_keys(np.arange(3), 3), 3, 2)
    assert together.npmi(pair_keys(np.array([1, 2]), 3)) == 1


def test_intervals_and_permutations_have_known_values():
    low, high = wilson(np.array([15, 0]), 30)
    np.testing.assert_allclose([low[0], high[0], low[1], high[1]], [0.3315, 0.6685, 0, 0.1135], atol=1e-4)
    assert circular_shift_p([0, 0, 0, 1, 1, 1], 3) == pytest.approx(2 / 6)
    assert circular_shift_p([0.0] * 6, 3) == 1
    assert ranks(np.array([3.0, 1, 3, 7])).tolist() == [2.5, 1, 2.5, 4]
    np.testing.assert_allclose(spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])), 0.8)
    a = np.random.default_rng(0).normal(size=(4, 8))
    by_row, mean, p = spearman_within(a, -a, 500)
    assert mean == pytest.approx(-1) and (by_row < -0.99).all() and p == pytest.approx(1 / 501)
    assert spearman_within(a, np.random.default_rng(5).normal(size=(4, 8)), 500)[2] > 0.05
    assert np.isnan(spearman_within(a, np.ones((4, 8)), 10)[1:]).all()
    rise, dip = thirds(np.array([0.0, 0, 1, 1, 0.5, 0.5]))
    assert (rise, dip) == (1, 0.5) and np.isnan(thirds(np.zeros(2))[0])


@pytest.fixture(scope="module")
def planted(oracle):
    """A random GPT-2 whose first W_out writes 15 topics and 15 random directions, and a text about these topics."""
    rng = torch.Generator().manual_seed(0)
    model = oracle.gpt2(n_layer=6, n_head=4, n_embd=D, vocab_size=V, tie_word_embeddings=False)
    topics = torch.linalg.qr(torch.randn(D, D, generator=rng))[0]
    unembedding = torch.randn(V, D, generator=rng)
    for k in range(N_TOPICS):
        unembedding[k * PER_TOPIC : (k + 1) * PER_TOPIC] += 5 * topics[k]
    others = torch.randn(D - 15, 15, generator=rng).T @ topics[15:]
    written = torch.cat([topics[:15], torch.linalg.qr(others.T)[0].T])
    left = torch.linalg.qr(torch.randn(4 * D, 30, generator=rng))[0]
    with torch.no_grad():
        model.lm_head.weight.copy_(unembedding)
        model.transformer.h[0].mlp.c_proj.weight.copy_(left @ (torch.linspace(9, 5, 30)[:, None] * written))
        for block in model.transformer.h[1:]:
            block.mlp.c_proj.weight.normal_(generator=rng)
    draw = np.random.default_rng(0)
    pieces = [draw.integers(0, PER_TOPIC, 40) + PER_TOPIC * draw.integers(0, N_TOPICS) for _ in range(800)]
    pieces += [draw.integers(0, V, 40) for _ in range(400)]
    return oracle.checkpoint(model), join_pieces("topics", pieces)


def test_planted_directions_are_half_and_gaussian_ones_are_chance(planted):
    checkpoint, corpus = planted
    share = np.repeat([[0.1], [0.1], [0.1], [0.6], [0.6], [0.6]], 4, 1) + np.arange(4) / 100
    share = xarray.DataArray(share[None], dims=("query_set", "layer", "head"), coords={"query_set": ["second_half"]})
    origin = {"model_digest": "", "run": "r", "model": "m"}
    sinks = xarray.Dataset({"first_token_share": share, "l_in": 3}, attrs=origin)
    got = coherence_of(checkpoint, corpus, sinks)
    fraction = got.coherent_fraction.sel(kind="w_out")
    assert 13 / 30 <= fraction[0] <= 17 / 30
    assert fraction[1:].mean() <= 0.04
    assert got.coherent_low.sel(kind="w_out", layer=0) < 0.5 < got.coherent_high.sel(kind="w_out", layer=0)
    assert (got.null_score > got.threshold).mean("random").values.tolist() == [0.01, 0.01]
    assert got.coherent_fraction.mean("layer").sel(kind=["ov_read", "ov_write", "qk_key", "w_in_raw"]).max() < 0.04
    one = got.sel(kind="w_out")
    np.testing.assert_allclose(one.difference, fraction[3:].mean() - fraction[:3].mean())
    assert one.difference_p >= 1 / 6 and got.l_in == 3
    assert got.rise.sel(kind="w_out") < 0 and got.share_coherence.sizes == {"measure": 2, "head_kind": 4, "layer": 6}
    assert "class_share" not in got
    again = coherence_of(checkpoint, corpus, sinks)
    assert got.identical(again)
    with pytest.raises(ValueError, match=r"the sinks are those of m with \[layer, head\] \[6, 4\]; expected"):
        coherence_of(checkpoint, corpus, sinks.assign_attrs(model_digest="other"))


def test_a_run_or_a_text_is_the_corpus(tiny_gpt2, analysis_run, tiny_text):
    few = Settings(n_directions=4, n_top=5, n_random=40, n_bootstrap=20)
    run = analysis_run("packed")
    got = coherence(str(tiny_gpt2), run, settings=few)
    assert coherence(str(tiny_gpt2), run.path, settings=few).identical(got)
    tokens = run.tokens[run.plain("row_start") <= np.arange(run.manifest.n_positions)]
    from headwater.extractor.weights import load_checkpoint

    np.testing.assert_array_equal(open_corpus(run, load_checkpoint(str(tiny_gpt2))).tokens, tokens)
    np.testing.assert_allclose(got.class_share.sum("token_class"), 1)
    assert got.kind.values.tolist() == list(KINDS) and np.isnan(got.difference).all()
    text = coherence(str(tiny_gpt2), str(tiny_text), settings=few, max_tokens=100)
    assert '"corpus_tokens": 100' in text.attrs["arguments"]
    with pytest.raises(ValueError, match="has no tokenizer"):
        coherence(str(analysis_run("plain").path.parent / "model"), str(tiny_text), settings=few)
    with pytest.raises(ValueError, match="made with another vocabulary"):
        coherence(str(tiny_gpt2), analysis_run("plain"), settings=few)
    with pytest.raises(ValueError, match="n_top is 1; expected at least 2"):
        Settings(n_top=1)


def test_token_classes():
    strings = [" the", " The", " NATO", "ing", " 42", "...", " (", "\n\n", "<|endoftext|>", "\ufffd", "a1", " über"]
    names = [CLASSES[i] for i in classify(strings)]
    assert names == ["word", "Word", "WORD", "piece", "number", "punctuation", "punctuation", "space", "other", "other",
                     "other", "word"]  # fmt: skip
