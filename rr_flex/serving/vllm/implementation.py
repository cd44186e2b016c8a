"""An attention that answers the sparse rows of a step, to go before one of vLLM's, which answers the others."""

import time
from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank

from rr_flex.serving.settings import Layer, settings_of_environment
from rr_flex.serving.step import attend_sparse
from rr_flex.serving.step_rows import ROW
from rr_flex.serving.vllm.side_cache import PooledKeys
from rr_flex.serving.vllm.support import check_configuration, why_dense


class SparseImpl:
    """Goes before an attention of vLLM's, whose pages `pools` reads. `layer_settings` None: it is the parent."""

    side: PooledKeys | None = None
    layer_settings: Layer | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        check_configuration(config)
        if self.alibi_slopes is not None:
            raise NotImplementedError("rr_flex does not serve ALiBi: unset RR_FLEX")
        self.counters = None
        settings = settings_of_environment()
        self.first_head = get_tensor_model_parallel_rank() * self.num_heads
        if settings is None or why_dense(self) is not None or not keeps_pooled_keys(config):
            return
        rules = settings.any_config()
        if rules.pool != "queries":
            self.side = PooledKeys(self.num_kv_heads, self.head_size, rules.strides[1], rules.order)

    def rewrite_pooled(self, slots: Tensor) -> None:
        """Pools anew what was written at these slots, which need not be of this step."""
        keys, _ = self.pools(self.attention_layer.kv_cache)
        self.side.pooled.rewrite(keys, slots)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        plan = getattr(attn_metadata, "rr_flex", None)
        scales = (output_scale, output_block_scale)
        if plan is None or self.layer_settings is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        if plan.dense_metadata is not None:
            part = output.new_empty(len(plan.dense_tokens), *output.shape[1:])
            tokens = plan.dense_tokens
            super().forward(
                layer, query[tokens], key[tokens], value[tokens], kv_cache, plan.dense_metadata, part, *scales
            )
            output[tokens] = part
        began = time.perf_counter()
        if plan.slots is not None:
            self.rewrite_pooled(plan.slots)
        keys, values = self.pools(kv_cache)
        pooled = self.side and self.side.pooled
        out, blocks = attend_sparse(plan.step, self.layer_settings, query, keys, values, pooled)
        output[plan.step.tokens] = out.reshape(len(out), *output.shape[1:])
        if self.counters is not None:
            self.counters.blocks += blocks
            if query.device.type == "cpu":
                self.counters.add("seconds", time.perf_counter() - began)
        return output


def keeps_pooled_keys(config: Any) -> bool:
    """Whether a side cache fits beside the model's KV cache: only where all layers attend fully.

    With sliding windows or a state space beside them vLLM gives layers groups of pages of one size, and copies a page
    in the middle of being written. Elsewhere keys are pooled anew.
    """
    if config.model_config.is_hybrid:
        return False
    text = config.model_config.hf_text_config
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return kinds == {"full_attention"} and window is None and config.cache_config.block_size % ROW == 0
