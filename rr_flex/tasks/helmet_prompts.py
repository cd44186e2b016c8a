"""HELMET's prompts, word for word: a row of its data, and examples, to a question with its references."""

import hashlib
import random
from dataclasses import dataclass

SHOTS = 2


@dataclass(frozen=True)
class Question:
    prompt: str
    references: list[str]
    relevance: dict[str, int] | None = None  # re-ranking only


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
