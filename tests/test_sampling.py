"""Sampled queries and pooled keys, each step alone."""

import oracle
import pytest
import torch
from cases import Shape, seeds, shapes, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from rr_flex.sampling import pool_keys, sample_queries, stride_weights

strides = st.sampled_from([1, 2, 4, 8, 16, 32, 64])


@given(shape=shapes(), stride=strides, head_offset=st.integers(0, 20), seed=seeds)
def test_samples_the_head_s_own_phase_of_each_stride(shape, stride, head_offset, seed):
    q, _, _ = tensors(shape, seed)
    assert torch.equal(sample_queries(q, stride, head_offset), oracle.sample(q, stride, head_offset))


@given(shape=shapes(), stride=strides, seed=seeds)
def test_pools_each_stride_to_its_mean(shape, stride, seed):
    _, k, _ = tensors(shape, seed)
    torch.testing.assert_close(pool_keys(k, stride).double(), oracle.pool(k, stride)[0], rtol=0, atol=1e-5)


@given(shape=shapes(), stride=strides, seed=seeds)
def test_padding_keys_are_left_out_of_the_mean(shape, stride, seed):
    _, k, _ = tensors(shape, seed)
    valid = torch.rand(shape.B, shape.Lk, generator=torch.Generator().manual_seed(seed)) < 0.3
    pooled = pool_keys(k, stride, valid=valid[:, None])
    torch.testing.assert_close(pooled.double(), oracle.pool(k, stride, valid)[0], rtol=0, atol=1e-5)
    changed = torch.where(valid[:, None, :, None], k, torch.full_like(k, 1e4))
    assert torch.equal(pool_keys(changed, stride, valid=valid[:, None]), pooled)


@given(shape=shapes(), stride=strides, seed=seeds)
def test_a_stride_counts_by_its_real_keys(shape, stride, seed):
    _, k, _ = tensors(shape, seed)
    valid = torch.rand(shape.B, shape.Lk, generator=torch.Generator().manual_seed(seed)) < 0.3
    assert torch.equal(stride_weights(valid[:, None], stride)[:, 0] * stride, oracle.pool(k, stride, valid)[2].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_float32(dtype):
    """The mean of half-precision keys is wrong by no more than one rounding to that dtype."""
    _, k, _ = tensors(Shape(Lk=1000), dtype=dtype)
    exact = oracle.pool(k, 64)[0]
    error = (pool_keys(k, 64).double() - exact).abs()
    assert (error <= torch.finfo(dtype).eps * exact.abs() + 1e-5).all()


@settings(max_examples=10)
@given(seed=seeds)
def test_strided_inputs_give_the_same(seed):
    q, k, _ = tensors(Shape(), seed)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    assert torch.equal(sample_queries(apart[0], 8), sample_queries(q, 8))
    assert torch.equal(pool_keys(apart[1], 8), pool_keys(k, 8))
