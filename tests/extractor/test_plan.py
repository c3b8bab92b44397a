"""A plan says what a run will take before anything runs: bytes, shapes and memory, and what cannot be."""

from __future__ import annotations

import shutil
import time
import tracemalloc
from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headwater.extractor import budget as module
from headwater.extractor import machine
from headwater.extractor.budget import check_resources, free_disk
from headwater.extractor.machine import available_memory
from headwater.extractor.model.weights import ModelConfig
from headwater.extractor.plan import (
    Geometry,
    geometry,
    make_plan,
)
from headwater.extractor.request import RunConfig
from headwater.extractor.run import extract, plan_run
from headwater.extractor.sites import SITES, RequestError
from headwater.extractor.units import count, show_bytes
from headwater.store.layout import CHUNK_BYTES, LAYER_BYTES, SHARD_BYTES, make_spec, tile_edge

SMALL = ModelConfig.from_hf({"model_type": "gpt2"}, "config")
XL = ModelConfig.from_hf(
    {"model_type": "gpt2", "n_layer": 48, "n_head": 25, "n_embd": 1600}, "config"
)
MIB = 1 << 20


def size_of(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    "selection",
    [
        {"preset": "all", "block": 8},
        {"preset": "all", "seq_len": 20, "max_sequences": 11, "block": 4},
        {"preset": "all", "mode": "document", "block": 2, "max_sequences": 1},
        {
            "sites": ["resid", "q", "pattern"],
            "layers": "1",
            "heads": "0",
            "positions": "last",
            "dtype": "float32",
        },
    ],
)
def test_projected_bytes_are_written_bytes(tiny_gpt2, tiny_text, tmp_path, selection):
    config = RunConfig(tmp_path / "run", str(tiny_gpt2), text=[str(tiny_text)], **selection)
    plan, run = plan_run(config), extract(config)
    assert (plan.n_sequences, plan.n_blocks) == (run.manifest.n_sequences, run.manifest.n_blocks)
    assert plan.array_bytes() == {name: size_of(run.path / name / "c") for name in run.sites}
    text = ("tokens", "row_start", "length", "document", "offset", "complete")
    written = sum(size_of(run.path / name / "c") for name in text)
    assert plan.text_bytes >= written
    unplanned = (
        size_of(run.path / "tokenizer.json") if (run.path / "tokenizer.json").exists() else 0
    )
    assert plan.total_bytes == pytest.approx(size_of(run.path) - unplanned, rel=0.02, abs=100_000)


def test_a_million_blocks_are_planned_at_once():
    shape = Geometry(1024, 16, 2)
    config = RunConfig("run", preset="all")
    tracemalloc.start()
    start = time.process_time()
    plan = make_plan(config, XL, shape, 16_000_000)
    assert plan.n_blocks == 10**6 == len(plan.blocks) and plan.total_bytes > 10**15
    assert plan.heaviest()[0][0] in ("attn_scores", "pattern")
    assert time.process_time() - start < 2 and tracemalloc.get_traced_memory()[1] < 50 * MIB
    tracemalloc.stop()
    one = make_plan(config, XL, shape, 16)
    assert plan.host_bytes == one.host_bytes and plan.geometry == one.geometry
    assert [s.shard for s in plan.arrays] == [s.shard for s in one.arrays]
    assert sum(plan.array_bytes().values()) == 10**6 * sum(one.array_bytes().values())


def test_a_run_shorter_than_a_block_has_shorter_chunks():
    config, shape = RunConfig("run", preset="statistics"), Geometry(16, 1024, 128)
    for n in (1, 3, 1000):
        plan = make_plan(config, SMALL, shape, n)
        whole = 1 << (n - 1).bit_length()
        assert {spec.sequences_per_shard for spec in plan.arrays} == {whole} and plan.n_blocks == 1
        assert all(spec.sequences_per_chunk <= whole for spec in plan.arrays)
    assert make_plan(config, SMALL, shape, 1).total_bytes < MIB
    longer = [make_plan(config, SMALL, shape, n).arrays for n in (1024, 5000)]
    assert [s.shard for s in longer[0]] == [s.shard for s in longer[1]]


