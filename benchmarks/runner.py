"""Case to row: selects at the wanted budget, checks the output against float32, times every stage and the whole."""

import gc
import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import dense_kernels as dense
from benchmarks import rivals, stages
from benchmarks.cases import Case
from benchmarks.timing import OutOfTime, Progress, kernel_times, measure, measure_in_turns, peak_bytes
from benchmarks.workloads import Inputs, Shape, captured, structured
from rr_flex import RRConfig, rr_attention, select_blocks
from rr_flex.attention import calls
from rr_flex.kernels.choose import choose_kernel
from rr_flex.kernels.options import attention_options
from rr_flex.request import level_per_head, make_request
from rr_flex.runtime.head_slices import head_slices

Row = dict[str, Any]

ERROR_ROWS = 2048  # queries whose output is compared with float32
SETS = 3  # input sets that rotate, memory permitting
SHARE_OF_MEMORY = 0.15  # that input sets may take
ERROR_BISECTIONS = 8
STAGES = ("estimate", "select", "lists", "selection", "attention", "total")


class Bench:
    """Inputs, exact rows and dense baselines of one shape; they stay until a case asks for another."""

    def __init__(
        self,
        device: torch.device,
        progress: Progress,
        seconds: float = 1.0,
        in_turns: bool = False,
        sets: int = SETS,
        rest: float = 0.0,
    ) -> None:
        self.device, self.progress, self.in_turns, self.rest = device, progress, in_turns, rest
        self.seconds, self.most_sets = seconds, sets
        self.shape: tuple | None = None
        self.compiled_for: tuple | None = None
        self.sets: list[Inputs] = []
        self.rows = self.exact = torch.empty(0)
        self.times: dict[tuple, dict[str, Row]] = {}  # of dense kernels, by shape
        self.kernels: dict[str, dense.Dense] = {}  # that ran on the shape in use
        self.levels: dict[tuple, RRConfig] = {}  # that gave a density on the shape in use

    @property
    def dense(self) -> dict[str, Row]:
        """Of the shape in use: each dense kernel's figures, or why it is absent."""
        return self.times.setdefault(self.shape, {})

    def use(self, case: Case) -> None:
        """Makes ready for a case; raises OutOfTime where there is no time."""
        shape = stages.shape_of(case)
        # Sizes and settings that change between calls are compiled for all values at once, which is another kernel:
        # each shape and setting starts with a fresh compiler.
        compiled_for = (shape, *stages.compiled_for(case))
        if compiled_for != self.compiled_for:
            torch._dynamo.reset()
            stages.estimate_of.cache_clear()
            self.compiled_for = compiled_for
        if shape != self.shape:
            self.shape, self.sets, self.exact = None, [], torch.empty(0)
            self.kernels, self.levels = {}, {}
            self.release()
            self.progress.step("inputs")
            self.sets = self.make_sets(case)
            self.rows = dense.sampled_rows(self.sets[0].q.shape[2], ERROR_ROWS, self.device)
            self.progress.step("exact rows")
            self.exact = dense.exact_rows(*self.sets[0], self.rows)
            self.shape = shape
        for name in dense.names_for(self.device) if case.dense is None else case.dense:
            if name not in self.dense:
                self.progress.step(f"dense, {name}")
                self.dense[name] = self.time_dense(name)

    def start_over(self, seconds: float, deadline: float | None) -> None:
        """Forgets inputs and times, but nothing that was compiled, and times for `seconds` from now on.

        `deadline`: on the clock of time.time(), when to stop.
        """
        self.shape, self.seconds, self.most_sets = None, seconds, SETS
        self.times.clear()
        if deadline is not None:
            self.progress.budget = self.progress.seconds + deadline - time.time()

    def release(self) -> None:
        """Gives unused memory back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def make_sets(self, case: Case) -> list[Inputs]:
        dtype = getattr(torch, case.dtype)
        if case.workload != "structured":
            return [captured(case.workload, self.device, dtype)]
        tokens = case.batch * case.length * case.head_dim * dtype.itemsize
        size = tokens * (case.heads + 2 * case.kv_heads)
        sets = self.most_sets
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory
            sets = max(1, min(sets, int(SHARE_OF_MEMORY * memory / size)))
        shape = Shape(case.length, case.heads, case.kv_heads, case.head_dim, case.batch)
        return [
            structured(shape, dtype=dtype, device=self.device, seed=case.seed + 1000 * index) for index in range(sets)
        ]

    def time(self, call) -> dict[str, float]:
        timing = measure(call, sets=len(self.sets), device=self.device, seconds=self.seconds)
        return timing.as_dict()

    def fastest_dense(self) -> str | None:
        """The name of the fastest dense kernel that ran on the shape in use."""
        times = {name: result["ms"] for name, result in self.dense.items() if "ms" in result and name in self.kernels}
        return min(times, key=times.get) if times else None

    def time_with_dense(self, call) -> dict[str, Row]:
        """Timings of a call and of the fastest dense kernel: each by itself, or `in_turns`."""
        fastest = self.fastest_dense()
        if fastest is None or not self.in_turns:
            return {"total": self.time(call)} | ({} if fastest is None else {"dense": self.dense[fastest]["timing"]})
        kernel = self.kernels[fastest]

        def attend(index: int) -> Tensor:
            with kernel.context():
                return kernel.attend(*self.sets[index])

        settings = {"sets": len(self.sets), "device": self.device, "seconds": self.seconds, "rest": self.rest}
        timings = measure_in_turns([call, attend], **settings)
        return dict(zip(("total", "dense"), (timing.as_dict() for timing in timings), strict=True))

    def time_dense(self, name: str) -> Row:
        try:
            kernel = dense.prepare(name, *self.sets[0])
        except dense.Absent as reason:
            return {"absent": str(reason)}
        try:
            with kernel.context():
                error = dense.relative_error(kernel.attend(*self.sets[0]), self.exact, self.rows)
                timing = self.time(lambda index: kernel.attend(*self.sets[index]))
        except torch.OutOfMemoryError as reason:
            return {"absent": dense.first_line(reason)}
        self.kernels[name] = kernel
        flops = dense.attention_flops(self.sets[0].q)
        return {
            "ms": timing["median"],
            "tflops": flops / timing["median"] / 1e9,
            "error": error,
            "note": kernel.note,
            "timing": timing,
        }


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
    if len(strips_of(case)) == 1:
        timings, densities, options = measure_stages(case, config, bench)
    else:  # a few heads at a time: no stage is run for all of them
        timings, options = {}, kernel_options(case, sets[0])
        densities = [density_in_strips(each, config) for each in sets]

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


def strips_of(case: Case) -> list:
    L = case.length
    return head_slices(case.batch, case.heads, case.kv_heads, L, L, case.config)


def density_in_strips(inputs: Inputs, config: RRConfig) -> float:
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


def kernel_options(case: Case, inputs: Inputs) -> dict[str, Any]:
    """Options of the kernel that rr_attention would use, with the case's own."""
    q, k, v = inputs
    kernel = choose_kernel(case.backend or "auto", q, v, make_request(q, k, case.config, {}))
    return attention_options(q, case.config.block_sizes, kernel) | dict(case.kernel_options)


