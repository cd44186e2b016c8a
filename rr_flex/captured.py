"""A prompt's chunks as CUDA graphs: what a chunk costs the host is one replay, for caches that stay where they are."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from rr_flex.attention import Asked, answer, attend, count
from rr_flex.checks import (
    FARTHEST,
    check_numbers,
    check_offset,
    check_queries_and_keys,
    check_values,
    gradient_wanted,
    shown,
)
from rr_flex.config import RRConfig
from rr_flex.geometry import ceil_div
from rr_flex.kernels.choose import Backend, check_backend, check_backend_name, choose_kernel
from rr_flex.kernels.deciding import decide_call, work_of
from rr_flex.registry import ESTIMATORS
from rr_flex.request import make_request
from rr_flex.runtime.compiling import compile_whole
from rr_flex.runtime.recording import Recorder
from rr_flex.runtime.tracing import traced
from rr_flex.sampling import pooled_features
from rr_flex.state import PrefillState

GRID = 128  # tokens: where a chunk's first query may stand, and what its length is a multiple of
LEAST_STEP = 8192  # keys that one more graph is for
MOST_GRAPHS = 32  # of one cache: in longer ones the step is longer
REPLAY_HOST = 0.2  # ms of the host for a replay with its copies and checks


class CapturedPrefill:
    """`rr_attention` of a prompt's chunks over a cache: the same answer, a fraction of the host's time.

    For callers on CUDA that keep each layer's cache at one place in memory and fill it from the front, prompt after
    prompt. A chunk of `queries` tokens (a multiple of 128) that begins at a multiple of 128 replays a CUDA graph; there
    is one for each 8,192 keys of a cache (of its thirty-second part, if that is more), captured when a chunk first
    reaches into them. Any other chunk, and one for which dense attention is faster, is an ordinary call; `calls` says
    how many were "replayed" and how many "called". One object serves all layers of a model, and holds each cache that
    it has seen, its pooled keys (see PrefillState) and the memory of the graphs until it is told to `forget`. On
    another stream than the last call's, work waits for that call's.

    `config` or single `settings`, `scale`, `softcap`, `head_offset`, `backend`: as in `rr_attention`, and so are the
    errors; ValueError for an estimator that pools no keys.
    """

    def __init__(
        self,
        queries: int,
        *,
        config: RRConfig | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        head_offset: int = 0,
        backend: Backend = "auto",
        **settings: Any,
    ) -> None:
        if type(queries) is not int or queries < GRID or queries % GRID:
            raise ValueError(f"queries must be a multiple of {GRID}, got {shown(queries)}")
        if type(head_offset) is not int:
            raise TypeError(f"head_offset must be an int, got {type(head_offset).__name__}")
        check_offset("head_offset", head_offset, 0, FARTHEST)
        check_numbers(scale, softcap)
        check_backend_name(backend)
        self.queries = queries
        self.config = RRConfig.resolve(config, settings)
        if isinstance(level := self.config.level, Tensor):  # a graph would not see what is written to it later
            self.config = self.config.with_settings({self.config.level_field: level.clone()})
        if "key_stride" not in ESTIMATORS[self.config.pool].reads:
            raise ValueError(f"pool must be one that pools keys, got {self.config.pool!r}")
        self.calls: Counter[str] = Counter()
        self._backend: Backend = backend
        self._options = {"scale": scale, "softcap": softcap, "head_offset": head_offset}
        self._caches: dict[tuple, _Cache] = {}
        self._shared: dict[tuple, _Shared] = {}
        self._graphs = self._recorder()

    _devices = ("cuda",)
    _recorder = Recorder

    def __call__(
        self,
        q: Float[Tensor, "B Hq Lq D"],
        k: Float[Tensor, "B Hkv capacity D"],
        v: Float[Tensor, "B Hkv capacity Dv"],
        first: int,
    ) -> Float[Tensor, "B Hq Lq Dv"]:
        """Attention of a chunk whose first query stands at `first`, over the whole cache of its layer.

        The cache is written up to the chunk's end by then, and before `first` it is what it was at the calls before.
        `first` = 0 begins a new prompt. The next call may overwrite the result. ValueError for a chunk that does not
        lie in the cache; NotImplementedError off CUDA, under torch.autocast, inside torch.compile and torch.cuda.graph,
        and for tensors that require grad; RuntimeError while another thread is in a call.
        """
        if traced():
            raise NotImplementedError("a captured prefill must be called outside of torch.compile")
        check_queries_and_keys(q, k)
        check_values(q, k, v)
        check_backend(self._backend, q)
        if gradient_wanted(q, k, v):
            raise NotImplementedError("q, k and v must not require grad: a replay has no backward")
        if torch.is_autocast_enabled(q.device.type):
            raise NotImplementedError("a captured prefill must be called outside of torch.autocast")
        if q.device.type not in self._devices:
            raise NotImplementedError(f"q must be on a CUDA device, got {q.device}; rr_attention takes a PrefillState")
        if q.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise NotImplementedError("a captured prefill must be called outside of torch.cuda.graph")
        Lq, capacity = q.shape[2], k.shape[2]
        if Lq > capacity:
            raise ValueError(f"q must have at most the cache's {capacity} tokens, got {Lq}")
        if type(first) is not int or not 0 <= first <= capacity - Lq:
            raise ValueError(f"first must be an int from 0 to {capacity - Lq}, got {shown(first)}")
        # What is kept must take the next call's too, in inference mode or out of it.
        with self._graphs.alone(q.device), torch.inference_mode(False), torch.no_grad():
            return self._attend(q, k, v, first)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
        Lq, capacity = q.shape[2], k.shape[2]
        place = _place(q, k, v)
        if place not in self._caches or not self._caches[place].lies_at(k, v):
            self._caches[place] = _Cache(k.detach(), v.detach())
        cache = self._caches[place]
        cache.state.trim(first)
        end = first + Lq
        if Lq == self.queries and first % GRID == 0 and end >= (self.config.min_length or 0):
            keys = step_end(end, capacity)
            if keys not in cache.replays:
                cache.replays[keys] = self._captured(cache, q, keys, first)
            if cache.replays[keys] is not None:
                self.calls["replayed"] += 1
                return cache.replays[keys](q, first)
        self.calls["called"] += 1
        asked = Asked(self.config, state=cache.state, backend=self._backend)
        return answer(q, k[:, :, :end], v[:, :, :end], asked, **self._options).out

    def forget(self) -> None:
        """Lets go of all caches, their pooled keys and graphs, once what was launched of them has ended."""
        with self._graphs.letting_go():
            self._caches.clear()
            self._shared.clear()

    def _captured(self, cache: "_Cache", q: Tensor, keys: int, first: int) -> Callable[[Tensor, int], Tensor] | None:
        """A chunk over the first `keys` of a cache as a graph; None where dense attention is faster."""
        # What is returned holds neither this object nor the cache's record: both are freed where they are let go of.
        state, all_keys, queries, config = cache.state, cache.k, self.queries, self.config
        k, v = all_keys[:, :, :keys], cache.v[:, :, :keys]
        request = make_request(q, k, config, self._options)
        name = choose_kernel(self._backend, q, v, request)
        if not self._pays(name, q, k):
            return None
        state.settle(all_keys, config, room=all_keys.shape[2])
        shape = (*q.shape, v.shape[3], q.dtype, q.device)
        if shape not in self._shared:
            out = q.new_empty(*q.shape[:3], v.shape[3])
            self._shared[shape] = _Shared(
                torch.empty_like(q, memory_format=torch.contiguous_format), out, request.q_offset
            )
        shared = self._shared[shape]
        pooled = state.pooled(keys)
        request = replace(request, q_offset=shared.first, pooled_keys=rearrange(pooled, "n b h e -> b h n e"))

        def chunk() -> None:
            _pool_chunk_compiled(k, pooled, shared.first, queries, config)
            shared.out.copy_(attend(name, (shared.q, k, v), request).out)

        def put(q: Tensor, first: int) -> None:
            state.pool_new(all_keys[:, :, :first])  # what ordinary calls, all dense, have left
            shared.q.copy_(q)
            shared.first.fill_(first)

        def replay(q: Tensor, first: int) -> Tensor:
            put(q, first)
            again()
            state.note(first + queries)
            count(name)
            return shared.out

        put(q, first)
        again = self._graphs.record(chunk)
        return replay

    def _pays(self, name: str, q: Tensor, k: Tensor) -> bool:
        """Whether a chunk at the end of k is faster sparse, by the kernel of this name, than dense."""
        if self.config.min_length is not None:
            return True  # asked at every call
        earlier = k.shape[2] - q.shape[2]
        work = work_of(q, k, earlier, causal=True, pooled=earlier)
        return decide_call(name, q, work, self.config, fused=True, host=REPLAY_HOST).sparse


@dataclass(frozen=True)
class _Shared:
    """What all chunks of one shape are copied to and come from."""

    q: Float[Tensor, "B Hq Lq D"]
    out: Float[Tensor, "B Hq Lq Dv"]
    first: Int[Tensor, ""]  # position of query 0


@dataclass
class _Cache:
    """A layer's cache, kept so that no other tensor can come to lie at its place."""

    k: Float[Tensor, "B Hkv capacity D"]
    v: Float[Tensor, "B Hkv capacity Dv"]
    state: PrefillState = field(default_factory=PrefillState)
    # Keys of a graph -> the chunk through it; None where dense attention is faster.
    replays: dict[int, Callable[[Tensor, int], Tensor] | None] = field(default_factory=dict)

    def lies_at(self, k: Tensor, v: Tensor) -> bool:
        """False where `resize_` has moved what was kept, and others have come to lie at its place."""
        return (self.k.data_ptr(), self.v.data_ptr()) == (k.data_ptr(), v.data_ptr())


def _place(q: Tensor, k: Tensor, v: Tensor) -> tuple:
    return (q.shape[1], *((x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in (k, v)))


def step_end(end: int, capacity: int) -> int:
    """Keys of the graph for a chunk that ends at `end`: the end of its step of the cache."""
    step = max(LEAST_STEP, ceil_div(ceil_div(capacity, MOST_GRAPHS), GRID) * GRID)
    return min(ceil_div(end, step) * step, capacity)


@torch.no_grad()
def _pool_chunk(k: Tensor, pooled: Tensor, first: Tensor, queries: int, config: RRConfig) -> None:
    """Pools the chunk's keys into their strides, at a position that only the device knows."""
    stride, device = config.strides[1], k.device
    token = first + torch.arange(queries, device=device)
    new = pooled_features(k.index_select(2, token), stride, config.order)
    row = first // stride + torch.arange(new.shape[2], device=device)
    pooled.index_copy_(0, row, rearrange(new, "b h n e -> n b h e"))


_pool_chunk_compiled = compile_whole(_pool_chunk, dynamic=True)
