"""The ledger at scale: entries move into segments, at any moment of which a crash loses and doubles nothing."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import headwater
from headwater.benchmarks.breaking import faults
from headwater.benchmarks.storage.bench_ledger import fill, measure, measure_plan
from headwater.store.ledger import Entry, Ledger, LedgerError
from headwater.store.segments import FOLDER
from headwater.store.verify import repair, verify

N = 40


def entry(block, attempt=1, **changes):
    files = {f"loss/c/{block}/0": [100, block], f"complete/c/{block}": [5, 7]}
    casts, seconds = {"loss": {"overflow": 1, "nonfinite": 0}}, {"compute": 0.5, "write": 0.25}
    return replace(
        Entry(block, attempt, "f" * 64, block, block + 1, 16, files, casts, seconds, "node:7"),
        **changes,
    )


def filled(run, n=N):
    """Make a ledger of n loose entries."""
    run.mkdir(exist_ok=True)
    ledger = Ledger(run, "f" * 64)
    for block in range(n):
        assert ledger.commit(entry(block))
    return ledger


def check(run, n=N):
    """Check that every block is there once, as it was committed."""
    ledger = Ledger(run, "f" * 64)
    assert (
        ledger.committed() == dict.fromkeys(range(n), 1) and ledger.trusted() == ledger.committed()
    )
    assert sorted(ledger.entries(), key=lambda e: e.block) == [entry(block) for block in range(n)]
    assert ledger.read(3) == entry(3) and ledger.next_attempt(3) == 2 and not ledger.tried()


def test_entries_move_and_say_the_same(tmp_path):
    ledger = filled(tmp_path)
    assert ledger.compact(N + 1) == 0 and ledger.compact(N) == N
    assert not list(ledger.folder.iterdir()) and len(list((tmp_path / FOLDER).iterdir())) == 1
    check(tmp_path)
    for block in range(N, N + 9):
        ledger.commit(entry(block))
    check(tmp_path, N + 9)
    assert ledger.compact(9) == 9 and ledger.compact(1) == 0
    assert sorted(p.name[:9] for p in (tmp_path / FOLDER).iterdir()) == ["00000001.", "00000002."]
    check(tmp_path, N + 9)


def test_threads_that_share_listings_see_what_was_committed_before_they_asked(tmp_path):
    """Another process commits and takes out; many threads ask all the time, so that listings are always under way."""
    writer, shared, over = filled(tmp_path, 1), Ledger(tmp_path, "f" * 64), threading.Event()
    n_listed, listing = itertools.count(), shared._list
    shared._list = lambda: (next(n_listed), listing())[1]
    n_asked = []

    def ask():
        n = 0
        while not over.is_set():
            assert shared.holds(0, 1).all()
            n += 1
        n_asked.append(n)

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask) for _ in range(6)]
        for block in range(1, 150):
            writer.commit(entry(block))
            assert shared.holds(block - 1, block + 2).tolist() == [True, True, False]
            if block % 10 == 0:
                writer.remove(block)
                assert not shared.holds(block, block + 1).any() and block not in shared.committed()
                writer.commit(entry(block, writer.next_attempt(block)))
        over.set()
        for one in asking:
            one.result()
    assert next(n_listed) < sum(n_asked), "listings are shared"


def test_a_ledger_that_does_not_change_is_not_listed_again(tmp_path, monkeypatch):
    writer, ledger, listed = filled(tmp_path, 3), Ledger(tmp_path, "f" * 64), []
    monkeypatch.setattr(
        ledger, "_list", lambda listing=ledger._list: (listed.append(1), listing())[1]
    )
    assert ledger.holds(0, 4).tolist() == [True, True, True, False] and len(ledger.committed()) == 3
    assert len(listed) == 2, "it was changed a moment ago, so that nothing is sure"
    os.utime(ledger.folder, (1, 1))
    assert [len(ledger.committed()) for _ in range(5)] == [3] * 5 and len(listed) == 3
    writer.commit(entry(3))
    os.utime(ledger.folder, (2, 2))
    assert ledger.holds(3, 4).all() and len(listed) == 4
    writer.compact(1)
    os.utime(ledger.folder, (3, 3))
    os.utime(tmp_path / FOLDER, (1, 1))
    assert ledger.holds(0, 4).all() and ledger.read(2) == entry(2) and len(listed) == 5
    writer._segments.write([(entry(7), False)])
    os.utime(tmp_path / FOLDER, (4, 4))
    assert ledger.holds(7, 8).all() and len(listed) == 6


@pytest.mark.parametrize("way", ["ended", "torn"])
def test_a_crash_at_any_operation_of_a_move(tmp_path, way):
    base = tmp_path / "base"
    filled(base)
    counted = Ledger(shutil.copytree(base, tmp_path / "count"), "f" * 64)
    names = faults.count_operations(lambda: counted.compact(N))
    assert names.index("replace") < names.index("unlink") and names.count("unlink") == N
    points = [*range(names.index("unlink") + 2), len(names) // 2, len(names) - 1]
    points = [n for n in points if way == "ended" or "write" in names[n]]
    for n in points:
        run = shutil.copytree(base, tmp_path / f"{n}")

        def action(run=run, n=n):
            with faults.hooked(faults.end_at(n, way == "torn")):
                Ledger(run, "f" * 64).compact(N)

        assert faults.in_child(action) == faults.ENDED
        check(run)
        Ledger(run, "f" * 64).compact(1)
        check(run)
        assert not list((run / "headwater/ledger").iterdir())


def test_a_failing_disk_deletes_nothing(tmp_path):
    ledger = filled(tmp_path)
    with faults.hooked(faults.fail_at(0, 5, False)), pytest.raises(OSError, match="Input/output"):
        ledger.compact(N)
    check(tmp_path)


def test_a_reader_misses_nothing_that_moves_under_it(tmp_path, monkeypatch):
    """The entries are listed first: a move between the two listings is seen in the segment."""
    ledger, reader = filled(tmp_path), Ledger(tmp_path, "f" * 64)
    columns = reader._segments.columns

    def late():
        monkeypatch.setattr(reader._segments, "columns", columns)
        ledger.compact(1)
        return columns()

    monkeypatch.setattr(reader._segments, "columns", late)
    assert len(reader.committed()) == N
    ledger.commit(entry(N))
    view = reader._view()
    monkeypatch.setattr(reader, "_view", lambda: (monkeypatch.undo(), ledger.compact(1), view)[2])
    assert len(list(reader.entries())) == N + 1


def test_a_block_in_a_segment_is_taken_out_and_comes_back(tmp_path):
    ledger = filled(tmp_path)
    ledger.compact(1)
    ledger.remove(3, 5)
    assert [p.name for p in sorted(ledger.folder.iterdir())] == [
        "00000003.2.gone",
        "00000005.2.gone",
    ]
    assert set(range(N)) - set(ledger.committed()) == {3, 5} and ledger.tried() == {3: 2, 5: 2}
    with pytest.raises(LedgerError, match="no entry of block 3"):
        ledger.read(3)
    assert {e.block for e in ledger.entries()} == set(range(N)) - {3, 5}
    assert ledger.commit(entry(3, 1)) and 3 not in ledger.committed(), (
        "a late first attempt does not undo it"
    )
    assert ledger.next_attempt(3) == 3 and ledger.commit(entry(3, 3)) and ledger.committed()[3] == 3
    ledger.compact(1)
    again = Ledger(tmp_path, "f" * 64)
    assert again.read(3) == entry(3, 3) and again.tried() == {5: 2} and again.next_attempt(5) == 3
    again.remove(3)
    assert again.tried() == {3: 4, 5: 2}


def test_a_bad_entry_stays_where_it_is_found(tmp_path):
    ledger = filled(tmp_path)
    (ledger.folder / "00000004.1.json").write_bytes(b"{")
    assert ledger.compact(1) == N - 1
    assert [p.name for p in ledger.folder.iterdir()] == ["00000004.1.json"]
    with pytest.raises(LedgerError, match=r"00000004\.1\.json .*verify --repair"):
        ledger.trusted()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A request, and what an uninterrupted run of it holds."""
    config = faults.make_case(tmp_path_factory.mktemp("segments"))
    return config, faults.contents(headwater.extract(config).path)


