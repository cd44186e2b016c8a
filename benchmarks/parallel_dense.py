"""Dense attention over several ranks, by everybody's means: what the sparse ways have to beat."""

import torch
from torch import Tensor

from rr_flex.distributed import Shards
from rr_flex.distributed.by_heads import split_heads
from rr_flex.distributed.shards import SEQUENCE
from rr_flex.distributed.transfer import exchange, gather_tokens, in_order
from rr_flex.kernels.dense import dense_attention


def dense_ulysses(q: Tensor, k: Tensor, v: Tensor, shards: Shards) -> Tensor:
    """All-to-all to whole sequences of some heads, the fastest dense kernel, and back."""
    layout, ranks, me = shards.layout, shards.ranks(SEQUENCE), shards.place
    parts = split_heads(q.shape[1], k.shape[1], ranks)
    whole = []
    for x, of in ((q, 0), (k, 1), (v, 1)):
        heads = parts[me][of].stop - parts[me][of].start
        shapes = [(x.shape[0], heads, layout.keys_on(rank), x.shape[3]) for rank in range(ranks)]
        whole.append(in_order(exchange([x[:, part[of]] for part in parts], shapes, shards)[0], layout))
    out = dense_attention(*whole, causal=True, scale=None, flash=q.device.type == "cuda")
    shapes = [(q.shape[0], part[0].stop - part[0].start, q.shape[2], v.shape[3]) for part in parts]
    return torch.cat(exchange([layout.take(out, rank) for rank in range(ranks)], shapes, shards)[0], 1)


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
