"""A builder that plans each step, to go before one of vLLM's.

Decodes, short rows and cut rows stay with vLLM's own attention; a step without sparse rows goes there whole, unchanged.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport

from rr_flex.serving.pages import tokens_to_pool
from rr_flex.serving.step import SparseStep
from rr_flex.serving.step_rows import pieces_of_step
from rr_flex.serving.vllm.start import Started, start

logger = init_logger("vllm.rr_flex")

MOST_PENDING = 8192  # slots that wait for the next sparse step to be pooled


@dataclass(frozen=True)
class Plan:
    """What the builder leaves for the layers of one step that has sparse rows."""

    step: SparseStep
    dense_metadata: Any  # of the dense pieces, for the parent; None: there are none
    dense_tokens: Tensor | None  # int64, on the device
    slots: Tensor | None  # written since the last sparse step and to be pooled; None: there are none


class SparseBuilder:
    """Goes before a builder of vLLM's. Its metadata carry `rr_flex`: the step's Plan, or None."""

    supports_update_block_table = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # The parent's own buffers hold the whole step while the dense pieces need theirs.
        self.of_dense_pieces = type(self).parent(kv_cache_spec, layer_names, vllm_config, device)
        self.started: Started = start(self, layer_names, vllm_config)
        self.pending: list[Tensor] = []
        self.waiting = 0  # slots in them

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        own = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        return min(own, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.rr_flex = self.plan(common_attn_metadata, fast_build) if self.started.layers else None
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        metadata = super().build(0, common_attn_metadata)
        metadata.rr_flex = None
        return metadata

    def build_for_drafting(self, common_attn_metadata: Any, draft_index: int) -> Any:
        # Layers of a draft model are dense, and what waits to be pooled is the other layers'.
        metadata = super().build(0, common_attn_metadata, True)
        metadata.rr_flex = None
        return metadata

    def plan(self, m: Any, fast_build: bool) -> Plan | None:
        starts = m.query_start_loc_cpu.tolist()
        if m.seq_lens_cpu_upper_bound is None or starts[-1] == 0:
            return None
        lengths = m.seq_lens_cpu_upper_bound.tolist()[: len(starts) - 1]
        prefilling = [False] * len(lengths) if m.is_prefilling is None else m.is_prefilling.tolist()
        # A full CUDA graph's batch is padded with requests without queries, of which not every list knows.
        requests = min(len(lengths), len(prefilling))
        starts, lengths, prefilling = starts[: requests + 1], lengths[:requests], prefilling[:requests]
        self.remember(m, starts, lengths, prefilling)
        counters = self.started.counters
        if counters is not None and counters.counted_by is not self:
            counters = None
        if counters is not None and (line := counters.line_if_due()):
            logger.info(line)
        if not any(prefilling):
            if counters is not None:
                counters.add("decode", starts[-1])
            return None
        causal = m.causal is True and not m.mm_req_doc_ranges
        shortest = self.started.min_length
        pieces = pieces_of_step(starts, lengths, prefilling, min_length=shortest, causal=causal)
        if counters is not None:
            for piece in pieces:
                counters.add(piece.reason, len(piece))
        step = SparseStep.of(pieces, m.block_table_tensor, self.started.page)
        if step is None:
            return None
        if counters is not None:
            counters.add("steps", 1)
        dense, tokens = None, None
        if step.dense is not None:
            dense, tokens = self.dense_metadata(m, step, lengths, fast_build)
        return Plan(step, dense, tokens, self.slots_to_pool())

    def dense_metadata(self, m: Any, step: SparseStep, lengths: list[int], fast_build: bool) -> tuple[Any, Tensor]:
        """The parent's metadata of the dense pieces, each as a request of its own, and their tokens."""
        dense, device = step.dense, m.seq_lens.device
        # Without waiting for what runs: the host is a step ahead.
        requests, tokens, query_starts, piece_lengths = (
            x.to(device, non_blocking=True) for x in (dense.requests, dense.tokens, dense.query_starts, dense.lengths)
        )
        # A piece that ends with its request has the request's own length, which with drafts only the device knows.
        ends = torch.tensor(lengths)[dense.requests] == dense.lengths
        own = m.seq_lens[requests]
        batch = m.replace(
            query_start_loc=query_starts,
            query_start_loc_cpu=dense.query_starts,
            seq_lens=torch.where(ends.to(device, non_blocking=True), own, piece_lengths.to(own.dtype)),
            seq_lens_cpu_upper_bound=dense.lengths,
            num_reqs=len(dense.lengths),
            num_actual_tokens=len(dense.tokens),
            max_query_len=dense.longest,
            max_seq_len=int(dense.lengths.max()),
            block_table_tensor=m.block_table_tensor[requests].contiguous(),
            slot_mapping=m.slot_mapping[tokens],
            is_prefilling=None if m.is_prefilling is None else m.is_prefilling[dense.requests],
            positions=None if m.positions is None else m.positions[tokens],
            req_idx=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        return self.of_dense_pieces.build(0, batch, fast_build), tokens

    def remember(self, m: Any, starts: list[int], lengths: list[int], prefilling: list[bool]) -> None:
        """The slots that this step writes and that end a stride; they are pooled when a step is sparse."""
        stride = self.started.pooled_stride
        if stride is None:
            return
        exact = [flag or self.started.lengths_are_exact for flag in prefilling]
        tokens = tokens_to_pool(starts, lengths, exact, stride)
        if not tokens:
            return
        places = torch.tensor(tokens).to(m.slot_mapping.device, non_blocking=True)
        self.pending.append(m.slot_mapping[places])
        self.waiting += len(tokens)
        if self.waiting > MOST_PENDING + len(tokens):
            # The last entry is of this step, whose keys are not written yet.
            *earlier, latest = self.pending
            for impl in self.started.layers:
                impl.rewrite_pooled(torch.cat(earlier))
            self.pending, self.waiting = [latest], len(latest)

    def slots_to_pool(self) -> Tensor | None:
        if not self.pending:
            return None
        slots = torch.cat(self.pending)
        self.pending, self.waiting = [], 0
        return slots
