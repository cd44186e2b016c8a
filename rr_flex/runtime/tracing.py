"""Whether this thread's operations are recorded or run.

`torch.compiler.is_compiling()` does not say it: that is one flag for the whole process (torch 2.13), true while any
other thread compiles.
"""

import torch

from rr_flex.runtime import private


def traced() -> bool:
    """Whether dynamo or an exporting tracer records this thread's operations into a graph of the caller's."""
    return torch.compiler.is_dynamo_compiling() or private.proxy_mode() is not None


def eager_may_run() -> bool:
    """Whether what torch.compile wraps may run uncompiled: dynamo is off, or `torch.compiler.set_stance` says so."""
    return private.stance() not in ("default", "fail_on_recompile")
