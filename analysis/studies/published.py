"""Known figures of OpenAI's GPT-2 weights, raw, that a correct extraction meets within 10 % on other text.

By layer: of resid_post. Definitions: Sun et al. 2024 (arXiv 2402.17762) for massive activations; the second half of the
queries is arXiv 2604.14722's convention.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A quantity of `reproduce` at a place (layer, or layer and head), and its published value."""

    quantity: str
    place: tuple[int, ...]
    value: float


LARGEST = {0: 101.6, 1: 610.7, 2: 2475.0, 3: 2648.0, 10: 3021.0, 11: 452.0}
MEDIAN = {0: 0.60, 2: 0.84, 5: 1.28, 10: 2.61}
LAST_64 = (0.0007, 0.003, 0.104, 0.342, 0.367, 0.486, 0.493, 0.543, 0.534, 0.625, 0.535, 0.550)
STRONGEST = {(5, 1): 0.83, (6, 1): 0.80, (7, 2): 0.80}
SMALL = (12, 768)
MEDIUM = (24, 1024)
LARGE = (36, 1280)
SMALL_FIGURES = (
    *(Figure("max_size", (layer,), value) for layer, value in LARGEST.items()),
    Figure("max_dimension", (10,), 447),
    Figure("max_position", (10,), 0),
    *(Figure("median_size", (layer,), value) for layer, value in MEDIAN.items()),
    Figure("mlp_out_447", (2,), 2342.0),
    Figure("neuron_447", (2,), 666),
    Figure("w_out_sigma_1", (2,), 38.3),
    Figure("w_out_sigma_ratio", (2,), 2.52),
    Figure("share_second_half", (), 0.447),
    Figure("share_second_half_40", (), 0.563),
    *(Figure("share_last_64", (layer,), value) for layer, value in enumerate(LAST_64)),
    *(Figure("head_share", place, value) for place, value in STRONGEST.items()),
)
PUBLISHED: dict[tuple[int, int], tuple[Figure, ...]] = {
    SMALL: SMALL_FIGURES,
    MEDIUM: (Figure("share_second_half_40", (), 0.575),),
    LARGE: (Figure("share_second_half_40", (), 0.502),),
}
COORDINATES: dict[tuple[int, int], tuple[int, ...]] = {
    SMALL: (138, 378, 447),
    MEDIUM: (9, 238, 268, 428, 580, 608),
    LARGE: (8, 24, 248, 440, 792, 870),
}
LONG = 512
SHORT = 40
# The positions of the rows that these were published for. A shorter model compares with none.
POSITIONS = {"share_second_half": LONG, "share_second_half_40": SHORT, "share_last_64": LONG}
EXACT = ("max_dimension", "max_position", "neuron_447", "massive_dimensions")
TITLES = {
    "max_size": "largest |resid_post|",
    "max_dimension": "its dimension",
    "max_position": "its position",
    "median_size": "median |resid_post|",
    "mlp_out_447": "|MLP output| into dimension 447 at position 0",
    "neuron_447": "neuron with the largest part in it",
    "w_out_sigma_1": "first singular value of W_out",
    "w_out_sigma_ratio": "first over second singular value of W_out",
    "share_second_half": "first-token share, second half of {n} positions, layers 3 to n − 2",
    "share_second_half_40": "first-token share, second half of {n} positions, layers 3 to n − 2",
    "share_last_64": "first-token share, last {last} of {n} positions",
    "head_share": "first-token share of a head, second half",
    "massive_dimensions": "massive coordinates",
}


def title_of(quantity: str, n_ctx: int) -> str:
    """Return the title of a quantity as it was measured, with the positions that a model of n_ctx allows."""
    n = min(POSITIONS.get(quantity, LONG), n_ctx)
    return TITLES[quantity].format(n=n, last=min(64, n))
