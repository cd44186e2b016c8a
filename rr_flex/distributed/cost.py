"""What each way would take and hold, from measured rates: past the cards that are there.

One attention layer's prefill on ranks that are alike. Time is the longest of what runs side by side, plus what nothing
runs beside. Rates are data (rates.json): what was measured, and where a number was not, its "source" says so.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from rr_flex.geometry import ceil_div

RATES = Path(__file__).with_name("rates.json")
BLOCK = 128
STRIPS = 4  # as in context.py
# As in runtime/head_slices.py: of a block's flags, lists and mass; of the estimate, two for each sampled query.
BYTES_PER_BLOCK = 25
SLICE_BYTES = 12 << 30


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one rank. ValueError for what is not positive."""

    attention_flops: dict[str, float]  # tokens -> per second, of the block-sparse kernel: long keys leave its cache
    dense_flops: float  # of the fastest dense kernel
    estimate_flops: float  # of the estimate as attention
    block_seconds: float  # to select and list one block of the map
    pool_bytes: float  # per second, of keys pooled
    link_bytes: float  # per second that a rank receives, within a host
    far_bytes: float  # the same between hosts
    host_ranks: int  # ranks of a host
    call_seconds: float  # of a call, whatever its size
    across_seconds: float  # beside that, of a call of context parallel or ring
    host_seconds: float  # in which the host queues such a call over several ranks: the least that it takes
    telling_seconds: float  # in which ranks tell each other which blocks they want
    # density -> ranks -> of the rank that has most: the share of foreign key blocks that it wants, and its kept blocks
    # over the mean
    fetched: dict[str, dict[str, float]]
    uneven: dict[str, dict[str, float]]
    source: str

    @classmethod
    def read(cls, path: str | Path = RATES) -> "Rates":
        """From a JSON file of these fields; others in it are remarks. ValueError naming what is missing or wrong."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"rates must be a JSON file in UTF-8, got {str(path)!r}: {error}") from error
        names = cls.__dataclass_fields__
        if missing := sorted(set(names) - set(found)):
            raise ValueError(f"{path} must hold {', '.join(names)}, got none for {', '.join(missing)}")
        rates = cls(**{name: found[name] for name in names})
        for name in names:
            value = getattr(rates, name)
            if isinstance(value, float | int) and not value > 0:
                raise ValueError(f"{name} in {path} must be positive, got {value}")
        return rates


def nearest(table: dict, *where: float) -> float:
    """What was measured nearest to `where`, a number for each level of the table, on a scale of ratios."""
    for wanted in where:
        table = table[min(table, key=lambda at: max(float(at) / wanted, wanted / float(at)))]
    return table


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One layer's shape and what is kept of it."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    density: float = 0.1
    element: int = 2  # bytes
    strides: tuple[int, int] = (16, 8)
    order: int = 2

    def flops(self, density: float) -> float:
        return 4.0 * self.head_dim * self.heads * self.tokens * (self.tokens + 1) / 2 * density

    @property
    def estimate_flops(self) -> float:
        """Two products: of features, and with 128 one-hot columns."""
        pairs = self.tokens / self.strides[0] * self.tokens / self.strides[1] / 2
        return 2.0 * self.heads * pairs * (self.head_dim * self.order + 128)

    @property
    def blocks(self) -> float:
        """Of all heads' maps."""
        return float(self.heads) * ceil_div(self.tokens, BLOCK) ** 2

    def selecting_bytes(self, heads: float, queries: float) -> float:
        """While blocks are selected, some heads at a time; one head is never cut."""
        pairs = queries / BLOCK * ceil_div(self.tokens, BLOCK)
        of_head = pairs * (BYTES_PER_BLOCK + 2 * BLOCK / self.strides[0])
        return min(max(1.0, heads) * of_head, max(SLICE_BYTES, of_head))

    @property
    def kv_bytes(self) -> float:
        return 2.0 * self.kv_heads * self.tokens * self.head_dim * self.element

    @property
    def q_bytes(self) -> float:
        return float(self.heads) * self.tokens * self.head_dim * self.element


@dataclass(frozen=True)
class Cost:
    """Of the slowest rank."""

    way: str
    ranks: int
    seconds: float
    memory: float  # bytes
    moved: float  # bytes received


WAYS = ("one card", "heads", "ulysses", "kept", "all", "ring", "dense ulysses", "dense context")


