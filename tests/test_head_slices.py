"""Long contexts run a few heads at a time, and nobody can tell from the result."""

import oracle
import pytest
import torch
from cases import FREE, SQUARE, assert_attends, tensors
from hypothesis import given
from hypothesis import strategies as st

from mask_mods import SpanMask, both, causal
from rr_flex import RRConfig, rr_attention, select_blocks
from rr_flex.request import in_head_slices, make_request
from rr_flex.runtime import head_slices

pytestmark = pytest.mark.usefixtures("one_graph_a_shape")
M = 2**20
CPU = torch.device("cpu")


@given(
    B=st.integers(1, 3),
    group=st.integers(1, 6),
    Hkv=st.integers(1, 12),
    L=st.sampled_from([1, 1000, 2**17, 2**18, 2**19, 2**20]),
    stride=st.sampled_from([8, 16]),
)
def test_strips_cover_the_heads_and_share_keys_rightly(B, group, Hkv, L, stride):
    strips = head_slices.head_slices((B, Hkv * group, Hkv), (L, L), RRConfig(stride=stride), CPU)
    covered = [head for heads, _ in strips for head in range(heads.start, heads.stop)]
    assert covered == list(range(Hkv * group))
    assert len({(heads.stop - heads.start, keys.stop - keys.start) for heads, keys in strips}) == 1
    for heads, keys in strips:
        count, shared = heads.stop - heads.start, keys.stop - keys.start
        assert count % shared == 0
        for head in range(count):  # within the strip head h reads key head h // (count // shared)
            assert (heads.start + head) // group == keys.start + head // (count // shared)


def test_the_sizes_that_occur():
    def strips(L, **settings):
        return len(head_slices.head_slices((1, 32, 8), (L, L), RRConfig(**settings), CPU))

    assert strips(M // 8) == 1 and strips(M // 4) == 1  # 128K and 256K need none
    assert strips(M, query_stride=16, key_stride=8) == 8  # a key head and its four query heads
    assert strips(M) == 16  # half a group


def test_a_slice_takes_no_more_than_half_of_what_the_card_has_free(monkeypatch):
    free = 0

    def asked(*_):
        return free << 30, 80 << 30

    monkeypatch.setattr(torch.cuda, "mem_get_info", asked)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 3 << 30)  # of which one is not in use
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 2 << 30)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    slices = []
    for free in (60, 11, 3):
        found = head_slices.head_slices((1, 32, 8), (M, M), RRConfig(), torch.device("cuda"))
        assert head_slices.bytes_for(50 << 30, torch.device("cuda")) == min(12, (free + 1) / 2) * (1 << 30)
        slices.append(len(found))
    assert slices == [16, 32, 32] and head_slices.bytes_for(1 << 30, torch.device("cuda")) == 12 << 30


@pytest.fixture(params=[1, 2])
def strips_of(request, monkeypatch):
    """Strips of one head, which is half a group here, or of two, which is a whole one."""
    one_head = next(
        size for size in range(1, 1 << 22, 1 << 10) if pipeline_strips(size, monkeypatch) == 4 // request.param
    )
    monkeypatch.setattr(head_slices, "SLICE_BYTES", one_head)
    return request.param


def pipeline_strips(size, monkeypatch):
    monkeypatch.setattr(head_slices, "SLICE_BYTES", size)
    return len(head_slices.head_slices((SQUARE.B, 4, 2), (SQUARE.Lq, SQUARE.Lk), RRConfig(), CPU))


def window_per_head():
    """Head h sees its last 100 · (h + 1) keys."""
    return both(causal(), SpanMask(lambda b, h, q_idx: ((q_idx - 100 * (h + 1), q_idx),)))


def plain_per_head(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx) & (kv_idx > q_idx - 100 * (h + 1))


@pytest.mark.parametrize("mask_mod", [None, window_per_head(), plain_per_head], ids=["causal", "spans", "plain"])
def test_a_selection_in_strips_is_the_selection(strips_of, monkeypatch, mask_mod):
    q, k, _ = tensors(SQUARE)
    chosen = {"mask_mod": mask_mod, "causal": True, "tau": [0.3, 0.6, 0.2, 0.9], "head_offset": 3, **FREE}
    assert len(list(in_head_slices(make_request(q, k, RRConfig(), {}), q, k))) == 4 // strips_of
    strips = select_blocks(q, k, **chosen)
    monkeypatch.undo()
    whole = select_blocks(q, k, **chosen)
    assert torch.equal(strips.kept, whole.kept)
    torch.testing.assert_close(strips.mass, whole.mass)
    for name in ("visible", "whole"):
        assert torch.equal(getattr(strips, name).expand_as(whole.kept), getattr(whole, name).expand_as(whole.kept))
    lists = [selection.block_mask.kv_num_blocks for selection in (strips, whole)]
    assert torch.equal(*lists)


def test_attention_in_strips_is_attention(monkeypatch):
    q, k, v = tensors(SQUARE)
    mask = window_per_head()
    chosen = {"mask_mod": mask, "tau": [0.3, 0.6, 0.2, 0.9], "head_offset": 3, **FREE}
    kept = oracle.expand(select_blocks(q, k, **chosen).kept, (300, 300), (128, 128))
    assert pipeline_strips(1, monkeypatch) == 4
    out = rr_attention(q, k, v, **chosen)
    assert_attends(out, q, k, v, oracle.pairs(mask, *SQUARE[:2], 300, 300) & kept)
