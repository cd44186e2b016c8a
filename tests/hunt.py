"""Hunts for wrong answers: random calls of the public functions, right and wrong ones, through the compiled kernel.

    python tests/hunt.py --calls 20000 --calls-each 500 --seed 0
    python tests/hunt.py --calls 20000 --calls-each 500 --seed 0 --only 1234
    python tests/hunt.py --calls 20000 --calls-each 1000 --device cuda

A family has one form (heads, widths, blocks, masks, rules), so that its calls share graphs; lengths, batch, levels,
tensors, contexts and threads change from call to call. Without --calls-each each call has a form of its own and runs
uncompiled. Each call must raise a clear error of ours before anything is computed, or be right. Right is: the blocks
that the method's text chooses, and attention in float64 over the pairs that the mask shows and these blocks hold. The
oracle is written from the documentation and shares no code with the package.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import math
import random
import re
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from run_anew import RunAnew
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, flex_attention, or_masks

import mask_mods as mm
from rr_flex import (
    CapturedPrefill,
    PrefillState,
    RRConfig,
    captured,
    create_rr_block_mask,
    rr_attention,
    rr_attention_packed,
    select_blocks,
)
from rr_flex import attention as attention_module
from rr_flex import mass as mass_module
from rr_flex import selection as selection_module
from rr_flex.runtime import head_slices

ROOT = Path(__file__).resolve().parent.parent
OUTPUT_ERROR = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the largest value
MASS_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}  # of a row, for logits near 1
HANGS = 600  # seconds for one call, its compilation among them
captured.LEAST_STEP = 256  # tokens: caches are short here
LONG_ROW = 3  # blocks, past which a threshold scales while a hunt goes on: so are rows
WHERE = torch.device("cpu")  # where the calls run; the oracle is always on the CPU


class Wrong(Exception):
    """A call that was wrong, silent, or failed unclearly."""


class UsersOwn(Exception):
    """What a caller's own mask raises."""


@dataclass
class Mask:
    """A mask and its meaning: `show(b, h, i, j, base, Lk)`, where query i stands at position base + i."""

    text: str
    build: Callable[[int], Any]  # Lk -> mask_mod
    show: Callable[..., Any]
    real: Callable[..., Any] | None = None  # b, j, Lk -> whether key j is no padding
    valid: str = "right"  # right, wrong, either: refused or right
    own: bool = False


@dataclass
class Case:
    """One call: its tensors, arguments, and whether it is right."""

    q: Any
    k: Any
    v: Any
    mask: Mask | None
    options: dict[str, Any]
    settings: dict[str, Any]
    attention: dict[str, Any] = field(default_factory=dict)  # arguments that only rr_attention takes
    valid: str = "right"
    why: str = ""
    usual: bool = False  # as called: dense where the costs say so
    on_grid: bool = False  # q_offset as an int: block rows lie on absolute positions
    Lk: int = 0

    def __post_init__(self) -> None:
        self.Lk = self.Lk or self.k.shape[2]

    def spoil(self, why: str, valid: str = "wrong") -> None:
        self.why += f" {why}"
        self.valid = "wrong" if "wrong" in (valid, self.valid) else "either"


def at(base: Any, i: Any) -> Any:
    """Positions of query indices [.., i, j]: base an int, 0-dim or [B]."""
    return i + (base.long().reshape(-1, 1, 1, 1) if isinstance(base, Tensor) and base.ndim else int(base))


def there(x: Any) -> Any:
    """What a call is given, on the device, with its strides."""
    if isinstance(x, dict):
        return {name: there(one) for name, one in x.items()}
    if not isinstance(x, Tensor) or WHERE.type == "cpu" or x.device.type == "meta":
        return x
    if x.is_neg():  # which moving it would resolve
        return torch._neg_view(-x.to(WHERE))
    plain = type(x) is Tensor and x.layout == torch.strided and not (x.is_nested or x.is_conj())
    if not plain or 0 in x.stride():
        return x.to(WHERE)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=WHERE).copy_(x)


# ------------------------------------------------------------------------------------------- masks, right and wrong


