"""The plugin's backend over vLLM's own CPU kernels, without a server; skipped where vLLM is not installed."""

from types import SimpleNamespace

import pytest
import torch
from paged_server import VOCABULARY, PagedServer
from test_serving_schedules import batch_of

pytest.importorskip("vllm")

import vllm.config.vllm as vllm_config_module
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs

from rr_flex.sampling import pooled_features
from rr_flex.serving.pages import pools_of_cpu, read_pages
from rr_flex.serving.vllm import implementation as attention
from rr_flex.serving.vllm import plugin, start
from rr_flex.serving.vllm.builder import SparseBuilder
from rr_flex.serving.vllm.cpu import SparseCPUBuilder, SparseCPUImpl
from rr_flex.serving.vllm.flash_attn import SparseFlashBuilder
from rr_flex.serving.vllm.side_cache import PooledKeys

Hq, Hkv, D, PAGE, PAGES = 4, 2, 64, 128, 14


class FakeLayer(AttentionLayerBase):
    """What an attention layer is to its backend."""

    _k_scale_float = _v_scale_float = 1.0

    def __init__(self, impl, dtype):
        self.impl, self.num_heads, self.isa = impl, Hq, "vec"
        self.kv_cache = torch.zeros(PAGES, Hkv, PAGE, 2 * D, dtype=dtype)

    def get_attn_backend(self):
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config):
        return SPEC


SPEC = FullAttentionSpec(block_size=PAGE, num_kv_heads=Hkv, head_size=D, dtype=torch.float32)


@pytest.fixture
def config(monkeypatch):
    """The parts of vLLM's configuration that the backends read."""
    text = SimpleNamespace()
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.float32, hf_text_config=text, is_hybrid=False),
        parallel_config=SimpleNamespace(use_ubatching=False, decode_context_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto", block_size=PAGE),
        kv_transfer_config=None,
        speculative_config=None,
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    monkeypatch.setattr(vllm_config_module, "_current_vllm_config", config)
    for module in (attention, start):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0)
    return config


def served(config, impl_class, builder_class):
    """An attention, its layer and its builder, as vLLM makes them at start."""
    dtype = config.model_config.dtype
    impl = impl_class(Hq, D, D**-0.5, Hkv, None, None, "auto")
    layer = FakeLayer(impl, dtype)
    config.compilation_config.static_forward_context["model.layers.0.self_attn.attn"] = layer
    side = getattr(impl, "side", None)
    if side is not None:
        side.bind_kv_cache(torch.zeros(PAGES, Hkv, PAGE // side.stride, side.order * D, dtype=dtype))
    names = ["model.layers.0.self_attn.attn"]
    return impl, layer, builder_class(SPEC, names, config, torch.device("cpu"))


def metadata_of(server, chunks):
    starts, lengths, prefilling = batch_of(chunks)
    table = torch.zeros(len(chunks), 8, dtype=torch.int32)
    for row, chunk in enumerate(chunks):
        table[row, : len(chunk.request.table)] = torch.tensor(chunk.request.table)
    starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in (starts, lengths))
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=len(chunks),
        num_actual_tokens=int(starts[-1]),
        max_query_len=int(starts.diff().max()),
        max_seq_len=int(lengths.max()),
        block_table_tensor=table,
        slot_mapping=torch.tensor([slot for chunk in chunks for slot in server.slots(chunk)]),
        is_prefilling=torch.tensor(prefilling),
        seq_lens_cpu_upper_bound=lengths,
    )


def step_of(impl, layer, builder, m, q, k, v):
    metadata = builder.build(0, m)
    impl.do_kv_cache_update(layer, k, v, layer.kv_cache, m.slot_mapping)
    return impl.forward(layer, q, k, v, layer.kv_cache, metadata, torch.zeros_like(q)), metadata


