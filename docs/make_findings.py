"""Make docs/findings.md and its figures: what the demo model and MGM show. Run it from the repository's root.

    python docs/make_findings.py [--work DIR]

Needs `headwater[plots]` and, once, a package index for MGM (`pip download microformer-mgm==0.5.8`). Runs and results
are kept in --work, so that a second call only draws and writes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

import headwater
from headwater.analysis.coherence import coherence
from headwater.analysis.massive import massive_dimensions
from headwater.analysis.plots import draw, save_figures
from headwater.analysis.results import RunResults, kept_results
from headwater.analysis.suite import analyze
from headwater.extractor.weights import load_checkpoint

DOCS = Path(__file__).parent
SITES = ("resid", "pattern", "mlp_post", "attn_entropy", "attn_sink", "attn_distance", "attn_received")
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


def analysed(work: Path, name: str, model: str, **text: object) -> RunResults:
    """Extract and analyse, or take what is kept; the weights' digest is part of the run's name."""
    checkpoint = load_checkpoint(model)
    out = work / f"{name}-{checkpoint.digest[:8]}"
    config = headwater.RunConfig(model=model, out=str(out), sites=SITES, dtype="float32", block=8, **text)
    run = headwater.extract(config)
    analyze(run)
    sinks = kept_results(run).results["sinks"]
    found = kept_results(run, name)
    found.results["coherence"] = coherence(model, run, sinks)
    return found


def numbers(values: object, form: str = ".3g") -> str:
    """Write numbers with commas between."""
    return ", ".join(f"{float(v):{form}}" for v in np.ravel(values))


def layer_or_none(value: int) -> str:
    return f"layer {value}" if value >= 0 else "none"


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def sink_rows(run: RunResults) -> list[str]:
    d = run.results["sinks"]
    share = d.first_token_share.sel(query_set="second_half").values
    layer, head = np.unravel_index(share.argmax(), share.shape)
    spread = d.entropy_non_sink.sel(query_set="second_half").mean("head")
    late = d.received.mean(("layer", "head")).where(~d.few_rows)[1:]
    return [
        run.label,
        numbers(d.share_by_layer.sel(query_set="second_half")),
        layer_or_none(int(d.l_in)),
        layer_or_none(int(d.l_out)),
        f"L{layer}H{head} {share.max():.2f}",
        numbers(spread, ".2f"),
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
    neurons = "; ".join(
        f"N{int(origin.neuron[layer, i])} {float(origin.neuron_contribution[layer, i]):.1f}" for i in range(3)
    )
    return [
        run.label,
        str(massive_dimensions(d, "strict") or "none"),
        str(massive_dimensions(d, "large") or "none"),
        numbers(d.max_size.max("positions"), ".4g"),
        f"{float(d.largest_ratio.max()):.0f}",
        f"{int(origin.dimension)} at position {int(origin.position)}",
        f"{made}; of it {neurons}",
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


def false_rows(run: RunResults) -> list[str]:
    d = run.results["false_sinks"].sel(start="token").isel(length=-1)
    return [
        run.label,
        str(int(d.length)),
        numbers(d.norm_ratio.mean("repeated"), ".2f"),
        numbers(d.control_norm_ratio, ".2f"),
        f"{float(d.false_norm.mean('repeated').max()):.2f}",
        f"{float(d.false_attention.max()):.2f}",
    ]


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
    whole = d.coherent_fraction.mean("layer")
    there = int(d.l_in) > 0
    return [
        [
            run.label,
            str(kind),
            f"{float(whole.sel(kind=kind)):.3f}",
            numbers(d.coherent_fraction.sel(kind=kind), ".2f"),
            f"{float(d.difference.sel(kind=kind)):+.3f}" if there else "no transition",
            f"{float(d.difference_p.sel(kind=kind)):.2f}" if there else "–",
        ]
        for kind in d.kind.values
    ]


def head_rows(run: RunResults) -> list[str]:
    d, f = run.results["heads"], run.results["favourites"]
    effect = f.second_effect.values / f.second_error.values
    return [
        run.label,
        str(int(d.inverted.sum()) // 2),
        f"{float(np.nanmin(d.tau.values)):.2f}",
        " / ".join(f"{float(np.nanmean(d[f'argmax_information{tail}'].values)):.2f}" for tail in ("", "_null")),
        f"{int((effect > 3).sum())} of {int(np.isfinite(effect).sum())}",
        f"{float(np.nanmean(f.transitivity.values)):.2f}",
    ]


def page(runs: list[RunResults], images: dict[str, list[str]]) -> str:
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
    return f"""# What the demo model and MGM show

