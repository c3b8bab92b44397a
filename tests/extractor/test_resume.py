"""Going on with a run: what is done stays, what is missing is computed, and another request is refused by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import headwater
from headwater.benchmarks.breaking import faults
from headwater.extractor import resume as same_request
from headwater.store import files
from headwater.store.ledger import Ledger, LedgerError
from headwater.store.manifest import RunError, read_manifest
from headwater.store.place import place_of
from headwater.store.shard import ShardWriter
from headwater.store.verify import verify


class Stop(Exception):
    """Ends an extraction."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A request, and what an uninterrupted run of it holds."""
    config = faults.make_case(tmp_path_factory.mktemp("resume"))
    return config, faults.contents(headwater.extract(config).path)


def after(n):
    """Return an observer that ends the extraction after `n` blocks."""

    def observe(progress):
        if progress.entry is not None and progress.done == n:
            raise Stop

    return observe


def half(config, out, n=1):
    """Make a run and stop it after `n` blocks."""
    config = replace(config, out=str(out))
    with pytest.raises(Stop):
        headwater.extract(config, after(n))
    return config


def times(folder):
    return {p: (p.lstat().st_mtime_ns, p.lstat().st_ctime_ns) for p in [folder, *folder.rglob("*")]}


def test_a_finished_run_is_left_as_it_is(made):
    before = times(Path(made[0].out))
    for config in (made[0], headwater.RunConfig(out=made[0].out), replace(made[0], threads=2)):
        assert headwater.extract(config).complete.all()
    assert times(Path(made[0].out)) == before


def test_finished_blocks_are_not_touched(made, tmp_path):
    config = half(made[0], tmp_path / "run", 2)
    run = headwater.open_run(config.out)
    shards = [run.path / path for entry in run.ledger.entries() for path in entry.files]
    before = [(p.stat().st_mtime_ns, p.stat().st_ino) for p in shards]
    seen = []
    headwater.extract(config, lambda p: seen.append(p.entry and p.entry.block))
    assert [(p.stat().st_mtime_ns, p.stat().st_ino) for p in shards] == before and seen == [None, 2]
    assert faults.contents(run.path) == made[1]
    assert not list((run.path / "headwater/tmp").iterdir())


@pytest.mark.parametrize("name", ["text", "tokens", "selection", "documents"])
def test_out_alone_goes_on(made, tmp_path, monkeypatch, name):
    config = made[0]
    if name == "tokens":
        np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(0, 256, (10, 24)))
        config = replace(config, text=(), labels=(), seq_len=None, tokens=str(tmp_path / "ids.npy"))
    elif name == "selection":
        config = replace(
            config,
            sites=("resid", "z", "pattern", "top_tokens"),
            layers="1",
            depths="0,2",
            heads="1",
            positions="last",
            dtype="float16,resid=float32",
            top_k=3,
            on_overflow="keep",
        )
    elif name == "documents":
        config = replace(config, mode="document", bos=True, positions="0:3", max_tokens=150)
    whole = headwater.extract(replace(config, out=str(tmp_path / "whole")))
    half(config, tmp_path / "run")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert headwater.extract(headwater.RunConfig(out=str(moved))).complete.all()
    assert faults.contents(moved) == faults.contents(whole.path)


