"""Rules judged by what a model says under them: `python -m benchmarks.study.judge --model NAME --out ROWS.jsonl`.

Levels are found on the choosing texts, so that each rule keeps two shares of the blocks there; then every held-out
text runs at each. A row is one rule at one level on one text: density, next-token KL from the dense model, agreement,
perplexity. Float32 with tf32 products on a GPU, where one model takes about a minute of an H100.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.environment import describe
from benchmarks.study.judged_rules import BY_WEIGHT, JUDGED, OWN_BUDGETS, JudgedRule, by_head
from rr_flex.calibration.measured_curves import measure_curves
from rr_flex.calibration.sensitivity import output_gradients
from rr_flex.calibration.thresholds import meet, profile_of
from rr_flex.cli import flags
from rr_flex.evaluation.block_outputs import KeptBlocks
from rr_flex.evaluation.language_model import compare_logits
from rr_flex.evaluation.rules import Case
from rr_flex.evaluation.rules_on_texts import keeping
from rr_flex.evaluation.sparse_model import attend_densely, attend_to_blocks, hidden_states
from rr_flex.evaluation.texts import KINDS, sample_text
from rr_flex.models.loading import load_causal_lm, load_tokenizer, tokenize

CHOOSING, HELD_OUT = (0,), (1, 2)  # parts of every kind of text
DENSITIES = (0.24, 0.36)  # of the choosing texts; between them a divergence is read off on a logarithmic scale
SAMPLED_VALUES = 1 << 22  # of a rule's values on a text, from which its levels are read off


@dataclass
class JudgedAttention:
    """Attention over what a rule keeps at a level in the layers of full attention; sliding ones are dense."""

    rule: JudgedRule
    level: float
    densities: list[Tensor] = field(default_factory=list)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float, window: int | None) -> Tensor:
        if window is not None:
            return attend_densely(q, k, v, layer=layer, scale=scale, window=window)
        visible, mandatory = self.rule.blocks(q.shape[2], q.device)
        kept = self.rule.kept(Case(q, k, v, (layer,)), self.level, visible, mandatory)
        self.densities.append(kept.sum() / (visible.sum() * q.shape[1]))
        return self.attend((q, k, v), kept, visible, scale)

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], kept: Tensor, visible: Tensor, scale: float) -> Tensor:
        """The output from the kept ones of the visible blocks."""
        return attend_to_blocks(*qkv, KeptBlocks(kept, self.rule.block_size), scale=scale)

    @property
    def density(self) -> float:
        return torch.stack(self.densities).mean().item()


@dataclass
class Judge:
    """One model and its texts as token ids, each [1, L]."""

    model: torch.nn.Module
    choosing: Mapping[str, Tensor]
    held_out: Mapping[str, Tensor]
    rules: dict[str, JudgedRule]
    densities: Sequence[float] = DENSITIES
    own_budgets: Sequence[str] = (*OWN_BUDGETS, BY_WEIGHT)
    runs: dict[tuple[str, float], tuple[JudgedRule, float]] = field(default_factory=dict)  # with its level

    @torch.no_grad()
    def add_own_budgets(self) -> None:
        """The rules whose thresholds are calibrated on the choosing texts, for each density."""
        for name, (config, by_prediction) in OWN_BUDGETS.items():
            if name not in self.own_budgets:
                continue
            start, settings = time.perf_counter(), {"by_prediction": by_prediction, "every": 4}
            curves = measure_curves(self.model, list(self.choosing.values()), config, lambda *_: None, **settings)
            for density in self.densities:
                chosen = meet(curves, "density", density)
                profile = profile_of(self.model, curves, chosen, config, {"density": density}, list(self.choosing))
                self.runs[name, density] = by_head(config, profile.layers), 1.0
            told(start, f"for {name}, {len(self.choosing)} texts")
        if BY_WEIGHT in self.own_budgets:
            self.rules[BY_WEIGHT] = by_head(OWN_BUDGETS["best 128×64, own budget"][0], self.head_thresholds())

    def head_thresholds(self) -> dict[int, list[float]]:
        """Relative ones from one number a head: w = E‖g‖² · E‖v − mean v‖², what a share of 1 on other values would do
        to the prediction. A block of share p then costs about w · p², so that a threshold is as w^-½."""
        found: dict[int, list[Tensor]] = {}
        for ids in self.choosing.values():
            for layer, felt in output_gradients(self.model, ids).items():
                v, gradient = felt.v[0], felt.gradient[0]
                spread = (v - v.mean(1, keepdim=True)).square().sum(-1).mean(1)
                spread = spread.repeat_interleave(gradient.shape[0] // len(spread))
                found.setdefault(layer, []).append(gradient.square().sum(-1).mean(1) * spread)
        return {layer: torch.stack(each).mean(0).rsqrt().tolist() for layer, each in found.items()}

    @torch.no_grad()
    def find_levels(self) -> None:
        """Each rule's level for each density, over all blocks of the choosing texts' dense runs."""
        values: dict[str, list[Tensor]] = {name: [] for name in self.rules}
        shares: dict[str, list[float]] = {name: [] for name in self.rules}
        for ids in self.choosing.values():
            kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
            hidden_states(self.model, ids, keeping(kept, range(self.model.config.get_text_config().num_hidden_layers)))
            for name, rule in self.rules.items():
                visible, mandatory = rule.blocks(ids.shape[1], ids.device)
                free = (visible & ~mandatory)[0, 0]
                found = [
                    rule.value(Case(*qkv, (layer,)), visible, mandatory)[0][:, free] for layer, qkv in kept.items()
                ]
                found = torch.cat([each.flatten() for each in found])
                step = max(1, len(found) // SAMPLED_VALUES)
                values[name].append(found[::step])
                shares[name].append((mandatory.sum() / visible.sum()).item())
        for name in self.rules:
            ordered = torch.cat(values[name]).sort(descending=True).values
            fixed = sum(shares[name]) / len(shares[name])
            for density in self.densities:
                place = round((density - fixed) / (1 - fixed) * len(ordered))
                level = ordered[min(max(place, 0), len(ordered) - 1)].item()
                self.runs[name, density] = self.rules[name], level

    @torch.no_grad()
    def rows(self) -> Iterator[dict]:
        """One row a rule, level and held-out text."""
        head = self.model.get_output_embeddings()
        for text, ids in self.held_out.items():
            dense = hidden_states(self.model, ids, attend_densely)
            for (name, density), (rule, level) in self.runs.items():
                attention = JudgedAttention(rule, level)
                compared = hidden_states(self.model, ids, attention)
                found = compare_logits(dense, compared, ids[0], head=head)
                yield {
                    "rule": name,
                    "text": text,
                    "tokens": ids.shape[1],
                    "aimed": density,
                    "level": level,
                    "density": round(attention.density, 5),
                    "kl": round(found.kl, 7),
                    "agreement": round(found.agreement, 5),
                    "perplexity": round(found.perplexity, 4),
                    "perplexity_compared": round(found.perplexity_compared, 4),
                }


def texts_of(tokenizer, parts: Sequence[int], length: int) -> dict[str, Tensor]:
    return {f"{kind}{part}": tokenize(tokenizer, sample_text(kind, part), length) for part in parts for kind in KINDS}


def must_hold(texts: Mapping[str, Tensor], names: Sequence[str]) -> None:
    if absent := sorted({*names} - {*texts}):
        raise SystemExit(f"--texts and the choosing one must be of {', '.join(texts)}, got {', '.join(absent)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.judge", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face name, a folder or a .gguf file [SmolLM2-135M-Instruct]")
    parser.add_argument("--name", required=True, help="of the model, in the rows")
    parser.add_argument("--out", type=flags.new_file, required=True, metavar="ROWS.jsonl")
    parser.add_argument("--length", type=flags.whole(1), default=8192, help="tokens of each text [%(default)s]")
    parser.add_argument(
        "--ids", type=flags.old_file, help="token ids by text, made elsewhere with torch.save: no tokenizer"
    )
    parser.add_argument("--rules", nargs="+", choices=JUDGED, default=list(JUDGED), help="[all]")
    own = (*OWN_BUDGETS, BY_WEIGHT)
    parser.add_argument("--own-budgets", nargs="*", choices=own, default=own, metavar="NAME", help="calibrated [all]")
    parser.add_argument("--densities", type=flags.share, nargs="+", default=DENSITIES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="named in the rows where there is no git history")
    arguments = parser.parse_args()
    start = time.perf_counter()
    torch.set_float32_matmul_precision("high")
    made = torch.load(arguments.ids) if arguments.ids else None
    parts = CHOOSING, HELD_OUT
    if made is None:
        tokenizer = load_tokenizer(arguments.model)
        choosing, held_out = (texts_of(tokenizer, part, arguments.length) for part in parts)
    else:
        choosing, held_out = (
            {name: ids[:, : arguments.length] for name, ids in made.items() if int(name[-1]) in part} for part in parts
        )
    choosing, held_out = (
        {name: ids.to(arguments.device) for name, ids in texts.items()} for texts in (choosing, held_out)
    )
    model, _ = load_causal_lm(arguments.model, device=arguments.device, tokenizer=object())
    rules = {name: JUDGED[name] for name in arguments.rules}
    judge = Judge(model, choosing, held_out, rules, arguments.densities, arguments.own_budgets)
    told(start, "loaded")
    judge.add_own_budgets()
    told(start, "calibrated")
    judge.find_levels()
    told(start, "levels found")
    about = {"model": arguments.name} | describe(torch.device(arguments.device), arguments.commit)
    text = None
    with arguments.out.open("w", encoding="utf-8") as stream:
        for row in judge.rows():
            stream.write(json.dumps(about | row, ensure_ascii=False) + "\n")
            stream.flush()
            if row["text"] != text:
                text = row["text"]
                told(start, text)
    told(start, "done")


def told(start: float, what: str) -> None:
    print(f"{time.perf_counter() - start:7.1f} s  {what}", flush=True)


if __name__ == "__main__":
    main()
