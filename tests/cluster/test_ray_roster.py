"""What is said of workers: while they run, and afterwards from the ledger."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest

from headwater.cli.progress import Reporter
from headwater.extractor.cluster.members import Roster, by_worker, straggler
from headwater.extractor.progress import Progress
from headwater.extractor.run import extract
from headwater.store.ledger import Entry, Ledger


def entry(block, worker, tokens, **seconds):
    return Entry(block, 1, "f", block, block + 1, tokens, {}, {}, seconds, worker)


def test_a_roster_says_rates_losses_and_stragglers():
    roster = Roster()
    assert roster.text([], 2, []) == "0 workers, 2 starting"
    roster.add(entry(0, "a:1", 100, compute=0.5, finish=0.5, write=9.0))
    assert roster.text(["a:1"], 1, []) == "1 worker at 100, 1 starting, mostly write"
    roster.add(entry(1, "b:2", 300, compute=1.0))
    roster.add(entry(2, "gone:3", 9, compute=1.0))
    roster.n_lost = roster.n_retries = roster.n_refused = 1
    running = [("a:1", 7, 42.0), ("b:2", 8, 2.0)]
    assert roster.text(["a:1", "b:2"], 0, running) == (
        "2 workers at 100 to 300, 1 lost, 1 could not start, 1 tried again, mostly write, a:1 42 s on block 7"
    )
    assert "block" not in roster.text(["a:1"], 0, [("a:1", 7, 4.9)])


def test_workers_are_shown_on_the_line():
    stream = io.StringIO()
    reporter, progress = Reporter(stream), Progress("blocks", 4, 0)
    reporter(progress)
    progress.workers = "2 starting"
    for _ in range(20):
        reporter(progress)
    progress.done, progress.entry, progress.n_tokens = 4, entry(3, "a:1", 5), 20
    reporter(progress)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "4 blocks" and len(lines) == 2 and lines[1].endswith("left  2 starting")


def test_a_ledger_is_summed_by_worker():
    entries = [
        entry(0, "a:1", 10, compute=1.0, write=3.0),
        entry(1, "a:1", 10, compute=3.0, write=0.5),
        entry(2, "b:2", 5, compute=0.5, finish=2.0),
    ]
    assert by_worker(entries) == {
        "a:1": {
            "blocks": 2,
            "tokens": 20,
            "seconds": 4.0,
            "tokens_per_second": 5.0,
            "slowest": "compute",
        },
        "b:2": {
            "blocks": 1,
            "tokens": 5,
            "seconds": 2.5,
            "tokens_per_second": 2.0,
            "slowest": "finish",
        },
    }
    assert by_worker([]) == {}


def test_a_straggler_is_named():
    usual = [entry(i, "a:1", 10, compute=1.0) for i in range(5)]
    assert straggler([]) is None and straggler(usual) is None
    assert straggler([*usual, entry(9, "b:2", 10, compute=3.0, finish=0.5)]) == {
        "block": 9,
        "worker": "b:2",
        "seconds": 3.5,
        "times": 3.5,
    }


@pytest.fixture
def two_workers(many_blocks, tmp_path):
    """A run whose ledger names two workers."""
    run = extract(replace(many_blocks[0], out=str(tmp_path / "run"), preset="statistics"))
    ledger = Ledger(run.path, run.manifest.fingerprint)
    for done in list(ledger.entries())[::4]:
        ledger.remove(done.block)
        seconds = {"compute": 50.0, "finish": 10.0}
        attempt = ledger.next_attempt(done.block)
        assert ledger.commit(replace(done, attempt=attempt, worker="other:7", seconds=seconds))
    return run.path


def test_status_shows_the_slowest_worker_first(cli, two_workers):
    said = cli("status", two_workers).out.splitlines()
    lines = [line for line in said if line.startswith("worker ")]
    assert "retried  4 blocks committed by a later attempt" in said
    assert any(
        line.startswith("slowest  block ") and " on other:7: 60.0 s, " in line for line in said
    ), said
    assert (
        lines[0]
        == "worker   other:7: 4 blocks, 256 tokens in 240.0 s (1 a second), most of it compute"
    )
    assert len(lines) == 2 and "12 blocks, 768 tokens" in lines[1]
    workers = json.loads(cli("status", two_workers, "--json").out)["workers"]
    assert json.loads(cli("status", two_workers, "--json").out)["straggler"]["times"] > 3
    assert (
        workers["other:7"]["slowest"] == "compute"
        and sum(w["blocks"] for w in workers.values()) == 16
    )
