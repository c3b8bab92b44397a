"""Edits at work: the hook that changes values of one batch on their way through the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from headwater.extractor.edits.grammar import Edit
from headwater.extractor.edits.places import Place, Spots, find_function, item_shape, place_edits
from headwater.extractor.edits.values import make_source
from headwater.extractor.model.activations import value_and_slope
from headwater.extractor.model.batch import Batch, Forward
from headwater.extractor.model.forward import Model
from headwater.extractor.model.hook import RecordHook
from headwater.extractor.model.tap import NoTap, Tap
from headwater.extractor.model.walk import Micro, walk_layers
from headwater.extractor.sites import SITES
from headwater.kernels.mask import RowBlock

Where = tuple[str, int]


class Editor:
    """Edits fitted to a model and a row length; `hook` binds them to each batch. Several apply in their order."""

    def __init__(self, edits: Sequence[Edit], model: Model, n_positions: int) -> None:
        self.model = model
        self.places = place_edits(edits, model.config, n_positions)
        self.sources = {place.number: make_source(place, model) for place in self.places}
        self.functions = {
            p.number: find_function(p.edit) for p in self.places if p.edit.op == "call"
        }
        self.by_where: dict[Where, list[Place]] = {}
        for place in self.places:
            for layer in place.at:
                self.by_where.setdefault((place.edit.site, layer), []).append(place)
        self.tangent = {layer for p in self.places if p.edit.op == "linearise" for layer in p.at}
        self.reference = {
            ("mlp_pre" if p.edit.op == "linearise" else p.edit.site, layer)
            for p in self.places
            if p.edit.op == "freeze" or (p.edit.op == "linearise" and p.edit.value is None)
            for layer in p.at
        }
        self.last = max(
            (_layer_of(*where, model.config.n_layer) for where in self.reference), default=-1
        )

    def hook(self, batch: Batch, first: int = 0) -> Batch:
        """Return the batch with these edits; its first row is sequence `first` of the run."""
        return replace(batch, hook=BoundEdits(self, batch, first)) if self.places else batch


class _Shadow(NoTap):
    """A tap that keeps nothing but makes the pass round as another tap does, which wants `attn_out` or `mlp_out`."""

    def __init__(self, other: Tap) -> None:
        self._other = other

    def wants(self, site: str, layer: int) -> bool:
        """Want LayerNorm's last scale, without which the output is not begun, and what the other one adds apart."""
        return site == "ln_final_scale" or (
            site in ("attn_out", "mlp_out") and self._other.wants(site, layer)
        )

    def take(self, site: str, layer: int, value: torch.Tensor) -> None:
        """Keep nothing."""


