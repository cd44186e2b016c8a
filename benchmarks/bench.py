"""What stays from case to case: inputs, exact rows and dense baselines of one shape, and how long to time."""

import gc
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import dense_kernels as dense
from benchmarks import stages
from benchmarks.cases import Case
from benchmarks.timing import Progress, measure, measure_in_turns
from benchmarks.workloads import Inputs, Shape, captured, structured
from rr_flex import RRConfig
from rr_flex.kernels.choose import choose_kernel
from rr_flex.kernels.options import attention_options
from rr_flex.level import level_per_head
from rr_flex.request import make_request

Row = dict[str, Any]

ERROR_ROWS = 2048  # queries whose output is compared with float32
SETS = 3  # input sets that rotate, memory permitting
SHARE_OF_MEMORY = 0.15  # that input sets may take
ERROR_BISECTIONS = 8


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
