"""Ragged prompts packed into one call, beside FlashAttention's varlen call on the same and beside a call a prompt."""

import argparse
from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
from torch import Tensor

from benchmarks.server import Row, Server, dense_kernel, median_host_ms
from benchmarks.timing import measure_in_turns
from benchmarks.workloads import Inputs
from rr_flex import RRConfig, attention, rr_attention_packed

# Prompts, and the least and most tokens of one: short ones, and such as reach over the break-even.
PACKS = ((64, (500, 4000)), (8, (8000, 32000)))
DENSITIES = (0.25, 0.5)
REPEATS = (3, 10)


def rows(server: Server, options: argparse.Namespace) -> Iterator[Row]:
    """A row a pack, density and backend, as it is called: each prompt dense or sparse as it would be alone."""
    generator = torch.Generator().manual_seed(server.seed)
    for prompts, (least, most) in packs(server, options):
        lengths = torch.randint(least, most + 1, (prompts,), generator=generator).tolist()
        inputs = server.inputs(1, sum(lengths))
        name, dense = varlen(lengths, server.device)
        for backend in server.backends:
            for density in options.densities or DENSITIES:
                settings = {"budget": "density", "target_density": density, "dense_last_rows": 0}
                config = RRConfig(order=2, query_stride=16, key_stride=8, **settings)

                def packed(_: int, config=config, backend=backend, inputs=inputs, lengths=lengths) -> Tensor:
                    return rr_attention_packed(*inputs, lengths, config=config, backend=backend)

                server.progress.step(f"{prompts} prompts, density {density}, {backend}")
                before = attention.calls.copy()
                packed(0)
                ran = attention.calls - before
                times = {"sets": 1, "device": server.device, "seconds": server.seconds, "repeats": REPEATS}
                calls = [packed, lambda _, dense=dense, inputs=inputs: dense(inputs)]
                sparse, beside = measure_in_turns(calls, **times)
                yield {
                    "suite": "packed",
                    "failed": None,
                    "prompts": prompts,
                    "tokens": sum(lengths),
                    "sparse_prompts": prompts - ran["dense"],
                    "backend": backend,
                    "wanted_density": density,
                    "ms": sparse.median,
                    "host_ms": median_host_ms(packed, server.device),
                    "dense": name,
                    "dense_ms": beside.median,
                    **server.about,
                }


def packs(server: Server, options: argparse.Namespace) -> list[tuple[int, tuple[int, int]]]:
    """Those of PACKS whose prompts are no longer than the server's longest, of so many prompts as were asked for."""
    fitting = [(prompts, lengths) for prompts, lengths in PACKS if lengths[1] <= server.length]
    return [(options.prompts or prompts, lengths) for prompts, lengths in fitting]


def varlen(lengths: list[int], device: torch.device) -> tuple[str, Callable[[Inputs], Tensor]]:
    """Dense attention of each prompt to itself: one varlen call where FlashAttention 4 is, else a call a prompt."""
    name, attend = dense_kernel(device)
    if name != "fa4":

        def one_by_one(inputs: Inputs) -> Tensor:
            prompts = zip(*(x.split(lengths, 2) for x in inputs), strict=True)
            return torch.cat([attend(*prompt) for prompt in prompts], 2)

        return f"{name}, a call a prompt", one_by_one
    from flash_attn.cute import flash_attn_varlen_func

    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    longest = max(lengths)

    def together(inputs: Inputs) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in inputs)  # tokens H D
        sizes = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
        out = flash_attn_varlen_func(q, k, v, **sizes, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return "fa4 varlen", together