def draw_mask(form: random.Random, r: random.Random, B: int, Lk: int, depth: int = 0) -> Mask:
    """`form` decides what is compiled, `r` the tensors."""
    kinds = ["causal", "window", "symmetric", "document", "prefix", "padding", "frames", "sink", "bidirectional"]
    kinds += ["own", "own head", "own table", "span", "dilated"]
    kinds += ["both", "either", "from_head", "and_masks", "or_masks"] * (2 - depth)
    kind, where, number = form.choice(kinds), form.choice(["none"] * 4 + ["0-dim", "batch"]), form.randint(1, 9)
    dtype = form.choice([torch.int64, torch.int32])
    count = B if where == "batch" else 1
    low = -20 if form.random() < 0.3 else 0
    offset = torch.tensor([r.randint(low, Lk) for _ in range(count)], dtype=dtype)
    offset = {"none": None, "0-dim": offset[0], "batch": offset}[where]
    own = lambda base: base if offset is None else offset  # noqa: E731
    text = f"{kind} {number} offset={offset}"

    def positioned(make: Callable, see: Callable) -> Mask:
        return Mask(text, lambda Lk: make(offset), lambda b, h, i, j, base, Lk: see(at(own(base), i), j))

    if kind == "causal":
        return positioned(mm.causal, lambda p, j: j <= p)
    if kind == "window":
        w = (1, 2, 7, 40, 77, 128, 200, 1000, 30)[number - 1]
        return positioned(lambda o: mm.sliding_window(w, o), lambda p, j: (p - w < j) & (j <= p))
    if kind == "symmetric":
        return positioned(
            lambda o: mm.sliding_window(20 * number, o, symmetric=True), lambda p, j: (p - j).abs() < 20 * number
        )
    if kind == "frames":
        t, past = (1, 3, 16, 50, 128)[number % 5], (None, 0, 1, 3)[number % 4]

        def framed(p, j):
            f, g = torch.div(torch.as_tensor(p), t, rounding_mode="floor"), j // t
            return (g <= f) if past is None else (g <= f) & (g >= f - past)

        return positioned(lambda o: mm.frames(t, past, o), framed)
    if kind == "prefix":
        lengths = torch.tensor([r.randint(0, Lk) for _ in range(B)])
        n = lengths if number % 2 else lengths[0]
        show = lambda b, h, i, j, base, Lk: (at(n, 0 * j) > j) | (j <= at(own(base), i))  # noqa: E731
        return Mask(f"{text} {n}", lambda Lk: mm.prefix(n, offset), show)
    if kind == "document":
        rows = []
        for _ in range(B):
            ids: list[int] = []
            while len(ids) < Lk:
                ids += [(ids[-1] if ids else r.randint(0, 3)) + r.randint(1, 3)] * r.randint(1, max(1, Lk // 2))
            rows.append(ids[:Lk])
        table = torch.tensor(rows, dtype=dtype)
        table = table if number % 2 else table[0]

        def same(b, h, i, j, base, Lk):
            p = at(own(base), i) + 0 * b
            every = table.expand(B, -1)
            return (p >= 0) & (p < Lk) & (every[b, p.clamp(0, Lk - 1)] == every[b, j])

        return Mask(f"{text} {list(table.shape)}", lambda Lk: mm.document(table[..., :Lk], offset), same)
    if kind == "padding":
        lengths = torch.tensor([r.randint(0 if number == 1 else 1, Lk) for _ in range(B)])
        if number == 2:
            lengths = lengths.clamp(max=120).to(torch.uint8)
        left, pads = number % 2 == 0, Lk - lengths.long()

        def real(b, t, Lk):
            # Between chunks, padding on the left stays where it is; on the right it begins where it begins.
            return (t >= pads[b] if left else t < lengths.long()[b]) & (t >= 0) & (t < Lk)

        def build(Lk):
            n = (Lk - pads).clamp(min=0) if left else lengths.clamp(max=Lk)
            return mm.padding(n.to(lengths.dtype), "left" if left else "right", Lk if left else None, offset)

        show = lambda b, h, i, j, base, Lk: real(b, j, Lk) & real(b, at(own(base), i), Lk)  # noqa: E731
        return Mask(f"{text} left={left} {lengths}", build, show, real, "either" if number == 2 else "right")
    if kind == "sink":
        return Mask(text, lambda Lk: mm.sink(number * 20), lambda b, h, i, j, base, Lk: j < number * 20)
    if kind == "bidirectional":
        return Mask(text, lambda Lk: mm.bidirectional(), lambda b, h, i, j, base, Lk: j >= 0)
    if kind in ("own", "own head", "own table"):
        cut = torch.tensor([r.randint(1, Lk) for _ in range(B)])
        functions = {
            "own": lambda b, h, i, j: (i - j) % number == 0,
            "own head": lambda b, h, i, j: (j + h * 16) % 64 < 40,
            "own table": lambda b, h, i, j: j < cut[b],
        }
        f = functions[kind]
        return Mask(f"{text} {cut}", lambda Lk: f, lambda b, h, i, j, base, Lk: f(b, h, i, j), own=True)
    if kind == "span":
        f = lambda b, h, i: ((30 * number, 30 * number + 20), (i - number, i - number))  # noqa: E731
        show = lambda b, h, i, j, base, Lk: ((j - 30 * number - 10).abs() <= 10) | (j == i - number)  # noqa: E731
        return Mask(text, lambda Lk: mm.SpanMask(f), show)
    if kind == "dilated":
        return positioned(
            lambda o: Dilated(number, offset=o), lambda p, j: (j <= p) & (j >= p - 2 * number) & ((p - j) % number == 0)
        )
    if kind == "from_head":
        first = (0, 1, 5, torch.tensor(r.randint(0, 7)))[number % 4]
        part = draw_mask(form, r, B, Lk, depth + 1)
        show = lambda b, h, i, j, base, Lk: part.show(b, h + int(first), i, j, base, Lk)  # noqa: E731
        build = lambda Lk: mm.from_head(part.build(Lk), first)  # noqa: E731
        return Mask(f"from_head({part.text}, {first})", build, show, part.real, part.valid, part.own)
    parts = [draw_mask(form, r, B, Lk, depth + 1) for _ in range(1 + number % 3)]
    join = torch.logical_and if kind in ("both", "and_masks") else torch.logical_or
    compose = {"both": mm.both, "either": mm.either, "and_masks": and_masks, "or_masks": or_masks}[kind]
    plain = kind in ("and_masks", "or_masks")  # a function, whose parts nobody places: they stand at 0
    reals = [part.real for part in parts if part.real is not None]
    hides = reals and (kind == "both" or (kind == "either" and len(reals) == len(parts)))

    def shown(b, h, i, j, base, Lk):
        first, *rest = (torch.as_tensor(part.show(b, h, i, j, 0 if plain else base, Lk)) for part in parts)
        for one in rest:
            first = join(first, one)
        return first

    def all_real(b, t, Lk):
        first, *rest = (real(b, t, Lk) for real in reals)
        for one in rest:
            first = join(first, one)
        return first

    return Mask(
        f"{kind}({', '.join(part.text for part in parts)})",
        lambda Lk: compose(*(part.build(Lk) for part in parts)),
        shown,
        all_real if hides else None,
        "either" if any(part.valid == "either" for part in parts) else "right",
        plain or any(part.own for part in parts),
    )


@dataclass(frozen=True, eq=False, repr=False)
class Dilated(mm.PositionMask):
    """A mask of the user's own, as mask_mods/README.md says to write one."""

    step: int

    def spans(self, b, h, q_idx):
        p = self.position(b, q_idx)
        return tuple((p - back * self.step, p - back * self.step) for back in range(3))


def raises(b, h, i, j):
    raise UsersOwn("mine")


def wrong_masks(B: int, Lk: int) -> dict[str, Callable[[], Any]]:
    ones, zeros = torch.ones, torch.zeros
    long = torch.long
    return {
        "window 0": lambda: mm.sliding_window(0),
        "window float": lambda: mm.sliding_window(1.5),
        "window None": lambda: mm.sliding_window(None),
        "offset float": lambda: mm.causal(0.5),
        "offset float tensor": lambda: mm.causal(torch.tensor(0.5)),
        "offset [B+1]": lambda: mm.causal(zeros(B + 1, dtype=long)),
        "offset 2d": lambda: mm.causal(zeros(B, 1, dtype=long)),
        "document more": lambda: mm.document(zeros(Lk + 1, dtype=long)),
        "document rows": lambda: mm.document(zeros(B + 1, Lk, dtype=long)),
        "document float": lambda: mm.document(zeros(Lk)),
        "document back": lambda: mm.document(torch.arange(max(Lk, 3)) % 2),
        "prefix -1": lambda: mm.prefix(-1),
        "prefix [B+1]": lambda: mm.prefix(ones(B + 1, dtype=long)),
        "padding beyond": lambda: mm.padding(torch.full((B,), Lk + 1)),
        "padding below": lambda: mm.padding(torch.full((B,), -1)),
        "padding no total": lambda: mm.padding(torch.full((B,), Lk), "left"),
        "padding total": lambda: mm.padding(torch.full((B,), Lk), "left", Lk + 1),
        "padding [B+1]": lambda: mm.padding(torch.full((B + 1,), Lk)),
        "padding float": lambda: mm.padding(ones(B)),
        "frames past": lambda: mm.frames(4, -1),
        "sink -1": lambda: mm.sink(-1),
        "both none": lambda: mm.both(),
        "either None": lambda: mm.either(None),
        "both uncalled": lambda: mm.both(mm.causal(), mm.causal),
        "from_head str": lambda: mm.from_head(mm.causal(), "a"),
        "own None": lambda: lambda b, h, i, j: None,
        "own bool": lambda: lambda b, h, i, j: True,
        "own float": lambda: lambda b, h, i, j: (i - j).float(),
        "own shape": lambda: lambda b, h, i, j: ones(7, 3, dtype=torch.bool),
        "own raises": lambda: raises,
        "own arguments": lambda: lambda i, j: i >= j,
        "own short": lambda: (lambda t: lambda b, h, i, j: t[j])(ones(Lk - 1, dtype=torch.bool)),
        "tensor": lambda: ones(2, 2, dtype=torch.bool),
        "uncalled": lambda: mm.sliding_window,
        "spans None": lambda: mm.SpanMask(lambda b, h, i: None),
        "spans flat": lambda: mm.SpanMask(lambda b, h, i: (0, 5)),
        "spans float": lambda: mm.SpanMask(lambda b, h, i: ((0.5, 5.5),)),
        "span returned": lambda: lambda b, h, i, j: (j, j + 3),
        "own numpy": lambda: lambda b, h, i, j: np.asarray(True),
        "own five": lambda: lambda b, h, i, j, x: i >= j,
        "a module": lambda: mm,
        "meta": lambda: mm.padding(torch.full((B,), 1, device="meta")),
        "spans raise": lambda: mm.SpanMask(lambda b, h, i: raises(b, h, i, i)),
    }


WRONG_SETTINGS: list[dict[str, Any]] = [
    {"stride": 0}, {"stride": 7}, {"stride": 8.0}, {"stride": None}, {"query_stride": 0}, {"key_stride": 24},
    {"key_stride": 256}, {"block_size": 0}, {"block_size": 32}, {"block_size": (128,)}, {"block_size": "128"},
    {"block_size": None}, {"pool": "values"}, {"query_pool": 64}, {"pool": "queries", "query_pool": 0}, {"order": 3},
    {"variance_weight": 0.5}, {"order": 2, "variance_weight": math.nan}, {"budget": "top_p"}, {"tau": 1.5},
    {"tau": -0.1}, {"tau": math.nan}, {"tau": "0.9"}, {"tau": []}, {"tau": [0.5, 2.0]}, {"tau": [0.5] * 99},
    {"tau": torch.ones(99)}, {"tau": torch.ones(2, 2)}, {"tau": 0.5, "budget": "threshold"}, {"threshold": 0.1},
    {"target_density": 0.5}, {"budget": "threshold", "threshold": 2.0}, {"budget": "density", "target_density": -0.1},
    {"budget": "density", "tau": 0.5}, {"mandatory": "none"}, {"budget": "threshold", "mandatory": "add"},
    {"sink_blocks": -1}, {"sink_blocks": 1.5}, {"local_blocks": None}, {"dense_last_rows": -1}, {"min_length": 1.5},
    {"preset": "better"}, {"preset": None}, {"preset": "best", "tau": 0.5}, {"preset": "rr", "threshold": 0.1},
    {"tau": True}, {"tau": np.float32(0.5)}, {"tau": torch.tensor(0.5)}, {"tau": 1j}, {"stride": True},
    {"tau": torch.tensor([math.nan] * 3)}, {"tau": torch.ones(3, dtype=torch.int64)}, {"order": 2.0}, {"budget": None},
    {"stride": 2**70}, {"sink_blocks": 2**70}, {"min_length": -1}, {"min_length": 2**40}, {"min_length": "auto"},
    {"budget": "threshold", "threshold": [0.1] * 99}, {"budget": "density", "target_density": [0.5]},
    {"tua": 0.5}, {"dropout": 0.1}, {"preset": "fast", "mandatory": "add"}, {"is_causal": True},
]  # fmt: skip
WRONG_OPTIONS: list[dict[str, Any]] = [
    {"softcap": 0}, {"softcap": -1.0}, {"softcap": math.nan}, {"softcap": "5"}, {"scale": math.nan}, {"scale": "0.1"},
    {"scale": math.inf}, {"scale": torch.ones(3)}, {"scale": 1e300}, {"q_offset": 0.5}, {"q_offset": "3"},
    {"q_offset": torch.tensor(0.5)}, {"q_offset": torch.zeros(9).long()}, {"q_offset": torch.zeros(2, 1).long()},
    {"q_offset": torch.tensor(2**40)}, {"head_offset": -1}, {"head_offset": 0.5}, {"head_offset": torch.tensor(-1)},
    {"head_offset": torch.tensor([1, 2])}, {"causal": "False"}, {"causal": 2}, {"state": 5}, {"state": PrefillState},
    {"config": {"tau": 0.5}}, {"config": RRConfig}, {"config": "best"}, {"causal": None}, {"causal": np.bool_(True)},
    {"scale": True}, {"scale": np.float32(0.1)}, {"scale": 0.0}, {"softcap": torch.tensor(5.0)}, {"q_offset": True},
    {"q_offset": np.int64(0)}, {"q_offset": torch.tensor(True)}, {"head_offset": 2**31}, {"mask_mod": 5},
    {"mask_mod": "causal"}, {"config": RRConfig(), "preset": "best"}, {"scale": 1e-300}, {"softcap": 1e-300},
]  # fmt: skip
WRONG_ATTENTION: list[dict[str, Any]] = [
    {"sinks": torch.zeros(99)}, {"sinks": torch.zeros(2, 1)}, {"sinks": [0.0]}, {"sinks": 0.5}, {"backend": "cuda"},
    {"sinks": torch.zeros(4, device="meta")}, {"backend": ["auto"]}, {"backend": None}, {"return_lse": 1},
    {"return_density": None}, {"return_density": "yes"},
]  # fmt: skip
# On an accelerator two of them are right, and values are not looked at.
WRONG_ON_CPU = [{"backend": "flash"}, {"return_lse": True}, {"sinks": torch.full((1,), math.nan)}]
# Masks whose values are wrong, which on an accelerator nobody waits for.
UNSEEN = ("document back", "padding beyond", "padding below", "own short")
WRONG_TENSORS: dict[str, Callable[[Any], Any]] = {
    "3 axes": lambda x: x[0],
    "double": lambda x: x.double(),
    "integers": lambda x: x.int(),
    "complex": lambda x: x.float() + 1j,
    "other dtype": lambda x: x.to(torch.float16 if x.dtype != torch.float16 else torch.float32),
    "heads": lambda x: x.repeat(1, 13, 1, 1),
    "batch": lambda x: x.repeat(4, 1, 1, 1),
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.float().numpy(),
    "None": lambda x: None,
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "5 axes": lambda x: x[None],
    "empty": lambda x: x[:, :, :0],
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "subclass": lambda x: x.as_subclass(type("Own", (Tensor,), {})),
    "nested": lambda x: torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(2, 4)], layout=torch.jagged),
    "conjugate": lambda x: x.to(torch.complex64).conj(),
    "negated": torch._neg_view,
}


