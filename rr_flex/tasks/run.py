"""Runs a suite's cells one after the other, each on the same samples dense and with RRAttention."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from time import perf_counter

from rr_flex.config import RRConfig
from rr_flex.models import enable
from rr_flex.models.records import DECODE
from rr_flex.tasks import results
from rr_flex.tasks.answers import Asked
from rr_flex.tasks.results import Cell, Setting, describe


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cells of a run: every task at every length with every config."""

    suite: str
    scores: Callable[..., tuple[list[float], int]]  # (model, tokenizer, Asked) -> each sample's, prompt tokens
    tasks: Sequence[str]
    lengths: Sequence[int]
    configs: Sequence[RRConfig | None]  # None is dense
    same: Setting  # for all cells; device, dtype and the model's name are only recorded

    @property
    def asked(self) -> list[Asked]:
        """What `scores` is asked for, under each config."""
        same, data = self.same, Path(self.same.data) if self.same.data else None
        return [
            Asked(task, length, same.samples, same.chat, same.batch_size, data)
            for length, task in product(self.lengths, self.tasks)
        ]


def run(
    model,
    tokenizer,
    plan: Plan,
    path: Path,
    progress: Callable[[str, int, int], None] = lambda text, done, of: None,
) -> Iterator[Cell]:
    """Each cell that `path` does not hold yet, added to it when it is done."""
    done = {cell.key for cell in results.read(path)}
    wanted = list(product(plan.asked, plan.configs))
    for number, (asked, config) in enumerate(wanted):
        facts = {"suite": plan.suite, "task": asked.task, "length": asked.length, "attention": describe(config)}
        facts |= asdict(plan.same)
        progress(f"{plan.suite} {asked.task}, {asked.length:,} tokens, {facts['attention']}", number, len(wanted))
        if results.key_of(**facts) in done:
            continue
        start = perf_counter()
        with nullcontext() if config is None else enable(model, config=config) as on:
            found, tokens = plan.scores(model, tokenizer, asked)
            record = on.report() if on else None
        cell = Cell(
            **facts,
            score=sum(found) / len(found),
            seconds=perf_counter() - start,
            density=record.density if record else None,
            dense_reasons={why: n for why, n in record.dense.items() if why != DECODE} if record else {},
            tokens=tokens,
        )
        results.append(path, cell)
        yield cell
