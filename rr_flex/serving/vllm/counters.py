"""What the plugin did, seen from outside: a line in vLLM's log at its own interval, and metrics on its /metrics page.

The workers that attend and the front end that answers /metrics are processes of their own. A worker keeps its numbers
in a file of eight-byte floats, mapped into memory, in a folder that the first process made and named in the
environment of the others; the front end adds up the files when it is asked.
"""

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

FOLDER = "RR_FLEX_COUNTERS"
WAYS = ("sparse", "decode", "cut", "short", "mask")
FIELDS = (*WAYS, "kept", "visible", "seconds", "steps")


def share_counters() -> None:
    """Makes the folder, once for all processes, and puts its sum on this process's Prometheus registry."""
    if FOLDER not in os.environ:
        folder = tempfile.mkdtemp(prefix="rr_flex-")
        os.environ[FOLDER] = folder
        owner = os.getpid()
        atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    from prometheus_client import REGISTRY

    REGISTRY.register(Collector(Path(os.environ[FOLDER])))


class Collector:
    """The sums of all workers' files, as Prometheus asks for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterator:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        sums = dict(zip(FIELDS, sum_of(self.folder), strict=True))
        queries = CounterMetricFamily("rr_flex_queries", "Query tokens by the way they were answered", labels=["way"])
        for way in WAYS:
            queries.add_metric([way], sums[way])
        yield queries
        blocks = CounterMetricFamily("rr_flex_blocks", "Blocks of sparse rows over layers and heads", labels=["state"])
        for state in ("kept", "visible"):
            blocks.add_metric([state], sums[state])
        yield blocks
        yield CounterMetricFamily("rr_flex_steps", "Steps with sparse rows", value=sums["steps"])
        yield CounterMetricFamily("rr_flex_seconds", "Seconds in sparse attention, on a CPU", value=sums["seconds"])
        density = sums["kept"] / sums["visible"] if sums["visible"] else 1.0
        yield GaugeMetricFamily("rr_flex_density", "Kept over visible blocks of sparse rows", value=density)


def sum_of(folder: Path) -> list[float]:
    sums = np.zeros(len(FIELDS))
    for path in folder.glob("*.counts"):
        sums += np.fromfile(path, dtype=np.float64, count=len(FIELDS))
    return sums.tolist()


class Counters:
    """A worker's own numbers. `folder` None: they are kept in memory only."""

    def __init__(self, folder: Path | None, interval: float, device: torch.device) -> None:
        if folder is None:
            self.held = np.zeros(len(FIELDS))
        else:
            path = folder / f"{os.getpid()}.counts"
            self.held = np.memmap(path, dtype=np.float64, mode="w+", shape=(len(FIELDS),))
        self.counted_by: object = None  # the builder that counts queries and steps; every layer counts its blocks
        self.interval = interval  # seconds between lines
        self.told = time.monotonic()
        self.before = self.held.copy()
        # Kept and visible, on the device until a line is due: nothing waits for them.
        self.blocks = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, name: str, amount: float) -> None:
        self.held[FIELDS.index(name)] += amount

    def line_if_due(self) -> str | None:
        """What happened since the last line, if the interval is over and anything was sparse."""
        now = time.monotonic()
        if now - self.told < self.interval:
            return None
        self.told = now
        self.held[FIELDS.index("kept") : FIELDS.index("visible") + 1] += self.blocks.cpu().numpy()
        self.blocks.zero_()
        since = dict(zip(FIELDS, (self.held - self.before).tolist(), strict=True))
        self.before = np.array(self.held)
        if not since["visible"]:
            return None
        dense = ", ".join(f"{since[way]:.0f} {way}" for way in WAYS[1:] if since[way])
        density = since["kept"] / since["visible"]
        took = f", {since['seconds']:.2f} s in sparse attention" if since["seconds"] else ""
        return f"rr_flex: {since['sparse']:.0f} queries sparse at density {density:.3f}{took}; dense: {dense or 'none'}"
