"""Kernel options fit the mask's blocks, and a compiled call never falls back to eager, which would be dense."""

import sys
from types import ModuleType

import pytest
import torch

from rr_flex import registry
from rr_flex.kernels import options as options_module
from rr_flex.kernels.options import TUNED, attention_options, estimate_options, read_cards
from rr_flex.runtime import private
from rr_flex.runtime.compiling import compile_whole
from rr_flex.runtime.private import RECOMPILE_LIMIT


def elsewhere(head_dim):
    """Queries on a device that is neither the CPU nor a card in the table."""
    return torch.empty(1, 1, 1, head_dim, device="meta")


def test_the_cpu_kernel_has_no_options():
    assert attention_options(torch.empty(1, 1, 1, 64), (64, 64)) == {}


@pytest.mark.parametrize("block_size", [(128, 128), (128, 64), (64, 128), (64, 64)])
def test_tiles_divide_the_blocks(block_size):
    options = attention_options(elsewhere(64), block_size)
    for size, names in zip(block_size, (("BLOCK_M", "BLOCK_M2"), ("BLOCK_N", "BLOCK_N1")), strict=True):
        for name in names:
            assert size % options.get(name, 128) == 0


def test_an_unknown_card_gets_the_compiler_s_defaults():
    assert estimate_options(elsewhere(128)) == {"FORCE_USE_FLEX_ATTENTION": True}


def test_the_table_names_cards_head_dims_and_dtypes():
    for card, by_head_dim in TUNED.items():
        assert card == "cpu" or len([int(number) for number in card.split(".")]) == 2
        for head_dim, by_dtype in by_head_dim.items():
            assert int(head_dim) > 0
            for dtype, entry in by_dtype.items():
                assert isinstance(getattr(torch, dtype), torch.dtype)
                assert set(entry) <= {"attention", "costs", "estimate", "estimate_columns", "min_length"}


def test_a_file_of_cards_joins_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(options_module, "TUNED", {"9.0": {"128": {"bfloat16": {"min_length": 1}}}})
    path = tmp_path / "cards.json"
    path.write_text('{"9.0": {"128": {"float16": {"min_length": 2}}}, "8.6": {"64": {"float16": {}}}}')
    read_cards(path)
    assert options_module.TUNED["9.0"]["128"] == {"bfloat16": {"min_length": 1}, "float16": {"min_length": 2}}
    assert options_module.TUNED["8.6"] == {"64": {"float16": {}}}
    for text in ("{", "[]", '{"9.0": 3}', '{"9.0": {"128": {"float16": 3}}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"^path must hold card"):
            read_cards(path)


def test_past_the_limit_a_call_raises(monkeypatch):
    monkeypatch.setattr(private, "RECOMPILE_LIMIT", 2)
    scaled = compile_whole(lambda x, factors: x * len(factors))
    x = torch.ones(3)
    assert scaled(x, [1]).sum() == 3 and scaled(x, [1, 2]).sum() == 6
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        scaled(x, [1, 2, 3])


@pytest.mark.parametrize("fails", [False, True])
def test_the_compiler_s_settings_are_as_they_were_after_a_call(fails):
    config = torch._dynamo.config
    before = config.recompile_limit, config.specialize_int
    during = []

    def plain(x):
        if fails:
            raise ValueError("x")
        return x + 1

    def backend(graph, example):
        during.append((config.recompile_limit, config.specialize_int))
        return graph

    with pytest.MonkeyPatch.context() as patch:
        compiler = torch.compile
        patch.setattr(
            torch, "compile", lambda *args, **kwargs: compiler(*args, **kwargs | {"backend": backend, "options": None})
        )
        call = compile_whole(plain)
    try:
        call(torch.ones(3))
    except torch._dynamo.exc.Unsupported:
        assert fails
    assert (config.recompile_limit, config.specialize_int) == before
    assert during == ([] if fails else [(RECOMPILE_LIMIT, True)])


USERS_MODULE = """
WIDTH = 3

def near(q_idx, kv_idx):
    return q_idx - kv_idx < WIDTH

def mask(q_idx, kv_idx):
    return near(q_idx, kv_idx)
"""


def test_what_a_user_may_replace_is_compiled_anew(monkeypatch):
    users = ModuleType("users_masks")
    exec(USERS_MODULE, users.__dict__)
    monkeypatch.setitem(sys.modules, "users_masks", users)
    monkeypatch.setitem(registry.ESTIMATORS, "users", registry.Estimator(lambda x: 2 * x, ()))
    index = torch.arange(6)

    def function(mask, index):
        return mask(index, 0), registry.ESTIMATORS["users"].estimate(index)

    call = compile_whole(function)
    shown, scaled = call(users.mask, index)
    assert shown.sum() == 3 and scaled[1] == 2
    users.WIDTH = 4
    assert call(users.mask, index)[0].sum() == 4
    users.near = lambda q_idx, kv_idx: q_idx < 1
    assert call(users.mask, index)[0].sum() == 1
    registry.estimator("users", reads=())(lambda x: 5 * x)
    assert call(users.mask, index)[1][1] == 5
