"""Blocks that are kept whatever the estimate says, on examples small enough to see."""

import torch
from cases import Shape, tensors

from mask_mods import padding, prefix
from rr_flex import select_blocks

EIGHT = Shape(B=2, Hq=2, Hkv=1, Lq=1024, Lk=1024)
LEAST = {"tau": 1e-6, "dense_last_rows": 0, "local_blocks": 0, "sink_blocks": 0}


def kept(**chosen):
    """Kept blocks of batch 0, head 0: [8, 8]."""
    return select_blocks(*tensors(EIGHT)[:2], **{**LEAST, **chosen}).kept[0, 0]


def test_the_sink_is_the_first_key_blocks():
    assert kept(sink_blocks=2)[1:, :2].all()
    assert kept(sink_blocks=2).sum(1).tolist() == [1, 2, 2, 2, 2, 2, 2, 2]


def test_the_sink_of_a_left_padded_sequence_is_its_first_real_block():
    mask = padding(torch.tensor([1024 - 300, 1024]), side="left", total=1024)
    rows = kept(sink_blocks=1, mask_mod=mask, causal=True)
    assert rows[2:, 2].all() and not rows[:, :2].any() and rows.sum() == 6


def test_local_blocks_end_with_the_diagonal():
    rows = kept(local_blocks=3)
    assert [row.nonzero().flatten().tolist() for row in rows[:4]] == [[0], [0, 1], [0, 1, 2], [1, 2, 3]]


def test_local_blocks_of_queries_off_the_grid_cross_two_blocks():
    q, k, _ = tensors(Shape(B=1, Hq=1, Hkv=1, Lq=256, Lk=1024))
    rows = select_blocks(q, k, **{**LEAST, "local_blocks": 1}, q_offset=400).kept[0, 0]
    assert rows[0].nonzero().flatten().tolist() == [3, 4]


def test_the_last_rows_are_dense():
    rows = kept(dense_last_rows=2)
    assert rows[6].tolist() == [True] * 7 + [False] and rows[7].all()
    assert rows[:6].sum(1).max() == 1


def test_causal_cuts_a_mask_that_looks_ahead():
    ahead, cut = (
        select_blocks(*tensors(EIGHT)[:2], mask_mod=prefix(600), causal=causal).visible[0, 0]
        for causal in (False, True)
    )
    assert ahead[0, :5].all()
    assert torch.equal(cut, torch.ones(8, 8, dtype=torch.bool).tril())
