"""The last block rows by themselves, in runs: the same blocks, and after the merge the same attention."""

import oracle
import pytest
import torch
from cases import MASKS, Shape, assert_attends, mask_by_name, seeds, shapes, tensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_block_mask import listed

from rr_flex import RRConfig, attention, rr_attention, select_blocks
from rr_flex.block_mask import list_partial_and_full
from rr_flex.kernels import graphs, last_rows
from rr_flex.kernels.last_rows import RUNS, merge_runs, rows_apart, take_apart


@settings(max_examples=20)
@given(seed=seeds, nQ=st.integers(2, 5), nK=st.integers(1, 30), share=st.floats(0, 1), data=st.data())
def test_runs_share_a_row_s_blocks_equally(seed, nQ, nK, share, data):
    rows = data.draw(st.integers(1, nQ - 1))
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(2, 3, nQ, nK, generator=generator) < share
    whole = torch.rand(1, 1, nQ, nK, generator=generator) < 0.7
    rest, runs = take_apart(list_partial_and_full(kept, whole), rows)
    for blocks, at in ((kept & ~whole, 0), (kept & whole, 2)):
        assert not rest[at][:, :, nQ - rows :].any()
        others = listed(*rest[at : at + 2], nK)
        assert torch.equal(others[:, :, : nQ - rows], blocks[:, :, : nQ - rows])
        of_run = listed(*runs[at : at + 2], nK).unflatten(1, (3, RUNS))
        assert torch.equal(of_run.sum(2), blocks[:, :, nQ - rows :].long())
        sizes = runs[at].unflatten(1, (3, RUNS))
        assert (sizes.amax(2) - sizes.amin(2)).max() <= 1
    # The kernel goes by the partial lists' strides, and takes a batch to follow the last head.
    for counts, indices in (runs[:2], runs[2:]):
        assert indices.stride() == runs[1].stride() and counts.stride() == runs[0].stride()
        assert indices.stride(0) == 3 * RUNS * indices.stride(1) and counts.stride(0) == 3 * RUNS * counts.stride(1)


def test_merged_runs_are_attention_over_all_of_them():
    generator = torch.Generator().manual_seed(0)
    score = 9 * torch.randn(2, 3, 5, RUNS, 7, generator=generator, dtype=torch.float64)
    value = torch.randn(RUNS, 7, 4, generator=generator, dtype=torch.float64)
    score[:, 0, :, 2:5] = -torch.inf  # runs that see nothing
    score[1, 2] = -torch.inf  # queries that see nothing
    out = torch.einsum("bhqrk,rkd->bhrqd", score.softmax(-1).nan_to_num(0), value)
    out[:, 0, 2:5] = torch.nan  # what the kernel leaves where nothing is seen says nothing
    score[0, 1, 0, 1] = torch.nan  # and of a query that has NaN it says that
    out[0, 1, 1, 0] = torch.nan
    lse = score.logsumexp(-1).transpose(2, 3)
    found, total = merge_runs(out.flatten(1, 2), lse.flatten(1, 2))
    exact = score.flatten(3).softmax(-1).nan_to_num(0) @ value.flatten(0, 1)
    exact[0, 1, 0] = torch.nan
    torch.testing.assert_close(found, exact, equal_nan=True)
    torch.testing.assert_close(total, score.flatten(3).logsumexp(-1), equal_nan=True)


def attend_by_lists(q, k, v, block_mask, scale, return_lse, options, score_mod=None):
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
)
@example(shape=Shape(), seed=0, rows=1, name="by head")
def test_rows_apart_change_nothing(shape, seed, rows, name):
    q, k, v = tensors(shape, seed)
    offset = shape.Lk - shape.Lq
    if name == "by head":
        mask = lambda b, h, q, kv: (kv <= q + offset) & ((q + kv) % (h + 2) != 0)  # noqa: E731
    else:
        mask = None if name == "causal" else mask_by_name(name, shape, seed)[0]
    chosen = {"mask_mod": mask, "tau": 0.4, "dense_last_rows": rows}
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "choose_kernel", lambda *_, **__: "triton")
        patch.setattr(graphs, "_attend_compiled", graphs._attend)
        patch.setattr(graphs, "_flex", lambda *of_call: calls.append(1) or attend_by_lists(*of_call))
        patch.setattr(last_rows, "LEAST_KEYS", 0)
        out = rr_attention(q, k, v, **chosen)
    assert len(calls) == (2 if shape.Lq > 128 * rows else 1)
    shown = oracle.pairs(mask or oracle.causal_element(offset), *shape[:2], shape.Lq, shape.Lk)
    kept = select_blocks(q, k, **chosen).kept
    assert_attends(out, q, k, v, shown & oracle.expand(kept, (shape.Lq, shape.Lk), (128, 128)))


def test_rows_apart_ask_for_no_query_past_the_last(monkeypatch):
    q, k, v = tensors(Shape())
    ids = torch.arange(300) // 70  # as many as queries
    monkeypatch.setattr(attention, "choose_kernel", lambda *_, **__: "triton")
    monkeypatch.setattr(graphs, "_attend_compiled", graphs._attend)
    monkeypatch.setattr(last_rows, "LEAST_KEYS", 0)

    def ask_for_whole_blocks(q, k, v, block_mask, *_):
        index = torch.arange(-(-q.shape[2] // 128) * 128).clamp(max=max(299, q.shape[2] - 1))
        block_mask.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], torch.arange(300))
        return torch.zeros_like(q), torch.zeros(q.shape[:3])

    monkeypatch.setattr(graphs, "_flex", ask_for_whole_blocks)
    rr_attention(q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: ids[q_idx] == ids[kv_idx], causal=True)


def test_rows_are_apart_where_it_pays():
    config, least = RRConfig(dense_last_rows=2), last_rows.LEAST_KEYS
    lengths = [(600, least), (600, least - 1), (256, least), (257, least)]
    assert [rows_apart(Lq, Lk, config, "triton") for Lq, Lk in lengths] == [2, 0, 0, 2]
    assert [rows_apart(Lq, Lk, config, "flash") for Lq, Lk in lengths] == [2, 2, 0, 2]
    most = RRConfig(dense_last_rows=last_rows.MOST_ROWS + 1)
    assert rows_apart(1 << 20, 1 << 20, most, "triton") == 0
    assert rows_apart(600, least, config, "cpu") == rows_apart(600, least, RRConfig(dense_last_rows=0), "flash") == 0
