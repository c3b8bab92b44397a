"""Patching and ablation against single edited passes, gradients against differences, and what is refused."""

import numpy as np
import pytest

import headwater
from headwater.analysis.interventions.ablation import ablate, sweep_targets
from headwater.analysis.interventions.effects import effects
from headwater.analysis.interventions.patching import patch, read_cases
from headwater.analysis.interventions.prompts import Pair, Reader, read_pairs
from headwater.analysis.interventions.requests import REQUESTS
from headwater.analysis.measures.repeated import repeated
from headwater.extractor.edits.grammar import Edit, parse_edit
from headwater.extractor.model.forward import Model
from headwater.extractor.settings import options_of

N_LAYER, V = 3, 31
CLEAN, CORRUPT = [3, 1, 4, 1, 5, 9], [3, 1, 7, 1, 5, 8]


@pytest.fixture(scope="module")
def checkpoint(oracle):
    return oracle.checkpoint(oracle.gpt2(n_layer=N_LAYER, n_head=3, n_embd=24))


def captured(model, ids, edits=(), sites=("resid",)):
    return headwater.capture(model, np.array([ids], np.int32), list(sites), edits=edits, top_k=V)


def difference(run):
    order = np.argsort(run.top_tokens.values[0, -1])
    logits = run.top_logits.values[0, -1][order].astype(np.float64)
    return logits[2] - logits[6]


@pytest.mark.parametrize("edits", [(), ("mlp_out[1] scale=0.5", "attn_scores[2] key=2 add=1")])
def test_patching_is_one_edited_pass_for_each_place(checkpoint, edits):
    model = Model(checkpoint, "fp64")
    case = read_cases([Pair(CLEAN, CORRUPT, "", {"answer": 2, "wrong": 6})], Reader(checkpoint))
    parsed = [parse_edit(line) for line in edits]
    sites = ("resid", "attn_out", "mlp_out", "z")
    found = patch(checkpoint, case, sites, heads=True, edits=parsed, compute="fp64")
    clean = captured(model, CLEAN, edits, (*sites, "top_logits", "top_tokens"))
    base = difference(captured(model, CORRUPT, edits, ("top_logits", "top_tokens")))
    np.testing.assert_allclose(found.clean_logit_difference[0], difference(clean), 1e-5)
    np.testing.assert_allclose(found.corrupt_logit_difference[0], base, 1e-5)
    span = difference(clean) - base
    places = [
        ("resid", 1, 2),
        ("resid", 3, 5),
        ("attn_out", 0, 4),
        ("mlp_out", 2, 5),
        ("mlp_out", 1, 2),
    ]
    for site, at, position in places:
        value = clean[site].values[at, 0, position].astype(np.float64)
        one = captured(
            model,
            CORRUPT,
            [*edits, Edit(site, "set", value, at=at, positions=position)],
            ("top_logits", "top_tokens"),
        )
        np.testing.assert_allclose(
            found[site][0, at, position], (difference(one) - base) / span, 1e-3, 1e-4
        )
    value = np.zeros((3, 8))
    value[1] = clean.z.values[1, 0, 5, 1]
    edit = Edit("z[1]", "set", value, heads=1, positions=5)
    one = captured(model, CORRUPT, [*edits, edit], ("top_logits", "top_tokens"))
    np.testing.assert_allclose(found.z[0, 1, 5, 1], (difference(one) - base) / span, 1e-3, 1e-4)
    np.testing.assert_allclose(found.resid[0, -1, -1], 1, 1e-5)
    np.testing.assert_allclose(found.resid[0, :, :2], 0, atol=1e-6)
    np.testing.assert_allclose(found.resid[0, 0, [2, 5]].sum() > 0, True)


def test_shorter_prompts_stand_at_the_right(checkpoint):
    more = {"answer": 2, "wrong": 6}
    cases = read_cases(
        [Pair(CLEAN, CORRUPT, "", more), Pair(CLEAN[2:], CORRUPT[2:], "", more)], Reader(checkpoint)
    )
    found = patch(checkpoint, cases, ("resid",))
    assert np.isnan(found.resid[1, :, :2]).all() and np.isfinite(found.resid[1, :, 2:]).all()
    np.testing.assert_allclose(found.resid[:, -1, -1], 1, 1e-4)


def test_what_patching_refuses(checkpoint, tmp_path):
    reader, more = Reader(checkpoint), {"answer": 2, "wrong": 6}
    for corrupt, said, text in [
        (CORRUPT[1:], more, "6 clean and 5 corrupt"),
        (CORRUPT, {}, "'answer'"),
        (CORRUPT, more | {"wrong": V}, "0 to 30"),
    ]:
        with pytest.raises(ValueError, match=text):
            read_cases([Pair(CLEAN, corrupt, "x", said)], reader)
    case = read_cases([Pair(CLEAN, CORRUPT, "", more)], reader)
    with pytest.raises(ValueError, match="loss; expected some of"):
        patch(checkpoint, case, ("loss",))
    with pytest.raises(ValueError, match="freeze and linearise"):
        patch(checkpoint, case, edits=[parse_edit("pattern freeze")])
    for text, error in [
        ("{", "not JSON"),
        ('{"clean": [1]}', "no 'clean' and 'corrupt'"),
        ("", "no pairs"),
        ('{"clean": "a", "corrupt": "b"}', "without a tokenizer"),
        ('{"clean": [1], "corrupt": [99]}', "0 to 30"),
    ]:
        (tmp_path / "pairs.jsonl").write_text(text + "\n")
        with pytest.raises(ValueError, match=error):
            read_pairs(tmp_path / "pairs.jsonl", ("clean", "corrupt"), reader)


