"""What all pictures share: colours that every kind of sight can tell apart, and axes in tokens."""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, MultipleLocator

SIDE = 512  # cells a side of a map, at most: more than a picture's pixels

# Okabe and Ito's colours, in an order that stays apart in grey too.
LINES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")

HIDDEN, DROPPED, CUT, KEPT = "#ffffff", "#d9d9d9", "#e69f00", "#08519c"
ERROR = "#d55e00"
MASS = "viridis_r"  # of a block's share of its row's mass, on a log scale
DIFFERENCE = "PuOr"  # orange: too little, purple: too much
FAINTEST_SHARE = 1e-4  # of a block row's mass: fainter blocks take the palest colour


def share_norm() -> LogNorm:
    return LogNorm(FAINTEST_SHARE, 1, clip=True)


def edges(cells: Sequence[int], tokens: Sequence[int], lengths: Sequence[int]) -> list[np.ndarray]:
    """Where cells of so many tokens begin and the last one ends, in tokens: for each axis its number of cells + 1."""
    sizes = zip(cells, tokens, lengths, strict=True)
    return [np.minimum(np.arange(count + 1) * step, length) for count, step, length in sizes]


def token_axes(axes: Iterable[Axes], Lq: int, Lk: int) -> None:
    """Queries downwards, keys to the right, both in tokens, to scale."""
    for axis in axes:
        axis.set(xlim=(0, Lk), ylim=(Lq, 0), aspect="equal")
        for side, length in ((axis.xaxis, Lk), (axis.yaxis, Lq)):
            tokens_along(side, length)


def tokens_along(side, length: int) -> None:
    """About five round ticks of tokens along one matplotlib axis."""
    side.set_major_locator(MultipleLocator(2 ** max(0, (length // 5).bit_length())))
    side.set_major_formatter(FuncFormatter(lambda tokens, _: short(tokens)))


def short(tokens: float) -> str:
    """2,048, but 128K and 1M where more digits would not fit."""
    for unit, letter in ((2**20, "M"), (2**10, "K")):
        if tokens >= 16 * 2**10 and tokens % unit == 0:
            return f"{tokens / unit:.0f}{letter}"
    return f"{tokens:,.0f}"
