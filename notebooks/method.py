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
# This notebook derives what `rr_flex` does beyond the published rule, measures it, and lists what failed. Every table and
# picture is computed from a results file beside it (`study.json`); the command that made that file is at the end.
#
# Notation: $B$ batch, $H_q, H_{kv}$ heads, $L$ tokens, $D$ head dim, $n_Q, n_K$ blocks. Scores $s_{ij} = q_i \cdot k_j /
# \sqrt D$, probabilities $p_{ij}$, output $o_i = \sum_j p_{ij} v_j$. A block is $I \times J$.

# %%
# %load_ext rr_flex.notebook
import math
from pathlib import Path

import torch

from benchmarks.study.every_rule import BEST, FAST, RULES
from benchmarks.study.study_file import StudyFile, density_from, gain_over, group_of, kind_of, kl_gain, of_group
from rr_flex.evaluation.pictures import error_figure, prediction_figure
from rr_flex.evaluation.predictions import curve, kl_at, value_at
from rr_flex.evaluation.rules import multiplications
from rr_flex.evaluation.summaries import summarise
from rr_flex.sampling import moments, pooled_features, with_square, with_variance

here = Path(__file__).parent if "__file__" in globals() else Path()
study = StudyFile.read(here / "study.json")
records, about = study.records, study.about
print(f"{about['model']}, {about['tokens']:,} tokens, layers {about['layers']}")
print(f"{about['device']}, torch {about['torch']}, Python {about['python']}, {about['date']}")
texts_by_group = {}
for text in dict.fromkeys(record.text for record in records):
    texts_by_group.setdefault(group_of(text), []).append(text)
for group, texts in texts_by_group.items():
    print(f"{group}: {', '.join(texts)}")

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
# either, see the table). Scoring every key with one query in 32 or 64 gives such layers almost the oracle's selection:
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
# what single queries seek, so that they should stay fine, one in 8. Strides 8/32 cost the multiplications of 16/16, and at
# equal weight of the variance win, most where queries change abruptly (table in section 5). `fast`, in this notebook, is order 1 for both, 0.75 of the published
# estimate's multiplications; `best` takes order 2 for the keys, 1.0, with a quarter of the second-order term (an
# eighth of the variance): the whole term is right for Gaussian logits, but where a stride of 32 keys holds a few that differ
# much it promises far more than they hold, and takes the row's share from blocks that count. Where pooled queries see those
# blocks neither, they are pruned: rare by the mean error over heads, costly by what the model predicts (section 4).
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
# ## 4. The study
#
# What follows was measured before rules were judged by two models' predictions in a given time (README.md beside this), and
# `best` and `fast` are here what these presets were then: the estimates above over blocks of 128×64, at orders 2 and 1.
#
# Always at equal density (kept / visible blocks, mandatory ones included: sink, diagonal, last row). *Error* is
# ‖out − dense‖ / ‖dense‖ of a head, mean over heads and layers. There are five kinds of text: prose, code, a chat, key–value
# lines and a table. Rules were chosen, and budgets calibrated, on part 0 of each (the tables say *tuned on*); parts 1 and 2
# are what they are judged by (*held out*). No part shares more than a hundredth of its long lines with another that it is
# judged against. *Flatter* is a stand-in for a model whose attention is diffuse, for want of one without a network: the
# same queries halved, that is logits at temperature 2. *Structured* is the synthetic workload of
# `benchmarks/workloads.py`, head dim 128, 16,384 tokens; its seed 0 was tuned on. *4096* and *2048* are the first five
# held-out texts at those lengths; mandatory blocks are .28 (128×64) and .33 (128×128) at 2,048 tokens, so that densities
# below .40 are not equal there.

# %%
DENSITIES = (0.25, 0.3, 0.4, 0.5)
GROUPS = [
    group
    for group in ("held out", "flatter", "structured", "4096", "2048")
    if any(group_of(r.text) == group for r in records)
]
WHOLE = "both, order 2, 8/32"  # `best` with half of the variance
MAIN = ("rr", "order 2 128×64, threshold", "pooled queries, order 2", FAST, BEST, "best 128×128", WHOLE)
MAIN += ("best, calibrated", "oracle mass", "oracle mass 128×64")
COLOURED = ("rr", FAST, BEST, WHOLE, "oracle mass 128×64")  # first, so that a rule has one colour in all pictures
DRAWN = (*COLOURED, *MAIN[1:3])


