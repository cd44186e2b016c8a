"""What a model does to its logits before the softmax: a soft cap on each, and a sink's logit beside them."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from mask_mods.spans import buffered
from rr_flex.block_mask import build_block_mask
from rr_flex.result import Selection

ScoreMod = Callable[..., Tensor]  # FlexAttention's: (score, b, h, q_idx, kv_idx) -> score


def soft_cap(score: Tensor, cap: Tensor | float | None) -> Tensor:
    """cap · tanh(score / cap), which lies within ± cap; None leaves the score."""
    return score if cap is None else cap * torch.tanh(score / cap)


def score_mod_of(cap: Tensor | float | None, sinks: Float[Tensor, " Hq"] | None = None) -> ScoreMod | None:
    """The score_mod of a soft cap, of sinks whose logits stand at key 0 (see `with_sink_block`), of both, or None."""
    if cap is None and sinks is None:
        return None
    sink_logits = None if sinks is None else buffered(sinks.float())

    def score_mod(score, b, h, q_idx, kv_idx):
        score = soft_cap(score, cap)
        return score if sink_logits is None else torch.where(kv_idx == 0, sink_logits[h], score)

    return score_mod


def with_sink_block(
    k: Float[Tensor, "B Hkv Lk D"], v: Float[Tensor, "B Hkv Lk Dv"], chosen: Selection
) -> tuple[Tensor, Tensor, BlockMask]:
    """k, v and the BlockMask of the kept blocks with a block of zero keys and values in front.

    Its key 0 is seen by every query and its others by none: with the sink as its logit it adds exp(sink) to the
    softmax's sum and nothing to the output. Exact, for a kernel that gives no log-sum-exp to correct by.
    """
    k_block = chosen.block_size[1]
    mask_mod = chosen.mask_mod

    def behind_the_sink(b, h, q_idx, kv_idx):
        seen = mask_mod(b, h, q_idx, torch.clamp(kv_idx - k_block, min=0))
        return (kv_idx == 0) | ((kv_idx >= k_block) & seen)

    Lq, Lk = chosen.seq_lengths
    mask = build_block_mask(
        F.pad(chosen.kept, (1, 0), value=True),
        F.pad(chosen.whole, (1, 0), value=False),
        behind_the_sink,
        block_size=chosen.block_size,
        seq_lengths=(Lq, Lk + k_block),
    )
    return F.pad(k, (0, 0, k_block, 0)), F.pad(v, (0, 0, k_block, 0)), mask


def beside_sinks(
    out: Float[Tensor, "B Hq Lq Dv"], lse: Float[Tensor, "B Hq Lq"], sinks: Float[Tensor, " Hq"]
) -> Float[Tensor, "B Hq Lq Dv"]:
    """What is left of `out` beside a sink: exp(lse) / (exp(lse) + exp(sink)) of it; 0 where no key is seen."""
    share = torch.sigmoid(lse - sinks.float()[:, None]).where(lse > -torch.inf, 0)  # −∞ beside −∞ is NaN
    return (out * share[..., None]).to(out.dtype)
