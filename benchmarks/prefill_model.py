"""`python -m benchmarks.prefill_model`: a whole model's prefill, dense and with rr_flex, on random or real weights.

Time to first token: a forward over the prompt with a new cache, logits of the last token, argmax. JSON lines out.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import stages
from benchmarks.environment import describe
from benchmarks.first_token import time_first_token
from benchmarks.model_shapes import MODELS, SHAPES, load, prompt
from benchmarks.timing import many_calls
from rr_flex import RRConfig, attention, enable, select_blocks
from rr_flex.cli import flags
from rr_flex.kernels.choose import Backend
from rr_flex.kernels.dense import dense_attention
from rr_flex.models.attention_by import attention_by

Row = dict[str, Any]

# name -> (implementation of transformers, backend of sdpa)
DENSE = {
    "sdpa": ("sdpa", None),
    "sdpa, cuDNN": ("sdpa", SDPBackend.CUDNN_ATTENTION),
    "flash_attention_2": ("flash_attention_2", None),
    "flash_attention_3": ("flash_attention_3", None),
    "flash_attention_4": ("flash_attention_4", None),
    "flex_attention": ("flex_attention", None),
}


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    config = RRConfig.resolve(None, {"min_length": 0} | options.config)
    if config.budget == "density":
        raise ValueError(
            "--config must leave the budget 'top_tau' or a threshold, whose level is sought, got 'density'"
        )
    if options.layers and "smollm2" in options.models:
        raise ValueError(f"--layers must come without the model smollm2, which has its own, got {options.layers}")
    if options.ahead:
        compile_ahead(options)
    options.out.mkdir(parents=True, exist_ok=True)
    about = describe(device, options.commit)
    start = time.perf_counter()
    with (options.out / "prefill-model.jsonl").open("a") as stream:

        def write(row: Row) -> None:
            print(json.dumps(row | about), file=stream, flush=True)
            print(f"{time.perf_counter() - start:5.0f} s  {line_of(row)}", file=sys.stderr, flush=True)

        for name in options.models:
            try:
                model, tokenizer = load(name, device, dtype, options.layers)
            except (FileNotFoundError, ModuleNotFoundError) as error:
                write({"model": name, "absent": str(error)})
                continue
            for length in lengths_of(name, options):
                if options.budget_seconds and time.perf_counter() - start > options.budget_seconds:
                    write({"model": name, "length": length, "absent": "the budget of seconds was spent"})
                    continue
                ids = prompt(tokenizer, length, model.config.vocab_size, device)
                for row in measure_length(model, ids, config, options, real=tokenizer is not None):
                    write({"model": name, "length": length, "chunk": options.chunk, "dtype": options.dtype, **row})
            del model
            release(device)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill_model", description=__doc__)
    parser.add_argument(
        "--out", type=flags.new_folder, required=True, help="folder of prefill-model.jsonl, which grows"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2", "llama-8b-shape"])
    parser.add_argument("--lengths", type=flags.whole(1), nargs="+", default=[8192, 32768, 65536, 131072])
    parser.add_argument(
        "--smollm2-lengths", type=flags.whole(1), nargs="+", default=[8192, 16384, 32768], help="8192 is its most"
    )
    parser.add_argument("--densities", type=flags.share, nargs="+", default=[0.25, 0.5], help="for random weights")
    parser.add_argument("--taus", type=flags.share, nargs="+", default=[0.95, 0.9], help="for real weights and top_tau")
    parser.add_argument("--config", type=json.loads, default={}, help='preset and fields of RRConfig: {"order": 2}')
    parser.add_argument("--dense", nargs="*", choices=sorted(DENSE), default=list(DENSE), help="all unless given")
    parser.add_argument("--backend", choices=get_args(Backend), default="auto")
    parser.add_argument("--layers", type=flags.whole(1), help="layers of a random model; its own number unless given")
    parser.add_argument("--chunk", type=flags.whole(1), help="tokens of a prompt at a time; all at once unless given")
    parser.add_argument("--repeats", type=flags.whole(1), default=3)
    parser.add_argument(
        "--row-seconds", type=flags.positive, default=20.0, help="no further repeat of a row after this"
    )
    parser.add_argument(
        "--ahead", action="store_true", help="first compile all lengths side by side, in one layer each"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=flags.DTYPES,
        default="bfloat16" if torch.cuda.is_available() else "float32",
    )
    parser.add_argument("--budget-seconds", type=flags.positive, help="start no length after this")
    parser.add_argument("--commit", help="named in the rows where there is no git history")
    return parser


def lengths_of(name: str, options: argparse.Namespace) -> list[int]:
    return options.smollm2_lengths if name.startswith("smollm2") else options.lengths


def compile_ahead(options: argparse.Namespace) -> None:
    """Fills the compiler's cache on disk: every model and length in a process of its own, with one layer."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for name in options.models:
            for length in lengths_of(name, options):
                shape = name if name in SHAPES else f"{name}-shape"
                command = [sys.executable, "-m", "benchmarks.prefill_model", "--out", folder, "--models", shape]
                command += ["--lengths", str(length), "--smollm2-lengths", str(length), "--densities", "0.5"]
                command += ["--layers", "1", "--repeats", "1", "--config", json.dumps(options.config)]
                command += ["--backend", options.backend, "--device", options.device, "--dtype", options.dtype]
                command += ["--dense", *(["flex_attention"] if "flex_attention" in options.dense else [])]
                running.append(subprocess.Popen(command))
        for process in running:
            process.wait()


