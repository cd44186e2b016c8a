"""The last block rows by themselves, in runs: the same blocks, and after the merge the same attention."""

from dataclasses import replace

import oracle
import pytest
import torch
from cases import MASKS, Shape, assert_attends, mask_by_name, seeds, shapes, tensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_block_mask import listed

from rr_flex import RRConfig, attention, rr_attention, select_blocks
from rr_flex.kernels import choose, flex, last_rows
from rr_flex.kernels.last_rows import PIECES, merge_pieces, rows_apart, take_apart

TRITON_FROM_THE_START = replace(choose.KERNELS["triton"], least_keys_apart=0)


@settings(max_examples=20)
@given(seed=seeds, nQ=st.integers(2, 5), nK=st.integers(1, 30), share=st.floats(0, 1), data=st.data())
def test_pieces_share_a_row_s_blocks_equally(seed, nQ, nK, share, data):
    rows = data.draw(st.integers(1, nQ - 1))
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(2, 3, nQ, nK, generator=generator) < share
    rest, pieces = take_apart(kept, rows)
    assert torch.equal(rest[:, :, : nQ - rows], kept[:, :, : nQ - rows]) and not rest[:, :, nQ - rows :].any()
    of_piece = pieces.unflatten(1, (3, PIECES)).long()
    assert torch.equal(of_piece.sum(2), kept[:, :, nQ - rows :].long())
    sizes = of_piece.sum(-1)
    assert (sizes.amax(2) - sizes.amin(2)).max() <= 1


def test_merged_pieces_are_attention_over_all_of_them():
    generator = torch.Generator().manual_seed(0)
    score = 9 * torch.randn(2, 3, 5, PIECES, 7, generator=generator, dtype=torch.float64)
    value = torch.randn(PIECES, 7, 4, generator=generator, dtype=torch.float64)
    score[:, 0, :, 2:5] = -torch.inf  # runs that see nothing
    score[1, 2] = -torch.inf  # queries that see nothing
    out = torch.einsum("bhqrk,rkd->bhrqd", score.softmax(-1).nan_to_num(0), value)
    out[:, 0, 2:5] = torch.nan  # what the kernel leaves where nothing is seen says nothing
    score[0, 1, 0, 1] = torch.nan  # and of a query that has NaN it says that
    out[0, 1, 1, 0] = torch.nan
    lse = score.logsumexp(-1).transpose(2, 3)
    found, total = merge_pieces(out.flatten(1, 2), lse.flatten(1, 2))
    exact = score.flatten(3).softmax(-1).nan_to_num(0) @ value.flatten(0, 1)
    exact[0, 1, 0] = torch.nan
    torch.testing.assert_close(found, exact, equal_nan=True)
    torch.testing.assert_close(total, score.flatten(3).logsumexp(-1), equal_nan=True)


