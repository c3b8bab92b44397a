"""The bits of a result depend on its request alone: not on threads, not on the batch, not on where a run stopped."""

import dataclasses

import numpy as np
import pytest
import torch

import headwater
from headwater.benchmarks.breaking.faults import contents
from headwater.extractor import plan as plan_module
from headwater.extractor.sites import SITES

WIDE = 3072
D_VOCAB = 701


@pytest.fixture(autouse=True)
def threads():
    """Set torch's thread count in a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.tobytes() == np.ascontiguousarray(want[name]).tobytes(), name


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "quick_gelu", "silu"])
@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
def test_bits_do_not_depend_on_threads_or_batch(oracle, threads, compute, activation):
    """272 rows × d_mlp are more elements than torch gives to one thread; 5 and 7 threads cut them between vectors."""
    model = oracle.gpt2(
        n_layer=1,
        n_head=3,
        n_embd=96,
        n_positions=130,
        n_inner=WIDE,
        vocab_size=D_VOCAB,
        activation_function=activation,
    )
    tokens, row_start = oracle.rows(3, 130, "documents", d_vocab=D_VOCAB)
    threads(1)
    _, want = oracle.capture(model, tokens, row_start, compute)
    for n in (2, 5, 7, 16) if activation == "gelu_new" else (5,):
        threads(n)
        _, got = oracle.capture(model, tokens, row_start, compute)
        assert_same_bits(got, want)
    for part in (slice(0, 1), slice(1, 3)):
        _, got = oracle.capture(model, tokens[part], row_start[part], compute)
        assert_same_bits(
            got,
            {
                name: value[:, part] if SITES[name].axis else value[part]
                for name, value in want.items()
            },
        )


def test_odd_sizes_do_not_depend_on_the_batch(oracle):
    """What is left over behind the last whole vector must not be computed otherwise than the rest."""
    model = oracle.gpt2(n_layer=1, n_head=5, n_embd=35, n_positions=48, n_inner=23)
    tokens, row_start = oracle.rows(4, 48, "unpadded")
    _, want = oracle.capture(model, tokens, row_start)
    for part in (slice(0, 1), slice(0, 3), slice(2, 4)):
        _, got = oracle.capture(model, tokens[part], row_start[part])
        assert_same_bits(
            got,
            {
                name: value[:, part] if SITES[name].axis else value[part]
                for name, value in want.items()
            },
        )


@pytest.fixture(scope="module")
def request_(oracle, tmp_path_factory):
    """A run of 3 blocks, the last one short, with padding at either end of some rows."""
    home = tmp_path_factory.mktemp("same")
    oracle.gpt2(n_head=3, n_embd=96, n_positions=150, vocab_size=D_VOCAB).save_pretrained(
        home / "model"
    )
    tokens, _ = oracle.rows(9, 150, "left", d_vocab=D_VOCAB)
    tokens[4:] = oracle.rows(5, 150, "right", seed=1, d_vocab=D_VOCAB)[0]
    np.save(home / "ids.npy", tokens)
    return headwater.RunConfig(
        out="unset",
        model=str(home / "model"),
        tokens=str(home / "ids.npy"),
        preset="all",
        block=4,
        codec="pattern=zstd-1",
    )


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_runs_with_other_threads_have_the_same_files(request_, tmp_path, compute):
    runs = []
    for n in (1, 2, 5):
        config = dataclasses.replace(
            request_, out=str(tmp_path / str(n)), compute=compute, threads=n
        )
        runs.append(contents(headwater.extract(config).path))
    assert len(runs[0]) > 100 and runs[0] == runs[1] == runs[2]


def test_a_run_that_was_interrupted_has_the_same_files(request_, tmp_path):
    class Stop(Exception):
        pass

    def stop_after_each_block(progress):
        if progress.entry is not None:
            raise Stop

    whole = dataclasses.replace(request_, out=str(tmp_path / "whole"), threads=2)
    parts = dataclasses.replace(request_, out=str(tmp_path / "parts"))
    for n in (1, 5, 2):
        with pytest.raises(Stop):
            headwater.extract(dataclasses.replace(parts, threads=n), stop_after_each_block)
    assert headwater.open_run(parts.out).complete.all()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").rglob("*") if p.is_file()}
    again = headwater.extract(dataclasses.replace(parts, threads=7))
    assert before == {
        p: p.stat().st_mtime_ns for p in (tmp_path / "parts").rglob("*") if p.is_file()
    }
    assert contents(again.path) == contents(headwater.extract(whole).path)


def test_values_do_not_depend_on_micro_batches_or_blocks(request_, tmp_path, monkeypatch):
    sites = ("resid", "mlp_post", "pattern", "attn_distance", "attn_received", "loss", "top_logits")
    request_ = dataclasses.replace(request_, sites=sites)
    want = headwater.extract(dataclasses.replace(request_, out=str(tmp_path / "want")))
    for block, micro in ((4, 1), (8, 8), (1, 1)):
        monkeypatch.setattr(plan_module, "MICRO_TOKENS", micro * 150)
        got = headwater.extract(
            dataclasses.replace(request_, out=str(tmp_path / f"{block}-{micro}"), block=block)
        )
        assert (got.manifest.block, got.manifest.micro) == (block, micro)
        assert_same_bits(
            {name: got[name][...] for name in got.sites},
            {name: want[name][...] for name in want.sites},
        )
