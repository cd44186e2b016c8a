"""RRAttention block-sparse prefill on PyTorch's FlexAttention."""

from rr_flex.attention import rr_attention
from rr_flex.config import RRConfig
from rr_flex.pipeline import Selection, create_rr_block_mask, select_blocks

__all__ = ["RRConfig", "Selection", "create_rr_block_mask", "rr_attention", "select_blocks"]
