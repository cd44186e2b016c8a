"""Synthetic recall: three of HELMET's kinds of haystack (arXiv 2410.02694) in its words, made here from a seed."""

import json
import random
import uuid
from collections.abc import Callable
from functools import cache, partial

from rr_flex.tasks import answers, helmet_prompts
from rr_flex.tasks.answers import Asked, Question
from rr_flex.tasks.ruler import prose

SEED = 42
LEAST = 4  # things in a haystack


def json_kv(count: int, random_: random.Random) -> dict:
    """A JSON object of `count` UUID pairs, one key asked, two others shown as examples."""
    pairs = {_uuid(random_): _uuid(random_) for _ in range(count)}
    key, *others = random_.sample(list(pairs), 3)
    row = {"context": json.dumps(pairs, indent=0), "demos": [(other, pairs[other]) for other in others]}
    return row | {"question": key, "answer": pairs[key]}


def multikey(count: int, random_: random.Random) -> dict:
    """`count` needles, word to number, one word asked: all the haystack is distractors."""
    words = random_.sample(_words(), min(count, len(_words())))
    numbers = {word: _number(random_) for word in words}
    asked = random_.choice(words)
    lines = [_needle(word, number) for word, number in numbers.items()]
    return {"context": "\n".join(lines), "query": asked, "type_needle_v": "number", "answer": numbers[asked]}


def multivalue(count: int, random_: random.Random) -> dict:
    """Four numbers of one word among `count` words of prose; all four asked."""
    asked = random_.choice(_words())
    values = [_number(random_) for _ in range(4)]
    text = prose().split(" ")
    start = random_.randrange(max(1, len(text) - count))
    haystack = text[start : start + count]
    for value, place in zip(values, sorted(random_.sample(range(len(haystack) + 1), 4), reverse=True), strict=True):
        haystack.insert(place, _needle(asked, value))
    return {"context": " ".join(haystack), "query": asked, "type_needle_v": "numbers", "answer": values}


# task: (makes a row of so many things, the row's prompt, tokens that the answer may take)
TASKS: dict[str, tuple[Callable[[int, random.Random], dict], Callable[[dict, list], str], int]] = {
    "json_kv": (json_kv, helmet_prompts.json_kv, 40),
    "multikey": (multikey, helmet_prompts.needle, 20),
    "multivalue": (multivalue, helmet_prompts.needle, 60),
}


def scores(model, tokenizer, asked: Asked) -> tuple[list[float], int]:
    """(each sample's score 0 to 1, prompt tokens): the share of the right answers found in the model's."""
    samples = (fit(asked.task, asked.length, SEED + index, tokenizer) for index in range(asked.samples))
    return answers.answered(model, tokenizer, samples, chat=asked.chat)


def check(asked: Asked, tokenizer) -> None:
    """ValueError for a length that does not hold the least of each sample."""
    for index in range(asked.samples):
        must_hold(asked.length, asked.task, SEED + index, tokenizer)


def must_hold(length: int, task: str, seed: int, tokenizer) -> None:
    if (tokens := tokens_of(task, LEAST, seed, tokenizer)) > length:
        raise ValueError(f"length must hold a sample of {task}, here {tokens} tokens at least, got {length}")


def prompt(task: str, count: int, seed: int) -> str:
    make, prompt_of, _ = TASKS[task]
    return prompt_of(make(count, random.Random(seed)), [])


def tokens_of(task: str, count: int, seed: int, tokenizer) -> int:
    """Of a prompt with `count` things, and of its answer."""
    return len(tokenizer(prompt(task, count, seed), verbose=False).input_ids) + TASKS[task][2]


def fit(task: str, length: int, seed: int, tokenizer) -> Question:
    """The largest sample whose prompt and answer fit `length` tokens. ValueError where not even the least does."""
    must_hold(length, task, seed, tokenizer)

    def fits(count: int) -> bool:
        return tokens_of(task, count, seed, tokenizer) <= length

    low, high = LEAST, 2 * LEAST
    most = len(_words()) if task == "multikey" else 2**20
    while high < most and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    make, _, new_tokens = TASKS[task]
    right = helmet_prompts.references(make(low, random.Random(seed)))
    return Question(prompt(task, low, seed), new_tokens, partial(answers.recall, references=right))


def _needle(word: str, value: str) -> str:
    return f"One of the special magic numbers for {word} is: {value}."


def _number(random_: random.Random) -> str:
    return str(random_.randint(10**6, 10**7 - 1))


def _uuid(random_: random.Random) -> str:
    return str(uuid.UUID(int=random_.getrandbits(128), version=4))


@cache
def _words() -> list[str]:
    """Distinct lower-case words of the local prose, in alphabetical order."""
    return sorted({word for word in prose().split(" ") if word.isalpha() and word.islower()})
