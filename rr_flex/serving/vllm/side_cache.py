"""Pooled keys as a layer of vLLM's own KV cache: in its memory budget, and copied wherever it copies pages."""

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder, MultipleOf
from vllm.v1.kv_cache_interface import FullAttentionSpec

from rr_flex.serving.pages import PooledPages
from rr_flex.serving.step_rows import ROW

FIRST_INDEX = 100_000  # vLLM reads a layer's number from its name; no model has as many


class PooledKeys(AttentionLayerBase):
    """A side cache [pages, Hkv, P / stride, D · order] beside one attention layer's."""

    def __init__(self, Hkv: int, D: int, stride: int, order: int) -> None:
        self.Hkv, self.D, self.stride, self.order = Hkv, D, stride, order
        self.kv_cache = torch.tensor([])
        self.pooled: PooledPages | None = None
        layers = get_current_vllm_config().compilation_config.static_forward_context
        taken = sum(isinstance(layer, PooledKeys) for layer in layers.values())
        self.name = f"rr_flex.pooled_keys.{FIRST_INDEX + taken}"
        layers[self.name] = self

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        self.kv_cache = kv_cache
        self.pooled = PooledPages(features=kv_cache, stride=self.stride, order=self.order) if kv_cache.numel() else None

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec:
        dtype = vllm_config.model_config.dtype
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.Hkv,
            head_size=self.D,
            dtype=dtype,
            tokens_per_state=self.stride,
            state_content_bytes=self.order * self.D * dtype.itemsize,
        )

    def get_attn_backend(self) -> type[AttentionBackend]:
        return PooledKeysBackend


class PooledKeysBackend(AttentionBackend):
    """Nothing attends to it: it has pages, and no metadata."""

    @staticmethod
    def get_name() -> str:
        return "RR_FLEX_POOLED_KEYS"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("pooled keys have no attention of their own")

    @staticmethod
    def get_builder_cls() -> type["NoMetadata"]:
        return NoMetadata

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(ROW)]


class NoMetadata(AttentionMetadataBuilder):
    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> None:
        return None
