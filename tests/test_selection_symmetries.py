"""What may not matter to a selection: the order of the batch, sharding, chunking, the future, padding's content."""

import oracle
import pytest
import torch
from cases import LAYOUTS, Shape, real_keys, seeds, shapes, taus, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from mask_mods import padding
from rr_flex import select_blocks

few = settings(max_examples=15)


def kept(q, k, **chosen):
    return select_blocks(q, k, **chosen).kept


@few
@given(shape=shapes(), tau=taus, seed=seeds)
def test_permuting_the_batch_permutes_the_choice(shape, tau, seed):
    shape = shape._replace(B=3)
    q, k, _ = tensors(shape, seed)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(kept(q[order], k[order], tau=tau), kept(q, k, tau=tau)[order])


@few
@given(shape=shapes(), tau=taus, seed=seeds, ratio=st.sampled_from([1, 2, 4]))
def test_rotating_heads_by_the_stride_rotates_the_choice(shape, tau, seed, ratio):
    q, k, _ = tensors(shape._replace(B=1, Hq=16, Hkv=16 // ratio), seed)
    turned = kept(q.roll(8, 1), k.roll(8 // ratio, 1), tau=tau)
    assert torch.equal(turned, kept(q, k, tau=tau).roll(8, 1))


@few
@given(shape=shapes(), tau=taus, seed=seeds, order=st.sampled_from([1, 2]))
def test_grouped_heads_equal_repeated_keys(shape, tau, seed, order):
    q, k, _ = tensors(shape, seed)
    repeated = k.repeat_interleave(shape.Hq // shape.Hkv, 1)
    assert torch.equal(kept(q, repeated, tau=tau, order=order), kept(q, k, tau=tau, order=order))


@few
@given(shape=shapes(), tau=taus, seed=seeds, first=st.integers(0, 3), layout=st.sampled_from(LAYOUTS))
def test_a_shard_of_heads_selects_its_slice(shape, tau, seed, first, layout):
    (sq, sk), block_size = layout
    chosen = {"query_stride": sq, "key_stride": sk, "block_size": block_size, "tau": tau}
    q, k, _ = tensors(shape._replace(Hq=12, Hkv=4), seed)
    shard = kept(q[:, 3 * first : 3 * first + 3], k[:, first : first + 1], head_offset=3 * first, **chosen)
    assert torch.equal(shard, kept(q, k, **chosen)[:, 3 * first : 3 * first + 3])


@few
@given(data=st.data(), L=st.integers(129, 700), tau=taus, seed=seeds, layout=st.sampled_from(LAYOUTS))
@pytest.mark.parametrize("cache", ["grown", "static"])
def test_chunks_select_what_one_shot_selects(data, cache, L, tau, seed, layout):
    """A static cache holds the whole length from the start; what lies beyond the chunk isn't visible."""
    (sq, sk), block_size = layout
    chosen = {"query_stride": sq, "key_stride": sk, "block_size": block_size, "tau": tau}
    q, k, _ = tensors(Shape(Lq=L, Lk=L), seed)
    size = 128 * data.draw(st.integers(1, 3))
    whole = kept(q, k, **chosen)
    for start in range(0, L, size):
        stop = min(start + size, L)
        seen = k[:, :, :stop] if cache == "grown" else k
        last = int(stop == L)
        chunk = kept(q[:, :, start:stop], seen, q_offset=start, dense_last_rows=last, **chosen)
        rows = whole[:, :, start // block_size[0] : -(-stop // block_size[0])]
        assert torch.equal(chunk, rows[..., : chunk.shape[-1]])
        assert not rows[..., chunk.shape[-1] :].any()


@few
@given(data=st.data(), shape=shapes(longest=500), ahead=st.integers(0, 20), tau=taus, seed=seeds)
@pytest.mark.parametrize("order", [1, 2])
def test_keys_past_a_row_s_block_never_change_it(data, order, shape, ahead, tau, seed):
    shape = shape._replace(Lk=shape.Lq + 8 * ahead)  # whole strides ahead, so that rows end where strides end
    q, k, _ = tensors(shape, seed)
    row = data.draw(st.integers(0, (shape.Lq - 1) // 128))
    end = min(128 * (row + 1), shape.Lq) + 8 * ahead
    changed = k.clone()
    changed[:, :, end:] = 50 * tensors(shape, seed + 1)[1][:, :, end:]
    before, after = kept(q, k, tau=tau, order=order), kept(q, changed, tau=tau, order=order)
    assert torch.equal(before[:, :, : row + 1], after[:, :, : row + 1])


@few
@given(data=st.data(), L=st.integers(1, 500), tau=taus, seed=seeds, order=st.sampled_from([1, 2]))
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_padding_holds_never_matters(data, side, L, tau, seed, order):
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, L), min_size=2, max_size=2)))
    shape = Shape(Lq=L, Lk=L)
    q, k, _ = tensors(shape, seed)
    real = real_keys(lengths, L, side)[:, None, :, None]
    changed = [torch.where(real, x, 50 * y) for x, y in zip((q, k), tensors(shape, seed + 1)[:2], strict=True)]
    chosen = {"mask_mod": padding(lengths, side=side, total=L), "causal": True, "tau": tau, "order": order}
    assert torch.equal(kept(*changed, **chosen), kept(q, k, **chosen))


@few
@given(data=st.data(), L=st.integers(1, 500), seed=seeds, layout=st.sampled_from(LAYOUTS))
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_equal_keys_have_equal_mass_wherever_padding_cuts_their_strides(data, side, order, L, layout, seed):
    """A block's share of a row is its share of the real keys, if these are equal; whole numbers, so that means are."""
    (sq, sk), block_size = layout
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, L), min_size=2, max_size=2)))
    real = real_keys(lengths, L, side)
    q, k = (x.round() for x in tensors(Shape(Lq=L, Lk=L), seed)[:2])
    k = torch.where(real[:, None, :, None], k[:, :, :1], k)
    chosen = {"query_stride": sq, "key_stride": sk, "block_size": block_size, "order": order, "causal": False}
    mass = select_blocks(q, k, mask_mod=padding(lengths, side=side, total=L), **chosen).mass
    count = torch.stack([block.sum(1) for block in real.split(block_size[1], 1)], 1)  # B nK
    share = count / count.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(mass, mass.sum(-1, keepdim=True) * share[:, None, None], rtol=0, atol=1e-4)
    for h in range(4):
        see = real[:, oracle.sampled_indices(L, sq, h)].sum(1)
        torch.testing.assert_close(mass[:, h].sum((1, 2)), see.float(), rtol=0, atol=1e-3)


