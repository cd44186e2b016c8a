"""A mask against a call that it does not fit: an error that names the argument, the rule and the value."""

import copy
import inspect
import io
import pickle
import re
import threading
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import mask_mods
from mask_mods import (
    PositionMask,
    SpanMask,
    bidirectional,
    both,
    causal,
    check_mask_mod,
    document,
    either,
    frames,
    from_head,
    last_queries,
    padding,
    prefix,
    seeing_queries,
    sink,
    sliding_window,
)
from mask_mods.checks import can_be_read, recorded

CALL = {"B": 2, "Hq": 4, "Lq": 5, "Lk": 8, "device": "cpu"}
lengths = partial(torch.tensor, dtype=torch.int32)


def rows(B, Lk=8):
    """[B, Lk] ids, two documents each."""
    return (torch.arange(Lk) // 5).expand(B, Lk)


FITTING = [
    bidirectional(),
    causal(),
    causal(lengths([3, -1])),
    sliding_window(2**30, symmetric=True),
    document(torch.arange(8)),
    document(torch.tensor([9, 9, 9, 2, 2, 7, 7, 7])),
    document(rows(2), torch.tensor(3)),
    prefix(900),
    prefix(lengths([0, 8])),
    padding(lengths([0, 8])),
    padding(lengths([3, 8]), "left", total=8),
    sink(10),
    frames(3),
    from_head(causal(), 2),
    both(causal(), padding(lengths([1, 2])), lambda b, h, q_idx, kv_idx: q_idx != kv_idx),
    either(sink(1), sliding_window(3)),
    SpanMask(lambda b, h, q_idx: ((0, q_idx), (3, 4))),
    lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (b < 2),
    partial(lambda window, b, h, q_idx, kv_idx: q_idx - kv_idx < window, 3),
]


@pytest.mark.parametrize("mask", FITTING, ids=lambda mask: repr(mask).split(" at ")[0])
def test_masks_that_fit_pass(mask):
    check_mask_mod(mask, **CALL)


ids = torch.tensor([[0, 0, 1, 1, 0, 0, 2, 2], [0, 0, 1, 1, 2, 2, 3, 3]])
WRONG_MASKS = [
    (padding(lengths([3])), "lengths must hold one value for each of the call's 2 sequences, got 1"),
    (padding(lengths([3, 3, 3, 3])), "lengths must hold .* 2 sequences, got 4"),
    (padding(lengths([3, -1])), "lengths must be from 0 to 8, got -1"),
    (padding(lengths([3, 9])), "lengths must be from 0 to 8, got 9"),
    (padding(lengths([3, 5]), "left", total=9), "total must be the call's number of keys 8, got 9"),
    (padding(lengths([3, 5]), total=7), "total must be the call's number of keys 8, got 7"),
    (
        padding(lengths([3, 5], device="cuda" if torch.cuda.is_available() else "cpu"), offset=lengths([1] * 3)),
        "offset",
    ),
    (document(torch.arange(5)), r"document_ids must be of shape \[8\] or \[2, 8\], an id a key, got \[5\]"),
    (document(torch.arange(9)), r"document_ids must be of shape .* got \[9\]"),
    (document(rows(3)), r"document_ids must be of shape .* got \[3, 8\]"),
    (document(rows(1)), r"document_ids must be of shape .* got \[1, 8\]"),
    (document(ids), "document_ids must hold each document's tokens side by side, .* comes back in sequence 0"),
    (document(ids[0]), "document_ids must hold each document's tokens side by side, .* comes back;"),
    (prefix(lengths([1, 2, 3])), "length must hold one value for each of the call's 2 sequences, got 3"),
    (prefix(torch.tensor(-3)), "length must be from 0 to 1073741824, got -3"),
    (causal(lengths([1])), "offset must hold one value for each of the call's 2 sequences, got 1"),
    (sliding_window(3, torch.tensor(2**40)), "offset must be from -1073741824 to 1073741824, got 1099511627776"),
]


@pytest.mark.parametrize(("mask", "words"), WRONG_MASKS, ids=[words.split(" ")[0] for _, words in WRONG_MASKS])
def test_masks_of_another_call_are_refused_alone_and_in_any_composition(mask, words):
    for wrong in (mask, both(causal(), mask), either(mask, lambda *pair: pair[2] == pair[3]), from_head(mask, 1)):
        with pytest.raises(ValueError, match=words):
            check_mask_mod(wrong, **CALL)
        with pytest.raises(ValueError, match=words):
            check_mask_mod(wrong.placed(3) if "offset" not in words else wrong, **CALL)


two = torch.ones(2, 8, dtype=torch.bool)
rows = torch.ones(2, 5, dtype=torch.bool)
WRONG_FUNCTIONS = [
    (lambda b, h, q, k: None, TypeError, "mask_mod must return a bool tensor of its indices' shape, got NoneType"),
    (lambda b, h, q, k: k < torch.tensor(3).item(), TypeError, "mask_mod must not read a tensor's value"),
    (lambda b, h, q, k: q >= k and k > 3, TypeError, "got if, and, or, not"),
    (lambda b, h, q, k: True, TypeError, "got bool; combine comparisons of the indices with &, | and ~"),
    (lambda b, h, q, k: [q >= k], TypeError, "got list"),
    (lambda b, h, q, k: 1, TypeError, "got int"),
    (lambda b, h, q, k: 0.5, TypeError, "got float"),
    (lambda b, h, q, k: numpy.ones((), dtype=bool), TypeError, "got ndarray"),
    (lambda b, h, q, k: q - k, TypeError, "got dtype torch.int64"),
    (lambda b, h, q, k: (q >= k)[None], ValueError, r"got shape \[1\] for 0-dim indices"),
    (
        lambda b, h, q: q >= h,
        TypeError,
        r"mask_mod must be a function of \(b, h, q_idx, kv_idx\), got one of \(b, h, q\)",
    ),
    (lambda b, h, q, k, more: q >= k, TypeError, r"got one of \(b, h, q, k, more\)"),
    (lambda b, h, q, k: two[b, k] & two[q, k], ValueError, r"mask_mod must take every index up to \(1, 3, 4, 7\)"),
    (lambda b, h, q, k: rows[b][q] & (q >= k), ValueError, r"mask_mod must be elementwise .* not, got a IndexError"),
    (lambda b, h, q, k: (q >= k) if q > k else (q < k), TypeError, "mask_mod must not .* got if"),
    (lambda b, h, q, k: (q < k).flatten()[0], ValueError, "mask_mod must be elementwise .* got another answer"),
    (two, TypeError, r"mask_mod must be a function of \(b, h, q_idx, kv_idx\), got a tensor: bool\[2, 8\]"),
    ("causal", TypeError, r"mask_mod must be a function of \(b, h, q_idx, kv_idx\), got str"),
    (SpanMask(lambda b, h: ((0, h),)), TypeError, r"spans must be a function of \(b, h, q_idx\), got one of \(b, h\)"),
    (SpanMask(lambda b, h, q: (0, q)), TypeError, "spans must return one or more .* got 0 for one"),
    (SpanMask(lambda b, h, q: ()), TypeError, r"spans must return one or more .* got \(\)"),
    (SpanMask(lambda b, h, q: ((0, q / 2),)), TypeError, r"spans must return .* got float32\[\]"),
    (SpanMask(lambda b, h, q: ((0, two[b].int()),)), ValueError, r"spans must return .* shape, got int32\[8\]"),
    (SpanMask(lambda b, h, q: ((0, rows[b][q].int()),)), ValueError, "spans must be elementwise .* got a IndexError"),
]


@pytest.mark.parametrize(
    ("function", "error", "words"), WRONG_FUNCTIONS, ids=[words[:60] for *_, words in WRONG_FUNCTIONS]
)
def test_what_is_no_mask_is_named_in_one_sentence(function, error, words):
    with pytest.raises(error, match=words) as caught:
        check_mask_mod(function, **CALL)
    assert len(str(caught.value).splitlines()) == 1
    if not isinstance(function, torch.Tensor | str):
        with pytest.raises(error, match=words):
            check_mask_mod(both(causal(), from_head(function, 0)), **CALL)


class OfTheUser(Exception):
    pass


def test_what_the_function_raises_comes_out_as_it_is():
    def failing(b, h, q_idx, kv_idx):
        raise OfTheUser("mine")

    with pytest.raises(OfTheUser, match=r"^mine$"):
        check_mask_mod(either(causal(), failing), **CALL)


class Checks(torch.nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        check_mask_mod(self.mask, **CALL)
        return x + 1


def test_values_are_read_on_a_cpu_outside_a_graph_only(monkeypatch):
    bad_values, bad_shape = padding(lengths([30, -1])), padding(lengths([3]))

    @partial(torch.compile, backend="eager", fullgraph=True)
    def in_graph(x, mask):
        check_mask_mod(mask, **CALL)
        return x + 1

    in_graph(torch.zeros(2), bad_values)
    in_graph(torch.zeros(2), both(bad_values, lambda b, h, q_idx, kv_idx: q_idx >= kv_idx))
    for strict in (False, True):
        torch.export.export(Checks(bad_values), (torch.zeros(2),), strict=strict)
    assert can_be_read(bad_values.lengths) and not can_be_read(bad_values.lengths.to("meta"))
    monkeypatch.setattr("mask_mods.checks.can_be_read", lambda value: False)
    check_mask_mod(bad_values, **CALL)
    with pytest.raises(ValueError, match="lengths must hold"):
        check_mask_mod(bad_shape, **CALL)


# Each must come back from pickle as the same mask, and deep copies must not share tensors.
@pytest.mark.parametrize("mask", FITTING[:14] + FITTING[15:16], ids=repr)
def test_masks_are_pickled_and_copied(mask):
    indices = torch.arange(2).view(2, 1, 1, 1), torch.arange(4).view(4, 1, 1), torch.arange(5)[:, None], torch.arange(8)
    stream = io.BytesIO()
    torch.save(mask, stream)
    stream.seek(0)
    for again in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), torch.load(stream, weights_only=False)):
        assert repr(again) == repr(mask) and type(again) is type(mask)
        assert torch.equal(*torch.broadcast_tensors(again(*indices), mask(*indices)))
        assert torch.equal(*torch.broadcast_tensors(again.placed(2)(*indices), mask.placed(2)(*indices)))
    block_mask = create_block_mask(mask, 2, None, 5, 8, device="cpu")
    assert torch.equal(pickle.loads(pickle.dumps(block_mask)).to_dense(), block_mask.to_dense())


