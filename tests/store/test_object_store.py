"""Runs in an object store: a real S3 server (moto) behind a proxy that throttles and drops; the same bytes as on disk.

The server and the proxy are tests/s3_with_faults.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import headwater
from headwater.analysis.engine.scan import Scan
from headwater.analysis.measures.cosine import cosine
from headwater.benchmarks.breaking import faults
from headwater.extractor.cluster.weights import published
from headwater.extractor.model.weights import load_checkpoint
from headwater.extractor.text import commit
from headwater.store import lease, objects, publish
from headwater.store.ledger import Ledger
from headwater.store.manifest import RunError, read_manifest
from headwater.store.objects import StoreError
from headwater.store.place import place_of
from headwater.store.verify import repair, verify

pytest.importorskip("obstore")
pytest.importorskip("moto.server")
SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYs3cr3tOfTheTest"
SHAKY = {"throttle": 0.1, "drop": 0.05, "drop_answer": 0.05, "cut": 0.05}
BOOKKEEPING = "headwater/"


class Server:
    """The proxy and the server behind it."""

    def __init__(self, proxy, server):
        self.proxy, self.server = proxy, server

    def set(self, **rules):
        self._call(f"{self.proxy}/faults", "PUT", json.dumps(rules).encode())

    def done(self):
        return json.loads(self._call(f"{self.proxy}/faults"))

    def make_bucket(self, name):
        self._call(f"{self.server}/{name}", "PUT")

    def _call(self, url, method="GET", data=None):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return opener.open(urllib.request.Request(url, data, method=method), timeout=60).read()


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A server with one bucket, the environment that leads to it, and nobody's credentials but the test's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        home = tmp_path_factory.mktemp("home")
        for name, value in {
            "AWS_ACCESS_KEY_ID": "AKIATEST",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": str(home / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(home / "none"),
            "no_proxy": "127.0.0.1",
            "TMPDIR": str(home),
        }.items():
            patch.setenv(name, value)
        patch.setattr(tempfile, "tempdir", str(home))
        command = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "s3_with_faults.py")]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            server = Server(*json.loads(process.stdout.readline()))
            patch.setenv("AWS_ENDPOINT_URL", server.proxy)
            server.make_bucket("bucket")
            yield server
            process.stdin.close()


@pytest.fixture(autouse=True)
def calm(s3):
    s3.set()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A request, and what an uninterrupted run of it on disk holds."""
    config = faults.make_case(tmp_path_factory.mktemp("case"))
    return config, faults.contents(headwater.extract(config).path)


def stored(url):
    """Every object of a run, by its path in it."""
    run = place_of(url)
    return {item.relative_to(run).as_posix(): item.read_bytes() for item in run.iterdir()}


def contents(url):
    """What a run promises: its objects outside the bookkeeping."""
    return {name: data for name, data in stored(url).items() if not name.startswith(BOOKKEEPING)}


def left_over(url):
    """Objects of the bookkeeping that a finished run does not have."""
    return [
        name
        for name in stored(url)
        if name.startswith((f"{BOOKKEEPING}tmp", f"{BOOKKEEPING}lock", f"{BOOKKEEPING}unfinished"))
    ]


def test_the_same_bytes_and_values_as_on_disk(s3, made, cli):
    config, expected = made
    url = "s3://bucket/one/run"
    run = headwater.extract(replace(config, out=url))
    assert contents(url) == expected and not left_over(url) and run.complete.all()
    assert {name.partition("/")[0] for name in stored(url)} == {
        p.partition("/")[0] for p in expected
    } | {"headwater"}
    before = stored(url)
    headwater.extract(headwater.RunConfig(out=url))
    assert stored(url) == before
    assert not verify(run, workers=4).problems and not verify(run, quick=True).problems
    local = headwater.open_run(config.out)
    for name in run.sites:
        np.testing.assert_array_equal(run[name][...], local[name][...])
        np.testing.assert_array_equal(run[name][0, 3:7], local[name][0, 3:7])
    assert json.loads(cli("status", url, "--json").out)["done"] and cli("verify", url).code == 0
    assert f"headwater.open_run({url!r}).to_xarray()" in cli("info", url).out
    assert cli("extract", "--out", url).code == 0
    assert (
        "in an object store"
        in cli("plan", "--model", config.model, "--text", *config.text, "--out", url).out
    )
    assert not [p for p in Path(os.environ["TMPDIR"]).glob("hw-*")]


