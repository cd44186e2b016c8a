"""A table of bad arguments: each is refused by name, "<argument> must <rule>, got <value>"."""

import math
import re

import pytest
import torch
from cases import Shape, tensors

from mask_mods import causal, padding
from rr_flex import RRConfig, create_rr_block_mask, rr_attention, select_blocks

SMALL = Shape(Lq=64, Lk=64)


def zeros(*sizes, **options):
    return torch.zeros(*sizes, **options)


def refused(argument):
    """The argument (or one of several) starts the message, which states the rule and the value."""
    return re.compile(rf"^({argument})\b.* must .+, got .+", re.DOTALL)


BAD_SETTINGS = [
    ("stride", {"stride": 0}, ValueError),
    ("stride", {"stride": -8}, ValueError),
    ("stride", {"stride": 8.0}, TypeError),
    ("block_size|stride", {"stride": 7}, ValueError),
    ("block_size|stride|query_stride", {"query_stride": 48}, ValueError),
    ("block_size|stride|key_stride", {"key_stride": 128, "block_size": (128, 64)}, ValueError),
    ("block_size", {"block_size": 100, "stride": 4}, ValueError),
    ("block_size", {"block_size": 0}, ValueError),
    ("block_size", {"block_size": (128, 100), "stride": 4}, ValueError),
    ("block_size", {"block_size": (128, 128, 128)}, ValueError),
    ("tau", {"tau": 0}, ValueError),
    ("tau", {"tau": 0.0}, ValueError),
    ("tau", {"tau": -1}, ValueError),
    ("tau", {"tau": 1.5}, ValueError),
    ("tau", {"tau": math.nan}, ValueError),
    ("tau", {"tau": [0.5, 0.5, 0.5, 1.5]}, ValueError),
    ("tau", {"tau": [0.5, 0.5, 0.5, math.nan]}, ValueError),
    ("tau", {"tau": torch.tensor([0.5, 0.0, 0.5, 0.5])}, ValueError),
    ("tau", {"tau": "most"}, TypeError),
    ("order", {"order": 0}, ValueError),
    ("order", {"order": 3}, ValueError),
    ("variance_weight", {"variance_weight": 0.0}, ValueError),
    ("budget", {"budget": "unknown"}, ValueError),
    ("budget", {"budget": ["top_tau"]}, ValueError),
    ("pool", {"pool": ["keys"]}, ValueError),
    ("mandatory", {"mandatory": "unknown"}, ValueError),
    ("threshold", {"budget": "threshold", "threshold": -0.1}, ValueError),
    ("threshold", {"budget": "threshold", "threshold": math.nan}, ValueError),
    ("sink_blocks", {"sink_blocks": -1}, ValueError),
    ("local_blocks", {"local_blocks": -1}, ValueError),
    ("dense_last_rows", {"dense_last_rows": -1}, ValueError),
]


@pytest.mark.parametrize(("argument", "chosen", "error"), BAD_SETTINGS)
def test_a_bad_setting_dies_at_construction(argument, chosen, error):
    with pytest.raises(error, match=refused(argument)):
        RRConfig(**chosen)


@pytest.mark.parametrize(("argument", "chosen", "error"), BAD_SETTINGS)
def test_a_bad_setting_is_refused_by_the_call(argument, chosen, error):
    q, k, _ = tensors(SMALL)
    with pytest.raises(error, match=refused(argument)):
        select_blocks(q, k, **chosen)


BAD_CALLS = [
    ("tau", {"tau": [0.5, 0.5, 0.5]}, ValueError),
    ("tau", {"tau": torch.full((5,), 0.5)}, ValueError),
    ("q_offset", {"q_offset": -1}, ValueError),
    ("head_offset", {"head_offset": 2**63}, ValueError),
    ("q_offset", {"q_offset": 65}, ValueError),  # the first query would stand past the end of the 64 keys
    ("q_offset", {"q_offset": 2**70}, ValueError),
    ("q_offset", {"q_offset": 1.5}, TypeError),
    ("q_offset", {"q_offset": "end"}, TypeError),
    ("q_offset", {"q_offset": torch.zeros((), dtype=torch.int64, device="meta")}, TypeError),
    ("head_offset", {"head_offset": torch.zeros((), dtype=torch.int64, device="meta")}, TypeError),
    ("head_offset", {"head_offset": -1}, ValueError),
    ("head_offset", {"head_offset": 0.5}, TypeError),
    ("config", {"config": {"tau": 0.5}}, TypeError),
    ("mask_mod", {"mask_mod": torch.ones(64, 64).bool()}, TypeError),
]