# In bfloat16 both round their outputs, of up to 3, to 2^-8 of themselves, and vLLM its probabilities too.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_random_schedules_at_tau_1_are_vllm_s_own_attention(dtype, tolerance, config, monkeypatch):
    monkeypatch.setenv("RR_FLEX", '{"tau": 1.0, "min_length": 0}')
    config.model_config.dtype = dtype
    ours = served(config, SparseCPUImpl, SparseCPUBuilder)
    theirs = served(config, CPUAttentionBackendImpl, CPUAttentionMetadataBuilder)
    impl, layer, builder = ours
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (
        torch.randn(VOCABULARY, heads, D, generator=generator).to(dtype) for heads in (Hq, Hkv, Hkv)
    )
    sparse_steps = pooled_pages = 0
    for seed in range(40):
        server = PagedServer(seed, pages=PAGES, page=PAGE, longest=700)
        builder.slots_to_pool()  # of another server's pages
        for _ in range(5):
            # vLLM puts decodes first.
            chunks = sorted(server.step(), key=lambda chunk: chunk.stop - chunk.start > 1)
            if not chunks:
                continue
            m = metadata_of(server, chunks)
            rows = torch.cat([chunk.request.rows[chunk.start : chunk.stop] for chunk in chunks])
            q, k, v = queries[rows], keys[rows], values[rows]
            out, metadata = step_of(*ours, m, q, k, v)
            expected, _ = step_of(*theirs, m, q, k, v)
            torch.testing.assert_close(out, expected, atol=tolerance, rtol=0)
            if metadata.rr_flex is not None:
                sparse_steps += 1
                for piece in metadata.rr_flex.step.sparse:
                    table = torch.tensor([chunks[piece.request].request.table[: piece.stop // PAGE]])
                    fresh = pooled_features(read_pages(pools_of_cpu(layer.kv_cache)[0], table), 8, 1)
                    torch.testing.assert_close(impl.side.pooled.read(table), fresh, atol=1e-6, rtol=1e-2)
                    pooled_pages += table.numel()
            server.finish(chunks)
    assert sparse_steps > 40 and pooled_pages > 100


def test_a_step_without_sparse_rows_is_the_parent_s(config, monkeypatch):
    monkeypatch.setenv("RR_FLEX", '{"tau": 0.9}')
    impl, layer, builder = served(config, SparseCPUImpl, SparseCPUBuilder)
    called = []
    monkeypatch.setattr(CPUAttentionBackendImpl, "forward", lambda self, *arguments: called.append(arguments))
    m = CommonAttentionMetadata(
        query_start_loc=torch.tensor([0, 1, 2], dtype=torch.int32),
        query_start_loc_cpu=torch.tensor([0, 1, 2], dtype=torch.int32),
        seq_lens=torch.tensor([200, 300], dtype=torch.int32),
        num_reqs=2,
        num_actual_tokens=2,
        max_query_len=1,
        max_seq_len=300,
        block_table_tensor=torch.arange(6, dtype=torch.int32).view(2, 3),
        slot_mapping=torch.tensor([199, 3 * PAGE + 299 - 256]),
        is_prefilling=torch.tensor([False, False]),
        seq_lens_cpu_upper_bound=torch.tensor([200, 300], dtype=torch.int32),
    )
    metadata = builder.build(0, m)
    assert metadata.rr_flex is None
    q = torch.zeros(2, Hq, D)
    impl.forward(layer, q, None, None, layer.kv_cache, metadata, q)
    ((_, query, *_, given, output, _, _),) = called
    assert query is q and given is metadata and output is q
    # The first of the two ends a stride of 8 keys, and waits for the next sparse step.
    assert [slots.tolist() for slots in builder.pending] == [[199]]


def test_full_cuda_graphs_are_of_decodes_only():
    """What vLLM makes of each mode that it may be asked for; attention runs between piecewise graphs, as ever."""
    assert issubclass(SparseFlashBuilder, FlashAttentionMetadataBuilder)
    support = SparseFlashBuilder.get_cudagraph_support(None, SPEC)
    assert support == AttentionCGSupport.UNIFORM_BATCH
    always = type("Always", (FlashAttentionMetadataBuilder,), {"_cudagraph_support": AttentionCGSupport.ALWAYS})
    over_always = type("Builder", (SparseBuilder, always), {})
    assert over_always.get_cudagraph_support(None, SPEC) == AttentionCGSupport.UNIFORM_BATCH
    assert SparseCPUBuilder.get_cudagraph_support(None, SPEC) == AttentionCGSupport.NEVER
    for asked, found in (("PIECEWISE", "PIECEWISE"), ("FULL", "FULL_AND_PIECEWISE"), ("FULL_AND_PIECEWISE",) * 2):
        compilation = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode[asked])
        compilation.set_splitting_ops_for_v1(all2all_backend="naive")
        assert compilation.splitting_ops_contain_attention()
        assert compilation.resolve_cudagraph_mode_and_sizes(support, "SparseFlashBackend").name == found


def test_what_a_full_cuda_graph_replays_has_no_plan(config, monkeypatch):
    """Decodes, drafts, and single tokens at a prompt's end; padded with requests of which the flags do not know."""
    monkeypatch.setenv("RR_FLEX", '{"tau": 0.9, "min_length": 0}')
    _, _, builder = served(config, SparseCPUImpl, SparseCPUBuilder)
    starts = torch.tensor([0, 1, 2, 2], dtype=torch.int32)
    m = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([128, 256, 0], dtype=torch.int32),
        num_reqs=3,
        num_actual_tokens=2,
        max_query_len=1,
        max_seq_len=256,
        block_table_tensor=torch.arange(6, dtype=torch.int32).view(3, 2),
        slot_mapping=torch.tensor([127, 3 * PAGE + 127]),
        is_prefilling=torch.tensor([False, True]),
        seq_lens_cpu_upper_bound=torch.tensor([128, 256], dtype=torch.int32),
    )
    _, _, later = served(config, SparseCPUImpl, SparseCPUBuilder)
    counted = later.started.counters.held.sum()
    assert builder.plan(m, False) is None
    assert [slots.tolist() for slots in builder.pending] == [[127, 3 * PAGE + 127]]
    # Of several builders of a process the last counts.
    assert later.started.counters.held.sum() == counted and later.plan(m, False) is None
    assert later.started.counters.held.sum() == counted + 2
    assert builder.build_for_cudagraph_capture(m).rr_flex is None and len(builder.pending) == 1


def test_settings_and_layers_at_start(config, monkeypatch):
    monkeypatch.setenv("RR_FLEX", "smollm2-135m-instruct")
    impl = SparseCPUImpl(Hq, D, D**-0.5, Hkv, None, 512, "auto")
    assert impl.side is None and impl.layer_settings is None
    with pytest.raises(NotImplementedError, match="rr_flex does not serve ALiBi"):
        SparseCPUImpl(Hq, D, D**-0.5, Hkv, [0.5] * Hq, None, "auto")
    config.cache_config.cache_dtype = "fp8"
    with pytest.raises(NotImplementedError, match="a KV cache of fp8"):
        SparseCPUImpl(Hq, D, D**-0.5, Hkv, None, None, "fp8")


def test_pooled_keys_are_pages_of_the_same_group(config, monkeypatch):
    monkeypatch.setenv("RR_FLEX", '{"preset": "best"}')
    impl, _, _ = served(config, SparseCPUImpl, SparseCPUBuilder)
    side = impl.side
    assert (side.stride, side.order) == (32, 2) and isinstance(side, PooledKeys)
    spec = side.get_kv_cache_spec(config)
    # A mean and a variance for 32 keys and values.
    assert spec.page_size_bytes * 32 == SPEC.page_size_bytes
    group = UniformTypeKVCacheSpecs.from_specs({"model.layers.0.self_attn.attn": SPEC, side.name: spec})
    assert group is not None and group.page_size_bytes == spec.page_size_bytes + SPEC.page_size_bytes


def test_the_registry_serves_ours_and_refuses_others(monkeypatch):
    from vllm.v1.attention.backends import registry

    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", dict(registry._ATTN_OVERRIDES))
    plugin._override_backends()
    plugin._override_backends()
    assert AttentionBackendEnum.CPU_ATTN.get_class().get_impl_cls() is SparseCPUImpl
    assert AttentionBackendEnum.CPU_ATTN.get_class().get_name() == "CPU_ATTN"
    for member in (AttentionBackendEnum.CPU_MLA, AttentionBackendEnum.FLASHINFER):
        with pytest.raises(ImportError, match="unset RR_FLEX"):
            member.get_class()
