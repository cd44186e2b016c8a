"""What each estimate costs on a card: `python -m benchmarks.estimates [lengths] [--json FILE]`, milliseconds.

Per length and preset: the whole selection as one graph, its estimate alone, and the largest error of a row's share
against float32. Beside them the bare matrix products of low-precision estimates, which a softmax would still follow.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.environment import describe
from benchmarks.timing import measure
from benchmarks.workloads import Shape, structured
from rr_flex import RRConfig, select_blocks
from rr_flex.estimate import estimate_mass
from rr_flex.mass import row_share
from rr_flex.request import make_request
from rr_flex.runtime.compiling import compile_whole

CONFIGS = {
    "rr": RRConfig(),
    "order 2": RRConfig(order=2),
    "order 2, 128×64": RRConfig(order=2, block_size=(128, 64)),
    "pooled queries": RRConfig(pool="queries", block_size=(128, 64)),
    "pooled queries, order 2": RRConfig(pool="queries", order=2, block_size=(128, 64)),
    "fast": RRConfig.from_preset("fast"),
    "best": RRConfig.from_preset("best"),
    "both, order 2, 16/16": RRConfig.from_preset("best", stride=16, key_stride=16),
    "both, order 2, 8/16": RRConfig.from_preset("best", key_stride=16),
    "best, density": RRConfig.from_preset("best", budget="density", target_density=0.3),
}


def estimate(q: Tensor, k: Tensor, config: RRConfig) -> Tensor:
    return estimate_mass(q, k, make_request(q, k, config, {}))


def time_length(L: int, device: torch.device, seconds: float) -> list[dict]:
    Hq, Hkv = 32, 8
    q, k, _ = structured(Shape(L, Hq, Hkv, 128), dtype=torch.bfloat16, device=device, seed=0)
    alone = compile_whole(estimate)
    rows = []
    for name, config in CONFIGS.items():
        row = {"L": L, "estimate": name}
        try:
            whole = measure(lambda _, c=config: select_blocks(q, k, config=c), sets=1, device=device, seconds=seconds)
            only = measure(lambda _, c=config: alone(q, k, c), sets=1, device=device, seconds=seconds)
            row |= {"select ms": whole.median, "estimate ms": only.median}
            row["density"] = select_blocks(q, k, config=config).density.item()
            if L <= 16384:
                share = row_share(alone(q, k, config)[:, :8])
                exact = row_share(estimate(q[:, :8].float().cpu(), k[:, :2].float().cpu(), config))
                row["share error"] = (share.cpu() - exact).abs().max().item()
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        rows.append(row)
        print(row, flush=True)
    return rows + time_products(q, k, L, device, seconds)


def time_products(q: Tensor, k: Tensor, L: int, device: torch.device, seconds: float) -> list[dict]:
    """[L/128 queries of 4 heads of a group] × [L keys] for 8 key heads, as one head after another, scores in bf16."""
    rows = []
    group = q.shape[1] // k.shape[1]
    queries = q.unflatten(2, (-1, 128)).float().mean(3).to(q.dtype)
    queries = queries.unflatten(1, (k.shape[1], group)).flatten(2, 3)[0]  # Hkv group*nq D
    keys = k[0]
    one = torch.ones((), device=device)
    products = {"bf16 product": lambda a, b: a @ b.mT}
    pairs = {"bf16 product": list(zip(queries, keys, strict=True))}
    if device.type == "cuda":
        eight = torch.float8_e4m3fn
        products["fp8 product"] = lambda a, b: torch._scaled_mm(a, b.mT, one, one, out_dtype=torch.bfloat16)
        pairs["fp8 product"] = [(a.to(eight), b.to(eight)) for a, b in zip(queries, keys, strict=True)]
        products["int8 product"] = lambda a, b: torch._int_mm(a, b.mT)
        whole = [tuple((32 * x).round().to(torch.int8) for x in pair) for pair in pairs["bf16 product"]]
        pairs["int8 product"] = whole
    for name, product in products.items():
        row = {"L": L, "estimate": name}
        try:
            timing = measure(
                lambda _, n=name, f=product: [f(a, b) for a, b in pairs[n]], sets=1, device=device, seconds=seconds
            )
            row["estimate ms"] = timing.median
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimates", description=__doc__.splitlines()[0])
    parser.add_argument("lengths", type=int, nargs="*", default=[8192, 32768, 131072])
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="named in the file where there is no git history")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        rows = [row for L in arguments.lengths for row in time_length(L, device, arguments.seconds)]
    if arguments.json:
        about = describe(device, arguments.commit)
        arguments.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
