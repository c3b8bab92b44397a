"""Edits against hooks on transformers written by hand, in float64; identity, resuming, and refusals."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from transformers.models.gpt2 import modeling_gpt2

import headwater
from headwater.extractor.edits import places as edit_places
from headwater.extractor.edits.grammar import OPS, OPTIONS, SPOTS, Edit, parse_edit, read_edits
from headwater.extractor.edits.places import load_array
from headwater.extractor.model.activations import ACTIVATIONS, SMOOTH, value_and_slope
from headwater.extractor.sites import RequestError

N_LAYER, T = 3, 20


@pytest.fixture(scope="module")
def model(oracle):
    return oracle.gpt2(n_layer=N_LAYER, n_head=3, n_embd=24)


@pytest.fixture(autouse=True)
def pattern_hook(monkeypatch):
    """Let transformers' eager attention call `edit_pattern` of its module, for it has no hook between P and P V."""
    eager = modeling_gpt2.eager_attention_forward

    def forward(module, query, key, value, *more, **named):
        _, pattern = eager(module, query, key, value, *more, **named)
        pattern = getattr(module, "edit_pattern", lambda p: p)(pattern.clone())
        return (pattern @ value).transpose(1, 2), pattern

    monkeypatch.setattr(modeling_gpt2, "eager_attention_forward", forward)


def at_pattern(attention, change):
    attention.edit_pattern = change


def double(model):
    model = copy.deepcopy(model).double().requires_grad_(False)
    model.set_attn_implementation("eager")
    return model


def after(module, change):
    """Let a forward hook change a module's (first) output."""

    def hook(_, inputs, output):
        first = change((output[0] if isinstance(output, tuple) else output).clone())
        return (first, *output[1:]) if isinstance(output, tuple) else first

    module.register_forward_hook(hook)


def before(module, change, inplace=False):
    def hook(_, inputs):
        if inplace:
            inputs[0].copy_(change(inputs[0].clone()))
            return None
        return (change(inputs[0].clone()), *inputs[1:])

    module.register_forward_pre_hook(hook)


def put(index, function):
    def change(x):
        x[index] = function(x[index])
        return x

    return change


def outputs(model, ids):
    """Run transformers; return the residual stream [depth, B, T, D] and the loss [B, T − 1]."""
    seen = []
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    model.transformer.ln_f.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].clone())
    )
    logits = model(torch.from_numpy(ids.astype(np.int64))).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].mT, torch.from_numpy(ids[:, 1:].astype(np.int64)), reduction="none"
    )
    return torch.stack(seen).numpy(), loss.numpy()


def head(h, d=8):
    return slice(h * d, (h + 1) * d)


def drop_first_key(p):
    p[:, 1, 1:, 0] = 0
    p[:, 1] /= p[:, 1].sum(-1, keepdim=True)
    return p


def no_first_key(p):
    p[:, 1, :, 0] = 0
    return p


def fixed_scale(model, layer):
    norm = model.transformer.h[layer].ln_2
    norm.register_forward_hook(
        lambda m, inputs, _: (inputs[0] - inputs[0].mean(-1, keepdim=True)) / 2 * m.weight + m.bias
    )


