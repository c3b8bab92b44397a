"""Plateaus: the replayed positions against whole forward passes, and closed forms for every bend of a path."""

import numpy as np
import pytest
import torch

import headwater
from headwater.analysis.interventions.plateau import Sweep, covariance_directions, plateau
from headwater.analysis.interventions.plateau_heads import head_response
from headwater.analysis.interventions.plateau_parts import attribute, jacobian
from headwater.analysis.interventions.plateau_paths import (
    distances,
    make_path,
    norm_curve,
    own_score,
    sharpness,
    softmax_curve,
    softmax_width,
    width,
)
from headwater.analysis.interventions.prompts import Pair
from headwater.analysis.interventions.replay import Prompts, Replay
from headwater.analysis.studies.synthetic import softmax_model
from headwater.extractor.edits.grammar import Edit
from headwater.extractor.model.forward import Model

N_LAYER = 3
A, B = [3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8]


@pytest.fixture(scope="module")
def checkpoint(oracle):
    return oracle.checkpoint(oracle.gpt2(n_layer=N_LAYER, n_head=3, n_embd=24))


@pytest.fixture(scope="module")
def replay(checkpoint):
    return Replay(checkpoint, "fp64")


def pair(a=A, b=B, label="pair"):
    return Pair(a, b, label, {})


@pytest.mark.parametrize("n_last", [1, 3])
def test_replayed_positions_are_those_of_transformers(oracle, checkpoint, replay, n_last):
    """From any depth, with a prefix of any length, every site is the whole pass's."""
    model = oracle.gpt2(n_layer=N_LAYER, n_head=3, n_embd=24)
    prompts = Prompts(replay, [A, B], n_last)
    for depth in range(N_LAYER):
        seen = {}
        end = replay.run(
            prompts.states[depth],
            depth,
            prompts.prefix,
            look=lambda site, at, value, seen=seen: seen.update({(site, at): value[:, 0].clone()}),
        )
        logits = replay.logits(end)
        for b, ids in enumerate((A, B)):
            row = np.array([ids], np.int32)
            want = oracle.reference(model, row, np.zeros_like(row))
            np.testing.assert_allclose(logits[b, 0], want["logits"][0, -n_last:], 1e-10, 1e-10)
            for (site, at), value in seen.items():
                if site in ("attn_out", "mlp_out", "mlp_pre", "mlp_post", "resid", "resid_mid"):
                    np.testing.assert_allclose(
                        value[b], want[site][at, 0, -n_last:], 1e-10, 1e-10, err_msg=site
                    )
                elif site in ("q", "k", "v", "z"):
                    np.testing.assert_allclose(
                        value[b].transpose(0, 1), want[site][at, 0, -n_last:], 1e-10, 1e-10
                    )
                elif site == "pattern":
                    kept = [*range(len(ids) - n_last), *range(len(A) - n_last, len(A))]
                    np.testing.assert_allclose(
                        value[b][..., kept], want[site][at, 0, :, -n_last:], 1e-10, 1e-10
                    )


