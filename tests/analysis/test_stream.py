"""Streams: every row once an epoch over runs, ranks and workers; resumable; as well mixed as stated; bounded."""

import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import headwater
from headwater.benchmarks.lib.synthetic import make_run
from headwater.store.manifest import RunError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def residuals(tmp_path_factory):
    """A run of 48 sequences of 256 positions, 3 depths, width 64, float16."""
    return make_run(tmp_path_factory.mktemp("stream"), 48 * 3 * 256 * 64 * 2, 2, 64, 256)


def gather(batches):
    values, index = zip(*batches, strict=True)
    return torch.cat(values).numpy(), torch.cat(index).numpy()


def wanted(run, site, without_first):
    """The real stored positions of a run, as a set of (sequence, position)."""
    from headwater.analysis.engine.reducer import Chunk

    row_start = run.plain("row_start")
    text = Chunk(run, 0, len(row_start), row_start, row_start).text(site)
    return {
        tuple(map(int, place)) for place in np.argwhere(text.real & ~(text.first & without_first))
    }


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("layout", ["plain", "packed", "padded", "last", "0:5"])
def test_every_row_comes_once_with_its_values(analysis_run, layout, shuffle):
    run = analysis_run(layout)
    for site, at in (("resid", [0, 2]), ("z", 1)):
        for without_first in (False, True):
            row = 2 * run[site].shape[-1] * 4 * (1 if site == "resid" else run[site].shape[3])
            stream = headwater.stream(
                run,
                site,
                8,
                at=at,
                shuffle=shuffle,
                index=True,
                without_first=without_first,
                buffer_bytes=40 * row,
            )
            batches = list(stream)
            values, index = gather(batches)
            expected = wanted(run, site, without_first)
            assert [len(v) for v, _ in batches[:-1]] == [8] * (len(batches) - 1) and len(
                batches
            ) == stream.n_batches()
            assert {(s, p) for _, s, p in index.tolist()} == expected and len(index) == len(
                expected
            ) == stream.n_rows
            held = run[site][:][at][..., index[:, 1], index[:, 2], :] if site == "resid" else None
            held = (
                held.swapaxes(0, 1)
                if held is not None
                else run[site][:][at][index[:, 1], index[:, 2]]
            )
            np.testing.assert_array_equal(values, held)
            if not shuffle:
                assert (np.diff(index[:, 1] * 10_000 + index[:, 2]) > 0).all()


def test_several_runs_ranks_and_workers_share_an_epoch(residuals, tmp_path):
    other = make_run(tmp_path, 10 * 3 * 256 * 64 * 2, 2, 64, 256)
    options = {"at": 1, "index": True, "buffer_bytes": 1 << 20, "seed": 5}
    seen = []
    for rank in range(2):
        stream = headwater.stream(
            [residuals, other.path], "resid", 100, rank=rank, world_size=2, **options
        )
        stream.set_epoch(3)
        batches = list(DataLoader(stream, batch_size=None, num_workers=2))
        assert len(batches) == stream.n_batches(3, 2)
        seen.append(gather(batches)[1])
    both = np.concatenate(seen)
    assert len(both) == 58 * 256 == len(np.unique(both, axis=0)) and set(both[:, 0]) == {0, 1}
    lengths = []
    for rank in range(3):
        stream = headwater.stream(
            [residuals, other], batch_tokens=100, rank=rank, world_size=3, even=True, **options
        )
        lengths.append([len(values) for values, _ in stream])
    assert lengths[0] == lengths[1] == lengths[2] and set(lengths[0]) == {100}


def test_a_stream_goes_on_where_its_state_was_taken(residuals):
    def make(**changes):
        options = {"at": 2, "epochs": 2, "buffer_bytes": 1 << 20} | changes
        return headwater.stream(residuals, "resid", 1000, **options)

    whole = list(make())
    assert len(whole) == 2 * 13 and not torch.equal(whole[0], whole[13])
    for stop in (1, 4, 13, 20):
        stream = make()
        taken = [batch for _, batch in zip(range(stop), stream, strict=False)]
        state = json.loads(json.dumps(stream.state_dict()))
        again = make()
        again.load_state_dict(state)
        rest = list(again)
        for got, expected in zip(taken + rest, whole, strict=True):
            assert torch.equal(got, expected)
        assert [len(b) for b in make(drop_last=True, epochs=1)] == [1000] * 12
    with pytest.raises(ValueError, match="another seed, without_first"):
        make(seed=1, without_first=True).load_state_dict(state)


