"""`python -m benchmarks.decode_step`: what rr_flex adds to a one-token step, which stays dense.

The attention function called with one query, sdpa's against rr_flex's, in turns; then whole steps of the model.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.environment import describe
from benchmarks.timing import synchronize
from rr_flex import enable
from rr_flex.models.forward import rr_flex_attention
from rr_flex.models.loading import load_causal_lm


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_step", description=__doc__)
    parser.add_argument("--length", type=int, default=2048, help="tokens in the cache")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, _ = load_causal_lm(device=device, dtype=dtype)
    row = {"length": options.length, "dtype": str(dtype), **calls(model, options.length), **steps(model, options)}
    print(json.dumps(row | describe(device, options.commit)))
    return 0


@torch.no_grad()
def calls(model, length: int, repeats: int = 2000) -> dict[str, float]:
    """Microseconds that one layer's call takes more on the host, with keys so short that the host is all there is."""
    config, device, dtype = model.config, model.device, model.dtype
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q = torch.randn(1, heads, 1, dim, device=device, dtype=dtype)
    k = torch.randn(1, kv_heads, 16, dim, device=device, dtype=dtype)
    module = model.model.layers[0].self_attn
    times: dict[str, list[float]] = {"sdpa": [], "rr_flex": []}
    with enable(model):
        for _ in range(repeats):
            for name, attend in (("sdpa", sdpa_attention_forward), ("rr_flex", rr_flex_attention)):
                start = time.perf_counter()
                attend(module, q, k, k, None, scaling=dim**-0.5, dropout=0.0)
                times[name].append(time.perf_counter() - start)
    medians = {name: 1e6 * statistics.median(found) for name, found in times.items()}
    return {"call_sdpa_us": medians["sdpa"], "call_rr_flex_us": medians["rr_flex"]}


@torch.no_grad()
def steps(model, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a whole step after `length` tokens, the two in turns; and the calls' difference as its share."""
    ids = torch.randint(1000, (1, options.length), device=model.device)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, logits_to_keep=1)
    times: dict[str, list[float]] = {"sdpa": [], "rr_flex": []}

    def one(name: str) -> None:
        synchronize(model.device)
        start = time.perf_counter()
        model(ids[:, :1], past_key_values=cache)
        synchronize(model.device)
        times[name].append(1000 * (time.perf_counter() - start))

    for step in range(options.steps):
        order = ("sdpa", "rr_flex") if step % 2 else ("rr_flex", "sdpa")
        for name in order:
            if name == "sdpa":
                one(name)
            else:
                with enable(model):
                    one(name)
    medians = {name: statistics.median(found[2:]) for name, found in times.items()}
    return {"step_sdpa_ms": medians["sdpa"], "step_rr_flex_ms": medians["rr_flex"]}


if __name__ == "__main__":
    sys.exit(main())
