"""The dense last block rows of a sequence: their few queries go to all keys, instead of all keys to them.

The rank that holds them would have to fetch every key, and do a share of the work that grows with the ranks. So every
rank attends for them over its own keys, and the parts are merged by log-sum-exp.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from rr_flex.distributed.local import Local
from rr_flex.distributed.positions import at_keys, from_query
from rr_flex.distributed.shards import SEQUENCE, answering
from rr_flex.distributed.transfer import all_gather
from rr_flex.geometry import ceil_div
from rr_flex.kernels.choose import KERNELS
from rr_flex.kernels.score_mods import soft_cap
from rr_flex.request import Request

Parts = tuple[Float[Tensor, "B Hq c Dv"], Float[Tensor, "B Hq c"]]


def attend_far_rows(local: Local, out: Float[Tensor, "B Hq n Dv"]) -> None:
    """Writes the outputs of this rank's queries from position `local.first_far` on, if it has such, into `out`.

    Every rank takes part.
    """
    shards, q, group = local.shards, local.q, local.shards.group(SEQUENCE)
    first, layout = local.first_far, shards.layout
    queries = q.new_zeros(*q.shape[:2], local.count - first, q.shape[3])
    own, row = [], 0  # (rows here, rows among the far ones)
    for _, start, stop in layout.queries_of(shards.place):
        far = max(start, first)
        if far < stop:
            own.append((slice(row + far - start, row + stop - start), slice(far - first, stop - first)))
        row += stop - start
    for here, there in own:
        queries[:, :, there] = q[:, :, here]
    with answering():
        dist.all_reduce(queries, group=group)
    part, lse = _over_own_keys(local, queries)
    gathered = lse.new_empty(shards.ranks(SEQUENCE) * lse.shape[0], *lse.shape[1:])
    with answering():
        all_gather(gathered, lse.contiguous(), group=group)
    total = gathered.unflatten(0, (-1, lse.shape[0])).logsumexp(0)
    share = torch.exp(lse - torch.where(total == -torch.inf, 0, total))
    # A rank whose keys none of them sees adds 0, whatever the kernel left there.
    merged = torch.where((lse == -torch.inf)[..., None], 0, part.float() * share[..., None])
    with answering():
        dist.all_reduce(merged, group=group)
    for here, there in own:
        out[:, :, here] = merged[:, :, there].to(out.dtype)
    local.asked.account.fetched += 2 * (queries.nbytes + merged.nbytes) + gathered.nbytes


def _over_own_keys(local: Local, queries: Float[Tensor, "B Hq c D"]) -> Parts:
    """(out, log-sum-exp) of all far queries over this rank's keys."""
    pieces, device, first = local.shards.layout.of(local.shards.place), queries.device, local.first_far
    # Keys lie in the order of their positions: of those before the far ones every query sees all.
    before = sum(max(0, min(piece.stop, first) - piece.start) for piece in pieces)
    request = replace(local.request, q_offset=local.request.q_offset + before)
    shared_out = any(piece.stop > first < piece.start for piece in pieces)
    if request.own_mask is not None or shared_out or local.kernel == "cpu":
        position = torch.cat([torch.arange(piece.start, piece.stop, device=device) for piece in pieces])
        mask = at_keys(from_query(local.request.mask_mod, local.request.q_offset + first), position)
        request = replace(request, own_mask=mask, causal=False)
    if local.kernel == "cpu":
        return _in_plain_operations(queries, local.k, local.v, request)
    rows = ceil_div(queries.shape[2], local.config.block_sizes[0])
    request = replace(request, estimate="none", returns=("lse",), rows_apart=rows)
    kernel = local.kernel if request.own_mask is None else "triton"
    return KERNELS[kernel].attend(queries, local.k, local.v, request)[:2]


def _in_plain_operations(queries: Tensor, k: Tensor, v: Tensor, request: Request) -> Parts:
    """The same where the kernel gives no log-sum-exp; float32, one key head at a time."""
    (B, _, n, _), (Hkv, m), device = queries.shape, k.shape[1:3], queries.device
    b, row = torch.arange(B, device=device)[:, None, None, None], torch.arange(n, device=device)[:, None]
    outs, sums = [], []
    for key_head, own in enumerate(queries.chunk(Hkv, 1)):
        h = torch.arange(own.shape[1], device=device)[:, None, None] + key_head * own.shape[1]
        scores = soft_cap(own.float() * request.scale @ k[:, key_head, None].float().mT, request.softcap)
        scores = scores.masked_fill(~request.mask_mod(b, h, row, torch.arange(m, device=device)), -torch.inf)
        lse = scores.logsumexp(-1)
        weight = torch.exp(scores - torch.where(lse == -torch.inf, 0, lse)[..., None])
        outs.append(weight @ v[:, key_head, None].float())
        sums.append(lse)
    return torch.cat(outs, 1), torch.cat(sums, 1)
