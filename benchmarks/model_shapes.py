"""Whole models to time: real SmolLM2, or random weights in the shape of a known one."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rr_flex.models.loading import load_causal_lm, tokenize

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_8B |= {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
SMOLLM2 |= {"num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 131072}
SHAPES = {"llama-8b-shape": LLAMA_8B, "smollm2-shape": SMOLLM2, "tiny-shape": TINY}
MODELS = ["smollm2", *SHAPES]


def load(name: str, device: torch.device, dtype: torch.dtype, layers: int | None = None):
    """(model, its tokenizer or None); a shape has random weights, and `layers` layers if that is given.

    FileNotFoundError where the package that carries SmolLM2 is absent.
    """
    if name not in SHAPES:
        if layers is not None:
            raise ValueError(f"layers must be None for the real {name}, got {layers}")
        return load_causal_lm(device=device, dtype=dtype)
    shape = SHAPES[name] | ({} if layers is None else {"num_hidden_layers": layers})
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**shape, rms_norm_eps=1e-5))
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval(), None


def prompt(tokenizer, length: int, vocabulary: int, device: torch.device) -> Tensor:
    """[1, length]: Python's own documentation, or random tokens where there is no tokenizer."""
    if tokenizer is None:
        ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    else:
        from pydoc_data.topics import topics

        ids = tokenize(tokenizer, "\n\n".join(topics[name] for name in sorted(topics)), length)
    return ids.to(device)
