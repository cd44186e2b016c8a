"""As a server prefills: `python -m benchmarks chunks`. Its suites: chunks, cells, packed, host; one JSON line a row."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import chunk_suite, host_suite, packed_suite, server_tables, work_suite
from benchmarks.cases import BACKENDS
from benchmarks.dense_kernels import first_line
from benchmarks.environment import describe
from benchmarks.server import Row, Server, release
from benchmarks.timing import OutOfTime, Progress
from rr_flex.cli import flags

SUITES = {
    "chunks": chunk_suite.rows,
    "cells": work_suite.rows,
    "packed": packed_suite.rows,
    "host": host_suite.rows,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suites", nargs="+", choices=list(SUITES), default=list(SUITES))
    parser.add_argument(
        "--length", type=flags.whole(1), default=131072, help="tokens of the longest prompt [%(default)s]"
    )
    parser.add_argument("--heads", type=flags.whole(1), default=32)
    parser.add_argument("--kv-heads", type=flags.whole(1), default=8)
    parser.add_argument("--head-dim", type=flags.whole(16, 16), default=128)
    parser.add_argument("--dtype", choices=flags.DTYPES, help="bfloat16 on CUDA, float32 on the CPU unless given")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="on CUDA")
    parser.add_argument("--settings", nargs="+", choices=list(chunk_suite.SETTINGS), help="of the chunks")
    parser.add_argument("--chunk-sizes", type=flags.whole(1), nargs="+", help="queries, longest first")
    parser.add_argument("--batches", type=flags.whole(1), nargs="+", help="of the cells")
    parser.add_argument("--densities", type=flags.share, nargs="+", help="of the cells and of packed prompts")
    parser.add_argument("--prompts", type=flags.whole(1), help="packed into one call")
    parser.add_argument(
        "--captured", type=flags.old_file, help="file of q, k, v from a real model in place of structured ones"
    )
    parser.add_argument("--seed", type=flags.whole(0), default=0)


def run_suites(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    if options.heads % options.kv_heads:
        raise SystemExit(f"--heads must be a multiple of --kv-heads, got {options.heads} and {options.kv_heads}")
    server = Server(
        device=device,
        dtype=getattr(torch, options.dtype or ("bfloat16" if cuda else "float32")),
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        length=options.length,
        backends=tuple(options.backends) if cuda else ("auto",),
        seconds=options.seconds,
        seed=options.seed,
        file=options.captured,
        progress=Progress(len(options.suites), options.budget_seconds),
    )
    about = describe(device, options.commit)
    found: list[Row] = []
    for name in options.suites:
        with server.progress.case(name):
            for row in kept_rows(SUITES[name](server, options), options.out / f"{name}.jsonl"):
                found.append(row)
                write_rows(options.out / f"{name}.jsonl", [row], about)
                print(f"\n{server_tables.one_line(row)}", file=sys.stderr, flush=True)
        release(device)
    print(server_tables.text(found))
    for backend, costs in work_suite.costs_found(found).items():
        print(f"costs, {backend}: {json.dumps(costs)}")
    return 1 if any(row["failed"] for row in found) else 0


def kept_rows(rows: Iterator[Row], path: Path) -> Iterator[Row]:
    """The rows of a suite until it is out of time; what stops it otherwise is a row of its own."""
    try:
        yield from rows
    except OutOfTime as reason:
        print(f"\nstopped: {reason}", file=sys.stderr)
    except Exception as error:
        yield {"suite": path.stem, "failed": f"{type(error).__name__}: {first_line(error)}"}


def write_rows(path: Path, rows: list[Row], about: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.writelines(json.dumps(row | about) + "\n" for row in rows)
