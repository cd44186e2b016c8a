"""The mass that full attention puts on every block: what the estimate is judged against."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def true_block_mass(
    q: Float[Tensor, "B Hq Lq D"],
    k: Float[Tensor, "B Hkv Lk D"],
    *,
    block_size: int | tuple[int, int] = 128,
    mask_mod=None,
    scale: float | None = None,
    q_offset: int | None = None,
) -> Float[Tensor, "B Hq nQ nK"]:
    """Softmax probabilities over every pair, summed per block, in float32, one strip of block rows at a time.

    `mask_mod` is an element rule (b, h, q, k) that broadcasts; None is causal, with query i at position i + `q_offset`
    (default Lk - Lq). A row of blocks sums to its number of queries that see a key. The whole of attention's work is done.
    """
    B, Hq, Lq, D = q.shape
    Hkv, Lk = k.shape[1:3]
    block_q, block_k = (block_size, block_size) if isinstance(block_size, int) else block_size
    scale = D**-0.5 if scale is None else scale
    offset = Lk - Lq if q_offset is None else q_offset
    batch = torch.arange(B, device=q.device)[:, None, None, None]
    head = torch.arange(Hq, device=q.device)[:, None, None]
    key = torch.arange(Lk, device=q.device)

    rows = []
    for start in range(0, Lq, block_q):
        stop = min(start + block_q, Lq)
        query = torch.arange(start, stop, device=q.device)[:, None]
        visible = key <= query + offset if mask_mod is None else mask_mod(batch, head, query, key)
        strip = q[:, :, start:stop].float().unflatten(1, (Hkv, Hq // Hkv))
        scores = (strip @ k.float().mT.unsqueeze(2)).flatten(1, 2) * scale  # [B, Hq, rows, Lk]
        scores = scores.masked_fill(~visible, float("-inf"))
        mass = scores.softmax(-1).nan_to_num(0.0).sum(2)  # [B, Hq, Lk]; a query that sees nothing adds 0
        rows.append(F.pad(mass, (0, -Lk % block_k)).unflatten(-1, (-1, block_k)).sum(-1))
    return torch.stack(rows, 2)
