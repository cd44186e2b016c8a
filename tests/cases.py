"""What the tests draw: shapes, settings, masks, and tensors from a seed."""

import contextlib
import warnings
from typing import NamedTuple

import oracle
import torch
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

from mask_mods import both, causal, document, either, frames, padding, prefix, sink, sliding_window


class Shape(NamedTuple):
    """The axes of q [B Hq Lq D] and of k and v [B Hkv Lk D]."""

    B: int = 2
    Hq: int = 4
    Hkv: int = 2
    Lq: int = 300
    Lk: int = 300
    D: int = 16


# Compiling costs seconds a shape, so the compiled tests share this one.
SQUARE = Shape()
# By default three block rows keep all that they see: sink, diagonal and last row. This leaves tau something to drop.
FREE = {"sink_blocks": 0, "dense_last_rows": 0, "min_length": 0}
EVERY_EXTENSION = {"query_stride": 16, "key_stride": 8, "block_size": (128, 64), "order": 2, "local_blocks": 2}
EVERY_EXTENSION |= {"budget": "threshold", "threshold": 0.2, **FREE}

LAYOUTS = [  # (query stride, key stride), (query block, key block)
    ((8, 8), (128, 128)),
    ((8, 8), (64, 64)),
    ((8, 8), (128, 64)),
    ((16, 8), (128, 64)),
    ((8, 16), (64, 128)),
    ((32, 4), (64, 64)),
    ((1, 1), (128, 128)),
    ((64, 64), (64, 64)),
]


def tensors(shape, seed=0, dtype=torch.float32):
    """q, k, v whose keys drift every 40 tokens, so that blocks differ in mass."""
    B, Hq, Hkv, Lq, Lk, D = shape
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *sizes: torch.randn(*sizes, generator=generator, dtype=torch.float64)  # noqa: E731
    drift = randn(B, Hkv, -(-Lk // 40), D).repeat_interleave(40, 2)[:, :, :Lk]
    q, k, v = 2 * randn(B, Hq, Lq, D), randn(B, Hkv, Lk, D) + drift, randn(B, Hkv, Lk, D)
    return q.to(dtype), k.to(dtype), v.to(dtype)


seeds = st.integers(0, 2**31)
taus = st.floats(0.05, 0.999)


@st.composite
def shapes(draw, longest=700, bottom_right=False):
    """Ragged lengths, one token, Lq != Lk, grouped heads."""
    Hkv = draw(st.integers(1, 2))
    Lk = draw(st.one_of(st.sampled_from([1, 8, 64, 127, 128, 129, 257, 384, 640]), st.integers(1, longest)))
    Lq = draw(st.one_of(st.just(Lk), st.just(1), st.integers(1, Lk if bottom_right else longest)))
    return Shape(draw(st.integers(1, 2)), Hkv * draw(st.integers(1, 3)), Hkv, Lq, Lk, draw(st.sampled_from([16, 24])))


@st.composite
def kept_by_rule(draw, Hq):
    """The settings that don't touch the estimate: which blocks are mandatory, and the budget."""
    counts = st.integers(0, 2)
    chosen = {name: draw(counts) for name in ("sink_blocks", "local_blocks", "dense_last_rows")}
    rule = draw(st.sampled_from(["count", "add", "per head", "threshold", "scaled_threshold"]))
    if "threshold" in rule:
        return {**chosen, "budget": rule, "threshold": draw(st.sampled_from([0.001, 0.03, 0.2, 0.6]))}
    if rule == "per head":
        return {**chosen, "tau": draw(st.lists(taus, min_size=Hq, max_size=Hq))}
    return {**chosen, "tau": draw(st.one_of(taus, st.just(1.0))), "mandatory": rule}


def real_keys(lengths, Lk, side):
    """Which keys are no padding: bool [B, Lk]."""
    index = torch.arange(Lk, device=lengths.device)
    return index < lengths[:, None] if side == "right" else index >= Lk - lengths[:, None]


MASKS = ["sliding_window", "document", "prefix", "left padding", "right padding", "frames", "window and sink"]


def mask_by_name(name, shape, seed=0, device="cpu"):
    """A mask_mod for queries that stand at the end of the keys, and the keys that are real (None: all)."""
    B, _, _, Lq, Lk, _ = shape
    offset = Lk - Lq
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high, *size: torch.randint(low, high + 1, size, generator=generator).to(device)  # noqa: E731
    if name == "sliding_window":
        return both(causal(offset), sliding_window(draw(1, Lk, 1).item(), offset)), None
    if name == "document":
        return both(causal(offset), document(draw(0, 4, B, Lk).sort(1).values, offset)), None
    if name == "prefix":
        return prefix(draw(1, Lk, 1).item(), offset), None
    if name == "frames":
        return frames(draw(1, 150, 1).item(), draw(1, 3, 1).item(), offset), None
    if name == "window and sink":
        return both(causal(offset), either(sliding_window(draw(1, 150, 1).item(), offset), sink(20))), None
    side, lengths = name.split()[0], draw(0, Lk, B)
    return both(causal(offset), padding(lengths, side=side, total=Lk, offset=offset)), real_keys(lengths, Lk, side)


def eager_flex(q, k, v, block_mask, scale=None):
    """flex_attention uncompiled, which torch warns about: its lists don't count there, only its mask_mod."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flex_attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True)


compiled_flex = torch.compile(flex_attention, fullgraph=True)


@contextlib.contextmanager
def no_compile():
    """Nothing inside may compile a graph."""
    before = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert counters["stats"]["unique_graphs"] == before


def eager_attention(q, k, v, allowed):
    """Attention in the tensors' own dtype with every pair written out: the yardstick for tolerances."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    score = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf"))
    return score.softmax(-1).nan_to_num(0) @ v


def assert_attends(out, q, k, v, allowed):
    """Error against float64 at most twice (same-dtype eager error + one rounding)."""
    exact = oracle.attend(q, k, v, allowed)[0]
    rounding = torch.finfo(q.dtype).eps * exact.abs().max()
    bound = 2 * ((eager_attention(q, k, v, allowed).double() - exact).abs().max() + rounding)
    assert out.dtype == q.dtype and out.shape == exact.shape
    assert (out.double() - exact).abs().max() <= bound
    assert (out[~allowed.any(-1)] == 0).all()
