"""Make docs/findings.md and its figures: what the demo model and MGM show. Run it from the repository's root.

    python docs/make_findings.py [--work DIR]

Needs `headwater[plots]` and, once, a package index for MGM (`pip download microformer-mgm==0.5.8`). Runs and results
are kept in --work, so that a second call only draws and writes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

import headwater
from headwater.analysis.engine.results import RunResults, kept_results
from headwater.analysis.measures.massive import massive_dimensions
from headwater.analysis.plots.catalogue import draw, save_figures
from headwater.analysis.suite.analyze import analyze
from headwater.analysis.weights.chance import wilson
from headwater.analysis.weights.coherence import coherence, shown
from headwater.extractor.model.weights import load_checkpoint

DOCS = Path(__file__).parent
SITES = (
    "resid",
    "pattern",
    "loss",
    "mlp_post",
    "attn_entropy",
    "attn_sink",
    "attn_distance",
    "attn_received",
)
FIGURES = (
    "phases",
    "dimensions",
    "sink_layers",
    "sink_map",
    "false_sinks",
    "massive_depth",
    "massive_made",
    "lens",
    "attribution",
    "coherence",
)
INSIDE = "mgm/resources/general_model"


def mgm(work: Path) -> Path:
    """Return the directory of MGM, fetched where it is not there."""
    if not (work / INSIDE / "pytorch_model.bin").is_file():
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                str(work),
                "microformer-mgm==0.5.8",
            ],
            check=True,
        )
        with zipfile.ZipFile(next(work.glob("microformer*.whl"))) as wheel:
            wheel.extractall(work, [name for name in wheel.namelist() if name.startswith(INSIDE)])
    return work / INSIDE


def sampled_rows(model: Path, n_rows: int = 32, length: int = 256) -> np.ndarray:
    """Sample rows from a model itself, so that it knows their language: temperature 1, no top-k, −1 behind <eos>."""
    import torch
    from transformers import GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel.from_pretrained(model).eval()
    rng = np.random.default_rng(11)
    rows = np.full((n_rows, length), -1, np.int32)
    rows[:, 0] = gpt2.config.bos_token_id
    done, past = np.zeros(n_rows, bool), None
    last = torch.from_numpy(rows[:, :1].astype(np.int64))
    for at in range(1, length):
        with torch.no_grad():
            out = gpt2(last, past_key_values=past, use_cache=True)
        past = out.past_key_values
        below = torch.softmax(out.logits[:, -1].double(), -1).cumsum(-1).numpy()
        draw = rng.random(n_rows)
        token = np.array(
            [
                min(np.searchsorted(row, x * row[-1]), len(row) - 1)
                for row, x in zip(below, draw, strict=True)
            ]
        )
        rows[~done, at] = token[~done]
        done |= token == gpt2.config.eos_token_id
        if done.all():
            break
        last = torch.from_numpy(token)[:, None]
    return rows


def analysed(work: Path, name: str, model: str, **text: object) -> RunResults:
    """Extract and analyse, or take what is kept; the weights' digest is part of the run's name."""
    checkpoint = load_checkpoint(model)
    out = work / f"{name}-{checkpoint.digest[:8]}"
    config = headwater.RunConfig(
        model=model, out=str(out), sites=SITES, dtype="float32", block=8, **text
    )
    run = headwater.extract(config)
    analyze(run)
    sinks = kept_results(run).results["sinks"]
    found = kept_results(run, name)
    # the demo learnt on such text as Python's library; of MGM's language there are the run's own tokens only
    corpus = run if name == "MGM" else sorted(map(str, Path(os.__file__).parent.glob("*.py")))
    found.results["coherence"] = coherence(model, corpus, sinks, max_tokens=500_000)
    found.results["loss"] = run["loss"][...]
    return found


def numbers(values: object, form: str = ".3g") -> str:
    """Write numbers with commas between."""
    return ", ".join(f"{float(v):{form}}" for v in np.ravel(values))


def layer_or_none(value: object) -> str:
    """Write a layer, or why there is none."""
    if np.isfinite(value):
        return f"layer {int(value)}"
    return str(value.attrs["transition"]).replace("steps", "none")


def with_errors(values: object, errors: object, form: str = ".3f") -> str:
    """Write numbers with their standard errors."""
    return ", ".join(
        f"{float(v):{form}} ± {float(e):{form}}"
        for v, e in zip(np.ravel(values), np.ravel(errors), strict=True)
    )


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def sink_rows(run: RunResults) -> list[str]:
    d = run.results["sinks"]
    share = d.first_token_share.sel(query_set="second_half").values
    layer, head = np.unravel_index(share.argmax(), share.shape)
    half = d.sel(query_set="second_half")
    error = float(half.first_token_share_error[layer, head])
    late = d.received.mean(("layer", "head")).where(~d.few_rows)[1:]
    fit = d.l_in.attrs
    return [
        run.label,
        with_errors(half.share_by_layer, half.share_by_layer_error),
        f"{layer_or_none(d.l_in)} / {layer_or_none(d.l_out)}",
        f"{fit['r2_steps']:.2f} / {fit['r2_line']:.2f}; {fit['p']:.3f}",
        f"{share.max():.3f} ± {error:.3f} (L{layer}H{head})",
        f"{numbers(half.entropy_non_sink_by_layer, '.2f')}: {layer_or_none(d.concentrates_in)}",
        f"{float(d.received[..., 0].mean()):.3f} / {float(late.max()):.3f}",
    ]


def stream_rows(run: RunResults) -> list[str]:
    d, cka = run.results["cosine"], run.results["cka"].cka
    strict = d.sel(centring="centred", positions="without_first", outliers="out")
    return [
        run.label,
        numbers(d.isel(centring=0, positions=0, outliers=0).consecutive),
        numbers(strict.consecutive),
        numbers(np.diagonal(cka.sel(positions="all"), 1)),
        numbers(np.diagonal(cka.sel(positions="without_first"), 1)),
        numbers(d.anisotropy.isel(centring=0, positions=0, outliers=0)[[0, -1]]),
    ]


def massive_rows(run: RunResults) -> list[str]:
    d, origin = run.results["massive"], run.results["massive_origin"].isel(event=0)
    layer = int(np.abs(origin.mlp_out.values).argmax())
    made = f"MLP {layer}: {float(origin.mlp_out[layer]):.1f}; attention in all: {float(origin.attn_out.sum()):.1f}"
    part = origin.neuron_contribution.values
    order = np.argsort(-np.abs(part), axis=None)[:3]
    neurons = "; ".join(
        f"L{i}N{int(origin.neuron[i, j])} {part[i, j]:.1f}"
        for i, j in zip(*np.unravel_index(order, part.shape), strict=True)
    )
    return [
        run.label,
        str(massive_dimensions(d, "strict") or "none"),
        str(massive_dimensions(d, "large") or "none"),
        numbers(d.max_size.max("positions"), ".4g"),
        f"{float(d.largest_ratio.max()):.0f}",
        f"{int(origin.dimension)} at token {int(origin.text_position)} of its text",
        f"{made}; largest neurons of all layers: {neurons}",
    ]


def dimension_rows(run: RunResults) -> list[str]:
    d = run.results["svd"].participation_ratio
    return [
        run.label,
        *(
            numbers(d.sel(centring=c, positions=p))
            for c, p in (("raw", "all"), ("centred", "all"), ("centred", "without_first"))
        ),
    ]


def false_rows(run: RunResults) -> list[list[str]]:
    """One row for each repeated token at the largest length, without and with <bos> in front."""
    d = run.results["false_sinks"].sel(start="token").isel(length=-1)
    control = numbers(d.control_norm_ratio, ".2f")
    rows = [[run.label, f"{int(d.attrs['n_controls'])} rows of different tokens", control, "", ""]]
    ratio = d.relative_ratio.max("depth", skipna=True)
    order = np.argsort(-np.nan_to_num(ratio.values, nan=-1.0))[:4]
    chosen = [*order, *np.flatnonzero(d.repeated.values == "2")] if run.label == "MGM" else order
    for at in dict.fromkeys(int(i) for i in chosen):
        one = d.isel(repeated=at)
        best = one.relative_ratio.values
        name = one.token_text.item() if "token_text" in d else f"id {one.repeated.item()}"
        name = "<bos>" if run.label == "MGM" and one.repeated.item() == "2" else str(name)[:60]
        if np.isfinite(best).any():
            depth = int(np.nanargmax(best))
            told = f"{best[depth]:.2f} at depth {depth}"
            norms = f"{float(one.norm[depth]):.4g} / {float(one.first_norm[depth]):.4g}"
        else:
            told, norms = "the first stands out nowhere", "–"
        rows.append([run.label, f"`{name}`", numbers(one.norm_ratio, ".2f"), told, norms])
    return rows


def output_rows(run: RunResults) -> list[str]:
    d, a = run.results["lens"].isel(position_set=0), run.results["attribution"].isel(position_set=0)
    head = a.head_contribution.values
    layer, best = np.unravel_index(head.argmax(), head.shape)
    return [
        run.label,
        numbers(d.kl),
        numbers(d.top1_agreement, ".2f"),
        f"{float(a.logit):.2f}",
        f"{float(a.mlp.sum()):.2f} / {head.sum():.2f}",
        f"L{layer}H{best} {head.max():.2f}",
    ]


def weight_rows(run: RunResults) -> list[list[str]]:
    d = run.results["coherence"]
    there = np.isfinite(d.l_in)
    rows = []
    for kind in d.kind.values:
        one = d.sel(kind=kind)
        n, n_all = int(one.n_scored.sum()), int(one.n_directions.sum())
        if not n:
            rows.append([run.label, str(kind), f"0 of {n_all}", "too few pairs", "–", "–", "–"])
            continue
        low, high = wilson(np.array(one.n_coherent.sum()), float(n))
        change = f"{float(one.difference):+.3f}, {float(one.difference_beyond_line):+.3f}"
        rows.append(
            [
                run.label,
                str(kind),
                f"{n} of {n_all}",
                f"{float(one.n_coherent.sum()) / n:.3f} ({low:.3f} to {high:.3f})",
                numbers(one.coherent_fraction, ".2f"),
                numbers(one.mean_log_count, ".1f"),
                f"{change}, {float(one.difference_p):.3f}" if there else "no transition",
            ]
        )
    return rows


def directions(run: RunResults) -> str:
    """Show the most coherent directions with their tokens."""
    lines = [
        f"- {kind}, {line.replace('|', '∣')}"
        for kind in ("ov_write", "w_in_folded", "w_out")
        for line in shown(run.results["coherence"], kind, 3, 8)
    ]
    return "\n".join(lines)


def head_rows(run: RunResults) -> list[str]:
    d, f = run.results["heads"], run.results["favourites"]
    effect, told = f.second_effect.values, f.second_effect_p.values
    beyond = (effect > 3 * f.second_error.values) & (told <= 0.01)
    at = np.unravel_index(np.nanargmin(d.tau.values), d.tau.shape)
    return [
        run.label,
        str(int(d.inverted.sum()) // 2),
        f"{float(d.tau.values[at]):.2f} ± {float(d.tau_error.values[at]):.2f}",
        " / ".join(
            f"{float(np.nanmean(d[f'argmax_information{tail}'].values)):.2f}"
            for tail in ("", "_null")
        ),
        f"{int(beyond.sum())} of {int(np.isfinite(effect).sum())}",
        f"{float(np.nanmean(f.transitivity.values)):.2f} / {float(f.transitivity_null):.2f}",
        f"{int((f.transitivity_p.values <= 0.05).sum())} of {int(np.isfinite(f.transitivity_p.values).sum())}",
    ]


def table_of_truth() -> str:
    """Return the table of planted truths and simulated nulls."""
    from headwater.benchmarks import bench_truth

    return bench_truth.table(bench_truth.simulate(500))


def page(runs: list[RunResults], images: dict[str, list[str]], truth: str) -> str:
    """Return the page."""

    def show(name: str) -> str:
        return "\n".join(f"![{name}](findings/{image})" for image in images[name])

    attrs = [run.results["sinks"].attrs for run in runs]
    made = "; ".join(
        f"**{run.label}**: weights {a['model_digest'][:16]}, {a['n_sequences']} sequences of {a['n_positions']}, run "
        f"{a['fingerprint'][:16]}"
        for run, a in zip(runs, attrs, strict=True)
    )
    versions = json.loads(attrs[0]["versions"])
    losses = ", ".join(f"{np.nanmean(run.results['loss']):.2f} ({run.label})" for run in runs)
    return f"""# What the demo model and MGM show