def test_a_mask_of_local_functions_says_why_it_is_not_pickled():
    local = SpanMask(lambda b, h, q_idx: ((0, q_idx),))
    with pytest.raises(TypeError, match="spans must be a function of a module's top level to be pickled"):
        pickle.dumps(both(causal(), local))
    assert copy.deepcopy(local).spans is local.spans and copy.copy(local) is local


def test_a_mask_of_ones_own_over_positions_is_placed_and_checked():
    class Diagonal(PositionMask):
        def spans(self, b, h, q_idx):
            return ((self.position(b, q_idx), self.position(b, q_idx)),)

    zero = torch.tensor(0)
    assert Diagonal().placed(3)(zero, zero, zero, torch.tensor(3))
    with pytest.raises(ValueError, match="offset must hold"):
        check_mask_mod(Diagonal(offset=lengths([1, 2, 3])), **CALL)


def test_queries_that_see_and_the_last_of_each_sequence():
    right, left = padding(lengths([3, 5])), padding(lengths([4, 0]), "left", total=8)
    sizes = 2, 3, 5, 8, "cpu"
    own = lambda b, h, q_idx, kv_idx: (q_idx > h) & (kv_idx < 2)  # noqa: E731
    expected = {right: ([[2], [4]], None), left: ([[4], [-1]], None), causal(): ([[4]], None), own: ([[4]], None)}
    for mask in (*expected, both(causal(), right), both(left, own), sliding_window(2).placed(9)):
        b, h = torch.arange(2).view(2, 1, 1, 1), torch.arange(3).view(3, 1, 1)
        brute_force = mask(b, h, torch.arange(5)[:, None], torch.arange(8)).expand(2, 3, 5, 8).any(-1)
        assert torch.equal(seeing_queries(mask, *sizes).expand(2, 3, 5), brute_force)
    assert last_queries(right, *sizes).tolist() == [[2], [4]]
    assert last_queries(both(causal(), right), *sizes).tolist() == [[2], [4]]
    assert last_queries(left.placed(3), *sizes).tolist() == [[4], [-1]]
    assert last_queries(causal(), *sizes).tolist() == [[4]]