def test_geometry_is_of_the_model_not_of_the_run():
    config = RunConfig("run")
    assert geometry(config, SMALL) == Geometry(1024, 16, 2)
    assert geometry(RunConfig("run", seq_len=300), SMALL) == Geometry(300, 32, 4)
    assert geometry(RunConfig("run", seq_len=1, block=4), SMALL) == Geometry(1, 4, 4)
    assert geometry(config, SMALL, 77) == Geometry(77, 128, 16)
    with pytest.raises(
        RequestError, match="--seq-len is 1025, but the model has only 1024 positions"
    ):
        geometry(RunConfig("run", seq_len=1025), SMALL)
    with pytest.raises(RequestError, match="the rows of --tokens have 2000 positions"):
        geometry(config, SMALL, 2000)


@pytest.mark.parametrize(
    ("n", "edge"),
    [
        (1, 1),
        (100, 100),
        (256, 256),
        (257, 64),
        (300, 64),
        (512, 256),
        (1024, 256),
        (640, 128),
        (2048, 256),
    ],
)
def test_tile_edges(n, edge):
    assert tile_edge(n) == edge


@given(st.integers(1, 4096))
def test_tiles_waste_at_most_a_third(n):
    def stored(edge):
        return -(-n // edge) * (-(-n // edge) + 1) // 2 * edge * edge

    if n > 256:
        good = [
            edge
            for edge in (64, 128, 256)
            if 3 * stored(edge) <= 4 * min(map(stored, (64, 128, 256)))
        ]
        assert tile_edge(n) == max(good)


@st.composite
def layouts(draw):
    heads = draw(st.integers(1, 25))
    d_head = draw(st.sampled_from([8, 64, 80]))
    return SimpleNamespace(
        site=SITES[draw(st.sampled_from(sorted(SITES)))],
        block=2 ** draw(st.integers(0, 12)),
        n=draw(st.integers(1, 10**6)),
        length=draw(st.integers(1, 2048)),
        layers=draw(st.integers(1, 48)),
        heads=heads,
        d_head=d_head,
        dtype=draw(st.sampled_from(["float16", "float32"])),
        top_k=draw(st.integers(1, 50)),
    )


@settings(max_examples=300, deadline=None)
@given(layouts())
@example(
    SimpleNamespace(
        site=SITES["mlp_post"],
        block=64,
        n=99,
        length=1024,
        layers=48,
        heads=25,
        d_head=64,
        dtype="float32",
        top_k=1,
    )
)
def test_layouts_keep_the_rules(c):
    sizes = {
        "layer": c.layers,
        "depth": c.layers + 1,
        "head": c.heads,
        "sequence": c.n,
        "position": c.length,
        "query": c.length,
        "key": c.length,
        "d_model": c.heads * c.d_head,
        "d_head": c.d_head,
        "d_mlp": 4 * c.heads * c.d_head,
        "d_vocab": 50257,
        "rank": c.top_k,
    }
    spec = make_spec(c.site.name, c.site.dims, sizes, c.dtype, "none", c.site.fill, c.block, {})
    itemsize, lead = np.dtype(c.dtype).itemsize, 0 if spec.axis is None else 1
    assert all(s % k == 0 for s, k in zip(spec.shard, spec.chunk, strict=True))
    assert all(s >= n for s, n in zip(spec.shard[lead + 1 :], spec.shape[lead + 1 :], strict=True))
    assert (
        c.block % spec.sequences_per_shard == 0
        and spec.sequences_per_shard % spec.sequences_per_chunk == 0
    )
    row = prod(spec.shape[lead + 2 :]) * itemsize
    if not spec.tiled:
        assert spec.chunk_bytes <= CHUNK_BYTES + 16 * row
    stored = (
        c.heads * spec.n_tiles() * spec.chunk[-1] ** 2
        if spec.tiled
        else prod(spec.shape[lead + 1 :])
    )
    per_sequence = stored * itemsize
    part = per_sequence * spec.sequences_per_shard * spec.layers_per_shard
    assert part <= SHARD_BYTES or (spec.sequences_per_shard, spec.layers_per_shard) == (1, 1)
    if spec.sequences_per_shard < c.block:
        assert 2 * part > SHARD_BYTES
    if spec.axis is not None:
        whole = per_sequence * c.block < LAYER_BYTES and per_sequence * spec.shape[0] <= SHARD_BYTES
        assert spec.layers_per_shard == (spec.shape[0] if whole else 1)
    if spec.tiled:
        edge = tile_edge(c.length)
        assert (
            spec.chunk[-2:] == (edge, edge)
            and c.heads % spec.chunk[-3] == 0
            and spec.sequences_per_chunk == 1
        )
    assert spec.stored_bytes(2 * c.block) == 2 * spec.stored_bytes(c.block)
    assert spec.stored_bytes(c.block) >= per_sequence * c.block * (
        1 if lead == 0 else spec.shape[0]
    )


def test_refusals_give_both_numbers(monkeypatch, tmp_path):
    plan = make_plan(RunConfig("run", preset="patterns"), SMALL, Geometry(1024, 16, 2), 10_000)
    monkeypatch.setattr(module, "free_disk", lambda out: 10**9)
    with pytest.raises(
        RequestError, match=rf"needs {show_bytes(plan.total_bytes)} on disk, .* has 1 GB free"
    ):
        check_resources(plan, tmp_path)
    monkeypatch.setattr(module, "free_disk", lambda out: plan.total_bytes // 2)
    check_resources(plan, tmp_path, done=0.6)
    monkeypatch.setattr(module, "available_memory", lambda: 10**8)
    with pytest.raises(
        RequestError,
        match=rf"needs {show_bytes(plan.host_bytes)} of memory, but 100 MB are available",
    ):
        check_resources(plan, tmp_path, done=0.6)
    make_plan(RunConfig("run", top_k=60000), SMALL, Geometry(8, 1, 1), 1)
    with pytest.raises(RequestError, match="--top-k is 60000, but the vocabulary has 50257 tokens"):
        make_plan(RunConfig("run", sites=["top_logits"], top_k=60000), SMALL, Geometry(8, 1, 1), 1)


def test_projected_memory_grows_with_what_is_asked():
    def host(model=SMALL, block=16, **request):
        return make_plan(
            RunConfig("run", **request), model, Geometry(1024, block, 2), 100
        ).host_bytes

    assert host() < host(preset="patterns") < host(preset="all") < host(XL, preset="all") < 32 << 30
    assert host(block=8) < host(block=32) and host(compute="bf16") > host()
    assert host(workers=2) > 2 * host() > host(workers=1) > host() == host(workers=2, ray="auto")


def test_free_disk_and_memory_are_those_of_this_machine(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # the disk fills while tests run: ask once, for two paths
        usage = {str(tmp_path): shutil.disk_usage(tmp_path)}
        patch.setattr(shutil, "disk_usage", lambda path: usage[str(path)])
        assert 0 < free_disk(tmp_path / "not/there/yet") == free_disk(tmp_path)
    assert 0 < available_memory() < 1 << 50
    files = {
        "memory.max": "1000000000\n",
        "memory.current": "900000000\n",
        "memory.stat": "inactive_file 300000000\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert (
        machine._room(str(tmp_path), "memory.max", "memory.current", "inactive_file") == 4 * 10**8
    )
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._room(str(tmp_path), "memory.max", "memory.current", "inactive_file") > 1 << 50
    assert free_disk(Path("/")) > 0


def test_numbers_are_written_for_people():
    assert [show_bytes(n) for n in (0, 999, 1000, 999_600, 1.5e9, 2e12, 3e15, 4e19)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1 MB",
        "1.5 GB",
        "2 TB",
        "3 PB",
        "40,000 PB",
    ]
    assert [count(n, "block") for n in (0, 1, 2000)] == ["0 blocks", "1 block", "2,000 blocks"]
