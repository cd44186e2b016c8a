"""Masks one after another in one process, at other lengths and batch sizes: graphs that are reused, and others anew.

torch's CPU kernel (2.13) gave the sizes of what a mask captures names that ran into others (runtime/flex_names.py):
which masks, lengths and orders met it depends on hashes, so all of them are run, against every pair in float64.
"""

import oracle
import pytest
import torch
import torch._inductor.config
from cases import Shape, assert_attends, tensors

from mask_mods import (
    bidirectional,
    both,
    causal,
    document,
    either,
    frames,
    padding,
    prefix,
    sink,
    sliding_window,
)
from rr_flex import rr_attention

# Two batch sizes and three lengths: the first as it is, the second as symbols, the third by the second's graph.
CALLS = ((2, 384), (3, 300), (2, 457))


def lengths(B, L):
    return torch.tensor([L - 100, L // 3, L])[:B]


def ids(B, L):
    return torch.arange(L) // torch.tensor([[100], [77], [130]])[:B]


def same_document(B, L):
    """A function of a caller's own that looks up [B, L] ids."""
    own = ids(B, L)
    return lambda b, h, q_idx, kv_idx: own[b, q_idx] == own[b, kv_idx]


MASKS = {
    "document of all": lambda B, L: document(ids(1, L)[0]),
    "padding right": lambda B, L: padding(lengths(B, L)),
    "document of each": lambda B, L: document(ids(B, L)),
    "prefix of each": lambda B, L: prefix(lengths(B, L) // 2),
    "padding left": lambda B, L: padding(lengths(B, L), "left", total=L),
    "a function": same_document,
    "window, sink, frames": lambda B, L: either(sliding_window(77), sink(3), both(frames(50, past=1), bidirectional())),
}


@pytest.fixture(autouse=True, scope="module")
def nothing_compiled_by_others(nothing_compiled_before):
    """The compiler keeps code on disk, that of another torch's names too."""
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


@pytest.mark.parametrize("name", MASKS)
def test_masks_one_after_another_attend_as_alone(name):
    for B, L in CALLS:
        shape = Shape(B=B, Lq=L, Lk=L)
        q, k, v = tensors(shape)
        mask = MASKS[name](B, L)
        causal_too = not name.startswith("prefix")
        # Every visible block: the estimate, which knows no such names, would take most of the compiler's time.
        out = rr_attention(q, k, v, mask_mod=mask, causal=causal_too, min_length=10**6)
        whole = both(causal(), mask) if causal_too else mask
        assert_attends(out, q, k, v, oracle.pairs(whole, B, shape.Hq, L, L))