Made by `python docs/make_findings.py`; every number below comes from its runs. {made}. Headwater
{versions["headwater"]}, numpy {versions["numpy"]}. demo is the model in the package on the source of Python's json
package, with the beginning-of-text token; MGM is a trained GPT-2 of microbial communities, on rows of random genera, so
its losses say nothing about its quality. Both are small; nothing here speaks of GPT-2.

## Does attention sink into the first token, and where does early, distributed attention end?

{
        table(
            [
                "",
                "first-token share by layer, second half",
                "l_in",
                "l_out",
                "strongest head",
                "non-sink entropy by layer",
                "α of the first key / largest elsewhere",
            ],
            [sink_rows(run) for run in runs],
        )
    }

{show("sink_layers")}
{show("sink_map")}

l_in is the best single step up with R² ≥ .5 and at least .1; "none" is a finding, not a failure of the fit. The
non-sink entropy says whether the mass that is not on the first key is spread: near 1 it is even, whatever the share is.

## Do repeated tokens look like a first one?

{
        table(
            [
                "",
                "repeated",
                "norm over the first's, by depth",
                "the same, different tokens",
                "largest share of false norms",
                "largest share of false sinks",
            ],
            [false_rows(run) for run in runs],
        )
    }

{show("false_sinks")}

A ratio near 1 at a depth where different tokens stay far below it means that repetition makes false sinks there.

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

The first step turns the stream most in both models. Whether the last one is a step of its own is in the last points.

## Which activations are massive, and what makes them?

{
        table(
            ["", "strict", "large", "largest size by depth", "largest ratio", "largest lies in dimension", "made by"],
            [massive_rows(run) for run in runs],
        )
    }

{show("massive_depth")}
{show("massive_made")}

Where no dimension is massive, the largest activation is split in the same way. The sums are checked in float64.

## How many dimensions does the stream use?

{table(["", "participation ratio, raw", "centred", "centred, without first"], [dimension_rows(run) for run in runs])}

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
            ["", "directions", "coherent", "by layer", "after l_in − before", "p (circular shifts)"],
            [row for run in runs for row in weight_rows(run)],
        )
    }

{show("coherence")}

Chance is .01 by construction. The corpus is the run's own tokens, which are few: another corpus gives other
fractions. With {runs[-1].results["sinks"].sizes["layer"]} layers no p can be below
{1 / runs[-1].results["sinks"].sizes["layer"]:.3f}.

## Do heads of a layer work against each other?

{
        table(
            [
                "",
                "inverted pairs",
                "smallest τ_b",
                "argmax information / its null",
                "heads with a second favourite (> 3 errors)",
                "mean transitivity",
            ],
            [head_rows(run) for run in runs],
        )
    }

Kendall's τ_b is taken over the keys that are neither first nor the query's own; nulls pair rows of different sequences.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", default="build/findings", help="where runs and MGM are kept")
    work = Path(parser.parse_args().work)
    work.mkdir(parents=True, exist_ok=True)
    r = np.random.default_rng(0)
    ids = np.stack([np.r_[2, r.permutation(np.arange(5, 9669))[:255]] for _ in range(8)])
    np.save(work / "ids.npy", ids.astype(np.int32))
    runs = [
        analysed(work, "demo", "demo", text=(json.__path__[0],), bos=True, max_sequences=32),
        analysed(work, "MGM", str(mgm(work)), tokens=str(work / "ids.npy")),
    ]
    drawn = draw(runs, FIGURES)
    folder = DOCS / "findings"
    for old in folder.glob("*.png"):
        old.unlink()
    images: dict[str, list[str]] = {}
    for one, path in zip(drawn, save_figures(drawn, folder, "png", 100), strict=True):
        images.setdefault(one.plot.name, []).append(path.name)
    (DOCS / "findings.md").write_text(page(runs, images), "utf-8")


if __name__ == "__main__":
    main()
