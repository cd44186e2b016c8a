"""One profile at many lengths: `python -m benchmarks.study.judge_lengths --model NAME --out ROWS.jsonl`.

Own budgets of `best` by prediction are found at each length on choosing texts. At every length held-out texts then run
under that length's own thresholds, and under those of one reference length times a factor of the length alone: the one
that meets the density on the choosing texts ("fitted"), or one read off two other lengths on a log-log line ("line").
"""

import argparse
import json
import math
import time

import torch

from benchmarks.environment import describe
from benchmarks.study.judge import Judge, told
from benchmarks.study.judged_rules import by_head
from rr_flex.calibration.measured_curves import measure_curves
from rr_flex.calibration.thresholds import meet, profile_of
from rr_flex.cli import flags
from rr_flex.config import RRConfig
from rr_flex.models.loading import load_causal_lm

TARGET = 0.4  # density; at 2,048 tokens mandatory blocks alone are .28
REFERENCE = 8192  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.study.judge_lengths", description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--name", required=True, help="of the model, in the rows")
    parser.add_argument(
        "--ids", type=flags.old_file, required=True, help="token ids by text, the last letter 0 for choosing ones"
    )
    parser.add_argument("--lengths", type=flags.whole(1), nargs="+", required=True)
    parser.add_argument("--out", type=flags.new_file, required=True, metavar="ROWS.jsonl")
    parser.add_argument("--target", type=flags.share, default=TARGET)
    parser.add_argument("--reference", type=flags.whole(1), default=REFERENCE)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    if arguments.reference not in arguments.lengths:
        raise SystemExit(f"--reference must be among --lengths, got {arguments.reference}")
    start = time.perf_counter()
    torch.set_float32_matmul_precision("high")
    texts = {name: ids.to(arguments.device) for name, ids in torch.load(arguments.ids).items()}
    model, _ = load_causal_lm(arguments.model, device=arguments.device, tokenizer=object())
    config, target = RRConfig.from_preset("best", block_size=(128, 64)), arguments.target
    about = {"model": arguments.name} | describe(torch.device(arguments.device), arguments.commit)
    own, factors = {}, {}

    def judge(length: int) -> Judge:
        choosing, held_out = (
            {name: ids[:, :length] for name, ids in texts.items() if (name[-1] == "0") == first}
            for first in (True, False)
        )
        return Judge(model, choosing, held_out, {}, (target,))

    for length in sorted(arguments.lengths, key=lambda each: each != arguments.reference):
        at = judge(length)
        curves = measure_curves(
            model, list(at.choosing.values()), config, lambda *_: None, by_prediction=True, every=max(4, length // 2048)
        )
        found = profile_of(model, curves, meet(curves, "density", target), config, {"density": target}, [])
        own[length] = by_head(config, found.layers)
        if length == arguments.reference:
            reference = own[length]
        at.rules = {"fitted": reference}
        at.find_levels()
        factors[length] = at.runs["fitted", target][1]
        told(start, f"{length} calibrated, factor {factors[length]:.4f}")
    with arguments.out.open("w", encoding="utf-8") as stream:
        for length in arguments.lengths:
            at = judge(length)
            at.runs = {("own", target): (own[length], 1.0), ("fitted", target): (reference, factors[length])}
            others = sorted((x for x in factors if x != length), key=lambda x: abs(math.log(x / length)))[:2]
            if len(others) == 2:
                at.runs["line", target] = reference, on_line(length, *((x, factors[x]) for x in others))
            for row in at.rows():
                stream.write(json.dumps(about | row | {"factor": factors[length]}, ensure_ascii=False) + "\n")
            stream.flush()
            told(start, f"{length} judged")


def on_line(length: int, first: tuple[int, float], second: tuple[int, float]) -> float:
    """The factor at a length, on the line through two others' logarithms."""
    slope = math.log(second[1] / first[1]) / math.log(second[0] / first[0])
    return first[1] * (length / first[0]) ** slope


if __name__ == "__main__":
    main()
