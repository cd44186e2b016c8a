"""The method in float64 loops, written from its text: an independent reading to hold the library against.

Axes as everywhere: B batch, Hq Hkv heads, Lq Lk tokens, D head dim, nq nk strides, nQ nK blocks. Nothing here is fast.
"""

import math
from types import SimpleNamespace

import torch


def runs(length, size):
    """The index ranges of `length` tokens cut into runs of `size`; the last may be short."""
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def causal_element(offset):
    """Query index i stands at position i + offset and sees the keys at or before it."""
    return lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + offset


def pairs(element, B, Hq, Lq, Lk):
    """element(b, h, q_idx, kv_idx) at every index: bool [B, Hq, Lq, Lk]."""
    b, h = torch.arange(B).view(-1, 1, 1, 1), torch.arange(Hq).view(1, -1, 1, 1)
    q_idx, kv_idx = torch.arange(Lq).view(1, 1, -1, 1), torch.arange(Lk).view(1, 1, 1, -1)
    return torch.as_tensor(element(b, h, q_idx, kv_idx)).expand(B, Hq, Lq, Lk)


def sampled_indices(Lq, stride, head, head_offset=0):
    """The one query index that this head samples from each stride; past the end it is the last token."""
    return [min(run.start + (head + head_offset) % stride, Lq - 1) for run in runs(Lq, stride)]


def sample(q, stride, head_offset=0):
    """[B, Hq, Lq, D] -> [B, Hq, nq, D]"""
    heads = range(q.shape[1])
    return torch.stack([q[:, h, sampled_indices(q.shape[2], stride, h, head_offset)] for h in heads], 1)


def pool(k, stride, key_valid=None):
    """Mean and population variance of each stride's valid keys, [B, Hkv, nk, D] each, and their count, [B, nk]."""
    B, Hkv, Lk, D = k.shape
    nk = len(runs(Lk, stride))
    key_valid = torch.ones(B, Lk, dtype=torch.bool) if key_valid is None else key_valid
    mean, var = torch.zeros(B, Hkv, nk, D).double(), torch.zeros(B, Hkv, nk, D).double()
    count = torch.zeros(B, nk, dtype=torch.long)
    for b in range(B):
        for j, run in enumerate(runs(Lk, stride)):
            keys = k[b, :, [index for index in run if key_valid[b, index]]].double()  # [Hkv, count, D]
            count[b, j] = keys.shape[1]
            if keys.shape[1]:
                mean[b, :, j] = keys.mean(1)
                var[b, :, j] = ((keys - keys.mean(1, keepdim=True)) ** 2).mean(1)
    return mean, var, count


