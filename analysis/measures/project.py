"""Projections of a run onto directions as a run of their own, and directions read through the unembedding."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.analysis.engine.analysis import Figures, ModelAnalysis, as_function
from headwater.analysis.engine.derived import Derived, Observe, derive
from headwater.analysis.engine.options import SOME, setting
from headwater.analysis.engine.reducer import Chunk
from headwater.analysis.engine.results import coordinates
from headwater.analysis.engine.scan import as_run
from headwater.analysis.engine.work import read_text
from headwater.analysis.measures.origin import MODEL_HELP
from headwater.extractor.settings import MODEL, SWITCH, TEXT
from headwater.store.layout import make_spec
from headwater.store.place import Place, place_of
from headwater.store.reader import Run

if TYPE_CHECKING:
    import xarray

RESIDUAL = ("resid", "resid_mid", "attn_out", "mlp_out")
CONVENTIONS = (
    "projection: (x − centre) · direction in float64, stored as float32; centre is the mean of the rows that the "
    "directions were computed from where they are centred, else 0. NaN at padding and in blocks that are not complete."
)


def project(
    run: Run | str | Path,
    directions: Any,
    out: str | Path,
    k: int | None = None,
    centring: str = "centred",
    positions: str = "without_first",
    partial: bool = False,
    observe: Observe | None = None,
) -> Run:
    """Write a run's projections onto the first k directions of an `svd` result as a run at `out`, and open it.

    It holds `<site>_projection` [lead, sequence, position(, head), rank] with the text of the run, and the small arrays
    `direction` and `centre`. It goes on where it was interrupted. The directions may be those of another run of the
    same model. Values have the same bits on one kind of processor with one number of BLAS threads.
    """
    run = as_run(run)
    chosen = directions.sel(centring=centring, positions=positions)
    site = str(directions.attrs["site"])
    spec = run.spec(site)
    target = _target(out)
    axis = str(spec.axis)
    width = spec.dims[-1]
    leads = _leads(run, directions, site, [int(i) for i in chosen[axis]])
    v = np.ascontiguousarray(chosen["direction"].transpose(axis, ..., "rank", width).values)
    if k is not None and not 1 <= k <= v.shape[-2]:
        raise ValueError(
            f"k is {k}; expected 1 to {v.shape[-2]}, as many as there are. Compute more with svd(k=…)."
        )
    v = np.ascontiguousarray(v[..., :k, :])
    centre = (
        chosen["mean"].values if centring == "centred" else np.zeros((*v.shape[:-2], v.shape[-1]))
    )
    heads = tuple(spec.dims[3:-1])
    dims = (axis, "sequence", spec.dims[2], *heads, "rank")
    sizes = dict(zip(dims, (len(leads), *spec.shape[1:-1], v.shape[-2]), strict=True))
    name = f"{site}_projection"
    attributes = {
        "conventions": CONVENTIONS,
        "site": site,
        "centring": centring,
        "positions": positions,
        "directions_of": directions.attrs["fingerprint"],
    }
    made = make_spec(
        name, dims, sizes, "float32", "none", float("nan"), run.manifest.block, attributes
    )
    small: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        **{
            dim: ((axis,), np.asarray(values)) for dim, values in _numbers(run, site, leads).items()
        },
        "rank": (("rank",), np.arange(v.shape[-2])),
        "direction": ((axis, *heads, "rank", width), v),
        "centre": ((axis, *heads, width), np.ascontiguousarray(centre)),
    }
    digest = hashlib.sha256(v.tobytes() + centre.tobytes()).hexdigest()
    identity = {
        "array": name,
        axis: [int(i) for i in chosen[axis]],
        "k": v.shape[-2],
        "centring": centring,
        "positions": positions,
        "directions": digest,
    }
    compute = _Projection(run, site, leads, v, centre)
    return derive(run, target, Derived(made, small, identity), compute, partial, observe)


def _target(out: str | Path) -> Path:
    target: Place = place_of(out)
    if not isinstance(target, Path):
        raise ValueError(
            f"a projection is written to a directory; {out} is not on disk. Name one, and copy it there."
        )
    return target


def _leads(run: Run, directions: Any, site: str, wanted: list[int]) -> list[int]:
    """Return where the directions' layers or depths lie in the run; ValueError where model or depths do not fit."""
    if directions.attrs["model_digest"] != run.manifest.model["digest"]:
        raise ValueError(
            f"the directions are those of model {directions.attrs['model']}, but {run.path} was made with another one, "
            f"{run.manifest.model['name']}. Compute the svd of a run of the same model."
        )
    stored = run.leads(site)
    if missing := sorted(set(wanted) - set(stored)):
        raise ValueError(
            f"{run.path} holds {site} at {run.spec(site).axis} {stored}, but the directions are at {missing} too. "
            "Compute them at fewer."
        )
    return [stored.index(i) for i in wanted]


def _numbers(run: Run, site: str, leads: list[int]) -> dict[str, Any]:
    """Return the coordinates along the leading dimension."""
    axis = str(run.spec(site).axis)
    found = coordinates(run, site, leads)
    return {axis: found[axis], f"{axis}_fraction": found[f"{axis}_fraction"][1]}


