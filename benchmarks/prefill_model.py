"""`python -m benchmarks.prefill_model`: a whole model's prefill, dense and with rr_flex, on random or real weights.

Time to first token: a forward over the prompt with a new cache, logits of the last token, argmax. JSON lines out.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.environment import describe
from benchmarks.timing import many_calls, synchronize
from rr_flex import RRConfig, attention, enable, select_blocks
from rr_flex.backends import Backend
from rr_flex.compiling import compile_whole
from rr_flex.mandatory import mandatory_blocks
from rr_flex.models.attention import attention_by
from rr_flex.models.loading import load_causal_lm, tokenize
from rr_flex.pipeline import Selection, device_arguments, select
from rr_flex.selection import select_threshold, select_top_tau

Row = dict[str, Any]

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_8B |= {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 131072}
SHAPES = {"llama-8b-shape": LLAMA_8B, "tiny-shape": TINY}
# name -> (implementation of transformers, backend of sdpa)
DENSE = {
    "sdpa": ("sdpa", None),
    "sdpa, cuDNN": ("sdpa", SDPBackend.CUDNN_ATTENTION),
    "flash_attention_2": ("flash_attention_2", None),
    "flash_attention_3": ("flash_attention_3", None),
    "flash_attention_4": ("flash_attention_4", None),
    "flex_attention": ("flex_attention", None),
}
BISECTIONS = 12


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    config = RRConfig(**({"min_length": 0} | options.config))
    options.out.mkdir(parents=True, exist_ok=True)
    about = describe(device, options.commit)
    start = time.perf_counter()
    with (options.out / "prefill-model.jsonl").open("a") as stream:

        def write(row: Row) -> None:
            print(json.dumps(row | about), file=stream, flush=True)
            print(line_of(row), file=sys.stderr, flush=True)

        for name in options.models:
            lengths = options.smollm2_lengths if name == "smollm2" else options.lengths
            try:
                model, tokenizer = load(name, device, dtype)
            except (FileNotFoundError, ModuleNotFoundError) as error:
                write({"model": name, "absent": str(error)})
                continue
            for length in lengths:
                if options.budget_seconds and time.perf_counter() - start > options.budget_seconds:
                    write({"model": name, "length": length, "absent": "the budget of seconds was spent"})
                    continue
                ids = prompt(tokenizer, length, model.config.vocab_size, device)
                for row in measure_length(model, ids, config, options):
                    write({"model": name, "length": length, "dtype": options.dtype, **row})
            del model
            release(device)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill_model", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of prefill-model.jsonl, which grows")
    parser.add_argument("--models", nargs="+", choices=["smollm2", *SHAPES], default=["smollm2", "llama-8b-shape"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 65536, 131072])
    parser.add_argument("--smollm2-lengths", type=int, nargs="+", default=[8192, 16384, 32768], help="8192 is its most")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.25, 0.5], help="for random weights")
    parser.add_argument("--taus", type=float, nargs="+", default=[0.95, 0.9], help="for real weights")
    parser.add_argument("--config", type=json.loads, default={}, help='fields of RRConfig, as {"order": 2}')
    parser.add_argument("--dense", nargs="*", choices=sorted(DENSE), default=list(DENSE), help="all unless given")
    parser.add_argument("--backend", choices=get_args(Backend), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--budget-seconds", type=float, help="start no length after this")
    parser.add_argument("--commit", help="named in the rows where there is no git history")
    return parser


def load(name: str, device: torch.device, dtype: torch.dtype):
    """(model, tokenizer or None); random weights for a shape."""
    if name not in SHAPES:
        return load_causal_lm(device=device, dtype=dtype)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[name], rms_norm_eps=1e-5))
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval(), None


def prompt(tokenizer, length: int, vocabulary: int, device: torch.device) -> Tensor:
    """[1, length]: Python's own documentation, or random tokens where there is no tokenizer."""
    if tokenizer is None:
        ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    else:
        from pydoc_data.topics import topics

        ids = tokenize(tokenizer, "\n\n".join(topics[name] for name in sorted(topics)), length)
    return ids.to(device)


