"""q, k and v of a real model's prefill, for `run --captured FILE`."""

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.workloads import Inputs
from rr_flex.evaluation.rules_on_texts import keeping
from rr_flex.evaluation.sparse_model import hidden_states
from rr_flex.models.loading import tokenize


@torch.no_grad()
def capture(model, tokenizer, text: str, length: int, layers: Sequence[int]) -> Inputs:
    """What attention gets in `layers` of a prefill of `length` tokens, [layers, H, length, D]: one layer a batch row.

    ValueError for layers that the model has no softmax attention in.
    """
    kept: dict[int, Inputs] = {}
    hidden_states(model, tokenize(tokenizer, text, length).to(model.device), keeping(kept, layers))
    absent = sorted(set(layers) - kept.keys())
    if absent:
        raise ValueError(f"layers must be layers with full attention, got {absent}")
    return Inputs(*(torch.cat([kept[layer][index] for layer in layers]) for index in range(3)))


def write(inputs: Inputs, path: Path) -> None:
    """As float16, in the file that `benchmarks.workloads.captured` reads."""
    torch.save({name: x.half().cpu() for name, x in inputs._asdict().items()}, path)
