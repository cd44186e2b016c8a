"""HELMET (arXiv 2410.02694) from its own data folder: recall, RAG, re-ranking; long QA and ICL from exported rows.

Prompts, sizes and scores follow HELMET's. Two differences: which examples precede a question is drawn by Python's
generator, not by the datasets package's; long QA is scored by word F1, not by a judge model.
"""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rr_flex.tasks.answers import answer, ndcg, recall, substring_match, token_f1

SHOTS = 2
KILT_SIZES = {8192: 50, 16384: 105, 32768: 220, 65536: 440, 131072: 1000}
MARCO_SIZES = {8192: 50, 16384: 130, 32768: 285, 65536: 600, 131072: 1000}
KV_SIZES = {8192: 105, 16384: 220, 32768: 440, 65536: 900, 131072: 1800}
ANY_SIZE = dict.fromkeys(KV_SIZES, 0)
LENGTHS = tuple(KV_SIZES)


@dataclass(frozen=True)
class Question:
    prompt: str
    references: list[str]
    relevance: dict[str, int] | None = None  # re-ranking only


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


def json_kv(row: dict, examples: list[dict]) -> Question:
    shown = "".join(f"Key: {key}\nCorresponding value: {value}\n\n" for key, value in row["demos"][:SHOTS])
    ask = "Extract the value corresponding to the specified key in the JSON object below."
    prompt = f"{row['context']}\n\n{ask}\n\n{shown}Key: {row['question']}\nCorresponding value:"
    return Question(prompt, _listed(row["answer"]))


def needle(row: dict, examples: list[dict]) -> Question:
    kind, query, context = row["type_needle_v"], row["query"], row["context"]
    references = _listed(row.get("answer", row.get("outputs")))
    if len(references) > 1:
        lead, ask, verb = f"Some special magic {kind} are", f"What are all the special magic {kind}", "are"
    else:
        lead, ask, verb = f"A special magic {kind} is", f"What is the special magic {kind}", "is"
    memorize = (
        f"hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} afterwards."
    )
    tail = f"for {query} mentioned in the provided text"
    prompt = f"{lead} {memorize}\n{context}\n{ask} {tail}?\nThe special magic {kind} {tail} {verb}"
    return Question(prompt, references)


def documents(row: dict, examples: list[dict]) -> Question:
    """Passages, then a question about one of them."""
    ask = (
        "Use the given documents to write a concise and short answer to the question. "
        "Write your answer in the following format:\nAnswer: [answer]"
    )
    shown = "".join(
        f"{_passages(one['ctxs'])}\n\nQuestion: {one['question']}\nAnswer: {one['answers'][0]}\n\n"
        for one in _drawn(examples, row["question"], "question")
    )
    prompt = f"{ask}\n\n{shown}{_passages(row['ctxs'])}\n\nQuestion: {row['question']}\nAnswer:"
    return Question(prompt, row["answers"])


def ranking(row: dict, examples: list[dict]) -> Question:
    """Passages with IDs, to be put in order of relevance to a query."""
    ask = (
        "You are provided with a list of documents, each indicated by their ID. Rank each document based on their "
        "relevance to the question in descending order from most relelvant to least relevant texts. Include all "
        "documents in the rankings. Write your answer using the unique IDs, with the following format:\n"
        "Ranking: ID3 > ID1 > ID2"
    )
    shown = "".join(
        f"{_passages(one['ctxs'])}\n\nQuery: {one['query']}\nRanking: {_best_order(one['ctxs'])}\n\n"
        for one in _drawn(examples, row["qid"], "qid")
    )
    prompt = f"{ask}\n\n{shown}{_passages(row['ctxs'])}\n\nQuery: {row['query']}\nRanking:"
    return Question(prompt, [], {passage["id"]: int(passage["label"]) for passage in row["ctxs"]})


def story(row: dict, examples: list[dict]) -> Question:
    ask = (
        "You are given a story, which can be either a novel or a movie script, and a question. "
        "Answer the question as concisely as you can, using a single phrase if possible."
    )
    prompt = f"{ask}\n\n{row.get('demo', '')}{row['context']}\n\nQuestion: {row['question']}\nAnswer:"
    return Question(prompt, _listed(row["answer"]))


def labelled(row: dict, examples: list[dict]) -> Question:
    ask = (
        "Use the provided mapping from the text to label to assign a label to the text. "
        'Only output "label: {label}" and nothing else. '
    )
    return Question(f"{ask}\n\n{row['context']}\n\n{row['question']}\nlabel:", _listed(row["answer"]))


def label_match(text: str, question: Question) -> float:
    words = text.replace("label:", " ").split()
    return float(bool(words) and words[0] == question.references[0])


def order_of(text: str) -> list[str]:
    """IDs of an answer such as "Ranking: [ID: 3] > ID1 > 2"."""
    text = text.removeprefix("Ranking:")
    return [part.strip(" []\n.").removeprefix("ID").strip(": ") for part in text.split(">") if part.strip(" []\n.")]


def _passages(passages: list[dict]) -> str:
    def shown(passage: dict) -> str:
        number = f"[ID: {passage['id']}] " if "label" in passage else ""
        title = f" (Title: {passage['title']})" if "title" in passage else ""
        return f"{number}Document{title}: {passage['text']}"

    return "\n\n".join(shown(passage) for passage in passages)


def _best_order(passages: list[dict]) -> str:
    return " > ".join(one["id"] for one in sorted(passages, key=lambda one: one["label"], reverse=True))


def _drawn(examples: list[dict], asked: str, key: str) -> list[dict]:
    """SHOTS examples of other questions, the same ones for the same question."""
    others = list({one[key]: one for one in examples if one[key] != asked}.values())
    seed = int(hashlib.sha256(asked.encode()).hexdigest(), 16) % 2**31
    return random.Random(seed).sample(others, min(SHOTS, len(others)))


def _listed(references: str | list[str]) -> list[str]:
    return [references] if isinstance(references, str) else list(references)


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