def test_zarr_and_xarray_read_the_prefix_without_headwater(s3, made):
    import xarray
    import zarr
    from obstore.store import from_url
    from zarr.storage import ObjectStore

    config, _ = made
    headwater.extract(replace(config, out="s3://bucket/plain"))
    store = ObjectStore(
        from_url(
            "s3://bucket/plain", config={"endpoint": s3.proxy}, client_options={"allow_http": True}
        ),
        read_only=True,
    )
    group, local = zarr.open_group(store, mode="r"), zarr.open_group(config.out, mode="r")
    for name, array in local.arrays():
        np.testing.assert_array_equal(group[name][...], array[...], err_msg=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        here = xarray.open_zarr(store, chunks=None).load()
    xarray.testing.assert_identical(
        here, headwater.open_run("s3://bucket/plain").to_xarray().load()
    )
    xarray.testing.assert_identical(here, xarray.open_zarr(config.out, chunks=None).load())


def test_throttling_and_dropped_connections(s3, made):
    config, expected = made
    url = "s3://bucket/shaky"
    s3.set(**SHAKY, seed=4)
    run = headwater.extract(replace(config, out=url))
    assert run.complete.all() and not verify(run, workers=4).problems
    done = s3.done()
    assert all(done[kind] for kind in SHAKY), done
    s3.set()
    assert contents(url) == expected and not left_over(url)
    assert [entry.attempt for entry in run.ledger.entries()] == [1, 1, 1]


def test_large_shards_go_in_parts(s3, made, monkeypatch):
    config, expected = made
    monkeypatch.setattr(objects, "PUT_BYTES", 20_000)
    monkeypatch.setattr(objects, "PART_BYTES", 5 << 20)
    s3.set(only="POST .*uploads", throttle=0.5, seed=1)
    headwater.extract(replace(config, out="s3://bucket/parts"))
    assert s3.done()["throttle"]
    s3.set()
    assert contents("s3://bucket/parts") == expected


@pytest.mark.parametrize("rules", [{}, {"no_conditions": True}])
def test_an_entry_is_created_once_even_where_its_answer_is_lost(s3, made, rules):
    config, _ = made
    run = headwater.extract(replace(config, out="s3://bucket/once"))
    (entry, *_), ledger = run.ledger.entries(), run.ledger
    s3.set(**rules, only="PUT .*ledger", drop_answer=1, most=1)
    second = replace(entry, attempt=ledger.next_attempt(entry.block), worker="late")
    assert ledger.commit(second), "its own request is told from another's by its bytes"
    s3.set(**rules)
    assert not ledger.commit(replace(second, worker="later"))
    assert next(ledger.entries()).worker == "late"
    ledger.remove(entry.block)


def test_a_store_without_conditions_holds_a_run(s3, made):
    config, expected = made
    s3.set(no_conditions=True)
    headwater.extract(replace(config, out="s3://bucket/simple"))
    assert s3.done()["not_implemented"] == 1  # it is asked once
    assert contents("s3://bucket/simple") == expected and not left_over("s3://bucket/simple")


def test_a_conflict_of_conditional_requests_is_no_refusal(s3, made):
    config, expected = made
    s3.set(conflict=4)
    headwater.extract(replace(config, out="s3://bucket/conflict"))
    assert s3.done()["conflict"] == 4
    s3.set(conflict=2)
    run = place_of("s3://bucket/conflict")
    dead = {"host": socket.gethostname(), "pid": 1 << 22, "key": "k"}
    (run / "headwater/lock").write_bytes(json.dumps(dead).encode())
    with lease.lease(run):  # taken over from a process that is gone
        assert s3.done()["conflict"] == 2
    assert contents(str(run)) == expected and not left_over(str(run))


def test_damage_is_named_and_repaired(s3, made, cli):
    config, expected = made
    url = "s3://bucket/damaged"
    run = headwater.extract(replace(config, out=url))
    place = run.path
    data = bytearray(expected["resid/c/0/1/0/0"])
    data[40] ^= 8
    (place / "resid/c/0/1/0/0").write_bytes(bytes(data))
    (place / "loss/c/0/0").unlink()
    entry = place / "headwater/ledger/00000002.1.json"
    entry.write_bytes(entry.read_bytes()[:-40])
    again = headwater.open_run(url)
    with pytest.raises(RunError, match="does not match its checksum"):
        again["resid"][0, 4]
    assert {p.path for p in verify(again).problems} == {
        "resid/c/0/1/0/0",
        "loss/c/0/0",
        "headwater/ledger/00000002.1.json",
    }
    assert cli("verify", url, "--repair").code == 0
    assert not headwater.open_run(url).complete.any()
    assert (
        headwater.extract(headwater.RunConfig(out=url)).complete.all() and contents(url) == expected
    )


class Stop(Exception):
    """Ends an extraction."""


def test_an_interrupted_run_goes_on(s3, made):
    config, expected = made
    config = replace(config, out="s3://bucket/half")

    def stop(progress):
        if progress.entry is not None:
            raise Stop

    with pytest.raises(Stop):
        headwater.extract(config, stop)
    run = headwater.open_run(config.out)
    assert (
        run.complete.sum() == 4 and np.isnan(run["resid"][0, 4:]).all() and not verify(run).problems
    )
    seen = []
    headwater.extract(config, lambda p: seen.append(p.entry and p.entry.block))
    assert seen == [None, 1, 2] and contents(config.out) == expected


def test_an_interrupted_text_is_committed_anew(s3, made, monkeypatch):
    config, expected = made
    config = replace(config, out="s3://bucket/text")

    def fail(made, run, manifest):
        names = [*manifest.statics, "tokens/c/9/9"]
        (run / "headwater/unfinished").write_bytes("".join(f"{name}\n" for name in names).encode())
        for name in ("tokens/zarr.json", "tokens/c/9/9"):
            (run / name).write_bytes(b"of another text")
        raise Stop

    monkeypatch.setattr(commit, "publish", fail)
    with pytest.raises(Stop):
        headwater.extract(config)
    with pytest.raises(RunError, match="its text was never committed"):
        headwater.open_run(config.out)
    monkeypatch.setattr(commit, "publish", publish.publish)
    headwater.extract(config)
    assert contents(config.out) == expected and not left_over(config.out)


def test_a_driver_that_is_killed(s3, made):
    config, expected = made
    url = "s3://bucket/killed"
    command = [
        sys.executable,
        "-m",
        "headwater",
        "extract",
        "--model",
        config.model,
        "--text",
        *config.text,
        "--labels",
        "kind,rank",
        "--seq-len",
        "20",
        "--sites",
        ",".join(config.sites),
        "--codec",
        config.codec,
        "--block",
        "4",
        "--threads",
        "1",
        "--out",
        url,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 300
    while process.poll() is None and not place_of(f"{url}/headwater/ledger").is_dir():
        assert time.monotonic() < end
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0]
    manifest = read_manifest(place_of(url))
    assert Ledger(place_of(url), manifest.fingerprint).committed(), said
    headwater.extract(
        replace(config, out=url)
    )  # the lock of a process of this machine that is dead
    assert contents(url) == expected and not left_over(url)
    assert not list(Path(os.environ["TMPDIR"]).glob("hw-*"))


def test_a_second_driver_learns_who_is_first(s3, made, cli, monkeypatch):
    config, _ = made
    monkeypatch.setattr(lease, "REFRESH_SECONDS", 0.2)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.1)
    run = place_of("s3://bucket/locked")
    with lease.lease(run) as check:
        again = cli("extract", "--model", config.model, "--text", *config.text, "--out", run)
        again.error(1, f"is being written by process {os.getpid()} on ", "One run has one writer")
        monkeypatch.setattr(lease, "REFRESH_SECONDS", 60)
        time.sleep(0.5)
        monkeypatch.setattr(
            lease, "LEASE_SECONDS", 0.5
        )  # the first one is dead for all that can be seen
        monkeypatch.setattr(lease, "REFRESH_SECONDS", 0.2)
        with lease.lease(run):
            pass
        with pytest.raises(lease.LockedError):  # it came back after a pause: it was taken over
            check()
    assert not (run / "headwater/lock").is_file()


