"""Values that the stored dtype cannot hold end the block with a clear error, or are kept as infinities and counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import headwater
from headwater.benchmarks.breaking import faults
from headwater.store.verify import verify

SITES = ("resid", "mlp_pre", "attn_scores", "resid_norm", "loss")


@pytest.fixture
def large(tmp_path):
    """A request whose embeddings at the positions 4 and 5, and only there, exceed float16."""
    config = replace(faults.make_case(tmp_path), sites=SITES)
    path = Path(config.model) / "model.safetensors"
    weights = load_file(path)
    weights["wpe.weight"][4:6, 7] = 1e6
    save_file(weights, path)
    return config


def test_the_block_fails_and_names_what_to_do(cli, large):
    arguments = [
        "extract",
        "--model",
        large.model,
        "--text",
        *large.text,
        "--labels",
        "kind,rank",
        "--seq-len",
        "20",
        "--block",
        "4",
        "--sites",
        ",".join(SITES),
        "--codec",
        large.codec,
        "--out",
        large.out,
    ]
    says = (
        "8 values of resid at depth 0 are too large for float16 (largest 65504) in sequences 0 to 3"
    )
    cli(*arguments).error(1, says, "--dtype resid=float32", "--on-overflow keep")
    run = headwater.open_run(large.out)
    assert not run.ledger.committed() and not run.complete.any() and not verify(run).problems
    assert np.isnan(run["resid"][...]).all() and not list((run.path / "headwater/tmp").iterdir())
    cli(*arguments).error(1, says)


def test_kept_infinities_are_counted(cli, large):
    run = headwater.extract(replace(large, on_overflow="keep"))
    assert run.complete.all() and not verify(run).problems
    casts = [entry.casts for entry in run.ledger.entries()]
    for name in SITES:
        kept = int(np.isinf(run[name][...].astype(np.float64)).sum())
        assert sum(c.get(name, {"overflow": 0})["overflow"] for c in casts) == kept, name
    n_large = int((run.tokens[:, 4:6] >= 0).sum())
    assert (
        np.isinf(run["resid"][0]).sum() == n_large
        and np.isinf(run["resid"][0, :, 4:6, 7]).sum() == n_large
    )
    assert np.isfinite(run["resid_norm"][:, 0]).all()
    said = json.loads(cli("status", run.path, "--json").out)["casts"]
    assert (
        said["resid"]["overflow"] == int(np.isinf(run["resid"][...]).sum())
        and said["resid"]["nonfinite"] == 0
    )
    wide = headwater.extract(replace(large, out=large.out + "-wide", dtype="float32"))
    assert all(not entry.casts for entry in wide.ledger.entries())
    with np.errstate(over="ignore"):
        assert np.array_equal(
            wide["resid"][...].astype(np.float16), run["resid"][...], equal_nan=True
        )