class BoundEdits:
    """The edits of one batch. A reference pass over the same tokens runs beside it as far as an edit needs one."""

    def __init__(self, editor: Editor, batch: Batch, first: int) -> None:
        self.editor = editor
        self.batch = batch
        self.first = first
        t = torch.arange(batch.row_start.shape[1], device=batch.row_start.device)
        self._real = batch.row_start <= t
        self._rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._stream: torch.Tensor | None = None
        self._kept: dict[Where, torch.Tensor] = {}
        self._pre: torch.Tensor | None = None

    def prepare(self, model: Forward, layer: int, batch: Batch, tap: Tap) -> None:
        """Take the reference pass through a layer and keep what edits will ask of it."""
        if layer > self.editor.last:
            self._stream = None
            self._kept = {}
            return
        record = RecordHook(self.editor.reference)
        plain = replace(batch, hook=record)
        if self._stream is None:
            self._stream = model.embed(plain)
        if layer == model.config.n_layer:
            model.finish(self._stream, plain, _Shadow(tap))
        else:
            micro = Micro(self.first, plain, self._stream)
            walk_layers(model, [micro], _Shadow(tap), layer, layer + 1)
        self._kept = record.kept

    def changes(self, site: str, layer: int) -> bool:
        """Say whether there is an edit here, or one that will need the value."""
        return (site, layer) in self.editor.by_where or (
            site == "mlp_pre" and layer in self.editor.tangent
        )

    def apply(self, site: str, layer: int, value: torch.Tensor) -> None:
        """Change a value [B, T, …] at the chosen positions; padding is left alone."""
        if (site, layer) == ("resid", 0):
            self._kept["resid", 0] = value.clone()
        for place in self.editor.by_where.get((site, layer), ()):
            b, t = self._places(place)
            old = value[b, t]
            new = self._new(place, layer, old, b, t).to(old.dtype)
            chosen = self._item(place, old)
            value[b, t] = new if chosen is None else torch.where(chosen, new, old)
        if site == "mlp_pre" and layer in self.editor.tangent:
            self._pre = value.clone()

    def apply_rows(
        self, site: str, layer: int, sequence: int, block: RowBlock, value: torch.Tensor
    ) -> bool:
        """Change a row block [N, Q, K] at the chosen heads, queries and visible keys; hidden keys stay as they are."""
        before = value.clone()
        starts = self.batch.row_start[sequence, block.first : block.last, None]
        key = torch.arange(block.key, block.last, device=value.device)
        query = torch.arange(block.first, block.last, device=value.device)[:, None]
        for place in self.editor.by_where[site, layer]:
            chosen = (key <= query) & (key >= starts)
            chosen &= self._mask(place)[sequence, block.first : block.last, None]
            if place.keys is not None:
                first = (key == starts) if place.keys.first else torch.zeros_like(chosen)
                chosen &= first | _spotted(place.keys, self._real[sequence])[block.key : block.last]
            if place.heads is not None:
                chosen = chosen & _chosen(place.heads, len(value), value.device)[:, None, None]
            value.copy_(
                torch.where(chosen, self._new_rows(place, layer, sequence, block, value), value)
            )
        return not torch.equal(before, value)

    def _new(
        self, place: Place, layer: int, old: torch.Tensor, b: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """Return what an op makes of values [n, …]."""
        edit = place.edit
        source = self.editor.sources[place.number]
        if edit.op == "linearise":
            point = None if source is None else source.rows(layer, b + self.first, t)
            return self._tangent(layer, old, b, t, point)
        if edit.op == "noise":
            return old + float(edit.value) * self._noise(place, layer, old, b, t)
        if edit.op == "call":
            return self._called(place, old)
        given = None if source is None else source.rows(layer, b + self.first, t).to(old)
        kept = self._kept[edit.site, layer][b, t] if edit.op == "freeze" else None
        return _result(edit, old, given, kept)

    def _new_rows(
        self, place: Place, layer: int, sequence: int, block: RowBlock, old: torch.Tensor
    ) -> torch.Tensor:
        edit = place.edit
        source = self.editor.sources[place.number]
        rows = slice(block.first, block.last)
        keys = slice(block.key, block.last)
        if edit.op == "call":
            return self._called(place, old)
        kept = (
            self._kept[edit.site, layer][sequence][:, rows, keys] if edit.op == "freeze" else None
        )
        given = None
        if source is not None:
            square = source.square(layer, sequence + self.first).to(old)
            given = old.clone()
            part = square[:, rows, keys]
            given[:, : part.shape[1], : part.shape[2]] = part
        return _result(edit, old, given, kept)

    def _called(self, place: Place, old: torch.Tensor) -> torch.Tensor:
        try:
            changed: Any = self.editor.functions[place.number](old.clone())
        except Exception as error:
            raise RuntimeError(
                f"--edit {str(place.edit)!r}: its function failed ({type(error).__name__}: {error})."
            ) from error
        if not isinstance(changed, torch.Tensor) or changed.shape != old.shape:
            raise RuntimeError(
                f"--edit {str(place.edit)!r}: its function must return a tensor of shape {list(old.shape)}."
            )
        return torch.as_tensor(changed)

    def _tangent(
        self,
        layer: int,
        old: torch.Tensor,
        b: torch.Tensor,
        t: torch.Tensor,
        point: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return f(p) + f′(p)(a − p) for pre-activations a and the point p, by default that of the reference pass."""
        assert self._pre is not None
        pre = self._pre[b, t]
        point = self._kept["mlp_pre", layer][b, t] if point is None else point.to(pre)
        value, slope = value_and_slope(self.editor.model.config.activation, point)
        return torch.where(pre == point, old, value + slope * (pre - point))

    def _noise(
        self, place: Place, layer: int, old: torch.Tensor, b: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """Draw normal values that depend on seed, edit, layer, sequence and position alone."""
        length = self.batch.tokens.shape[1]
        out = torch.empty_like(old)
        for row in sorted(set(b.tolist())):
            rng = np.random.default_rng([place.edit.seed, place.number, layer, self.first + row])
            drawn = torch.from_numpy(rng.standard_normal((length, *old.shape[1:]), np.float32)).to(
                old
            )
            out[b == row] = drawn[t[b == row]]
        return out

    def _places(self, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
        if place.number not in self._rows:
            b, t = self._mask(place).nonzero(as_tuple=True)
            self._rows[place.number] = b, t
        return self._rows[place.number]

    def _mask(self, place: Place) -> torch.Tensor:
        """Return bool [B, T]: the positions that an edit changes."""
        mask = self._real.clone()
        if place.positions is not None:
            spots = torch.stack([_spotted(place.positions, real) for real in self._real])
            if place.positions.first:
                spots |= self.batch.row_start == torch.arange(mask.shape[1], device=mask.device)
            mask &= spots
        if place.tokens is not None:
            mask &= torch.isin(self.batch.tokens, torch.tensor(place.tokens, device=mask.device))
        return mask

    def _item(self, place: Place, value: torch.Tensor) -> torch.Tensor | None:
        """Return a bool mask over one position's value for chosen heads and dimensions, None for all."""
        shape = item_shape(place.edit.site, self.editor.model.config)
        mask = None
        if place.dims is not None:
            mask = _chosen(place.dims, shape[-1], value.device)
        if place.heads is not None:
            heads = _chosen(place.heads, shape[0], value.device)[:, None]
            mask = heads if mask is None else heads & mask
        return mask


def _result(
    edit: Edit, old: torch.Tensor, given: torch.Tensor | None, kept: torch.Tensor | None
) -> torch.Tensor:
    """Apply an op that needs only numbers: what was there, what a source gives, what the reference pass kept."""
    number = float(edit.value) if isinstance(edit.value, int | float) else None
    if kept is not None:
        return kept.expand_as(old) if number is None else kept * number
    if edit.op == "scale" and number is not None:
        return old * number
    if edit.op == "add":
        return torch.add(
            old, old.new_tensor(number or 0.0) if given is None else given, alpha=edit.factor
        )
    if given is not None:
        return given.expand_as(old)
    return torch.full_like(old, number or 0.0)


def _spotted(spots: Spots, real: torch.Tensor) -> torch.Tensor:
    """Return bool [T]: absolute positions and the last real one; `first` depends on the row and is added elsewhere."""
    mask = _chosen(spots.absolute, len(real), real.device)
    if spots.last and bool(real.any()):
        mask[int(real.nonzero()[-1, 0])] = True
    return mask


def _chosen(indices: Sequence[int], size: int, device: torch.device) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    mask[torch.tensor(indices, dtype=torch.int64, device=device)] = True
    return mask


def _layer_of(site: str, at: int, n_layer: int) -> int:
    """Return the layer in whose reference pass a value is kept; depth 0 is kept when it is made."""
    if site == "resid":
        return at - 1
    return n_layer if SITES[site].axis is None else at
