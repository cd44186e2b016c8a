"""Case to row: selects at the wanted budget, checks the output against float32, times every stage and the whole."""

import json
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import dense_kernels as dense
from benchmarks import rivals, stages
from benchmarks.bench import Bench, Row, budgeted, kernel_options
from benchmarks.cases import Case
from benchmarks.timing import OutOfTime, kernel_times, peak_bytes
from benchmarks.workloads import Inputs
from rr_flex import RRConfig, rr_attention, select_blocks
from rr_flex.attention import calls
from rr_flex.level import level_per_head
from rr_flex.runtime.head_slices import head_slices

STAGES = ("estimate", "select", "lists", "selection", "attention", "total")


def run(cases: list[Case], bench: Bench, *, out: Path, suite: str, about: Row, profile: bool = False) -> Iterator[Row]:
    """The row of each case, appended to `out` as it comes. A case that fails gives a row that says why."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        with bench.progress.case(case.name):
            try:
                row = run_case(case, bench, profile)
            except OutOfTime:
                raise
            except Exception as error:
                traceback.print_exc()
                row = describe_case(case) | {"failed": f"{type(error).__name__}: {dense.first_line(error)}"}
                bench.release()
        row = {"suite": suite, **row, **about}
        with out.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        yield row


def describe_case(case: Case) -> Row:
    names = ("length", "heads", "kv_heads", "head_dim", "batch", "dtype", "method", "backend", "seed")
    return {
        "case": case.name,
        "label": case.label,
        **{name: getattr(case, name) for name in names},
        "workload": Path(case.workload).name,
        "settings": {name: list(value) if isinstance(value, tuple) else value for name, value in case.settings.items()},
        "block_size": list(case.config.block_sizes),
        "kernel_options": dict(case.kernel_options),
        "wanted_density": case.density,
        "wanted_error": case.error,
        "failed": None,
    }


def run_case(case: Case, bench: Bench, profile: bool = False) -> Row:
    bench.use(case)
    measured = measure_rr(case, bench, profile) if case.method == "rr" else measure_rival(case, bench)
    row = describe_case(case) | measured
    row |= {"dense": bench.dense, "fastest_dense": bench.fastest_dense()}
    beside = row["timings"].get("dense")
    row["fastest_dense_ms"] = None if beside is None else beside["median"]
    row["in_turns"], row["rest_s"] = bench.in_turns, bench.rest
    row["error_rows"] = len(bench.rows)
    row["sets"] = len(bench.sets)
    flops = dense.attention_flops(bench.sets[0].q) * row["density"]
    row["attention_tflops"] = None if row["attention_ms"] is None else flops / row["attention_ms"] / 1e9
    if beside is not None and row["total_ms"] is not None:
        row["speedup"] = beside["median"] / row["total_ms"]
        row["over_limit"] = row["total_ms"] / (row["density"] * beside["median"])
    else:
        row["speedup"] = row["over_limit"] = None
    return row


def measure_rr(case: Case, bench: Bench, profile: bool) -> Row:
    config = budgeted(case, bench)
    sets, device = bench.sets, bench.device
    if len(slices_of(case, device)) == 1:
        timings, densities, options = measure_stages(case, config, bench)
    else:  # a few heads at a time: no stage is run for all of them
        timings, options = {}, kernel_options(case, sets[0])
        densities = [density_in_slices(each, config) for each in sets]

    def total(index: int) -> Tensor:
        backend = {} if case.backend is None else {"backend": case.backend}
        return rr_attention(*sets[index], config=config, **backend)

    bench.progress.step("rr_attention")
    before = calls.copy()
    error = dense.relative_error(total(0), bench.exact, bench.rows)
    ways = sorted(calls - before)
    timings |= bench.time_with_dense(total)
    qkv = sum(x.numel() * x.element_size() for x in sets[0])
    return {
        "level": getattr(config, config.level_field),
        # Over the sets whose times are averaged; the error is the first one's.
        "density": 1.0 if ways == ["dense"] else sum(densities) / len(densities),
        "error": error,
        "ran": ways,
        **{f"{stage}_ms": timings[stage]["median"] if stage in timings else None for stage in STAGES},
        "peak_gib": (peak_bytes(lambda: total(0), device) + qkv) / 2**30,
        "attention_options": options,
        "timings": timings,
        "kernels": kernel_times(lambda: total(0), device) if profile else None,
    }


def measure_stages(case: Case, config: RRConfig, bench: Bench) -> tuple[dict[str, Row], list[float], Row]:
    """All before attention as one graph, its stages by themselves, and attention."""
    step, sets = bench.progress.step, bench.sets
    q = sets[0].q
    Hq, L = q.shape[1:3]
    level = level_per_head(config, Hq, bench.device)
    same = stages.without_level(config)  # so that levels share compiled code

    step("estimate")
    timings = {"estimate": bench.time(lambda index: stages.estimate(sets[index].q, sets[index].k, config))}
    masses = [stages.estimate(each.q, each.k, config) for each in sets]
    if case.every_stage:
        step("select")
        timings["select"] = bench.time(lambda index: stages.choose_compiled(masses[index], level, same, L))
    chosen = [stages.choose(mass, level, same, L) for mass in masses]
    masses.clear()
    if case.every_stage:
        step("lists")
        timings["lists"] = bench.time(lambda index: stages.lists(chosen[index][0], chosen[index][1].whole))
    densities = [stages.density(kept, blocks.visible) for kept, blocks in chosen]
    options = kernel_options(case, bench.sets[0])
    masks = [stages.block_mask(kept, blocks.whole, config, L) for kept, blocks in chosen]
    chosen.clear()
    step("selection")
    timings["selection"] = bench.time(lambda index: stages.selection(sets[index].q, sets[index].k, config))
    step("attention")
    timings["attention"] = bench.time(lambda index: stages.attend(*sets[index], masks[index], options))
    return timings, densities, options


def slices_of(case: Case, device: torch.device) -> list:
    L = case.length
    return head_slices((case.batch, case.heads, case.kv_heads), (L, L), case.config, device)


def density_in_slices(inputs: Inputs, config: RRConfig) -> float:
    selection = select_blocks(inputs.q, inputs.k, config=config)
    return stages.density(selection.kept, selection.visible)


def measure_rival(case: Case, bench: Bench) -> Row:
    """A rival's blocks on our kernel: density, error and attention; no time is claimed for its estimate."""
    q, k, _ = bench.sets[0]
    L = q.shape[2]
    blocks = stages.causal_blocks(case.config, L, bench.device)
    bench.progress.step("scores")
    score = rivals.RULES[case.method](q, k, case.config.block_sizes)
    kept = rivals.at_density(score, blocks.visible, blocks.mandatory, case.density)
    density = stages.density(kept, blocks.visible)
    mask = stages.block_mask(kept, blocks.whole, case.config, L)
    del score, kept
    bench.progress.step("attention")
    options = kernel_options(case, bench.sets[0])
    timings = bench.time_with_dense(lambda index: stages.attend(*bench.sets[0], mask, options))
    timings["attention"] = timings.pop("total")
    return {
        "level": None,
        "density": density,
        "error": dense.relative_error(stages.attend(*bench.sets[0], mask, options), bench.exact, bench.rows),
        "estimate_ms": None,
        "select_ms": None,
        "lists_ms": None,
        "selection_ms": None,
        "ran": None,
        "attention_ms": timings["attention"]["median"],
        "total_ms": None,
        "peak_gib": None,
        "attention_options": options,
        "timings": timings,
        "kernels": None,
    }


def with_length(cases: list[Case], lengths: list[int]) -> list[Case]:
    """The cases of those lengths; where a suite has none of a length, its cases at that length instead of theirs."""
    kept = [case for case in cases if case.length in lengths]
    missing = [length for length in lengths if length not in {case.length for case in cases}]
    moved = [replace(case, length=length) for length in missing for case in cases]
    return list(dict.fromkeys([*kept, *moved]))
