"""Kernel options by trial, and the costs by which a call is dense or sparse: the library's tuned.json."""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import dense_kernels as dense
from benchmarks import stages, work_suite
from benchmarks.bench import Bench
from benchmarks.cases import COARSE_QUERIES, Case
from benchmarks.environment import describe
from benchmarks.server import Server
from benchmarks.timing import OutOfTime, Progress
from rr_flex.kernels.flash import flash_is_installed
from rr_flex.kernels.options import TUNED
from rr_flex.level import level_per_head

PARTS = ("attention", "estimate", "break-even")
CELLS = 131072  # keys of the largest cell that the costs are sought for
BEST = 4  # options of the first dtype that the others try

Options = dict[str, Any]
Log = Callable[[dict[str, Any]], None]


def candidates(full: bool) -> list[Options]:
    """Combinations, those that are likely to win first; without `full` only those."""
    tiles = itertools.product((128, 64), (128, 64), (8, 4), (3, 2), (True, False))
    every = [
        dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), numbers, strict=True)) | {"USE_TMA": tma}
        for *numbers, tma in tiles
    ]
    unlikely = [
        # Four warps hold a 128 × 128 tile in more registers than there are; eight are too many for 64 rows.
        options["num_warps"] != 8
        if options["BLOCK_M"] * options["BLOCK_N"] == 128 * 128
        else options["BLOCK_M"] == 64 and (options["num_warps"], options["num_stages"]) != (4, 3)
        for options in every
    ]
    likely = [options for options, bad in zip(every, unlikely, strict=True) if not bad]
    return likely + [options for options in every if full and options not in likely]


class Tuning:
    """One run: where it writes, and what it has found."""

    def __init__(self, bench: Bench, table: Path, log: Path, about: dict[str, Any]) -> None:
        self.bench, self.table_path, self.log_path, self.about = bench, table, log, about
        self.table = json.loads(table.read_text()) if table.exists() else {}
        self.ranked: dict[str, dict[str, list[Options]]] = {}  # kind -> dtype -> what ran, fastest first

    def log(self, tried: dict[str, Any]) -> None:
        with self.log_path.open("a") as stream:
            stream.write(json.dumps({**tried, **self.about}) + "\n")

    def remember(self, head_dim: int, dtype: str, name: str, value: Any) -> None:
        """Into the file, and into the table that the library has loaded, so that what follows runs with it."""
        for table in (self.table, TUNED):
            entry_of(table, self.about["capability"], head_dim, dtype)[name] = value
        self.table_path.write_text(json.dumps(self.table, indent=2, sort_keys=True) + "\n")

    def tried(self, kind: str, full: bool) -> list[Options]:
        """All candidates for the first dtype; for the others its best."""
        of_kind = list(self.ranked.get(kind, {}).values())
        return of_kind[0][:BEST] if of_kind and of_kind[0] and not full else candidates(full)


def tune(options: argparse.Namespace, device: torch.device) -> int:
    """Fills the table for this card, head dim by head dim and dtype by dtype; writes it after every entry."""
    options.out.mkdir(parents=True, exist_ok=True)
    pairs = list(itertools.product(options.head_dims, options.dtypes))
    bench = Bench(device, Progress(len(pairs), options.budget_seconds), options.seconds)
    table = options.table or options.out / "tuned.json"
    tuning = Tuning(bench, table, options.out / "tune.jsonl", describe(device, options.commit))
    try:
        for D, dtype in pairs:
            case = Case(
                length=options.length, head_dim=D, dtype=dtype, config=COARSE_QUERIES, density=options.density, dense=()
            )
            with bench.progress.case(f"head dim {D}, {dtype}"):
                tune_case(case, tuning, options.what, options.full)
    except OutOfTime as reason:
        print(f"\nstopped: {reason}; the table so far is written", file=sys.stderr)
    print(json.dumps(tuning.table, indent=2))
    return 0