def spoil(r: random.Random, case: Case) -> None:
    """One thing wrong."""
    kind = r.choice(["mask", "mask", "settings", "settings", "options", "attention", "tensor"])
    if kind == "mask":
        masks = wrong_masks(case.q.shape[0], case.k.shape[2])
        if WHERE.type != "cpu":
            masks = {name: build for name, build in masks.items() if name not in UNSEEN}
        name, build = r.choice(sorted(masks.items()))
        case.mask = Mask(f"wrong {name}", lambda Lk: build(), lambda *a: None)
        case.spoil(name)
    elif kind == "settings":
        case.settings = r.choice(WRONG_SETTINGS)
        case.spoil(f"{case.settings}")
    elif kind == "options":
        case.options |= r.choice(WRONG_OPTIONS)
        if "mask_mod" in case.options:
            case.mask = None
        case.spoil(f"{case.options}")
    elif kind == "attention":
        case.attention |= r.choice(WRONG_ATTENTION + (WRONG_ON_CPU if WHERE.type == "cpu" else []))
        case.spoil(f"{case.attention}")
    else:
        name, which = r.choice(sorted(WRONG_TENSORS)), r.choice("qkv")
        if name in ("heads", "batch") and which == "q":
            which = "k"
        setattr(case, which, WRONG_TENSORS[name](getattr(case, which)))
        case.spoil(f"{which}: {name}")


# --------------------------------------------------------------------------------------------------- forms and calls


def draw_settings(form: random.Random, r: random.Random, Hq: int) -> dict[str, Any]:
    """Settings that the documentation says are right."""
    s: dict[str, Any] = {}
    preset = form.choice([None, None, "rr", "best", "fast"])
    if preset:
        s["preset"] = preset
    if form.random() < 0.6:
        s["block_size"] = form.choice([64, (128, 64), (64, 128), (64, 64), (128, 128)])
    if preset in (None, "rr"):
        s |= form.choice([{}, {"stride": 16}, {"query_stride": 16}, {"key_stride": 32}, {"stride": 4}])
        s |= form.choice([{}, {}, {"order": 2}, {"order": 2, "variance_weight": 0.2}])
        if not s.keys() & {"stride", "query_stride", "key_stride", "order"}:
            s |= form.choice([{}, {"pool": "queries"}, {"pool": "both"}, {"pool": "queries", "query_pool": 32}])
    budget = form.choice(["top_tau", "top_tau", "threshold", "scaled_threshold", "density"])
    s["budget"] = budget
    levels = {"top_tau": ("tau", 1.0), "density": ("target_density", 1.0)}
    name, high = levels.get(budget, ("threshold", 0.3))
    shape = form.choice(["none", "one", "one", "one", "most", "list", "tensor", "tuple", "half", "numpy"])
    if shape == "most":
        s[name] = 0.0 if name == "threshold" else 1.0
    elif shape in ("list", "tensor", "tuple", "half") and budget != "density":
        levels = [r.uniform(0.01, 0.99 * high) for _ in range(Hq)]
        as_half = lambda x: torch.tensor(x, dtype=torch.float16)  # noqa: E731
        s[name] = {"list": list, "tensor": torch.tensor, "tuple": tuple, "half": as_half}[shape](levels)
    elif shape == "numpy":
        s[name] = np.float64(r.uniform(0.01, high))
    elif shape != "none":
        s[name] = r.uniform(0.01, high)
    if budget == "top_tau" and form.random() < 0.3:
        s["mandatory"] = form.choice(["count", "add"])
    for name in ("sink_blocks", "local_blocks", "dense_last_rows"):
        if form.random() < 0.4:
            s[name] = form.choice([0, 0, 1, 2, 5])
    if form.random() < 0.1:
        s["min_length"] = 100
    return s