def test_a_lock_that_was_taken_over_stops_its_first_holder(s3, monkeypatch):
    monkeypatch.setattr(lease, "REFRESH_SECONDS", 0.1)
    run = place_of("s3://bucket/taken")
    with lease.lease(run) as check:
        other = {"host": "other", "pid": 7, "since": "today", "key": "k"}
        (run / "headwater/lock").write_bytes(json.dumps(other).encode())
        with pytest.raises(lease.LockedError, match="process 7 on other since today"):
            for _ in range(300):
                check()
                time.sleep(0.1)
    assert (run / "headwater/lock").is_file(), "another's lock stays"


def test_a_driver_that_lost_its_run_takes_nothing_from_the_next(s3, made, monkeypatch):
    """It was stopped for longer than its lease; the next driver has begun to write, and its workers to load."""
    config, _ = made
    run = place_of("s3://bucket/lost")
    checkpoint = load_checkpoint(config.model)
    with published(run, checkpoint, False) as theirs:
        with published(run, checkpoint, False):
            pass
        assert (run / "headwater/tmp" / theirs).is_file()
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.0)  # any pause is a long one
    theirs = {"host": "other", "pid": 7, "since": "today", "key": "k"}
    written = {
        "headwater/lock": json.dumps(theirs).encode(),
        "headwater/unfinished": b"tokens/zarr.json\n",
        "tokens/zarr.json": b"theirs",
    }

    def lose(progress):
        for name, data in written.items():
            (run / name).write_bytes(data)

    def lose_and_refuse(progress):
        lose(progress)
        raise ValueError("a text that cannot be read")

    for observe in (lose, lose_and_refuse):
        with pytest.raises(lease.LockedError, match="by process 7 on other"):
            headwater.extract(replace(config, out=str(run)), observe)
        assert stored(run) == written
        (run / "headwater/lock").unlink()


