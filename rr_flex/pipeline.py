"""From q and k to the blocks worth attending to: the steps of RRAttention in their order."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import rr_flex.selection  # noqa: F401 - enters the budget rules: no import may be left to a caller's graph
from mask_mods import block_visibility
from mask_mods.spans import MaskMod
from rr_flex.checks import as_autocast_says, check_queries_and_keys
from rr_flex.config import RRConfig
from rr_flex.estimate import estimate_mass, in_strips, valid_keys_of
from rr_flex.mandatory import mandatory_blocks
from rr_flex.registry import BUDGETS
from rr_flex.request import Request, in_head_slices, make_request
from rr_flex.result import Selection
from rr_flex.runtime.compiling import compile_whole
from rr_flex.runtime.tracing import traced
from rr_flex.state import PrefillState, check_state


def create_rr_block_mask(q: Tensor, k: Tensor, **options: Any) -> BlockMask:
    """The BlockMask of `select_blocks(q, k, ...)`, for torch.compile(flex_attention)(q, k, v, block_mask=...).

    Takes the arguments of `select_blocks` and raises what it raises.
    """
    return select_blocks(q, k, **options).build_block_mask()


@as_autocast_says
def select_blocks(
    q: Float[Tensor, "B Hq Lq D"],
    k: Float[Tensor, "B Hkv Lk D"],
    *,
    config: RRConfig | None = None,
    mask_mod: MaskMod | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    q_offset: int | Tensor | None = None,
    head_offset: int | Tensor = 0,
    state: PrefillState | None = None,
    **settings: Any,
) -> Selection:
    """The blocks of the attention map that hold most of its mass, estimated from q and k (arXiv 2602.05853).

    float32, bfloat16 or float16, Hq a multiple of Hkv, any lengths and D; no gradient.
    `config`, or single `settings` (fields of RRConfig, or a preset): strides, block sizes, budget, mandatory blocks.
    `causal`: whether the causal mask holds, also beside a `mask_mod`, a FlexAttention mask over indices.
    `scale`: factor of the logits, 1/√D unless given. `softcap`: c of c·tanh(logit / c), which the model applies to its
    logits and the estimate to its own.
    `q_offset`: position of the first query among the keys, Lk − Lq unless given. The causal mask, the diagonal and
    every mask of mask_mods without an offset of its own stand there.
    `head_offset`: global index of the first query head, under tensor parallelism.
    `state`: what the prompt's earlier chunks have left, see PrefillState; k holds the keys of all its tokens so far.
    ValueError, TypeError or NotImplementedError name the argument, the rule and the value.
    """
    check_queries_and_keys(q, k)
    q, k = q.detach(), k.detach()
    options = {"mask_mod": mask_mod, "causal": causal, "scale": scale, "softcap": softcap}
    options |= {"q_offset": q_offset, "head_offset": head_offset}
    request = make_request(q, k, RRConfig.resolve(config, settings), options)
    check_state(state, q, k)
    if is_short(k, request.config.min_length):
        request = replace(request, estimate="none")
    elif state is not None:
        request = state.pool(q, k, request)
    return select_in_slices(q, k, request)


def is_short(k: Tensor, min_length: int | None) -> bool:
    """Whether k has fewer keys than `min_length`, if that is given: then nothing is dropped."""
    return min_length is not None and k.shape[2] < min_length


def select_in_slices(q: Float[Tensor, "B Hq Lq D"], k: Float[Tensor, "B Hkv Lk D"], request: Request) -> Selection:
    """`select` of as many heads at a time as memory takes, in a graph where kernels are worth their compilation."""
    # On the CPU single operations serve as well.
    choose = _select_compiled if q.device.type != "cpu" and not traced() else select
    with torch.no_grad():
        parts = [choose(*qk, with_mass_of_strips(*qk, own)) for _, own, qk in in_head_slices(request, q, k)]
    return parts[0] if len(parts) == 1 else join(parts, request.mask_mod)


def with_mass_of_strips(q: Tensor, k: Tensor, request: Request) -> Request:
    """The request with its mass, where that is held in strips: a loop that no graph should unroll."""
    if request.dense or traced() or not in_strips(q, k, request):
        return request
    with torch.no_grad():
        return replace(request, mass=estimate_mass(q, k, request))


def select(q: Float[Tensor, "B Hq Lq D"], k: Float[Tensor, "B Hkv Lk D"], request: Request) -> Selection:
    """`select_blocks` of a request: plain PyTorch, one graph under torch.compile(fullgraph=True)."""
    (B, Hq, Lq, _), Lk, config = q.shape, k.shape[2], request.config
    mask_mod = request.mask_mod
    facts = {"B": B, "H": Hq, "Lq": Lq, "Lk": Lk, "block_size": config.block_sizes, "device": q.device}
    visible, whole = block_visibility(mask_mod, **facts)
    about = {"block_size": config.block_sizes, "seq_lengths": (Lq, Lk), "mask_mod": mask_mod}
    if request.dense:
        kept = visible.expand(B, Hq, -1, -1)
        mass = torch.zeros_like(kept, dtype=torch.float32)
        return Selection(kept, mass, visible, whole, **about, dense=True)
    mass = estimate_mass(q, k, request) if request.mass is None else request.mass
    valid_keys = valid_keys_of(request, q, k)
    mandatory = mandatory_blocks(visible, config, Lq=Lq, q_offset=request.q_offset, valid_keys=valid_keys)
    kept = BUDGETS[config.budget].select(mass, request.level[:, None], visible, mandatory, config)
    return Selection(kept, mass, visible, whole, **about)


def join(parts: list[Selection], mask_mod: MaskMod) -> Selection:
    """The Selection of all heads from those of slices of heads."""

    def together(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], dim=1)

    # Slices of which none looks at the head have one and the same map.
    first = parts[0]
    shared = first.visible.shape[1] == 1 < first.kept.shape[1]
    visible, whole = (first.visible, first.whole) if shared else (together("visible"), together("whole"))
    kept, mass = together("kept"), together("mass")
    return replace(first, kept=kept, mass=mass, visible=visible, whole=whole, mask_mod=mask_mod)


_select_compiled = compile_whole(select)
