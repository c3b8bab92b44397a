"""Damage of any kind is found and named by its path in the run, and what can be repaired resumes to the same bytes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import headwater
from headwater.benchmarks.breaking import faults
from headwater.store.manifest import RunDamaged, RunError
from headwater.store.verify import repair, verify

SHARD, OTHER, PACKED = "resid/c/0/1/0/0", "resid/c/0/0/0/0", "pattern/c/0/1/0/0/0"
ENTRY, FIRST_ENTRY = "headwater/ledger/00000001.1.json", "headwater/ledger/00000000.1.json"
COMPLETE = "complete/c/1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A request, and what an uninterrupted run of it holds."""
    config = faults.make_case(tmp_path_factory.mktemp("verify"))
    return config, faults.contents(headwater.extract(config).path)


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(made[0].out, tmp_path / "run"))


def flip(path, at, bit=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def cut(path, n):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - n)


def swap(run, first, second):
    (run / first).rename(run / "x")
    (run / second).rename(run / first)
    (run / "x").rename(run / second)


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other(run):
    """Make a run of the same shape from another text."""
    config = faults.make_case(run.parent / "other")
    text = Path(config.text[0])
    text.write_text(text.read_text().replace("o", "u").replace("q", "s"))
    return headwater.extract(config).path


DAMAGES = {
    "a bit of a value": (lambda run: flip(run / SHARD, 40, 3), {SHARD}, False),
    "a bit of padding": (lambda run: flip(run / SHARD, 4000), {SHARD}, False),
    "a bit of a checksum": (lambda run: flip(run / PACKED, 4095), {PACKED}, False),
    "a bit of the index": (lambda run: flip(run / PACKED, -30), {PACKED}, True),
    "the last bit of the index": (lambda run: flip(run / SHARD, -1, 7), {SHARD}, True),
    "cut": (lambda run: cut(run / SHARD, 1), {SHARD}, True),
    "emptied": (lambda run: (run / SHARD).write_bytes(b""), {SHARD}, True),
    "longer": (
        lambda run: (run / SHARD).write_bytes((run / SHARD).read_bytes() + b"\0"),
        {SHARD},
        True,
    ),
    "deleted": (lambda run: (run / SHARD).unlink(), {SHARD}, True),
    "an array deleted": (
        lambda run: shutil.rmtree(run / "resid/c"),
        {SHARD, OTHER, "resid/c/0/2/0/0"},
        True,
    ),
    "swapped": (lambda run: swap(run, SHARD, OTHER), {SHARD, OTHER}, False),
    "of another run": (lambda run: shutil.copy(other(run) / SHARD, run / SHARD), {SHARD}, False),
    "complete": (lambda run: flip(run / COMPLETE, 0), {COMPLETE}, False),
    "complete deleted": (lambda run: (run / COMPLETE).unlink(), {COMPLETE}, True),
    "an entry's number": (lambda run: rewrite(run / ENTRY, n_tokens=3), {ENTRY}, True),
    "an entry's files": (lambda run: rewrite(run / ENTRY, files={}), {ENTRY}, True),
    "an entry cut": (lambda run: cut(run / ENTRY, 200), {ENTRY}, True),
    "an entry emptied": (lambda run: (run / ENTRY).write_bytes(b""), {ENTRY}, True),
    "an entry of no object": (lambda run: (run / ENTRY).write_bytes(b"[1]"), {ENTRY}, True),
    "an entry of another block": (
        lambda run: shutil.copy(run / FIRST_ENTRY, run / ENTRY),
        {ENTRY},
        True,
    ),
    "an entry of another run": (
        lambda run: shutil.copy(other(run) / ENTRY, run / ENTRY),
        {ENTRY},
        True,
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_repaired(made, run, name):
    damage, paths, quick = DAMAGES[name]
    damage(run)
    opened = headwater.open_run(run)
    report = verify(opened, workers=2)
    assert {p.path for p in report.problems} == paths, report.problems
    assert bool(verify(opened, quick=True).problems) == quick
    blocks = repair(opened, report)
    assert 1 in blocks and not set(blocks) & set(opened.ledger.committed())
    assert not verify(opened).problems and not headwater.open_run(run).complete[4:8].any()
    again = headwater.extract(replace(made[0], out=str(run)))
    assert faults.contents(run) == made[1] and not verify(again).problems and again.complete.all()
    assert len(again.ledger.committed()) == 3


STATICS = [
    "zarr.json",
    "resid/zarr.json",
    "tokens/zarr.json",
    "tokens/c/0/0",
    "row_start/c/0/0",
    "documents.parquet",
    "tokenizer.json",
    "depth/c/0",
    "label_kind/c/0",
]


@pytest.mark.parametrize("path", STATICS)
def test_files_that_are_written_once(run, path):
    assert path in headwater.open_run(run).manifest.statics
    flip(run / path, 3)
    opened = headwater.open_run(run)
    report = verify(opened)
    assert [(p.path, p.block) for p in report.problems] == [(path, None)]
    assert not verify(opened, quick=True).problems and not repair(opened, report)
    cut(run / path, 1)
    assert [p.path for p in verify(opened, quick=True).problems] == [path]
    (run / path).unlink()
    assert [(p.path, p.what) for p in verify(opened).problems] == [(path, "is missing")]
    assert len(opened.ledger.committed()) == 3


def test_tokens_of_another_run_are_found(run):
    shutil.copy(other(run) / "tokens/c/0/0", run / "tokens/c/0/0")
    assert [p.path for p in verify(headwater.open_run(run)).problems] == ["tokens/c/0/0"]


def test_every_file_is_known(made, run):
    """Nothing that a run holds is left out of the checks."""
    opened = headwater.open_run(run)
    known = opened.manifest.statics.keys() | {
        path for entry in opened.ledger.entries() for path in entry.files
    }
    assert known == made[1].keys()
    assert verify(opened).n_bytes == sum(map(len, made[1].values()))


def test_an_extra_file_does_not_matter(made, run):
    for path in (
        "notes.txt",
        "mine/zarr.json",
        "resid/c/0/9/0/0",
        "headwater/ledger/a.txt",
        "headwater/ledger/1.json",
    ):
        (run / path).parent.mkdir(parents=True, exist_ok=True)
        (run / path).write_bytes(b"{")
    assert not verify(headwater.open_run(run)).problems
    headwater.extract(replace(made[0], out=str(run)))


def test_the_command_names_each_path(cli, run):
    damage = {
        SHARD: "does not match its checksum (block 1)",
        OTHER: "is missing (block 0)",
        "tokenizer.json": "does not match its checksum",
    }
    flip(run / SHARD, 100)
    (run / OTHER).unlink()
    flip(run / "tokenizer.json", 100)
    for flags in ([], ["--repair"]):
        found = cli("verify", run, *flags)
        assert found.code == 1 and {f"{p}: {what}" for p, what in damage.items()} <= set(
            found.out.splitlines()
        ), found
    assert [p["path"] for p in json.loads(cli("verify", run, "--json").out)["problems"]] == [
        "tokenizer.json"
    ]
    assert json.loads(cli("status", run, "--json").out)["committed"] == 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_bit_of_the_bookkeeping_is_trusted_blindly(made, data):
    """A flipped bit in manifest or ledger is found, or what is read is what was written."""
    run = Path(made[0].out)
    path = run / data.draw(st.sampled_from(["headwater/manifest.json", ENTRY]))
    before = path.read_bytes()
    opened = headwater.open_run(run)
    said, entries = opened.manifest, list(opened.ledger.entries())
    try:
        flip(path, data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(0, 7)))
        try:
            again = headwater.open_run(run)
        except (RunDamaged, RunError) as error:
            assert "manifest.json" in str(error)
        else:
            assert repr(again.manifest) == repr(said)
            assert verify(again, quick=True).problems or list(again.ledger.entries()) == entries
    finally:
        path.write_bytes(before)
