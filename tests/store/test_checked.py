"""What is read is what was committed, or an error: of shards, text, results, manifests, by every reader."""

from __future__ import annotations

import json
import os
import shutil
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import headwater
from headwater.analysis.engine.results import (
    StaleResult,
    kept_results,
    load,
    save,
    save_at,
    set_aside,
)
from headwater.analysis.suite.analyze import analyze
from headwater.benchmarks.breaking import faults, flips
from headwater.extractor.run import extract
from headwater.service.data.results import read_result
from headwater.service.data.slices import read_slice
from headwater.service.settings import Limits
from headwater.store import shard_file
from headwater.store.entry import LedgerError, decode
from headwater.store.files import RunMoved, json_sum
from headwater.store.lock import hold
from headwater.store.manifest import RunError, clear_unfinished, read_manifest
from headwater.store.place import place_of
from headwater.store.scratch import scratch_folder
from headwater.store.verify import verify

SHARD, OTHER = "resid/c/0/1/0/0", "resid/c/0/0/0/0"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A request, and the folder of its run."""
    config = faults.make_case(tmp_path_factory.mktemp("checked"))
    return SimpleNamespace(config=config, path=Path(extract(config).path))


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(made.path, tmp_path / "run"))


def flip(path, at=40, bit=6):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def swap(run, first, second):
    (run / first).rename(run / "x")
    (run / second).rename(run / first)
    (run / "x").rename(run / second)


def _at(config, run):
    return replace(config, out=str(run))


READERS = {
    "open_run": lambda run: [run[name][...] for name in run] + [run.plain("tokens")],
    "analyze": lambda run: analyze(run, ["norms"], again=True),
    "stream": lambda run: list(headwater.stream(run, "resid", 64, at=0)),
    "slices": lambda run: [
        read_slice(run, name, {}, False, Limits()) for name in ("resid", "tokens")
    ],
}
DAMAGES = {
    "flipped": (lambda run: flip(run / SHARD), SHARD),
    "cut": (lambda run: os.truncate(run / SHARD, 5000), SHARD),
    "deleted": (lambda run: (run / SHARD).unlink(), SHARD),
    "swapped": (lambda run: swap(run, SHARD, OTHER), "resid/c/0"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_reader_refuses_a_damaged_shard(run, damage, reader):
    break_it, named = DAMAGES[damage]
    READERS[reader](headwater.open_run(run))
    shard_file.forget_checks()
    break_it(run)
    with pytest.raises(RunError, match=named):
        READERS[reader](headwater.open_run(run))


TEXT_DAMAGES = {
    "deleted": lambda run: (run / "tokens/c/0/0").unlink(),
    "flipped": lambda run: flip(run / "tokens/c/0/0"),
    "row_start in its place": lambda run: swap(run, "tokens/c/0/0", "row_start/c/0/0"),
    "another shape": lambda run: flip(run / "tokens/zarr.json", 30, 0),
}


@pytest.mark.parametrize("damage", TEXT_DAMAGES)
def test_text_that_is_not_the_run_s_is_refused(made, run, damage):
    TEXT_DAMAGES[damage](run)
    with pytest.raises(RunError, match="tokens"):
        headwater.open_run(run).plain("tokens")
    headwater.open_run(run).ledger.remove(1)
    with pytest.raises(RunError, match="tokens"):  # resume reads them too
        extract(_at(made.config, run))


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_a_tokenizer_that_is_not_the_run_s_is_refused(run, damage):
    damage(run / "tokenizer.json")
    with pytest.raises(RunError, match=r"tokenizer\.json"):
        analyze(headwater.open_run(run), ["top"])


def test_unchecked_reads_are_what_lies_there(run):
    right = headwater.open_run(run)["resid"][0, 5, 0, 0]
    flip(run / SHARD, 20 * 32 * 2 + 1)
    assert headwater.open_run(run, checked=False)["resid"][0, 5, 0, 0] != right
    list(headwater.stream(headwater.open_run(run, checked=False), "resid", 64))


def test_a_replaced_shard_is_not_served_again(run):
    """A run that stays open reads the file that has the name now, and checks it anew."""
    opened = headwater.open_run(run)
    stream = headwater.stream(opened, "resid", 64, at=0, shuffle=False)
    right, rows = np.array(opened["resid"][0]), [batch.numpy() for batch in stream]
    whole = (run / SHARD).read_bytes()
    flip(run / SHARD)
    for read in (lambda: opened["resid"][0], lambda: list(stream)):
        with pytest.raises(RunError, match="does not match its checksum"):
            read()
    (run / "again").write_bytes(whole)
    (run / "again").rename(run / SHARD)
    np.testing.assert_array_equal(opened["resid"][0], right)
    for batch, before in zip(stream, rows, strict=True):
        np.testing.assert_array_equal(batch.numpy(), before)


def test_what_is_not_committed_reads_as_missing(run):
    opened = headwater.open_run(run)
    opened.ledger.remove(1)
    shutil.rmtree(run / "resid/c/0/1")
    assert np.isnan(opened["resid"][:, 4:8].astype(float)).all() and not opened.complete[4:8].any()


def test_results_of_a_block_that_was_computed_again_are_not_used(made, run):
    first = analyze(headwater.open_run(run), ["norms"])
    assert analyze(headwater.open_run(run), ["norms"]).reused == ["norms"]
    opened = headwater.open_run(run)
    opened.ledger.remove(1)
    with pytest.raises(StaleResult, match="computed again or taken out"):
        load(opened, "norms")
    extract(_at(made.config, run))
    with pytest.warns(UserWarning, match="headwater analyze"):
        assert not kept_results(run).results
    again = analyze(headwater.open_run(run), ["norms"])
    assert not again.reused and again.results["norms"].equals(first.results["norms"])
    assert list(kept_results(run).results) == ["norms"]


def test_a_projection_of_a_block_that_was_computed_again_is_too(made, run, tmp_path):
    from headwater.analysis.measures.project import project
    from headwater.analysis.measures.svd import svd

    directions = svd(headwater.open_run(run), k=2)

    def attempts():
        found = project(run, directions, tmp_path / "projected")
        return found["resid_projection"][...], found.ledger.committed()

    values, before = attempts()
    headwater.open_run(run).ledger.remove(1)
    extract(_at(made.config, run))
    again, after = attempts()
    np.testing.assert_array_equal(again, values)
    assert before == {0: 1, 1: 1, 2: 1} and after == {0: 1, 1: 3, 2: 1} and attempts()[1] == after


def test_results_are_checked_when_they_are_read_and_by_verify(cli, run):
    analyze(headwater.open_run(run), ["norms"])
    chunk = next(p for p in (run.parent / "run.analysis/norms").rglob("c/*") if p.is_file())
    flip(chunk, 12)
    named = chunk.relative_to(run.parent).as_posix()
    with pytest.raises(ValueError, match=str(chunk)):
        load(run, "norms")
    assert f"{named}: does not match its checksum" in cli("verify", run).out
    assert cli("verify", run, "--repair").code == 0 and cli("verify", run).code == 0
    assert not analyze(headwater.open_run(run), ["norms"]).reused
    (chunk.parent / "0").unlink(missing_ok=True)
    assert not analyze(headwater.open_run(run), ["norms"]).reused


def test_what_a_dead_writer_of_results_left_is_cleared_and_two_may_write(run):
    result = analyze(headwater.open_run(run), ["norms"]).results["norms"].load()
    folder = run.parent / "run.analysis"
    for name in (".norms.new.77", ".cka.old.78"):
        shutil.copytree(folder / "norms", folder / name)
    errors = []

    def write():
        try:
            for _ in range(2):
                save(run, result)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and os.listdir(folder) == ["norms"] and load(run, "norms").equals(result)


def rewrite(path, change):
    """Change the JSON of a manifest or entry, with a right checksum."""
    raw = json.loads(path.read_bytes())
    del raw["crc32c"]
    change(raw)
    path.write_text(json.dumps(raw | {"crc32c": json_sum(raw)}))


def test_members_of_a_later_version_are_left_out(run):
    rewrite(run / "headwater/manifest.json", lambda raw: raw.update(later=[1]))
    rewrite(run / "headwater/manifest.json", lambda raw: raw["arrays"][0].update(later={}))
    rewrite(run / "headwater/ledger/00000001.1.json", lambda raw: raw.update(later="x"))
    opened = headwater.open_run(run)
    assert not verify(opened).problems and opened["resid"][0, 5].shape == (20, 32)


MALFORMED = {
    "no member": lambda raw: raw.pop("micro"),
    "zero": lambda raw: raw.update(block=0),
    "huge": lambda raw: raw.update(n_sequences=2**63),
    "text for a number": lambda raw: raw.update(n_positions="20"),
    "true for a number": lambda raw: raw.update(n_positions=True),
    "no list": lambda raw: raw.update(arrays={}),
    "no array": lambda raw: raw.update(arrays=[3]),
    "an array of no size": lambda raw: raw["arrays"][0].update(shape=[]),
    "chunks of zero": lambda raw: raw["arrays"][0].update(chunk=[0, 0, 0, 0]),
    "another type": lambda raw: raw["arrays"][0].update(dtype="O"),
    "another codec": lambda raw: raw["arrays"][0].update(codec="lz"),
    "an array outside": lambda raw: raw["arrays"][0].update(name="../x"),
    "a file outside": lambda raw: raw["statics"].update({"../../etc/passwd": [1, 2]}),
    "a model of nothing": lambda raw: raw.update(model={}),
    "no text": lambda raw: raw.update(text={"sources": 3}),
}


@pytest.mark.parametrize("change", MALFORMED)
def test_a_malformed_manifest_is_refused_with_the_reason(run, change):
    rewrite(run / "headwater/manifest.json", MALFORMED[change])
    with pytest.raises(RunError, match="does not describe a run"):
        headwater.open_run(run)


def test_mutated_manifests_are_refused_or_read(run):
    """Values of other types at any place of the manifest never end in an error of Python's."""
    rng, path = np.random.default_rng(0), run / "headwater/manifest.json"
    whole = path.read_bytes()
    for _ in range(100):
        path.write_bytes(whole)

        def change(raw):
            place = raw
            while True:
                keys = list(place) if isinstance(place, dict) else range(len(place))
                key = keys[rng.integers(len(keys))]
                deeper = isinstance(place[key], dict | list) and len(place[key])
                if not deeper or rng.random() < 0.3:
                    place[key] = [None, 0, -1, 1e300, "", [], {}, True][rng.integers(8)]
                    return
                place = place[key]

        rewrite(path, change)
        with suppress(ValueError, OSError, LedgerError):
            verify(headwater.open_run(run), quick=True)


