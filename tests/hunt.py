"""Hunts for wrong answers: random calls of rr_attention and select_blocks, right and wrong ones.

    python tests/hunt.py --calls 20000 --seed 0
    python tests/hunt.py --seed 0 --only 1234

Each call must raise a clear error of ours before anything is computed, or be right. Right is: equal to attention in
float64 over the pairs that the mask shows and the selection keeps, as the documentation (not the code) describes them.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import math
import random
import re
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import mask_mods as mm
from rr_flex import PrefillState, RRConfig, create_rr_block_mask, rr_attention, select_blocks

OURS = (ValueError, TypeError, NotImplementedError, RuntimeError)
ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Wrong(Exception):
    """A call that was wrong, silent, or failed unclearly."""


class UsersOwn(Exception):
    """What a caller's own mask raises."""


@dataclass
class Mask:
    text: str
    build: Callable[[Any], Any]  # permutation of the batch or None -> mask_mod
    show: Callable  # b h i j base -> bool
    valid: str = "right"  # right, wrong, either
    hides: bool = False
    placed: bool = True  # all parts are mask_mods' own
    per_head: bool = False


@dataclass
class Case:
    q: Any
    k: Any
    v: Any
    mask: Mask | None = None
    valid: str = "right"
    why: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)  # of both calls
    only_attention: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    config: Callable[[], Any] | None = None

    def spoil(self, why: str, valid: str = "wrong") -> None:
        self.why.append(why)
        if self.valid != "wrong":
            self.valid = valid


def take(x: Any, perm: Any) -> Any:
    return x[perm] if perm is not None and isinstance(x, torch.Tensor) and x.ndim > 0 else x


def column(x: Any) -> Any:
    """An int, 0-dim or [B] tensor, broadcast over [B, H, i, j]."""
    return x.reshape(-1, 1, 1, 1).long() if isinstance(x, torch.Tensor) and x.ndim else (int(x) if x is not None else x)


def draw_offset(r: random.Random, B: int, Lk: int) -> tuple[Any, str]:
    kind = r.choice(["none"] * 5 + ["int", "scalar", "batch"])
    low, high = (-20, Lk) if r.random() < 0.3 else (0, Lk)
    if kind == "none":
        return None, "right"
    if kind == "int":
        return r.randint(low, high), "right"
    dtype = r.choice([torch.int64, torch.int32])
    if kind == "scalar":
        return torch.tensor(r.randint(low, high), dtype=dtype), "right"
    return torch.tensor([r.randint(low, high) for _ in range(B)], dtype=dtype), "right"


def position(offset: Any, i: Any, base: Any) -> Any:
    return i + (base if offset is None else column(offset))