def test_a_sweep_is_what_single_edits_do(checkpoint, replay):
    """Every step against a whole pass with the residual stream set there; frozen parts against `freeze` edits."""
    model, alpha = Model(checkpoint, "fp64"), np.linspace(0, 1, 5)
    row = np.array([A], np.int32)
    found = plateau(replay, [pair()], [1], 5, ("linear", "slerp"))
    sweep = Sweep(replay, [pair()], 5)
    held = {
        "attn_out held": ["attn_out[1:] position=last freeze"],
        "pattern held": ["pattern[1:] position=last freeze"],
        "mlp_out held": ["mlp_out[1:] position=last freeze"],
        "mlp_linear held": ["mlp_post[1:] position=last linearise"],
        "ln_scale held": [
            f"{n} position=last freeze"
            for n in ("ln1_scale[1:]", "ln2_scale[1:]", "ln_final_scale")
        ],
    }
    parts = attribute(replay, [pair()], [1], 5)
    for path in ("linear", "slerp"):
        states = make_path(*sweep.ends(1), torch.from_numpy(alpha), path)[0].numpy()
        edits = [[Edit("resid[1]", "set", state, positions="last")] for state in states]
        runs = [
            headwater.capture(
                model,
                row,
                ["resid", "top_logits", "top_tokens"],
                edits=e,
                top_k=31,
                dtype="float32",
            )
            for e in edits
        ]
        resid = torch.from_numpy(
            np.stack([r.resid.values[:, 0, -1] for r in runs]).astype(np.float64)
        )
        d, _, ratio = distances(resid.transpose(0, 1))
        np.testing.assert_allclose(
            found.distance.sel(path=path, depth=1)[0, 1:4], d[1:], 1e-5, 1e-5
        )
        np.testing.assert_allclose(
            found.ratio.sel(path=path, depth=1)[0, 1:4], ratio[1:], 1e-5, 1e-5
        )
        logits = np.stack(
            [r.top_logits.values[0, -1][np.argsort(r.top_tokens.values[0, -1])] for r in runs]
        )
        d, _, _ = distances(torch.from_numpy(logits.astype(np.float64))[None])
        np.testing.assert_allclose(
            found.distance.sel(path=path, depth=1, output=-1)[0], d[0], 1e-5, 1e-5
        )
        log_p = torch.log_softmax(torch.from_numpy(logits.astype(np.float64)), -1)
        kl = torch.nn.functional.kl_div(
            log_p, log_p[:1].expand_as(log_p), log_target=True, reduction="none"
        ).sum(-1)
        np.testing.assert_allclose(found.kl.sel(path=path, depth=1)[0], kl, 1e-4, 1e-5)
        for name, lines in held.items() if path == "linear" else ():
            ends = [
                headwater.capture(model, row, ["resid"], edits=[*e, *lines], dtype="float32")
                for e in edits
            ]
            resid = torch.from_numpy(
                np.stack([r.resid.values[-1, 0, -1] for r in ends]).astype(np.float64)
            )
            curve = parts.curve.sel(depth=1, scenario=name, out="resid")[0]
            np.testing.assert_allclose(
                curve, distances(resid[None])[0][0], 1e-5, 2e-5, err_msg=name
            )


@pytest.mark.parametrize("s", [0.5, 4.0, 12.0])
def test_softmax_plateau(s):
    """The weight of the key moved to, in a model that has nothing but a softmax; its width and slope with two keys."""
    n = 10
    checkpoint, a, b = softmax_model(n, s)
    replay = Replay(checkpoint, "fp64")
    sweep = Sweep(replay, [pair(a, b)], 41)
    path = make_path(*sweep.ends(0), torch.from_numpy(sweep.alpha), "linear")
    seen = {}
    replay.run(
        path[:, :, None],
        0,
        sweep.a.prefix,
        frozenset({("ln_scale", 0)}),
        sweep.a.point(0, slice(0, 1)),
        lambda site, at, value: seen.update({site: value}),
    )
    np.testing.assert_allclose(
        seen["pattern"][0, :, 0, 0, 6], softmax_curve(sweep.alpha, s, n), 1e-12
    )
    fine = np.linspace(0, 1, 20001)
    p = softmax_curve(fine, s, 2)
    d = ((p - p[0]) / (p[-1] - p[0]))[None]
    np.testing.assert_allclose(width(d, 1 - d, fine), softmax_width(s), 1e-6)
    np.testing.assert_allclose(sharpness(d, fine), s / 2 / np.tanh(s / 2), 1e-6)