HALF = np.linspace(-1, 1, 24)
CASES = {
    "resid[1] position=first dim=3 scale=0.5": lambda m: before(
        m.transformer.h[1], put(np.s_[:, 0, 3], lambda x: x * 0.5)
    ),
    "resid[3] position=-1 zero": lambda m: before(
        m.transformer.ln_f, put(np.s_[:, -1], torch.zeros_like)
    ),
    "blocks.0.hook_resid_post position=last,2 dim=0:4 set=0.25": lambda m: before(
        m.transformer.h[1], put(np.s_[:, [2, T - 1], :4], lambda x: 0 * x + 0.25)
    ),
    "resid_mid[1] position=4:9 scale=2": lambda m: before(
        m.transformer.h[1].ln_2, put(np.s_[:, 4:9], lambda x: x * 2), inplace=True
    ),
    "attn_out[0] position=2 zero": lambda m: after(
        m.transformer.h[0].attn, put(np.s_[:, 2], torch.zeros_like)
    ),
    "mlp_out[0:2] dim=4 add=0.5": lambda m: [
        after(m.transformer.h[i].mlp, put(np.s_[..., 4], lambda x: x + 0.5)) for i in (0, 1)
    ],
    "z[1] head=1 position=last zero": lambda m: before(
        m.transformer.h[1].attn.c_proj, put(np.s_[:, -1, head(1)], torch.zeros_like)
    ),
    "q[0] head=2 dim=1 scale=-1": lambda m: after(
        m.transformer.h[0].attn.c_attn, put(np.s_[:, :, 17], lambda x: -x)
    ),
    "v[2] head=0 scale=3": lambda m: after(
        m.transformer.h[2].attn.c_attn, put(np.s_[:, :, 48:56], lambda x: x * 3)
    ),
    "mlp_post[0] dim=0:5 add=0.3": lambda m: after(
        m.transformer.h[0].mlp.act, put(np.s_[..., :5], lambda x: x + 0.3)
    ),
    "mlp_pre[1] scale=0.5": lambda m: after(m.transformer.h[1].mlp.c_fc, lambda x: x * 0.5),
    "pattern[0] head=1 key=first scale=0": lambda m: at_pattern(
        m.transformer.h[0].attn, no_first_key
    ),
    "attn_scores[0] head=1 position=1:20 key=first set=-inf": lambda m: at_pattern(
        m.transformer.h[0].attn, drop_first_key
    ),
    "ln2_scale[1] set=2": lambda m: fixed_scale(m, 1),
}


@pytest.mark.parametrize("line", CASES)
def test_edits_agree_with_hooks_on_transformers(oracle, model, line):
    tokens, row_start = oracle.rows(2, T, "unpadded")
    other = double(model)
    CASES[line](other)
    resid, loss = outputs(other, tokens)
    _, got = oracle.capture(model, tokens, row_start, "fp64", wide=True, edits=[line])
    np.testing.assert_allclose(got["resid"], resid, 1e-10, 1e-10)
    np.testing.assert_allclose(got["loss"][:, :-1], loss, 1e-10, 1e-10)
    assert not np.allclose(
        got["top_logits"], oracle.capture(model, tokens, row_start)[1]["top_logits"]
    )
    _, single = oracle.capture(model, tokens, row_start, sites=("resid", "loss"), edits=[line])
    np.testing.assert_allclose(single["resid"], resid, 1e-3, 1e-4)


def test_arrays_tokens_functions_and_their_order(oracle, model):
    tokens, row_start = oracle.rows(2, T, "unpadded")
    chosen = torch.from_numpy(np.isin(tokens, [1, 2, 3, 4, 5, 6]))
    direction = torch.from_numpy(HALF)
    other = double(model)
    before(other.transformer.h[1], lambda x: torch.where(chosen[..., None], x + 2 * direction, x))
    before(other.transformer.h[1], lambda x: x.clamp(-1, 1))
    before(other.transformer.h[1], lambda x: x * 0.7)
    edits = [
        Edit("resid[1]", "add", HALF, tokens="1:7", factor=2.0),
        Edit("resid", "call", lambda x: x.clamp(-1, 1), at=1),
        "resid[1] scale=0.7",
    ]
    resid, _ = outputs(other, tokens)
    _, got = oracle.capture(model, tokens, row_start, "fp64", wide=True, edits=edits)
    np.testing.assert_allclose(got["resid"], resid, 1e-10, 1e-10)


