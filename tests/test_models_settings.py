"""What enable() and register() take: settings by layer and head, and every argument that nothing would read."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from model_families import SETTINGS, logits, make

from rr_flex import RRConfig
from rr_flex.models import enable, register, report
from rr_flex.models.choices import Choices, make_plan
from rr_flex.models.layer_call import heads_of
from rr_flex.models.layer_plan import Plan, plan_of
from rr_flex.profiles import load_profile


@pytest.fixture(scope="module")
def llama():
    return make("llama")


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
    register(sliding_layers="dense")  # all are replaced, also by what are the defaults
    found = plan_of(torch.nn.Identity())
    assert (found.backend, found.sliding_layers, found.default) == ("auto", "dense", RRConfig())
    register()
    assert plan_of(torch.nn.Identity()).sliding_layers == "select"


def test_enabled_shows_what_it_does(llama):
    with enable(llama, tau=[0.3, 0.4], dense_layers=[1], order=2) as on:
        assert repr(on) == (
            "Enabled(LlamaForCausalLM, on: tau=0.95; 1 layers set apart, 1 dense; 0 calls sparse; 0 dense)"
        )
    assert "LlamaForCausalLM, restored" in repr(on)
    with enable(llama, budget="threshold", threshold=[0.1] * 4) as on:
        assert "on: threshold=(0.1, 0.1, 0.1, 0.1); 0 calls" in repr(on)


def test_levels_by_head_are_split_as_the_heads_are():
    """Each process of tensor parallelism holds two of the four heads."""

    class Mesh:
        def get_local_rank(self):
            return 1

    module = torch.nn.Module()
    module.config = hf.LlamaConfig(num_attention_heads=4)
    module.q_proj = torch.nn.Linear(1, 1)
    module.q_proj.weight.device_mesh = Mesh()
    assert heads_of(module, 4) is None and heads_of(module, 2) == range(2, 4)
    for config in (
        RRConfig(tau=(0.1, 0.2, 0.3, 0.4)),
        RRConfig(budget="threshold", threshold=(0.1, 0.2, 0.3, 0.4)),
    ):
        plan = Plan(config)
        assert plan.of_heads(0, range(2, 4), 64).level == (0.3, 0.4) and plan.of_heads(0, None, 64) is config
    plan = Plan(config)
    with ThreadPoolExecutor(8) as threads:
        local = list(threads.map(lambda _: plan.of_heads(0, range(2, 4), 64), range(200)))
    assert len({id(config) for config in local}) == 1
    config = RRConfig(tau=0.5)
    assert Plan(config).of_heads(0, range(2, 4), 64) is config


def planned(n_layers, **choices):
    return make_plan(n_layers, Choices(**choices))


def test_a_plan_names_settings_by_layer():
    base = RRConfig(order=2)
    profile = {1: RRConfig(tau=0.5, block_size=64), 2: None}
    plan = planned(3, config=base, profile=profile, dense_last_tokens=129)
    assert plan.config(0) == base.with_settings({"dense_last_rows": 2})
    # The tokens count in every layer, in rows of its own size.
    assert plan.config(1) == profile[1].with_settings({"dense_last_rows": 3}) and plan.config(2) is None
    plan = planned(3, tau={2: 0.5}, dense_layers=[1])
    assert [plan.config(layer) and plan.config(layer).tau for layer in range(3)] == [0.95, None, 0.5]
    assert planned(2, tau=0.5, settings={"order": 2}).config(1) == RRConfig(tau=0.5, order=2)
    shipped = load_profile("smollm2-135m-instruct")
    assert planned(30, profile=shipped).layers == planned(30, profile="smollm2-135m-instruct").layers


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"config": RRConfig(), "settings": {"preset": "best"}}, "preset must not be given beside a config"),
        ({"tau": 0.1, "settings": {"preset": "best"}}, "tau must not be given beside budget='scaled_threshold'"),
        ({"tau": [0.1, 0.2], "settings": {"budget": "threshold"}}, "tau must not be given beside budget='threshold'"),
        ({"tau": 0.1, "config": RRConfig(budget="threshold")}, "tau must not be given beside budget='threshold'"),
        ({"settings": {"threshold": 0.1}}, "threshold must not be given beside budget='top_tau'"),
        ({"dense_last_tokens": 9, "settings": {"dense_last_rows": 2}}, "dense_last_tokens must not stand beside"),
        (
            {"tau": {1: 0.5}, "profile": {1: RRConfig()}},
            r"tau must name layers that profile does not, got .* \[1\]",
        ),
        ({"config": RRConfig(), "profile": [RRConfig(), None]}, "config must be left out beside a profile of every"),
        ({"tau": 0.5, "profile": [RRConfig(), None]}, "tau must be left out beside a profile of every layer"),
        ({"settings": {"min_length": 0}, "profile": [RRConfig()] * 2}, "min_length must be left out beside a profile"),
    ],
)
def test_what_nothing_would_read_is_refused(choices, says):
    with pytest.raises(ValueError, match=says):
        planned(2, **choices)


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
