"""Activation patching: put clean values into a corrupt run, place by place, and see how much of the answer returns.

Meng et al. 2022 (arXiv 2202.05262), Wang et al. 2022 (arXiv 2211.00593). Many places are one batch: every row is the
corrupt prompt with one place patched, and begins at the layer of the place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from headwater.analysis.interventions.prompts import Pair, Reader
from headwater.extractor.edits.apply import Editor
from headwater.extractor.edits.grammar import Edit
from headwater.extractor.model.batch import Batch, Forward, Hook, NoHook, make_batch
from headwater.extractor.model.forward import Model
from headwater.extractor.model.hook import RecordHook
from headwater.extractor.model.tap import NoTap, Tap
from headwater.extractor.model.walk import Micro, walk_layers
from headwater.extractor.model.weights import Checkpoint, ModelConfig
from headwater.extractor.sites import SITES
from headwater.kernels.mask import RowBlock

if TYPE_CHECKING:
    import xarray

    from headwater.analysis.engine.results import Variables

PATCHABLE = ("resid", "resid_mid", "attn_out", "mlp_out", "q", "k", "v", "z", "mlp_pre", "mlp_post")
HEADS = ("q", "k", "v", "z")

# Of a batch of patched rows, each a whole prompt.
POSITIONS_AT_ONCE = 4096

# A smaller difference of the two prompts is rounding, and nothing can be restored of it.
LEAST = 1e-5
CONVENTIONS = (
    "Each line has a clean and a corrupt prompt of equal length, an answer and a wrong token. LD = logit(answer) − "
    "logit(wrong) at the last position. restored = (LD patched − LD corrupt)/(LD clean − LD corrupt): 0 changes "
    "nothing, 1 brings the clean answer back. A place is one site, layer (or depth), position and, where heads are "
    "asked for, head; its clean value goes into the corrupt run. Lines whose prompts differ in LD by less than 1e-5 "
    "give NaN."
)


@dataclass(frozen=True)
class Case:
    """A pair with the two tokens that tell it apart."""

    pair: Pair
    answer: int
    wrong: int


def read_cases(pairs: Sequence[Pair], reader: Reader) -> list[Case]:
    """Check pairs for patching: equal lengths, and one token each as `answer` and `wrong`."""
    cases = []
    for i, pair in enumerate(pairs, 1):
        if len(pair.a) != len(pair.b):
            raise ValueError(
                f"pair {i} ({pair.label}) has {len(pair.a)} clean and {len(pair.b)} corrupt tokens; patching goes "
                "position by position, so both need as many."
            )
        for name in ("answer", "wrong"):
            if name not in pair.more:
                raise ValueError(
                    f"pair {i} ({pair.label}) has no {name!r}; give the right and the wrong next token, each "
                    "one token."
                )
        answer = reader.one(pair.more["answer"], f"pair {i}, answer")
        wrong = reader.one(pair.more["wrong"], f"pair {i}, wrong")
        cases.append(Case(pair, answer, wrong))
    return cases


class PatchRows:
    """A hook that gives row b the clean value of one position (and head) at one site and layer."""

    def __init__(
        self,
        site: str,
        layer: int,
        positions: torch.Tensor,
        heads: torch.Tensor | None,
        clean: torch.Tensor,
        inner: Hook,
    ) -> None:
        self._where = (site, layer)
        self._inner = inner
        self._positions = positions
        self._heads = heads
        self._clean = clean

    def prepare(self, model: Forward, layer: int, batch: Batch, tap: Tap) -> None:
        """Let the inner hook make ready."""
        self._inner.prepare(model, layer, batch, tap)

    def changes(self, site: str, layer: int) -> bool:
        """Say yes at the one place, and where the inner hook does."""
        return (site, layer) == self._where or self._inner.changes(site, layer)

    def apply(self, site: str, layer: int, value: torch.Tensor) -> None:
        """Let the inner hook change the value, then put the clean one in."""
        if self._inner.changes(site, layer):
            self._inner.apply(site, layer, value)
        if (site, layer) == self._where:
            rows = torch.arange(len(value))
            t = self._positions
            if self._heads is None:
                value[rows, t] = self._clean[t]
            else:
                value[rows, t, self._heads] = self._clean[t, self._heads]

    def apply_rows(
        self, site: str, layer: int, sequence: int, block: RowBlock, value: torch.Tensor
    ) -> bool:
        """Leave patterns to the inner hook."""
        return self._inner.apply_rows(site, layer, sequence, block, value)


def patch(
    checkpoint: Checkpoint,
    cases: Sequence[Case],
    sites: Sequence[str] = ("resid", "attn_out", "mlp_out"),
    heads: bool = False,
    layers: Sequence[int] | None = None,
    edits: Sequence[Edit] = (),
    compute: str = "fp32",
) -> xarray.Dataset:
    """Patch every position of every site and layer; return `restored` by site as a dataset.

    `restored` is [pair, layer, position] for each site (resid: depth), by head as well for q, k, v and z where `heads`.
    `edits` apply to all runs. Positions of shorter prompts are at the right end: position −1 is the last of all.
    """
    import xarray

    _check(sites, heads, edits)
    if not cases:
        raise ValueError("there are no pairs to patch; give at least one.")
    model = Model(checkpoint, compute)
    c = checkpoint.config
    n = max(len(case.pair.a) for case in cases)
    data: Variables = {}
    for site in sites:
        dims = ["pair", str(SITES[site].axis), "position"]
        shape = [len(cases), _n_at(site, c), n]
        if heads and site in HEADS:
            dims.append("head")
            shape.append(c.n_head)
        data[site] = tuple(dims), np.full(shape, np.nan, np.float32)
    clean_ld = np.full(len(cases), np.nan)
    corrupt_ld = np.full(len(cases), np.nan)
    for i, case in enumerate(cases):
        one = _Case(model, checkpoint, case, sites, edits)
        clean_ld[i] = one.clean_ld
        corrupt_ld[i] = one.corrupt_ld
        span = one.clean_ld - one.corrupt_ld
        if abs(span) < LEAST:
            span = np.nan
        for site in sites:
            restored = data[site][1]
            for at in range(restored.shape[1]):
                if layers is not None and at not in layers:
                    continue
                patched = one.patched(site, at, by_head=restored.ndim == 4)
                restored[i, at, n - len(patched) :] = (patched - one.corrupt_ld) / span
    coords = {
        "pair": [case.pair.label for case in cases],
        "position": np.arange(-n, 0),
        "layer": np.arange(c.n_layer),
        "depth": np.arange(c.n_layer + 1),
        "head": np.arange(c.n_head),
    }
    data["clean_logit_difference"] = "pair", clean_ld
    data["corrupt_logit_difference"] = "pair", corrupt_ld
    attributes = {"analysis": "patch", "conventions": CONVENTIONS, "edits": [str(e) for e in edits]}
    return xarray.Dataset(data, coords, attributes)


def _n_at(site: str, config: ModelConfig) -> int:
    """Return at how many depths or layers a site can be patched."""
    if SITES[site].axis == "depth":
        return config.n_layer + 1
    return config.n_layer


def _check(sites: Sequence[str], heads: bool, edits: Sequence[Edit]) -> None:
    for site in sites:
        if site not in PATCHABLE:
            raise ValueError(f"--sites has {site}; expected some of {', '.join(PATCHABLE)}.")
    if heads and not set(sites) & set(HEADS):
        raise ValueError(f"--by-head needs one of {', '.join(HEADS)} among --sites.")
    if any(edit.op in ("freeze", "linearise") for edit in edits):
        raise ValueError(
            "freeze and linearise need a reference pass, which patching from the middle has not; leave them out of "
            "--edit."
        )


class _Case:
    """One pair: its clean values, the corrupt residual stream at every depth, and its two logit differences."""

    def __init__(
        self,
        model: Model,
        checkpoint: Checkpoint,
        case: Case,
        sites: Sequence[str],
        edits: Sequence[Edit],
    ) -> None:
        c = model.config
        t = checkpoint.tensors
        self._weight = t["ln_f.weight"].to(model.stream)
        self._bias = t["ln_f.bias"].to(model.stream)
        unembedding = t["wte.weight"] if c.tied else t["lm_head.weight"]
        # LD is linear in the normed state: its product with the difference of two rows of W_U.
        answer = unembedding[case.answer].to(model.stream)
        wrong = unembedding[case.wrong].to(model.stream)
        self._direction = answer - wrong
        self.model = model
        self.case = case
        self.n = len(case.pair.a)
        self.editor = Editor(edits, model, self.n)
        everywhere = {(site, at) for site in sites for at in range(_n_at(site, c))}
        depths = {("resid", depth) for depth in range(c.n_layer + 1)}
        self.clean, self.clean_ld = self._whole(case.pair.a, everywhere)
        self.corrupt, self.corrupt_ld = self._whole(case.pair.b, depths)

    def patched(self, site: str, at: int, by_head: bool) -> np.ndarray:
        """Return LD with each position [T], or each position and head [T, N], of a site patched."""
        rows_at_once = max(POSITIONS_AT_ONCE // self.n, 1)
        positions = torch.arange(self.n)
        if not by_head:
            parts = torch.split(positions, rows_at_once)
            return np.concatenate([self._from(site, at, part, None) for part in parts])
        n_head = self.model.config.n_head
        places = torch.cartesian_prod(positions, torch.arange(n_head))
        found = []
        for part in torch.split(places, rows_at_once):
            found.append(self._from(site, at, part[:, 0], part[:, 1]))
        return np.concatenate(found).reshape(self.n, n_head)

    def _whole(
        self, ids: list[int], wanted: set[tuple[str, int]]
    ) -> tuple[dict[tuple[str, int], torch.Tensor], float]:
        batch = _rows(ids, 1)
        record = RecordHook(wanted)
        bound = self.editor.hook(batch).hook
        with torch.inference_mode():
            x = self.model.run(replace(batch, hook=_Both(bound, record)), NoTap())
            return record.kept, float(self._difference(x)[0])

    def _from(
        self, site: str, at: int, positions: torch.Tensor, heads: torch.Tensor | None
    ) -> np.ndarray:
        """Run a row of the corrupt prompt for each place, from the layer of the site on."""
        batch = _rows(self.case.pair.b, len(positions))
        clean = self.clean[site, at][0]
        hook = PatchRows(site, at, positions, heads, clean, self.editor.hook(batch).hook)
        batch = replace(batch, hook=hook)
        with torch.inference_mode():
            x = self.corrupt["resid", at].expand(len(positions), -1, -1).clone()
            if site == "resid":
                x[torch.arange(len(x)), positions] = clean[positions]
            micro = Micro(0, batch, x)
            walk_layers(self.model, [micro], NoTap(), at, self.model.config.n_layer)
            return np.asarray(self._difference(x).numpy())

    def _difference(self, x: torch.Tensor) -> torch.Tensor:
        """Return LD at the last position."""
        last = x[:, self.n - 1]
        c = self.model.config
        normed = torch.nn.functional.layer_norm(
            last, [c.d_model], self._weight, self._bias, c.layer_norm_epsilon
        )
        return normed @ self._direction


class _Both(NoHook):
    """One hook after another."""

    def __init__(self, first: Hook, second: RecordHook) -> None:
        self._both = first, second

    def prepare(self, model: Forward, layer: int, batch: Batch, tap: Tap) -> None:
        """Prepare both."""
        for hook in self._both:
            hook.prepare(model, layer, batch, tap)

    def changes(self, site: str, layer: int) -> bool:
        """Say yes where one does."""
        return any(hook.changes(site, layer) for hook in self._both)

    def apply(self, site: str, layer: int, value: torch.Tensor) -> None:
        """Apply those that change the site."""
        for hook in self._both:
            if hook.changes(site, layer):
                hook.apply(site, layer, value)

    def apply_rows(
        self, site: str, layer: int, sequence: int, block: RowBlock, value: torch.Tensor
    ) -> bool:
        """Apply those that change the site."""
        changed = False
        for hook in self._both:
            if hook.changes(site, layer):
                changed |= hook.apply_rows(site, layer, sequence, block, value)
        return changed


def _rows(ids: list[int], n: int) -> Batch:
    """Return n rows of one prompt."""
    tokens = np.tile(np.array(ids, np.int32), (n, 1))
    return make_batch(tokens, np.zeros((n, len(ids)), np.int32))
