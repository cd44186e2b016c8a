"""The hook into transformers' attention: what goes in is what the model would have attended to."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from rr_flex.evaluation.prefill import dense_attention, mask_of
from rr_flex.models.attention_by import attention_by, refuse_all_but_plain_prefill

SHAPE = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.randint(50, (1, 150), generator=torch.Generator().manual_seed(0))


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def windowed():
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=20)).eval()


def dense(q, k, v, *, layer, scale, window):
    return dense_attention(q, k, v, scale, mask_of(window))


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, windowed])
def test_dense_attention_through_the_hook_is_the_models_own(make):
    model = make()
    own = model(IDS, use_cache=False).logits
    seen = []

    def attend(q, k, v, *, layer, scale, window):
        seen.append((layer, window))
        return dense(q, k, v, layer=layer, scale=scale, window=window)

    with attention_by(model, attend):
        hooked = model(IDS, use_cache=False).logits
    torch.testing.assert_close(hooked, own, atol=1e-5, rtol=1e-5)
    window = getattr(model.config, "sliding_window", None)
    assert seen == [(0, window), (1, window)]


@torch.no_grad()
def test_the_model_gets_its_attention_back():
    model = llama()
    before, own = model.config._attn_implementation, model(IDS).logits
    with pytest.raises(RuntimeError, match="stop"), attention_by(model, dense):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == before
    torch.testing.assert_close(model(IDS).logits, own)


@torch.no_grad()
def test_what_the_hook_does_not_do_it_refuses():
    model = llama()
    padded = torch.ones_like(IDS)
    padded[0, :10] = 0
    with attention_by(model, dense), pytest.raises(NotImplementedError, match="one unpadded prefill without a cache"):
        model(IDS, attention_mask=padded)
    with pytest.raises(NotImplementedError, match="50 queries and 150 keys"):
        refuse_all_but_plain_prefill(1, q_length=50, kv_length=150, q_offset=100)
