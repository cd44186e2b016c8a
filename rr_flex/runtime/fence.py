"""An operator around attention in a caller's graph on a CPU: what stands before and after it stays out of its kernel.

torch's CPU kernel of FlexAttention (2.11 to 2.14) takes no operation of its neighbours into itself, and stops with an
error where the compiler tries that. A copy of the tensor is the price, in a caller's torch.compile only.
"""

import torch
from torch import Tensor


@torch.library.custom_op("rr_flex::fence", mutates_args=())
def fence(x: Tensor) -> Tensor:
    """x itself, computed and contiguous."""
    return x.clone(memory_format=torch.contiguous_format)


@fence.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