@pytest.mark.parametrize("hold", [False, True])
def test_ablation_is_edited_runs(oracle, checkpoint, hold):
    tokens, _ = oracle.rows(5, 20, "unpadded")
    target, op = (
        parse_edit("resid[1:3] position=first dim=4 scale=1"),
        "freeze" if hold else "scale",
    )
    found = ablate(checkpoint, tokens, target, [0, 1, 2.5], hold=hold, compute="fp64")
    model = Model(checkpoint, "fp64")
    sites = ["resid", "loss", "attn_sink"]
    clean = headwater.capture(model, tokens, sites)
    for i, scale in enumerate((0, 1, 2.5)):
        edit = Edit("resid[1:3]", op, scale, positions="first", dims=4)
        run = headwater.capture(model, tokens, sites, edits=[edit])
        np.testing.assert_allclose(found.loss[0, i], np.nanmean(run.loss), 1e-5)
        np.testing.assert_allclose(
            found.share[0, i], run.attn_sink.mean(("sequence", "query")), 1e-5
        )
        half = run.attn_sink[..., 10:].mean(("sequence", "query"))
        np.testing.assert_allclose(found.share_second_half[0, i], half, 1e-5)
        x, y = run.resid.values.astype(np.float64), clean.resid.values
        norm = np.linalg.norm(x, axis=-1)
        cosine = (x * y).sum(-1) / norm / np.linalg.norm(y, axis=-1)
        for j, part in enumerate((np.s_[..., :1], np.s_[..., 1:])):
            np.testing.assert_allclose(found.norm[0, i, j], norm[part].mean((1, 2)), 1e-5)
            np.testing.assert_allclose(found.cosine[0, i, j], cosine[part].mean((1, 2)), 1e-5)
        rows = np.nanmean(run.loss.values, -1) - np.nanmean(clean.loss.values, -1)
        error = rows.std(ddof=1) / len(rows) ** 0.5
        np.testing.assert_allclose(found.loss_change_error[0, i], error, 1e-4, 1e-9)
    assert found.loss_error.min() > 0 and found.dloss_error[0] > 0
    np.testing.assert_allclose(found.loss[0, 1], found.loss_unchanged, 1e-12)
    np.testing.assert_allclose(found.dloss, found.dloss_check, 1e-6)
    near = ablate(
        checkpoint, tokens, target, [1 + 1e-3, 1 - 1e-3], hold=hold, compute="fp64", gradient=False
    )
    for name, slope in (("loss", found.dloss), ("share", found.dshare)):
        difference = (near[name][:, 0] - near[name][:, 1]) / 2e-3
        np.testing.assert_allclose(slope, difference, 1e-3, 1e-7)
    assert float(found.dloss[0]) != 0


def test_the_second_half_begins_in_the_same_place_everywhere(checkpoint):
    """⌈n/2⌉ of the positions that a row, or a document packed into one, has: 11 of 21, and 2 of 3."""
    tokens = np.arange(24, dtype=np.int32)[None] % 30
    row_start = np.array([[0] * 21 + [21] * 3], np.int32)
    target = parse_edit("z[0] scale=1")
    found = ablate(checkpoint, tokens, target, [1], row_start, gradient=False)
    alone = [
        headwater.capture(Model(checkpoint, "fp32"), part, ["attn_sink"]).attn_sink.values[:, 0]
        for part in (tokens[:, :21], tokens[:, 21:])
    ]
    half = np.concatenate([alone[0][..., 11:], alone[1][..., 2:]], -1).mean(-1)
    np.testing.assert_allclose(found.share_second_half[0, 0], half, 1e-5)


@pytest.mark.parametrize(
    "line",
    [
        "z[1] head=2 scale=1",
        "mlp_post[0] position=last dim=3:9 scale=1",
        "q position=2 scale=1",
        "attn_out[2] token=1:9 scale=1",
    ],
)
def test_derivatives_of_every_kind_of_site(oracle, checkpoint, line):
    scales = [1 + 1e-3, 1 - 1e-3]
    tokens, row_start = oracle.rows(3, 12, "left", seed=1)
    assert "dloss" not in ablate(checkpoint, tokens, parse_edit(line), scales, row_start)
    tokens, row_start = oracle.rows(3, 12, "right", seed=1)
    found = ablate(checkpoint, tokens, parse_edit(line), scales, row_start, compute="fp64")
    for name, slope in (("loss", found.dloss), ("share", found.dshare)):
        np.testing.assert_allclose(
            slope, (found[name][:, 0] - found[name][:, 1]) / 2e-3, 1e-3, 1e-7
        )
    np.testing.assert_allclose(found.dloss, found.dloss_check, 1e-6)


