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

from mask_mods.spans import MaskMod
from rr_flex.distributed.asked import check_asked
from rr_flex.distributed.attend import attend
from rr_flex.distributed.choosing import Chosen, for_strip, needs_every_key
from rr_flex.distributed.context import choose_blocks, prepare
from rr_flex.distributed.local import Local
from rr_flex.distributed.shards import SEQUENCE, Shards, answering
from rr_flex.distributed.transfer import Owners


def ring(
    q: Float[Tensor, "B Hq n D"],
    k: Float[Tensor, "B Hkv m D"],
    v: Float[Tensor, "B Hkv m Dv"],
    shards: Shards,
    **options: Any,
) -> Float[Tensor, "B Hq n Dv"]:
    """What `context_parallel` gives, by passing shards of keys and values around the ranks of "sequence".

    Options are config or its fields, mask_mod, causal, scale, softcap, account. NotImplementedError on every rank on
    the CPU, whose compiled kernel has no log-sum-exp, and for rules that need every key at once (pool="queries",
    "both").
    """
    asked = check_asked(q, k, v, shards, options, set())
    if q.device.type == "cpu":
        raise NotImplementedError("q must be on CUDA for ring, since the CPU's kernel has no log-sum-exp, got the CPU")
    if needs_every_key(asked.config):
        raise NotImplementedError(
            f"pool must be 'keys' for ring, got {asked.config.pool!r}, which scores every key; use context_parallel"
        )
    local = prepare(q, k, v, shards, asked)
    chosen, _ = choose_blocks(local)
    size, ranks, me = local.config.block_sizes[1], shards.ranks(SEQUENCE), shards.place
    owners = Owners(shards.layout, size, q.device)
    longest = max(len(columns) for columns in owners.columns) * size
    here = [F.pad(x, (0, 0, 0, longest - x.shape[2])).contiguous() for x in (k, v)]
    asked.account.all_gather += (ranks - 1) * sum(x.nbytes for x in here)
    total, lse = None, None
    for step in range(ranks):
        coming, works = pass_on(here, shards) if step + 1 < ranks else (None, [])
        owner = (me - step) % ranks
        out, own_lse = _attend_shard(local, chosen, here, owners.columns[owner], owner)
        total, lse = (out.float(), own_lse) if total is None else merge(total, lse, out, own_lse)
        for work in works:
            with answering():
                work.wait()
        if coming is not None:
            asked.account.fetched += sum(x.nbytes for x in coming)
        here = coming
    return total.to(q.dtype)


def pass_on(here: list[Tensor], shards: Shards) -> tuple[list[Tensor], list[dist.Work]]:
    """Sends to the next rank what this one has, and receives what the one before had."""
    group, ranks, me = shards.group(SEQUENCE), shards.ranks(SEQUENCE), shards.place
    after, before = (dist.get_global_rank(group, (me + step) % ranks) for step in (1, -1))
    coming = [torch.empty_like(x) for x in here]
    sends = [dist.P2POp(dist.isend, x, after, group) for x in here]
    receives = [dist.P2POp(dist.irecv, x, before, group) for x in coming]
    with answering():
        return coming, dist.batch_isend_irecv(sends + receives)


def merge(total: Tensor, lse: Tensor, out: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from that over each; float32. Nothing seen has a log-sum-exp of −∞."""
    both = torch.logaddexp(lse, own)
    floor = torch.where(both == -torch.inf, 0, both)
    parts = [
        torch.where((w == -torch.inf)[..., None], 0, x * torch.exp(w - floor)[..., None])
        for x, w in ((total, lse), (out.float(), own))
    ]
    return parts[0] + parts[1], both


def _attend_shard(local: Local, chosen: list[Chosen], here: list[Tensor], columns: Tensor, owner: int):
    """This rank's queries over the shard of `owner`: (out, lse)."""
    size = local.config.block_sizes[1]
    blocks = here[0].shape[2] // size
    position = torch.full((blocks * size,), local.count, dtype=torch.int64, device=columns.device)
    own = torch.cat([torch.arange(p.start, p.stop, device=columns.device) for p in local.shards.layout.of(owner)])
    position[: len(own)] = own  # pieces begin at whole blocks, so only the last key block is short
    outs, sums = [], []
    for (heads, key_heads), one in zip(local.strips, chosen, strict=True):
        pad = (0, blocks - len(columns))
        kept, visible, whole = (F.pad(x.index_select(-1, columns), pad) for x in one[:3])
        mask = at_keys(one.mask_mod, position)
        seen = Chosen(kept, visible, whole, one.block_size, (local.q.shape[2], blocks * size), mask)
        request = replace(for_strip(local.request, heads, mask), returns=("lse",))
        out, lse, _ = attend(local.q[:, heads], *(x[:, key_heads] for x in here), seen, request)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs, 1), torch.cat(sums, 1)


def at_keys(mask_mod: MaskMod, position: Tensor) -> MaskMod:
    """`mask_mod` whose key j stands at position[j]."""

    def moved_mask(b, h, q_idx, kv_idx):
        return mask_mod(b, h, q_idx, position[kv_idx])

    return moved_mask
