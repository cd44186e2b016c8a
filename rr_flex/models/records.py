"""What rr_flex did in a model: per layer, how often sparse, how often dense and why, and at which density."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from torch import Tensor

DECODE = "decode"
SHORT = "shorter than min_length"
FASTER = "dense is faster"
LAST_ROWS = "all rows are dense last rows"
DENSE_LAYER = "layer set to dense"
SLIDING = "sliding layer set to dense"
NOT_CAUSAL = "not causal"
OWN_MASK = "a mask of the model's own"
PADDING_BETWEEN = "padding between real tokens"
DROPOUT = "dropout"
GRADIENT = "gradient on the CPU"
POSITION_BIAS = "position bias"
HEAD_DIM = "head dim outside 16 to 256"
DTYPE = "dtype"
MASK_LENGTH = "mask and keys of different lengths"

# One for all records, which are copied with their model: a lock can't be. It is held for less than a microsecond.
_COUNTING = Lock()


@dataclass
class LayerRecord:
    """One layer's calls; threads may count at once."""

    sparse: int = 0  # prefill calls with a selection
    dense: Counter[str] = field(default_factory=Counter)  # calls by reason
    pairs: float = 0.0  # of queries and keys up to them, in the sparse calls
    kept_pairs: Tensor | float = 0.0  # of these, by density; a tensor stays on its device until it is read
    faster: str | None = None  # the last call for which dense attention was faster: its size, and what was expected

    def add_dense(self, reason: str, faster: str | None = None) -> None:
        with _COUNTING:
            self.dense[reason] += 1
            self.faster = faster or self.faster

    def add_sparse(self, density: Tensor, sizes: tuple[int, int, int]) -> None:
        """`sizes`: sequences, queries and keys of the call, whose last query sees the last key."""
        sequences, queries, keys = sizes
        pairs = sequences * queries * (keys - (queries - 1) / 2)
        kept = density.detach() * pairs
        with _COUNTING:
            self.sparse += 1
            self.pairs += pairs
            self.kept_pairs = self.kept_pairs + kept

    @property
    def density(self) -> float | None:
        """Of the sparse calls together, each by its pairs; None without one."""
        return float(self.kept_pairs) / self.pairs if self.sparse else None


@dataclass(frozen=True)
class Report:
    """Counts by layer. Calls of an exported program, and of one token in a caller's graph, are not counted."""

    layers: dict[int, LayerRecord]

    @classmethod
    def of(cls, counted: Iterable[dict[int, LayerRecord]]) -> "Report":
        """The sums by layer of what was counted up to now; copies, which later calls do not change."""
        layers: dict[int, LayerRecord] = {}
        with _COUNTING:
            # Lists, since other threads may add layers meanwhile.
            for layer, record in [item for records in counted for item in list(records.items())]:
                total = layers.setdefault(layer, LayerRecord())
                total.sparse += record.sparse
                total.dense += record.dense
                total.faster = record.faster or total.faster
                total.pairs += record.pairs
                added = record.kept_pairs
                # Layers of one number (an encoder's, a decoder's) may lie on two cards.
                if isinstance(added, Tensor) and isinstance(total.kept_pairs, Tensor):
                    added = added.to(total.kept_pairs.device)
                total.kept_pairs = total.kept_pairs + added
        return cls(layers)

    @property
    def sparse(self) -> int:
        return sum(record.sparse for record in self.layers.values())

    @property
    def dense(self) -> Counter[str]:
        return sum((record.dense for record in self.layers.values()), Counter())

    @property
    def density(self) -> float | None:
        """Of all layers' sparse calls together; None without one."""
        kept, pairs = (sum(float(getattr(x, name)) for x in self.layers.values()) for name in ("kept_pairs", "pairs"))
        return kept / pairs if self.sparse else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        layers = {
            str(layer): {
                "sparse": record.sparse,
                "dense": dict(record.dense),
                "density": record.density,
                "faster": record.faster,
            }
            for layer, record in sorted(self.layers.items())
        }
        return {"sparse": self.sparse, "dense": dict(self.dense), "density": self.density, "layers": layers}

    def __str__(self) -> str:
        lines = ["layer  sparse  density  dense"]
        for layer, record in sorted(self.layers.items()):
            lines.append(f"{layer:5d}" + _row(record.sparse, record.density, record.dense))
        lines.append("  all" + _row(self.sparse, self.density, self.dense))
        faster = next((record.faster for record in self.layers.values() if record.faster), None)
        return "\n".join(lines if faster is None else [*lines, f"{FASTER}: {faster}"])


def _row(sparse: int, density: float | None, dense: Counter[str]) -> str:
    reasons = ", ".join(f"{reason} {count}" for reason, count in dense.most_common())
    return f"  {sparse:6d}  {'-' if density is None else f'{density:.3f}':>7}  {reasons or '-'}"