def test_what_is_wrong_is_said(s3, made, cli, monkeypatch, tmp_path):
    config, _ = made
    common = ["extract", "--model", config.model, "--text", *config.text, "--out"]
    cli(*common, "s3://nowhere/run").error(1, "s3://nowhere/run", "there is no such bucket")
    cli(*common, "s3://").error(2, "s3:// names no bucket")
    cli("status", "s3://bucket/missing").error(
        2, "there is no run at s3://bucket/missing: no such prefix"
    )
    (place_of("s3://bucket/mine") / "notes.txt").write_bytes(b"mine")
    cli(*common, "s3://bucket/mine").error(
        2, "is not empty and not a Headwater run (it holds 'notes.txt')"
    )
    monkeypatch.setattr(objects, "RETRIES", objects.RETRIES | {"max_retries": 1})
    objects._connect.cache_clear()
    s3.set(throttle=1)
    cli("status", "s3://bucket/missing").error(1, "503 Service Unavailable SlowDown")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    objects._connect.cache_clear()
    answer = cli("status", "s3://bucket/missing")
    assert answer.code == 1 and "Traceback" not in answer.err and SECRET not in answer.err
    objects._connect.cache_clear()
    monkeypatch.setitem(sys.modules, "obstore", None)
    cli("status", "s3://bucket/missing").error(2, "pip install obstore")


@pytest.mark.parametrize("inner", ["headwater/ledger/00000001.9.gone", "a", "../around.analysis/x"])
def test_no_run_is_made_inside_another(s3, made, inner):
    around = place_of("s3://bucket/around")
    (around / "headwater/manifest.json").write_bytes(b"{}")
    out = f"s3://bucket/around.analysis/{inner[-1]}" if ".." in inner else f"{around}/{inner}"
    with pytest.raises(RunError, match="lies in the run s3://bucket/around"):
        headwater.extract(replace(made[0], out=out))


