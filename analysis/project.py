"""Projections of a run onto directions as a derived Zarr group, and directions read through the unembedding."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from headwater.analysis.engine import ONE_BY_ONE, Scan, ScanProgress, as_run, committed_blocks
from headwater.analysis.pools import make_pool
from headwater.analysis.reducer import Chunk
from headwater.analysis.results import analysis_path, coordinates, provenance
from headwater.analysis.work import read_text
from headwater.store.reader import Run, open_run

CHUNK_BYTES = 4 << 20
RESIDUAL = ("resid", "resid_mid", "attn_out", "mlp_out")
CONVENTIONS = (
    "projection: (x − centre) · direction in float64, stored as float32; centre is the mean of the rows that the "
    "directions were computed from where they are centred, else 0. NaN at padding and in blocks that are not complete."
)


def project(
    run: Run | str | Path,
    directions: Any,
    k: int | None = None,
    centring: str = "centred",
    positions: str = "without_first",
    name: str | None = None,
    scan: Scan = ONE_BY_ONE,
) -> Any:
    """Write a run's projections onto the first k directions of an `svd` result, beside the run; open them.

    The result is the Zarr group `RUN.analysis/<name>` with projection [lead, sequence, position(, head), rank]; `name`
    is `<site>_projection` by default. The run may be another one than that of the directions, of the same model.
    """
    import xarray
    import zarr

    run = as_run(run)
    chosen = directions.sel(centring=centring, positions=positions)
    site = str(directions.attrs["site"])
    spec = run.spec(site)
    axis = str(spec.axis)
    if directions.attrs["model_digest"] != run.manifest.model["digest"]:
        raise ValueError(
            f"the directions are those of model {directions.attrs['model']}, but {run.path} was made with another one, "
            f"{run.manifest.model['name']}. Compute the svd of a run of the same model."
        )
    stored, wanted = run.leads(site), [int(i) for i in chosen[axis]]
    if missing := sorted(set(wanted) - set(stored)):
        raise ValueError(f"{run.path} holds {site} at {axis} {stored}, but the directions are at {missing} too.")
    v = chosen["direction"].transpose(axis, ..., "rank", spec.dims[-1]).values
    v = v[..., : k or v.shape[-2], :]
    centre = chosen["mean"].values if centring == "centred" else np.zeros((*v.shape[:-2], v.shape[-1]))
    heads = tuple(spec.dims[3:-1])
    shape = (len(wanted), run.manifest.n_sequences, spec.shape[2], *v.shape[1:-2], v.shape[-2])
    per = int(np.prod(shape[2:])) * 4
    n = min(1 << max(CHUNK_BYTES // per, 1).bit_length() - 1, run.manifest.block)
    blocks = committed_blocks(run, scan.partial)
    name = name or f"{site}_projection"
    target = analysis_path(run, name)
    if not isinstance(target, Path):
        raise ValueError(f"a projection is written to a directory beside its run; {run.path} is not on disk. Copy it.")
    new = target.with_name(f".{target.name}.new.{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    arguments = {"site": site, "centring": centring, "positions": positions, "k": v.shape[-2],
                 "directions_of": directions.attrs["fingerprint"]}  # fmt: skip
    coords = coordinates(run, site, [stored.index(i) for i in wanted])
    attributes = provenance(run, name, arguments, 1, CONVENTIONS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        text = {plain: (("sequence", "position"), run.plain(plain)) for plain in ("tokens", "row_start")}
        new.parent.mkdir(parents=True, exist_ok=True)
        xarray.Dataset(text, coords, attributes).to_zarr(new, zarr_format=3, consolidated=False)
        zarr.create_array(
            new, name="projection", shape=shape, chunks=(1, n, *shape[2:]), dtype="float32", fill_value=np.nan,
            dimension_names=(axis, "sequence", spec.dims[2], *heads, "rank"),
        )  # fmt: skip
        progress = ScanProgress(1, len(blocks))
        work = Project(run, new, site, [stored.index(i) for i in wanted], v, centre, n)
        for _ in make_pool(scan.pool, scan.workers).map(work, blocks):
            progress.done += 1
            if scan.observe is not None:
                scan.observe(progress)
        zarr.consolidate_metadata(new)
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)
    return xarray.open_zarr(target, chunks=None)


class Project:
    """Project one block and write its chunks, which no other block touches."""

    def __init__(
        self, run: Run | str, out: Path, site: str, leads: list[int], v: np.ndarray, centre: np.ndarray, n: int
    ) -> None:
        self.run = open_run(run) if isinstance(run, str) else run
        self.out, self.site, self.leads, self.v, self.centre, self.n = out, site, leads, v, centre, n

    def __reduce__(self) -> Any:
        return Project, (str(self.run.path), self.out, self.site, self.leads, self.v, self.centre, self.n)

    def __call__(self, block: int) -> int:
        import zarr

        first, last = self.run.manifest.block_range(block)
        tokens, row_start = read_text(self.run, first, last)
        target = zarr.open_array(self.out / "projection", mode="r+")
        for low in range(first, last, self.n):
            high = min(low + self.n, last)
            here = slice(low - first, high - first)
            chunk = Chunk(self.run, low, high, tokens[here], row_start[here])
            real = chunk.text(self.site).real
            for at, lead in enumerate(self.leads):
                x = chunk.at(self.site, lead)
                values = np.full((*x.shape[:-1], self.v.shape[-2]), np.nan, np.float32)
                for s in range(len(x)):
                    rows = x[s].astype(np.float64) - self.centre[at]
                    product = rows @ self.v[at].T if self.v.ndim == 3 else np.einsum("pnh,nkh->pnk", rows, self.v[at])
                    values[s] = np.where(real[s].reshape(-1, *(1,) * (rows.ndim - 1)), product, np.nan)
                target[at, low:high] = values
                chunk.forget()
        return last - first


def run_directions(
    run: Run | str | Path, result: Any = None, model: str | None = None, n: int = 10, fold_ln_f: bool = False
) -> Any:
    """Read the directions of a run's `svd` of the residual stream as tokens; see `read_directions`.

    `model` is the run's model by default; ValueError if its weights are not those of the run.
    """
    run = as_run(run)
    if result is None or result.attrs["site"] not in RESIDUAL:
        site = "none" if result is None else result.attrs["site"]
        raise ValueError(f"svd_tokens reads directions of {', '.join(RESIDUAL)}; these are of {site}.")
    there = run if (run.path / "tokenizer.json").is_file() else None
    found = read_directions(result, model or run.manifest.model["name"], n, fold_ln_f, there)
    found = found.assign(singular_value=result["singular_value"])
    name = result.attrs["analysis"].replace("svd", "svd_tokens")
    return found.assign_attrs(analysis=name)


def read_directions(
    directions: Any, model: str, n: int = 10, fold_ln_f: bool = False, run: Run | str | Path | None = None
) -> Any:
    """Read directions [..., rank, d_model] of an `svd` result through the unembedding of their model.

    Returns the dataset's coordinates with token and logit [sign, ..., rank, top]: the n tokens whose rows of W_U have
    the largest product with +direction and with −direction, raw, or with the scale of ln_f folded in. With a `run` that
    holds a tokenizer, token_text as well.
    """
    import torch
    import xarray

    from headwater.extractor.weights import load_checkpoint

    checkpoint = load_checkpoint(model)
    if checkpoint.digest != directions.attrs["model_digest"]:
        raise ValueError(
            f"{model} is not the model of these directions ({directions.attrs['model']}): their weights differ. Name "
            "that one."
        )
    v = directions["direction"]
    if v.dims[-1] != "d_model":
        raise ValueError(f"these directions lie in {v.dims[-1]}, not in the residual stream, which W_U reads.")
    w_DV = checkpoint.tensors["wte.weight" if checkpoint.config.tied else "lm_head.weight"].double().T
    values = torch.from_numpy(v.values)
    if fold_ln_f:
        values = values * checkpoint.tensors["ln_f.weight"].double()
    logits, tokens = [], []
    flat = values.reshape(-1, values.shape[-1])
    for at in range(0, len(flat), 64):
        product = flat[at : at + 64] @ w_DV
        tops = [(sign * product).topk(n) for sign in (1, -1)]
        logits.append(torch.stack([sign * top.values for sign, top in zip((1, -1), tops, strict=True)]))
        tokens.append(torch.stack([top.indices for top in tops]))
    dims = ("sign", *v.dims[:-1], "top")
    shape = (2, *v.shape[:-1], n)
    found = {"token": (dims, torch.cat(tokens, 1).reshape(shape).numpy()),
             "logit": (dims, torch.cat(logits, 1).reshape(shape).numpy())}  # fmt: skip
    if run is not None:
        from headwater.extractor.tokenizer import load_tokenizer

        strings = load_tokenizer(as_run(run).path / "tokenizer.json").token_strings(found["token"][1].ravel())
        found["token_text"] = dims, np.array(strings, dtype=object).reshape(shape)
    return xarray.Dataset(found, v.coords, directions.attrs | {"ln_f": "folded" if fold_ln_f else "not folded"})
