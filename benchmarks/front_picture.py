"""The picture of the project's front page: a real head's attention, the blocks that are kept of it, what that saves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.capture import capture
from benchmarks.front_page import CARD, Call, row_of
from benchmarks.tables import CHIEF, Row
from rr_flex import RRConfig, Selection, select_blocks
from rr_flex.evaluation.measures import density, recalled_mass
from rr_flex.evaluation.texts import sample_text
from rr_flex.evaluation.true_mass import true_block_mass
from rr_flex.mass import row_share
from rr_flex.models.loading import EMBEDDED_MODEL, load_causal_lm
from rr_flex.view.plots.style import DROPPED, KEPT, LINES, share_norm, token_axes

TOKENS, LAYER, HEAD = 8192, 9, 4  # a head that looks at single places far back, beside the sink and its neighbours
CONFIG = RRConfig.from_preset("best")
LENGTHS = (16384, 32768, 65536, 131072)
DENSITY = 0.3


def draw(rows: Sequence[Row], path: Path) -> None:
    """`rows`: those of the benchmarks. Loads SmolLM2, on a CPU."""
    model, tokenizer = load_causal_lm()
    q, k, _ = (x.float() for x in capture(model, tokenizer, sample_text("prose", 1), TOKENS, [LAYER]))
    selection = select_blocks(q, k, config=CONFIG)
    figure = Figure(figsize=(12.6, 4.5), layout="constrained")
    axes = figure.subplots(1, 3)
    true_mass = true_block_mass(q, k, block_size=CONFIG.block_sizes)
    draw_mass(axes[0], true_mass[0, HEAD], selection)
    recalled = recalled_mass(true_mass, selection.kept)[0, HEAD].item()
    draw_kept(axes[1], selection, recalled)
    token_axes(axes[:2], TOKENS, TOKENS)
    axes[0].set_ylabel("query (token)")
    for axis in axes[:2]:
        axis.set_xlabel("key (token)")
    draw_times(axes[2], rows)
    where = f"{EMBEDDED_MODEL}, layer {LAYER}, head {HEAD}, {TOKENS:,} tokens"
    measured = f"{CARD}, 32 heads of 128, bfloat16, FLASH, order 2, strides 16/8"
    figure.supxlabel(f"1, 2: {where}, preset “best”     3: {measured}", fontsize=9)
    figure.savefig(path, dpi=120)


def draw_mass(axis: Axes, true_mass, selection: Selection) -> None:
    share = np.ma.masked_where(~selection.visible[0, 0].numpy(), row_share(true_mass).numpy())
    axis.pcolormesh(*edges(), share, cmap="Blues", norm=share_norm())
    axis.set_title("1  Where one head really looks\n(darker: more of a row's attention)", fontsize=11)


def draw_kept(axis: Axes, selection: Selection, recalled: float) -> None:
    visible, kept = selection.visible[0, 0].numpy(), selection.kept[0, HEAD].numpy()
    axis.pcolormesh(*edges(), np.ma.masked_where(~visible, kept), cmap=ListedColormap([DROPPED, KEPT]))
    share = density(selection.kept, selection.visible)[0, HEAD].item()
    axis.set_title(f"2  The blocks rr_flex keeps: {share:.0%}\nthey hold {recalled:.0%} of the attention", fontsize=11)
    colours = [Patch(facecolor=KEPT, label="computed"), Patch(facecolor=DROPPED, label="skipped")]
    axis.legend(handles=colours, loc="upper right", frameon=False)


def edges() -> tuple[np.ndarray, np.ndarray]:
    """Of the blocks, in tokens: along keys, along queries."""
    q_block, k_block = CONFIG.block_sizes
    return np.arange(0, TOKENS + 1, k_block), np.arange(0, TOKENS + 1, q_block)


def draw_times(axis: Axes, rows: Sequence[Row]) -> None:
    """Of one layer, both axes linear: so the square of the length is seen."""
    found = [row_of(Call("", length, f"{CHIEF} flash", density=DENSITY), rows) for length in LENGTHS]
    for name, field, colour in (("dense", "fastest_dense_ms", LINES[5]), ("rr_flex", "total_ms", KEPT)):
        times = [row[field] for row in found]
        axis.plot(LENGTHS, times, color=colour, marker="o", markersize=5, linewidth=2.5)
        axis.annotate(
            f"{name}\n{times[-1]:.0f} ms",
            (LENGTHS[-1], times[-1]),
            (8, -8),
            textcoords="offset points",
            color=colour,
            weight="bold",
        )
    axis.set_title(f"3  Time of one layer's attention\nat a density of {DENSITY:.0%}, estimate included", fontsize=11)
    axis.set(xlabel="length (tokens)", ylabel="milliseconds", xlim=(0, LENGTHS[-1] * 1.3), ylim=(0, None))
    axis.set_xticks(LENGTHS[1:], [f"{length // 1024}K" for length in LENGTHS[1:]])
    axis.grid(alpha=0.3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
