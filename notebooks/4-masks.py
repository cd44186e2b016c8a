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
# # 4 · Masks
#
# A mask says which keys a query *may* see; the blocks that RRAttention keeps are chosen among those. Every mask of
# `mask_mods` knows two rules: the element rule, which FlexAttention evaluates inside blocks, and the block rule: is
# any, are all of a block's pairs visible. The second is in closed form, so that no mask is ever evaluated on all
# pairs. The upper pictures are the element rule, the lower ones the block rule: blue blocks are whole, orange ones are
# cut by the mask, and only those pay for evaluating it.

# %%
# %load_ext rr_flex.notebook
import torch

from mask_mods import (
    bidirectional,
    both,
    causal,
    document,
    documents_from_lengths,
    either,
    frames,
    padding,
    prefix,
    sink,
    sliding_window,
)
from rr_flex import select_blocks
from rr_flex.notebook import explore
from rr_flex.plots import dynamic_blocks_figure, mask_figure

LENGTH = 1024
shape = {"Lq": LENGTH, "Lk": LENGTH, "block_size": (64, 64)}

# %% [markdown]
# ## One by one

# %%
mask_figure(
    {
        "bidirectional()": bidirectional(),
        "causal()": causal(),
        "sliding_window(200)": sliding_window(200),
        "sliding_window(200, symmetric=True)": sliding_window(200, symmetric=True),
    },
    **shape,
)

# %%
lengths = torch.tensor([300, 500, 224])
packed = document(documents_from_lengths(lengths, total=LENGTH))
mask_figure(
    {
        "document(ids)": packed,
        "prefix(320)": prefix(320),
        "padding(left)": padding(torch.tensor([700]), "left", total=LENGTH),
        "frames(200, past=1)": frames(200, past=1),
    },
    **shape,
)

# %% [markdown]
# ## Chunks
#
# A chunk of queries against a cache: the positions move by an `offset`. Query i of the second half stands at 512 + i.

# %%
mask_figure(
    {"causal(offset=512)": causal(512), "sliding_window(300, offset=512)": sliding_window(300, 512)},
    **{"Lq": 512, "Lk": LENGTH, "block_size": (64, 64)},
)

# %% [markdown]
# ## Composed
#
# `both` keeps what all show, `either` what any shows. A composed mask is again a mask with both rules.

# %%
streaming = both(causal(), either(sink(64), sliding_window(256)))
mask_figure(
    {
        "packed, causal": both(packed, causal()),
        "sink and window": streaming,
        "prefix within documents": both(packed, prefix(150)),
    },
    **shape,
)

# %% [markdown]
# ## With dynamic blocks on top
#
# `select_blocks(q, k, mask_mod=…)` estimates under the mask: what the mask hides is neither scored nor kept. Grey
# blocks could be seen, and were dropped.

# %%
generator = torch.Generator().manual_seed(3)
topic = torch.randint(8, (LENGTH // 32,), generator=generator).repeat_interleave(32)
directions = 1.5 * torch.randn(8, 64, generator=generator)
q, k = (torch.randn(1, 2, LENGTH, 64, generator=generator) + directions[topic] for _ in range(2))
masks = {
    "causal": causal(),
    "packed, causal": both(packed, causal()),
    "sink and window": streaming,
    "bidirectional": bidirectional(),
}


def chosen(mask: str, tau: float):
    selection = select_blocks(q, k, mask_mod=masks[mask], tau=tau, block_size=64, dense_last_rows=0)
    title = f"{mask}, τ = {tau}: {selection.density_per_head[0, 0]:.0%} of the visible blocks"
    return dynamic_blocks_figure(selection, title=title)


explore(chosen, mask=list(masks), tau=[0.7, 0.5, 0.9, 0.95])

# %%
chosen("packed, causal", 0.7)

# %% [markdown]
# ## A video
#
# Video tokens come in frames: all tokens of a frame see each other, and some frames before theirs, and text after the
# video sees everything. 14 frames of 64 tokens, and 128 tokens of a question:

# %%
FRAME, VIDEO = 64, 14 * 64


def video_mask(past: int):
    """Text is causal; video frames see themselves and `past` frames before."""
    window = frames(FRAME, past=past)

    def mask_mod(b, h, q_idx, kv_idx):
        in_video = (q_idx < VIDEO) & (kv_idx < VIDEO)
        return torch.where(in_video, window(b, h, q_idx, kv_idx), kv_idx <= q_idx)

    return mask_mod


mask_figure({f"past = {past}": video_mask(past) for past in (1, 4, 14)}, **shape)

# %% [markdown]
# That mask is a plain function: any `mask_mod` works, at the cost of evaluating it on all pairs once. Neighbouring
# frames are alike, and the selection finds which of the earlier ones matter:

# %%
scene = torch.randint(4, (16,), generator=generator).repeat_interleave(FRAME)
q, k = (torch.randn(1, 2, LENGTH, 64, generator=generator) + directions[scene] for _ in range(2))
selection = select_blocks(q, k, mask_mod=video_mask(14), tau=0.8, block_size=64)
dynamic_blocks_figure(selection, title=f"scenes that come back, {selection.density_per_head[0, 0]:.0%} kept")

# %%
selection.block_mask
