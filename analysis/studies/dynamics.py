"""Training dynamics: massive activations, sinks, spectra and loss over the checkpoints of one training.

Every checkpoint runs over the same text, and the run goes through the analyses `massive`, `sinks` and `svd`.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from headwater.analysis.engine.scan import analyse
from headwater.analysis.measures.massive import MassiveAnalysis
from headwater.analysis.measures.sink_rows import STATISTIC_SITES
from headwater.analysis.measures.sinks import SinksAnalysis
from headwater.analysis.measures.svd import SvdAnalysis
from headwater.store.reader import Run

SITES = ("resid", "loss", *STATISTIC_SITES)
N_COMPONENTS = 32
CONVENTIONS = (
    "largest: the activation of the largest |x| at a depth, with its sign, dimension, sequence, position and ratio to "
    "the median |x| of its sequence; largest_first and largest_rest: the largest |x| at the rows' first visible key, "
    "and elsewhere. median: mean over sequences of the median |x|. received_rest: the largest mean mass on a key that "
    "is not first, per row that can see it, keys that fewer than 16 rows see left out; received_rest_key its place. "
    "loss: mean over tokens, nats. first_token_share and share_by_layer as in `sinks`, singular_value, "
    "participation_ratio and effective_rank as in `svd`."
)


def name_steps(names: Iterable[str]) -> dict[int, str]:
    """Return checkpoints by their step, rising: "STEP=PATH", or the last whole number in the path's last part.

    Raises ValueError for a name without a number, and for two checkpoints of one step.
    """
    found: dict[int, str] = {}
    for name in names:
        given = re.fullmatch(r"(\d+)=(.+)", name)
        numbers = re.findall(r"\d+", Path(name).name)
        if not given and not numbers:
            raise ValueError(
                f"{name!r} does not say which step it is; expected a number in its name, such as "
                f"step-200, or STEP={name}."
            )
        step, path = (int(given[1]), given[2]) if given else (int(numbers[-1]), name)
        if step in found:
            raise ValueError(
                f"{found[step]!r} and {path!r} are both step {step}; give one of them, or STEP=PATH."
            )
        found[step] = path
    if not found:
        raise ValueError(
            "there is no checkpoint; give directories in Hugging Face's format, or nanoGPT's files."
        )
    return dict(sorted(found.items()))


def dynamics(
    checkpoints: Mapping[int, str], runs: str | Path | None = None, **settings: Any
) -> Any:
    """Measure checkpoints, by step, over one text; return a dataset with the quantities of CONVENTIONS by `step`.

    `checkpoints` are what `headwater extract` takes as a model. `settings` are fields of RunConfig that say what the
    text is: text or tokens, seq_len, bos, max_sequences and so on. The run of each checkpoint is kept in `runs` if that
    is given, as step-N, and is not computed again. Raises ValueError where models or tokens differ in shape or text.
    """
    import xarray

    if not checkpoints:
        raise ValueError("there is no checkpoint; give at least one, by its step.")
    with tempfile.TemporaryDirectory(prefix="headwater-dynamics-") as scratch:
        home = Path(scratch if runs is None else runs)
        home.mkdir(parents=True, exist_ok=True)
        found = []
        first = None
        for step, model in sorted(checkpoints.items()):
            run = _extract(home / f"step-{step}", model, settings)
            first = first or run
            _check_same(first, run, step)
            found.append(_figures(run))
    joined = xarray.concat(found, dim="step", combine_attrs="override").assign_coords(
        step=sorted(checkpoints)
    )
    models = [str(checkpoints[step]) for step in sorted(checkpoints)]
    kept = {
        name: found[0].attrs[name]
        for name in ("text", "n_positions", "n_sequences", "n_tokens", "versions")
    }
    joined.attrs = {"analysis": "dynamics", "conventions": CONVENTIONS} | kept
    return joined.assign_coords(model=("step", models))


def _extract(out: Path, model: str, settings: dict[str, Any]) -> Run:
    from headwater.extractor.request import RunConfig
    from headwater.extractor.run import extract

    return extract(RunConfig(out=out, model=str(model), sites=SITES, dtype="float32", **settings))


def _check_same(first: Run, run: Run, step: int) -> None:
    """Refuse a checkpoint of another shape, or one whose tokenizer gives other tokens."""
    for what, a, b in (
        ("model sizes", first.manifest.model["config"], run.manifest.model["config"]),
        ("tokens", first.manifest.text["digest"], run.manifest.text["digest"]),
    ):
        if a != b:
            raise ValueError(
                f"step {step} has other {what} than the first checkpoint: {b} where {a} was expected. "
                "Give checkpoints of one training."
            )


def _figures(run: Run) -> Any:
    """Return the figures of one checkpoint."""
    import xarray

    analyses = [
        MassiveAnalysis().prepare(run),
        SinksAnalysis(source="statistics").prepare(run),
        SvdAnalysis().prepare(run),
    ]
    massive, sinks, svd = analyse(run, analyses)
    peak = massive.stack(place=("positions", "d_model"))
    peak = peak.isel(place=abs(peak.peak).argmax("place"))
    dimension = peak.d_model.reset_coords(drop=True)
    peak = peak.reset_coords(drop=True)
    received = sinks.received.where(~sinks.few_rows).isel(key=slice(1, None)).fillna(0)
    variables = {
        "largest": peak.peak,
        "largest_dimension": dimension,
        "largest_position": peak.peak_position,
        "largest_sequence": peak.peak_sequence,
        "largest_ratio": peak.peak_ratio,
        "largest_first": massive.max_size.sel(positions="first", drop=True),
        "largest_rest": massive.max_size.sel(positions="rest", drop=True),
        "median": massive["median"],
        "first_token_share": sinks.first_token_share,
        "share_by_layer": sinks.share_by_layer,
        "received_rest": received.max("key"),
        "received_rest_key": received.argmax("key") + 1,
        "singular_value": svd.singular_value.isel(component=slice(N_COMPONENTS)),
        "participation_ratio": svd.participation_ratio,
        "effective_rank": svd.effective_rank,
        "loss": float(np.nanmean(run["loss"][...], dtype=np.float64)),
    }
    return xarray.Dataset(variables, attrs=sinks.attrs)
