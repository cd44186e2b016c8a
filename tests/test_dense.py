"""Under `min_length` keys attention is dense, and says so."""

import sys
import types

import pytest
import torch
from cases import FREE, SQUARE, tensors
from torch.nn import functional as F

from mask_mods import both, causal, sliding_window
from rr_flex import RRConfig, attention, create_rr_block_mask, rr_attention, select_blocks
from rr_flex.kernels import dense
from rr_flex.kernels import options as kernel

pytestmark = pytest.mark.usefixtures("one_graph_a_shape")
DENSE = {"tau": 0.1, "min_length": 301, **FREE}


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
        heads_first = (x.transpose(1, 2) for x in tensors)
        out = F.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        return (out.transpose(1, 2), None) if with_lse else out.transpose(1, 2)

    installed = types.ModuleType("flash_attn.cute.interface")
    installed.flash_attn_func = flash_attn_func
    for name in ("flash_attn", "flash_attn.cute", installed.__name__):
        monkeypatch.setitem(sys.modules, name, installed)
    monkeypatch.setattr(attention, "choose_kernel", lambda *_, **__: "flash")
    monkeypatch.setattr(dense, "_right", {})
    rr_attention(q, k, v, **DENSE)
    assert not dense._right  # for so few tokens its launch takes too long
    monkeypatch.setattr(attention, "SHORTEST_FLASH", 300)
    for below in (True, False):
        exact = F.scaled_dot_product_attention(q, k, v, is_causal=below, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(rr_attention(q, k, v, causal=below, scale=0.3, **DENSE), exact)
    assert list(dense._right.values()) == [True]
    # One that is wrong is not taken, nor one that stops.
    for broken in (lambda *tensors, **_: tensors[0] + 1, lambda *_, **__: 1 / 0):
        monkeypatch.setattr(installed, "flash_attn_func", broken)
        monkeypatch.setattr(dense, "_right", {})
        torch.testing.assert_close(rr_attention(q, k, v, causal=False, scale=0.3, **DENSE), exact)


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
    # Half the queries, at the end of the keys.
    last = rr_attention(q[:, :, 150:], k, v, q_offset=150, **DENSE)
    torch.testing.assert_close(
        last, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[:, :, 150:]
    )


def test_a_dense_selection_says_so():
    q, k, _ = tensors(SQUARE)
    selection = select_blocks(q, k, **DENSE)
    assert selection.dense and selection.density == 1 and (selection.covered == 1).all() and (selection.mass == 0).all()
    assert torch.equal(selection.kept, selection.visible.expand_as(selection.kept))
    assert (create_rr_block_mask(q, k, **DENSE).kv_num_blocks == 1).all()  # the diagonal's; the others are whole


@pytest.mark.parametrize("given", [None, 0])
def test_only_attention_asks_the_card(monkeypatch, given):
    """The measured break-even decides in rr_attention alone, and only where nothing else was said."""
    monkeypatch.setattr(attention, "break_even", lambda q: 1000)
    q, k, v = tensors(SQUARE)
    assert not select_blocks(q, k, **{**DENSE, "min_length": given}).dense
    counted = count_of(lambda: rr_attention(q, k, v, **{**DENSE, "min_length": given}))[1]
    assert counted == ({"dense": 1} if given is None else {"cpu": 1})


def test_the_break_even_is_only_known_for_a_plain_softmax(monkeypatch):
    """It was measured against a fused dense kernel, which no soft cap and no sink goes through."""
    monkeypatch.setattr(attention, "break_even", lambda q: 1000)
    q, config = torch.empty(1, 1, 1, 16), RRConfig()
    assert attention.shortest_sparse(q, config) == 1000
    assert attention.shortest_sparse(q, config, plain_softmax=False) == 0
    for plain_softmax in (True, False):
        assert attention.shortest_sparse(q, RRConfig(min_length=5), plain_softmax=plain_softmax) == 5


def test_nothing_was_measured_on_the_cpu():
    assert kernel.break_even(torch.empty(1, 1, 1, 128)) == 0
