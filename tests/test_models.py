"""enable(), restore, report and settings on a tiny llama; transformers' masks read as spans.

Lengths change here, in one process: the second compiles for any length, the third compiles nothing.
"""

import contextlib
import copy
import inspect
import json
import subprocess
import sys

import oracle
import pytest
import torch
from cases import Shape, assert_attends, no_compile, tensors

pytest.importorskip("transformers")

import transformers as hf
from model_families import FAMILIES, IDS, SHAPE, generate, make
from transformers import masking_utils

import rr_flex
from mask_mods import SpanMask
from rr_flex import RRConfig, attention, rr_attention, select_blocks
from rr_flex.models import enable, register, report
from rr_flex.models.hf_masks import has_window, is_causal, spans_of
from rr_flex.models.plan import ATTRIBUTE, make_plan, plan_of
from rr_flex.models.prefill_mask import prefill_mask
from rr_flex.models.shards import head_offset_of

MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
MLA |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
MLA |= {"first_k_dense_replace": 1}
SETTINGS = {"block_size": 64, "dense_last_rows": 0}


def logits(model, ids=IDS[:1], **options):
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


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


def test_by_name(llama):
    register(tau=0.3, **SETTINGS)
    named = hf.AutoModelForCausalLM.from_config(copy.deepcopy(llama.config), attn_implementation="rr_flex").eval()
    named.load_state_dict(llama.state_dict())
    with enable(llama, tau=0.3, **SETTINGS):
        expected = logits(llama)
    torch.testing.assert_close(logits(named), expected)
    assert report(named).sparse == 2
    for bad, error, says in (
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"dense_layers": 1}, TypeError, "settings must be preset or fields of RRConfig"),
    ):
        with pytest.raises(error, match=says):
            register(**bad)
    register(backend="triton", dense_last_tokens=130)
    found = plan_of(torch.nn.Identity())
    assert found.backend == "triton" and found.default == RRConfig(dense_last_rows=3)
    register(RRConfig())
    assert plan_of(torch.nn.Identity()).backend == "auto"


def test_levels_by_head_are_split_as_the_heads_are():
    """Each process of tensor parallelism holds two of the four heads."""

    class Mesh:
        def get_local_rank(self):
            return 1

    module = torch.nn.Module()
    module.config = hf.LlamaConfig(num_attention_heads=4)
    module.q_proj = torch.nn.Linear(1, 1)
    module.q_proj.weight.device_mesh = Mesh()
    for config, name in (
        (RRConfig(tau=(0.1, 0.2, 0.3, 0.4)), "tau"),
        (RRConfig(budget="threshold", threshold=(0.1, 0.2, 0.3, 0.4)), "threshold"),
    ):
        offset, local = head_offset_of(module, 2, config)
        assert offset == 2 and getattr(local, name) == (0.3, 0.4)
        assert head_offset_of(module, 4, config) == (0, config)
    assert head_offset_of(module, 2, RRConfig(tau=0.5)) == (2, RRConfig(tau=0.5))


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
    for number, (Lq, Lk) in enumerate([(300, 300), (257, 384), (130, 700), (513, 513)]):
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
    with enable(llama, tau=0.3, dense_last_tokens=320, **SETTINGS) as on:
        logits(llama)
    assert on.report().dense["all rows are dense last rows"] == 2


