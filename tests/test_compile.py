"""Compiled or not, the choice is the same; a new value never compiles anew."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from cases import EVERY_EXTENSION, FREE, SQUARE, compiled_flex, mask_by_name, no_compile, seeds, tensors
from hypothesis import Phase, given, settings
from torch.nn.attention.flex_attention import flex_attention

from rr_flex import create_rr_block_mask, rr_attention, select_blocks
from rr_flex.runtime import mends
from rr_flex.runtime.is_kept import is_kept
from rr_flex.runtime.mends import mend_torch

few = settings(max_examples=5, phases=[Phase.explicit, Phase.generate])


@torch.compile(fullgraph=True)
def compiled_select(q, k, tau):
    selection = select_blocks(q, k, tau=tau, **FREE)
    return selection.kept, selection.mass


@few
@given(seed=seeds)
def test_compiled_selection_equals_eager(seed):
    q, k, _ = tensors(SQUARE, seed)
    tau = 0.1 + 0.8 * torch.rand(SQUARE.Hq, generator=torch.Generator().manual_seed(seed))
    selection, (kept, mass) = select_blocks(q, k, tau=tau, **FREE), compiled_select(q, k, tau)
    assert torch.equal(kept, selection.kept)
    torch.testing.assert_close(mass, selection.mass, rtol=1e-5, atol=1e-5)


def test_compiled_selection_equals_eager_under_a_mask():
    q, k, _ = tensors(SQUARE)
    mask, _ = mask_by_name("left padding", SQUARE)
    select = partial(select_blocks, mask_mod=mask, causal=mask is None, order=2, block_size=(128, 64))
    kept = torch.compile(lambda q, k: select(q, k).kept, fullgraph=True)(q, k)
    assert torch.equal(kept, select(q, k).kept)


def test_new_taus_compile_nothing():
    q, k, v = tensors(SQUARE)
    rr_attention(q, k, v, tau=0.5, **FREE)
    with no_compile():
        outs = [rr_attention(q, k, v, tau=tau, **FREE) for tau in (0.1, 0.31, 0.72, 0.9, 1.0)]
    assert not torch.equal(outs[0], outs[-1])


def test_new_per_head_taus_compile_nothing():
    q, k, v = tensors(SQUARE)
    rr_attention(q, k, v, tau=[0.5, 0.6, 0.7, 0.8], **FREE)
    with no_compile():
        rr_attention(q, k, v, tau=[0.9, 0.1, 0.7, 0.2], **FREE)
        rr_attention(q, k, v, tau=torch.tensor([0.3, 1.0, 0.4, 0.2]), **FREE)


def test_new_thresholds_compile_nothing():
    q, k, v = tensors(SQUARE)
    rr_attention(q, k, v, **EVERY_EXTENSION)
    with no_compile():
        for threshold in (0.05, 0.1, 0.3):
            rr_attention(q, k, v, **EVERY_EXTENSION | {"threshold": threshold})


def test_new_offsets_compile_nothing():
    q, k, v = tensors(SQUARE)
    rr_attention(q, k, v, tau=0.5, q_offset=128, **FREE)
    with no_compile():
        # An int off the block grid is answered with more queries, which is another length.
        offsets = (0, 256, *map(torch.tensor, (1, 2, 64, 300)))
        outs = [rr_attention(q, k, v, tau=0.5, q_offset=q_offset, **FREE) for q_offset in offsets]
    assert not torch.equal(outs[0], outs[-1])


def test_new_head_offsets_compile_nothing():
    q, k, v = tensors(SQUARE)
    rr_attention(q, k, v, tau=0.5, head_offset=4, **FREE)
    with no_compile():
        for head_offset in (0, 1, 8, 12):
            rr_attention(q, k, v, tau=0.5, head_offset=head_offset, **FREE)


def test_new_masks_compile_nothing_in_the_caller_s_own_flex():
    q, k, v = tensors(SQUARE)
    compiled_flex(q, k, v, block_mask=create_rr_block_mask(q, k, tau=0.5, **FREE), enable_gqa=True)
    with no_compile():
        for seed in (1, 2, 3):
            q, k, v = tensors(SQUARE, seed)
            compiled_flex(q, k, v, block_mask=create_rr_block_mask(q, k, tau=0.1 * seed, **FREE), enable_gqa=True)


def test_the_compiled_kernel_reads_no_map_of_kept_blocks():
    """Whose index would overflow int32 at 1,048,576 tokens and 33 heads; eager attention reads it."""
    q, k, v = tensors(SQUARE)
    block_mask = create_rr_block_mask(q, k, tau=0.3, **FREE)
    exact = compiled_flex(q, k, v, block_mask=block_mask, enable_gqa=True)
    block_mask.mask_mod.kept.zero_()
    assert torch.equal(compiled_flex(q, k, v, block_mask=block_mask, enable_gqa=True), exact)


def test_both_calls_work_inside_the_caller_s_graph():
    """A model that is compiled as a whole: selection and attention are part of its graph, and not eager, not dense."""
    q, k, v = tensors(SQUARE)

    @torch.compile(fullgraph=True)
    def two_calls_and_one(q, k, v):
        block_mask = create_rr_block_mask(q, k, tau=0.3, **FREE)
        two = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
        return two, rr_attention(q, k, v, tau=0.3, **FREE)

    expected = rr_attention(q, k, v, tau=0.3, **FREE)
    for out in two_calls_and_one(q, k, v):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_a_padded_index_is_a_number_where_it_stands_at_one():
    """From torch 2.14 on padding is a concatenation on a GPU, whose index inductor wraps (runtime/mends.py)."""
    import sympy
    from torch.utils._sympy.functions import Identity

    mend_torch()
    place = sympy.Symbol("place", integer=True)
    for number in (0, 1, 1024):  # 1024 - Identity(1024) is 0, which sympy does not take to be exact
        end = (1024 - Identity(place)).xreplace({place: sympy.Integer(number)})
        assert sympy.Min(end, 1000) == min(1024 - number, 1000)
        assert sympy.Max(end, 1000) == max(1024 - number, 1000)
    assert isinstance(Identity(place), Identity)


@pytest.mark.skipif(torch.__version__ >= "2.13", reason="torch has it so itself")
def test_a_row_of_a_sum_that_programs_share_is_a_scalar():
    """With few rows of many blocks each program has one row (torch 2.11, runtime/mends.py)."""
    from torch._inductor.codegen.triton import TritonSymbols
    from torch._inductor.virtualized import V
    from torch.utils._sympy.symbol import SymT, make_symbol

    mend_torch()
    kinds = [("x", None, SymT.XBLOCK), ("r0_", 0, SymT.R0_INDEX)]
    trees = [SimpleNamespace(prefix=name, tensor_dim=dim, symt=kind) for name, dim, kind in kinds]
    kernel = SimpleNamespace(active_range_trees=lambda: trees, triton_tensor_ndim=lambda: 1)
    row, column = make_symbol(SymT.XBLOCK, 0), make_symbol(SymT.R0_INDEX, 1)
    with V.set_kernel_handler(kernel):
        assert TritonSymbols.get_block_shape(row) == ()
        assert TritonSymbols.get_block_shape(row * 7 + column) == ("R0_BLOCK",)


def test_a_kernel_looks_no_kept_block_up():
    """It visits kept blocks alone. So no offset into a map of 2³¹ blocks or more can overflow in it."""
    kept, index = torch.zeros(1, 1, 2, 2, dtype=torch.bool), torch.zeros(8, dtype=torch.int32)
    compiled = torch.compile(is_kept, fullgraph=True, options={"fx_graph_cache": False})  # which holds what was lowered
    assert compiled(kept, index, index, index, index).all() and not is_kept(kept, index, index, index, index).any()


def test_threads_mend_torch_once(monkeypatch):
    made = []
    for name in ("names_of_sizes", "value_of_index", "rows_of_split_scans", "tuning_in_threads"):
        monkeypatch.setattr(mends, f"_mend_{name}", lambda: made.append(time.sleep(0.05)))
    monkeypatch.setattr(mends, "_mend_once", cache(mends._mend_once.__wrapped__))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: mend_torch(), range(4)))
    assert len(made) == 4


def test_one_thread_chooses_a_kernel_s_form():
    """The others would time forms that the first has unloaded (torch 2.14, runtime/mends.py)."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    class Tuner(CachingAutotuner):
        def __init__(self):
            self.launchers, self.times, self.inside = ["one", "other"], 0, threading.Barrier(4)

        def benchmark_all_configs(self):
            self.times += 1
            time.sleep(0.1)
            self.launchers = self.launchers[:1]
            raise ValueError  # the rest of torch's own asks for real launchers

    tuner = Tuner()

    def launch(_):
        tuner.inside.wait()
        with suppress(ValueError):
            tuner.autotune_to_one_config()

    mend_torch()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(launch, range(4)))
    assert tuner.times == 1
