"""Train toy GPT-2s whose two one-dimensional heads must rank four signals in opposite orders, and analyse them.

Tokens: 0 the readout, 1–4 signals, 5–11 noise. A sequence holds two of the signals, each several times, and a little
noise; at the readout, the last position, the model names both signals with probability ½ each. A head of dimension 1
gives every token one score, so it attends to the signal present that stands highest in its order; to tell the six
pairs apart, the two heads need opposite orders of most. The known answer is the order that the weights set.
Embeddings are one-hot and frozen, positions zero, the MLP zero, each head uses one dimension of its six; all seeds are
trained together.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from headwater.benchmarks.lib.measure import write_csv
from headwater.benchmarks.lib.rows import Row

READOUT = 0
SIGNALS = (1, 2, 3, 4)
NOISE = (5, 6, 7, 8, 9, 10, 11)
D_VOCAB = D_MODEL = 12
N_HEAD = 2
D_HEAD = 6
LENGTH = 12
PAIRS = np.array([(a, b) for a in SIGNALS for b in SIGNALS if a != b])
NOISE_SHARE = 0.05
SOLVED = 0.72
Tensors = dict[str, torch.Tensor]


def make_sequences(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens int32 [n, LENGTH] and the two signals of each [n, 2]."""
    pair = PAIRS[rng.integers(0, len(PAIRS), n)]
    tokens = np.take_along_axis(pair, rng.integers(0, 2, (n, LENGTH)), 1)
    noise = rng.random((n, LENGTH)) < NOISE_SHARE
    noise[:, 1:3], noise[:, 0] = False, True
    tokens[:, 1:3] = pair
    tokens = np.where(noise, rng.choice(NOISE, (n, LENGTH)), tokens)
    tokens[:, 1:-1] = rng.permuted(tokens[:, 1:-1], axis=1)
    tokens[:, -1] = READOUT
    return tokens.astype(np.int32), pair


def normalised_one_hot() -> torch.Tensor:
    """Return LayerNorm of the one-hot embeddings: [token, d_model]."""
    return torch.nn.functional.layer_norm(torch.eye(D_MODEL), (D_MODEL,))


