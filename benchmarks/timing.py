"""Times and memory of a call: device events on CUDA, a host clock on the CPU, so that everything runs on both."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

WARM_UPS = 3  # untimed calls, the first of which compiles
LONG = 3000.0  # ms: calls longer than this are warmed up once and timed twice


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    median: float
    first_quartile: float
    third_quartile: float
    repeats: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def measure(
    call: Callable[[int], object], *, sets: int, device: torch.device, seconds: float = 1.0, repeats: tuple = (5, 50)
) -> Timing:
    """Times `call(i)` on input set i, which rotates, for about `seconds` and between `repeats` calls.

    Several input sets keep a cache from holding the inputs between calls.
    """
    return measure_in_turns([call], sets=sets, device=device, seconds=seconds, repeats=repeats)[0]


def measure_in_turns(
    calls: list[Callable[[int], object]],
    *,
    sets: int,
    device: torch.device,
    seconds: float = 1.0,
    repeats: tuple = (5, 50),
    rest: float = 0.0,
) -> list[Timing]:
    """`measure` of several calls, one after the other in each turn.

    A card at its power limit lends the clock of one to the next: what follows a hungry kernel is slower than alone.
    `rest`: seconds that the device idles before each call, so that all run at the full clock.
    """
    lasts = []
    for call in calls:
        one_call(call, 0, device)  # compiles
        for warm_up in range(1, max(WARM_UPS, sets + 1)):
            last = one_call(call, warm_up % sets, device)
            if last > LONG:
                break
        lasts.append(last)
    least, most = (2, 2) if max(lasts) > LONG else repeats
    count = min(most, max(least, int(1000 * seconds * len(calls) / max(sum(lasts), 1e-3))))
    return [_timing(times) for times in many_turns(calls, count, sets, device, rest)]


def _timing(times: list[float]) -> Timing:
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Timing(statistics.median(times), low, high, len(times))


def one_call(call: Callable[[int], object], index: int, device: torch.device, rest: float = 0.0) -> float:
    """Milliseconds on the host clock, from idle to idle, after `rest` seconds; on one thread of a CPU that thread's own
    time, of which other processes have no part."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    synchronize(device)
    time.sleep(rest)
    start = clock()
    call(index)
    synchronize(device)
    return 1000 * (clock() - start)


def many_calls(call: Callable[[int], object], count: int, sets: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `count` calls in a row; on CUDA the queue is never drained between them."""
    return many_turns([call], count, sets, device)[0]


def many_turns(
    calls: list[Callable[[int], object]], count: int, sets: int, device: torch.device, rest: float = 0.0
) -> list[list[float]]:
    """`many_calls` of each of `calls`, in turns; `rest` seconds of an idle device before each."""
    if device.type != "cuda":
        turns = [[one_call(call, repeat % sets, device, rest) for call in calls] for repeat in range(count)]
        return [list(times) for times in zip(*turns, strict=True)]
    events = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls] for _ in range(count)]
    for repeat, turn in enumerate(events):
        for call, (start, stop) in zip(calls, turn, strict=True):
            if rest:
                synchronize(device)
                time.sleep(rest)
            start.record()
            call(repeat % sets)
            stop.record()
    synchronize(device)
    return [[start.elapsed_time(stop) for start, stop in of_call] for of_call in zip(*events, strict=True)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a warm call allocates at its peak beside what is already there; on the CPU the process's peak."""
    if device.type != "cuda":
        call()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def kernel_times(call: Callable[[], object], device: torch.device, most: int = 12) -> list[tuple[str, float]]:
    """The kernels of one warm call and their milliseconds, longest first; none on the CPU."""
    if device.type != "cuda":
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        synchronize(device)
    times: dict[str, float] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] = times.get(event.name, 0.0) + event.device_time_total / 1000
    return sorted(times.items(), key=lambda item: -item[1])[:most]


class OutOfTime(Exception):
    """The budget of seconds is spent."""


class Progress:
    """One line on stderr that says where a long run stands; stops the run between steps once its budget is spent."""

    def __init__(self, total: int, budget_seconds: float | None = None) -> None:
        self.total, self.budget = total, budget_seconds
        self.start = time.perf_counter()
        self.done = 0
        self.name = ""

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        self.name = name
        yield
        self.done += 1

    def step(self, text: str) -> None:
        """Says what happens next; raises OutOfTime when there is no time for it."""
        line = f"[{self.done + 1}/{self.total}] {self.seconds:4.0f} s  {self.name}: {text}"
        end = "" if sys.stderr.isatty() else "\n"
        print(("\r\x1b[K" if not end else "") + line, end=end, file=sys.stderr, flush=True)
        if self.budget is not None and self.seconds > self.budget:
            raise OutOfTime(f"{self.seconds:.0f} s of {self.budget:.0f} s are spent")
