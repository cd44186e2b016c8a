"""Masks one after another in one process, at other lengths and batch sizes: graphs that are reused, and others anew.

torch's CPU kernel (2.13) gave the sizes of what a mask captures names that ran into others (runtime/mends.py):
which masks, lengths and orders met it depends on hashes, so all of them are run, against every pair in float64.
"""

import oracle
import pytest
import torch
from cases import Shape, assert_attends, tensors
from torch._functorch import config as functorch
from torch._inductor import config as inductor

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
    visible_keys,
)
from rr_flex import rr_attention
from rr_flex.sampling import moments

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
    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
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


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_sequences_shorter_than_a_vector_are_pooled(side):
    """Of 3 tokens; inductor (2.13) could not pad what `keys` computes to a stride's 8."""

    def pooled(k, lengths):
        return moments(k, 8, visible_keys(padding(lengths, side, total=3), 2, 1, 3, k.device))

    k, real = torch.arange(12.0).view(2, 1, 3, 2), torch.tensor([3, 2])
    mean, _ = torch.compile(pooled, fullgraph=True)(k, real)
    last_two = slice(1, 3) if side == "left" else slice(0, 2)
    assert mean[0].tolist() == k[0].mean(1, keepdim=True).tolist()
    assert mean[1].tolist() == k[1, :, last_two].mean(1, keepdim=True).tolist()
