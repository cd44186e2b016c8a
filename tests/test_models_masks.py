"""transformers' masks, read as spans: what they show, and what is not recognised."""

import inspect
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from model_families import SETTINGS, logits, make
from transformers import masking_utils

from mask_mods import SpanMask
from rr_flex.models import enable, hf_masks
from rr_flex.models.hf_masks import (
    COMPOSED,
    NOT_READ,
    SPANS,
    TESTED_TRANSFORMERS,
    UNRECOGNISED,
    Place,
    made_by,
    read,
)
from rr_flex.models.prefill_mask import prefill_mask
from rr_flex.models.records import OWN_MASK

causal = masking_utils.causal_mask_function
sliding = masking_utils.sliding_window_causal_mask_function(5)
ids = torch.tensor([[0] * 6 + [1] * 10, [0] * 11 + [1] * 5])
positions = torch.tensor([[*range(6), *range(10)], [*range(11), *range(5)]])
# Older releases (5.17) give a packed mask the row's own positions.
remap = getattr(masking_utils, "remap_positions_for_packed_sequence", lambda function, positions: function)
packed = masking_utils.packed_sequence_mask_function(ids)
MASKS = {
    "causal": (causal, True, False),
    "sliding": (sliding, True, True),
    "chunked": (masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 3])), True, False),
    "packed": (masking_utils.and_masks(remap(sliding, positions), packed), True, True),
    "bidirectional": (masking_utils.bidirectional_mask_function, False, False),
    "band": (masking_utils.sliding_window_bidirectional_mask_function(3), False, True),
}
ARGUMENTS = {"sliding_window": 4, "chunk_size": 4, "left_padding": torch.zeros(1, dtype=torch.long)}
ARGUMENTS |= {"mask_function": causal, "position_ids": positions, "q_offset": 1, "kv_offset": 1}
ARGUMENTS |= dict.fromkeys(("packed_sequence_mask", "padding_mask", "block_sequence_ids"), ids)
NEWS = f"transformers {transformers.__version__} (tested: {', '.join(TESTED_TRANSFORMERS)})"


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("offsets", [(0, 0), (4, 0), (7, 3), (torch.tensor(6), 2)])
def test_masks_are_read_as_they_are(name, offsets):
    function, causes, window = MASKS[name]
    q_offset, kv_offset = (0, 0) if name == "packed" else offsets
    Lq, Lk = (16, 16) if name == "packed" else (9, 13)
    b, h = torch.arange(2).view(2, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.long)
    q, k = torch.arange(Lq).view(1, 1, Lq, 1), torch.arange(Lk).view(1, 1, 1, Lk)
    theirs = function(b, h, q + q_offset, k + kv_offset)
    reading = read(function)
    mask = reading.spans(Place(torch.as_tensor(q_offset - kv_offset), kv_offset, torch.device("cpu")))
    assert isinstance(mask, SpanMask) and reading.unread is None
    assert torch.equal(mask(b, h, q, k).expand(2, 1, Lq, Lk), theirs.expand(2, 1, Lq, Lk))
    assert (reading.causal, reading.sliding) == (causes, window)
    assert reading.causal_window == {"causal": hf_masks.FAR, "sliding": 5}.get(name)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("offsets", [(0, 0), (4, 0), (7, 3)])
def test_padded_masks_are_theirs_for_real_queries(window, offsets):
    q_offset, kv_offset = offsets
    Lq, Lk = 9, 13
    real = torch.ones(2, q_offset + Lq, dtype=torch.bool)
    real[0, :6] = False
    real[1, -2:] = False
    function = causal if window is None else masking_utils.sliding_window_causal_mask_function(window)
    arguments = {"q_length": Lq, "kv_length": Lk, "q_offset": q_offset, "kv_offset": kv_offset}
    arguments |= {"mask_function": function, "attention_mask": real, "batch_size": 2}
    mine, reason = prefill_mask(**arguments).spans(torch.device("cpu"))
    theirs = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    b, h = torch.arange(2).view(2, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.long)
    shown = mine(b, h, torch.arange(Lq).view(1, 1, Lq, 1), torch.arange(Lk).view(1, 1, 1, Lk))
    real_queries = real[:, q_offset : q_offset + Lq]
    assert reason is None and torch.equal(shown[:, 0][real_queries], theirs[:, 0][real_queries])
    assert not shown[:, 0][~real_queries].any()


