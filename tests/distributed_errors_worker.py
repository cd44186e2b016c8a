"""One of two processes that are asked for what cannot be, and of which the second then dies."""

import os
import sys
import time

import torch
import torch.distributed as dist

from rr_flex.distributed import Shards, context_parallel, head_parallel, make_mesh, ring, ulysses, zigzag

TIMEOUT = 30


def raised(call, kind):
    try:
        call()
    except kind as error:
        print(f"{kind.__name__}: {error}", flush=True)
        return
    raise SystemExit(f"{kind.__name__} must be raised")


def main() -> None:
    mesh = make_mesh(sequence=2, device="cpu", timeout=TIMEOUT)
    shards = Shards(mesh, zigzag(512, 2))
    q, k, v = (torch.randn(1, heads, 256, 16) for heads in (4, 2, 2))
    rank = dist.get_rank()
    # Wrong on one rank, told on both.
    raised(lambda: context_parallel(q, k[:, :, rank:], v, shards), (RuntimeError, ValueError)[rank])
    raised(lambda: context_parallel(q, k, v, shards, tau=0.5 + 0.1 * rank), ValueError)
    raised(lambda: context_parallel(q, k, v, shards, fetch=("all", "kept")[rank]), ValueError)
    raised(lambda: ulysses(q, k, v, shards, sinks=torch.zeros(4 - rank)), (RuntimeError, ValueError)[rank])
    # Wrong on every rank.
    raised(lambda: ring(q, k, v, shards), NotImplementedError)
    raised(lambda: context_parallel(q, k, v, shards, budget="density"), NotImplementedError)
    raised(lambda: context_parallel(q, k, v, shards, sinks=torch.zeros(4)), TypeError)
    raised(lambda: context_parallel(q, k, v, shards, fetch="some"), ValueError)
    raised(lambda: head_parallel(q, k, v, shards), ValueError)
    raised(lambda: ulysses(q[:, :1], k[:, :1], v[:, :1], shards), ValueError)
    raised(lambda: Shards(mesh, zigzag(512, 4)), ValueError)
    dist.barrier()
    if rank == 1:
        os._exit(0)
    start = time.perf_counter()
    raised(lambda: context_parallel(q, k, v, shards), RuntimeError)
    print(f"after {time.perf_counter() - start:.1f} s", flush=True)
    sys.stdout.flush()
    os._exit(0)  # not to wait for the other in destroy_process_group
