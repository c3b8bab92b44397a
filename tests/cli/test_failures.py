"""What goes wrong while a command runs, or with a run that is there, is said; nothing that was finished is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from headwater.extractor import budget as plan
from headwater.store import lock
from headwater.store.shard import ShardWriter

MODEL_AND_TEXT = "--model", "model", "--text", "text.txt"
SMALL = *MODEL_AND_TEXT, "--sites", "loss", "--out", "run"


@pytest.fixture
def place(tiny_gpt2, tiny_text, tmp_path, monkeypatch):
    """Stand in a directory with a model and a text."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_gpt2, "model")
    shutil.copy(tiny_text, "text.txt")
    return tmp_path


def files(folder="run"):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def test_what_cannot_fit_is_refused_with_both_numbers(cli, place, monkeypatch):
    arguments = [*MODEL_AND_TEXT, "--out", "run"]
    needed = plan.show_bytes(json.loads(cli("plan", *arguments, "--json").out)["total_bytes"])
    monkeypatch.setattr(plan, "free_disk", lambda out: 5000)
    cli("plan", *arguments).error(2, f"needs {needed} on disk", "5 kB free", "--out")
    cli("extract", *arguments).error(2, "needs at least", "on disk", "5 kB free", "--out")
    monkeypatch.setattr(plan, "free_disk", lambda out: 10**12)
    monkeypatch.setattr(plan, "available_memory", lambda: 100 << 20)
    for command in ("plan", "extract"):
        cli(command, *arguments).error(2, "of memory, but 105 MB are available", "--block")
    assert not Path("run").exists()


def test_a_codec_counts_as_nothing_until_it_has_run(cli, place, monkeypatch):
    stored = json.loads(cli("plan", *MODEL_AND_TEXT, "--json").out)["arrays"]["resid"]["n_bytes"]
    monkeypatch.setattr(plan, "free_disk", lambda out: stored)
    cli("plan", *MODEL_AND_TEXT, "--codec", "zstd-1,resid=none").error(2, "on disk")
    squeezed = cli("plan", *MODEL_AND_TEXT, "--codec", "zstd-1")
    assert squeezed.code == 0 and "must, to fit on the disk" in squeezed.out


def test_another_request_leaves_a_run_alone(cli, place):
    assert cli("extract", *SMALL).code == 0
    before = files()
    cli("extract", *SMALL, "--seq-len", "8").error(
        2, "another configuration", "seq_len is 32 in the run, 8"
    )
    cli("extract", *SMALL, "--max-sequences", "2").error(2, "max_sequences is None in the run, 2")
    cli("extract", *SMALL[:-4], "--sites", "loss,q", "--out", "run").error(
        2, "sites is ['loss'] in the run"
    )
    weights = load_file("model/model.safetensors")
    save_file(weights | {"ln_f.bias": weights["ln_f.bias"] + 1}, "model/model.safetensors")
    cli("extract", *SMALL).error(2, "model weights is")
    assert files() == before


def test_a_changed_or_longer_source_is_named(cli, place):
    Path("texts").mkdir()
    shutil.copy("text.txt", "texts/a.txt")
    arguments = ["--model", "model", "--text", "texts", "--sites", "loss", "--out", "run"]
    assert cli("extract", *arguments).code == 0
    before = files()
    Path("texts/b.txt").write_text("more")
    cli("extract", *arguments).error(2, "texts/b.txt is new", "another --out")
    Path("texts/b.txt").unlink()
    Path("texts/a.txt").write_text("other")
    cli("extract", *arguments).error(2, "texts/a.txt has changed")
    assert files() == before


def test_no_run_is_named(cli, place):
    for command in ("status", "info", "verify"):
        cli(command, "nothing").error(2, "no run at nothing", "Check the path")
        cli(command, "model").error(2, "model is not a Headwater run")


def test_damaged_bookkeeping_is_named(cli, place):
    assert cli("extract", *SMALL).code == 0
    entry = next(Path("run/headwater/ledger").iterdir())
    entry.write_text(entry.read_text().replace('"n_tokens": ', '"n_tokens": 1'))
    status = cli("status", "run")
    assert status.code == 1 and "0 of 1 block" in status.out, status
    assert f"{entry.name} does not match its checksum" in status.out, status
    assert "verify --repair" in status.out, status
    assert cli("verify", "run", "--repair").code == 0 and cli("extract", "--out", "run").code == 0
    Path("run/headwater/manifest.json").write_text("{}")
    for command in ("status", "info", "verify"):
        result = cli(command, "run")
        result.error(1, "manifest.json cannot be read", "damaged")


@pytest.mark.parametrize(
    ("failure", "part"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (MemoryError(), "the memory was not enough"),
        (
            RuntimeError("[enforce fail] can't allocate memory: you tried"),
            "the memory was not enough",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "x"),
            "Permission denied: 'x'. Check that the path",
        ),
        (ValueError("math domain error"), "math domain error. 2 of 5 blocks are kept in run"),
        (KeyError("x"), "unexpected KeyError at test_failures.py"),
    ],
)
def test_failures_while_running_keep_what_is_finished(cli, place, monkeypatch, failure, part):
    commit, calls = ShardWriter.commit, []

    def fail(self):
        calls.append(self)
        if len(calls) == 3:
            raise failure
        return commit(self)

    monkeypatch.setattr(ShardWriter, "commit", fail)
    cli("extract", *SMALL, "--block", "4").error(1, part)
    assert json.loads(cli("status", "run", "--json").out)["committed"] == 2
    kept = files("run/loss")
    resumed = cli("extract", "--out", "run")
    assert resumed.code == 0 and "5 blocks, 2 done already" in resumed.err
    assert cli("verify", "run").code == 0 and files("run/loss").items() >= kept.items()
    assert not list(Path("run/headwater/tmp").iterdir())


def test_too_large_values_stop_the_run_unless_they_are_kept(cli, place):
    weights = load_file("model/model.safetensors")
    save_file(weights | {"wte.weight": weights["wte.weight"] * 1e6}, "model/model.safetensors")
    arguments = [*MODEL_AND_TEXT, "--out"]
    cli("extract", *arguments, "run").error(
        1, "of resid at depth 0 are too large for float16", "--dtype resid=float32"
    )
    assert cli("extract", *arguments, "kept", "--on-overflow", "keep").code == 0
    status = cli("status", "kept")
    assert status.code == 0 and "kept in resid: " in status.out
    assert cli("extract", *arguments, "wide", "--dtype", "resid=float32").code == 0


def test_a_second_driver_is_refused_with_the_first_ones_name(cli, place):
    assert cli("extract", *SMALL).code == 0
    shutil.rmtree("run/headwater/ledger")
    with lock.hold(Path("run")):
        cli("extract", *SMALL).error(1, f"is being written by process {os.getpid()}")
