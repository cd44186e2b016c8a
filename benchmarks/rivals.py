"""Rivals' selection rules as maps of scores, in plain PyTorch, so that all run on the same kernel at the same density.

Each scores every visible block, [B, Hq, nQ, nK] float32; `at_density` keeps those above one threshold. Their own
budgets and kernels are not copied, and no time is claimed for them.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from rr_flex.evaluation.true_mass import true_block_mass
from rr_flex.geometry import ceil_div

STRIP_SCORES = 1 << 27  # float32 scores held at once: 512 MiB
BISECTIONS = 40


def at_density(
    score: Float[Tensor, "B Hq nQ nK"],
    visible: Bool[Tensor, "#B #Hq nQ nK"],
    mandatory: Bool[Tensor, "#B #Hq nQ nK"],
    density: float,
) -> Bool[Tensor, "B Hq nQ nK"]:
    """Mandatory blocks, and those above one threshold for all rows and heads, so that `density` of the visible is kept.

    The largest threshold that keeps at least that much; mandatory blocks alone may be more.
    """
    visible = visible.expand_as(score)
    score = torch.where(visible, score, -torch.inf)
    wanted = density * visible.sum().item()
    low = score[visible].min().item() - 1  # keeps all
    high = score.max().item()
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = ((score > middle) | mandatory & visible).sum().item() >= wanted
        low, high = (middle, high) if enough else (low, middle)
    return (score > low) | mandatory & visible


def antidiagonal(q: Tensor, k: Tensor, block_size: tuple[int, int], stride: int = 8) -> Float[Tensor, "B Hq nQ nK"]:
    """XAttention (arXiv 2503.16428): softmax over sums along the antidiagonals of stride × stride tiles."""
    L = q.shape[2]
    tiles = ceil_div(L, stride)
    q, k = (F.pad(x, (0, 0, 0, tiles * stride - L)) for x in (q, k))
    # Token i of a query stride meets token stride − 1 − i of a key stride: one product over the strides laid flat.
    scale = q.shape[-1] ** -0.5 / stride
    q = q.unflatten(2, (tiles, stride)).flip(3).flatten(3)
    k = k.unflatten(2, (tiles, stride)).flatten(3)
    per_block = (block_size[0] // stride, block_size[1] // stride)
    strips = []
    for scores, row in strips_of_scores(q, k, scale, per_block[0]):
        hidden = torch.arange(tiles, device=q.device) > row[:, None]
        share = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        strips.append(sum_tiles(share, per_block))
    return torch.cat(strips, 2)


def block_mean_keys(q: Tensor, k: Tensor, block_size: tuple[int, int]) -> Float[Tensor, "B Hq nQ nK"]:
    """FlashPrefill (arXiv 2603.06199): exp(query · mean key of the block) summed over a block's queries, as a share of
    its row's largest. In logs. A block counts for a query once its last key is visible."""
    means = block_means(k, block_size[1])
    last_key = torch.arange(1, means.shape[2] + 1, device=q.device) * block_size[1] - 1
    strips = []
    for scores, row in strips_of_scores(q, means, q.shape[-1] ** -0.5, block_size[0]):
        scores = scores.masked_fill(last_key > row[:, None], -torch.inf)
        padded = F.pad(scores, (0, 0, 0, -scores.shape[2] % block_size[0]), value=-torch.inf)
        mass = padded.unflatten(2, (-1, block_size[0])).logsumexp(3)
        strips.append((mass - mass.amax(-1, keepdim=True)).nan_to_num(-1e4, neginf=-1e4))
    return torch.cat(strips, 2)


def pooled_top_k(q: Tensor, k: Tensor, block_size: tuple[int, int]) -> Float[Tensor, "B Hq nQ nK"]:
    """Mean query · mean key of each block; the score is minus the rank in the row, over the visible blocks' number."""
    queries, keys = block_means(q, block_size[0]), block_means(k, block_size[1])
    strips = []
    for scores, row in strips_of_scores(queries, keys, q.shape[-1] ** -0.5, 1):
        last_query = (row + 1) * block_size[0] - 1
        hidden = torch.arange(keys.shape[2], device=q.device) * block_size[1] > last_query[:, None]
        rank = scores.masked_fill(hidden, -torch.inf).argsort(-1, descending=True).argsort(-1)
        strips.append(-rank.float() / (~hidden).sum(-1, keepdim=True))
    return torch.cat(strips, 2)


def random_blocks(q: Tensor, k: Tensor, block_size: tuple[int, int]) -> Float[Tensor, "B Hq nQ nK"]:
    shape = (*q.shape[:2], ceil_div(q.shape[2], block_size[0]), ceil_div(k.shape[2], block_size[1]))
    return torch.rand(shape, generator=torch.Generator(q.device).manual_seed(0), device=q.device)


def oracle(q: Tensor, k: Tensor, block_size: tuple[int, int]) -> Float[Tensor, "B Hq nQ nK"]:
    """Each block's share of its row's true mass: no estimate can do better by mass. Costs as much as attention."""
    mass = true_block_mass(q, k, block_size=block_size)
    return mass / mass.sum(-1, keepdim=True)


Rule = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]

RULES: dict[str, Rule] = {
    "antidiagonal": antidiagonal,
    "block-mean-keys": block_mean_keys,
    "pooled-top-k": pooled_top_k,
    "random": random_blocks,
    "oracle": oracle,
}


def block_means(x: Float[Tensor, "B H L D"], size: int) -> Float[Tensor, "B H n D"]:
    L = x.shape[2]
    n = ceil_div(L, size)
    counts = torch.full((n, 1), float(size), device=x.device)
    counts[-1] = L - (n - 1) * size
    sums = F.pad(x, (0, 0, 0, n * size - L)).unflatten(2, (n, size)).sum(3, dtype=torch.float32)
    return (sums / counts).to(x.dtype)


def strips_of_scores(q: Tensor, k: Tensor, scale: float, rows_per_block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Scaled scores [B Hq rows nk] in float32 of whole blocks of rows at a time, and the rows' indices."""
    B, Hq, n, _ = q.shape
    Hkv, nk = k.shape[1:3]
    blocks = max(1, STRIP_SCORES // (B * Hq * rows_per_block * nk))
    keys = k.float().mT
    for row in torch.arange(n, device=q.device).split(blocks * rows_per_block):
        strip = q[:, :, row].float().unflatten(1, (Hkv, Hq // Hkv)).flatten(2, 3)
        yield (strip @ keys).unflatten(2, (Hq // Hkv, len(row))).flatten(1, 2) * scale, row


def sum_tiles(share: Float[Tensor, "B Hq n nk"], per_block: tuple[int, int]) -> Float[Tensor, "B Hq nQ nK"]:
    padded = F.pad(share, (0, -share.shape[3] % per_block[1], 0, -share.shape[2] % per_block[0]))
    return padded.unflatten(3, (-1, per_block[1])).unflatten(2, (-1, per_block[0])).sum((3, 5))
