"""Each mask against its definition in plain loops, and each block rule against brute force over the element rule."""

from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mask_mods import (
    SpanMask,
    any_key_visible,
    bidirectional,
    block_visibility,
    both,
    causal,
    document,
    documents_from_lengths,
    either,
    frames,
    from_head,
    padding,
    place,
    prefix,
    sink,
    sliding_window,
    visible_keys,
)

laws = partial(settings, deadline=None)


class Case:
    """A mask, the same mask as a loop over Python ints, and whether it depends on the batch and the head.

    The rule's last argument is where the call's queries begin: an int, or a tensor as for `at`."""

    def __init__(self, mask, rule, *values, uses_b=False, uses_h=False):
        self.mask, self.rule = mask, rule
        self.uses_b = uses_b or any(isinstance(value, torch.Tensor) and value.ndim > 0 for value in values)
        self.uses_h = uses_h

    def __repr__(self):
        return repr(self.mask)


def at(value, b):
    """The int that batch b has in an int, a 0-dim tensor or a [B] tensor."""
    return int(value[b]) if isinstance(value, torch.Tensor) and value.ndim else int(value)


def position(i, b, offset, start):
    """Where query i stands: the mask's own offset goes before the call's start."""
    return i + at(start if offset is None else offset, b)


def per_batch_values(B, low, high):
    numbers = st.integers(low, high)
    return st.one_of(numbers, numbers.map(torch.tensor), st.lists(numbers, min_size=B, max_size=B).map(torch.tensor))


def offsets(B, Lk):
    return st.one_of(st.none(), per_batch_values(B, -6, Lk))


def bidirectional_cases(B, Lk):
    return st.just(Case(bidirectional(), lambda b, h, i, j, start: True))


@st.composite
def causal_cases(draw, B, Lk):
    offset = draw(offsets(B, Lk))
    return Case(causal(offset), lambda b, h, i, j, start: j <= position(i, b, offset, start), offset)


@st.composite
def sliding_window_cases(draw, B, Lk):
    window, symmetric, offset = draw(st.integers(1, Lk + 2)), draw(st.booleans()), draw(offsets(B, Lk))

    def rule(b, h, i, j, start):
        back = position(i, b, offset, start) - j
        return abs(back) < window if symmetric else 0 <= back < window

    return Case(sliding_window(window, offset, symmetric=symmetric), rule, offset)


@st.composite
def document_cases(draw, B, Lk):
    row = st.lists(st.integers(0, 2), min_size=Lk, max_size=Lk)
    rows = st.one_of(row, row.map(sorted))
    ids = torch.tensor(draw(st.one_of(rows, st.lists(rows, min_size=B, max_size=B))))
    offset = draw(offsets(B, Lk))

    def rule(b, h, i, j, start):
        place, row = position(i, b, offset, start), (ids if ids.ndim == 1 else ids[b]).tolist()
        between = row[min(place, j) : max(place, j) + 1]
        return 0 <= place < Lk and len(set(between)) == 1

    return Case(document(ids, offset), rule, offset, uses_b=ids.ndim == 2)


@st.composite
def prefix_cases(draw, B, Lk):
    length, offset = draw(per_batch_values(B, 0, Lk + 2)), draw(offsets(B, Lk))

    def rule(b, h, i, j, start):
        return j < at(length, b) or j <= position(i, b, offset, start)

    return Case(prefix(length, offset), rule, length, offset)


@st.composite
def padding_cases(draw, B, Lk):
    lengths = torch.tensor(draw(st.lists(st.integers(0, Lk), min_size=B, max_size=B)))
    side, offset = draw(st.sampled_from(["left", "right"])), draw(offsets(B, Lk))

    def rule(b, h, i, j, start):
        length = int(lengths[b])
        real = range(Lk - length, Lk) if side == "left" else range(length)
        return position(i, b, offset, start) in real and j in real

    return Case(padding(lengths, side, total=Lk, offset=offset), rule, lengths, offset)


@st.composite
def sink_cases(draw, B, Lk):
    count = draw(st.integers(0, Lk + 2))
    return Case(sink(count), lambda b, h, i, j, start: j < count)


