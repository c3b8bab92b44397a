"""Every site of the forward pass against transformers in float64: configurations, layouts, selections, precisions."""

import math

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import headwater
from headwater.extractor.model.activations import ACTIVATIONS, SMOOTH
from headwater.extractor.model.batch import make_batch
from headwater.extractor.model.forward import Model, _next_token_loss
from headwater.extractor.model.tap import NoTap
from headwater.extractor.sites import SITES

LAYOUTS = ("unpadded", "left", "right", "documents")
SWITCHES = st.fixed_dictionaries(
    {
        "n_layer": st.integers(1, 3),
        "n_inner": st.sampled_from([None, 1, 23]),
        "activation_function": st.sampled_from(sorted(ACTIVATIONS)),
        "scale_attn_weights": st.booleans(),
        "scale_attn_by_inverse_layer_idx": st.booleans(),
        "reorder_and_upcast_attn": st.booleans(),
        "layer_norm_epsilon": st.sampled_from([1e-5, 1e-2]),
        "tie_word_embeddings": st.booleans(),
    }
)


def test_every_activation_has_its_function():
    assert sorted(ACTIVATIONS) == sorted(SMOOTH)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_those_of_transformers(oracle, name):
    model = oracle.gpt2(activation_function=name, n_inner=300)
    tokens, row_start = oracle.rows(2, 16, "unpadded")
    _, got = oracle.capture(model, tokens, row_start, "fp64", wide=True)
    oracle.assert_sites(got, oracle.reference(model, tokens, row_start), atol=1e-11, rtol=1e-11)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    switches=SWITCHES,
    n_head=st.integers(1, 5),
    d_head=st.integers(3, 17),
    length=st.integers(1, 70),
    n=st.integers(1, 3),
    layout=st.sampled_from(LAYOUTS),
    compute=st.sampled_from(["fp32", "fp64"]),
    seed=st.integers(0, 99),
)
def test_every_site_agrees_with_transformers(
    oracle, switches, n_head, d_head, length, n, layout, compute, seed
):
    model = oracle.gpt2(seed, n_head=n_head, n_embd=n_head * d_head, n_positions=length, **switches)
    tokens, row_start = oracle.rows(n, length, layout, seed)
    _, got = oracle.capture(model, tokens, row_start, compute, wide=compute == "fp64")
    assert got.keys() == SITES.keys()
    tolerance = {"atol": 1e-4, "rtol": 1e-3} if compute == "fp32" else {"atol": 1e-9, "rtol": 1e-9}
    oracle.assert_sites(got, oracle.reference(model, tokens, row_start), **tolerance)


