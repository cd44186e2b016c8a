"""The search for a row's cut by sorting (CPU) and by bits (accelerators) is the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rr_flex.selection import largest_by_bits, largest_by_sort


@given(seed=st.integers(0, 2**31), nK=st.integers(1, 40), levels=st.integers(1, 9))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_searches_agree(dtype, nK, levels, seed):
    """Whole numbers with many ties, whose sums are exact, and every whole need from none to more than there is."""
    generator = torch.Generator().manual_seed(seed)
    mass = torch.randint(0, levels, (1, nK), generator=generator).to(dtype)
    need = torch.arange(-1, mass.sum().item() + 2, dtype=dtype)[:, None]
    rows = mass.expand(len(need), nK)
    by_sort, by_bits = largest_by_sort(rows, need), largest_by_bits(rows, need)
    assert torch.equal(by_sort, by_bits)
    # Fewest: without its smallest kept entry a row falls short; reached: or nothing positive is left.
    kept = torch.where(by_bits, mass, 0)
    assert ((kept.sum(-1) >= need[:, 0]) | (by_bits == (rows > 0)).all(-1)).all()
    smallest = torch.where(by_bits, mass, torch.inf).amin(-1)
    assert ((kept.sum(-1) - smallest < need[:, 0]) | ~by_bits.any(-1)).all()


@given(seed=st.integers(0, 2**31), share=st.floats(0.01, 0.99))
def test_both_searches_agree_on_untied_floats(share, seed):
    mass = torch.rand(4, 33, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 8
    need = share * mass.sum(-1, keepdim=True)
    assert torch.equal(largest_by_sort(mass, need), largest_by_bits(mass, need))
