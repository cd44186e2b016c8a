"""Pictures hold the numbers they were given, at 8 blocks and at 2,048; what a notebook shows can be read back."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex
from PIL import Image

from mask_mods import both, causal, document, documents_from_lengths, sliding_window
from rr_flex import create_rr_block_mask, select_blocks
from rr_flex.view import drawing
from rr_flex.view.drawing import CUT, DROPPED, HIDDEN, KEPT, block_mask_html, blocks_of
from rr_flex.view.plots import (
    HeadMap,
    block_map_figure,
    density_figure,
    dynamic_blocks_figure,
    mask_figure,
    model_figure,
    row_budget_figure,
    top_tau_figure,
)
from rr_flex.view.plots.style import LINES, short


@pytest.fixture(scope="module")
def selection():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 1000, 16, generator=generator) * 2 for heads in (4, 2))
    return select_blocks(q, k, tau=0.6, min_length=0)


def head_map(n: int) -> HeadMap:
    """Every row's mass lies on its first block and its diagonal, half each; those two are kept."""
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    mass = torch.eye(n)
    mass[:, 0] += 1
    return HeadMap(title="head", true_mass=mass, estimated_mass=mass, kept=mass > 0, visible=visible)


def meshes(figure) -> list[np.ma.MaskedArray]:
    return [np.ma.array(c.get_array()) for axis in figure.axes for c in axis.collections if isinstance(c, QuadMesh)]


def test_eight_blocks_are_drawn_one_by_one():
    columns = ("true", "estimate", "difference", "kept")
    figure = block_map_figure([head_map(8)], Lq=1000, Lk=1000, block_size=(128, 128), columns=columns)
    true, estimate, difference, kept = meshes(figure)[:4]
    for mesh in (true, estimate, difference, kept):
        assert mesh.shape == (8, 8)
        np.testing.assert_array_equal(np.ma.getmaskarray(mesh), ~np.tri(8, dtype=bool))
    assert true[5, 0] == true[5, 5] == 0.5 and true[0, 0] == 1 and true[5, 3] == 0
    assert abs(difference).max() == 0
    assert kept.filled(0).sum() == 8 + 7
    axis = figure.axes[0]
    assert axis.get_xlim() == (0, 1000) and axis.get_ylim() == (1000, 0)
    # The last block is short: 1000 − 7 · 128 tokens.
    mesh = next(c for c in axis.collections if isinstance(c, QuadMesh))
    assert mesh.get_coordinates()[-1, -1].tolist() == [1000, 1000]


def test_2048_blocks_become_cells_that_keep_the_sums():
    figure = block_map_figure([head_map(2048)], Lq=2**18, Lk=2**18, block_size=(128, 128))
    true, _, kept = meshes(figure)[:3]
    assert true.shape == (512, 512)
    np.testing.assert_allclose(true.filled(0).sum(1), 1, rtol=1e-6)
    # 4 rows of a cell, each with one block of 4 in the first column of cells.
    assert kept[300, 0] == pytest.approx(1 / 4) and true[300, 0] == pytest.approx(0.5)
    assert kept[300, 300] == pytest.approx(4 / (4 * 5 / 2))
    figure.canvas.draw()
    assert {"0", "64K", "256K"} <= {label.get_text() for label in figure.axes[0].get_xticklabels()}


def test_errors_are_bars_beside_the_map_and_the_worst_of_a_cell():
    head = replace(head_map(8), row_error=torch.arange(8) / 10)
    figure = block_map_figure([head], Lq=1000, Lk=1000, block_size=(128, 128), columns=("true", "kept", "error"))
    bars = figure.axes[2].patches
    assert [round(bar.get_width(), 6) for bar in bars] == [round(row / 10, 6) for row in range(8)]
    assert bars[-1].get_height() == 1000 - 7 * 128 and figure.axes[2].get_title() == "output error"
    many = replace(head_map(1024), row_error=torch.arange(1024) / 1024)
    (axis,) = block_map_figure([many], Lq=2**17, Lk=2**17, block_size=(128, 128), columns=("error",)).axes
    assert len(axis.patches) == 512 and axis.patches[3].get_width() == 7 / 1024
    with pytest.raises(ValueError, match="heads must have row_error for the column error, got none in 'head'"):
        block_map_figure([head_map(8)], Lq=1000, Lk=1000, block_size=(128, 128), columns=("error",))


