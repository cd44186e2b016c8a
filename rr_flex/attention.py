"""Queries, keys and values to outputs: selection and block-sparse attention in one compiled graph."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from mask_mods.spans import MaskMod
from rr_flex.checks import check_call, check_differentiable, check_queries_and_keys, check_values
from rr_flex.compiling import compile_whole
from rr_flex.config import RRConfig
from rr_flex.kernel import attention_options
from rr_flex.pipeline import device_arguments, select


def rr_attention(
    q: Float[Tensor, "B Hq Lq D"],
    k: Float[Tensor, "B Hkv Lk D"],
    v: Float[Tensor, "B Hkv Lk Dv"],
    *,
    config: RRConfig | None = None,
    mask_mod: MaskMod | None = None,
    causal: bool | None = None,
    scale: float | None = None,
    q_offset: int | Tensor | None = None,
    head_offset: int | Tensor = 0,
    return_lse: bool = False,
    **settings: Any,
) -> Float[Tensor, "B Hq Lq Dv"] | tuple[Float[Tensor, "B Hq Lq Dv"], Float[Tensor, "B Hq Lq"]]:
    """Attention over the blocks that `select_blocks` keeps; arguments and errors as there.

    Compiled as one graph; the first call for a shape takes seconds. A query that sees nothing gives 0. The selection
    is held fixed under differentiation. `return_lse` adds the natural log-sum-exp of each query's kept logits.
    NotImplementedError on the CPU for `return_lse` or tensors that require grad.
    """
    check_queries_and_keys(q, k)
    check_values(q, k, v)
    check_differentiable(q, k, v)
    check_call(q, k, config=config, mask_mod=mask_mod, scale=scale, q_offset=q_offset, head_offset=head_offset)
    if return_lse and q.device.type == "cpu":
        raise NotImplementedError("return_lse must be False on the CPU, whose compiled kernel has none, got True")
    config = (config or RRConfig()).with_settings(settings)
    level, q_offset, head_offset = device_arguments(q, k, config, q_offset, head_offset)
    arguments = (q, k, v, level, q_offset, head_offset, config, mask_mod, causal, scale, return_lse)
    return (_attend if torch.compiler.is_compiling() else _attend_compiled)(*arguments)


def _attend(q, k, v, level, q_offset, head_offset, config, mask_mod, causal, scale, return_lse):
    for_backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    with torch.no_grad():
        chosen = select(q, k, level, q_offset, head_offset, config, mask_mod, causal, scale)
        block_mask = chosen.build_block_mask(look_up=False, for_backward=for_backward)
    aux = AuxRequest(lse=True) if return_lse else None
    options = attention_options(q, config.block_sizes)
    out = flex_attention(
        q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True, return_aux=aux, kernel_options=options
    )
    return (out[0], out[1].lse) if return_lse else out


_attend_compiled = compile_whole(_attend)
