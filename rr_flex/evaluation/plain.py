"""The library's selection without its compiled kernels: for judging rules, where a graph a rule would cost minutes."""

import torch
from jaxtyping import Float
from torch import Tensor

from mask_mods.spans import MaskMod
from rr_flex.config import RRConfig
from rr_flex.pipeline import device_arguments, is_short, select
from rr_flex.result import Selection


@torch.no_grad()
def plain_selection(
    q: Float[Tensor, "B Hq Lq D"],
    k: Float[Tensor, "B Hkv Lk D"],
    *,
    config: RRConfig,
    mask_mod: MaskMod | None = None,
    scale: float | None = None,
) -> Selection:
    """What `select_blocks` chooses, by uncompiled operations in float32 on any device; scores are stored in strips."""
    level, q_offset, head_offset = device_arguments(q, k, config, None, 0)
    dense = is_short(k, config.min_length)
    return select(q, k, level, q_offset, head_offset, config, mask_mod, None, scale, dense=dense, plain=True)