def test_row_budgets_are_counts_of_blocks(selection):
    kept, visible = selection.kept[0], selection.visible.expand_as(selection.kept)[0]
    axis = row_budget_figure(kept, visible, Lq=1000, q_block=128).axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axis.lines}
    assert lines["visible"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    np.testing.assert_array_equal(lines["median head, kept"][:-1], np.median(kept.sum(-1), 0))


def test_top_tau_takes_mandatory_blocks_first():
    mass = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    mandatory = torch.tensor([True, False, False, False, True])
    kept = torch.tensor([True, True, False, False, True])
    axis = top_tau_figure(mass, kept, mandatory, tau=0.7).axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["4", "0", "1", "3", "2"]
    bars = [(round(float(bar.get_height()), 2), to_hex(bar.get_facecolor())) for bar in axis.patches[:5]]
    assert bars == [(0.2, LINES[1]), (0.1, LINES[1]), (0.4, "#08519c"), (0.25, "#bdbdbd"), (0.05, "#bdbdbd")]


def test_a_model_is_one_cell_a_head_and_one_bar_a_layer():
    values = {0: torch.tensor([0.1, 0.3]), 3: torch.tensor([0.5, 0.7])}
    figure = model_figure(values, name="density")
    np.testing.assert_allclose(meshes(figure)[0], [[0.1, 0.3], [0.5, 0.7]], rtol=1e-6)
    np.testing.assert_allclose([bar.get_width() for bar in figure.axes[1].patches], [0.2, 0.6], rtol=1e-6)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "3"]


def test_curves_are_sorted_and_told_apart():
    curves = {name: [(0.5, 0.8), (0.1, 0.2)] for name in "abcdefgh"}
    axis = density_figure(curves, measure="mass recalled").axes[0]
    assert all(list(line.get_xdata()) == [0.1, 0.5] for line in axis.lines)
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axis.lines}
    assert len(looks) == 8


def test_masks_are_drawn_as_pairs_and_as_blocks():
    ids = documents_from_lengths(torch.tensor([300, 700]), total=1000)
    masks = {"window": sliding_window(200), "packed": both(document(ids), causal())}
    figure = mask_figure(masks, Lq=1000, Lk=1000, block_size=(128, 128))
    window, packed, *_ = (axis.images[0].get_array() for axis in figure.axes if axis.images)
    query, key = torch.arange(1000)[:, None], torch.arange(1000)
    np.testing.assert_array_equal(window, (key <= query) & (key > query - 200))
    np.testing.assert_array_equal(packed, (key <= query) & (ids[:, None] == ids))
    for blocks, pairs in zip(meshes(figure), (window, packed), strict=True):
        tiles = [np.asarray(pairs[r : r + 128, c : c + 128]) for r in range(0, 1000, 128) for c in range(0, 1000, 128)]
        np.testing.assert_array_equal(blocks.flatten(), [int(tile.any()) + int(tile.all()) for tile in tiles])


def test_long_masks_are_sampled():
    figure = mask_figure({"causal": causal()}, Lq=2**17, Lk=2**17, block_size=(128, 128))
    assert figure.axes[0].images[0].get_array().shape == (2048, 2048)


def test_dynamic_blocks_show_four_states(selection):
    (mesh,) = meshes(dynamic_blocks_figure(selection, head=1))
    kept, whole = selection.kept[0, 1], selection.whole[0, 0]
    expected = selection.visible[0, 0].int() + kept.int() + (kept & whole).int()
    np.testing.assert_array_equal(mesh, expected)


