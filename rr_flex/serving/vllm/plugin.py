"""What vLLM calls once in each of its processes. Without RR_FLEX in the environment it does nothing, nor imports.

vLLM finds this function by the entry point in the distribution's metadata. It overrides members of vLLM's own registry
of attention backends: a new name would be unknown to its `Attention` layer, and on a CPU the choice is ignored anyway.
"""

import os


def register() -> None:
    """Puts the sparse backends in place. ValueError or NotImplementedError where RR_FLEX or vLLM's version is wrong."""
    if not os.environ.get("RR_FLEX", "").strip():
        return
    from rr_flex.serving.settings import settings_of_environment
    from rr_flex.serving.vllm.counters import share_counters
    from rr_flex.serving.vllm.support import check_version

    check_version()
    settings_of_environment()
    share_counters()
    _override_backends()


def _override_backends() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    ours = {
        "CPU_ATTN": "rr_flex.serving.vllm.cpu.SparseCPUBackend",
        "FLASH_ATTN": "rr_flex.serving.vllm.flash_attn.SparseFlashBackend",
    }
    for name, member in AttentionBackendEnum.__members__.items():
        if name in ours:
            register_backend(member, ours[name])
        elif "MLA" in name:
            register_backend(member, "rr_flex.serving.vllm.refused.MLA")
        elif name in ("FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION"):
            register_backend(member, "rr_flex.serving.vllm.refused.OtherBackend")
