"""Prefill past one card: heads, Ulysses, context parallel and ring on torch.distributed."""

from rr_flex.distributed.by_heads import head_parallel, ulysses
from rr_flex.distributed.context import context_parallel
from rr_flex.distributed.layout import Layout, Piece, balanced, contiguous, zigzag
from rr_flex.distributed.ring import ring
from rr_flex.distributed.shards import Account, Shards, make_mesh

__all__ = [
    "Account",
    "Layout",
    "Piece",
    "Shards",
    "balanced",
    "context_parallel",
    "contiguous",
    "head_parallel",
    "make_mesh",
    "ring",
    "ulysses",
    "zigzag",
]
