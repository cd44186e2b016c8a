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
# # 5 · Anatomy of a kernel
#
# There is no kernel in this repository. `torch.compile` writes one: on a GPU Triton, on a CPU C++. This notebook finds
# the code that the compiler generated for `flex_attention` over our blocks, shows the lines where the sparsity lives,
# and then where the time goes.

# %%
# %load_ext rr_flex.notebook
import re
from pathlib import Path
from time import perf_counter

import torch
from matplotlib.figure import Figure
from torch._inductor.utils import run_and_get_code
from torch.nn.attention.flex_attention import flex_attention

from rr_flex import RRConfig, select_blocks
from rr_flex.block_mask import list_blocks
from rr_flex.kernels.options import attention_options
from rr_flex.mandatory import mandatory_blocks
from rr_flex.mass import Samples, block_mass
from rr_flex.sampling import pool_keys, sample_queries
from rr_flex.selection import select_top_tau

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
LENGTH, HEADS, KV_HEADS, HEAD_DIM = (8192, 32, 8, 128) if device == "cuda" else (2048, 8, 2, 64)

generator = torch.Generator().manual_seed(0)
topic = torch.randint(16, (LENGTH // 64,), generator=generator).repeat_interleave(64)
directions = 1.2 * torch.randn(16, HEAD_DIM, generator=generator)
q, k, v = (
    (torch.randn(1, heads, LENGTH, HEAD_DIM, generator=generator) + scale * directions[topic]).to(device, dtype)
    for heads, scale in ((HEADS, 1), (KV_HEADS, 1), (KV_HEADS, 0))
)
selection = select_blocks(q, k, tau=0.8, min_length=0)
print(f"{device}, {LENGTH:,} tokens, {HEADS} heads, density {selection.density.item():.0%}")

# %% [markdown]
# ## What the kernel is given
#
# Two lists a block row: *full* blocks, whose every pair is visible, and *partial* ones, in which the mask is evaluated.
# Counts, and indices in ascending order; whatever stands past the count is never read.

# %%
mask = selection.block_mask
row = mask.kv_num_blocks.shape[2] - 4
for name, count, indices in (
    ("full", mask.full_kv_num_blocks, mask.full_kv_indices),
    ("partial", mask.kv_num_blocks, mask.kv_indices),
):
    held = int(count[0, 0, row])
    print(f"head 0, block row {row}: {held} {name} blocks: {indices[0, 0, row, :held].tolist()}")

# %% [markdown]
# ## The code that the compiler wrote

# %%
torch._dynamo.reset()
attend = torch.compile(flex_attention, fullgraph=True, dynamic=False)
call = {"block_mask": mask, "enable_gqa": True, "kernel_options": attention_options(q, (128, 128))}
out, codes = run_and_get_code(attend, q, k, v, **call)
code = "\n".join(codes)
language = "Triton" if device == "cuda" else "C++"
print(f"{len(code.splitlines())} lines around a kernel in {language}")

# %% [markdown]
# The lines where the sparsity is, found in it by what they name:


# %%
def excerpt(text: str, pattern: str, before: int = 0, after: int = 6) -> str:
    """The first lines that match, with their neighbours and numbers."""
    lines = text.splitlines()
    at = next((number for number, line in enumerate(lines) if re.search(pattern, line)), None)
    if at is None:
        return f"(no line matches {pattern!r} in this version)"
    shown = range(max(0, at - before), min(len(lines), at + after + 1))
    return "\n".join(f"{number + 1:>5}  {lines[number][:140]}" for number in shown)


MARKS = {
    "Triton": {
        "the loop over the listed blocks, not over all keys": r"for start_n in",
        "how many blocks this row has": r"kv_num_blocks = tl.load|tl.load\(KV_NUM_BLKS",
        "to the next listed block: the jump that skips the others": r"def get_offset_for_next_block",
        "scores of one block: the tensor cores": r"qk = tl.dot",
        "the running maximum of the online softmax": r"m_ij = tl.maximum",
    },
    "C++": {
        "how many blocks this row has": r"kv_logical_num_data =",
        "the loop over the listed blocks, not over all keys": r"for.*(n < kv_indice_num|kv_indice_list)|int64_t n = 0",
        "which block that is": r"kv_logical_data =",
        "scores of one block: a matrix product": r"cpublas::(brgemm|gemm)",
        "the running maximum of the online softmax": r"tmp_max = |qk_max",
    },
}
for about, pattern in MARKS[language].items():
    print(f"— {about}\n{excerpt(code, pattern)}\n")

# %% [markdown]
# On a machine without a GPU the Triton kernel itself can't be generated, but the template from which every one is made
# is in PyTorch, and is worth reading: it is FlashAttention's loop with a list of blocks in place of "all keys".

# %%
FILES = ("flex_attention.py.jinja", "common.py.jinja", "utilities.py.jinja")
templates = Path(torch.__file__).parent / "_inductor" / "kernel" / "flex" / "templates"
template = "\n".join(path.read_text() for path in map(templates.joinpath, FILES))
TEMPLATE_MARKS = {
    "the lists come in beside q, k and v": r'def_kernel\("Q", "K", "V"',
    "partial blocks first: with the mask": r"kv_num_blocks = tl.load\(KV_NUM_BLKS",
    "then full blocks: the same loop without the mask": r"IS_FULL_BLOCKS=True",
    "the jump to the next listed block": r"def get_offset_for_next_block",
}
for about, pattern in TEMPLATE_MARKS.items():
    print(f"— {about}\n{excerpt(template, pattern, before=1)}\n")

# %% [markdown]
# ## Where the time goes
#
# Each step by itself, uncompiled but for the attention, which is how a CPU runs `select_blocks`. (On a GPU the whole
# selection is compiled and fused, and `rr_attention` puts everything into one graph: `python -m benchmarks run` times
# that.)


# %%
def milliseconds(function, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - start)
    return 1e3 * sorted(times[1:])[repeats // 2]


config = RRConfig(tau=0.8)
samples = Samples(
    sample_queries(q, 8),
    pool_keys(k, 8),
    strides=(8, 8),
    seq_lengths=(LENGTH, LENGTH),
    block_size=(128, 128),
    mask_mod=selection.mask_mod,
    scale=HEAD_DIM**-0.5,
)
mass = block_mass(samples)
always = mandatory_blocks(selection.visible, config, Lq=LENGTH, q_offset=0)
steps = {
    "sample the queries": lambda: sample_queries(q, 8),
    "pool the keys": lambda: pool_keys(k, 8),
    "score, softmax, sum by block": lambda: block_mass(samples),
    "select: top-τ": lambda: select_top_tau(mass, 0.8, selection.visible, always),
    "list the blocks": lambda: list_blocks(selection.kept & selection.whole),
    "attention over the blocks": lambda: attend(q, k, v, **call),
    "dense attention, for comparison": lambda: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    ),
}
times = {name: milliseconds(step) for name, step in steps.items()}

figure = Figure(figsize=(8, 3.4), layout="constrained")
axis = figure.subplots()
colours = ["#0072b2"] * 5 + ["#e69f00", "#999999"]
bars = axis.barh(list(times), list(times.values()), color=colours)
axis.bar_label(bars, fmt="%.2f", padding=3)
axis.invert_yaxis()
axis.set(xlabel=f"milliseconds, {LENGTH:,} tokens, {device}", xmargin=0.12)
figure

# %% [markdown]
# The blue bars are the price of knowing where to look. The orange one falls with the number of blocks; how far it
# stands below the grey one is what block-sparse attention is for, and depends on the length, the card and the density.