def test_an_entry_names_no_file_outside_the_run(run):
    path = run / "headwater/ledger/00000001.1.json"
    rewrite(path, lambda raw: raw["files"].update({"../../x": [1, 2]}))
    with pytest.raises(LedgerError, match="no path inside a run"):
        decode(path.read_bytes(), path.name, 1, read_manifest(run).fingerprint)


@pytest.mark.parametrize("pair", [[-1, 2], [1, -2], [1, 1 << 32], [1], [1, 2, 3]])
def test_an_entry_gives_no_file_a_size_or_sum_that_none_has(run, pair):
    path = run / "headwater/ledger/00000001.1.json"
    name = next(iter(json.loads(path.read_bytes())["files"]))
    rewrite(path, lambda raw: raw["files"].update({name: pair}))
    with pytest.raises(LedgerError, match="which no file has"):
        decode(path.read_bytes(), path.name, 1, read_manifest(run).fingerprint)
    assert verify(headwater.open_run(run)).problems


def test_only_files_of_the_ledger_count(run):
    (run / "headwater/ledger/00000001.9.gone").mkdir()
    (run / "headwater/ledger/00000000.9.gone").symlink_to(run / "zarr.json")
    assert headwater.open_run(run).complete.all()


def test_a_result_in_a_version_of_zarr_that_can_unpickle_is_not_opened(run):
    """Filters of Zarr 2 can be any of numcodecs, pickle among them, which older versions of it decode."""
    group = run.with_name("run.analysis") / "norms"
    group.mkdir(parents=True)
    (group / ".zgroup").write_text('{"zarr_format": 2}')
    (group / ".zattrs").write_text('{"analysis": "norms", "request": "../x"}')
    with pytest.raises(FileNotFoundError, match="Make it with"):
        load(run, "norms")
    assert set_aside(run, ["norms"], "other") == []
    analyze(run, ["norms"])
    assert load(run, "norms").attrs["analysis"] == "norms"


