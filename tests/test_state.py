"""With a state between chunks a call gives what it gives without one, wherever the prompt is cut."""

import warnings
from functools import partial

import oracle
import pytest
import torch
from cases import FREE, Shape, assert_attends, no_compile, seeds, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from mask_mods import padding
from rr_flex import PrefillState, rr_attention, select_blocks
from rr_flex.estimate import ESTIMATORS

pytestmark = pytest.mark.usefixtures("short_rows_are_long")
RULES = [{"tau": 0.4}, {"preset": "best", "threshold": 0.1}, {"order": 2, "key_stride": 16, "tau": 0.4}]


def chunks(L, cuts):
    ends = [*sorted(set(cuts)), L]
    return list(zip([0, *ends], ends, strict=False))


@settings(max_examples=15)
@given(seed=seeds, cuts=st.lists(st.integers(1, 699), max_size=5), rule=st.sampled_from(RULES), left=st.booleans())
def test_any_cut_gives_what_no_state_gives(seed, cuts, rule, left):
    q, k, _ = tensors(Shape(Lq=700, Lk=700), seed)
    lengths = torch.randint(1, 701, (2,), generator=torch.Generator().manual_seed(seed))
    state = PrefillState()
    for start, end in chunks(700, cuts):
        mask = padding(torch.clamp(lengths - (700 - end), min=0), side="left", total=end) if left else None
        here = {"q_offset": start, "mask_mod": mask, **rule, **FREE}
        alone = select_blocks(q[:, :, start:end], k[:, :, :end], **here)
        kept = select_blocks(q[:, :, start:end], k[:, :, :end], state=state, **here)
        assert torch.equal(kept.kept, alone.kept)
        torch.testing.assert_close(kept.mass, alone.mass, rtol=0, atol=1e-5)
        assert state.tokens == end // (32 if "preset" in rule else rule.get("key_stride", 8)) * (
            32 if "preset" in rule else rule.get("key_stride", 8)
        )


