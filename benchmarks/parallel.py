"""Prefill on several cards: `torchrun --nproc-per-node N -m benchmarks.parallel`, one JSON line a way and shape.

Every way on the same structured q, k, v in the same run: heads, Ulysses, context parallel that fetches kept blocks or
gathers all, a mesh of heads × sequence, ring, one card, and dense attention over the same ranks. Times are the slowest
rank's, from a barrier to its end.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.environment import describe
from benchmarks.workloads import Shape, structured
from rr_flex import RRConfig, rr_attention, select_blocks
from rr_flex.distributed import Account, Shards, context_parallel, head_parallel, make_mesh, ring, ulysses, zigzag
from rr_flex.distributed.asked import check_asked
from rr_flex.distributed.context import attend_strip, choose_blocks
from rr_flex.distributed.far_rows import attend_far_rows
from rr_flex.distributed.fetch import Deliveries
from rr_flex.distributed.local import Local, prepare
from rr_flex.kernels.dense import dense_attention

K = 1024
RULES = {
    "coarse": RRConfig(order=2, query_stride=16, key_stride=8, budget="threshold", min_length=0),
    "best": RRConfig.from_preset("best", min_length=0),
}
BISECTIONS = 8
LONGEST = 1500  # milliseconds of timed calls after which no further one begins


class Run:
    """The processes, their clock and where rows go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.sequence = make_mesh(sequence=int(options.world), device=options.device, timeout=options.timeout)
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.heads = init_device_mesh(options.device, (self.ranks,), mesh_dim_names=("heads",))
        self.plane = None
        if self.ranks % 2 == 0:
            sizes = 2, self.ranks // 2
            self.plane = init_device_mesh(options.device, sizes, mesh_dim_names=("heads", "sequence"))
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

    def time(self, call: Callable[[], Any]) -> tuple[Any, list[float]]:
        """The call's result and milliseconds of some calls, each the slowest rank's, after one that compiles."""
        result, times = call(), []
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


class Prompt:
    """One length's tensors: the whole ones while some way needs them, and each way's part."""

    def __init__(self, run: Run, length: int) -> None:
        Hq, Hkv = run.options.heads
        self.run, self.length, self.shape = run, length, (Hq, Hkv, run.options.head_dim)
        dtype = getattr(torch, run.options.dtype)
        whole = structured(Shape(length, Hq, Hkv, run.options.head_dim), dtype=dtype, device=run.device, seed=0)
        self.layout = zigzag(length, run.ranks)
        self.shards = Shards(run.sequence, self.layout)
        self.part = [self.layout.take(x, self.shards.place).contiguous() for x in whole]
        # One card and head parallelism work on whole sequences; very long ones leave no room for both.
        self.whole = list(whole) if length <= run.options.most_whole else None
        self.exact = None  # one card's output, where outputs are compared

    def local(self, config: RRConfig, **options: Any) -> Local:
        asked = check_asked(*self.part, self.shards, {"config": config, **options}, {"fetch"})
        return prepare(*self.part, self.shards, asked)

    def at_density(self, config: RRConfig, wanted: float) -> RRConfig:
        """The threshold that keeps `wanted` of the visible blocks, all ranks together."""
        low, high = 1e-7, 0.5
        for _ in range(BISECTIONS):
            config = replace(config, threshold=(low * high) ** 0.5)
            more = density_of(self, config)["density"] > wanted
            low, high = (config.threshold, high) if more else (low, config.threshold)
        return config


def density_of(prompt: Prompt, config: RRConfig) -> dict[str, float]:
    """Of all ranks' blocks together, and the threshold that gave it."""
    account = Account()
    choose_blocks(prompt.local(config, account=account))
    kept, visible = prompt.run.total(float(sum(account.kept)), float(sum(account.visible)))
    return {"threshold": config.threshold, "density": kept / visible}


