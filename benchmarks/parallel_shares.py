"""What selections mean for several ranks, without having them: `python -m benchmarks.parallel_shares`.

From the kept blocks of one process: how many of the others' key blocks each rank wants (the union over its rows and a
key head's query heads), and how unevenly kept blocks fall on ranks by the layout of tokens.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from benchmarks.workloads import Shape, captured, structured
from rr_flex import RRConfig, select_blocks
from rr_flex.cli import flags
from rr_flex.distributed import Layout, balanced, contiguous, zigzag
from rr_flex.distributed.fetch import wanted_blocks
from rr_flex.mass import row_share

RULE = RRConfig(order=2, query_stride=16, key_stride=8, budget="threshold")
DENSITIES = (0.05, 0.1, 0.25, 0.5)
RANKS = (2, 4, 8, 16, 32, 64)


def kept_at(density: float, mass: Float[Tensor, "B Hq nQ nK"], chosen: Any) -> Bool[Tensor, "B Hq nQ nK"]:
    """The blocks over the one threshold that keeps `density` of the visible ones, with the sink and the diagonal.

    Without the dense last row, whose queries go to the keys and not the keys to them.
    """
    share = row_share(mass)[chosen.visible.expand_as(mass)]
    threshold = share.flatten().kthvalue(max(1, int(len(share.flatten()) * (1 - density)))).values
    sink_and_diagonal = torch.eye(mass.shape[2], dtype=torch.bool)
    sink_and_diagonal[:, 0] = True
    kept = chosen.visible & ((row_share(mass) > threshold) | sink_and_diagonal)
    kept[:, :, -1] = False
    return kept


def fetched_share(kept: Bool[Tensor, "B Hq nQ nK"], Hkv: int, layout: Layout) -> list[float]:
    """For each rank the share of the other ranks' key blocks that it wants."""
    owner = torch.tensor(layout.owner_of_blocks(128))
    shares = []
    for rank in range(layout.ranks):
        foreign = owner != rank
        wanted = wanted_blocks([kept[:, :, ~foreign]], (kept.shape[0], Hkv), kept.shape[3])
        shares.append(wanted[..., foreign].float().mean().item())
    return shares


def unevenness(kept: Bool[Tensor, "B Hq nQ nK"], layout: Layout) -> float:
    """The fullest rank's kept blocks over the mean."""
    of_row = kept.sum((0, 1, 3)).float()
    owner = torch.tensor(layout.owner_of_blocks(128))
    work = torch.stack([of_row[owner == rank].sum() for rank in range(layout.ranks)])
    return (work.max() / work.mean()).item()


def study(name: str, q: Tensor, k: Tensor, predicted: Tensor | None = None) -> list[dict[str, Any]]:
    """Rows for all densities and ranks; `predicted`: the mass of another text, whose rows predict the work of this."""
    L, Hkv = q.shape[2], k.shape[1]
    chosen = select_blocks(q, k, config=RULE)
    rows = []
    for density in DENSITIES:
        kept = kept_at(density, chosen.mass, chosen)
        seen = kept_at(density, predicted, chosen) if predicted is not None else kept
        cost = seen.sum((0, 1, 3)).tolist()
        for ranks in RANKS:
            if 2 * ranks > kept.shape[2]:
                continue
            layouts = {"contiguous": contiguous(L, ranks), "zigzag": zigzag(L, ranks)}
            layouts["balanced"] = balanced(cost, L, ranks)
            facts = {"workload": name, "length": L, "heads": q.shape[1], "kv_heads": Hkv, "ranks": ranks}
            facts |= {"wanted_density": density, "density": (kept.sum() / chosen.visible.expand_as(kept).sum()).item()}
            facts["unevenness"] = {each: unevenness(kept, layout) for each, layout in layouts.items()}
            shares = {each: fetched_share(kept, Hkv, layout) for each, layout in layouts.items()}
            facts["fetched_share"] = {each: sum(own) / ranks for each, own in shares.items()}
            facts["most_fetched"] = {each: max(own) for each, own in shares.items()}
            rows.append(facts)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel_shares", description=__doc__)
    parser.add_argument("--length", type=flags.whole(0), default=131072)
    parser.add_argument("--heads", type=flags.whole(1), nargs=2, default=(8, 2))
    parser.add_argument(
        "--captured", type=flags.old_file, nargs="*", default=[], help="files of q, k, v from a real model"
    )
    parser.add_argument(
        "--output", type=flags.new_file, default=Path(__file__).parent / "results" / "parallel-shares.json"
    )
    options = parser.parse_args(arguments)
    Hq, Hkv = options.heads
    shape, made = Shape(options.length, Hq, Hkv, 128), {"dtype": torch.float32, "device": "cpu"}
    rows = []
    with torch.no_grad():
        if options.length:
            other = structured(shape, **made, seed=1)
            predicted = select_blocks(other.q, other.k, config=RULE).mass
            this = structured(shape, **made, seed=0)
            rows += study("structured", this.q, this.k, predicted)
        for path in options.captured:
            q, k, _ = captured(path, "cpu", torch.float32)
            rows += study(Path(path).stem, q, k)
    options.output.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        uneven = " ".join(f"{each} {value:.3f}" for each, value in row["unevenness"].items())
        shares = " ".join(f"{each} {value:.3f}" for each, value in row["fetched_share"].items())
        about = f"{row['workload']} {row['ranks']:>3} ranks density {row['density']:.3f}"
        print(f"{about}: uneven {uneven}; fetched {shares}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