def test_a_run_with_segments_is_verified_repaired_and_resumed(made, tmp_path, cli):
    run = Path(shutil.copytree(made[0].out, tmp_path / "run"))
    config = replace(made[0], out=str(run))
    assert headwater.open_run(run).ledger.compact(1) == 3
    assert not verify(headwater.open_run(run)).problems and cli("status", run).out.startswith(
        "3 of 3 blocks"
    )
    headwater.extract(config)
    (run / "loss/c/1/0").unlink()
    opened = headwater.open_run(run)
    assert repair(opened, verify(opened)) == [1] and set(
        headwater.open_run(run).ledger.committed()
    ) == {0, 2}
    again = headwater.extract(config)
    assert faults.contents(run) == made[1] and again.ledger.committed() == {0: 1, 1: 3, 2: 1}
    (segment,) = (run / FOLDER).iterdir()
    segment.write_bytes(segment.read_bytes()[:-1])
    found = cli("status", run)
    assert found.code == 1 and segment.name in found.out and "verify --repair" in found.out
    assert [p.path for p in verify(headwater.open_run(run)).problems] == [
        f"{FOLDER}/{segment.name}"
    ]
    with pytest.raises(LedgerError, match="does not match its checksum"):
        headwater.extract(config)
    assert cli("verify", run, "--repair").code == 0
    assert set(headwater.open_run(run).ledger.committed()) == {1}
    assert headwater.extract(config).complete.all() and faults.contents(run) == made[1]


def test_the_cost_of_a_ledger_grows_with_its_length(tmp_path):
    """Ten times the entries take no more than some thirty times as long, and little memory each."""
    fill(tmp_path / "small", 1_000, 500)
    fill(tmp_path / "large", 10_000, 500)
    small, large = (
        min((measure(tmp_path / name) for _ in range(3)), key=lambda m: m["open_seconds"])
        for name in ("small", "large")
    )
    assert large["entries"] == 10_000 and large["open_seconds"] < 30 * small["open_seconds"] + 0.5
    assert large["memory_bytes"] < 10_000 * 1_000 + (64 << 20)
    assert os.path.exists(tmp_path / "large" / FOLDER)


def test_a_million_blocks_are_planned_in_little_memory():
    few, many = measure_plan(1_000), measure_plan(1_000_000)
    assert (
        many["entries"] == 1_000_000 and many["missing"] == 500_000 and many["memory_bytes"] < 500e6
    )
    assert many["plan_bytes"] > 900 * few["plan_bytes"]
