"""A mask as a rank's queries see it, which stand at positions of their own."""

import torch
from jaxtyping import Int
from torch import Tensor

from mask_mods import SpanMask
from mask_mods.spans import MaskMod


def at_positions(mask_mod: MaskMod, position: Int[Tensor, " n"], sizes: tuple[int, int, int]) -> MaskMod:
    """`mask_mod` whose query i stands at position[i], over `sizes` (B, Hq, Lk); keys from Lk on are hidden.

    Of a SpanMask the spans of every query are written out, so that causal, window and document masks are one and the
    same graph with other numbers.
    """
    B, Hq, Lk = sizes
    mask_mod = mask_mod.placed(0) if hasattr(mask_mod, "placed") else mask_mod  # query i of it is token i
    device = position.device
    if not isinstance(mask_mod, SpanMask):
        last_key = torch.full((), Lk - 1, dtype=torch.int64, device=device)

        def moved_mask(b, h, q_idx, kv_idx):
            inside = torch.where(kv_idx < last_key, kv_idx, last_key)
            return mask_mod(b, h, position[q_idx], inside) & (kv_idx <= last_key)

        return moved_mask

    b, h = torch.arange(B, device=device)[:, None, None], torch.arange(Hq, device=device)[:, None]
    zeros = torch.zeros_like(position)[None, None]
    ends = []
    for first, last in mask_mod.spans(b, h, position[None, None]):
        ends += [(first + zeros).clamp(min=0), (last + zeros).clamp(max=Lk - 1)]
    ends = [x.to(torch.int32).contiguous() for x in torch.broadcast_tensors(*ends)]
    return _written_out(ends, mask_mod)


def _written_out(ends: list[Tensor], mask_mod: SpanMask) -> SpanMask:
    """The mask whose spans' first and last keys are `ends`, each [B or 1, Hq or 1, n]."""
    by_batch, by_head = (size > 1 for size in ends[0].shape[:2])

    def spans(b, h, q_idx):
        at = (b if by_batch else 0 * q_idx, h if by_head else 0 * q_idx, q_idx)
        return tuple((first[at], last[at]) for first, last in zip(ends[::2], ends[1::2], strict=True))

    return SpanMask(spans, mask_mod.keys, label=lambda: f"at_positions({mask_mod!r})")