Made by `python docs/make_findings.py`; every number below comes from its runs. {made}. Headwater
{versions["headwater"]}, numpy {
        versions["numpy"]
    }. Each model reads text that it knows: demo, the model in the package, the
source of Python's json package with the beginning-of-text token; MGM, a trained GPT-2 of microbial communities, rows
sampled from itself. Mean losses: {
        losses
    } nats. Errors (±) are standard errors over sequences. Both models are small, and every
sentence here is about these models on these texts.

## Does attention sink into the first token, and where does early, distributed attention end?

{
        table(
            [
                "",
                "first-token share by layer, second half",
                "l_in / l_out",
                "R² of steps / of a line; p of steps",
                "strongest head",
                "non-sink entropy by layer: where it falls",
                "α of the first key / largest elsewhere",
            ],
            [sink_rows(run) for run in runs],
        )
    }

{show("sink_layers")}
{show("sink_map")}

l_in and l_out are the ends of a fit of low, high and low layers, where it beats a constant and a straight line by BIC,
jumps by .1 or more, and is not what noise over as many layers gives (p ≤ .04). "ramp" and "none" are findings. The
non-sink entropy says whether the mass that is not on the first key is spread: near 1 it is even. Where it falls,
attention gathers on other keys.

## Do repeated tokens look like a first one?

