"""The command that asks one question of several models: study."""

from __future__ import annotations

from argparse import Namespace

from headwater.cli.command import DONE, Command, Parser, add_options
from headwater.cli.show import print_json

NAMES = ("transition", "phases", "massive", "repeated", "plateaus", "heads")
TEXT = ("text", "tokens", "seq_len", "bos", "max_sequences", "tokenizer", "revision")
ABOUT = """\
Ask a question of one model or several, which all read the same text. A run of each is kept in --out with its results,
so that the same command goes on where it was stopped. OUT/NAME.md is the answer as a page with its figures,
OUT/NAME.json as numbers.

  transition   where early, distributed attention ends, and whether the weights change there
  phases       whether the residual stream goes through phases over depth
  massive      which activations are massive, what makes them, and what the loss says of their size
  repeated     whether repeated tokens look like a first one
  plateaus     whether the output follows a state in plateaus, and which part makes them
  heads        whether heads of a layer work against each other; second favourites"""
EXAMPLES = """examples:
  headwater study phases demo --text book.txt --bos --max-sequences 32 --out study
  headwater study transition gpt2 gpt2-medium --text book.txt --corpus books/ --out study
"""


def add_study(parser: Parser) -> None:
    """Add the arguments of `study`."""
    from headwater.extractor.request import RunConfig

    parser.description = ABOUT
    parser.epilog = EXAMPLES
    parser.usage = (
        "headwater study NAME MODEL … (--text PATH … | --tokens IDS.npy) --out DIR [more …]"
    )
    parser.add_argument("study", metavar="NAME", help=f"one of {', '.join(NAMES)}")
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="models as `extract --model` takes them"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for runs, page and figures")
    parser.add_argument(
        "--corpus",
        metavar="PATH",
        nargs="+",
        help="for transition: text whose co-occurrences score the weights (default: that of the run)",
    )
    add_options(parser, RunConfig, TEXT)


def run_study(options: Namespace) -> int:
    """Ask the study and print its answers."""
    from headwater.analysis.studies import questions, study
    from headwater.extractor.request import RunConfig

    asked = questions.study_of(options.study)
    if options.out is None:
        raise ValueError("--out is missing; name a folder for the runs and the answer.")
    settings = {name: value for name in TEXT if (value := getattr(options, name)) is not None}
    chosen = asked()
    if options.corpus is not None:
        if not isinstance(chosen, questions.TransitionStudy):
            raise ValueError(f"--corpus is for the study transition; {options.study} takes none.")
        chosen = questions.TransitionStudy(corpus=tuple(options.corpus))
    requests = [RunConfig(out=options.out, model=model, **settings) for model in options.models]
    found = study.run_study(chosen, requests, options.out)
    if options.json:
        print_json(study.plain(found.answers))
        return DONE
    print(chosen.question)
    for answer in found.answers:
        print()
        width = max(map(len, answer))
        for name, value in answer.items():
            print(f"  {name:<{width}}  {study.write_value(value)}")
    print(f"\n{chosen.reading}\n\nThe page is {found.page}.")
    return DONE


COMMANDS = (
    Command(
        "study",
        "answer a question about one model or several, with its figures",
        add_study,
        run_study,
    ),
)
