"""The estimate as attention over one-hot values equals the estimate in strips, to rounding."""

import warnings

import pytest
import torch
from cases import FREE, MASKS, Shape, mask_by_name, seeds, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from mask_mods import causal, visible_keys
from rr_flex import mass, select_blocks
from rr_flex.mass import Samples, block_mass
from rr_flex.mass_by_attention import block_mass_by_attention
from rr_flex.sampling import pool_keys, sample_queries

few = settings(max_examples=8)


def both_forms(shape, mask_mod, strides, block_size, head_offset=0, seed=0, valid=None):
    """Eager on both sides: FlexAttention's own eager form, which does return the log-sum-exp on a CPU."""
    q, k, _ = tensors(shape, seed)
    sampled, pooled = sample_queries(q, strides[0], head_offset), pool_keys(k, strides[1], valid)
    facts = {"mask_mod": mask_mod, "seq_lengths": (shape.Lq, shape.Lk), "strides": strides, "block_size": block_size}
    samples = Samples(sampled, pooled, **facts, scale=0.25, head_offset=head_offset, valid_keys=valid)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's word that eager flex_attention stores all scores
        return block_mass(samples), block_mass_by_attention(samples)


@few
@given(seed=seeds, head_offset=st.integers(0, 9), name=st.sampled_from(["causal", *MASKS]))
@pytest.mark.parametrize(
    ("strides", "block_size"), [((8, 8), (128, 128)), ((16, 8), (128, 64)), ((8, 16), (64, 128)), ((8, 4), (128, 64))]
)
def test_both_forms_agree(strides, block_size, name, head_offset, seed):
    shape = Shape(Lq=300, Lk=700)
    mask = causal(400) if name == "causal" else mask_by_name(name, shape, seed)[0]
    valid = visible_keys(mask, shape.B, 1, shape.Lk, "cpu")
    strips, attention = both_forms(shape, mask, strides, block_size, head_offset, seed, valid)
    torch.testing.assert_close(attention, strips, rtol=0, atol=1e-5)


@few
@given(seed=seeds, share=st.floats(0, 1))
@pytest.mark.parametrize(("batches", "heads"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_both_forms_agree_on_any_real_keys(batches, heads, share, seed):
    """Strides with any number of real keys, none among them, that differ by batch and key head."""
    shape = Shape(Lq=300, Lk=700)
    valid = torch.rand(batches, heads, 700, generator=torch.Generator().manual_seed(seed)) < share
    strips, attention = both_forms(shape, causal(400), (8, 8), (128, 64), seed=seed, valid=valid)
    torch.testing.assert_close(attention, strips, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [0, 1])
def test_a_row_s_sum_is_its_sampled_queries_whatever_its_strides_count(form):
    shape = Shape(Lq=250, Lk=1001)
    valid = torch.arange(1001) >= 15
    found = both_forms(shape, causal(751), (8, 8), (128, 128), valid=valid[None, None])[form]
    torch.testing.assert_close(found.sum(-1), torch.tensor([16.0, 16.0]).expand(2, 4, 2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", [0, 1])
def test_nan_stays_in_its_row_and_nothing_visible_is_0(form):
    shape = Shape(Lq=256, Lk=256)
    q, k, _ = tensors(shape)
    q[0, 0, 200] = torch.nan
    facts = {"mask_mod": causal(-100), "seq_lengths": (256, 256), "strides": (8, 8), "block_size": (64, 64)}
    samples = Samples(sample_queries(q, 8), pool_keys(k, 8), **facts, scale=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = (block_mass, block_mass_by_attention)[form](samples)
    assert (found[:, :, 0] == 0).all()
    assert found[0, 0, 3].isnan().all() and found.isnan().sum() == 4


@pytest.mark.parametrize("Lk", [128 * 128, 128 * 128 + 1, 300 * 128])
def test_segments_are_merged_exactly(Lk):
    """More than 128 key blocks: several segments, some of which a row may not see at all."""
    shape = Shape(B=2, Hq=2, Hkv=1, Lq=260, Lk=Lk)
    for offset in (Lk - 260, Lk // 3):
        strips, attention = both_forms(shape, causal(offset), (8, 8), (128, 128))
        torch.testing.assert_close(attention, strips, rtol=0, atol=1e-5)


@few
@given(seed=seeds, strip=st.integers(1, 5000))
def test_the_size_of_a_strip_never_matters(seed, strip):
    q, k, _ = tensors(Shape(Lq=700, Lk=900), seed)
    sampled, pooled = sample_queries(q, 8), pool_keys(k, 8)
    facts = {"mask_mod": causal(200), "seq_lengths": (700, 900), "strides": (8, 8), "block_size": (128, 64)}
    samples = Samples(sampled, pooled, **facts, scale=0.25)
    whole = block_mass(samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mass, "STRIP_ELEMENTS", strip)
        torch.testing.assert_close(block_mass(samples), whole, rtol=0, atol=1e-5)


def test_strips_are_of_few_graphs_for_any_lengths(monkeypatch):
    """As on a GPU, where a strip is compiled: no length is a constant of it."""
    torch._dynamo.reset()
    monkeypatch.setattr(mass, "STRIP_ELEMENTS", 1 << 13)
    graphs = []
    for length in (700, 900, 1100, 1300):
        q, k, _ = tensors(Shape(B=1, Hq=2, Hkv=1, Lq=length, Lk=length, D=32))
        alone = select_blocks(q, k, order=2, tau=0.5, **FREE)
        with monkeypatch.context() as compiled:
            compiled.setattr(mass, "_strip_mass", mass._strip_mass_compiled)
            found = select_blocks(q, k, order=2, tau=0.5, **FREE)
        torch.testing.assert_close(found.mass, alone.mass, rtol=0, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] <= graphs[0] + 1
