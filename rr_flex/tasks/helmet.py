"""HELMET (arXiv 2410.02694) from its own data folder: recall, RAG, re-ranking; long QA and ICL from exported rows.

Prompts, sizes and scores follow HELMET's. Two differences: which examples precede a question is drawn by Python's
generator, not by the datasets package's; long QA is scored by word F1, not by a judge model.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rr_flex.tasks.answers import answer, ndcg, recall, substring_match, token_f1
from rr_flex.tasks.helmet_prompts import Question, documents, json_kv, labelled, needle, ranking, story

KILT_SIZES = {8192: 50, 16384: 105, 32768: 220, 65536: 440, 131072: 1000}
MARCO_SIZES = {8192: 50, 16384: 130, 32768: 285, 65536: 600, 131072: 1000}
KV_SIZES = {8192: 105, 16384: 220, 32768: 440, 65536: 900, 131072: 1800}
ANY_SIZE = dict.fromkeys(KV_SIZES, 0)
LENGTHS = tuple(KV_SIZES)


@dataclass(frozen=True)
class Task:
    file: str  # below the data folder, {size} or {length} to fill in
    sizes: dict[int, int]  # documents or pairs by length in tokens
    question: Callable[[dict, list[dict]], Question]  # of a row and the rows of examples
    score: Callable[[str, Question], float]
    new_tokens: int
    examples: str | None = None  # file of the examples
    one_line: bool = False  # the answer ends at the first new line


def scores_in(folder: Path):
    """The function that scores one task from `folder`, HELMET's data: see rr_flex.tasks.run.Scores."""

    def scores(model, tokenizer, task: str, length: int, samples: int, *, chat: bool = False):
        chosen = TASKS[task]
        found, tokens = [], 0
        for question in questions(folder, task, length, samples):
            text, size = answer(model, tokenizer, question.prompt, chosen.new_tokens, chat=chat)
            tokens += size
            found.append(chosen.score(text.split("\n")[0] if chosen.one_line else text, question))
        return found, tokens

    return scores


def questions(folder: Path, task: str, length: int, samples: int) -> list[Question]:
    """At most `samples` questions of a task. ValueError for a length that HELMET does not have."""
    chosen = TASKS[task]
    if length not in chosen.sizes:
        raise ValueError(f"length must be one of HELMET's, {sorted(chosen.sizes)}, got {length}")
    rows = read_rows(folder / chosen.file.format(size=chosen.sizes[length], length=length))
    examples = read_rows(folder / chosen.examples) if chosen.examples else []
    rows = random.Random(42).sample(rows, min(samples, len(rows)))
    return [chosen.question(row, examples) for row in rows]


def read_rows(path: Path) -> list[dict]:
    """A JSON object a line. FileNotFoundError says where HELMET's data comes from."""
    if not path.exists():
        raise FileNotFoundError(f"{path} was not found; --data must be the folder of HELMET's data archive")
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def label_match(text: str, question: Question) -> float:
    words = text.replace("label:", " ").split()
    return float(bool(words) and words[0] == question.references[0])


def order_of(text: str) -> list[str]:
    """IDs of an answer such as "Ranking: [ID: 3] > ID1 > 2"."""
    text = text.removeprefix("Ranking:")
    return [part.strip(" []\n.").removeprefix("ID").strip(": ") for part in text.split(">") if part.strip(" []\n.")]


def _substring(text: str, question: Question) -> float:
    return substring_match(text, question.references)


def _recall(text: str, question: Question) -> float:
    return recall(text, question.references)


def _rag(name: str, deep: int, test: str = "-dev-multikilt", train: str = "-train-multikilt") -> Task:
    return Task(
        f"kilt/{name}{test}_1000_k{{size}}_dep{deep}.jsonl",
        KILT_SIZES,
        documents,
        _substring,
        20,
        f"kilt/{name}{train}_1000_k3_dep{deep}.jsonl",
        one_line=True,
    )


TASKS = {
    "json_kv": Task("json_kv/test_k{size}_dep6.jsonl", KV_SIZES, json_kv, _substring, 100),
    "niah_mk_2": Task("ruler/niah_multikey_2/validation_{length}.jsonl", ANY_SIZE, needle, _recall, 50),
    "niah_mk_3": Task("ruler/niah_multikey_3/validation_{length}.jsonl", ANY_SIZE, needle, _recall, 100),
    "niah_mv": Task("ruler/niah_multivalue/validation_{length}.jsonl", ANY_SIZE, needle, _recall, 50),
    "kilt_nq": _rag("nq", 6),
    "kilt_triviaqa": _rag("triviaqa", 6),
    "kilt_hotpotqa": _rag("hotpotqa", 3),
    "kilt_popqa": _rag("popqa", 6, "_test", "_test"),
    "msmarco_rerank": Task(
        "msmarco/test_reranking_data_k{size}_dep3.jsonl",
        MARCO_SIZES,
        ranking,
        lambda text, question: ndcg(order_of(text), question.relevance),
        200,
        "msmarco/test_reranking_data_k10_dep3.jsonl",
        one_line=True,
    ),
    "longqa": Task(
        "exported/longqa_{length}.jsonl", ANY_SIZE, story, lambda text, one: token_f1(text, one.references), 100
    ),
    "icl": Task("exported/icl_{length}.jsonl", ANY_SIZE, labelled, label_match, 20, one_line=True),
}
