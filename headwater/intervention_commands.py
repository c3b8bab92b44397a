"""The commands that intervene: plateau, patch, ablate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.commands import DONE
from headwater.intervention_arguments import add_ablate, add_patch, add_plateau
from headwater.show import print_json

if TYPE_CHECKING:
    from headwater.store.place import Place

NAMES = ("plateau", "patch", "ablate")


def add_commands(group: Any, make: Any) -> None:
    """Add the commands to the parser."""
    add_plateau(make(group, "plateau", run_plateau, "move a state from one prompt's to another's, and see plateaus"))
    add_patch(make(group, "patch", run_patch, "patch clean activations into a corrupt prompt, place by place"))
    add_ablate(make(group, "ablate", run_ablate, "scale what is at a place, and see loss, sinks and gradients"))


def run_plateau(options: Any) -> int:
    """Sweep plateaus; keep and print the results."""
    from headwater.analysis.plateau import check_depths, plateau
    from headwater.analysis.plateau_heads import head_response
    from headwater.analysis.plateau_parts import attribute, jacobian
    from headwater.analysis.prompts import Reader, read_pairs
    from headwater.analysis.replay import Replay
    from headwater.extractor.selection import parse_indices
    from headwater.extractor.weights import load_checkpoint

    if (options.pairs is None) == (options.a is None) or (options.a is None) != (options.b is None):
        raise ValueError("expected either --pairs, or --a together with --b.")
    steps, n_last, seed = (_whole(options, name, low) for name, low in (("steps", 3), ("from_end", 1), ("seed", 0)))
    tau = _real(options, "tau")
    if not 0 < tau < 0.5:
        raise ValueError(f"--tau is {options.tau}; expected a number between 0 and 0.5.")
    checkpoint = load_checkpoint(_model(options))
    source = options.pairs or [{"a": options.a, "b": options.b}]
    pairs = read_pairs(source, ("a", "b"), Reader(checkpoint, options.tokenizer, options.bos))
    n_layer = checkpoint.config.n_layer
    depths = None if options.depths is None else list(parse_indices(options.depths, n_layer, "depths"))
    at = None if options.jacobian is None else _whole(options, "jacobian", 0)
    if at is not None:
        check_depths([at], n_layer)
    replay = Replay(checkpoint, options.compute)
    found = [plateau(replay, pairs, depths, steps, options.paths.split(","), n_last, tau, options.run, seed)]
    if options.parts:
        found.append(attribute(replay, pairs, depths, steps, n_last, tau))
    if options.heads:
        found.append(head_response(replay, pairs, depths, steps))
    if at is not None:
        found.append(jacobian(replay, pairs, at, seed=seed))
    return _report(options, found, checkpoint)


def run_patch(options: Any) -> int:
    """Patch pairs; keep and print the results."""
    from headwater.analysis.patching import patch, read_cases
    from headwater.analysis.prompts import Reader, read_pairs
    from headwater.extractor.edits import read_edits
    from headwater.extractor.selection import parse_indices
    from headwater.extractor.weights import load_checkpoint

    if options.pairs is None:
        raise ValueError("--pairs is missing; name a file of JSON lines with clean, corrupt, answer and wrong.")
    edits = read_edits(options.edits or ())
    checkpoint = load_checkpoint(_model(options))
    reader = Reader(checkpoint, options.tokenizer, options.bos)
    cases = read_cases(read_pairs(options.pairs, ("clean", "corrupt"), reader), reader)
    sites = [name.strip() for name in options.sites.split(",")]
    layers = None if options.layers is None else parse_indices(options.layers, checkpoint.config.n_layer + 1, "layers")
    found = patch(checkpoint, cases, sites, options.by_head, layers, edits, options.compute)
    return _report(options, [found], checkpoint)


def run_ablate(options: Any) -> int:
    """Ablate by scale, measure effects or probe repeated tokens; keep and print the results."""
    from headwater.analysis.ablation import ablate
    from headwater.analysis.effects import effects
    from headwater.analysis.repeated import repeated
    from headwater.extractor.edits import OPS, parse_edit, read_edits
    from headwater.extractor.model import Model
    from headwater.extractor.weights import load_checkpoint

    asked = [name for name in ("target", "effects", "repeated") if getattr(options, name)]
    if not asked:
        raise ValueError("expected --target, --effects or --repeated, so that there is something to measure.")
    edits = read_edits(options.edits or ())
    target = None
    if options.target:
        has_op = any(word.partition("=")[0] in OPS for word in options.target.split()[1:])
        target = parse_edit(options.target if has_op else f"{options.target} scale=1")
    scales = _reals(options.scales, "scales")
    lengths = [_count(text, "lengths", 2) for text in options.lengths.split(",")]
    first_layers = _whole(options, "first_layers", 1)
    checkpoint = load_checkpoint(_model(options))
    found = []
    if asked != ["repeated"]:
        tokens, row_start = _rows(options, checkpoint)
    if target is not None:
        found.append(ablate(checkpoint, tokens, target, scales, row_start, options.sweep, options.hold, edits,
                            options.compute, not options.no_gradient and not edits))  # fmt: skip
    if options.effects:
        found.append(effects(checkpoint, tokens, row_start, options.compute))
    if options.repeated:
        bos = checkpoint.config.bos_token_id if options.bos else None
        model = Model(checkpoint, options.compute)
        clusters = [_cluster(part) for text in options.repeated for part in text.split(",")]
        found.append(repeated(model, clusters, lengths, bos, first_layers, edits))
    return _report(options, found, checkpoint)


def _model(options: Any) -> str:
    """Return the model that is named, or that of the run."""
    if options.model is None and getattr(options, "run", None):
        from headwater.store.reader import open_run

        return str(open_run(options.run).manifest.model["name"])
    return options.model or "demo"


def _rows(options: Any, checkpoint: Any) -> tuple[Any, Any]:
    """Return token ids and row starts of a run, a file of ids, or text."""
    import numpy as np

    from headwater.extractor.config import RunConfig
    from headwater.extractor.source import Source
    from headwater.store.reader import open_run

    most = _whole(options, "max_sequences", 1)
    if sum(x is not None for x in (options.run, options.tokens, options.text)) != 1:
        raise ValueError("expected one of --run, --tokens and --text: the rows to run.")
    if options.run:
        run = open_run(options.run)
        if run.manifest.model["digest"] != checkpoint.digest:
            raise ValueError(f"the weights of {checkpoint.name} are not those that {options.run} was made with. Leave "
                             "--model out, or name that model.")  # fmt: skip
        return run.tokens[:most], run.plain("row_start")[:most]
    length = None if options.seq_len is None else _whole(options, "seq_len", 1)
    text = {"text": tuple(options.text)} if options.text else {"tokens": options.tokens}
    more = {"seq_len": length, "tokenizer": options.tokenizer, "bos": options.bos} if options.text else {}
    config = RunConfig(out=".", max_sequences=most, **text, **more)
    rows = list(Source(config, checkpoint.config, checkpoint.tokenizer).rows())
    tokens, row_start = (np.concatenate([getattr(part, name) for part in rows]) for name in ("tokens", "row_start"))
    return tokens, row_start


def _report(options: Any, found: Sequence[Any], checkpoint: Any) -> int:
    """Keep results, draw them where asked, and print their figures."""
    from headwater.analysis.intervention_figures import headline
    from headwater.analysis.results import save
    from headwater.store.place import place_of

    home = place_of(options.out or getattr(options, "run", None) or options.parser.prog.split()[-1])
    paths = []
    for dataset in found:
        dataset.attrs |= {"model": checkpoint.name, "model_digest": checkpoint.digest}
        paths.append(save(home, dataset))
    figures = _draw(options, found, home) if options.plot else []
    lines = [headline(dataset) for dataset in found]
    if options.json:
        print_json([{"analysis": d.attrs["analysis"], "path": str(path), "figures": figure}
                    for d, path, figure in zip(found, paths, lines, strict=True)])  # fmt: skip
        return DONE
    for dataset, path, figure in zip(found, paths, lines, strict=True):
        print(f"{dataset.attrs['analysis']}")
        for label, value in figure.items():
            print(f"  {label:34} {value if isinstance(value, str) else _shown(value)}")
        print(f"  kept in {path}")
    for file in figures:
        print(f"drew {file}")
    return DONE


def _draw(options: Any, found: Sequence[Any], home: Place) -> list[Path]:
    from headwater.analysis.plots import draw, save_figures
    from headwater.analysis.results import RunResults

    results = RunResults(home.name, {dataset.attrs["analysis"]: dataset for dataset in found}, home)
    return save_figures(draw([results]), Path(options.plot))


def _shown(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return " ".join("-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)


def _whole(options: Any, name: str, least: int) -> int:
    return _count(getattr(options, name), name, least)


def _count(text: Any, name: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise ValueError(f"--{name.replace('_', '-')} has {text!r}; expected whole numbers from {least} on.")
    return value


def _real(options: Any, name: str) -> float:
    return _reals(getattr(options, name), name)[0]


def _reals(text: str, name: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name} is {text!r}; expected numbers such as 0,0.5,1.") from None


def _cluster(text: str) -> int | list[int]:
    ids = [_count(part, "repeated", 0) for part in text.split("+")]
    return ids[0] if len(ids) == 1 else ids
