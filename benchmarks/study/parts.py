"""What the accuracy study runs: predictions and errors on one text, calibration, the structured workload."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.study.accuracy import COMPARED, judge_structured
from benchmarks.study.combinations import calibrated
from benchmarks.study.every_rule import BEST, FAST, RULES
from rr_flex import RRConfig
from rr_flex.calibration.thresholds import Curves, measure_curves, meet, profile_of
from rr_flex.evaluation.block_outputs import KeptBlocks
from rr_flex.evaluation.equal_density import visible_and_mandatory
from rr_flex.evaluation.judging import Record, judge_text
from rr_flex.evaluation.language_model import compare_logits
from rr_flex.evaluation.measures import density as density_of
from rr_flex.evaluation.predictions import Prediction
from rr_flex.evaluation.rules_on_texts import keeping
from rr_flex.evaluation.sparse_model import SparseAttention, attend_densely, attend_to_blocks, hidden_states
from rr_flex.evaluation.texts import sample_text
from rr_flex.evaluation.true_mass import true_block_mass
from rr_flex.models.loading import tokenize
from rr_flex.profiles import Profile
from rr_flex.selection import select_threshold

TUNING_PART = 0  # of every kind: what rules are chosen and budgets calibrated on
HELD_OUT_PARTS = (1, 2)
TARGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # densities of the calibrated profiles
CALIBRATED_AT = 0.3  # the profile that the study of errors scales to every density
FLATTER = 0.5  # factor of the logits that stands in for a model whose attention is diffuse
TAUS = (0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
THRESHOLDS = (0.008, 0.004, 0.002, 0.001, 0.0005, 0.00025, 0.0001)  # at 8,192 tokens; shares of fewer blocks are larger
WHOLE_VARIANCE = "both, order 2, 8/32"  # `best` with half of it, as if logits were Gaussian
TABLED = (
    "rr",
    "order 2 128×64, threshold",
    "pooled queries, order 2",
    FAST,
    BEST,
    "best 128×128",
    "best, variance by a quarter",
    WHOLE_VARIANCE,
    "both, order 2, 16/16",
    "oracle mass",
    "oracle mass 128×64",
)
SHORT_RULES = (  # where the study of all rules would cost more than it tells
    *TABLED,
    *(rule for rule in COMPARED if rule not in TABLED),
    "both, order 2, 8/16",
    "both, order 2, 4/32",
    "both, order 1, 8/16",
    "best, queries by 64",
    "best 64×64",
    "coarse to fine: order 2, 32/8 then 8/8",
    "coarse to fine: pooled queries then best",
    "best, geometric mean",
    "best, mean of squares",
    "best, mean of squares, share of a row",
    "both, order 2, 8/16, mean of squares",
    "best, weighed by disagreement",
    "best, weighed by disagreement, root",
    "best, three quarters keys",
    "best, row before as prior, a tenth",
    "best, FP8",
    "best, INT8",
    "oracle mass 64×64",
)


@dataclass
class OracleAttention:
    """Attention by the true mass: every layer keeps blocks above a share of their row, and the mandatory ones."""

    block_size: tuple[int, int]
    threshold: float
    densities: dict[int, float] = field(default_factory=dict)  # of the last run, by layer

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float, window: int | None) -> Tensor:
        if window is not None:
            raise NotImplementedError(f"layer {layer} must have full causal attention, got a window of {window}")
        mass = true_block_mass(q, k, block_size=self.block_size, scale=scale)
        visible, mandatory = visible_and_mandatory(q.shape[2], self.block_size, q.device)
        kept = select_threshold(mass, self.threshold, visible, mandatory)
        self.densities[layer] = density_of(kept, visible).mean().item()
        return attend_to_blocks(q, k, v, KeptBlocks(kept, self.block_size), scale=scale)

    @property
    def density(self) -> float:
        return sum(self.densities.values()) / len(self.densities)


@dataclass
class Study:
    """The model, the device and what was found so far."""

    device: torch.device
    model: torch.nn.Module
    tokenizer: object
    kinds: Sequence[str]
    length: int  # of the errors in all layers and the flatter ones
    judged: Sequence[int]  # layers, each with its predecessor
    every: int = 1  # of how many levels of a rule's budget `runs` has one
    records: list[Record] = field(default_factory=list)
    predictions: list[dict] = field(default_factory=list)
    curves: dict[int, Curves] = field(default_factory=dict)  # by the length that they were measured at

    def ids(self, kind: str, part: int, length: int) -> Tensor:
        return tokenize(self.tokenizer, sample_text(kind, part), length).to(self.device)

    def calibrate(self, length: int) -> None:
        texts = [self.ids(kind, TUNING_PART, length) for kind in self.kinds]
        self.curves[length] = measure_curves(self.model, texts, RRConfig.from_preset("best"), lambda *_: None)

    def targets(self, length: int) -> list[float]:
        """Those of TARGETS that are more than the mandatory blocks; none where nothing was calibrated."""
        if length not in self.curves:
            return []
        least = self.curves[length].density.amin(2).mean().item()
        return [density for density in TARGETS if density > least]

    def profile(self, density: float, length: int) -> Profile:
        names = [f"{kind}:{TUNING_PART}, {length} tokens" for kind in self.kinds]
        curves, config = self.curves[length], RRConfig.from_preset("best")
        return profile_of(self.model, curves, meet(curves, "density", density), config, {"density": density}, names)

    def errors(self, kind: str, part: int, length: int, rules: Sequence[str] = tuple(RULES)) -> None:
        """Rules on one text; with flatter attention some of them at the study's own length. New ones replace old."""
        kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        hidden_states(self.model, self.ids(kind, part, length), keeping(kept, self.judged))
        chosen = {name: RULES[name] for name in rules}
        if length == self.length and length in self.curves:
            profile = self.profile(max(CALIBRATED_AT, self.targets(length)[0]), length)
            chosen = chosen | {"best, calibrated": calibrated(RULES[BEST].config, profile.layers)}
        name = f"{kind}{part}" if length == self.length else f"{kind}{part}-{length}"
        with torch.no_grad():
            self.add(judge_text(name, kept, chosen, judged=self.judged))
            if length == self.length and part != TUNING_PART:
                flat = {layer: (FLATTER * q, k, v) for layer, (q, k, v) in kept.items()}
                few = {rule: RULES[rule] for rule in rules if rule in SHORT_RULES}
                self.add(judge_text(f"flatter {name}", flat, few, scopes=("layer",), judged=self.judged))

    def add(self, records: list[Record]) -> None:
        """Records, in place of earlier ones of the same rules and text."""
        new = {(record.rule, record.text) for record in records}
        self.records = [record for record in self.records if (record.rule, record.text) not in new] + records

    def predict(self, kind: str, part: int, length: int) -> None:
        """The model's predictions under each attention against its dense ones."""
        ids = self.ids(kind, part, length)
        dense = hidden_states(self.model, ids, attend_densely)
        head = self.model.get_output_embeddings()
        rows = []
        for (rule, level), make in self.runs(length).items():
            attention = make()
            if rule == "dense, bfloat16":
                compared = hidden_states(copy.deepcopy(self.model).bfloat16(), ids, attention).to(dense.dtype)
            else:
                compared = hidden_states(self.model, ids, attention)
            found = compare_logits(dense, compared, ids[0], head=head)
            density = getattr(attention, "density", 1.0)
            ratio = found.perplexity_compared / found.perplexity
            row = Prediction(rule, f"{kind}{part}", level, density, found.kl, found.agreement, ratio)
            rows.append({"length": length} | dataclasses.asdict(row))
        # All at once: a text that failed half-way has none.
        self.predictions += rows

    def structured(self, seed: int, length: int, heads: int, rules: Sequence[str] = SHORT_RULES) -> None:
        self.add(judge_structured(seed, length, heads, {name: RULES[name] for name in rules}, self.device))

    def runs(self, length: int) -> dict[tuple[str, float | None], Callable]:
        """Attention by (rule, level) for `predict`."""
        found: dict[tuple[str, float | None], Callable] = {}
        thresholds = [level * 8192 / length for level in THRESHOLDS]

        def add(rule: str, level: float, config) -> None:
            found[rule, level] = lambda: SparseAttention(config)

        # What rounding alone does; on a CPU six times as slow as a run in float32.
        if self.device.type == "cuda":
            found["dense, bfloat16", None] = lambda: attend_densely
        for tau in TAUS[:: self.every]:
            add("rr", tau, RULES["rr"].config.with_settings({"tau": tau}))
        for rule, step in ((BEST, 1), (FAST, 1), (WHOLE_VARIANCE, 2)):
            for threshold in thresholds[:: step * self.every]:
                add(rule, threshold, RULES[rule].config.with_settings({"threshold": threshold}))
        for threshold in thresholds[:: 2 * self.every]:
            found["oracle mass 128×64", threshold] = lambda level=threshold: OracleAttention((128, 64), level)
        for density in self.targets(length)[:: self.every]:
            add("best, calibrated", density, RRConfig.from_profile(self.profile(density, length)))
        for density in TARGETS[1 :: 2 * self.every]:
            uniform = RULES[BEST].config.with_settings({"budget": "density", "target_density": density})
            add("best, every layer at the density", density, uniform)
        return found