def test_own_score_is_bilinear(replay):
    """A token's score with itself is quadratic in α where LayerNorm is frozen, with earlier keys linear."""
    heads = head_response(replay, [pair()], [1], 11)
    sweep = Sweep(replay, [pair()], 11)
    path = make_path(*sweep.ends(1), torch.from_numpy(sweep.alpha), "linear")
    scores = []
    replay.run(
        path[:, :, None],
        1,
        sweep.a.prefix,
        frozenset({("ln_scale", 1)}),
        sweep.a.point(1, slice(0, 1)),
        lambda site, at, value: scores.append(value) if (site, at) == ("attn_scores", 1) else None,
        last=2,
    )
    score = scores[0][0, :, :, 0].numpy()  # [step, head, key]
    both = heads.own_score.sel(depth=1, moved="both")[0].values
    np.testing.assert_allclose(score[:, :, -1].T, both, 1e-11, 1e-12)
    second = np.diff(score, 2, axis=0)
    np.testing.assert_allclose(second[..., :-1], 0, atol=1e-12)
    np.testing.assert_allclose(
        second[..., -1], np.broadcast_to(heads.curvature.sel(depth=1)[0] * 0.01, (9, 3)), 1e-8
    )
    np.testing.assert_allclose(
        heads.own_score.sel(depth=1, moved="query")[0, :, 0], both[:, 0], 1e-12
    )
    assert (np.diff(heads.own_score.sel(depth=1, moved="key")[0], 2, axis=-1) < 1e-12).all()
    free = head_response(replay, [pair()], [1], 11).own_score_measured.sel(depth=1)[0]
    np.testing.assert_allclose(free[:, 0], both[:, 0], 1e-11)
    assert not np.allclose(free[:, 5], both[:, 5])
    np.testing.assert_allclose(own_score(np.array([0.5]), 1.0, 2.0, 3.0, 4.0), [2.5])


@pytest.mark.parametrize("depth", range(N_LAYER))
def test_with_every_switch_the_path_is_a_line(replay, depth):
    parts = attribute(replay, [pair(), pair(B, A)], [depth], 21)
    curve = parts.curve.sel(depth=depth, scenario="all held")
    assert np.abs(curve - parts.alpha).max() < 1e-12
    np.testing.assert_allclose(parts.width.sel(depth=depth, scenario="all held"), 0.2, 1e-9)
    for scenario in ("nothing held", "softmax alone", "mlp alone", "layernorm alone"):
        assert np.abs(parts.curve.sel(depth=depth, scenario=scenario) - parts.alpha).max() > 1e-3, (
            scenario
        )
    assert (parts.layer_width.notnull().sum("layer") == N_LAYER - depth).all()


def test_layernorm_alone():
    """Between centred orthogonal states of equal norm: √2 sin(½ atan2(α, 1 − α)), sharpness 1.32."""
    checkpoint, _, _ = softmax_model(8, 1.0)
    d = checkpoint.config.d_model
    tensors = {
        name: t if t.ndim == 1 else torch.zeros_like(t) for name, t in checkpoint.tensors.items()
    }
    tensors["wte.weight"] = checkpoint.tensors["wte.weight"]
    replay = Replay(type(checkpoint)("", checkpoint.config, tensors, "", None), "fp64")
    replay.unembedding = torch.eye(d, dtype=torch.float64)
    found = plateau(replay, [pair([0], [1])], [0], 201, ("linear",))
    np.testing.assert_allclose(
        found.distance[0, 0, 0, -1], norm_curve(found.alpha.values), 1e-6, 1e-7
    )
    np.testing.assert_allclose(found.sharpness[0, 0, 0, -1], 1.32, atol=0.01)
    np.testing.assert_allclose(found.sharpness[0, 0, 0, 1], 1, 1e-4)


def test_a_linearised_mlp_has_the_slope_of_the_real_one(replay):
    """At α = 0, by finite differences, with everything else as it is."""
    sweep = Sweep(replay, [pair()], 3)
    point, (a, b) = sweep.a.point(1, slice(0, 1)), sweep.ends(1)
    held = frozenset(("mlp_linear", at) for at in range(1, N_LAYER))

    def at(h, switches):
        return replay.run((a + h * (b - a))[:, None, None], 1, sweep.a.prefix, switches, point)

    h = 1e-5
    real, linear = ((at(h, s) - at(-h, s)) / (2 * h) for s in (frozenset(), held))
    np.testing.assert_allclose(real, linear, 1e-7, 1e-8)
    np.testing.assert_allclose(at(0, held), at(0, frozenset()), 1e-13)
    assert not np.allclose(at(1, held), at(1, frozenset()))