def block_mass(q, k, shown, *, scale, strides, block_size, order=1, head_offset=0, key_valid=None, variance_weight=0.5):
    """Each tile's sum of the sampled queries' softmax over the key strides that they see: [B, Hq, nQ, nK].

    A stride's exponential counts in proportion to its number of valid keys.
    """
    (B, Hq, Lq, _), (_, Hkv, Lk, _) = q.shape, k.shape
    (sq, sk), (bq, bk) = strides, block_size
    sampled = sample(q, sq, head_offset).double()
    mean, var, count = pool(k, sk, key_valid)
    key_runs = runs(Lk, sk)
    mass = torch.zeros(B, Hq, len(runs(Lq, bq)), len(runs(Lk, bk))).double()
    for b in range(B):
        for h in range(Hq):
            kv_head = h // (Hq // Hkv)
            score = scale * sampled[b, h] @ mean[b, kv_head].T  # [nq, nk]
            if order == 2:
                score = score + variance_weight * scale**2 * sampled[b, h] ** 2 @ var[b, kv_head].T
            rows = shown[b, h, sampled_indices(Lq, sq, h, head_offset)]  # [nq, Lk]
            seen = torch.stack([rows[:, run.start : run.stop].any(1) for run in key_runs], 1) & (count[b] > 0)
            some = seen.any(1)
            share = torch.zeros_like(score)
            exponential = torch.exp(score - score.masked_fill(~seen, -math.inf).amax(1, keepdim=True))
            counted = torch.where(seen, count[b] * exponential, 0)
            share[some] = counted[some] / counted[some].sum(1, keepdim=True)
            for i, rows in enumerate(share.split(bq // sq)):
                for j, tile in enumerate(rows.split(bk // sk, 1)):
                    mass[b, h, i, j] = tile.sum()
    return mass


def blocks(shown, block_size):
    """Which blocks show any real pair, and which show all of theirs: two bool [B, Hq, nQ, nK]."""
    B, Hq, Lq, Lk = shown.shape
    row_runs, column_runs = runs(Lq, block_size[0]), runs(Lk, block_size[1])
    visible = torch.zeros(B, Hq, len(row_runs), len(column_runs), dtype=torch.bool)
    whole = visible.clone()
    for i, rows in enumerate(row_runs):
        for j, columns in enumerate(column_runs):
            tile = shown[:, :, rows.start : rows.stop, columns.start : columns.stop].flatten(2)
            visible[:, :, i, j], whole[:, :, i, j] = tile.any(-1), tile.all(-1)
    return visible, whole


def mandatory_blocks(visible, lengths, q_offset, block_size, *, sink_blocks, local_blocks, dense_last_rows, key_valid):
    """Sink, local and last-row blocks, as far as they are visible: bool [B, Hq, nQ, nK]."""
    (Lq, Lk), (bq, bk) = lengths, block_size
    must = torch.zeros_like(visible)
    B, _, nQ, nK = visible.shape
    for b in range(B):
        valid = range(Lk) if key_valid is None else key_valid[b].nonzero().flatten().tolist()
        first_sink = valid[0] // bk if len(valid) else 0
        # A sequence ends with its last query that sees anything: padding behind it has no last row.
        seeing = [i for i in range(nQ) if visible[b, :, i].any()]
        end = nQ if key_valid is None else max(seeing, default=-1) + 1
        for i, rows in enumerate(runs(Lq, bq)):
            first_local = (rows[0] + q_offset) // bk - (local_blocks - 1)
            last_local = (rows[-1] + q_offset) // bk
            for j in range(nK):
                is_sink = first_sink <= j < first_sink + sink_blocks
                is_local = local_blocks > 0 and first_local <= j <= last_local
                must[b, :, i, j] = is_sink or is_local or i >= end - dense_last_rows
    return must & visible


def usable(mass):
    """A row can be ranked when its total is a positive number."""
    total = sum(mass)
    return math.isfinite(total) and total > 0


def largest_until(mass, goal, candidates, covered=0.0):
    """The fewest candidates, largest first and lower index first among equals, that lift `covered` to `goal`."""
    chosen = set()
    for j in sorted(candidates, key=lambda j: (-mass[j], j)):
        if covered >= goal:
            break
        covered += mass[j]
        chosen.add(j)
    return chosen


LONG_ROW = 64  # visible blocks past which budget="scaled_threshold" scales


def select_row(mass, visible, must, *, tau=0.95, budget="top_tau", threshold=None, mandatory="count"):
    """The kept blocks of one row, as a set of indices. `mass` is a list of numbers, `visible` and `must` are sets."""
    if not usable(mass):
        return set(visible)
    total = sum(mass)
    if budget == "scaled_threshold" and len(visible) > LONG_ROW:
        threshold = threshold * LONG_ROW / len(visible)
    if budget in ("threshold", "scaled_threshold"):
        return {j for j in visible if mass[j] / total > threshold} | must
    if tau >= 1:
        return set(visible)
    if mandatory == "add":
        return largest_until(mass, tau * total, visible) | must
    return largest_until(mass, tau * total, visible - must, sum(mass[j] for j in must)) | must


def sure_row(mass, visible, must, margin, *, tau=0.95, budget="top_tau", threshold=None, mandatory="count"):
    """The blocks kept, and those dropped, whatever an error of `margin` (a share of the row) does to the masses."""
    rule = {"tau": tau, "budget": budget, "threshold": threshold, "mandatory": mandatory}
    everything = set(range(len(mass)))
    if not usable(mass) or (budget == "top_tau" and tau >= 1):
        return set(visible), everything - visible
    slack = margin * sum(mass)
    if budget in ("threshold", "scaled_threshold"):
        margin *= max(1, len(visible) / LONG_ROW) if budget == "scaled_threshold" else 1
        lenient, strict = ({**rule, "threshold": threshold + sign * margin} for sign in (-1, 1))
        return select_row(mass, visible, must, **strict), everything - select_row(mass, visible, must, **lenient)
    if mandatory == "add":
        kept, dropped = sure_row(mass, visible, set(), margin, tau=tau)
        return kept | must, dropped - must
    low, high = (select_row(mass, visible, must, tau=tau + sign * margin) for sign in (-1, 1))
    best_dropped = max((mass[j] for j in visible - low), default=-math.inf)
    worst_kept = min((mass[j] for j in high - must), default=math.inf)
    kept = {j for j in low if j in must or mass[j] > best_dropped + slack}
    dropped = {j for j in visible - high if mass[j] < worst_kept - slack}
    return kept, dropped | (everything - visible)


def per_row(rule, mass, visible, must, tau):
    """Apply rule(mass, visible, must, tau) -> set to every row; tau may be one number a head."""
    kept = torch.zeros_like(visible)
    taus = [float(t) for t in tau] if torch.is_tensor(tau) or isinstance(tau, (list, tuple)) else None
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in mass.shape[:3])).view(-1, 3).tolist():
        sets = ({j for j, yes in enumerate(row.tolist()) if yes} for row in (visible[b, h, i], must[b, h, i]))
        for j in rule(mass[b, h, i].tolist(), *sets, taus[h] if taus else tau):
            kept[b, h, i, j] = True
    return kept


def select(
    q,
    k,
    element=None,
    *,
    q_offset=None,
    scale=None,
    head_offset=0,
    key_valid=None,
    strides=(8, 8),
    block_size=(128, 128),
    order=1,
    sink_blocks=1,
    local_blocks=1,
    dense_last_rows=1,
    tau=0.95,
    margin=1e-5,
    **rule,
):
    """Everything the method decides: shown, mass, visible, whole, must, kept; and what rounding can't change of it."""
    (B, Hq, Lq, D), Lk = q.shape, k.shape[2]
    q_offset = Lk - Lq if q_offset is None else q_offset
    scale = D**-0.5 if scale is None else scale
    shown = pairs(element or causal_element(q_offset), B, Hq, Lq, Lk)
    estimate = {"scale": scale, "strides": strides, "order": order, "head_offset": head_offset}
    mass = block_mass(q, k, shown, block_size=block_size, key_valid=key_valid, **estimate)
    visible, whole = blocks(shown, block_size)
    always = {"sink_blocks": sink_blocks, "local_blocks": local_blocks, "dense_last_rows": dense_last_rows}
    must = mandatory_blocks(visible, (Lq, Lk), q_offset, block_size, key_valid=key_valid, **always)
    kept = per_row(lambda m, v, u, t: select_row(m, v, u, tau=t, **rule), mass, visible, must, tau)
    surely_kept = per_row(lambda m, v, u, t: sure_row(m, v, u, margin, tau=t, **rule)[0], mass, visible, must, tau)
    surely_dropped = per_row(lambda m, v, u, t: sure_row(m, v, u, margin, tau=t, **rule)[1], mass, visible, must, tau)
    return SimpleNamespace(
        shown=shown,
        mass=mass,
        visible=visible,
        whole=whole,
        must=must,
        kept=kept,
        surely_kept=surely_kept,
        surely_dropped=surely_dropped,
    )


def expand(kept, lengths, block_size):
    """A map over blocks as a map over pairs: [.., nQ, nK] -> [.., Lq, Lk]."""
    rows = torch.arange(lengths[0]) // block_size[0]
    columns = torch.arange(lengths[1]) // block_size[1]
    return kept[..., rows[:, None], columns]


def attend(q, k, v, allowed, scale=None, softcap=None):
    """Softmax over the allowed pairs, bool [B, Hq, Lq, Lk]: out, and each row's log-sum-exp (natural)."""
    (B, Hq, Lq, D), Hkv = q.shape, k.shape[1]
    scale = D**-0.5 if scale is None else scale
    out, lse = torch.zeros(B, Hq, Lq, v.shape[3]).double(), torch.full((B, Hq, Lq), -math.inf).double()
    for b in range(B):
        for h in range(Hq):
            kv_head = h // (Hq // Hkv)
            score = scale * q[b, h].double() @ k[b, kv_head].double().T
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            lse[b, h] = torch.logsumexp(score.masked_fill(~allowed[b, h], -math.inf), 1)
            some = allowed[b, h].any(1)
            share = (score - lse[b, h, :, None]).exp().masked_fill(~allowed[b, h], 0)
            out[b, h, some] = share[some] @ v[b, kv_head].double()
    return out, lse
