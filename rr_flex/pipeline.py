"""From q and k to the blocks worth attending to: the steps of RRAttention in their order."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mask_mods import (
    SpanMask,
    any_key_visible,
    bidirectional,
    block_visibility,
    both,
    from_head,
    hides_keys,
    visible_keys,
)
from mask_mods import causal as causal_mask
from mask_mods.spans import Index, MaskMod
from rr_flex.checks import check_call, check_queries_and_keys
from rr_flex.config import RRConfig
from rr_flex.kernels.score_mods import cap_as_tensor
from rr_flex.mandatory import mandatory_blocks
from rr_flex.mass import block_mass
from rr_flex.mass_by_attention import block_mass_by_attention, kernel_can_estimate
from rr_flex.result import Selection
from rr_flex.runtime.compiling import compile_whole
from rr_flex.runtime.head_slices import head_slices
from rr_flex.sampling import moments, pooled_query_features, sample_queries, second_order_features
from rr_flex.selection import select_density, select_threshold, select_top_tau

DEFAULT = RRConfig()


def create_rr_block_mask(q: Tensor, k: Tensor, **options: Any) -> BlockMask:
    """The BlockMask of `select_blocks(q, k, ...)`, for torch.compile(flex_attention)(q, k, v, block_mask=...).

    Takes the arguments of `select_blocks` and raises what it raises.
    """
    return select_blocks(q, k, **options).build_block_mask()


def select_blocks(
    q: Float[Tensor, "B Hq Lq D"],
    k: Float[Tensor, "B Hkv Lk D"],
    *,
    config: RRConfig | None = None,
    mask_mod: MaskMod | None = None,
    causal: bool | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_offset: int | Tensor | None = None,
    head_offset: int | Tensor = 0,
    **settings: Any,
) -> Selection:
    """The blocks of the attention map that hold most of its mass, estimated from q and k (arXiv 2602.05853).

    float32, bfloat16 or float16, Hq a multiple of Hkv, any lengths and D; no gradient.
    `config` or single `settings` (fields of RRConfig): strides, block sizes, budget, mandatory blocks.
    `mask_mod`: a FlexAttention mask over indices; `causal`: True without a mask_mod, else False; both together meet.
    `scale`: factor of the logits, 1/√D unless given. `softcap`: c of c·tanh(logit / c), which the model applies to its
    logits and the estimate to its own.
    `q_offset`: position of the first query among the keys, Lk − Lq unless given; moves causal mask and diagonal.
    `head_offset`: global index of the first query head, under tensor parallelism.
    ValueError, TypeError or NotImplementedError name the argument, the rule and the value.
    """
    check_queries_and_keys(q, k)
    options = {"scale": scale, "softcap": softcap, "q_offset": q_offset, "head_offset": head_offset}
    check_call(q, k, config=config, mask_mod=mask_mod, **options)
    config = (config or DEFAULT).with_settings(settings)
    level, q_offset, head_offset = device_arguments(q, k, config, q_offset, head_offset)
    cap, dense = cap_as_tensor(softcap, q.device), is_short(k, config.min_length)
    # On the CPU single operations serve as well; elsewhere the kernels are worth their compilation.
    compiled = q.device.type != "cpu" and not torch.compiler.is_compiling()
    choose = _select_compiled if compiled else select
    with torch.no_grad():
        parts = [
            choose(*strip, config, mask, causal, scale, cap, dense)
            for _, *strip, mask in in_head_slices(q, (k,), level, q_offset, head_offset, config, mask_mod)
        ]
    return parts[0] if len(parts) == 1 else join(parts, resolve_mask(mask_mod, causal, q_offset))


def is_short(k: Tensor, min_length: int | None) -> bool:
    """Whether k has fewer keys than `min_length`, if that is given: then attention is dense."""
    return min_length is not None and k.shape[2] < min_length


def in_head_slices(
    q: Tensor,
    keys: tuple[Tensor, ...],
    level: Tensor,
    q_offset: Index,
    head_offset: Index,
    config: RRConfig,
    mask_mod: MaskMod | None,
) -> Iterator[tuple]:
    """For each of `head_slices` the slice of query heads, then the same arguments of it, `keys` spread out."""
    B, Hq, Lq = q.shape[:3]
    Hkv, Lk = keys[0].shape[1:3]
    strips = head_slices(B, Hq, Hkv, Lq, Lk, config)
    if len(strips) == 1:
        yield slice(None), q, *keys, level, q_offset, head_offset, mask_mod
        return
    for heads, key_heads in strips:
        mask = mask_mod
        if mask_mod is not None:
            mask = from_head(mask_mod, torch.full((), heads.start, dtype=torch.int64, device=q.device))
        shared = [x[:, key_heads] for x in keys]
        yield heads, q[:, heads], *shared, level[heads], q_offset, head_offset + heads.start, mask


def join(parts: list[Selection], mask_mod: MaskMod) -> Selection:
    """The Selection of all heads from those of strips of heads."""

    def together(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], dim=1)

    # Strips of which none looks at the head have one and the same map.
    first = parts[0]
    shared = first.visible.shape[1] == 1 < first.kept.shape[1]
    visible, whole = (first.visible, first.whole) if shared else (together("visible"), together("whole"))
    return Selection(
        together("kept"), together("mass"), visible, whole, first.block_size, first.seq_lengths, mask_mod, first.dense
    )


def device_arguments(
    q: Tensor, k: Tensor, config: RRConfig, q_offset: Index | None, head_offset: Index
) -> tuple[Tensor, Index, Index]:
    """Budget level [Hq], q_offset and head_offset as tensors on q's device: new values of them compile nothing anew."""
    if q_offset is None:
        q_offset = k.shape[2] - q.shape[2]
    level = config.level_per_head(q.shape[1], q.device)
    # In a caller's graph on a CPU they stay ints: its kernel (torch 2.13) can't capture a constant made in the graph.
    if torch.compiler.is_compiling() and q.device.type == "cpu":
        return level, q_offset, head_offset
    return level, *(
        x.to(q.device) if isinstance(x, Tensor) else torch.full((), x, dtype=torch.int64, device=q.device)
        for x in (q_offset, head_offset)
    )


