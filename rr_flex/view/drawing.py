"""A Selection and a BlockMask as HTML for a notebook: one small picture a head.

Pillow makes the pictures; it comes with matplotlib. Without it a notebook shows their text.
"""

import base64
import html
import importlib.util
import io

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from rr_flex.view.cells import cell_size, states_of_cells

SIDE = 256  # cells a side, at most
HEADS = 8  # pictures
WIDTH = 150  # CSS pixels a picture

# Red, green, blue, opacity. Blue and orange differ for every kind of colour blindness, and in grey.
HIDDEN, DROPPED, CUT, KEPT = (0, 0, 0, 0), (189, 189, 189, 255), (230, 159, 0, 255), (0, 90, 160, 255)
NAMES = {DROPPED: "dropped", CUT: "kept, cut by the mask", KEPT: "kept"}


def selection_html(selection) -> str | None:
    """What `Selection._repr_html_` shows: the first batch's heads; None, so its text, without Pillow."""
    about = f"Selection: {_shape(selection.kept.shape, selection.seq_lengths, selection.block_size)}"
    if selection.kept.device.type == "meta":
        return f"<p>{html.escape(about)}</p>"
    dense = ", dense: shorter than min_length" if selection.dense else ""
    parts = (selection.kept, selection.whole, selection.visible)
    about = f"{about}, density {selection.density.item():.1%}{dense}"
    return _page(about, *(x.expand_as(selection.kept)[0].cpu() for x in parts))


def block_mask_html(block_mask: BlockMask) -> str | None:
    """The blocks that FlexAttention would visit: read off the lists, whatever their width; None without Pillow."""
    whole, cut = blocks_of(block_mask)
    visited = whole | cut
    about = f"BlockMask: {_shape(whole.shape, block_mask.seq_lengths, block_mask.BLOCK_SIZE)}"
    about = f"{about}, {visited.float().mean().item():.1%} of all blocks visited"
    return _page(about, visited[0], whole[0], visited[0])


def blocks_of(block_mask: BlockMask) -> tuple[Bool[Tensor, "B H nQ nK"], Bool[Tensor, "B H nQ nK"]]:
    """(full, partial) blocks of a BlockMask, on the CPU; its lists may be narrower than its keys."""
    Lk, k_block = block_mask.seq_lengths[1], block_mask.BLOCK_SIZE[1]
    nK = -(-Lk // k_block)
    partial = _dense(block_mask.kv_num_blocks, block_mask.kv_indices, nK)
    if block_mask.full_kv_num_blocks is None:
        return torch.zeros_like(partial), partial
    return _dense(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, nK), partial


def _dense(count: Tensor, indices: Tensor, nK: int) -> Bool[Tensor, "B H nQ nK"]:
    count, indices = count.cpu(), indices.cpu().long()
    listed = torch.arange(indices.shape[-1]) < count[..., None]
    # An entry past the count may hold anything: it goes to a spare column.
    column = torch.where(listed, indices, nK)
    blocks = torch.zeros(*indices.shape[:-1], nK + 1, dtype=torch.bool)
    return blocks.scatter(-1, column, True)[..., :nK]


def _shape(shape: tuple[int, ...], lengths: tuple[int, int], block_size: tuple[int, int]) -> str:
    B, H, nQ, nK = shape
    heads = (f"batch {B}, " if B > 1 else "") + f"{H} head{'s' if H > 1 else ''}"
    more = f", of which {HEADS} are drawn" if H > HEADS else ""
    blocks = f"{nQ} × {nK} blocks of {block_size[0]} × {block_size[1]}"
    return f"{heads}{more}, {lengths[0]:,} × {lengths[1]:,} tokens, {blocks}"


def _page(
    about: str, kept: Bool[Tensor, "H nQ nK"], whole: Bool[Tensor, "H nQ nK"], visible: Bool[Tensor, "H nQ nK"]
) -> str | None:
    if importlib.util.find_spec("PIL") is None:
        return None
    size = cell_size(*kept.shape[1:], SIDE)
    states = [states_of_cells(*blocks, size) for blocks in zip(kept[:HEADS], whole, visible, strict=False)]
    figures = "".join(_figure(f"head {head}", state) for head, state in enumerate(states))
    keys = " ".join(f'<span style="color:rgb{colour[:3]}">■</span> {name}' for colour, name in NAMES.items())
    return (
        f"<div><p>{html.escape(about)}<br>rows: queries, columns: keys · {keys}</p>"
        f'<div style="display:flex;flex-wrap:wrap;gap:10px">{figures}</div></div>'
    )


def _figure(name: str, state: Tensor) -> str:
    from PIL import Image

    stream = io.BytesIO()
    colours = torch.tensor([HIDDEN, DROPPED, CUT, KEPT], dtype=torch.uint8)[state]
    Image.fromarray(colours.numpy(), "RGBA").save(stream, "PNG")
    source = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    size = f'width="{WIDTH}" height="{max(1, round(WIDTH * state.shape[0] / state.shape[1]))}"'
    style = "image-rendering:pixelated;border:1px solid #8888"
    return (
        f'<figure style="margin:0"><img alt="{name}" src="{source}" {size} style="{style}">'
        f'<figcaption style="font-size:smaller">{name}</figcaption></figure>'
    )
