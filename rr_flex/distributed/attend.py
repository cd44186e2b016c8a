"""Attention of a rank's queries over the blocks that were chosen for them, compiled as one graph."""

from jaxtyping import Float
from torch import Tensor

from rr_flex.block_mask import build_block_mask
from rr_flex.distributed.choose import Chosen
from rr_flex.kernels.flex import Attended, flex, of_pieces, with_last_rows
from rr_flex.kernels.last_rows import merge_pieces, take_apart
from rr_flex.kernels.options import attention_options
from rr_flex.kernels.score_mods import score_mod_of
from rr_flex.request import Request
from rr_flex.runtime.compiling import compile_whole


def attend(
    q: Float[Tensor, "B Hq n D"],
    k: Float[Tensor, "B Hkv m D"],
    v: Float[Tensor, "B Hkv m Dv"],
    chosen: Chosen,
    request: Request,
) -> Attended:
    """Attention over the chosen blocks of k and v, whose length is whole blocks; others are never read."""
    # The CPU's template (torch 2.13) writes code that does not compile where so many sizes are symbols.
    graph = _for_these_lengths if q.device.type == "cpu" else _for_any_length
    return with_last_rows(*graph(q, k, v, chosen, request), request)


def _attend(q: Tensor, k: Tensor, v: Tensor, chosen: Chosen, request: Request):
    kept, pieces = chosen.kept, None
    if request.rows_apart:
        kept, pieces = take_apart(kept, request.rows_apart)
    sizes = {"block_size": chosen.block_size, "seq_lengths": chosen.seq_lengths}
    block_mask = build_block_mask(kept, chosen.whole, chosen.mask_mod, **sizes)
    options = attention_options(q, chosen.block_size)
    settings = {"scale": request.scale, "kernel_options": options, "score_mod": score_mod_of(request.softcap)}
    out, lse = flex(q, k, v, block_mask, settings, lse=pieces is not None or "lse" in request.returns)
    if pieces is None:
        return Attended(out, lse, None), None
    queries, mask = of_pieces(q, chosen, pieces, request)
    return Attended(out, lse, None), merge_pieces(*flex(queries, k, v, mask, settings, lse=True))


_for_these_lengths = compile_whole(_attend, dynamic=False)
_for_any_length = compile_whole(_attend)
