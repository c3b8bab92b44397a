"""False sinks: what repeated tokens do in models where the answer is known."""

import numpy as np
import pytest

from headwater.analysis.measures.false_sinks import false_sinks
from headwater.analysis.suite.registry import summarise


def save(model, home):
    model.save_pretrained(home)
    return str(home)


def test_without_positions_every_repeated_token_is_like_the_first(oracle, tmp_path):
    model = oracle.gpt2(n_positions=48)
    model.transformer.wpe.weight.data.zero_()
    got = false_sinks(save(model, tmp_path / "m"), [3, 9, [4, 4]], lengths=[5, 40])
    assert dict(got.sizes) == {"start": 1, "length": 2, "repeated": 3, "depth": 3, "layer": 2}
    assert (got.false_norm == 1).all()
    np.testing.assert_allclose(got.norm_ratio, 1, 1e-4)
    for i, n in enumerate((5, 40)):
        want = (1 / np.arange(2, n + 1)).mean()
        np.testing.assert_allclose(got.first_token_share[:, i], want, 1e-4)
    assert not got.false_attention.sel(length=40).any()
    np.testing.assert_allclose(got.norm, got.first_norm, 1e-4)
    assert got.attrs["n_controls"] >= 16 and (got.control_norm_ratio_spread > 0).all()
    assert np.isnan(got.relative_ratio).all()  # different tokens differ here no more than these
    said = summarise("false_sinks", got)["largest_ratio_relative_to_different_tokens"]
    assert "stands out at no depth" in said


def test_a_large_first_position_is_a_sink_that_nothing_else_is(oracle, tmp_path):
    model = oracle.gpt2(n_positions=48)
    model.transformer.wpe.weight.data[0] *= 1000
    got = false_sinks(save(model, tmp_path / "m"), [3, [5, 6, 7]], lengths=[30], bos=0)
    assert got.start.values.tolist() == ["token", "bos"] and got.repeated.values.tolist() == [
        "3",
        "5+6+7",
    ]
    assert not got.false_norm.any() and not got.control_false_norm.any()
    assert (got.norm_ratio < 0.1).all()
    np.testing.assert_allclose(got.relative_ratio, got.norm_ratio / got.control_norm_ratio, 1e-12)


def test_a_repeated_token_that_passes_for_the_first_is_found_by_its_absolute_norm(oracle, tmp_path):
    """One planted token is as large as the first position; another only makes the first one small."""
    model = oracle.gpt2(n_positions=48)
    model.transformer.wpe.weight.data[0] *= 100
    model.transformer.wte.weight.data[7] *= 100
    shrink = -0.98 * model.transformer.wpe.weight.data[0]
    model.transformer.wte.weight.data[8] = shrink
    model.transformer.wpe.weight.data[1:] -= shrink / 100
    got = false_sinks(save(model, tmp_path / "m"), [3, 7, 8], lengths=[30]).isel(start=0, length=0)
    first = got.isel(depth=0)
    assert first.control_norm_ratio < 0.3
    assert first.relative_ratio.sel(repeated="3") < 2 < first.relative_ratio.sel(repeated="7")
    assert first.norm.sel(repeated="7") > 0.4 * first.control_first_norm
    assert first.first_norm.sel(repeated="8") < 0.1 * first.control_first_norm


def test_lengths_that_do_not_fit_are_refused(oracle, tmp_path):
    home = save(oracle.gpt2(n_positions=16), tmp_path / "m")
    for lengths in ([16], [1], []):
        with pytest.raises(ValueError, match="lengths from 2 to 15"):
            false_sinks(home, [1], lengths=lengths, bos=0)
