"""Compile many cases at once, time them one at a time: a card's time is short, and most of it goes to compilation."""

import sys
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from benchmarks import stages
from benchmarks import tables as report
from benchmarks.bench import Bench
from benchmarks.cases import Case
from benchmarks.runner import run
from benchmarks.timing import OutOfTime, Progress

WARM_SECONDS = 0.01  # of each timing whose figure is thrown away


Named = tuple[str, Case]  # a case and the suite that it belongs to


def groups(cases: list[Named]) -> list[list[Named]]:
    """Cases that run the same compiled code, in the order of their first."""
    found: dict[tuple, list[Named]] = {}
    for suite, case in cases:
        stages_run = case.method == "rr", case.every_stage
        found.setdefault((stages.shape_of(case), *stages.compiled_for(case), *stages_run), []).append((suite, case))
    return list(found.values())


def run_together(cases: list[Named], jobs: int, options: dict[str, Any]) -> None:
    """Runs cases in rounds of `jobs` processes; each appends its rows to the files of their suites.

    `options` are those of `work`. Each process holds its inputs on the device: as many jobs as memory allows.
    """
    context = multiprocessing.get_context("spawn")
    grouped = groups(cases)
    for batch in (grouped[first : first + jobs] for first in range(0, len(grouped), jobs)):
        processes, readies, goes = [], [], []
        for group in batch:
            ready, go = context.Event(), context.Event()
            process = context.Process(target=work, args=(group, ready, go, options))
            process.start()
            processes.append(process)
            readies.append(ready)
            goes.append(go)
        while not all(r.is_set() or not p.is_alive() for r, p in zip(readies, processes, strict=True)):
            time.sleep(0.1)
        for process, go in zip(processes, goes, strict=True):
            go.set()
            process.join()


def work(named: list[Named], ready: Event, go: Event, options: dict[str, Any]) -> None:
    """One process: compiles by running its first case, says that it is ready, waits for its turn, times all cases."""
    device = torch.device(options["device"])
    in_turns = {"in_turns": options["in_turns"], "rest": options["rest"]}
    bench = Bench(device, Progress(len(named) + 1), WARM_SECONDS, sets=1, **in_turns)
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
