"""The ranks of a benchmark run: their clock, their meshes, and where rows go."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.environment import describe
from rr_flex.distributed import make_mesh

LONGEST = 1500  # milliseconds of timed calls after which no further one begins


class Run:
    """The processes, their clock and where rows go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.sequence = make_mesh(sequence=int(options.world), device=options.device, timeout=options.timeout)
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.heads = init_device_mesh(options.device, (self.ranks,), mesh_dim_names=("heads",))
        self.planes = [
            init_device_mesh(options.device, (heads, self.ranks // heads), mesh_dim_names=("heads", "sequence"))
            for heads in range(1, self.ranks + 1)
            if self.ranks % heads == 0
        ]
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.start = time.perf_counter()
        self.about = describe(self.device, options.commit) | {"ranks": self.ranks}
        if self.device.type == "cuda":
            self.about["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))

    def largest(self, *values: float) -> list[float]:
        """Of all ranks."""
        x = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x.tolist()

    def total(self, *values: float) -> list[float]:
        x = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(x)
        return x.tolist()

    @property
    def over(self) -> bool:
        """Whether the time is spent, the same on every rank."""
        return self.largest(time.perf_counter() - self.start)[0] > self.options.seconds

    def time(self, call: Callable[[], Any], first: Callable[[], Any] | None = None) -> tuple[Any, list[float]]:
        """The call's result and milliseconds of some calls, each the slowest rank's, after a `first` that compiles."""
        result, times = (first or call)(), []
        self.synchronize()
        while len(times) < self.options.calls and sum(times) <= LONGEST:
            result = None
            dist.barrier()
            self.synchronize()
            begin = time.perf_counter()
            result = call()
            self.synchronize()
            times.append(self.largest(1000 * (time.perf_counter() - begin))[0])
        return result, times

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def write(self, row: dict[str, Any]) -> None:
        if self.rank == 0:
            with Path(self.options.output).open("a") as stream:
                stream.write(json.dumps(self.about | row) + "\n")
            shown = {name: value for name, value in row.items() if value is not None}
            print(f"{time.perf_counter() - self.start:4.0f} s {shown}", file=sys.stderr, flush=True)
