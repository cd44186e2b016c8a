"""The last block rows by themselves: each one's blocks are cut into runs that attend side by side and are merged.

The kernel takes block rows in their order. A dense last row is the longest of all and starts when the others end: at
131,072 tokens attention takes 1.0 to 1.8 of 58 to 94 ms less without it with FlashAttention, 2.9 to 3.4 of 78 to 123 ms
with Triton (H100, 32 heads), and by itself in runs it takes 0.4 and 0.5 ms, the merge not counted.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mask_mods.spans import MaskMod, buffered, smaller
from rr_flex.block_mask import Lists
from rr_flex.config import RRConfig
from rr_flex.geometry import ceil_div

MOST_ROWS = 8  # apart: more fill the card by themselves, and each takes RUNS times its queries
RUNS = 8  # of each row; at 131,072 tokens 4, 8 and 16 took 0.40, 0.41 and 0.61 ms
LEAST_KEYS = 16384  # from which on, with Triton, a row takes longer than the second kernel that this compiles


def rows_apart(Lq: int, Lk: int, config: RRConfig, kernel: str) -> int:
    """How many block rows at the end of the queries attend by themselves with `kernel` ("triton", "flash", "cpu")."""
    rows = config.dense_last_rows
    short = rows >= ceil_div(Lq, config.block_sizes[0]) or (kernel == "triton" and Lk < LEAST_KEYS)
    return 0 if kernel == "cpu" or short or rows > MOST_ROWS else rows


def take_apart(lists: Lists, rows: int) -> tuple[Lists, Lists]:
    """Lists in which the last `rows` block rows are empty, and the lists of those rows, a run as a head of its own.

    Heads of the latter are [B, H · RUNS]: run r of head h is head h · RUNS + r, with an equal share of its entries.
    """
    rest, runs = [], []
    for counts, indices in (lists[:2], lists[2:]):
        rest += _without(counts, rows), indices
        runs += _in_runs(counts, indices, rows)
    return tuple(rest), tuple(runs)


def _without(counts: Int[Tensor, "B H nQ"], rows: int) -> Int[Tensor, "B H nQ"]:
    row = torch.arange(counts.shape[-1], device=counts.device)
    return buffered(torch.where(row < counts.shape[-1] - rows, counts, 0))


def _in_runs(counts: Int[Tensor, "B H nQ"], indices: Int[Tensor, "B H nQ nK"], rows: int) -> tuple[Tensor, Tensor]:
    nK = indices.shape[-1]
    first_row = counts.shape[-1] - rows
    run = torch.arange(RUNS, device=counts.device, dtype=torch.int32)[:, None]
    count = counts[:, :, None, first_row:]  # B H 1 rows
    first = count * run // RUNS  # B H RUNS rows
    length = count * (run + 1) // RUNS - first
    place = (first[..., None] + torch.arange(nK, device=counts.device)).clamp(max=nK - 1)
    entries = indices[:, :, None, first_row:].expand(-1, -1, RUNS, -1, -1).gather(-1, place)
    return buffered(length.flatten(1, 2)), buffered(entries.flatten(1, 2))


def first_query(Lq: int, rows: int, q_block: int) -> int:
    """The first query of the last `rows` block rows."""
    return (ceil_div(Lq, q_block) - rows) * q_block


def run_queries(q: Float[Tensor, "B H Lq D"], rows: int, q_block: int) -> Float[Tensor, "B H*RUNS n D"]:
    """The queries of the last rows, once for each run; n = rows · q_block, the last query repeated where it ends short.

    So n is the same for every length, and one graph serves them all.
    """
    place = first_query(q.shape[2], rows, q_block) + torch.arange(rows * q_block, device=q.device)
    return q.index_select(2, place.clamp(max=q.shape[2] - 1)).repeat_interleave(RUNS, dim=1)


def run_mask(mask_mod: MaskMod, first_query: Int[Tensor, ""], last_query: Int[Tensor, ""]) -> MaskMod:
    """`mask_mod` as the runs see it, whose heads are runs and whose queries begin at `first_query`.

    Past the last query, where the runs' block rows end short, it is asked for the last: it may look a query up.
    """

    def visible_in_run(b, h, q_idx, kv_idx):
        return mask_mod(b, h // RUNS, smaller(q_idx + first_query, last_query), kv_idx)

    return visible_in_run


def merge_runs(
    out: Float[Tensor, "B H*RUNS n Dv"], lse: Float[Tensor, "B H*RUNS n"]
) -> tuple[Float[Tensor, "B H n Dv"], Float[Tensor, "B H n"]]:
    """Attention over all runs' keys and its log-sum-exp, both from those of each run; in nats."""
    lse = lse.unflatten(1, (-1, RUNS))
    total = lse.logsumexp(2)
    share = torch.exp(lse - total[:, :, None])[..., None]
    # A run that sees nothing adds 0, whatever the kernel left there.
    parts = torch.where((lse == -torch.inf)[..., None], 0, out.unflatten(1, (-1, RUNS)) * share)
    return parts.sum(2).to(out.dtype), total


def write_last_rows(
    whole: Float[Tensor, "B H Lq ..."], last: Float[Tensor, "B H n ..."], rows: int, q_block: int
) -> None:
    """The last `rows` block rows of `whole`, in place, from what their runs were merged to."""
    first = first_query(whole.shape[2], rows, q_block)
    whole[:, :, first:] = last[:, :, : whole.shape[2] - first]
