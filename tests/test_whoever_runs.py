"""The answer is the same whoever runs the graph: compiled kernel, eager mode, other backends, exports, threads."""

import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import oracle
import pytest
import torch
from cases import FREE, Shape, tensors
from torch._dynamo.utils import counters

from mask_mods import sliding_window
from rr_flex import RRConfig, create_rr_block_mask, rr_attention, select_blocks
from rr_flex.kernels.options import tuned_for
from rr_flex.runtime.tracing import traced

pytestmark = pytest.mark.usefixtures("one_graph_a_shape")
SHAPE = Shape(B=1, Lq=520, Lk=520)
CHOSEN = {"tau": 0.3, **FREE}


def exact(q, k, v, **chosen):
    """Attention in float64 over what is kept."""
    chosen = CHOSEN | chosen
    kept = select_blocks(q, k, **chosen).kept
    L = q.shape[2]
    shown = oracle.pairs(oracle.causal_element(0), *q.shape[:2], L, L)
    if "mask_mod" in chosen:
        shown = shown & oracle.pairs(chosen["mask_mod"], *q.shape[:2], L, L)
    assert kept.float().mean() < 0.6  # what is dense would be seen
    return oracle.attend(q, k, v, shown & oracle.expand(kept, (L, L), (128, 128)))[0]


def assert_exact(out, q, k, v, **chosen):
    torch.testing.assert_close(out.double(), exact(q, k, v, **chosen), rtol=0, atol=1e-5)


def call(q, k, v):
    out, density = rr_attention(q, k, v, return_density=True, **CHOSEN)
    return out, density


class Module(torch.nn.Module):
    def forward(self, q, k, v):
        return call(q, k, v)


@pytest.fixture(autouse=True)
def eager_flex_may_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's word that eager flex_attention stores all scores
        yield


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_caller_s_compiler(backend):
    q, k, v = tensors(SHAPE)
    out, density = torch.compile(call, backend=backend)(q, k, v)
    assert_exact(out, q, k, v)
    torch.testing.assert_close(density, select_blocks(q, k, **CHOSEN).density)


def test_a_caller_s_compiler_at_any_length_and_beside_other_operations():
    """torch's CPU kernel takes none of them into itself, and names no length."""

    def called(q, k, v):
        out, density = call(q * 1.0, k, v)
        return out * 2, density

    compiled, before = torch.compile(called), counters["stats"]["unique_graphs"]
    for length in (520, 390, 700):
        q, k, v = tensors(SHAPE._replace(Lq=length, Lk=length))
        for x in (q, k, v):
            torch._dynamo.mark_dynamic(x, 2)
        out, density = compiled(q, k, v)
        assert_exact(out / 2, q, k, v)
        torch.testing.assert_close(density, select_blocks(q, k, **CHOSEN).density)
    assert counters["stats"]["unique_graphs"] == before + 1


def test_a_caller_s_compiler_that_makes_symbols_of_all_numbers():
    """`dynamic=True`: of a preset's and a configuration's too."""
    config = RRConfig.from_preset("best")

    def called(q, k, v):
        return select_blocks(q, k, preset="best").kept, rr_attention(q, k, v, config=config)

    q, k, v = tensors(SHAPE)
    kept, out = torch.compile(called, backend="eager", dynamic=True, fullgraph=True)(q, k, v)
    assert torch.equal(kept, select_blocks(q, k, preset="best").kept)
    torch.testing.assert_close(out, rr_attention(q, k, v, config=config), rtol=0, atol=1e-5)


def test_a_card_s_table_where_the_head_dim_is_a_symbol():
    def called(x):
        return x * (2 if tuned_for("9.0", x.shape[-1], torch.bfloat16) else 3)

    compiled = torch.compile(called, backend="eager", dynamic=True, fullgraph=True)
    assert [compiled(torch.ones(2, D)).mean().item() for D in (128, 64, 48)] == [2, 2, 3]


def test_eager_that_is_forced():
    q, k, v = tensors(SHAPE)
    with torch.compiler.set_stance("force_eager"):
        out, _ = call(q, k, v)
    assert_exact(out, q, k, v)


def test_a_compiler_that_is_off():
    """As by TORCH_COMPILE_DISABLE=1, under which flex_attention fails too."""
    q, k, v = tensors(SHAPE)
    with torch._dynamo.config.patch(disable=True), pytest.raises(RuntimeError, match=r"^torch's compiler must be on"):
        call(q, k, v)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program(strict):
    q, k, v = tensors(SHAPE)
    program = torch.export.export(Module(), (q, k, v), strict=strict)
    out, _ = program.module()(q, k, v)
    assert_exact(out, q, k, v)


def test_a_block_mask_of_the_caller_s_own_call():
    q, k, v = tensors(SHAPE)
    block_mask = create_rr_block_mask(q, k, **CHOSEN)
    flex = torch.nn.attention.flex_attention.flex_attention
    for run in (flex, torch.compile(flex, backend="aot_eager", fullgraph=True)):
        assert_exact(run(q, k, v, block_mask=block_mask, enable_gqa=True), q, k, v)


def test_another_thread_that_compiles():
    """torch.compiler.is_compiling() is true for every thread while one compiles."""
    q, k, v = tensors(SHAPE)
    rr_attention(q, k, v, **CHOSEN)
    inside, done = threading.Event(), threading.Event()

    def backend(graph, example):
        inside.set()
        assert done.wait(60)
        return graph

    def compile_something():
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))

    other = threading.Thread(target=compile_something)
    other.start()
    try:
        assert inside.wait(60)
        assert not traced()
        out = rr_attention(q, k, v, **CHOSEN)
        selection = select_blocks(q, k, **CHOSEN)
    finally:
        done.set()
        other.join()
    assert_exact(out, q, k, v)
    assert torch.equal(selection.kept, select_blocks(q, k, **CHOSEN).kept)


def test_threads_that_meet_new_shapes_together():
    cases = [(tensors(SHAPE._replace(Lq=L, Lk=L), L), window) for L, window in ((390, None), (390, 177), (520, 177))]

    def run(case):
        qkv, window = case
        return rr_attention(*qkv, **CHOSEN, **({} if window is None else {"mask_mod": sliding_window(window)}))

    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(run, cases * 3))
    for out, (qkv, window) in zip(outs, cases * 3, strict=True):
        assert_exact(out, *qkv, **({} if window is None else {"mask_mod": sliding_window(window)}))


FIRST_OF_A_PROCESS = """
import warnings
import torch
from rr_flex import rr_attention
q, k, v = torch.randn(1, 2, 300, 16), torch.randn(1, 1, 300, 16), torch.randn(1, 1, 300, 16)
call = torch.compile(lambda q, k, v: rr_attention(q, k, v, tau=0.5), backend="eager", fullgraph=True)
warnings.simplefilter("error", UserWarning)
print(tuple(call(q, k, v).shape))
"""


def test_the_first_call_of_a_process_may_be_a_caller_s_graph():
    """Nothing is left for it to import or to enter, which no graph can hold, and nothing to warn of."""
    run = subprocess.run([sys.executable, "-c", FIRST_OF_A_PROCESS], capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "(1, 2, 300, 16)", run.stderr