@pytest.mark.parametrize("call", [select_blocks, create_rr_block_mask])
@pytest.mark.parametrize(("argument", "chosen", "error"), BAD_CALLS)
def test_a_bad_argument_is_refused(call, argument, chosen, error):
    q, k, _ = tensors(SMALL)
    with pytest.raises(error, match=refused(argument)):
        call(q, k, **chosen)


@pytest.mark.parametrize(("argument", "chosen", "error"), BAD_CALLS)
def test_attention_refuses_the_same_arguments(argument, chosen, error):
    with pytest.raises(error, match=refused(argument)):
        rr_attention(*tensors(SMALL), **chosen)


good = zeros(1, 2, 64, 16)
BAD_TENSORS = [
    ("q", zeros(2, 64, 16), good, ValueError),
    ("k", good, zeros(2, 64, 16), ValueError),
    ("q", zeros(1, 1, 2, 64, 16), good, ValueError),
    ("q|k|Hq", zeros(1, 3, 64, 16), good, ValueError),
    ("q|k|Hq", zeros(1, 2, 64, 16), zeros(1, 4, 64, 16), ValueError),
    ("q|k", zeros(1, 2, 64, 8), good, ValueError),
    ("q|k", zeros(2, 2, 64, 16), good, ValueError),
    ("q", zeros(1, 2, 0, 16), good, ValueError),
    ("k", good, zeros(1, 2, 0, 16), ValueError),
    ("q|k", zeros(1, 2, 64, 0), zeros(1, 2, 64, 0), ValueError),
    ("q", zeros(1, 2, 64, 16, dtype=torch.int64), good, TypeError),
    ("q", zeros(1, 2, 64, 16, dtype=torch.int64), zeros(1, 2, 64, 16, dtype=torch.int64), TypeError),
    ("q|k", good, good.bfloat16(), TypeError),
    ("q|k", good, zeros(1, 2, 64, 16, device="meta"), ValueError),
    ("q", [[1.0]], good, TypeError),
    ("k", good, None, TypeError),
]


@pytest.mark.parametrize("call", [select_blocks, create_rr_block_mask])
@pytest.mark.parametrize(("argument", "q", "k", "error"), BAD_TENSORS)
def test_a_bad_tensor_is_refused(call, argument, q, k, error):
    with pytest.raises(error, match=refused(argument)):
        call(q, k)


@pytest.mark.parametrize(("argument", "q", "k", "error"), BAD_TENSORS)
def test_attention_refuses_the_same_tensors(argument, q, k, error):
    with pytest.raises(error, match=refused(f"{argument}|v")):
        rr_attention(q, k, k)


@pytest.mark.parametrize(
    ("v", "error"),
    [
        (zeros(2, 64, 16), ValueError),
        (zeros(1, 2, 63, 16), ValueError),
        (zeros(1, 1, 64, 16), ValueError),
        (zeros(2, 2, 64, 16), ValueError),
        (good.bfloat16(), TypeError),
        (good.long(), TypeError),
        (zeros(1, 2, 64, 16, device="meta"), ValueError),
        (None, TypeError),
    ],
)
def test_bad_values_are_refused(v, error):
    with pytest.raises(error, match=refused("v")):
        rr_attention(good, good, v)


@pytest.mark.parametrize("call", [select_blocks, create_rr_block_mask])
def test_an_unknown_setting_is_refused(call):
    with pytest.raises(TypeError, match="taw"):
        call(good, good, taw=0.5)
    with pytest.raises(TypeError, match="taw"):
        rr_attention(good, good, good, taw=0.5)
    with pytest.raises(TypeError, match="taw"):
        RRConfig(taw=0.5)


