"""enable(), restore and report on a tiny llama: what is sparse, what stays dense and why.

Lengths change here, in one process: the second compiles for any length, the third compiles nothing.
"""

import contextlib
import copy
import json
import re
import subprocess
import sys

import oracle
import pytest
import torch
from cases import Shape, assert_attends, no_compile, tensors

pytest.importorskip("transformers")

import transformers as hf
from model_families import IDS, SETTINGS, generate, logits, make, with_cache

import rr_flex
from rr_flex import rr_attention, select_blocks
from rr_flex.models import enable, report
from rr_flex.models.layer_plan import ATTRIBUTE


@pytest.fixture(scope="module")
def llama():
    return make("llama")


def test_sparse_differs_and_is_counted(llama):
    dense = logits(llama)
    with enable(llama, tau=0.3, **SETTINGS) as on:
        sparse = logits(llama)
        generate(llama)
    assert (sparse - dense).abs().max() > 1e-2
    found = on.report()
    assert {layer: (r.sparse, dict(r.dense)) for layer, r in found.layers.items()} == {
        0: (2, {"decode": 2}),
        1: (2, {"decode": 2}),
    }
    assert 0 < found.density < 1 and found.sparse == 4 and found.dense["decode"] == 4
    assert json.loads(json.dumps(found.as_dict()))["layers"]["1"]["density"] == found.layers[1].density
    assert str(found).splitlines()[1].split()[:2] == ["0", "2"]
    on.reset()
    assert on.report().layers == {}


def test_restores_what_was_there(llama):
    before = llama.config._attn_implementation, logits(llama)
    outer = enable(llama, tau=0.3, **SETTINGS)
    inside = logits(llama)
    with pytest.raises(RuntimeError, match="stop"), enable(llama, tau=1.0, **SETTINGS):
        raise RuntimeError("stop")
    torch.testing.assert_close(logits(llama), inside)  # the outer settings are back
    assert outer.report().sparse == 4
    outer.restore()
    outer.restore()
    assert llama.config._attn_implementation == before[0]
    torch.testing.assert_close(logits(llama), before[1], atol=0, rtol=0)
    assert not [module for module in llama.modules() if hasattr(module, ATTRIBUTE)]


def test_importing_registers_nothing():
    assert rr_flex.enable is enable
    program = "import rr_flex.models, transformers; print('rr_flex' in transformers.AttentionInterface())"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"


