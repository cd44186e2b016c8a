"""Many ranks on one card, one after the other: `torchrun --nproc-per-node N -m benchmarks.parallel_turns`.

For hosts with fewer cards than ranks. The ranks talk through gloo; outputs and kept blocks are compared with one
process's. Then each rank calls again by itself, with what came from the others replayed from memory: the time of all
that a rank does but the transfers, which a copy within the card stands for.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import parallel
from benchmarks.parallel_ways import LONGEST, RULES, Prompt, Run, density_of, exact_part, ways
from rr_flex import rr_attention
from rr_flex.distributed import Account, Shards, far_rows, transfer


class Arrived:
    """A transfer that is over."""

    def wait(self) -> None:
        pass


class Tape:
    """What collectives gave this rank: recorded once, and replayed in the same order."""

    def __init__(self) -> None:
        self.mode, self.items, self.place = "live", [], 0
        self.gather = self.taped(transfer.all_gather)
        transfer.all_gather = far_rows.all_gather = self.gather
        dist.all_reduce, dist.all_to_all_single = self.taped(dist.all_reduce), self.taped(dist.all_to_all_single)
        sys.modules["rr_flex.distributed.ring"].pass_on = self.pass_on  # gloo has no send for what lies on a card

    def taped(self, collective: Callable) -> Callable:
        def call(out: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Arrived | None:
            if self.mode == "replay":
                out.copy_(self.items[self.place])
                self.place += 1
            else:
                through_host(collective, out, *args, **kwargs)
                if self.mode == "record":
                    self.items.append(out.clone())
            return Arrived() if async_op else None

        return call

    def pass_on(self, here: list[Tensor], shards: Shards) -> tuple[list[Tensor], list]:
        ranks, before = shards.ranks("sequence"), (shards.place - 1) % shards.ranks("sequence")
        coming = []
        for x in here:
            everybody = x.new_empty(ranks * x.shape[0], *x.shape[1:])
            self.gather(everybody, x, group=shards.group("sequence"))
            coming.append(everybody.unflatten(0, (ranks, -1))[before].clone())
        return coming, []

    def record(self, call: Callable[[], Tensor]) -> Tensor:
        self.mode, self.items = "record", []
        out = call()
        self.mode = "live"
        return out

    def replay(self, call: Callable[[], Tensor]) -> Tensor:
        self.mode, self.place = "replay", 0
        out = call()
        self.mode = "live"
        return out


def through_host(collective: Callable, out: Tensor, *args: Any, **kwargs: Any) -> None:
    """The collective between processes that share a card, on copies that gloo can read."""
    if out.device.type == "cpu":
        collective(out, *args, **kwargs)
        return
    reduces = not args or not isinstance(args[0], Tensor)
    if reduces:
        copy = out.float().cpu() if out.dtype == torch.bfloat16 else out.cpu()
        collective(copy, *args, **kwargs)
        out.copy_(copy)
        return
    bits = torch.float16 if out.dtype == torch.bfloat16 else out.dtype  # moved, never read as numbers
    copy = torch.empty(out.shape, dtype=bits)
    collective(copy, args[0].cpu().view(bits), *args[1:], **kwargs)
    out.copy_(copy.view(out.dtype))


def in_turns(run: Run, call: Callable[[], Any], ranks: int) -> list[float]:
    """Milliseconds of the first `ranks` ranks, each alone: the median of some calls after one more."""
    found = torch.zeros(run.ranks, dtype=torch.float64, device=run.device)
    for rank in range(ranks):
        dist.barrier()
        if run.rank != rank:
            continue
        times = []
        while len(times) <= run.options.calls and sum(times) <= LONGEST:
            run.synchronize()
            begin = time.perf_counter()
            call()
            run.synchronize()
            times.append(1000 * (time.perf_counter() - begin))
        found[rank] = statistics.median(times[1:] or times)
    dist.barrier()
    dist.all_reduce(found)
    return found.tolist()[:ranks]


def row_of(prompt: Prompt, tape: Tape, name: str, way: Callable, config: Any) -> dict[str, Any]:
    run, account = prompt.run, Account()
    alone = name.startswith("one card")
    row = {"way": name, "in_turns": True}
    exact = exact_part(prompt, name)
    if not alone:
        out = tape.record(lambda: way(config, account))
        names = ("fetched_bytes", "selecting_bytes", "all_gather_bytes")
        row |= zip(names, run.largest(account.fetched, account.selecting, account.all_gather), strict=True)
        if account.kept:
            own = float(sum(account.kept))
            row["balance"] = run.largest(own)[0] / (run.total(own)[0] / run.ranks)
        if exact is not None:
            off, size = run.total((out - exact).float().square().sum(), exact.float().square().sum())
            row["error"] = (off / size) ** 0.5
        del out
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    call = lambda: way(config, Account())  # noqa: E731
    times = in_turns(run, call if alone else lambda: tape.replay(call), 1 if alone else run.ranks)
    peak = torch.cuda.max_memory_allocated() - sum(x.nbytes for x in tape.items) if run.device.type == "cuda" else 0
    tape.items = []
    return row | {"rank_ms": times, "ms": max(times), "peak_bytes": run.largest(float(peak))[0]}


def rows_of(prompt: Prompt, tape: Tape) -> Iterator[dict[str, Any]]:
    options, found = prompt.run.options, ways(prompt)
    shape = dict(zip(("heads", "kv_heads", "head_dim"), prompt.shape, strict=True))
    shape |= {"length": prompt.length, "dtype": options.dtype, "rule": options.rule}
    for wanted in options.densities:
        config = prompt.at_density(RULES[options.rule], wanted)
        facts = shape | {"wanted_density": wanted} | density_of(prompt, config)
        if prompt.length <= options.most_checked:
            yield facts | parallel.attempt("differ", lambda c=config: parallel.blocks_that_differ(prompt, c))
            prompt.exact = rr_attention(*prompt.whole, config=config)
        for name, way in found.items():
            tape.mode = "live"
            yield facts | parallel.attempt(name, lambda n=name, w=way, c=config: row_of(prompt, tape, n, w, c))
        prompt.exact = None


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    options = parallel.parser().parse_args(arguments)
    dist.init_process_group("gloo", timeout=timedelta(seconds=2 * options.timeout))
    if options.device == "cuda":
        os.environ["LOCAL_RANK"] = "0"
        torch.zeros((), device="cuda:0")
    run, tape = Run(options), Tape()
    if options.eager:
        torch.compiler.set_stance("force_eager")
    for length in options.lengths:
        for row in rows_of(Prompt(run, length), tape):
            run.write(row)
            if run.over:
                return parallel.finish()
    return parallel.finish()


if __name__ == "__main__":
    sys.exit(main())
