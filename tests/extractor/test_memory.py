"""`headwater.capture` gives texts' activations as a labelled dataset, with no run on disk."""

import numpy as np
import pytest
import torch

import headwater
from headwater.extractor.in_memory import capture
from headwater.extractor.model.forward import Model
from headwater.extractor.model.weights import load_checkpoint
from headwater.extractor.sites import SITES, RequestError
from headwater.extractor.tokenizer import load_tokenizer

TEXTS = ["the quick brown fox", "the lazy dog jumps over the quick brown fox", "dog"]


@pytest.fixture(scope="module")
def texts(tiny_gpt2):
    """The ids of TEXTS, −1 for padding."""
    encoded = load_tokenizer(tiny_gpt2).encode_batch(TEXTS)
    ids = np.full((3, max(map(len, encoded))), -1, np.int32)
    for row, values in zip(ids, encoded, strict=True):
        row[: len(values)] = values
    return ids


@pytest.fixture(scope="module")
def transformer(tiny_gpt2):
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval()


def test_every_site_of_several_texts(tiny_gpt2, texts, transformer, oracle):
    data = headwater.capture(str(tiny_gpt2), TEXTS, sites=tuple(SITES), top_k=oracle.top_k)
    row_start = np.where(texts >= 0, 0, np.arange(1, texts.shape[1] + 1)).astype(np.int32)
    oracle.assert_sites(
        {name: data[name].values for name in SITES}, oracle.reference(transformer, texts, row_start)
    )
    np.testing.assert_array_equal(data.token, texts)
    for row, text in zip(data.token_string.values, TEXTS, strict=True):
        assert "".join(row) == text
    for name, site in SITES.items():
        assert data[name].dims == site.dims and data[name].attrs["title"] == site.title
    assert data.attrs == {"model": str(tiny_gpt2), "compute": "fp32"}
    np.testing.assert_array_equal(data.depth_fraction, [0, 0.5, 1])
    np.testing.assert_array_equal(data.layer_fraction, [0.25, 0.75])
    assert data.pattern.attrs["transformer_lens"] == "blocks.{}.attn.hook_pattern"


def test_one_text_and_its_ids_are_the_same(tiny_gpt2, texts):
    by_text = capture(str(tiny_gpt2), TEXTS[1], sites=["resid", "pattern"])
    by_ids = capture(str(tiny_gpt2), texts[1:2].astype(np.int64), sites="resid,pattern")
    assert by_text.identical(by_ids) and by_text.sizes["sequence"] == 1


def test_aliases_and_selections_become_coordinates(tiny_gpt2):
    data = capture(
        str(tiny_gpt2),
        TEXTS,
        ["blocks.1.hook_resid_post", "pattern.1", "q.1"],
        heads="1",
        positions="0,2",
    )
    assert set(data.data_vars) == {"resid", "pattern", "q"}
    assert data.resid.dims == ("depth", "sequence", "selected_position", "d_model")
    assert [
        data[dim].values.tolist() for dim in ("depth", "layer", "head", "selected_position")
    ] == [[2], [1], [1], [0, 2]]
    whole = capture(str(tiny_gpt2), TEXTS, ["resid", "q"])
    np.testing.assert_allclose(
        data.resid, whole.resid.sel(depth=[2]).isel(position=[0, 2]), atol=1e-6
    )
    np.testing.assert_allclose(
        data.q, whole.q.sel(layer=[1], head=[1]).isel(position=[0, 2]), atol=1e-6
    )


def test_last_is_the_last_real_token(tiny_gpt2, texts):
    data = capture(str(tiny_gpt2), TEXTS, positions="last")
    assert data.selected_position.values.tolist() == [-1]
    for b, n in enumerate((texts >= 0).sum(1)):
        alone = capture(str(tiny_gpt2), texts[b : b + 1, :n])
        np.testing.assert_array_equal(data.resid[:, b, 0], alone.resid[:, 0, -1])


def test_bos_comes_first_and_long_texts_are_cut(tiny_gpt2):
    data = capture(str(tiny_gpt2), ["fox " * 40, "fox"], bos=True)
    assert data.sizes["position"] == 32
    assert data.token[:, 0].values.tolist() == [0, 0] and data.token[1, -1] == -1


def test_stored_types(tiny_gpt2):
    data = capture(
        str(tiny_gpt2),
        TEXTS,
        ["resid", "pattern", "attn_argmax", "loss"],
        dtype="float16,pattern=float32",
    )
    assert [data[name].dtype.name for name in data.data_vars] == [
        "float16",
        "float32",
        "int32",
        "float32",
    ]
    narrow = capture(str(tiny_gpt2), TEXTS, compute="bf16")
    assert narrow.attrs["compute"] == "bf16" and narrow.resid.dtype == "float32"


def test_overflow_is_kept_in_memory(oracle):
    model = oracle.gpt2()
    with torch.no_grad():
        model.transformer.wpe.weight[3, 5] = 1e6
    data = capture(Model(oracle.checkpoint(model)), np.arange(8)[None], dtype="float16")
    assert np.isinf(data.resid[0, 0, 3, 5]) and np.isfinite(data.resid[:, :, 0]).all()


def test_a_model_that_is_loaded_already(tiny_gpt2):
    model = Model(load_checkpoint(str(tiny_gpt2)), "fp64")
    data = capture(model, TEXTS, tokenizer=str(tiny_gpt2))
    assert data.attrs == {"model": "", "compute": "fp64"}
    np.testing.assert_allclose(data.resid, capture(str(tiny_gpt2), TEXTS).resid, atol=1e-5)
    assert "token_string" not in capture(model, np.ones((1, 3), int)).coords


@pytest.mark.parametrize(
    "text, options, message",
    [
        ([], {}, "no tokens"),
        ([""], {}, "no tokens"),
        (np.zeros((1, 33), int), {}, "33 positions.*only 32"),
        (np.full((1, 3), 9999), {}, "token id 9999 at row 0, position 0"),
        (np.array([[1, -1, 2]]), {}, "padding"),
        (np.full((2, 3), -1), {}, "all padding"),
        (np.zeros((1, 3)), {}, "dtype float64"),
        (np.zeros((1, 1, 3), int), {}, "shape"),
        ("fox", {"sites": ["residual"]}, "no site 'residual'"),
        ("fox", {"depths": "3"}, "out of range"),
        ("fox", {"layers": "1"}, "resid has no layers"),
        ("fox", {"dtype": "bfloat16"}, "bfloat16"),
        ("fox", {"sites": ["top_logits"], "top_k": 9999}, "top-k"),
    ],
)
def test_wrong_requests_are_named(tiny_gpt2, text, options, message):
    with pytest.raises(ValueError, match=message):
        capture(str(tiny_gpt2), text, **options)


def test_text_needs_a_tokenizer(oracle):
    with pytest.raises(RequestError, match="without a tokenizer"):
        capture(Model(oracle.checkpoint(oracle.gpt2())), "text")


def test_bos_needs_a_token(oracle, tiny_gpt2, tmp_path):
    model = Model(
        oracle.checkpoint(oracle.gpt2(vocab_size=300, bos_token_id=None, eos_token_id=None))
    )
    assert capture(model, "fox", bos=True, tokenizer=str(tiny_gpt2)).token[0, 0] == 0
    nameless = (tiny_gpt2 / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(nameless)
    with pytest.raises(RequestError, match="bos: neither"):
        capture(model, "fox", bos=True, tokenizer=str(tmp_path))
