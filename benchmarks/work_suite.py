"""Sparse against dense by work: queries × keys × batch × density, and the costs of a card that explain the times."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product

import torch
from torch import Tensor

from benchmarks.server import Row, Server, dense_kernel, median_host_ms, release
from benchmarks.timing import measure_in_turns
from benchmarks.workloads import Inputs
from rr_flex import RRConfig, rr_attention, select_blocks
from rr_flex.kernels.break_even import Costs, Work, decide
from rr_flex.kernels.options import TUNED

QUERIES, KEYS = (512, 2048, 8192, 32768), (8192, 32768, 131072)
BATCHES = (1, 8)
DENSITIES = (0.1, 0.25, 0.5)
CPU_CELLS = [(1, length, length) for length in (512, 1024, 2048, 4096, 8192, 16384)]  # batch, queries, keys
CPU_CELLS += [(8, 512, 512), (8, 2048, 2048), (1, 512, 4096), (1, 512, 16384), (1, 2048, 16384)]
REPEATS = (3, 15)
LEAST_CELLS = 8  # that costs are sought for


def cells(server: Server, options: argparse.Namespace) -> list[tuple[int, int, int]]:
    """(batch, queries, keys), the smallest inputs first."""
    if server.device.type == "cpu":
        return sorted((cell for cell in CPU_CELLS if cell[2] <= server.length), key=lambda cell: (cell[2], cell[0]))
    found = product(options.batches or BATCHES, KEYS, QUERIES)
    fitting = [(batch, queries, keys) for batch, keys, queries in found if queries <= keys <= server.length]
    return sorted(fitting, key=lambda cell: (cell[0] * cell[2], cell[1]))


def rows(server: Server, options: argparse.Namespace) -> Iterator[Row]:
    """A row a cell, density and backend: sparse beside dense."""
    name, attend = dense_kernel(server.device)
    held: Inputs | None = None
    for batch, queries, keys in cells(server, options):
        if held is None or held.k.shape[:3:2] != (batch, keys):
            held = None
            release(server.device)
            server.progress.step(f"inputs of {batch} × {keys}")
            held = server.inputs(batch, keys)
        inputs = Inputs(held.q[:, :, keys - queries :], held.k, held.v)
        for backend, density in product(server.backends, options.densities or DENSITIES):
            server.progress.step(f"{batch} × {queries} of {keys}, density {density}, {backend}")
            row = measure_cell(server, inputs, attend, (backend, density))
            about = {"batch": batch, "queries": queries, "keys": keys, "backend": backend, "wanted_density": density}
            yield {"suite": "cells", "failed": None, "dense": name, **about, **row, **server.about}


def taken(row: Row) -> str | None:
    """The way that the costs in tuned.json take a cell; None where the card has none."""
    card, head_dim, kernel = row["capability"], str(row["head_dim"]), row["backend"]
    if card is None:
        card, head_dim, kernel = "cpu", "64", "cpu"  # as options.costs_of has it
    costs = TUNED.get(card, {}).get(head_dim, {}).get(row["dtype"], {}).get("costs", {}).get(kernel)
    return costs and ("sparse" if decide(work_of(row), Costs(**costs), row["density"]).sparse else "dense")


def measure_cell(server: Server, inputs: Inputs, attend, way: tuple[str, float]) -> Row:
    backend, density = way
    settings = {"budget": "density", "target_density": density, "min_length": 0, "dense_last_rows": 0}
    config = RRConfig(order=2, query_stride=16, key_stride=8, **settings)
    q, k, v = inputs

    def sparse(_: int) -> Tensor:
        return rr_attention(q, k, v, config=config, backend=backend)

    def dense(_: int) -> Tensor:
        return attend(q, k, v)

    times = {"sets": 1, "device": server.device, "seconds": server.seconds, "repeats": REPEATS}
    sparse_time, dense_time = measure_in_turns([sparse, dense], **times)
    # On a card the budget is met, and choosing by itself would compile graphs of its own.
    found = density if q.device.type == "cuda" else select_blocks(q, k, config=config).density.item()
    return {
        "density": found,
        "sparse_ms": sparse_time.median,
        "dense_ms": dense_time.median,
        "host_ms": host_ms(sparse, server.device),
        "dense_host_ms": host_ms(dense, server.device),
    }


def host_ms(call, device: torch.device) -> float:
    """0 on a CPU, where no device waits for the host."""
    return median_host_ms(call, device) if device.type == "cuda" else 0.0


def fit(rows: list[Row]) -> Costs:
    """Costs by least squares of relative errors, none below 0, from rows of one card, backend and shape of heads."""
    works = [work_of(row) for row in rows]
    blocks = torch.tensor([work.visible_blocks for work in works], dtype=torch.float64) / 1e6
    pooled = torch.tensor([work.keys_to_pool for work in works], dtype=torch.float64) / 1e6
    sparse, dense, density, host, dense_host = (
        torch.tensor([row[name] for row in rows], dtype=torch.float64)
        for name in ("sparse_ms", "dense_ms", "density", "host_ms", "dense_host_ms")
    )
    host, dense_host = host.quantile(0.25).item(), dense_host.quantile(0.25).item()
    row = torch.tensor([work.blocks_of_row for work in works], dtype=torch.float64) / 1e6
    one = torch.ones_like(blocks)
    # Where the host decides, a time says nothing of the device.
    on_device, dense_on_device = sparse > 1.3 * host, dense > 1.3 * dense_host
    columns = torch.stack([one, pooled, blocks, density * blocks, density * row], 1)
    call, key, scored, kept, longest = least_squares(columns, sparse, on_device)
    dense_call, dense_block = least_squares(torch.stack([one, blocks], 1), dense, dense_on_device)
    return Costs(
        dense_host=dense_host,
        dense_call=min(dense_call, call),  # or the smallest calls of all would seem to pay
        dense_block=dense_block,
        host=host,
        call=call,
        pooled_key=key,
        scored_block=scored,
        kept_block=kept,
        row_block=longest,
    )


def least_squares(columns: Tensor, ms: Tensor, counted: Tensor) -> list[float]:
    """Coefficients ≥ 0 of least relative error: columns whose coefficient would be negative are left out, the worst
    first."""
    weighted = columns[counted] / ms[counted, None]
    used = list(range(columns.shape[1]))
    while True:
        found = torch.linalg.lstsq(weighted[:, used], torch.ones(len(weighted), 1, dtype=torch.float64)).solution[:, 0]
        if not used or found.min() >= 0:
            break
        used.pop(int(found.argmin()))
    coefficients = [0.0] * columns.shape[1]
    for place, value in zip(used, found.tolist(), strict=True):
        coefficients[place] = round(value, 6)
    return coefficients


def work_of(row: Row) -> Work:
    names = ("batch", "heads", "kv_heads", "queries", "keys")
    return Work(**{name: row[name] for name in names}, first_position=row["keys"] - row["queries"])


def costs_found(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Backend -> costs that explain its cells, as tuned.json has them; none from fewer than LEAST_CELLS."""
    cells = [row for row in rows if row["suite"] == "cells" and not row["failed"]]
    of_backend = {name: [row for row in cells if row["backend"] == name] for name in {row["backend"] for row in cells}}
    return {
        name: {field: round(value, 5) for field, value in asdict(fit(of_one)).items()}
        for name, of_one in of_backend.items()
        if len(of_one) >= LEAST_CELLS
    }
