"""How this library compiles: one graph or an error, never the silent return to eager, which is slow."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TypeVar

import torch

from rr_flex.runtime.mends import mend_torch
from rr_flex.runtime.private import compiler_disabled, compiler_settings

# Where a length is a symbol, so is the offset at which a slice of it begins, and inductor, not knowing that it is a
# multiple of 16 bytes, refuses TMA and wide loads: a chunk's kernel took 2.3 times as long (torch 2.11 to 2.13). With
# this it looks at the pointers when it runs, and copies what is not aligned.
OPTIONS = {"assume_aligned_inputs": True}

# Where a guard's name begins: in a package whose code does not change while a program runs (a name without one is of
# the compiled function's own module), or in one of which nothing does.
SETTLED_CODE = re.compile(r"G\['(__import_(rr_flex|mask_mods|torch)(_dot_\w+)?|(?!__)\w+)'\]")
SETTLED = re.compile(r"G\['(__import_einops_dot_\w+|__builtins_dict\w*)'\]")
TABLES = ("ESTIMATORS", "BUDGETS")  # whose entries a user may replace

OFF = (
    "torch's compiler must be on, since flex_attention itself fails without it, got TORCH_COMPILE_DISABLE; "
    "torch.compiler.set_stance('force_eager') runs uncompiled"
)

Function = TypeVar("Function", bound=Callable)


def compile_whole(function: Function, *, dynamic: bool | None = None, specialize_int: bool = True) -> Function:
    """`function` under torch.compile(fullgraph=True), with room for many graphs.

    `dynamic` is torch.compile's: None compiles the first sizes as they are and all that follow as symbols. Ints are
    settings, compiled in: as symbols they would fail inside a mask_mod's kernel. Without `specialize_int` they are
    symbols, for a function that takes lengths as ints. With `dynamic=True` sizes that are equal in the first call by
    chance (as many blocks as heads) are no rule for later ones.
    """
    options = OPTIONS | {"guard_filter_fn": looked_at}
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, options=options)
    settings = compiler_settings(specialize_int, use_duck_shape=not dynamic)

    @wraps(function)
    def call(*args, **kwargs):
        if compiler_disabled():
            raise RuntimeError(OFF)
        mend_torch()
        with _holding(settings):
            return compiled(*args, **kwargs)

    return call


def looked_at(guards: Sequence) -> list[bool]:
    """Which of a graph's guards each call looks at: not the nine tenths by which functions, classes and modules of the
    library, and of what it stands on, are still those that were compiled. Data is looked at, and so is all that a mask
    of the user's own reaches."""
    return [not _is_settled(guard) for guard in guards]


def _is_settled(guard) -> bool:
    if not guard.is_global or any(table in guard.name for table in TABLES):
        return False
    code = guard.has_value and isinstance(guard.value, FunctionType | BuiltinFunctionType | ModuleType | type)
    found = re.search(r"G\['\w+'\]", guard.name)
    return found is not None and bool(SETTLED.match(found[0]) or (code and SETTLED_CODE.match(found[0])))


@contextmanager
def _holding(settings: tuple[tuple[object, str, object], ...]) -> Iterator[None]:
    """The compiler's settings at these values for a while, in this thread (they are context variables), as its own
    `patch` would; that takes a tenth of a millisecond of each call."""
    changed = [(*setting, before) for setting in settings if (before := getattr(*setting[:2])) != setting[2]]
    for where, name, value, _ in changed:
        setattr(where, name, value)
    try:
        yield
    finally:
        for where, name, _, before in changed:
            setattr(where, name, before)
