"""How this library compiles: one graph or an error, never the silent return to eager, which is slow."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TypeVar

import torch

from rr_flex.runtime.private import compiler_settings

Function = TypeVar("Function", bound=Callable)


def compile_whole(function: Function, *, dynamic: bool | None = None, specialize_int: bool = True) -> Function:
    """`function` under torch.compile(fullgraph=True), with room for many graphs.

    `dynamic` is torch.compile's: None compiles the first sizes as they are and all that follow as symbols. Ints are
    settings, compiled in: as symbols they would fail inside a mask_mod's kernel. Without `specialize_int` they are
    symbols, for a function that takes lengths as ints. With `dynamic=True` sizes that are equal in the first call by
    chance (as many blocks as heads) are no rule for later ones.
    """
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    settings = compiler_settings(specialize_int, use_duck_shape=not dynamic)

    @wraps(function)
    def call(*args, **kwargs):
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
