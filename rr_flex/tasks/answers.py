"""Greedy answers to prompts, and how answers are scored."""

import json
import math
import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch


@dataclass(frozen=True)
class Asked:
    """What a suite is asked for: one task at one length."""

    task: str
    length: int  # tokens of prompt and answer
    samples: int
    chat: bool = False  # prompts through the model's chat template
    batch_size: int = 1  # samples generated at once
    data: Path | None = None  # folder of the suite's data


@dataclass(frozen=True)
class Question:
    prompt: str
    new_tokens: int  # that the answer may take
    score: Callable[[str], float]  # of the answer, 0 to 1


def rows_of(path: Path, most: int | None = None) -> list[dict]:
    """The JSON objects of a data file, one a line, the first `most` or all. FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"--data must be the folder of the suite's data, which has no {path}")
    try:
        with path.open(encoding="utf-8") as lines:
            rows = list(islice(map(json.loads, filter(str.strip, lines)), most))
    except ValueError as error:
        raise ValueError(f"{path} must hold a JSON object a line: {error}") from error
    if not rows:
        raise ValueError(f"{path} must hold rows, got none")
    return rows


@torch.no_grad()
def answered(model, tokenizer, questions: Iterable[Question], *, chat: bool) -> tuple[list[float], int]:
    """(each question's score, prompt tokens): greedy answers, one at a time."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    scores, tokens = [], 0
    for question in questions:
        prompt = question.prompt
        if chat:
            message = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat, verbose=False).input_ids
        ids = ids.to(model.device)
        more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": question.new_tokens, "pad_token_id": pad}
        out = model.generate(ids, do_sample=False, **more)
        scores.append(question.score(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)))
        tokens += ids.shape[1]
    return scores, tokens


def recall(answer: str, references: Sequence[str]) -> float:
    """The share of the references that occur in the answer, case aside."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def substring_match(answer: str, references: Sequence[str]) -> float:
    """1 where any reference occurs in the answer, both normalised."""
    return float(any(normalise(reference) in normalise(answer) for reference in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """The best harmonic mean of precision and recall of normalised words over the references."""
    return max(_f1(normalise(answer).split(), normalise(reference).split()) for reference in references)


def ndcg(ranking: Sequence[str], relevance: dict[str, int], depth: int = 10) -> float:
    """Discounted cumulative gain of the ranking's first `depth` over the best possible one's; repeats count once."""
    seen = list(dict.fromkeys(ranking))[:depth]
    ideal = _gain(sorted(relevance.values(), reverse=True)[:depth])
    return _gain([relevance.get(name, 0) for name in seen]) / ideal if ideal else 0.0


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and runs of spaces, as SQuAD's script has it."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1(words: list[str], reference: list[str]) -> float:
    common = sum(min(words.count(word), reference.count(word)) for word in set(words))
    return 2 * common / (len(words) + len(reference)) if common else 0.0


def _gain(labels: Sequence[int]) -> float:
    return sum(label / math.log2(place + 2) for place, label in enumerate(labels))
