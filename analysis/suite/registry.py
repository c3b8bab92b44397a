"""The analyses by name: what each one is, which sites it needs, how it is called, and what it brings along.

The command line, the report and the service all go through this table. A function is named, not imported, so that the
table costs nothing to read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwater.store.reader import Run

STATISTICS = ("attn_entropy", "attn_sink", "attn_distance", "attn_received")
VECTORS = ("mlp_post", "resid", "mlp_out", "attn_out", "resid_mid", "mlp_pre")
HOME = "headwater.analysis.measures"
# The flags of options that are called otherwise in Python.
FLAGS = {
    "pairs": "--cka",
    "n_sequences": "--sequences",
    "n_positions": "--positions",
    "n_queries": "--queries",
}


@dataclass(frozen=True)
class Entry:
    """One analysis.

    `needs` are alternatives: the run must hold every site of one of them. `scan` names a function (run, **options)
    that returns an Analysis for the engine; `compute` one (run, **options) that returns a dataset at once, which may
    take the result of another analysis, `after`, as its option `result`. `brings` are analyses that are run with it
    where they can be.
    """

    name: str
    title: str
    needs: tuple[tuple[str, ...], ...] = ((),)
    scan: str = ""
    compute: str = ""
    after: str = ""
    brings: tuple[str, ...] = ()

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself."""
        module, _, name = (self.scan or self.compute).partition(":")
        function: Callable[..., Any] = getattr(import_module(f"{HOME}.{module}"), name)
        return function

    def options(self) -> dict[str, Any]:
        """Return the options that it takes, with their defaults."""
        parameters = list(inspect.signature(self.function).parameters.values())[1:]
        return {
            p.name: p.default for p in parameters if p.name not in ("result", "scan", "state_bytes")
        }

    def takes(self, name: str) -> bool:
        """Say whether the function has a parameter."""
        return name in inspect.signature(self.function).parameters

    def lacking(self, run: Run, options: Mapping[str, Any]) -> str:
        """Say which sites a run lacks, and what to extract; "" where it has what is needed."""
        if site := options.get("site"):
            alternatives: tuple[tuple[str, ...], ...] = ((str(site),),)
        elif self.name == "sinks" and options.get("source") in ("pattern", "statistics"):
            alternatives = (("pattern",) if options["source"] == "pattern" else STATISTICS,)
        else:
            alternatives = self.needs
        if any(set(sites) <= set(run.sites) for sites in alternatives):
            return ""
        wanted = " or ".join(" + ".join(sites) for sites in alternatives)
        least = min(alternatives, key=lambda sites: len(set(sites) - set(run.sites)))
        return (
            f"{self.name} needs {wanted}; {run.path} holds {', '.join(run.sites)}. Extract a run with --sites "
            f"{','.join(least)}."
        )


ENTRIES = (
    Entry(
        "cosine",
        "residual stream between depths: cosines in all variants, block influence, norms, anisotropy",
        (("resid",),),
        scan="cosine:cosine_analysis",
        brings=("cka",),
    ),
    Entry(
        "norms",
        "norms and cosines of consecutive depths, at reading speed",
        (("resid",),),
        scan="norms:norms_analysis",
    ),
    Entry(
        "cka",
        "linear CKA between depths, with and without first positions",
        (("resid",),),
        scan="cka:cka_analysis",
    ),
    Entry(
        "sinks",
        "first-token share, Sink_k, entropies, received attention, distance, word share, l_in and l_out",
        (("pattern",), STATISTICS),
        scan="sinks:sinks_analysis",
        brings=("false_sinks",),
    ),
    Entry(
        "false_sinks",
        "repeated tokens that look like a first one (runs the model)",
        compute="false_sinks:run_false_sinks",
    ),
    Entry(
        "massive",
        "massive activations: where, how large, when they rise and fall",
        (("resid",),),
        scan="massive:massive_analysis",
        brings=("massive_origin",),
    ),
    Entry(
        "massive_origin",
        "which heads, MLPs and neurons make the massive activations (runs the model)",
        (("resid",),),
        compute="origin:massive_origin",
        after="massive",
    ),
    Entry(
        "svd",
        "spectra and principal directions of a vector site, centred or not, first position in or out",
        tuple((site,) for site in dict.fromkeys(("resid", *VECTORS))),
        scan="svd:svd_analysis",
        brings=("svd_tokens",),
    ),
    Entry(
        "svd_tokens",
        "principal directions of the residual stream read through the unembedding",
        (("resid",),),
        compute="project:run_directions",
        after="svd",
    ),
    Entry(
        "heads",
        "head by head: overlap, divergence, shared targets, opposite orders, with nulls",
        (("pattern",),),
        scan="heads:heads_analysis",
        brings=("favourites",),
    ),
    Entry(
        "favourites",
        "what heads attend to second when their favourite is absent, and the logits withheld (needs the model)",
        (("pattern",),),
        scan="favourites:favourites_analysis",
    ),
    Entry(
        "lens",
        "logit lens at every depth: KL to the output, agreement, rank of the next token",
        (("resid",),),
        scan="lens:lens_analysis",
        brings=("attribution",),
    ),
    Entry(
        "attribution",
        "direct logit attribution of every head, MLP and embedding (runs the model)",
        compute="attribution:attribution",
    ),
    Entry(
        "top",
        "contexts in which units are most active, with their tokens",
        tuple((site,) for site in (*VECTORS, "z", "pattern")),
        scan="top:run_top",
    ),
)
REGISTRY = {entry.name: entry for entry in ENTRIES}


def entry_of(name: str) -> Entry:
    """Return an analysis by name; raise ValueError with the names there are."""
    if name not in REGISTRY:
        raise ValueError(f"there is no analysis {name!r}; expected one of {', '.join(REGISTRY)}.")
    return REGISTRY[name]


def flag_of(option: str) -> str:
    """Return the flag of an option of analyses."""
    return FLAGS.get(option, f"--{option}")
