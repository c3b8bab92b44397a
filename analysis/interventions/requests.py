"""What plateau, patch and ablate are asked: one frozen, checked request each, from flags, a job or Python."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import headwater
from headwater.extractor.edits.grammar import INDICES, Edit, read_edits, read_target
from headwater.extractor.settings import flag_of
from headwater.extractor.sites import RequestError

if TYPE_CHECKING:  # torch and xarray come with them
    from headwater.extractor.model.weights import Checkpoint
    from headwater.store.place import Place

# What a setting names, for those who check where it lies: a file to read, a model, a run, edits.
FILE = "file"
MODEL = "model"
RUN = "run"
EDITS = "edits"
SCALES = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2)
MOST = 10**6


def _setting(default: Any, read: Callable[[str, Any], Any], names: str = "") -> Any:
    return field(default=default, metadata={"read": read, "names": names})


def _text(flag: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{flag} is {value!r}; expected text.")
    return value


def _switch(flag: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{flag} is {value!r}; expected true or false.")
    return value


def _whole(least: int) -> Callable[[str, Any], int]:
    def read(flag: str, value: Any) -> int:
        number = least - 1
        if isinstance(value, int) and not isinstance(value, bool):
            number = value
        elif isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value.strip()):
            number = int(value)
        if not least <= number <= MOST:
            raise RequestError(
                f"{flag} has {value!r}; expected whole numbers from {least} on (to {MOST:,})."
            )
        return number

    return read


def _real(flag: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RequestError(f"{flag} is {value!r}; expected numbers such as 0,0.5,1.")
    return number


def _each(read: Callable[[str, Any], Any]) -> Callable[[str, Any], tuple[Any, ...]]:
    """Read a list, which may be text with commas, item by item."""

    def read_list(flag: str, value: Any) -> tuple[Any, ...]:
        items = value.split(",") if isinstance(value, str) else value
        items = items if isinstance(items, list | tuple) else [items]
        if not items:
            raise RequestError(f"{flag} is {value!r}; expected at least one.")
        return tuple(read(flag, item.strip() if isinstance(item, str) else item) for item in items)

    return read_list


def _indices(flag: str, value: Any) -> str:
    items = value if isinstance(value, list | tuple) else [value]
    text = "".join(",".join(map(str, items)).split())
    if not INDICES.fullmatch(text):
        raise RequestError(f"{flag} is {value!r}; expected numbers and ranges, such as 0,4:8.")
    return text


def _paths(flag: str, value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(_text(flag, item) for item in items)


def _clusters(flag: str, value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list | tuple) else [value]
    for item in items:
        if isinstance(item, bool) or not re.fullmatch(r"[0-9]{1,9}([+,][0-9]{1,9})*", str(item)):
            raise RequestError(
                f"{flag} has {item!r}; expected token ids such as 262,13 or 464+383."
            )
    return tuple(map(str, items))


def _compute(flag: str, value: Any) -> str:
    if value not in ("fp32", "fp64"):
        raise RequestError(f"{flag} is {value!r}; expected fp32 or fp64.")
    return str(value)


def _edits(flag: str, value: Any) -> tuple[Edit, ...]:
    return read_edits(value)


def _target(flag: str, value: Any) -> Edit:
    return read_target(value)


@dataclass(frozen=True, kw_only=True)
class Intervention(ABC):
    """What the three have in common. Raises RequestError for a value that a setting cannot have."""

    model: str | None = _setting(None, _text, MODEL)
    revision: str | None = _setting(None, _text)
    activation: str | None = _setting(None, _text)
    tokenizer: str | None = _setting(None, _text, MODEL)
    bos: bool = _setting(False, _switch)
    compute: str = _setting("fp32", _compute)

    # The names of the results that a request can give.
    family: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None or item.default is not None:
                object.__setattr__(
                    self, item.name, item.metadata["read"](flag_of(item.name), value)
                )
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Refuse settings that do not go together."""

    @abstractmethod
    def find(self, checkpoint: Checkpoint) -> list[Any]:
        """Return the results, one dataset an analysis."""

    def results(self) -> tuple[list[Any], Checkpoint]:
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

        sums = []
        for item in fields(self):
            value = getattr(self, item.name)
            if value and item.metadata["names"] == FILE:
                for name in (value,) if isinstance(value, str) else value:
                    path = Path(name)
                    sums.append(
                        hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else name
                    )
        run = getattr(self, "run", None)
        made = "" if run is None else open_run(run).manifest.fingerprint
        parts = [headwater.__version__, self.to_json(), sums, made, checkpoint.digest]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def keep(self, home: Place, found: Sequence[Any]) -> tuple[list[Place], list[Path]]:
        """Keep results beside `home`; return where, and where earlier ones of other settings were moved to."""
        from headwater.analysis.engine.results import save, set_aside

        aside = set_aside(home, self.family, found[0].attrs["request"])
        return [save(home, dataset) for dataset in found], aside

    def made_from(self) -> tuple[str, str | None, str | None]:
        """Return the model's name, revision and activation: as named, else as the run was made, else demo's."""
        from headwater.store.reader import open_run

        run = getattr(self, "run", None)
        made = None if run is None else open_run(run).manifest.model
        if made is None or self.model not in (None, made["name"]):
            return self.model or "demo", self.revision, self.activation
        activation = self.activation or made["config"]["activation"]
        return made["name"], self.revision or made["revision"], activation

    def to_json(self) -> dict[str, Any]:
        """Return the settings that are not as by default as JSON values; `make_request` takes them."""
        found = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value != item.default:
                found[item.name] = value
                if item.metadata["names"] == EDITS:
                    edits = (value,) if isinstance(value, Edit) else value
                    listed = [edit.to_json() for edit in edits]
                    found[item.name] = listed[0] if isinstance(value, Edit) else listed
        return found