def test_chunked_prefill_keeps_what_one_shot_keeps(llama):
    """At chunks of a multiple of the block size, with no dense last rows."""
    with enable(llama, tau=0.4, **SETTINGS) as on:
        one_shot = generate(llama)
        whole = on.report().sparse
        on.reset()
        chunked = generate(llama, prefill_chunk_size=192)
        assert on.report().sparse == 2 * whole
    assert torch.equal(one_shot[0], chunked[0])
    torch.testing.assert_close(one_shot[1], chunked[1], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_the_third_length_compiles_nothing():
    """Settings and heads are the model's, whose calls above have compiled the graph for any length already."""
    chosen = {"tau": 0.5, **SETTINGS}
    for number, (Lq, Lk) in enumerate([(300, 300), (256, 384), (124, 700), (513, 513)]):
        shape = Shape(B=1, Lq=Lq, Lk=Lk, D=32)
        q, k, v = tensors(shape)
        with no_compile() if number > 1 else contextlib.nullcontext():
            out, _ = rr_attention(q, k, v, scale=32**-0.5, return_density=True, **chosen)
        shown = oracle.pairs(oracle.causal_element(Lk - Lq), *shape[:2], Lq, Lk)
        kept = oracle.expand(select_blocks(q, k, **chosen).kept, (Lq, Lk), (64, 64))
        assert_attends(out, q, k, v, shown & kept)


def test_layers_have_their_own_settings(llama):
    with enable(llama, tau=[1.0, 0.3], **SETTINGS) as on:
        logits(llama)
    densities = [on.report().layers[layer].density for layer in (0, 1)]
    assert densities[0] == 1 and densities[1] < 1
    with enable(llama, tau=0.3, dense_layers=1, **SETTINGS) as on:
        logits(llama)
    assert dict(on.report().layers[0].dense) == {"layer set to dense": 1} and on.report().layers[1].sparse == 1
    with enable(llama, tau=0.3, dense_last_tokens=320, block_size=64) as on:
        logits(llama)
    assert on.report().dense["all rows are dense last rows"] == 2


def test_what_stays_dense_says_why(llama):
    own = torch.ones(1, 1, 320, 320, dtype=torch.bool).tril()
    holes = torch.ones(1, 320, dtype=torch.long)
    holes[0, 5:9] = 0
    cases = [({"attention_mask": own}, "a mask of the model's own"), ({"attention_mask": holes}, "padding between")]
    for options, reason in cases:
        dense = logits(llama, **options)
        with enable(llama, tau=0.3, **SETTINGS) as on:
            torch.testing.assert_close(logits(llama, **options), dense)
        assert [name for name in on.report().dense if reason in name] and not on.report().sparse
    with enable(llama, tau=0.3, **SETTINGS) as on:
        llama(IDS[:1], use_cache=False).logits.sum().backward()
    llama.zero_grad()
    assert dict(on.report().dense) == {"gradient on the CPU": 2}
    with enable(llama, tau=0.3, **SETTINGS | {"min_length": 321}) as on:
        logits(llama)
    assert dict(on.report().dense) == {"shorter than min_length": 2}
    with enable(llama, tau=0.3, block_size=64) as on:  # as the CPU's costs say of so few tokens
        sparse_or_not = logits(llama)
    torch.testing.assert_close(sparse_or_not, logits(llama))
    found = on.report()
    assert dict(found.dense) == {"dense is faster": 2} and not found.sparse
    assert re.search(r"dense is faster: 1 × 320 queries and 320 keys: dense [\d.]+ ms, sparse", str(found))
    model = make("mistral")
    with enable(model, tau=0.3, sliding_layers="dense", **SETTINGS) as on:
        logits(model)
    assert dict(on.report().dense) == {"sliding layer set to dense": 2}
    model = make("llama", attention_dropout=0.5).train()
    with torch.no_grad(), enable(model, **SETTINGS) as on:
        logits(model)
    assert dict(on.report().dense) == {"dropout": 2}


def test_a_copy_of_an_enabled_model_works(llama):
    with enable(llama, tau=0.3, **SETTINGS):
        expected = logits(llama)
        copied = copy.deepcopy(llama)
    torch.testing.assert_close(logits(copied), expected, atol=0, rtol=0)
    assert report(copied).sparse == 4 and report(llama).layers == {}


@torch.no_grad()
def test_a_prefix_in_a_static_cache(llama):
    """The cache's length is a tensor that the first layer's update moves on, before any attention reads it."""
    dense = logits(llama)
    cache = with_cache(llama, hf.StaticCache(config=llama.config, max_cache_len=330))
    with enable(llama, tau=1.0, **SETTINGS) as on:
        llama(IDS[:1, :192], **cache)
        positions = torch.arange(192, 320)[None]
        rest = llama(IDS[:1, 192:], **cache, position_ids=positions).logits
    assert on.report().sparse == 4
    torch.testing.assert_close(rest, dense[:, 192:], atol=1e-3, rtol=1e-3)


def test_a_device_map_with_layers_on_disk(llama, tmp_path):
    """accelerate's hooks move every argument of a layer to its device, the mask among them."""
    accelerate = pytest.importorskip("accelerate")
    dense = logits(llama)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = accelerate.dispatch_model(copy.deepcopy(llama), places, offload_dir=tmp_path, main_device="cpu")
    with enable(model, tau=1.0, **SETTINGS) as on:
        torch.testing.assert_close(logits(model), dense, atol=1e-3, rtol=1e-3)
    assert on.report().sparse == 2
