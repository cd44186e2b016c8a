"""Pictures of selections, models, masks and measurements, as matplotlib Figures. Needs matplotlib."""

from rr_flex.view.plots.block_maps import HeadMap, block_map_figure
from rr_flex.view.plots.curves import density_figure
from rr_flex.view.plots.mask_maps import dynamic_blocks_figure, mask_figure
from rr_flex.view.plots.model import model_figure
from rr_flex.view.plots.row_budgets import row_budget_figure, top_tau_figure

__all__ = [
    "HeadMap",
    "block_map_figure",
    "density_figure",
    "dynamic_blocks_figure",
    "mask_figure",
    "model_figure",
    "row_budget_figure",
    "top_tau_figure",
]
