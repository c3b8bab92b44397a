"""Make the pictures of the documentation from the packaged model. Run it from the repository's root.

    python docs/make_pictures.py [--work DIR]

The run and its results are kept in --work, so that a second call only draws.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import headwater
from headwater.cli.entry import main as command

DOCS = Path(__file__).parent
LAYER, HEAD, SEQUENCE, N_SHOWN = 2, 1, 14, 150
FIGURES = (
    "phases",
    "depth_cosine",
    "norms",
    "block_influence",
    "spectra",
    "dimensions",
    "sink_layers",
    "sink_map",
    "received",
    "words",
    "false_sinks",
    "massive_depth",
    "massive_made",
    "lens",
    "attribution",
    "head_pairs",
)


def demo_run(work: Path) -> Path:
    """Extract and analyse what `make demo` extracts, or take what is kept."""
    run = work / "demo-run"
    flags = ["--config", str(DOCS / "demo.toml"), "--text", json.__path__[0], "--out", str(run)]
    if command(["extract", *flags]) or command(["analyze", str(run)]):
        raise SystemExit("the demo run could not be made")
    return run


def token_strings(run: Path) -> dict[int, str]:
    """Read the run's own tokenizer; line breaks stay line breaks."""
    vocabulary = json.loads((run / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    return {i: token.replace("Ġ", " ").replace("Ċ", "\n") for token, i in vocabulary.items()}


def draw_tinted_text(axes: plt.Axes, words: list[str], weight: np.ndarray) -> None:
    """Write the tokens in a fixed-width font, each on a ground as dark as its weight."""
    column, line = 0, 0
    for word, share in zip(words, weight, strict=True):
        ground = {"facecolor": plt.cm.Blues(0.85 * share), "edgecolor": "none", "pad": 0.6}
        shown = word.replace("\n", "↵")
        ink = "white" if share > 0.6 else "black"
        axes.text(column, -line, shown, family="monospace", size=7.6, color=ink, bbox=ground)
        column += len(shown)
        if "\n" in word:
            column = len(word) - word.rindex("\n") - 1
            line += 1
    axes.set(xlim=(-0.5, 68), ylim=(-line - 0.6, 1))
    axes.axis("off")


def line_breaks(run: Path) -> plt.Figure:
    """Show one head that looks at line breaks: its pattern, and the text tinted by what it looks at."""
    opened = headwater.open_run(run)
    names = token_strings(run)
    ids = opened.plain("tokens")[SEQUENCE, :N_SHOWN]
    words = ["" if i == 0 else names[int(i)] for i in ids]
    pattern = np.asarray(opened["pattern"][LAYER, SEQUENCE, HEAD], np.float32)[:N_SHOWN, :N_SHOWN]
    # What a key is given by the 24 queries behind it: longer reach would favour early keys.
    received = np.array([pattern[k + 1 : k + 25, k].sum() for k in range(N_SHOWN)])
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 3.9), width_ratios=[1, 1.35], layout="constrained"
    )
    shown = left.imshow(pattern, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    left.set(title=f"layer {LAYER}, head {HEAD}: attention", xlabel="key", ylabel="query")
    left.spines[["top", "right"]].set_visible(False)
    figure.colorbar(shown, ax=left, shrink=0.6, label="share of attention")
    draw_tinted_text(right, words, received / received.max())
    right.set_title("the same text: the darker, the more the tokens after it look there")
    return figure


def share_on_line_breaks(run: Path) -> float:
    """Return the mean share of attention that the head gives to tokens that begin with a line break."""
    opened = headwater.open_run(run)
    names = token_strings(run)
    breaks = [i for i, name in names.items() if name.startswith("\n")]
    ids = opened.plain("tokens")[...]
    pattern = np.asarray(opened["pattern"][LAYER, :, HEAD], np.float32)
    half = ids.shape[1] // 2
    share = np.einsum("sqk,sk->sq", pattern, np.isin(ids, breaks).astype(np.float32))
    return float(share[:, half:].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", default="build/pictures", help="where the run is kept")
    work = Path(parser.parse_args().work)
    run = demo_run(work)
    line_breaks(run).savefig(DOCS / "images/line-breaks.png", dpi=110)
    print(f"layer {LAYER} head {HEAD}, on line breaks: {share_on_line_breaks(run):.3f}")
    flags = ["--figures", ",".join(FIGURES), "--format", "png", "--out", str(work / "plots")]
    command(["plot", str(run), *flags])
    for name in FIGURES:
        made = next((work / "plots").glob(f"{name}*.png"))
        shutil.copy(made, DOCS / "images" / f"{name}.png")


if __name__ == "__main__":
    main()
