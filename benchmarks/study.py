"""The accuracy study: `python -m benchmarks.study --out DIR`, on a GPU if there is one.

What SmolLM2 predicts at each budget, on texts of five kinds and at several lengths; then every rule at equal density on
its own q, k and v, the same with flatter attention, and the structured workload. Work is cut into tasks, the most
telling first: predictions at the first length, prose and code before the rest. What does not fit into --budget-seconds
is left out, and named in about.json. `benchmarks.study_report` puts the folders of several runs together.
"""

import argparse
import copy
import dataclasses
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.accuracy import COMPARED, judge_structured
from benchmarks.environment import describe
from rr_flex import RRConfig
from rr_flex.calibration import Curves, measure_curves, profile_at
from rr_flex.evaluation.combinations import calibrated
from rr_flex.evaluation.equal_density import kept_coarse_to_fine, visible_and_mandatory
from rr_flex.evaluation.estimators import BAND, Case
from rr_flex.evaluation.language_model import compare_logits
from rr_flex.evaluation.predictions import Prediction
from rr_flex.evaluation.report import keeping
from rr_flex.evaluation.rules import BEST, FAST, RULES
from rr_flex.evaluation.sparse_model import OracleAttention, SparseAttention, attend_densely, hidden_states
from rr_flex.evaluation.study import DENSITIES, Record, judge_text
from rr_flex.evaluation.summaries import write_records
from rr_flex.evaluation.texts import KINDS, sample_text
from rr_flex.models.loading import load_causal_lm, tokenize
from rr_flex.profiles import Profile