@dataclass(frozen=True, kw_only=True)
class Plateau(Intervention):
    """Move a state from one prompt's to another's: `pairs`, a file of JSON lines, or one pair, `a` and `b`."""

    family = ("plateau", "plateau_parts", "plateau_heads", "plateau_jacobian")
    pairs: str | None = _setting(None, _text, FILE)
    a: str | None = _setting(None, _text)
    b: str | None = _setting(None, _text)
    depths: str | None = _setting(None, _indices)
    paths: tuple[str, ...] = _setting(("linear", "slerp"), _each(_text))
    steps: int = _setting(50, _whole(3))
    from_end: int = _setting(1, _whole(1))
    tau: float = _setting(0.1, _real)
    parts: bool = _setting(False, _switch)
    heads: bool = _setting(False, _switch)
    jacobian: int | None = _setting(None, _whole(0))
    run: str | None = _setting(None, _text, RUN)
    seed: int = _setting(0, _whole(0))

    def check(self) -> None:
        """Refuse both pairs and a pair, or neither, and a plateau that would be everywhere or nowhere."""
        if (self.pairs is None) == (self.a is None) or (self.a is None) != (self.b is None):
            raise RequestError("expected either --pairs, or --a together with --b.")
        if not 0 < self.tau < 0.5:
            raise RequestError(f"--tau is {self.tau}; expected a number between 0 and 0.5.")

    def find(self, checkpoint: Checkpoint) -> list[Any]:
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
                self.steps,
                list(self.paths),
                self.from_end,
                self.tau,
                self.run,
                self.seed,
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
    pairs: str | None = _setting(None, _text, FILE)
    sites: tuple[str, ...] = _setting(("resid", "attn_out", "mlp_out"), _each(_text))
    by_head: bool = _setting(False, _switch)
    layers: str | None = _setting(None, _indices)
    edits: tuple[Edit, ...] = _setting((), _edits, EDITS)

    def check(self) -> None:
        """Refuse a request without pairs."""
        if self.pairs is None:
            raise RequestError(
                "--pairs is missing; name a file of JSON lines with clean, corrupt, answer and wrong."
            )

    def find(self, checkpoint: Checkpoint) -> list[Any]:
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
        sites = list(self.sites)
        return [
            patch(checkpoint, cases, sites, self.by_head, layers, list(self.edits), self.compute)
        ]


@dataclass(frozen=True, kw_only=True)
class Ablate(Intervention):
    """Scale what is at a place, measure effects, or probe repeated tokens, on the rows of a run, ids or text."""

    family = ("ablate", "effects", "repeated")
    target: Edit | None = _setting(None, _target, EDITS)  # noqa: RUF009
    scales: tuple[float, ...] = _setting(SCALES, _each(_real))
    sweep: str | None = _setting(None, _text)
    hold: bool = _setting(False, _switch)
    no_gradient: bool = _setting(False, _switch)
    edits: tuple[Edit, ...] = _setting((), _edits, EDITS)
    effects: bool = _setting(False, _switch)
    repeated: tuple[str, ...] = _setting((), _clusters)
    lengths: tuple[int, ...] = _setting((16, 64), _each(_whole(2)))
    first_layers: int = _setting(3, _whole(1))
    run: str | None = _setting(None, _text, RUN)
    tokens: str | None = _setting(None, _text, FILE)
    text: tuple[str, ...] = _setting((), _paths, FILE)
    seq_len: int | None = _setting(None, _whole(1))
    max_sequences: int = _setting(8, _whole(1))

    def check(self) -> None:
        """Refuse a request that asks nothing, or that names no rows, or several kinds of them."""
        if self.target is None and not self.effects and not self.repeated:
            raise RequestError(
                "expected --target, --effects or --repeated, so that there is something to measure."
            )
        n_rows = (self.run is not None) + (self.tokens is not None) + bool(self.text)
        if n_rows != 1 and (self.target is not None or self.effects):
            raise RequestError("expected one of --run, --tokens and --text: the rows to run.")

    def find(self, checkpoint: Checkpoint) -> list[Any]:
        """Ablate by scale, measure effects, probe repeated tokens."""
        from headwater.analysis.interventions.ablation import ablate
        from headwater.analysis.interventions.effects import effects
        from headwater.analysis.interventions.prompts import first_token
        from headwater.analysis.measures.repeated import repeated
        from headwater.extractor.model.forward import Model
        from headwater.extractor.tokenizer import load_tokenizer

        found = []
        if self.target is not None or self.effects:
            tokens, row_start = self.rows(checkpoint)
        if self.target is not None:
            found.append(
                ablate(
                    checkpoint,
                    tokens,
                    self.target,
                    list(self.scales),
                    row_start,
                    self.sweep,
                    self.hold,
                    list(self.edits),
                    self.compute,
                    not self.no_gradient and not self.edits,
                )
            )
        if self.effects:
            found.append(effects(checkpoint, tokens, row_start, self.compute))
        if self.repeated:
            home = self.tokenizer or checkpoint.tokenizer
            coder = None if home is None else load_tokenizer(home)
            bos = first_token(checkpoint, coder) if self.bos else None
            clusters = [_cluster(part) for text in self.repeated for part in text.split(",")]
            found.append(
                repeated(
                    Model(checkpoint, self.compute),
                    clusters,
                    list(self.lengths),
                    bos,
                    self.first_layers,
                    list(self.edits),
                )
            )
        return found

    def rows(self, checkpoint: Checkpoint) -> tuple[Any, Any]:
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
    ids = [int(part) for part in text.split("+")]
    return ids[0] if len(ids) == 1 else ids
