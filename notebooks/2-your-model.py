# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2 · Your model
#
# A Hugging Face model, switched to RRAttention by one call, and what that does: to each layer and head, to the
# predictions, and to the text that it writes. The model is SmolLM2-135M-Instruct, out of a Python package; any other
# goes through the same lines with its name in `load_causal_lm`.

# %%
# %load_ext rr_flex.notebook
import torch

from rr_flex import select_blocks
from rr_flex.cli.demonstration import default_text
from rr_flex.evaluation import compare_logits, recalled_mass, true_block_mass
from rr_flex.models import enable
from rr_flex.models.attention_by import attention_by
from rr_flex.models.loading import load_causal_lm, tokenize
from rr_flex.notebook import explore
from rr_flex.plots import HeadMap, block_map_figure, model_figure, row_budget_figure

torch.manual_seed(0)
model, tokenizer = load_causal_lm()
LENGTH = 1536
ids = tokenize(tokenizer, default_text(), LENGTH)
print(tokenizer.decode(ids[0, :60]))

# %% [markdown]
# ## What each head looks at
#
# One dense run, whose queries and keys are kept. Nothing is changed yet.

# %%
captured = {}


def remember(q, k, v, *, layer, scale, window):
    captured[layer] = q, k
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


with torch.no_grad(), attention_by(model, remember):
    dense_logits = model(ids, use_cache=False).logits[0]

selections = {layer: select_blocks(*qk, tau=0.95) for layer, qk in captured.items()}
density = {layer: selection.density_per_head[0] for layer, selection in selections.items()}
model_figure(density, name="density", title=f"kept blocks at τ = 0.95, {LENGTH:,} tokens")

# %% [markdown]
# Dark heads need few blocks: they look at the sink, the neighbourhood, or a few places. Bright ones look everywhere.
# The maps of one head, with its true mass beside the estimate:


# %%
def head_maps(layer: int, head: int, tau: float):
    q, k = captured[layer]
    group = q.shape[1] // k.shape[1]
    selection = select_blocks(q, k, tau=tau)
    true_mass = true_block_mass(q[:, head : head + 1], k[:, head // group : head // group + 1])
    recall = recalled_mass(true_mass, selection.kept[:, head : head + 1])[0, 0]
    shown = HeadMap(
        title=f"layer {layer}, head {head}\nrecalled mass {recall:.1%}",
        true_mass=true_mass[0, 0],
        estimated_mass=selection.mass[0, head],
        kept=selection.kept[0, head],
        visible=selection.visible[0, 0],
    )
    return block_map_figure([shown], Lq=LENGTH, Lk=LENGTH, block_size=(128, 128), title=f"τ = {tau}")


explore(head_maps, layer=[14, *range(30)], head=range(9), tau=[0.95, 0.8, 0.9, 0.99])

# %% [markdown]
# And how many blocks each part of the prompt gets, in one layer:

# %%
selection = selections[14]
visible = selection.visible.expand_as(selection.kept)[0]
row_budget_figure(selection.kept[0], visible, Lq=LENGTH, q_block=128, title="layer 14")

# %% [markdown]
# ## Switch it on
#
# `enable` holds until `restore()`, or within a `with` block. The first prefill compiles for some seconds. The report
# says for every layer how often it was sparse, at which density, and how often dense and why. `min_length=0` makes it
# sparse at any length; without it calls for which dense attention is faster stay dense.

# %%
with enable(model, tau=0.95, min_length=0) as enabled, torch.no_grad():
    sparse_logits = model(ids, use_cache=False).logits[0]
print(enabled.report())

# %%
comparison = compare_logits(dense_logits, sparse_logits, ids[0])
print(f"perplexity        dense {comparison.perplexity:.3f}, sparse {comparison.perplexity_compared:.3f}")
print(f"same next token   {comparison.agreement:.1%}")
print(f"KL(dense, sparse) {comparison.kl:.2e} nats a token")

# %% [markdown]
# ## Does it still say the same?
#
# The text continued by both. Only the prompt is sparse; decoding is dense in both, and the report says so.


# %%
def continuation() -> str:
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return tokenizer.decode(out[0, LENGTH:], skip_special_tokens=True).strip()


dense_text = continuation()
with enable(model, tau=0.95, min_length=0) as enabled:
    sparse_text = continuation()
print("…", tokenizer.decode(ids[0, -30:]))
print("\ndense :", dense_text)
print("\nsparse:", sparse_text)
print("\ncalls:", enabled.report().sparse, "sparse;", dict(enabled.report().dense))

# %% [markdown]
# A model of 135 million parameters says what it can. What counts here is that both say the same, or where they part.
# For every head's map on a page of its own: `rr-flex demo --maps all --json run.json && rr-flex page run.json`.
