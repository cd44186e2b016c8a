"""Over vLLM's FLASH_ATTN on CUDA, with pages whose tokens stand one behind the other: nothing is gathered."""

from torch import Tensor
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from rr_flex.serving.pages import Pool, pools_of_flash
from rr_flex.serving.step_rows import ROW
from rr_flex.serving.vllm.builder import SparseBuilder
from rr_flex.serving.vllm.implementation import SparseImpl


class SparseFlashBuilder(SparseBuilder, FlashAttentionMetadataBuilder):
    parent = FlashAttentionMetadataBuilder


class SparseFlashImpl(SparseImpl, FlashAttentionImpl):
    def pools(self, kv_cache: Tensor) -> tuple[Pool, Pool]:
        return pools_of_flash(kv_cache)


class SparseFlashBackend(FlashAttentionBackend):
    """`get_name()` stays vLLM's: its `Attention` looks it up in the registry."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBNHC,)

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return max(super().get_preferred_block_size(default_block_size), ROW)

    @staticmethod
    def get_impl_cls() -> type[SparseFlashImpl]:
        return SparseFlashImpl

    @staticmethod
    def get_builder_cls() -> type[SparseFlashBuilder]:
        return SparseFlashBuilder
