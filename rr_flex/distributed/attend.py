"""Attention over blocks that are already chosen, by the kernels of `rr_attention`."""

from jaxtyping import Bool, Float
from torch import Tensor

from rr_flex.block_mask import build_block_mask, list_partial_and_full
from rr_flex.kernels import flash
from rr_flex.kernels.choose import laid_out
from rr_flex.kernels.flex import Attended, flex
from rr_flex.kernels.options import attention_options
from rr_flex.kernels.score_mods import score_mod_of
from rr_flex.request import Request
from rr_flex.runtime.compiling import compile_whole

QKV = tuple[Float[Tensor, "B Hq n D"], Float[Tensor, "B Hkv m D"], Float[Tensor, "B Hkv m Dv"]]
Blocks = tuple[Bool[Tensor, "B Hq nQ nK"], Bool[Tensor, "#B #Hq nQ nK"]]  # kept; wholly visible


def attend(kernel: str, qkv: QKV, blocks: Blocks, request: Request) -> Attended:
    """Attention over the kept blocks by the kernel of this name; with "lse" in the request's returns its log-sum-exp
    too, natural."""
    if kernel == "flash":
        whole = _lists_compiled(*blocks), flash.offset_per_batch(request.q_offset, qkv[0].shape[0])
        return flash.attend_chosen(qkv, whole, None, request)
    # The CPU's template (torch 2.13) writes code that does not compile where so many sizes are symbols.
    graph = _for_these_lengths if kernel == "cpu" else _for_any_length
    return graph(qkv, blocks, laid_out(kernel, *qkv[:2], request))


def _attend(qkv: QKV, blocks: Blocks, request: Request) -> Attended:
    (q, k, _), (kept, whole), size = qkv, blocks, request.config.block_sizes
    lengths = q.shape[2], k.shape[2]
    block_mask = build_block_mask(kept, whole, request.mask_mod, block_size=size, seq_lengths=lengths)
    score_mod = score_mod_of(request.softcap)
    options = attention_options(q, size, whole_tiles=request.whole_tiles)
    settings = {"scale": request.scale, "kernel_options": options, "score_mod": score_mod}
    return Attended(*flex(*qkv, block_mask, settings, lse="lse" in request.returns), None)


_for_these_lengths = compile_whole(_attend, dynamic=False)
_for_any_length = compile_whole(_attend)
_lists_compiled = compile_whole(list_partial_and_full)
