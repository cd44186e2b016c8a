"""A Hugging Face model run dense and with block-sparse attention, compared by its predictions.

Attention here is plain masked softmax a block row at a time, exact and without compiling: for judging, not for speed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from mask_mods import sliding_window
from rr_flex.config import RRConfig
from rr_flex.evaluation.block_outputs import KeptBlocks
from rr_flex.evaluation.language_model import LanguageModelComparison, compare_logits
from rr_flex.evaluation.plain import plain_selection
from rr_flex.models.attention_by import attention_by

STRIP_ELEMENTS = 1 << 26  # scores held at once: 256 MiB in float32

Configs = RRConfig | Mapping[int, RRConfig | None]


def attend_to_blocks(
    q: Float[Tensor, "B Hq L D"],
    k: Float[Tensor, "B Hkv L D"],
    v: Float[Tensor, "B Hkv L Dv"],
    chosen: KeptBlocks,
    *,
    scale: float,
    window: int | None = None,
) -> Float[Tensor, "B Hq L Dv"]:
    """Causal attention over the kept blocks, some block rows at a time; every query must see a key."""
    B, Hq, L = q.shape[:3]
    Hkv = k.shape[1]
    kept, (q_block, k_block) = chosen
    step = q_block * max(1, STRIP_ELEMENTS // (B * Hq * q_block * L))
    strips = []
    for start in range(0, L, step):
        stop = min(start + step, L)
        position, key = torch.arange(start, stop, device=q.device)[:, None], torch.arange(stop, device=q.device)
        allowed = key <= position
        if window is not None:
            allowed &= key > position - window
        rows = kept[:, :, start // q_block : -(-stop // q_block)].repeat_interleave(k_block, -1)[..., :stop]
        mask = rows.repeat_interleave(q_block, 2)[:, :, : stop - start] & allowed
        # Written out: with a mask torch's own attention takes its slowest way on a GPU.
        queries = q[:, :, start:stop].unflatten(1, (Hkv, Hq // Hkv)).flatten(2, 3)  # B Hkv group*rows D
        scores = (queries * scale @ k[:, :, :stop].mT).unflatten(2, (Hq // Hkv, stop - start))
        scores = scores.masked_fill_(~mask.unflatten(1, (Hkv, Hq // Hkv)), -torch.inf)
        share = scores.softmax(-1, dtype=torch.float32).to(v.dtype).flatten(2, 3)
        strips.append((share @ v[:, :, :stop]).unflatten(2, (Hq // Hkv, stop - start)).flatten(1, 2))
    return torch.cat(strips, 2)


def attend_densely(q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float, window: int | None) -> Tensor:
    # A key head a query head: with fewer, torch has no float32 kernel on a GPU that stores less than L² scores.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    strips = []  # of a window each: with one mask for all pairs memory would grow with L²
    for start in range(0, q.shape[2], window):
        stop, first = min(start + window, q.shape[2]), max(0, start - window + 1)
        position, key = torch.arange(start, stop, device=q.device)[:, None], torch.arange(first, stop, device=q.device)
        visible = (key <= position) & (key > position - window)
        keys, values = k[:, :, first:stop], v[:, :, first:stop]
        rows = q[:, :, start:stop]
        strips.append(F.scaled_dot_product_attention(rows, keys, values, attn_mask=visible, scale=scale))
    return torch.cat(strips, 2)


@dataclass
class SparseAttention:
    """An attention function for `attention_by`: each layer selects by its own config, None (or no entry) is dense."""

    configs: Configs
    densities: dict[int, float] = field(default_factory=dict)  # of the last run, by layer

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float, window: int | None) -> Tensor:
        config = self.configs if isinstance(self.configs, RRConfig) else self.configs.get(layer)
        if config is None:
            self.densities[layer] = 1.0
            return attend_densely(q, k, v, layer=layer, scale=scale, window=window)
        mask_mod = None if window is None else sliding_window(window)
        selection = plain_selection(q, k, config=config, mask_mod=mask_mod, scale=scale)
        self.densities[layer] = selection.density.item()
        return attend_to_blocks(q, k, v, KeptBlocks(selection.kept, selection.block_size), scale=scale, window=window)

    @property
    def density(self) -> float:
        return sum(self.densities.values()) / len(self.densities)


@torch.no_grad()
def hidden_states(model: PreTrainedModel, ids: Int[Tensor, "1 L"], attend: Callable) -> Float[Tensor, "L width"]:
    """The last hidden states of a prefill whose attention is `attend`."""
    if getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        raise NotImplementedError("model must have no soft cap on its logits, got final_logit_softcapping")
    with attention_by(model, attend):
        return model.base_model(ids, use_cache=False).last_hidden_state[0]


@torch.no_grad()
def compare_selections(
    model: PreTrainedModel, ids: Int[Tensor, "1 L"], candidates: Iterable[Configs], *, dense: Tensor | None = None
) -> list[tuple[float, LanguageModelComparison]]:
    """(density, comparison with the dense run) for each candidate; logits are made some positions at a time."""
    reference = hidden_states(model, ids, attend_densely) if dense is None else dense
    head = model.get_output_embeddings()
    results = []
    for configs in candidates:
        attention = SparseAttention(configs)
        compared = hidden_states(model, ids, attention)
        results.append((attention.density, compare_logits(reference, compared, ids[0], head=head)))
    return results
