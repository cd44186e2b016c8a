"""`rr_flex.view.plots` under its shorter, documented name."""

from rr_flex.view.plots import *  # noqa: F403
from rr_flex.view.plots import __all__ as __all__
