"""Dense under `min_length` keys or, if that is not given, where the costs of the card say so; and it says so."""

import sys
import types
from functools import partial

import pytest
import torch
from cases import FREE, SQUARE, tensors
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from mask_mods import both, causal, sliding_window
from rr_flex import attention, create_rr_block_mask, rr_attention, select_blocks
from rr_flex.kernels import dense
from rr_flex.kernels.dense import keys_of_dense_call

pytestmark = pytest.mark.usefixtures("one_graph_a_shape")
DENSE = {"tau": 0.1, **FREE, "min_length": 301}


def count_of(call):
    before = attention.calls.copy()
    out = call()
    return out, dict(attention.calls - before)


def test_a_short_context_is_dense_and_counted():
    q, k, v = tensors(SQUARE)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out, counted = count_of(lambda: rr_attention(q, k, v, **DENSE))
    torch.testing.assert_close(out, exact)
    assert counted == {"dense": 1}
    everything = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(rr_attention(q, k, v, causal=False, **DENSE), everything)


@pytest.mark.parametrize("with_lse", [False, True])
def test_a_short_context_goes_to_flash_attention_4_as_that_takes_it(monkeypatch, with_lse):
    q, k, v = tensors(SQUARE)

    def flash_attn_func(*tensors, causal, softmax_scale):  # of B L H D; some releases return the log-sum-exp too
        q, k, v = (x.transpose(1, 2) for x in tensors)
        mask = causal_lower_right(q.shape[2], k.shape[2]) if causal else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=True)
        return (out.transpose(1, 2), None) if with_lse else out.transpose(1, 2)

    installed = types.ModuleType("flash_attn.cute.interface")
    installed.flash_attn_func = flash_attn_func
    for name in ("flash_attn", "flash_attn.cute", installed.__name__):
        monkeypatch.setitem(sys.modules, name, installed)
    monkeypatch.setattr(dense, "_may_serve", lambda q: True)
    monkeypatch.setattr(dense, "_right", {})
    rr_attention(q, k, v, **DENSE)
    assert not dense._right  # for so few tokens its launch takes too long
    monkeypatch.setattr(dense, "SHORTEST_FLASH", 300)
    for below in (True, False):
        exact = F.scaled_dot_product_attention(q, k, v, is_causal=below, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(rr_attention(q, k, v, causal=below, scale=0.3, **DENSE), exact)
    assert list(dense._right.values()) == [True]
    # One that is wrong is not taken, nor one that stops.
    for broken in (lambda *tensors, **_: tensors[0] + 1, lambda *_, **__: 1 / 0):
        monkeypatch.setattr(installed, "flash_attn_func", broken)
        monkeypatch.setattr(dense, "_right", {})
        torch.testing.assert_close(rr_attention(q, k, v, causal=False, scale=0.3, **DENSE), exact)


def test_rows_for_torch_s_kernels_begin_at_whole_reads():
    x = torch.randn(2, 3, 40, 64, dtype=torch.bfloat16)
    aligned = [x, x[:, :, 7:], x.transpose(1, 2), F.pad(x, (0, 8))[..., :64]]
    odd = torch.randn(2, 3, 40, 17, dtype=torch.bfloat16)  # no copy of it would be
    assert all(dense._aligned(y) is y for y in (*aligned, odd))
    for y in (F.pad(x, (0, 2))[..., :64], F.pad(x, (1, 7))[..., 1:-7], x.repeat_interleave(2, 3)[..., ::2]):
        found = dense._aligned(y)
        assert torch.equal(found, y)
        assert found.is_contiguous()
        assert found.data_ptr() % 16 == 0
    for dynamic in (False, True):  # a graph cannot ask where a tensor begins
        compiled = torch.compile(
            lambda y: dense._aligned(y[..., 1:65]), backend="eager", fullgraph=True, dynamic=dynamic
        )
        found = compiled(F.pad(x, (1, 7)))
        assert torch.equal(found, x)
        assert found.data_ptr() % 16 == 0


def test_a_long_context_is_sparse_and_counted():
    q, k, v = tensors(SQUARE)
    sparse = {**DENSE, "min_length": 300}
    out, counted = count_of(lambda: rr_attention(q, k, v, **sparse))
    assert counted == {"cpu": 1}
    assert (out - rr_attention(q, k, v, **DENSE)).norm() > 0.1 * out.norm()
    assert not select_blocks(q, k, **sparse).dense


def test_other_masks_and_offsets_are_dense_too():
    q, k, v = tensors(SQUARE)
    window = both(causal(), sliding_window(150))
    position = torch.arange(300)
    shown = window(torch.tensor(0), torch.tensor(0), position[:, None], position)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=shown, enable_gqa=True)
    out, counted = count_of(lambda: rr_attention(q, k, v, mask_mod=window, causal=False, **DENSE))
    torch.testing.assert_close(out, exact)
    assert counted == {"dense": 1}


@pytest.mark.parametrize("strip", [512, 40])
def test_a_chunk_is_dense_through_the_dense_kernel(monkeypatch, strip):
    """At the end of the keys, and before it: keys that nobody sees are never read."""
    monkeypatch.setattr(dense, "STRIP", strip)
    monkeypatch.setattr(attention, "attend", None)
    q, k, v = tensors(SQUARE)
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    v[:, :, 290:] = torch.nan
    for first, last in ((150, 290), (0, 150), (70, 71), (150, 290)):
        queries = q[:, :, first:last]
        out, counted = count_of(partial(rr_attention, queries, k, v, q_offset=first, **DENSE))
        torch.testing.assert_close(out, whole[:, :, first:last])
        assert counted == {"dense": 1}
    assert keys_of_dense_call(q, k, None, causal=True) is None and keys_of_dense_call(q, k, 1, causal=True) is None
    assert keys_of_dense_call(q, k, -1, causal=True) is None and keys_of_dense_call(q, k, None, causal=False) == 300


def test_a_dense_selection_says_so():
    q, k, _ = tensors(SQUARE)
    selection = select_blocks(q, k, **DENSE)
    assert selection.dense and selection.density == 1 and (selection.covered == 1).all() and (selection.mass == 0).all()
    assert torch.equal(selection.kept, selection.visible.expand_as(selection.kept))
    assert (create_rr_block_mask(q, k, **DENSE).kv_num_blocks == 1).all()  # the diagonal's; the others are whole


@pytest.mark.parametrize("given", [None, 0])
def test_only_attention_asks_the_card(given):
    """The measured costs decide in rr_attention alone, and only where nothing else was said."""
    q, k, v = tensors(SQUARE)
    chosen = {**DENSE, "min_length": given}
    assert not select_blocks(q, k, **chosen).dense
    assert count_of(lambda: rr_attention(q, k, v, **chosen))[1] == ({"dense": 1} if given is None else {"cpu": 1})
    own_mask = {"mask_mod": sliding_window(150), "softcap": 3.0}
    assert count_of(lambda: rr_attention(q, k, v, **own_mask, **chosen))[1] == (
        {"dense": 1} if given is None else {"cpu": 1}
    )