def draw_document(r: random.Random, B: int, Lk: int) -> torch.Tensor:
    rows = []
    for _ in range(B):
        ids, current = [], r.randint(0, 3)
        while len(ids) < Lk:
            ids += [current] * r.randint(1, max(1, Lk // 2))
            current += r.randint(1, 3)
        rows.append(ids[:Lk])
    ids = torch.tensor(rows, dtype=r.choice([torch.int64, torch.int32]))
    return ids[0] if r.random() < 0.5 else ids


def draw_mask(r: random.Random, B: int, Hq: int, Lq: int, Lk: int, depth: int = 0) -> Mask:
    kinds = [
        "causal",
        "window",
        "symmetric",
        "document",
        "prefix",
        "padding",
        "frames",
        "sink",
        "bidirectional",
        "own",
        "own_head",
        "own_batch",
        "span",
    ]
    if depth < 2:
        kinds += ["both", "either", "from_head"] * 2
    kind = r.choice(kinds)
    o, valid = draw_offset(r, B, Lk)
    w = r.choice([1, 2, 7, 40, 128, 200, 1000])
    if kind == "causal":
        return Mask(
            f"causal({o})", lambda p: mm.causal(take(o, p)), lambda b, h, i, j, s: j <= position(o, i, s), valid
        )
    if kind == "window":

        def show(b, h, i, j, s):
            p = position(o, i, s)
            return (p - w < j) & (j <= p)

        return Mask(f"sliding_window({w},{o})", lambda p: mm.sliding_window(w, take(o, p)), show, valid)
    if kind == "symmetric":
        return Mask(
            f"sliding_window({w},{o},symmetric)",
            lambda p: mm.sliding_window(w, take(o, p), symmetric=True),
            lambda b, h, i, j, s: (position(o, i, s) - j).abs() < w,
            valid,
        )
    if kind == "document":
        ids = draw_document(r, B, Lk)
        table = ids.expand(B, Lk).long()

        def show(b, h, i, j, s):
            p = position(o, i, s)
            p = p + 0 * b
            at = table[b, p.clamp(0, Lk - 1)]
            return (p >= 0) & (p < Lk) & (at == table[b, j])

        take_ids = lambda p: ids if ids.ndim == 1 else take(ids, p)  # noqa: E731
        return Mask(f"document({list(ids.shape)},{o})", lambda p: mm.document(take_ids(p), take(o, p)), show, valid)
    if kind == "prefix":
        length = r.choice(["int", "scalar", "batch"])
        n = (
            r.randint(0, Lk)
            if length == "int"
            else torch.tensor(r.randint(0, Lk))
            if length == "scalar"
            else torch.tensor([r.randint(0, Lk) for _ in range(B)])
        )
        return Mask(
            f"prefix({n},{o})",
            lambda p: mm.prefix(take(n, p), take(o, p)),
            lambda b, h, i, j, s: (j < column(n)) | (j <= position(o, i, s)),
            valid,
        )
    if kind == "padding":
        lengths = torch.tensor([r.randint(0 if r.random() < 0.2 else 1, Lk) for _ in range(B)])
        if r.random() < 0.2:
            narrow = r.choice([torch.int32, torch.int16, torch.uint8, torch.int8])
            lengths = lengths.clamp(max=torch.iinfo(narrow).max).to(narrow)
        if r.random() < 0.5:
            real = lambda b, t: (t >= 0) & (t < lengths.long()[b])  # noqa: E731
            build = lambda p: mm.padding(take(lengths, p), offset=take(o, p))  # noqa: E731
        else:
            real = lambda b, t: (t >= Lk - lengths.long()[b]) & (t < Lk)  # noqa: E731
            build = lambda p: mm.padding(take(lengths, p), "left", Lk, take(o, p))  # noqa: E731
        return Mask(
            f"padding({lengths.tolist()} {lengths.dtype},{o})",
            build,
            lambda b, h, i, j, s: real(b, j) & real(b, position(o, i, s)),
            "right" if lengths.dtype in (torch.int64, torch.int32) else "either",
            hides=True,
        )
    if kind == "frames":
        t, past = r.choice([1, 3, 16, 50, 128]), r.choice([None, 0, 1, 3])

        def show(b, h, i, j, s):
            f = torch.div(torch.as_tensor(position(o, i, s)), t, rounding_mode="floor")
            g = j // t
            return (g <= f) if past is None else (g <= f) & (g >= f - past)

        return Mask(f"frames({t},{past},{o})", lambda p: mm.frames(t, past, take(o, p)), show, valid)
    if kind == "sink":
        n = r.choice([0, 1, 4, 130, 1000])
        return Mask(f"sink({n})", lambda p: mm.sink(n), lambda b, h, i, j, s: j < n, "right" if n else "either")
    if kind == "bidirectional":
        return Mask("bidirectional()", lambda p: mm.bidirectional(), lambda b, h, i, j, s: j >= 0)
    if kind == "own":
        step = r.randint(1, 9)
        pick = r.randint(0, 2)
        forms = [
            lambda b, h, q, k: (q - k) % step == 0,
            lambda b, h, q, k: (k <= q + 3 * step) | (k % step == 0),
            lambda b, h, q, k: k >= 10 * step,
        ]
        f = forms[pick]
        return Mask(f"own{pick}({step})", lambda p: f, lambda b, h, i, j, s: f(b, h, i, j), placed=False)
    if kind == "own_head":
        f = lambda b, h, q, k: (k + h * 16) % 64 < 40  # noqa: E731
        return Mask("own_head", lambda p: f, lambda b, h, i, j, s: f(b, h, i, j), placed=False, per_head=True)
    if kind == "own_batch":
        table = torch.tensor([r.randint(1, Lk) for _ in range(B)])

        def make(p):
            t = take(table, p)
            return lambda b, h, q, k: k < t[b]

        f0 = make(None)
        return Mask(f"own_batch({table.tolist()})", make, lambda b, h, i, j, s: f0(b, h, i, j), placed=False)
    if kind == "span":
        place, count = r.randint(-10, Lk + 10), r.randint(0, 60)
        f = lambda b, h, q: ((place - count, place + count), (q - count, q - count))  # noqa: E731
        return Mask(
            f"span({place},{count})",
            lambda p: mm.SpanMask(f),
            lambda b, h, i, j, s: ((j - place).abs() <= count) | (j == i - count),
        )
    if kind == "from_head":
        first = r.choice([0, 1, 5, torch.tensor(2)])
        a = draw_mask(r, B, Hq, Lq, Lk, depth + 1)
        return Mask(
            f"from_head({a.text},{first})",
            lambda p: mm.from_head(a.build(p), first),
            lambda b, h, i, j, s: a.show(b, h + int(first), i, j, s),
            a.valid,
            a.hides,
            a.placed,
            a.per_head,
        )
    parts = [draw_mask(r, B, Hq, Lq, Lk, depth + 1) for _ in range(r.choice([1, 2, 2, 3]))]
    join = torch.logical_and if kind == "both" else torch.logical_or
    compose = mm.both if kind == "both" else mm.either

    def show(b, h, i, j, s):
        out = parts[0].show(b, h, i, j, s)
        for part in parts[1:]:
            out = join(torch.as_tensor(out), torch.as_tensor(part.show(b, h, i, j, s)))
        return out

    return Mask(
        f"{kind}({', '.join(p.text for p in parts)})",
        lambda p: compose(*(part.build(p) for part in parts)),
        show,
        "either" if any(p.valid == "either" for p in parts) else "right",
        any(p.hides for p in parts),
        all(p.placed for p in parts),
        any(p.per_head for p in parts),
    )


def own_raises(b, h, q, k):
    raise UsersOwn("mine")


def wrong_mask(r: random.Random, B: int, Lk: int) -> Mask:
    L = torch.tensor
    choices: dict[str, Callable] = {
        "window0": lambda p: mm.sliding_window(0),
        "window-1": lambda p: mm.sliding_window(-1),
        "window float": lambda p: mm.sliding_window(1.5),
        "window str": lambda p: mm.sliding_window("a"),
        "window None": lambda p: mm.sliding_window(None),
        "symmetric": lambda p: mm.sliding_window(4, symmetric="yes"),
        "offset float": lambda p: mm.causal(0.5),
        "offset float tensor": lambda p: mm.causal(L(0.5)),
        "offset str": lambda p: mm.causal("x"),
        "offset [B+1]": lambda p: mm.causal(torch.zeros(B + 1, dtype=torch.long)),
        "offset 2d": lambda p: mm.causal(torch.zeros(B, 1, dtype=torch.long)),
        "offset bool tensor": lambda p: mm.causal(torch.tensor(True)),
        "document fewer": lambda p: mm.document(torch.zeros(Lk + 1, dtype=torch.long)),
        "document more rows": lambda p: mm.document(torch.zeros(B + 1, Lk, dtype=torch.long)),
        "document float": lambda p: mm.document(torch.zeros(Lk)),
        "document list": lambda p: mm.document([0] * Lk),
        "document back": lambda p: mm.document(L([0, 1] * Lk)[:Lk]) if Lk > 2 else mm.document(None),
        "prefix -1": lambda p: mm.prefix(-1),
        "prefix float": lambda p: mm.prefix(1.0),
        "prefix [B+1]": lambda p: mm.prefix(torch.ones(B + 1, dtype=torch.long)),
        "padding beyond": lambda p: mm.padding(torch.full((B,), Lk + 1)),
        "padding below": lambda p: mm.padding(torch.full((B,), -1)),
        "padding side": lambda p: mm.padding(torch.full((B,), Lk), "middle"),
        "padding no total": lambda p: mm.padding(torch.full((B,), Lk), "left"),
        "padding total": lambda p: mm.padding(torch.full((B,), Lk), "left", Lk + 1),
        "padding [B+1]": lambda p: mm.padding(torch.full((B + 1,), Lk)),
        "padding float": lambda p: mm.padding(torch.ones(B)),
        "padding list": lambda p: mm.padding([Lk] * B),
        "frames 0": lambda p: mm.frames(0),
        "frames past -1": lambda p: mm.frames(4, -1),
        "frames float": lambda p: mm.frames(4.0),
        "sink -1": lambda p: mm.sink(-1),
        "sink float": lambda p: mm.sink(1.5),
        "both none": lambda p: mm.both(),
        "either None": lambda p: mm.either(None),
        "both str": lambda p: mm.both(mm.causal(), "x"),
        "both uncalled": lambda p: mm.both(mm.causal(), mm.causal),
        "from_head str": lambda p: mm.from_head(mm.causal(), "a"),
        "from_head None": lambda p: mm.from_head(None, 0),
        "own None": lambda p: lambda b, h, q, k: None,
        "own bool": lambda p: lambda b, h, q, k: True,
        "own int tensor": lambda p: lambda b, h, q, k: (q >= k).int(),
        "own float tensor": lambda p: lambda b, h, q, k: (q - k).float(),
        "own shape": lambda p: lambda b, h, q, k: torch.ones(7, 3, dtype=torch.bool),
        "own raises": lambda p: own_raises,
        "own arguments": lambda p: lambda q, k: q >= k,
        "own short table": lambda p: (lambda t: lambda b, h, q, k: t[k])(torch.ones(max(Lk - 1, 0), dtype=torch.bool)),
        "not callable": lambda p: torch.ones(2, 2, dtype=torch.bool),
        "uncalled": lambda p: mm.causal,
        "uncalled window": lambda p: mm.sliding_window,
        "spans None": lambda p: mm.SpanMask(lambda b, h, q: None),
        "spans flat": lambda p: mm.SpanMask(lambda b, h, q: (0, 5)),
        "spans empty": lambda p: mm.SpanMask(lambda b, h, q: ()),
        "spans float": lambda p: mm.SpanMask(lambda b, h, q: ((0.5, 5.5),)),
        "spans raises": lambda p: mm.SpanMask(lambda b, h, q: own_raises(b, h, q, q)),
    }
    name = r.choice(sorted(choices))
    lenient = {"spans empty", "offset bool tensor", "symmetric"}
    nothing = lambda b, h, i, j, s: (j < 0) & (i < 0)  # noqa: E731
    ok = {"spans empty": nothing}
    return Mask(f"WRONG {name}", choices[name], ok.get(name, nothing), "either" if name in lenient else "wrong")


def draw_settings(r: random.Random, Hq: int, case: Case) -> None:
    """Settings that the documentation says are right (most of them), into case.settings."""
    s: dict[str, Any] = {}
    if r.random() < 0.5:
        s["preset"] = r.choice(["rr", "best", "fast"])
    if r.random() < 0.5:
        s["block_size"] = r.choice([64, 128, (128, 64), (64, 128), (64, 64), (128, 128)])
    if r.random() < 0.2:
        s["stride"] = r.choice([4, 8, 16])
    if r.random() < 0.1:
        s["key_stride"] = r.choice([4, 8, 16, 32])
    if r.random() < 0.1:
        s["query_stride"] = r.choice([4, 8, 16, 32])
    if "preset" not in s:
        if r.random() < 0.3:
            s["pool"] = r.choice(["keys", "queries", "both"])
            if s["pool"] != "keys" and r.random() < 0.5:
                s["query_pool"] = r.choice([16, 32, 64])
        if r.random() < 0.3:
            s["order"] = r.choice([1, 2])
            if s["order"] == 2 and r.random() < 0.5:
                s["variance_weight"] = r.choice([0.1, 0.25, 0.5, 1.0])
    if ("pool" in s or "query_stride" in s or "preset" in s) and len(s) > 1:
        case.spoil("maybe settings that the rules do not read", "either")
    budget = r.choice(["", "top_tau", "threshold", "density"])
    if budget:
        s["budget"] = budget
        level = {"top_tau": "tau", "threshold": "threshold", "density": "target_density"}[budget]
        high = {"top_tau": 1.0, "threshold": 0.3, "density": 1.0}[budget]
        if r.random() < 0.85:
            x = r.uniform(0.01, high)
            form = r.choice(["one", "one", "one", "top", "list", "tensor"])
            if form == "top" and budget != "threshold":
                x = 1.0
            elif form in ("list", "tensor") and budget != "density":
                x = [r.uniform(0.01, high) for _ in range(Hq)]
                x = torch.tensor(x) if form == "tensor" else x
            s[level] = x
        if budget == "top_tau" and r.random() < 0.3:
            s["mandatory"] = r.choice(["count", "add"])
    for name in ("sink_blocks", "local_blocks", "dense_last_rows"):
        if r.random() < 0.35:
            s[name] = r.choice([0, 0, 1, 2, 5])
    if r.random() < 0.1:
        s["min_length"] = r.choice([0, 1, 100, 401])
    if "dense_last_rows" not in s and r.random() < 0.5:
        s["dense_last_rows"] = 0
    case.settings = s


BAD_SETTINGS: list[dict[str, Any]] = [
    {"stride": 0}, {"stride": -8}, {"stride": 7}, {"stride": 8.0}, {"stride": "8"}, {"stride": None},
    {"query_stride": 0}, {"key_stride": -1}, {"key_stride": 24}, {"key_stride": 256},
    {"block_size": 0}, {"block_size": 32}, {"block_size": 100}, {"block_size": (128,)}, {"block_size": "128"},
    {"block_size": (128, 0)}, {"block_size": 128.0}, {"block_size": None},
    {"pool": "values"}, {"pool": None}, {"query_pool": 64}, {"pool": "queries", "query_pool": 0},
    {"order": 3}, {"order": 0}, {"order": "1"}, {"variance_weight": 0.5}, {"order": 2, "variance_weight": math.nan},
    {"order": 2, "variance_weight": "a"}, {"budget": "top_p"}, {"budget": None}, {"tau": 1.5}, {"tau": -0.1},
    {"tau": math.nan}, {"tau": "0.9"}, {"tau": []}, {"tau": [0.5, 2.0]}, {"tau": [0.5] * 99}, {"tau": torch.ones(99)},
    {"tau": torch.ones(2, 2)}, {"tau": 0.5, "budget": "threshold"}, {"threshold": 0.1}, {"target_density": 0.5},
    {"budget": "threshold", "threshold": -0.5}, {"budget": "threshold", "threshold": 2.0},
    {"budget": "threshold", "threshold": math.nan}, {"budget": "density", "target_density": 1.5},
    {"budget": "density", "target_density": -0.1}, {"budget": "density", "target_density": [0.1, 0.2]},
    {"budget": "density", "tau": 0.5}, {"mandatory": "none"}, {"budget": "threshold", "mandatory": "add"},
    {"sink_blocks": -1}, {"sink_blocks": 1.5}, {"sink_blocks": "1"}, {"local_blocks": -1}, {"local_blocks": None},
    {"dense_last_rows": -1}, {"dense_last_rows": 0.5}, {"min_length": -1}, {"min_length": 1.5}, {"min_length": "a"},
    {"preset": "better"}, {"preset": None}, {"preset": "best", "tau": 0.5}, {"preset": "rr", "threshold": 0.1},
    {"tua": 0.5}, {"dropout": 0.1}, {"preset": "fast", "mandatory": "add"}, {"is_causal": True},
]  # fmt: skip


def draw_case(r: random.Random, torch_seed: int) -> Case:
    g = torch.Generator().manual_seed(torch_seed)
    B, Hkv = r.randint(1, 3), r.randint(1, 3)
    Hq = Hkv * r.randint(1, 4)
    length = lambda: r.choice([1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 256, 300, 384, 400, r.randint(1, 400)])  # noqa: E731
    Lk = length()
    Lq = Lk if r.random() < 0.4 else length()
    D = r.choice([16, 32, 64, 17, 40])
    Dv = D if r.random() < 0.8 else r.choice([16, 32, 64, 24])
    dtype = r.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])

    def tensor(H, L, width, gain=1.0):
        layout = r.choice(["plain", "plain", "transposed", "sliced"])
        if layout == "transposed":
            x = torch.randn(B, L, H, width, generator=g).transpose(1, 2)
        elif layout == "sliced":
            x = torch.randn(B, H, L + 3, width + 2, generator=g)[:, :, 3:, :width]
        else:
            x = torch.randn(B, H, L, width, generator=g)
        return (x * gain).to(dtype)

    gain = r.choice([1.0, 2.0])
    case = Case(tensor(Hq, Lq, D, gain), tensor(Hkv, Lk, D), tensor(Hkv, Lk, Dv))
    causal = r.random() < 0.6
    if not causal or r.random() < 0.3:
        case.options["causal"] = causal
    if causal is False and r.random() < 0.3:
        x = r.choice([128, 256, 384])
        case.q = torch.randn(B, Hq, x, D, generator=g).to(dtype)
        Lq = x
    elif r.random() < 0.75:
        case.mask = wrong_mask(r, B, Lk) if r.random() < 0.15 else draw_mask(r, B, Hq, Lq, Lk)
        if case.mask.valid != "right":
            case.spoil(case.mask.text, case.mask.valid)
    if r.random() < 0.35:
        form = r.choice(["int", "scalar", "int", "scalar", "int", "scalar", "batch", "negative", "beyond"])
        top = max(Lk - Lq, 0)
        if form == "int":
            case.options["q_offset"] = r.randint(0, top)
        elif form == "scalar":
            case.options["q_offset"] = torch.tensor(r.randint(0, top))
        elif form == "batch":
            case.options["q_offset"] = torch.tensor([r.randint(0, top) for _ in range(B)])
        elif form == "negative":
            case.options["q_offset"] = -r.randint(1, 150)
        else:
            case.options["q_offset"] = Lk - r.randint(0, Lq)
        if form in ("negative", "beyond", "batch"):
            case.spoil(f"q_offset {form}", "either")
    if r.random() < 0.15:
        case.options["head_offset"] = r.choice([0, 1, 3, 8, torch.tensor(5)])
    if r.random() < 0.2:
        case.options["softcap"] = r.choice([0.5, 5.0, 30.0, 20])
    if r.random() < 0.25:
        case.options["scale"] = r.choice([0.01, 0.02, 0.1, 0.15, 0.2, 0.3, 1, 0.5, 0.4, r.choice([0.0, -0.1])])
        if case.options["scale"] <= 0:
            case.spoil("scale 0 or below", "either")
    if r.random() < 0.2:
        case.only_attention["sinks"] = torch.randn(Hq, generator=g).to(r.choice([dtype, torch.float32]))
    draw_settings(r, Hq, case)
    if r.random() < 0.15:
        form = r.choice(["config", "config and settings"])
        s = dict(case.settings)
        if form == "config" or "preset" in s:
            preset = s.get("preset")
            rest = {n: x for n, x in s.items() if n != "preset"}
            case.config = lambda: RRConfig.from_preset(preset, **rest) if preset else RRConfig(**rest)
            case.settings = {}
        else:
            names = [n for n in s if n in ("sink_blocks", "local_blocks", "dense_last_rows", "min_length")]
            later = {n: s.pop(n) for n in names}
            case.config = lambda: RRConfig(**s)
            case.settings = later
            if later and r.random() < 0.3:
                case.settings["preset"] = "best"
                case.spoil("config beside a preset")
    if r.random() < 0.12:
        bad = r.choice(BAD_SETTINGS)
        if case.config is None:
            case.settings = dict(bad)
        else:
            case.config = lambda: RRConfig(**bad)
        case.spoil(f"settings {bad}")
    if r.random() < 0.12:
        spoil_call(r, case, B, Hq, Hkv, Lq, Lk, D)
    return case