def measure_length(model, ids: Tensor, config: RRConfig, options: argparse.Namespace, *, real: bool) -> Iterator[Row]:
    """A row for each dense implementation, then one for each density, tau or threshold. `real`: a trained model."""
    device = ids.device
    torch._dynamo.reset()
    best = None
    for name in options.dense:
        row = time_dense(model, ids, name, options)
        if "ms" in row and (best is None or row["ms"] < best["ms"]):
            best = row | {"attention": name}
        yield {"attention": name, **row}
    level = config.level_field
    goals = options.densities if not real else options.taus if level == "tau" else [config.threshold]
    found = look(model, ids, config, [] if real else goals)
    for goal in goals:
        release(device)
        wanted = {level: goal} if real else {"wanted_density": goal}
        chosen = config.with_settings({level: goal}) if real else config
        try:
            row = time_sparse(model, ids, chosen, found.profiles.get(goal), found, options)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            yield {"attention": "rr_flex", **wanted, "absent": f"{type(error).__name__}: {first_line(error)}"}
            continue
        if best is not None:
            row |= {"dense": best["attention"], "dense_ms": best["ms"], "speedup": best["ms"] / row["ms"]}
        yield {"attention": "rr_flex", "config": shown(config), **wanted, **row}


def time_dense(model, ids: Tensor, name: str, options: argparse.Namespace) -> Row:
    """Time to first token and the attention's part of it, or why the implementation is absent."""
    implementation, backend = DENSE[name]
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(implementation)
        with sdpa_kernel(backend) if backend is not None else nullcontext():
            return time_first_token(model, ids, implementation, **clock_of(options))
    except Exception as error:  # an implementation that this machine lacks says so in many ways
        return {"absent": f"{type(error).__name__}: {first_line(error)}"}
    finally:
        model.set_attn_implementation(before)
        release(ids.device)


def clock_of(options: argparse.Namespace) -> dict[str, Any]:
    return {"repeats": options.repeats, "seconds": options.row_seconds, "chunk": options.chunk}


class Look(NamedTuple):
    """What one dense pass showed."""

    profiles: dict[float, dict[int, RRConfig]]  # density -> layer -> settings that keep it
    q: Tensor  # [1, Hq, L, D] of the middle layer
    k: Tensor  # [1, Hkv, L, D]


def look(model, ids: Tensor, config: RRConfig, densities: list[float]) -> Look:
    """Each layer's tau or threshold for each density, and the middle layer's q and k, of one dense pass."""
    middle = model.config.num_hidden_layers // 2
    profiles: dict[float, dict[int, RRConfig]] = {density: {} for density in densities}
    held: dict[str, Tensor] = {}

    def attend(q, k, v, *, layer, scale, window):
        if layer == middle:
            held.update(q=q, k=k)
        if densities:
            mass = select_blocks(q, k, scale=scale, config=config).mass
            for density in densities:
                profiles[density][layer] = stages.config_for_density(mass, config, q.shape[2], density)
        return dense_attention(q, k, v, causal=True, scale=scale)

    with torch.no_grad(), attention_by(model, attend):
        model(ids, use_cache=False, logits_to_keep=1)
    return Look(profiles, **held)


def time_sparse(model, ids: Tensor, config: RRConfig, profile, found: Look, options: argparse.Namespace) -> Row:
    """As `time_dense`, with the estimate's part and the density that was kept."""
    settings = {"config": config} if profile is None else {"profile": profile}
    with enable(model, **settings, backend=options.backend) as on:
        ways = Counter(attention.calls)
        row = time_first_token(model, ids, "rr_flex", **clock_of(options))
        row["kernels"] = dict(attention.calls - ways)
        report = on.report()
    if report.sparse == 0 or sum(report.dense.values()):
        raise RuntimeError(f"every layer must have been sparse, got {report.as_dict()}")
    row |= {"density": report.density, "density_by_layer": [r.density for _, r in sorted(report.layers.items())]}
    layers = model.config.num_hidden_layers
    estimate = time_estimate(found.q, found.k, config if profile is None else profile[layers // 2], options.repeats)
    row["estimate_ms"] = estimate * layers
    row["attention_ms"] = row["attention_total_ms"] - row["estimate_ms"]
    return row


def time_estimate(q: Tensor, k: Tensor, config: RRConfig, repeats: int) -> float:
    """Milliseconds of one layer's estimate, selection and lists, as one graph."""
    with torch.no_grad():
        stages.selection(q, k, config)
        times = many_calls(lambda _: stages.selection(q, k, config), max(repeats, 5), 1, q.device)
    return statistics.median(times)


def shown(config: RRConfig) -> Row:
    names = ("order", "pool", "budget", "mandatory")
    sizes = {"block_size": list(config.block_sizes), "strides": list(config.strides)}
    return sizes | {name: getattr(config, name) for name in names}


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
