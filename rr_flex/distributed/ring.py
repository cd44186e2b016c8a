"""The ring: every rank's keys and values pass by all others, and outputs are merged by their log-sum-exp.

The least memory: two shards of keys and values besides the own. Each rank's kept blocks are split by their owner.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from rr_flex.checks import as_autocast_says
from rr_flex.distributed.asked import check_asked
from rr_flex.distributed.attend import Blocks, attend
from rr_flex.distributed.context import choose_blocks, needs_every_key
from rr_flex.distributed.far_rows import attend_far_rows
from rr_flex.distributed.local import Chunk, Local, prepare
from rr_flex.distributed.positions import at_keys
from rr_flex.distributed.shards import SEQUENCE, Shards, answering
from rr_flex.runtime.compiling import compile_whole


@as_autocast_says
def ring(
    q: Float[Tensor, "B Hq n D"],
    k: Float[Tensor, "B Hkv m D"],
    v: Float[Tensor, "B Hkv m Dv"],
    shards: Shards,
    **options: Any,
) -> Float[Tensor, "B Hq n Dv"]:
    """What `context_parallel` gives, by passing shards of keys and values around the ranks of "sequence".

    Options are config or its fields, mask_mod, causal, scale, softcap, backend, account. NotImplementedError on every
    rank on the CPU, whose compiled kernel has no log-sum-exp, and for rules that need every key at once
    (pool="queries", "both").
    """
    asked = check_asked(q, k, v, shards, options, {"backend"})
    if q.device.type == "cpu":
        raise NotImplementedError("q must be on CUDA for ring, since the CPU's kernel has no log-sum-exp, got the CPU")
    if needs_every_key(asked.config):
        raise NotImplementedError(
            f"pool must be 'keys' for ring, got {asked.config.pool!r}, which scores every key; use context_parallel"
        )
    return pass_around(prepare(q, k, v, shards, asked))


def pass_around(local: Local) -> Float[Tensor, "B Hq n Dv"]:
    """The ring itself, by a kernel that gives its log-sum-exp."""
    q, shards, account = local.q, local.shards, local.asked.account
    chosen, _ = choose_blocks(local)
    layout, ranks, me = shards.layout, shards.ranks(SEQUENCE), shards.place
    here = [F.pad(x, (0, 0, 0, layout.most_keys - x.shape[2])).contiguous() for x in (local.k, local.v)]
    account.all_gather += (ranks - 1) * sum(x.nbytes for x in here)
    total: list[Part | None] = [None] * len(chosen)
    for step in range(ranks):
        coming, works = pass_on(here, shards) if step + 1 < ranks else ([], [])
        owner = (me - step) % ranks
        for number, (chunk, blocks) in enumerate(zip(local.chunks, chosen, strict=True)):
            part = attend_shard(local, chunk, blocks, here, owner)
            if part is not None:
                total[number] = _as_total(part) if total[number] is None else _merge_compiled(total[number], part)
        for work in works:
            with answering():
                work.wait()
        account.fetched += sum(x.nbytes for x in coming)
        here = coming
    out = q.new_empty(*q.shape[:3], local.v.shape[3])
    for chunk, (own, _) in zip(local.chunks, total, strict=True):
        out[:, :, chunk.rows] = own.to(out.dtype)
    if local.first_far < local.count:
        attend_far_rows(local, out)
    return out


def pass_on(here: list[Tensor], shards: Shards) -> tuple[list[Tensor], list[dist.Work]]:
    """Sends to the next rank what this one has, and receives what the one before had."""
    group, ranks, me = shards.group(SEQUENCE), shards.ranks(SEQUENCE), shards.place
    after, before = (dist.get_global_rank(group, (me + step) % ranks) for step in (1, -1))
    coming = [torch.empty_like(x) for x in here]
    sends = [dist.P2POp(dist.isend, x, after, group) for x in here]
    receives = [dist.P2POp(dist.irecv, x, before, group) for x in coming]
    with answering():
        return coming, dist.batch_isend_irecv(sends + receives)


Part = tuple[Float[Tensor, "B Hq n Dv"], Float[Tensor, "B Hq n"]]  # output and log-sum-exp


def merge(total: Part, part: Part) -> Part:
    """Attention over two disjoint sets of keys from that over each; float32. Nothing seen has a log-sum-exp of −∞."""
    both = torch.logaddexp(total[1], part[1])
    floor = torch.where(both == -torch.inf, 0, both)
    outs = [out * torch.exp(lse - floor)[..., None] for out, lse in (total, _as_total(part))]
    return outs[0] + outs[1], both


def _as_total(part: Part) -> Part:
    """In float32, and 0 where nothing was seen, whatever the kernel left there."""
    out, lse = part
    return torch.where((lse == -torch.inf)[..., None], 0, out.float()), lse


# One kernel: as single operations it reads and writes 46 bytes an element, so 10.
_merge_compiled = compile_whole(merge)


def attend_shard(local: Local, chunk: Chunk, blocks: Blocks, here: list[Tensor], owner: int) -> Part | None:
    """A chunk's queries over those keys of `owner` that it may see; None where there are none such."""
    layout, size, device = local.shards.layout, local.config.block_sizes[1], local.q.device
    pieces = [(p.start, min(p.stop, chunk.keys)) for p in layout.of(owner) if p.start < chunk.keys]
    if not pieces:
        return None
    count = sum(stop - start for start, stop in pieces)
    columns = torch.cat([torch.arange(a // size, -(-b // size), device=device) for a, b in pieces])
    request = replace(local.of_chunk(chunk), returns=("lse",))
    if request.own_mask is not None or not request.causal:
        position = torch.cat([torch.arange(*piece, device=device) for piece in pieces])
        request = replace(request, own_mask=at_keys(request.mask_mod, position), causal=False)
    else:
        # Pieces lie before the chunk, where it sees all, or are its own: the first keys of both are what it sees.
        before = sum(stop - start for start, stop in pieces if start < chunk.start)
        request = replace(request, q_offset=local.request.q_offset + before)
    kept, whole = (x.index_select(-1, columns) for x in blocks)
    kernel = "triton" if request.own_mask is not None else local.kernel
    qkv = local.q[:, :, chunk.rows], *(x[:, :, :count] for x in here)
    return attend(kernel, qkv, (kept, whole), request)[:2]
