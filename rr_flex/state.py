"""What a prompt's next chunk needs of its chunks before: their pooled keys, which are never pooled again."""

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rr_flex.checks import shown
from rr_flex.config import RRConfig
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
    A new prompt needs a new state: one whose first chunk meets an old state is refused, and on a CPU also keys that are
    not the old ones in the last whole stride. Not noticed: other keys before that stride, and on an accelerator, which
    would have to wait, a later chunk of another prompt.
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
        """Memory of the pooled keys."""
        return 0 if self._pooled is None else self._pooled.nbytes

    def trim(self, tokens: int) -> None:
        """Forgets what lies behind the first `tokens` keys: a rejected draft, a cache that was cropped."""
        if type(tokens) is not int or tokens < 0:
            raise ValueError(f"tokens must be an int of at least 0, got {shown(tokens)}")
        if self._layout is not None:
            self._whole = min(self._whole, tokens // self._layout.stride)

    def reorder(self, rows: Int[Tensor, " rows"]) -> None:
        """Takes the given rows of the batch, in this order, with repeats: beams."""
        if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"rows must be an integer tensor [rows], got {getattr(rows, 'dtype', type(rows).__name__)}")
        if not len(rows):
            raise ValueError("rows must be at least one, got none")
        if self._layout is not None:
            if rows.device.type == "cpu" and not bool(((rows >= 0) & (rows < self._layout.batch)).all()):
                raise ValueError(f"rows must be from 0 to {self._layout.batch - 1}, got {rows.tolist()}")
            with torch.inference_mode(False):
                self._pooled = self._pooled.index_select(1, rows.to(self._pooled.device))
            self._layout = replace(self._layout, batch=self._pooled.shape[1])

    def copy(self) -> "PrefillState":
        """A state of its own with the same keys: prompts that go on from a common prefix."""
        other = PrefillState()
        other._layout, other._whole = self._layout, self._whole
        with torch.inference_mode(False):
            other._pooled = None if self._pooled is None else self._pooled.clone()
        return other

    def pool(self, q: Float[Tensor, "B Hq Lq D"], k: Float[Tensor, "B Hkv Lk D"], request: Request) -> Request:
        """The request with the pooled keys of all of k, of which only the new strides are computed here."""
        if traced():
            raise NotImplementedError("state must be None inside a caller's torch.compile, got a PrefillState")
        config = request.config
        if "key_stride" not in ESTIMATORS[config.pool].reads:
            raise ValueError(f"state must be None with pool={config.pool!r}, which pools no keys, got a PrefillState")
        self.settle(k, config, room=k.shape[2])
        self.pool_new(k, valid_keys_of(request, q, k))
        return replace(request, pooled_keys=rearrange(self.pooled(k.shape[2]), "n b h e -> b h n e"))

    def settle(self, k: Float[Tensor, "B Hkv Lk D"], config: RRConfig, *, room: int) -> None:
        """Takes the settings and sizes by which keys are pooled, and room for so many; ValueError if they changed."""
        (B, Hkv, _, D), stride, order = k.shape, config.strides[1], config.order
        layout = Layout(B, Hkv, order * D, stride, order, k.dtype, k.device)
        if self._layout not in (None, layout):
            raise ValueError(f"state must keep its batch, layer and settings, {self._layout}, got {layout}")
        self._layout = layout
        self._make_room(ceil_div(room, stride))

    def pool_new(self, k: Float[Tensor, "B Hkv Lk D"], valid: Bool[Tensor, "#B #Hkv Lk"] | None = None) -> None:
        """Pools the strides of k that are new or were not whole; `valid` as in `pooled_features`."""
        stride, order, Lk = self._layout.stride, self._layout.order, k.shape[2]
        # On a CPU the last stride is pooled once more, to see whether it is still the same.
        again = int(self._whole > 0 and k.device.type == "cpu")
        if self.tokens == Lk and not again:
            return
        start = (self._whole - again) * stride
        new = k[:, :, start:], stride, order, None if valid is None else valid[..., start:]
        if again:
            self._check_last(pooled_features(*new)[:, :, 0])
        pool_into(self._pooled[self._whole - again : ceil_div(Lk, stride)], *new)
        self._whole = Lk // stride

    def pooled(self, tokens: int) -> Float[Tensor, "strides B Hkv E"]:
        """The pooled keys of so many tokens, where they lie."""
        return self._pooled[: ceil_div(tokens, self._layout.stride)]

    def note(self, tokens: int) -> None:
        """Says that so many tokens, whole strides, were pooled into where they lie."""
        self._whole = tokens // self._layout.stride

    def _check_last(self, found: Float[Tensor, "B Hkv E"]) -> None:
        """ValueError unless the last whole stride is the one that was pooled before, but for rounding."""
        if not torch.allclose(found, self._pooled[self._whole - 1], rtol=1e-2, atol=1e-3, equal_nan=True):
            first = self.tokens - self._layout.stride
            raise ValueError(
                f"k must go on with the keys of its state, got other keys in tokens {first} to {self.tokens - 1}; a new"
                " prompt takes a new state"
            )

    def _make_room(self, strides: int) -> None:
        """Room for so many strides, doubled as it runs out."""
        about = self._layout
        capacity = 0 if self._pooled is None else self._pooled.shape[0]
        if strides > capacity:
            size = (1 << (strides - 1).bit_length(), about.batch, about.key_heads, about.features)
            with torch.inference_mode(False):  # it must take the next call's too, in inference mode or out of it
                grown = torch.zeros(size, dtype=about.dtype, device=about.device)
            if capacity:
                grown[:capacity] = self._pooled
            self._pooled = grown


def check_state(state: object, q: Tensor, k: Tensor) -> None:
    """TypeError for anything but a PrefillState or None; ValueError for queries that it has left behind."""
    if state is None:
        return
    if not isinstance(state, PrefillState):
        raise TypeError(f"state must be a PrefillState, got {type(state).__name__}")
    Lq, Lk = q.shape[2], k.shape[2]
    if Lq > Lk - state.tokens:
        raise ValueError(
            f"q must hold tokens after the state's {state.tokens} alone, {Lk - state.tokens} of k's {Lk}, got {Lq}; a"
            " new prompt takes a new state, and `state.trim` takes tokens back"
        )


@torch.no_grad()
def pool_into(
    where: Float[Tensor, "n B Hkv E"],
    k: Float[Tensor, "B Hkv new D"],
    stride: int,
    order: int,
    valid: Bool[Tensor, "#B #Hkv new"] | None,
) -> None:
    """`pooled_features`, written to their place: one kernel on an accelerator, some operations on a CPU."""
    write = _write_pooled_compiled if k.device.type == "cuda" else _write_pooled
    write(where, k, stride, order, valid)


def _write_pooled(where: Tensor, k: Tensor, stride: int, order: int, valid: Tensor | None) -> None:
    where.copy_(rearrange(pooled_features(k, stride, order, valid), "b h n e -> n b h e"))


_write_pooled_compiled = compile_whole(_write_pooled, dynamic=True)
