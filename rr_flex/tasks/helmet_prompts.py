"""HELMET's prompts, word for word: of a row of its data, and of rows of examples."""

import hashlib
import random

SHOTS = 2


def references(row: dict) -> list[str]:
    """The right answers, under whichever name a row has them."""
    found = next(row[name] for name in ("answers", "answer", "outputs") if name in row)
    return [found] if isinstance(found, str) else list(found)


def json_kv(row: dict, examples: list[dict]) -> str:
    shown = "".join(f"Key: {key}\nCorresponding value: {value}\n\n" for key, value in row["demos"][:SHOTS])
    ask = "Extract the value corresponding to the specified key in the JSON object below."
    return f"{row['context']}\n\n{ask}\n\n{shown}Key: {row['question']}\nCorresponding value:"


def needle(row: dict, examples: list[dict]) -> str:
    kind, query, context = row["type_needle_v"], row["query"], row["context"]
    lead, ask, verb = f"A special magic {kind} is", f"What is the special magic {kind}", "is"
    if len(references(row)) > 1:
        lead, ask, verb = f"Some special magic {kind} are", f"What are all the special magic {kind}", "are"
    memorize = (
        f"hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} afterwards."
    )
    tail = f"for {query} mentioned in the provided text"
    return f"{lead} {memorize}\n{context}\n{ask} {tail}?\nThe special magic {kind} {tail} {verb}"


def documents(row: dict, examples: list[dict]) -> str:
    """Passages, then a question about one of them."""
    ask = (
        "Use the given documents to write a concise and short answer to the question. "
        "Write your answer in the following format:\nAnswer: [answer]"
    )
    shown = [f"{_asked(one, 'Question', 'Answer')} {one['answers'][0]}" for one in _drawn(examples, row, "question")]
    return "\n\n".join([ask, *shown, _asked(row, "Question", "Answer")])


def ranking(row: dict, examples: list[dict]) -> str:
    """Passages with IDs, to be put in order of relevance to a query."""
    ask = (
        "You are provided with a list of documents, each indicated by their ID. Rank each document based on their "
        "relevance to the question in descending order from most relelvant to least relevant texts. Include all "
        "documents in the rankings. Write your answer using the unique IDs, with the following format:\n"
        "Ranking: ID3 > ID1 > ID2"
    )
    shown = []
    for one in _drawn(examples, row, "qid"):
        best = sorted(one["ctxs"], key=lambda passage: passage["label"], reverse=True)
        shown.append(f"{_asked(one, 'Query', 'Ranking')} {' > '.join(passage['id'] for passage in best)}")
    return "\n\n".join([ask, *shown, _asked(row, "Query", "Ranking")])


def story(row: dict, examples: list[dict]) -> str:
    ask = (
        "You are given a story, which can be either a novel or a movie script, and a question. "
        "Answer the question as concisely as you can, using a single phrase if possible."
    )
    return f"{ask}\n\n{row.get('demo', '')}{row['context']}\n\nQuestion: {row['question']}\nAnswer:"


def labelled(row: dict, examples: list[dict]) -> str:
    ask = (
        "Use the provided mapping from the text to label to assign a label to the text. "
        'Only output "label: {label}" and nothing else. '
    )
    return f"{ask}\n\n{row['context']}\n\n{row['question']}\nlabel:"


def _asked(row: dict, question: str, answer: str) -> str:
    """A row's passages, and what is asked about them."""
    passages = []
    for passage in row["ctxs"]:
        number = f"[ID: {passage['id']}] " if "label" in passage else ""
        title = f" (Title: {passage['title']})" if "title" in passage else ""
        passages.append(f"{number}Document{title}: {passage['text']}")
    return "\n\n".join([*passages, f"{question}: {row[question.lower()]}\n{answer}:"])


def _drawn(examples: list[dict], row: dict, key: str) -> list[dict]:
    """SHOTS examples of other questions, the same ones for the same question."""
    others = list({one[key]: one for one in examples if one[key] != row[key]}.values())
    seed = int(hashlib.sha256(row[key].encode()).hexdigest(), 16) % 2**31
    return random.Random(seed).sample(others, min(SHOTS, len(others)))