def test_frozen_and_linearised_layers(oracle, model):
    """Downstream of one edit, parts keep what they had without it; an MLP follows its tangent."""
    tokens, row_start = oracle.rows(2, T, "unpadded")
    clean, seen = double(model), {}
    clean.transformer.h[1].attn.register_forward_hook(
        lambda _, i, o: seen.update(attn=o[0].clone())
    )
    at_pattern(clean.transformer.h[2].attn, lambda p: seen.setdefault("pattern", p))
    clean.transformer.h[1].mlp.act.register_forward_hook(
        lambda _, i, o: seen.update(pre=i[0].clone(), post=o.clone())
    )
    outputs(clean, tokens)
    other, kept = double(model), {}
    before(other.transformer.h[1], put(np.s_[:, 0], lambda x: x * 1.5))
    after(other.transformer.h[1].attn, lambda x: seen["attn"])
    at_pattern(other.transformer.h[2].attn, lambda p: seen["pattern"])
    point = seen["pre"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(other.transformer.h[1].mlp.act(point).sum(), point)
    act = other.transformer.h[1].mlp.act
    act.register_forward_pre_hook(lambda _, i: kept.update(now=i[0].clone()))
    after(act, lambda x: seen["post"] + slope * (kept["now"] - seen["pre"]))
    resid, loss = outputs(other, tokens)
    edits = [
        "resid[1] position=first scale=1.5",
        "attn_out[1] freeze",
        "pattern[2] freeze",
        "mlp_post[1] linearise",
    ]
    _, got = oracle.capture(model, tokens, row_start, "fp64", wide=True, edits=edits)
    np.testing.assert_allclose(got["resid"], resid, 1e-10, 1e-10)
    np.testing.assert_allclose(got["loss"][:, :-1], loss, 1e-10, 1e-10)


@pytest.mark.parametrize("layout", ["left", "documents"])
def test_first_and_last_follow_the_row(oracle, model, layout):
    """`first` is the first visible key of every stretch of text, `last` the last real position of a row."""
    tokens, row_start = oracle.rows(3, T, layout, seed=4)
    other = copy.deepcopy(model)
    before(other.transformer.h[1], put(np.s_[:, 0], lambda x: x * 3))
    edits = ["resid[1] position=first scale=3"]
    _, got = oracle.capture(model, tokens, row_start, edits=edits)
    oracle.assert_sites(got, oracle.reference(other, tokens, row_start))
    _, last = oracle.capture(
        model, tokens, row_start, sites=("resid",), edits=["resid[3] position=last zero"]
    )
    ends = [np.flatnonzero(row >= 0)[-1] for row in tokens]
    zero = (last["resid"][3] == 0).all(-1)
    assert [np.flatnonzero(row).tolist() for row in zero] == [[end] for end in ends]


NOTHING = [
    "resid scale=1",
    "attn_out scale=1",
    "mlp_out add=0",
    "pattern scale=1",
    "attn_scores add=0",
    "z freeze",
    "ln1_scale scale=1",
    "ln_final_scale freeze",
    "resid freeze",
    "mlp_out freeze",
    "pattern freeze",
    "q add=0",
    "mlp_post linearise",
    "mlp_pre noise=0",
]


def test_an_edit_that_changes_nothing_changes_no_bit(oracle, model):
    tokens, row_start = oracle.rows(3, 37, "documents")
    for preset in ({"preset": "all"}, {"sites": ("resid", "loss")}):
        _, plain = oracle.capture(model, tokens, row_start, **preset)
        for edits in [[line] for line in NOTHING] + [NOTHING]:
            _, got = oracle.capture(model, tokens, row_start, edits=edits, **preset)
            for name, value in got.items():
                np.testing.assert_array_equal(value, plain[name], f"{name} with {edits}")


@pytest.fixture(scope="module")
def on_disk(oracle, model, tmp_path_factory):
    home = tmp_path_factory.mktemp("edits")
    model.save_pretrained(home / "model")
    tokens, _ = oracle.rows(6, 24, "left")
    np.save(home / "ids.npy", tokens)
    other, _ = oracle.rows(6, 24, "unpadded", seed=9)
    np.save(home / "other.npy", other)

    def run(name, ids="ids", **settings):
        return headwater.extract(
            headwater.RunConfig(
                out=home / name,
                model=str(home / "model"),
                tokens=str(home / f"{ids}.npy"),
                dtype="float32",
                block=2,
                **{"preset": "all"} | settings,
            )
        )

    run.home = home
    run.source = run("source", "other")
    return run


def test_patching_every_depth_reproduces_the_source(on_disk):
    """Whatever the tokens are: the output is then the source's, bit by bit, save the loss, whose targets are not."""
    run = on_disk("patched", "other", edits=[f"resid patch={on_disk.source.path}"])
    for name in ("resid", "top_logits", "loss"):
        np.testing.assert_array_equal(run[name][...], on_disk.source[name][...], name)
    np.save(on_disk.home / "shifted.npy", np.roll(np.load(on_disk.home / "other.npy"), 1, 1))
    run = on_disk("moved", "shifted", edits=[f"resid[0] patch={on_disk.source.path}"])
    for name in ("pattern", "resid", "top_logits"):
        np.testing.assert_array_equal(run[name][...], on_disk.source[name][...], name)


def test_means_prompts_and_noise(on_disk):
    source = on_disk.source
    mean = source["mlp_out"][1].astype(np.float64).mean((0, 1))
    run = on_disk("mean", edits=[f"mlp_out[1] mean={source.path}"])
    real = run.plain("row_start") <= np.arange(24)
    np.testing.assert_allclose(
        run["mlp_out"][1][real], np.broadcast_to(mean, (real.sum(), 24)), 1e-5, 1e-6
    )
    ids = [3, 1, 4, 1, 5]
    prompt = headwater.capture(str(on_disk.home / "model"), np.array([ids]), ["z"])
    run = on_disk(
        "prompt", edits=["z[2] head=1 position=last source=-1 patch=ids:" + ",".join(map(str, ids))]
    )
    np.testing.assert_allclose(
        run["z"][2][:, -1, 1], prompt.z[2, 0, -1, 1].values[None].repeat(6, 0), 1e-6, 1e-7
    )
    noise = "resid[1] position=3: noise=0.5 seed=7"
    one, two = (on_disk(f"noise-{n}", "other", edits=[noise], max_sequences=n) for n in (6, 3))
    np.testing.assert_array_equal(one["resid"][:, :3], two["resid"][...])
    added = one["resid"][1] - source["resid"][1]
    assert (added[:, :3] == 0).all() and abs(added[:, 3:].std() - 0.5) < 0.03


def test_an_edited_run_is_a_run(on_disk, cli, monkeypatch):
    """It resumes by its name alone, knows its edits, and is not taken for another."""
    from headwater.extractor.block import Worker

    np.save(on_disk.home / "direction.npy", HALF)
    edits = [
        "resid[1] position=first dim=3 scale=0.5",
        f"resid[2] factor=0.3 add={on_disk.home / 'direction.npy'}",
        f"mlp_out[2] patch={on_disk.source.path}",
        "pattern[2] freeze",
    ]
    whole = on_disk("whole", edits=edits)
    work = Worker.extract_block

    def stop(self, block, attempt):
        if block == 1:
            raise KeyboardInterrupt
        return work(self, block, attempt)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Worker, "extract_block", stop)
        on_disk("resumed", edits=edits)
    assert cli("extract", "--out", on_disk.home / "resumed").code == 0
    resumed = headwater.open_run(on_disk.home / "resumed")
    assert (
        resumed.manifest.fingerprint
        == whole.manifest.fingerprint
        != on_disk("plain").manifest.fingerprint
    )
    for name in whole.sites:
        np.testing.assert_array_equal(resumed[name][...], whole[name][...], name)
    flags = (
        "extract",
        "--model",
        on_disk.home / "model",
        "--tokens",
        on_disk.home / "ids.npy",
        "--preset",
        "all",
        "--dtype",
        "float32",
        "--out",
        on_disk.home / "whole",
    )
    cli(*flags, "--edit", edits[0]).error(2, "another configuration: edits is")
    np.save(on_disk.home / "direction.npy", 2 * HALF)
    cli(*flags, *(part for line in edits for part in ("--edit", line))).error(2, "edits is")


