"""How good a selection is: true mass, recall, density, output error, and what a language model makes of it."""

from rr_flex.evaluation.language_model import LanguageModelComparison, compare_logits
from rr_flex.evaluation.measures import density, output_error, recalled_mass
from rr_flex.evaluation.true_mass import true_block_mass

__all__ = [
    "LanguageModelComparison",
    "compare_logits",
    "density",
    "output_error",
    "recalled_mass",
    "true_block_mass",
]
