"""Ragged prompts packed into one call, beside FlashAttention's varlen call on the same and beside a call a prompt."""

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.server import Row, Server, dense_kernel, median_host_ms
from benchmarks.timing import measure_in_turns
from benchmarks.workloads import Inputs
from mask_mods import document, documents_from_lengths
from rr_flex import RRConfig, rr_attention, select_blocks

PROMPTS, LENGTHS = 64, (500, 4000)  # and the least and most tokens of one
DENSITIES = (0.25, 0.5)
REPEATS = (3, 10)


def rows(server: Server, options: argparse.Namespace) -> Iterator[Row]:
    prompts = options.prompts or PROMPTS
    generator = torch.Generator().manual_seed(server.seed)
    lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (prompts,), generator=generator)
    total = int(lengths.sum())
    inputs = server.inputs(1, total)
    name, dense = varlen(lengths, server.device)
    ids = documents_from_lengths(lengths.to(server.device), total)
    for backend in server.backends:
        for density in options.densities or DENSITIES:
            settings = {"budget": "density", "target_density": density, "min_length": 0, "dense_last_rows": 0}
            config = RRConfig(order=2, query_stride=16, key_stride=8, **settings)

            def packed(_: int, config=config, backend=backend) -> Tensor:
                return rr_attention(*inputs, mask_mod=document(ids), causal=True, config=config, backend=backend)

            server.progress.step(f"{prompts} prompts, density {density}, {backend}")
            times = {"sets": 1, "device": server.device, "seconds": server.seconds, "repeats": REPEATS}
            sparse, beside = measure_in_turns([packed, lambda _: dense(inputs)], **times)
            found = select_blocks(inputs.q, inputs.k, mask_mod=document(ids), causal=True, config=config)
            yield {
                "suite": "packed",
                "failed": None,
                "prompts": prompts,
                "tokens": total,
                "backend": backend,
                "wanted_density": density,
                "density": found.density.item(),
                "ms": sparse.median,
                "host_ms": median_host_ms(packed, server.device),
                "dense": name,
                "dense_ms": beside.median,
                **server.about,
            }


def varlen(lengths: Tensor, device: torch.device) -> tuple[str, Callable[[Inputs], Tensor]]:
    """Dense attention of each prompt to itself: one varlen call where FlashAttention 4 is, else a call a prompt."""
    ends = lengths.cumsum(0)
    name, attend = dense_kernel(device)
    if name != "fa4":
        slices = [slice(int(end - length), int(end)) for end, length in zip(ends, lengths, strict=True)]

        def one_by_one(inputs: Inputs) -> Tensor:
            return torch.cat([attend(*(x[:, :, part] for x in inputs)) for part in slices], 2)

        return f"{name}, a call a prompt", one_by_one
    from flash_attn.cute import flash_attn_varlen_func

    starts = torch.cat([ends.new_zeros(1), ends]).int().to(device)
    longest = int(lengths.max())

    def together(inputs: Inputs) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in inputs)  # tokens H D
        sizes = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
        out = flash_attn_varlen_func(q, k, v, **sizes, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return "fa4 varlen", together
