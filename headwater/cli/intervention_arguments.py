"""The arguments of the commands that intervene: plateau, patch, ablate."""

from __future__ import annotations

from typing import Any

SCALES = "0,0.25,0.5,0.75,1,1.25,1.5,2"
PLATEAU = """\
Move the residual stream at one depth and position from prompt A's state to prompt B's, in A's context, and see how flat
the output is: curves and widths at every later depth and at the logits, for many pairs and depths at once.

PAIRS.jsonl has one pair a line, text or lists of token ids: {"a": "The house is", "b": "The river was"}"""
PLATEAU_EXAMPLES = """examples:
  headwater plateau --model gpt2 --a "The house is" --b "The river was" --depths 0,2,6
  headwater plateau --model gpt2 --pairs pairs.jsonl --parts --heads          what makes the plateaus, layer by layer
  headwater plateau --model gpt2 --pairs pairs.jsonl --run run --paths linear,random,covariance
"""
PATCH = """\
Put clean values into a corrupt run, one site, layer and position (and head) at a time, and see how much of the logit
difference between the right and the wrong answer comes back.

PAIRS.jsonl has lines of equally long prompts: {"clean": "…", "corrupt": "…", "answer": " Paris", "wrong": " Rome"}"""
PATCH_EXAMPLES = """examples:
  headwater patch --model gpt2 --pairs capitals.jsonl
  headwater patch --model gpt2 --pairs capitals.jsonl --sites z --by-head --layers 6:12
"""
ABLATE = """\
Scale what is at a place over a grid and see what depends on it: loss, mass on the first key by layer and head, norms
and cosines of the residual stream, and the derivatives of loss and first-token shares by the scale at 1."""
ABLATE_EXAMPLES = """examples:
  headwater ablate --run run --target 'resid[3] position=first dim=447'
  headwater ablate --run run --target 'resid[3:] position=first dim=447' --hold --scales 0,0.5,1,1.5,2
  headwater ablate --model gpt2 --text book.txt --seq-len 256 --target 'z[5]' --sweep head --scales 0
  headwater ablate --run run --effects                       what the loss needs, head by head: directly and in total
  headwater ablate --model gpt2 --repeated 262,13 --repeated 464+383+632 --lengths 16,64,256
"""


def add_plateau(parser: Any) -> None:
    """Add the arguments of `plateau`."""
    parser.description = PLATEAU
    parser.epilog = PLATEAU_EXAMPLES
    parser.usage = (
        "headwater plateau (--pairs PAIRS.jsonl | --a TEXT --b TEXT) [more of the arguments below]"
    )
    _add(
        parser,
        "what to move",
        {
            "--pairs": ("FILE", "JSON lines with a and b"),
            "--a": ("TEXT", "one pair: the prompt whose context it is"),
            "--b": ("TEXT", "one pair: the prompt to whose state it goes"),
            "--depths": (
                "D",
                "depths of the residual stream to move it at (default: all but the last)",
            ),
            "--paths": (
                "P",
                "linear, slerp (with the norm), and baselines: random, covariance (of --run) (default: "
                "linear,slerp)",
            ),
            "--steps": ("N", "steps from A to B, both included (default: 50)"),
            "--from-end": ("N", "move the N-th position from the end (default: 1)"),
            "--tau": ("T", "distance that ends a plateau (default: 0.1)"),
        },
    )
    _add(
        parser,
        "what to ask besides",
        {
            "--parts": ("", "again with parts frozen or made linear, together and layer by layer"),
            "--heads": ("", "patterns and outputs of heads, their terms, own scores"),
            "--jacobian": ("DEPTH", "norms of the Jacobian along the path from this depth"),
            "--run": (
                "RUN",
                "run whose residual stream gives the covariance; the results are kept beside it",
            ),
            "--seed": ("N", "of the random directions (default: 0)"),
        },
    )
    _add_model(parser)


