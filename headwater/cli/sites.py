"""The command that lists what can be captured: sites."""

from __future__ import annotations

from argparse import Namespace

from headwater.cli.command import DONE, Command, Parser
from headwater.cli.show import print_json

ABOUT = """\
List the sites: names for --sites, what they are, their dimensions, and their names in TransformerLens, which --sites
takes too."""


def add_sites(parser: Parser) -> None:
    """Add the arguments of `sites`."""
    parser.description = ABOUT
    parser.add_argument(
        "--model", metavar="M", help="show the sizes that the dimensions have for this model"
    )


def run_sites(options: Namespace) -> int:
    """List the sites, with their sizes for a model where one is named."""
    sizes: dict[str, int] = {}
    if options.model:
        sizes = _sizes(options.model)
    if options.json:
        print_json(_sites_json(sizes))
    else:
        _print_sites(sizes)
    return DONE


def _sizes(model: str) -> dict[str, int]:
    """Return how long each dimension is for a model."""
    from headwater.extractor.model.weights import read_config

    config = read_config(model)
    return {
        "layer": config.n_layer,
        # One more than layers: depth 0 is the embeddings, depth d what layer d - 1 left.
        "depth": config.n_layer + 1,
        "head": config.n_head,
        "d_model": config.d_model,
        "d_head": config.d_head,
        "d_mlp": config.d_mlp,
        "d_vocab": config.d_vocab,
    }


def _sites_json(sizes: dict[str, int]) -> dict[str, object]:
    from headwater.extractor.sites import SITES

    found: dict[str, object] = {}
    for site in SITES.values():
        found[site.name] = {
            "dims": site.dims,
            "title": site.title,
            "transformer_lens": site.alias,
            "sizes": {dim: sizes[dim] for dim in site.dims if dim in sizes},
        }
    return found


def _print_sites(sizes: dict[str, int]) -> None:
    from headwater.extractor.sites import PRESETS, SITES

    # Two lines a site: one does not fit a terminal.
    for site in SITES.values():
        dims = ", ".join(f"{dim} {sizes.get(dim, '')}".strip() for dim in site.dims)
        alias = ""
        if site.alias:
            alias = f"  {site.alias.format('L')}"
        print(f"{site.name:15} {site.title}")
        print(f"{'':15} ({dims}){alias}")
    print("\npresets")
    for name, members in PRESETS.items():
        listed = ", ".join(members)
        if name == "all":
            others = [site for site in SITES if site not in members]
            listed = f"every site but {', '.join(others)}"
        print(f"  {name:11} {listed}")


COMMANDS = (Command("sites", "list what can be captured", add_sites, run_sites),)
