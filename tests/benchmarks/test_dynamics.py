"""The script that resets an optimizer's moments: its task, its optimizer, its figures and its table."""

import csv

import numpy as np
import pytest
import torch

from headwater.benchmarks.training import train_dynamics
from headwater.benchmarks.training.train_dynamics import (
    Adam,
    Sizes,
    Task,
    losses,
    make_model,
    measure,
)

TINY = Sizes(
    n_layer=2, n_embd=8, length=16, d_vocab=16, batch=4, steps=4, more=4, warmup=2, every=2
)


def test_tokens_after_a_trigger_are_copies():
    rows = Task(TINY, 0).rows(200).numpy()
    assert (rows[:, 0] == 0).all() and rows[:, 1:].min() >= 1 and rows.max() <= 15
    after = np.isin(rows[:, 2:-1], (1, 2, 3))
    assert after.sum() > 100
    assert (rows[:, 3:][after] == rows[:, 1:-2][after]).all()
    assert (rows[:, 3:] == rows[:, 1:-2])[~after].mean() < 0.5


@pytest.mark.parametrize("reset", ["none", "both"])
def test_optimizer_is_adamw(reset):
    """A reset of both moments is a new AdamW."""

    def gradients():
        torch.manual_seed(1)
        for _ in range(4):
            yield [torch.randn(4, 3), torch.randn(3)]

    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]

    def adamw():
        groups = [
            {"params": theirs[:1], "weight_decay": 0.1},
            {"params": theirs[1:], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))

    adam, other = Adam(ours), adamw()
    for at, values in enumerate(gradients()):
        if at == 2 and reset == "both":
            adam.reset("both")
            other = adamw()
        for ps in (ours, theirs):
            for p, value in zip(ps, values, strict=True):
                p.grad = value.clone()
        before = [p.detach().clone() for p in ours]
        size = adam.step(0.01)
        other.step()
        moved = torch.cat([(a.detach() - b).flatten() for a, b in zip(ours, before, strict=True)])
        assert size == pytest.approx(float(moved.norm()), rel=1e-4)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_one_moment_is_reset_with_its_own_bias_correction():
    p = torch.nn.Parameter(torch.zeros(3))
    adam = Adam([p])
    for _ in range(5):
        p.grad = torch.full((3,), 2.0)
        adam.step(0.01)
    for which, grad, expected in (("first", 2.0, 0.01), ("second", 2.0, 0.01)):
        adam.reset(which)
        before = p.detach().clone()
        p.grad = torch.full((3,), grad)
        adam.step(0.01)
        torch.testing.assert_close(before - p, torch.full((3,), expected), rtol=1e-4, atol=0)


def test_figures_agree_with_transformers():
    model, rows = make_model(TINY, 0), Task(TINY, 0).rows(6)
    got = measure(model, rows.numpy())
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(input_ids=rows, output_attentions=True, output_hidden_states=True)
    share = torch.stack(out.attentions)[..., 8:, 0].mean((1, 3))
    assert got["share"] == pytest.approx(float(share.mean()), abs=1e-5)
    assert got["share_max"] == pytest.approx(float(share.max()), abs=1e-5)
    inner = torch.stack(out.hidden_states[:-1])
    assert got["largest"] >= float(inner.abs().max()) - 1e-5
    if got["largest_depth"] < TINY.n_layer:
        place = got["largest_depth"], slice(None), got["largest_position"], got["largest_dimension"]
        assert got["largest"] == pytest.approx(float(inner[place].abs().max()), abs=1e-5)
    assert losses(model, rows).shape == (6 * 15,)


def test_every_way_goes_on_from_the_same_model(tmp_path):
    out = tmp_path / "table.csv"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(TINY).items()]
    train_dynamics.main(["--out", str(out), "--seeds", "0", "1", *flags])
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    ways = {(row["seed"], row["reset"], row["warmup"]) for row in rows}
    assert len(ways) == 2 * (1 + 8)
    scratch = [row for row in rows if row["reset"] == "scratch"]
    for seed in ("0", "1"):
        end = [row for row in scratch if row["seed"] == seed][-1]
        starts = [
            row
            for row in rows
            if row["seed"] == seed and row["reset"] != "scratch" and row["step"] == "0"
        ]
        assert len(starts) == 8
        assert all(
            row[name] == end[name] for row in starts for name in ("loss", "largest", "share")
        )
    last = {
        (row["reset"], row["warmup"]): row["loss"]
        for row in rows
        if row["seed"] == "0" and row["step"] == "4"
    }
    assert last["none", "0"] != last["both", "0"] != last["first", "0"] != last["second", "0"]
