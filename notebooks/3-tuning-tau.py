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
# # 3 · Tuning τ
#
# τ is a promise about *estimated* mass. What one wants is little error for few blocks, and less time. Three pictures:
# error against density for several settings, τ for each head from one text and judged on another, and the density from
# which sparse attention is faster on this machine.

# %%
# %load_ext rr_flex.notebook
from time import perf_counter

import torch
from torch.nn.attention.flex_attention import flex_attention

from rr_flex import RRConfig, select_blocks
from rr_flex.cli.demonstration import default_text
from rr_flex.evaluation import density, output_error, recalled_mass, true_block_mass
from rr_flex.kernels.options import attention_options
from rr_flex.models.attention_by import attention_by
from rr_flex.models.loading import load_causal_lm, tokenize
from rr_flex.plots import density_figure, model_figure

LAYERS, LENGTH = (4, 14, 22), 1536
model, tokenizer = load_causal_lm()
both = tokenize(tokenizer, default_text(), 2 * LENGTH)
texts = {"tuned on": both[:, :LENGTH], "judged on": both[:, LENGTH:]}

# %% [markdown]
# Queries, keys and values of three layers, from a dense run over each text:


# %%
def capture(ids):
    found = {}

    def remember(q, k, v, *, layer, scale, window):
        if layer in LAYERS:
            found[layer] = q, k, v
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    with torch.no_grad(), attention_by(model, remember):
        model(ids, use_cache=False)
    return found


captured = {name: capture(ids) for name, ids in texts.items()}
true_mass = {name: {layer: true_block_mass(q, k) for layer, (q, k, _) in of.items()} for name, of in captured.items()}
dense = {
    layer: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for layer, (q, k, v) in captured["judged on"].items()
}

# %% [markdown]
# ## Error against density
#
# The same queries and keys, three settings, τ (or the threshold) from low to high. Each point is the mean over layers
# and heads. Lower and further left is better; the settings differ most in which blocks they find, not in how many.


# %%
def attend(selection, q, k, v):
    """Dense attention under the kept blocks, pair by pair: slow, exact, and without a compilation."""
    q_block, k_block = selection.block_size
    pairs = selection.kept.repeat_interleave(q_block, 2).repeat_interleave(k_block, 3).tril()
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=pairs, enable_gqa=True)


def point(config):
    densities, errors = [], []
    for layer, (q, k, v) in captured["judged on"].items():
        selection = select_blocks(q, k, config=config)
        densities.append(density(selection.kept, selection.visible).mean())
        errors.append(output_error(attend(selection, q, k, v), dense[layer]).mean())
    return torch.stack(densities).mean().item(), torch.stack(errors).mean().item()


shares = (0.6, 0.8, 0.95)
thresholds = (0.08, 0.03, 0.01)
curves = {
    "paper: top-τ": [point(RRConfig(tau=tau)) for tau in shares],
    "second order, top-τ": [point(RRConfig(order=2, tau=tau)) for tau in shares],
    "second order, one threshold": [point(RRConfig(order=2, budget="threshold", threshold=t)) for t in thresholds],
}
density_figure(curves, measure="output error, ‖out − dense‖ / ‖dense‖", log=True)

# %% [markdown]
# ## A τ for each head
#
# Heads differ: for one, τ = 0.7 keeps 95 % of the true mass; another needs 0.99. `tau` takes one number a head. Here is
# the least τ with which each head recalls 95 % of its true mass on the first text, found by halving an interval.


# %%
def least_tau(layer: int, target: float, steps: int = 6):
    q, k, _ = captured["tuned on"][layer]
    low, high = torch.zeros(q.shape[1]), torch.ones(q.shape[1])
    for _ in range(steps):
        middle = (low + high) / 2
        recall = recalled_mass(true_mass["tuned on"][layer], select_blocks(q, k, tau=middle.tolist()).kept)[0]
        low, high = torch.where(recall < target, middle, low), torch.where(recall < target, high, middle)
    return high


tau = {layer: least_tau(layer, 0.95) for layer in LAYERS}
model_figure(tau, name="τ for 95 % of the true mass")

# %% [markdown]
# On the text that they were *not* tuned on, against the single τ that gives the same density there:


# %%
def on_other_text(tau_of_layer):
    kept, recall, least = [], [], []
    for layer, (q, k, _) in captured["judged on"].items():
        selection = select_blocks(q, k, tau=tau_of_layer(layer))
        share = recalled_mass(true_mass["judged on"][layer], selection.kept)
        kept.append(density(selection.kept, selection.visible).mean())
        recall.append(share.mean())
        least.append(share.min())
    return torch.stack(kept).mean().item(), torch.stack(recall).mean().item(), torch.stack(least).min().item()


calibrated = on_other_text(lambda layer: tau[layer].tolist())
low, high = 0.0, 1.0
for _ in range(6):
    single = (low + high) / 2
    uniform = on_other_text(lambda layer, tau=single: tau)
    low, high = (single, high) if uniform[0] < calibrated[0] else (low, single)
print(f"{'':<24}density  mass recalled  worst head")
print(f"{'τ for each head':<24}{calibrated[0]:>7.3f}  {calibrated[1]:>13.4f}  {calibrated[2]:>10.4f}")
print(f"{f'τ = {single:.3f} for all':<24}{uniform[0]:>7.3f}  {uniform[1]:>13.4f}  {uniform[2]:>10.4f}")

# %% [markdown]
# ## The break-even
#
# Time of the compiled kernel against the number of blocks that it visits, on this machine, beside dense attention.
# Where the lines cross, sparse attention starts to pay; the estimate's own time is added. On a GPU the kernel is
# near the dense one's speed per block, and the crossing lies at high densities. On a CPU it does from some 2,000 tokens
# on; in a shorter text it lies low or nowhere.

# %%
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float32 if device == "cpu" else torch.bfloat16
q, k, v = (x.to(device, dtype) for x in captured["judged on"][14])
compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)


def seconds(function, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


estimate = seconds(lambda: select_blocks(q, k, tau=0.9, min_length=0))
points = []
for share in (0.3, 0.8, 1.0):
    selection = select_blocks(q, k, tau=share, min_length=0)
    mask, options = selection.block_mask, attention_options(q, (128, 128))
    call = {"block_mask": mask, "enable_gqa": True, "kernel_options": options}
    time = seconds(lambda call=call: compiled(q, k, v, **call))
    points.append((selection.density.item(), 1e3 * (estimate + time)))
dense_time = 1e3 * seconds(
    lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
)
ends = [points[0][0], 1.0]
density_figure(
    {"estimate + sparse attention": points, "dense attention": [(end, dense_time) for end in ends]},
    measure=f"ms for {LENGTH:,} tokens on {device}",
)

# %% [markdown]
# For a whole model at once there is `rr-flex calibrate`, for curves of your own model and text `rr-flex evaluate`, and
# for a GPU's kernels and break-even `rr-flex tune`.