{
        table(
            [
                "",
                "repeated",
                "norm over the first's, by depth",
                "largest ratio to that of different tokens",
                "norm there / the first's",
            ],
            [row for run in runs for row in false_rows(run)],
        )
    }

{show("false_sinks")}

The ratio to different tokens is taken where these stay below .5, for elsewhere nothing sets the first position apart.

## How does the residual stream change over depth?

{
        table(
            [
                "",
                "consecutive cosine, raw",
                "centred, without first and outliers",
                "CKA, all",
                "CKA, without first",
                "anisotropy at both ends",
            ],
            [stream_rows(run) for run in runs],
        )
    }

{show("phases")}

In both models the first layer turns the stream most.

## Which activations are massive, and what makes them?

{
        table(
            [
                "",
                "strict",
                "large",
                "largest size by depth",
                "largest ratio",
                "largest lies in dimension",
                "made by",
            ],
            [massive_rows(run) for run in runs],
        )
    }

{show("massive_depth")}
{show("massive_made")}

Where no dimension is massive, the largest activation is split in the same way. The sums are checked in float64.

## How many dimensions does the stream use?

{
        table(
            ["", "participation ratio, raw", "centred", "centred, without first"],
            [dimension_rows(run) for run in runs],
        )
    }

{show("dimensions")}

