"""What each judged rule costs: `python -m benchmarks.study.judge_times --shape 9 3 64 --out TIMES.jsonl`, on a GPU.

Estimate, selection and attention in one call at 131,072 tokens of a model's shape on the structured workload, at the
levels where a rule keeps .15 and .30 of the blocks; between them a time is linear in the density.
"""

import argparse
import fcntl
import json
import math
import time
from pathlib import Path

import torch

from benchmarks.environment import describe
from benchmarks.study.judged_rules import JUDGED
from benchmarks.timing import measure
from benchmarks.workloads import Inputs, Shape, structured
from rr_flex import RRConfig, rr_attention
from rr_flex.cli import flags
from rr_flex.kernels.dense import dense_attention

DENSITIES = (0.15, 0.3)
STEPS = 12  # of a bisection for a density; a step of the last is 1/4096 of the range of the level's logarithm
SEED = 1
TIMED = [name for name, rule in JUDGED.items() if rule.config]


def density_at(inputs: Inputs, config: RRConfig) -> float:
    return rr_attention(*inputs, config=config, return_density=True)[1].item()


def level_for(inputs: Inputs, config: RRConfig, density: float) -> float:
    """The threshold or τ that keeps so much, by bisection: a threshold on its logarithm, τ on that of 1 − τ."""

    def at(x: float) -> float:
        return math.exp(x) if config.level_field == "threshold" else 1 - math.exp(x)

    low, high = -14.0, -0.1  # the density falls with x
    for _ in range(STEPS):
        middle = (low + high) / 2
        keeps = density_at(inputs, config.with_settings({config.level_field: at(middle)}))
        low, high = (middle, high) if keeps > density else (low, middle)
    return at((low + high) / 2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.judge_times", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=flags.whole(1), nargs=3, required=True, metavar=("HQ", "HKV", "D"))
    parser.add_argument("--length", type=flags.whole(1), default=131072)
    parser.add_argument("--rules", choices=TIMED, nargs="+", default=TIMED)
    parser.add_argument("--out", type=flags.new_file, required=True, metavar="TIMES.jsonl", help="rows are added to it")
    parser.add_argument("--after", type=Path, help="compile, then wait for this file and time one process at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="named in the rows where there is no git history")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = structured(Shape(arguments.length, *arguments.shape), dtype=dtype, device=device, seed=SEED)
    configs = {name: JUDGED[name].config.with_settings({"min_length": 0}) for name in arguments.rules}
    levels = {}
    for name, config in configs.items():
        for density in DENSITIES:
            levels[name, density] = level_for(inputs, config, density)
        print(f"{name}: {levels[name, DENSITIES[0]]:.3g}, {levels[name, DENSITIES[1]]:.3g}", flush=True)
    while arguments.after is not None and not arguments.after.exists():
        time.sleep(0.2)
    about = {"shape": arguments.shape, "tokens": arguments.length} | describe(device, arguments.commit)
    with arguments.out.open("a", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        for (name, _), level in levels.items():
            config = configs[name].with_settings({configs[name].level_field: level})
            timing = measure(
                lambda _, config=config: rr_attention(*inputs, config=config),
                sets=1,
                device=device,
                seconds=0.2,
                repeats=(3, 10),
            )
            row = {"rule": name, "level": level, "density": round(density_at(inputs, config), 4)}
            stream.write(json.dumps(about | row | {"ms": timing.median}, ensure_ascii=False) + "\n")
        dense = measure(
            lambda _: dense_attention(*inputs, causal=True, scale=None, flash="no"),
            sets=1,
            device=device,
            seconds=0.2,
            repeats=(3, 10),
        )
        stream.write(json.dumps(about | {"rule": "dense", "density": 1.0, "ms": dense.median}) + "\n")


if __name__ == "__main__":
    main()
