"""Stands for backends that would attend densely while RR_FLEX is set: to look one up says why there is none.

An ImportError is what vLLM takes for "not available here": it goes on to the backend that the plugin serves, and where
there is none, or another was asked for by name, it stops with this line.
"""

REASONS = {
    "MLA": "rr_flex does not serve models with latent attention (MLA): unset RR_FLEX",
    "OtherBackend": "rr_flex serves FLASH_ATTN on CUDA: start with --attention-backend FLASH_ATTN, or unset RR_FLEX",
}


def __getattr__(name: str):
    if name in REASONS:
        raise ImportError(REASONS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
