"""Texts of five kinds for evaluation, from the standard library and seeds: the same wherever Python's version is.

Each kind has parts that share no passage, so that a rule can be tuned on one and judged on others.
"""

import importlib
import inspect
import random
import unicodedata
import uuid
from pydoc_data.topics import topics

CODE_MODULES = (("argparse", "ast"), ("inspect", "typing"), ("tarfile", "doctest"), ("zipfile", "pickle"))
PART_CHARACTERS = 60_000  # of prose in one part: more than 8,192 tokens of any tokenizer here


def sample_text(kind: str, part: int = 0) -> str:
    """Text number `part` of a kind in KINDS; at least 40,000 characters."""
    if kind not in KINDS:
        raise ValueError(f"text must be a file or one of {', '.join(KINDS)}, got {kind!r}")
    return KINDS[kind](part)


def prose(part: int) -> str:
    """Python's language reference, as pydoc carries it; a paragraph that several topics share is told once."""
    paragraphs = dict.fromkeys(p for name in sorted(topics) for p in topics[name].split("\n\n"))
    whole = "\n\n".join(paragraphs)
    text = whole[part * PART_CHARACTERS : (part + 1) * PART_CHARACTERS]
    return _enough("prose", part, text)


def code(part: int) -> str:
    """Source of standard modules."""
    if not 0 <= part < len(CODE_MODULES):
        raise ValueError(f"part of code must lie in [0, {len(CODE_MODULES)}), got {part}")
    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in CODE_MODULES[part])


def key_value(part: int) -> str:
    """Lines of UUID keys and values, the speed prompt of the paper."""
    drawn = random.Random(part)
    lines = (f"{_uuid(drawn)}: {_uuid(drawn)}" for _ in range(1_000))
    return "The lines below hold keys and their values.\n" + "\n".join(lines)


def chat(part: int) -> str:
    """Turns of a user who asks about the language reference and an assistant who quotes it."""
    drawn = random.Random(part)
    names = [name for number, name in enumerate(sorted(topics)) if number % 3 == part % 3]
    drawn.shuffle(names)
    asked = ("What should I know about {}?", "Explain {} to me, please.", "And {}? Keep it short.", "How does {} work?")
    turns = []
    for name in names * 3:
        paragraphs = [p for p in topics[name].split("\n\n") if 80 < len(p) < 900]
        if paragraphs:
            start = drawn.randrange(len(paragraphs))
            answer = "\n\n".join(paragraphs[start : start + 2])
            question = drawn.choice(asked).format(name.replace("-", " "))
            turns.append(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>")
    return "\n".join(turns)


def table(part: int) -> str:
    """A Markdown table of Unicode characters."""
    rows = ["| code | character | name | category | decomposition |", "|---|---|---|---|---|"]
    for point in range(0x100 + 0x600 * part, 0x700 + 0x600 * part):
        name = unicodedata.name(chr(point), None)
        if name:
            cells = (chr(point), name.title(), unicodedata.category(chr(point)), unicodedata.decomposition(chr(point)))
            rows.append(f"| {point:04X} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


KINDS = {"prose": prose, "code": code, "key-value": key_value, "chat": chat, "table": table}


def _uuid(drawn: random.Random) -> uuid.UUID:
    return uuid.UUID(int=drawn.getrandbits(128), version=4)


def _enough(kind: str, part: int, text: str) -> str:
    if part < 0 or len(text) < PART_CHARACTERS:
        raise ValueError(f"part of {kind} must be a whole part of the text, got {part}")
    return text
