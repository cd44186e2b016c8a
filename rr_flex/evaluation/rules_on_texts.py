"""Rules on a model and texts: output error at equal density, and what the model's predictions make of each budget."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from rr_flex.config import RRConfig
from rr_flex.evaluation.judging import Record, judge_text
from rr_flex.evaluation.language_model import compare_logits
from rr_flex.evaluation.predictions import Prediction
from rr_flex.evaluation.rules import Rule
from rr_flex.evaluation.sparse_model import SparseAttention, attend_densely, hidden_states

TRIED = {  # of the language model's curves, by budget
    "top_tau": (0.7, 0.8, 0.9, 0.95, 0.98),
    "threshold": (0.032, 0.016, 0.008, 0.004, 0.002),
}
QUANTIZATIONS = ("int8-dynamic", "int8-weight-only", "fp8-weight-only")


@dataclass
class Evaluation:
    records: list[Record] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)

    def as_dict(self) -> dict[str, list[dict]]:
        return {
            "records": [record._asdict() for record in self.records],
            "predictions": [asdict(each) for each in self.predictions],
        }


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    texts: dict[str, Int[Tensor, "1 L"]],
    rules: dict[str, Rule],
    *,
    layers: Sequence[int],
    densities: Sequence[float],
    predict: bool = True,
    quantization: str | None = None,
    progress: Callable[..., None] = lambda stage, done=0, of=0: None,
) -> Evaluation:
    """Output errors of `rules` in `layers` at `densities`, and with `predict` runs of the whole model.

    L a multiple of 128, layers of full causal attention. `quantization` (one of QUANTIZATIONS, torchao's) is applied to
    the linear layers after the reference run, so that the error of sparsity stands beside it.
    """
    found = Evaluation()
    references = {}
    before = {layer - 1 for layer in layers if layer and any(rule.needs_before for rule in rules.values())}
    for number, (name, ids) in enumerate(texts.items()):
        progress(f"dense prefill of {name}", number, len(texts))
        kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        references[name] = hidden_states(model, ids, keeping(kept, before.union(layers)))
        missing = sorted(set(layers) - set(kept))
        if missing:
            raise ValueError(f"layers must have full causal attention, got {missing}")
        progress(f"{len(rules)} rules on {name}", number, len(texts))
        found.records += judge_text(name, kept, rules, densities, judged=layers)
    if not predict:
        return found
    head = model.get_output_embeddings()
    if quantization is not None:
        progress(f"quantizing to {quantization}")
        quantize(model, quantization)
    runs = [("dense", None, None)] if quantization else []
    runs += [
        (name, level, rule.config.with_settings(_budget(rule.config, level)))
        for name, rule in rules.items()
        if rule.config is not None
        for level in TRIED[rule.config.budget]
    ]
    for name, ids in texts.items():
        for number, (rule, level, config) in enumerate(runs):
            progress(f"the model on {name}", number + 1, len(runs))
            attention = attend_densely if config is None else SparseAttention(config)
            compared = hidden_states(model, ids, attention)
            result = compare_logits(references[name], compared, ids[0], head=head)
            density = 1.0 if config is None else attention.density
            ratio = result.perplexity_compared / result.perplexity
            found.predictions.append(Prediction(rule, name, level, density, result.kl, result.agreement, ratio))
    return found


def quantize(model: PreTrainedModel, quantization: str) -> None:
    """torchao's quantization of the linear layers under the last projection, in place."""
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    configs = (Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, Float8WeightOnlyConfig)
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")
    quantize_(model.base_model, dict(zip(QUANTIZATIONS, configs, strict=True))[quantization]())


def _budget(config: RRConfig, level: float) -> dict[str, float]:
    return {config.level_field: level}


def keeping(kept: dict, layers: Collection[int]):
    """Dense attention that keeps float32 q, k and v of some layers."""

    def attend(q, k, v, *, layer, scale, window):
        if layer in layers and window is None:
            if abs(scale * q.shape[-1] ** 0.5 - 1) > 1e-6:
                raise NotImplementedError(f"layer {layer} must scale its logits by 1/√D, got {scale}")
            kept[layer] = tuple(x.float() for x in (q, k, v))
        return attend_densely(q, k, v, layer=layer, scale=scale, window=window)

    return attend