def test_the_shuffle_mixes_as_stated(residuals):
    """Pairs of rows of one batch from one piece are as frequent as `quality` says, far rarer than in order."""

    def same_piece(stream):
        step = int(stream.pieces.counts.max())
        rates = []
        for _, index in stream:
            if len(index) == 512:
                counts = np.unique(index[:, 1] * 1000 + index[:, 2] // step, return_counts=True)[1]
                rates.append((counts * (counts - 1)).sum() / (512 * 511))
        return np.mean(rates), np.std(rates) / np.sqrt(len(rates))

    for rows in (1024, 4096, 48 * 256):
        stream = headwater.stream(
            residuals, "resid", 512, at=1, index=True, buffer_bytes=2 * rows * 128
        )
        measured, error = same_piece(stream)
        quality = stream.quality
        assert abs(measured - quality.same_piece) < 5 * error + 0.1 * quality.same_piece, (
            rows,
            measured,
            quality,
        )
        assert quality.window_rows == rows
    assert measured < 1.2 * quality.ideal
    ordered = headwater.stream(residuals, "resid", 512, at=1, index=True, shuffle=False)
    assert same_piece(ordered)[0] > 10 * measured
    order = np.concatenate([i[:, 1] * 256 + i[:, 2] for _, i in stream])
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 5 / np.sqrt(48)
    first, second = (
        next(iter(headwater.stream(residuals, "resid", 512, at=1, seed=seed))) for seed in (0, 1)
    )
    assert not torch.equal(first, second)


def test_memory_is_bounded(residuals):
    stream = headwater.stream(residuals, "resid", 256, at=[0, 1, 2], buffer_bytes=1 << 20)
    sum(float(batch.sum()) for batch in stream)
    tracemalloc.start()
    try:
        for batch in stream:
            del batch
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    rows = 48 * 256 * 3 * 128
    assert peak < (1 << 20) + (1 << 20) < rows, peak


def test_bad_requests_say_what_is_wrong(residuals, analysis_run):
    run = analysis_run("plain")
    for arguments, message in (
        ({"site": "pattern"}, "a stream takes vectors by position"),
        ({"at": 9}, r"holds resid at depth \[0, 1, 2, 3\]; \[9\] was asked for"),
        ({"at": []}, "nothing was asked for"),
        ({"batch_tokens": 0}, "batch_tokens is 0; expected a whole number from 1 on"),
        ({"buffer_bytes": 1000}, "holds two windows of 5 rows; expected room for 4,096 rows"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of world_size 2"),
        ({"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            headwater.stream(run, **arguments)
    with pytest.raises(RunError, match="Stream runs of one model, stored alike"):
        headwater.stream([run, residuals], "resid", at=1)
    with pytest.raises(ValueError, match="stream got no run"):
        headwater.stream([])


def test_the_training_loop_of_the_documentation_learns(residuals, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(residuals.path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/stream.md").read_text("utf-8"), re.S)
    names = {}
    exec(code.replace("4096", "256"), names)
    losses = names["losses"]
    assert len(losses) == 2 * (48 * 255 // 256) and np.mean(losses[-10:]) < 0.5 * np.mean(
        losses[:10]
    )
    assert json.loads((tmp_path / "stream.json").read_text())["epoch"] == 2


def test_a_batch_that_is_kept_is_not_written_again(residuals):
    batches = headwater.stream(residuals, "resid", 512, at=1, buffer_bytes=1 << 20, index=True)
    kept = [(values, index) for i, (values, index) in enumerate(batches) if i % 3 == 0]
    views = [values.numpy()[:, :4] for values, _ in kept]
    addresses = {values.data_ptr() for values, _ in kept}
    for _ in headwater.stream(residuals, "resid", 512, at=1, buffer_bytes=1 << 20):
        pass
    assert len(addresses) == len(kept)
    for view, (values, index) in zip(views, kept, strict=True):
        right = residuals["resid"][1][index[:, 1].numpy(), index[:, 2].numpy()]
        np.testing.assert_array_equal(values.numpy(), right)
        np.testing.assert_array_equal(view, right[:, :4])


def test_memory_of_batches_is_used_again(residuals):
    addresses = [
        values.data_ptr()
        for values in headwater.stream(residuals, "resid", 512, at=1, buffer_bytes=1 << 20)
    ]
    assert len(addresses) > 10 and len(set(addresses)) <= 3


@pytest.mark.parametrize("at", [1, [0, 2]])
def test_reading_around_the_page_cache_changes_nothing(residuals, at):
    usual, direct = (
        headwater.stream(residuals, "resid", 300, at=at, buffer_bytes=1 << 20, direct=d)
        for d in (False, True)
    )
    for a, b in zip(usual, direct, strict=True):
        assert torch.equal(a, b)
