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
# # 1 · The idea
#
# Attention over a long prompt spends most of its time on pairs of tokens that hardly matter. RRAttention
# ([arXiv 2602.05853](https://arxiv.org/abs/2602.05853)) finds out *before* the attention which 128 × 128 blocks of the
# map carry its mass, at 1/64 of the scores, and computes only those. This notebook draws each step on a small example,
# and ends with the compiled sparse kernel giving what masked dense attention gives.

# %%
# %load_ext rr_flex.notebook
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch.nn.attention.flex_attention import flex_attention

from rr_flex import RRConfig, select_blocks
from rr_flex.evaluation import recalled_mass, true_block_mass
from rr_flex.geometry import sampled_index
from rr_flex.mandatory import mandatory_blocks
from rr_flex.notebook import explore
from rr_flex.plots import HeadMap, block_map_figure, top_tau_figure

# %% [markdown]
# ## Queries and keys with something to find
#
# Random queries and keys attend to everything alike. Here each token belongs to one of a few topics, topics come back
# after a while as they do in a text, a query looks for its own topic's keys, and the first tokens draw attention
# whatever they say, as in real models.


# %%
def topical(length: int, heads: int, head_dim: int, *, seed: int, lasts: int = 60, sink: float = 3.0):
    """q, k, v as [1, heads, length, head_dim]: topics last some `lasts` tokens; each head heeds them more or less."""
    generator = torch.Generator().manual_seed(seed)
    change = torch.rand(length, generator=generator) < 1 / lasts
    topic = torch.randint(12, (length,), generator=generator)[change.long().cumsum(0)]
    directions = torch.randn(12, head_dim, generator=generator)
    strength = torch.linspace(0.7, 1.3, heads)[:, None, None]
    noise = torch.randn(3, heads, length, head_dim, generator=generator)
    q = noise[0] + strength * directions[topic]
    k = noise[1] + strength * directions[topic]
    k[:, :4] += sink * q.mean(1, keepdim=True)
    return q[None], k[None], noise[2][None]


# %% [markdown]
# ## Steps 1 and 2: sample the queries, pool the keys
#
# Of every *stride* of queries one is taken, and heads take turns: head h takes the token `h mod stride` of each. That
# is the round robin of the name. The keys of a stride become their mean. Below are 32 tokens with a stride of 4: the
# framed rows are the queries that each head samples, the columns between white lines are pooled into one key.

# %%
q, k, v = topical(32, 4, 32, seed=5, lasts=8, sink=0)
stride = 4
scores = (q @ k.mT * 32**-0.5).masked_fill(torch.ones(32, 32).triu(1).bool(), -torch.inf).softmax(-1)[0]

figure = Figure(figsize=(12, 3.6), layout="constrained")
for head, axis in enumerate(figure.subplots(1, 4, sharey=True)):
    axis.imshow(np.ma.masked_equal(scores[head], 0), cmap="viridis_r", vmax=0.5)
    for row in sampled_index(head, torch.arange(32 // stride), stride, 31):
        axis.add_patch(Rectangle((-0.5, row - 0.5), 32, 1, fill=False, edgecolor="#d55e00", linewidth=1.2))
    for column in range(stride, 32, stride):
        axis.axvline(column - 0.5, color="white", linewidth=1.5)
    axis.set(title=f"head {head} samples tokens {head}, {head + 4}, …", xlabel="key (token)")
figure.axes[0].set_ylabel("query (token)")
figure

# %% [markdown]
# ## Steps 3 and 4: score, and sum by block
#
# Sampled queries meet pooled keys, a softmax turns scores into shares, and the shares of each block are summed: its
# *estimated mass*. With a stride of 8 that is 1/64 of the scores of attention. Beside it stands the *true mass*, which
# costs as much as the whole attention and serves only to judge the estimate.

# %%
LENGTH, HEADS = 1024, 4
q, k, v = topical(LENGTH, HEADS, 64, seed=1)
true_mass = true_block_mass(q, k)


def maps(head: int, tau: float):
    selection = select_blocks(q, k, tau=tau, dense_last_rows=0)
    share = recalled_mass(true_mass, selection.kept)[0, head]
    shown = HeadMap(
        title=f"head {head}\nrecalled mass {share:.0%}",
        true_mass=true_mass[0, head],
        estimated_mass=selection.mass[0, head],
        kept=selection.kept[0, head],
        visible=selection.visible[0, 0],
    )
    columns = ("true", "estimate", "difference", "kept")
    return block_map_figure([shown], Lq=LENGTH, Lk=LENGTH, block_size=(128, 128), title=f"τ = {tau}", columns=columns)


explore(maps, head=[3, 2, 1, 0], tau=[0.9, 0.5, 0.7, 0.8, 0.95, 1.0])

# %% [markdown]
# ## Step 5: keep the fewest blocks that reach τ
#
# Row by row. The sink (key block 0) and the diagonal always stay; then the largest blocks join, until what is kept
# holds τ of the row's estimated mass. The block that crosses τ is kept. Here is one row of the map above.


# %%
def one_row(row: int, tau: float):
    selection = select_blocks(q, k, tau=tau, dense_last_rows=0)
    always = mandatory_blocks(selection.visible, RRConfig(dense_last_rows=0), Lq=LENGTH, q_offset=0)[0, 0, row]
    mass, kept = selection.mass[0, 3, row], selection.kept[0, 3, row]
    title = f"head 3, block row {row}: {int(kept.sum())} of {row + 1} visible blocks kept"
    return top_tau_figure(mass[: row + 1], kept[: row + 1], always[: row + 1], tau=tau, title=title)


explore(one_row, row=[7, 6, 5, 4, 3], tau=[0.9, 0.7, 0.8, 0.95])

# %% [markdown]
# A `Selection` holds all of that, and draws itself. (In a prompt's last block row every visible block is kept, unless
# `dense_last_rows=0` as above: the answer begins there.)

# %%
selection = select_blocks(q, k, tau=0.9)
selection

# %% [markdown]
# ## Steps 6 and 7: a BlockMask, and the compiled kernel
#
# `selection.block_mask` is an ordinary BlockMask of PyTorch's FlexAttention. The kernel that `torch.compile` makes of
# it visits only the listed blocks. Is that the same as dense attention under the same mask? The mask is written out
# here for every pair of tokens, which is what one avoids at length, and attended in float64.

# %%
attend = torch.compile(flex_attention, fullgraph=True, dynamic=False)
sparse = attend(q, k, v, block_mask=selection.block_mask)

pairs = selection.kept.repeat_interleave(128, 2).repeat_interleave(128, 3).tril()
exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=pairs)
dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

difference = (sparse - exact).abs().max().item()
assert difference < 1e-5
error = ((sparse - dense).norm() / dense.norm()).item()
print(f"largest difference from masked dense attention: {difference:.1e}")
print(f"distance from full attention, ‖out − dense‖ / ‖dense‖: {error:.3f}, at density {selection.density.item():.0%}")

# %% [markdown]
# The first number is rounding: the kernel computes exactly what it was told to. The second is the price of the blocks
# that were dropped, and the subject of the next notebooks.