def spoil_call(r: random.Random, case: Case, B: int, Hq: int, Hkv: int, Lq: int, Lk: int, D: int) -> None:
    o, a = case.options, case.only_attention
    kind = r.choice(
        [
            "q3d",
            "q64",
            "qint",
            "dtype",
            "heads",
            "dim",
            "batch",
            "vlen",
            "vbatch",
            "vheads",
            "list",
            "numpy",
            "softcap",
            "scale",
            "sinks",
            "q_offset",
            "head_offset",
            "backend",
            "causal",
            "state",
            "config",
            "lse",
            "meta",
            "empty_q",
            "empty_k",
            "empty_b",
            "complex",
            "none",
            "mixed_v",
        ]
    )
    valid = "wrong"
    if kind == "q3d":
        case.q = case.q[0]
    elif kind == "q64":
        case.q, case.k, case.v = case.q.double(), case.k.double(), case.v.double()
    elif kind == "qint":
        case.q, case.k, case.v = case.q.int(), case.k.int(), case.v.int()
    elif kind == "complex":
        case.q = case.q.float() + 1j
    elif kind == "dtype":
        case.k = case.k.to(torch.float16 if case.k.dtype != torch.float16 else torch.float32)
    elif kind == "mixed_v":
        case.v = case.v.to(torch.float16 if case.v.dtype != torch.float16 else torch.float32)
    elif kind == "heads":
        case.k = torch.cat([case.k] * (Hq + 1), 1)[:, : Hq + 1]
        case.v = torch.cat([case.v] * (Hq + 1), 1)[:, : Hq + 1]
    elif kind == "dim":
        case.k = case.k[..., :-1]
    elif kind == "batch":
        case.k = torch.cat([case.k, case.k])
    elif kind == "vlen":
        case.v = torch.cat([case.v, case.v], 2)
    elif kind == "vbatch":
        case.v = torch.cat([case.v, case.v])
    elif kind == "vheads":
        case.v = torch.cat([case.v, case.v], 1)
    elif kind == "list":
        case.q = case.q.tolist()
    elif kind == "numpy":
        case.k = case.k.float().numpy()
    elif kind == "none":
        case.k = None
    elif kind == "softcap":
        o["softcap"] = r.choice([0, 0.0, -1.0, math.nan, math.inf, "5", True])
        valid = "either" if o["softcap"] in (math.inf, True) else "wrong"
        if o["softcap"] in (math.inf,):
            valid = "refuse or same"
    elif kind == "scale":
        o["scale"] = r.choice([math.nan, math.inf, "0.1", torch.ones(3)])
    elif kind == "sinks":
        pick = r.randint(0, 4)
        a["sinks"] = [torch.zeros(Hq + 1), torch.zeros(Hq, 1), [0.0] * Hq, 0.5, torch.zeros(Hq).int()][pick]
    elif kind == "q_offset":
        o["q_offset"] = r.choice(
            [0.5, "3", torch.tensor(0.5), torch.zeros(B + 1).long(), torch.zeros(B, 1).long(), [0]]
        )
    elif kind == "head_offset":
        o["head_offset"] = r.choice([-1, 0.5, "1", torch.tensor(0.5), torch.tensor([1, 2]), None])
    elif kind == "backend":
        a["backend"] = r.choice(["cuda", None, "flash"])
    elif kind == "causal":
        o["causal"] = r.choice(["yes", 2, torch.tensor(True)])
        valid = "wrong"
    elif kind == "state":
        o["state"] = r.choice([5, {}, PrefillState])
    elif kind == "config":
        case.config = lambda: r.choice([{"tau": 0.5}, "best", RRConfig])
    elif kind == "lse":
        a["return_lse"] = True
    elif kind == "meta":
        case.k = case.k.to("meta")
    elif kind == "empty_q":
        case.q = case.q[:, :, :0]
        valid = "either"
    elif kind == "empty_k":
        case.k, case.v = case.k[:, :, :0], case.v[:, :, :0]
        valid = "either"
    elif kind == "empty_b":
        case.q, case.k, case.v = case.q[:0], case.k[:0], case.v[:0]
        valid = "either"
    case.spoil(f"call {kind} {o.get(kind, a.get(kind, ''))!r}", valid)


