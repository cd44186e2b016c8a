"""The library's selection without its compiled kernels: for judging rules, where a graph a rule would cost minutes."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mask_mods.spans import MaskMod
from rr_flex.config import RRConfig
from rr_flex.pipeline import is_short, select
from rr_flex.request import make_request
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
    request = make_request(q, k, config, {"mask_mod": mask_mod, "scale": scale})
    return select(q, k, replace(request, estimate="none" if is_short(k, config.min_length) else "plain"))
