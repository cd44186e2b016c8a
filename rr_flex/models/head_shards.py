"""Tensor parallelism: which of the query heads this process holds, so that it selects what one process would."""

from torch import nn


def heads_of(module: nn.Module, Hq: int) -> range | None:
    """Global indices of this process's `Hq` query heads; None where it holds all.

    NotImplementedError where heads are sharded and no mesh says which these are.
    """
    heads = getattr(getattr(module, "config", None), "num_attention_heads", Hq)
    if Hq >= heads:
        return None
    mesh = getattr(module.q_proj.weight, "device_mesh", None) if hasattr(module, "q_proj") else None
    if mesh is None:
        raise NotImplementedError(
            f"sharded query heads must come with a device mesh at q_proj, got {Hq} of {heads} heads and no mesh"
        )
    first = mesh.get_local_rank() * Hq
    return range(first, first + Hq)
