"""What only an accelerator's kernels do: the estimate as attention, log-sum-exp, gradients, dynamic lengths."""

import math
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import oracle
import pytest
import torch
from cases import Shape, assert_attends, compiled_flex, eager_flex, mask_by_name, tensors
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask

import rr_flex
from mask_mods import both, causal, padding, sliding_window, visible_keys
from rr_flex import (
    PrefillState,
    attention,
    captured,
    create_rr_block_mask,
    mass,
    rr_attention,
    rr_attention_packed,
    select_blocks,
)
from rr_flex.block_mask import KeptMask
from rr_flex.kernels import choose, deciding, dense, last_rows
from rr_flex.kernels import flash as backends
from rr_flex.mass import Samples, block_mass
from rr_flex.mass_by_attention import block_mass_by_attention
from rr_flex.runtime import head_slices
from rr_flex.runtime.compiling import compile_whole
from rr_flex.sampling import pool_keys, sample_queries

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # flash-attn-4's compiler uses what it deprecates and warns of its own arguments.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Argument .* cannot be converted to a JitArgument:UserWarning"),
    # A hint of torch's, raised where it compiles what multiplies in float32.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    # How torch says that it looks for synchronizations.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
    # torch's graph trees warm up with an empty graph.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
]
needs_flash = pytest.mark.skipif(not backends.flash_is_installed(), reason="needs flash-attn-4")
LONG = Shape(B=2, Hq=4, Hkv=2, Lq=1044, Lk=1300, D=64)


@pytest.fixture(autouse=True)
def fresh_graphs(monkeypatch):
    torch._dynamo.reset()
    # Short contexts are dense where sparse attention does not pay; here they are what is tested.
    for name, nothing in (("costs_of", None), ("tuned", {})):
        monkeypatch.setattr(deciding, name, lambda *_, nothing=nothing: nothing)


def on_gpu(shape, seed=0, dtype=torch.float32):
    return [x.cuda() for x in tensors(shape, seed, dtype)]


def allowed_pairs(q, k, mask_mod=None, block_size=(128, 128), **chosen):
    """The pairs that the mask shows and the selection keeps, on the CPU: bool [B, Hq, Lq, Lk]."""
    (B, Hq, Lq, _), Lk = q.shape, k.shape[2]
    kept = select_blocks(q, k, block_size=block_size, mask_mod=mask_mod, **chosen).kept.cpu()
    shown = oracle.pairs(causal(Lk - Lq), B, Hq, Lq, Lk)
    if mask_mod is not None:
        shown = shown & oracle.pairs(mask_mod, B, Hq, Lq, Lk)
    return shown & oracle.expand(kept, (Lq, Lk), block_size)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_estimate_as_attention_equals_the_strips(dtype, error):
    q, k, _ = on_gpu(Shape(B=2, Lq=300, Lk=128 * 130, D=64), dtype=dtype)
    facts = {"mask_mod": causal(128 * 130 - 300), "seq_lengths": (300, 128 * 130), "strides": (8, 8)}
    samples = Samples(sample_queries(q, 8), pool_keys(k, 8), **facts, block_size=(128, 128), scale=0.125)
    found = compile_whole(block_mass_by_attention)(samples)
    torch.testing.assert_close(found, block_mass(samples), rtol=0, atol=error)


@pytest.mark.parametrize(
    ("dtype", "error", "batches"),
    [(torch.float32, 1e-5, 1), (torch.float32, 1e-5, 2), (torch.bfloat16, 2e-2, 2), (torch.float16, 4e-3, 1)],
)
def test_strides_count_by_their_real_keys_in_both_forms(dtype, error, batches):
    """Ragged lengths, and padding on the left that leaves few keys in a stride; lengths for each batch or for all."""
    Lk = 128 * 130 + 3
    q, k, _ = on_gpu(Shape(B=2, Lq=300, Lk=Lk, D=64), dtype=dtype)
    real = torch.tensor([Lk - 15, 901], device="cuda")[:batches]
    mask = both(causal(Lk - 300), padding(real, side="left", total=Lk, offset=Lk - 300))
    valid = visible_keys(mask, 2, 1, Lk, "cuda")[:batches]
    facts = {"mask_mod": mask, "seq_lengths": (300, Lk), "strides": (8, 8), "block_size": (128, 128), "scale": 0.125}
    samples = Samples(sample_queries(q, 8), pool_keys(k, 8, valid), **facts, valid_keys=valid)
    found = compile_whole(block_mass_by_attention)(samples)
    torch.testing.assert_close(found, block_mass(samples), rtol=0, atol=error)