def table(group: str, rules=None, scope: str = "layer") -> None:
    """Mean error by rule; cost: multiplications of the estimate's scores, published = 1."""
    summary = summarise(records, scope=scope, texts=of_group(group))
    print(f"{group}, {scope}".ljust(48) + f"{'cost':>6}" + "".join(f"{density:>9.2f}" for density in DENSITIES))
    for rule in rules or summary:
        if rule in summary:
            config = RULES[rule].config if rule in RULES else None
            cost = f"{multiplications(config):.2f}" if config else ""
            print(f"{rule:48}{cost:>6}" + "".join(f"{summary[rule][density].mean:>9.4f}" for density in DENSITIES))
    print()


for group in GROUPS:
    table(group, MAIN)

# %% [markdown]
# How much lower than the published rule's, paired by text, with 95 % intervals of a bootstrap over texts; and how much of
# the gap between the published rule and the oracle of 128×64 blocks is closed:

# %%
groups = {name: of_group(name) for name in GROUPS}
kinds = dict.fromkeys(kind_of(record.text) for record in records if group_of(record.text) == "held out")
groups |= {kind: lambda text, kind=kind: group_of(text) == "held out" and kind_of(text) == kind for kind in kinds}
for rule in (FAST, BEST, "best 128×128", WHOLE, "both, order 2, 16/16"):
    for name, texts in groups.items():
        line = f"{rule:28} {name:11}"
        for density in DENSITIES:
            gain = gain_over(records, rule, "rr", density, scope="layer", texts=texts)
            line += f"  {gain.mean:4.0%} ({gain.low:3.0%} to {gain.high:3.0%})"
        closed = [
            gain_over(records, rule, "rr", density, scope="layer", texts=texts, oracle="oracle mass 128×64").mean
            for density in DENSITIES
        ]
        print(line + "   of the gap " + " ".join(f"{share:4.0%}" for share in closed))

# %%
shown = GROUPS[0]
figure = error_figure(
    [record for record in records if group_of(record.text) == shown],
    DRAWN,
    f"{about['model']}, {about['tokens']:,} tokens, {shown}: texts that no rule was chosen on",
)
figure

# %% [markdown]
# The mean hides how much layers differ. The estimate gains most where the published one is bad, in layers that look
# everywhere for single keys; elsewhere both are nearer to the oracle. A choice of layers is a choice of the result:

# %%
BY_LAYER = ("rr", BEST, "oracle mass 128×64")
apart = [record for record in records if group_of(record.text) == shown and record.layer >= 0]
print(f"{', '.join(dict.fromkeys(record.text for record in apart))}, density 0.30")
print("layer" + "".join(f"{rule:>30}" for rule in BY_LAYER) + f"{'lower by':>10}")
for layer in sorted({record.layer for record in apart}):
    errors = {rule: [] for rule in BY_LAYER}
    for record in apart:
        if (record.layer, record.density, record.scope) == (layer, 0.3, "layer"):
            errors.get(record.rule, []).append(record.error)
    mean = [sum(each) / len(each) for each in errors.values()]
    print(f"{layer:>5}" + "".join(f"{error:>30.4f}" for error in mean) + f"{1 - mean[1] / mean[0]:>10.0%}")

# %% [markdown]
# The structured workload is the opposite case to text: its keys are alike within segments and its queries change abruptly.
# Pooled queries alone do little there, pooled keys of order 2 are excellent, and the mean of both holds.

# %%
figure = error_figure(
    [record for record in records if group_of(record.text) == "structured"],
    DRAWN,
    "structured workload, 16,384 tokens, head dim 128",
)
figure

# %% [markdown]
# ### What the model predicts
#
# Errors of layers add up in ways that no layer shows, so the last judge is the model: its predictions with sparse attention
# in every layer against its dense ones, on held-out texts. *KL* is the divergence in nats a token, *agreement* the share of
# positions with the same most likely next token, *perplexity* its excess over the dense model's. Each rule runs at several
# levels of its budget; values at a density are interpolated between them where they lie at most .25 of density apart, and
# means are over texts. A dash: a text's levels do not reach that density (mandatory blocks alone are .3 at 2,048 tokens),
# or lie further apart.