def draw(form: random.Random, r: random.Random, seed: int, family: bool) -> Case:
    """A call of the form that `form` decides; those of a `family` can share graphs."""
    g = torch.Generator().manual_seed(seed)
    Hkv = form.randint(1, 3)
    Hq = Hkv * form.randint(2 if family else 1, 3)
    D = form.choice([16, 32, 64, 64, 17, 40, 40, 128 if family else 256])
    Dv = D if form.random() < 0.8 else form.choice([16, 32, 24])
    dtype = form.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    # A batch of another size, an axis of length 1, and lengths of a single block have graphs of their own.
    B = 1 if form.random() < 0.4 else (form if family else r).randint(2, 3)
    usual: tuple[int, ...] = (1, 2, 8, 63, 65, 128, 129, 300, 400)
    if family:
        usual = (2, 7, 8, 63, 64) if form.random() < 0.15 else (129, 191, 256, 257, 300, 384, 400)
        if WHERE.type != "cpu":  # whole tiles have graphs of their own, of which a card takes half a minute for each
            usual = (129, 191, 257, 300, 400)
    length = lambda: r.choice([*usual, *(r.randint(usual[0], usual[-1]) for _ in usual)])  # noqa: E731
    Lk = length() if family or r.random() > 0.03 else r.randint(400, 1100)
    Lq = Lk if r.random() < 0.5 else length()

    def tensor(H: int, L: int, width: int) -> Tensor:
        layout = form.choice(["plain", "plain", "transposed", "sliced", "plain" if family else "expanded"])
        if layout == "expanded":
            return torch.randn(1, 1, L, width, generator=g).to(dtype).expand(B, H, L, width)
        if layout == "transposed":
            return torch.randn(B, L, H, width, generator=g).to(dtype).transpose(1, 2)
        if layout == "sliced":
            return torch.randn(B, H, L + 3, width + 2, generator=g).to(dtype)[:, :, 3:, :width]
        return torch.randn(B, H, L, width, generator=g).to(dtype)

    options: dict[str, Any] = {}
    masked, causal = form.random() < 0.75, form.random() < 0.6
    if not causal or form.random() < 0.3:
        options["causal"] = causal
    where = form.choice(["none"] * 4 + ["int", "0-dim", "0-dim", "0-dim" if family else "outside"])
    top = max(Lk - Lq, 0)
    if where == "int":
        options["q_offset"] = r.randint(0, top)
    elif where == "0-dim":
        options["q_offset"] = torch.tensor(r.randint(0, top))
    elif where == "outside":
        options["q_offset"] = torch.tensor(r.choice([-r.randint(1, 150), Lk - r.randint(0, Lq)]))
    if form.random() < 0.2:
        options["head_offset"] = form.choice([1, 3, 8, torch.tensor(r.randint(0, 20))])
    if form.random() < 0.2:
        options["softcap"] = form.choice([0.5, 5.0, 30.0, 20])
    if form.random() < 0.25:
        options["scale"] = form.choice([0.02, 0.1, 0.3, 1])
    attention = {"sinks": torch.randn(Hq, generator=g)} if form.random() < 0.2 else {}
    if attention and not family:
        attention["sinks"][0] *= r.choice([1, math.inf]) if attention["sinks"][0] < 0 else 1
        attention["sinks"] = attention["sinks"].to(r.choice([torch.float32, dtype]))
    settings = draw_settings(form, r, Hq)
    states = form.getstate(), r.getstate()
    mask = draw_mask(form, r, B, Lk) if masked else None
    if mask is not None and WHERE.type != "cpu":
        again = random.Random(), random.Random()
        for one, state in zip(again, states, strict=True):
            one.setstate(state)
        with WHERE:
            mask.build = draw_mask(*again, B, Lk).build
    gain = form.choice([1.0, 2.0])
    case = Case(tensor(Hq, Lq, D) * gain, tensor(Hkv, Lk, D), tensor(Hkv, Lk, Dv), mask, options, settings, attention)
    case.usual = not family and r.random() < 0.15
    case.on_grid = not family and mask is None and where in ("none", "int") and r.random() < 0.7
    if mask is not None and mask.real is not None and not family and r.random() < 0.3:
        padding = ~real_keys(case)[:, None, :, None]
        bad = r.choice([math.nan, math.inf])
        case.k, case.v = case.k.masked_fill(padding, bad), case.v.masked_fill(padding, bad)
        case.q = case.q.masked_fill(~pairs_of(case)[0].any(3, keepdim=True), bad)  # queries that see nothing
    if mask is not None and mask.valid != "right":
        case.spoil("perhaps too narrow lengths", "either")
    if where == "outside":
        case.spoil(f"q_offset {where}", "either")
    return case


# ------------------------------------------------------------------------------------------- the method, in float64


def blocks_of(pairs: Tensor, block: tuple[int, int], whole: bool = False) -> Tensor:
    """Which blocks show any of their pairs, or all: [.., Lq, Lk] -> [.., nQ, nK]."""
    Lq, Lk = pairs.shape[2:]
    pad = (0, -Lk % block[1], 0, -Lq % block[0])
    tiles = torch.nn.functional.pad(pairs, pad, value=whole).unflatten(3, (-1, block[1])).unflatten(2, (-1, block[0]))
    return tiles.all(5).all(3) if whole else tiles.any(5).any(3)


def pairs_of(case: Case) -> tuple[Tensor, Tensor]:
    """Visible pairs [B, Hq, Lq, Lk], and the position of the first query, [B]."""
    (B, Hq, Lq, _), Lk = case.q.shape, case.k.shape[2]
    b, h = torch.arange(B).view(-1, 1, 1, 1), torch.arange(Hq).view(1, -1, 1, 1)
    i, j = torch.arange(Lq).view(1, 1, -1, 1), torch.arange(Lk).view(1, 1, 1, -1)
    base = case.options.get("q_offset", Lk - Lq)
    pairs = torch.ones(B, Hq, Lq, Lk, dtype=torch.bool)
    if case.mask is not None:
        pairs = pairs & torch.as_tensor(case.mask.show(b, h, i, j, base, Lk))
    if case.options.get("causal", True):
        pairs = pairs & (j <= at(base, i))
    return pairs, torch.as_tensor(base).long().expand(B)


def real_keys(case: Case) -> Tensor:
    B, Lk = case.k.shape[0], case.k.shape[2]
    if case.mask is None or case.mask.real is None:
        return torch.ones(B, Lk, dtype=torch.bool)
    return case.mask.real(torch.arange(B)[:, None], torch.arange(Lk)[None], Lk).expand(B, Lk)