@st.composite
def frames_cases(draw, B, Lk):
    size, past = draw(st.integers(1, 7)), draw(st.one_of(st.none(), st.integers(0, 3)))
    offset = draw(offsets(B, Lk))

    def rule(b, h, i, j, start):
        back = position(i, b, offset, start) // size - j // size
        return back >= 0 and (past is None or back <= past)

    return Case(frames(size, past, offset), rule, offset)


@st.composite
def stripes_cases(draw, B, Lk):
    """SpanMask users may write their own: here every `period`-th run of keys, with empty and overlapping spans."""
    period, length = draw(st.integers(1, 6)), draw(st.integers(-1, 7))

    def spans(b, h, q_idx):
        return tuple((q_idx + start, q_idx + start + length - 1) for start in (2 * period, -period, 0, period))

    def rule(b, h, i, j, start):
        return any(0 <= j - i - start < length for start in (2 * period, -period, 0, period))

    return Case(SpanMask(spans), rule)


@st.composite
def plain_cases(draw, B, Lk):
    """A mask_mod that is no SpanMask, has no intervals, and may depend on batch and head."""
    uses_b, uses_h, period = draw(st.booleans()), draw(st.booleans()), draw(st.integers(1, 4))

    def mask(b, h, i, j):
        return (i + (b if uses_b else 0) + 2 * (h if uses_h else 0) + j * j) % period == 0

    return Case(mask, lambda b, h, i, j, start: mask(b, h, i, j), uses_b=uses_b, uses_h=uses_h)


LEAVES = {
    "bidirectional": bidirectional_cases,
    "causal": causal_cases,
    "sliding_window": sliding_window_cases,
    "document": document_cases,
    "prefix": prefix_cases,
    "padding": padding_cases,
    "sink": sink_cases,
    "frames": frames_cases,
    "stripes": stripes_cases,
}


