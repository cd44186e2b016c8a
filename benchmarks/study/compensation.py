"""Dropped blocks given back by one query a block row: `python -m benchmarks.study.compensation --out ROWS.jsonl`.

The mean query of a block row attends to all keys that the row drops: exact, with values and keys as its values. For
each query of the row its log-sum-exp is shifted to first order, and both parts are merged:
out_i = (e^lse_i · out_i + e^l_i · μ_v) / (e^lse_i + e^l_i), l_i = l + (q_i − q̄) · μ_k / √D.
"""

import argparse
import json
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.environment import describe
from benchmarks.study.judge import Judge, JudgedAttention, must_hold, texts_of, told
from benchmarks.study.judged_rules import JUDGED
from rr_flex.cli import flags
from rr_flex.evaluation.block_outputs import KeptBlocks
from rr_flex.evaluation.language_model import compare_logits
from rr_flex.evaluation.sparse_model import attend_densely, hidden_states
from rr_flex.models.loading import load_causal_lm, load_tokenizer

HELD_OUT = ("prose1", "code1", "chat1")
RULES = ("best", "fast")


@dataclass
class Compensated(JudgedAttention):
    """`JudgedAttention` whose dropped blocks come back; only values, without the shift, where `shift` is False."""

    shift: bool | None = None  # None: no compensation at all

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], kept: Tensor, visible: Tensor, scale: float) -> Tensor:
        out, lse = attend_by_lists(qkv, KeptBlocks(kept, self.rule.block_size), scale)
        if self.shift is None:
            return out
        return compensate(qkv, (out, lse), visible & ~kept, self.rule.block_size, (scale, self.shift))


def attend_by_lists(qkv: tuple, chosen: KeptBlocks, scale: float) -> tuple[Tensor, Tensor]:
    """(out [1, Hq, L, Dv], log-sum-exp [1, Hq, L]) of causal attention, a head and a block row at a time."""
    q, k, v = (x[0] for x in qkv)
    kept, (rows, columns) = chosen.kept[0], chosen.block_size
    Hq, L, group = q.shape[0], q.shape[1], q.shape[0] // k.shape[0]
    out, lse, inside = q.new_empty(Hq, L, v.shape[2]), q.new_empty(Hq, L), torch.arange(columns)
    for row, start in enumerate(range(0, L, rows)):
        stop = min(start + rows, L)
        for head in range(Hq):
            key = (kept[head, row].nonzero() * columns + inside).flatten()
            key = key[key < stop]
            scores = q[head, start:stop] @ k[head // group, key].T * scale
            scores.masked_fill_(key > torch.arange(start, stop)[:, None], -torch.inf)
            lse[head, start:stop] = scores.logsumexp(1)
            out[head, start:stop] = (scores - lse[head, start:stop, None]).exp_() @ v[head // group, key]
    return out[None], lse[None]


def compensate(qkv: tuple, attended: tuple, dropped: Tensor, size: tuple[int, int], how: tuple[float, bool]) -> Tensor:
    """The merged output [1, Hq, L, Dv]; dropped [1, Hq, nQ, nK] blocks are wholly visible, L a multiple of both sizes.
    `how`: scale, and whether each query shifts the log-sum-exp."""
    (q, k, v), (out, lse), (scale, shift) = qkv, attended, how
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    each = q.unflatten(2, (-1, size[0]))
    mean = each.mean(3)  # B Hq nQ D
    scores = mean @ k.mT * scale
    scores = scores.masked_fill(~dropped.repeat_interleave(size[1], 3), -torch.inf)
    total = scores.logsumexp(3, keepdim=True)  # B Hq nQ 1
    share = (scores - total).exp().nan_to_num()
    key, value = share @ k, share @ v
    if shift:
        total = total + ((each - mean[:, :, :, None]) @ key[..., None]).squeeze(-1) * scale
    weight = (total - lse.unflatten(2, (-1, size[0]))).sigmoid()[..., None]  # 0 where nothing is dropped
    return torch.lerp(out.unflatten(2, (-1, size[0])), value[:, :, :, None], weight).flatten(2, 3)


WAYS = {"none": None, "values alone": False, "shifted": True}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study.compensation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", help="a Hugging Face name, a folder or a .gguf file [SmolLM2-135M-Instruct]")
    parser.add_argument("--name", default="SmolLM2-135M", help="of the model, in the rows")
    parser.add_argument("--out", type=flags.new_file, required=True, metavar="ROWS.jsonl", help="rows are added to it")
    parser.add_argument("--length", type=flags.whole(1), default=4096)
    parser.add_argument("--densities", type=flags.share, nargs="+", default=(0.2, 0.3))
    parser.add_argument(
        "--levels", type=flags.positive, nargs="+", help="of one rule at the densities [found on a text]"
    )
    parser.add_argument(
        "--ids", type=flags.old_file, help="token ids by text, made elsewhere with torch.save: no tokenizer"
    )
    parser.add_argument("--texts", nargs="+", default=HELD_OUT)
    parser.add_argument("--rules", nargs="+", choices=JUDGED, default=RULES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=("none", "shifted"))
    parser.add_argument(
        "--every", type=flags.whole(1), default=4, help="positions whose logits are compared [%(default)s]"
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    made = torch.load(arguments.ids) if arguments.ids else None
    texts = made or texts_of(load_tokenizer(arguments.model), (0, 1, 2), arguments.length)
    texts = {name: ids[:, : arguments.length] for name, ids in texts.items()}
    must_hold(texts, ["code0", *arguments.texts])
    if arguments.levels and len(arguments.levels) != len(arguments.densities):
        raise SystemExit(f"--levels must be as many as --densities, got {arguments.levels}")
    model, _ = load_causal_lm(arguments.model, device="cpu", tokenizer=object())
    rules = {name: JUDGED[name] for name in arguments.rules}
    judge = Judge(model, {"code0": texts["code0"]}, {}, rules, arguments.densities)
    if arguments.levels:
        name, rule = next(iter(rules.items()))
        levels = zip(arguments.densities, arguments.levels, strict=True)
        judge.runs = {(name, density): (rule, level) for density, level in levels}
    else:
        judge.find_levels()
    told(start, "levels")
    head, about = model.get_output_embeddings(), {"model": arguments.name} | describe(torch.device("cpu"), None)
    for text in arguments.texts:
        ids = texts[text]
        dense = hidden_states(model, ids, attend_densely)
        for (name, density), (rule, level) in judge.runs.items():
            for way in arguments.ways:
                attention = Compensated(rule, level, shift=WAYS[way])
                found = hidden_states(model, ids, attention)
                found = compare_logits(*(x[:: arguments.every] for x in (dense, found, ids[0])), head=head)
                row = {"rule": name, "text": text, "tokens": ids.shape[1], "aimed": density, "compensation": way}
                row |= {"density": round(attention.density, 5), "kl": round(found.kl, 7)}
                row |= {"agreement": round(found.agreement, 5)}
                with arguments.out.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(about | row, ensure_ascii=False) + "\n")
                told(start, " ".join(str(x) for x in row.values()))


if __name__ == "__main__":
    main()
