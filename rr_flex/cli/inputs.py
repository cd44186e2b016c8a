"""Texts, device and model of a command, in the order in which what is wrong with them is found soonest."""

import argparse
import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rr_flex.evaluation.texts import KINDS, sample_text
from rr_flex.models import loading
from rr_flex.view.page.build import installed_version

# Of the default model's configuration, which takes twelve seconds to read from its file.
EMBEDDED = SimpleNamespace(num_hidden_layers=30, num_attention_heads=9, max_position_embeddings=8192)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A model and what it is to read."""

    model: torch.nn.Module
    tokenizer: Any
    ids: dict[str, Tensor]  # by the text's name, [1, length]
    about: dict[str, Any]  # what a result file says of its run


def read_text(source: str) -> str:
    """A file's text, or a part of a kind's, as in prose:1. ValueError names --text."""
    kind, _, part = source.partition(":")
    if kind in KINDS and not Path(source).exists():
        try:
            return sample_text(kind, int(part or 0))
        except ValueError as error:
            raise ValueError(f"--text must name a part of {kind} that there is, got {source!r}") from error
    try:
        text = Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise ValueError(f"--text must be a file in UTF-8, got {source!r}: {where}") from error
    except OSError as error:
        kinds = ", ".join(KINDS)
        raise ValueError(f"--text must be a file or one of {kinds}, got {source!r}: {error.strerror}") from error
    if not text.strip():
        raise ValueError(f"--text must hold words, got an empty file {source!r}")
    return text


def device_and_dtype(arguments: argparse.Namespace) -> dict[str, Any]:
    """auto: a GPU if there is one; bfloat16 on a GPU, float32 on a CPU."""
    device, dtype = arguments.device, arguments.dtype
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be one that torch can use, got {device!r}: {error}") from error
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return {"device": device, "dtype": getattr(torch, dtype)}


def load(
    arguments: argparse.Namespace, texts: dict[str, str], check: Callable[[Any], None], progress: Callable[..., None]
) -> Prompts:
    """`check` gets the text model's config, before the weights are loaded wherever it can be had so early.

    Loading bars of others are not shown. ValueError or OSError on what the user can mend.
    """
    where = device_and_dtype(arguments)
    name, length = arguments.model or loading.embedded_gguf().stem, arguments.length

    def check_all(config: Any) -> None:
        longest = getattr(config, "max_position_embeddings", length)
        if not 2 <= length <= longest:
            raise ValueError(f"--length must lie in [2, {longest}] for {name}, got {length}")
        check(config)

    early = model_config(arguments.model)
    if early is not None:
        check_all(early)
    progress(f"loading {name}")
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = loading.load_tokenizer(arguments.model)
        ids = {source: loading.tokenize(tokenizer, text, length).to(where["device"]) for source, text in texts.items()}
        model, _ = loading.load_causal_lm(arguments.model, tokenizer=tokenizer, **where)
    if early is None:
        check_all(model.config.get_text_config())
    hardware = loading.device_name(where["device"])
    about = {
        "model": name,
        "texts": list(ids),
        "tokens": length,
        # A CPU's times depend on its threads.
        "device": f"CPU, {torch.get_num_threads()} threads" if hardware == "CPU" else hardware,
        "dtype": str(where["dtype"]).removeprefix("torch."),
        "torch": torch.__version__,
        "rr_flex": installed_version(),
    }
    return Prompts(model=model, tokenizer=tokenizer, ids=ids, about=about)


def model_config(name: str | None) -> Any:
    """The text model's config without its weights; None for a .gguf file, whose header is read with the rest."""
    from transformers import AutoConfig

    if name is None:
        return EMBEDDED
    source = loading.source_of(name)
    return None if "gguf_file" in source else AutoConfig.from_pretrained(**source).get_text_config()
