"""Toy heads with known orders: inversions, second favourites and withheld logits are found as the weights say."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import headwater
from headwater.analysis.measures.favourites import (
    Favourites,
    FavouritesAnalysis,
    favourites,
    preferences,
    transitivity,
)
from headwater.analysis.measures.favourites import _dataset as dataset_of
from headwater.analysis.measures.head_rows import kendall, rest_keys
from headwater.analysis.measures.heads import heads, inverted_pairs
from headwater.benchmarks.training import train_inverted_heads as toy
from headwater.extractor.model.weights import load_checkpoint

ORDERS = ((4.0, 3.0, 2.0, 1.0), (1.0, 2.0, 3.0, 4.0))


def hand_set(orders, strength=3.0):
    """Parameters of one toy whose heads score the signals by `orders`, noise below, and copy what they attend to."""
    zeros = torch.zeros(1, 2, 12)
    p = {name: zeros.clone() for name in ("w_q", "w_k", "w_v", "w_o")}
    p |= {name: torch.zeros(1, 2) for name in ("b_q", "b_k", "b_v")} | {"b_o": torch.zeros(1, 12)}
    p |= {"gamma": torch.ones(1, 12), "beta": torch.zeros(1, 12)}
    p["w_q"][:] = 0
    p["b_q"][:] = strength
    for head, order in enumerate(orders):
        p["w_k"][0, head, list(toy.SIGNALS)] = torch.tensor(order)
        p["w_v"][0, head, list(toy.SIGNALS)] = torch.tensor([2.0, 1.0, -1.0, -2.0])
        p["w_o"][0, head, list(toy.SIGNALS)] = torch.tensor([1.0, 0.5, -0.5, -1.0])
    return p


def extract(home, p, at, tokens):
    toy.save_model(home / "model", p, at)
    np.save(home / "ids.npy", tokens)
    config = headwater.RunConfig(
        model=str(home / "model"),
        tokens=str(home / "ids.npy"),
        out=str(home / "run"),
        sites=("pattern",),
        dtype="float32",
    )
    return headwater.extract(config)


@pytest.fixture(scope="module")
def inverted(tmp_path_factory):
    tokens, _ = toy.make_sequences(256, np.random.default_rng(1))
    return extract(tmp_path_factory.mktemp("toy"), hand_set(ORDERS), 0, tokens), tokens


def test_hand_set_opposite_orders_are_inverted(inverted):
    run, _ = inverted
    got = heads(run, queries=[toy.LENGTH - 1], n_sequences=256)
    assert inverted_pairs(got) == [(0, 0, 1)] and got.tau[0, 0, 1] < -0.4 and got.q[0, 0, 1] < 1e-6
    assert got.attrs["arguments"].count("[11]") == 1
    with pytest.raises(ValueError, match=r"queries are \[12\]; expected positions from 1 to 11"):
        heads(run, queries=[12])


def test_favourites_are_the_order_and_withhold_their_logit(inverted):
    run, tokens = inverted
    got = favourites(run, queries=[toy.LENGTH - 1], n_sequences=256, tokens=toy.SIGNALS, min_rows=4)
    assert got.favourite[0].values.tolist() == [[1, 2, 3, 4], [4, 3, 2, 1]]
    np.testing.assert_array_equal(got.second_absent, 1)
    np.testing.assert_array_equal(got.second_present, 0)
    np.testing.assert_array_equal(got.transitivity, 1)
    assert got.triples.values.tolist() == [[4, 4]]
    assert (got.second_effect_p == 1 / 400).all() and got.second_effect_null < 0.9
    np.testing.assert_array_equal(got.second_error, 0)
    pattern = run["pattern"][0, :, 0, -1].astype(np.float64)[:, 1:-1]
    keys = tokens[:, 1:-1]
    mass = (pattern * (keys == 2)).sum(1)
    has1, has2 = (keys == 1).any(1), (keys == 2).any(1)
    withheld = mass[has2 & ~has1].mean() - mass[has2 & has1].mean()
    np.testing.assert_allclose(got.withheld_mass[0, 0], withheld, 1e-5)
    table = toy.normalised_one_hot().double().numpy()
    v = table[2, 1:5] @ np.array([2.0, 1, -1, -2])
    logits = np.zeros(12)
    logits[1:5] = v * np.array([1.0, 0.5, -0.5, -1.0])
    np.testing.assert_allclose(got.ov_own[0, 0], logits[2] - logits.mean(), 1e-5)
    np.testing.assert_allclose(got.withheld_own[0, 0], withheld * (logits[2] - logits.mean()), 1e-5)
    assert got.ov_top_token[0, 0] == 1


def test_the_analysis_agrees_with_the_weights_of_any_toy(tmp_path):
    """Of toys that are hardly trained, mean τ is that of the scores which the weights give the keys."""
    p, losses = toy.train([0, 1], steps=2, batch=8)
    assert losses.shape == (2,) and np.isfinite(losses).all()
    tokens, pairs = toy.make_sequences(64, np.random.default_rng(2))
    table = toy.normalised_one_hot()
    for at in range(2):
        query = p["w_q"][at] @ table[0] + p["b_q"][at]
        scores = (query[:, None] * (p["w_k"][at] @ table.T + p["b_k"][at][:, None])).numpy()[
            :, tokens
        ]
        rows = [
            kendall(*(scores[h : h + 1, s, rest_keys(0, 11, 128)] for h in (0, 1)))[0, 0]
            for s in range(64)
        ]
        run = extract(tmp_path / str(at), p, at, tokens)
        got = heads(run, queries=[11], n_sequences=64)
        np.testing.assert_allclose(got.tau[0, 0, 1], np.mean(rows), atol=0.02)
        known = np.sign(toy.signal_orders(p, at)[:, :, None] - toy.signal_orders(p, at)[:, None])
        found = (
            favourites(run, queries=[11], n_sequences=64, tokens=toy.SIGNALS, min_rows=1)
            .favourite[0]
            .values
            - 1
        )
        for head in (0, 1):
            np.testing.assert_array_equal(found[head], np.argsort(-toy.signal_orders(p, at)[head]))
        assert known.shape == (2, 4, 4)
    assert all({a, b} <= set(row) for row, (a, b) in zip(tokens, pairs, strict=True))
    assert (
        (tokens[:, -1] == 0).all() and not (tokens[:, :-1] == 0).any() and (tokens[:, 0] >= 5).all()
    )


@pytest.mark.slow
def test_random_attention_is_as_transitive_as_its_null(tmp_path, oracle):
    """Heads without preferences look transitive: what is there more often is attended to more often."""
    model = oracle.gpt2(n_layer=4, n_head=4, n_embd=16, n_positions=24, vocab_size=20)
    model.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 21)
    tokens = rng.choice(20, (160, 24), p=share / share.sum()).astype(np.int32)
    np.save(tmp_path / "ids.npy", tokens)
    config = headwater.RunConfig(
        model=str(tmp_path / "model"),
        tokens=str(tmp_path / "ids.npy"),
        out=str(tmp_path / "run"),
        sites=("pattern",),
        dtype="float32",
    )
    run = headwater.extract(config)
    reducer = Favourites(run, range(4), 160, np.arange(3, 24, 2), np.arange(12))
    state = reducer.zero()
    noise = rng.gumbel(size=(160, 4, 4, 24, 24))  # the largest of equal keys is any of them
    for sequence, layer in np.ndindex(160, 4):
        chunk = SimpleNamespace(
            first=sequence,
            lead=layer,
            row_start_ST=np.zeros((1, 24), np.int32),
            tokens_ST=tokens[sequence : sequence + 1],
        )
        rows = noise[sequence, layer][None]
        reducer.update(state, Chunked(chunk, np.exp(rows - rows.max())))
    analysis = FavouritesAnalysis(tokens=range(12)).prepare(run)
    checkpoint = load_checkpoint(str(tmp_path / "model"))
    got = dataset_of(run, range(4), range(4), state, np.arange(12), checkpoint, 20, analysis)
    assert (
        got.transitivity_null > 0.75 and abs(got.transitivity.mean() - got.transitivity_null) < 0.1
    )
    assert (got.transitivity_p <= 0.05).mean() <= 0.2 and (
        got.second_effect_p <= 0.05
    ).mean() <= 0.2
    by_rows = np.sqrt(0.25 / state["rows"].sum(0).max())
    assert np.isfinite(got.second_error).all() and got.second_error.median() > by_rows / 4


class Chunked:
    """A chunk whose pattern is given."""

    def __init__(self, chunk, pattern):
        self.__dict__ |= vars(chunk) | {"pattern": pattern}

    def __getitem__(self, site):
        return self.pattern


def test_preferences_and_cycles():
    both, rows = np.array([[0, 9, 1], [2, 0, 8], [7, 3, 0]]), np.full((3, 3), 12)
    prefer = preferences(both, rows, 10)
    assert prefer.tolist() == [[0, -1, 1], [1, 0, -1], [-1, 1, 0]]
    assert transitivity(prefer) == (0.0, 3)
    assert np.isnan(transitivity(preferences(both, rows, 13))[0])


def test_text_runs_have_candidates_and_strings(tiny_gpt2, analysis_run):
    run = analysis_run("packed")
    got = favourites(run, n_sequences=100, n_queries=20, min_rows=1)
    assert got.sizes["rank"] == min(32, len(np.unique(run.tokens[run.tokens >= 0])))
    assert got.favourite_text.shape == got.favourite.shape
    with pytest.raises(ValueError, match="expected two or more ids"):
        favourites(run, tokens=[3])
    with pytest.raises(ValueError, match="9 is out of range"):
        favourites(run, layers=[9])