# %%
PREDICTED = (
    "rr",
    FAST,
    BEST,
    "both, order 2, 8/32",
    "best, every layer at the density",
    "best, calibrated",
    "oracle mass 128×64",
)
READ = {"kl": (kl_at, 1, 0), "agreement": (value_at, 100, 0), "perplexity_ratio": (value_at, 100, 1)}
for length in (8192, 4096, 2048):
    runs, where = study.predictions[length], about["predictions"][str(length)]
    texts = list(dict.fromkeys(run.text for run in runs))
    print(f"{length:,} tokens, {', '.join(texts)}; {where['device']}, torch {where['torch']}, {where['date']}")
    for measure, (read, factor, less) in READ.items():
        print(f"{measure:36}" + "".join(f"{density:>9.2f}" for density in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)))
        for rule in PREDICTED:
            line = f"{rule:36}"
            for density in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
                values = [read(curve(runs, rule, text, measure), density) for text in texts]
                mean = None if None in values else factor * (sum(values) / len(values) - less)
                line += f"{'–':>9}" if mean is None else f"{mean:>9.4f}" if measure == "kl" else f"{mean:>8.2f}%"
            print(line)
    for density in (0.3, 0.4, 0.5, 0.6):
        gain = kl_gain(runs, "best, calibrated", BEST, density, texts)
        if gain is not None:
            print(
                f"calibrated below one threshold at {density}: KL {gain.mean:.0%} ({gain.low:.0%} to {gain.high:.0%})"
            )
    print()

# %%
order = [*COLOURED, "best, calibrated"]
shown_runs = [run for rule in order for run in study.predictions[8192] if run.rule == rule]
prediction_figure(shown_runs, f"{about['model']}, 8,192 tokens: a thin line a text, a thick one their mean")

# %% [markdown]
# From which density a rule holds on each text, agreement of 99 % or more and perplexity within .5 %; and where `best` and
# `fast` are behind another rule: the text, the first and the last such density, and in brackets by how much at most:

# %%
TOLERANCE = {"agreement": 0.99, "perplexity_ratio": -0.005}


def goodness(points, measure: str) -> list[tuple[float, float]]:
    """A curve with more for better: a perplexity is the better the nearer it is to the dense model's."""
    return [(density, -abs(y - 1) if measure == "perplexity_ratio" else y) for density, y in points]


def loss(runs, rule: str, text: str, measure: str, density: float) -> float | None:
    points = curve(runs, rule, text, measure)
    if measure == "kl":
        return kl_at(points, density)
    value = value_at(goodness(points, measure), density)
    return None if value is None else -value


for length, runs in sorted(study.predictions.items(), reverse=True):
    texts = list(dict.fromkeys(run.text for run in runs))
    for measure, least in TOLERANCE.items():
        print(f"{length:,} tokens, {measure} from".ljust(42) + "".join(f"{text:>12}" for text in texts))
        for rule in PREDICTED:
            found = [density_from(goodness(curve(runs, rule, text, measure), measure), least) for text in texts]
            print(f"{rule:42}" + "".join(f"{'–':>12}" if x is None else f"{x:>12.2f}" for x in found))
    for rule, other in ((BEST, "rr"), (FAST, "rr"), (BEST, FAST)):
        for measure in READ:
            behind = []
            for text in texts:
                losses = {}
                for density in (x / 100 for x in range(15, 100)):
                    pair = [loss(runs, each, text, measure, density) for each in (rule, other)]
                    if None not in pair and pair[0] > pair[1]:
                        losses[density] = pair[0] - pair[1]
                if losses:
                    behind.append(f"{text} {min(losses):.2f} to {max(losses):.2f} ({max(losses.values()):.1g})")
            print(f"{length:,} tokens, {measure}, {rule} behind {other}: {', '.join(behind) or 'nowhere'}")
    print()

# %% [markdown]
# `best` is ahead of the published rule by KL on every text at every density and length, and by agreement but for one table
# at 4,096 tokens and the other at 2,048, by less than .1 points where both agree with the dense model at more than 99 % of
# positions. In perplexity it is behind over stretches. `fast` is not ahead everywhere. What costs most is one threshold for
# all heads: thresholds calibrated on other texts of the same kinds lower the divergence to a third and less at 8,192 tokens
# and to two fifths at the shorter lengths, about that of the *true* masses under one threshold, though at equal density in
# every layer they have more output error than one threshold up to .40 and hardly less at .50. Some layers and heads matter
# more to the model than the mean over them says.
#
# ## 5. What failed, and what is level
#
# Every rule on the ten held-out texts. After the errors, the error over that of `best` (1 is level) on these, with an
# interval over texts, and for the rules that were run there on the same with flatter attention and on the structured
# workload.

