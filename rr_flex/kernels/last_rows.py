"""The last block rows by themselves, or all of a short chunk: each one's blocks are cut into pieces that attend side
by side and are merged.

The kernel takes block rows in their order. A dense last row is the longest of all and starts when the others end: at
131,072 tokens attention takes 1.0 to 1.8 of 58 to 94 ms less without it with FlashAttention, 2.9 to 3.4 of 78 to 123 ms
with Triton (H100, 32 heads), and by itself in pieces it takes 0.4 and 0.5 ms, the merge not counted.
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mask_mods.spans import MaskMod, smaller
from rr_flex.config import RRConfig
from rr_flex.geometry import ceil_div

MOST_ROWS = 8  # apart: more fill the card by themselves, and each takes PIECES times its queries
SHORT_CHUNK = (1, 2, 4, 8)  # block rows of a chunk that may attend in pieces as a whole
MOST_SHORT_ROWS = 512  # of all its heads: more fill the card
SHORT_CHUNK_KEYS = 16384  # from which on a row is long enough to be cut
PIECES = 8  # of each row; at 131,072 tokens 4, 8 and 16 took 0.40, 0.41 and 0.61 ms


def rows_apart(Lq: int, Lk: int, config: RRConfig, least_keys: int) -> int:
    """How many block rows at the end of the queries attend by themselves; `least_keys`: from which on it pays."""
    rows = config.dense_last_rows
    few = rows >= ceil_div(Lq, config.block_sizes[0]) or Lk < least_keys
    return 0 if few or rows > MOST_ROWS else rows


def all_rows_apart(q: Tensor, block_rows: int, Lk: int) -> bool:
    """Whether a short chunk attends in pieces as a whole: its few rows leave most of the card idle, and the longest
    decides. Not for every number of rows, since each is a graph of its own."""
    few = q.shape[0] * q.shape[1] * block_rows <= MOST_SHORT_ROWS
    return block_rows in SHORT_CHUNK and few and Lk >= SHORT_CHUNK_KEYS


def take_apart(
    kept: Bool[Tensor, "B H nQ nK"], rows: int
) -> tuple[Bool[Tensor, "B H nQ nK"], Bool[Tensor, "B H*PIECES rows nK"]]:
    """Kept blocks without the last `rows` block rows, and those rows, a piece as a head of its own.

    Piece p of head h is head h · PIECES + p, with an equal share of the row's kept blocks.
    """
    nQ = kept.shape[2]
    row = torch.arange(nQ, device=kept.device)[:, None]
    last = kept[:, :, nQ - rows :]
    place = last.cumsum(-1) - 1  # of each kept block in its row
    count = last.sum(-1, keepdim=True)
    piece = torch.arange(PIECES, device=kept.device)[:, None, None]
    first, stop = (count[:, :, None] * (piece + step) // PIECES for step in (0, 1))  # B H PIECES rows 1
    own = last[:, :, None] & (place[:, :, None] >= first) & (place[:, :, None] < stop)
    return kept & (row < nQ - rows), rearrange(own, "b h p r k -> b (h p) r k")


def first_query(Lq: int, rows: int, q_block: int) -> int:
    """The first query of the last `rows` block rows."""
    return (ceil_div(Lq, q_block) - rows) * q_block


def piece_queries(q: Float[Tensor, "B H Lq D"], rows: int, q_block: int) -> Float[Tensor, "B H*PIECES n D"]:
    """The queries of the last rows, once for each piece; n = rows · q_block, the last query repeated where it ends
    short.

    So n is the same for every length, and one graph serves them all.
    """
    place = first_query(q.shape[2], rows, q_block) + torch.arange(rows * q_block, device=q.device)
    return q.index_select(2, place.clamp(max=q.shape[2] - 1)).repeat_interleave(PIECES, dim=1)


def piece_mask(mask_mod: MaskMod, first_query: Int[Tensor, ""], last_query: Int[Tensor, ""]) -> MaskMod:
    """`mask_mod` as the pieces see it, whose heads are pieces and whose queries begin at `first_query`.

    Past the last query, where the pieces' block rows end short, it is asked for the last: it may look a query up.
    """

    def visible_in_piece(b, h, q_idx, kv_idx):
        return mask_mod(b, h // PIECES, smaller(q_idx + first_query, last_query), kv_idx)

    return visible_in_piece


def merge_pieces(
    out: Float[Tensor, "B H*PIECES n Dv"], lse: Float[Tensor, "B H*PIECES n"]
) -> tuple[Float[Tensor, "B H n Dv"], Float[Tensor, "B H n"]]:
    """Attention over all pieces' keys and its log-sum-exp, both from those of each piece; in nats."""
    lse = rearrange(lse, "b (h p) n -> b h p n", p=PIECES)
    total = lse.logsumexp(2)
    share = torch.exp(lse - total[:, :, None])[..., None]
    # A piece that sees nothing adds 0, whatever the kernel left there.
    parts = torch.where((lse == -torch.inf)[..., None], 0, rearrange(out, "b (h p) n d -> b h p n d", p=PIECES) * share)
    return parts.sum(2).to(out.dtype), total


def write_last_rows(
    whole: Float[Tensor, "B H Lq ..."], last: Float[Tensor, "B H n ..."], rows: int, q_block: int
) -> None:
    """The last `rows` block rows of `whole`, in place, from what their pieces were merged to."""
    first = first_query(whole.shape[2], rows, q_block)
    whole[:, :, first:] = last[:, :, : whole.shape[2] - first]