def test_edits_in_toml_and_on_ray(on_disk, cli):
    (on_disk.home / "run.toml").write_text(
        'block = 2\ndtype = "float32"\npreset = "all"\nedits = ["z[1] head=0 zero", '
        '{ site = "mlp_post", op = "linearise", at = 2 }]\n'
    )
    flags = (
        "extract",
        "--config",
        on_disk.home / "run.toml",
        "--model",
        on_disk.home / "model",
        "--tokens",
        on_disk.home / "ids.npy",
        "--out",
    )
    for name, more in (("toml", ()), ("ray", ("--workers", 1))):
        assert cli(*flags, on_disk.home / name, *more).code == 0
    here, there = (headwater.open_run(on_disk.home / name) for name in ("toml", "ray"))
    assert (here["z"][1][:, :, 0][here.plain("row_start") <= np.arange(24)] == 0).all()
    for name in here.sites:
        np.testing.assert_array_equal(here[name][...], there[name][...], name)


BAD = {
    "resid[4] scale=2": "out of range",
    "resid[1] dim=24 scale=2": "24 is out of range",
    "z[0] head=3 zero": "out of range",
    "resid[1] position=40 zero": "positions",
    "resid[1] zero scale=2": "two ops",
    "resid[1]": "does not say what to do",
    "reside[1] zero": "did you mean 'resid'",
    "resid_norm zero": "edit resid instead",
    "loss zero": "computed from other values",
    "mlp_out head=1 zero": "no heads",
    "resid[1] colour=red zero": "not understood",
    "resid[1] scale=two": "multiply by a number",
    "resid[1] scale=nan": "NaN",
    "resid[1] set=inf": "hides a key",
    "resid[1] add=missing.npy": "neither a number nor a .npy file",
    "resid[1] mean=missing": "no run at missing",
    "resid[1] patch=ids:1,99": "below 31",
    "resid[1] patch=ids:1,2": "has 2 positions",
    "resid[1] patch=text:hello": "no tokenizer",
    "mlp_pre linearise": "its site is mlp_post",
    "resid[1] call=nowhere:f": "there is no function",
    "pattern noise=1": "noise is for",
    "resid[1] 'zero": "cannot be read",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_edits_are_refused_by_name(on_disk, cli, line):
    out = on_disk.home / "never"
    answer = cli(
        "extract",
        "--model",
        on_disk.home / "model",
        "--tokens",
        on_disk.home / "ids.npy",
        "--out",
        out,
        "--edit",
        line,
    )
    answer.error(2, "--edit", BAD[line])
    assert not out.exists()


def test_python_arrays_that_do_not_fit(on_disk):
    with pytest.raises(RequestError, match=r"shape \(5,\).*broadcast to \(1, 24\)"):
        headwater.capture(
            str(on_disk.home / "model"),
            np.array([[1, 2]]),
            edits=[Edit("resid[1]", "add", np.ones(5))],
        )
    with pytest.raises(RequestError, match="site, op and any of"):
        headwater.capture(
            str(on_disk.home / "model"), np.array([[1, 2]]), edits=[{"site": "resid"}]
        )


def test_a_line_reads_as_it_prints():
    for line in (
        *CASES,
        *NOTHING,
        "pattern[0] position=first head=1 key=0:4 zero",
        "k noise=0.5 seed=3",
    ):
        assert vars(parse_edit(str(parse_edit(line)))) == vars(parse_edit(line))


ANYTHING = strategies.one_of(
    strategies.none(),
    strategies.integers(),
    strategies.lists(strategies.integers(-9, 9) | strategies.text(max_size=3), max_size=3),
    strategies.from_regex(SPOTS, fullmatch=True),
    strategies.from_regex(r"[0-9:, \\\\'\"=a-z]{0,12}", fullmatch=True),
)
VALUES = strategies.one_of(
    strategies.none(), strategies.integers(), strategies.floats(), strategies.text(max_size=12)
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    site=strategies.sampled_from(("resid", "z[1]", "pattern[0,2:]", "mlp_post", "attn_scores")),
    op=strategies.sampled_from(tuple(OPS)),
    value=VALUES,
    positions=ANYTHING,
    heads=ANYTHING,
    dims=ANYTHING,
    keys=ANYTHING,
    more=strategies.dictionaries(
        strategies.sampled_from(OPTIONS), strategies.integers() | strategies.floats(), max_size=2
    ),
)
def test_an_edit_is_refused_or_reads_back_as_itself(
    site, op, value, positions, heads, dims, keys, more
):
    """Else a line that was checked could be another edit for whoever reads it."""
    try:
        edit = Edit(site, op, value, None, positions, None, heads, dims, keys, **more)
    except RequestError:
        return
    assert vars(parse_edit(str(edit))) == vars(edit)
    assert [vars(e) for e in read_edits([edit.to_json()])] == [vars(edit)]


@pytest.mark.parametrize(
    "edit",
    [
        {"site": "resid", "op": "zero", "positions": "0 call=os:getcwd\\"},
        {"site": "resid", "op": "zero", "dims": "0 scale=2"},
        {"site": "resid", "op": "zero", "at": "1] call=os:getcwd ["},
        {"site": "resid", "op": "zero", "heads": [True]},
        {"site": "resid", "op": ["zero"]},
        {"site": "resid", "op": "scale", "value": 10**400},
        {"site": "resid", "op": "noise", "value": 1, "seed": -1},
        "resid 'position=0 call=os:getcwd\\' zero",
    ],
)
def test_selections_are_numbers_ranges_and_named_positions(edit):
    with pytest.raises(RequestError, match="--edit"):
        read_edits([edit])


def test_a_file_calls_a_function_only_where_that_is_allowed(on_disk, cli, tmp_path):
    """Neither a run that goes on nor a TOML file is code; who asks for the function again, or allows it, has it."""
    line = "resid[1] call=torch:abs"
    whole = on_disk("called", edits=[line])
    out, name = whole.path, "torch:abs"
    (out / "headwater" / "ledger" / "00000001.1.json").unlink()
    cli("extract", "--out", out).error(2, "running code", f"--allow-call {name}")
    cli("plan", "--out", out, "--allow-call", "torch:neg").error(2)
    cli("extract", "--out", out, "--allow-call", "torch:neg").error(2, "running code")
    assert cli("extract", "--out", out, "--allow-call", name).code == 0
    (out / "headwater" / "ledger" / "00000001.2.json").unlink(missing_ok=True)
    (out / "headwater" / "ledger" / "00000001.1.json").unlink(missing_ok=True)
    on_disk("called", edits=[line])
    assert headwater.open_run(out).complete.all()
    toml = tmp_path / "run.toml"
    toml.write_text(f'edits = ["{line}"]\n')
    asked = ("plan", "--config", toml, "--model", on_disk.home / "model")
    asked += ("--tokens", on_disk.home / "ids.npy")
    cli(*asked).error(2, "running code", str(toml))
    assert cli(*asked, "--allow-call", name).code == 0
    toml.write_text(f'edits = ["{line}"]\nallow_call = ["{name}"]\n')
    cli(*asked).error(2, "cannot allow itself")


@pytest.mark.parametrize("name", ["..x:y", "os:getcwd", "os:getpid.x", ":", "this_is_not:there"])
def test_functions_that_cannot_be_called_are_named(on_disk, cli, name):
    out = on_disk.home / "uncalled"
    flags = ("--model", on_disk.home / "model", "--tokens", on_disk.home / "ids.npy", "--out", out)
    answer = cli("extract", *flags, "--edit", f"resid[1] call={name}")
    answer.error(1 if name == "os:getcwd" else 2, f"call={name}")
    assert "fault in Headwater" not in answer.err


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00v\x00{(", "archive", "huge"]
)
def test_arrays_that_are_no_npy_are_refused(tmp_path, data):
    path = tmp_path / "array.npy"
    if data == "archive":
        np.savez(tmp_path / "array", a=HALF)
        path = tmp_path / "array.npz"
    elif data == "huge":
        np.save(path, HALF)
        path.write_bytes(path.read_bytes().replace(b"(24,)", b"(10000000000000,)"))
    else:
        path.write_bytes(data)
    with pytest.raises(RequestError, match=r"neither a number|an archive"):
        load_array(Edit("resid[1]", "set", str(path)))


def test_a_process_that_switched_calls_off_refuses_them_all(monkeypatch):
    monkeypatch.setattr(edit_places, "_no_calls", "")
    edit = Edit("resid", "call", "torch:abs")
    assert edit_places.find_function(edit) is torch.abs
    edit_places.switch_calls_off("this is a test.")
    for other in (edit, Edit("resid", "call", torch.abs)):
        with pytest.raises(RequestError, match="and this is a test"):
            edit_places.find_function(other)


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_activations_are_those_of_the_forward_pass(name):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    value, slope = value_and_slope(name, x)
    torch.testing.assert_close(value, ACTIVATIONS[name](x.clone()), rtol=1e-12, atol=1e-12)
    h, away = 1e-6, x.abs() > 1e-3
    near = [ACTIVATIONS[name](x + sign * h) for sign in (1, -1)]
    torch.testing.assert_close(
        slope[away], ((near[0] - near[1]) / (2 * h))[away], rtol=1e-6, atol=1e-8
    )