def select(
    q: Float[Tensor, "B Hq Lq D"],
    k: Float[Tensor, "B Hkv Lk D"],
    level: Float[Tensor, " Hq"],
    q_offset: Index,
    head_offset: Index,
    config: RRConfig,
    mask_mod: MaskMod | None,
    causal: bool | None,
    scale: float | None,
    softcap: Tensor | float | None = None,
    dense: bool = False,
    plain: bool = False,
) -> Selection:
    """`select_blocks` on checked arguments: plain PyTorch, one graph under torch.compile(fullgraph=True).

    `dense`: every visible block, and nothing estimated; `config.min_length` is not looked at here.
    `plain`: the estimate by `block_mass` on every device, for where nothing is compiled.
    """
    B, Hq, Lq, D = q.shape
    Lk = k.shape[2]
    scale = D**-0.5 if scale is None else scale
    mask_mod = resolve_mask(mask_mod, causal, q_offset)
    visible, whole = block_visibility(mask_mod, B=B, H=Hq, Lq=Lq, Lk=Lk, block_size=config.block_sizes, device=q.device)
    if dense:
        kept = visible.expand(B, Hq, -1, -1)
        mass = torch.zeros_like(kept, dtype=torch.float32)
        return Selection(kept, mass, visible, whole, config.block_sizes, (Lq, Lk), mask_mod, dense=True)

    valid_keys = visible_keys(mask_mod, B, Hq, Lk, q.device) if hides_keys(mask_mod) else None
    facts = {"mask_mod": mask_mod, "Lq": Lq, "Lk": Lk, "scale": scale, "softcap": softcap, "head_offset": head_offset}
    mass = estimate_mass(q, k, valid_keys, config, plain=plain, **facts)

    mandatory = mandatory_blocks(visible, config, Lq=Lq, q_offset=q_offset, valid_keys=valid_keys)
    if config.budget == "top_tau":
        count = config.mandatory == "count"
        kept = select_top_tau(mass, level[:, None], visible, mandatory, count_mandatory=count)
    elif config.budget == "threshold":
        kept = select_threshold(mass, level[:, None], visible, mandatory)
    else:
        kept = select_density(mass, level[0], visible, mandatory)
    return Selection(kept, mass, visible, whole, config.block_sizes, (Lq, Lk), mask_mod)


