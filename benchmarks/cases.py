"""What is measured, as data: one case a row, in suites ordered by importance, since time on a card is short."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from rr_flex import RRConfig
from rr_flex.registry import BUDGETS

K = 1024


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method on one shape. `density` or `error` set its budget; with neither, `config` does."""

    length: int = 128 * K
    heads: int = 32  # of queries
    kv_heads: int = 8
    head_dim: int = 128
    batch: int = 1
    dtype: str = "bfloat16"
    workload: str = "structured"  # or the path of captured q, k, v, which then decide the shape
    method: str = "rr"  # or a rule of rivals.RULES
    config: RRConfig = field(default_factory=RRConfig)
    density: float | None = None  # wanted share of visible blocks
    error: float | None = None  # wanted output error: the sparsest budget that reaches it
    backend: str | None = None  # of rr_attention; None: its default
    kernel_options: tuple[tuple[str, Any], ...] = ()  # of the attention stage, over the library's own
    dense: tuple[str, ...] | None = None  # dense kernels to compare with; None: all that are installed
    seed: int = 0
    every_stage: bool = False  # select and lists by themselves too, beside all before attention as one graph

    def __post_init__(self) -> None:
        if self.density is not None and self.error is not None:
            raise ValueError("density and error must not both be given")
        if self.method != "rr" and self.density is None:
            raise ValueError(f"density must be given for a rival's rule, got method {self.method!r}")

    @property
    def settings(self) -> dict[str, Any]:
        """What of `config` differs from the defaults of its rules, and which rules; the budget's level aside."""
        rules = {name: getattr(self.config, name) for name in ("pool", "order", "budget")}
        default, of_rules = RRConfig(), RRConfig(**rules)
        levels = {each.level for each in BUDGETS.values()}
        values = {each.name: getattr(self.config, each.name) for each in fields(RRConfig) if each.name not in levels}
        return {
            name: value
            for name, value in values.items()
            if value != getattr(default if name in rules else of_rules, name)
        }

    @property
    def name(self) -> str:
        """Short, and different for cases that differ in anything but seed and dense kernels."""
        shape = f"{self.length // K}K" if self.length % K == 0 else str(self.length)
        parts = [shape, f"{self.batch}x{self.heads}/{self.kv_heads}x{self.head_dim}", self.dtype]
        if self.workload != "structured":
            parts.append(self.workload.rsplit("/", 1)[-1])
        parts.append(self.label)
        if self.density is not None:
            parts.append(f"density {self.density:.2f}")
        if self.error is not None:
            parts.append(f"error {self.error:g}")
        return " ".join(parts)

    @property
    def label(self) -> str:
        """The method without the shape."""
        parts = [self.method]
        parts += [f"{name}={_short(value)}" for name, value in self.settings.items()]
        parts += [self.backend] if self.backend else []
        parts += [f"{name}={value}" for name, value in self.kernel_options]
        return " ".join(parts)


