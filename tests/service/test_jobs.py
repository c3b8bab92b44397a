"""Jobs of a real server: planned, run, followed, cancelled, refused; and a server that is killed in the middle."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest

import headwater
from headwater.analysis.suite.registry import all_options, analyses
from headwater.benchmarks.breaking.faults import contents
from headwater.benchmarks.lib.serving import Server
from headwater.extractor.settings import EDITS, FILE, MODEL, PLACE, PLAIN, options_of
from headwater.service.jobs.analysis_options import analyze_schema
from headwater.service.jobs.requests import allowed
from headwater.service.places import DeniedError
from headwater.service.settings import make_settings

N_KILLS, N_BLOCKS = 3, 240


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_gpt2, tiny_text):
    home = tmp_path_factory.mktemp("served")
    shutil.copytree(tiny_gpt2, home / "models" / "tiny")
    (home / "texts").mkdir()
    shutil.copy(tiny_text, home / "texts" / "fox.txt")
    for name, n in (("ids", N_BLOCKS), ("long", 50 * N_BLOCKS)):
        np.save(
            home / "texts" / f"{name}.npy",
            np.random.default_rng(5).integers(0, 200, (n, 32)).astype(np.int32),
        )
    return home


@pytest.fixture(scope="module")
def server(root):
    with Server(root) as server:
        yield server


DOCUMENT = {
    "model": "models/tiny",
    "tokens": "texts/ids.npy",
    "sites": ["resid", "attn_sink"],
    "block": 1,
    "layers": "1",
    "depths": "1",
    "threads": 1,
}


def submit(server, kind="extract", **document):
    return server.client.post("/jobs", {"kind": kind, "document": document})


@pytest.fixture(scope="module")
def extracted_here(root):
    """The bytes of the run as this process makes it, from the same model and ids."""
    config = headwater.RunConfig(
        **DOCUMENT
        | {
            "out": str(root / "same"),
            "model": str(root / "models/tiny"),
            "tokens": str(root / "texts/ids.npy"),
        }
    )
    found = contents(headwater.extract(config).path)
    shutil.rmtree(root / "same")
    return found


def test_a_job_is_planned_run_and_followed(server, root, extracted_here, cli):
    planned = server.client.post(
        "/plan", {"kind": "extract", "document": DOCUMENT | {"out": "first"}}
    )
    assert planned["price"]["n_blocks"] == N_BLOCKS and not (root / "first").exists()
    clock = server.client.get("/jobs")["clock"]
    job = submit(server, **DOCUMENT, out="first")
    assert job["price"]["total_bytes"] == planned["price"]["total_bytes"] and job["run"] == "first"
    seen = []
    for changed in server.client.follow(clock):
        seen.append(changed)
        if changed["state"] == "done":
            break
    assert seen[-1]["id"] == job["id"] and seen[-1]["progress"]["done"] == N_BLOCKS
    assert any(0 < change["progress"].get("done", 0) < N_BLOCKS for change in seen)
    run = headwater.open_run(root / "first")
    assert run.complete.all() and seen[-1]["result"]["fingerprint"] == run.manifest.fingerprint
    assert extracted_here == contents(run.path)
    listed = cli("jobs", "--server", server.url)
    assert (
        listed.code == 0
        and f"job 1: extract first, done, blocks {N_BLOCKS}/{N_BLOCKS} blocks" in listed.out
    )


def test_analyses_and_checks_are_jobs(server, root, cli):
    done = cli(
        "submit",
        "analyze",
        "--set",
        "run=first",
        "analyses=massive",
        "--server",
        server.url,
        "--wait",
    )
    assert done.code == 0 and "analyze first, done" in done.out, done
    assert "massive" in server.client.get("/runs/first/about")["analyses"]
    shard = root / "first" / headwater.open_run(root / "first").spec("resid").shard_path(0, 3)
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    checked = server.finish(submit(server, "verify", run="first")["id"])
    assert checked["result"]["n_problems"] == 1
    listed = {run["name"]: run for run in server.client.get("/runs")["runs"]}
    assert listed["first"]["damage"]["n_problems"] == 1
    assert listed["first"]["damage"]["problems"][0]["path"] == str(
        shard.relative_to(root / "first")
    )
    data[100] ^= 1
    shard.write_bytes(data)


def test_a_cancelled_job_leaves_a_run_that_goes_on(server, root, cli):
    job = submit(server, **DOCUMENT, out="second")
    server.wait_for(job["id"], lambda job: job["progress"].get("done", 0) >= 2)
    server.client.post(f"/jobs/{job['id']}/cancel")
    assert server.finish(job["id"])["state"] == "cancelled"
    listed = {run["name"]: run for run in server.client.get("/runs")["runs"]}
    n_done = listed["second"]["committed"]
    assert 2 <= n_done < N_BLOCKS and listed["second"]["state"] == "unfinished"
    about = server.client.get("/runs/second/about")
    assert about["incomplete"] == [[n_done, N_BLOCKS]]
    with pytest.raises(ValueError, match="are not computed yet"):
        server.client.get(f"/runs/second/arrays/resid?sequence={n_done}")
    resumed = submit(server, out="second")
    assert (
        resumed["price"]["committed"] == n_done and server.finish(resumed["id"])["state"] == "done"
    )
    assert contents(root / "second") == contents(root / "first")
    again = server.client.post(f"/jobs/{resumed['id']}/cancel")
    assert again["state"] == "done"


def test_jobs_wait_for_one_another(server, root, cli):
    first = submit(server, **DOCUMENT | {"tokens": "texts/long.npy"}, out="long")
    waiting = submit(server, **DOCUMENT, out="third")
    assert (
        waiting["state"] == "queued"
        and submit(server, **DOCUMENT, out="third")["id"] == waiting["id"]
    )
    assert cli("cancel", waiting["id"], "--server", server.url).code == 0
    assert server.client.get(f"/jobs/{first['id']}")["state"] == "running"
    assert cli("cancel", first["id"], "--server", server.url).code == 0
    assert {server.finish(job["id"])["state"] for job in (first, waiting)} == {"cancelled"}
    assert not (root / "third").exists()


def test_a_killed_server_goes_on_once(root, extracted_here, tmp_path):
    """Killed at random moments of a job; the run must end byte-equal, by one job. Memory is limited here, too."""
    chance = random.Random(1)
    with Server(tmp_path, "--memory", "1", "--models", str(root), "--texts", str(root)) as server:
        with pytest.raises(ValueError, match="but the server gives all jobs together 1 GB"):
            submit(server, **DOCUMENT, workers=2, out="large")
        number = submit(server, **DOCUMENT, out="killed")["id"]
        for kill in range(N_KILLS):
            server.wait_for(
                number, lambda job, n=N_BLOCKS // 4 * kill: job["progress"].get("done", 0) > n
            )
            time.sleep(chance.random() * 0.05)
            server.kill()
            server.start()
        job = server.finish(number)
        assert job["state"] == "done" and job["starts"] == N_KILLS + 1
        assert [j["id"] for j in server.client.get("/jobs")["jobs"] if j["run"] == "killed"] == [
            number
        ]
        assert headwater.open_run(tmp_path / "killed").ledger.committed().keys() == set(
            range(N_BLOCKS)
        )
        assert contents(tmp_path / "killed") == extracted_here


@pytest.mark.parametrize(
    ("kind", "document", "part"),
    [
        ("extract", {"out": "../x", **DOCUMENT}, "no name under the server's root"),
        ("extract", {"out": "/etc/x", **DOCUMENT}, "no name under the server's root"),
        ("extract", {"out": "first.analysis", **DOCUMENT}, "is taken"),
        ("extract", {"out": "texts/a", **DOCUMENT}, "is taken"),
        ("extract", {"out": ".headwater/a", **DOCUMENT}, "no name under the server's root"),
        ("extract", {**DOCUMENT, "out": "x", "model": "/etc"}, "is not under the server's root"),
        (
            "extract",
            {**DOCUMENT, "out": "x", "model": "models/../../etc"},
            "is not under the server's root",
        ),
        ("extract", {"out": "x", "text": ["/etc/passwd"]}, "is not under the server's root"),
        (
            "extract",
            {"out": "x", "text": ["texts/../../../etc/passwd"]},
            "is not under the server's root",
        ),
        ("extract", {"out": "x", "text": ["-"]}, "is not under the server's root"),
        ("extract", {"out": "x", "text": [".headwater"]}, "is not under the server's root"),
        ("extract", {"out": "x", "text": ["links"]}, "link that leads out"),
        ("extract", {"out": "x", "text": ["links/passwd"]}, "is not under the server's root"),
        ("extract", {**DOCUMENT, "out": "outside/x"}, "no name under the server's root"),
        (
            "extract",
            {**DOCUMENT, "out": "first/headwater/ledger/00000001.9.gone"},
            "lies in the run",
        ),
        ("extract", {**DOCUMENT, "out": "first.analysis/x"}, "lies in the run"),
        ("extract", {**DOCUMENT, "out": "x", "allow_call": "os:system"}, "runs no code"),
        ("extract", {**DOCUMENT, "out": "x", "ray": "auto"}, "is the server's to choose"),
        (
            "extract",
            {**DOCUMENT, "out": "x", "edits": ["attn_out[0] call=os:system"]},
            "runs no code",
        ),
        (
            "extract",
            {**DOCUMENT, "out": "x", "edits": ["attn_out[0] set=/etc/passwd"]},
            "is not under the server's root",
        ),
        ("extract", {**DOCUMENT, "out": "x", "presets": "all"}, "did you mean 'preset'"),
        (
            "extract",
            {**DOCUMENT, "out": "x", "sites": ["everything"]},
            "there is no site 'everything'",
        ),
        ("analyze", {"run": "first", "analyses": ["sink"]}, "there is no analysis 'sink'"),
        (
            "analyze",
            {"run": "first", "options": {"model": "/etc"}},
            "is not under the server's root",
        ),
        ("analyze", {"run": "first", "options": {"windw": 3}}, "did you mean 'window'"),
        ("analyze", {"run": "first", "options": {"layers": -1.5}}, "the option layers is -1.5"),
        ("analyze", {"run": "first", "options": {"n": float("nan")}}, "the option n is nan"),
        ("analyze", {"run": "first", "options": {"sign": 0}}, "the option sign is 0"),
        ("analyze", {"run": "first", "options": {"site": "loss"}}, "the option site is 'loss'"),
        ("analyze", {"run": "first", "options": []}, "options is []"),
        ("verify", {"run": "nowhere"}, "there is no run 'nowhere'"),
        ("verify", {"run": "first", "repair": 1}, "expected true or false"),
        ("ablate", {"run": "first", "target": "attn_out[0] call=os:system"}, "runs no code"),
        (
            "ablate",
            {"run": "first", "target": "resid[1]", "edits": ["attn_out[0] call=os:system"]},
            "runs no code",
        ),
        ("plateau", {"run": "first", "pairs": "/etc/passwd"}, "is not under the server's root"),
        (
            "ablate",
            {"run": "first", "target": "resid[1]", "plot": "/tmp/x"},
            "is no setting of ablate",
        ),
        ("format", {"run": "first"}, "there is no job 'format'"),
    ],
)
def test_what_a_job_may_not_is_refused(server, root, kind, document, part):
    links = root / "links"
    if not links.exists():
        links.mkdir()
        (links / "passwd").symlink_to("/etc/passwd")
        (root / "outside").symlink_to(root.parent)
    before = len(server.client.get("/jobs")["jobs"])
    with pytest.raises(ValueError) as refusal:
        server.client.post("/jobs", {"kind": kind, "document": document})
    assert part in str(refusal.value) and str(root) not in str(refusal.value)
    assert len(server.client.get("/jobs")["jobs"]) == before and not (root / "x").exists()


def test_a_text_is_sent_planned_and_priced_by_command(server, root, tmp_path, cli):
    text, config = tmp_path / "sent.txt", tmp_path / "run.toml"
    text.write_text("the fox jumps\n" * 50)
    config.write_text(
        'model = "models/tiny"\ntext = ["texts/sent.txt"]\npreset = "statistics"\nseq-len = 16\n'
    )
    flags = ["submit", "extract", "--config", config, "--server", server.url, "--set", "out=sent"]
    planned = cli(*flags, "--upload", text, "--plan")
    assert (
        planned.code == 0
        and planned.out.startswith("sent: writes ")
        and (root / "texts/sent.txt").is_file()
    )
    cli(*flags, "--upload", text).error(2, "texts/sent.txt is there already")
    cli(*flags, "seq-len=9999").error(2, "--seq-len is 9999")
    cli("submit", "extract", "--set", "out", "--server", server.url).error(2, "'out' is no setting")
    cli("cancel", 999, "--server", server.url).error(2, "there is no job 999")
    cli("jobs", "--server", "http://127.0.0.1:9").error(1, "cannot be reached")
    cli("serve", root).error(2, "is served already, by process")


def test_every_option_of_an_analysis_has_its_kind():
    """What an analysis takes is a flag and a key of jobs, but for events, which are objects of Python."""
    taken = {name for kind in analyses().values() for name in kind.parameters()}
    offered = analyze_schema()["properties"]["options"]["properties"]
    assert set(offered) == set(all_options()) == taken - {"events"}
    flags = [takers[0][1].flag for takers in all_options().values()]
    assert len(set(flags)) == len(flags)
    for takers in all_options().values():
        assert len({option.flag for _, option in takers}) == 1


def test_what_a_setting_leads_to_decides_whether_jobs_may_have_it(tmp_path):
    """One that is new must say it: one that names a place has to be checked in documents."""
    settings = make_settings(str(tmp_path))
    for option in options_of(headwater.RunConfig):
        assert option.refused or option.leads in (PLAIN, FILE, PLACE, MODEL, EDITS), option.name
    new = replace(options_of(headwater.RunConfig)[1], name="new", leads=None)
    with pytest.raises(DeniedError, match="new is not for jobs"):
        allowed(settings, new, "/etc/passwd")


def test_the_document_describes_every_kind_of_job(server):
    schemas = server.client.get("/openapi.json")["components"]["schemas"]
    extract = schemas["ExtractDocument"]
    assert extract["properties"].keys() == {
        option.name for option in options_of(headwater.RunConfig) if not option.refused
    }
    assert extract["required"] == ["out"] and extract["properties"]["seq_len"]["minimum"] == 1