def estimate(case: Case, config: RRConfig, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Steps 1 to 4: each block's mass, [B, Hq, nQ, nK], and how far the logits reach."""
    (B, Hq, Lq, D), (_, Hkv, Lk, _) = case.q.shape, case.k.shape
    (bq, bk), (sq, sk) = config.block_sizes, config.strides
    nQ, nK = -(-Lq // bq), -(-Lk // bk)
    q, k = case.q.double(), case.k.double().repeat_interleave(Hq // Hkv, 1)
    scale, cap = case.options.get("scale", D**-0.5), case.options.get("softcap")
    capped = lambda x: x if cap is None else cap * torch.tanh(x / cap)  # noqa: E731
    real = real_keys(case)
    reach = torch.tensor(1.0)

    def by_strides() -> tuple[Tensor, Tensor, Tensor, int]:
        h = torch.arange(Hq) + int(case.options.get("head_offset", 0))
        token = (torch.arange(-(-Lq // sq)) * sq + (h % sq)[:, None]).clamp(max=Lq - 1)  # Hq nq
        sampled = q.gather(2, token[None, :, :, None].expand(B, -1, -1, D))
        rows = pairs.gather(2, token[None, :, :, None].expand(B, -1, -1, Lk))
        width = (-Lk) % sk
        runs = torch.nn.functional.pad(k * real[:, None, :, None], (0, 0, 0, width)).unflatten(2, (-1, sk))
        count = torch.nn.functional.pad(real, (0, width)).unflatten(1, (-1, sk)).sum(2)[:, None, :, None].double()
        mean = runs.sum(3) / count.clamp(min=1)
        logits = sampled @ mean.mT * scale
        if config.order == 2:
            variance = (runs**2).sum(3) / count.clamp(min=1) - mean**2
            weight = 0.5 if config.variance_weight is None else config.variance_weight
            logits = logits + weight * scale**2 * (sampled**2 @ variance.mT)
        seen = torch.nn.functional.pad(rows & real[:, None, None], (0, width)).unflatten(3, (-1, sk)).any(4)
        return capped(logits) + count.mT.clamp(min=1e-9).log(), seen, bq // sq, bk // sk

    def by_queries() -> tuple[Tensor, Tensor, Tensor, int]:
        size = config.tokens_per_pooled_query
        width = (-Lq) % size
        sees = pairs.any(3)
        runs = torch.nn.functional.pad(q * sees[..., None], (0, 0, 0, width)).unflatten(2, (-1, size))
        count = torch.nn.functional.pad(sees, (0, width)).unflatten(2, (-1, size)).sum(3).clamp(min=1)[..., None]
        mean = runs.sum(3) / count
        logits = mean @ k.mT * scale
        if config.order == 2 and config.pool == "queries":
            weight = 0.5 if config.variance_weight is None else config.variance_weight
            logits = logits + weight * scale**2 * ((runs**2).sum(3) / count - mean**2) @ (k**2).mT
        first = torch.arange(0, Lq, size)
        seen = pairs[:, :, first] | pairs[:, :, (first + size - 1).clamp(max=Lq - 1)]
        logits = capped(logits)
        return logits, seen, bq // size, bk

    parts = []
    for form in {"keys": [by_strides], "queries": [by_queries], "both": [by_strides, by_queries]}[config.pool]:
        logits, seen, rows, columns = form()
        logits = logits.masked_fill(~seen, -math.inf)
        share = (logits - logits.amax(-1, keepdim=True).clamp(min=-1e9)).exp()
        share = share / share.sum(-1, keepdim=True).clamp(min=1e-300)
        share = torch.nn.functional.pad(share, (0, nK * columns - share.shape[3], 0, nQ * rows - share.shape[2]))
        parts.append(share.unflatten(3, (nK, columns)).unflatten(2, (nQ, rows)).sum((3, 5)))
        reach = torch.maximum(reach, logits.masked_fill(~seen, 0).abs().amax())
    shares = [part / part.sum(-1, keepdim=True).clamp(min=1e-300) for part in parts]
    mean = sum(shares)
    return mean / mean.sum(-1, keepdim=True).clamp(min=1e-300), reach


def mandatory(case: Case, config: RRConfig, visible: Tensor, base: Tensor) -> Tensor:
    """Sink, local and last-row blocks, as far as they are visible."""
    (B, _, Lq, _), (bq, bk), (nQ, nK) = case.q.shape, config.block_sizes, visible.shape[2:]
    columns, rows = torch.arange(nK), torch.arange(nQ)
    real = real_keys(case)
    first_key = torch.where(real.any(1), real.int().argmax(1), 0) // bk
    sink = (columns >= first_key[:, None]) & (columns < first_key[:, None] + config.sink_blocks)  # B nK
    begin = torch.div(base[:, None] + rows * bq, bk, rounding_mode="floor")
    end = torch.div(base[:, None] + (rows * bq + bq).clamp(max=Lq) - 1, bk, rounding_mode="floor")  # B nQ
    local = (columns <= end[..., None]) & (columns > begin[..., None] - config.local_blocks) & (config.local_blocks > 0)
    rows_end = torch.full((B, 1), nQ)
    if case.mask is not None and case.mask.real is not None:
        rows_end = (torch.where(visible.any(3), rows, -1).amax((1, 2)) + 1)[:, None]
    last = rows >= rows_end - config.dense_last_rows  # B nQ
    return (sink[:, None, None] | local[:, None] | last[:, None, :, None]) & visible


def attend(case: Case, pairs: Tensor) -> Tensor:
    q, k, v = (x.detach().double() for x in (case.q, case.k, case.v))
    groups = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(groups, 1).mT * case.options.get("scale", q.shape[3] ** -0.5)
    if (cap := case.options.get("softcap")) is not None:
        logits = cap * torch.tanh(logits / cap)
    logits = logits.masked_fill(~pairs, -math.inf)
    sinks = case.attention.get("sinks", torch.full((q.shape[1],), -math.inf)).double().view(1, -1, 1, 1)
    top = torch.maximum(logits.amax(-1, keepdim=True), sinks).clamp(min=-1e9)
    p = (logits - top).exp()
    return p @ v.repeat_interleave(groups, 1) / (p.sum(-1, keepdim=True) + (sinks - top).exp()).clamp(min=1e-300)


# ----------------------------------------------------------------------------------------------------------- judging


def check_selection(case: Case, selection: Any, pairs: Tensor, base: Tensor) -> None:
    """The estimate against the method's text; the choice against its rule, given the estimate."""
    config = RRConfig.resolve(None, dict(case.settings))
    kept, mass, block = selection.kept, selection.mass.double(), config.block_sizes
    visible, whole = blocks_of(pairs, block), blocks_of(pairs, block, whole=True)
    if tuple(selection.block_size) != block:
        raise Wrong(f"block_size {selection.block_size} instead of {block}")
    if not torch.equal(selection.visible.expand_as(kept), visible):
        raise Wrong("visible is not the mask's")
    if (selection.whole.expand_as(kept) & ~whole).any():
        raise Wrong("whole says too much")
    if (kept & ~visible).any():
        raise Wrong("a block is kept that the mask hides")
    per_head = kept.sum((2, 3)).double() / visible.sum((2, 3)).clamp(min=1)
    if abs(float(selection.density) - float(per_head.mean())) > 1e-5:
        raise Wrong(f"density {float(selection.density)} is not kept / visible {float(per_head.mean())}")
    if selection.dense or (config.min_length or 0) > pairs.shape[3]:
        if not torch.equal(kept, visible):
            raise Wrong("dense, and blocks are dropped")
        return
    if not torch.isfinite(mass).all() or (mass < -1e-6).any() or (mass[~visible] > 1e-6).any():
        raise Wrong("mass is not finite, negative, or on hidden blocks")
    total = mass.sum(-1, keepdim=True)
    share = mass / total.clamp(min=1e-30)
    # What a soft cap does to a variance the documentation leaves open.
    if not (config.order == 2 and "softcap" in case.options):
        theirs, reach = estimate(case, config, pairs)
        gap = float(((share - theirs) * (total > 0)).abs().max())
        if gap > MASS_ERROR[case.q.dtype] * max(1.0, float(reach)):
            raise Wrong(f"the estimate is {gap:.3g} off (logits reach {float(reach):.3g}, {case.q.dtype})")
    must = mandatory(case, config, visible, base)
    if (must & ~kept).any():
        raise Wrong(f"a mandatory block is dropped: {(must & ~kept).nonzero()[0].tolist()}")
    if (visible & ~kept & ~(total > 0)).any():
        raise Wrong("a row without an estimate drops blocks")
    check_budget(case, config, {"kept": kept, "visible": visible, "must": must, "mass": mass, "share": share})


def check_budget(case: Case, config: RRConfig, found: dict[str, Tensor]) -> None:
    kept, visible, must, mass, share = (found[name] for name in ("kept", "visible", "must", "mass", "share"))
    total, eps = mass.sum(-1, keepdim=True), 1e-5
    free, rest = kept & ~must & (total > 0), visible & ~kept
    if config.budget == "density":
        goal = 0.4 if config.target_density is None else config.target_density
        if case.mask is not None and case.mask.own:
            return  # heads may see differently, and a mean of heads is no count of blocks
        for b in range(kept.shape[0]):
            # No threshold keeps what has no mass at all.
            most = float((visible[b] & (must[b] | (share[b] > 1e-16) | (total[b] <= 0))).sum())
            want, got = goal * float(visible[b].sum()), float(kept[b].sum())
            want = want if goal >= 1 else min(want, most)
            if got < want - 1.001 or (got > want + 1.001 and free[b].any()):
                raise Wrong(f"density: {got:.0f} of {int(visible[b].sum())} blocks instead of {want:.2f}")
        return
    level = torch.as_tensor(config.level, dtype=torch.float64).reshape(1, -1, 1, 1)
    if config.level_field == "threshold":
        if config.budget == "scaled_threshold":
            n = visible.sum(-1, keepdim=True)
            level = level * torch.where(n > LONG_ROW, LONG_ROW / n.clamp(min=1), 1)
        if (rest & (share > level + eps)).any() or (free & (share < level - eps)).any():
            raise Wrong("a block is on the wrong side of the threshold")
        return
    if (rest & (level >= 1)).any():
        raise Wrong("tau = 1 is not dense")
    least = torch.where(free, share, math.inf).amin(-1, keepdim=True)
    if (least < torch.where(rest, share, -math.inf).amax(-1, keepdim=True) - eps).any():
        raise Wrong("a smaller block is kept, a larger dropped")
    have = (share * kept).sum(-1, keepdim=True)
    needed = have - least
    if (((have < level - 1e-4) & (total > 0)) & rest.any(-1, keepdim=True)).any():
        raise Wrong("a row holds less than tau")
    if config.mandatory == "add":  # mandatory blocks join after the choice: those larger than the last were in it
        needed = (share * (kept & (share > least + eps))).sum(-1, keepdim=True)
    if ((needed > level + 1e-4) & (level < 1)).any():
        raise Wrong("a row keeps more than tau needs")


def check_output(case: Case, out: Tensor, kept: Tensor, pairs: Tensor, tolerance: float, before: int = 0) -> None:
    config = RRConfig.resolve(None, dict(case.settings))
    (bq, bk), (Lq, Lk) = config.block_sizes, pairs.shape[2:]
    each = lambda x: x.repeat_interleave(bq, 2)[:, :, :Lq].repeat_interleave(bk, 3)[..., :Lk]  # noqa: E731
    expect = attend(case, pairs & each(kept))[:, :, before:]
    if out.shape != expect.shape or out.requires_grad:
        raise Wrong(f"output of shape {tuple(out.shape)}, requires_grad {out.requires_grad}")
    # A weight is off by twice what its logit is, which a sum of rounded products decides.
    norms = [float(x.double().norm(dim=-1).max()) for x in (case.q, case.k)]
    logits = 2 * 2**-24 * math.prod(norms) * case.options.get("scale", case.q.shape[3] ** -0.5)
    allowed = (tolerance + logits) * (float(case.v.double().abs().max()) + 1e-3)
    error = (out.double() - expect).abs().amax(-1)
    if not (error <= allowed).all():
        dense = (out.double() - attend(case, pairs)[:, :, before:]).abs().max()
        raise Wrong(
            f"output differs by {float(error.max()):.3g}, allowed {allowed:.2g} (from dense by {float(dense):.3g}), "
            f"in {int((error > allowed).sum())} of {error.numel()} rows"
        )


def as_selected(case: Case) -> dict[str, Any]:
    """The arguments of a call. A right one's are such that rr_attention attends to what select_blocks keeps: it is not
    dense for its speed, and its block rows begin with the first query, as where only the device knows its position."""
    options = {**case.options, **case.settings}
    if case.mask is not None:
        with WHERE:
            options["mask_mod"] = case.mask.build(case.Lk)
    if case.valid != "wrong":
        if not case.usual:
            options.setdefault("min_length", 0)
        place = options.get("q_offset", case.k.shape[2] - case.q.shape[2])
        if case.mask is None and not isinstance(place, Tensor) and not case.on_grid:
            options["q_offset"] = torch.tensor(place, device="cpu")  # where a context has another default
    return options


def from_the_grid(case: Case) -> tuple[Case, int]:
    """The call that a call means whose first query is no multiple of the block: with queries before it that fill the
    block row, and how many these are. Its own queries stand in for them."""
    row = RRConfig.resolve(None, dict(case.settings)).block_sizes[0]
    place = case.options.get("q_offset", case.Lk - case.q.shape[2])
    before = place % row if case.on_grid else 0
    if not before:
        return case, 0
    own = case.q[:, :, : row - before]
    filling = torch.cat([own] * (before // own.shape[2] + 1), 2)[:, :, :before]
    options = {**case.options, "q_offset": place - before}
    return replace(case, q=torch.cat([filling, case.q], 2), options=options, on_grid=False), before


def in_half(case: Case) -> Case:
    """What torch.autocast makes of a call."""
    half = {name: getattr(case, name).to(torch.bfloat16) for name in "qkv" if isinstance(getattr(case, name), Tensor)}
    return replace(case, **half)


def without_padding(case: Case) -> Case:
    """What stands in padding counts for nothing, NaN too."""
    return replace(case, **{name: getattr(case, name).nan_to_num(0, 0, 0) for name in "qkv"})


def clear(error: Exception, case: Case) -> str:
    """What an error says of the call, or Wrong."""
    if isinstance(error, UsersOwn | IndexError) and case.why.strip().endswith(("raises", "spans raise", "own short")):
        return "the user's own error"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {error}"[:700]
    ours = ROOT in Path(frame.filename).resolve().parents and "tests" not in Path(frame.filename).parts
    if not ours or not isinstance(error, ValueError | TypeError | NotImplementedError | RuntimeError):
        raise Wrong(f"an error that is not ours ({frame.filename[-50:]}:{frame.lineno}): {text}") from None
    if case.valid == "right":
        raise Wrong(f"a right call is refused: {text}") from None
    return "refused" if case.valid == "wrong" else "refused, perhaps rightly"


CONTEXTS = ["inference", "no_grad", "autocast", "device", "double", "eager", "caller eager", "flex", "caller"]
# Without compilation; the last ones are traced anew in each call.
UNCOMPILED = [*CONTEXTS[:6], "slices", "strips", "flex"] * 2
TRACED = ["caller eager", "any length", "aot", "export", "strict export"]


class Hunt:
    def __init__(self, seed: int, calls_each: int) -> None:
        self.seed, self.calls_each = seed, calls_each
        self.counts: collections.Counter[str] = collections.Counter()
        self.errors: collections.Counter[str] = collections.Counter()
        self.wrong: list[tuple[int, str, str]] = []
        self.slowest = (0.0, -1)
        self.callers: dict[Any, Callable] = {}
        self.flex_lengths: dict[int, int] = {}

    def one(self, n: int) -> None:
        family = n // self.calls_each
        r = random.Random(f"{self.seed}/call/{n}")
        form = lambda: random.Random(f"{self.seed}/form/{family}")  # noqa: E731
        own = random.Random(f"{self.seed}/use/{family}")
        chunks = own.random() < 0.2
        case = draw(form(), r, r.randrange(2**31), self.calls_each > 1)
        # Most contexts have graphs of their own: two a family, on a card one.
        uses = own.sample(CONTEXTS, 2 if WHERE.type == "cpu" else 1) if self.calls_each > 1 else UNCOMPILED
        context = r.choice(["plain"] * 8 + ["grad", "threads", "beside"] + uses)
        if self.calls_each == 1 and r.random() < 0.002:
            context = r.choice(TRACED)
        if WHERE.type != "cpu":
            context = "plain" if context == "grad" else context  # right there, and test_gpu.py's
            kernel = own.choice(["triton", "triton", "auto"]) if self.calls_each > 1 else "triton"
            case.attention["backend"] = kernel
        pack = self.calls_each == 1 and r.random() < 0.06
        # Operations that run one by one can't be captured on a card.
        cache = case.valid == "right" and r.random() < 0.03 and (WHERE.type == "cpu" or self.calls_each > 1)
        begin = time.monotonic()
        faulthandler.dump_traceback_later(HANGS, exit=True)
        try:
            if chunks and case.valid == "right" and RRConfig.resolve(None, dict(case.settings)).pool != "queries":
                result = self.in_chunks(r, case)
            elif cache and RRConfig.resolve(None, dict(case.settings)).pool != "queries":
                result, context = self.in_cache(r, case), "in a cache"
            elif pack and case.valid == "right":
                result, context = self.in_pack(r, case), "packed"
            elif r.random() < 0.08:
                spoil(r, case)
                result = self.judge(case, lambda: self.run(case, "plain"), OUTPUT_ERROR)
            elif context == "threads":
                other = draw(form(), r, r.randrange(2**31), self.calls_each > 1)
                result = self.at_once([case, other], beside=False)
            elif context == "beside":
                result = self.at_once([case], beside=True)
            else:
                if context == "grad":
                    case.spoil("v requires grad")
                errors = OUTPUT_ERROR
                if context == "autocast":
                    errors = dict.fromkeys(OUTPUT_ERROR, 0.12)  # logits in bfloat16
                if context == "slices" and case.settings["budget"] == "density":
                    context = "plain"  # each slice has the density for itself
                if context in ("flex", "slices"):
                    case.on_grid = False
                judged = in_half(case) if context == "autocast" else case
                result = self.judge(judged, lambda: self.run(case, context, family), errors, context)
            self.counts[f"{result}, {'in chunks' if chunks else context}" if result == "right" else result] += 1
        except Wrong as wrong:
            self.counts["WRONG"] += 1
            self.wrong.append((n, str(wrong), f"{context}{', in chunks' * chunks}, {self.describe(case)}"))
        faulthandler.cancel_dump_traceback_later()
        self.slowest = max(self.slowest, (time.monotonic() - begin, n))

    def describe(self, case: Case) -> str:
        shape = lambda x: f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__  # noqa: E731
        shapes = " ".join(map(shape, (case.q, case.k, case.v)))
        rest = f"{case.options} {case.attention} {case.settings}"
        return f"{shapes} {case.mask and case.mask.text} {rest} {case.why}".replace("\n", " ")

    def judge(self, case: Case, call: Callable, errors: dict, context: str = "") -> str:
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        try:
            selection, out, density = call()
        except Wrong:
            raise
        except Exception as error:
            kind = clear(error, case)
            self.errors[re.sub(r"-?\d+(\.\d+)?", "#", f"{type(error).__name__}: {error}")[:200]] += 1
            if context not in TRACED and torch._dynamo.utils.counters["stats"]["unique_graphs"] != graphs:
                raise Wrong("the error comes after a compilation") from None
            return kind
        if case.valid == "wrong":
            raise Wrong("a wrong call is not refused")
        self.compare(case, selection, out, density, errors[case.q.dtype])
        return "right"

    def compare(self, case: Case, selection: Any, out: Tensor, density: Any, error: float) -> None:
        case, before = from_the_grid(without_padding(case))
        pairs, base = pairs_of(case)
        on_cpu = {name: getattr(selection, name).cpu() for name in ("kept", "mass", "visible", "whole")}
        selection, out = replace(selection, **on_cpu), out.cpu()
        check_selection(case, selection, pairs, base)
        kept, expected = selection.kept, float(selection.density)
        visible = blocks_of(pairs, selection.block_size)
        dense = float(visible.any(3).any(2).double().mean())  # a head that sees nothing has density 0
        if case.usual and density is not None and abs(float(density) - dense) < 1e-6:
            kept, expected = visible, dense
        check_output(case, out, kept, pairs, error, before)
        if density is not None and abs(float(density) - expected) > 1e-5:
            raise Wrong(f"return_density {float(density)}, the selection's {expected}")

    def run(self, case: Case, context: str, family: int = 0) -> tuple[Any, Tensor, Any]:
        def attention(q, k, v, **more):
            out, density = rr_attention(q, k, v, **{"return_density": True, **more})
            return out, density

        options = as_selected(case)
        q, k, v = map(there, (case.q, case.k, case.v))
        both = {**options, **there(case.attention)}

        whole = case if case.valid == "wrong" else from_the_grid(case)[0]
        chosen = options if whole is case else as_selected(whole)

        def select() -> Any:
            return select_blocks(q if whole is case else there(whole.q), k, **chosen)

        if context == "grad":
            v = v.detach().requires_grad_()
        if context == "flex" and self.calls_each == 1:
            if "softcap" in options or "sinks" in case.attention:
                return self.run(case, "plain")
            block_mask = create_rr_block_mask(q, k, **options)
            settings = {"enable_gqa": True, "scale": case.options.get("scale")}
            clean = without_padding(case)  # what padding holds is the caller's matter here
            clean = map(there, (clean.q, clean.k, clean.v))
            return select(), flex_attention(*clean, block_mask=block_mask, **settings), None
        if context in TRACED and self.calls_each == 1:
            both = {name: float(x) if isinstance(x, np.floating) else x for name, x in both.items()}
            with torch.compiler.set_stance("default"):
                out, density = traced_anew(context, attention, (q, k, v), both)
            return select(), out / 2, density
        if context == "flex":
            # Each pair of lengths is a graph of its own: cut to one pair a family.
            if "softcap" in options or "sinks" in case.attention or case.k.shape[2] < 2:
                return self.run(case, "plain")
            flex = self.callers.setdefault("flex", torch.compile(flex_attention, fullgraph=True, dynamic=False))
            case.v = torch.nn.functional.pad(case.v, (0, q.shape[3]))[..., : q.shape[3]]
            v = there(case.v)
            shape = (family, q.shape[0], q.shape[2], k.shape[2])
            if self.flex_lengths.setdefault(family, shape) != shape:
                return self.run(case, "plain")
            block_mask = create_rr_block_mask(q, k, **options)
            scale = case.options.get("scale")
            out = flex(q, k, v, block_mask=block_mask, enable_gqa=True, scale=scale)
            return select(), out, None
        if context.startswith("caller"):
            key = (context, family)
            if key not in self.callers:
                backend = "eager" if context == "caller eager" else "inductor"
                self.callers[key] = torch.compile(
                    lambda q, k, v, more: [x * 2 for x in attention(q * 1.0, k, v, **more)], backend=backend
                )
            out, density = self.callers[key](q, k, v, both)
            return select(), out / 2, density / 2
        with contextlib.ExitStack() as stack:
            if context == "inference":
                stack.enter_context(torch.inference_mode())
            elif context == "no_grad":
                stack.enter_context(torch.no_grad())
                q, v = q.detach().requires_grad_(), v.detach().requires_grad_()
            elif context == "autocast":
                stack.enter_context(torch.autocast(WHERE.type, torch.bfloat16))
            elif context == "device":
                stack.enter_context(torch.device("meta"))
            elif context == "eager":
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            elif context == "double":
                torch.set_default_dtype(torch.float64)
                stack.callback(torch.set_default_dtype, torch.float32)
            elif context in ("slices", "strips"):
                where, name = {"slices": (head_slices, "SLICE_BYTES"), "strips": (mass_module, "STRIP_ELEMENTS")}[
                    context
                ]
                stack.callback(setattr, where, name, getattr(where, name))
                setattr(where, name, 1 if context == "slices" else 1 << 10)
            counted = calls_counted()
            out, density = attention(q, k, v, **both)
            if threading.active_count() == 1:
                counted = calls_counted() - counted
                if counted != 1:
                    raise Wrong(f"counted as {counted} calls")
            return select(), out, density

    def at_once(self, cases: list[Case], beside: bool) -> str:
        """Two calls of two lengths in two threads; or one call while another thread compiles something else."""
        results: list[Any] = [None] * len(cases)
        stance = "default" if self.calls_each > 1 else "force_eager"

        def work(place: int) -> None:
            try:
                with torch.compiler.set_stance(stance):
                    results[place] = self.run(cases[place], "plain")
            except Exception as error:
                results[place] = error

        threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(len(cases))]
        if beside:
            number = random.random()
            other = torch.compile(lambda x: (x * number).sin() + 1, backend="eager", dynamic=False)
            compiles = lambda: [other(torch.ones(2, 1 + n, device=WHERE)) for n in range(3)]  # noqa: E731
            threads.append(threading.Thread(target=compiles, daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANGS - 10)
            if thread.is_alive():
                raise Wrong("a thread hangs")

        def hand(place: int) -> Any:
            if isinstance(results[place], Exception):
                raise results[place]
            return results[place]

        kinds = [self.judge(case, partial(hand, place), OUTPUT_ERROR) for place, case in enumerate(cases)]
        return "right" if set(kinds) == {"right"} else next(kind for kind in kinds if kind != "right")

    def in_chunks(self, r: random.Random, case: Case) -> str:
        """A prompt cut anywhere, with a state that is copied, trimmed and reordered in between; each chunk is judged as
        a call of its own."""
        Lk = case.k.shape[2]
        cuts = sorted({*r.sample(range(2, max(Lk - 1, 4)), 2), Lk}) if Lk > 4 else [Lk]
        state, begin = PrefillState(), 0
        q = torch.cat([case.q.nan_to_num(0, 0, 0)] * (-(-Lk // case.q.shape[2])), 2)
        k, v = case.k.clone(), case.v
        while cuts:
            end = cuts.pop(0)
            tensors = q[:, :, begin:end], k[:, :, :end], v[:, :, :end]
            part = Case(*tensors, case.mask, dict(case.options), case.settings, case.attention, usual=case.usual)
            part.options["q_offset"] = r.choice([int, torch.tensor])(begin)
            part.on_grid = case.mask is None and type(part.options["q_offset"]) is int and case.on_grid
            inference = torch.inference_mode(r.random() < 0.3)

            def call(part: Case = part, state: PrefillState = state, inference: Any = inference) -> tuple:
                options = as_selected(part)
                before = state.copy()
                both = {**options, **there(part.attention), "state": state, "return_density": True}
                with inference:
                    out, density = rr_attention(there(part.q), there(part.k), there(part.v), **both)
                whole, filled = from_the_grid(part)
                if filled:  # its queries begin before the state ends
                    return select_blocks(there(whole.q), there(whole.k), **as_selected(whole)), out, density
                return select_blocks(there(part.q), there(part.k), state=before, **options), out, density

            if (kind := self.judge(part, call, OUTPUT_ERROR)) != "right":
                return kind
            begin = end
            event = r.choice(["none", "none", "copy", "trim", "reorder"])
            if event == "copy":
                state = state.copy()
            elif event == "trim" and len(cuts) == 1:
                begin = r.randint(0, end)
                state.trim(begin)
                if k.isfinite().all():
                    k = torch.cat([k[:, :, :begin], k[:, :, begin:].flip(2)], 2)
                cuts = sorted({r.randint(begin + 1, Lk), Lk}) if begin + 1 < Lk else cuts
            elif event == "reorder" and case.mask is None:
                rows = torch.tensor([r.randrange(q.shape[0]) for _ in range(r.randint(1, 3))])
                state.reorder(rows)
                q, k, v = (x[rows] for x in (q, k, v))
        return "right"

    def in_cache(self, r: random.Random, case: Case) -> str:
        """Prompts in a cache that stays, each chunk judged as a call of its own; some go on from a common prefix."""
        B, Hkv = case.k.shape[:2]
        queries, capacity = r.choice([128, 256]), r.randint(260, 700)
        settings = {"min_length": 0} | case.settings
        options = {name: x for name, x in case.options.items() if name in ("scale", "softcap")}
        options["head_offset"] = int(case.options.get("head_offset", 0))
        backend = case.attention.get("backend", "auto")
        kind = CapturedPrefill if WHERE.type == "cuda" else RunAnew
        prefill = kind(queries, backend=backend, **options, **settings)
        g = torch.Generator().manual_seed(r.randrange(2**31))
        cache = [torch.randn(B, Hkv, capacity, x.shape[3], generator=g).to(x.dtype) for x in (case.k, case.v)]
        own = [there(x) for x in cache]
        begin = 0
        for _ in range(r.randint(2, 7)):
            Lq = min(queries if r.random() < 0.8 else r.randint(1, 300), capacity - begin)
            end = begin + Lq
            for x, mine in zip(cache, own, strict=True):
                x[:, :, begin:end] = torch.randn(*x[:, :, begin:end].shape, generator=g).to(x.dtype)
                mine.copy_(x)
            q = torch.randn(B, case.q.shape[1], Lq, case.q.shape[3], generator=g).to(case.q.dtype)
            part = Case(q, *(x[:, :, :end] for x in cache), None, options, settings, on_grid=True)
            inference = torch.inference_mode(r.random() < 0.3)

            def call(part: Case = part, begin: int = begin, inference: Any = inference) -> tuple:
                with inference:
                    out = prefill(there(part.q), *own, begin)
                whole, _ = from_the_grid(part)
                return select_blocks(there(whole.q), there(whole.k), **as_selected(whole)), out, None

            if (kind := self.judge(part, call, OUTPUT_ERROR)) != "right":
                return kind
            begin = end if end < capacity and r.random() < 0.8 else r.choice([0, begin // 2])
            if r.random() < 0.1:
                prefill.forget()
        return "right"

    def in_pack(self, r: random.Random, case: Case) -> str:
        """Prompts packed end to end, each judged as a call of its own."""
        if case.mask is not None or "q_offset" in case.options:
            return self.judge(case, lambda: self.run(case, "plain"), OUTPUT_ERROR)
        q, k, v = (x[:1] for x in (case.q, case.k, case.v))
        sizes, parts = [], []
        for _ in range(r.randint(1, 4)):
            keys = r.randint(1, k.shape[2])
            queries = r.choice([keys, r.randint(1, keys)])
            queries = min(queries, q.shape[2])
            keys = max(keys, queries)
            sizes.append((queries, keys))
            parts.append((q[:, :, -queries:], k[:, :, :keys], v[:, :, -keys:]))
        pack = [torch.cat(x, 2) for x in zip(*parts, strict=True)]
        queries, keys = zip(*sizes, strict=True)
        options = {**case.options, **case.settings, **there(case.attention)}
        if not case.usual:
            options.setdefault("min_length", 0)
        pack = map(there, pack)
        outs = rr_attention_packed(*pack, list(queries), key_lengths=list(keys), **options).split(queries, 2)
        for part, out in zip(parts, outs, strict=True):
            own = Case(*part, None, case.options, case.settings, case.attention, usual=case.usual, on_grid=True)
            whole, _ = from_the_grid(own)
            selection = select_blocks(there(whole.q), there(whole.k), **as_selected(whole))
            try:
                self.compare(own, selection, out, None, OUTPUT_ERROR[own.q.dtype])
            except Wrong:
                if not case.usual:
                    raise
                dense = pairs_of(own)[0]  # as the costs may say
                every = blocks_of(dense, selection.block_size)
                check_output(own, out.cpu(), every, dense, OUTPUT_ERROR[own.q.dtype])
        return "right"


def calls_counted() -> int:
    return sum(attention_module.calls[way] for way in ("dense", "cpu", "triton", "flash"))


def traced_anew(
    how: str, attention: Callable, qkv: tuple[Tensor, ...], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(twice the output, density) by a graph of the caller's, for this call alone."""
    torch._dynamo.reset()

    def call(q, k, v):
        out, density = attention(q * 1.0, k, v, **options)
        return out * 2, density

    if how.endswith("export"):
        module = torch.nn.Module()
        module.forward = call
        return torch.export.export(module, qkv, strict=how == "strict export").module()(*qkv)
    backend = "aot_eager" if how == "aot" else "eager"
    return torch.compile(call, backend=backend, dynamic=True if how == "any length" else None)(*qkv)


def hunt(calls: range, seed: int, calls_each: int = 1, until: float = math.inf, tell: Callable = str) -> Hunt:
    """Makes the calls, for `until` seconds at most, and tells what it finds; an error of the device is the last."""
    hunter = Hunt(seed, calls_each)
    began, told = time.monotonic(), 0.0
    sorts: collections.Counter[str] = collections.Counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(patch.object(selection_module, "LONG_ROW", LONG_ROW))
        if calls_each == 1:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for n in calls:
            if time.monotonic() - began > until:
                break
            known = len(hunter.wrong)
            hunter.one(n)
            for number, what, which in hunter.wrong[known:]:
                sort = re.sub(r"[\d.e+-]+", "#", what)[:80]
                sorts[sort] += 1
                if sorts[sort] <= 5:
                    tell(f"\n#{number}: {what}\n    {which}")
            if hunter.wrong[known:] and "CUDA error" in hunter.wrong[-1][1]:
                break
            if time.monotonic() - told > 20:
                told = time.monotonic()
                graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                right = sum(count for name, count in hunter.counts.items() if name.startswith("right"))
                tell(f"call {n}, {told - began:.0f} s, {graphs} graphs, {right} right, {len(hunter.wrong)} wrong")
    return hunter


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--calls-each", type=int, default=1, help="calls of a family; 1: uncompiled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one call by its number")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--device", type=torch.device, default=WHERE, help="where the calls run")
    args = parser.parse_args()
    globals()["WHERE"] = args.device
    calls = range(args.calls) if args.only is None else range(args.only, args.only + 1)
    hunter = hunt(calls, args.seed, args.calls_each, args.seconds, lambda text: print(text, flush=True))
    print(f"\n{sum(hunter.counts.values())} calls, {torch._dynamo.utils.counters['stats']['unique_graphs']} graphs")
    for name, count in [*hunter.counts.most_common(), *hunter.errors.most_common()]:
        print(f"{count:7} {name}")
    print(f"slowest: call {hunter.slowest[1]}, {hunter.slowest[0]:.1f} s")
    print(f"{len(hunter.wrong)} wrong: {[n for n, *_ in hunter.wrong]}")
    return 1 if hunter.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