SWAPS = {
    "another run's": {"fingerprint": "other"},
    "another analysis's": {"analysis": "massive"},
    "of blocks that there are not": {"blocks": "0:999999999999"},
    "of other blocks": {"blocks": "0:1"},
}


@pytest.mark.parametrize("swap", SWAPS)
def test_a_result_that_is_another_is_not_shown_even_with_right_sums(run, swap):
    analyze(run, ["norms"])
    kept = load(run, "norms").load()
    place = save(run, kept)
    save_at(place, kept.assign_attrs(SWAPS[swap]))
    for show in (load, lambda run, name: read_result(headwater.open_run(run), [name], name)):
        with pytest.raises(ValueError, match="Make it anew"):
            show(run, "norms")
    assert analyze(run, ["norms"]).reused == []


@pytest.mark.parametrize("request_", ["../../x", "x" * 300, 7.5, ["a"]])
def test_earlier_results_are_set_aside_whatever_they_say_of_their_request(run, request_):
    analyze(run, ["norms"])
    kept = load(run, "norms").load()
    kept.attrs["request"] = request_
    save(run, kept)
    assert [path.name for path in set_aside(run, ["norms"], "other")] == ["norms@earlier"]


@pytest.mark.parametrize("link", ["headwater", "headwater/tmp", "headwater/lock"])
def test_what_a_link_in_the_bookkeeping_leads_to_is_left_alone(run, tmp_path, link):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a").write_text("precious")
    target = outside / "a" if link == "headwater/lock" else outside
    (run / link).rename(tmp_path / "was")
    (run / link).symlink_to(target)
    with pytest.raises(RunError, match="is a link"), hold(run):
        place_of(run).clear_temporary()
    assert [item.name for item in outside.iterdir()] == ["a"]
    assert (outside / "a").read_text() == "precious"