def add_patch(parser: Any) -> None:
    """Add the arguments of `patch`."""
    parser.description = PATCH
    parser.epilog = PATCH_EXAMPLES
    parser.usage = "headwater patch --pairs PAIRS.jsonl [more of the arguments below]"
    _add(
        parser,
        "what to patch",
        {
            "--pairs": ("FILE", "JSON lines with clean, corrupt, answer, wrong"),
            "--sites": (
                "A,B",
                "resid, resid_mid, attn_out, mlp_out, q, k, v, z, mlp_pre, mlp_post (default: "
                "resid,attn_out,mlp_out)",
            ),
            "--by-head": ("", "patch q, k, v and z head by head"),
            "--layers": ("L", "layers (and depths) to patch (default: all)"),
            "--edit": ("EDIT", "change the model in all runs"),
        },
    )
    _add_model(parser)


def add_ablate(parser: Any) -> None:
    """Add the arguments of `ablate`."""
    parser.description = ABLATE
    parser.epilog = ABLATE_EXAMPLES
    parser.usage = "headwater ablate (--run RUN | --tokens IDS.npy | --text PATH …) --target PLACE [more below]"
    _add(
        parser,
        "what to scale",
        {
            "--target": (
                "PLACE",
                "a site and selections as in --edit: 'resid[3] position=first dim=447'",
            ),
            "--scales": ("S", f"factors, 1 changes nothing (default: {SCALES})"),
            "--sweep": (
                "DIM",
                "depth, layer, position, head or dim: one chosen index after another",
            ),
            "--hold": ("", "keep it at its scaled value at every chosen depth"),
            "--no-gradient": ("", "leave the derivatives out"),
            "--edit": ("EDIT", "change the model besides, at scale 1 too"),
        },
    )
    _add(
        parser,
        "what to ask instead",
        {
            "--effects": ("", "direct and total effects of every head and MLP on the loss"),
            "--repeated": (
                "IDS",
                "rows of one token again and again, one row for each of 262,13, or drawn from a cluster, "
                "464+383: what the first layers' heads do",
            ),
            "--lengths": ("N,M", "lengths of repeated rows (default: 16,64)"),
            "--first-layers": ("N", "layers to look at for --repeated (default: 3)"),
        },
    )
    _add(
        parser,
        "the rows to run",
        {
            "--run": ("RUN", "the tokens and the model of a run; the results are kept beside it"),
            "--tokens": ("IDS.npy", "token ids [sequence, position], -1 for padding"),
            "--text": ("PATH", "files of text"),
            "--seq-len": (
                "N",
                "positions in a row, for --text (default: as many as the model has)",
            ),
            "--max-sequences": ("N", "rows to take (default: 8)"),
        },
    )
    _add_model(parser)


def _add_model(parser: Any) -> None:
    _add(
        parser,
        "model and results",
        {
            "--model": (
                "M",
                "directory, hub id, nanoGPT's ckpt.pt, or demo (default: that of --run, else demo)",
            ),
            "--activation": (
                "F",
                "activation function of a checkpoint that does not name one (default: that of --run)",
            ),
            "--tokenizer": ("T", "tokenizer of the prompts (default: the model's own)"),
            "--bos": ("", "put the beginning-of-text token in front"),
            "--compute": ("C", "fp32 or fp64 (default: fp32)"),
            "--out": (
                "NAME",
                "keep the results in NAME.analysis (default: beside --run, else here)",
            ),
            "--plot": ("DIR", "draw the results as .png files in DIR"),
        },
    )


def _add(parser: Any, title: str, flags: dict[str, tuple[str, str]]) -> None:
    """Add a group of flags; those that can be given several times are collected."""
    part = parser.add_argument_group(title)
    for flag, (metavar, text) in flags.items():
        kind: dict[str, Any] = {"metavar": metavar} if metavar else {"action": "store_true"}
        if flag in ("--edit", "--repeated"):
            kind |= {"action": "append", "dest": "edits" if flag == "--edit" else "repeated"}
        if flag == "--text":
            kind |= {"nargs": "+", "action": "extend"}
        part.add_argument(flag, help=text, **kind)