@pytest.mark.parametrize(
    "chosen",
    [{}, {"block_size": (128, 64), "order": 2, "query_stride": 16}, {"block_size": (64, 64), "causal": False}],
)
def test_the_kernel_keeps_the_oracle_s_blocks(chosen):
    q, k, _ = on_gpu(LONG)
    settings = {"tau": 0.6, **chosen}
    on_cpu = select_blocks(q.cpu(), k.cpu(), **settings)
    selection = select_blocks(q, k, **settings)
    torch.testing.assert_close(selection.mass.cpu(), on_cpu.mass, rtol=0, atol=1e-4)
    assert torch.equal(selection.kept.cpu(), on_cpu.kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_three_ways_to_attend_agree_with_float64(dtype):
    q, k, v = on_gpu(LONG, dtype=dtype)
    allowed = allowed_pairs(q, k, tau=0.5)
    mask = create_rr_block_mask(q, k, tau=0.5)
    outs = [
        rr_attention(q, k, v, tau=0.5),
        compiled_flex(q, k, v, block_mask=mask, enable_gqa=True),
        eager_flex(q, k, v, mask),
    ]
    for out in outs:
        assert_attends(out.cpu(), q.cpu(), k.cpu(), v.cpu(), allowed)


@pytest.mark.parametrize("block_size", [(128, 64), (64, 64)])
def test_small_blocks_and_few_queries(block_size):
    q, k, v = on_gpu(Shape(B=1, Hq=8, Hkv=2, Lq=3, Lk=643, D=64), dtype=torch.bfloat16)
    chosen = {"block_size": block_size, "order": 2, "budget": "threshold", "threshold": 0.05, "dense_last_rows": 0}
    assert_attends(rr_attention(q, k, v, **chosen).cpu(), q.cpu(), k.cpu(), v.cpu(), allowed_pairs(q, k, **chosen))


def test_padding_batches():
    shape = LONG._replace(Lq=1000, Lk=1000)
    q, k, v = on_gpu(shape)
    here, there = (
        padding(torch.tensor([300, 907], device=device), side="left", total=1000) for device in ("cpu", "cuda")
    )
    out = rr_attention(q, k, v, mask_mod=there, causal=True, tau=0.5)
    kept = select_blocks(q.cpu(), k.cpu(), mask_mod=here, causal=True, tau=0.5).kept
    shown = oracle.pairs(both(causal(), here), 2, 4, 1000, 1000)
    assert_attends(out.cpu(), q.cpu(), k.cpu(), v.cpu(), shown & oracle.expand(kept, (1000, 1000), (128, 128)))


def test_batches_whose_lists_the_compiler_would_pad():
    """The kernel takes a batch's lists to follow the last head's: 9 heads of 15 × 16 entries leave no gap by chance."""
    shape = Shape(B=3, Hq=9, Hkv=3, Lq=1836, Lk=1836, D=64)
    q, k, v = on_gpu(shape)
    lengths = torch.tensor([1836, 1500, 907])
    here, there = (padding(lengths.to(device), side="left", total=1836) for device in ("cpu", "cuda"))
    out = rr_attention(q, k, v, mask_mod=there, causal=True, tau=0.5, backend="triton")
    kept = select_blocks(q.cpu(), k.cpu(), mask_mod=here, causal=True, tau=0.5).kept
    shown = oracle.pairs(both(causal(), here), 3, 9, 1836, 1836)
    allowed = shown & oracle.expand(kept, (1836, 1836), (128, 128))
    assert_attends(*(x.cpu() for x in (out, q, k, v)), allowed)


def test_the_log_sum_exp_is_natural():
    q, k, v = on_gpu(LONG)
    lse = rr_attention(q, k, v, tau=0.5, return_lse=True)[1]
    exact = oracle.attend(q.cpu(), k.cpu(), v.cpu(), allowed_pairs(q, k, tau=0.5))[1]
    torch.testing.assert_close(lse.cpu().double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("block_size", "shape"),
    [((128, 128), LONG), ((128, 64), LONG), ((128, 128), Shape(B=2, Hq=9, Hkv=3, Lq=1836, Lk=1836, D=64))],
)
def test_gradients_are_those_of_attention_over_the_same_blocks(block_size, shape):
    q, k, v = (x.requires_grad_() for x in on_gpu(shape))
    chosen = {"tau": 0.5, "block_size": block_size}
    direction = torch.randn(*q.shape, generator=torch.Generator().manual_seed(0)).cuda()
    found = torch.autograd.grad((rr_attention(q, k, v, **chosen) * direction).sum(), (q, k, v))
    allowed = allowed_pairs(q, k, **chosen).cuda()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    many_k, many_v = (x.repeat_interleave(shape.Hq // shape.Hkv, 1) for x in exact[1:])
    score = (exact[0] @ many_k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed, -torch.inf)
    expected = torch.autograd.grad(((score.softmax(-1) @ many_v) * direction).sum(), exact)
    for gradient, true in zip(found, expected, strict=True):
        assert (gradient - true).norm() <= 1e-5 * true.norm()


# Triton's kernel is told of whole blocks, which makes a second graph for any length, short and long.
@pytest.mark.parametrize(("backend", "most"), [("triton", 5), pytest.param("flash", 3, marks=needs_flash)])
def test_fifty_lengths_compile_a_few_times(backend, most):
    lengths = [1024 + 1280 * step + 37 * (step % 3) for step in range(49)] + [65536]
    q, k, v = (torch.randn(1, heads, 65536, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 1, 1))
    rr_attention(q[:, :, :512], k[:, :, :512], v[:, :, :512], tau=0.9, backend=backend)  # FLASH checks itself
    torch._dynamo.reset()
    counters.clear()
    for length in lengths:
        short = [x[:, :, :length].contiguous() for x in (q, k, v)]
        out = rr_attention(*short, tau=0.9, backend=backend)
        # The first block row sees one block: dense, whatever the selection.
        exact = torch.nn.functional.scaled_dot_product_attention(
            *(x[:, :, :128] for x in short), is_causal=True, enable_gqa=True
        )
        assert (out[:, :, :128] - exact).abs().max() < 0.05
        # Eager flex_attention ignores the lists: this would be dense everywhere.
        last = torch.nn.functional.scaled_dot_product_attention(
            short[0][:, :, length - 300 : length - 290], *short[1:], enable_gqa=True
        )
        assert length < 8000 or (out[:, :, length - 300 : length - 290] - last).norm() > 1e-2 * last.norm()
    assert counters["stats"]["unique_graphs"] <= most


@needs_flash
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (LONG, torch.bfloat16),
        (LONG, torch.float16),
        (Shape(B=1, Hq=8, Hkv=2, Lq=700, Lk=700, D=128), torch.bfloat16),
    ],
)
def test_flash_attends_to_the_kept_blocks(shape, dtype):
    q, k, v = on_gpu(shape, dtype=dtype)
    out, lse = rr_attention(q, k, v, tau=0.5, backend="flash", return_lse=True)
    allowed = allowed_pairs(q, k, tau=0.5)
    assert_attends(out.cpu(), q.cpu(), k.cpu(), v.cpu(), allowed)
    exact = oracle.attend(q.cpu(), k.cpu(), v.cpu(), allowed)[1]
    torch.testing.assert_close(lse.cpu().double(), exact, rtol=0, atol=1e-2)
    assert not allowed.all()


@needs_flash
def test_auto_is_flash_and_its_log_sum_exp_is_off_by_ln_2_in_torch_2_11():
    q, k, v = on_gpu(LONG, dtype=torch.bfloat16)
    before = attention.calls["flash"]
    rr_attention(q, k, v, tau=0.5)
    assert attention.calls["flash"] == before + 1
    found = backends.check_flash(q.device, 64, 64, torch.bfloat16)
    assert found.refused is None
    # 2.14.1 gives nats. Drop the factor from LSE_FACTORS once no supported torch needs it.
    release = tuple(map(int, torch.__version__.split(".")[:2]))
    expected = {(2, 11): (1 / math.log(2),), (2, 14): (1.0,)}.get(release, backends.LSE_FACTORS)
    assert found.lse_factor in expected


@needs_flash
# A single sequence too: FLASH's template (torch 2.11) loads no number whose place is known when it compiles.
@pytest.mark.parametrize(("name", "B"), [("document", 1), ("document", 2), ("left padding", 1), ("window and sink", 2)])
def test_flash_takes_a_caller_s_mask_by_name(name, B):
    shape = LONG._replace(B=B, Lq=1000, Lk=1000)
    q, k, v = on_gpu(shape, dtype=torch.bfloat16)
    here, there = (mask_by_name(name, shape, device=device)[0] for device in ("cpu", "cuda"))
    chosen = {"causal": False, "tau": 0.5}
    out = rr_attention(q, k, v, mask_mod=there, backend="flash", **chosen)
    kept = select_blocks(q, k, mask_mod=there, **chosen).kept.cpu()
    shown = oracle.pairs(here, B, 4, 1000, 1000) & oracle.expand(kept, (1000, 1000), (128, 128))
    assert_attends(out.cpu(), q.cpu(), k.cpu(), v.cpu(), shown)


def test_one_captured_graph_runs_selection_and_attention():
    q, k, v = on_gpu(Shape(B=1, Hq=4, Hkv=2, Lq=1000, Lk=1000, D=64), dtype=torch.bfloat16)
    chosen = {"tau": 0.5, "backend": "triton"}
    rr_attention(q, k, v, **chosen)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rr_attention(q, k, v, **chosen)
    fresh = on_gpu(Shape(B=1, Hq=4, Hkv=2, Lq=1000, Lk=1000, D=64), seed=7, dtype=torch.bfloat16)
    for old, new in zip((q, k, v), fresh, strict=True):
        old.copy_(new)
    graph.replay()
    torch.testing.assert_close(out, rr_attention(*fresh, **chosen))


def test_a_caller_s_reduce_overhead_graph(monkeypatch):
    monkeypatch.setattr(head_slices, "SMALL_BYTES", -1)  # as in a long context, where free memory would be asked for
    shape = Shape(B=1, Hq=4, Hkv=2, Lq=1000, Lk=1000, D=64)
    call = torch.compile(lambda q, k, v: rr_attention(q, k, v, tau=0.5), mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for seed in range(4):
            q, k, v = on_gpu(shape, seed, torch.bfloat16)
            torch.compiler.cudagraph_mark_step_begin()
            out = call(q, k, v).clone()
            torch.testing.assert_close(out, rr_attention(q, k, v, tau=0.5, backend="triton"))


def test_strips_of_heads(monkeypatch):
    q, k, v = on_gpu(LONG, dtype=torch.bfloat16)
    chosen = {"tau": [0.3, 0.6, 0.2, 0.9], "head_offset": 3, "backend": "triton"}
    whole = rr_attention(q, k, v, return_lse=True, **chosen)
    monkeypatch.setattr(head_slices, "SLICE_BYTES", 1)
    for strips, exact in zip(rr_attention(q, k, v, return_lse=True, **chosen), whole, strict=True):
        torch.testing.assert_close(strips, exact)


@pytest.mark.parametrize("backend", ["triton", pytest.param("flash", marks=needs_flash)])
@pytest.mark.parametrize(("rows", "B"), [(1, 1), (2, 2)])
def test_last_rows_by_themselves(monkeypatch, backend, rows, B):
    q, k, v = on_gpu(LONG._replace(B=B), dtype=torch.bfloat16)
    chosen = {"tau": 0.5, "dense_last_rows": rows}
    with monkeypatch.context() as patch:
        patch.setattr(choose, "rows_apart", lambda *_: 0)
        at_once = rr_attention(q, k, v, return_lse=True, backend=backend, **chosen)
    monkeypatch.setitem(choose.KERNELS, "triton", replace(choose.KERNELS["triton"], least_keys_apart=0))
    out, lse = rr_attention(q, k, v, return_lse=True, backend=backend, **chosen)
    first = (8 - rows) * 128  # of eight block rows
    assert torch.equal(out[:, :, :first], at_once[0][:, :, :first])
    assert_attends(out.cpu(), q.cpu(), k.cpu(), v.cpu(), allowed_pairs(q, k, **chosen))
    torch.testing.assert_close(lse, at_once[1], rtol=0, atol=1e-2)
    sinks = torch.tensor([0.5, 3.0, 6.0, -1.0], device="cuda")
    beside = rr_attention(q, k, v, sinks=sinks, backend=backend, **chosen)
    torch.testing.assert_close(
        beside, (out * torch.sigmoid(lse - sinks[:, None])[..., None]).to(out.dtype), rtol=0, atol=3e-2
    )


@pytest.mark.parametrize("backend", ["triton", pytest.param("flash", marks=needs_flash)])
@pytest.mark.parametrize("Lq", [512, 500])
def test_a_short_chunk_in_pieces_and_a_state(backend, Lq):
    q, k, v = on_gpu(Shape(B=1, Hq=4, Hkv=2, Lq=1012, Lk=last_rows.SHORT_CHUNK_KEYS + 512, D=64), dtype=torch.bfloat16)
    state = PrefillState()
    rr_attention(q[:, :, :-Lq], k[:, :, :-Lq], v[:, :, :-Lq], tau=0.5, backend=backend, state=state)
    q = q[:, :, -Lq:]
    # On the card alone: rows begin with the first query, as those of select_blocks.
    chosen = {"tau": 0.5, "q_offset": torch.tensor(k.shape[2] - Lq, device="cuda")}
    for given in (None, state):
        out, lse = rr_attention(q, k, v, return_lse=True, backend=backend, state=given, **chosen)
        allowed = allowed_pairs(q, k, **chosen)
        exact, exact_lse = oracle.attend(q.cpu(), k.cpu(), v.cpu(), allowed)
        assert (out.cpu() - exact).norm() < 2e-2 * exact.norm()
        torch.testing.assert_close(lse.cpu().double(), exact_lse, rtol=0, atol=1e-2)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_a_short_context_is_dense_through_the_fastest_kernel(backend):
    q, k, v = on_gpu(Shape(B=2, Hq=4, Hkv=2, Lq=300, Lk=300, D=64), dtype=torch.bfloat16)
    before = attention.calls["dense"]
    out = rr_attention(q, k, v, tau=0.1, min_length=301, backend=backend)
    assert attention.calls["dense"] == before + 1
    assert_attends(out.cpu(), q.cpu(), k.cpu(), v.cpu(), oracle.pairs(causal(), 2, 4, 300, 300))


@pytest.mark.parametrize("keys", [4096, 1300])
def test_a_chunk_is_dense_through_the_fastest_kernel(keys):
    """FlashAttention 4 from 4,096 keys on, where it is installed."""
    q, k, v = on_gpu(Shape(B=2, Hq=4, Hkv=2, Lq=300, Lk=keys + 50, D=64), dtype=torch.bfloat16)
    before = attention.calls["dense"]
    out = rr_attention(q, k, v, q_offset=keys - 300, min_length=10**6)
    assert attention.calls["dense"] == before + 1
    seen = (q.cpu(), k[:, :, :keys].cpu(), v[:, :, :keys].cpu())
    assert_attends(out.cpu(), *seen, oracle.pairs(causal(keys - 300), 2, 4, 300, keys))


def test_a_pack_is_each_prompt_alone():
    lengths, keys = [1500, 1, 640, 3000], [1500, 900, 2560, 3000]
    q, k, v = on_gpu(Shape(B=1, Hq=4, Hkv=2, Lq=sum(lengths), Lk=sum(keys), D=64), dtype=torch.bfloat16)
    for least, count in ((10**6, 4), (2000, 2)):
        chosen = {"tau": 0.5, "min_length": least}
        before = attention.calls["dense"]
        out = rr_flex.rr_attention_packed(q, k, v, lengths, key_lengths=keys, **chosen)
        assert attention.calls["dense"] == before + count
        prompts = zip(q.split(lengths, 2), k.split(keys, 2), v.split(keys, 2), strict=True)
        alone = torch.cat([rr_attention(*prompt, **chosen) for prompt in prompts], 2)
        torch.testing.assert_close(out, alone, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("chosen", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"block_size": (128, 64), "order": 2}, torch.float32),
        ({"min_length": 1301}, torch.bfloat16),
    ],
)
def test_a_soft_cap_is_triton_s_and_holds_for_the_estimate_too(chosen, dtype):
    q, k, v = on_gpu(LONG, dtype=dtype)
    settings = {"tau": 0.5, "softcap": 3.0, **chosen}
    before = attention.calls.copy()
    out, lse = rr_attention(q, k, v, return_lse=True, **settings)
    assert dict(attention.calls - before) == {"dense" if "min_length" in chosen else "triton": 1}
    exact, exact_lse = oracle.attend(
        q.cpu(), k.cpu(), v.cpu(), allowed_pairs(q, k, **{"block_size": (128, 128), **settings}), softcap=3.0
    )
    # As far as one rounding of the output and of its inputs goes.
    assert (out.cpu().double() - exact).abs().max() < (1e-4 if dtype == torch.float32 else 3e-2)
    torch.testing.assert_close(lse.cpu().double(), exact_lse, rtol=0, atol=1e-4 if dtype == torch.float32 else 2e-2)
    if dtype == torch.float32:
        on_cpu = select_blocks(q.cpu(), k.cpu(), **settings)
        torch.testing.assert_close(select_blocks(q, k, **settings).mass.cpu(), on_cpu.mass, rtol=0, atol=1e-4)


