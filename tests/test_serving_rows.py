"""Which rows of a step are sparse, by examples that a person can follow, and by laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rr_flex.serving.step_rows import ROW, dense_batch, pieces_of_step


def pieces(start, stop, prefilling=True, **options):
    found = pieces_of_step([0, stop - start], [stop], [prefilling], **options)
    return [(piece.start, piece.stop, piece.reason) for piece in found]


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 1, [(0, 1, "cut")]),
        (0, 127, [(0, 127, "cut")]),
        # A prompt that ends with a row ends sparse: its chunk does not know that it is the last.
        (0, 128, [(0, 128, "sparse")]),
        (0, 129, [(0, 128, "sparse"), (128, 129, "cut")]),
        (0, 512, [(0, 512, "sparse")]),
        (100, 512, [(100, 128, "cut"), (128, 512, "sparse")]),
        (100, 500, [(100, 128, "cut"), (128, 384, "sparse"), (384, 500, "cut")]),
        # Two rows, neither whole.
        (100, 200, [(100, 200, "cut")]),
        # Every position but one past a prefix hit of four pages.
        (512, 513, [(512, 513, "cut")]),
        (512, 640, [(512, 640, "sparse")]),
    ],
)
def test_whole_rows_of_a_chunk_are_sparse(start, stop, expected):
    assert pieces(start, stop) == expected


def test_rows_that_end_before_the_shortest_length_are_dense_wherever_the_prompt_is_cut():
    assert pieces(0, 640, min_length=300) == [(0, 256, "short"), (256, 640, "sparse")]
    assert pieces(0, 256, min_length=300) == [(0, 256, "short")]
    assert pieces(0, 200, min_length=300) == [(0, 200, "short")]
    assert pieces(256, 640, min_length=300) == [(256, 640, "sparse")]
    assert pieces(0, 300, min_length=300) == [(0, 300, "cut")]
    assert pieces(0, 384, min_length=384) == [(0, 256, "short"), (256, 384, "sparse")]


def test_decodes_and_what_is_not_causal_are_dense():
    assert pieces(512, 513, prefilling=False) == [(512, 513, "decode")]
    # The verification of drafts, and generated tokens that are computed again after a preemption.
    assert pieces(512, 900, prefilling=False) == [(512, 900, "decode")]
    assert pieces(0, 512, causal=False) == [(0, 512, "mask")]


def test_a_request_without_queries_has_no_piece():
    found = pieces_of_step([0, 1, 1, 257], [9, 0, 256], [False, False, True])
    assert [(piece.request, piece.token, len(piece), piece.reason) for piece in found] == [
        (0, 0, 1, "decode"),
        (2, 1, 256, "sparse"),
    ]


def test_the_dense_batch_has_single_queries_first():
    found = pieces_of_step([0, 128 + 90, 219, 224], [128 + 90, 700, 5], [True, False, True])
    dense = dense_batch(found)
    # The others stay in their order.
    assert dense.tokens.tolist() == [218, *range(128, 218), *range(219, 224)]
    assert dense.query_starts.tolist() == [0, 1, 91, 96] and dense.longest == 90
    assert dense.lengths.tolist() == [700, 218, 5] and dense.requests.tolist() == [1, 0, 2]
    assert dense_batch(pieces_of_step([0, 128], [128], [True])) is None


@given(
    cuts=st.lists(st.integers(1, 3000), min_size=1, max_size=8, unique=True), min_length=st.sampled_from([0, 200, 1024])
)
def test_a_cut_makes_at_most_its_own_row_dense(cuts, min_length):
    """However a prompt is cut, its sparse rows are those of one shot but for the rows that the cuts split."""
    *cuts, length = sorted(cuts)
    whole = rows_of([length], min_length)
    split = {cut // ROW for cut in cuts if cut % ROW}
    assert rows_of([*cuts, length], min_length) == whole - split


def rows_of(ends, min_length):
    sparse, start = set(), 0
    for end in ends:
        for first, last, reason in pieces(start, end, min_length=min_length):
            if reason == "sparse":
                sparse |= set(range(first // ROW, last // ROW))
        start = end
    return sparse


def test_tokens_of_the_dense_batch_are_integers_that_index():
    dense = dense_batch(pieces_of_step([0, 5], [5], [True]))
    assert dense.tokens.dtype == torch.int64 and dense.query_starts.dtype == torch.int32
