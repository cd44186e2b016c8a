"""SmolLM2-135M under rr_flex: real weights, in float32 and bfloat16, and quantised by torchao."""

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from rr_flex.models import enable
from rr_flex.models.loading import embedded_gguf, load_causal_lm, tokenize
from rr_flex.tasks.ruler import prose

try:
    embedded_gguf()
except FileNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

SETTINGS = {"block_size": 64, "dense_last_rows": 0, "min_length": 0}


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load_causal_lm()
    return model, tokenizer, tokenize(tokenizer, prose(), 320)


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits[0].float()


def loss(logits, ids):
    return F.cross_entropy(logits[:-1], ids[0, 1:]).item()


def generate(model, ids):
    return model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))[0, -6:]


def test_real_weights(loaded):
    model, _, ids = loaded
    dense, continuation = logits(model, ids), generate(model, ids)
    with enable(model, tau=1.0, **SETTINGS):
        torch.testing.assert_close(logits(model, ids), dense, atol=2e-3, rtol=1e-3)
        assert torch.equal(generate(model, ids), continuation)
    with enable(model, tau=0.95, **SETTINGS) as on:
        sparse = logits(model, ids)
    log_p, log_q = dense.log_softmax(-1), sparse.log_softmax(-1)
    assert (log_p.exp() * (log_p - log_q)).sum(-1).mean() < 0.02
    assert on.report().density < 0.95 and len(on.report().layers) == 30


CONFIGS = ["Int8DynamicActivationInt8WeightConfig", "Int8WeightOnlyConfig", "Float8WeightOnlyConfig"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_quantised_by_torchao(loaded, name):
    quantization = pytest.importorskip("torchao.quantization")
    float_loss = loss(logits(loaded[0], loaded[2]), loaded[2])
    model, tokenizer, ids = copy.deepcopy(loaded[0]), *loaded[1:]
    quantization.quantize_(model, getattr(quantization, name)())
    dense, continuation = logits(model, ids), generate(model, ids)
    with enable(model, tau=1.0, **SETTINGS):
        # Quantised activations turn the kernels' last bits into whole steps of 1/127: near ties fall otherwise, and the
        # loss moved by 0.020 where it was measured.
        dynamic = "DynamicActivation" in name
        assert dynamic or torch.equal(generate(model, ids), continuation)
        assert abs(loss(logits(model, ids), ids) - loss(dense, ids)) < (0.05 if dynamic else 0.001)
    with enable(model, tau=0.95, **SETTINGS) as on:
        sparse = logits(model, ids)
        text = tokenizer.decode(generate(model, ids))
    assert on.report().sparse == 60 and on.report().density < 0.95
    assert abs(loss(sparse, ids) - loss(dense, ids)) < 0.05 and loss(sparse, ids) < float_loss + 0.15
    assert text.strip()


def test_bfloat16(loaded):
    model = loaded[0].to(torch.bfloat16)
    try:
        dense = logits(model, loaded[2])
        with enable(model, tau=1.0, **SETTINGS) as on:
            whole = logits(model, loaded[2])
        assert on.report().sparse == 30
        assert abs(loss(whole, loaded[2]) - loss(dense, loaded[2])) < 0.01
    finally:
        model.to(torch.float32)