def logits_of(p: Tensors, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Return the logits at the readout of every model: [seed, B, token]."""
    table = normalised_one_hot()
    q = p["w_q"] @ table[READOUT] + p["b_q"]
    k = p["w_k"] @ table.T + p["b_k"][..., None]
    v = p["w_v"] @ table.T + p["b_v"][..., None]
    scores = (q[..., None] * k / math.sqrt(D_HEAD))[:, :, tokens_BT]
    read = (scores.softmax(-1) * v[:, :, tokens_BT]).sum(-1)
    x = (
        torch.eye(D_MODEL)[READOUT]
        + torch.einsum("shb,shd->sbd", read, p["w_o"])
        + p["b_o"][:, None]
    )
    x = torch.nn.functional.layer_norm(x, (D_MODEL,))
    return x * p["gamma"][:, None] + p["beta"][:, None]


def train(seeds: list[int], steps: int = 2000, batch: int = 256) -> tuple[Tensors, np.ndarray]:
    """Train one model a seed; return their parameters [seed, …] and final losses, nats, of which ln 2 is the least."""
    sizes = {
        "w_q": (N_HEAD, D_MODEL),
        "w_k": (N_HEAD, D_MODEL),
        "w_v": (N_HEAD, D_MODEL),
        "w_o": (N_HEAD, D_MODEL),
        "b_q": (N_HEAD,),
        "b_k": (N_HEAD,),
        "b_v": (N_HEAD,),
        "b_o": (D_MODEL,),
        "beta": (D_MODEL,),
    }
    makers = [torch.Generator().manual_seed(seed) for seed in seeds]
    p = {
        name: torch.stack([torch.randn(size, generator=make) * 0.5 for make in makers])
        for name, size in sizes.items()
    }
    p["gamma"] = torch.ones(len(seeds), D_MODEL)
    for value in p.values():
        value.requires_grad_()
    optimiser = torch.optim.Adam(p.values(), lr=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.05, steps)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        tokens, pair = (torch.from_numpy(x).long() for x in make_sequences(batch, rng))
        log_p = logits_of(p, tokens).log_softmax(-1)
        loss = -log_p.gather(2, pair.expand(len(seeds), -1, -1)).mean((1, 2))
        optimiser.zero_grad()
        loss.sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return {name: value.detach() for name, value in p.items()}, loss.detach().numpy()


def save_model(folder: Path, p: Tensors, at: int) -> None:
    """Write one of the models as a Hugging Face directory of a GPT-2."""
    import safetensors.torch

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "gpt2",
        "n_layer": 1,
        "n_head": N_HEAD,
        "n_embd": D_MODEL,
        "n_positions": LENGTH,
        "vocab_size": D_VOCAB,
        "bos_token_id": None,
        "eos_token_id": None,
        "n_inner": D_MODEL,
    }
    (folder / "config.json").write_text(json.dumps(config))
    ones = torch.ones(D_MODEL)
    zeros = torch.zeros(D_MODEL)
    square = torch.zeros(D_MODEL, D_MODEL)
    qkv = torch.zeros(D_MODEL, 3 * D_MODEL)
    bias = torch.zeros(3 * D_MODEL)
    out = square.clone()
    for part, name in enumerate("qkv"):
        for head in range(N_HEAD):
            column = part * D_MODEL + head * D_HEAD
            qkv[:, column], bias[column] = p[f"w_{name}"][at, head], p[f"b_{name}"][at, head]
    for head in range(N_HEAD):
        out[head * D_HEAD] = p["w_o"][at, head]
    tensors = {
        "wte.weight": torch.eye(D_MODEL),
        "wpe.weight": torch.zeros(LENGTH, D_MODEL),
        "h.0.ln_1.weight": ones,
        "h.0.ln_1.bias": zeros,
        "h.0.ln_2.weight": ones,
        "h.0.ln_2.bias": zeros,
        "h.0.attn.c_attn.weight": qkv,
        "h.0.attn.c_attn.bias": bias,
        "h.0.attn.c_proj.weight": out,
        "h.0.attn.c_proj.bias": p["b_o"][at],
        "h.0.mlp.c_fc.weight": square,
        "h.0.mlp.c_fc.bias": zeros,
        "h.0.mlp.c_proj.weight": square,
        "h.0.mlp.c_proj.bias": zeros,
        "ln_f.weight": p["gamma"][at],
        "ln_f.bias": p["beta"][at],
    }
    safetensors.torch.save_file(
        {name: value.clone() for name, value in tensors.items()}, folder / "model.safetensors"
    )


def signal_orders(p: Tensors, at: int) -> np.ndarray:
    """Return the scores of the signals at the readout in each head: [head, signal]. This is the known answer."""
    table = normalised_one_hot()
    q = p["w_q"][at] @ table[READOUT] + p["b_q"][at]
    return (q[:, None] * (p["w_k"][at] @ table.T + p["b_k"][at][:, None]))[:, SIGNALS].numpy()


def analyse(folder: Path, p: Tensors, at: int, n: int = 256) -> Row:
    """Extract a run of one model, compare its heads, and return what was found beside the known answer."""
    import headwater
    from headwater.analysis.measures.favourites import favourites
    from headwater.analysis.measures.head_rows import kendall
    from headwater.analysis.measures.heads import heads, inverted_pairs
    from headwater.analysis.weights.directions import weights

    save_model(folder / "model", p, at)
    np.save(folder / "ids.npy", make_sequences(n, np.random.default_rng(1))[0])
    run = headwater.extract(
        headwater.RunConfig(
            model=str(folder / "model"),
            tokens=str(folder / "ids.npy"),
            out=str(folder / "run"),
            sites=("pattern",),
            dtype="float32",
        )
    )
    found = heads(run, queries=[LENGTH - 1], n_sequences=n)
    likes = favourites(run, queries=[LENGTH - 1], n_sequences=n, tokens=SIGNALS, min_rows=4)
    order = signal_orders(p, at)
    return {
        "known_tau": round(float(kendall(order[:1], order[1:])[0, 0]), 3),
        "tau": round(float(found.tau[0, 0, 1]), 3),
        "tau_null": round(float(found.tau_null[0, 0, 1]), 3),
        "q": float(found.q[0, 0, 1]),
        "inverted": bool(inverted_pairs(found)),
        "qk_correlation": round(
            float(weights(str(folder / "model"), 1, 1).qk_correlation[0, 0, 1]), 3
        ),
    } | {
        f"{name}_{head}": round(float(likes[name][0, head]), 3)
        for head in range(N_HEAD)
        for name in ("second_effect", "transitivity", "withheld_own")
    }


def run(seeds: list[int], steps: int) -> list[Row]:
    """Train and analyse a model for every seed; return a row for each."""
    start = time.perf_counter()
    p, losses = train(seeds, steps)
    seconds = (time.perf_counter() - start) / len(seeds)
    rows = []
    for at, seed in enumerate(seeds):
        with tempfile.TemporaryDirectory() as folder:
            found = analyse(Path(folder), p, at)
        solved = bool(losses[at] < SOLVED)
        rows.append(
            {
                "seed": seed,
                "seconds": round(seconds, 2),
                "loss": round(float(losses[at]), 4),
                "solved": solved,
            }
        )
        rows[-1] |= found
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and write it to benchmarks/results with --save."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks inverted", description=__doc__
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--save", action="store_true", help="write the figures to benchmarks/results"
    )
    options = parser.parse_args(arguments)
    rows = run(list(range(options.seeds)), options.steps)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    solved = [row for row in rows if row["solved"]]
    print(
        f"{len(solved)} of {len(rows)} solved; the analysis finds the inversion in {sum(r['inverted'] for r in solved)}"
    )
    if options.save:
        print(write_csv("inverted_heads", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
