"""Every part of torch that is not public and that this library needs, in one place, each with what breaks without it.

Tested with torch 2.11, 2.13 and 2.14. Where a release moves a part, the error says so and names these versions.
"""

from types import SimpleNamespace

import torch

TESTED = "2.11, 2.13 and 2.14"


def inductor_parts() -> SimpleNamespace:
    """What tells the compiler that a kept block is kept (`is_kept`). Without it kernels would look blocks up."""
    with _named(
        "torch._inductor.lowering.register_lowering, torch._inductor.ir.Pointwise, torch._inductor.virtualized.ops"
    ):
        from torch._inductor.ir import Pointwise
        from torch._inductor.lowering import register_lowering
        from torch._inductor.virtualized import ops
    return SimpleNamespace(Pointwise=Pointwise, register_lowering=register_lowering, ops=ops)


def compiler_settings(specialize_int: bool, use_duck_shape: bool) -> tuple[tuple[object, str, object], ...]:
    """(module, name, value) of the compiler's settings that our graphs need.

    Without the limit a ninth graph of a function is an error; without the others lengths become constants of a graph.
    """
    with _named("torch._dynamo.config.recompile_limit, .specialize_int, torch.fx.experimental._config.use_duck_shape"):
        import torch.fx.experimental._config as shapes
        from torch._dynamo import config as dynamo

        settings = (
            (dynamo, "recompile_limit", RECOMPILE_LIMIT),
            (dynamo, "specialize_int", specialize_int),
            (shapes, "use_duck_shape", use_duck_shape),
        )
        for module, name, _ in settings:
            getattr(module, name)
    return settings


# Every combination of settings, dtypes and mask code is a graph of its own; past the limit fullgraph raises.
RECOMPILE_LIMIT = 256


def cpu_flex_template() -> type | None:
    """The CPU kernel's template, whose names runtime/mends.py mends; None in a torch that has it no longer.

    Without it masks that capture tensors may fail to compile on a CPU: tests/test_mask_sequences.py tells.
    """
    try:
        import torch._inductor.lowering  # noqa: F401  before the template, which alone is a circle
        from torch._inductor.codegen.cpp_flex_attention_template import CppFlexAttentionTemplate
    except ImportError:
        return None
    return CppFlexAttentionTemplate


def wrapped_index() -> type | None:
    """What an index into a part of a concatenation is wrapped in, which runtime/mends.py gives its value."""
    try:
        from torch.utils._sympy.functions import Identity
    except ImportError:
        return None
    return Identity


def triton_symbols() -> SimpleNamespace | None:
    """What tells the shape of an index in a Triton kernel, which runtime/mends.py mends for scans."""
    try:
        from torch._inductor.codegen.triton import TritonSymbols
        from torch._inductor.virtualized import V
        from torch.utils._sympy.symbol import SymT, make_symbol, prefix_str, symbol_is_type
    except ImportError:
        return None
    scalar = make_symbol(SymT.SIZE, 0)
    return SimpleNamespace(symbols=TritonSymbols, graph=V, types=prefix_str, is_type=symbol_is_type, scalar=scalar)


def autotuner() -> type | None:
    """What times a Triton kernel's forms at its first launch, which runtime/mends.py lets one thread do at a time."""
    try:
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    except ImportError:
        return None
    return CachingAutotuner


def cxx_names() -> tuple[str, ...]:
    """The C++ compilers that the CPU's kernels are compiled with, the first found; the usual ones without it."""
    try:
        from torch._inductor import config

        return tuple(name for name in config.cpp.cxx if name)
    except (ImportError, AttributeError):
        return "g++", "clang++"


def graphs_compiled() -> int:
    """How many graphs this process has compiled. Without it a server's warm-up could not tell what it did."""
    with _named("torch._dynamo.utils.counters"):
        from torch._dynamo.utils import counters
    return counters["stats"]["unique_graphs"]


def is_inside_functorch(x: torch.Tensor) -> bool:
    """Whether torch.func or vmap maps x. Without it: their own errors, which name no argument of ours."""
    asked = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None)
    return asked is not None and asked(x)


def proxy_mode() -> object | None:
    """The tracer that records this thread's operations, if one does: non-strict export. Without it: see `traced`."""
    return _get_proxy_mode()


def compiler_disabled() -> bool:
    """Whether TORCH_COMPILE_DISABLE or its setting is on. Without it: fifty thousand characters of dynamo, and every
    later call under torch.compiler.disable fails."""
    return getattr(getattr(torch._dynamo, "config", None), "disable", False)


def stance() -> str:
    """`torch.compiler.set_stance`'s word. Without it: FLASH could run uncompiled, which it cannot."""
    found = getattr(torch._dynamo.eval_frame, "_stance", None)
    return "force_eager" if compiler_disabled() else getattr(found, "stance", "default")


def dispatch_mode() -> object | None:
    """The innermost TorchDispatchMode of this thread (FlopCounterMode, FakeTensorMode ...). Without it: see checks."""
    return _get_current_mode()


class _named:
    """Turns what a moved part raises into an ImportError that names the parts and the tested versions."""

    def __init__(self, parts: str) -> None:
        self.parts = parts

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, ImportError | AttributeError):
            raise ImportError(
                f"torch must have {self.parts} where rr_flex looks for them (tested with torch {TESTED}), got torch "
                f"{torch.__version__}: {error}"
            ) from error


with _named("torch.fx.experimental.proxy_tensor.get_proxy_mode"):
    from torch.fx.experimental.proxy_tensor import get_proxy_mode as _get_proxy_mode
with _named("torch.utils._python_dispatch._get_current_dispatch_mode"):
    from torch.utils._python_dispatch import _get_current_dispatch_mode as _get_current_mode
