"""A pack gives what each of its prompts gives alone, whatever it is packed with."""

import sys
import types
import warnings

import pytest
import torch
from cases import FREE, Shape, tensors
from torch.nn import functional as F

from rr_flex import attention, rr_attention, rr_attention_packed
from rr_flex.kernels import dense

LENGTHS, KEYS = [300, 1, 129, 210], [300, 70, 385, 300]
SPARSE = {"tau": 0.3, **FREE}


def packed(lengths, keys):
    return tensors(Shape(B=1, Lq=sum(lengths), Lk=sum(keys)), seed=4)


def one_by_one(q, k, v, lengths, keys, **options):
    prompts = zip(q.split(lengths, 2), k.split(keys, 2), v.split(keys, 2), strict=True)
    return torch.cat([rr_attention(*prompt, **options) for prompt in prompts], 2)


@pytest.mark.parametrize("keys", [LENGTHS, KEYS], ids=["whole prompts", "chunks"])
def test_a_pack_is_each_prompt_alone(keys):
    """Dense ones together, sparse ones by themselves; with sinks and a soft cap too."""
    q, k, v = packed(LENGTHS, keys)
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's word that eager flex_attention stores all scores
        sinks = {"sinks": torch.tensor([1.0, 0.5, 2.0, 0.0]), "softcap": 3.0}
        for own in ({}, {"min_length": 0}, {"min_length": 250}, {"min_length": 250, "causal": False}, sinks):
            options = SPARSE | own
            expected = one_by_one(q, k, v, LENGTHS, keys, **options)
            before = attention.calls.copy()
            out = rr_attention_packed(q, k, v, LENGTHS, key_lengths=keys, **options)
            assert torch.equal(out, expected)
            ran = attention.calls - before
            short = sum(length < options["min_length"] for length in keys)
            assert (ran["dense"], ran["cpu"]) == (short, 4 - short)
    # As it is called: these are short.
    before = attention.calls["dense"]
    out = rr_attention_packed(q, k, v, LENGTHS, key_lengths=keys, tau=0.3)
    assert attention.calls["dense"] - before == 4
    assert torch.equal(out, one_by_one(q, k, v, LENGTHS, keys, tau=0.3))


def test_dense_prompts_go_through_one_call_of_flash_attention_4(monkeypatch):
    def flash_attn_varlen_func(*tensors, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale):
        calls.append((cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), max_seqlen_q, max_seqlen_k))
        q, k, v = (x.transpose(0, 1)[None] for x in tensors)  # of tokens H D
        lengths, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        settings = {"min_length": 10**6, "causal": causal, "scale": softmax_scale}
        return one_by_one(q, k, v, lengths, keys, **settings)[0].transpose(0, 1)

    calls = []
    installed = types.ModuleType("flash_attn.cute.interface")
    installed.flash_attn_varlen_func = flash_attn_varlen_func
    for name in ("flash_attn", "flash_attn.cute", installed.__name__):
        monkeypatch.setitem(sys.modules, name, installed)
    q, k, v = packed(LENGTHS, KEYS)
    expected = rr_attention_packed(q, k, v, LENGTHS, key_lengths=KEYS, scale=0.3)
    monkeypatch.setattr(dense, "_may_serve", lambda q: True)
    monkeypatch.setattr(dense, "SHORTEST_FLASH", sum(KEYS))
    monkeypatch.setattr(dense, "_right", {})
    torch.testing.assert_close(rr_attention_packed(q, k, v, LENGTHS, key_lengths=KEYS, scale=0.3), expected)
    assert list(dense._right.values()) == [True] and len(calls) >= 2
    assert calls[-1] == ([0, 300, 301, 430, 640], [0, 300, 370, 755, 1055], 300, 385)
    # One that is wrong is not taken.
    monkeypatch.setattr(installed, "flash_attn_varlen_func", lambda *tensors, **_: tensors[0] + 1)
    monkeypatch.setattr(dense, "_right", {})
    assert torch.equal(rr_attention_packed(q, k, v, LENGTHS, key_lengths=KEYS, scale=0.3), expected)


def test_gradients_and_bad_lengths():
    q, k, v = packed([3, 4], [3, 4])
    for lengths, keys, error, message in (
        ([3, 5], None, ValueError, r"^lengths must be at least 1 and sum to q's 7 tokens, got \[3, 5\]"),
        ([7, 0], None, ValueError, r"^lengths must be at least 1"),
        ([], None, ValueError, r"^lengths must be at least 1"),
        ([3, 4], [7], ValueError, r"^key_lengths must be as many as lengths, 2, got 1"),
        ([3, 4], [4, 3], ValueError, r"^key_lengths must be at least lengths, got 3 for 4"),
        (torch.tensor([3, 4]), None, TypeError, r"^lengths must be a sequence of ints"),
        ([3.0, 4], None, TypeError, r"^lengths must be a sequence of ints"),
        (None, None, TypeError, r"^lengths must be a sequence of ints, got None"),
        ([3, 4], 7, TypeError, r"^key_lengths must be a sequence of ints, got 7"),
    ):
        with pytest.raises(error, match=message):
            rr_attention_packed(q, k, v, lengths, key_lengths=keys)
    with pytest.raises(ValueError, match=r"^q must be a batch of one for packed prompts, got 2"):
        rr_attention_packed(*(x.expand(2, -1, -1, -1) for x in (q, k, v)), [3, 4])
    with pytest.raises(TypeError, match="settings must be"):
        rr_attention_packed(q, k, v, [3, 4], mask_mod=None)
    with pytest.raises(NotImplementedError, match=r"must not require grad on the CPU"):
        rr_attention_packed(q.clone().requires_grad_(), k, v, [3, 4])
    assert F.mse_loss(rr_attention_packed(q, k, v, (3, 4)), one_by_one(q, k, v, [3, 4], [3, 4])) == 0
