"""RRAttention block-sparse prefill on PyTorch's FlexAttention."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rr_flex.attention import rr_attention
    from rr_flex.captured import CapturedPrefill
    from rr_flex.config import RRConfig
    from rr_flex.packed import rr_attention_packed
    from rr_flex.pipeline import create_rr_block_mask, select_blocks
    from rr_flex.result import Selection
    from rr_flex.state import PrefillState

__all__ = [
    "CapturedPrefill",
    "PrefillState",
    "RRConfig",
    "Selection",
    "create_rr_block_mask",
    "enable",
    "rr_attention",
    "rr_attention_packed",
    "select_blocks",
]

HOMES = {
    "CapturedPrefill": "captured",
    "PrefillState": "state",
    "RRConfig": "config",
    "Selection": "result",
    "create_rr_block_mask": "pipeline",
    "enable": "models",
    "rr_attention": "attention",
    "rr_attention_packed": "packed",
    "select_blocks": "pipeline",
}


def __getattr__(name: str) -> Any:
    """A public name, from its module, which is imported only now: `rr-flex --help` waits for no torch."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f"rr_flex.{HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