@pytest.mark.parametrize("compute, limit", [("bf16", 3e-2), ("fp16", 4e-3)])
def test_narrow_types_stay_close(oracle, compute, limit):
    model = oracle.gpt2(n_embd=96, n_head=4, n_layer=3, n_inner=1000)
    tokens, row_start = oracle.rows(3, 64, "documents")
    _, got = oracle.capture(model, tokens, row_start, compute)
    want = oracle.reference(model, tokens, row_start)
    for name, value in got.items():
        real = np.isfinite(want[name])
        np.testing.assert_array_equal(np.isnan(value), ~real, name)
        if not SITES[name].integer:
            error = np.linalg.norm((value - want[name])[real]) / np.linalg.norm(want[name][real])
            assert error < limit, name
    np.testing.assert_allclose(got["resid"][0], want["resid"][0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_site_asked_for_alone_is_the_same(oracle, layout):
    model = oracle.gpt2(n_head=3, n_embd=21)
    tokens, row_start = oracle.rows(2, 37, layout)
    want = oracle.reference(model, tokens, row_start)
    for name in SITES:
        _, got = oracle.capture(model, tokens, row_start, sites=(name,))
        assert list(got) == [name]
        oracle.assert_sites(got, want)


@pytest.mark.parametrize("within", [False, True])
def test_packed_text_on_disk(oracle, tiny_gpt2, tmp_path, within):
    """Documents that are kept apart are as each of them alone, those that are not as one text."""
    from transformers import GPT2LMHeadModel

    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(
            " ".join(["fox", "dog", "the lazy"][: 1 + i % 3] * (i + 1))
        )
    run = headwater.extract(
        headwater.RunConfig(
            out=tmp_path / "run",
            model=str(tiny_gpt2),
            text=(str(tmp_path / "*.txt"),),
            preset="all",
            dtype="float32",
            seq_len=21,
            within_documents=within,
            bos=within,
            top_k=oracle.top_k,
        )
    )
    row_start = run.plain("row_start")
    assert (len(np.unique(row_start[0])) > 1) == within
    model = GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval()
    oracle.assert_sites(
        {name: run[name][...] for name in run.sites}, oracle.reference(model, run.tokens, row_start)
    )


def subsets(size):
    return st.sets(st.integers(0, size - 1), min_size=1).map(sorted)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    layers=subsets(3),
    depths=subsets(4),
    heads=subsets(4),
    layout=st.sampled_from(LAYOUTS),
    positions=st.one_of(st.none(), st.just("last"), subsets(19)),
)
def test_selections_pick_out_of_the_whole(oracle, layers, depths, heads, layout, positions):
    model = oracle.gpt2(n_layer=3, n_head=4)
    tokens, row_start = oracle.rows(3, 19, layout)
    chosen = {"layer": layers, "depth": depths, "head": heads}
    named = {f"{dim}s": ",".join(map(str, indices)) for dim, indices in chosen.items()}
    text = positions if positions in (None, "last") else ",".join(map(str, positions))
    plan, got = oracle.capture(model, tokens, row_start, positions=text, **named)
    want = oracle.reference(model, tokens, row_start)
    all_logits = want["logits"]
    last = np.array([np.flatnonzero(row >= 0)[-1] for row in tokens])
    for spec in plan.arrays:
        value = want[spec.name]
        for axis, dim in enumerate(spec.dims):
            if dim == "selected_position":
                index = (
                    last[:, None] if positions == "last" else np.tile(positions, (len(tokens), 1))
                )
                index = index.reshape(
                    *[1] * (axis - 1), *index.shape, *[1] * (value.ndim - axis - 1)
                )
                value = np.take_along_axis(value, index, axis)
            elif dim in chosen:
                value = value.take(chosen[dim], axis)
        want[spec.name] = value
    np.testing.assert_allclose(got.pop("logits"), want["logits"], 1e-3, 1e-4)
    want["logits"] = all_logits  # among which the largest were chosen
    for name in ("attn_argmax", "resid_argmax"):
        np.testing.assert_array_equal(got.pop(name), want[name])
    oracle.assert_sites(got, want)


@pytest.mark.parametrize(
    "length, layout", [(250, "left"), (300, "right"), (512, "left"), (520, "documents")]
)
def test_long_rows_in_tiles(oracle, length, layout):
    model = oracle.gpt2(n_layer=1, n_positions=length)
    tokens, row_start = oracle.rows(2, length, layout)
    _, got = oracle.capture(model, tokens, row_start)
    oracle.assert_sites(got, oracle.reference(model, tokens, row_start))


@pytest.mark.parametrize("length, layout", [(40, "left"), (300, "right"), (520, "left")])
def test_a_run_on_disk_holds_what_memory_holds(oracle, tmp_path, length, layout):
    model = oracle.gpt2(n_positions=length, n_head=3, n_embd=12)
    model.save_pretrained(tmp_path / "model")
    tokens, row_start = oracle.rows(5, length, layout)
    np.save(tmp_path / "ids.npy", tokens)
    run = headwater.extract(
        headwater.RunConfig(
            out=str(tmp_path / "run"),
            model=str(tmp_path / "model"),
            tokens=str(tmp_path / "ids.npy"),
            sites=tuple(SITES),
            dtype="float32",
            block=2,
            top_k=oracle.top_k,
            codec="pattern=zstd-1",
        )
    )
    assert run.complete.all()
    plan, want = oracle.capture(model, tokens, row_start)
    root = zarr.open_group(run.path, mode="r")
    for spec in plan.arrays:
        np.testing.assert_array_equal(run[spec.name][...], want[spec.name], spec.name)
        np.testing.assert_array_equal(root[spec.name][...], want[spec.name], spec.name)
        assert root[spec.name].metadata.dimension_names == spec.dims


@pytest.mark.parametrize(
    "selection",
    [
        {"sites": "q,attn_entropy", "layers": "0"},
        {"sites": "mlp_out", "layers": "1"},
        {"sites": "resid", "depths": "0"},
        {"sites": "resid,z", "depths": "2", "layers": "0", "heads": "2,0", "positions": "last"},
        {"sites": "resid_cosine,pattern", "depths": "1", "layers": "1", "heads": "1"},
        {"sites": "loss"},
    ],
)
def test_a_run_of_a_few_layers(oracle, tmp_path, selection):
    """Layers behind the last one that is asked for are not computed."""
    model = oracle.gpt2(n_layer=3, n_head=3, n_embd=12)
    model.save_pretrained(tmp_path / "model")
    tokens, row_start = oracle.rows(3, 20, "left")
    np.save(tmp_path / "ids.npy", tokens)
    run = headwater.extract(
        headwater.RunConfig(
            out=tmp_path / "run",
            model=str(tmp_path / "model"),
            tokens=str(tmp_path / "ids.npy"),
            dtype="float32",
            block=2,
            **selection,
        )
    )
    plan, want = oracle.capture(model, tokens, row_start, **selection)
    assert run.sites == tuple(spec.name for spec in plan.arrays)
    for spec in plan.arrays:
        np.testing.assert_array_equal(run[spec.name][...], want[spec.name], spec.name)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_logits_are_held_a_few_rows_at_a_time(oracle, monkeypatch, compute):
    checkpoint = oracle.checkpoint(oracle.gpt2(vocab_size=20_000, n_positions=608))
    tokens, row_start = oracle.rows(2, 601, "documents")
    batch, sites = make_batch(tokens, row_start), ("loss", "top_logits", "top_tokens")

    def outputs():
        model, tap = Model(checkpoint, compute), Outputs(sites)
        model.run(batch, tap)
        return tap.values, model.workspace.nbytes

    whole, most = outputs()
    monkeypatch.setattr(headwater.extractor.model.batch, "LOGIT_BYTES", 1)
    parts, least = outputs()
    assert least < most / 2
    for site in sites:
        np.testing.assert_array_equal(parts[site], whole[site])


def test_the_loss_is_that_of_all_logits_at_once():
    logits = torch.randn(70, 30_000) * 5
    logits[3, 7], logits[4] = math.inf, -math.inf
    targets = torch.arange(-1, 69)
    want = torch.logsumexp(logits, 1) - logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    got = _next_token_loss(logits.clone(), targets)
    assert torch.equal(got[1:].nan_to_num(1234.5), want[1:].nan_to_num(1234.5))
    assert got[0].isnan()


class Outputs(NoTap):
    """Keep what the output of a model gives."""

    top_k = 3

    def __init__(self, sites):
        self.sites, self.values = sites, {}

    def wants(self, site, layer):
        return site in self.sites

    def take(self, site, layer, value):
        self.values[site] = value.clone()
