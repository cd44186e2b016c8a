"""Block-sparse attention over the page pool itself: key blocks are physical pages, and nothing is gathered.

The whole block rows of all requests of a step stand one behind the other as one sequence of queries; each row lists the
blocks of its own request's pages. A row lies on the absolute grid, so only its diagonal is cut by the causal mask, and
there a key's place in its row is its index in the pool modulo the row: a page is a whole number of rows.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mask_mods.spans import MaskMod
from rr_flex.block_mask import Lists
from rr_flex.kernels.options import attention_options
from rr_flex.kernels.score_mods import score_mod_of
from rr_flex.runtime.compiling import compile_whole
from rr_flex.runtime.is_kept import is_kept
from rr_flex.serving.pages import Pool
from rr_flex.serving.step_rows import ROW

LARGEST_POOL = 2**31  # elements, keys and values together, that the kernels' int32 offsets reach (torch 2.13)


def within_row(nothing: Bool[Tensor, "1 1 0 0"]) -> MaskMod:
    """The mask_mod of blocks on the diagonal, causal inside their row; other blocks are listed as full.

    A pool's mask has no meaning but its lists. Whoever ignores them looks a block up in an empty map: an error, and not
    an answer from pages of other requests.
    """

    def causal_in_row(b, h, q_idx, kv_idx):
        listed = is_kept(nothing, b, h, q_idx // ROW, kv_idx // ROW)
        return listed & (kv_idx % ROW <= q_idx % ROW)

    return causal_in_row


def folds_heads(pool: Pool) -> bool:
    """Whether the pool's tokens are one sequence only with the key heads folded in (pages with heads outermost).

    ValueError for a layout that is neither, such as keys that lie across their pages (vLLM's on a CPU).
    """
    _, Hkv, P, D = pool.shape
    page, head, token, element = pool.stride()
    if element == 1 and page == P * token:
        return False
    if element == 1 and page == Hkv * head and head == P * token:
        return True
    raise ValueError(f"pool must have whole tokens one behind the other, got strides {pool.stride()} of {Hkv}×{P}×{D}")


def as_sequence(pool: Pool) -> Float[Tensor, "1 H N D"]:
    """The pool as the keys or values of one sequence: a view, of one head where `folds_heads`."""
    if (extent := pool.shape[0] * pool.stride(0)) > LARGEST_POOL:
        raise ValueError(f"pool must reach over at most {LARGEST_POOL} elements, got {extent}")
    return pool.flatten(0, 2)[None, None] if folds_heads(pool) else pool.transpose(0, 1).flatten(1, 2)[None]


def attend_pages(
    q: Float[Tensor, "1 Hq n D"],
    pools: tuple[Pool, Pool],
    lists: Lists,
    *,
    k_block: int,
    scale: float,
    softcap: Tensor | None = None,
) -> Float[Tensor, "1 Hq n D"]:
    """Attention of whole block rows over the blocks of the pool that they list; compiled once for any n and any pool.

    n is a multiple of 128. `pools`: keys and values. `lists` as `onto_pages` makes them.
    """
    k, v = (as_sequence(pool) for pool in pools)
    if q.device.type == "cpu":
        # The CPU's kernel wants lists as wide as the pool.
        width = k.shape[2] // k_block
        lists = lists[0], _widened(lists[1], width), lists[2], _widened(lists[3], width)
    nothing = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=q.device)
    block_mask = BlockMask.from_kv_blocks(
        *lists,
        BLOCK_SIZE=(ROW, k_block),
        mask_mod=within_row(nothing),
        seq_lengths=(q.shape[2], k.shape[2]),
        compute_q_blocks=False,
    )
    return _attend_compiled((q, k, v), block_mask, scale, softcap, attention_options(q, (ROW, k_block)))


def _widened(indices: Tensor, width: int) -> Tensor:
    return F.pad(indices, (0, width - indices.shape[-1])).contiguous()


def _attend(
    qkv: tuple[Tensor, Tensor, Tensor], block_mask: BlockMask, scale: float, softcap: Any, options: dict
) -> Tensor:
    settings = {"scale": scale, "enable_gqa": True, "kernel_options": options}
    return flex_attention(*qkv, score_mod=score_mod_of(softcap), block_mask=block_mask, **settings)


_attend_compiled = compile_whole(_attend, dynamic=True, specialize_int=False)