# %%
table("held out")
found = {(record.rule, group_of(record.text)) for record in records}
print(f"{'error / error of ' + BEST:48}{'held out':<44}{'flatter':<14}{'structured'}")
print(" " * 48 + f"{0.3:<22.2f}{0.5:<22.2f}" + f"{0.3:<7.2f}{0.5:<7.2f}" * 2)
for rule in dict.fromkeys(r.rule for r in records if group_of(r.text) == "held out" and r.rule != BEST):
    line = f"{rule:48}"
    for group, width in (("held out", 22), ("flatter", 7), ("structured", 7)):
        for density in (0.3, 0.5):
            cell = "–"
            if (rule, group) in found:
                gain = gain_over(records, rule, BEST, density, scope="layer", texts=of_group(group))
                cell = f"{1 - gain.mean:.2f}"
                if group == "held out":
                    cell += f" ({1 - gain.high:.2f} to {1 - gain.low:.2f})"
            line += cell.ljust(width)
    print(line)

# %% [markdown]
# * **Other phases** than RRAttention's head phase, and XAttention's antidiagonal at eight times the cost: within 3 % of each
#   other. Where a query is sampled hardly matters.
# * **Better second-order terms** for pooled keys. The covariance within rotary pairs and bounded terms are level with the
#   diagonal. A cap gains 5 to 7 %. The *full* covariance overshoots where logits are heavy-tailed and is worse than its
#   diagonal; bent, it is better, but it is no dot product of features. Finer key strides with order 2 are worse: a stride of
#   four that holds the sink has an enormous variance.
# * **Expanding around the head's mean query**, and **keys sorted into groups that are alike** before pooling: better than
#   contiguous strides around zero, behind pooled queries and keys together, and each needs keys pooled anew for each head
#   or a sort.
# * **Two query clusters a block**: better than one, at twice the scores, and behind both sides together.
# * **Every key, one query in 8**, at eight times the cost: level with `best`.
# * **Finer pooling beside `best`** for half as many multiplications again: queries pooled by 64 are 1 % lower on text and 10 %
#   on the structured workload; finer strides with half of the variance are worse on text, 19 to 31 % lower on the
#   structured workload. *Blocks of 64×64* are 12 to 15 % lower on text, and slow to attend over.
# * **Value-aware weights**, by block means or by the sampled queries' own outputs: 2 to 6 % worse than none. The oracle's
#   displacement is worse than its mass at .30 and 9 % better at .50 (128×64). What helps an oracle is mean squared
#   probabilities, 6 to 9 %.
# * **Hedges**: the geometric mean is 10 to 18 % worse on text and far worse on the structured workload: a block that one side
#   does not see is lost. The larger of the two is level; other weights than halves are 0 to 9 % worse.
# * **Mean of squares**, and **a weight by how much the sampled queries disagree**: 2 to 11 % worse on text, 14 to 29 % better on
#   the structured workload; half of the variance trades one for the other as well.
# * **Priors**: the layer before (mean over its heads) is 1 % lower at .30 and higher at .50; the block row before is no better.
#   The first would make a layer's selection depend on another's, the second a row's on the row before, which ends query
#   independence and with it exact chunked prefill.
# * **Coarse to fine**: a query in 32 deciding the clear cases and one in 8 the rest closes most of what separates the two,
#   but a quarter to a third of the blocks lie within a factor of four of the threshold; a fine estimate of them alone,
#   scattered as they are, saves less than finer strides for all cost. `best` refined with keys by 8 is 2 % lower, and asks
#   for a quarter to a half of the blocks.
# * **A threshold for each head at equal density per head** loses to one threshold for all heads. Calibrated thresholds, scaled
#   until each layer has the density, have more output error than one for all up to .40 (`best, calibrated` in section 4),
#   whereas what the model predicts is far better.
# * **Mean correction** (pruned blocks back as one pooled key and value for 64 tokens): 6 to 7 % lower, for extra key blocks
#   in every row: not shipped. With the second-order term it is far *worse* than none.
# * **Low precision**: features in FP8 or INT8 with a scale a row change it by less than 1 %.
#
# ## 6. Two definitions of equal density
#
# An earlier exploration of layers 6, 14 and 22 on one text found that order 2 alone halves the error at equal density.
# Here it does not. Layers differ as section 4 shows, and with one level for all layers a rule spends more in layers that
# need more. Both definitions, on the held-out texts:

# %%
for scope in ("layer", "model"):
    some = ("rr", "order 2", "order 2 128×64", "order 2 128×64, threshold", BEST, "oracle mass", "oracle mass 128×64")
    table("held out", some, scope=scope)

# %% [markdown]
# ## 7. The command
#
# ```bash
# python -m benchmarks.study --out raw             # on a GPU; --smoke for a trial
# python -m benchmarks.study.study_tables raw            # writes study.json and its page
# ```
#
# Predictions come first, then errors; with `--budget-seconds` what does not fit is left out. The tables take several
# folders, and keep what a new one lacks. Texts come from the standard library, so another version of Python makes slightly
# other texts.
