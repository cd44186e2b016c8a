# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # What a block is worth, estimated
#
# Block-sparse prefill keeps, for each head and each row of query blocks, some of the key blocks. Three questions decide
# how good that is at a given number of blocks:
#
# 1. **the estimate**: how much attention falls on a block, from a small fraction of the scores;
# 2. **the budget**: given estimates, where the next block is best spent;
# 3. **the shape** of a block.
#
# This notebook derives what `rr_flex` does beyond the published rule, and shows what two models say under it. Tables and
# the picture are computed from files in `benchmarks/results`; what they mean, and what failed, is in README.md beside this.
#
# Notation: $B$ batch, $H_q, H_{kv}$ heads, $L$ tokens, $D$ head dim, $n_Q, n_K$ blocks. Scores $s_{ij} = q_i \cdot k_j /
# \sqrt D$, probabilities $p_{ij}$, output $o_i = \sum_j p_{ij} v_j$. A block is $I \times J$.

# %%
# %load_ext rr_flex.notebook
import math

import torch

from benchmarks.study import judge_tables
from rr_flex.sampling import moments, pooled_features, with_square, with_variance

# %% [markdown]
# ## 1. Pooling keys: why the mean is not enough
#
# RRAttention scores a few queries with the *mean* key of each stride $S$ of 8 tokens. What the block's mass needs is the
# mean of exponentials. For logits $x_j$, $j \in S$, with mean $\mu$ and variance $\sigma^2$,
#
# $$\log \tfrac1{|S|} \sum_{j \in S} e^{x_j} = \mu + \tfrac12 \sigma^2 + \tfrac16 \kappa_3 + \dots$$
#
# (cumulants); exact with two terms if the logits are Gaussian. With $x_j = q \cdot k_j/\sqrt D$ the variance is
# $q^\top C q / D$, $C$ the covariance of the stride's keys. Keeping its diagonal makes it a dot product again:
#
# $$q' = [\,q,\ \tfrac1{2\sqrt D}\, q \odot q\,], \qquad k' = [\,\bar k,\ \operatorname{var} k\,], \qquad
# q' \cdot k' / \sqrt D = \mu + \tfrac12 \textstyle\sum_d q_d^2 \operatorname{var}(k_d) / D .$$
#
# That is `order=2`: the same attention call over features twice as wide.

# %%
generator = torch.Generator().manual_seed(0)
q = torch.randn(1, 1, 500, 64, generator=generator)
k = torch.randn(1, 1, 8 * 64, 64, generator=generator) * 1.5
exact = (q @ k.mT / 8).unflatten(-1, (64, 8)).logsumexp(-1) - math.log(8)
first = q @ moments(k, 8)[0].mT / 8
a, b = with_square(q, 0.5 / 8), with_variance(moments(k, 8), k.dtype)
second = a @ b.mT / 8
print(f"Gaussian keys: mean error of the log-mean-exp, order 1 {(first - exact).mean():+.3f}", end=", ")
print(f"order 2 {(second - exact).mean():+.3f} nats")

# %% [markdown]
# ## 2. Pooling queries instead
#
# In real models the error of pooled keys does not come from Gaussian spread. In layers that look everywhere a stride
# holds *one* key that matters among seven that do not, and no two moments tell that (full covariance does not help
# either). Scoring every key with one query in 32 or 64 gives such layers almost the oracle's selection:
# keys are spiky, queries are smooth. So exchange the sides. For a block $I$ of queries with mean $\bar q$,
#
# $$\tfrac1{|I|} \sum_{i \in I} e^{q_i \cdot k_j/\sqrt D} \approx
# \exp\!\big(\bar q \cdot k_j/\sqrt D + \tfrac12 \textstyle\sum_d \operatorname{var}(q_d)\, k_{jd}^2 / D\big),$$
#
# one query for 128, every key on its own: $L^2/128$ scores, half of the published estimate's $L^2/64$. It loses what
# single queries of a block seek apart from the others, which is what pooled *keys* see. The two fail in different
# places, and the mean of their shares of a row is better than either:
#
# $$w_{IJ} = \tfrac12 \frac{m^{\text{keys}}_{IJ}}{\sum_J m^{\text{keys}}_{IJ}} +
# \tfrac12 \frac{m^{\text{queries}}_{IJ}}{\sum_J m^{\text{queries}}_{IJ}} .$$
#
# Beside pooled keys the mean query alone does as well as with its variance. And the two need different strides than one
# alone: every key is scored on its own already, so that keys may be pooled coarsely, by 32; what the mean query misses is
# what single queries seek, so that they should stay fine, one in 8. `best` takes order 2 for the keys with a quarter of the
# second-order term (an eighth of the variance): the whole term is right for Gaussian logits, but where a stride of 32 keys
# holds a few that differ much it promises far more than they hold, and takes the row's share from blocks that count.
#
# Like the published rule this keeps *query independence*: a row of blocks looks at its own queries and at keys before its
# end, so that chunked prefill at multiples of the block size selects what one-shot prefill selects.

