"""Ragged prompts packed end to end, as a server's step has them: each selects and attends as it would alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rr_flex.attention import Asked, answer, count
from rr_flex.checks import (
    as_autocast_says,
    check_differentiable,
    check_queries_and_keys,
    check_sinks,
    check_values,
    gradient_wanted,
)
from rr_flex.config import RRConfig
from rr_flex.kernels.break_even import Work
from rr_flex.kernels.choose import Backend, check_backend, choose_kernel
from rr_flex.kernels.deciding import decider
from rr_flex.kernels.dense import dense_packed, which_flash
from rr_flex.request import Request, make_request

REQUESTED = ("causal", "scale", "softcap", "head_offset")  # of rr_attention's options, those of `make_request`


@as_autocast_says
def rr_attention_packed(
    q: Float[Tensor, "1 Hq queries D"],
    k: Float[Tensor, "1 Hkv keys D"],
    v: Float[Tensor, "1 Hkv keys Dv"],
    lengths: Sequence[int],
    *,
    key_lengths: Sequence[int] | None = None,
    config: RRConfig | None = None,
    backend: Backend = "auto",
    **options: Any,
) -> Float[Tensor, "1 Hq queries Dv"]:
    """`rr_attention` of each prompt by itself: of `lengths` queries, the last of `key_lengths` keys (None: of as many).

    Prompts for which dense attention is faster go through one call together (FlashAttention 4's; without it a call
    each), the others one by one, since each of them fills the device. So nothing depends on what a prompt is packed
    with, no graph on the packing, and nothing is as large as the square of the pack.
    Lengths are ints, known to the host. `options`: causal, scale, softcap, sinks, head_offset, and settings.
    ValueError, TypeError and the rest as `rr_attention`.
    """
    check_queries_and_keys(q, k)
    check_values(q, k, v)
    check_backend(backend, q)
    sizes = check_lengths(lengths, key_lengths, q, k)
    named = {name: options.pop(name) for name in REQUESTED if name in options}
    sinks = options.pop("sinks", None)
    check_sinks(q, sinks)
    check_differentiable(q, k, v, sinks)
    asked = Asked(RRConfig.resolve(config, options), sinks, backend=backend)
    request = replace(make_request(q, k, asked.config, named), sinks=sinks, backward=gradient_wanted(q, k, v))
    together = dense_ones(q, k, v, sizes, request, backend)
    flash = which_flash(q, k.shape[2], backend, backward=request.backward)
    settings = {"causal": request.causal, "scale": named.get("scale"), "flash": flash}
    if len(together) == len(sizes):
        return dense_packed((q, k, v), sizes, **settings)
    queries, keys = zip(*sizes, strict=True)
    prompts = list(zip(q.split(queries, 2), k.split(keys, 2), v.split(keys, 2), strict=True))
    out: dict[int, Tensor] = {}
    if together:
        pack = tuple(torch.cat(x, 2) for x in zip(*(prompts[number] for number in together), strict=True))
        dense = dense_packed(pack, [sizes[number] for number in together], **settings)
        out = dict(zip(together, dense.split([queries[number] for number in together], 2), strict=True))
    for number, prompt in enumerate(prompts):
        if number not in out:
            out[number] = answer(*prompt, asked, **named).out
    return torch.cat([out[number] for number in range(len(sizes))], 2)


def check_lengths(
    lengths: Sequence[int], key_lengths: Sequence[int] | None, q: Tensor, k: Tensor
) -> list[tuple[int, int]]:
    """(queries, keys) of each prompt; ValueError or TypeError where they are none of q and k."""
    given = {"lengths": lengths, "key_lengths": lengths if key_lengths is None else key_lengths}
    for (name, found), (tensor, x) in zip(given.items(), (("q", q), ("k", k)), strict=True):
        if not isinstance(found, Sequence) or not all(type(length) is int for length in found):
            raise TypeError(f"{name} must be a sequence of ints, got {found!r}")
        if x.shape[0] != 1:
            raise ValueError(f"{tensor} must be a batch of one for packed prompts, got {x.shape[0]}")
        if not found or min(found) < 1 or sum(found) != x.shape[2]:
            raise ValueError(f"{name} must be at least 1 and sum to {tensor}'s {x.shape[2]} tokens, got {list(found)}")
    if len(given["lengths"]) != len(given["key_lengths"]):
        raise ValueError(f"key_lengths must be as many as lengths, {len(lengths)}, got {len(given['key_lengths'])}")
    sizes = list(zip(*given.values(), strict=True))
    for queries, keys in sizes:
        if queries > keys:
            raise ValueError(f"key_lengths must be at least lengths, got {keys} for {queries}")
    return sizes


def dense_ones(
    q: Tensor, k: Tensor, v: Tensor, sizes: list[tuple[int, int]], request: Request, backend: Backend
) -> list[int]:
    """The prompts that a dense kernel answers, counted."""
    if not request.plain_softmax:
        return []
    decide = decider(choose_kernel(backend, q, v, request), q, request.config, fused=True)
    heads = {"batch": 1, "heads": q.shape[1], "kv_heads": k.shape[1]}
    found = []
    for number, (queries, keys) in enumerate(sizes):
        first = keys - queries if request.causal else None
        if not decide(Work(**heads, queries=queries, keys=keys, first_position=first)).sparse:
            found.append(number)
            count("dense")
    return found
