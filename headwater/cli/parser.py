"""The arguments of every command, with their help."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

import headwater
from headwater.cli import analyses as analysis_commands
from headwater.cli import dynamics as dynamics_commands
from headwater.cli import interventions as intervention_commands
from headwater.cli import project as project_commands
from headwater.cli import reproduce as reproduce_commands
from headwater.cli import runs as commands
from headwater.cli import service as service_commands

# Each area has its arguments in a module with NAMES and add_commands(group, make).
AREAS: tuple[ModuleType, ...] = (
    analysis_commands,
    project_commands,
    intervention_commands,
    dynamics_commands,
    reproduce_commands,
    service_commands,
)
NAMES = (
    "extract",
    "plan",
    "status",
    "verify",
    "info",
    "sites",
    *(name for area in AREAS for name in area.NAMES),
)
SELECTIONS = ("--layers", "--depths", "--heads", "--positions", "--at", "--units", "--outliers")
START = """start here:
  headwater extract --model demo --text README.md --out run --preset all
  headwater info run

`headwater COMMAND --help` explains a command. Results go to standard output, progress and errors to standard error.
Exit codes: 0 done; 1 failed while it ran, what was finished is kept; 2 wrong request, nothing was touched; 130 stopped.
"""
EXTRACT = """\
Run the model over text and store the chosen sites in a run: a directory of Zarr arrays.

Stop it whenever you like (Ctrl-C, a crash): finished blocks are kept, and the same command goes on
where it stopped. On a finished run it does nothing."""
EXTRACT_EXAMPLES = """examples:
  headwater extract --model demo --text README.md --out run
  headwater extract --model gpt2 --text corpus/ --out run --preset statistics --seq-len 512
  headwater extract --model gpt2 --text pile.jsonl --column text --labels source --mode document --out run
  headwater extract --model gpt2 --tokens ids.npy --sites resid,pattern --layers 0,4:8 --depths 4:9 --out run
  headwater extract --out run                      go on with an unfinished run
"""
STORED = """how values are stored:
  residual streams, q, k, v, z, neurons and patterns as float16 unless --dtype says otherwise, statistics
  as float32, indices as int32. A value too large for float16 stops the run; see --on-overflow.
"""


class UsageError(ValueError):
    """The command line cannot be read."""


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and which help to read."""
        raise UsageError(f"{message.removeprefix('argument ')}. See `{self.prog} --help`.")


def read_arguments(arguments: Sequence[str]) -> Any:
    """Return the command and its options; raise UsageError, or SystemExit after printing a help text."""
    if not arguments:
        raise UsageError(
            f"a command is missing; expected one of {', '.join(NAMES)}. See `headwater --help`."
        )
    if not arguments[0].startswith("-") and arguments[0] not in NAMES:
        raise UsageError(
            f"there is no command {arguments[0]!r}{_near(arguments[0], NAMES)} Expected one of {', '.join(NAMES)}. See "
            "`headwater --help`."
        )
    options, unknown = make_parser().parse_known_args(_attach(arguments))
    if not hasattr(options, "command"):
        raise UsageError(
            f"{unknown[0]!r} stands where a command is expected. See `headwater --help`."
        )
    if unknown:
        flags = re.findall(
            r"--[a-z-]+", options.parser.format_usage() + options.parser.format_help()
        )
        hint = (
            ""
            if unknown[0].startswith("-")
            else " Lists are written with commas, such as --sites resid,pattern."
        )
        raise UsageError(
            f"{unknown[0]!r} is not an argument of `{options.parser.prog}`{_near(unknown[0], flags)}{hint} See "
            f"`{options.parser.prog} --help`."
        )
    return options


