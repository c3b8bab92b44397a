"""Every command says what it did: text for people, JSON alone on standard output, and a run that is what was asked."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest

from headwater.cli.entry import main
from headwater.cli.parser import make_parser
from headwater.extractor.request import RunConfig
from headwater.extractor.settings import options_of
from headwater.extractor.sites import PRESETS, SITES
from headwater.kernels.cpu import products
from headwater.store.reader import open_run


@pytest.fixture(scope="module")
def made(tiny_gpt2, tiny_text, tmp_path_factory):
    """A finished run of the preset `all`."""
    run = tmp_path_factory.mktemp("made") / "run"
    flags = ["--model", str(tiny_gpt2), "--text", str(tiny_text), "--preset", "all", "--block", "8"]
    assert main(["extract", *flags, "--out", str(run)]) == 0
    return run


def test_plan_shows_what_extract_then_writes(cli, made, tiny_gpt2, tiny_text, tmp_path):
    flags = [
        "--model",
        tiny_gpt2,
        "--text",
        tiny_text,
        "--preset",
        "all",
        "--block",
        8,
        "--out",
        tmp_path / "run",
    ]
    plain, plan = cli("plan", *flags), json.loads(cli("plan", *flags, "--json").out)
    assert plain.code == 0 and plain.err == ""
    assert all(f"  {name} " in plain.out for name in PRESETS["all"])
    assert (
        "of the bytes" in plain.out
        and "needed" in plain.out
        and "--dtype resid=float32" in plain.out
    )
    assert set(plan["arrays"]) == set(PRESETS["all"])
    assert plan["n_sequences"] == open_run(made).manifest.n_sequences
    assert (
        plan["total_bytes"]
        == sum(a["n_bytes"] for a in plan["arrays"].values()) + plan["text_bytes"]
    )
    assert not (tmp_path / "run").exists()


def test_extract_reports_on_both_streams(cli, tiny_gpt2, tiny_text, tmp_path):
    flags = [
        "--model",
        tiny_gpt2,
        "--text",
        tiny_text,
        "--preset",
        "statistics",
        "--block",
        8,
        "--out",
    ]
    done = cli("extract", *flags, tmp_path / "a", "--json")
    report = json.loads(done.out)
    assert (done.code, report["complete"]) == (0, report["n_sequences"])
    assert set(report["sites"]) == set(PRESETS["statistics"])
    lines = done.err.splitlines()
    assert lines[0].startswith("reading text") and lines[-1].split()[1] == "{0}/{0}".format(
        report["n_blocks"]
    )
    assert "\r" not in done.err and "\x1b" not in done.err
    again = cli("extract", *flags, tmp_path / "a")
    assert again.code == 0 and "nothing to do" in again.err
    assert again.out.startswith(
        f"{tmp_path / 'a'}: {report['n_sequences']} sequences of 32 positions, 16 arrays"
    )
    only_out = cli("extract", "--out", tmp_path / "a")
    assert (only_out.code, only_out.out) == (0, again.out)


def test_status_info_and_verify_describe_a_run(cli, made):
    status, info, verify = (cli(name, made) for name in ("status", "info", "verify"))
    assert [r.code for r in (status, info, verify)] == [0, 0, 0]
    assert [r.err for r in (status, info, verify)] == ["", "", ""]
    assert ": done\nseconds  compute" in status.out and "0 problems" in verify.out
    assert "2 layers, 2 heads, d_model 16" in info.out and "pattern " in info.out
    assert (f", products by {products.library()}" in info.out) == (products.library() != "torch")
    facts = json.loads(cli("status", made, "--json").out)
    assert facts["done"] and facts["committed"] == facts["n_blocks"] > 1 and facts["casts"] == {}
    assert facts["n_tokens"] == int((open_run(made).tokens >= 0).sum())
    manifest = json.loads(cli("info", made, "--json").out)
    assert (
        manifest["fingerprint"] in open_run(made).manifest.fingerprint and "statics" not in manifest
    )
    for flags in ([], ["--quick"], ["--workers", 3]):
        report = json.loads(cli("verify", made, "--json", *flags).out)
        assert report["problems"] == [] and report["n_files"] > 100


def test_damage_is_found_repaired_and_computed_again(cli, made, tiny_gpt2, tiny_text, tmp_path):
    run, flags = (
        tmp_path / "run",
        ["--model", tiny_gpt2, "--text", tiny_text, "--sites", "resid,loss", "--block", 8],
    )
    assert cli("extract", *flags, "--out", run).code == 0
    shard = run / "resid/c/0/0/0/0"
    data = bytearray(shard.read_bytes())
    whole = bytes(data)
    data[100] ^= 1
    shard.write_bytes(data)
    found = cli("verify", run)
    name = str(shard.relative_to(run))
    assert (
        found.code == 1
        and f"{name}: does not match its checksum (block 0)" in found.out
        and "--repair" in found.out
    )
    assert cli("verify", run, "--quick").code == 0
    problems = json.loads(cli("verify", run, "--json").out)["problems"]
    found = {"path": name, "what": "does not match its checksum", "block": 0, "result": None}
    assert problems == [found]
    fixed = cli("verify", run, "--repair")
    assert fixed.code == 0 and "took 1 block out" in fixed.out
    status = cli("status", run)
    assert f"go on with `headwater extract --out {run}`" in status.out
    assert not json.loads(cli("status", run, "--json").out)["done"]
    assert cli("extract", "--out", run).code == 0
    assert cli("verify", run).code == 0 and shard.read_bytes() == whole


def test_a_file_that_is_written_once_cannot_be_repaired(cli, tiny_gpt2, tiny_text, tmp_path):
    run = tmp_path / "run"
    assert (
        cli(
            "extract", "--model", tiny_gpt2, "--text", tiny_text, "--sites", "loss", "--out", run
        ).code
        == 0
    )
    (run / "tokenizer.json").write_text("{}")
    found = cli("verify", run, "--repair")
    assert (
        found.code == 1
        and "tokenizer.json: has 2 bytes" in found.out
        and "cannot be repaired" in found.out
    )


def test_sites_lists_names_shapes_and_presets(cli, tiny_gpt2):
    plain, sized = cli("sites"), cli("sites", "--model", tiny_gpt2)
    assert all(f"{name:15} {site.title}\n" in plain.out for name, site in SITES.items())
    assert "(layer, sequence, head, query, key)  blocks.L.attn.hook_pattern" in plain.out
    assert "(depth 3, sequence, position, d_model 16)" in sized.out
    assert json.loads(cli("sites", "--json", "--model", tiny_gpt2).out)["mlp_pre"]["sizes"] == {
        "layer": 2,
        "d_mlp": 64,
    }


def test_flags_win_over_toml(cli, tiny_gpt2, tiny_text, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        f'model = "{tiny_gpt2}"\ntext = "{tiny_text}"\nsites = ["resid", "pattern"]\nlayers = [0]\nseq-len = 16\n'
        f'out = "{tmp_path / "toml"}"\nbos = true\nmax_sequences = 5\n[dtype]\nresid = "float32"\n'
    )
    assert cli("extract", "--config", file).code == 0
    first = open_run(tmp_path / "toml").manifest
    assert (first.n_sequences, first.n_positions, first.config["layers"]) == (5, 16, [0])
    assert first.config["dtype"] == {"resid": "float32", "pattern": "float16"}
    flags = [
        "--preset",
        "statistics",
        "--seq-len",
        "8",
        "--layers",
        "-1:",
        "--out",
        tmp_path / "flags",
    ]
    assert cli("extract", "--config", file, *flags).code == 0
    second = open_run(tmp_path / "flags").manifest
    assert (second.n_sequences, second.n_positions, second.config["layers"]) == (5, 8, [1])
    assert second.config["sites"] == list(PRESETS["statistics"])
    assert json.loads(cli("plan", "--config", file, "--json").out)["n_sequences"] == 5


def test_ready_tokens_and_selections_reach_the_run(cli, tiny_gpt2, tmp_path):
    ids = np.arange(60).reshape(5, 12).astype(np.int64)
    ids[2, 9:] = -1
    np.save(tmp_path / "ids.npy", ids)
    flags = [
        "--tokens",
        tmp_path / "ids.npy",
        "--sites",
        "resid,pattern",
        "--layers",
        "-1",
        "--depths",
        "0,-1",
    ]
    flags += ["--heads", "1", "--positions", "last", "--codec", "none,pattern=zstd-1"]
    out = tmp_path / "run"
    assert cli("extract", "--model", tiny_gpt2, *flags, "--out", out).code == 0
    run = open_run(out)
    assert (run.tokens == ids).all()
    assert run["resid"].shape == (2, 5, 1, 16) and run["pattern"].shape == (1, 5, 1, 12, 12)
    assert run.plain("selected_position").tolist() == [-1]
    again = cli("extract", "--out", out)
    assert again.code == 0 and "nothing to do" in again.err
    assert "will shrink" in cli("plan", "--model", tiny_gpt2, *flags).out


def test_a_run_can_lie_in_the_directory_of_its_text(cli, tiny_gpt2, tiny_text, tmp_path):
    (tmp_path / "a.txt").write_bytes(tiny_text.read_bytes())
    flags = ["--model", tiny_gpt2, "--text", tmp_path, "--sites", "loss", "--out", tmp_path / "run"]
    assert cli("extract", *flags).code == 0
    assert cli("extract", *flags).code == 0
    assert [s["path"] for s in open_run(tmp_path / "run").manifest.text["sources"]] == [
        str(tmp_path / "a.txt")
    ]


def test_help_names_every_value_and_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("extract", "plan"):
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        for option in options_of(RunConfig):
            assert option.flag in text and all(word in text for word in option.kind.choices)
        assert max(map(len, text.splitlines())) <= 120
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("headwater ")
    assert main(["--help"]) == 0
    commands = capsys.readouterr().out
    for name in ("extract", "plan", "status", "verify", "info", "sites"):
        assert f"    {name}" in commands
        assert main([name, "--help"]) == 0 and "--json" in capsys.readouterr().out
    assert make_parser().prog == "headwater"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_flags(cli, shell):
    script = cli("--print-completion", shell).out
    for word in ("extract", "plateau", "seq-len", "within-documents", "token-file"):
        assert word in script
    if shell == "bash":
        probe = 'COMP_WORDS=(headwater extract --seq); COMP_CWORD=2; _headwater; echo "$COMPREPLY"'
        done = subprocess.run(
            ["bash", "-c", f"{script}\n{probe}"], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "--seq-len" and done.stderr == ""


def test_what_completion_takes_is_said(cli):
    cli("--print-completion", "csh").error(2, "invalid choice: 'csh'", "bash")