def grid(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Visible pairs [B, Hq, Lq, Lk] and the positions of the queries [B, Lq]."""
    B, Hq, Lq, _ = case.q.shape
    Lk = case.k.shape[2]
    b, h = torch.arange(B).view(-1, 1, 1, 1), torch.arange(Hq).view(1, -1, 1, 1)
    i, j = torch.arange(Lq).view(1, 1, -1, 1), torch.arange(Lk).view(1, 1, 1, -1)
    base = case.options.get("q_offset")
    base = torch.as_tensor(Lk - Lq if base is None else column(base))
    pairs = torch.ones(B, Hq, Lq, Lk, dtype=torch.bool)
    if case.mask is not None:
        pairs = pairs & torch.as_tensor(case.mask.show(b, h, i, j, base))
    if case.options.get("causal", True):
        pairs = pairs & (j <= i + base)
    return pairs, (base.reshape(-1, 1) + torch.arange(Lq)).expand(B, Lq)


def per_block(pairs: torch.Tensor, block: tuple[int, int], whole: bool = False) -> torch.Tensor:
    B, H, Lq, Lk = pairs.shape
    nQ, nK = -(-Lq // block[0]), -(-Lk // block[1])
    pairs = torch.nn.functional.pad(pairs, (0, nK * block[1] - Lk, 0, nQ * block[0] - Lq), value=whole)
    pairs = pairs.view(B, H, nQ, block[0], nK, block[1])
    return pairs.all(5).all(3) if whole else pairs.any(5).any(3)


def per_pair(blocks: torch.Tensor, block: tuple[int, int], Lq: int, Lk: int) -> torch.Tensor:
    return blocks.repeat_interleave(block[0], 2)[:, :, :Lq].repeat_interleave(block[1], 3)[..., :Lk]


def reference(case: Case, pairs: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.detach().double() for x in (case.q, case.k, case.v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale = case.options.get("scale")
    logits = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else float(scale))
    cap = case.options.get("softcap")
    if cap is not None and cap != math.inf:
        logits = cap * torch.tanh(logits / cap)
    logits = logits.masked_fill(~pairs, -math.inf)
    sinks = case.only_attention.get("sinks")
    top = logits.amax(-1, keepdim=True).clamp(min=-1e9) if logits.shape[-1] else logits.new_zeros(*logits.shape[:-1], 1)
    if sinks is not None:
        s = sinks.double().view(1, -1, 1, 1)
        top = torch.maximum(top, s)
    p = (logits - top).exp()
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (s - top).exp()
    return p @ v / total.clamp(min=1e-300)


def effective(case: Case) -> RRConfig:
    config = case.config() if case.config is not None else None
    return RRConfig.resolve(config, dict(case.settings))


def check_selection(case: Case, selection: Any, config: RRConfig, pairs: torch.Tensor, at: torch.Tensor) -> None:
    B, _Hq, Lq, Lk = pairs.shape
    block = selection.block_size
    if tuple(block) != tuple(config.block_sizes):
        raise Wrong(f"block_size {block} instead of {config.block_sizes}")
    kept, mass = selection.kept, selection.mass.double()
    visible = per_block(pairs, block)
    if not torch.equal(selection.visible.expand_as(kept), visible):
        raise Wrong("visible is not the mask's")
    said, truth = selection.whole.expand_as(kept), per_block(pairs, block, whole=True) & visible
    if (said & ~truth).any():
        raise Wrong("whole says too much")
    if (kept & ~visible).any():
        raise Wrong("kept blocks outside the visible ones")
    each = (kept.sum((2, 3)).double() / visible.sum((2, 3)).clamp(min=1)).mean()  # 0 where a head sees nothing
    if abs(float(selection.density) - float(each)) > 1e-5:
        raise Wrong(f"density {float(selection.density)} is not kept / visible {float(each)}")
    if config.min_length is not None and Lk < config.min_length:
        if not torch.equal(kept, visible):
            raise Wrong("under min_length, and not dense")
        return
    if not torch.isfinite(mass).all() or (mass < -1e-6).any():
        raise Wrong("mass is not finite or negative")
    if (mass[~visible] > 1e-6).any():
        raise Wrong("mass on invisible blocks")
    nQ, nK = kept.shape[2:]
    cols = torch.arange(nK)
    must = (cols < config.sink_blocks).expand(B, 1, nQ, nK)
    last = at[:, (torch.arange(1, nQ + 1) * block[0]).clamp(max=Lq) - 1]  # B nQ
    first = at[:, torch.arange(nQ) * block[0]]
    diagonal = torch.div(last, block[1], rounding_mode="floor")[:, None, :, None]
    start = torch.div(first, block[1], rounding_mode="floor")[:, None, :, None]
    near = (cols <= diagonal) & (cols > diagonal - config.local_blocks)
    must = must | (near & (diagonal < nK))
    n = config.dense_last_rows
    rows = torch.arange(nQ).view(1, 1, -1, 1)
    hides = case.mask is not None and case.mask.hides
    if not hides and n:
        must = must | (rows >= nQ - n)
    if (must & visible & ~kept).any():
        raise Wrong(f"a mandatory block is dropped at {(must & visible & ~kept).nonzero()[0].tolist()}")
    may = (cols < config.sink_blocks) | ((cols >= start - config.local_blocks) & (cols <= diagonal + 1))
    may = may | (rows >= nQ - n) | torch.full((B, 1, nQ, nK), bool(hides and n))
    if hides:
        may = torch.ones_like(may)  # where the padding begins is not modelled here
    free = kept & ~may
    rest = visible & ~kept
    total = mass.sum(-1, keepdim=True)
    share = mass / total.clamp(min=1e-30)
    if config.budget == "density":
        if float(config.target_density if config.target_density is not None else 0.4) >= 1 and rest.any():
            raise Wrong("target_density=1 is not dense")
        goal = config.target_density if config.target_density is not None else 0.4
        for b in range(B):
            want = goal * float(visible[b].sum())
            got = float(kept[b].sum())
            if case.mask is not None and case.mask.per_head:
                continue
            if got < want - 1.001 or (got > want + 1.001 and free[b].any()):
                raise Wrong(f"density: {got} blocks instead of {want} of {int(visible[b].sum())}")
        return
    level = torch.as_tensor(config.level, dtype=torch.float64).reshape(1, -1, 1, 1)
    if config.budget == "threshold":
        if (rest & (share > level + 1e-5) & (total > 1e-6)).any():
            raise Wrong("a block above the threshold is dropped")
        if (free & (share < level - 1e-5) & (total > 1e-6)).any():
            raise Wrong("a block below the threshold is kept")
    else:
        have = (mass * kept).sum(-1, keepdim=True)
        if ((have < level * total - 1e-4 * total.clamp(min=1)) & visible.any(-1, keepdim=True)).any():
            raise Wrong("a row holds less than tau")
        if (rest & (level >= 1)).any():
            raise Wrong("tau=1 is not dense")
        if config.mandatory != "add":
            smallest = torch.where(free, mass, math.inf).amin(-1, keepdim=True)
            if ((have - smallest > level * total + 1e-4 * total.clamp(min=1)) & (total > 1e-6)).any():
                raise Wrong("a row keeps more than tau needs")


def same_kept(a: Any, b: Any, what: str) -> None:
    """Equal but for ties of the estimate."""
    if a.kept.shape != b.kept.shape:
        raise Wrong(f"{what}: shapes differ")
    if not torch.equal(a.kept, b.kept):
        gap = (a.mass.double() - b.mass.double()).abs().max()
        differ = int((a.kept != b.kept).sum())
        raise Wrong(f"{what}: {differ} of {a.kept.numel()} kept blocks differ, mass by {float(gap):.2g}")


CONTEXTS = ["plain"] * 6 + [
    "inference",
    "no_grad",
    "grad",
    "autocast",
    "meta_default",
    "thread",
    "eager",
    "double_default",
]


class Hunt:
    def __init__(self, seed: int, compiled: int = 0) -> None:
        self.seed = seed
        self.compiled = compiled
        self.counts: collections.Counter[str] = collections.Counter()
        self.errors: collections.Counter[str] = collections.Counter()
        self.wrong: list[tuple[int, str, str]] = []
        self.sorts: collections.Counter[str] = collections.Counter()
        self.slowest = (0.0, -1)

    def call(self, case: Case, perm: Any = None, **more: Any) -> tuple[dict, dict]:
        options = {**case.options, **case.settings}
        if isinstance(options.get("q_offset"), torch.Tensor):
            options["q_offset"] = take(options["q_offset"], perm)
        if case.mask is not None:
            options["mask_mod"] = case.mask.build(perm)
        if case.config is not None:
            options["config"] = case.config()
        if case.valid != "wrong":
            self.as_selected(case, options)
        return {**options, **more}, case.only_attention

    @staticmethod
    def as_selected(case: Case, options: dict) -> None:
        """What makes rr_attention attend to what select_blocks keeps: no call is dense for its speed, and rows begin
        with the first query, which they do where only the device knows its position."""
        if "min_length" not in options and getattr(options.get("config"), "min_length", None) is None:
            options["min_length"] = 0
        if case.mask is None and not isinstance(options.get("q_offset"), torch.Tensor):
            at = options.get("q_offset")
            options["q_offset"] = torch.tensor(case.k.shape[2] - case.q.shape[2] if at is None else at)

    def one(self, n: int) -> None:
        r = random.Random(f"{self.seed}/{n}")
        case = draw_case(r, r.randrange(2**31))
        context = r.choice(CONTEXTS)
        begin = time.monotonic()
        try:
            kind = self.judge(r, case, context)
            self.counts[kind] += 1
        except Wrong as wrong:
            self.wrong.append((n, str(wrong), self.describe(case, context)))
            self.counts["WRONG"] += 1
        took = time.monotonic() - begin
        if took > self.slowest[0]:
            self.slowest = (took, n)

    def describe(self, case: Case, context: str) -> str:
        shape = lambda x: f"{tuple(x.shape)} {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__  # noqa: E731
        try:
            config = case.config() if case.config else None
        except Exception as error:
            config = error
        return (
            f"q {shape(case.q)} k {shape(case.k)} v {shape(case.v)} mask={case.mask and case.mask.text}"
            f" options={case.options} attention={case.only_attention} settings={case.settings} config={config}"
            f" context={context} why={case.why}"
        )

    def judge(self, r: random.Random, case: Case, context: str) -> str:
        if context == "grad":
            case.spoil("requires_grad", "wrong")
        try:
            selection, out, density = self.run(case, context)
        except UsersOwn:
            if case.mask is None or "raises" not in case.mask.text:
                raise Wrong("UsersOwn from nowhere") from None
            return "user's own error"
        except OURS as error:
            text = "".join(traceback.format_exception_only(type(error), error)).strip()
            where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
            ours = ROOT in where.resolve().parents
            self.errors[re.sub(r"-?\d+(\.\d+)?", "#", f"{type(error).__name__}: {error}")[:300]] += 1
            if not ours:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                raise Wrong(
                    f"an error that is not ours ({frame.filename[-60:]}:{frame.lineno}): {text[:600]}"
                ) from None
            if case.valid == "right":
                raise Wrong(f"a right call is refused: {text[:600]}") from None
            if case.valid == "either":
                return "refused, maybe rightly"
            return "refused"
        except Exception as error:
            if isinstance(error, IndexError) and case.mask is not None and "short table" in case.mask.text:
                return "user's own error"
            text = "".join(traceback.format_exception_only(type(error), error)).strip()
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise Wrong(f"{type(error).__name__} at {frame.filename[-60:]}:{frame.lineno}: {text[:600]}") from None
        if case.valid == "wrong":
            raise Wrong("a wrong call is not refused")
        config = effective(case)
        pairs, at = grid(case)
        Lq, Lk = pairs.shape[2:]
        if pairs.numel():
            check_selection(case, selection, config, pairs, at)
            shown = pairs & per_pair(selection.kept, selection.block_size, Lq, Lk)
        else:
            shown = pairs
        expect = reference(case, shown)
        if out.shape != expect.shape:
            raise Wrong(f"output of shape {tuple(out.shape)}")
        if out.dtype != case.q.dtype and (context != "autocast" or out.dtype != torch.bfloat16):
            raise Wrong(f"output of dtype {out.dtype}")
        if out.requires_grad:
            raise Wrong("the output requires grad")
        if out.numel():
            error = float((out.double() - expect).abs().max())
            size = float(case.v.double().abs().max()) + 1e-3
            tolerance = TOLERANCE[torch.bfloat16 if context == "autocast" else case.q.dtype]
            if context == "autocast":
                tolerance *= 4  # logits in bfloat16
            if not error <= tolerance * size:
                raise Wrong(f"output differs by {error:.3g} (of {size:.3g}, {case.q.dtype})")
        if density is not None and pairs.any() and abs(float(density) - float(selection.density)) > 1e-5:
            raise Wrong(f"return_density {float(density)}, selection's {float(selection.density)}")
        if pairs.numel() and context in ("plain", "no_grad"):
            try:
                self.relatives(r, case, config, selection)
            except OURS as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                raise Wrong(f"a relative is refused ({where.filename[-40:]}:{where.lineno}): {error}"[:600]) from None
        return "right" if context == "plain" else f"right, {context}"

    def run(self, case: Case, context: str) -> tuple[Any, torch.Tensor, Any]:
        grad = context in ("grad", "no_grad")
        q, k, v = case.q, case.k, case.v
        if grad and isinstance(v, torch.Tensor) and v.is_floating_point():
            v = v.detach().requires_grad_()
        if context == "no_grad" and isinstance(q, torch.Tensor) and q.is_floating_point():
            q = q.detach().requires_grad_()

        def work() -> tuple[Any, torch.Tensor, Any]:
            options, more = self.call(case)
            lists = {n: x for n, x in options.items()}
            result = rr_attention(q, k, v, **options, **more, return_density=True)
            out, density = result[0], result[-1]
            if "state" in lists:
                lists["state"] = PrefillState()
            return select_blocks(q, k, **lists), out, density

        if context == "inference":
            with torch.inference_mode():
                return work()
        if context == "no_grad":
            with torch.no_grad():
                return work()
        if context == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return work()
        if context == "meta_default":
            options, more = self.call(case)
            with torch.device("meta"):
                result = rr_attention(q, k, v, **options, **more, return_density=True)
                return select_blocks(q, k, **options), result[0], result[1]
        if context == "double_default":
            torch.set_default_dtype(torch.float64)
            try:
                return work()
            finally:
                torch.set_default_dtype(torch.float32)
        if context == "thread":
            results: list[Any] = [None, None]

            def at_once(place: int) -> None:
                try:
                    with torch.compiler.set_stance("force_eager"):
                        results[place] = work()
                except Exception as error:
                    results[place] = error

            threads = [threading.Thread(target=at_once, args=(i,), daemon=True) for i in range(2)]
            for t in threads:
                t.start()
            for t in threads:
                t.join(120)
                if t.is_alive():
                    raise Wrong("a thread hangs")
            for result in results:
                if isinstance(result, Exception):
                    raise result
            if not torch.equal(results[0][1], results[1][1]) or not torch.equal(results[0][0].kept, results[1][0].kept):
                raise Wrong("two threads differ")
            return results[0]
        if context == "eager" and case.valid == "right" and self.compiled > 0:
            self.compiled -= 1
            options, more = self.call(case)
            with torch.compiler.set_stance("default"):
                torch._dynamo.reset()

                @torch.compile(backend="eager")
                def caller(q, k, v):
                    return rr_attention(q, k, v, **options, **more, return_density=True)

                result = caller(q, k, v)
            return select_blocks(q, k, **options), result[0], result[1]
        return work()

    def relatives(self, r: random.Random, case: Case, config: RRConfig, selection: Any) -> None:
        """What must not change the selection, or must change it in a known way."""
        B, Hq, Lq, Lk = case.q.shape[0], case.q.shape[1], case.q.shape[2], case.k.shape[2]
        options, _ = self.call(case)
        q, k = case.q.detach(), case.k.detach()
        if options.get("causal", True) is False and case.mask is None and r.random() < 0.6:
            return self.estimate(case, config, options)
        kind = r.choice(
            [
                "perm",
                "state",
                "scale",
                "softcap",
                "heads",
                "function",
                "chunks",
                "cuts",
                "config",
                "block_mask",
                "mask_call",
            ]
        )
        if kind == "perm" and B > 1:
            perm = torch.randperm(B, generator=torch.Generator().manual_seed(r.randrange(99)))
            again = select_blocks(q[perm], k[perm], **self.call(case, perm)[0])
            moved = Picked(selection.kept[perm], selection.mass[perm])
            same_kept(again, moved, "batch order")
        elif kind == "state" and config.pool != "queries":
            again = select_blocks(q, k, **options, state=PrefillState())
            same_kept(again, selection, "state")
        elif kind == "scale" and "softcap" not in options:
            scale = options.get("scale")
            scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
            same_kept(select_blocks(q / 2, k, **{**options, "scale": 2 * scale}), selection, "q / 2, scale · 2")
        elif kind == "softcap" and "softcap" not in options:
            again = select_blocks(q, k, **options, softcap=1e6)
            if float((again.mass.double() - selection.mass.double()).abs().max()) > 1e-2:
                raise Wrong("softcap=1e6 moves the estimate")
        elif kind == "heads" and config.budget != "density" and case.k.shape[1] > 1:
            groups = Hq // k.shape[1]
            head = int(options.get("head_offset", 0) or 0) + groups
            cut = {
                n: (x[groups:] if n in ("tau", "threshold") and not isinstance(x, float) else x)
                for n, x in options.items()
            }
            if "config" in cut and not isinstance(config.level, float):
                return
            if case.mask is not None:
                cut["mask_mod"] = mm.from_head(cut["mask_mod"], groups)
            again = select_blocks(q[:, groups:], k[:, 1:], **{**cut, "head_offset": head})
            same_kept(again, Picked(selection.kept[:, groups:], selection.mass[:, groups:]), "head_offset")
        elif kind == "function" and case.mask is not None and not case.mask.hides:
            base = options.get("q_offset")
            base = Lk - Lq if base is None else base
            show = case.mask.show

            def plain(b, h, i, j):
                at = base if not isinstance(base, torch.Tensor) or base.ndim == 0 else base[b]
                return torch.as_tensor(show(b, h, i, j, at))

            if "offset" in case.mask.text or "tensor" in case.mask.text or case.mask.per_head:
                return
            again = select_blocks(q, k, **{**options, "mask_mod": plain})
            if not torch.equal(again.visible.expand_as(again.kept), selection.visible.expand_as(selection.kept)):
                raise Wrong("a plain function shows other blocks than the mask")
            same_kept(again, selection, "the mask as a plain function")
        elif kind in ("chunks", "cuts") and case.mask is None and options.get("causal", True):
            if options.get("q_offset") is not None or Lq != Lk or config.budget == "density":
                return
            step = config.block_sizes[0] if kind == "chunks" else r.choice([1, 5, 8, 50, 100])
            if kind == "cuts":
                step = max(step, Lk // 6 + 1)
            state, begin, pools = PrefillState(), 0, config.pool != "queries"
            final = RRConfig.resolve(config, {"dense_last_rows": min(config.dense_last_rows, 1)})
            self.plain(options, final)
            whole = select_blocks(q, k, **options, config=final)
            while begin < Lk:
                end = min(begin + step, Lk)
                c = final if end == Lk else RRConfig.resolve(final, {"dense_last_rows": 0})
                o = {**options, "config": c, "q_offset": begin}
                with_state = select_blocks(q[:, :, begin:end], k[:, :, :end], **o, state=state if pools else None)
                without = select_blocks(q[:, :, begin:end], k[:, :, :end], **o)
                same_kept(with_state, without, f"a chunk {begin}:{end} with a state")
                if kind == "chunks" and c.min_length in (None, 0):
                    row = begin // step
                    n = with_state.kept.shape[3]
                    part = Picked(whole.kept[:, :, row : row + 1, :n], whole.mass[:, :, row : row + 1, :n])
                    same_kept(with_state, part, f"a chunk {begin}:{end} of the whole")
                begin = end
        elif kind == "config":
            o = {n: x for n, x in options.items() if n not in case.settings and n != "config"}
            same_kept(select_blocks(q, k, **o, config=config), selection, "the same as one config")
        elif kind == "block_mask":
            listed = create_rr_block_mask(q, k, **options).to_dense().bool()
            if not torch.equal(listed.expand_as(selection.kept), selection.kept):
                raise Wrong("create_rr_block_mask lists other blocks")
        elif kind == "mask_call" and case.mask is not None:
            pairs, _ = grid(case)
            base = options.get("q_offset")
            mask = mm.place(options["mask_mod"], Lk - Lq if base is None else base)
            b, h = torch.arange(B).view(-1, 1, 1, 1), torch.arange(Hq).view(1, -1, 1, 1)
            i, j = torch.arange(Lq).view(1, 1, -1, 1), torch.arange(Lk).view(1, 1, 1, -1)
            base = torch.as_tensor(Lk - Lq if base is None else column(base))
            if not torch.equal(
                torch.as_tensor(mask(b, h, i, j)).expand_as(pairs),
                torch.as_tensor(case.mask.show(b, h, i, j, base)).expand_as(pairs),
            ):
                raise Wrong("the placed mask's pairs are not the documented ones")

    @staticmethod
    def estimate(case: Case, config: RRConfig, options: dict) -> None:
        """Steps 1 to 4 of the method as they are described, in float64."""
        B, Hq, Lq, D = case.q.shape
        Hkv, Lk = case.k.shape[1:3]
        qb, kb = config.block_sizes
        sq, sk = config.strides
        if config.pool == "both" or Lq % qb:
            return
        scale = options.get("scale")
        scale = 1 / math.sqrt(D) if scale is None else scale
        cap = options.get("softcap")
        selection = select_blocks(case.q.detach(), case.k.detach(), **options)
        q, k = case.q.detach().double(), case.k.detach().double().repeat_interleave(Hq // Hkv, 1)
        cut = lambda x: x if cap is None else cap * torch.tanh(x / cap)  # noqa: E731
        if config.pool == "queries":
            if config.order == 2:
                return
            rows = config.tokens_per_pooled_query
            logits = cut(q.unflatten(2, (-1, rows)).mean(3) @ k.mT * scale)
            groups, per = torch.arange(Lk) // kb, qb // rows
        else:
            n = -(-Lk // sk)
            padded = torch.nn.functional.pad(k, (0, 0, 0, n * sk - Lk)).unflatten(2, (n, sk))
            count = torch.full((n,), float(sk), dtype=torch.float64)
            count[-1] = Lk - (n - 1) * sk
            mean = padded.sum(3) / count.view(-1, 1)
            h = torch.arange(Hq) + int(options.get("head_offset", 0))
            token = torch.arange(Lq // sq).view(1, -1) * sq + (h % sq).view(-1, 1)
            sampled = q.gather(2, token.view(1, Hq, -1, 1).expand(B, -1, -1, D))
            logits = cut(sampled @ mean.mT * scale)
            if config.order == 2:
                if cap is not None:
                    return
                square = (padded**2).sum(3) / count.view(-1, 1) - mean**2
                weight = 0.5 if config.variance_weight is None else config.variance_weight
                logits = logits + weight * (sampled**2 @ square.mT) * scale**2
            logits = logits + count.log()
            groups, per = torch.arange(n) * sk // kb, qb // sq
        p = logits.softmax(-1).unflatten(2, (-1, per)).sum(3)
        mass = torch.zeros(*p.shape[:3], -(-Lk // kb), dtype=p.dtype).index_add_(3, groups, p)
        share = mass / mass.sum(-1, keepdim=True)
        ours = selection.mass.double()
        if ours.sum() == 0:
            return  # dense
        gap = float((ours / ours.sum(-1, keepdim=True).clamp(min=1e-30) - share).abs().max())
        size = float(logits.amax() - logits.amin())
        allowed = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[case.q.dtype] * (1 + size)
        if gap > allowed:
            raise Wrong(f"the estimate is {gap:.3g} off (logits span {size:.3g}, {case.q.dtype})")

    @staticmethod
    def plain(options: dict, config: RRConfig) -> dict[str, Any]:
        for name in list(options):
            if name in RRConfig.__dataclass_fields__ or name in ("preset", "config"):
                del options[name]
        return {"config": config}


@dataclass
class Picked:
    kept: torch.Tensor
    mass: torch.Tensor


def hunt(
    calls: int, seed: int, only: int | None = None, until: float = math.inf, compiled: int = 0, quiet=False
) -> Hunt:
    hunter = Hunt(seed, compiled)
    began, told = time.monotonic(), 0.0
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for n in range(calls) if only is None else [only]:
            if time.monotonic() - began > until:
                break
            known = len(hunter.wrong)
            hunter.one(n)
            for wrong in hunter.wrong[known:]:
                sort = re.sub(r"[\d.]+", "#", wrong[1])
                hunter.sorts[sort] += 1
                if not quiet and hunter.sorts[sort] <= 3:
                    print(f"\n#{wrong[0]}: {wrong[1]}\n    {wrong[2]}", flush=True)
            if not quiet and time.monotonic() - told > 20:
                told = time.monotonic()
                print(f"{n + 1} calls, {told - began:.0f} s, {len(hunter.wrong)} wrong", flush=True)
    return hunter


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one call by its number")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--compiled", type=int, default=0, help="calls from within torch.compile(backend='eager')")
    args = parser.parse_args()
    hunter = hunt(args.calls, args.seed, args.only, args.seconds, args.compiled)
    print(f"\n{sum(hunter.counts.values())} calls")
    for name, count in hunter.counts.most_common():
        print(f"{count:7} {name}")
    print("errors")
    for name, count in hunter.errors.most_common():
        print(f"{count:7} {name}")
    print(f"slowest: call {hunter.slowest[1]}, {hunter.slowest[0]:.1f} s")
    for name, count in hunter.sorts.most_common():
        print(f"{count:7} WRONG {name}")
    print(f"{len(hunter.wrong)} wrong: {[n for n, *_ in hunter.wrong]}")
    return 1 if hunter.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
