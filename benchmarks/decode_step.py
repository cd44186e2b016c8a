"""`python -m benchmarks.decode_step`: what rr_flex adds to a one-token step, which stays dense.

The attention function called with one query, sdpa's against rr_flex's, in turns; then whole steps of the model.
"""

import argparse
import inspect
import json
import statistics
import sys
import time

import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.environment import describe
from benchmarks.model_shapes import MODELS, load, prompt
from benchmarks.timing import synchronize
from rr_flex import enable
from rr_flex.cli import flags
from rr_flex.models.forward import rr_flex_attention

WARM_UPS = 5  # steps of each kind that are not counted


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_step", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="real weights, or random ones in a shape")
    parser.add_argument("--length", type=flags.whole(1), default=2048, help="tokens in the cache")
    parser.add_argument("--steps", type=flags.whole(2), default=200, help="of each kind")
    parser.add_argument("--calls", type=flags.whole(2), default=2000, help="of each attention function")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=flags.DTYPES,
        default="bfloat16" if torch.cuda.is_available() else "float32",
    )
    parser.add_argument("--out", type=flags.new_file, help="file that the JSON line is added to; printed without it")
    parser.add_argument("--commit")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    model, tokenizer = load(options.model, device, getattr(torch, options.dtype))
    ids = prompt(tokenizer, options.length, model.config.vocab_size, device)
    row = {"model": options.model, "length": options.length, "dtype": options.dtype}
    row |= {"calls": calls(model, options.calls), "steps": steps(model, ids, options.steps)}
    line = json.dumps(row | describe(device, options.commit))
    if options.out is None:
        print(line)
    else:
        with options.out.open("a") as stream:
            print(line, file=stream)
    print(line_of(row), file=sys.stderr)
    return 0


@torch.no_grad()
def calls(model, repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds of one layer's call on the host, with keys so short that the host is all there is."""
    config, device, dtype = model.config, model.device, model.dtype
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = config.hidden_size // heads
    q = torch.randn(1, heads, 1, dim, device=device, dtype=dtype)
    k = torch.randn(1, kv_heads, 16, dim, device=device, dtype=dtype)
    module = model.model.layers[0].self_attn
    ways = {"sdpa": sdpa_attention_forward, "rr_flex": rr_flex_attention}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with enable(model):
        for repeat in range(repeats):
            for name in in_turn(repeat):
                start = time.perf_counter()
                ways[name](module, q, k, k, None, scaling=dim**-0.5, dropout=0.0)
                times[name].append(1e6 * (time.perf_counter() - start))
            if repeat % 50 == 0:
                synchronize(device)
    return compared(times, "us", repeats // 10)


@torch.no_grad()
def steps(model, ids: torch.Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a whole step behind `ids`, always at the same length: the cache is cut back after each."""
    cache = DynamicCache(config=model.config)
    # transformers renamed the argument.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with_cache = {name: cache}
    model(ids, logits_to_keep=1, **with_cache)
    times: dict[str, list[float]] = {"sdpa": [], "rr_flex": []}

    def one() -> float:
        synchronize(model.device)
        start = time.perf_counter()
        model(ids[:, :1], **with_cache)
        synchronize(model.device)
        found = 1000 * (time.perf_counter() - start)
        cache.crop(-1)
        return found

    for repeat in range(repeats + WARM_UPS):
        for name in in_turn(repeat):
            if name == "sdpa":
                times[name].append(one())
            else:
                with enable(model):
                    times[name].append(one())
    return compared(times, "ms", WARM_UPS)


def in_turn(repeat: int) -> tuple[str, str]:
    """Which goes first alternates, so that a drift of the clock falls on both."""
    return ("sdpa", "rr_flex") if repeat % 2 else ("rr_flex", "sdpa")


def compared(times: dict[str, list[float]], unit: str, skip: int) -> dict[str, dict[str, float]]:
    """Quartiles of each after `skip` warm-ups, and of the difference within each turn."""
    found = {name: quartiles(all_[skip:]) for name, all_ in times.items()}
    pairs = list(zip(times["rr_flex"], times["sdpa"], strict=True))[skip:]
    found["difference"] = quartiles([mine - dense for mine, dense in pairs])
    share = found["difference"]["median"] / found["sdpa"]["median"]
    return found | {"difference_share": share, "unit": unit, "repeats": len(pairs)}


def quartiles(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"first_quartile": low, "median": median, "third_quartile": high}


def line_of(row: dict) -> str:
    parts = []
    for kind in ("calls", "steps"):
        found = row[kind]
        sdpa, mine, more = (found[name]["median"] for name in ("sdpa", "rr_flex", "difference"))
        parts.append(
            f"{kind}: sdpa {sdpa:.2f}, rr_flex {mine:.2f} {found['unit']}, {more:+.3f} in the same turn "
            f"({100 * found['difference_share']:+.1f} %)"
        )
    return f"{row['model']}, {row['length']:,} tokens: " + "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