def make_parser() -> Parser:
    """Build the parser of all commands."""
    parser = Parser(
        prog="headwater",
        usage="headwater COMMAND [arguments]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run a GPT-2-family model over text and store what happens inside it as Zarr arrays.",
        epilog=START,
    )
    parser.add_argument("--version", action="version", version=f"headwater {headwater.__version__}")
    group = parser.add_subparsers(title="commands", metavar="COMMAND", prog="headwater")
    extract = _command(
        group, "extract", commands.run_extract, "run a model over text and store the chosen sites"
    )
    extract.description = EXTRACT
    extract.epilog = f"{STORED}\n{EXTRACT_EXAMPLES}"
    extract.usage = "headwater extract --out RUN (--text PATH … | --tokens IDS.npy) [more of the arguments below]"
    plan = _command(
        group, "plan", commands.run_plan, "show what `extract` would write and need; write nothing"
    )
    plan.description = (
        "Show what `headwater extract` with the same arguments would write, array by array, and how much disk and "
        "memory\nit needs. Reads the text to count it, but not the weights. Exit code 2 where it cannot fit."
    )
    plan.usage = "headwater plan (--text PATH … | --tokens IDS.npy) [more of the arguments below]"
    plan.epilog = "example:\n  headwater plan --model gpt2 --text corpus/ --preset patterns --max-sequences 1000\n"
    for parser_ in (extract, plan):
        _add_extraction(parser_)
    plan.add_argument(
        "--assume",
        metavar="RATES",
        help="rates of the machine that will run it, for the projected "
        "speed: compute=300,link=25,disk=2.5 (TFLOP/s, GB/s, GB/s)",
    )
    status = _command(
        group,
        "status",
        commands.run_status,
        "show how much of a run is done, and where its time went",
    )
    verify = _command(
        group, "verify", commands.run_verify, "read a run again and compare it with its checksums"
    )
    verify.description = (
        "Read every file of a run and compare it with the length and checksum that were recorded when it was written.\n"
        "Problems are printed one a line, by path. Exit code 1 where any is left. Blocks that are not computed yet are "
        "no problem."
    )
    info = _command(
        group, "info", commands.run_info, "describe a run: model, text, arrays, and how to open it"
    )
    for parser_ in (status, verify, info):
        parser_.add_argument("run", metavar="RUN", help="directory of a run, finished or not")
    verify.add_argument(
        "--quick", action="store_true", help="compare only lengths and shard indexes"
    )
    verify.add_argument(
        "--repair",
        action="store_true",
        help="take damaged blocks out of the run; `headwater extract --out RUN` then computes them again",
    )
    verify.add_argument(
        "--workers", type=_number, default=2, metavar="N", help="files read at once (default: 2)"
    )
    sites = _command(group, "sites", commands.run_sites, "list what can be captured")
    sites.description = (
        "List the sites: names for --sites, what they are, their dimensions, and their names in TransformerLens, which "
        "--sites takes too."
    )
    sites.add_argument(
        "--model", metavar="M", help="show the sizes that the dimensions have for this model"
    )
    for area in AREAS:
        area.add_commands(group, _command)
    return parser


