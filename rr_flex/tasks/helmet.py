"""HELMET (arXiv 2410.02694) from its own data folder: recall, RAG, re-ranking; long QA and ICL from exported rows.

Prompts, sizes and scores follow HELMET's. Two differences: which examples precede a question is drawn by Python's
generator, not by the datasets package's; long QA is scored by word F1, not by a judge model.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rr_flex.tasks import answers, helmet_prompts
from rr_flex.tasks.answers import Asked, Question, rows_of
from rr_flex.tasks.helmet_prompts import references

LENGTHS = (8192, 16384, 32768, 65536, 131072)
# Documents or pairs of a prompt of each length.
KILT_SIZES = (50, 105, 220, 440, 1000)
MARCO_SIZES = (50, 130, 285, 600, 1000)
KV_SIZES = (105, 220, 440, 900, 1800)


@dataclass(frozen=True)
class Task:
    file: str  # below the data folder, {size} or {length} to fill in
    prompt: Callable[[dict, list[dict]], str]  # of a row and the rows of examples
    score: Callable[[str, dict], float]  # of an answer and the row
    new_tokens: int
    sizes: tuple[int, ...] = LENGTHS  # of LENGTHS
    examples: str | None = None  # file of the examples
    one_line: bool = False  # the answer ends at the first new line


def scores(model, tokenizer, asked: Asked) -> tuple[list[float], int]:
    return answers.answered(model, tokenizer, questions(asked), chat=asked.chat)


def check(asked: Asked, tokenizer) -> None:
    """ValueError or FileNotFoundError unless a task's files are there and begin with rows of it: they can be large."""
    path, examples = files(asked)
    questions_of(TASKS[asked.task], rows_of(path, 1), rows_of(examples, 1) if examples else [])


def questions(asked: Asked) -> list[Question]:
    """At most `samples` questions of a task. ValueError for a length that HELMET does not have."""
    path, examples = files(asked)
    rows = rows_of(path)
    rows = random.Random(42).sample(rows, min(asked.samples, len(rows)))
    return questions_of(TASKS[asked.task], rows, rows_of(examples) if examples else [])


def questions_of(task: Task, rows: list[dict], examples: list[dict]) -> list[Question]:
    return [Question(task.prompt(row, examples), task.new_tokens, partial(_score, task, row)) for row in rows]


def _score(task: Task, row: dict, text: str) -> float:
    return task.score(text.split("\n")[0] if task.one_line else text, row)


def files(asked: Asked) -> tuple[Path, Path | None]:
    """(of a task's rows, of the examples that its prompts show)"""
    task = TASKS[asked.task]
    if asked.length not in LENGTHS:
        raise ValueError(f"length must be one of HELMET's, {list(LENGTHS)}, got {asked.length}")
    size = task.sizes[LENGTHS.index(asked.length)]
    path = asked.data / task.file.format(size=size, length=asked.length)
    return path, asked.data / task.examples if task.examples else None


def order_of(text: str) -> list[str]:
    """IDs of an answer such as "Ranking: [ID: 3] > ID1 > 2"."""
    text = text.removeprefix("Ranking:")
    return [part.strip(" []\n.").removeprefix("ID").strip(": ") for part in text.split(">") if part.strip(" []\n.")]


def _ranked(text: str, row: dict) -> float:
    return answers.ndcg(order_of(text), {passage["id"]: int(passage["label"]) for passage in row["ctxs"]})


def _label(text: str, row: dict) -> float:
    words = text.replace("label:", " ").split()
    return float(words[:1] == references(row)[:1])


def _by(measure: Callable) -> Callable[[str, dict], float]:
    return lambda text, row: measure(text, references(row))


def _rag(name: str, deep: int, test: str = "-dev-multikilt", train: str = "-train-multikilt") -> Task:
    file, examples = f"kilt/{name}{test}_1000_k{{size}}_dep{deep}.jsonl", f"kilt/{name}{train}_1000_k3_dep{deep}.jsonl"
    score = _by(answers.substring_match)
    return Task(file, helmet_prompts.documents, score, 20, KILT_SIZES, examples, one_line=True)


def _needle(name: str, new_tokens: int) -> Task:
    file = f"ruler/{name}/validation_{{length}}.jsonl"
    return Task(file, helmet_prompts.needle, _by(answers.recall), new_tokens)


MARCO = "msmarco/test_reranking_data_k{size}_dep3.jsonl", "msmarco/test_reranking_data_k10_dep3.jsonl"
TASKS = {
    "json_kv": Task(
        "json_kv/test_k{size}_dep6.jsonl", helmet_prompts.json_kv, _by(answers.substring_match), 100, KV_SIZES
    ),
    "niah_mk_2": _needle("niah_multikey_2", 50),
    "niah_mk_3": _needle("niah_multikey_3", 100),
    "niah_mv": _needle("niah_multivalue", 50),
    "kilt_nq": _rag("nq", 6),
    "kilt_triviaqa": _rag("triviaqa", 6),
    "kilt_hotpotqa": _rag("hotpotqa", 3),
    "kilt_popqa": _rag("popqa", 6, "_test", "_test"),
    "msmarco_rerank": Task(MARCO[0], helmet_prompts.ranking, _ranked, 200, MARCO_SIZES, MARCO[1], one_line=True),
    "longqa": Task("exported/longqa_{length}.jsonl", helmet_prompts.story, _by(answers.token_f1), 100),
    "icl": Task("exported/icl_{length}.jsonl", helmet_prompts.labelled, _label, 20, one_line=True),
}