def test_a_plan_names_settings_by_layer():
    base = RRConfig(order=2)
    plan = make_plan(3, config=base, profile={1: RRConfig(tau=0.5), 2: None}, dense_last_tokens=129)
    assert plan.config(0) == base.with_settings({"dense_last_rows": 2}) and plan.config(1).tau == 0.5
    assert plan.config(2) is None
    assert make_plan(3, tau={2: 0.5}).config(1).tau == 0.95


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"tau": [0.5]}, ValueError, "one value a layer"),
        ({"tau": {7: 0.5}}, ValueError, "layers from 0 to 1"),
        ({"tau": 2.0}, ValueError, "tau must lie"),
        ({"tau": "most"}, TypeError, "one value, a sequence"),
        ({"profile": "no-such-profile"}, FileNotFoundError, "profile must be a .json file or one of smollm2"),
        ({"profile": "smollm2-135m-instruct"}, ValueError, "profile must have the model's 4 query heads, got"),
        ({"profile": 0.5}, TypeError, "profile must map layers"),
        ({"profile": {0: 0.5}}, TypeError, "RRConfig"),
        ({"dense_layers": 3}, ValueError, "dense_layers must"),
        ({"dense_layers": [5]}, ValueError, "dense_layers must"),
        ({"dense_layers": True}, TypeError, "dense_layers must be a number"),
        ({"dense_layers": "all"}, TypeError, "dense_layers must be a number"),
        ({"config": {"tau": 0.5}}, TypeError, "config must be an RRConfig"),
        ({"config": RRConfig(tau=(0.5, 0.6))}, ValueError, r"tau must be .* one a query head \(4\), got 2"),
        ({"tau": {1: (0.5, 0.6, 0.7)}}, ValueError, r"tau must be .* one a query head \(4\), got 3"),
        ({"profile": {1: RRConfig(budget="threshold", threshold=(0.1,))}}, ValueError, "threshold must be one number"),
        ({"dense_last_tokens": -1}, ValueError, "dense_last_tokens must"),
        ({"sliding_layers": "off"}, ValueError, "sliding_layers must"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"no_such": 1}, TypeError, "no_such"),
    ],
)
def test_bad_settings(llama, arguments, error, says):
    with pytest.raises(error, match=says):
        enable(llama, **arguments)
    assert llama.config._attn_implementation != "rr_flex"


def test_bad_models(llama):
    with pytest.raises(TypeError, match="must be a transformers model"):
        enable(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="must be a transformers model"):
        enable("llama")
    bloom = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=8, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(NotImplementedError, match="attention interface"):
        enable(bloom)
    with enable(llama), pytest.raises(ValueError, match="output_attentions must be False"):
        logits(llama, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions must be False in the model's config"):
        enable(make("llama", output_attentions=True, attn_implementation="eager"))


def test_what_stays_dense_says_why(llama, monkeypatch):
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
    with enable(llama, tau=0.3, min_length=321, **SETTINGS) as on:
        logits(llama)
    assert dict(on.report().dense) == {"shorter than min_length": 2}
    monkeypatch.setattr(attention, "break_even", lambda q: 321)
    with enable(llama, tau=0.3, **SETTINGS) as on:
        logits(llama)
    assert dict(on.report().dense) == {"shorter than min_length": 2}
    monkeypatch.undo()
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
def test_a_compiled_model():
    """Prefill breaks its graph at each attention, and is counted; a one-token step compiles whole."""
    llama = make("llama", num_hidden_layers=1)
    dense = logits(llama)
    with enable(llama, tau=1.0, **SETTINGS) as on:
        compiled = torch.compile(llama, dynamic=False)
        torch.testing.assert_close(logits(compiled), dense, atol=1e-3, rtol=1e-3)
        assert on.report().sparse == 1
    name = "cache" if "cache" in inspect.signature(llama.forward).parameters else "past_key_values"

    def prefill_and_step(step):
        cache = {name: hf.StaticCache(config=llama.config, max_cache_len=330)}
        llama(IDS[:1], **cache)
        return step(IDS[1:2, :1], **cache, position_ids=torch.tensor([[320]])).logits

    expected = prefill_and_step(llama)
    with enable(llama, tau=1.0, **SETTINGS) as on:
        stepped = prefill_and_step(torch.compile(llama, fullgraph=True, dynamic=False))
    torch.testing.assert_close(stepped, expected, atol=1e-3, rtol=1e-3)
    assert on.report().sparse == 1 and not on.report().dense


@torch.no_grad()
def test_a_prefix_in_a_static_cache(llama):
    """The cache's length is a tensor that the first layer's update moves on, before any attention reads it."""
    dense = logits(llama)
    name = "cache" if "cache" in inspect.signature(llama.forward).parameters else "past_key_values"
    cache = {name: hf.StaticCache(config=llama.config, max_cache_len=330)}
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


def test_values_narrower_than_queries():
    """Multi-head latent attention: D = 48, Dv = 32."""
    torch.manual_seed(0)
    config = hf.DeepseekV3Config(**(SHAPE | {"head_dim": None, "num_key_value_heads": 4}), **MLA)
    model = hf.DeepseekV3ForCausalLM(config).eval()
    dense = logits(model)
    with enable(model, tau=1.0, **SETTINGS) as on:
        torch.testing.assert_close(logits(model), dense, atol=2e-3, rtol=1e-3)
    assert on.report().sparse == 2


causal = masking_utils.causal_mask_function
sliding = masking_utils.sliding_window_causal_mask_function(5)
ids = torch.tensor([[0] * 6 + [1] * 10, [0] * 11 + [1] * 5])
positions = torch.tensor([[*range(6), *range(10)], [*range(11), *range(5)]])
remapped = masking_utils.remap_positions_for_packed_sequence(sliding, positions)
MASKS = {
    "causal": (causal, True, False),
    "sliding": (sliding, True, True),
    "chunked": (masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 3])), True, False),
    "packed": (masking_utils.and_masks(remapped, masking_utils.packed_sequence_mask_function(ids)), True, True),
    "bidirectional": (masking_utils.bidirectional_mask_function, False, False),
    "band": (masking_utils.sliding_window_bidirectional_mask_function(3), False, True),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("offsets", [(0, 0), (4, 0), (7, 3), (torch.tensor(6), 2)])
