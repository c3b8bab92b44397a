"""What bounds a run: named from the ledger's seconds, projected from rates that are measured or stated."""

import json

import pytest

from headwater.extractor.limits import bottleneck, find_rates, flops_per_token, project, read_rates
from headwater.extractor.model.weights import ModelConfig
from headwater.extractor.plan import Geometry, make_plan
from headwater.extractor.request import RunConfig
from headwater.extractor.sites import RequestError

GPT2 = ModelConfig.from_hf(
    {
        "model_type": "gpt2",
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
    "config",
)
H200 = "compute=400,link=50,disk=5"


def projected(assume=H200, **request):
    config = RunConfig(out=".", device="cuda", compute="bf16", **request)
    plan = make_plan(config, GPT2, Geometry(1024, 8, 8), 64)
    return plan, project(plan, find_rates(config, read_rates(assume)))


@pytest.mark.parametrize(
    ("seconds", "part", "busy"),
    [
        (
            {"compute": 10, "wait": 1, "write": 3, "sync": 2, "finish": 1},
            "compute",
            {"compute": 9, "disk": 5},
        ),
        ({"compute": 10, "wait": 8, "write": 9, "sync": 1}, "disk", {"compute": 2, "disk": 10}),
        (
            {"compute": 4, "wait": 6, "copy": 9, "encode": 5, "write": 3, "sync": 1},
            "copy",
            {"compute": 4, "copy": 9, "encode": 5, "disk": 4},
        ),
        (
            {"compute": 4, "wait": 6, "copy": 1, "encode": 8, "write": 3, "sync": 1},
            "encode",
            {"compute": 4, "copy": 1, "encode": 8, "disk": 4},
        ),
    ],
)
def test_the_busiest_part_is_the_bottleneck(seconds, part, busy):
    assert bottleneck(seconds) == (part, busy)


def test_flops_are_those_of_gpt2():
    """12 layers of 12 d² weights, 2 operations each, and scores and mixing over half of T keys."""
    plan, _ = projected(preset="residual")
    assert flops_per_token(plan) == 12 * (2 * 12 * 768**2 + 2 * 1024 * 768)
    with_loss, _ = projected(sites=("loss",))
    assert flops_per_token(with_loss) - flops_per_token(plan) == 2 * 50257 * 768


def test_patterns_cannot_stream_and_statistics_can():
    """Bytes a token of GPT-2 small: residual 20 kB, patterns as fp16 tiles 184 kB, row statistics 4.6 kB."""
    _, residual = projected(preset="residual")
    _, patterns = projected(sites=("pattern",))
    _, statistics = projected(sites=("attn_entropy", "attn_max"))
    assert residual.tokens_per_second["link"] == pytest.approx(50e9 / 19968, rel=0.01)
    assert patterns.bound == "disk" and patterns.statistics == pytest.approx(
        5e9 / (8 * 4 * 144), rel=0.01
    )
    assert patterns.tokens_per_second["disk"] == pytest.approx(
        5e9 / (12 * 12 * 2 * 10 * 256 * 256 / 1024), rel=0.04
    )
    assert statistics.bound == "compute" and statistics.statistics is None
    assert projected("disk=1000", sites=("pattern",))[1].bound == "link"
    assert projected("disk=1000,link=1000", sites=("pattern",))[1].bound == "compute"


def test_rates_say_where_they_come_from():
    here = find_rates(RunConfig(out="."), read_rates("link=3"))
    assert {name: rate.how for name, rate in here.items()} == {
        "compute": "measured",
        "disk": "assumed",
    }
    there = find_rates(RunConfig(out=".", device="cuda"), read_rates("disk=2"))
    assert {name: rate.how for name, rate in there.items()} == {
        "compute": "assumed",
        "link": "assumed",
        "disk": "stated",
    }
    assert there["disk"].value == 2e9
    for wrong in ("fast", "disk", "disk=0", "disk=-1", "disk=nan", "gpu=3", "disk=1,,link=2"):
        with pytest.raises(RequestError, match="is no rate; expected for example"):
            read_rates(wrong)


def test_plan_and_status_say_it(cli, tiny_gpt2, tiny_text, tmp_path):
    request = ("--model", tiny_gpt2, "--text", tiny_text, "--sites", "pattern,resid")
    told = cli("plan", *request, "--assume", "compute=1000,disk=0.001")
    assert told.code == 0, told
    assert "projected, not measured: compute" in told.out and "bound by the disk" in told.out
    assert "disk 0.001 GB/s stated" in told.out and "pattern cannot stream" in told.out
    given = json.loads(cli("plan", *request, "--json").out)["projection"]
    assert (
        given["rates"]["compute"]["how"] == "measured"
        and given["bound"] in given["tokens_per_second"]
    )
    cli("plan", *request, "--assume", "disk=x").error(
        2, "--assume 'disk=x'", "expected for example"
    )
    assert cli("extract", *request, "--out", tmp_path / "run").code == 0
    assert "\nlimit    " in cli("status", tmp_path / "run").out
    assert json.loads(cli("status", tmp_path / "run", "--json").out)["bottleneck"] in (
        "compute",
        "disk",
    )


def test_a_device_that_is_not_there_is_refused(cli, tiny_gpt2, tiny_text, tmp_path):
    request = ("--model", tiny_gpt2, "--text", tiny_text, "--out", tmp_path / "run")
    cli("extract", *request, "--device", "cuda:7").error(2, "--device is 'cuda:7'", "--device cpu")
    cli("extract", *request, "--device", "tpu").error(2, "--device is 'tpu'", "cuda:1")
    assert not (tmp_path / "run").exists()
    told = cli("plan", *request, "--device", "cuda").out
    assert "link" in told and "needed on the GPU, projected" in told
    cli("plan", *request, "--device", "cuda", "--edit", "resid[1] scale=2").error(
        2, "--edit", "Leave --device out"
    )
