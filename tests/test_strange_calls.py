"""What a stranger tries: odd tensors, modes and contexts. Each is refused by name before anything runs, or changes
nothing."""

import importlib
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.fx.experimental._config as fx_config
from cases import FREE, Shape, tensors
from sources import imports_of
from torch._dynamo import config as dynamo_config
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from mask_mods import padding, sliding_window
from rr_flex import RRConfig, attention, level, mass, rr_attention, select_blocks
from rr_flex.kernels import flash
from rr_flex.level import level_per_head
from rr_flex.runtime import private
from rr_flex.selection import largest_by_bits

Q, K, V = tensors(Shape(B=1, Lq=64, Lk=64))
PRIVATE = Path(private.__file__)


class Own(torch.Tensor):
    pass


NESTED = torch.nested.nested_tensor([torch.zeros(3, 16), torch.zeros(5, 16)], layout=torch.jagged)
TENSORS = [
    (Q.to("meta"), "q must have values, got a tensor on the meta device"),
    (Q.to_sparse(), "q must be a dense tensor, got layout torch.sparse_coo"),
    (NESTED, "q must be a dense tensor, got layout torch.jagged, nested"),
    (Q.as_subclass(Own), "q must be a plain tensor, got Own"),
    (torch.complex(Q, Q).conj().imag, "q must be a plain tensor, got a view that negates another"),
]


@pytest.mark.parametrize(("q", "words"), TENSORS, ids=[words for _, words in TENSORS])
def test_tensors_of_another_kind_are_refused_by_name(q, words):
    for call in (lambda: select_blocks(q, K), lambda: rr_attention(q, K, V)):
        with pytest.raises(TypeError) as raised:
            call()
        assert str(raised.value).startswith(words)


def test_a_derivative_that_would_be_lost_is_refused():
    with forward_ad.dual_level(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch imports for it is deprecated
        for call in (lambda q: select_blocks(q, K), lambda q: rr_attention(q, K, V)):
            with pytest.raises(TypeError, match=r"^q must be a plain tensor, got a dual one"):
                call(forward_ad.make_dual(Q, Q))


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"scale": 1e300}, "scale must be positive and finite in float32, got 1e"),
        ({"scale": 1e-300}, "scale must be positive and finite in float32, got 1e-300"),
        ({"softcap": 1e-300}, "softcap must be positive and finite in float32, got 1e-300"),
        ({"causal": torch.zeros(2000)}, "causal must be True or False, got a tensor torch.float32 (2000,)"),
        ({"sinks": torch.full((4,), torch.nan)}, "sinks must be numbers below infinity, got nan"),
        ({"return_density": "yes"}, "return_density must be True or False, got 'yes'"),
        ({"causal": "False"}, "causal must be True or False, got 'False'"),
        ({"q_offset": torch.tensor(-1)}, "q_offset must be an int from 0 to 64, got -1"),
        ({"head_offset": torch.tensor(2**40)}, "head_offset must be an int from 0 to 2147483647, got 1099511627776"),
        ({"tau": torch.ones(4, device="meta")}, "tau must be a dense tensor with values, got torch.strided on meta"),
        ({"tau": torch.ones(4).to_sparse()}, "tau must be a dense tensor with values, got torch.sparse_coo on cpu"),
        ({"stride": None}, "stride must be an int, got None"),
    ],
)
def test_values_that_would_pass_unnoticed_are_refused(chosen, words):
    with pytest.raises((ValueError, TypeError)) as raised:
        rr_attention(Q, K, V, **chosen)
    assert str(raised.value).startswith(words)