def test_terms_of_a_head(checkpoint, replay):
    """Pattern, value and cross terms add up, and are those of whole passes."""
    heads = head_response(replay, [pair()], [1], 5)
    np.testing.assert_allclose(heads.term_share.sum("term_of")[..., 1:][:, :, 1:], 1, 1e-5)
    state = Sweep(replay, [pair()], 5).ends(1)[1].numpy()
    runs = [
        headwater.capture(
            Model(checkpoint, "fp64"), np.array([A], np.int32), ["pattern", "v", "z"], edits=edits
        )
        for edits in ((), [Edit("resid[1]", "set", state, positions="last")])
    ]
    (p, v), (q, w) = (
        (r.pattern.values[:, 0, :, -1], r.v.values[:, 0].transpose(0, 2, 1, 3)) for r in runs
    )
    want = [np.einsum("lnk,lnkh->lnh", x, y) for x, y in ((q - p, v), (p, w - v), (q - p, w - v))]
    got = heads.term[0, 0, :, :, :, -1].values
    np.testing.assert_allclose(got[1:], np.linalg.norm(np.stack(want, 2), axis=-1)[1:], 1e-4, 1e-5)
    whole = np.linalg.norm(np.sum(want, 0), axis=-1)[1:]
    np.testing.assert_allclose(heads.z_change[0, 0, 1:, :, -1], whole, 1e-4, 1e-5)


def test_jacobian_norms(replay):
    found = jacobian(replay, [pair()], 1, 3, n_probes=400)
    sweep = Sweep(replay, [pair()], 3)
    a, b = sweep.ends(1)
    for i, alpha in enumerate((0, 0.5, 1)):
        x = torch.lerp(a, b, torch.tensor(alpha, dtype=torch.float64))
        j = torch.autograd.functional.jacobian(
            lambda x: replay.run(x[:, None, None], 1, sweep.a.prefix)[0, 0, 0], x
        )[:, 0]
        np.testing.assert_allclose(
            found.along[0, i], (j @ (b - a)[0]).norm() / (b - a).norm(), 1e-9
        )
        error = abs(float(found.frobenius[0, i]) - float(j.norm()))
        assert error < 5 * float(found.frobenius_error[0, i]) < 0.3 * float(j.norm())


def test_widths_of_a_line_a_step_and_nothing():
    alpha = np.linspace(0, 1, 50)
    step = (alpha > 0.5).astype(float)
    np.testing.assert_allclose(width(alpha, 1 - alpha, alpha), 0.2)
    np.testing.assert_allclose(width(step, 1 - step, alpha), 1, atol=0.03)
    assert np.isnan(width(np.full(50, np.nan), alpha, alpha))


def test_baselines(oracle, replay, tmp_path):
    """Directions have a run's covariance; an end is as far as B."""
    model = oracle.gpt2(n_layer=N_LAYER, n_head=3, n_embd=24)
    model.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "ids.npy", oracle.rows(12, 24, "left")[0])
    run = headwater.extract(
        headwater.RunConfig(
            out=tmp_path / "run",
            model=str(tmp_path / "model"),
            dtype="float32",
            tokens=str(tmp_path / "ids.npy"),
        )
    )
    start = run.plain("row_start")
    rows = run["resid"][1][start < np.arange(24)].astype(np.float64)
    drawn = covariance_directions(run, 1, 40000, np.random.default_rng(0))
    want = np.cov(rows.T, bias=True)
    assert np.linalg.norm(np.cov(drawn.T) - want) < 0.03 * np.linalg.norm(want)
    found = plateau(
        replay, [pair(), pair(B, A)], [1], 9, ("linear", "random", "covariance"), run=run
    )
    assert np.isfinite(found.width.sel(depth=1)[:, :, 1:]).all()
    np.testing.assert_allclose(found.width_mean, found.width.mean("pair"))
    np.testing.assert_allclose(found.width_error, found.width.std("pair", ddof=1) / 2**0.5)
    assert found.n_pairs == 2
    assert np.isnan(plateau(replay, [pair()], [1], 9, ("linear",)).width_error).all()
    line = np.broadcast_to(found.alpha, (2, 3, 9))
    np.testing.assert_allclose(found.distance.sel(depth=1, output=1), line, atol=1e-6)
    with pytest.raises(ValueError, match="--run RUN"):
        plateau(replay, [pair()], [1], 9, ("covariance",))
    with pytest.raises(ValueError, match="depths 0 to 2"):
        plateau(replay, [pair()], [3])
