"""Dense or sparse, by work: what a call takes either way on a card whose costs were measured. Arithmetic only.

    dense  = max(host, call + block · visible blocks)
    sparse = max(host, call + key · keys to pool + scored block · visible blocks
                       + density · (kept block · visible blocks + row block · blocks of a row))

A block is 128 × 128 tokens of one query head; other block sizes count by their area. The last term is the longest row
that ends after all others: in a chunk of 512 queries, whose rows do not fill a card, most of the time.
"""

from dataclasses import dataclass, fields

BLOCK = 128  # tokens per side
# Share of dense attention's time that sparse may take at most: predictions are off by some percent, and a wrong
# "dense" costs nothing that the caller had before.
WORTH = 0.95


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What was measured on a card for one head dim and dtype. ValueError for a negative cost."""

    dense_host: float  # ms of the host for a dense call, which it never goes below
    dense_call: float  # ms of the device for a dense call of no size
    dense_block: float  # ns a visible block
    host: float  # ms of the host for a sparse call
    call: float  # ms of the device for the small kernels of a selection
    pooled_key: float  # ns a key of one key head
    scored_block: float  # ns of estimating and deciding, a visible block
    kept_block: float  # ns of attending, a kept block
    row_block: float  # ns at the end for the longest row, a block that a row keeps on average

    def __post_init__(self) -> None:
        for name in COSTS:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


COSTS = tuple(field.name for field in fields(Costs))  # a caller's graph can't list them (torch 2.11)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The size of one call. ValueError for a size below 1 or a pooled number outside the keys."""

    batch: int
    heads: int  # of queries
    kv_heads: int
    queries: int
    keys: int
    first_position: int | None = None  # of the first query among the keys; None: every query sees every key
    pooled_keys: int | None = None  # keys that no earlier chunk has pooled; None: all of them

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "kv_heads", "queries", "keys"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.pooled_keys is not None and not 0 <= self.pooled_keys <= self.keys:
            raise ValueError(f"pooled_keys must lie in [0, {self.keys}], got {self.pooled_keys}")

    @property
    def pairs(self) -> int:
        """Of one head: those that the causal mask shows."""
        if self.first_position is None:
            return self.queries * self.keys
        return visible_pairs(self.queries, self.keys, self.first_position)

    @property
    def visible_blocks(self) -> float:
        """Pairs that the causal mask shows, in blocks, over batch and query heads."""
        return self.batch * self.heads * self.pairs / BLOCK**2

    @property
    def blocks_of_row(self) -> float:
        return self.keys / BLOCK

    @property
    def keys_to_pool(self) -> int:
        """Over batch and key heads."""
        new = self.keys if self.pooled_keys is None else self.pooled_keys
        return self.batch * self.kv_heads * new


@dataclass(frozen=True)
class Decision:
    """Which way a call goes, and why in words for a report."""

    sparse: bool
    reason: str


def visible_pairs(queries: int, keys: int, first_position: int) -> int:
    """Σ of min(position + 1, keys), at least 0, over queries at first_position, first_position + 1, …"""
    first = max(first_position, -1)  # a query before the first key sees nothing
    last = min(first_position + queries - 1, keys - 1)
    rising = (last + 1) * (last + 2) // 2 - (first + 1) * first // 2 if last >= first else 0
    after = max(0, first_position + queries - max(keys, first_position))
    return rising + after * keys


def dense_ms(work: Work, costs: Costs) -> float:
    return max(costs.dense_host, costs.dense_call + costs.dense_block * work.visible_blocks / 1e6)


def sparse_ms(work: Work, costs: Costs, density: float) -> float:
    """At `density`, kept over visible blocks in [0, 1]."""
    return max(costs.host, _selection_ms(work, costs) + density * _attention_ms(work, costs))


def _selection_ms(work: Work, costs: Costs) -> float:
    return costs.call + (costs.pooled_key * work.keys_to_pool + costs.scored_block * work.visible_blocks) / 1e6


def _attention_ms(work: Work, costs: Costs) -> float:
    """At density 1."""
    return (costs.kept_block * work.visible_blocks + costs.row_block * work.blocks_of_row) / 1e6


def break_even_density(work: Work, costs: Costs) -> float:
    """The density under which sparse takes less than WORTH of dense's time; 0 where none does, at most 1."""
    allowed = WORTH * dense_ms(work, costs)
    if costs.host >= allowed:
        return 0.0
    left, attention = allowed - _selection_ms(work, costs), _attention_ms(work, costs)
    return min(1.0, max(0.0, left / attention)) if attention > 0 else float(left > 0)


def decide(work: Work, costs: Costs, density: float) -> Decision:
    """Sparse where `density` lies under the break-even; ValueError for a density outside [0, 1]."""
    if not 0 <= density <= 1:
        raise ValueError(f"density must lie in [0, 1], got {density}")
    most = break_even_density(work, costs)
    size = f"{work.batch} × {work.queries:,} queries and {work.keys:,} keys"
    times = f"dense {dense_ms(work, costs):.2f} ms, sparse {sparse_ms(work, costs, density):.2f} ms"
    sides = f"{times} expected at density {density:.2f}; sparse pays below {most:.2f}"
    return Decision(density < most, f"{size}: {sides}")