def test_flash_refuses_a_soft_cap():
    q, k, v = on_gpu(LONG, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"^backend must be 'auto' or another kernel here, got 'flash'"):
        rr_attention(q, k, v, softcap=3.0, backend="flash")


@pytest.mark.parametrize("backend", ["triton", pytest.param("flash", marks=needs_flash)])
def test_sinks_join_the_softmax(backend):
    q, k, v = on_gpu(LONG, dtype=torch.bfloat16)
    sinks = torch.tensor([0.5, 3.0, 6.0, -1.0], device="cuda")
    out = rr_attention(q, k, v, tau=0.5, sinks=sinks, backend=backend)
    exact, lse = oracle.attend(q.cpu(), k.cpu(), v.cpu(), allowed_pairs(q, k, tau=0.5))
    left = exact * (lse.exp() / (lse.exp() + sinks.cpu().double().exp()[:, None]))[..., None]
    assert (out.cpu().double() - left).abs().max() < 3e-2
    assert (left - exact).abs().max() > 0.1


def test_a_query_that_sees_nothing_beside_no_sink():
    q, k, v = on_gpu(LONG, dtype=torch.bfloat16)
    sinks = torch.tensor([-torch.inf, 3.0, 6.0, -1.0], device="cuda")
    out = rr_attention(q, k[:, :, :600], v[:, :, :600], tau=0.5, sinks=sinks)
    assert (out[:, :, :444] == 0).all()
    assert out.isfinite().all()


