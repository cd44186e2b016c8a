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
    "scaled_threshold": (0.032, 0.016, 0.008, 0.004, 0.002),
}
QUANTIZATIONS = {  # torchao's
    "int8-dynamic": "Int8DynamicActivationInt8WeightConfig",
    "int8-weight-only": "Int8WeightOnlyConfig",
    "fp8-weight-only": "Float8WeightOnlyConfig",
}


@dataclass(kw_only=True)
class Evaluation:
    """What is compared, and what was found so far: after an error too."""

    rules: dict[str, Rule]
    layers: Sequence[int]  # of full causal attention
    densities: Sequence[float]
    predict: bool = True  # run the whole model at each of TRIED
    # One of QUANTIZATIONS, applied to the linear layers after the reference run: its error stands beside sparsity's.
    quantization: str | None = None
    records: list[Record] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)

    def as_dict(self) -> dict[str, list[dict]]:
        return {
            "records": [record._asdict() for record in self.records],
            "predictions": [asdict(each) for each in self.predictions],
        }

    @torch.no_grad()
    def run(
        self,
        model: PreTrainedModel,
        texts: dict[str, Int[Tensor, "1 L"]],
        progress: Callable[..., None] = lambda stage, done=0, of=0: None,
    ) -> None:
        """Output errors in `layers` at `densities`, then the model's predictions. L must be a multiple of 128."""
        references = {}
        for number, (name, ids) in enumerate(texts.items()):
            progress(f"dense prefill of {name}, text", number + 1, len(texts))
            kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
            references[name] = hidden_states(model, ids, keeping(kept, self.layers))
            missing = sorted(set(self.layers) - set(kept))
            if missing:
                raise ValueError(f"layers must have full causal attention, got {missing}")
            progress(f"{len(self.rules)} rules on {name}, text", number + 1, len(texts))
            self.records += judge_text(name, kept, self.rules, self.densities, judged=self.layers)
        if not self.predict:
            return
        if self.quantization is not None:
            progress(f"quantizing to {self.quantization}")
            quantize(model, self.quantization)
        for name, ids in texts.items():
            runs = self._runs()
            for number, (rule, level, config) in enumerate(runs):
                progress(f"the model on {name}, run", number + 1, len(runs))
                attention = attend_densely if config is None else SparseAttention(config)
                compared = hidden_states(model, ids, attention)
                head = model.get_output_embeddings()
                result = compare_logits(references[name], compared, ids[0], head=head)
                density = 1.0 if config is None else attention.density
                ratio = result.perplexity_compared / result.perplexity
                self.predictions.append(Prediction(rule, name, level, density, result.kl, result.agreement, ratio))

    def _runs(self) -> list[tuple[str, float | None, RRConfig | None]]:
        """(rule, level, config) of each run of the model; the quantized model alone is "dense"."""
        runs = [("dense", None, None)] if self.quantization else []
        for name, rule in self.rules.items():
            if rule.config is not None:
                set_level, own = rule.config.with_settings, rule.config.level_field
                runs += [(name, level, set_level({own: level})) for level in TRIED[rule.config.budget]]
        return runs


def quantize(model: PreTrainedModel, quantization: str) -> None:
    """torchao's quantization of the linear layers under the last projection, in place."""
    from torchao import quantization as torchao

    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")
    torchao.quantize_(model.base_model, getattr(torchao, QUANTIZATIONS[quantization])())


def keeping(kept: dict, layers: Collection[int]):
    """Dense attention that keeps float32 q, k and v of some layers."""

    def attend(q, k, v, *, layer, scale, window):
        if layer in layers and window is None:
            if abs(scale * q.shape[-1] ** 0.5 - 1) > 1e-6:
                raise NotImplementedError(f"layer {layer} must scale its logits by 1/√D, got {scale}")
            kept[layer] = tuple(x.float() for x in (q, k, v))
        return attend_densely(q, k, v, layer=layer, scale=scale, window=window)

    return attend