PAGE = (Path(mask_mods.__file__).parent / "README.md").read_text()


def test_the_page_runs():
    names = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "mask_mods/README.md", "exec"), names)


@pytest.mark.parametrize("name", sorted(set(mask_mods.__all__) & set(re.findall(r"`(\w+)\(", PAGE))))
def test_the_page_shows_the_real_signature(name):
    signature = inspect.signature(getattr(mask_mods, name))
    bare = [x.replace(annotation=inspect.Parameter.empty) for x in signature.parameters.values()]
    shown = str(inspect.Signature(bare))
    assert f"`{name}{shown}`" in PAGE


def test_the_page_names_every_mask():
    makers = {name for name in mask_mods.__all__ if name[0].islower()}
    helpers = {"any_key_visible", "block_visibility", "check_mask_mod", "hides_keys", "last_queries", "place"}
    assert makers - helpers - {"seeing_queries", "visible_keys"} == set(re.findall(r"`(\w+)\(", PAGE)) & makers


def test_what_another_thread_exports_lets_no_mask_pass():
    """torch.compiler.is_exporting() is true for every thread while one exports."""
    inside, done = threading.Event(), threading.Event()

    class Waits(torch.nn.Module):
        def forward(self, x):
            inside.set()
            assert done.wait(60) and recorded()
            return x + 1

    exporting = partial(torch.export.export, Waits(), (torch.ones(3),), strict=False)
    other = threading.Thread(target=exporting)
    other.start()
    try:
        assert inside.wait(60) and torch.compiler.is_exporting()
        for wrong in (padding(lengths([3, -1])), lambda b, h, q_idx, kv_idx: None):
            with pytest.raises((TypeError, ValueError)):
                check_mask_mod(wrong, **CALL)
    finally:
        done.set()
        other.join()
