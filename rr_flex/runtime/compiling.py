"""How this library compiles: one graph or an error, never the silent return to eager, which is slow."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TypeVar

import torch

from rr_flex.runtime.flex_names import mend_flex_names
from rr_flex.runtime.private import compiler_settings

# Where a length is a symbol, so is the offset at which a slice of it begins, and inductor, not knowing that it is a
# multiple of 16 bytes, refuses TMA and wide loads: a chunk's kernel took 2.3 times as long (torch 2.11 to 2.13). With
# this it looks at the pointers when it runs, and copies what is not aligned.
OPTIONS = {"assume_aligned_inputs": True}

Function = TypeVar("Function", bound=Callable)


def compile_whole(function: Function, *, dynamic: bool | None = None, specialize_int: bool = True) -> Function:
    """`function` under torch.compile(fullgraph=True), with room for many graphs.

    `dynamic` is torch.compile's: None compiles the first sizes as they are and all that follow as symbols. Ints are
    settings, compiled in: as symbols they would fail inside a mask_mod's kernel. Without `specialize_int` they are
    symbols, for a function that takes lengths as ints. With `dynamic=True` sizes that are equal in the first call by
    chance (as many blocks as heads) are no rule for later ones.
    """
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, options=OPTIONS)
    settings = compiler_settings(specialize_int, use_duck_shape=not dynamic)

    @wraps(function)
    def call(*args, **kwargs):
        mend_flex_names()
        with _holding(settings):
            return compiled(*args, **kwargs)

    return call


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
