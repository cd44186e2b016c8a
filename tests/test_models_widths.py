"""Queries, keys and values of unequal widths and dtypes."""

from unittest.mock import patch

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from model_families import IDS, SETTINGS, SHAPE, logits, make

from rr_flex.attention import answer
from rr_flex.models import enable, forward

MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
MLA |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
MLA |= {"first_k_dense_replace": 1}


def test_values_narrower_than_queries():
    """Multi-head latent attention: D = 48, Dv = 32."""
    torch.manual_seed(0)
    config = hf.DeepseekV3Config(**(SHAPE | {"head_dim": None, "num_key_value_heads": 4}), **MLA)
    model = hf.DeepseekV3ForCausalLM(config).eval()
    dense = logits(model)
    with enable(model, tau=1.0, **SETTINGS) as on:
        torch.testing.assert_close(logits(model), dense, atol=2e-3, rtol=1e-3)
    assert on.report().sparse == 2


@torch.no_grad()
def test_autocast_is_what_it_is_to_sdpa():
    """Norms leave q and k in float32 beside a v in bfloat16."""
    model = make("qwen3", num_hidden_layers=1)
    ids = IDS[:1, :192]
    exact = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        dense = logits(model, ids)
        with enable(model, **SETTINGS | {"min_length": 1000}):
            assert torch.equal(logits(model, ids), dense)
        seen = []
        with enable(model, tau=1.0, **SETTINGS) as on, patch.object(forward, "answer", seeing(seen)):
            whole = logits(model, ids)
    assert on.report().sparse == 1 and seen == [(torch.bfloat16, False)]
    error = (whole.float() - exact).abs().max()
    assert error <= 2 * (dense.float() - exact).abs().max()


def seeing(seen):
    def attention(q, k, v, asked, **options):
        assert q.dtype == k.dtype == v.dtype
        seen.append((q.dtype, torch.is_autocast_enabled("cpu")))
        return answer(q, k, v, asked, **options)

    return attention
