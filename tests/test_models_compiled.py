"""An enabled model means the same whoever runs its graph: torch.compile, force_eager, export, while others compile."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from model_families import IDS, SETTINGS, logits, make, with_cache
from test_models_threads import another_thread_that_compiles

from rr_flex.models import enable

SPARSE = {"tau": 0.3, **SETTINGS}
# torch's word that it stores all scores
eager_flex_may_warn = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(scope="module")
def llama():
    return make("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def outputs(llama):
    """(dense, sparse) logits, which are well apart."""
    with enable(llama, **SPARSE) as on:
        sparse = logits(llama)
    dense = logits(llama)
    assert on.report().sparse == 1 and on.report().density < 1 and (sparse - dense).abs().max() > 1e-2
    return dense, sparse


def compiled_by_eager(model):
    return torch.compile(model, backend="eager", dynamic=False)


def compiled_by_inductor(model):
    return torch.compile(model, dynamic=False)


@pytest.mark.parametrize("compiled", [compiled_by_eager, compiled_by_inductor])
def test_a_caller_s_graph_breaks_at_prefill(llama, outputs, compiled):
    with enable(llama, **SPARSE) as on:
        found = logits(compiled(llama))
    torch.testing.assert_close(found, outputs[1], atol=1e-4, rtol=1e-4)
    assert on.report().sparse == 1 and on.report().density < 1


@eager_flex_may_warn
def test_forced_eager(llama, outputs):
    with enable(llama, **SPARSE) as on, torch.compiler.set_stance("force_eager"):
        found = logits(llama)
    torch.testing.assert_close(found, outputs[1], atol=1e-4, rtol=1e-4)
    assert on.report().sparse == 1 and on.report().density < 1


def test_while_another_thread_compiles(llama, outputs):
    with enable(llama, **SPARSE) as on, another_thread_that_compiles():
        assert torch.compiler.is_compiling()
        found = logits(llama)
    torch.testing.assert_close(found, outputs[1], atol=1e-4, rtol=1e-4)
    assert on.report().sparse == 1 and on.report().density < 1


def exported(model):
    return torch.export.export(model, (), {"input_ids": IDS[:1], "use_cache": False}, strict=False).module()


@eager_flex_may_warn
@torch.no_grad()
def test_exported(llama, outputs):
    """The program is as sparse as the model; its calls are not counted."""
    with enable(llama, **SPARSE) as on:
        program = exported(llama)
    found = program(input_ids=IDS[:1], use_cache=False).logits
    torch.testing.assert_close(found, outputs[1], atol=1e-4, rtol=1e-4)
    assert not on.report().layers


def test_a_program_that_is_exported_dense_says_why(llama, outputs):
    with enable(llama, **SPARSE) as on:
        program = exported(llama)
    found = program(input_ids=IDS[:1], use_cache=False).logits
    torch.testing.assert_close(found, outputs[0], atol=1e-4, rtol=1e-4)
    assert dict(on.report().dense) == {"gradient on the CPU": 1} and not on.report().sparse


@torch.no_grad()
def test_a_step_compiles_whole(llama):
    """Of one token; the prefill before it is counted, the step is not."""
    torch._dynamo.reset()  # the model's frames, which the tests above have compiled in pieces

    def prefill_and_step(step):
        cache = with_cache(llama, hf.StaticCache(config=llama.config, max_cache_len=330))
        llama(IDS[:1], **cache)
        return step(IDS[1:2, :1], **cache, position_ids=torch.tensor([[320]])).logits

    expected = prefill_and_step(llama)
    with enable(llama, tau=1.0, **SETTINGS) as on:
        stepped = prefill_and_step(torch.compile(llama, fullgraph=True, dynamic=False))
    torch.testing.assert_close(stepped, expected, atol=1e-3, rtol=1e-3)
    assert on.report().sparse == 1 and not on.report().dense