class _Projection:
    """Project stretches of a run, sequence by sequence."""

    def __init__(
        self, run: Run, site: str, leads: list[int], v: np.ndarray, centre: np.ndarray
    ) -> None:
        self._run = run
        self._site = site
        self._leads = leads
        self._v = v
        self._centre = centre

    def __call__(self, at: int, sequences: slice, positions: slice) -> np.ndarray:
        """Return float32 [sequence, position(, head), rank], NaN at padding."""
        first = sequences.start
        last = sequences.stop
        real = (
            Chunk(self._run, first, last, *read_text(self._run, first, last))
            .text(self._site)
            .real[:, positions]
        )
        array = self._run[self._site]
        v = self._v[at]
        out = []
        for sequence in range(first, last):
            rows = array[self._leads[at], sequence, positions].astype(np.float64) - self._centre[at]
            product = rows @ v.T if v.ndim == 2 else np.einsum("pnh,nkh->pnk", rows, v)
            keep = real[sequence - first].reshape(-1, *(1,) * (product.ndim - 1))
            out.append(np.where(keep, product, np.nan).astype(np.float32))
        return np.stack(out)


@dataclass(frozen=True)
class SvdTokensAnalysis(ModelAnalysis):
    """Read the directions of a run's `svd` of the residual stream as tokens; see `read_directions`.

    `model` is the run's model by default; ValueError if its weights are not those of the run.
    """

    name = "svd_tokens"
    title = "principal directions of the residual stream read through the unembedding"
    needs = (("resid",),)
    section = "The dimensions of the stream"
    after = "svd"

    model: str | None = setting(None, TEXT, MODEL_HELP, "MODEL", leads=MODEL)
    n: int = setting(10, SOME, "tokens of a direction", "N", flag="--tokens-of-a-direction")
    fold_ln_f: bool = setting(False, SWITCH, "fold the scale of ln_f into the directions")

    def compute(self, run: Run, result: xarray.Dataset | None = None) -> xarray.Dataset:
        """Read the directions of the result."""
        if result is None or result.attrs["site"] not in RESIDUAL:
            site = "none" if result is None else result.attrs["site"]
            raise ValueError(
                f"svd_tokens reads directions of {', '.join(RESIDUAL)}; these are of {site}."
            )
        there = run if "tokenizer.json" in run.manifest.statics else None
        model = self.model or run.manifest.model["name"]
        found = read_directions(result, model, self.n, self.fold_ln_f, there)
        found = found.assign(singular_value=result["singular_value"])
        name = result.attrs["analysis"].replace("svd", "svd_tokens")
        return found.assign_attrs(analysis=name)

    @staticmethod
    def headline(result: xarray.Dataset) -> Figures:
        """Return the tokens of the first direction at the last depth."""
        axis = result.token.dims[-3]
        last = result.isel({axis: -1, "centring": -1, "positions": -1, "rank": 0})
        named = last.token_text if "token_text" in result else last.token
        words = named.values[0, :5].tolist()
        return {"first_direction_at_the_last_depth": " ".join(map(repr, words))}


svd_tokens = as_function(SvdTokensAnalysis)


def read_directions(
    directions: Any,
    model: str,
    n: int = 10,
    fold_ln_f: bool = False,
    run: Run | str | Path | None = None,
) -> xarray.Dataset:
    """Read directions [..., rank, d_model] of an `svd` result through the unembedding of their model.

    Returns the dataset's coordinates with token and logit [sign, ..., rank, top]: the n tokens whose rows of W_U have
    the largest product with +direction and with −direction, raw, or with the scale of ln_f folded in. With a `run` that
    holds a tokenizer, token_text as well.
    """
    import torch
    import xarray

    from headwater.extractor.model.weights import load_checkpoint

    checkpoint = load_checkpoint(model)
    if checkpoint.digest != directions.attrs["model_digest"]:
        raise ValueError(
            f"{model} is not the model of these directions ({directions.attrs['model']}): their weights differ. Name "
            "that one."
        )
    v = directions["direction"]
    if v.dims[-1] != "d_model":
        raise ValueError(
            f"these directions lie in {v.dims[-1]}, not in the residual stream, which W_U reads."
        )
    n = min(n, checkpoint.config.d_vocab)
    w_DV = (
        checkpoint.tensors["wte.weight" if checkpoint.config.tied else "lm_head.weight"].double().T
    )
    values = torch.from_numpy(v.values)
    if fold_ln_f:
        values = values * checkpoint.tensors["ln_f.weight"].double()
    logits = []
    tokens = []
    flat = values.reshape(-1, values.shape[-1])
    for at in range(0, len(flat), 64):
        product = flat[at : at + 64] @ w_DV
        tops = [(sign * product).topk(n) for sign in (1, -1)]
        logits.append(
            torch.stack([sign * top.values for sign, top in zip((1, -1), tops, strict=True)])
        )
        tokens.append(torch.stack([top.indices for top in tops]))
    dims = ("sign", *v.dims[:-1], "top")
    shape = (2, *v.shape[:-1], n)
    found = {
        "token": (dims, torch.cat(tokens, 1).reshape(shape).numpy()),
        "logit": (dims, torch.cat(logits, 1).reshape(shape).numpy()),
    }
    if run is not None:
        from headwater.extractor.tokenizer import load_run_tokenizer

        coder = load_run_tokenizer(as_run(run))
        if coder is None:
            raise ValueError(f"{as_run(run).path} was not made from text, so it has no tokenizer.")
        strings = coder.token_strings(found["token"][1].ravel())
        found["token_text"] = dims, np.array(strings, dtype=object).reshape(shape)
    return xarray.Dataset(
        found, v.coords, directions.attrs | {"ln_f": "folded" if fold_ln_f else "not folded"}
    )
