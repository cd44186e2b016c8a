"""An enabled model whoever runs its graph: torch.compile, other backends, force_eager, export, another thread."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from model_families import IDS, SETTINGS, logits, make, with_cache

from rr_flex.models import enable


@torch.no_grad()
def test_a_compiled_model():
    """Prefill breaks its graph at each attention, and is counted; a one-token step compiles whole."""
    llama = make("llama", num_hidden_layers=1)
    dense = logits(llama)
    with enable(llama, tau=1.0, **SETTINGS) as on:
        compiled = torch.compile(llama, dynamic=False)
        torch.testing.assert_close(logits(compiled), dense, atol=1e-3, rtol=1e-3)
        assert on.report().sparse == 1

    def prefill_and_step(step):
        cache = with_cache(llama, hf.StaticCache(config=llama.config, max_cache_len=330))
        llama(IDS[:1], **cache)
        return step(IDS[1:2, :1], **cache, position_ids=torch.tensor([[320]])).logits

    expected = prefill_and_step(llama)
    with enable(llama, tau=1.0, **SETTINGS) as on:
        stepped = prefill_and_step(torch.compile(llama, fullgraph=True, dynamic=False))
    torch.testing.assert_close(stepped, expected, atol=1e-3, rtol=1e-3)
    assert on.report().sparse == 1 and not on.report().dense
