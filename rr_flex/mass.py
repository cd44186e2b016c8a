"""Sampled queries and pooled keys to block mass: the estimate of how much attention falls on each block."""

from functools import reduce as fold
from operator import or_
from typing import Literal, NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mask_mods import any_key_visible
from mask_mods.spans import Index, MaskMod, smaller
from rr_flex.geometry import as_tensors, ceil_div, sampled_index
from rr_flex.kernels.score_mods import soft_cap
from rr_flex.runtime.compiling import compile_whole
from rr_flex.runtime.tracing import traced
from rr_flex.sampling import stride_weights, stride_weights_of_all

STRIP_ELEMENTS = 1 << 25  # float32 scores held at once: 128 MiB


class Samples(NamedTuple):
    """What is scored in place of all queries and keys, and what it stands for."""

    queries: Float[Tensor, "B Hq nq E"]
    keys: Float[Tensor, "B Hkv nk E"]
    strides: tuple[int, int]  # tokens a row of `queries`, and of `keys`, stands for
    seq_lengths: tuple[int, int]  # tokens: (Lq, Lk)
    block_size: tuple[int, int]  # tokens: (queries, keys)
    mask_mod: MaskMod
    scale: float
    head_offset: Index = 0  # global index of the first head
    # Which queries of a stride a row of `queries` is: the sampled one, or all of them pooled.
    stands_for: Literal["one", "all"] = "one"
    softcap: Tensor | float | None = None
    valid_keys: Bool[Tensor, "#B #Hkv Lk"] | None = None  # False: pooled into no stride; None: all are valid
    ends: tuple[Tensor, Tensor] | None = None  # (last query, number of keys), for strips and where a graph needs them

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks: (nQ, nK)."""
        return tuple(ceil_div(*sizes) for sizes in zip(self.seq_lengths, self.block_size, strict=True))

    @property
    def per_block(self) -> tuple[int, int]:
        """Rows of `queries`, and of `keys`, in a block."""
        return self.block_size[0] // self.strides[0], self.block_size[1] // self.strides[1]


def block_mass(samples: Samples, *, compiled: bool = True) -> Float[Tensor, "B Hq nQ nK"]:
    """Softmax of sampled queries over visible key strides, summed over each block's tile; float32.

    A key stride is visible to a sampled query as `stride_visible` says, and its share is in proportion to its number of
    valid keys, which a short last stride or padding makes fewer. A row sums to the number of its sampled queries that
    see something. Scores are held for a strip of block rows at a time. `compiled`: strips on a GPU may be one graph.
    """
    nQ, _ = samples.grid
    nq, queries_per_block = samples.queries.shape[2], samples.per_block[0]
    rows = rows_at_once(samples)
    compiled = compiled and samples.queries.device.type == "cuda" and not traced()
    strip = _strip_mass_compiled if compiled else _strip_mass
    stride_index = torch.arange(nq, device=samples.queries.device)[:, None]
    weights = key_weights(samples)
    # A strip reads `ends` alone: lengths are ints, which would make a graph for each.
    Lq, Lk = samples.seq_lengths
    samples = samples._replace(ends=samples.ends or as_tensors((Lq - 1, Lk), samples.queries.device))
    # One strip is no loop: that keeps a graph open to other lengths.
    if nQ <= rows:
        return _strip_mass(samples, stride_index, weights)
    size = rows * queries_per_block
    parts = zip(samples.queries.split(size, dim=2), stride_index.split(size), strict=True)
    return torch.cat([strip(samples._replace(queries=part), index, weights) for part, index in parts], dim=2)


def rows_at_once(samples: Samples) -> int:
    """Block rows in a strip."""
    B, Hq = samples.queries.shape[:2]
    return max(1, STRIP_ELEMENTS // (B * Hq * samples.per_block[0] * samples.keys.shape[2]))


def _strip_mass(
    samples: Samples, stride_index: Int[Tensor, "n 1"], weights: Float[Tensor, "#B #Hkv nk"] | None
) -> Float[Tensor, "B Hq rows nK"]:
    """The mass of the block rows whose samples are `samples.queries`, those of strides `stride_index`."""
    B, Hq, n, _ = samples.queries.shape
    queries_per_block, keys_per_block = samples.per_block
    nk, device = samples.keys.shape[2], samples.queries.device
    index = Indices(
        torch.arange(B, device=device)[:, None, None, None],
        torch.arange(Hq, device=device)[:, None, None],
        stride_index,
        torch.arange(nk, device=device) * samples.strides[1],
    )
    last_query, Lk = samples.ends
    visible = stride_visible(samples, index, last_query=last_query, Lk=Lk)
    scores = soft_cap(_scores(samples.queries.float() * samples.scale, samples.keys), samples.softcap)
    if weights is not None:
        group = 1 if weights.shape[1] == 1 else Hq // samples.keys.shape[1]
        weights = weights.repeat_interleave(group, 1)[:, :, None]  # B Hq 1 nk, or 1 for B and for Hq
    share = _masked_softmax(scores, visible, weights)  # B Hq n nk
    share = F.pad(share, (0, -nk % keys_per_block, 0, -n % queries_per_block))
    return reduce(share, "b h (Q q) (K k) -> b h Q K", "sum", q=queries_per_block, k=keys_per_block)


_strip_mass_compiled = compile_whole(_strip_mass, dynamic=True)


def key_weights(samples: Samples) -> Float[Tensor, "#B #Hkv nk"] | None:
    """`stride_weights` of the keys; None where all strides are alike, one key each."""
    valid, stride = samples.valid_keys, samples.strides[1]
    if valid is not None:
        return stride_weights(valid, stride)
    return None if stride == 1 else stride_weights_of_all(samples.seq_lengths[1], stride, samples.keys.device)


class Indices(NamedTuple):
    """What is looked up in a mask, elementwise in tensors that broadcast."""

    b: Tensor
    h: Tensor
    stride: Tensor  # number of the query stride
    first_key: Tensor  # of the key stride


def stride_visible(samples: Samples, index: Indices, *, last_query: Index, Lk: Index) -> Bool[Tensor, "..."]:
    """Does the mask show any key of the stride at `first_key` to the query that stands for a query stride?

    The sampled query, or where all are pooled the first or the last query of the stride: that is any query of it under
    a mask whose keys in view move with the query, and never one that none of them sees. Lengths are arguments: in a
    mask_mod they are tensors.
    """
    q_stride, k_stride = samples.strides
    first = index.stride * q_stride
    if samples.stands_for == "all":
        queries = [smaller(first + step, last_query) for step in dict.fromkeys((0, q_stride - 1))]
    else:
        queries = [sampled_index(index.h + samples.head_offset, index.stride, q_stride, last_query)]
    seen = [any_key_visible(samples.mask_mod, index.b, index.h, q, index.first_key, k_stride, Lk) for q in queries]
    return fold(or_, seen)


def row_share(mass: Float[Tensor, "... nQ nK"]) -> Float[Tensor, "... nQ nK"]:
    """Each block's share of its row; 0 in a row without mass, NaN in one that has NaN."""
    total = mass.sum(-1, keepdim=True)
    return mass / torch.where(total == 0, 1, total)


def _scores(queries: Float[Tensor, "B Hq n E"], keys: Float[Tensor, "B Hkv nk E"]) -> Float[Tensor, "B Hq n nk"]:
    """Dot products in float32, each key head shared by its group of query heads without repeating keys."""
    Hkv, n = keys.shape[1], queries.shape[2]
    grouped = rearrange(queries.float(), "b (g r) n e -> b g (r n) e", g=Hkv)
    return rearrange(grouped @ keys.float().mT, "b g (r n) k -> b (g r) n k", n=n)


def _masked_softmax(scores: Tensor, visible: Tensor, weights: Tensor | None) -> Tensor:
    """Softmax over the visible last axis, each exponential times its weight (0 hides it).

    A row with nothing visible is 0; NaN and inf scores stay visible as NaN.
    """
    scores = scores if weights is None else scores + weights.log()
    scores = torch.where(visible, scores, -torch.inf)
    highest = scores.amax(-1, keepdim=True)
    weight = torch.exp(scores - torch.where(highest == -torch.inf, 0, highest))
    return weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