def _short(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


# The settings that matter: as published, and with what FACTS found to be better at equal density.
PUBLISHED = RRConfig()
PUBLISHED_THRESHOLD = RRConfig(budget="threshold")
SECOND_ORDER = RRConfig(order=2, budget="threshold")
COARSE_QUERIES = RRConfig(order=2, query_stride=16, key_stride=8, budget="threshold")
COARSEST_QUERIES = RRConfig(order=2, query_stride=32, key_stride=8, budget="threshold")
NARROW_BLOCKS = replace(COARSE_QUERIES, block_size=(128, 64))
COARSE_BOTH = RRConfig(order=2, stride=16, budget="threshold")
# With a threshold that the case sets, one for rows of any length.
BEST, FAST = (RRConfig.from_preset(preset, budget="threshold") for preset in ("best", "fast"))
BEST_WIDE = replace(BEST, block_size=(128, 64))  # what `best` was before, on Triton

RIVALS = ("antidiagonal", "block-mean-keys", "pooled-top-k", "oracle", "random")
BACKENDS = ("flash", "triton")


def _rivals(densities: tuple[float, ...], **shape: Any) -> list[Case]:
    own = [PUBLISHED, PUBLISHED_THRESHOLD, SECOND_ORDER, COARSE_QUERIES, NARROW_BLOCKS]
    rivals = [Case(method=method, density=density, **shape) for method in RIVALS for density in densities]
    return [Case(config=config, density=density, **shape) for config in own for density in densities] + rivals


def _shapes() -> list[Case]:
    heads = {"GQA 4": (32, 8), "MHA": (32, 32), "GQA 8": (64, 8)}
    return [
        Case(
            length=32 * K,
            heads=Hq,
            kv_heads=Hkv,
            head_dim=D,
            dtype=dtype,
            config=COARSE_QUERIES,
            density=0.3,
            backend=backend,
        )
        for backend, kinds in (("triton", tuple(heads)), ("flash", ("GQA 4",)))
        for D in (128, 64)
        for dtype in ("bfloat16", "float16")
        for Hq, Hkv in (heads[kind] for kind in kinds)
    ]


def _million() -> list[Case]:
    shape = {"length": 1024 * K, "density": 0.085, "dense": ()}
    return [
        Case(config=config, backend=backend, **shape)
        for config in (COARSE_BOTH, COARSE_QUERIES)
        for backend in BACKENDS
    ]


SUITES: dict[str, list[Case]] = {
    # A first look: minutes.
    "quick": [
        Case(length=32 * K, config=COARSE_QUERIES, density=0.3),
        Case(length=32 * K, config=PUBLISHED, density=0.3),
        Case(length=32 * K, method="antidiagonal", density=0.3),
        Case(length=32 * K, config=COARSE_QUERIES, density=0.3, backend="flash"),
    ],
    # How near to the limit.
    "128k": [
        Case(config=config, density=density, backend=backend, every_stage=True)
        for config in (COARSE_QUERIES, PUBLISHED, COARSEST_QUERIES)
        for backend in BACKENDS
        for density in (0.3, 0.25, 0.4)
    ]
    + [
        Case(config=config, density=density, backend=backend, every_stage=True)
        for config, backend in ((BEST, "flash"), (BEST_WIDE, "triton"), (FAST, "flash"))
        for density in (0.25, 0.4)
    ],
    # Where the estimate costs most beside what is kept.
    "low-density": [
        Case(config=config, density=density, backend="flash", dense=("fa4",))
        for config in (COARSE_BOTH, COARSE_QUERIES)
        for density in (0.05, 0.13, 0.08, 0.19)
    ],
    # Time against length.
    "lengths": [
        Case(length=length * K, config=config, density=0.3, backend=backend)
        for length in (128, 8, 32, 64, 16)
        for config, backend in ((COARSE_QUERIES, "flash"), (COARSE_QUERIES, "triton"), (PUBLISHED, "triton"))
    ],
    # As users call it, with the library's own choice of when to be dense.
    "short": [
        Case(length=length * K, config=RRConfig.from_preset(preset))
        for preset in ("rr", "best")
        for length in (8, 16, 4, 2)
    ],
    "shapes": _shapes(),
    "million": _million(),
    # The cheapest settings that stay under an output error.
    "error03": [
        Case(length=length * K, config=config, error=0.03, backend=backend)
        for length in (128, 32)
        for config in (
            *(BEST_WIDE, BEST, NARROW_BLOCKS, COARSE_QUERIES, COARSEST_QUERIES, SECOND_ORDER),
            *(PUBLISHED_THRESHOLD, PUBLISHED),
        )
        for backend in BACKENDS
        # FLASH takes 128 × 128 blocks.
        if not (backend == "flash" and config.block_sizes != (128, 128))
    ],
    # The presets as they come.
    "presets": [
        Case(length=length * K, config=RRConfig.from_preset(preset, **narrow), backend=backend)
        for length in (128, 32, 64, 16)
        for preset, narrow, backend in (
            ("best", {}, "flash"),
            ("best", {"block_size": (128, 64)}, "triton"),
            ("fast", {}, "flash"),
        )
    ],
    # What narrower blocks cost.
    "blocks": [
        Case(config=replace(COARSE_QUERIES, block_size=block_size), density=0.3, backend="triton")
        for block_size in (128, (128, 64), 64, (64, 128))
    ],
    # Selection rules at equal density on one kernel.
    "rivals": _rivals((0.3, 0.2, 0.4), length=32 * K),
    # That the program runs: seconds a case, no GPU.
    "cpu": [
        Case(length=2048, heads=4, kv_heads=2, head_dim=64, dtype="float32", **case)
        for case in (
            {"config": PUBLISHED, "density": 0.7},
            {"config": COARSE_QUERIES, "density": 0.7},
            {"method": "antidiagonal", "density": 0.7},
        )
    ],
}
