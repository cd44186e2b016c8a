"""Frame mask for video."""

from dataclasses import dataclass

from mask_mods.checks import check_count
from mask_mods.positions import PositionMask
from mask_mods.spans import Index, called


@dataclass(frozen=True, eq=False, repr=False)
class Frames(PositionMask):
    """See `frames`."""

    tokens_per_frame: int
    past: int | None

    def __post_init__(self):
        super().__post_init__()
        check_count("tokens_per_frame", self.tokens_per_frame, minimum=1)
        if self.past is not None:
            check_count("past", self.past, minimum=0)

    def spans(self, b, h, q_idx):
        frame = self.position(b, q_idx) // self.tokens_per_frame
        first = 0 if self.past is None else (frame - self.past) * self.tokens_per_frame
        return ((first, (frame + 1) * self.tokens_per_frame - 1),)

    def __repr__(self) -> str:
        return called("frames", self.tokens_per_frame, past=self.past, offset=self.offset)


def frames(tokens_per_frame: int, past: int | None = None, offset: Index | None = None) -> PositionMask:
    """Key j in frame g = ⌊j / tokens_per_frame⌋ is visible to a query in frame f when f − past ≤ g ≤ f.

    f = ⌊(i + offset) / tokens_per_frame⌋ (offset: see PositionMask): a query sees its own frame whole, and `past`
    frames before it, or all (None). Causal inside the frame is `both(frames(...), causal())`, rr_flex's default.
    """
    return Frames(tokens_per_frame, past, offset=offset)