def test_an_unknown_mask_is_not_guessed_at():
    def strange(b, h, q, k):
        return (q + k) % 2 == 0

    either = masking_utils.or_masks(causal, strange)
    assert read(strange).unread == read(either).unread == OWN_MASK and not read(either).causal
    # Positions that start anew say nothing where the documents are not told.
    assert read(remap(causal, positions)).unread == (OWN_MASK if remap(causal, positions) is not causal else None)


def factories():
    """The public functions of masking_utils that make a mask function, by name."""
    for name, function in inspect.getmembers(masking_utils, inspect.isfunction):
        own = function.__module__ == masking_utils.__name__ and not name.startswith("_")
        if own and inspect.signature(function).return_annotation is Callable:
            yield name, function


def example_of(factory):
    parameters = inspect.signature(factory).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return factory(causal, sliding)
    return factory(*(ARGUMENTS[parameter.name] for parameter in parameters))


def test_each_mask_factory_of_this_transformers_is_known():
    """The canary: a release that adds, renames or rewrites one is named here. Models stay dense then, and say so."""
    found = dict(factories())
    assert len(found) >= 8, f"{NEWS} annotates its mask factories in another way: {sorted(found)}"
    for name, factory in found.items():
        reason = read(example_of(factory), packed=True).unread
        assert reason != UNRECOGNISED, f"{NEWS} has a mask that rr_flex.models.hf_masks does not recognise: {name}"
        assert reason is None or name in NOT_READ, f"{NEWS}: {name} is read no longer"
    composed = {"sliding_window_causal_mask_function", "chunked_causal_mask_function"}
    composed |= {"sliding_window_bidirectional_mask_function"}
    new = set(found) - set(SPANS) - set(COMPOSED) - set(NOT_READ) - composed
    assert not new, f"{NEWS} has new mask factories: {sorted(new)}"


def renamed(sliding_window):
    """What a release would make that calls its variable otherwise."""
    window = sliding_window

    def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx > q_idx - window

    inner_mask.__module__ = masking_utils.__name__
    inner_mask.__qualname__ = "sliding_window_overlay.<locals>.inner_mask"
    return inner_mask


def retyped(sliding_window):
    """What a release would make that holds the window in a tensor."""
    mask = renamed(sliding_window)
    sliding_window = torch.tensor(sliding_window)

    def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx > q_idx - sliding_window

    inner_mask.__module__, inner_mask.__qualname__ = mask.__module__, mask.__qualname__
    return inner_mask


@pytest.mark.parametrize("factory", [renamed, retyped])
def test_a_mask_of_another_form_is_dense_and_counted(factory, monkeypatch):
    model = make("mistral")
    dense = logits(model)
    monkeypatch.setattr(masking_utils, "sliding_window_overlay", factory)
    mask = masking_utils.sliding_window_causal_mask_function(4)
    assert made_by(factory(4)) == ("", {}) and read(mask).unread == UNRECOGNISED
    assert transformers.__version__ in UNRECOGNISED
    with enable(model, tau=0.3, **SETTINGS) as on:
        torch.testing.assert_close(logits(model), dense)
    assert dict(on.report().dense) == {UNRECOGNISED: 2} and not on.report().sparse


def test_a_transformers_that_asks_for_masks_in_another_way_is_refused_at_import(monkeypatch):
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda batch_size, cache_position, kv_length: None)  # 5.0's
    with pytest.raises(ImportError, match=rf"tested: .*5\.24\.0.*got {transformers.__version__}"):
        runpy.run_path(hf_masks.__file__)


def test_the_tested_releases_are_in_order_and_on_the_page():
    numbers = [tuple(map(int, version.split("."))) for version in TESTED_TRANSFORMERS]
    page = (Path(__file__).parent.parent / "rr_flex" / "models" / "README.md").read_text()
    assert numbers == sorted(numbers) and ", ".join(TESTED_TRANSFORMERS) in page
