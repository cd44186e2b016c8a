"""A prompt of one layer in chunks against a growing cache, beside one shot and dense attention in the same chunks."""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks import stages
from benchmarks.cases import BEST, COARSE_BOTH, COARSE_QUERIES, PUBLISHED
from benchmarks.server import Row, Server, dense_kernel
from benchmarks.timing import measure, one_call, synchronize
from benchmarks.workloads import Inputs
from rr_flex import CapturedPrefill, PrefillState, RRConfig, rr_attention, select_blocks

CHUNKS = (16384, 8192, 2048, 512)
# label -> (setting, density of one shot that its level is sought for; None: its own level)
SETTINGS = {
    "order 2, 16/8, threshold": (COARSE_QUERIES, 0.13),
    "order 2, 16/16, threshold": (COARSE_BOTH, 0.13),
    "τ": (PUBLISHED, 0.27),
    "best": (BEST, None),
}
REPEATS = (2, 4)


@dataclass(frozen=True)
class Way:
    """How a prompt is prefilled."""

    config: RRConfig
    backend: str
    # What is kept between chunks: nothing, pooled keys (PrefillState), or graphs too (CapturedPrefill).
    kept: Literal["nothing", "state", "graphs"] = "nothing"


def rows(server: Server, options: argparse.Namespace) -> Iterator[Row]:
    """A row a setting, backend and chunk size; the first of them is one shot, with which the others are compared."""
    inputs = server.inputs(1, server.length)
    length = inputs.q.shape[2]
    sizes = [length, *(size for size in options.chunk_sizes or CHUNKS if size < length)]
    name, attend = dense_kernel(server.device)
    dense = {}
    for size in sizes:
        server.progress.step(f"{name}, chunks of {size}")
        dense[size] = timed(server, lambda _, size=size: use_up(in_chunks(attend, inputs, size)))
    for label in options.settings or SETTINGS:
        config, density = SETTINGS[label]
        server.progress.step("level")
        config, density = at_density(inputs, config, density)
        for backend in server.backends:
            one_shot = None
            for size in sizes:
                for kept in ways_of(server, size < length):
                    way = Way(config, backend, kept)
                    server.progress.step(f"{label}, {backend}, chunks of {size}, kept: {kept}")
                    row = measure_way(server, inputs, way, size)
                    one_shot = one_shot or row["ms"]
                    about = {"config": label, "backend": backend, "chunk": size, "kept": kept, "length": length}
                    beside = {"dense": name, "dense_ms": dense[size], "one_shot_ms": one_shot, "density": density}
                    yield {"suite": "chunks", "failed": None, **about, **row, **beside, **server.about}


def ways_of(server: Server, chunked: bool) -> tuple[str, ...]:
    """One shot by an ordinary call comes first: what all others are held against."""
    return ("state" if chunked else "nothing", *(("graphs",) if server.device.type == "cuda" else ()))


def at_density(inputs: Inputs, config: RRConfig, wanted: float | None) -> tuple[RRConfig, float]:
    """The setting at the level that keeps about that much of one shot, without dense last rows, and its density."""
    config = replace(config, dense_last_rows=0, min_length=0)
    mass = select_blocks(inputs.q, inputs.k, config=config).mass
    L = inputs.q.shape[2]
    found = config if wanted is None else stages.config_for_density(mass, config, L, wanted)
    level = found.level
    return found, stages.density_at(mass, level, found, inputs.q.shape[2])


def measure_way(server: Server, inputs: Inputs, way: Way, size: int) -> Row:
    """Milliseconds of all chunks together, the host's part of them, and how far the output is from one shot's."""

    graphs = CapturedPrefill(size, config=way.config, backend=way.backend) if way.kept == "graphs" else None

    def prefill(_: int) -> None:
        use_up(sparse_in_chunks(inputs, way, size, graphs))

    (one_shot,) = sparse_in_chunks(inputs, replace(way, kept="nothing"), inputs.q.shape[2])
    parts = sparse_in_chunks(inputs, way, size, graphs)
    squares = [(part - own).float().square().sum() for part, own in zip(parts, one_shot.split(size, 2), strict=True)]
    error = (sum(squares).sqrt() / one_shot.float().norm()).item()
    del one_shot
    host = host_of(prefill, server.device)
    chunks = -(-inputs.q.shape[2] // size)
    return {"ms": timed(server, prefill), "host_ms": host, "host_ms_a_call": host / chunks, "from_one_shot": error}


def timed(server: Server, call: Callable[[int], object]) -> float:
    return measure(call, sets=1, device=server.device, seconds=server.seconds, repeats=REPEATS).median


def host_of(call: Callable[[int], object], device: torch.device) -> float:
    """Until the last chunk is launched, begun on an idle device; no less than the device's own time where its queue is
    full."""
    one_call(call, 0, device)
    synchronize(device)
    start = time.perf_counter()
    call(0)
    host = 1000 * (time.perf_counter() - start)
    synchronize(device)
    return host


def in_chunks(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, size: int) -> Iterator[Tensor]:
    """The output of each chunk, which the next one's may overwrite."""
    q, k, v = inputs
    for first in range(0, q.shape[2], size):
        end = min(first + size, q.shape[2])
        yield attend(q[:, :, first:end], k[:, :, :end], v[:, :, :end])


def use_up(outputs: Iterator[Tensor]) -> None:
    """Each chunk in its turn; a model would read its output here."""
    for _ in outputs:
        pass


def sparse_in_chunks(inputs: Inputs, way: Way, size: int, graphs: CapturedPrefill | None = None) -> Iterator[Tensor]:
    settings = {"config": way.config, "backend": way.backend}
    if way.kept == "state":
        settings["state"] = PrefillState()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = k.shape[2] - q.shape[2]
        if graphs is not None:
            return graphs(q, inputs.k, inputs.v, first)
        return rr_attention(q, k, v, q_offset=first, **settings)

    return in_chunks(attend, inputs, size)