def attend_by_lists(q, k, v, block_mask, settings, return_lse):
    """What the kernel does: attention over the listed blocks and, inside the partial ones, what the mask shows."""
    (B, H, Lq, _), Lk = q.shape, k.shape[2]
    nK = -(-Lk // block_mask.BLOCK_SIZE[1])
    maps = [
        (block_mask.kv_num_blocks, block_mask.kv_indices),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    ]
    partial, full = (oracle.expand(listed(*of_kind, nK), (Lq, Lk), block_mask.BLOCK_SIZE) for of_kind in maps)
    out, lse = oracle.attend(q, k, v, full | (partial & oracle.pairs(block_mask.mask_mod, B, H, Lq, Lk)))
    return out.to(q.dtype), lse


@settings(max_examples=12)
@given(
    shape=shapes(bottom_right=True),
    seed=seeds,
    rows=st.integers(1, 2),
    name=st.sampled_from(["causal", "by head", *MASKS]),
    whole=st.booleans(),
)
@example(shape=Shape(), seed=0, rows=1, name="by head", whole=False)
@example(shape=Shape(Lq=200), seed=0, rows=1, name="by head", whole=True)
def test_rows_apart_change_nothing(shape, seed, rows, name, whole):
    q, k, v = tensors(shape, seed)
    offset = shape.Lk - shape.Lq
    if name == "by head":
        mask = lambda b, h, q, kv: (kv <= q + offset) & ((q + kv) % (h + 2) != 0)  # noqa: E731
    else:
        mask = None if name == "causal" else mask_by_name(name, shape, seed)[0]
    # A position that only the device knows: rows begin with the first query, as those of select_blocks.
    chosen = {"mask_mod": mask, "causal": mask is None, "tau": 0.4, "dense_last_rows": rows}
    chosen |= {"q_offset": torch.tensor(offset), "min_length": 0}
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "choose_kernel", lambda *_, **__: "triton")
        patch.setattr(flex, "_attend_compiled", flex._attend)
        patch.setattr(flex, "flex", lambda *of_call, lse: calls.append(1) or attend_by_lists(*of_call, lse))
        patch.setitem(choose.KERNELS, "triton", TRITON_FROM_THE_START)
        patch.setattr(last_rows, "SHORT_CHUNK_KEYS", 0 if whole else shape.Lk + 1)
        out = rr_attention(q, k, v, **chosen)
    all_rows = -(-shape.Lq // 128)
    assert len(calls) == (1 if all_rows <= rows or (whole and all_rows in last_rows.SHORT_CHUNK) else 2)
    shown = oracle.pairs(mask or oracle.causal_element(offset), *shape[:2], shape.Lq, shape.Lk)
    kept = select_blocks(q, k, **chosen).kept
    assert_attends(out, q, k, v, shown & oracle.expand(kept, (shape.Lq, shape.Lk), (128, 128)))


def test_rows_apart_ask_for_no_query_past_the_last(monkeypatch):
    q, k, v = tensors(Shape())
    ids = torch.arange(300) // 70  # as many as queries
    monkeypatch.setattr(attention, "choose_kernel", lambda *_, **__: "triton")
    monkeypatch.setattr(flex, "_attend_compiled", flex._attend)
    monkeypatch.setitem(choose.KERNELS, "triton", TRITON_FROM_THE_START)

    def ask_for_whole_blocks(q, k, v, block_mask, settings, lse):
        index = torch.arange(-(-q.shape[2] // 128) * 128).clamp(max=max(299, q.shape[2] - 1))
        block_mask.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], torch.arange(300))
        return torch.zeros_like(q), torch.zeros(q.shape[:3])

    monkeypatch.setattr(flex, "flex", ask_for_whole_blocks)
    rr_attention(q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: ids[q_idx] == ids[kv_idx], causal=True, min_length=0)


def test_a_short_chunk_is_all_in_pieces():
    q = torch.empty(2, 32, 1, 64, device="meta")
    assert [rows for rows in range(20) if last_rows.all_rows_apart(q, rows, 16384)] == [1, 2, 4, 8]
    assert not last_rows.all_rows_apart(q, 4, 16383)
    assert not last_rows.all_rows_apart(torch.empty(3, 32, 1, 64, device="meta"), 8, 16384)  # rows enough for a card


def test_rows_are_apart_where_it_pays():
    config, least = RRConfig(dense_last_rows=2), choose.KERNELS["triton"].least_keys_apart
    lengths = [(600, least), (600, least - 1), (256, least), (257, least)]
    assert [rows_apart(Lq, Lk, config, least) for Lq, Lk in lengths] == [2, 0, 0, 2]
    assert [rows_apart(Lq, Lk, config, 0) for Lq, Lk in lengths] == [2, 2, 0, 2]
    most = RRConfig(dense_last_rows=last_rows.MOST_ROWS + 1)
    assert rows_apart(1 << 20, 1 << 20, most, 0) == rows_apart(600, least, RRConfig(dense_last_rows=0), 0) == 0
    assert choose.KERNELS["cpu"].least_keys_apart is None