@pytest.mark.parametrize("name", ["{outside}", "../outside", "", ".", "headwater", "link", "mine"])
def test_a_planted_note_deletes_nothing_but_what_stage_0_makes(tmp_path, name):
    outside, run = tmp_path / "outside", tmp_path / "run"
    for folder in (outside, run / "headwater", run / "tokens/c/0", run / "mine"):
        folder.mkdir(parents=True)
    for file in (outside / "a", run / "mine/a", run / "tokens/zarr.json", run / "tokens/c/0/0"):
        file.write_text("")
    (run / "link").symlink_to(outside)
    (run / "headwater/unfinished").write_text(f"tokens\n{name.format(outside=outside)}\n")
    if name == "link":
        clear_unfinished(run)
    else:
        with pytest.raises(RunError):
            clear_unfinished(run)
    assert (outside / "a").exists() and (run / "mine/a").exists() and (run / "headwater").exists()
    assert not (run / "tokens").exists()


def test_scratch_folders_of_the_dead_are_deleted_and_no_others(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("lock", "manifest.json"):
        (victim / name).write_text("")
    (tmp_path / "hw-text-x").symlink_to(victim)
    shutil.copytree(victim, tmp_path / "hw-text-y")
    with scratch_folder("hw-text-", tmp_path) as dead:
        shutil.copytree(dead, tmp_path / "hw-text-z")  # its lock is held by nobody
        with scratch_folder("hw-text-", tmp_path) as other:
            left = {path.name for path in tmp_path.iterdir()}
    assert left == {"victim", "hw-text-x", "hw-text-y", dead.name, other.name}
    assert (victim / "manifest.json").exists()


@pytest.mark.parametrize("folder", ["", "headwater/ledger"])
def test_a_run_that_is_taken_away_while_it_is_written_is_not_made_anew(made, tmp_path, folder):
    def take_away(progress):
        if progress.entry is not None and progress.done == 2:
            (tmp_path / "run" / folder).rename(tmp_path / "elsewhere")

    with pytest.raises((RunError, RunMoved), match=r"moved or deleted|is missing"):
        extract(_at(made.config, tmp_path / "run"), take_away)
    if not folder:
        assert not (tmp_path / "run").exists()
        (tmp_path / "elsewhere").rename(tmp_path / "run")
    assert extract(_at(made.config, tmp_path / "run")).complete.all()


def test_arrays_take_lists_and_masks(made):
    run = headwater.open_run(made.path)
    array, values = run["resid"], np.asarray(run["resid"])
    assert values.shape == array.shape and values.dtype == array.dtype and len(array) == 3
    mask = np.arange(10) % 3 == 0
    for key in (
        (0, mask),
        (slice(None), [9, 0, -1, 0]),
        ([2, 0], slice(1, 7)),
        (..., [3, 1]),
        (0, np.zeros(10, bool)),
        (0, []),
    ):
        np.testing.assert_array_equal(array[key], values[key])
    np.testing.assert_array_equal(array[0, run.complete], values[0])
    here = np.arange(20) > 15  # dimensions keep their order, where numpy moves them to the front
    np.testing.assert_array_equal(array[1, 2:9, here], values[1][2:9, here])
    wrong = [(0, mask[:3]), ([0], [0]), (0, [10]), (0, 1.5), (True,), (None,), (0, values[0] > 0)]
    for key in wrong:
        with pytest.raises(IndexError, match="resid"):
            array[key]


def test_a_run_is_a_collection_of_its_arrays(made):
    run = headwater.open_run(made.path)
    assert "resid" in run and "tokens" not in run and 3 not in run
    assert list(run) == list(run.sites) and len(run) == len(run.sites)
    assert len(list(run["loss"])) == 10


def test_an_array_that_another_program_added_is_a_note(cli, run):
    import xarray

    with pytest.warns():
        xarray.Dataset({"probe": ("sequence", np.arange(10.0))}).to_zarr(run, mode="a")
    found = cli("verify", run)
    assert found.code == 0 and "zarr.json lists probe too" in found.out
    assert json.loads(cli("verify", run, "--json").out)["notes"]
    analyze(headwater.open_run(run), ["norms"])


def test_nothing_is_silently_wrong():
    """Of random damage to any file of a run and its results, every reader gives the same values or an error."""
    for (kind, reader), outcomes in flips.run(16, seed=7).items():
        assert set(outcomes) <= {"same", "refused"}, (kind, reader, outcomes)