def estimate_mass(
    q: Float[Tensor, "B Hq Lq D"],
    k: Float[Tensor, "B Hkv Lk D"],
    valid_keys: Bool[Tensor, "b h Lk"] | None,
    config: RRConfig,
    *,
    mask_mod: MaskMod,
    Lq: int,
    Lk: int,
    scale: float,
    head_offset: Index,
    softcap: Tensor | float | None = None,
    plain: bool = False,
) -> Float[Tensor, "B Hq nQ nK"]:
    """Block mass from pooled keys, from pooled queries, or the mean of both estimates' shares of a row.

    `valid_keys`: False for keys that no query may see, None where there are none such.
    `softcap` bounds what stands for a stride's logits, with order 2 their mean and variance together.
    """
    facts = {"mask_mod": mask_mod, "Lq": Lq, "Lk": Lk, "scale": scale, "block_size": config.block_sizes}
    facts |= {"softcap": softcap}
    estimates = []
    if config.pool != "queries":
        q_stride, k_stride = config.strides
        queries = sample_queries(q, q_stride, head_offset, config.phase)
        if valid_keys is not None:
            valid_keys = key_head_mask(valid_keys, q.shape[1], k.shape[1])
        mean, variance = moments(k, k_stride, valid_keys)
        keys = mean.to(k.dtype)
        if config.order == 2:
            queries, keys = second_order_features(queries, mean, variance, scale, config.variance_weight)
        mass = block_mass if plain or not kernel_can_estimate(queries) else block_mass_by_attention
        sampling = {"strides": config.strides, "head_offset": head_offset, "phase": config.phase}
        estimates.append(mass(queries, keys, valid_keys=valid_keys, **sampling, **facts))
    if config.pool != "keys":
        # Beside pooled keys, whose second order it would repeat, the mean query alone is as good (README, "Accuracy").
        order = config.order if config.pool == "queries" else 1
        valid = queries_that_see(mask_mod, q.shape[0], q.shape[1], Lq, Lk, q.device)
        pooled = (config.tokens_per_pooled_query, order, scale, valid, config.variance_weight)
        queries, keys = pooled_query_features(q, k, *pooled)
        mass = block_mass if plain or not kernel_can_estimate(queries) else block_mass_by_attention
        strides = (config.tokens_per_pooled_query, 1)
        estimates.append(mass(queries, keys, strides=strides, phase="pooled", **facts))
    return estimates[0] if len(estimates) == 1 else (row_share(estimates[0]) + row_share(estimates[1])) / 2


def queries_that_see(mask_mod: MaskMod, B: int, Hq: int, Lq: int, Lk: int, device: torch.device) -> Tensor | None:
    """Bool [b, h, Lq], False for padding, which should not be pooled; None where the mask is no SpanMask."""
    if not isinstance(mask_mod, SpanMask):
        return None
    b = torch.arange(B, device=device)[:, None, None]
    h = torch.arange(Hq, device=device)[:, None]
    first_key = torch.zeros((), dtype=torch.int64, device=device)
    sees = any_key_visible(mask_mod, b, h, torch.arange(Lq, device=device), first_key, Lk, Lk)
    return sees.expand(torch.broadcast_shapes(sees.shape, (1, 1, Lq)))


def row_share(mass: Float[Tensor, "B Hq nQ nK"]) -> Float[Tensor, "B Hq nQ nK"]:
    """Each block's share of its row; 0 in a row without mass, NaN in one that has NaN."""
    total = mass.sum(-1, keepdim=True)
    return mass / torch.where(total == 0, 1, total)


def resolve_mask(mask_mod: MaskMod | None, causal: bool | None, q_offset: Index) -> MaskMod:
    """The one mask that holds: `mask_mod`, the causal mask, where both are asked for their intersection, or none."""
    if mask_mod is None:
        return bidirectional() if causal is False else causal_mask(q_offset)
    return both(causal_mask(q_offset), mask_mod) if causal else mask_mod


def key_head_mask(valid_keys: Bool[Tensor, "b h Lk"], Hq: int, Hkv: int) -> Bool[Tensor, "b #Hkv Lk"]:
    """Keys valid for any query head of a group: a mask over query heads seen from the key heads."""
    return valid_keys if valid_keys.shape[1] == 1 else valid_keys.unflatten(1, (Hkv, Hq // Hkv)).any(2)


_select_compiled = compile_whole(select)
