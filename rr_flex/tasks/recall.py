"""Synthetic recall in the manner of HELMET (arXiv 2410.02694): its three kinds of haystack, made here from a seed."""

import json
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from rr_flex.tasks.answers import answer, recall
from rr_flex.tasks.ruler import prose

SEED = 42


@dataclass(frozen=True)
class Sample:
    prompt: str
    answers: list[str]  # each found, whatever its case, scores its share
    new_tokens: int  # that the answer may take


def json_kv(count: int, random_: random.Random) -> Sample:
    """A JSON object of `count` UUID pairs, one key asked."""
    pairs = {_uuid(random_): _uuid(random_) for _ in range(count)}
    key = random_.choice(list(pairs))
    prompt = (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        f"{json.dumps(pairs, indent=0)}\n\nKey: {key}\nCorresponding value:"
    )
    return Sample(prompt, [pairs[key]], 40)


def multikey(count: int, random_: random.Random) -> Sample:
    """`count` needles, word to number, one word asked: all the haystack is distractors."""
    words = random_.sample(_words(), min(count, len(_words())))
    numbers = {word: str(random_.randint(10**6, 10**7 - 1)) for word in words}
    asked = random_.choice(words)
    lines = [_needle(word, number) for word, number in numbers.items()]
    return Sample(_magic("\n".join(lines), asked, "number"), [numbers[asked]], 20)


def multivalue(count: int, random_: random.Random) -> Sample:
    """Four numbers of one word among `count` words of prose; all four asked."""
    asked = random_.choice(_words())
    values = [str(random_.randint(10**6, 10**7 - 1)) for _ in range(4)]
    text = prose().split(" ")
    start = random_.randrange(max(1, len(text) - count))
    haystack = text[start : start + count]
    for value, place in zip(values, sorted(random_.sample(range(len(haystack) + 1), 4), reverse=True), strict=True):
        haystack.insert(place, _needle(asked, value))
    return Sample(_magic(" ".join(haystack), asked, "numbers"), values, 60)


TASKS: dict[str, Callable[[int, random.Random], Sample]] = {
    "json_kv": json_kv,
    "multikey": multikey,
    "multivalue": multivalue,
}


def fit(task: str, length: int, seed: int, tokenizer) -> Sample:
    """The largest sample whose prompt and answer fit `length` tokens. ValueError where not even the least does."""
    make = TASKS[task]

    def fits(count: int) -> bool:
        sample = make(count, random.Random(seed))
        return len(tokenizer(sample.prompt, verbose=False).input_ids) + sample.new_tokens <= length

    low, high = 4, 8
    if not fits(low):
        raise ValueError(f"length must hold a sample of {task}, got {length}")
    most = len(_words()) if task == "multikey" else 2**20
    while high < most and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return make(low, random.Random(seed))


def scores(model, tokenizer, task: str, length: int, samples: int, *, chat: bool = False) -> tuple[list[float], int]:
    """(each sample's score 0 to 1, prompt tokens): greedy answers, share of the references found in them."""
    found, tokens = [], 0
    for index in range(samples):
        sample = fit(task, length, SEED + index, tokenizer)
        text, size = answer(model, tokenizer, sample.prompt, sample.new_tokens, chat=chat)
        tokens += size
        found.append(recall(text, sample.answers))
    return found, tokens


def _needle(word: str, value: str) -> str:
    return f"One of the special magic numbers for {word} is: {value}."


def _magic(context: str, asked: str, kind: str) -> str:
    what = f"What are all the special magic {kind} for {asked} mentioned in the provided text?"
    if kind == "number":
        what = f"What is the special magic number for {asked} mentioned in the provided text?"
    lead = "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    verb = "is" if kind == "number" else "are"
    return (
        f"{lead}I will quiz you about the numbers afterwards.\n{context}\n{what} "
        f"The special magic {kind} for {asked} mentioned in the provided text {verb}"
    )


def _uuid(random_: random.Random) -> str:
    return str(uuid.UUID(int=random_.getrandbits(128), version=4))


def _words() -> list[str]:
    """Distinct lower-case words of the local prose, in alphabetical order."""
    if not _WORDS:
        _WORDS.extend(sorted({word for word in prose().split(" ") if word.isalpha() and word.islower()}))
    return _WORDS


_WORDS: list[str] = []