def tune_case(case: Case, tuning: Tuning, what: list[str], full: bool) -> None:
    def best(kind: str, name: str, features: int, make: Callable[[Options], Callable]) -> None:
        of_kind = tuning.ranked.setdefault(kind, {})
        if case.dtype not in of_kind:
            found = best_options(kind, tuning.tried(kind, full), make, tuning.bench, case, tuning.log)
            of_kind[case.dtype] = found
            if found:
                tuning.remember(features, case.dtype, name, found[0])

    D = case.head_dim
    if "attention" in what:
        best(f"attention, head dim {D}", "attention", D, attention_call(case, tuning.bench))
    if "estimate" in what:
        # The kernel sees as many features as the estimate gives a query: twice the head dim at second order.
        for order in (1, 2):
            best(f"estimate, {D * order} features", "estimate", D * order, estimate_call(case, order, tuning))
    if "break-even" in what:
        bench = tuning.bench
        bench.progress.step("costs")
        found = costs(case, bench, tuning.log)
        if found:
            tuning.remember(D, case.dtype, "costs", found)


def best_options(
    kind: str, tried: list[Options], make: Callable[[Options], Callable], bench: Bench, case: Case, log: Log
) -> list[Options]:
    """The options that ran, fastest first. Those that cannot (shared memory, tiles) are logged with the reason.

    Out of time, it ranks what it has.
    """
    times: list[tuple[float, int]] = []
    for number, options in enumerate(tried):
        about = {"tuned": kind, "shape": case.name, "options": options}
        try:
            bench.progress.step(f"{kind}, {number + 1} of {len(tried)}")
            timing = bench.time(make(options))
        except OutOfTime:
            break
        except Exception as error:
            log({**about, "ms": None, "failed": f"{type(error).__name__}: {dense.first_line(error)}"})
            continue
        log({**about, "ms": timing["median"], "timing": timing, "failed": None})
        times.append((timing["median"], number))
    return [tried[number] for _, number in sorted(times)]


def attention_call(case: Case, bench: Bench) -> Callable[[Options], Callable]:
    bench.use(case)
    L = case.length
    masks = []
    for q, k, _ in bench.sets:
        mass = stages.estimate(q, k, case.config)
        config = stages.config_for_density(mass, case.config, L, case.density)
        kept, blocks = stages.choose(mass, level_per_head(config, case.heads, bench.device), config, L)
        masks.append(stages.block_mask(kept, blocks.whole, config, L))

    def make(options: Options) -> Callable[[int], Any]:
        options = {"FORCE_USE_FLEX_ATTENTION": True, **options}
        return lambda index: stages.attend(*bench.sets[index], masks[index], options)

    return make


def estimate_call(case: Case, order: int, tuning: Tuning) -> Callable[[Options], Callable]:
    bench = tuning.bench
    bench.use(case)
    config = replace(case.config, order=order)
    entry = entry_of(TUNED, tuning.about["capability"], case.head_dim * order, case.dtype)

    def make(options: Options) -> Callable[[int], Any]:
        # The library reads its table while it compiles; a fresh compiler reads the entry under trial.
        entry["estimate"] = options
        torch._dynamo.reset()
        stages.estimate_of.cache_clear()
        return lambda index: stages.estimate(bench.sets[index].q, bench.sets[index].k, config)

    return make


def entry_of(table: dict[str, Any], capability: str, head_dim: int, dtype: str) -> dict[str, Any]:
    return table.setdefault(capability, {}).setdefault(str(head_dim), {}).setdefault(dtype, {})


def costs(case: Case, bench: Bench, log: Log) -> dict[str, dict[str, float]]:
    """Kernel -> costs that explain the cells of work_suite.py; out of time, those that were measured."""
    facts = {name: getattr(case, name) for name in ("heads", "kv_heads", "head_dim", "seed")}
    backends = ("triton", *(("flash",) if flash_is_installed() else ()))
    dtype = getattr(torch, case.dtype)
    about = {"device": bench.device, "dtype": dtype, "length": CELLS, "seconds": bench.seconds, "file": None}
    server = Server(**facts, **about, backends=backends, progress=bench.progress)
    rows = []
    try:
        for row in work_suite.rows(server, argparse.Namespace(batches=None, densities=None)):
            log({"tuned": "costs", **row})
            rows.append(row)
    except OutOfTime as reason:
        print(f"\nstopped: {reason}", file=sys.stderr)
    return work_suite.costs_found(rows)
