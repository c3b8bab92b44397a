"""Fit edits to a model and a row length: every index in range, every file and run there, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.extractor.edits.grammar import Edit, digest
from headwater.extractor.selection import parse_indices
from headwater.extractor.sites import SITES, SQUARE, VECTOR, RequestError

if TYPE_CHECKING:  # torch and zarr come with them
    from headwater.extractor.model.weights import ModelConfig
    from headwater.extractor.tokenizer import Tokenizer
    from headwater.store.reader import Run

NAMED = ("first", "last")
_no_calls = ""


@dataclass(frozen=True)
class Spots:
    """Positions of a row: absolute ones, and whether the first visible and the last real one are among them."""

    absolute: tuple[int, ...] = ()
    first: bool = False
    last: bool = False


@dataclass(frozen=True)
class Place:
    """An edit fitted to a model; None selects everything along a dimension. `number` counts the edits from 0."""

    edit: Edit
    number: int
    at: tuple[int, ...]
    heads: tuple[int, ...] | None
    dims: tuple[int, ...] | None
    positions: Spots | None
    keys: Spots | None
    tokens: tuple[int, ...] | None


def place_edits(edits: Sequence[Edit], config: ModelConfig, n_positions: int) -> tuple[Place, ...]:
    """Resolve the selections of edits and check what they take their values from; raise RequestError by name."""
    return tuple(_place(edit, i, config, n_positions) for i, edit in enumerate(edits))


def item_shape(site: str, config: ModelConfig) -> tuple[int, ...]:
    """Return the shape of a site's value at one position of one sequence, () for LayerNorm's scales."""
    sizes = {
        "d_model": config.d_model,
        "d_head": config.d_head,
        "d_mlp": config.d_mlp,
        "head": config.n_head,
    }
    return tuple(sizes[dim] for dim in SITES[site].dims if dim in sizes)


def n_at(site: str, config: ModelConfig) -> int:
    """Return how many layers or depths a site has."""
    return {"depth": config.n_layer + 1, "layer": config.n_layer, None: 1}[SITES[site].axis]


def encode_edits(edits: Sequence[Edit], tokenizer: Tokenizer | None) -> tuple[Edit, ...]:
    """Turn prompts written as text:… into ids:…, so that identity and workers need no tokenizer."""
    out = []
    for edit in edits:
        if isinstance(edit.value, str) and edit.value.startswith("text:"):
            if tokenizer is None:
                raise edit.refuse(
                    "there is no tokenizer to read its text with; write the ids, as in ids:1,2,3."
                )
            ids = tokenizer.encode_batch([edit.value.removeprefix("text:")])[0]
            edit = replace(edit, value="ids:" + ",".join(map(str, ids)))
        out.append(edit)
    return tuple(out)


def prompt_ids(edit: Edit, d_vocab: int) -> list[int]:
    """Return the ids of a prompt ids:1,2,3."""
    parts = str(edit.value).removeprefix("ids:").split(",")
    if not all(p.strip().isdigit() and int(p) < d_vocab for p in parts):
        raise edit.refuse(
            f"{edit.value!r} is not a list of token ids below {d_vocab}, as in ids:1,2,3."
        )
    return [int(p) for p in parts]


def is_prompt(edit: Edit) -> bool:
    """Say whether an edit takes its values from a prompt."""
    return isinstance(edit.value, str) and edit.value.startswith(("ids:", "text:"))


def open_source(edit: Edit) -> Run:
    """Open the run that an edit takes its values from; it must be whole and hold the site everywhere."""
    from headwater.store.reader import open_run

    try:
        run = open_run(str(edit.value))
        spec = run.spec(edit.site if edit.op != "linearise" else "mlp_pre")
    except ValueError as error:
        raise edit.refuse(str(error)) from error
    if not run.complete.all():
        raise edit.refuse(
            f"the run {edit.value} is not finished; finish it first with `headwater extract --out "
            f"{edit.value}`."
        )
    sizes = run.manifest.model["config"]
    if "selected_position" in spec.dims or (
        "head" in spec.dims and spec.shape[spec.dims.index("head")] != sizes["n_head"]
    ):
        raise edit.refuse(
            f"the run {edit.value} holds only some heads or positions of {spec.name}; extract one that "
            "holds all."
        )
    return run


def load_array(edit: Edit) -> np.ndarray:
    """Return the array of an edit, from memory or a .npy file, as float64."""
    value = edit.value
    if isinstance(value, np.ndarray):
        return value
    try:  # as a map, so that a header cannot ask for more memory than the file has bytes
        array = np.load(str(value), mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of a file that is no .npy, numpy raises almost anything
        raise edit.refuse(
            f"{value!r} is neither a number nor a .npy file that can be read ({error})."
        ) from None
    if not isinstance(array, np.ndarray):
        raise edit.refuse(f"{value} is an archive of arrays; expected a .npy file with one.")
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise edit.refuse(f"{value} must hold finite numbers; it is {array.dtype}.")
    return np.array(array, np.float64)


def digest_source(edit: Edit) -> str:
    """Return what identifies the run or the file behind an edit, whatever its path."""
    if edit.op in ("mean", "patch", "linearise"):
        return open_source(edit).manifest.fingerprint[:16]
    array = load_array(edit)
    return digest(array.tobytes() + str(array.shape).encode())


def _place(edit: Edit, number: int, config: ModelConfig, n_positions: int) -> Place:
    item = item_shape(edit.site, config)

    def indices(text: str | None, size: int, what: str) -> tuple[int, ...] | None:
        try:
            return None if text is None else parse_indices(text, size, what)
        except RequestError as error:
            raise edit.refuse(str(error).removeprefix("--")) from None

    size = n_at(edit.site, config)
    axis = SITES[edit.site].axis
    at = indices(edit.at, size, f"{axis}s") or tuple(range(size))
    if (
        edit.op in ("mean", "patch", "linearise")
        and edit.at is None
        and isinstance(edit.value, str)
        and axis
    ):
        at = (
            at
            if is_prompt(edit)
            else tuple(i for i in open_source(edit).leads(_source_site(edit)) if i < size)
        )
    place = Place(
        edit,
        number,
        at,
        indices(edit.heads, config.n_head, "heads"),
        indices(edit.dims, item[-1] if item else 1, "dims"),
        _spots(edit, edit.positions, n_positions, "positions"),
        _spots(edit, edit.keys, n_positions, "keys"),
        indices(edit.tokens, config.d_vocab, "tokens"),
    )
    _check_source(place, config, n_positions, item)
    return place


def _spots(edit: Edit, text: str | None, n_positions: int, what: str) -> Spots | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    rest = ",".join(part for part in parts if part not in NAMED)
    try:
        absolute = parse_indices(rest, n_positions, what) if rest else ()
    except RequestError as error:
        raise edit.refuse(
            f"{str(error).removeprefix('--')} `first` and `last` are positions too."
        ) from None
    return Spots(absolute, "first" in parts, "last" in parts)


def _source_site(edit: Edit) -> str:
    return "mlp_pre" if edit.op == "linearise" else edit.site


def _check_source(
    place: Place, config: ModelConfig, n_positions: int, item: tuple[int, ...]
) -> None:
    """Check that a source gives every value that is needed of it."""
    edit = place.edit
    value = place.edit.value
    square = SITES[edit.site].group == SQUARE
    if edit.op in ("set", "add") and not isinstance(value, int | float):
        array = load_array(edit)
        if square:
            raise edit.refuse(
                "patterns and scores are set or added to by numbers alone; patch them from a run."
            )
        _broadcast(edit, array, (len(place.at), *item))
    elif edit.op == "call" and isinstance(value, str):
        find_function(edit)
    elif edit.op in ("mean", "patch", "linearise") and value is not None:
        if isinstance(value, np.ndarray):
            shape = (
                (len(place.at), *item) if edit.op == "mean" else (len(place.at), None, None, *item)
            )
            _broadcast(
                edit,
                value,
                shape if not square else (len(place.at), None, config.n_head, None, None),
            )
        elif is_prompt(edit):
            if not value.startswith("text:"):
                _check_reach(place, len(prompt_ids(edit, config.d_vocab)), n_positions)
        else:
            _check_run(place, config, n_positions, item)


def _check_run(place: Place, config: ModelConfig, n_positions: int, item: tuple[int, ...]) -> None:
    edit = place.edit
    run = open_source(edit)
    site = _source_site(edit)
    held = run.leads(site)
    sizes = item_shape(site, config)
    if missing := [i for i in place.at if SITES[site].axis and i not in held]:
        raise edit.refuse(f"the run {edit.value} holds {site} at {held}, not at {missing}.")
    if SITES[site].group == VECTOR and run.spec(site).shape[-len(sizes) :] != sizes:
        raise edit.refuse(
            f"the run {edit.value} has {site} of shape {run.spec(site).shape}; this model's is {sizes}."
        )
    if edit.op != "mean":
        if edit.sequence is not None and not 0 <= edit.sequence < run.manifest.n_sequences:
            raise edit.refuse(
                f"the run {edit.value} has {run.manifest.n_sequences} sequences, counted from 0."
            )
        _check_reach(place, run.manifest.n_positions, n_positions)


def _check_reach(place: Place, there: int, n_positions: int) -> None:
    """Refuse a source that is shorter than the positions that take from it."""
    edit = place.edit
    if edit.source is not None:
        if not -there <= edit.source < there:
            raise edit.refuse(f"source is {edit.source}, but its source has {there} positions.")
        return
    spots = place.positions
    needed = n_positions - 1 if spots is None or spots.first or spots.last else max(spots.absolute)
    if needed >= there:
        raise edit.refuse(
            f"its source has {there} positions, but position {needed} of a row would take from it. Say which of its "
            "positions to take for all with source=, or select position= below that."
        )


def _broadcast(edit: Edit, array: np.ndarray, shape: tuple[int | None, ...]) -> None:
    """Refuse an array that does not broadcast to a shape, whose None fits anything."""
    tail = shape[len(shape) - array.ndim :] if array.ndim else ()
    sizes = zip(array.shape[-len(tail) :], tail, strict=True) if tail else ()
    if array.ndim > len(shape) or any(n not in (1, m) and m is not None for n, m in sizes):
        wanted = tuple("n" if n is None else n for n in shape)
        raise edit.refuse(
            f"its array has shape {array.shape}, which does not broadcast to {wanted}."
        )


def switch_calls_off(reason: str) -> None:
    """Let this process refuse every `call` from now on, wherever it comes from; `reason` ends the error."""
    global _no_calls
    _no_calls = reason


def find_function(edit: Edit) -> Any:
    """Return the function of a `call`, from Python or as module:name."""
    from importlib import import_module

    if _no_calls:
        raise edit.refuse(f"it calls a function, and {_no_calls}")
    if not isinstance(edit.value, str):
        return edit.value
    module, _, name = edit.value.partition(":")
    try:
        function = import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except Exception as error:  # an import runs the module, which may raise anything
        raise edit.refuse(
            f"there is no function {edit.value!r} ({error}); write module:name."
        ) from None
    if not callable(function):
        raise edit.refuse(f"{edit.value} is not a function.")
    return function