CHANGES = {
    "sites": (
        {"sites": ("resid",)},
        r"sites is \['resid', .*\] in the run, \['resid'\] in the request",
    ),
    "layers": ({"layers": "1"}, r"layers is \[0, 1\] in the run, \[1\] in"),
    "depths": ({"depths": "0"}, r"depths is \[0, 1, 2\] in the run, \[0\] in"),
    "heads": ({"heads": "0"}, r"heads is \[0, 1\] in the run, \[0\] in"),
    "positions": ({"positions": "last"}, r"positions is None in the run, \[-1\] in"),
    "dtype": (
        {"dtype": "float16,resid=float32"},
        "dtype of resid is 'float16' in the run, 'float32' in",
    ),
    "codec": ({"codec": "none"}, "codec of pattern is 'zstd-1' in the run, 'none' in the request"),
    "much": (
        {"codec": "zstd-3", "dtype": "float32"},
        "codec of attn_argmax is 'none' .*; and 3 more",
    ),
    "labels": ({"labels": ("rank",)}, r"labels is \['kind', 'rank'\] in the run, \['rank'\] in"),
} | {
    name: ({name: value}, f"{name} is .* in the run, {value!r} in the request")
    for name, value in {
        "seq_len": 10,
        "block": 2,
        "compute": "bf16",
        "on_overflow": "keep",
        "bos": True,
        "max_sequences": 100,
        "max_tokens": 10**6,
        "mode": "document",
        "column": "body",
        "within_documents": True,
        "tokenizer": "other",
    }.items()
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_request_is_refused_by_name(made, unfinished, name):
    change, says = CHANGES[name]
    for config in (made[0], unfinished):
        before = faults.contents(Path(config.out))
        with pytest.raises(RunError, match=f"was made with another configuration: .*{says}"):
            headwater.extract(replace(config, **change))
        assert faults.contents(Path(config.out)) == before


@pytest.fixture(scope="module")
def unfinished(made, tmp_path_factory):
    """A run of one block of three."""
    return half(made[0], tmp_path_factory.mktemp("unfinished") / "run")


def change_manifest(run, change):
    path = run / "headwater/manifest.json"
    raw = json.loads(path.read_text())
    del raw["crc32c"]
    change(raw)
    path.write_text(json.dumps(raw | {"crc32c": files.json_sum(raw)}))


def test_a_manifest_says_of_a_request_what_text_it_is(made, tmp_path):
    """It says neither where the run goes on nor on which Ray cluster, whose answers are code."""
    run = tmp_path / "run"
    shutil.copytree(made[0].out, run)
    extra = {"ray": "ray://elsewhere:10001", "out": str(tmp_path / "other"), "later": 1}
    change_manifest(run, lambda raw: raw["text"]["request"].update(extra))
    asked = headwater.RunConfig(out=str(run))
    found = same_request.stored_request(asked, place_of(run), read_manifest(run))
    assert (found.out, found.ray, found.text) == (str(run), None, made[0].text)
    assert headwater.extract(asked).path == run
    change_manifest(run, lambda raw: raw["config"].update(later=1))
    with pytest.raises(RunError, match="later is 1 in the run, and this Headwater does not know"):
        headwater.extract(asked)


def test_other_weights_are_refused(made, unfinished, tmp_path):
    faults.make_model(tmp_path / "model", n_layer=3)
    with pytest.raises(RunError, match="model weights is"):
        headwater.extract(replace(unfinished, model=str(tmp_path / "model")))


def test_a_changed_source_is_named_and_a_missing_one_not_needed(tmp_path):
    config = half(faults.make_case(tmp_path), tmp_path / "run")
    text = Path(config.text[0])
    before = text.read_bytes()
    text.write_bytes(before + b'{"text": "more", "kind": "a", "rank": 1}\n')
    for request in (config, headwater.RunConfig(out=config.out)):
        with pytest.raises(RunError, match=r"text\.jsonl has changed since its text was committed"):
            headwater.extract(request)
    text.unlink()
    assert headwater.extract(config).complete.all()


@pytest.mark.parametrize("what", ["processor", "torch", "products", "headwater"])
def test_another_processor_is_refused_unless_accepted(made, tmp_path, monkeypatch, what):
    config = half(made[0], tmp_path / "run")
    here = same_request.maker()
    monkeypatch.setattr(same_request, "maker", lambda device: here | {what: "another kind"})
    with pytest.raises(
        RunError, match=f"was made with {what} .*; this is another kind.*--other-processor"
    ):
        headwater.extract(config)
    assert headwater.extract(replace(config, other_processor=True)).complete.all()


def test_a_directory_of_others_is_left_untouched(made, tmp_path):
    for name, files_in in {
        "notes": ["a.txt"],
        "package": ["headwater/cli.py"],
        "scratch": ["headwater/tmp/mine"],
        "array": ["zarr.json"],
    }.items():
        out = tmp_path / name
        for file in files_in:
            (out / file).parent.mkdir(parents=True)
            (out / file).write_text("mine")
        before = times(out)
        with pytest.raises(RunError, match=f"not empty and not a Headwater run.*{files_in[0]}"):
            headwater.extract(replace(made[0], out=str(out)))
        assert times(out) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="is a file"):
        headwater.extract(replace(made[0], out=str(tmp_path / "file")))
    (tmp_path / "empty").mkdir()
    assert headwater.extract(replace(made[0], out=str(tmp_path / "empty"))).complete.all()


@pytest.mark.parametrize("name", ["a/b", "/../../x", "a\n../x"])
def test_a_label_that_is_no_name_is_refused(made, tmp_path, name):
    with pytest.raises(ValueError, match="becomes the name of an array"):
        headwater.extract(replace(made[0], out=str(tmp_path / "run"), labels=(name,)))
    assert not (tmp_path / "run").exists()


