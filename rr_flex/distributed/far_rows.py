"""The dense last block rows of a sequence: their few queries go to all keys, instead of all keys to them.

The rank that holds them would have to fetch every key, and do a share of the work that grows with the ranks. So every
rank attends for them over its own keys, and the parts are merged by log-sum-exp.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from mask_mods import hides_keys
from rr_flex.distributed.choosing import Chosen
from rr_flex.distributed.local import Local
from rr_flex.distributed.position_masks import at_positions
from rr_flex.distributed.shards import SEQUENCE, answering
from rr_flex.distributed.transfer import all_gather
from rr_flex.geometry import ceil_div
from rr_flex.kernels.choose import KERNELS
from rr_flex.kernels.last_rows import rows_apart
from rr_flex.kernels.score_mods import soft_cap

MOST_ROWS = 8  # more of them are work like any other


def first_far_query(local: Local) -> int:
    """Position of the first query of the dense last rows, or the number of tokens where none go to the keys.

    Under padding the last rows lie elsewhere for each sequence, and stay where they are.
    """
    layout, config, q_block = local.shards.layout, local.config, local.config.block_sizes[0]
    rows = config.dense_last_rows
    stays = local.request.dense or rows > MOST_ROWS or hides_keys(local.asked.mask)
    if stays or layout.ranks == 1:
        return local.count
    return max(layout.first_query, (ceil_div(local.count, q_block) - rows) * q_block)


def without_far_rows(chosen: Chosen, local: Local, first: int) -> Chosen:
    """Blocks without those of queries from position `first` on."""
    position = local.shards.layout.positions(local.shards.place, local.q.device)
    near = position[:: chosen.block_size[0]] < first
    return chosen._replace(kept=chosen.kept & near[:, None])


def attend_far_rows(local: Local, first: int) -> Float[Tensor, "B Hq c Dv"]:
    """The outputs of this rank's queries from position `first` on, c of them, perhaps none; every rank takes part."""
    shards, q, group = local.shards, local.q, local.shards.group(SEQUENCE)
    position = shards.layout.positions(shards.place, q.device)
    own = int(sum(max(0, p.stop - max(p.start, first)) for p in shards.layout.queries_of(shards.place)))
    place = position[len(position) - own :] - first  # of the own ones among all
    queries = q.new_zeros(*q.shape[:2], local.count - first, q.shape[3])
    queries[:, :, place] = q[:, :, q.shape[2] - own :]
    with answering():
        dist.all_reduce(queries, group=group)
    parts = [_over_own_keys(local, queries, strip, first) for strip in local.strips]
    out, lse = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    gathered = lse.new_empty(shards.ranks(SEQUENCE) * lse.shape[0], *lse.shape[1:])
    with answering():
        all_gather(gathered, lse, group=group)
    total = gathered.unflatten(0, (-1, lse.shape[0])).logsumexp(0)
    share = torch.where(lse == -torch.inf, 0, torch.exp(lse - torch.where(total == -torch.inf, 0, total)))
    merged = out * share[..., None]
    with answering():
        dist.all_reduce(merged, group=group)
    local.asked.account.fetched += 2 * (queries.nbytes + merged.nbytes) + gathered.nbytes
    return merged[:, :, place].to(q.dtype)


def _over_own_keys(local: Local, queries: Tensor, strip: tuple[slice, slice], first: int) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) of all far queries of a strip over this rank's keys, float32, one key head at a time."""
    heads, key_heads = strip
    device, layout = queries.device, local.shards.layout
    at = torch.cat([torch.arange(p.start, p.stop, device=device) for p in layout.of(local.shards.place)])
    asks = torch.arange(first, local.count, device=device)
    B, group = queries.shape[0], queries.shape[1] // local.k.shape[1]
    sizes = B, heads.stop - heads.start, local.count
    mask = at_positions(local.position_mask(heads), asks, sizes)
    b = torch.arange(B, device=device)[:, None, None, None]
    row = torch.arange(len(asks), device=device)[:, None]
    outs, sums = [], []
    for number, key_head in enumerate(range(key_heads.start, key_heads.stop)):
        h = torch.arange(number * group, (number + 1) * group, device=device)[:, None, None]
        own = queries[:, key_head * group : (key_head + 1) * group].float() * local.request.scale
        scores = soft_cap(own @ local.k[:, key_head, None].float().mT, local.request.softcap)
        scores = scores.masked_fill(~mask(b, h, row, at), -torch.inf)
        lse = scores.logsumexp(-1)
        weight = torch.exp(scores - torch.where(lse == -torch.inf, 0, lse)[..., None])
        outs.append(weight @ local.v[:, key_head, None].float())
        sums.append(lse)
    return torch.cat(outs, 1), torch.cat(sums, 1)


def last_rows_here(local: Local) -> int:
    """How many of this rank's last block rows attend by themselves."""
    pieces = local.shards.layout.queries_of(local.shards.place)
    rows = ceil_div(pieces[-1].stop - pieces[-1].start, local.config.block_sizes[0])
    if first_far_query(local) < local.count or local.request.dense:
        return 0
    if pieces[-1].stop < local.count or rows < local.config.dense_last_rows:
        return 0
    least_keys = KERNELS[local.kernel].least_keys_apart
    return 0 if least_keys is None else rows_apart(local.q.shape[2], local.count, local.config, least_keys)
