"""A prompt's pooled keys from one chunk to the next: a PrefillState for each layer of a cache, as long as it goes on.

An attention function is not told which cache its keys come from; a hook in front of the attention module is. Keys are
the cache's own only if they are the very tensor that it holds, and those before them are what they were only if the
cache still held the tensor that the last call left, or the front of it (a crop). Whatever else happened, such as a
reordering for beams, ends the state, and the next call pools all keys anew.
"""

import threading
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from rr_flex.config import RRConfig
from rr_flex.models.layer_call import LayerCall
from rr_flex.models.layer_plan import layer_of
from rr_flex.models.prefill_mask import PrefillMask
from rr_flex.registry import ESTIMATORS
from rr_flex.runtime.tracing import traced
from rr_flex.state import PrefillState

_LOCK = threading.Lock()
_here = threading.local()  # the cache that the hook of the module that is being called has found


class Seen:
    """The keys that a call left in the cache."""

    def __init__(self, keys: Tensor) -> None:
        self._keys = ref(keys)
        self._version = _version(keys)

    def still_there(self, keys: Tensor | None) -> int:
        """How many of the first of `keys` are the ones that were seen."""
        seen = self._keys()
        if seen is None or keys is None or self._version != _version(keys):
            return 0
        if seen is keys:
            return keys.shape[2]
        # A crop leaves a view of the front.
        same = _base(seen) is _base(keys) and keys.storage_offset() == seen.storage_offset()
        same = same and keys.stride() == seen.stride() and keys.shape[:2] == seen.shape[:2]
        return min(keys.shape[2], seen.shape[2]) if same else 0


@dataclass
class Kept:
    """One layer's state, and what it is a state of."""

    state: PrefillState
    config: RRConfig
    seen: Seen


# By the object that holds a layer's keys in its cache.
_states: "WeakKeyDictionary[DynamicLayer, Kept]" = WeakKeyDictionary()


def holder_of(cache: Cache | None, layer: int) -> DynamicLayer | None:
    """None where the cache is not of the kind that appends keys to a tensor, or has none of this layer yet."""
    layers = getattr(cache, "layers", ())
    holder = layers[layer] if 0 <= layer < len(layers) else None
    return holder if type(holder) is DynamicLayer and isinstance(holder.keys, Tensor) else None


def before_attention(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """The hook, before the cache is given the call's keys: takes back what was cropped, ends what does not go on."""
    if traced():
        return
    cache = kwargs.get("cache")
    cache = kwargs.get("past_key_values") if cache is None else cache  # the name changed within transformers 5
    _here.called = (module, ref(cache)) if isinstance(cache, Cache) else None
    holder = holder_of(cache, layer_of(module))
    kept = _states.get(holder) if holder else None
    if kept:
        tokens = kept.seen.still_there(holder.keys)
        kept.state.trim(tokens)
        if tokens == 0:
            with _LOCK:
                _states.pop(holder, None)


def after_update(module: nn.Module, k: Tensor) -> DynamicLayer | None:
    """What holds this call's keys k [B,Hkv,Lk,D], now that the cache has them; None where they are none of it."""
    called = getattr(_here, "called", None)
    _here.called = None
    holder = holder_of(called[1](), layer_of(module)) if called and called[0] is module else None
    if holder is None or holder.keys is not k:
        return None
    if holder in _states:
        _states[holder].seen = Seen(k)
    return holder


def state_of(holder: DynamicLayer | None, call: LayerCall, config: RRConfig) -> PrefillState | None:
    """The state for a sparse call by `config`; None where there is none.

    It begins where the cache holds at least twice as many earlier keys as the call brings. A prompt that comes at once
    or in two chunks needs none, and pays neither its memory nor its graphs.
    """
    mask = call.mask
    own = isinstance(mask, PrefillMask) and isinstance(mask.q_offset, int) and mask.kv_offset == 0
    if holder is None or not own or mask.reading.sliding or "key_stride" not in ESTIMATORS[config.pool].reads:
        return None
    earlier = mask.q_offset
    if earlier + call.q.shape[2] != call.k.shape[2]:
        return None
    kept = _states.get(holder)
    if kept is None or kept.config is not config:
        if earlier < 2 * call.q.shape[2]:
            return None
        kept = Kept(PrefillState(), config, Seen(holder.keys))
        with _LOCK:
            _states[holder] = kept
    return kept.state


def _base(x: Tensor) -> Tensor:
    return x if x._base is None else x._base


def _version(x: Tensor) -> int:
    """How often it was written to; inference tensors do not tell, and no DynamicLayer writes to its own."""
    return 0 if x.is_inference() else x._version