def test_sweeps_take_one_place_at_a_time(oracle, checkpoint):
    tokens, _ = oracle.rows(2, 16, "unpadded")
    for line, sweep, names in [
        ("resid[1:4] dim=3 scale=1", "depth", ["depth 1", "depth 2", "depth 3"]),
        ("z[1] scale=1", "head", ["head 0", "head 1", "head 2"]),
        (
            "mlp_out[0] position=first,3:5 scale=1",
            "position",
            ["position first", "position 3", "position 4"],
        ),
        ("resid[1] dim=2,5 scale=1", "dim", ["dim 2", "dim 5"]),
    ]:
        found = ablate(checkpoint, tokens, parse_edit(line), [0], sweep=sweep, gradient=False)
        assert found.target.values.tolist() == names
        assert len(np.unique(found.loss)) == len(names)
    with pytest.raises(ValueError, match="too many runs"):
        sweep_targets(parse_edit("resid[1] scale=1"), "dim", checkpoint.config, 16)
    with pytest.raises(ValueError, match="--sweep is 'head'"):
        sweep_targets(parse_edit("resid[1] scale=1"), "head", checkpoint.config, 16)


def test_effects_of_heads_and_mlps(oracle, checkpoint):
    """Total effects are zeroed runs; direct ones change the last residual stream alone."""
    tokens, row_start = oracle.rows(4, 14, "left")
    found, model = effects(checkpoint, tokens, row_start, "fp64"), Model(checkpoint, "fp64")

    def loss(*edits):
        return np.nanmean(headwater.capture(model, tokens, ["loss"], edits=edits).loss)

    base = loss()
    np.testing.assert_allclose(found.loss, base, 1e-6)
    np.testing.assert_allclose(found.total[1, 2], loss("z[1] head=2 zero") - base, 1e-4, 1e-6)
    np.testing.assert_allclose(found.total_mlp[0], loss("mlp_out[0] zero") - base, 1e-4, 1e-6)
    w_o = checkpoint.tensors["h.1.attn.c_proj.weight"].double().numpy()[16:24]
    run = headwater.capture(model, tokens, ["z", "mlp_out", "resid"])
    for part, value in [
        (run.z.values[1, :, :, 2] @ w_o, found.direct[1, 2]),
        (run.mlp_out.values[0], found.direct_mlp[0]),
        (run.resid.values[0], found.direct_embedding),
    ]:
        taken = np.nan_to_num(run.resid.values[-1] - part)
        left = [Edit("resid[3]", "patch", taken[None])]
        np.testing.assert_allclose(value, loss(*left) - base, 1e-3, 1e-5)
    last = N_LAYER - 1
    np.testing.assert_allclose(found.direct_mlp[last], found.total_mlp[last], 1e-6)


def test_repeated_tokens_in_a_model_without_positions(oracle):
    """All positions of a repeated token are then equal, and heads spread evenly (closed form); a head that is zeroed
    changes that for none."""
    model = oracle.gpt2(n_layer=2, n_head=3, n_embd=24)
    model.transformer.wpe.weight.data.zero_()
    loaded = Model(oracle.checkpoint(model), "fp64")
    found = repeated(
        loaded, [5, [1, 2, 3]], (8, 20), bos=0, n_layers=2, edits=[parse_edit("z[0] head=1 zero")]
    )
    alone = found.sel(start="token", repeated="5")
    for length in (8, 20):
        one = alone.sel(length=length)
        uniform = np.mean(1 / np.arange(2, length + 1))
        for name in ("first_token_share", "self_share", "previous_share"):
            np.testing.assert_allclose(one[name], uniform, 1e-6)
        np.testing.assert_allclose(one.entropy, 1, 1e-6)
        np.testing.assert_allclose(one.norm_ratio, 1, 1e-6)
    for other in (
        found.sel(start="bos", repeated="5"),
        found.sel(repeated="1+2+3"),
        found.sel(repeated="different"),
    ):
        assert np.abs(other.norm_ratio - 1).max() > 0.01 and np.isfinite(other.entropy).all()
    with pytest.raises(ValueError, match="--lengths"):
        repeated(loaded, [5], (100,))


@pytest.mark.parametrize("kind", REQUESTS)
def test_every_setting_says_what_its_flag_needs(kind):
    for one in options_of(REQUESTS[kind]):
        assert one.part and one.help and one.leads, one.name
        switch = one.kind.schema.get("type") == "boolean"
        assert switch == (not one.metavar) == (one.default is False), one.name
        default = f"(default: {one.default})"
        plain = isinstance(one.default, int | float | str) and one.default is not False
        assert one.help.endswith(default) == plain, one.name
        if isinstance(one.default, str) and "enum" in one.kind.schema:
            assert one.default in one.kind.schema["enum"], one.name
