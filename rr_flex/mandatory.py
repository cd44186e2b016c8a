"""Blocks that are kept whatever the estimate says."""

import torch
from einops import reduce
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F

from mask_mods.spans import Index
from rr_flex.config import RRConfig
from rr_flex.geometry import diagonal_blocks


def mandatory_blocks(
    visible: Bool[Tensor, "b h nQ nK"],
    config: RRConfig,
    *,
    Lq: int,
    q_offset: Index,
    valid_keys: Bool[Tensor, "#B #H Lk"] | None = None,
) -> Bool[Tensor, "b h nQ nK"]:
    """Visible blocks that are the sink, lie at the diagonal, or belong to the last block rows.

    The sink is the first `sink_blocks` key blocks, counted from the first block with a valid key (padding on the left
    has no sink in it). The last block rows are the last in which a query sees anything, likewise. Query i stands at
    position i + q_offset, of which there may be one a sequence ([B]).
    """
    nQ, nK = visible.shape[2:]
    column = torch.arange(nK, device=visible.device)
    row = torch.arange(nQ, device=visible.device)[:, None]
    start = column.new_zeros(1, 1, 1, 1)
    stop = nQ
    if valid_keys is not None:
        k_block = config.block_sizes[1]
        padded = F.pad(valid_keys, (0, nK * k_block - valid_keys.shape[-1]))
        start = reduce(padded.int(), "b h (K k) -> b h K", "max", k=k_block).argmax(-1)[..., None, None]
        sees = visible.any(-1).int()  # b h nQ
        stop = torch.where(sees.any(-1), nQ - sees.flip(-1).argmax(-1), 0)[..., None, None]
    kept = column < start + config.sink_blocks  # what lies before the start is not visible
    if config.local_blocks:
        if isinstance(q_offset, Tensor) and q_offset.ndim:
            q_offset = q_offset[:, None, None, None]
        kept = kept | diagonal_blocks((row, column), Lq, config.block_sizes, q_offset, config.local_blocks - 1)
    return visible & (kept | (row >= stop - config.dense_last_rows))
