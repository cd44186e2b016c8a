"""Pooled keys between the chunks of a prompt: with them the model does what it does without, and pools less.

In torch's eager mode, which means the same, so that nothing compiles.
"""

import copy
import gc
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from model_families import IDS, SETTINGS, WINDOW, make, with_cache

from rr_flex.models import enable, forward, states
from rr_flex.state import PrefillState

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
SPARSE = {"tau": 0.4, **SETTINGS}


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@pytest.fixture(autouse=True)
def eager():
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def new_cache(model):
    return hf.DynamicCache(config=model.config)


def call(model, cache, ids):
    return model(ids, **with_cache(model, cache)).logits


def both_ways(model, steps, **settings):
    """What `steps(cache)`, a generator of logits, gives with states and without; and the tokens that each pooled."""
    results = []
    for state_of in (states.state_of, lambda place, call, config: None):
        pooled, pool = [], PrefillState.pool

        def counted(self, q, k, request, pool=pool, pooled=pooled):
            pooled.append(k.shape[2] - self.tokens)
            return pool(self, q, k, request)

        with (
            enable(model, **(SPARSE | settings)) as on,
            patch.object(forward, "state_of", state_of),
            patch.object(PrefillState, "pool", counted),
        ):
            results.append((list(steps(new_cache(model))), pooled))
        assert on.report().sparse and on.report().density < 1
    (with_them, pooled), (without, none) = results
    assert not none
    for mine, plain in zip(with_them, without, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-5, rtol=1e-5)
    return pooled


def test_chunks_pool_their_own_keys_alone(llama):
    def chunks(cache):
        for first in range(0, 320, 64):
            yield call(llama, cache, IDS[:1, first : first + 64])

    # The first two chunks need no state, the third begins one; each of two layers.
    assert both_ways(llama, chunks) == [192, 192, 64, 64, 64, 64]


def test_a_conversation_goes_on_after_its_answer(llama):
    """One-token steps between two prefills: their keys are pooled with the next."""

    def turns(cache):
        yield call(llama, cache, IDS[:1, :128])
        yield call(llama, cache, IDS[:1, 128:192])
        for token in range(192, 196):
            yield call(llama, cache, IDS[:1, token : token + 1])
        yield call(llama, cache, IDS[:1, 196:300])

    assert both_ways(llama, turns) == [192, 192, 108, 108]


def test_a_crop_takes_back(llama):
    """A rejected draft: what was cropped is pooled anew, the rest is kept. Twice, and beside one that grew again."""

    def drafts(cache):
        yield call(llama, cache, IDS[:1, :128])
        yield call(llama, cache, IDS[:1, 128:192])
        yield call(llama, cache, IDS[:1, 192:256])
        for tokens in (48, 24):
            cache.crop(-tokens)
        yield call(llama, cache, IDS[1:2, 184:312])
        cache.crop(-100)
        yield call(llama, cache, IDS[2:3, :1])
        yield call(llama, cache, IDS[2:3, :100])

    assert both_ways(llama, drafts) == [192, 192, 64, 64, 128, 128, 105, 105]


def test_what_does_not_go_on_is_pooled_anew(llama):
    """Reordered for beams, written to in place, replaced, under other settings: nothing of it is taken for the same."""

    def beams(cache):
        for first in range(0, 160, 32):
            if first == 96:
                cache.reorder_cache(torch.tensor([1, 1]))
            if first == 128:
                cache.layers[0].keys.mul_(0.5)
            yield call(llama, cache, IDS[:2, first : first + 32])

    assert both_ways(llama, beams) == [96, 96, 128, 128, 160, 32]

    def settings(cache):
        yield call(llama, cache, IDS[:1, :64])
        yield call(llama, cache, IDS[:1, 64:128])
        with enable(llama, **(SPARSE | {"stride": 16})):
            yield call(llama, cache, IDS[:1, 128:192])
        yield call(llama, cache, IDS[:1, 192:256])

    assert both_ways(llama, settings) == [192, 192, 256, 256]


def test_inference_mode_comes_and_goes(llama):
    def chunks(cache):
        for first in range(0, 320, 64):
            with torch.inference_mode() if first < 256 else torch.no_grad():
                out = call(llama, cache, IDS[:1, first : first + 64])
            yield out

    assert both_ways(llama, chunks) == [192, 192, 64, 64, 64, 64]


def test_two_prompts_at_once_and_a_copied_prefix(llama):
    def interleaved(cache):
        other = new_cache(llama)
        for first in range(0, 256, 64):
            yield call(llama, cache, IDS[:1, first : first + 64])
            yield call(llama, other, IDS[1:2, first : first + 64])
            if first == 128:
                copied = copy.deepcopy(cache)
        yield call(llama, copied, IDS[2:3, :64])
        yield call(llama, cache, IDS[:1, 256:])

    assert both_ways(llama, interleaved) == [192] * 4 + [64] * 4 + [256] * 2 + [64] * 2


def test_padded_rows(llama):
    real = torch.ones(2, 320, dtype=torch.long)
    real[0, :100] = 0

    def chunks(cache):
        for first in range(0, 320, 64):
            last = first + 64
            out = llama(IDS[:2, first:last], attention_mask=real[:, :last], **with_cache(llama, cache)).logits
            yield out[1:] if last <= 100 else out  # a padded query's logits mean nothing

    assert both_ways(llama, chunks) == [192, 192, 64, 64, 64, 64]


@pytest.mark.parametrize(
    ("family", "cache", "settings"),
    [
        ("llama", lambda model: hf.StaticCache(config=model.config, max_cache_len=330), {}),
        ("mistral", new_cache, {}),
        ("llama", new_cache, {"pool": "queries", "tau": 0.3}),
    ],
    ids=["static", "window", "pooled queries"],
)
def test_where_there_is_no_state(family, cache, settings):
    """Keys past the prompt's end, keys that move on, no pooled keys."""
    model = make(family)
    cache = cache(model)
    with enable(model, **(SPARSE | settings)) as on, patch.object(PrefillState, "pool", None):
        for first in range(0, 192, 64):
            at = torch.arange(first, first + 64)
            model(IDS[:1, at], position_ids=at[None], **with_cache(model, cache))
    assert on.report().sparse == 6 and WINDOW < 192


def test_states_end_with_their_cache_and_hooks_with_enable(llama):
    cache = new_cache(llama)
    before = len(states._states)
    with enable(llama, **SPARSE):
        for first in range(0, 192, 64):
            call(llama, cache, IDS[:1, first : first + 64])
        assert len(states._states) == before + 2
        assert [states._states[layer].state.tokens for layer in cache.layers] == [192, 192]
    assert not any(module._forward_pre_hooks for module in llama.modules())
    del cache
    gc.collect()
    assert len(states._states) == before