def _command(group: Any, name: str, function: Callable[[Any], int], text: str) -> Parser:
    parser: Parser = group.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=function, parser=parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _add_extraction(parser: Parser) -> None:
    """Add the arguments of `extract`; their names are the fields of RunConfig, which checks the values."""

    def group(title: str, flags: dict[str, tuple[str, str]]) -> None:
        part = parser.add_argument_group(title)
        for flag, (metavar, text) in flags.items():
            kind: dict[str, Any] = (
                {"metavar": metavar} if metavar else {"action": "store_true", "default": None}
            )
            if metavar in ("N", "K", "B"):
                kind["type"] = _number
            if metavar == "PATH":
                kind |= {"nargs": "+", "action": "extend"}
            part.add_argument(flag, help=text, **kind)

    group(
        "model, text and place",
        {
            "--model": (
                "M",
                "directory in Hugging Face's format, nanoGPT's ckpt.pt, a hub id such as gpt2, or demo, a "
                "small trained model that comes with Headwater (default: demo)",
            ),
            "--revision": ("R", "branch, tag or commit of a hub id"),
            "--activation": (
                "F",
                "activation function of a checkpoint that does not name one, as nanoGPT's: gelu_new (by tanh), "
                "relu, … (default: gelu, exact, for nanoGPT)",
            ),
            "--text": (
                "PATH",
                "files (.txt .md .jsonl .csv .tsv .parquet .arrow; text, lines and CSV also as .gz .bz2 .xz .zst or "
                ".zip; anything else is plain text), directories, globs, pipes, or - for standard input",
            ),
            "--tokens": (
                "IDS.npy",
                "instead of text: whole numbers [sequence, position], -1 for padding at either end, or one long row to "
                "be cut at --seq-len; .npy, .npz, .pt, or .bin (uint16, as nanoGPT writes)",
            ),
            "--out": ("RUN", "directory to make; if it is an unfinished run, go on with it"),
            "--config": (
                "FILE",
                "TOML file of these arguments (seq_len = 512); what is given here wins over it",
            ),
        },
    )
    group(
        "how text becomes sequences of tokens",
        {
            "--seq-len": ("N", "positions in a sequence (default: as many as the model has)"),
            "--mode": (
                "MODE",
                "pack: join documents and cut full sequences; document: one sequence for each "
                "document, cut at --seq-len or padded (default: pack)",
            ),
            "--stride": (
                "N",
                "make several sequences, each N tokens after the one before, of a document (with --mode document) or a "
                "row of --tokens that is longer than a sequence; tokens that two of them hold are computed twice",
            ),
            "--within-documents": (
                "",
                "with pack: attention and positions start anew at each document of a sequence",
            ),
            "--bos": ("", "begin each sequence with the beginning-of-text token"),
            "--special-tokens": (
                "S",
                "what special tokens such as <|endoftext|> that stand in the text become: ids, as in transformers, or "
                "text, ordinary pieces (default: ids)",
            ),
            "--max-sequences": ("N", "stop after N sequences"),
            "--max-tokens": ("N", "stop after N tokens"),
            "--tokenizer": (
                "T",
                "tokenizer.json, its directory, or a hub id (default: the model's own)",
            ),
            "--column": (
                "NAME",
                "column or JSON key that holds the text, lists of token ids (input_ids), or the turns of a "
                "conversation (default: text)",
            ),
            "--labels": ("A,B", "columns to keep beside the sequences, as label_A, label_B"),
            "--jsonl": ("", "read standard input, and files of whatever name, as JSON lines"),
            "--max-unpacked": (
                "N",
                "bytes that one compressed file may unpack to (default: 128 GiB)",
            ),
        },
    )
    group(
        "what to capture",
        {
            "--preset": (
                "P",
                "residual, patterns (with residual), statistics (small: no vectors, no patterns) or all "
                "(default: residual)",
            ),
            "--sites": (
                "A,B",
                "sites by name instead of a preset, such as resid,pattern or blocks.3.hook_resid_post; "
                "`headwater sites` lists them",
            ),
            "--layers": ("L", "layers from 0: 3, 0,4:8 (4 to 7), :2, -1 (the last) (default: all)"),
            "--depths": (
                "D",
                "depths of the residual stream: 0 the embeddings, d what layer d - 1 left (default: all)",
            ),
            "--heads": ("H", "heads (default: all)"),
            "--positions": (
                "P",
                "positions of residual streams, q, k, v, z and neurons: 0:16, or last, the last token of "
                "each sequence (default: all)",
            ),
            "--top-k": ("K", "how many of the largest logits top_logits keeps (default: 10)"),
        },
    )
    part = parser.add_argument_group("what to change on the way (docs/interventions.md)")
    part.add_argument(
        "--edit",
        dest="edits",
        action="append",
        metavar="EDIT",
        help="change a value, once or several times: 'resid[4] position=first dim=447 scale=0.5'. A site, then any of "
        "position, token, head, dim, key, then scale, set, zero, add, mean, patch, freeze, linearise, noise or call",
    )
    part.add_argument(
        "--allow-call",
        action="append",
        metavar="MODULE:NAME",
        help="let the edits of a run that goes on, or of --config, call this function; a file alone never runs code",
    )
    group(
        "how to compute and store",
        {
            "--compute": (
                "C",
                "fp32, bf16 or fp16 for products with weights; the rest is fp32 (default: fp32)",
            ),
            "--dtype": (
                "D",
                "float16 or float32, with exceptions: float16,resid=float32 (default: float16)",
            ),
            "--codec": (
                "C",
                "none, zstd-1 or zstd-3, with exceptions: none,pattern=zstd-1 (default: none)",
            ),
            "--on-overflow": (
                "O",
                "what to do with values that float16 cannot hold: fail, or keep them as infinity "
                "(default: fail)",
            ),
            "--block": (
                "B",
                "sequences that are finished together, a power of two (default: about 16,000 tokens)",
            ),
            "--device": (
                "D",
                "cpu, or cuda (cuda:1) to compute with the kernels on a GPU (default: cpu)",
            ),
            "--threads": (
                "N",
                "processor threads of each worker (default: all cores, shared among the workers)",
            ),
            "--workers": (
                "N",
                "worker processes, through Ray; 0 computes in this one (default: 0)",
            ),
            "--ray": (
                "ADDRESS",
                "Ray cluster to use: auto, or its address; every node must see --out",
            ),
            "--other-processor": (
                "",
                "go on with a run that another kind of processor, torch or Headwater began, or with workers "
                "of one; last bits may differ",
            ),
        },
    )


def _near(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word.partition("=")[0], words, 1)
    return f"; did you mean {near[0]}?" if near else "."


def _number(text: str) -> int | str:
    """Read a whole number; leave anything else to RunConfig, which refuses it."""
    try:
        return int(text)
    except ValueError:
        return text


def _attach(arguments: Sequence[str]) -> list[str]:
    """Join a selection that begins with a minus sign to its flag, since argparse takes `-2:` for a flag."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in SELECTIONS and re.match(r"-\d", argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined
