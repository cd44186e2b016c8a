"""How this library compiles: one graph or an error, never the silent return to eager, which is dense."""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch

# Every combination of settings, dtypes and mask code is a graph of its own; past the limit fullgraph raises.
RECOMPILE_LIMIT = 256

Function = TypeVar("Function", bound=Callable)


def compile_whole(function: Function) -> Function:
    """`function` under torch.compile(fullgraph=True), with room for many graphs."""
    compiled = torch.compile(function, fullgraph=True)

    @wraps(function)
    def call(*args, **kwargs):
        # An int that changes (a stride, a window) is a setting: as a symbol it would fail inside a mask_mod's kernel.
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, specialize_int=True):
            return compiled(*args, **kwargs)

    return call
