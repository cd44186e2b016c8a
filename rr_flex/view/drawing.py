"""A Selection and a BlockMask as HTML for a notebook: one small picture a head.

Pillow makes the pictures; it comes with matplotlib. Without it a notebook shows their text.
"""

import base64
import html
import importlib.util
import io

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from rr_flex.view.cells import cell_size, kept_of_cells

SIDE = 256  # cells a side, at most
HEADS = 8  # pictures
WIDTH = 150  # CSS pixels a picture

# Red, green, blue, opacity. Blue and orange differ for every kind of colour blindness, and in grey.
HIDDEN, DROPPED, CUT, KEPT = (0, 0, 0, 0), (189, 189, 189, 255), (230, 159, 0, 255), (0, 90, 160, 255)


def selection_html(selection) -> str | None:
    """What `Selection._repr_html_` shows: the first batch's heads; None, so its text, without Pillow."""
    if importlib.util.find_spec("PIL") is None:
        return None
    B, Hq, nQ, nK = selection.kept.shape
    Lq, Lk = selection.seq_lengths
    about = f"Selection: {_count(B, Hq)}, {Lq:,} × {Lk:,} tokens, {nQ} × {nK} blocks of {_size(selection.block_size)}"
    if selection.kept.device.type == "meta":
        return f"<p>{html.escape(about)}</p>"
    heads = range(min(HEADS, Hq))
    visible, whole = (x.expand_as(selection.kept)[0].cpu() for x in (selection.visible, selection.whole))
    kept = selection.kept[0].cpu()
    pictures = [_picture(kept[h] & whole[h], kept[h] & ~whole[h], visible[h], f"head {h}") for h in heads]
    dense = ", dense: shorter than min_length" if selection.dense else ""
    return _page(f"{about}, density {selection.density.item():.1%}{dense}", pictures, Hq, DROPPED_TOO)


def block_mask_html(block_mask: BlockMask) -> str | None:
    """The blocks that FlexAttention would visit: read off the lists, whatever their width; None without Pillow."""
    if importlib.util.find_spec("PIL") is None:
        return None
    whole, cut = blocks_of(block_mask)
    B, H, nQ, nK = whole.shape
    Lq, Lk = block_mask.seq_lengths
    about = (
        f"BlockMask: {_count(B, H)}, {Lq:,} × {Lk:,} tokens, {nQ} × {nK} blocks of {_size(block_mask.BLOCK_SIZE)}, "
        f"{(whole | cut).float().mean().item():.1%} of all blocks visited"
    )
    nothing = torch.zeros(nQ, nK, dtype=torch.bool)
    pictures = [_picture(whole[0, h], cut[0, h], nothing, f"head {h}") for h in range(min(HEADS, H))]
    return _page(about, pictures, H, VISITED)


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


def _picture(
    whole: Bool[Tensor, "nQ nK"], cut: Bool[Tensor, "nQ nK"], visible: Bool[Tensor, "nQ nK"], name: str
) -> str:
    """A cell takes the colour of what most of its visible blocks are."""
    seen = visible | whole | cut
    size = cell_size(*seen.shape, SIDE)
    shares = torch.stack([kept_of_cells(blocks, seen, size) for blocks in (seen & ~(whole | cut), cut, whole)])
    state = torch.where(shares[0] < 0, 0, shares.argmax(0) + 1)
    colours = torch.tensor([HIDDEN, DROPPED, CUT, KEPT], dtype=torch.uint8)[state]
    source = "data:image/png;base64," + base64.b64encode(png(colours)).decode()
    density = (whole | cut).sum().item() / max(1, seen.sum().item())
    caption = name if not visible.any() else f"{name}: {density:.0%}"
    cQ, cK = state.shape
    height = max(1, round(WIDTH * cQ / cK))
    style = "image-rendering:pixelated;border:1px solid #8888"
    return (
        f'<figure style="margin:0"><img alt="{caption}" src="{source}" width="{WIDTH}" height="{height}" '
        f'style="{style}"><figcaption style="font-size:smaller">{caption}</figcaption></figure>'
    )


DROPPED_TOO = ((KEPT, "kept"), (CUT, "kept, cut by the mask"), (DROPPED, "dropped"))
VISITED = ((KEPT, "full"), (CUT, "partial (cut by the mask)"))


def _page(about: str, pictures: list[str], heads: int, legend) -> str:
    more = "" if heads <= HEADS else f", the first {HEADS} of {heads} heads"
    keys = " ".join(
        f'<span style="white-space:nowrap"><span style="color:rgb{colour[:3]}">■</span> {name}</span>'
        for colour, name in legend
    )
    return (
        f"<div><p>{html.escape(about + more)}<br>rows: queries, columns: keys · {keys}</p>"
        f'<div style="display:flex;flex-wrap:wrap;gap:10px">{"".join(pictures)}</div></div>'
    )


def _count(B: int, H: int) -> str:
    return (f"batch {B}, " if B > 1 else "") + f"{H} head{'s' if H > 1 else ''}"


def _size(block_size: tuple[int, int]) -> str:
    return f"{block_size[0]} × {block_size[1]}"


def png(colours: UInt8[Tensor, "height width 4"]) -> bytes:
    """A PNG file of 8-bit red, green, blue and opacity."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(colours.numpy(), "RGBA").save(stream, "PNG")
    return stream.getvalue()