def test_an_interrupted_text_starts_over_and_spares_what_is_not_ours(made, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(
        "headwater.extractor.text.commit.write_manifest", lambda *_: os.kill(os.getpid(), 2)
    )
    with pytest.raises(KeyboardInterrupt):
        headwater.extract(replace(made[0], out=str(run), sites=(), preset="all"))
    monkeypatch.undo()
    assert (run / "top_logits/zarr.json").exists() and (run / "headwater/unfinished").exists()
    (run / "notes").mkdir()
    (run / "notes/a.txt").write_text("mine")
    headwater.extract(replace(made[0], out=str(run)))
    assert faults.contents(run) == made[1] | {"notes/a.txt": b"mine"}
    assert not (run / "headwater/unfinished").exists()


@pytest.mark.parametrize("place", ["a shard", "a directory", "complete", "the ledger"])
def test_a_block_whose_fsync_fails_is_not_committed(made, tmp_path, monkeypatch, place):
    config = replace(made[0], out=str(tmp_path / "run"))
    fail = OSError(errno.EIO, "Input/output error")

    def failing(function, when):
        def call(*args):
            if when(*args) and (tmp_path / "run/complete/c/0").exists() == (place == "the ledger"):
                raise fail
            return function(*args)

        return call

    if place == "a shard":
        monkeypatch.setattr(
            ShardWriter, "commit", failing(ShardWriter.commit, lambda s: "loss" in s.path.name)
        )
    elif place == "a directory":
        monkeypatch.setattr(
            "headwater.store.writer.sync_directory", failing(files.sync_directory, lambda p: True)
        )
    elif place == "complete":
        monkeypatch.setattr(
            "headwater.store.writer.write_temporary",
            failing(files.write_temporary, lambda *a: True),
        )
    else:
        monkeypatch.setattr(
            files,
            "write_temporary",
            failing(files.write_temporary, lambda p, d: "0.1.json" in p.name),
        )
    with pytest.raises(OSError, match="Input/output error"):
        headwater.extract(config)
    monkeypatch.undo()
    run = headwater.open_run(config.out)
    assert not run.ledger.committed() and not verify(run).problems
    again = headwater.extract(config)
    assert faults.contents(run.path) == made[1]
    assert [e.attempt for e in again.ledger.entries()] == [1, 1, 1]


def test_an_entry_that_cannot_be_trusted_stops_resume(made, tmp_path):
    run = Path(shutil.copytree(made[0].out, tmp_path / "run"))
    entry, config = run / "headwater/ledger/00000002.1.json", replace(made[0], out=str(run))
    whole = entry.read_bytes()
    for data in (b"", whole[:-9], whole.replace(b'"first": 8', b'"first": 9')):
        entry.write_bytes(data)
        with pytest.raises(LedgerError, match=r"00000002\.1\.json .*verify --repair"):
            headwater.extract(config)
    entry.write_bytes(whole)
    assert headwater.extract(config).complete.all()


def test_the_highest_attempt_counts(tmp_path, made):
    (entry, *_) = headwater.open_run(made[0].out).ledger.entries()
    (tmp_path / "headwater").mkdir()
    ledger = Ledger(tmp_path, entry.fingerprint)
    assert not ledger.committed() and ledger.next_attempt(0) == 1
    for attempt in (1, 10, 9):
        assert ledger.commit(replace(entry, attempt=attempt, worker=str(attempt)))
    assert not ledger.commit(replace(entry, attempt=9, worker="late"))
    assert [e.worker for e in ledger.entries()] == ["10"]
    assert ledger.next_attempt(0) == 11 and ledger.next_attempt(1) == 1
    assert not list((tmp_path / "headwater/tmp").iterdir())
    ledger.remove(0)
    assert not ledger.committed() and not list(ledger.entries())


def test_an_open_run_sees_blocks_as_they_come(made, tmp_path):
    config = half(made[0], tmp_path / "run")
    run = headwater.open_run(config.out)
    assert np.isnan(run["resid"][0, 4:]).all() and (run["attn_argmax"][0, 4:] == -1).all()
    headwater.extract(config)
    assert (
        run.complete.all()
        and np.isfinite(run["resid"][0, 4:8]).all()
        and (run["attn_argmax"][0, 4:8] >= 0).all()
    )
