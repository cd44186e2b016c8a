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

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from rr_flex.config import RRConfig
from rr_flex.models.layer_call import LayerCall, layer_of
from rr_flex.models.prefill_mask import PrefillMask
from rr_flex.registry import ESTIMATORS
from rr_flex.runtime.tracing import traced
from rr_flex.state import PrefillState

_LOCK = threading.Lock()
_here = threading.local()  # what the hook of the module that is being called has found


class Seen:
    """The keys that a call left in the cache."""

    def __init__(self, keys: Tensor) -> None:
        self._keys = ref(keys)
        self._version = _version(keys)

    def still_there(self, keys: Tensor) -> int:
        """How many of the first of `keys` are the ones that were seen."""
        seen = self._keys()
        if seen is keys:
            return keys.shape[2] if self._version == _version(keys) else 0
        # A crop leaves a view of the front.
        same = seen is not None and _base(seen) is _base(keys) and self._version == _version(keys)
        same = same and keys.storage_offset() == seen.storage_offset() and keys.stride() == seen.stride()
        return min(keys.shape[2], seen.shape[2]) if same and keys.shape[:2] == seen.shape[:2] else 0


@dataclass
class Kept:
    """One layer's state, and what it is a state of."""

    state: PrefillState
    config: RRConfig
    seen: Seen
    inference: bool  # torch.inference_mode: outside it its tensors can't be added to


@dataclass
class Place:
    """Where the state of one layer of one cache is."""

    module: nn.Module
    cache: "ref[Cache]"
    layer: int

    @property
    def keys(self) -> Tensor | None:
        """The cache's keys, if it is of the kind that appends them to a tensor."""
        layers = getattr(self.cache(), "layers", ())
        layer = layers[self.layer] if 0 <= self.layer < len(layers) else None
        return layer.keys if type(layer) is DynamicLayer and isinstance(layer.keys, Tensor) else None

    @property
    def kept(self) -> Kept | None:
        return _states.get(self.cache(), {}).get(self.layer)

    def keep(self, kept: Kept | None) -> None:
        with _LOCK:
            of_layers = _states.setdefault(self.cache(), {})
            if kept is None:
                of_layers.pop(self.layer, None)
            else:
                of_layers[self.layer] = kept


_states: "WeakKeyDictionary[Cache, dict[int, Kept]]" = WeakKeyDictionary()


def before_attention(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """The hook, before the cache is given the call's keys: takes back what was cropped, ends what does not go on."""
    if traced():
        return
    _here.place = None
    cache = kwargs.get("cache")
    cache = kwargs.get("past_key_values") if cache is None else cache  # the name changed within transformers 5
    if not isinstance(cache, Cache):
        return
    place = Place(module, ref(cache), layer_of(module))
    kept = place.kept
    if kept is None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if isinstance(hidden, Tensor) and hidden.shape[1] == 1:
            return  # a decoding step begins no state
    else:
        keys = place.keys
        tokens = 0 if keys is None else kept.seen.still_there(keys)
        kept.state.trim(tokens)
        if tokens == 0:
            place.keep(None)
    _here.place = place


def after_update(module: nn.Module, k: Tensor) -> Place | None:
    """Where this call's state is, now that the cache holds the call's keys; None where k [B,Hkv,Lk,D] is none of it."""
    place = getattr(_here, "place", None)
    _here.place = None
    if place is None or place.module is not module or place.keys is not k:
        return None
    if place.kept is not None:
        place.kept.seen = Seen(k)
    return place


def state_of(place: Place | None, call: LayerCall, config: RRConfig) -> PrefillState | None:
    """The state for a sparse call by `config`; None where there is none.

    It begins where the cache holds at least twice as many earlier keys as the call brings. A prompt that comes at once
    or in two chunks needs none, and pays neither its memory nor its graphs.
    """
    mask = call.mask
    own = isinstance(mask, PrefillMask) and isinstance(mask.q_offset, int) and mask.kv_offset == 0 and not mask.sliding
    if place is None or not own or "key_stride" not in ESTIMATORS[config.pool].reads:
        return None
    earlier, Lk = mask.q_offset, call.k.shape[2]
    if earlier + call.q.shape[2] != Lk:
        return None
    kept, inference = place.kept, torch.is_inference_mode_enabled()
    if kept is None or kept.config is not config or kept.inference != inference:
        if earlier < 2 * call.q.shape[2]:
            return None
        kept = Kept(PrefillState(), config, Seen(place.keys), inference)
        place.keep(kept)
    return kept.state


def _base(x: Tensor) -> Tensor:
    return x if x._base is None else x._base


def _version(x: Tensor) -> int:
    """How often it was written to; inference tensors do not tell, and no DynamicLayer writes to its own."""
    return 0 if x.is_inference() else x._version