def pictures(page: str) -> list[np.ndarray]:
    """The pixels of every PNG in a page."""
    files = (base64.b64decode(encoded) for encoded in re.findall(r'src="data:image/png;base64,([^"]+)"', page))
    return [np.asarray(Image.open(io.BytesIO(file))) for file in files]


def test_a_selection_draws_itself(selection):
    page = selection._repr_html_()
    drawn = pictures(page)
    assert len(drawn) == 4 and "4 heads, 1,000 × 1,000 tokens" in page
    assert f"density {selection.density.item():.1%}" in page
    colours = torch.tensor([HIDDEN, DROPPED, CUT, KEPT])
    for head, pixels in enumerate(drawn):
        kept, whole = selection.kept[0, head], selection.whole[0, 0]
        state = selection.visible[0, 0].int() + kept.int() + (kept & whole).int()
        np.testing.assert_array_equal(pixels, colours[state.long()])


def test_a_block_mask_is_read_off_its_lists(selection):
    mask = selection.block_mask
    whole, cut = blocks_of(mask)
    torch.testing.assert_close(whole, selection.kept & selection.whole)
    torch.testing.assert_close(cut, selection.kept & ~selection.whole)
    assert len(pictures(block_mask_html(mask))) == 4
    # Narrow lists, whose width says nothing of the keys, and with anything past the count.
    mask.kv_indices = torch.full_like(mask.kv_indices[..., :2], 77).copy_(mask.kv_indices[..., :2])
    torch.testing.assert_close(blocks_of(mask)[1], cut)


def test_without_pillow_a_notebook_shows_text(selection, monkeypatch):
    monkeypatch.setattr(drawing.importlib.util, "find_spec", lambda name: None)
    assert selection._repr_html_() is None and block_mask_html(selection.block_mask) is None


def test_documented_names_are_those_of_the_room():
    import rr_flex.notebook
    import rr_flex.plots
    from rr_flex.view import notebook, plots

    assert rr_flex.plots.__all__ == plots.__all__
    assert all(getattr(rr_flex.plots, name) is getattr(plots, name) for name in plots.__all__)
    assert rr_flex.notebook.load_ipython_extension is notebook.load_ipython_extension


def test_a_notebook_shows_masks_and_figures():
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell
    from rr_flex.view import notebook

    ipython = shell()
    notebook.load_ipython_extension(ipython)
    q = torch.randn(1, 1, 256, 16)
    data, _ = ipython.display_formatter.format(create_rr_block_mask(q, q))
    assert data["text/html"].startswith("<div><p>BlockMask")
    data, _ = ipython.display_formatter.format(density_figure({"rr": [(0.5, 1.0)]}, measure="error"))
    assert data["image/png"].startswith(b"\x89PNG")


def test_explore_redraws_what_a_widget_chooses(monkeypatch):
    pytest.importorskip("ipywidgets")
    import IPython.display

    from rr_flex.view.notebook import explore

    shown, updates = [], []

    class Handle:
        def update(self, value):
            updates.append(value)

    def display(value, display_id=False):
        shown.append(value)
        return Handle()

    monkeypatch.setattr(IPython.display, "display", display)
    explore(lambda layer, tau: (layer, tau), layer=[3, 4], tau=(0.9, 0.95))
    widgets, picture = shown
    assert picture == (3, 0.9)
    widgets.children[0].value = 4
    assert updates == [(4, 0.9)]
    with pytest.raises(ValueError, match="layer must have at least one choice, got none"):
        explore(lambda layer: layer, layer=[])


def test_token_counts_are_short():
    assert [short(n) for n in (0, 512, 8192, 16384, 131072, 2**20, 100000)] == [
        *("0", "512", "8,192", "16K", "128K", "1M", "100,000")
    ]
