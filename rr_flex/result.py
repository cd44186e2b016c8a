"""What a selection gives: the kept blocks, the mass that decided them, and the BlockMask."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mask_mods.spans import MaskMod
from rr_flex.block_mask import build_block_mask
from rr_flex.view.drawing import selection_html


@dataclass(frozen=True, eq=False)
class Selection:
    """What was chosen for one (q, k): the kept blocks, the mass that decided it, and the BlockMask."""

    kept: Bool[Tensor, "B Hq nQ nK"]
    mass: Float[Tensor, "B Hq nQ nK"]  # estimated; a row sums to its number of sampled queries (pool="both": to 1)
    visible: Bool[Tensor, "b h nQ nK"]  # blocks with a visible pair; b is B or 1, h is Hq or 1
    whole: Bool[Tensor, "b h nQ nK"]  # blocks with every pair visible
    block_size: tuple[int, int]  # tokens: (queries, keys)
    seq_lengths: tuple[int, int]  # tokens: (Lq, Lk)
    mask_mod: MaskMod  # the element rule inside kept blocks
    dense: bool = False  # fewer keys than `min_length`: every visible block is kept, and the mass is 0

    @cached_property
    def block_mask(self) -> BlockMask:
        """The BlockMask of the kept blocks; it means the same in eager and in compiled flex_attention."""
        return self.build_block_mask()

    def build_block_mask(self, *, for_backward: bool = False) -> BlockMask:
        """`block_mask`, built anew: what a compiled function uses, where nothing can be cached."""
        return build_block_mask(
            self.kept,
            self.whole,
            self.mask_mod,
            block_size=self.block_size,
            seq_lengths=self.seq_lengths,
            for_backward=for_backward,
        )

    @property
    def density(self) -> Float[Tensor, ""]:
        """Mean over batch and heads of `density_per_head`; a 0-dim tensor."""
        return self.density_per_head.mean()

    @property
    def density_per_head(self) -> Float[Tensor, "B Hq"]:
        """Share of a head's visible blocks that is kept; 0 where none is visible."""
        visible = self.visible.sum((2, 3), dtype=torch.float32)
        return self.kept.sum((2, 3), dtype=torch.float32) / visible.clamp(min=1)

    @property
    def covered(self) -> Float[Tensor, "B Hq nQ"]:
        """Share of each row's estimated mass that the kept blocks hold; 1 where there is no mass."""
        total = self.mass.sum(-1)
        return torch.where(total > 0, (self.mass * self.kept).sum(-1) / total, 1.0)

    def map(self, head: int = 0, batch: int = 0, side: int = 48) -> str:
        """One head's blocks as text, at most `side` characters a side: █ kept, ▒ kept and cut by the mask,
        · visible but dropped; a character that stands for several blocks shows the first of these that it holds."""
        kept = self.kept[batch, head]
        whole = self.whole.expand_as(self.kept)[batch, head]
        visible = self.visible.expand_as(self.kept)[batch, head]
        step = max(1, -(-max(kept.shape) // side))

        def shrink(blocks: Tensor) -> list[list[float]]:
            return torch.nn.functional.max_pool2d(blocks.float()[None], step, ceil_mode=True)[0].tolist()

        layers = zip(shrink(kept & whole), shrink(kept), shrink(visible), strict=True)
        return "\n".join(
            "".join("█" if f else "▒" if p else "·" if s else " " for f, p, s in zip(*rows, strict=True)).rstrip()
            for rows in layers
        )

    def __repr__(self) -> str:
        B, Hq, nQ, nK = self.kept.shape
        about = f"Selection({B}×{Hq} heads, {nQ}×{nK} blocks of {self.block_size[0]}×{self.block_size[1]} tokens"
        if self.kept.device.type == "meta":
            return about + ")"
        legend = "█ kept, ▒ kept and cut by the mask, · dropped"
        return f"{about}, density {self.density.item():.3f}), head 0 ({legend}):\n{self.map()}"

    def _repr_html_(self) -> str:
        return selection_html(self)
