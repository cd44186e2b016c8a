"""RULER's tasks (arXiv 2404.06654) by lm-eval's harness, on a model that is in memory and without a network."""

import copy
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from rr_flex.tasks.answers import Asked

NEEDLES = ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue", "multiquery")
TASKS = {f"niah_{name}": f"niah_{name}" for name in NEEDLES} | {name: f"ruler_{name}" for name in ("vt", "cwe", "fwe")}
USUAL = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
# Modules of lm_eval.tasks.ruler and their functions that make 500 samples, whatever the limit.
MAKERS = {
    "niah_utils": "generate_samples",
    "vt_utils": "sys_vartrack_w_noise_random",
    "cwe_utils": "sys_word_pair_random",
    "fwe_utils": "sys_kwext",
}
LEAST_OF_RULER = 4096  # tokens: every task has a sample of that length


def scores(model, tokenizer, asked: Asked) -> tuple[list[float], int]:
    """(each sample's score 0 to 1, prompt tokens) of the first `samples` of lm-eval's samples at `length` tokens.

    Tasks whose haystack is essays get Python's own documentation in their place, since essays need a network: their
    scores compare dense with sparse here, not with published ones. Prompts of a batch are padded on the left.
    ValueError as `check`.
    """
    check(asked, tokenizer)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    name, here = TASKS[asked.task], Path(lm_eval.__file__).parent / "tasks" / "ruler"
    with tempfile.TemporaryDirectory() as folder, _offline(asked.samples):
        # The tasks load the tokenizer by name.
        tokenizer.save_pretrained(folder)
        metadata = {"max_seq_lengths": [asked.length], "tokenizer": folder}
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=asked.batch_size, max_length=asked.length),
            tasks=[name],
            task_manager=TaskManager(include_path=str(here), include_defaults=False, metadata=metadata),
            metadata=metadata,
            limit=asked.samples,
            bootstrap_iters=0,
            apply_chat_template=asked.chat,
        )
    logged = results["samples"][name]
    tokens = sum(len(tokenizer(sample["arguments"][0][0]).input_ids) for sample in logged)
    return [float(sample[str(asked.length)]) for sample in logged], tokens


def check(asked: Asked, tokenizer) -> None:
    """ValueError for a length that does not hold the least sample, for which most of lm-eval's makers look for ever."""

    def count(*texts: str) -> int:
        return len(tokenizer("\n".join(texts), verbose=False).input_ids)

    with _offline(1) as modules, tempfile.TemporaryDirectory() as folder:
        if asked.task.startswith("niah"):  # ends, but slowly at great lengths
            if asked.length < LEAST_OF_RULER:
                tokenizer.save_pretrained(folder)
                getattr(modules["niah_utils"], asked.task)(max_seq_lengths=[asked.length], tokenizer=folder)
            return
        module = modules[f"{asked.task}_utils"]
        if asked.task == "vt":  # behind an example of at most 500 tokens
            text, answer = module.generate_input_output(10, 1, 4)
            least = 500 + count(text, *answer) + 30
        elif asked.task == "cwe":
            *texts, answer = module.generate_input_output(20, asked.length)
            least = count(*texts, *answer) + 120
        else:  # a fiftieth of the tokens is how many words it has, of which three are asked for
            least = max(200, count(module.TEMPLATE))
    if asked.length < least:
        raise ValueError(f"length must hold a sample of {asked.task}, about {least} tokens, got {asked.length}")


@contextmanager
def _offline(samples: int) -> Iterator[dict[str, ModuleType]]:
    """lm-eval's makers of samples with a local haystack for essays, making no more samples than are wanted.

    The same ones each time: the words of cwe are shuffled by a generator that nothing seeds.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    with patch("nltk.download", lambda *args, **kwargs: False):  # asked for at import, for essays only
        modules = {name: import_module(f"lm_eval.tasks.ruler.{name}") for name in (*MAKERS, "prepare_niah")}
    plain = modules["niah_utils"].get_haystack
    replaced = [(name, maker, _fewer(getattr(modules[name], maker), samples)) for name, maker in MAKERS.items()]
    replaced += [
        ("niah_utils", "get_haystack", _local_haystack(plain)),
        ("prepare_niah", "cached_sent_tokenize", sentences),
        ("cwe_utils", "RNG", copy.deepcopy(modules["cwe_utils"].RNG)),
    ]
    with ExitStack() as stack:
        for name, function, ours in replaced:
            # lm-eval loads a module anew unless it carries the time of its file.
            modules[name].__mtime__ = Path(modules[name].__file__).stat().st_mtime_ns
            stack.enter_context(patch.object(modules[name], function, ours))
        yield modules


def _fewer(make: Callable, samples: int) -> Callable:
    @wraps(make)
    def make_fewer(*args, num_samples: int = 500, **kwargs):
        return make(*args, num_samples=min(num_samples, samples), **kwargs)

    return make_fewer


def _local_haystack(plain: Callable) -> Callable:
    def haystack(type_haystack: str, *args, **kwargs):
        return prose().split(" ") if type_haystack == "essay" else plain(type_haystack, *args, **kwargs)

    return haystack


@cache
def prose() -> str:
    """Python's own documentation on one line: 460,000 characters of English, in every installation."""
    from pydoc_data.topics import topics

    return re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics)))


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?]) ", text)