ROWS = {
    "padded": lambda x: torch.nn.functional.pad(x, (0, 2))[..., :64],
    "of heads": lambda x: torch.nn.functional.pad(x.flatten(2), (0, 4))[..., :-4].unflatten(2, x.shape[2:]),
    "elsewhere": lambda x: torch.nn.functional.pad(x.flatten(), (1, 0))[1:].view(x.shape),
    "every other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


@pytest.mark.parametrize("backend", ["triton", pytest.param("flash", marks=needs_flash)])
@pytest.mark.parametrize("rows", ROWS)
def test_rows_may_begin_anywhere(rows, backend):
    """torch 2.11's cuDNN kernel is wrong about rows that do not begin at a multiple of 16 bytes."""
    q, k, v = on_gpu(Shape(B=2, Hq=4, Hkv=2, Lq=640, Lk=640, D=64), dtype=torch.bfloat16)
    laid = [ROWS[rows](x) for x in (q, k, v)]
    assert [x.stride() for x in laid] != [x.stride() for x in (q, k, v)] or rows == "elsewhere"
    for chosen in ({"tau": 0.5}, {"min_length": 10**6}, {"min_length": 10**6, "causal": False}):
        expected = rr_attention(q, k, v, backend=backend, **chosen)
        torch.testing.assert_close(rr_attention(*laid, backend=backend, **chosen), expected, rtol=0, atol=3e-2)
    chunk = {"min_length": 10**6, "backend": backend}
    expected = rr_attention(q[:, :, -100:], k, v, **chunk)
    torch.testing.assert_close(rr_attention(laid[0][:, :, -100:], *laid[1:], **chunk), expected, rtol=0, atol=3e-2)
    pack = [x[:1] for x in laid]
    expected = rr_attention_packed(*(x[:1] for x in (q, k, v)), [300, 340], **chunk)
    torch.testing.assert_close(rr_attention_packed(*pack, [300, 340], **chunk), expected, rtol=0, atol=3e-2)


@pytest.mark.parametrize("family", ["gpt-oss", "gemma2"])
def test_models_with_sinks_and_soft_caps_say_what_dense_ones_say(family):
    pytest.importorskip("transformers")
    from model_families import IDS, generate, make

    model = make(family).cuda()
    if family == "gpt-oss":
        model.set_experts_implementation("eager")  # grouped products may want bfloat16
    ids = IDS[:1].cuda()
    tokens, logits = generate(model, ids)
    with rr_flex.enable(model, tau=1.0, block_size=64, dense_last_rows=0) as on:
        sparse_tokens, sparse_logits = generate(model, ids)
    assert torch.equal(tokens, sparse_tokens)
    torch.testing.assert_close(sparse_logits, logits, atol=2e-3, rtol=1e-3)
    assert on.report().sparse == 2 and dict(on.report().dense) == {"decode": 4}
    with rr_flex.enable(model, tau=0.4, block_size=64, dense_last_rows=0) as on:
        generate(model, ids)
    assert on.report().density < 0.95


@pytest.mark.parametrize("run", ["eager", "aot_eager", "force_eager", "export"])
def test_whoever_runs_the_graph_attends_to_the_kept_blocks(run):
    q, k, v = on_gpu(LONG)
    call = lambda q, k, v: rr_attention(q, k, v, tau=0.5)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's word that eager flex_attention stores all scores
        if run == "force_eager":
            with torch.compiler.set_stance("force_eager"):
                out = call(q, k, v)
        elif run == "export":
            module = torch.nn.Module()
            module.forward = call
            out = torch.export.export(module, (q, k, v)).module()(q, k, v)
        else:
            out = torch.compile(call, backend=run)(q, k, v)
    assert_attends(out.cpu(), q.cpu(), k.cpu(), v.cpu(), allowed_pairs(q, k, tau=0.5))


@pytest.mark.parametrize("backend", ["triton", pytest.param("flash", marks=needs_flash)])
def test_chunks_with_a_state_and_offsets_of_their_own(backend):
    shape = Shape(B=1, Hq=4, Hkv=2, Lq=4096, Lk=4096, D=64)
    q, k, v = on_gpu(shape, dtype=torch.float32 if backend == "triton" else torch.bfloat16)
    state, chosen = rr_flex.PrefillState(), {"tau": 0.4, "dense_last_rows": 0}
    for start, end in ((0, 1024), (1024, 2048), (2048, 2560), (2560, 3968), (3968, 4096)):
        own = q[:, :, start:end], k[:, :, :end], v[:, :, :end]
        out = rr_attention(*own, q_offset=start, state=state, backend=backend, **chosen)
        here = [x.cpu() for x in own]
        seen = here if q.dtype == torch.float32 else own  # by which a CPU keeps the same blocks, and compiles nothing
        allowed = allowed_pairs(*seen[:2], q_offset=start, **chosen)
        assert_attends(out.cpu(), *here, allowed)


@pytest.mark.parametrize("backend", ["triton", pytest.param("flash", marks=needs_flash)])
@pytest.mark.parametrize("chosen", [{"tau": 0.4, "dense_last_rows": 0}, {"order": 2, "key_stride": 16, "tau": 0.4}])
def test_captured_chunks_are_what_each_is_alone(monkeypatch, backend, chosen):
    """Two layers, two prompts, a ragged end; a new prompt in the same cache, whose end the graph must not look at."""
    monkeypatch.setattr(captured, "LEAST_STEP", 1536)
    chosen = chosen | {"backend": backend, "min_length": 0}
    prefill = rr_flex.CapturedPrefill(512, **chosen)
    shape = Shape(B=1, Hq=4, Hkv=2, Lq=2100, Lk=2100, D=64)
    caches = [on_gpu(shape, layer, torch.bfloat16)[1:] for layer in range(2)]
    for seed, ends in ((2, (512, 1024, 1536, 2048, 2100)), (4, (512, 1024))):
        prompts = [on_gpu(shape, seed + layer, torch.bfloat16) for layer in range(2)]
        for start, end in zip((0, *ends), ends, strict=False):
            for (q, new_k, new_v), (k, v) in zip(prompts, caches, strict=True):
                k[:, :, start:end], v[:, :, start:end] = new_k[:, :, start:end], new_v[:, :, start:end]
                found = prefill(q[:, :, start:end], k, v, start)
                alone = rr_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], **chosen)
                torch.testing.assert_close(found, alone, rtol=0, atol=2e-2)
    assert prefill.calls == {"replayed": 2 * 6, "called": 2}