With a massive first position the raw ratio is near 1 and says little; without first positions it is the text's own.

## What do the depths predict, and what writes the output?

{
        table(
            [
                "",
                "KL(output ‖ depth), nats",
                "top-1 agreement",
                "logit above the mean",
                "MLPs / heads in all",
                "largest head",
            ],
            [output_rows(run) for run in runs],
        )
    }

{show("lens")}
{show("attribution")}

## Do the SVD directions of the weights change character where attention does?

{
        table(
            [
                "",
                "directions",
                "with a score",
                "coherent (Wilson's 95 %)",
                "by layer",
                "mean ln count of their tokens, by layer",
                "after − before l_in, beyond a line, p",
            ],
            [row for run in runs for row in weight_rows(run)],
        )
    }

{show("coherence")}

A direction is coherent where its tokens share more windows of the corpus than tokens that are as frequent do, above the
99th percentile of 500 such sets: chance is .01. Random directions of the demo give {
        numbers(runs[0].results["coherence"].random_fraction, ".3f")
    } through W_E and W_U, for its
embeddings are clustered: only what is above that is the weights' own. The demo's corpus is the source of Python's
library. MGM's rows are too few for its 9669 tokens, and that is what the table says. The demo's most coherent
directions, with the first tokens of the better end:

{directions(runs[0])}

## Do heads of a layer work against each other?

{
        table(
            [
                "",
                "inverted pairs",
                "smallest τ_b",
                "argmax information / its null",
                "heads with a second favourite (> 3 errors, above random attention)",
                "mean transitivity / of random attention",
                "heads more transitive than that (p ≤ .05)",
            ],
            [head_rows(run) for run in runs],
        )
    }

Kendall's τ_b is taken over the keys that are neither first nor the query's own; nulls pair rows of different sequences.
Random attention on the same rows is transitive too, for what is there more often is attended to more often.

## How often are the measures wrong?

`python -m headwater.benchmarks truth` plants what is to be found, and simulates what is not: noise, ramps, trends,
tokens that are merely frequent or come in bursts, heads without preferences.

{truth}

A level "holds" where a null is found no more often than 1.2 times its level, of itself or within two standard errors.
One limit is known: evenly spread tokens, among others as frequent that keep to topics of their own, are called coherent
a little too often.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", default="build/findings", help="where runs and MGM are kept")
    work = Path(parser.parse_args().work)
    work.mkdir(parents=True, exist_ok=True)
    model = mgm(work)
    if not (work / "sampled.npy").is_file():
        np.save(work / "sampled.npy", sampled_rows(model))
    runs = [
        analysed(work, "demo", "demo", text=(json.__path__[0],), bos=True, max_sequences=32),
        analysed(work, "MGM", str(model), tokens=str(work / "sampled.npy")),
    ]
    drawn = draw(runs, FIGURES)
    folder = DOCS / "findings"
    for old in folder.glob("*.png"):
        old.unlink()
    images: dict[str, list[str]] = {}
    for one, path in zip(drawn, save_figures(drawn, folder, "png", 100), strict=True):
        images.setdefault(one.plot.name, []).append(path.name)
    (DOCS / "findings.md").write_text(page(runs, images, table_of_truth()), "utf-8")


if __name__ == "__main__":
    main()