def costs(prompt: Prompt, ranks: int, rates: Rates) -> list[Cost]:
    """Every way that fits the heads, fastest first; heads × sequence by its best split."""
    found = [cost(way, prompt, ranks, rates) for way in WAYS[1:]] if ranks > 1 else [cost("one card", prompt, 1, rates)]
    splits = [h for h in range(2, ranks) if ranks % h == 0 and prompt.kv_heads % h == 0]
    planes = [plane(prompt, (h, ranks // h), way, rates) for h in splits for way in ("all", "kept")]
    if planes:
        found.append(min(planes, key=lambda each: each.seconds))
    return sorted(filter(None, found), key=lambda each: each.seconds)


def plane(prompt: Prompt, mesh: tuple[int, int], way: str, rates: Rates) -> Cost:
    """Heads × sequence: each group of ranks along the sequence is context parallel for its part of the heads."""
    heads, sequence = mesh
    part = replace(prompt, heads=prompt.heads // heads, kv_heads=prompt.kv_heads // heads)
    # Neighbours on a host share the sequence first.
    of_part = cost(way, part, sequence, rates)
    return replace(of_part, way=f"{heads} heads × {sequence} {way}", ranks=heads * sequence)


def cost(way: str, prompt: Prompt, ranks: int, rates: Rates) -> Cost | None:
    """None where the ranks are more than the heads that the way shares out."""
    if way in ("heads", "ulysses", "dense ulysses") and prompt.heads % ranks:
        return None
    link = rates.link_bytes if ranks <= rates.host_ranks else rates.far_bytes
    foreign = (ranks - 1) / ranks
    kv = prompt.kv_bytes
    if way in ("heads", "ulysses", "dense ulysses") and ranks > prompt.kv_heads:
        kv *= ranks / prompt.kv_heads  # a key head goes to each rank that shares it
    own = (2 * prompt.q_bytes + kv) / ranks  # q, out, k, v
    if way.startswith("dense"):
        moved = foreign * (own if way == "dense ulysses" else kv)
        seconds = prompt.flops(1) / ranks / rates.dense_flops + moved / link
        memory = 2 * own if way == "dense ulysses" else own + kv
        return Cost(way, ranks, seconds + rates.call_seconds, memory, moved)

    pool = prompt.kv_bytes / 2 / ranks / rates.pool_bytes
    choose = prompt.estimate_flops / ranks / rates.estimate_flops + prompt.blocks / ranks * rates.block_seconds
    attend = prompt.flops(prompt.density) / ranks / nearest(rates.attention_flops, prompt.tokens)
    maps = prompt.selecting_bytes(prompt.heads / ranks, prompt.tokens)
    alone = pool + choose + rates.call_seconds
    if way in ("one card", "heads"):
        return Cost(way, ranks, alone + attend, own + maps, 0.0)
    if way == "ulysses":
        moved = foreign * own
        return Cost(way, ranks, alone + attend + moved / link, 2 * own + maps, moved)

    maps = prompt.selecting_bytes(prompt.heads, prompt.tokens / ranks / 2)  # of one of a rank's two runs
    pooled = foreign * prompt.kv_bytes / 2 * prompt.order / prompt.strides[1]
    kept = prompt.blocks / ranks  # one byte a block until it has attended
    gathered = foreign * prompt.kv_bytes
    telling = rates.telling_seconds if way == "kept" else 0
    alone += rates.across_seconds + telling
    least = rates.host_seconds + telling if ranks > 1 else 0
    attend *= nearest(rates.uneven, prompt.density, ranks)
    if way == "ring":
        step = max(attend / ranks, gathered / (ranks - 1) / link)
        seconds = max(least, alone + pooled / link + attend / ranks + (ranks - 1) * step)
        memory = own + 2 * kv / ranks + 4 * prompt.q_bytes / ranks + maps + kept  # outputs to merge are float32
        return Cost(way, ranks, seconds, memory, gathered + pooled)
    share = nearest(rates.fetched, prompt.density, ranks) if way == "kept" else 1.0
    strips = min(STRIPS, prompt.kv_heads)
    transfer = share * gathered / link
    beside = max(attend * (strips - 1) / strips, transfer * (strips - 1) / strips)
    seconds = max(least, alone + pooled / link + transfer / strips + beside + attend / strips)
    memory = own + (2 if strips > 1 else 1) * prompt.kv_bytes / strips + pooled + maps + kept
    return Cost(way, ranks, seconds, memory, share * gathered + pooled)