@pytest.mark.parametrize("rule", RULES)
def test_cuts_at_blocks_give_what_one_shot_gives(rule):
    q, k, _ = tensors(Shape(Lq=700, Lk=700))
    whole, state = select_blocks(q, k, **rule, **FREE), PrefillState()
    for start, end in chunks(700, [128, 512]):
        here = select_blocks(q[:, :, start:end], k[:, :, :end], q_offset=start, state=state, **rule, **FREE)
        q_block, k_block = whole.block_size
        rows, columns = slice(start // q_block, -(-end // q_block)), slice(0, -(-end // k_block))
        assert torch.equal(here.kept, whole.kept[:, :, rows, columns])


def test_attention_with_a_state_is_attention():
    q, k, v = tensors(Shape(Lq=640, Lk=640))
    state = PrefillState()
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's word that eager flex_attention stores all scores
        for start, end in ((0, 256), (256, 512), (512, 600)):
            own = q[:, :, start:end], k[:, :, :end], v[:, :, :end]
            out = rr_attention(*own, q_offset=start, state=state, tau=0.4, **FREE)
            torch.testing.assert_close(out, rr_attention(*own, q_offset=start, tau=0.4, **FREE), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chosen", [{"tau": 0.4}, {"preset": "best", "threshold": 0.1}, {"tau": 0.4, "causal": False}])
def test_whole_rows_of_a_chunk_off_the_grid_are_those_of_one_shot(chosen):
    """Rows lie on absolute positions; in the row that is cut its own queries stand in for those before them."""
    q, k, v = (x[:, :, :600] for x in tensors(Shape(Lq=640, Lk=640)))
    chosen = chosen | FREE
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's word that eager flex_attention stores all scores
        whole = rr_attention(q, k, v, **chosen)
        for start in (100, 130, 383, 500):
            before, own = start % 128, q[:, :, start:]
            out = rr_attention(own, k, v, q_offset=start, **chosen)
            rest = 128 - before
            torch.testing.assert_close(out[:, :, rest:], whole[:, :, start + rest :], rtol=0, atol=1e-5)
            filled = torch.cat([own[:, :, torch.arange(before) % min(rest, 600 - start)], own], 2)
            found = select_blocks(filled, k, q_offset=start - before, **chosen)
            allowed = oracle.expand(found.kept, (filled.shape[2], 600), found.block_size)[:, :, before:]
            if "causal" not in chosen:
                allowed = allowed & oracle.pairs(oracle.causal_element(start), 2, 4, 600 - start, 600)
            assert_attends(out, own, k, v, allowed)


def test_only_new_keys_are_pooled_and_a_new_length_compiles_nothing():
    q, k, _ = tensors(Shape(Lq=700, Lk=700))
    state = PrefillState()
    select_blocks(q[:, :, :512], k[:, :, :512], state=state)
    assert state.tokens == 512 and state.nbytes == 2 * 2 * 64 * 16 * 4
    k[:, :, :504] = torch.nan  # never looked at again, and the last stride on a CPU only, to see that it is the same
    with no_compile():
        chosen = select_blocks(q[:, :, 512:], k, q_offset=512, state=state)
    assert chosen.mass.isfinite().all()


def test_trimmed_copied_and_reordered():
    q, k, _ = tensors(Shape(Lq=700, Lk=700))
    state = PrefillState()
    select_blocks(q[:, :, :512], k[:, :, :512], state=state, tau=0.4)
    other = state.copy()
    k2 = torch.cat([k[:, :, :300], tensors(Shape(Lq=700, Lk=700), 1)[1][:, :, 300:]], 2)
    other.trim(300)
    assert (state.tokens, other.tokens) == (512, 296)
    for keys, own in ((k2, other), (k, state)):
        here = {"q_offset": 512, "tau": 0.4}
        found = select_blocks(q[:, :, 512:], keys, state=own, **here)
        assert torch.equal(found.kept, select_blocks(q[:, :, 512:], keys, **here).kept)
    rows = torch.tensor([1, 1, 0])
    state.reorder(rows)
    state.trim(650)
    found = select_blocks(q[rows][:, :, 650:], k[rows], q_offset=650, state=state)
    torch.testing.assert_close(found.mass, select_blocks(q[rows][:, :, 650:], k[rows], q_offset=650).mass)


def test_in_inference_mode_and_out_of_it():
    q, k, _ = tensors(Shape(Lq=700, Lk=700))
    for modes in ((True, False) * 2, (False, True) * 2):
        state, turns = PrefillState(), ("", "copy", "reorder", "")
        for (start, end), mode, turn in zip(chunks(700, (520, 560, 600)), modes, turns, strict=True):
            with torch.inference_mode(mode):
                found = select_blocks(q[:, :, start:end], k[:, :, :end], state=state, tau=0.4)
                state = state.copy() if turn == "copy" else state
                if turn == "reorder":
                    state.reorder(torch.arange(2))
            assert torch.equal(found.kept, select_blocks(q[:, :, start:end], k[:, :, :end], tau=0.4).kept)


def test_what_a_state_is_not_for_is_refused():
    q, k, v = tensors(Shape(Lq=256, Lk=256))
    state = PrefillState()
    for call in (partial(select_blocks, q, k), partial(rr_attention, q, k, v, min_length=0)):
        with pytest.raises(TypeError, match=r"^state must be a PrefillState, got dict"):
            call(state={})
        with pytest.raises(ValueError, match=r"^state must be None with pool='queries'"):
            call(state=state, pool="queries")
    select_blocks(q, k, state=state)
    with pytest.raises(ValueError, match=r"^state must keep its batch"):
        select_blocks(q[:1, :, :8], torch.cat([k, k], 2)[:1], state=state)
    for again in (200, 256):  # another prompt's first chunk, or the same call again
        with pytest.raises(ValueError, match=rf"^q must hold tokens after the state's 256 alone, {again - 256} of"):
            select_blocks(q[:, :, :again], k[:, :, :again], state=state)
    q, k, v = tensors(Shape(Lq=700, Lk=700), 1)
    with pytest.raises(ValueError, match=r"^q must hold tokens after the state's 256 alone, 444 of k's 700, got 700"):
        rr_attention(q, k, v, state=state)
    with pytest.raises(ValueError, match=r"^k must go on with the keys of its state, got other keys in tokens 248 to"):
        rr_attention(q[:, :, 256:], k, v, state=state, min_length=0)
    with pytest.raises(ValueError, match=r"^tokens must be"):
        state.trim(-1)
    assert {name for name, rule in ESTIMATORS.items() if "key_stride" in rule.reads} == {"keys", "both"}
