"""`%load_ext rr_flex.notebook`: `rr_flex.view.notebook` under its shorter, documented name."""

from rr_flex.view.notebook import explore, load_ipython_extension

__all__ = ["explore", "load_ipython_extension"]