def measure_length(model, ids: Tensor, config: RRConfig, options: argparse.Namespace) -> Iterator[Row]:
    """A row for each dense implementation, then one for each density or tau."""
    device = ids.device
    torch._dynamo.reset()
    best = None
    for name in options.dense:
        row = time_dense(model, ids, name, options.repeats)
        if "ms" in row and (best is None or row["ms"] < best["ms"]):
            best = row
        yield {"attention": name, **row}
    real = model.config.vocab_size not in {shape["vocab_size"] for shape in SHAPES.values()}
    for goal in options.taus if real else options.densities:
        release(device)
        profile = None if real else profile_for_density(model, ids, config, goal)
        wanted = {"tau": goal} if real else {"wanted_density": goal}
        try:
            chosen = config.with_settings(wanted) if real else config
            row = time_sparse(model, ids, chosen, profile, options)
        except torch.OutOfMemoryError as error:
            yield {"attention": "rr_flex", **wanted, "absent": first_line(error)}
            continue
        if best is not None:
            row |= {"dense_ms": best["ms"], "speedup": best["ms"] / row["ms"]}
        yield {"attention": "rr_flex", "config": shown(config), **wanted, **row}


def time_dense(model, ids: Tensor, name: str, repeats: int) -> Row:
    """Time to first token and the attention's part of it, or why the implementation is absent."""
    implementation, backend = DENSE[name]
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(implementation)
        with sdpa_kernel(backend) if backend is not None else nullcontext():
            return time_whole(model, ids, repeats, implementation)
    except Exception as error:  # an implementation that this machine lacks says so in many ways
        return {"absent": f"{type(error).__name__}: {first_line(error)}"}
    finally:
        model.set_attn_implementation(before)
        release(ids.device)


def time_sparse(model, ids: Tensor, config: RRConfig, profile, options: argparse.Namespace) -> Row:
    """As `time_dense`, with the estimate's part and the density that was kept."""
    with enable(model, config=config, profile=profile, backend=options.backend) as on:
        ways = Counter(attention.calls)
        row = time_whole(model, ids, options.repeats, "rr_flex")
        row["kernels"] = dict(attention.calls - ways)
        report = on.report()
        if report.sparse == 0 or sum(report.dense.values()):
            raise RuntimeError(f"every layer must have been sparse, got {report.as_dict()}")
        row |= {"density": report.density, "density_by_layer": [r.density for _, r in sorted(report.layers.items())]}
        estimate = time_estimate(model, ids, config, profile, options.repeats)
    layers = model.config.num_hidden_layers
    row["estimate_ms"] = estimate * layers
    row["attention_ms"] = row["attention_total_ms"] - row["estimate_ms"]
    return row


def time_whole(model, ids: Tensor, repeats: int, implementation: str) -> Row:
    """Median of whole prefills; then one more with a clock around every layer's attention."""
    device = ids.device
    warm = time.perf_counter()
    first_token(model, ids)
    synchronize(device)
    warm = time.perf_counter() - warm
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = many_calls(lambda _: first_token(model, ids), repeats, 1, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    with clocked(implementation, device) as read:
        first_token(model, ids)
        in_attention = read()
    median = statistics.median(times)
    return {
        "ms": median,
        "all_ms": times,
        "attention_total_ms": in_attention,
        "rest_ms": median - in_attention,
        "first_call_s": warm,
        "peak_bytes": peak,
    }


@torch.no_grad()
def first_token(model, ids: Tensor) -> Tensor:
    """Prefill with a new cache and logits for the last token only."""
    return model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)


@contextmanager
def clocked(implementation: str, device: torch.device) -> Iterator[Callable[[], float]]:
    """A clock around each call of an attention function of transformers; what it yields reads their sum in ms."""
    plain = ALL_ATTENTION_FUNCTIONS[implementation]
    spans: list[tuple] = []

    def clocked_attention(*args, **kwargs):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out = plain(*args, **kwargs)
            stop.record()
            spans.append((start, stop))
        else:
            start = time.perf_counter()
            out = plain(*args, **kwargs)
            spans.append((start, time.perf_counter()))
        return out

    def read() -> float:
        synchronize(device)
        if device.type == "cuda":
            return sum(start.elapsed_time(stop) for start, stop in spans)
        return 1000 * sum(stop - start for start, stop in spans)

    AttentionInterface.register(implementation, clocked_attention)
    try:
        yield read
    finally:
        AttentionInterface.register(implementation, plain)


