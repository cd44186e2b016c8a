"""Which heads carry the difference of two rules: `python -m benchmarks.study.carriers --name NAME --out ROWS.jsonl`.

On a choosing text every head's output error under each rule, at equal density, and the nats a token that it costs to
second order (calibration/sensitivity.py). The heads whose nats differ most then take the other rule, and held-out texts
show how much of the difference of the two divergences they carry.
"""

import argparse
import json
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.environment import describe
from benchmarks.study.compensation import attend_by_lists
from benchmarks.study.judge import Judge, JudgedAttention, must_hold, told
from benchmarks.study.judged_rules import JUDGED, JudgedRule
from rr_flex.calibration.sensitivity import output_gradients
from rr_flex.cli import flags
from rr_flex.evaluation.block_outputs import KeptBlocks, output_errors
from rr_flex.evaluation.equal_density import visible_and_mandatory
from rr_flex.evaluation.language_model import compare_logits
from rr_flex.evaluation.rules import Case
from rr_flex.evaluation.sparse_model import attend_densely, hidden_states
from rr_flex.models.loading import load_causal_lm

SWAPPED = (0.05, 0.15)  # of all heads


@dataclass
class Mixed(JudgedAttention):
    """One rule in all heads but those in `others`, (layer, head), which take the other rule at its own level."""

    other: tuple[JudgedRule, float] | None = None
    others: frozenset[tuple[int, int]] = frozenset()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float, window: int | None) -> Tensor:
        if window is not None:
            return attend_densely(q, k, v, layer=layer, scale=scale, window=window)
        visible, mandatory = visible_and_mandatory(q.shape[2], self.rule.block_size, q.device)
        case, swapped = Case(q, k, v, (layer,)), [head for at, head in self.others if at == layer]
        kept = self.rule.kept(case, self.level, visible, mandatory)
        if swapped:
            rule, level = self.other
            kept[:, swapped] = rule.kept(case, level, visible, mandatory)[:, swapped]
        self.densities.append(kept.sum() / (visible.sum() * q.shape[1]))
        return attend_by_lists((q, k, v), KeptBlocks(kept, self.rule.block_size), scale)[0]


@torch.no_grad()
def cost_of_heads(judge: Judge, ids: Tensor, runs: list[tuple[JudgedRule, float]]) -> dict[int, Tensor]:
    """Layer -> [2, rules, Hq]: nats a token, and squared output error over the layer's squared norm."""
    found = {}
    for layer, felt in output_gradients(judge.model, ids).items():
        q, k, v = felt.q.float(), felt.k.float(), felt.v.float()
        visible, mandatory = visible_and_mandatory(q.shape[2], runs[0][0].block_size, q.device)
        case = Case(q, k, v, (layer,))
        kept = [KeptBlocks(rule.kept(case, level, visible, mandatory), rule.block_size) for rule, level in runs]
        felt_errors = output_errors((q, k, v), kept, scale=felt.scale, gradient=felt.gradient, every=2)
        errors = output_errors((q, k, v), kept, scale=felt.scale, every=2)
        nats = felt_errors.difference[:, 0] / (2 * felt_errors.queries)
        found[layer] = torch.stack([nats, errors.difference[:, 0] / errors.reference.sum()])
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.carriers", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face name, a folder or a .gguf file [SmolLM2-135M-Instruct]")
    parser.add_argument("--name", required=True, help="of the model, in the rows")
    parser.add_argument("--ids", type=flags.old_file, required=True, help="token ids by text")
    parser.add_argument("--out", type=flags.new_file, required=True, metavar="ROWS.jsonl", help="rows are added to it")
    parser.add_argument("--length", type=flags.whole(1), default=4096)
    parser.add_argument("--density", type=flags.share, default=0.3)
    parser.add_argument("--rules", nargs=2, choices=JUDGED, default=("best", "fast"), help="of the same blocks")
    parser.add_argument("--choosing", default="code0")
    parser.add_argument("--texts", nargs="+", default=("prose1", "code1"))
    parser.add_argument(
        "--every", type=flags.whole(1), default=4, help="positions whose logits are compared [%(default)s]"
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    ids = {name: each[:, : arguments.length] for name, each in torch.load(arguments.ids).items()}
    must_hold(ids, [arguments.choosing, *arguments.texts])
    model, _ = load_causal_lm(arguments.model, device="cpu", tokenizer=object())
    first, second = arguments.rules
    choosing = {arguments.choosing: ids[arguments.choosing]}
    judge = Judge(model, choosing, {}, {name: JUDGED[name] for name in arguments.rules}, (arguments.density,))
    judge.find_levels()
    runs = [judge.runs[name, arguments.density] for name in arguments.rules]
    about = {"model": arguments.name, "tokens": arguments.length, "aimed": arguments.density, "rules": [first, second]}
    about |= describe(torch.device("cpu"), None)
    cost = cost_of_heads(judge, ids[arguments.choosing], runs)
    told(start, "heads judged")

    def write(row: dict) -> None:
        with arguments.out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(about | row, ensure_ascii=False) + "\n")
        told(start, str(row)[:160])

    for layer, found in cost.items():
        nats, errors = ([[round(x, 9) for x in rule] for rule in measure.tolist()] for measure in found)
        write({"text": arguments.choosing, "layer": layer, "nats": nats, "error²": errors})
    gain = {(layer, head): x.item() for layer, each in cost.items() for head, x in enumerate(each[0, 0] - each[0, 1])}
    ordered = sorted(gain, key=lambda head: -abs(gain[head]))
    for text in arguments.texts:
        dense = hidden_states(model, ids[text], attend_densely)
        tried = [(runs[0], None, ()), (runs[1], None, ())]
        for share in SWAPPED:
            heads = ordered[: max(1, round(share * len(ordered)))]
            tried += [(runs[0], runs[1], heads), (runs[1], runs[0], heads)]
        for own, other, heads in tried:
            attention = Mixed(*own, other=other, others=frozenset(heads))
            found = hidden_states(model, ids[text], attention)
            parts = (x[:: arguments.every] for x in (dense, found, ids[text][0]))
            found = compare_logits(*parts, head=model.get_output_embeddings())
            rule = first if own is runs[0] else second
            write(
                {
                    "text": text,
                    "rule": rule,
                    "swapped": [list(head) for head in heads],
                    "density": round(attention.density, 5),
                    "kl": round(found.kl, 7),
                    "agreement": round(found.agreement, 5),
                }
            )


if __name__ == "__main__":
    main()
