"""Runs a suite's cells one after the other, each on the same samples dense and with RRAttention."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter

from rr_flex.config import RRConfig
from rr_flex.models import enable
from rr_flex.models.records import DECODE
from rr_flex.tasks import results
from rr_flex.tasks.results import Cell, describe

Scores = Callable[..., tuple[list[float], int]]  # (model, tokenizer, task, length, samples, chat=) -> scores, tokens


def run(
    model,
    tokenizer,
    *,
    suite: str,
    score: Scores,
    tasks: list[str],
    lengths: list[int],
    samples: int,
    configs: list[RRConfig | None],
    name: str,
    path: Path,
    chat: bool = False,
    batch_size: int = 1,
    device: str = "",
    dtype: str = "",
    progress: Callable[[str, int, int], None] = lambda text, done, of: None,
) -> Iterator[Cell]:
    """Each cell that `path` does not hold yet, appended to it when it is done. None among `configs` is dense.

    `batch_size`, `device` and `dtype` are only recorded: `score` is to generate so many samples at once, `model` is
    there and so.
    """
    done = {cell.key for cell in results.read(path)}
    wanted = [(length, task, config) for length in lengths for task in tasks for config in configs]
    for number, (length, task, config) in enumerate(wanted):
        attention = describe(config)
        key = (suite, task, length, attention, name, samples)
        progress(f"{suite} {task}, {length:,} tokens, {attention}", number, len(wanted))
        if key in done:
            continue
        start = perf_counter()
        with nullcontext() if config is None else enable(model, config=config) as on:
            found, tokens = score(model, tokenizer, task, length, samples, chat=chat)
            report = on.report() if on else None
        cell = Cell(
            suite=suite,
            task=task,
            length=length,
            attention=attention,
            model=name,
            samples=samples,
            score=sum(found) / len(found),
            seconds=perf_counter() - start,
            density=report.density if report else None,
            dense_reasons={why: n for why, n in report.dense.items() if why != DECODE} if report else {},
            tokens=tokens,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
        )
        results.append(path, cell)
        yield cell