def test_a_config_is_frozen():
    with pytest.raises(AttributeError):
        RRConfig().tau = 0.5


@pytest.mark.parametrize("which", range(3))
def test_a_cpu_has_no_backward(which):
    inputs = [good.clone() for _ in range(3)]
    inputs[which].requires_grad_()
    with pytest.raises(NotImplementedError, match="grad"):
        rr_attention(*inputs)


@pytest.mark.parametrize(
    ("sinks", "error", "rule"),
    [
        (0.5, TypeError, "floating-point tensor"),
        (torch.zeros(2, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(3), ValueError, "one logit a query head"),
        (torch.zeros(2, 1), ValueError, "one logit a query head"),
        (torch.zeros(2, device="meta"), ValueError, "q's device"),
    ],
)
def test_bad_sinks(sinks, error, rule):
    with pytest.raises(error, match=f"^sinks must .*{rule}"):
        rr_attention(good, good, good, sinks=sinks)


def test_a_cpu_has_no_log_sum_exp():
    with pytest.raises(NotImplementedError, match="return_lse"):
        rr_attention(good, good, good, return_lse=True)


def test_mask_mods_are_taken_by_every_call():
    """The table above refuses for the right reason: the same calls with good arguments go through."""
    for call in (select_blocks, create_rr_block_mask):
        call(good, good, mask_mod=causal(), q_offset=0, head_offset=0, tau=[0.5, 1.0])


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("threshold", {"threshold": 0.5}),
        ("target_density", {"target_density": 0.5}),
        ("tau", {"preset": "best", "tau": 0.1}),
        ("tau", {"budget": "density", "tau": 0.95}),
        ("mandatory", {"budget": "threshold", "mandatory": "add"}),
        ("query_pool", {"query_pool": 64}),
        ("key_stride", {"pool": "queries", "key_stride": 16}),
        ("stride", {"pool": "queries", "stride": 16}),
        ("stride", {"stride": 16, "query_stride": 8, "key_stride": 8}),
        ("variance_weight", {"variance_weight": 0.25}),
    ],
)
def test_a_setting_that_no_rule_reads_is_refused_and_the_rule_is_named(name, chosen):
    with pytest.raises(ValueError, match=rf"^{name} must not be given"):
        select_blocks(good, good, **chosen)


def test_a_preset_stands_beside_no_config():
    with pytest.raises(ValueError, match=r"^preset must not be given beside a config"):
        select_blocks(good, good, config=RRConfig(tau=0.5), preset="best")
    # Where a rule is replaced, its number goes with it.
    assert RRConfig(tau=0.5).with_settings({"budget": "threshold"}) == RRConfig(budget="threshold")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.bool])
def test_integers_that_would_wrap_are_refused(dtype):
    few = torch.tensor([1], dtype=dtype)
    with pytest.raises(TypeError, match=r"^lengths must be an integer tensor \(int32, int64\)"):
        padding(few)
    with pytest.raises(TypeError, match=r"^offset must be an integer tensor \(int32, int64\)"):
        causal(few[0])
    with pytest.raises(TypeError, match=r"^q_offset must be an int or a 0-dim integer tensor \(int32, int64\)"):
        select_blocks(good, good, q_offset=few[0])


def test_a_wrong_state_is_refused_where_the_call_is_dense_too():
    for call in (select_blocks, lambda *tensors, **chosen: rr_attention(*tensors, good, **chosen)):
        with pytest.raises(TypeError, match=r"^state must be a PrefillState, got int"):
            call(good, good, state=5, min_length=9999)


@pytest.mark.parametrize("preset", ["rr", "best"])
def test_autocast_takes_tensors_in_its_dtype(preset):
    q, k = (torch.randn(1, 2, 256, 16, generator=torch.Generator().manual_seed(seed)).half() for seed in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        found = select_blocks(q, k, preset=preset)
    assert torch.equal(found.mass, select_blocks(q.bfloat16(), k.bfloat16(), preset=preset).mass)
