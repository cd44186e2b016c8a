"""Compiled or not, the choice is the same; a new value never compiles anew."""

import contextlib
from functools import partial

import pytest
import torch
from cases import AHEAD, MASKS, SQUARE, compiled_flex, mask_by_name, seeds, taus, tensors
from hypothesis import Phase, given, settings
from torch._dynamo.utils import counters

from rr_flex import create_rr_block_mask, rr_attention, select_blocks

few = settings(max_examples=5, phases=[Phase.explicit, Phase.generate])


@torch.compile(fullgraph=True)
def compiled_kept(q, k, tau):
    selection = select_blocks(q, k, tau=tau)
    return selection.kept, selection.mass


@few
@given(seed=seeds, tau=taus)
@pytest.mark.parametrize("shape", [SQUARE, AHEAD])
def test_compiled_selection_equals_eager(shape, seed, tau):
    q, k, _ = tensors(shape, seed)
    selection, per_head = select_blocks(q, k, tau=tau), torch.full((shape.Hq,), tau)
    kept, mass = compiled_kept(q, k, per_head)
    assert torch.equal(kept, selection.kept)
    torch.testing.assert_close(mass, selection.mass, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MASKS)
def test_compiled_selection_equals_eager_under_any_mask(name):
    q, k, _ = tensors(SQUARE)
    mask, _ = mask_by_name(name, SQUARE)
    select = partial(select_blocks, mask_mod=mask, order=2, block_size=(128, 64))
    kept = torch.compile(lambda q, k: select(q, k).kept, fullgraph=True)(q, k)
    assert torch.equal(kept, select(q, k).kept)


@contextlib.contextmanager
def no_compile():
    """Nothing inside may compile a graph."""
    before = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert counters["stats"]["unique_graphs"] == before


def test_new_taus_compile_nothing():
    q, k, v = tensors(SQUARE)
    rr_attention(q, k, v, tau=0.5)
    with no_compile():
        outs = [rr_attention(q, k, v, tau=tau) for tau in (0.1, 0.31, 0.72, 0.9, 1.0)]
    assert not torch.equal(outs[0], outs[-1])


def test_new_per_head_taus_compile_nothing():
    q, k, v = tensors(SQUARE)
    rr_attention(q, k, v, tau=[0.5, 0.6, 0.7, 0.8])
    with no_compile():
        rr_attention(q, k, v, tau=[0.9, 0.1, 0.7, 0.2])
        rr_attention(q, k, v, tau=torch.tensor([0.3, 1.0, 0.4, 0.2]))


def test_new_thresholds_compile_nothing():
    q, k, v = tensors(SQUARE)
    rr_attention(q, k, v, budget="threshold", threshold=0.1)
    with no_compile():
        for threshold in (0.05, 0.2, 0.3):
            rr_attention(q, k, v, budget="threshold", threshold=threshold)


def test_new_offsets_compile_nothing():
    q, k, v = tensors(AHEAD)
    rr_attention(q, k, v, tau=0.5, q_offset=127)
    with no_compile():
        outs = [rr_attention(q, k, v, tau=0.5, q_offset=q_offset) for q_offset in (0, 1, 2, 64, 126)]
    assert not torch.equal(outs[0], outs[-1])


def test_new_head_offsets_compile_nothing():
    q, k, v = tensors(SQUARE)
    rr_attention(q, k, v, tau=0.5, head_offset=4)
    with no_compile():
        for head_offset in (0, 1, 8, 12):
            rr_attention(q, k, v, tau=0.5, head_offset=head_offset)


@pytest.mark.parametrize("name", MASKS)
def test_new_mask_values_compile_nothing(name):
    q, k, v = tensors(SQUARE)
    first = rr_attention(q, k, v, mask_mod=mask_by_name(name, SQUARE, 0)[0], tau=0.5)
    with no_compile():
        outs = [rr_attention(q, k, v, mask_mod=mask_by_name(name, SQUARE, seed)[0], tau=0.5) for seed in (1, 2, 3)]
    assert not torch.equal(first, outs[-1])


def test_new_masks_compile_nothing_in_the_caller_s_own_flex():
    q, k, v = tensors(SQUARE)
    compiled_flex(q, k, v, block_mask=create_rr_block_mask(q, k, tau=0.5), enable_gqa=True)
    with no_compile():
        for seed in (1, 2, 3):
            q, k, v = tensors(SQUARE, seed)
            compiled_flex(q, k, v, block_mask=create_rr_block_mask(q, k, tau=0.1 * seed), enable_gqa=True)
