"""Coherent directions: NPMI by its definition, planted topics found, frequency alone not, the transition."""

import math
import os
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray

from headwater.analysis.weights.chance import (
    spearman,
    spearman_within,
    step_beyond_line,
    thirds,
    wilson,
)
from headwater.analysis.weights.coherence import (
    KINDS,
    Settings,
    coherence,
    coherence_of,
    score_sets,
    shown,
)
from headwater.analysis.weights.corpora import open_corpus
from headwater.analysis.weights.npmi import count_pairs, join_pieces
from headwater.analysis.weights.token_classes import CLASSES, classify

PER_TOPIC, FREQUENT, V, D = 20, 400, 600, 64  # topics of 20 tokens, then 200 frequent tokens


def by_hand(pieces, i, j, window):
    """NPMI from windows held as sets."""
    windows = [
        set(p[a : a + window])
        for p in pieces
        for a in range(max(len(p) - window + 1, min(len(p), 1)))
    ]
    n, both = len(windows), sum({i, j} <= w for w in windows)
    single = [sum(t in w for w in windows) for t in (i, j)]
    if both in (0, n):
        return -1.0 if both == 0 else 1.0
    return math.log(both * n / single[0] / single[1]) / -math.log(both / n)


def test_npmi_is_its_definition_where_chance_would_give_five_windows():
    rng = np.random.default_rng(0)
    pieces = [rng.integers(0, 12, n).astype(np.int32) for n in (400, 3, 0, 1, 11, 10)]
    table = count_pairs(join_pieces("x", pieces), 15, 5)
    assert (
        sorted(table.single[table.token].tolist(), reverse=True)
        == table.single[table.token].tolist()
    )
    for i, j in combinations(range(12), 2):
        got = table.npmi[table.rank[i], table.rank[j]]
        expected = table.single[i] * table.single[j] / table.n_windows
        want = by_hand([p.tolist() for p in pieces], i, j, 5)
        assert np.isnan(got) if expected < 5 else got == pytest.approx(want, 1e-5), (i, j)
    lists = [[1, 2] * 40, [3, 4] * 40]
    apart = count_pairs(join_pieces("x", [np.array(one) for one in lists]), 6, 2)
    one, two, three = (apart.rank[token] for token in (1, 2, 3))
    assert apart.npmi[one, two] > 0.99 and apart.npmi[one, three] == -1
    assert np.isnan(apart.coherence(apart.rank[np.array([0, 5, 1, 2])]))  # one pair of six counts


def test_matched_sets_are_as_frequent_and_stay_inside_the_vocabulary():
    counts = np.sort(np.random.default_rng(1).zipf(1.3, 400))[::-1].clip(max=2000)
    pieces = [np.repeat(np.arange(400), counts)]
    table = count_pairs(join_pieces("x", pieces), 400, 2)
    ranks = np.array([0, 3, 30, 100, 200, 397, 399])
    drawn = table.matched(ranks, 4000, np.random.default_rng(0))
    assert (np.abs(drawn - ranks).max(0) == [0, 3, 30, 60, 60, 2, 0]).all()
    np.testing.assert_allclose(drawn.mean(0), ranks, atol=2)


def test_intervals_and_permutations_have_known_values():
    low, high = wilson(np.array([15, 0]), 30)
    np.testing.assert_allclose(
        [low[0], high[0], low[1], high[1]], [0.3315, 0.6685, 0, 0.1135], atol=1e-4
    )
    np.testing.assert_allclose(spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])), 0.8)
    a = np.random.default_rng(0).normal(size=(4, 8))
    by_row, mean, p = spearman_within(a, -a, 500)
    assert mean == pytest.approx(-1) and (by_row < -0.99).all() and p == pytest.approx(1 / 501)
    assert spearman_within(a, np.random.default_rng(5).normal(size=(4, 8)), 500)[2] > 0.05
    assert np.isnan(spearman_within(a, np.ones((4, 8)), 10)[1:]).all()
    rise, dip = thirds(np.array([0.0, 0, 1, 1, 0.5, 0.5]))
    assert (rise, dip) == (1, 0.5) and np.isnan(thirds(np.zeros(2))[0])


