"""Prefill on several cards: `torchrun --nproc-per-node N -m benchmarks.parallel`, one JSON line a way and shape.

Every way on the same structured q, k, v in the same run: heads, Ulysses, context parallel that fetches kept blocks or
gathers all, a mesh of heads × sequence, ring, one card, and dense attention over the same ranks. Times are the slowest
rank's, from a barrier to its end.
"""

import argparse
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.parallel_run import Run
from benchmarks.parallel_ways import RULES, Prompt, dense_ways, density_of, exact_part, ways
from rr_flex import RRConfig, rr_attention, select_blocks
from rr_flex.cli import flags
from rr_flex.distributed import Account
from rr_flex.distributed.context import attend_strip, choose_blocks
from rr_flex.distributed.far_rows import attend_far_rows
from rr_flex.distributed.fetch import Deliveries

K = 1024


def measure(prompt: Prompt, name: str, way: Callable, config: RRConfig) -> dict[str, Any]:
    run = prompt.run
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if run.device.type == "cuda" else 0
    account = Account()
    alone = name.startswith("one card")

    def on_all() -> Tensor:
        account.__init__()
        return way(config, account)

    # What one card is timed on compiles on every rank: in the next way the others would be waited for.
    out, times = run.time((lambda: None) if alone and run.rank else on_all, on_all)
    row = {"way": name, "ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times)}
    peak = torch.cuda.max_memory_allocated() if run.device.type == "cuda" else 0
    most = run.largest(peak, held, account.fetched, account.selecting, account.all_gather)
    names = "peak_bytes", "held_bytes", "fetched_bytes", "selecting_bytes", "all_gather_bytes"
    row |= dict(zip(names, most, strict=True))
    if account.kept:
        own = float(sum(account.kept))
        row["balance"] = run.largest(own)[0] / (run.total(own)[0] / run.ranks)
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


def blocks_that_differ(prompt: Prompt, config: RRConfig, name: str | None = None) -> dict[str, Any]:
    """How many blocks all ranks together keep otherwise than one card does; `name`: of `prompt.arranged`."""
    local, size = prompt.local(config, name), config.block_sizes[0]
    expected = local.shards.heads(select_blocks(*prompt.whole[:2], config=config).kept)
    differing = 0
    for chunk, (kept, _) in zip(local.chunks, choose_blocks(local)[0], strict=True):
        rows = expected[:, :, chunk.start // size : -(-chunk.stop // size)]
        differing += int((rows[..., : kept.shape[3]] != kept).sum()) + int(rows[..., kept.shape[3] :].sum())
    differ, kept = prompt.run.total(float(differing), float(expected.sum()))
    found = {"way": "blocks that differ", "on": name or "sequence"}
    return found | {"differ": differ, "of_kept": kept / local.shards.ranks("sequence")}


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
        if prompt.whole is not None:
            prompt.balance(config)
        if checked:
            for name in (None, *prompt.arranged):
                yield facts | attempt("blocks that differ", lambda c=config, n=name: blocks_that_differ(prompt, c, n))
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
    parser = argparse.ArgumentParser(prog="torchrun ... -m benchmarks.parallel", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--lengths", type=flags.whole(1), nargs="+", default=[128 * K, 512 * K, 1024 * K])
    parser.add_argument("--densities", type=flags.share, nargs="+", default=[0.1, 0.05, 0.25])
    parser.add_argument("--heads", type=flags.whole(1), nargs=2, default=(32, 8), metavar=("Hq", "Hkv"))
    parser.add_argument("--head-dim", type=flags.whole(16, 16), default=128)
    parser.add_argument("--dtype", choices=flags.DTYPES, default="bfloat16")
    parser.add_argument("--rule", choices=sorted(RULES), default="coarse")
    parser.add_argument("--ways", nargs="*", default=[], help="all unless given")
    parser.add_argument("--no-dense", dest="dense", action="store_false")
    parser.add_argument(
        "--most-whole", type=flags.whole(0), default=1024 * K, help="tokens up to which one card holds all"
    )
    parser.add_argument(
        "--most-checked", type=flags.whole(0), default=128 * K, help="tokens up to which outputs are compared"
    )
    parser.add_argument("--calls", type=flags.whole(1), default=3, help="timed ones at most")
    parser.add_argument("--timeout", type=flags.positive, default=60, help="seconds that a rank waits for another")
    parser.add_argument("--no-stages", dest="stages", action="store_false")
    parser.add_argument(
        "--most-dense", type=flags.whole(0), default=512 * K, help="tokens up to which one card is dense"
    )
    parser.add_argument("--seconds", type=flags.positive, default=500, help="no way begins after so many")
    parser.add_argument("--eager", action="store_true", help="uncompiled: a dry run, no times to report")
    parser.add_argument("--output", type=flags.new_file, default="parallel.jsonl")
    parser.add_argument("--commit", help="where there is no git history")
    parser.add_argument("--world", default=os.environ.get("WORLD_SIZE", "1"), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