TUNING_PART = 0  # of every kind: what rules are chosen and budgets calibrated on
HELD_OUT_PARTS = (1, 2)
TARGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # densities of the calibrated profiles
CALIBRATED_AT = 0.3  # the profile that the study of errors scales to every density
FIRST_GUESS = 10.0  # seconds of a task of a kind that has not run yet
FLATTER = 0.5  # factor of the logits that stands in for a model whose attention is diffuse
TAUS = (0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
THRESHOLDS = (0.008, 0.004, 0.002, 0.001, 0.0005, 0.00025, 0.0001)  # at 8,192 tokens; shares of fewer blocks are larger
LENGTHS = (8192, 2048, 4096)
PARTS = ("predictions", "errors")
SHORT_RULES = (  # where the study of all rules would cost more than it tells
    *COMPARED,
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
    refined: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # by rule and text, a share a density
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
        return profile_at(self.model, self.curves[length], RRConfig.from_preset("best"), density, names)

    def errors(self, kind: str, part: int, length: int, rules: Sequence[str] | None = None) -> None:
        """All rules, or some, on one text; the same with flatter attention at the study's own length."""
        kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        wanted = {layer - back for layer in self.judged for back in (0, 1)}
        hidden_states(self.model, self.ids(kind, part, length), keeping(kept, wanted))
        chosen = RULES if rules is None else {name: RULES[name] for name in rules}
        if length == self.length and length in self.curves:
            profile = self.profile(max(CALIBRATED_AT, self.targets(length)[0]), length)
            chosen = chosen | {"best, calibrated": calibrated(RULES[BEST].config, profile.layers)}
        name = f"{kind}{part}" if length == self.length else f"{kind}{part}-{length}"
        with torch.no_grad():
            self.records += judge_text(name, kept, chosen, judged=self.judged)
            if length == self.length and part != TUNING_PART:
                flat = {layer: (FLATTER * q, k, v) for layer, (q, k, v) in kept.items()}
                few = {name: RULES[name] for name in SHORT_RULES}
                self.refine(name, kept[self.judged[len(self.judged) // 2]])
                self.records += judge_text(f"flatter {name}", flat, few, scopes=("layer",), judged=self.judged)

    def refine(self, text: str, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
        """The share of blocks that a rule from coarse to fine estimates finely, in one layer at each density."""
        for name, rule in RULES.items():
            if rule.refine is not None:
                case = Case(*qkv, {})
                blocks = visible_and_mandatory(qkv[0].shape[2], rule.block_size, self.device)
                weights = rule.weigh(case), rule.refine(case)
                _, shares = kept_coarse_to_fine(*weights, *blocks, densities=DENSITIES, band=BAND)
                self.refined.setdefault(name, {})[text] = [round(share, 4) for share in shares]

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

    def structured(self, seed: int, length: int, heads: int) -> None:
        rules = {name: RULES[name] for name in SHORT_RULES}
        self.records += judge_structured(seed, length, heads, rules, self.device)

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
        for rule in (BEST, FAST):
            for threshold in thresholds[:: self.every]:
                add(rule, threshold, RULES[rule].config.with_settings({"threshold": threshold}))
        for threshold in thresholds[:: 2 * self.every]:
            found["oracle mass 128×64", threshold] = lambda level=threshold: OracleAttention((128, 64), level)
        for density in self.targets(length)[:: self.every]:
            add("best, calibrated", density, self.profile(density, length).configs())
        for density in TARGETS[1 :: 2 * self.every]:
            uniform = RULES[BEST].config.with_settings({"budget": "density", "target_density": density})
            add("best, every layer at the density", density, uniform)
        return found


def tasks_of(
    study: Study, lengths: Sequence[int], structured: tuple[int, int], parts: Sequence[str] = PARTS
) -> list[tuple[str, Callable[[], None]]]:
    """(name, function), the most telling first; `structured`: that workload's length and query heads."""
    (full, *others), (structured_length, heads) = lengths, structured
    first, second = HELD_OUT_PARTS
    tasks: list[tuple[str, Callable[[], None]]] = []

    def add(name: str, function: Callable, *args) -> None:
        words = [name, *(str(x) for x in args if isinstance(x, str | int))]
        tasks.append((" ".join(words), lambda: function(*args)))

    def of_every_kind(name: str, function: Callable, *args) -> None:
        for kind in study.kinds:
            add(name, function, kind, *args)

    add("calibrate", study.calibrate, full)
    if "predictions" in parts:
        of_every_kind("predict", study.predict, first, full)
        of_every_kind("predict", study.predict, second, full)
        for length in others:
            add("calibrate", study.calibrate, length)
            of_every_kind("predict", study.predict, first, length)
            of_every_kind("predict", study.predict, second, length)
    if "errors" in parts:
        of_every_kind("errors", study.errors, first, full)
        for seed in (1, 2):
            add("structured", study.structured, seed, structured_length, heads)
        of_every_kind("errors", study.errors, second, full)
        of_every_kind("errors", study.errors, TUNING_PART, full)
        for length in others:
            of_every_kind("errors", study.errors, first, length, SHORT_RULES)
        add("structured", study.structured, 0, structured_length, heads)
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face name, a folder or a .gguf file [SmolLM2-135M-Instruct]")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="from the start [no limit]")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS", help="[%(default)s]")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=tuple(KINDS), help="of text [all]")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of N levels of a budget one [%(default)s]")
    parser.add_argument("--only", choices=PARTS, help="leave the other half out")
    parser.add_argument("--smoke", action="store_true", help="code only, 1,024 and 512 tokens, two layers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="named in the results where there is no git history")
    arguments = parser.parse_args()
    start = time.perf_counter()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_causal_lm(arguments.model, device=arguments.device)
    where = torch.device(arguments.device)
    parts = PARTS if arguments.only is None else (arguments.only,)
    if arguments.smoke:
        lengths = (1024, 512)
        study = Study(where, model, tokenizer, ("code",), lengths[0], (2, 5), every=10)
        tasks = tasks_of(study, lengths, (2048, 8), parts)
    else:
        lengths = arguments.lengths
        study = Study(where, model, tokenizer, arguments.kinds, lengths[0], range(2, 30, 3), every=arguments.every)
        tasks = tasks_of(study, lengths, (16384, 32), parts)
    about = environment(study, arguments.commit)
    about["loading"] = round(time.perf_counter() - start, 1)
    try:
        run_tasks(tasks, study, about, arguments.out, start, arguments.budget_seconds)
    finally:
        write(arguments.out, study, about)
    print(f"{time.perf_counter() - start:.0f} s; failed {list(about['failed'])}; left out {about['left out']}")


def run_tasks(tasks, study: Study, about: dict, out: Path, start: float, budget_seconds: float) -> None:
    """Each task that is expected to end in time; one that fails is told of in `about` and stops no other."""
    longest = dict.fromkeys(("calibrate", "errors", "predict", "structured"), FIRST_GUESS)
    seen: set[str] = set()
    written = time.perf_counter()
    for name, task in tasks:
        kind = name.split()[0]
        begun = time.perf_counter()
        if begun - start + 1.1 * longest[kind] > budget_seconds:
            about["left out"].append(name)
            continue
        try:
            task()
        except Exception:
            about["failed"][name] = traceback.format_exc()[-1500:]
        if study.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        longest[kind] = max(seconds, longest[kind] if kind in seen else 0)
        seen.add(kind)
        about["seconds"][name] = round(seconds, 2)
        print(f"{begun - start:7.1f} s  {name}: {seconds:.1f} s", about["failed"].get(name, ""), flush=True)
        if time.perf_counter() - written > 30:
            write(out, study, about)
            written = time.perf_counter()


def environment(study: Study, commit: str | None) -> dict:
    import transformers

    where = describe(study.device, commit)
    return {
        "model": getattr(study.model.config, "name_or_path", "").rsplit("/", 1)[-1],
        "tokens": study.length,
        "layers": list(study.judged),
        "device": where["card"],
        "torch": where["torch"],
        "transformers": transformers.__version__,
        "python": where["python"],
        "commit": where["commit"],
        "date": where["date"][:10],
        "seconds": {},
        "failed": {},
        "left out": [],
    }


def write(folder: Path, study: Study, about: dict) -> None:
    write_records(folder / "records.json", study.records)
    (folder / "predictions.json").write_text(json.dumps(study.predictions), encoding="utf-8")
    profiles = {
        length: {density: dataclasses.asdict(study.profile(density, length)) for density in study.targets(length)}
        for length in study.curves
    }
    (folder / "profiles.json").write_text(json.dumps(profiles), encoding="utf-8")
    (folder / "about.json").write_text(json.dumps(about | {"refined": study.refined}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
