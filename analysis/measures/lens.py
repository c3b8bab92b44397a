"""The logit lens: what every depth of the residual stream predicts when it is read as if it were the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.analysis.engine.analysis import Analysis, Figures, Plot, as_function, rounded
from headwater.analysis.engine.options import COUNT, SOME, setting
from headwater.analysis.engine.reducer import Chunk, Reducer, State, need_sites
from headwater.analysis.engine.results import coordinates, provenance
from headwater.analysis.engine.scan import Prepared, Steps
from headwater.analysis.measures.origin import MODEL_HELP, load_run_model
from headwater.extractor.settings import MODEL, TEXT
from headwater.store.manifest import RunError
from headwater.store.reader import Run

if TYPE_CHECKING:
    import xarray

    from headwater.extractor.model.weights import Checkpoint

QUANTITIES = (
    "kl",
    "top1_agreement",
    "top_k_agreement",
    "entropy",
    "loss",
    "target_rank",
    "target_reciprocal_rank",
)
ROWS = 32
CONVENTIONS = (
    "The residual stream at a depth goes through ln_f and W_U (nostalgebraist 2020); at the last depth this is the "
    "model's output. Means over the sampled positions: `positions` evenly spaced ones of every row, those that are "
    "real and have a next token. kl: KL(final ‖ depth), nats; top1_agreement: the most likely token is the final "
    "one's; top_k_agreement: share of the final k most likely tokens among the k of the depth; entropy and loss (−ln p "
    "of the next token), nats; target_rank: number of tokens more likely than the next one; target_reciprocal_rank: "
    "1/(rank + 1). position_set without_first: a row's first visible key is left out."
)


class Lens(Reducer):
    """Sums of QUANTITIES by depth, of first positions and of the rest.

    Shapes: L depths, D d_model, V d_vocab, n sampled tokens. State: total [2, 7, L] and n [2].
    """

    name = "lens"
    sites = ("resid",)
    joint = True
    tokens = 1

    def __init__(self, run: Run, checkpoint: Checkpoint, n_positions: int, k: int) -> None:
        c = checkpoint.config
        t = checkpoint.tensors
        self.k, self.epsilon = k, c.layer_norm_epsilon
        self.leads = tuple(range(len(run.leads("resid"))))
        self.gamma, self.beta = (t[f"ln_f.{name}"].double().numpy() for name in ("weight", "bias"))
        self.w_u_VD = t["wte.weight" if c.tied else "lm_head.weight"].float().numpy()
        length = run.manifest.n_positions
        self.chosen = np.unique(
            np.linspace(0, max(length - 2, 0), n_positions).round().astype(np.int64)
        )

    def zero(self) -> State:
        """Make an empty state."""
        assert self.leads is not None
        return {"total": np.zeros((2, len(QUANTITIES), len(self.leads))), "n": np.zeros(2)}

    @property
    def working_bytes(self) -> int:
        """Bytes of W_U and of the logits of some rows at two depths."""
        return int(self.w_u_VD.nbytes + 8 * ROWS * len(self.w_u_VD) * 8)

    def update(self, state: State, chunk: Chunk) -> None:
        """Add all depths."""
        assert self.leads is not None
        for s, (ids, start) in enumerate(zip(chunk.tokens_ST, chunk.row_start_ST, strict=True)):
            at = self.chosen[self.chosen < len(ids) - 1]
            at = at[(start[at] <= at) & (start[at + 1] <= at)]
            for low in range(0, len(at), ROWS):
                here = at[low : low + ROWS]
                first = start[here] == here
                state["n"] += first.sum(), (~first).sum()
                final = self._log_p(chunk.at("resid", self.leads[-1])[s, here])
                for lead in self.leads:
                    log_p = self._log_p(chunk.at("resid", lead)[s, here])
                    figures = lens_figures(log_p, final, ids[here + 1], self.k)
                    state["total"][0, :, lead] += figures[:, first].sum(1)
                    state["total"][1, :, lead] += figures[:, ~first].sum(1)

    def _log_p(self, x_nD: np.ndarray) -> np.ndarray:
        """Return the log-probabilities of all tokens: float64 [n, V], the logits computed in float32."""
        x = x_nD.astype(np.float64)
        x -= x.mean(1, keepdims=True)
        x *= self.gamma / np.sqrt((x**2).mean(1, keepdims=True) + self.epsilon)
        x += self.beta
        logits = (x.astype(np.float32) @ self.w_u_VD.T).astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(1, keepdims=True))
        return np.asarray(logits)

    def finalise(self, state: State) -> State:
        """Return the state: `lens` reads it."""
        return state


def lens_figures(
    log_p_nV: np.ndarray, final_nV: np.ndarray, target_n: np.ndarray, k: int
) -> np.ndarray:
    """Return QUANTITIES of every row from log-probabilities at a depth and at the last one: [7, n]."""
    p = np.exp(log_p_nV)
    p_final = np.exp(final_nV)
    top, top_final = (np.argpartition(-x, k - 1, axis=1)[:, :k] for x in (log_p_nV, final_nV))
    own = np.take_along_axis(log_p_nV, target_n[:, None].astype(np.int64), 1)
    rank = (log_p_nV > own).sum(1)
    return np.stack(
        [
            (p_final * (final_nV - log_p_nV)).sum(1),
            log_p_nV.argmax(1) == final_nV.argmax(1),
            (top[:, :, None] == top_final[:, None]).any(1).mean(1),
            -(p * log_p_nV).sum(1),
            -own[:, 0],
            rank,
            1 / (rank + 1),
        ]
    )


@dataclass(frozen=True)
class LensAnalysis(Analysis):
    """Read every stored depth of the residual stream through ln_f and W_U, in one pass.

    `model` is the run's model by default; ValueError if its weights are not those of the run. `n_positions` are sampled
    in every row. Returns a dataset: QUANTITIES [position_set, depth] and n_tokens [position_set].
    """

    name = "lens"
    title = "logit lens at every depth: KL to the output, agreement, rank of the next token"
    needs = (("resid",),)
    section = "What the depths predict"
    brings = ("attribution",)
    plots = (
        Plot(
            "lens",
            "What each depth predicts when it is read as if it were the last.",
            "headwater.analysis.plots.output:lens",
        ),
    )

    model: str | None = setting(None, TEXT, MODEL_HELP, "MODEL", leads=MODEL)
    n_positions: int = setting(
        64, COUNT, "sampled positions of a row", "POSITIONS", flag="--positions"
    )
    k: int = setting(10, SOME, "most likely tokens that are compared", "K")

    def prepare(self, run: Run, state_bytes: int = 0) -> Prepared:
        """Make it ready for the engine; it takes one pass."""
        n_positions = self.n_positions
        k = self.k
        need_sites(run, "resid")
        depths = run.leads("resid")
        n_layer = int(run.manifest.model["config"]["n_layer"])
        if depths[-1] != n_layer or "selected_position" in run.spec("resid").dims:
            raise RunError(
                f"{run.path} holds resid {run['resid'].dims} at depths {depths}; the lens needs every position and the "
                f"last depth, {n_layer}. Extract a run with --sites resid."
            )
        checkpoint = load_run_model(run, self.model)
        if not 1 <= k <= checkpoint.config.d_vocab or n_positions < 1:
            raise ValueError(
                f"k is {k} and n_positions {n_positions}; expected 1 to {checkpoint.config.d_vocab}, and at least 1."
            )

        def steps() -> Steps:
            (state,) = yield [Lens(run, checkpoint, n_positions, k)]
            return _dataset(run, state, prepared)

        prepared = Prepared("lens", 1, steps, {"positions": n_positions, "k": k})
        return prepared

    @staticmethod
    def headline(result: xarray.Dataset) -> Figures:
        """Return KL, agreement and loss by depth, of all positions."""
        return {
            "kl": rounded(result.kl[0]),
            "top1_agreement": rounded(result.top1_agreement[0]),
            "loss": rounded(result.loss[0]),
        }


lens = as_function(LensAnalysis)


def _dataset(run: Run, state: State, prepared: Prepared) -> xarray.Dataset:
    import xarray

    total = np.stack([state["total"].sum(0), state["total"][1]])
    n = np.array([state["n"].sum(), state["n"][1]])
    means = np.where(n[:, None, None] > 0, total / np.maximum(n, 1)[:, None, None], np.nan)
    variables: dict[str, Any] = {
        name: (("position_set", "depth"), means[:, at]) for at, name in enumerate(QUANTITIES)
    }
    variables["n_tokens"] = ("position_set",), n.astype(np.int64)
    coords = coordinates(run, "resid") | {"position_set": ["all", "without_first"]}
    attributes = provenance(run, prepared.name, prepared.arguments, prepared.passes, CONVENTIONS)
    return xarray.Dataset(variables, coords, attributes)
