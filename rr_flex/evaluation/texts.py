"""Texts of five kinds for evaluation, from the standard library and seeds: the same under one version of Python.

Each kind has parts that share no passage, so that a rule can be tuned on one and judged on others.
"""

import ast
import importlib
import inspect
import random
import unicodedata
import uuid
from pydoc_data.topics import topics

CODE_MODULES = (("argparse", "ast"), ("inspect", "typing"), ("tarfile", "doctest"), ("zipfile", "pickle"))
CHAT_MODULES = (
    ("statistics", "difflib", "optparse", "functools", "ipaddress", "imaplib", "http.client"),
    ("subprocess", "shutil", "os", "tempfile", "pathlib", "codecs", "gzip", "smtplib", "threading"),
    ("logging", "logging.handlers", "unittest.mock", "unittest.case", "random", "fractions", "enum"),
)  # none of them gives a text of code
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
    """Turns of a user who asks about standard modules' functions and an assistant who quotes their docstrings."""
    if not 0 <= part < len(CHAT_MODULES):
        raise ValueError(f"part of chat must lie in [0, {len(CHAT_MODULES)}), got {part}")
    drawn = random.Random(part)
    asked = ("What does {} do?", "Explain {} to me, please.", "And {}? Keep it short.", "How do I use {}?")
    turns = []
    for name, answer in dict.fromkeys(pair for module in CHAT_MODULES[part] for pair in _docstrings(module)):
        question = drawn.choice(asked).format(name)
        turns.append(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>")
    drawn.shuffle(turns)
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


def _docstrings(module: str) -> list[tuple[str, str]]:
    """(module.name, docstring) of a module's classes, functions and methods that say more than a line."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 80:
                found.append((f"{module}.{node.name}", text))
    return found


def _uuid(drawn: random.Random) -> uuid.UUID:
    return uuid.UUID(int=drawn.getrandbits(128), version=4)


def _enough(kind: str, part: int, text: str) -> str:
    if part < 0 or len(text) < PART_CHARACTERS:
        raise ValueError(f"part of {kind} must be a whole part of the text, got {part}")
    return text