def uncompiled(**chosen):
    """rr_attention by its eager meaning, which is quick and goes the same way through checks and steps."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's word that eager flex_attention stores all scores
        return rr_attention(chosen.pop("q", Q), K, chosen.pop("v", V), tau=0.5, block_size=64, **FREE, **chosen)


@pytest.mark.parametrize("mode", [lambda: FlopCounterMode(display=False), FakeTensorMode])
def test_modes_that_see_every_operation_are_refused_and_leave_nothing_behind(mode):
    exact = uncompiled()
    with mode(), pytest.raises(NotImplementedError, match=r"^rr_flex must be called outside of modes"):
        rr_attention(Q, K, V)
    with pytest.raises(TypeError, match=r"^q must be a plain tensor, got one inside torch.func or vmap"):
        torch.vmap(lambda q: rr_attention(q, K, V))(Q[None])
    assert torch.equal(uncompiled(), exact)


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.device("cpu"),
        lambda: torch.device("meta"),
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", enabled=False),
    ],
)
def test_contexts_change_nothing(context):
    exact = uncompiled(mask_mod=sliding_window(40))
    with context():
        assert torch.equal(uncompiled(mask_mod=sliding_window(40)), exact)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_tensors_that_require_grad_are_taken_where_none_is_asked_for(context):
    with context():
        out = uncompiled(q=Q.clone().requires_grad_(), v=V.clone().requires_grad_())
    assert torch.equal(out, uncompiled()) and not out.requires_grad


def test_what_a_mask_raises_comes_out_of_attention_as_it_is():
    def mine(b, h, q_idx, kv_idx):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        rr_attention(Q, K, V, mask_mod=mine)


def test_heads_and_tokens_that_look_exchanged_warn():
    with pytest.warns(UserWarning, match=r"^q must be \[B, heads, tokens, D\], got 640 heads of 8 tokens"):
        select_blocks(torch.zeros(1, 640, 8, 16), torch.zeros(1, 640, 8, 16))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_padding_holds_never_reaches_real_rows(bad):
    k, v = K.clone(), V.clone()
    exact = uncompiled(mask_mod=padding(torch.tensor([40])))
    k[:, :, 40:], v[:, :, 40:] = bad, bad
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = {"tau": 0.5, "block_size": 64, **FREE}
        out = rr_attention(Q, k, v, mask_mod=padding(torch.tensor([40])), **chosen)
    assert torch.equal(out, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_searched_by_bits_as_float32_is(dtype):
    some = torch.rand(5, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    need = (0.5 * some.float().sum(-1, keepdim=True)).to(dtype)
    assert torch.equal(largest_by_bits(some, need), largest_by_bits(some.float(), need.float()))


def test_mass_in_strips_is_counted_and_the_same(monkeypatch):
    exact, before = uncompiled(return_density=True), attention.calls["mass in strips"]
    monkeypatch.setattr(mass, "STRIP_ELEMENTS", 1)
    torch.testing.assert_close(uncompiled(return_density=True), exact)
    assert attention.calls["mass in strips"] == before + 1


def test_memory_that_a_self_check_lacked_is_not_remembered(monkeypatch):
    def lacks(*_):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(flash, "_checks", {})
    monkeypatch.setattr(flash, "_run_check", lacks)
    found = flash.check_flash(torch.device("cuda", 0), 64, 64, torch.bfloat16)
    assert "ran out of memory" in found.refused and not flash._checks


SETTINGS = [(dynamo_config, name) for name in ("recompile_limit", "specialize_int", "disable")]
SETTINGS.append((fx_config, "use_duck_shape"))


def private_parts() -> list[tuple[str, str]]:
    """(module, name) of all that runtime/private.py imports from torch, by its text."""
    return [(module, name) for module, name in imports_of(PRIVATE) if module.startswith("torch")]


def call_all_of_private():
    """Every function of runtime/private.py, read anew: each gives what it has, or says which part is not there."""
    spec = importlib.util.spec_from_file_location("private_anew", PRIVATE)
    module, given = importlib.util.module_from_spec(spec), {"compiler_settings": (True, True)}
    given["is_inside_functorch"] = (torch.zeros(1),)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        return [str(error)]
    said = []
    for name, function in vars(module).items():
        if name[0] != "_" and getattr(function, "__module__", "") == "private_anew":
            try:
                function(*given.get(name, ()))
            except ImportError as error:
                said.append(str(error))
    return said


@pytest.mark.parametrize(("module", "name"), [*private_parts(), *SETTINGS], ids=lambda part: str(part)[-40:])
def test_a_private_part_that_moved_is_named_with_the_versions_that_were_tested(module, name, monkeypatch):
    """Or is done without. (What torch itself then lacks is not asked here.)"""
    if isinstance(module, str):
        if f"{module}.{name}" in sys.modules:
            monkeypatch.setitem(sys.modules, f"{module}.{name}", None)
        monkeypatch.delattr(importlib.import_module(module), name)
    else:
        monkeypatch.delitem(module._config, name)
    for words in call_all_of_private():
        assert words.startswith("torch must have torch.") and name in words, words
        assert f"tested with torch {private.TESTED}" in words


def test_no_private_part_is_missing():
    assert not call_all_of_private()


def test_levels_are_the_same_where_nothing_may_be_uploaded(monkeypatch):
    """As while a CUDA graph is captured."""
    levels = [0.2, 0.9, 0.4, 0.7]
    exact = level_per_head(RRConfig(tau=levels), 4, torch.device("cpu"))
    assert level_per_head(RRConfig(tau=levels), 4, torch.device("cpu")) is exact  # uploaded once

    def captured(*_):
        raise level._Capturing

    monkeypatch.setattr(level, "_kept_level", captured)
    assert torch.equal(level_per_head(RRConfig(tau=levels), 4, torch.device("cpu")), exact)
    assert torch.equal(level_per_head(RRConfig(tau=0.5), 4, torch.device("cpu")), torch.full((4,), 0.5))
