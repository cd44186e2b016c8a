"""What a prompt's next chunk needs of its chunks before: their pooled keys, which are never pooled again."""

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rr_flex.estimate import valid_keys_of
from rr_flex.geometry import ceil_div
from rr_flex.registry import ESTIMATORS
from rr_flex.request import Request
from rr_flex.runtime.compiling import compile_whole
from rr_flex.runtime.tracing import traced
from rr_flex.sampling import pooled_features


@dataclass(frozen=True)
class Layout:
    """What must not change between two chunks of a prompt."""

    batch: int
    key_heads: int
    features: int  # numbers a pooled key: D, at order 2 twice that
    stride: int  # tokens a pooled key
    order: int
    dtype: torch.dtype
    device: torch.device


class PrefillState:
    """Pooled keys of one attention layer's prompt so far, for `rr_attention(..., state=state)` and `select_blocks`.

    Each call is given the keys of all tokens up to its own; it pools those strides that are new or were not whole, and
    appends them. The result is that of the same call without a state, wherever the prompt is cut.
    Memory: order / key_stride of the keys' (1/8 by default, 1/16 with preset="best"), rounded up to a power of two.
    Keys before the last call's must stay what they were, and padding where it was. Not for two threads at once.
    """

    def __init__(self) -> None:
        self._layout: Layout | None = None
        # Strides first: those so far then have the same steps whatever the capacity, and no graph needs a copy of them.
        self._pooled: Float[Tensor, "capacity B Hkv E"] | None = None
        self._whole = 0  # strides that are pooled for good

    @property
    def tokens(self) -> int:
        """Keys that are never looked at again: those of whole strides."""
        return 0 if self._layout is None else self._whole * self._layout.stride

    @property
    def nbytes(self) -> int:
        return 0 if self._pooled is None else self._pooled.nbytes

    def trim(self, tokens: int) -> None:
        """Forgets what lies behind the first `tokens` keys: a rejected draft, a cache that was cropped."""
        if type(tokens) is not int or tokens < 0:
            raise ValueError(f"tokens must be an int of at least 0, got {tokens!r}")
        if self._layout is not None:
            self._whole = min(self._whole, tokens // self._layout.stride)

    def reorder(self, rows: Int[Tensor, " rows"]) -> None:
        """Takes the given rows of the batch, in this order, with repeats: beams."""
        if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"rows must be an integer tensor [rows], got {getattr(rows, 'dtype', type(rows).__name__)}")
        if self._layout is not None:
            if rows.device.type == "cpu" and not bool(((rows >= 0) & (rows < self._layout.batch)).all()):
                raise ValueError(f"rows must be from 0 to {self._layout.batch - 1}, got {rows.tolist()}")
            self._pooled = self._pooled.index_select(1, rows.to(self._pooled.device))
            self._layout = replace(self._layout, batch=self._pooled.shape[1])

    def copy(self) -> "PrefillState":
        """A state of its own with the same keys: prompts that go on from a common prefix."""
        other = PrefillState()
        other._layout, other._whole = self._layout, self._whole
        other._pooled = None if self._pooled is None else self._pooled.clone()
        return other

    def pool(self, q: Float[Tensor, "B Hq Lq D"], k: Float[Tensor, "B Hkv Lk D"], request: Request) -> Request:
        """The request with the pooled keys of all of k, of which only the new strides are computed here."""
        if traced():
            raise NotImplementedError("state must be None inside a caller's torch.compile, got a PrefillState")
        config, (B, Hkv, Lk, D) = request.config, k.shape
        if "key_stride" not in ESTIMATORS[config.pool].reads:
            raise ValueError(f"state must be None with pool={config.pool!r}, which pools no keys, got a PrefillState")
        stride, order = config.strides[1], config.order
        layout = Layout(B, Hkv, order * D, stride, order, k.dtype, k.device)
        if self._layout not in (None, layout):
            raise ValueError(f"state must keep its batch, layer and settings, {self._layout}, got {layout}")
        if Lk < self.tokens:
            raise ValueError(f"k must hold the state's {self.tokens} tokens, got {Lk}; `state.trim` takes tokens back")
        self._layout, start = layout, self._whole * stride
        valid = valid_keys_of(request, q, k)
        new = pool_new(k[:, :, start:], stride, order, None if valid is None else valid[..., start:])
        strides = ceil_div(Lk, stride)
        self._make_room(strides)
        self._pooled[self._whole : strides] = rearrange(new, "b h n e -> n b h e")
        self._whole = Lk // stride
        return replace(request, pooled_keys=rearrange(self._pooled[:strides], "n b h e -> b h n e"))

    def _make_room(self, strides: int) -> None:
        """Room for so many strides, doubled as it runs out."""
        about = self._layout
        capacity = 0 if self._pooled is None else self._pooled.shape[0]
        if strides > capacity:
            size = (1 << (strides - 1).bit_length(), about.batch, about.key_heads, about.features)
            grown = torch.zeros(size, dtype=about.dtype, device=about.device)
            if capacity:
                grown[:capacity] = self._pooled
            self._pooled = grown


def check_state(state: object) -> None:
    """TypeError for anything but a PrefillState or None."""
    if state is not None and not isinstance(state, PrefillState):
        raise TypeError(f"state must be a PrefillState, got {type(state).__name__}")


@torch.no_grad()
def pool_new(
    k: Float[Tensor, "B Hkv new D"], stride: int, order: int, valid: Bool[Tensor, "#B #Hkv new"] | None
) -> Float[Tensor, "B Hkv n E"]:
    """`pooled_features`: one kernel on an accelerator, some operations on a CPU."""
    pool = _pool_compiled if k.device.type == "cuda" else pooled_features
    return pool(k, stride, order, valid)


_pool_compiled = compile_whole(pooled_features, dynamic=True)