@few
@given(data=st.data(), L=st.integers(2, 400), tau=taus, seed=seeds)
def test_right_padding_selects_what_the_sequence_alone_selects(data, L, tau, seed):
    length = data.draw(st.integers(1, L))
    q, k, _ = tensors(Shape(B=1, Lq=L, Lk=L), seed)
    chosen = {"tau": tau, "dense_last_rows": 0}
    mask = padding(torch.tensor([length]), side="right", total=L)
    padded = kept(q, k, mask_mod=mask, causal=True, **chosen)
    alone = kept(q[:, :, :length], k[:, :, :length], **chosen)
    nQ, nK = alone.shape[2:]
    # The last sampled query of a short stride is its last real token alone, and a hidden one under padding.
    whole = length // 8 * 8 // 128 if length % 8 else nQ
    assert torch.equal(padded[:, :, :whole, :nK], alone[:, :, :whole])
    assert not padded[:, :, nQ:].any() and not padded[..., nK:].any()


@few
@given(shape=shapes(), tau=taus, seed=seeds)
def test_strides_in_memory_never_matter(shape, tau, seed):
    q, k, _ = tensors(shape, seed)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    wider = [torch.cat([x, x], -1)[..., : shape.D] for x in (q, k)]
    assert torch.equal(kept(*apart, tau=tau), kept(q, k, tau=tau))
    assert torch.equal(kept(*wider, tau=tau), kept(q, k, tau=tau))


@few
@given(shape=shapes(bottom_right=True), tau=taus, seed=seeds)
def test_the_default_offset_puts_queries_at_the_end_of_the_keys(shape, tau, seed):
    q, k, _ = tensors(shape, seed)
    assert torch.equal(kept(q, k, tau=tau, q_offset=shape.Lk - shape.Lq), kept(q, k, tau=tau))


def test_the_worked_example():
    """Lq = 257, Lk = 384: the diagonal crosses blocks 0 1 | 1 2 | 2, the last row keeps all, block 0 is the sink."""
    q, k, _ = tensors(Shape(Lq=257, Lk=384))
    selection = select_blocks(q, k, tau=1e-6)
    visible = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]]).bool()
    assert torch.equal(selection.visible.expand_as(selection.kept), visible.expand_as(selection.kept))
    assert torch.equal(selection.kept, visible.expand_as(selection.kept))
    lone = kept(q, k, tau=1e-6, sink_blocks=0, dense_last_rows=0)
    assert torch.equal(lone, torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 1]]).bool().expand_as(lone))
    assert torch.equal(oracle.select(q, k, tau=1e-6, sink_blocks=0, dense_last_rows=0).kept, lone)


def test_the_sink_is_where_the_first_real_key_is():
    """Left padding of 0 and of 300: the sinks are blocks 0 and 4, and a tiny tau asks for nothing else."""
    q, k, _ = tensors(Shape(Hq=2, Lq=500, Lk=500))
    mask = padding(torch.tensor([500, 200]), side="left", total=500)
    chosen = {"block_size": 64, "tau": 1e-6, "local_blocks": 0, "dense_last_rows": 0, "mask_mod": mask, "causal": True}
    expected = torch.zeros(2, 2, 8, 8, dtype=torch.bool)
    expected[0, :, :, 0] = expected[1, :, 4:, 4] = True
    assert torch.equal(kept(q, k, **chosen), expected)
