"""Tensor parallelism: which of the query heads this process holds, so that it selects what one process would."""

from torch import nn

from rr_flex.config import RRConfig


def head_offset_of(module: nn.Module, Hq: int, config: RRConfig) -> tuple[int, RRConfig]:
    """(global index of the first of this process's `Hq` query heads, the settings for these heads).

    NotImplementedError where heads are sharded and no mesh says which these are.
    """
    heads = getattr(getattr(module, "config", None), "num_attention_heads", Hq)
    if Hq >= heads:
        return 0, config
    mesh = getattr(module.q_proj.weight, "device_mesh", None) if hasattr(module, "q_proj") else None
    if mesh is None:
        raise NotImplementedError(
            f"sharded query heads must come with a device mesh at q_proj, got {Hq} of {heads} heads and no mesh"
        )
    first = mesh.get_local_rank() * Hq
    name = config.level_field
    level = getattr(config, name)
    if not isinstance(level, float | int):
        config = config.with_settings({name: level[first : first + Hq]})
    return first, config