def test_a_step_is_told_from_a_trend():
    """A planted step is found, a noisy trend is not taken for one, and the least p that there can be is said."""
    rng = np.random.default_rng(0)

    def p_values(make, n_layer, n):
        return np.array([step_beyond_line(make(n_layer), n_layer // 2, 500).p for _ in range(n)])

    def trend(n_layer):
        return np.linspace(0.05, 0.5, n_layer) + 0.05 * rng.normal(size=n_layer)

    def step(n_layer):
        return np.where(np.arange(n_layer) < n_layer // 2, 0.1, 0.4) + 0.04 * rng.normal(
            size=n_layer
        )

    for n_layer in (8, 12):
        assert (p_values(trend, n_layer, 300) <= 0.05).mean() <= 0.06 + 2 * 0.0137
        assert (p_values(step, n_layer, 40) <= 0.05).mean() >= 0.8
    found = step_beyond_line([0, 0, 0, 1, 1, 1], 3)
    assert (found.before, found.after, found.least_p) == (0, 1, 1 / 720)
    assert 0 < found.by_line < 1 and found.beyond_line > 0 and found.p >= found.least_p
    assert step_beyond_line(np.arange(8.0), 4).p == 1
    for values, at in (([0, 0, 1, 1, 1], 2), (np.arange(8.0), 0), ([*range(7), np.nan], 4)):
        assert np.isnan(step_beyond_line(values, at).p)


GROUPS = (
    "integer integers float floating point complex number numbers imaginary literal",
    "open file files read write close stream buffer mode",
    "while for loop break continue else suite iteration",
    "exception raise raised try except finally handler traceback error",
    "class classes inheritance base bases metaclass instance instances attribute",
    "function call arguments argument parameter parameters keyword positional default",
    "string strings bytes literal literals quotes escape unicode characters",
    "list lists tuple tuples dictionary dictionaries set sets sequence sequences mapping",
    "import module modules package packages name path",
    "scope global local nonlocal block names binding namespace variables",
)


def test_groups_by_hand_beat_sets_as_frequent_on_prose_and_frequent_tokens_do_not():
    from pydoc_data.topics import topics

    sources = [
        path.read_text(errors="replace") for path in sorted(Path(os.__file__).parent.glob("*.py"))
    ]
    texts = [
        *topics.values(),
        *(doc for text in sources for doc in re.findall('"""(.*?)"""', text, re.S)),
    ]
    words = [re.findall(r"[a-z]+", text.lower()) for text in texts]
    number = {word: i for i, word in enumerate(sorted({w for text in words for w in text}))}
    pieces = [np.array([number[w] for w in text], np.int32) for text in words]
    table = count_pairs(join_pieces("prose", pieces), len(number))
    for group in GROUPS:
        ids = np.array([number[word] for word in group.split()])
        got = score_sets(table, np.stack([ids, ids]))
        assert got.coherent == 1 and got.z > 2, (group, got)
    rng = np.random.default_rng(1)
    frequent = [table.token[rng.permutation(200)[:20]] for _ in range(200)]
    got = score_sets(table, np.reshape(frequent, (2, 100, 20)))
    assert np.isfinite(got.z).all() and got.coherent.mean() <= 0.03 and abs(got.z.mean()) < 1


@pytest.fixture(scope="module")
def planted(oracle):
    """A random GPT-2 whose first W_out writes 15 rare topics and 15 groups of frequent tokens, and a text with both."""
    rng, draw = torch.Generator().manual_seed(0), np.random.default_rng(0)
    model = oracle.gpt2(n_layer=6, n_head=2, n_embd=D, vocab_size=V, tie_word_embeddings=False)
    written = torch.linalg.qr(torch.randn(D, 30, generator=rng))[0].T
    unembedding = torch.randn(V, D, generator=rng)
    for k in range(15):
        unembedding[k * PER_TOPIC : (k + 1) * PER_TOPIC] += 4 * written[k]
        unembedding[draw.choice(np.arange(FREQUENT, V), 20, replace=False)] += 4 * written[15 + k]
    left = torch.linalg.qr(torch.randn(4 * D, 30, generator=rng))[0]
    with torch.no_grad():
        model.lm_head.weight.copy_(unembedding)
        model.transformer.h[0].mlp.c_proj.weight.copy_(
            left @ (torch.linspace(9, 5, 30)[:, None] * written)
        )
        for block in model.transformer.h[1:]:
            block.mlp.c_proj.weight.normal_(generator=rng)
    pieces = []
    for _ in range(2000):
        topic = draw.integers(0, PER_TOPIC, 40) + PER_TOPIC * draw.integers(
            0, FREQUENT // PER_TOPIC
        )
        common = draw.integers(FREQUENT, V, 40)
        pieces.append(np.where(draw.random(40) < 0.6, topic, common))
    return oracle.checkpoint(model), join_pieces("topics", pieces)


def test_planted_topics_are_half_and_frequent_tokens_without_a_topic_are_chance(planted):
    checkpoint, corpus = planted
    share = np.repeat([[0.1], [0.1], [0.1], [0.6], [0.6], [0.6]], 2, 1) + np.arange(2) / 100
    share = xarray.DataArray(
        share[None], dims=("query_set", "layer", "head"), coords={"query_set": ["second_half"]}
    )
    origin = {"model_digest": "", "run": "r", "model": "m"}
    sinks = xarray.Dataset({"first_token_share": share, "l_in": 3.0}, attrs=origin)
    few = Settings(n_sets=200, n_bootstrap=50, n_random=100)
    got = coherence_of(checkpoint, corpus, sinks, few)
    fraction = got.coherent_fraction.sel(kind="w_out")
    assert 13 / 30 <= fraction[0] <= 17 / 30, fraction
    assert np.abs(fraction[1:].mean() - got.random_fraction.sel(through="W_U")) < 0.1
    which = [line.split()[1] for line in shown(got, "w_out", 30)]
    assert sum(int(rank[:-1]) < 15 for rank in which if rank) >= 13
    first = got.sel(kind="w_out", layer=0)
    assert first.coherent_low < 0.5 < first.coherent_high and first.n_scored == 30
    assert (got.w_out_coherent[0] == (got.w_out_percentile[0] > 0.99)).all()
    assert 1 < first.mean_log_count < 10
    through_embedding = ["ov_read", "qk_key", "w_in_raw"]
    assert got.coherent_fraction.mean("layer").sel(kind=through_embedding).max() < 0.04
    assert got.random_fraction.sel(through="W_E") < 0.04
    one = got.sel(kind="w_out")
    np.testing.assert_allclose(one.difference, fraction[3:].mean() - fraction[:3].mean())
    assert one.least_p == 1 / 720 <= one.difference_p and got.l_in == 3
    assert one.rise < 0 and got.share_coherence.sizes == {"measure": 2, "head_kind": 4, "layer": 6}
    assert "class_share" not in got
    best = shown(got, "w_out", 3, 4)
    assert len(best) == 3 and best[0].startswith("L0 ") and "z " in best[0]
    again = coherence_of(checkpoint, corpus, sinks, few)
    assert got.identical(again)
    with pytest.raises(
        ValueError, match=r"the sinks are those of m with \[layer, head\] \[6, 2\]; expected"
    ):
        coherence_of(checkpoint, corpus, sinks.assign_attrs(model_digest="other"))


def test_a_run_or_a_text_is_the_corpus(tiny_gpt2, analysis_run, tiny_text):
    few = Settings(n_directions=4, n_top=5, n_sets=200, n_bootstrap=20, n_random=20)
    run = analysis_run("packed")
    got = coherence(str(tiny_gpt2), run, settings=few)
    assert coherence(str(tiny_gpt2), run.path, settings=few).identical(got)
    tokens = run.tokens[run.plain("row_start") <= np.arange(run.manifest.n_positions)]
    from headwater.extractor.model.weights import load_checkpoint

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
    strings = [
        " the",
        " The",
        " NATO",
        "ing",
        " 42",
        "...",
        " (",
        "\n\n",
        "<|endoftext|>",
        "\ufffd",
        "a1",
        " über",
    ]
    names = [CLASSES[i] for i in classify(strings)]
    assert names == [
        "word",
        "Word",
        "WORD",
        "piece",
        "number",
        "punctuation",
        "punctuation",
        "space",
        "other",
        "other",
        "other",
        "word",
    ]


def test_the_table_of_planted_truths_is_printed():
    from headwater.benchmarks.bench_truth import Line, simulate, table

    lines = simulate(60)
    planted = [line for line in lines if line.level is None]
    assert len(planted) >= 6 and all(line.found >= 0.8 * line.n for line in planted)
    nulls = [line for line in lines if line.level is not None]
    assert len(nulls) > 20 and sum(line.found for line in nulls) <= 0.06 * 60 * len(nulls)
    assert table(lines).count("\n") == len(lines) + 1
    assert Line("m", "c", 500, 60, 0.05).verdict == "fails"
    assert Line("m", "c", 500, 30, 0.05).verdict == "holds"