# %%
queries = torch.randn(1, 1, 128 * 8, 64, generator=generator) + torch.randn(1, 1, 1, 64, generator=generator)
exact = (queries @ k.mT / 8).unflatten(2, (8, 128)).logsumexp(3) - math.log(128)
for order in (1, 2):
    a, b = pooled_features(queries, 128, order), k if order == 1 else with_square(k, 0.5 / 8)
    print(f"Gaussian queries, pooled at order {order}: mean error {(a @ b.mT / 8 - exact).mean():+.3f} nats")

# %% [markdown]
# ## 3. The budget
#
# Dropping blocks changes a query's output by about $\sum_{J \text{ dropped}} p_{iJ} (\bar v_{iJ} - o_i)$. If those
# deviations are unrelated, the squared error is a sum over dropped blocks, and the least total error for a number of
# blocks is had by keeping the blocks of largest weight wherever they are: **one threshold for all rows and heads**. Top-τ
# instead covers the same share of every row, spending many blocks on rows whose mass is spread thin, where each saves
# little. Calibration (`rr_flex.calibration.thresholds`) goes one step further: for a price $\lambda$ of density, each head takes
# the threshold that minimises (its measured error) + $\lambda$ · density, so that the marginal gain is equal everywhere.
#
# What an error costs depends on the head. To second order a change $e$ of head outputs costs
# $\tfrac12 \sum_t \mathbb E\,(g_t \cdot e_t)^2$ nats of the next token's divergence, $g_t$ the gradient of $-\log p(y)$ at
# the output and $y$ drawn from the model's own prediction. Thresholds from these curves are a model's own budget.
#
# ## 4. What two models say
#
# Divergence of the next token from the dense model's, ten held-out texts of 8,192 tokens, read off at a density of .30, and
# the time of a layer at 131,072 tokens (kernel by kernel, FLASH first). One line a rule, by what it does on the worse model.

# %%
found = judge_tables.read()
clock = judge_tables.Clock()
at = {(model, rule): judge_tables.at(rows) for model, rules in found.items() for rule, rows in rules.items()}
before = {model: at[model, judge_tables.BEFORE].mean for model in found}
worse = {rule: max(at[model, rule].mean / before[model] for model in found) for rule in next(iter(found.values()))}
print(f"{'':46}" + "".join(f"{model + ': KL':>22}{'÷':>6}{'same':>8}" for model in found) + f"{'ms':>12}")
for rule in sorted(worse, key=worse.get):
    line = f"{rule:46}"
    for model in found:
        own = at[model, rule]
        line += f"{own.mean:>22.4f}{own.mean / before[model]:>6.2f}{own.agreement:>8.1%}"
    if rule in judge_tables.TIMED:
        backends = judge_tables.KERNELS[judge_tables.TIMED[rule][0]]
        line += f"{' / '.join(f'{clock.ms(rule, judge_tables.DENSITY, backend):.0f}' for backend in backends):>12}"
    print(line)

# %% [markdown]
# The same against time. A line is a rule between the two densities that were run, .24 and .36.

# %%
judge_tables.draw(found)
