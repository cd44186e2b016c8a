"""A mask as a run of its heads sees it."""

from mask_mods.spans import Index, MaskMod, SpanMask


def from_head(mask_mod: MaskMod, first: Index) -> MaskMod:
    """`mask_mod` where head 0 stands for head `first`: for a call that takes only some of the heads.

    A SpanMask if `mask_mod` is one. `first` is an int or a 0-dim integer tensor; a new tensor causes no recompile.
    """
    if not isinstance(mask_mod, SpanMask):

        def shifted_mask(b, h, q_idx, kv_idx):
            return mask_mod(b, h + first, q_idx, kv_idx)

        return shifted_mask

    def spans(b, h, q_idx):
        return mask_mod.spans(b, h + first, q_idx)

    def keys(b, h, kv_idx):
        return mask_mod.keys(b, h + first, kv_idx)

    return SpanMask(spans, None if mask_mod.keys is None else keys, label=lambda: f"from_head({mask_mod!r}, {first})")
