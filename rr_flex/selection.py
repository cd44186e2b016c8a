"""Block mass to kept blocks: the budget rules."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from rr_flex.fields import LONG_ROW
from rr_flex.registry import budget

DENSITY_RANGE = (-40.0, 1.0)  # natural logarithms of the shares between which select_density seeks its threshold
DENSITY_PASSES = 7


def select_top_tau(
    mass: Float[Tensor, "... nK"],
    tau: float | Float[Tensor, "..."],
    visible: Bool[Tensor, "... nK"] | None = None,
    mandatory: Bool[Tensor, "... nK"] | None = None,
    *,
    count_mandatory: bool = True,
) -> Bool[Tensor, "... nK"]:
    """The fewest blocks of each row whose mass reaches `tau` × the row's total: mandatory first, then the largest.

    Equal masses are taken from the left. `count_mandatory=False` takes plain top-p over all visible blocks and adds
    the mandatory ones afterwards. tau ≥ 1 keeps every visible block, and so does a row whose total is zero or not
    finite: an estimate that says nothing drops nothing. `tau` broadcasts against mass's leading axes.
    """
    mass, visible, mandatory, total, told = _prepare(mass, visible, mandatory)
    tau = torch.as_tensor(tau, dtype=mass.dtype, device=mass.device)[..., None]
    candidates = torch.where(mandatory, 0, mass) if count_mandatory else mass
    need = tau * total
    if count_mandatory:
        need = need - torch.where(mandatory, mass, 0).sum(-1, keepdim=True)
    kept = _largest_reaching(candidates, need) | mandatory
    return torch.where(told & (tau < 1), kept, visible)


def select_threshold(
    mass: Float[Tensor, "... nK"],
    threshold: float | Float[Tensor, "..."],
    visible: Bool[Tensor, "... nK"] | None = None,
    mandatory: Bool[Tensor, "... nK"] | None = None,
) -> Bool[Tensor, "... nK"]:
    """Every block whose share of its row's mass exceeds `threshold`, and the mandatory ones.

    One threshold for all rows and heads spends a total budget where the marginal gain is. Rows without an estimate
    keep every visible block, as in `select_top_tau`.
    """
    mass, visible, mandatory, total, told = _prepare(mass, visible, mandatory)
    threshold = torch.as_tensor(threshold, dtype=mass.dtype, device=mass.device)[..., None]
    return torch.where(told, (mass > threshold * total) & visible | mandatory, visible)


def long_row_factor(visible: Bool[Tensor, "... nQ nK"]) -> Float[Tensor, "... nQ"]:
    """What a threshold is multiplied by in a row of n visible blocks: min(1, 64 / n).

    The shares of a row sum to 1, so the mean of n blocks has 1/n. Past 64 blocks a threshold thus stays the same
    multiple of the mean share, where a fixed one keeps fewer and fewer of a row's blocks.
    """
    return LONG_ROW / visible.sum(-1, dtype=torch.float32).clamp(min=LONG_ROW)


def select_density(
    mass: Float[Tensor, "B H nQ nK"],
    density: float | Float[Tensor, ""],
    visible: Bool[Tensor, "#B #H nQ nK"] | None = None,
    mandatory: Bool[Tensor, "#B #H nQ nK"] | None = None,
) -> Bool[Tensor, "B H nQ nK"]:
    """`select_threshold` at each sequence's own threshold: the least that keeps no more than `density` of its visible
    blocks, over all heads. Found to a factor 1 + 2e−5, within which blocks count as equal and the first are kept;
    mandatory blocks stay where they alone are more.

    A row's choice depends on the other rows and heads. No host sync: each pass over the mass cuts the interval of
    log-shares in eight.
    """
    mass, visible, mandatory, total, told = _prepare(mass, visible, mandatory)
    share = mass / torch.where(told, total, 1)
    wanted = density * visible.sum((1, 2, 3), dtype=torch.float32)[:, None]  # B 1
    fixed = (mandatory | (visible & ~told)).sum((1, 2, 3), dtype=torch.float32)[:, None]
    free = torch.where(visible & ~mandatory & told, share, -1.0)
    low, high = (torch.full_like(fixed, end, dtype=share.dtype) for end in DENSITY_RANGE)
    for _ in range(DENSITY_PASSES):
        # Ascending: what they keep falls. Counted one by one, all in a kernel that reads the shares once.
        edges = [low + (high - low) * (step / 8) for step in range(1, 8)]
        counts = [(free > edge.exp()[:, :, None, None]).sum((1, 2, 3), dtype=torch.float32)[:, None] for edge in edges]
        # By choices, not an index: a batch's graph for any length fails to compile with one (CUDA, torch 2.11).
        for edge, count in zip(edges, counts, strict=True):
            low = torch.where(count + fixed > wanted, edge, low)
        for edge, count in zip(reversed(edges), reversed(counts), strict=True):
            high = torch.where(count + fixed > wanted, high, edge)
    above = free > high.exp()[:, :, None, None]
    # What lies between the last two thresholds is equal to them: the first of these, as many as there is room for.
    tied = (free > low.exp()[:, :, None, None]) & ~above
    room = wanted - fixed - above.sum((1, 2, 3), dtype=torch.float32)[:, None]
    count = tied.sum(-1, dtype=torch.int32)  # of each block row
    before = (count.flatten(1).cumsum(1, dtype=torch.int32) - count.flatten(1)).view_as(count)
    first = tied.cumsum(-1, dtype=torch.int32) + before[..., None] <= room[..., None, None]
    everything = torch.as_tensor(density, device=mass.device) >= 1
    return torch.where(told & ~everything, above | (tied & first) | mandatory, visible)


@budget("top_tau", level="tau", reads=("mandatory",))
def _top_tau(mass, level, visible, mandatory, config):
    return select_top_tau(mass, level, visible, mandatory, count_mandatory=config.mandatory == "count")


@budget("threshold", level="threshold")
def _threshold(mass, level, visible, mandatory, config):
    return select_threshold(mass, level, visible, mandatory)


@budget("scaled_threshold", level="threshold")
def _scaled_threshold(mass, level, visible, mandatory, config):
    return select_threshold(mass, level * long_row_factor(visible), visible, mandatory)


@budget("density", level="target_density")
def _density(mass, level, visible, mandatory, config):
    return select_density(mass, level[0, 0], visible, mandatory)


def _prepare(mass: Tensor, visible: Tensor | None, mandatory: Tensor | None):
    """Mass of visible blocks without NaN, both masks, the row total and whether that total says anything."""
    visible = torch.ones_like(mass, dtype=torch.bool) if visible is None else visible.expand_as(mass)
    mandatory = torch.zeros_like(visible) if mandatory is None else mandatory & visible
    mass = torch.where(visible, mass, 0)
    total = mass.sum(-1, keepdim=True)
    told = torch.isfinite(total) & (total > 0)
    return torch.where(told, mass, 0), visible, mandatory, torch.where(told, total, 0), told


def _largest_reaching(mass: Float[Tensor, "... nK"], need: Float[Tensor, "... 1"]) -> Bool[Tensor, "... nK"]:
    """The fewest largest entries of each row whose sum is at least `need`, ties from the left; none if need ≤ 0."""
    # On an accelerator the passes over the bits fuse into one kernel: 0.45 ms against a sort's 1.63 (131,072 tokens, 32
    # heads, H100). On a CPU the compiler makes thousands of lines of them, and a sort is one call.
    return (largest_by_sort if mass.device.type == "cpu" else largest_by_bits)(mass, need)


def largest_by_sort(mass: Float[Tensor, "... nK"], need: Float[Tensor, "... 1"]) -> Bool[Tensor, "... nK"]:
    """`_largest_reaching` by a stable sort and a running sum."""
    value, order = mass.sort(dim=-1, descending=True, stable=True)
    before = F.pad(value.cumsum(-1), (1, -1))  # sum of the larger ones
    kept = (before < need) & (value > 0)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def largest_by_bits(mass: Float[Tensor, "... nK"], need: Float[Tensor, "... 1"]) -> Bool[Tensor, "... nK"]:
    """`_largest_reaching` without a sort: non-negative floats are ordered as their bits are, so the cut between kept
    and dropped is found one bit at a time."""
    if mass.dtype in (torch.bfloat16, torch.float16):
        mass, need = mass.float(), need.float()
    whole = {torch.float32: torch.int32, torch.float64: torch.int64}[mass.dtype]
    bits = mass.contiguous().view(whole)
    cut = torch.zeros_like(need, dtype=whole)
    for bit in reversed(range(torch.iinfo(whole).bits - 1)):
        raised = cut | (1 << bit)
        reaches = torch.where(bits >= raised, mass, 0).sum(-1, keepdim=True) >= need
        cut = torch.where(reaches, raised, cut)
    above = bits > cut
    level = bits == cut
    value = torch.where(level, mass, 0).amax(-1, keepdim=True)
    missing = need - torch.where(above, mass, 0).sum(-1, keepdim=True)
    take = torch.ceil(missing / torch.where(value > 0, value, 1)).clamp(min=1)
    return above | (level & (value > 0) & (level.cumsum(-1) <= take))
