"""What the studies ask, and how each model's results answer it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from headwater.analysis.engine.results import RunResults
from headwater.analysis.measures.origin import load_run_model
from headwater.analysis.measures.sink_rows import STATISTIC_SITES
from headwater.analysis.studies.phases import find_phases
from headwater.analysis.studies.study import Answer, Estimate, Study, Value

if TYPE_CHECKING:
    import xarray as xr

    from headwater.store.reader import Run

MIN_FIRST = 3  # standard errors that a second favourite must stand from nothing


def floats(values: xr.DataArray | np.ndarray) -> list[float]:
    """Return an array's numbers."""
    return [float(value) for value in np.asarray(values).ravel()]


def layer_or_why(value: xr.DataArray) -> str:
    """Name a layer, or say why there is none."""
    if np.isfinite(value):
        return f"layer {int(value)}"
    return str(value.attrs["transition"]).replace("steps", "none")


@dataclass(frozen=True)
class TransitionStudy(Study):
    """Where early, distributed attention ends, and whether the weights change character there.

    `corpus` is the text whose co-occurrences score the weights' directions; by default that of the run.
    """

    corpus: tuple[str, ...] = ()
    max_tokens: int = 500_000

    name = "transition"
    question = "Where does early, distributed attention end, and do the weights change there?"
    sites = (*STATISTIC_SITES, "loss")
    analyses = ("sinks",)
    figures = ("sink_layers", "coherence")
    further = ("coherence",)
    reading = (
        "l_in and l_out are the ends of a fit of low, high and low layers, where it beats a constant and a straight "
        "line. A direction is coherent where its tokens share more windows of the corpus than tokens as frequent do; "
        "chance is .01, and random directions give what stands beside. The change is the fraction from l_in on minus "
        "that before, beyond a straight line, with its p."
    )

    def more(self, run: Run, found: Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
        """Score the directions of the weights, with the transition of this run."""
        from headwater.analysis.weights.coherence import coherence_of
        from headwater.analysis.weights.corpora import open_corpus

        checkpoint = load_run_model(run)
        corpus = open_corpus(list(self.corpus) or run, checkpoint, self.max_tokens)
        scored = coherence_of(checkpoint, corpus, found["sinks"])
        return {"coherence": scored}

    def answer(self, results: RunResults) -> list[Answer]:
        """Give the transition, and of each kind of direction the coherent fraction by layer."""
        sinks = results.results["sinks"]
        scored = results.results["coherence"]
        half = sinks.sel(query_set="second_half")
        shared: Answer = {
            "first-token share by layer": Estimate(
                floats(half.share_by_layer), floats(half.share_by_layer_error)
            ),
            "l_in": layer_or_why(sinks.l_in),
            "l_out": layer_or_why(sinks.l_out),
            "p": float(sinks.l_in.attrs["p"]),
        }
        answers = []
        for kind in scored.kind.values:
            one = scored.sel(kind=kind)
            n = int(one.n_scored.sum())
            fraction: Value = None
            if n:
                fraction = float(one.n_coherent.sum()) / n
            answer: Answer = {
                "directions": str(kind),
                "with a score": f"{n} of {int(one.n_directions.sum())}",
                "coherent": fraction,
                "by layer": floats(one.coherent_fraction),
                "random directions": floats(scored.random_fraction),
                "change at l_in beyond a line": float(one.difference_beyond_line),
                "p of the change": float(one.difference_p),
            }
            answers.append({**shared, **answer})
        return answers


@dataclass(frozen=True)
class PhaseStudy(Study):
    """Whether the residual stream goes through phases over depth, and whether the last layer is a map of its own."""

    name = "phases"
    question = "Does the residual stream go through phases over depth?"
    sites = ("resid", "loss")
    analyses = ("cosine",)
    figures = ("phases",)
    reading = (
        "A step is 1 − the cosine of consecutive depths, centred and without first positions. Phases are levels of the "
        "steps, each tested against one level less; a ramp is a line that fits better. A final map is a last step "
        "larger than every step but the first."
    )

    def answer(self, results: RunResults) -> list[Answer]:
        """Give the steps, their phases, and the last step beside the largest in between."""
        cosine = results.results["cosine"]
        cka = results.results["cka"].cka
        strict = cosine.sel(centring="centred", positions="without_first", outliers="out")
        steps = 1 - np.asarray(strict.consecutive.values, np.float64)
        phases = find_phases(steps)
        final = "too few layers"
        if len(steps) > 2:
            final = "no"
            if steps[-1] > steps[1:-1].max():
                final = "yes"
        return [
            {
                "steps by layer": floats(steps),
                "phases": phases.kind,
                "change at layers": ", ".join(map(str, phases.changes)) or None,
                "mean steps": list(phases.levels),
                "p of each further level": list(phases.p),
                "final map": final,
                "CKA of consecutive depths": floats(
                    np.diagonal(cka.sel(positions="without_first"), 1)
                ),
            }
        ]


@dataclass(frozen=True)
class MassiveStudy(Study):
    """Which activations are massive, what makes them, and what the loss says of their size."""

    n_rows: int = 8
    scales: tuple[float, ...] = (0.0, 0.5, 0.75, 1.0, 1.25, 1.5)

    name = "massive"
    question = (
        "Which activations are massive, what makes them, and would the loss have them larger?"
    )
    sites = ("resid", "mlp_post", "loss", *STATISTIC_SITES)
    analyses = ("massive", "massive_origin", "sinks")
    figures = ("massive_depth", "massive_made", "ablation")
    further = ("ablate",)
    reading = (
        "Where no dimension is massive, the largest activation is split in the same way. The loss is that of the first "
        "rows with the activation scaled at every depth where it is there; dloss is its derivative at scale 1 with its "
        "standard error over rows: below 0 the loss would fall if it grew."
    )

    def more(self, run: Run, found: Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
        """Scale the largest activation at every depth from the one where it has half of its size."""
        from headwater.analysis.interventions.requests import Ablate
        from headwater.extractor.edits.grammar import read_target

        massive = found["massive"]
        peak = massive.stack(place=("positions", "d_model"))
        best = peak.isel(place=int(np.abs(peak.peak).max("depth").argmax("place")))
        size = np.abs(best.peak.values)
        first = int(massive.depth.values[int(np.argmax(size >= size.max() / 2))])
        last = int(massive.depth.values[-1])
        where = int(best.peak_position.isel(depth=int(size.argmax())))
        target = read_target(f"resid[{first}:{last}] position={where} dim={int(best.d_model)}")
        request = Ablate(
            target=target,
            hold=True,
            scales=self.scales,
            run=str(run.path),
            max_sequences=self.n_rows,
        )
        (result,), _ = request.results()
        return {"ablate": result}

    def answer(self, results: RunResults) -> list[Answer]:
        """Give dimension, size by depth, its makers, and the loss by scale with its derivative."""
        massive = results.results["massive"]
        origin = results.results["massive_origin"].isel(event=0)
        ablate = results.results["ablate"].isel(target=0)
        part = origin.neuron_contribution.values
        order = np.argsort(-np.abs(part), axis=None)[:3]
        neurons = [
            f"L{i}N{int(origin.neuron[i, j])} {part[i, j]:.4g}"
            for i, j in zip(*np.unravel_index(order, part.shape), strict=True)
        ]
        layer = int(np.abs(origin.mlp_out.values).argmax())
        return [
            {
                "dimension": int(origin.dimension),
                "at token of its text": int(origin.text_position),
                "largest size by depth": floats(massive.max_size.max("positions")),
                "largest ratio to the median": float(massive.largest_ratio.max()),
                "largest MLP": f"layer {layer}: {float(origin.mlp_out[layer]):.4g}",
                "all attention": float(origin.attn_out.sum()),
                "largest neurons": ", ".join(neurons),
                "scales": floats(ablate.scale),
                "loss": floats(ablate.loss),
                "dloss": Estimate([float(ablate.dloss)], [float(ablate.dloss_error)]),
            }
        ]


@dataclass(frozen=True)
class RepeatedStudy(Study):
    """Whether repeated tokens look like a first one."""

    most: int = 6

    name = "repeated"
    question = "Do repeated tokens look like a first one?"
    sites = (*STATISTIC_SITES, "loss")
    analyses = ("sinks", "false_sinks")
    figures = ("false_sinks",)
    reading = (
        "The norm of a token repeated, over that of the row's first position, by depth; beside it that of rows of "
        "different tokens. The ratio of both is taken at depths where the first position stands out: where different "
        "tokens have less than half of its norm."
    )

    def answer(self, results: RunResults) -> list[Answer]:
        """Give the repeated tokens that come nearest to a first one, and the control."""
        found = results.results["false_sinks"].sel(start="token").isel(length=-1)
        control: Answer = {
            "repeated": f"{int(found.attrs['n_controls'])} rows of different tokens",
            "norm over the first's, by depth": floats(found.control_norm_ratio),
        }
        ratio = found.relative_ratio.max("depth", skipna=True).values
        order = np.argsort(-np.nan_to_num(ratio, nan=-1.0))[: self.most]
        answers = [control]
        for at in order:
            one = found.isel(repeated=int(at))
            name = f"id {one.repeated.item()}"
            if "token_text" in found:
                name = repr(str(one.token_text.item()))[:60]
            answer: Answer = {
                "repeated": name,
                "norm over the first's, by depth": floats(one.norm_ratio),
                "largest ratio to different tokens": None,
                "at depth": None,
            }
            relative = one.relative_ratio.values
            if np.isfinite(relative).any():
                depth = int(np.nanargmax(relative))
                answer["largest ratio to different tokens"] = float(relative[depth])
                answer["at depth"] = int(one.depth[depth])
            answers.append(answer)
        return answers


@dataclass(frozen=True)
class HeadStudy(Study):
    """Whether heads of a layer work against each other, and what they attend to when their favourite is absent."""

    name = "heads"
    question = "Do heads of a layer work against each other, and do they have second favourites?"
    sites = ("pattern", "loss")
    analyses = ("heads", "favourites")
    figures = ()
    reading = (
        "τ_b is Kendall's over the keys that are neither first nor the query's own; nulls pair rows of different "
        "sequences. A second favourite stands three errors from nothing and above random attention (p ≤ .01). Random "
        "attention on the same rows is transitive, too."
    )

    def answer(self, results: RunResults) -> list[Answer]:
        """Give counts of inverted pairs, second favourites and transitive heads, beside their nulls."""
        heads = results.results["heads"]
        second = results.results["favourites"]
        effect = second.second_effect.values
        beyond = effect > MIN_FIRST * second.second_error.values
        beyond &= second.second_effect_p.values <= 0.01
        told = second.transitivity_p.values
        at = np.unravel_index(np.nanargmin(heads.tau.values), heads.tau.shape)
        return [
            {
                "inverted pairs": int(heads.inverted.sum()) // 2,
                "smallest τ_b": Estimate(
                    [float(heads.tau.values[at])], [float(heads.tau_error.values[at])]
                ),
                "argmax information": float(np.nanmean(heads.argmax_information.values)),
                "its null": float(np.nanmean(heads.argmax_information_null.values)),
                "heads with a second favourite": f"{int(beyond.sum())} of {int(np.isfinite(effect).sum())}",
                "mean transitivity": float(np.nanmean(second.transitivity.values)),
                "of random attention": float(second.transitivity_null),
                "more transitive (p ≤ .05)": f"{int((told <= 0.05).sum())} of {int(np.isfinite(told).sum())}",
            }
        ]


@dataclass(frozen=True)
class PlateauStudy(Study):
    """Whether the output follows a state in plateaus, and which part makes them."""

    n_pairs: int = 8
    n_tokens: int = 24
    steps: int = 50
    seed: int = 0

    name = "plateaus"
    question = "Does the output follow a state in plateaus, and what makes them?"
    sites = ("loss",)
    figures = ("plateau_map", "plateau_parts")
    further = ("plateau", "plateau_parts")
    reading = (
        "Pairs are rows of the text, cut to the same length; the last position's state moves from one to the other. A "
        "straight line has width .2, a step 1; below .2 the output moves faster near the ends. In a scenario the named "
        "parts are held, and what is left makes the width."
    )

    def more(self, run: Run, found: Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
        """Sweep pairs of the run's own rows, as a whole and with parts held."""
        from headwater.analysis.interventions.plateau import plateau
        from headwater.analysis.interventions.plateau_parts import attribute
        from headwater.analysis.interventions.prompts import Reader, read_pairs
        from headwater.analysis.interventions.replay import Replay

        checkpoint = load_run_model(run)
        rows = self._rows(run)
        asked = [{"a": rows[i], "b": rows[i + 1]} for i in range(0, len(rows) - 1, 2)]
        pairs = read_pairs(asked, ("a", "b"), Reader(checkpoint, None, False))
        replay = Replay(checkpoint, "fp32")
        return {
            "plateau": plateau(replay, pairs, n_steps=self.steps, paths=["linear", "slerp"]),
            "plateau_parts": attribute(replay, pairs, None, self.steps),
        }

    def _rows(self, run: Run) -> list[list[int]]:
        """Draw rows of the run without replacement, whole ones only; the last token of a pair's rows differs."""
        tokens = run.tokens[:, : self.n_tokens]
        start = run.plain("row_start")[:, : self.n_tokens]
        whole = np.flatnonzero((start == 0).all(1))
        order = np.random.default_rng(self.seed).permutation(whole)
        chosen: list[list[int]] = []
        for at in order:
            row = tokens[at].tolist()
            # An even number of rows is complete pairs; the next is the second of one.
            if len(chosen) % 2 and chosen[-1][-1] == row[-1]:
                continue
            chosen.append(row)
            if len(chosen) == 2 * self.n_pairs:
                break
        if len(chosen) < 4:
            raise ValueError(
                f"{run.path} has {len(whole)} rows of {self.n_tokens} tokens without padding or a document's start; "
                "expected at least 4. Give more text, or shorter rows (n_tokens)."
            )
        return chosen

    def answer(self, results: RunResults) -> list[Answer]:
        """Give widths at the logits by depth, of paths and with parts held."""
        whole = results.results["plateau"]
        parts = results.results["plateau_parts"]
        held = [
            (f"nothing ({path} path)", whole.sel(path=path, output=-1))
            for path in whole.path.values
        ]
        held += [
            (str(name), parts.sel(scenario=name, out="logits")) for name in parts.scenario.values
        ]
        return [
            {
                "what is held": name,
                "pairs": len(one.pair),
                "width by depth": Estimate(floats(one.width_mean), floats(one.width_error)),
            }
            for name, one in held
        ]


STUDIES: Sequence[type[Study]] = (
    TransitionStudy,
    PhaseStudy,
    MassiveStudy,
    RepeatedStudy,
    PlateauStudy,
    HeadStudy,
)


def study_of(name: str) -> type[Study]:
    """Return a study by name; raise ValueError with the names there are."""
    known = {study.name: study for study in STUDIES}
    if name not in known:
        raise ValueError(f"there is no study {name!r}; expected one of {', '.join(known)}.")
    return known[name]