def test_masks_are_read_as_they_are(name, offsets):
    function, causes, window = MASKS[name]
    q_offset, kv_offset = (0, 0) if name == "packed" else offsets
    Lq, Lk = (16, 16) if name == "packed" else (9, 13)
    b, h = torch.arange(2).view(2, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.long)
    q, k = torch.arange(Lq).view(1, 1, Lq, 1), torch.arange(Lk).view(1, 1, 1, Lk)
    theirs = function(b, h, q + q_offset, k + kv_offset)
    mask = spans_of(function, q_offset, kv_offset, torch.device("cpu"))
    assert isinstance(mask, SpanMask)
    assert torch.equal(mask(b, h, q, k).expand(2, 1, Lq, Lk), theirs.expand(2, 1, Lq, Lk))
    assert (is_causal(function), has_window(function)) == (causes, window)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("offsets", [(0, 0), (4, 0), (7, 3)])
def test_padded_masks_are_theirs_for_real_queries(window, offsets):
    q_offset, kv_offset = offsets
    Lq, Lk = 9, 13
    real = torch.ones(2, q_offset + Lq, dtype=torch.bool)
    real[0, :6] = False
    real[1, -2:] = False
    function = causal if window is None else masking_utils.sliding_window_causal_mask_function(window)
    arguments = {"q_length": Lq, "kv_length": Lk, "q_offset": q_offset, "kv_offset": kv_offset}
    arguments |= {"mask_function": function, "attention_mask": real, "batch_size": 2}
    mine, reason = prefill_mask(**arguments).spans(torch.device("cpu"))
    theirs = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    b, h = torch.arange(2).view(2, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.long)
    shown = mine(b, h, torch.arange(Lq).view(1, 1, Lq, 1), torch.arange(Lk).view(1, 1, 1, Lk))
    real_queries = real[:, q_offset : q_offset + Lq]
    assert reason is None and torch.equal(shown[:, 0][real_queries], theirs[:, 0][real_queries])
    assert not shown[:, 0][~real_queries].any()


def test_an_unknown_mask_is_not_guessed_at():
    def strange(b, h, q, k):
        return (q + k) % 2 == 0

    either = masking_utils.or_masks(causal, strange)
    assert spans_of(strange, 0, 0, torch.device("cpu")) is None
    assert spans_of(either, 0, 0, torch.device("cpu")) is None and not is_causal(either)


def test_families_are_the_twelve():
    assert len(FAMILIES) == 12 and SHAPE["num_attention_heads"] == 4
