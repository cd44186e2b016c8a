"""An operator of ours inside every mask: is this pair's block kept? It makes a BlockMask mean the same to everybody.

FlexAttention's kernel visits the listed blocks. Whatever runs a graph otherwise (eager mode, another backend of
torch.compile, an exported program) ignores the lists and goes by the mask_mod alone. So each mask looks its kept blocks
up, and the compiler, whose kernel has no need of it, is told that the answer is always yes: there it costs nothing.

Depends on torch._inductor.lowering.register_lowering and .Pointwise; if they move, the first import of a call says so.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rr_flex.runtime.private import inductor_parts

_LIBRARY = torch.library.Library("rr_flex", "DEF")
_LIBRARY.define("is_kept(Tensor kept, Tensor b, Tensor h, Tensor row, Tensor column) -> Tensor")
_is_kept = torch.ops.rr_flex.is_kept.default


def is_kept(
    kept: Bool[Tensor, "B H nQ nK"],
    b: Int[Tensor, "..."],
    h: Int[Tensor, "..."],
    row: Int[Tensor, "..."],
    column: Int[Tensor, "..."],
) -> Bool[Tensor, "..."]:
    """kept[b, h, row, column], elementwise; in a kernel that visits only kept blocks, True."""
    return _is_kept(kept, b, h, row, column)


def _look_up(kept, b, h, row, column):
    return kept[b, h, row, column]


def _fake(kept, b, h, row, column):
    shape = torch.broadcast_shapes(b.shape, h.shape, row.shape, column.shape)
    return kept.new_empty(shape)


def _batched(info, in_dims, kept, *index):
    """Elementwise in the indices: mapped axes go to the front, before those that the others have."""
    own = [x.ndim - (dim is not None) for x, dim in zip(index, in_dims[1:], strict=True)]
    moved = [
        x if dim is None else _with_axes(x.movedim(dim, 0), max(own) - ndim)
        for x, dim, ndim in zip(index, in_dims[1:], own, strict=True)
    ]
    return _is_kept(kept, *moved), 0


def _with_axes(x: Tensor, count: int) -> Tensor:
    """x with `count` axes of one behind its first."""
    return x.reshape(x.shape[0], *[1] * count, *x.shape[1:])


_LIBRARY.impl("is_kept", _look_up, "CompositeExplicitAutograd")
torch.library.register_fake("rr_flex::is_kept", _fake, lib=_LIBRARY)
torch.library.register_vmap("rr_flex::is_kept", _batched, lib=_LIBRARY)

_parts = inductor_parts()


@_parts.register_lowering(_is_kept, type_promotion_kind=None)
def _always(kept, b, h, row, column):
    return _parts.Pointwise.create(
        device=b.get_device(),
        dtype=torch.bool,
        inner_fn=lambda index: _parts.ops.constant(True, torch.bool),
        ranges=list(b.get_size()),
    )