@st.composite
def composed_cases(draw, B, Lk, depth=2, plain=False):
    """A mask, or masks composed by both and either up to `depth` levels deep."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        leaves = [*LEAVES.values()] + [plain_cases] * (3 if plain else 0)
        return draw(draw(st.sampled_from(leaves))(B, Lk))
    parts = draw(st.lists(composed_cases(B, Lk, depth - 1, plain), min_size=1, max_size=3))
    compose, quantifier = draw(st.sampled_from([(both, all), (either, any)]))

    def rule(b, h, i, j, start):
        return quantifier(part.rule(b, h, i, j, start) for part in parts)

    return Case(
        compose(*[part.mask for part in parts]),
        rule,
        uses_b=any(part.uses_b for part in parts),
        uses_h=any(part.uses_h for part in parts),
    )


@st.composite
def problems(draw, cases):
    B, H = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    Lq, Lk = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    return draw(cases(B, Lk)), B, H, Lq, Lk


@st.composite
def problems_elsewhere(draw, cases):
    """A problem and where its queries begin."""
    problem = draw(problems(cases))
    return *problem, draw(per_batch_values(problem[1], -6, problem[4]))


def element_rule(mask, B, H, Lq, Lk):
    """The mask as [B, H, Lq, Lk] booleans, from one call in broadcast indices."""
    b, h = torch.arange(B).view(B, 1, 1, 1), torch.arange(H).view(1, H, 1, 1)
    return mask(b, h, torch.arange(Lq).view(1, 1, Lq, 1), torch.arange(Lk)).expand(B, H, Lq, Lk)


def definition(rule, B, H, Lq, Lk, start=0):
    pairs = [[(i, j) for j in range(Lk)] for i in range(Lq)]
    return torch.tensor(
        [[[[bool(rule(b, h, i, j, start)) for i, j in row] for row in pairs] for h in range(H)] for b in range(B)]
    )


def brute_force_blocks(dense, q_block, k_block):
    """any and all of each block of [B, H, Lq, Lk], ragged blocks over their real pairs."""
    blocks = [[tile for tile in rows.split(k_block, 3)] for rows in dense.split(q_block, 2)]
    return tuple(
        torch.stack([torch.stack([reduce(tile) for tile in row], -1) for row in blocks], 2)
        for reduce in (lambda tile: tile.flatten(2).any(2), lambda tile: tile.flatten(2).all(2))
    )


def check_element_rule(problem):
    case, B, H, Lq, Lk = problem
    assert torch.equal(element_rule(case.mask, B, H, Lq, Lk), definition(case.rule, B, H, Lq, Lk))


def check_block_rule(problem, q_block, k_block):
    case, B, H, Lq, Lk = problem
    dense = element_rule(case.mask, B, H, Lq, Lk)
    found = block_visibility(case.mask, B=B, H=H, Lq=Lq, Lk=Lk, block_size=(q_block, k_block), device="cpu")
    for block_rule, brute_force in zip(found, brute_force_blocks(dense, q_block, k_block), strict=True):
        assert block_rule.shape[:2] == (B if case.uses_b else 1, H if case.uses_h else 1)
        assert torch.equal(block_rule.expand(brute_force.shape), brute_force)


block_sizes = st.integers(1, 16)


@pytest.mark.parametrize("name", LEAVES)
def test_each_mask_equals_its_definition(name):
    @laws(max_examples=60)
    @given(problem=problems(LEAVES[name]))
    def law(problem):
        check_element_rule(problem)

    law()


@pytest.mark.parametrize("name", LEAVES)
def test_block_rule_of_each_mask_equals_brute_force(name):
    @laws(max_examples=60)
    @given(problem=problems(LEAVES[name]), q_block=block_sizes, k_block=block_sizes)
    def law(problem, q_block, k_block):
        check_block_rule(problem, q_block, k_block)

    law()


@pytest.mark.parametrize("name", LEAVES)
def test_each_mask_stands_where_the_call_stands(name):
    @laws(max_examples=60)
    @given(problem=problems_elsewhere(LEAVES[name]))
    def law(problem):
        case, *sizes, start = problem
        assert torch.equal(element_rule(place(case.mask, start), *sizes), definition(case.rule, *sizes, start))

    law()


@laws(max_examples=200)
@given(
    problem=problems_elsewhere(partial(composed_cases, plain=True)),
    first=st.integers(0, 3),
    q_block=block_sizes,
    k_block=block_sizes,
)
def test_compositions_and_runs_of_heads_place_their_parts(problem, first, q_block, k_block):
    case, B, H, Lq, Lk, start = problem
    expected = definition(lambda b, h, *pair: case.rule(b, h + first, *pair), B, H, Lq, Lk, start)
    run = place(from_head(case.mask, first), start)
    assert isinstance(run, SpanMask) == isinstance(case.mask, SpanMask)
    assert torch.equal(element_rule(run, B, H, Lq, Lk), expected)
    assert torch.equal(element_rule(place(run, 99), B, H, Lq, Lk), expected), "placed a second time"
    found = block_visibility(run, B=B, H=H, Lq=Lq, Lk=Lk, block_size=(q_block, k_block), device="cpu")
    for block_rule, brute_force in zip(found, brute_force_blocks(expected, q_block, k_block), strict=True):
        assert torch.equal(block_rule.expand(brute_force.shape), brute_force)


def test_an_offset_of_its_own_goes_before_the_calls():
    mask = both(causal(), sliding_window(3, offset=5), lambda b, h, q_idx, kv_idx: kv_idx != 0)
    assert repr(mask.placed(2)).startswith("both(causal(offset=2), sliding_window(3, offset=5), <function")
    assert repr(mask).startswith("both(causal(), sliding_window(3, offset=5), <function"), "placing changes nothing"
    assert place(element_rule, 2) is element_rule


@laws()
@given(problem=problems(partial(composed_cases, plain=True)))
def test_compositions_equal_their_definition(problem):
    check_element_rule(problem)


@laws(max_examples=300)
@given(problem=problems(composed_cases), q_block=block_sizes, k_block=block_sizes)
def test_block_rule_of_compositions_equals_brute_force(problem, q_block, k_block):
    assert isinstance(problem[0].mask, SpanMask)
    check_block_rule(problem, q_block, k_block)


def test_unions_of_many_spans_are_whole_where_together_they_are():
    """All of 12³ choices of a span: by pairs they would take hours to merge."""
    many = [either(*[sliding_window(3, offset=step + 9 * part) for step in range(0, 36, 3)]) for part in range(3)]
    mask = both(*many)
    dense = element_rule(mask, 1, 1, 40, 60)
    found = block_visibility(mask, B=1, H=1, Lq=40, Lk=60, block_size=(4, 8), device="cpu")
    for block_rule, brute_force in zip(found, brute_force_blocks(dense, 4, 8), strict=True):
        assert torch.equal(block_rule, brute_force) and block_rule.any()


@laws()
@given(problem=problems(partial(composed_cases, plain=True)), q_block=block_sizes, k_block=block_sizes)
def test_block_rule_of_plain_functions_equals_brute_force(problem, q_block, k_block):
    check_block_rule(problem, q_block, k_block)


def test_plain_function_in_strips_equals_one_strip(monkeypatch):
    def plain(b, h, q_idx, kv_idx):
        return (q_idx * kv_idx + h) % 3 != 1

    whole = block_visibility(plain, B=2, H=2, Lq=50, Lk=30, block_size=(4, 7), device="cpu")
    monkeypatch.setattr("mask_mods.blocks.STRIP_PAIRS", 2 * 2 * 4 * 35 * 3)  # three block rows at once
    strips = block_visibility(plain, B=2, H=2, Lq=50, Lk=30, block_size=(4, 7), device="cpu")
    assert all(torch.equal(one, many) for one, many in zip(whole, strips, strict=True))


def test_all_sees_a_block_that_only_a_chain_of_spans_covers():
    """Keys 0…11 in four spans, out of order, overlapping, touching, one repeated and one empty."""

    def spans(b, h, q_idx):
        return ((6, q_idx * 0 + 8), (9, 11), (0, 2), (3, 7), (0, 2), (5, 4))

    _, covered = block_visibility(SpanMask(spans), B=1, H=1, Lq=2, Lk=14, block_size=(2, 4), device="cpu")
    assert covered.flatten().tolist() == [True, True, True, False]


@laws()
@given(problem=problems(composed_cases), q_block=block_sizes, k_block=block_sizes)
def test_block_rule_by_sorted_spans_equals_brute_force(problem, q_block, k_block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mask_mods.blocks.FEW_SPANS", 1)
        check_block_rule(problem, q_block, k_block)


@laws(max_examples=200)
@given(
    problem=problems(partial(composed_cases, plain=True)),
    length=st.integers(1, 9),
    Lk_as_tensor=st.booleans(),
)
def test_any_key_visible_equals_brute_force(problem, length, Lk_as_tensor):
    case, B, H, Lq, Lk = problem
    dense = element_rule(case.mask, B, H, Lq, Lk)
    starts = list(range(0, Lk + 3, 2))
    expected = torch.stack([dense[..., start : start + length].any(-1) for start in starts], -1)

    def run_rule(b, h, q_idx, k_first):
        return any_key_visible(case.mask, b, h, q_idx, k_first, length, torch.tensor(Lk) if Lk_as_tensor else Lk)

    b, h = torch.arange(B).view(B, 1, 1, 1), torch.arange(H).view(1, H, 1, 1)
    found = run_rule(b, h, torch.arange(Lq).view(1, 1, Lq, 1), torch.tensor(starts))
    assert torch.equal(found.expand(expected.shape), expected)


@laws()
@given(problem=problems(partial(composed_cases, plain=True)))
def test_hidden_keys_are_seen_by_no_query(problem):
    case, B, H, Lq, Lk = problem
    visible = visible_keys(case.mask, B, H, Lk, "cpu")
    assert visible.shape[0] in (1, B) and visible.shape[1:] == (1, Lk)
    assert not (element_rule(case.mask, B, H, Lq, Lk) & ~visible[:, :, None]).any()


def test_keys_are_hidden_by_all_of_either_and_by_any_of_both():
    right, left = padding(torch.tensor([3, 5])), padding(torch.tensor([4, 2]), "left", total=6)

    def keys(mask):
        return visible_keys(mask, 2, 1, 6, "cpu").int().squeeze(1).tolist()

    assert keys(right) == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert keys(left) == [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert keys(both(right, causal(), left)) == [[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]]
    assert keys(either(right, left)) == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert keys(either(right, right)) == keys(right)
    assert keys(either(right, sink(1))) == keys(causal()) == [[1] * 6]


def test_worked_example_of_the_block_rule():
    """Lq 257, Lk 384, blocks of 128, bottom-right aligned: queries stand at 127 … 383."""
    touched, covered = block_visibility(
        causal(384 - 257), B=1, H=1, Lq=257, Lk=384, block_size=(128, 128), device="cpu"
    )
    assert touched[0, 0].int().tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert covered[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


@example(lengths=[2, 0, 3], spare=2)
@laws()
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5), spare=st.integers(1, 4))
def test_document_ids_repeat_by_length(lengths, spare):
    expected = [document for document, length in enumerate([*lengths, spare]) for _ in range(length)]
    assert documents_from_lengths(torch.tensor(lengths), len(expected), rest=True).tolist() == expected
    both_rows = documents_from_lengths(torch.tensor([[*lengths, spare]] * 2), len(expected))
    assert both_rows.tolist() == [expected, expected]


@pytest.mark.parametrize(
    ("mask", "shown"),
    [
        (causal(), "causal()"),
        (sliding_window(4, torch.tensor(3)), "sliding_window(4, offset=int64[])"),
        (sliding_window(4, symmetric=True), "sliding_window(4, symmetric=True)"),
        (document(torch.zeros(2, 5, dtype=torch.int32)), "document(int32[2, 5])"),
        (padding(torch.tensor([3])), "padding(int64[1], side='right')"),
        (both(causal(2), frames(3)), "both(causal(offset=2), frames(3))"),
        (either(from_head(sink(2), 1), bidirectional()), "either(from_head(sink(2), 1), bidirectional())"),
        (prefix(3), "prefix(3)"),
        (SpanMask(lambda b, h, q_idx: ((0, q_idx),)), "SpanMask()"),
    ],
)  # fmt: skip
def test_masks_print_readably(mask, shown):
    assert repr(mask) == shown


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: causal(1.5), TypeError, "offset must be an int or an integer tensor"),
        (lambda: causal(True), TypeError, "offset must be an int or an integer tensor"),
        (lambda: causal(torch.tensor(1.0)), TypeError, "offset must be an integer tensor .* got dtype torch.float32"),
        (lambda: causal(torch.zeros(2, 3, dtype=torch.int64)), ValueError, r"offset must be .* got shape \[2, 3\]"),
        (lambda: sliding_window(0), ValueError, "window must be at least 1, got 0"),
        (lambda: sliding_window(2.0), TypeError, "window must be an int, got 2.0"),
        (lambda: sliding_window(2**70), ValueError, r"window must be at most 2\*\*30"),
        (lambda: sliding_window(2, symmetric="no"), TypeError, "symmetric must be True or False, got 'no'"),
        (lambda: causal(2**40), ValueError, r"offset must be within ± 2\*\*30, got 1099511627776"),
        (lambda: prefix(torch.tensor(2, device="meta")), ValueError, "length must be a dense tensor with values"),
        (lambda: documents_from_lengths(torch.tensor([2, 3]), 6), ValueError, "must sum to total 6, got 5; rest=True"),
        (lambda: documents_from_lengths(torch.tensor([[6], [7]]), 6, rest=True), ValueError, "at most total 6, got 7"),
        (lambda: documents_from_lengths(torch.tensor([7, -1]), 6), ValueError, "lengths must be at least 0, got -1"),
        (lambda: padding(torch.zeros(0, dtype=torch.int64)), ValueError, r"lengths must be .* got shape \[0\]"),
        (lambda: both(causal(), torch.zeros(2, 2)), TypeError, r"masks must be mask_mods.* got float32\[2, 2\]"),
        (lambda: SpanMask(3), TypeError, "spans must be a function, got 3"),
        (lambda: document([0, 0, 1]), TypeError, "document_ids must be an integer tensor"),
        (lambda: document(torch.tensor(3)), ValueError, r"document_ids must be .* got shape \[\]"),
        (lambda: documents_from_lengths(torch.tensor([0.5]), 2), TypeError, "lengths must be an integer tensor"),
        (lambda: documents_from_lengths(torch.tensor([2]), 0), ValueError, "total must be at least 1, got 0"),
        (lambda: prefix(-1), ValueError, "length must be at least 0, got -1"),
        (lambda: prefix(torch.tensor([[1]])), ValueError, r"length must be .* got shape \[1, 1\]"),
        (lambda: padding(torch.tensor(3)), ValueError, r"lengths must be .* got shape \[\]"),
        (lambda: padding(torch.tensor([True])), TypeError, "lengths must be .* got dtype torch.bool"),
        (lambda: padding(torch.tensor([3]), "up"), ValueError, "side must be 'right' or 'left', got 'up'"),
        (lambda: padding(torch.tensor([3]), "left"), ValueError, "total must be the number of keys"),
        (lambda: sink(-1), ValueError, "count must be at least 0, got -1"),
        (lambda: frames(0), ValueError, "tokens_per_frame must be at least 1, got 0"),
        (lambda: frames(4, past=-1), ValueError, "past must be at least 0, got -1"),
        (lambda: both(), ValueError, "masks must hold at least one mask"),
        (lambda: either(causal(), 3), TypeError, "masks must be mask_mods"),
        (lambda: visibility(causal(), block_size=(0, 4)), ValueError, "block_size must be at least 1, got 0"),
        (lambda: visibility(causal(), Lk=0), ValueError, "Lk must be at least 1, got 0"),
        (lambda: visibility(lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx)[None]), ValueError, "must be elementwise"),
    ],
)  # fmt: skip
def test_bad_arguments_say_what_they_must_be(build, error, words):
    with pytest.raises(error, match=words):
        build()


def visibility(mask, **changed):
    return block_visibility(mask, **{**dict(B=1, H=1, Lq=8, Lk=8, block_size=(4, 4), device="cpu"), **changed})


def test_create_block_mask_takes_a_span_mask():
    mask = both(either(causal(), prefix(torch.tensor([40, 200]))), padding(torch.tensor([256, 130])))
    block_mask = create_block_mask(mask, 2, None, 256, 256, device="cpu")
    touched, covered = block_visibility(mask, B=2, H=1, Lq=256, Lk=256, block_size=(128, 128), device="cpu")
    assert block_mask.mask_mod is mask
    assert torch.equal(block_mask.to_dense().bool(), touched)
    assert torch.equal(block_mask.full_kv_num_blocks, covered.sum(-1).int())


def lists(blocks):
    """Counts and ascending indices of the listed blocks of each row, full width."""
    return blocks.sum(-1).int(), (~blocks).int().argsort(dim=-1, stable=True).int()


def everything(lengths, offset, ids, Lk):
    window = either(sliding_window(300, offset), sink(3), prefix(20, offset), frames(64, 1, offset))
    return both(window, causal(offset), document(ids, offset), padding(lengths, "left", total=Lk))


def attend(q, k, v, lengths, offset, ids):
    """Masks, block lists and attention in one graph."""
    B, H, Lq, _ = q.shape
    Lk = k.shape[2]
    mask = everything(lengths, offset, ids, Lk)
    blocks = block_visibility(mask, B=B, H=H, Lq=Lq, Lk=Lk, block_size=(128, 128), device=q.device)
    touched, covered = (block.expand(B, H, -1, -1) for block in blocks)
    block_mask = BlockMask.from_kv_blocks(
        *lists(touched & ~covered),
        *lists(covered),
        BLOCK_SIZE=128,
        mask_mod=mask,
        seq_lengths=(Lq, Lk),
        compute_q_blocks=False,
    )
    return flex_attention(q, k, v, block_mask=block_mask)


def dense_attention(q, k, v, visible):
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v  # a query that sees nothing gives 0


def test_compiled_flex_attention_equals_dense_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, L, 16, generator=generator) for L in (200, 384, 384))
    compiled = torch.compile(attend, fullgraph=True)
    full_blocks = []
    ids = documents_from_lengths(torch.tensor([[384, 0], [170, 100]]), 384, rest=True)
    for lengths, offset in ((torch.tensor([384, 350]), torch.tensor(184)), (torch.tensor([37, 384]), torch.tensor(90))):
        visible = element_rule(everything(lengths, offset, ids, 384), 2, 2, 200, 384)
        full_blocks.append(brute_force_blocks(visible, 128, 128)[1].sum().item())
        exact = dense_attention(q.double(), k.double(), v.double(), visible)
        error = (compiled(q, k, v, lengths, offset, ids) - exact).abs().max()
        rounding = torch.finfo(torch.float32).eps * exact.abs().max()
        assert error <= 2 * ((dense_attention(q, k, v, visible) - exact).abs().max() + rounding)
    assert max(full_blocks) > 0, "the full list went untested"


def test_block_rules_compile_in_one_graph_for_all_lengths():
    """`dynamic=True`, fullgraph: one graph serves every length, and new tensors and offsets cause no recompile."""

    def visibilities(ids, lengths, offset, queries):
        Lk = ids.shape[-1]
        size = dict(B=ids.shape[0], H=2, Lq=len(queries), Lk=Lk, block_size=(16, 8), device=ids.device)
        spans = both(document(ids, offset), either(causal(offset), sink(2)), padding(lengths, "left", total=Lk))
        plain = both(frames(8, 1, offset), lambda b, h, q_idx, kv_idx: (q_idx + h) % 2 == kv_idx % 2)
        keys = visible_keys(spans, ids.shape[0], 2, Lk, ids.device)
        return *block_visibility(spans, **size), keys, *block_visibility(plain, **size)

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(visibilities, fullgraph=True, dynamic=True, backend=counter)
    for Lq, Lk, offset in ((100, 140, 40), (64, 64, 0), (33, 90, 12)):
        ids = documents_from_lengths(torch.tensor([[30, 3, 20], [1, 50, 9]]), Lk, rest=True)
        arguments = ids, torch.tensor([Lk - 3, 20]), torch.tensor(offset), torch.zeros(Lq)
        for found, expected in zip(compiled(*arguments), visibilities(*arguments), strict=True):
            assert torch.equal(found, expected)
    assert counter.frame_count == 1


def unlike(b, h, q_idx, kv_idx):
    return q_idx != kv_idx


# Of a length B and a new number each time: what new masks of one kind may differ in without another graph.
KINDS = {
    "causal": lambda step: causal(),
    "its own offset": lambda step: causal(torch.tensor(step)),
    "window": lambda step: sliding_window(3, symmetric=True),
    "document": lambda step: document(torch.arange(9) // step),
    "documents": lambda step: document(torch.arange(18).view(2, 9) // step),
    "prefix": lambda step: prefix(torch.tensor([step, 3])),
    "padding": lambda step: padding(torch.tensor([step, 9]), "left", total=9),
    "frames": lambda step: frames(2, past=1),
    "both": lambda step: both(causal(), either(sink(2), sliding_window(2)), padding(torch.tensor([step, 8]))),
    "beside a function": lambda step: both(causal(), unlike, either(unlike, document(torch.arange(9) // step))),
    "from a head": lambda step: from_head(both(causal(), bidirectional()), torch.tensor(step)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_new_masks_at_new_places_run_the_same_graph(kind):
    torch._dynamo.reset()  # the graphs of all kinds count towards one limit
    counter = CompileCounterWithBackend("eager")

    @partial(torch.compile, fullgraph=True, backend=counter)
    def shown_in_graph(mask, q_offset):
        b, index = torch.arange(2).view(2, 1, 1, 1), torch.arange(9)
        return mask.placed(q_offset)(b, b * 0, index[:, None], index)

    for step in (2, 3, 4):
        mask = KINDS[kind](step)
        expected = element_rule(place(mask, step), 2, 1, 9, 9)
        start = torch.tensor(step)
        for found in (shown_in_graph(mask, start), shown_in_graph(mask.placed(start), start)):
            assert torch.equal(found.expand(2, 1, 9, 9), expected)
    assert counter.frame_count <= 2, "one for masks that the graph places, one for masks placed before"
