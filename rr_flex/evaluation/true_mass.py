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
    (default Lk - Lq). A row of blocks sums to its number of queries that see a key.
    Costs as much as the whole attention.
    """
    B, Hq, Lq, D = q.shape
    Hkv, Lk = k.shape[1:3]
    block_q, block_k = (block_size, block_size) if isinstance(block_size, int) else block_size
    scale = D**-0.5 if scale is None else scale
    offset = Lk - Lq if q_offset is None else q_offset
    batch = torch.arange(B, device=q.device)[:, None, None, None]
    head = torch.arange(Hq, device=q.device)[:, None, None]
    key = torch.arange(Lk, device=q.device)
    keys = k.float().mT.unsqueeze(2)

    rows = []
    for start in range(0, Lq, block_q):
        stop = min(start + block_q, Lq)
        query = torch.arange(start, stop, device=q.device)[:, None]
        # Without a mask_mod no key past the strip's last query is seen.
        seen = max(1, min(Lk, stop + offset)) if mask_mod is None else Lk
        column = key[:seen]
        visible = column <= query + offset if mask_mod is None else mask_mod(batch, head, query, column)
        strip = q[:, :, start:stop].float().unflatten(1, (Hkv, Hq // Hkv)) * scale
        scores = (strip @ keys[..., :seen]).flatten(1, 2)  # [B, Hq, rows, seen]
        probabilities = scores.masked_fill_(~visible, float("-inf")).softmax(-1)
        tiles = F.pad(probabilities, (0, -seen % block_k)).unflatten(-1, (-1, block_k)).sum(-1)
        mass = tiles.nan_to_num(0.0).sum(2)  # a query that sees nothing is NaN, and adds 0
        rows.append(F.pad(mass, (0, -(-Lk // block_k) - mass.shape[-1])))
    return torch.stack(rows, 2)
