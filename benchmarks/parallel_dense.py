"""Dense attention over several ranks, by everybody's means: what the sparse ways have to beat."""

import torch
from torch import Tensor

from rr_flex.distributed import Shards
from rr_flex.distributed.by_heads import split_heads, to_heads, to_tokens
from rr_flex.distributed.transfer import gather_tokens
from rr_flex.kernels.dense import dense_attention


def dense_ulysses(q: Tensor, k: Tensor, v: Tensor, shards: Shards) -> Tensor:
    """All-to-all to whole sequences of some heads, the fastest dense kernel, and back."""
    query_heads, key_heads = split_heads(q.shape[1], k.shape[1], shards.layout.ranks)
    parts = (q, query_heads), (k, key_heads), (v, key_heads)
    whole = [to_heads(x, heads, shards.layout, shards)[0] for x, heads in parts]
    out = dense_attention(*whole, causal=True, scale=None, flash="must" if q.device.type == "cuda" else "no")
    return to_tokens(out, query_heads, shards.layout, shards)[0]


def dense_context(q: Tensor, k: Tensor, v: Tensor, shards: Shards) -> Tensor:
    """All-gather of keys and values, then each piece of queries over the keys before its end, by FlashAttention 4."""
    from flash_attn.cute.interface import flash_attn_func

    flights = [gather_tokens(x, shards) for x in (k, v)]
    keys, values = (flight.wait().transpose(1, 2) for flight in flights)  # B L H D
    outs, first = [], 0
    for _, start, stop in shards.layout.queries_of(shards.place):
        piece = q[:, :, first : first + stop - start].transpose(1, 2)
        out = flash_attn_func(piece, keys[:, :stop], values[:, :stop], causal=True)
        outs.append((out[0] if isinstance(out, tuple) else out).transpose(1, 2))
        first += stop - start
    return torch.cat(outs, 2)