def ways(prompt: Prompt) -> dict[str, Callable[[RRConfig, Account], Tensor]]:
    """Each way as a call of a config and an account."""
    run, found = prompt.run, {}
    backends = ("auto", "triton") if run.device.type == "cuda" else ("auto",)
    if prompt.whole is not None:
        for backend in backends:
            found[named("one card", backend)] = lambda c, a, b=backend: rr_attention(*prompt.whole, config=c, backend=b)
        heads = Shards(run.heads)
        own = [heads.heads(x).contiguous() for x in prompt.whole]
        found["heads"] = lambda c, a: head_parallel(*own, heads, config=c)
    found["ulysses"] = lambda c, a: ulysses(*prompt.part, prompt.shards, config=c, account=a)
    for backend in backends:
        for fetch in ("kept", "all"):
            how = {"fetch": fetch, "backend": backend}
            found[named(fetch, backend)] = lambda c, a, how=how: context_parallel(
                *prompt.part, prompt.shards, config=c, account=a, **how
            )
        if run.device.type == "cuda":
            found[named("ring", backend)] = lambda c, a, b=backend: ring(
                *prompt.part, prompt.shards, config=c, account=a, backend=b
            )
    if run.plane is not None and prompt.length <= run.options.most_checked and prompt.whole is not None:
        plane = prompt.of_plane = Shards(run.plane, zigzag(prompt.length, run.ranks // 2))
        part = [plane.layout.take(plane.heads(x), plane.place).contiguous() for x in prompt.whole]
        found["2 heads × sequence"] = lambda c, a: context_parallel(*part, plane, config=c, account=a)
    return {name: way for name, way in found.items() if name in run.options.ways or not run.options.ways}


def named(way: str, backend: str) -> str:
    return way if backend == "auto" else f"{way}, {backend}"


def exact_part(prompt: Prompt, name: str) -> Tensor | None:
    """What the way's output should be: one card's, of this rank's heads or tokens."""
    if prompt.exact is None or name.startswith("one card"):
        return prompt.exact
    if name == "heads":
        count = prompt.exact.shape[1] // prompt.run.ranks
        return prompt.exact[:, prompt.run.rank * count : (prompt.run.rank + 1) * count]
    plane = prompt.of_plane if name == "2 heads × sequence" else prompt.shards
    return plane.layout.take(plane.heads(prompt.exact), plane.place)


def measure(prompt: Prompt, name: str, way: Callable, config: RRConfig) -> dict[str, Any]:
    run = prompt.run
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    account = Account()
    alone = name.startswith("one card")

    def call() -> Tensor | None:
        account.__init__()
        return None if alone and run.rank else way(config, account)

    out, times = run.time(call)
    row = {"way": name, "ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times)}
    peak = torch.cuda.max_memory_allocated() if run.device.type == "cuda" else 0
    moved = run.largest(peak, account.fetched, account.selecting, account.all_gather)
    row |= dict(zip(("peak_bytes", "fetched_bytes", "selecting_bytes", "all_gather_bytes"), moved, strict=True))
    if account.ways:
        own = float(sum(account.kept))
        row["balance"] = run.largest(own)[0] / (run.total(own)[0] / run.ranks)
        row["strips_by_block"] = account.ways.count("kept") / max(1, len(account.ways))
    exact = exact_part(prompt, name)
    if exact is not None:
        out = exact if out is None else out
        off, size = run.total((out - exact).float().square().sum(), exact.float().square().sum())
        row["error"] = (off / size) ** 0.5
    return row


def stages(prompt: Prompt, config: RRConfig) -> dict[str, Any]:
    """Milliseconds of what context parallel does, each by itself: choosing, either transfer, attention."""
    run, found = prompt.run, {}
    (chosen, all_keys), times = run.time(lambda: choose_blocks(prompt.local(config)))
    found["choose_ms"] = statistics.median(times)
    for fetch in ("kept", "all"):
        local = prompt.local(config, fetch=fetch)

        def travel(local=local):
            sent = Deliveries(local, [kept for kept, _ in chosen], all_keys)
            return [[x.shape for x in sent.start(number)()] for number in range(len(local.strips))]

        found[f"{fetch}_transfer_ms"] = statistics.median(run.time(travel)[1])
    heads = local.strips[0][0]
    kv = Deliveries(local, [], all_keys).start(0)()

    def attend() -> list[Tensor]:
        return [attend_strip(local, heads, kv, *each) for each in zip(local.chunks, chosen, strict=True)]

    found["attend_strip_ms"] = statistics.median(run.time(attend)[1])
    if local.first_far < local.count:
        out = torch.empty_like(local.q)
        found["far_rows_ms"] = statistics.median(run.time(lambda: attend_far_rows(local, out))[1])
    return found | {"way": "stages", "strips": len(local.strips)}


def blocks_that_differ(prompt: Prompt, config: RRConfig) -> dict[str, Any]:
    """How many blocks all ranks together keep otherwise than one card does."""
    local, size = prompt.local(config), config.block_sizes[0]
    expected = select_blocks(*prompt.whole[:2], config=config).kept
    differing = 0
    for chunk, (kept, _) in zip(local.chunks, choose_blocks(local)[0], strict=True):
        rows = expected[:, :, chunk.start // size : -(-chunk.stop // size)]
        differing += int((rows[..., : kept.shape[3]] != kept).sum()) + int(rows[..., kept.shape[3] :].sum())
    differ, kept = prompt.run.total(float(differing), float(expected.sum()))
    return {"way": "blocks that differ", "differ": differ, "of_kept": kept / prompt.run.ranks}


def dense_ways(prompt: Prompt) -> dict[str, Callable[[], Tensor]]:
    """Dense attention over the same ranks: all-to-all to heads and the fastest dense kernel, and on one card."""
    from benchmarks.parallel_dense import dense_context, dense_ulysses

    run, found = prompt.run, {}
    if prompt.length <= run.options.most_dense:
        found["dense ulysses"] = lambda c, a: dense_ulysses(*prompt.part, prompt.shards)
    if run.device.type == "cuda" and prompt.length <= run.options.most_whole:
        found["dense context"] = lambda c, a: dense_context(*prompt.part, prompt.shards)
    if prompt.whole is not None and prompt.length <= run.options.most_dense:
        whole = {"causal": True, "scale": None, "flash": run.device.type == "cuda"}
        found["one card, dense"] = lambda c, a: dense_attention(*prompt.whole, **whole)
    return found


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    run = Run(parser().parse_args(arguments))
    if run.options.eager:
        torch.compiler.set_stance("force_eager")
    for length in run.options.lengths:
        for row in rows_of(Prompt(run, length)):
            run.write(row)
            if run.over:
                return finish()
    return finish()


def rows_of(prompt: Prompt) -> Iterator[dict[str, Any]]:
    """Of one length: every density and way, then dense attention."""
    options = prompt.run.options
    shape = dict(zip(("heads", "kv_heads", "head_dim"), prompt.shape, strict=True))
    shape |= {"length": prompt.length, "dtype": options.dtype, "rule": options.rule}
    checked = prompt.length <= options.most_checked and prompt.whole is not None
    found = ways(prompt)
    for wanted in options.densities:
        config = prompt.at_density(RULES[options.rule], wanted)
        facts = shape | {"wanted_density": wanted} | density_of(prompt, config)
        if checked:
            yield facts | attempt("blocks that differ", lambda c=config: blocks_that_differ(prompt, c))
            prompt.exact = rr_attention(*prompt.whole, config=config)
        for name, way in found.items():
            yield facts | attempt(name, lambda n=name, w=way, c=config: measure(prompt, n, w, c))
        if options.stages:
            yield facts | attempt("stages", lambda c=config: stages(prompt, c))
    prompt.exact, found = None, {}
    for name, way in dense_ways(prompt).items() if options.dense else ():
        yield shape | attempt(name, lambda n=name, w=way: measure(prompt, n, w, RULES[options.rule]))


def attempt(name: str, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row, or what stopped it, on all ranks alike: memory that runs out, a kernel that is not installed."""
    try:
        return call()
    except Exception as error:
        traceback.print_exc()
        first_line = (str(error).strip().splitlines() or [""])[0][:200]
        return {"way": name, "stopped": f"{type(error).__name__}: {first_line}"}


def finish() -> int:
    dist.barrier()
    dist.destroy_process_group()
    return 0


def parser() -> argparse.ArgumentParser:
    import os

    parser = argparse.ArgumentParser(prog="torchrun ... -m benchmarks.parallel", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[128 * K, 512 * K, 1024 * K])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.05, 0.25])
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("Hq", "Hkv"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rule", choices=sorted(RULES), default="coarse")
    parser.add_argument("--ways", nargs="*", default=[], help="all unless given")
    parser.add_argument("--no-dense", dest="dense", action="store_false")
    parser.add_argument("--most-whole", type=int, default=1024 * K, help="tokens up to which one card holds all")
    parser.add_argument("--most-checked", type=int, default=128 * K, help="tokens up to which outputs are compared")
    parser.add_argument("--calls", type=int, default=3, help="timed ones at most")
    parser.add_argument("--timeout", type=float, default=60, help="seconds that a rank waits for another")
    parser.add_argument("--no-stages", dest="stages", action="store_false")
    parser.add_argument("--most-dense", type=int, default=512 * K, help="tokens up to which one card is dense")
    parser.add_argument("--seconds", type=float, default=500, help="no way begins after so many")
    parser.add_argument("--eager", action="store_true", help="uncompiled: a dry run, no times to report")
    parser.add_argument("--output", default="parallel.jsonl")
    parser.add_argument("--commit", help="where there is no git history")
    parser.add_argument("--world", default=os.environ.get("WORLD_SIZE", "1"), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
