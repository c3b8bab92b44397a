"""The fuzzer: what it spoils is read before it is spoiled, it would find a fault, and a part of its cases runs here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from headwater.benchmarks import bench_fuzz
from headwater.benchmarks.breaking import fuzz_cases

HOSTILE = {"checkpoint", "weights_bin", "manifest", "planted_names", "job", "arrow", "compressed"}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return fuzz_cases.make_material(tmp_path_factory.mktemp("fuzz") / "material")


@pytest.fixture
def unspoiled(monkeypatch):
    """Let the cases spoil nothing."""
    for name in ("mutate_bytes", "mutate_json", "mutate_words", "mutate_text"):
        monkeypatch.setattr(fuzz_cases, name, lambda data, random: data)
    monkeypatch.setattr(fuzz_cases, "json_bytes", lambda data, random: json.dumps(data).encode())


@pytest.mark.parametrize("parser", ["config", "table", "edits", "ledger", "vocabulary", "job"])
def test_inputs_are_read_before_they_are_spoiled(parser, material, unspoiled, tmp_path):
    outcomes = [bench_fuzz.run_case(material, tmp_path, parser, n, seed=1) for n in range(2)]
    assert any(outcome.kind == "read" for outcome in outcomes), outcomes


def run_code(folder, random):
    return lambda: (folder / fuzz_cases.MARK).write_text("") or 0


def run_on(folder, random):
    import time

    return lambda: time.sleep(60) or 0


def take_memory(folder, random):
    return lambda: len(bytearray(b"x") * (256 << 20)) and 0


def end_by_signal(folder, random):
    return lambda: os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("flaw", "kind"),
    [
        (run_code, "code run"),
        (run_on, "over time"),
        (take_memory, "over memory"),
        (end_by_signal, "signal"),
        (lambda folder, random: lambda: {}["x"], "fault"),
        (lambda folder, random: ["info", "nothing"], "refused"),
    ],
)
def test_the_fuzzer_would_find_it(flaw, kind, material, tmp_path, monkeypatch):
    monkeypatch.setitem(fuzz_cases.PARSERS, "flaw", flaw)
    monkeypatch.setattr(bench_fuzz, "SECONDS", 1)
    monkeypatch.setattr(bench_fuzz, "PATIENCE", 2)
    monkeypatch.setattr(bench_fuzz, "MEMORY", 64 << 20)
    assert bench_fuzz.run_case(material, tmp_path, "flaw", 0, seed=0).kind == kind


def test_every_parser_refuses_in_words():
    command = [sys.executable, "-m", "headwater.benchmarks", "fuzz", "--n", "60", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1].startswith("all"), done.stdout