def test_captured_chunks_in_other_streams_and_after_errors(monkeypatch):
    monkeypatch.setattr(captured, "LEAST_STEP", 1536)
    chosen = {"tau": 0.4, "dense_last_rows": 0, "backend": "triton", "min_length": 0}
    prefill = rr_flex.CapturedPrefill(512, **chosen)
    q, k, v = on_gpu(Shape(B=1, Hq=4, Hkv=2, Lq=2100, Lk=2100, D=64), dtype=torch.bfloat16)
    call = lambda first: prefill(q[:, :, first : first + 512], k, v, first)  # noqa: E731
    alone = [rr_attention(q[:, :, i : i + 512], k[:, :, : i + 512], v[:, :, : i + 512], **chosen) for i in (0, 512)]

    real, calls = captured.attend, []

    def fails_when_captured(*given):
        calls.append(torch.cuda.is_current_stream_capturing())
        if calls[-1]:
            raise torch.OutOfMemoryError("none left")
        return real(*given)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError, match="none left"):
        patch.setattr(captured, "attend", fails_when_captured)
        call(0)
    assert calls == [False, True]
    torch.testing.assert_close(call(0), alone[0], rtol=0, atol=2e-2)
    with (
        pytest.raises(NotImplementedError, match=r"outside of torch.cuda.graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        call(512)

    torch.cuda.synchronize()
    torch.cuda._sleep(10**8)  # so that what follows is queued, and nothing of it has run when another stream begins
    first = call(0).clone()
    with torch.cuda.stream(torch.cuda.Stream()):
        second = call(512)
        prefill.forget()
        others = [torch.full_like(k, torch.nan) for _ in range(8)]  # at the place of what was forgotten
    torch.cuda.synchronize()
    for found, exact in zip((first, second), alone, strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=2e-2)
    assert prefill.calls == {"replayed": 3} and others[0].isnan().all()


def test_the_lookup_of_kept_blocks_is_not_in_the_kernel():
    q, k, v = on_gpu(LONG, dtype=torch.bfloat16)
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    _, code = run_and_get_code(lambda: rr_attention(q, k, v, tau=0.4, backend="triton"))
    assert "is_kept" not in "".join(code)


@pytest.mark.parametrize("backend", ["triton", pytest.param("flash", marks=needs_flash)])
def test_a_density_of_a_batch_over_lengths(backend):
    chosen = {"budget": "density", "target_density": 0.5, "dense_last_rows": 0}
    for length in (1000, 1300, 700):
        q, k, v = on_gpu(Shape(B=3, Hq=4, Hkv=2, Lq=length, Lk=length, D=64), dtype=torch.bfloat16)
        out = rr_attention(q, k, v, backend=backend, **chosen)
        assert_attends(out.cpu(), q.cpu(), k.cpu(), v.cpu(), allowed_pairs(q, k, **chosen))


@pytest.mark.parametrize("backend", ["triton", pytest.param("flash", marks=needs_flash)])
def test_a_warm_call_waits_for_nothing_that_runs(backend):
    """Sparse, with a level a head; a pack of dense prompts, whose lengths are uploaded."""
    q, k, v = on_gpu(Shape(B=1, Hq=4, Hkv=2, Lq=1000, Lk=1000, D=64), dtype=torch.bfloat16)
    sparse = {"tau": [0.3, 0.6, 0.2, 0.5], "backend": backend, "min_length": 0, "dense_last_rows": 0}
    try:
        for _ in range(2):
            rr_attention(q, k, v, **sparse)
            rr_flex.rr_attention_packed(q, k, v, [300, 500, 200], backend=backend, min_length=1 << 20)
            torch.cuda.set_sync_debug_mode("error")  # the second time
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_takes_a_level_a_head_that_no_call_had_before():
    q, k, v = on_gpu(Shape(B=1, Hq=4, Hkv=2, Lq=1000, Lk=1000, D=64), dtype=torch.bfloat16)
    chosen = {"sink_blocks": 0, "dense_last_rows": 0}
    call = lambda levels: rr_attention(q, k, v, tau=levels, backend="triton", **chosen)  # noqa: E731
    other = call([0.9] * 4)
    for levels, seen in (([0.3, 0.6, 0.2, 0.5], False), ([0.2, 0.7, 0.3, 0.4], True)):
        before = call(levels) if seen else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(levels)
        graph.replay()
        after = call(levels)
        assert torch.equal(out, after) and not torch.equal(out, other)
        assert before is None or torch.equal(before, after)
        assert_attends(*(x.cpu() for x in (out, q, k, v)), allowed_pairs(q, k, tau=levels, **chosen))


def test_threads_that_meet_new_shapes_while_one_compiles():
    cases = [(on_gpu(LONG), None), (on_gpu(LONG._replace(Lq=644, Lk=900)), None), (on_gpu(LONG), 200)]
    mask = lambda window: {} if window is None else {"mask_mod": sliding_window(window)}  # noqa: E731

    def work(case):
        if case is None:
            number = random.random()
            return torch.compile(lambda x: x.sin() * number, dynamic=False)(torch.ones(7, device="cuda"))
        qkv, window = case
        return rr_attention(*qkv, tau=0.3, **mask(window))

    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(work, [*cases, None, *cases, None, *cases]))
    for out, case in zip([out for out in outs if out.ndim == 4], cases * 3, strict=True):
        qkv, window = case
        q, k, v = (x.cpu() for x in qkv)
        kept = select_blocks(q, k, tau=0.3, **mask(window)).kept
        offset, sizes = k.shape[2] - q.shape[2], (*q.shape[:3], k.shape[2])
        shown = oracle.pairs(causal(offset), *sizes)
        if window is not None:
            shown = shown & oracle.pairs(sliding_window(window, offset), *sizes)
        assert_attends(out.cpu(), q, k, v, shown & oracle.expand(kept, sizes[2:], (128, 128)))


def test_contexts_change_nothing():
    q, k, v = on_gpu(LONG, dtype=torch.bfloat16)
    chosen = {"tau": 0.5, "backend": "triton"}
    exact = rr_attention(q, k, v, **chosen)
    contexts = [torch.no_grad(), torch.inference_mode(), torch.autocast("cuda", torch.bfloat16)]
    for context in (*contexts, torch.device("cpu"), torch.device("cuda"), torch.device("meta")):
        with context:
            assert torch.equal(rr_attention(q, k, v, **chosen), exact)
    with torch.autocast("cuda", torch.bfloat16):  # norms leave float32 queries beside values in half precision
        assert torch.equal(rr_attention(q.float(), k.float(), v, **chosen), exact)
    with torch.no_grad():
        out = rr_attention(q.clone().requires_grad_(), k, v.clone().requires_grad_(), **chosen)
    assert torch.equal(out, exact) and not out.requires_grad


def test_a_caller_s_compile_over_many_lengths():
    call = torch.compile(lambda q, k, v: rr_attention(q * 1.0, k, v, tau=0.3) * 2)
    q, k, v = on_gpu(Shape(B=1, Hq=4, Hkv=2, Lq=1400, Lk=1400, D=64))
    with torch.no_grad():
        for length in range(200, 1401, 200):
            own = [x[:, :, :length].contiguous() for x in (q, k, v)]
            out = call(*own) / 2
            own = [x.cpu() for x in own]  # in float32 a CPU keeps the same blocks, and compiles nothing
            assert_attends(out.cpu(), *own, allowed_pairs(*own[:2], tau=0.3))


@pytest.mark.parametrize("chosen", [{}, {"preset": "best"}, {"preset": "best", "min_length": 0}])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_caller_s_compiler_that_makes_symbols_of_all_numbers(monkeypatch, backend, chosen):
    """`dynamic=True`: of the head dim too, by which a card's table goes."""
    monkeypatch.undo()
    q, k, v = on_gpu(Shape(B=1, Hq=2, Hkv=1, Lq=1100, Lk=1100, D=64), dtype=torch.bfloat16)
    compiled = torch.compile(
        lambda q, k, v: rr_attention(q, k, v, backend=backend, **chosen), backend="eager", dynamic=True, fullgraph=True
    )
    out = compiled(q, k, v)
    torch.testing.assert_close(out, rr_attention(q, k, v, backend=backend, **chosen), rtol=0, atol=2e-2)


def test_a_caller_s_graph_where_the_costs_of_a_card_decide(monkeypatch):
    monkeypatch.undo()
    for length in (600, 20000):  # dense and sparse
        q, k, v = on_gpu(Shape(B=1, Hq=4, Hkv=2, Lq=length, Lk=length, D=128), dtype=torch.bfloat16)
        chosen = {"tau": 0.5, "backend": "triton"}
        call = torch.compile(lambda q, k, v: rr_attention(q, k, v, **chosen), fullgraph=True, dynamic=False)  # noqa: B023
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dynamo's word on functions that remember
            torch.testing.assert_close(call(q, k, v), rr_attention(q, k, v, **chosen), rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", ["document", "right padding"])
def test_masks_at_other_batch_sizes_and_lengths(name):
    for shape in (LONG._replace(Lq=900, Lk=900), LONG._replace(B=3, Lq=900, Lk=900), LONG._replace(B=3)):
        q, k, v = on_gpu(shape)
        here, there = (mask_by_name(name, shape, device=device)[0] for device in ("cpu", "cuda"))
        chosen = {"causal": False, "tau": 0.5}
        out = rr_attention(q, k, v, mask_mod=there, **chosen)
        q, k, v = (x.cpu() for x in (q, k, v))
        kept = select_blocks(q, k, mask_mod=here, **chosen).kept
        sizes = (shape.Lq, shape.Lk)
        shown = oracle.pairs(here, shape.B, shape.Hq, *sizes) & oracle.expand(kept, sizes, (128, 128))
        assert_attends(out.cpu(), q, k, v, shown)


@needs_flash
def test_flash_by_name_is_flash_on_a_short_call_too(monkeypatch):
    q, k, v = on_gpu(Shape(B=2, Hq=4, Hkv=2, Lq=300, Lk=300, D=64), dtype=torch.bfloat16)
    rr_attention(q, k, v, min_length=301, backend="flash")  # its check
    real, taken = dense._flash_attention, []
    monkeypatch.setattr(dense, "_flash_attention", lambda *call: taken.append(call) or real(*call))
    out = rr_attention(q, k, v, min_length=301, backend="flash")
    assert len(taken) == 1
    assert_attends(*(x.cpu() for x in (out, q, k, v)), oracle.pairs(causal(), 2, 4, 300, 300))
    monkeypatch.setattr(dense, "_right", {})
    monkeypatch.setattr(dense, "_flash_attention", lambda *call: torch.zeros_like(call[0]))
    with pytest.raises(RuntimeError, match=r"^backend must be 'auto' or 'triton' for a dense call here, got 'flash'"):
        rr_attention(q, k, v, min_length=301, backend="flash")


def test_wide_heads_at_order_2_have_their_mass_in_strips_and_few_graphs(monkeypatch):
    monkeypatch.setattr(mass, "STRIP_ELEMENTS", 1 << 13)
    chosen = {"tau": 0.5, "order": 2, "sink_blocks": 0, "dense_last_rows": 0}
    graphs = []
    for length in (700, 900, 1100, 1300, 1500):
        q, k, v = on_gpu(Shape(B=1, Hq=2, Hkv=1, Lq=length, Lk=length, D=256), dtype=torch.bfloat16)
        before = attention.calls["mass in strips"]
        out = rr_attention(q, k, v, **chosen)
        assert attention.calls["mass in strips"] == before + 1
        assert_attends(*(x.cpu() for x in (out, q, k, v)), allowed_pairs(q, k, **chosen))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[2] == graphs[-1]


def test_a_caller_s_kernel_reads_no_map_of_kept_blocks():
    """So none overflows its int32 index."""
    q, k, v = on_gpu(LONG, dtype=torch.bfloat16)
    block_mask = create_rr_block_mask(q, k, tau=0.5)
    exact = compiled_flex(q, k, v, block_mask=block_mask, enable_gqa=True)
    block_mask.mask_mod.kept.zero_()
    assert torch.equal(compiled_flex(q, k, v, block_mask=block_mask, enable_gqa=True), exact)


@pytest.mark.parametrize("dense_last_rows", [0, 1])
@pytest.mark.parametrize("backend", ["triton", "flash"])
def test_few_rows_of_many_blocks(backend, dense_last_rows):
    """Past 8,192 blocks of keys inductor shares a row's running sum among programs (runtime/mends.py)."""
    L = 8300 * 128
    q, k, v = on_gpu(Shape(B=1, Hq=2, Hkv=1, Lq=128, Lk=L, D=64), dtype=torch.bfloat16)
    q = q * 8  # a mean over a million keys would be 0, whichever they are
    chosen = {"tau": 0.5, "dense_last_rows": dense_last_rows, "min_length": 0}
    kept = select_blocks(q, k, **chosen).kept
    assert bool(kept.all()) == bool(dense_last_rows)
    out = rr_attention(q, k, v, backend=backend, **chosen)
    visible = torch.arange(L, device="cuda") <= torch.arange(L - 128, L, device="cuda")[:, None]
    visible = visible & kept[:, :, 0].repeat_interleave(128, -1)[:, :, None]
    weight = (q.float() @ k.float().mT / 8).masked_fill(~visible, -torch.inf).softmax(-1)
    torch.testing.assert_close(out.float(), weight @ v.float(), rtol=0, atol=2e-2)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 40e9, reason="needs 40 GB"
)
def test_a_block_mask_of_more_than_two_to_the_31_entries():
    """33 heads of 1,048,576 tokens; each row attends to its own block and to one before it, another for each head."""
    H, n, L = 33, 8192, 1 << 20
    rows, head = torch.arange(n, device="cuda"), torch.arange(H, device="cuda")[:, None]
    before = rows * (head + 3) // 40  # of row 0: itself
    kept = torch.zeros(1, H, n, n, dtype=torch.bool, device="cuda")
    kept[0, head, rows, rows] = True
    kept[0, head, rows, before] = True
    lists = []
    for entries in (rows.expand(H, n), before):
        indices = torch.zeros(1, H, n, n, dtype=torch.int32, device="cuda")
        indices[0, :, :, 0] = entries
        lists += [torch.ones(1, H, n, dtype=torch.int32, device="cuda"), indices]
    lists[2][0] = before < rows
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, x, L, 16, generator=g, device="cuda", dtype=torch.bfloat16) for x in (H, 1, 1))

    def attend(heads):
        mask_mod = KeptMask(kept[:, heads], causal(), (128, 128))
        block_mask = BlockMask.from_kv_blocks(
            *(x[:, heads] for x in lists), mask_mod=mask_mod, seq_lengths=(L, L), compute_q_blocks=False
        )
        return compiled_flex(q[:, heads], k, v, block_mask=block_mask, enable_gqa=True)

    last = attend(slice(H - 1, H))
    torch._dynamo.reset()
    torch.testing.assert_close(attend(slice(0, H))[:, -1:], last, rtol=0, atol=2e-2)
    assert kept.numel() > 2**31 and last.isfinite().all()
