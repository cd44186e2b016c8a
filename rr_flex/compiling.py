"""How this library compiles: one graph or an error, never the silent return to eager, which is dense."""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
import torch.fx.experimental._config

# Every combination of settings, dtypes and mask code is a graph of its own; past the limit fullgraph raises.
RECOMPILE_LIMIT = 256

Function = TypeVar("Function", bound=Callable)


def compile_whole(function: Function, *, dynamic: bool | None = None, specialize_int: bool = True) -> Function:
    """`function` under torch.compile(fullgraph=True), with room for many graphs.

    `dynamic` is torch.compile's: None compiles the first sizes as they are and all that follow as symbols. Ints are
    settings, compiled in: as symbols they would fail inside a mask_mod's kernel. Without `specialize_int` they are
    symbols, for a function that takes lengths as ints. With `dynamic=True` sizes that are equal in the first call by
    chance (as many blocks as heads) are no rule for later ones.
    """
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)

    @wraps(function)
    def call(*args, **kwargs):
        with (
            torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, specialize_int=specialize_int),
            torch.fx.experimental._config.patch(use_duck_shape=not dynamic),
        ):
            return compiled(*args, **kwargs)

    return call
