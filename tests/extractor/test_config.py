"""A request from flags, TOML or Python becomes one checked configuration, and what fixes the bytes is its own."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from headwater.cli.command import Parser, add_options
from headwater.extractor.request import RunConfig, fingerprint, make_config
from headwater.extractor.selection import select
from headwater.extractor.settings import COUNT, PLAIN, TEXT, option, options_of, request_schema
from headwater.extractor.sites import PRESETS, RequestError

MODEL = SimpleNamespace(n_layer=2, n_head=2)


def canonical(**settings):
    config = RunConfig("run", **settings)
    return config.canonical(
        select(MODEL, 8, config.requested, config.layers), 8, config.block or 64
    )


def test_python_may_give_natural_types(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = RunConfig(
        Path("a/run"),
        text=Path("b.txt"),
        sites=["resid", "q"],
        layers=[0, 1],
        depths=2,
        labels="a,b",
        dtype={"default": "float32", "resid": "float16"},
        tokenizer=Path("t"),
    )
    assert (config.out, config.text, config.sites, config.labels) == (
        "a/run",
        ("b.txt",),
        ("resid", "q"),
        ("a", "b"),
    )
    assert (config.layers, config.depths, config.dtype) == ("0,1", "2", "float32,resid=float16")
    assert RunConfig("run", sites="resid, q").requested == ("resid", "q")
    assert RunConfig("run", text="a, b.txt").text == ("a, b.txt",)
    assert RunConfig("~/run").out == "/home/someone/run"
    assert RunConfig("run").requested == PRESETS["residual"]
    assert RunConfig("run", threads=2).to_json() == {"out": "run", "threads": 2}
    assert replace(config, out="c").layers == "0,1"


WRONG = {
    "out": ("", 3, None),
    "model": ("", 3, None),
    "text": ([1], "", 4),
    "sites": ([1], "", ["q", " "]),
    "labels": ([None],),
    "preset": ("none", 1),
    "mode": ("Pack",),
    "compute": ("float32",),
    "on_overflow": ("x",),
    "seq_len": (0, -1, 1.0, "8", True),
    "block": (3, 12),
    "top_k": (None, 0),
    "threads": (4097,),
    "bos": (1, "true"),
    "jsonl": (None,),
    "layers": ("", [1, "2"], [], True, 1.5),
    "positions": ({},),
    "tokens": ("", 1),
    "dtype": (
        "bfloat16",
        "float64",
        "q=int8",
        "zz=float16",
        "float16,float32",
        "q=float16,q=float32",
        "",
        None,
        "attn_argmax=float16",
    ),
    "codec": ("gzip", "zstd-9", {"q": 3}, ["none"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_values_that_a_setting_cannot_have_are_refused(name):
    for value in WRONG[name]:
        with pytest.raises(RequestError, match=f"^--{name.replace('_', '-')} "):
            RunConfig(**{"out": "run", name: value})


def test_every_setting_says_what_it_is():
    for one in options_of(RunConfig):
        assert one.help and one.part and one.kind.schema, one.name
        assert one.leads is not None or one.refused, f"{one.name}: what do its values name?"
    for name in ("mode", "bos", "column", "max_tokens"):
        with pytest.raises(RequestError, match="--tokens gives them as they are"):
            RunConfig(
                "run",
                tokens="ids.npy",
                **{name: {"mode": "document", "bos": True, "column": "c"}.get(name, 4)},
            )


@dataclass(frozen=True)
class Other(RunConfig):
    """A request with two options that nothing else knows."""

    depth_charge: int = field(
        default=3, metadata=option(COUNT, "how to compute and store", "charges to lay", "N")
    )
    motto: str | None = field(
        default=None, metadata=option(TEXT, "mottos", "what to live by", "WORDS", leads=PLAIN)
    )


def test_a_field_is_all_that_a_new_option_takes(tmp_path):
    parser = Parser(prog="other")
    add_options(parser, Other)
    options = parser.parse_args(["--out", "run", "--depth-charge", "5"])
    assert make_config(vars(options), None, None, Other).depth_charge == 5
    text = parser.format_help()
    assert "--depth-charge N" in text and "charges to lay" in text and "mottos:" in text
    (tmp_path / "run.toml").write_text('out = "run"\ndepth-charge = 7\nmotto = "more"\n')
    read = make_config({}, str(tmp_path / "run.toml"), None, Other)
    assert (read.depth_charge, read.motto) == (7, "more")
    with pytest.raises(RequestError, match=r"^--depth-charge is 0; expected a whole number from 1"):
        Other("run", depth_charge=0)
    schema = request_schema(Other)["properties"]
    assert schema["depth_charge"] == {
        "type": "integer",
        "minimum": 1,
        "description": "charges to lay",
        "default": 3,
    }
    assert schema["motto"]["type"] == "string" and "ray" not in schema


def test_stored_types_have_defaults_and_exceptions():
    config = RunConfig("run", dtype="resid=float32", codec="zstd-1,pattern=none")
    expected = {
        "resid": "float32",
        "q": "float16",
        "pattern": "float16",
        "loss": "float32",
        "attn_argmax": "int32",
    }
    assert {site: config.dtype_of(site) for site in expected} == expected
    assert (config.codec_of("q"), config.codec_of("pattern")) == ("zstd-1", "none")
    half = RunConfig("run", dtype="float16,loss=float16")
    assert (half.dtype_of("loss"), half.dtype_of("resid_norm")) == ("float16", "float32")


def test_what_fixes_the_bytes_is_written_out():
    whole = canonical()
    assert (
        whole
        == canonical(sites=("resid",))
        == canonical(text=("a",), threads=3, dtype="float16", top_k=3)
    )
    assert whole["dtype"] == {"resid": "float16"} and whole["top_k"] is None
    for change in (
        {"dtype": "float32"},
        {"codec": "zstd-1"},
        {"compute": "bf16"},
        {"block": 32},
        {"sites": ["q"]},
        {"on_overflow": "keep"},
    ):
        assert canonical(**change) != whole
    assert (
        canonical(sites=["q"])
        == canonical(sites=["q"], layers=":")
        == canonical(sites=["q"], layers="0,1")
    )
    first = fingerprint(whole, "weights", "tokens")
    assert first == fingerprint(dict(reversed(whole.items())), "weights", "tokens")
    others = {
        fingerprint(canonical(block=32), "weights", "tokens"),
        fingerprint(whole, "w", "tokens"),
        fingerprint(whole, "weights", "t"),
    }
    assert len(others | {first}) == 4


def test_flags_replace_what_a_file_says(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'out = "a"\nsites = ["q"]\ntokens = "ids.npy"\nthreads = 2\nwithin-documents = true\nlayers = 1\n'
    )
    with pytest.raises(RequestError, match="--within-documents says how"):
        make_config({}, str(file))
    flags = {
        "text": ["b.txt"],
        "preset": "statistics",
        "threads": None,
        "command": print,
        "json": False,
    }
    config = make_config(flags, str(file))
    assert (config.text, config.tokens, config.sites, config.preset) == (
        ("b.txt",),
        None,
        (),
        "statistics",
    )
    assert (config.out, config.threads, config.within_documents, config.layers) == (
        "a",
        2,
        True,
        "1",
    )
    assert make_config({"out": "c", "text": ["b"]}, str(file)).out == "c"
    assert make_config({"text": ["b"]}, str(file), out="default").out == "a"
    assert make_config({}, out="default").out == "default"


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("seq_length = 3", {}, "'seq_length' is not a setting; did you mean 'seq_len'?"),
        ("x = 1", {}, "'x' is not a setting. Settings are the flags"),
        ("seq_len = ", {}, "cannot be read: Invalid value"),
        (
            'seq_len = "3"',
            {},
            r"--seq-len is '3'; expected a whole number from 1 on\. \(That is seq_len in .*run\.toml",
        ),
        ("seq_len = 3", {"seq_len": 0}, "--seq-len is 0; expected a whole number from 1 on.$"),
        ("[dtype]\nresid = 3", {}, "--dtype has '3'"),
        ('text = "a"\ntokens = "b"', {}, "--text and --tokens were both given in .*run.toml"),
        ("", {"preset": "all", "sites": "q"}, "--preset and --sites were both given; expected one"),
        ("", {"out": None}, "--out is missing"),
    ],
)
def test_files_that_are_wrong_are_refused(tmp_path, text, flags, message):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(RequestError, match=message):
        make_config({"out": "run"} | flags, str(tmp_path / "run.toml"))


@pytest.mark.parametrize("inner", ["headwater/ledger/00000001.9.gone", "a/b", "../run.analysis/x"])
def test_no_run_is_made_inside_another(tmp_path, cli, tiny_gpt2, inner):
    """A name can mean something to the run around it: such a folder in its ledger would take a block out."""
    run = tmp_path / "run"
    (run / "headwater").mkdir(parents=True)
    (run / "headwater" / "manifest.json").write_text("{}")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox")
    (tmp_path / "linked").symlink_to(run)
    asked = ("extract", "--model", tiny_gpt2, "--text", text, "--out")
    for out in (run / inner, tmp_path / "linked" / inner):
        cli(*asked, out).error(2, "lies in the run")
        assert not out.exists()


@pytest.mark.parametrize(
    ("name", "value"), [("seq_len", 0), ("dtype", "float8"), ("mode", "rows"), ("layers", 1.5)]
)
def test_an_error_names_its_setting_in_a_field(tmp_path, name, value):
    with pytest.raises(RequestError) as caught:
        RunConfig("run", **{name: value})
    assert caught.value.flag == name
    file = tmp_path / "run.toml"
    file.write_text(f"{name} = {json.dumps(value)}\n")
    with pytest.raises(RequestError, match=rf"\(That is {name} in {file}\.\)$"):
        make_config({"out": "run"}, str(file))
