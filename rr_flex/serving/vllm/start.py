"""What happens once at start: each layer gets its settings, the counters are opened, and the graphs are compiled."""

import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from vllm import envs
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from rr_flex.kernels.deciding import shortest_sparse
from rr_flex.serving.settings import Layer, ServingSettings, described, settings_of_environment
from rr_flex.serving.vllm.counters import FOLDER, Counters
from rr_flex.serving.vllm.support import check_isa, check_page, check_pool, installed_version, why_dense
from rr_flex.serving.warmup import compile_graphs

logger = init_logger("vllm.rr_flex")
_counters: dict[str, Counters] = {}  # of this process


@dataclass
class Started:
    """What a builder knows of its layers."""

    page: int  # tokens
    layers: list[Any] = field(default_factory=list)  # attention of the sparse ones
    min_length: int = 0  # keys
    pooled_stride: int | None = None  # keys a pooled one, where these are kept by page
    lengths_are_exact: bool = True  # of decodes, on the host
    counters: Counters | None = None  # of the first rank only


def start(builder: Any, layer_names: list[str], vllm_config: Any) -> Started:
    """Settings of each layer, and one line that says what is on. Raises where the server cannot be served."""
    page = builder.kv_cache_spec.block_size
    settings = settings_of_environment(vllm_config.model_config.hf_text_config)
    started = Started(page=page, lengths_are_exact=vllm_config.speculative_config is None)
    first_rank = get_tensor_model_parallel_rank() == 0

    def tell(line: str) -> None:
        logger.log(logging.INFO if first_rank else logging.DEBUG, "rr_flex: %s", line)

    dense: dict[str, int] = {}
    for name in layer_names:
        layer = vllm_config.compilation_config.static_forward_context[name]
        reason = why_dense(layer.impl, layer) or _give_settings(layer.impl, name, settings)
        if reason is not None:
            dense[reason] = dense.get(reason, 0) + 1
            continue
        layer.impl.attention_layer = layer
        started.layers.append(layer.impl)
    if not started.layers:
        tell(_line(settings, started, dense))
        return started
    check_page(page)
    if hasattr(builder, "isa"):
        check_isa(builder.isa)
    first = started.layers[0]
    if builder.device.type != "cpu":  # there pages are gathered
        elements = page * first.num_kv_heads * 2 * first.head_size
        check_pool(vllm_config.cache_config.num_gpu_blocks, elements)
    if first.side is not None:
        started.pooled_stride = first.side.stride
    sample = torch.empty(1, 1, 1, first.head_size, dtype=vllm_config.model_config.dtype, device=builder.device)
    started.min_length = shortest_prompt(first, sample, settings)
    if first_rank:
        started.counters = _counters_of_process(builder.device)
        # One builder of a process counts, the last: vLLM makes others before it, to find out what graphs take.
        started.counters.counted_by = builder
    for impl in started.layers:
        impl.counters = started.counters
    tell(_line(settings, started, dense))
    compile_graphs(first, sample, page, tell)
    return started


def _give_settings(impl: Any, name: str, settings: ServingSettings) -> str | None:
    config = settings.of_layer(extract_layer_index(name), impl.first_head, impl.num_heads)
    if config is None:
        return "not in the profile"
    impl.layer_settings = Layer(
        config=config, scale=impl.scale, softcap=impl.logits_soft_cap or None, head_offset=impl.first_head
    )
    return None


def shortest_prompt(impl: Any, sample: torch.Tensor, settings: ServingSettings) -> int:
    """Keys under which a block row is dense. Of a prompt that comes at once and alone, since a row's way must not
    depend on how the prompt was cut."""
    q = sample.expand(1, impl.num_heads, 1, impl.head_size)
    config = replace(impl.layer_settings.config, min_length=settings.min_length, dense_last_rows=1)
    return shortest_sparse("cpu" if q.device.type == "cpu" else "triton", q, impl.num_kv_heads, config)


def _counters_of_process(device: torch.device) -> Counters:
    if "own" not in _counters:
        folder = os.environ.get(FOLDER)
        _counters["own"] = Counters(Path(folder) if folder else None, envs.VLLM_LOG_STATS_INTERVAL, device)
    return _counters["own"]


def _line(settings: ServingSettings, started: Started, dense: dict[str, int]) -> str:
    left = ", ".join(f"{count} dense ({reason})" for reason, count in dense.items())
    pooled = f"by page, stride {started.pooled_stride}" if started.pooled_stride else "anew each step"
    return (
        f"on, vLLM {installed_version()}: {len(started.layers)} layers sparse{', ' + left if left else ''}; "
        f"{described(settings)}; rows under {started.min_length} keys dense; keys pooled {pooled}"
    )
