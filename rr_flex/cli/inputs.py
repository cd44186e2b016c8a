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

    name: str
    model: torch.nn.Module
    tokenizer: Any
    ids: dict[str, Tensor]  # by the text's name, [1, length]
    device: str
    dtype: torch.dtype

    @property
    def about(self) -> dict[str, Any]:
        """What a result file says of its run."""
        return {
            "model": self.name,
            "texts": list(self.ids),
            "tokens": next(iter(self.ids.values())).shape[1],
            "device": loading.device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "rr_flex": installed_version(),
        }


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
        raise ValueError(
            f"--text must be a file in UTF-8, got {source!r}: {error.reason} at byte {error.start}"
        ) from error
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
    name = arguments.model or loading.embedded_gguf().stem
    early = model_config(arguments.model)
    if early is not None:
        check_length(arguments, early, name)
        check(early)
    progress(f"loading {name}")
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = loading.load_tokenizer(arguments.model)
        ids = {source: loading.tokenize(tokenizer, text, arguments.length) for source, text in texts.items()}
        model, _ = loading.load_causal_lm(arguments.model, tokenizer=tokenizer, **where)
    if early is None:
        check_length(arguments, model.config.get_text_config(), name)
        check(model.config.get_text_config())
    ids = {source: each.to(where["device"]) for source, each in ids.items()}
    return Prompts(name=name, model=model, tokenizer=tokenizer, ids=ids, **where)


def check_length(arguments: argparse.Namespace, config: Any, name: str) -> None:
    longest = getattr(config, "max_position_embeddings", arguments.length)
    if not 2 <= arguments.length <= longest:
        raise ValueError(f"--length must lie in [2, {longest}] for {name}, got {arguments.length}")


def model_config(name: str | None) -> Any:
    """The text model's config without its weights; None for a .gguf file, whose header is read with the rest.

    ValueError in one line for a name that neither the cache nor the hub has, without the hub client's retries.
    """
    from transformers import AutoConfig

    if name is None:
        return EMBEDDED
    source = loading.source_of(name)
    if "gguf_file" in source:
        return None
    if not Path(source["pretrained_model_name_or_path"]).exists():
        check_hub(name)
    return AutoConfig.from_pretrained(**source).get_text_config()


def check_hub(name: str) -> None:
    from huggingface_hub import HfApi, try_to_load_from_cache

    rule = "--model must be a folder, a .gguf file or a name on the Hugging Face hub"
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=10)
    except Exception as error:  # whatever the network, the hub or the name's check may raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{rule}, got {name!r}: {reason}") from error
