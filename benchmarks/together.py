"""Compile many cases at once, time them one at a time: a card's time is short, and most of it goes to compilation."""

import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from benchmarks import report, stages
from benchmarks.cases import Case
from benchmarks.runner import Bench, run
from benchmarks.timing import OutOfTime, Progress

WARM_SECONDS = 0.01  # of each timing whose figure is thrown away


def groups(cases: list[Case]) -> list[list[Case]]:
    """Cases that share all compiled code, in the order of their first."""
    found: dict[tuple, list[Case]] = {}
    for case in cases:
        found.setdefault((stages.shape_of(case), *stages.compiled_for(case)), []).append(case)
    return list(found.values())


def run_together(suites: list[tuple[str, Case]], jobs: int, options: dict[str, Any]) -> Iterator[None]:
    """Runs (suite, case) pairs in rounds of `jobs` processes; each appends its rows to the suite's file. One yield a
    process that is done.

    `options` are those of `work`. Each process holds its inputs on the device: as many jobs as memory allows.
    """
    suite_of = {case: suite for suite, case in suites}
    context = multiprocessing.get_context("spawn")
    grouped = groups([case for _, case in suites])
    for batch in (grouped[first : first + jobs] for first in range(0, len(grouped), jobs)):
        processes, readies, goes = [], [], []
        for group in batch:
            ready, go = context.Event(), context.Event()
            named = [(suite_of[case], case) for case in group]
            process = context.Process(target=work, args=(named, ready, go, options))
            process.start()
            processes.append(process)
            readies.append(ready)
            goes.append(go)
        while not all(r.is_set() or not p.is_alive() for r, p in zip(readies, processes, strict=True)):
            time.sleep(0.1)
        for process, go in zip(processes, goes, strict=True):
            go.set()
            process.join()
            yield


def work(named: list[tuple[str, Case]], ready: Event, go: Event, options: dict[str, Any]) -> None:
    """One process: compiles by running its first case, says that it is ready, waits for its turn, times all cases."""
    device = torch.device(options["device"])
    bench = Bench(device, Progress(len(named) + 1), WARM_SECONDS, options["in_turns"], sets=1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            warm = Path(folder) / "warm.jsonl"
            list(run([named[0][1]], bench, out=warm, suite="warm", about=options["about"]))
    finally:
        ready.set()
    go.wait()
    bench.start_over(options["seconds"], options["deadline"])
    for suite, case in named:
        out = options["out"] / f"{suite}.jsonl"
        try:
            for row in run([case], bench, out=out, suite=suite, about=options["about"], profile=options["profile"]):
                print("\n" + report.one_line(row), file=sys.stderr, flush=True)
        except OutOfTime as reason:
            print(f"\nstopped: {reason}", file=sys.stderr, flush=True)
            return
