"""RRAttention block-sparse prefill on PyTorch's FlexAttention."""

import importlib
from typing import Any

from rr_flex import estimate, selection  # noqa: F401  (their rules enter the tables that RRConfig reads)
from rr_flex.attention import rr_attention
from rr_flex.config import RRConfig
from rr_flex.pipeline import create_rr_block_mask, select_blocks
from rr_flex.result import Selection
from rr_flex.state import PrefillState

__all__ = ["PrefillState", "RRConfig", "Selection", "create_rr_block_mask", "enable", "rr_attention", "select_blocks"]


def __getattr__(name: str) -> Any:
    """`rr_flex.enable`, from rr_flex.models, which imports transformers only now."""
    if name == "enable":
        return importlib.import_module("rr_flex.models").enable
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
