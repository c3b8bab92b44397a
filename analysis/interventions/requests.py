"""What plateau, patch and ablate are asked: one frozen, checked request each, from flags, a job or Python."""

from __future__ import annotations

import difflib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from headwater.analysis.interventions.settings import (
    CLUSTERS,
    INDICES,
    PATHS,
    PRECISION,
    REAL,
    TARGET,
    TEXT,
    list_of,
    setting,
    whole,
    word,
)
from headwater.extractor.edits.grammar import Edit
from headwater.extractor.settings import EDIT_LINES, EDITS, FILE, MODEL, RUN, SWITCH, read_fields
from headwater.extractor.sites import RequestError
from headwater.store.version import __version__

if TYPE_CHECKING:  # torch and xarray come with them
    import numpy as np
    import xarray as xr

    from headwater.extractor.model.weights import Checkpoint
    from headwater.store.place import Place

SCALES = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2)

# The headings of the help.
MOVE = "what to move"
BESIDES = "what to ask besides"
PATCHED = "what to patch"
SCALED = "what to scale"
INSTEAD = "what to ask instead"
ROWS = "the rows to run"
MODEL_PART = "model and results"


@dataclass(frozen=True, kw_only=True)
class Intervention(ABC):
    """What the three have in common. Raises RequestError for a value that a setting cannot have."""

    model: str | None = setting(
        None,
        TEXT,
        part=MODEL_PART,
        metavar="M",
        help="directory, hub id, nanoGPT's ckpt.pt, or demo (default: that of --run, else demo)",
        leads=MODEL,
    )
    revision: str | None = setting(
        None,
        TEXT,
        part=MODEL_PART,
        metavar="R",
        help="branch, tag or commit of a hub id (default: that of --run)",
    )
    activation: str | None = setting(
        None,
        TEXT,
        part=MODEL_PART,
        metavar="F",
        help="activation function of a checkpoint that does not name one (default: that of --run)",
    )
    tokenizer: str | None = setting(
        None,
        TEXT,
        part=MODEL_PART,
        metavar="T",
        help="tokenizer of the prompts (default: the model's own)",
        leads=MODEL,
    )
    bos: bool = setting(
        False, SWITCH, part=MODEL_PART, help="put the beginning-of-text token in front"
    )
    compute: str = setting(
        "fp32",
        PRECISION,
        part=MODEL_PART,
        metavar="C",
        help="fp32 or fp64",
    )

    # The names of the results that a request can give.
    family: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        read_fields(self)
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Refuse settings that do not go together."""

    @abstractmethod
    def find(self, checkpoint: Checkpoint) -> list[xr.Dataset]:
        """Return the results, one dataset an analysis."""

    def results(self) -> tuple[list[xr.Dataset], Checkpoint]:
        """Load the model and return the results, which say what made them, and the model."""
        from headwater.extractor.model.weights import load_checkpoint

        checkpoint = load_checkpoint(*self.made_from())
        found = self.find(checkpoint)
        made_by = {
            "model": checkpoint.name,
            "model_digest": checkpoint.digest,
            "request": self.identity(checkpoint),
        }
        for dataset in found:
            dataset.attrs |= made_by
        return found, checkpoint

    def identity(self, checkpoint: Checkpoint) -> str:
        """Return a hash of all that the results depend on: settings, files, the run, the weights."""
        from headwater.store.reader import open_run

        sums = [_sum_of(name) for name in self._files()]
        run = getattr(self, "run", None)
        made = ""
        if run is not None:
            made = open_run(run).manifest.fingerprint
        parts = [__version__, self.to_json(), sums, made, checkpoint.digest]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def keep(self, home: Place, found: Sequence[xr.Dataset]) -> tuple[list[Place], list[Path]]:
        """Keep results beside `home`; return where, and where earlier ones of other settings were moved to."""
        from headwater.analysis.engine.results import save, set_aside

        aside = set_aside(home, self.family, found[0].attrs["request"])
        return [save(home, dataset) for dataset in found], aside

    def made_from(self) -> tuple[str, str | None, str | None]:
        """Return the model's name, revision and activation: as named, else as the run was made, else demo's."""
        from headwater.store.reader import open_run

        run = getattr(self, "run", None)
        named = (self.model or "demo", self.revision, self.activation)
        if run is None:
            return named
        made = open_run(run).manifest.model
        if self.model not in (None, made["name"]):
            return named
        activation = self.activation or made["config"]["activation"]
        return made["name"], self.revision or made["revision"], activation

    def to_json(self) -> dict[str, object]:
        """Return the settings that are not as by default as JSON values; `make_request` takes them."""
        found: dict[str, object] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value == item.default:
                continue
            if isinstance(value, Edit):
                value = value.to_json()
            elif item.metadata["leads"] == EDITS:
                value = [edit.to_json() for edit in value]
            found[item.name] = value
        return found

    def _files(self) -> list[str]:
        """Return the files that the settings name."""
        named: list[str] = []
        for item in fields(self):
            if item.metadata["leads"] != FILE:
                continue
            value = getattr(self, item.name)
            if isinstance(value, str):
                named.append(value)
            else:
                named.extend(value or ())
        return named


@dataclass(frozen=True, kw_only=True)
class Plateau(Intervention):
    """Move a state from one prompt's to another's: `pairs`, a file of JSON lines, or one pair, `a` and `b`."""

    family = ("plateau", "plateau_parts", "plateau_heads", "plateau_jacobian")
    pairs: str | None = setting(
        None, TEXT, part=MOVE, metavar="FILE", help="JSON lines with a and b", leads=FILE
    )
    a: str | None = setting(
        None, TEXT, part=MOVE, metavar="TEXT", help="one pair: the prompt whose context it is"
    )
    b: str | None = setting(
        None,
        TEXT,
        part=MOVE,
        metavar="TEXT",
        help="one pair: the prompt to whose state it goes",
    )
    depths: str | None = setting(
        None,
        INDICES,
        part=MOVE,
        metavar="D",
        help="depths of the residual stream to move it at (default: all but the last)",
    )
    paths: tuple[str, ...] = setting(
        ("linear", "slerp"),
        list_of(word("linear", "slerp", "random", "covariance")),
        part=MOVE,
        metavar="P",
        help="linear, slerp (with the norm), and baselines: random, covariance (of --run)",
    )
    steps: int = setting(
        50, whole(3), part=MOVE, metavar="N", help="steps from A to B, both included"
    )
    from_end: int = setting(
        1, whole(1), part=MOVE, metavar="N", help="move the N-th position from the end"
    )
    tau: float = setting(0.1, REAL, part=MOVE, metavar="T", help="distance that ends a plateau")
    parts: bool = setting(
        False,
        SWITCH,
        part=BESIDES,
        help="again with parts frozen or made linear, together and layer by layer",
    )
    heads: bool = setting(
        False,
        SWITCH,
        part=BESIDES,
        help="patterns and outputs of heads, their terms, own scores",
    )
    jacobian: int | None = setting(
        None,
        whole(0),
        part=BESIDES,
        metavar="DEPTH",
        help="norms of the Jacobian along the path from this depth",
    )
    run: str | None = setting(
        None,
        TEXT,
        part=BESIDES,
        metavar="RUN",
        help="run whose residual stream gives the covariance; the results are kept beside it",
        leads=RUN,
    )
    seed: int = setting(0, whole(0), part=BESIDES, metavar="N", help="of the random directions")

    def check(self) -> None:
        """Refuse both pairs and a pair, or neither, and a plateau that would be everywhere or nowhere."""
        if (self.pairs is None) == (self.a is None) or (self.a is None) != (self.b is None):
            raise RequestError("expected either --pairs, or --a together with --b.")
        if not 0 < self.tau < 0.5:
            raise RequestError(f"--tau is {self.tau}; expected a number between 0 and 0.5.")

    def find(self, checkpoint: Checkpoint) -> list[xr.Dataset]:
        """Sweep plateaus."""
        from headwater.analysis.interventions.plateau import check_depths, plateau
        from headwater.analysis.interventions.plateau_heads import head_response
        from headwater.analysis.interventions.plateau_parts import attribute, jacobian
        from headwater.analysis.interventions.prompts import Reader, read_pairs
        from headwater.analysis.interventions.replay import Replay
        from headwater.extractor.selection import parse_indices

        source = self.pairs or [{"a": self.a, "b": self.b}]
        pairs = read_pairs(source, ("a", "b"), Reader(checkpoint, self.tokenizer, self.bos))
        n_layer = checkpoint.config.n_layer
        depths = None
        if self.depths is not None:
            depths = list(parse_indices(self.depths, n_layer, "depths"))
        if self.jacobian is not None:
            check_depths([self.jacobian], n_layer)
        replay = Replay(checkpoint, self.compute)
        found = [
            plateau(
                replay,
                pairs,
                depths,
                n_steps=self.steps,
                paths=list(self.paths),
                n_last=self.from_end,
                tau=self.tau,
                run=self.run,
                seed=self.seed,
            )
        ]
        if self.parts:
            found.append(attribute(replay, pairs, depths, self.steps, self.from_end, self.tau))
        if self.heads:
            found.append(head_response(replay, pairs, depths, self.steps))
        if self.jacobian is not None:
            found.append(jacobian(replay, pairs, self.jacobian, seed=self.seed))
        return found


@dataclass(frozen=True, kw_only=True)
class Patch(Intervention):
    """Patch clean values into corrupt prompts, place by place; `pairs` is a file of JSON lines."""

    family = ("patch",)
    pairs: str | None = setting(
        None,
        TEXT,
        part=PATCHED,
        metavar="FILE",
        help="JSON lines with clean, corrupt, answer, wrong",
        leads=FILE,
    )
    sites: tuple[str, ...] = setting(
        ("resid", "attn_out", "mlp_out"),
        list_of(TEXT),
        part=PATCHED,
        metavar="A,B",
        help="resid, resid_mid, attn_out, mlp_out, q, k, v, z, mlp_pre, mlp_post",
    )
    by_head: bool = setting(False, SWITCH, part=PATCHED, help="patch q, k, v and z head by head")
    layers: str | None = setting(
        None,
        INDICES,
        part=PATCHED,
        metavar="L",
        help="layers (and depths) to patch (default: all)",
    )
    edits: tuple[Edit, ...] = setting(
        (),
        EDIT_LINES,
        part=PATCHED,
        metavar="EDIT",
        help="change the model in all runs",
        flag="--edit",
        leads=EDITS,
    )

    def check(self) -> None:
        """Refuse a request without pairs."""
        if self.pairs is None:
            raise RequestError(
                "--pairs is missing; name a file of JSON lines with clean, corrupt, answer and wrong."
            )

    def find(self, checkpoint: Checkpoint) -> list[xr.Dataset]:
        """Patch pairs."""
        from headwater.analysis.interventions.patching import patch, read_cases
        from headwater.analysis.interventions.prompts import Reader, read_pairs
        from headwater.extractor.selection import parse_indices

        assert self.pairs is not None
        reader = Reader(checkpoint, self.tokenizer, self.bos)
        cases = read_cases(read_pairs(self.pairs, ("clean", "corrupt"), reader), reader)
        layers = None
        if self.layers is not None:
            layers = parse_indices(self.layers, checkpoint.config.n_layer + 1, "layers")
        found = patch(
            checkpoint,
            cases,
            sites=list(self.sites),
            heads=self.by_head,
            layers=layers,
            edits=list(self.edits),
            compute=self.compute,
        )
        return [found]


@dataclass(frozen=True, kw_only=True)
class Ablate(Intervention):
    """Scale what is at a place, measure effects, or probe repeated tokens, on the rows of a run, ids or text."""

    family = ("ablate", "effects", "repeated")
    target: Edit | None = setting(  # noqa: RUF009 (a setting is a field)
        None,
        TARGET,
        part=SCALED,
        metavar="PLACE",
        help="a site and selections as in --edit: 'resid[3] position=first dim=447'",
        leads=EDITS,
    )
    scales: tuple[float, ...] = setting(
        SCALES, list_of(REAL), part=SCALED, metavar="S", help="factors, 1 changes nothing"
    )
    sweep: str | None = setting(
        None,
        word("depth", "layer", "position", "head", "dim"),
        part=SCALED,
        metavar="DIM",
        help="depth, layer, position, head or dim: one chosen index after another",
    )
    hold: bool = setting(
        False,
        SWITCH,
        part=SCALED,
        help="keep it at its scaled value at every chosen depth",
    )
    no_gradient: bool = setting(False, SWITCH, part=SCALED, help="leave the derivatives out")
    edits: tuple[Edit, ...] = setting(
        (),
        EDIT_LINES,
        part=SCALED,
        metavar="EDIT",
        help="change the model besides, at scale 1 too",
        flag="--edit",
        leads=EDITS,
    )
    effects: bool = setting(
        False,
        SWITCH,
        part=INSTEAD,
        help="direct and total effects of every head and MLP on the loss",
    )
    repeated: tuple[str, ...] = setting(
        (),
        CLUSTERS,
        part=INSTEAD,
        metavar="IDS",
        help="rows of one token again and again, one row for each of 262,13, or drawn from a cluster, 464+383: what "
        "the first layers' heads do",
    )
    lengths: tuple[int, ...] = setting(
        (16, 64),
        list_of(whole(2)),
        part=INSTEAD,
        metavar="N,M",
        help="lengths of repeated rows",
    )
    first_layers: int = setting(
        3, whole(1), part=INSTEAD, metavar="N", help="layers to look at for --repeated"
    )
    run: str | None = setting(
        None,
        TEXT,
        part=ROWS,
        metavar="RUN",
        help="the tokens and the model of a run; the results are kept beside it",
        leads=RUN,
    )
    tokens: str | None = setting(
        None,
        TEXT,
        part=ROWS,
        metavar="IDS.npy",
        help="token ids [sequence, position], -1 for padding",
        leads=FILE,
    )
    text: tuple[str, ...] = setting(
        (), PATHS, part=ROWS, metavar="PATH", help="files of text", leads=FILE
    )
    seq_len: int | None = setting(
        None,
        whole(1),
        part=ROWS,
        metavar="N",
        help="positions in a row, for --text (default: as many as the model has)",
    )
    max_sequences: int = setting(8, whole(1), part=ROWS, metavar="N", help="rows to take")

    def check(self) -> None:
        """Refuse a request that asks nothing, or that names no rows, or several kinds of them."""
        if self.target is None and not self.effects and not self.repeated:
            raise RequestError(
                "expected --target, --effects or --repeated, so that there is something to measure."
            )
        n_rows = (self.run is not None) + (self.tokens is not None) + bool(self.text)
        if n_rows != 1 and (self.target is not None or self.effects):
            raise RequestError("expected one of --run, --tokens and --text: the rows to run.")

    def find(self, checkpoint: Checkpoint) -> list[xr.Dataset]:
        """Ablate by scale, measure effects, probe repeated tokens."""
        from headwater.analysis.interventions.ablation import ablate
        from headwater.analysis.interventions.effects import effects

        found = []
        if self.target is not None or self.effects:
            tokens, row_start = self.rows(checkpoint)
        if self.target is not None:
            scaled = ablate(
                checkpoint,
                tokens,
                self.target,
                scales=list(self.scales),
                row_start=row_start,
                sweep=self.sweep,
                hold=self.hold,
                edits=list(self.edits),
                compute=self.compute,
                gradient=not self.no_gradient and not self.edits,
            )
            found.append(scaled)
        if self.effects:
            found.append(effects(checkpoint, tokens, row_start, self.compute))
        if self.repeated:
            found.append(self.probe(checkpoint))
        return found

    def probe(self, checkpoint: Checkpoint) -> xr.Dataset:
        """Return what the first layers' heads do on rows of repeated tokens."""
        from headwater.analysis.interventions.prompts import first_token
        from headwater.analysis.measures.repeated import repeated
        from headwater.extractor.model.forward import Model
        from headwater.extractor.tokenizer import load_tokenizer

        home = self.tokenizer or checkpoint.tokenizer
        bos = None
        if self.bos:
            coder = None if home is None else load_tokenizer(home)
            bos = first_token(checkpoint, coder)
        written = ",".join(self.repeated)
        found: xr.Dataset = repeated(
            Model(checkpoint, self.compute),
            [_cluster(part) for part in written.split(",")],
            lengths=list(self.lengths),
            bos=bos,
            n_layers=self.first_layers,
            edits=list(self.edits),
        )
        return found

    def rows(self, checkpoint: Checkpoint) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and row starts [sequence, position] of a run, a file of ids, or text."""
        import numpy as np

        from headwater.extractor.request import RunConfig
        from headwater.extractor.text.source import Source
        from headwater.store.reader import open_run

        most = self.max_sequences
        if self.run is not None:
            run = open_run(self.run)
            if run.manifest.model["digest"] != checkpoint.digest:
                raise RequestError(
                    f"the weights of {checkpoint.name} are not those that {self.run} was made with. Leave "
                    "--model out, or name that model."
                )
            return run.tokens[:most], run.plain("row_start")[:most]
        config = RunConfig(out=".", max_sequences=most, tokens=self.tokens)
        if self.text:
            config = RunConfig(
                out=".",
                max_sequences=most,
                text=self.text,
                seq_len=self.seq_len,
                tokenizer=self.tokenizer,
                bos=self.bos,
            )
        rows = list(Source(config, checkpoint.config, checkpoint.tokenizer).rows())
        tokens = np.concatenate([part.tokens for part in rows])
        return tokens, np.concatenate([part.row_start for part in rows])


REQUESTS: dict[str, type[Intervention]] = {"plateau": Plateau, "patch": Patch, "ablate": Ablate}


def make_request(kind: str, settings: Mapping[str, Any]) -> Intervention:
    """Return a checked request; raise RequestError for an unknown setting, by its name, or a wrong value."""
    known = [item.name for item in fields(REQUESTS[kind])]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise RequestError(
                f"{str(name)[:80]!r} is no setting of {kind}{hint} Settings are {', '.join(known)}."
            )
    return REQUESTS[kind](**settings)


def _cluster(text: str) -> int | list[int]:
    """Read one token id, or several that a row is drawn from: 464+383."""
    ids = [int(part) for part in text.split("+")]
    if len(ids) == 1:
        return ids[0]
    return ids


def _sum_of(name: str) -> str:
    """Return the digest of a file; the name itself of what is none, such as a folder or a pattern of names."""
    path = Path(name)
    if not path.is_file():
        return name
    return hashlib.sha256(path.read_bytes()).hexdigest()
