"""Kept blocks to a FlexAttention BlockMask."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mask_mods.spans import MaskMod, buffered
from rr_flex.runtime.is_kept import is_kept

Lists = tuple[Tensor, Tensor, Tensor, Tensor]  # count and indices of partial blocks, then of full ones


def list_blocks(kept: Bool[Tensor, "B H nQ nK"]) -> tuple[Int[Tensor, "B H nQ"], Int[Tensor, "B H nQ nK"]]:
    """How many blocks each row keeps, and their key-block indices in ascending order; int32.

    Entries past the count are the row's last key block. Both have the strides that they have in eager mode: the kernel
    takes a batch to be H heads wide, and the compiler would pad the strides of what it computes itself.
    """
    nK = kept.shape[-1]
    place = kept.cumsum(-1, dtype=torch.int32)
    # A dropped block writes to a spare slot past the end of the row.
    slot = torch.where(kept, place - 1, nK).long()
    column = torch.arange(nK, device=kept.device, dtype=torch.int32).expand_as(kept)
    indices = torch.full((*kept.shape[:-1], nK + 1), nK - 1, device=kept.device, dtype=torch.int32)
    return buffered(place[..., -1].contiguous()), buffered(indices.scatter(-1, slot, column))[..., :nK]


def list_partial_and_full(kept: Bool[Tensor, "B H nQ nK"], whole: Bool[Tensor, "#B #H nQ nK"]) -> Lists:
    """`list_blocks` of the kept blocks that the mask cuts, and of those that it leaves whole."""
    return *list_blocks(kept & ~whole), *list_blocks(kept & whole)


def build_block_mask(
    kept: Bool[Tensor, "B H nQ nK"],
    whole: Bool[Tensor, "#B #H nQ nK"],
    mask_mod: MaskMod,
    *,
    block_size: tuple[int, int],
    seq_lengths: tuple[int, int],
    for_backward: bool = False,
) -> BlockMask:
    """The BlockMask that shows exactly what `mask_mod` shows inside the `kept` blocks, whoever runs it.

    `whole` blocks (every pair visible) go to the full list, the others to the partial one. The mask's own mask_mod
    looks `kept` up too, for whoever ignores lists (see runtime/is_kept.py). `for_backward` adds the query-side lists.
    """
    block_mask = BlockMask.from_kv_blocks(
        *list_partial_and_full(kept, whole),
        BLOCK_SIZE=block_size,
        mask_mod=KeptMask(buffered(kept), mask_mod, block_size),
        seq_lengths=seq_lengths,
        compute_q_blocks=False,
    )
    if for_backward:
        names = ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")
        for name, listed in zip(names, list_partial_and_full(kept.mT, whole.mT), strict=True):
            setattr(block_mask, name, listed)
    return block_mask


@dataclass(frozen=True, eq=False)
class KeptMask:
    """`mask_mod` inside the kept blocks, nothing outside."""

    kept: Bool[Tensor, "B H nQ nK"]
    mask_mod: MaskMod
    block_size: tuple[int, int]  # tokens: (queries, keys)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Bool[Tensor, "..."]:
        q_block, k_block = self.block_size
        kept = is_kept(self.kept, b, h, q_idx // q_block, kv_idx // k_block)
        return kept & self.mask_mod(b, h, q_idx, kv_idx)
