"""Three numbers a selection is judged by. Each gives one value per head, so that heads can be told apart."""

from jaxtyping import Bool, Float
from torch import Tensor


def recalled_mass(true_mass: Float[Tensor, "B Hq nQ nK"], kept: Bool[Tensor, "B Hq nQ nK"]) -> Float[Tensor, "B Hq"]:
    """Share of the true attention mass that lies in the kept blocks."""
    total = true_mass.sum((-2, -1))
    return (true_mass * kept).sum((-2, -1)) / total


def density(kept: Bool[Tensor, "B Hq nQ nK"], visible: Bool[Tensor, "*#B nQ nK"]) -> Float[Tensor, "B Hq"]:
    """Kept blocks as a share of the blocks that the mask lets through; 0 where it lets none through."""
    return kept.sum((-2, -1)) / visible.expand_as(kept).sum((-2, -1)).clamp(min=1)


def output_error(out: Float[Tensor, "B Hq L D"], reference: Float[Tensor, "B Hq L D"]) -> Float[Tensor, "B Hq"]:
    """‖out - reference‖ / ‖reference‖ over a head's whole output, in float32."""
    difference = (out.float() - reference.float()).flatten(2).norm(dim=-1)
    return difference / reference.float().flatten(2).norm(dim=-1)
