"""What the dense last block row costs: `python -m benchmarks.last_row`, attention alone, variants in turns.

All rows at once; the last row left empty, which bounds what can be gained; the last row in runs, as rr_attention does
it; and all rows with their blocks in descending order, which shows whether that order matters. JSON lines out.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import stages
from benchmarks.cases import BACKENDS, COARSE_QUERIES
from benchmarks.environment import describe
from benchmarks.timing import measure_in_turns
from benchmarks.workloads import structured
from mask_mods import causal
from rr_flex.block_mask import Lists, block_mask_of_lists, list_partial_and_full
from rr_flex.kernels.options import attention_options

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    about = describe(device, options.commit)
    shape = {"L": options.length, "Hq": options.heads, "Hkv": options.kv_heads, "D": options.head_dim}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = structured(**shape, dtype=dtype, device=device, seed=0)
    mass = stages.estimate(q, k, COARSE_QUERIES)
    for wanted in options.densities:
        config = stages.config_for_density(mass, COARSE_QUERIES, options.length, wanted)
        kept, blocks = stages.choose(mass, config.level_per_head(options.heads, device), config, options.length)
        for kernel in options.backends:
            variants = masks(kept, blocks.whole, options.length, kernel)
            kernel_options = attention_options(q, (128, 128), kernel)
            attend = partial(stages.attend_apart, q, k, v, options=kernel_options)
            calls = [lambda _, attend=attend, each=each: attend(each) for each in variants.values()]
            timings = measure_in_turns(calls, sets=1, device=device, seconds=options.seconds)
            row = {"density": stages.density(kept, blocks.visible), "backend": kernel, **shape}
            row["ms"] = {name: each.as_dict() for name, each in zip(variants, timings, strict=True)}
            print({name: round(each["median"], 2) for name, each in row["ms"].items()}, file=sys.stderr)
            with (options.out / "last-row.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | about) + "\n")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.last_row", description=__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS if cuda else ("triton",))
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.3, 0.25, 0.4])
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long to repeat each variant")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of last-row.jsonl, which grows")
    parser.add_argument("--commit", help="named in the rows where there is no git history")
    return parser


def masks(kept: Tensor, whole: Tensor, L: int, kernel: str) -> dict[str, stages.Masks]:
    """The variants by name; "in runs" only where the kernel gives a log-sum-exp to merge by."""
    without = kept.clone()
    without[:, :, -1] = False
    everything = list_partial_and_full(kept, whole)
    found = {
        "at once": of_lists(everything, L),
        "last row empty": of_lists(list_partial_and_full(without, whole), L),
        "descending": of_lists((*everything[:3], descending(*everything[2:])), L),
    }
    if kept.device.type == "cuda":
        found["last row in runs"] = stages.masks_apart(kept, whole, COARSE_QUERIES, L, kernel)
    return found


def of_lists(lists: Lists, L: int) -> stages.Masks:
    return stages.Masks(block_mask_of_lists(lists, causal(0), block_size=(128, 128), seq_lengths=(L, L)))


def descending(counts: Tensor, indices: Tensor) -> Tensor:
    """Each row's entries in reverse, in memory laid out as before, by which the kernel goes."""
    place = counts[..., None].long() - 1 - torch.arange(indices.shape[-1], device=indices.device)
    reverse = torch.where(place >= 0, indices.gather(-1, place.clamp(min=0)), indices)
    laid_out = torch.empty_strided(indices.shape, indices.stride(), dtype=indices.dtype, device=indices.device)
    return laid_out.copy_(reverse)


if __name__ == "__main__":
    raise SystemExit(main())