def test_credentials_come_from_the_standard_chain_and_go_nowhere(s3, made, monkeypatch, tmp_path):
    """A profile in ~/.aws serves, and neither it nor the environment's secret is printed or stored."""
    config, expected = made
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / "credentials").write_text(
        f"[lab]\naws_access_key_id = AKIALAB\naws_secret_access_key = {SECRET}\n"
    )
    flags = [
        "--model",
        config.model,
        "--text",
        *config.text,
        "--labels",
        "kind,rank",
        "--seq-len",
        "20",
        "--sites",
        ",".join(config.sites),
        "--codec",
        config.codec,
        "--block",
        "4",
        "--threads",
        "1",
    ]
    environment = {name: value for name, value in os.environ.items()} | {
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_PROFILE": "lab",
        "HEADWATER_DEBUG": "1",
    }
    command = [sys.executable, "-m", "headwater", "extract", *flags, "--out"]
    s3.set(throttle=0.1, drop=0.1)
    good = subprocess.run(
        [*command, "s3://bucket/lab"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert good.returncode == 0, good.stderr
    s3.set()
    bad = subprocess.run(
        [*command, "s3://nowhere/lab"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert bad.returncode == 1
    none = environment | {
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    del none["AWS_PROFILE"]
    nobody = subprocess.run(
        [*command, "s3://bucket/x"], env=none, capture_output=True, text=True, timeout=300
    )
    assert (
        nobody.returncode == 1
        and "there are no credentials for S3: set AWS_ACCESS_KEY_ID" in nobody.stderr
    )
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    held = stored("s3://bucket/lab")
    assert {n: d for n, d in held.items() if not n.startswith(BOOKKEEPING)} == expected
    said = "".join(r.stdout + r.stderr for r in (good, bad, nobody)).encode()
    for secret in (SECRET.encode(), b"AKIALAB"):
        assert secret not in said and not [name for name, data in held.items() if secret in data]


def test_analyses_read_it_and_keep_their_results_beside_it(s3, made):
    from headwater.analysis.engine.results import load, save

    config, _ = made
    run = headwater.extract(replace(config, out="s3://bucket/analysed"))
    here, there = cosine(run), cosine(headwater.open_run(config.out))
    for name in there.data_vars:
        np.testing.assert_array_equal(here[name], there[name])
    assert str(save(run, here)) == f"s3://bucket/analysed.analysis/{here.attrs['analysis']}"
    names = set(map(str, place_of("s3://bucket").iterdir()))
    assert not names & {"s3://bucket/zarr.json", "s3://bucket/analysed.analysis/zarr.json"}, (
        "no groups above a result"
    )
    kept = load("s3://bucket/analysed", here.attrs["analysis"])
    for name in there.data_vars:
        np.testing.assert_array_equal(kept[name], there[name])


def test_an_interrupted_scan_goes_on(s3, made):
    config, _ = made
    run = headwater.extract(replace(config, out="s3://bucket/scanned"))
    whole, seen = cosine(run, cka="all"), []

    def stop(progress):
        seen.append((progress.at, progress.done))
        if len(seen) == 4:  # in the second pass
            raise Stop

    with pytest.raises(Stop):
        cosine(run, cka="all", scan=Scan(keep_seconds=0, observe=stop))
    again = cosine(run, cka="all", scan=Scan(keep_seconds=0, observe=stop))
    assert seen[:4] == [(1, 1), (1, 2), (1, 3), (2, 1)] and (1, 1) not in seen[4:]
    assert not place_of("s3://bucket/scanned.analysis").is_dir()
    for name, value in whole.items():
        np.testing.assert_array_equal(again[name], value)


def test_workers_write_the_same_bytes(s3, made, tmp_path):
    """Two Ray workers through a shaky proxy; their secrets are in nobody's log."""
    pytest.importorskip("ray")
    config, expected = made
    s3.set(**SHAKY, seed=2)
    run = headwater.extract(replace(config, out="s3://bucket/ray", workers=2))
    s3.set()
    assert contents("s3://bucket/ray") == expected and not left_over("s3://bucket/ray")
    assert run.complete.all() and len(list(run.ledger.entries())) == 3
    repair(run, verify(run))
    assert not [name for name, data in stored("s3://bucket/ray").items() if SECRET.encode() in data]


def test_a_missing_object_is_told_from_a_failing_store(s3):
    place = place_of("s3://bucket/none")
    with pytest.raises(FileNotFoundError, match="there is no object s3://bucket/none/x"):
        (place / "x").read_bytes()
    with pytest.raises(StoreError, match="no such bucket"):
        (place_of("s3://nowhere/none") / "x").read_bytes()


def test_a_changed_endpoint_is_another_store(monkeypatch):
    handles = []
    for port in (9001, 9002, 9001):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        handles.append(objects._store("s3://bucket"))
    assert handles[0] is handles[2] is not handles[1]
