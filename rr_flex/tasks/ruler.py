"""RULER's tasks (arXiv 2404.06654) by lm-eval's harness, on a model that is in memory and without a network."""

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

TASKS = {
    "niah_single_1": "niah_single_1",
    "niah_single_2": "niah_single_2",
    "niah_single_3": "niah_single_3",
    "niah_multikey_1": "niah_multikey_1",
    "niah_multikey_2": "niah_multikey_2",
    "niah_multikey_3": "niah_multikey_3",
    "niah_multivalue": "niah_multivalue",
    "niah_multiquery": "niah_multiquery",
    "vt": "ruler_vt",
    "cwe": "ruler_cwe",
    "fwe": "ruler_fwe",
}
NO_ESSAY = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")


def scores(model, tokenizer, task: str, length: int, samples: int, *, chat: bool = False) -> tuple[list[float], int]:
    """(each sample's score 0 to 1, prompt tokens) of the first `samples` of lm-eval's samples at `length` tokens.

    Tasks whose haystack is essays get Python's own documentation in their place, since essays need a network: their
    scores compare dense with sparse here, not with published ones.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    name = TASKS[task]
    with tempfile.TemporaryDirectory() as folder, _local_essays():
        # The tasks load the tokenizer by name.
        tokenizer.save_pretrained(folder)
        metadata = {"max_seq_lengths": [length], "tokenizer": folder}
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=length),
            tasks=[name],
            task_manager=TaskManager(metadata=metadata),
            metadata=metadata,
            limit=samples,
            bootstrap_iters=0,
            apply_chat_template=chat,
        )
    logged = results["samples"][name]
    tokens = sum(len(tokenizer(sample["arguments"][0][0]).input_ids) for sample in logged)
    return [float(sample[str(length)]) for sample in logged], tokens


@contextmanager
def _local_essays() -> Iterator[None]:
    """lm-eval's essay haystack and sentence splitter replaced by ones that need no download."""
    import nltk

    plain_download = nltk.download
    nltk.download = lambda *args, **kwargs: False  # asked for at import, for essays only
    try:
        from lm_eval.tasks.ruler import niah_utils, prepare_niah
    finally:
        nltk.download = plain_download
    before = niah_utils.get_haystack, prepare_niah.cached_sent_tokenize

    def haystack(type_haystack: str, *args, **kwargs):
        return prose().split(" ") if type_haystack == "essay" else before[0](type_haystack, *args, **kwargs)

    niah_utils.get_haystack, prepare_niah.cached_sent_tokenize = haystack, sentences
    try:
        yield
    finally:
        niah_utils.get_haystack, prepare_niah.cached_sent_tokenize = before


def prose() -> str:
    """Python's own documentation on one line: 460,000 characters of English, in every installation."""
    from pydoc_data.topics import topics

    return re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics)))


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?]) ", text)
