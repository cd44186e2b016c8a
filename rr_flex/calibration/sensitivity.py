"""How much an error in each head's output moves what a model predicts.

The divergence of a changed model from its dense run is, to second order, KL = ½ Σ over positions of E[(g · e)²]: e is
the change of a head's output at a position, g the gradient there of −log p(y) and y a next token drawn from the dense
model's own prediction (the Fisher information; errors of different positions and heads are taken as uncorrelated).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from rr_flex.evaluation.sparse_model import attend_densely
from rr_flex.models.attention_by import attention_by

CHUNK = 256  # positions whose logits are held at once


class Felt(NamedTuple):
    """A layer of full attention in the dense run, and how the prediction feels a change of its output."""

    q: Float[Tensor, "1 Hq L D"]
    k: Float[Tensor, "1 Hkv L D"]
    v: Float[Tensor, "1 Hkv L Dv"]
    scale: float
    gradient: Float[Tensor, "1 Hq L Dv"] | None  # of −Σ log p(y) at the layer's output; None: not asked for


def output_gradients(model: PreTrainedModel, ids: Int[Tensor, "1 L"], seed: int = 0) -> dict[int, Felt]:
    """By layer of full attention, in the model's dtype; one dense prefill and one backward.

    Only activations have gradients: the model's parameters are left as they are, their `requires_grad` too.
    """
    kept: dict[int, tuple] = {}

    def attend(q, k, v, *, layer, scale, window):
        out = attend_densely(q, k, v, layer=layer, scale=scale, window=window)
        if window is None:
            out.retain_grad()
            kept[layer] = q.detach(), k.detach(), v.detach(), scale, out
        return out

    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad(), attention_by(model, attend):
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
            hidden.backward(_at_hidden(model, hidden.detach()[0], seed)[None])
    finally:
        for parameter in wanted:
            parameter.requires_grad_()
    return {layer: Felt(*rest, out.grad) for layer, (*rest, out) in kept.items()}


def _at_hidden(model: PreTrainedModel, hidden: Float[Tensor, "L width"], seed: int) -> Float[Tensor, "L width"]:
    """d(−log p(y))/d(hidden) = (p − onehot(y)) W of the last projection, some positions at a time."""
    weight = model.get_output_embeddings().weight
    drawn = torch.Generator(hidden.device).manual_seed(seed)
    parts = []
    for chunk in hidden.split(CHUNK):
        share = model.get_output_embeddings()(chunk).float().softmax(-1)
        token = torch.multinomial(share, 1, generator=drawn)
        parts.append(share.scatter_add(1, token, -torch.ones_like(share[:, :1])).to(weight.dtype) @ weight)
    return torch.cat(parts)