def time_estimate(model, ids: Tensor, config: RRConfig, profile, repeats: int) -> float:
    """Milliseconds of one layer's estimate, selection and lists, as one graph, on the middle layer's q and k."""
    middle = model.config.num_hidden_layers // 2
    held: dict[str, Any] = {}

    def attend(q, k, v, *, layer, scale, window):
        if layer == middle:
            held.update(q=q, k=k, scale=scale)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    with torch.no_grad(), attention_by(model, attend):
        model(ids, use_cache=False, logits_to_keep=1)
    q, k, scale = held["q"], held["k"], held["scale"]
    chosen = config if profile is None else profile[middle]
    arguments = device_arguments(q, k, chosen, None, 0)
    with torch.no_grad():
        _block_lists(q, k, *arguments, chosen, scale)
        times = many_calls(lambda _: _block_lists(q, k, *arguments, chosen, scale), max(repeats, 5), 1, ids.device)
    return statistics.median(times)


@compile_whole
def _block_lists(q, k, level, q_offset, head_offset, config, scale):
    lists = select(q, k, level, q_offset, head_offset, config, None, None, scale).build_block_mask(look_up=False)
    return lists.kv_num_blocks, lists.kv_indices, lists.full_kv_num_blocks, lists.full_kv_indices


def profile_for_density(model, ids: Tensor, config: RRConfig, density: float) -> dict[int, RRConfig]:
    """Each layer's tau or threshold that keeps `density` of its blocks, found on one dense pass."""
    profile: dict[int, RRConfig] = {}
    name = "tau" if config.budget == "top_tau" else "threshold"

    def attend(q, k, v, *, layer, scale, window):
        level = level_for_density(select_blocks(q, k, scale=scale, config=config), config, density)
        profile[layer] = config.with_settings({name: level})
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    with torch.no_grad(), attention_by(model, attend):
        model(ids, use_cache=False, logits_to_keep=1)
    return profile


def level_for_density(selection: Selection, config: RRConfig, density: float) -> float:
    """The level by bisection on the selection's own mass; the mandatory blocks' density is the least."""
    Lq, Lk = selection.seq_lengths
    mandatory = mandatory_blocks(selection.visible, config, Lq=Lq, q_offset=Lk - Lq)
    total = selection.visible.expand_as(selection.kept).sum()
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        level = (low + high) / 2
        if config.budget == "top_tau":
            count = config.mandatory == "count"
            kept = select_top_tau(selection.mass, level, selection.visible, mandatory, count_mandatory=count)
            too_many = bool(kept.sum() > density * total)
        else:
            # Thresholds are small: bisect their fourth root.
            kept = select_threshold(selection.mass, level**4, selection.visible, mandatory)
            too_many = not bool(kept.sum() > density * total)
        low, high = (low, level) if too_many else (level, high)
    return high if config.budget == "top_tau" else low**4


def shown(config: RRConfig) -> Row:
    return {"order": config.order, "block_size": list(config.block_sizes), "strides": list(config.strides)} | {
        "budget": config.budget,
        "mandatory": config.mandatory,
    }


def line_of(row: Row) -> str:
    where = f"{row['model']} {row.get('length', '')} {row.get('attention', '')}"
    if "absent" in row:
        return f"{where}: {row['absent']}"
    parts = f"attention {row['attention_total_ms']:.1f}, rest {row['rest_ms']:.1f}"
    if "estimate_ms" in row:
        parts += f", of attention the estimate {row['estimate_ms']:.1f}; density {row['density']:.3f}"
    return f"{where}: {row['ms']:.1f} ms to the first token ({parts}) {row.get('speedup', 1):.2f}×"


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