def budgeted(case: Case, bench: Bench) -> RRConfig:
    """The case's configuration at the level that gives the wanted density or error on the first input set.

    Sparse whatever the length, unless neither is wanted: that is the library as users call it.
    """
    if case.density is None and case.error is None:
        return case.config
    return replace(budgeted_selection(case, bench), min_length=0)


def budgeted_selection(case: Case, bench: Bench) -> RRConfig:
    q, k, _ = bench.sets[0]
    L = q.shape[2]
    bench.progress.step("level")
    key = (stages.without_level(case.config), case.density)
    if key in bench.levels:
        return bench.levels[key]
    mass = stages.estimate(q, k, case.config)
    if case.density is not None:
        return bench.levels.setdefault(key, stages.config_for_density(mass, case.config, L, case.density))
    options = kernel_options(case, bench.sets[0])
    low, high = 0.0, 1.0
    for bisection in range(ERROR_BISECTIONS):
        bench.progress.step(f"level, {bisection + 1} of {ERROR_BISECTIONS}")
        middle = (low + high) / 2
        config = stages.config_for_density(mass, case.config, L, middle)
        kept, blocks = stages.choose(mass, level_per_head(config, q.shape[1], bench.device), config, L)
        out = stages.attend(*bench.sets[0], stages.block_mask(kept, blocks.whole, config, L), options)
        reached = dense.relative_error(out, bench.exact, bench.rows) <= case.error
        low, high = (low, middle) if reached else (middle, high)
    return stages.config_for_density(mass, case.config, L, high)


def with_length(cases: list[Case], lengths: list[int]) -> list[Case]:
    """The cases of those lengths; where a suite has none of a length, its cases at that length instead of theirs."""
    kept = [case for case in cases if case.length in lengths]
    missing = [length for length in lengths if length not in {case.length for case in cases}]
    moved = [replace(case, length=length) for length in missing for case in cases]
    return list(dict.fromkeys([*kept, *moved]))
