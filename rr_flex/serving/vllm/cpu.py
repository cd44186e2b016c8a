"""Over vLLM's attention on a CPU, whose pages hold keys across: they are gathered for sparse rows."""

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from rr_flex.serving.pages import Pool, pools_of_cpu
from rr_flex.serving.vllm.builder import SparseBuilder
from rr_flex.serving.vllm.implementation import SparseImpl


class SparseCPUBuilder(SparseBuilder, CPUAttentionMetadataBuilder):
    parent = CPUAttentionMetadataBuilder


class SparseCPUImpl(SparseImpl, CPUAttentionBackendImpl):
    def pools(self, kv_cache: Tensor) -> tuple[Pool, Pool]:
        return pools_of_cpu(kv_cache)


class SparseCPUBackend(CPUAttentionBackend):
    """`get_name()` stays vLLM's: its `Attention` looks it up in the registry."""

    @staticmethod
    def get_impl_cls() -> type[SparseCPUImpl]:
        return SparseCPUImpl

    @staticmethod
    def get_builder_cls() -> type[SparseCPUBuilder]:
        return SparseCPUBuilder
