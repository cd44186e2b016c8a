"""Two models, two threads, any order of leaving: each has its own attention, and all calls are counted.

The attention is dense here, times a factor, so that nothing compiles.
"""

import contextlib
import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from model_families import IDS, SETTINGS, logits, make, with_cache

from rr_flex.models import enable
from rr_flex.models.attention_by import attention_by
from rr_flex.models.layer_plan import ATTRIBUTE, plan_of
from rr_flex.models.records import LayerRecord, Report
from rr_flex.models.switches import SWITCHES

SHORT = IDS[:1, :40]
DENSE = SETTINGS | {"min_length": 1000}


def times(factor):
    def attend(q, k, v, *, layer, scale, window):
        return factor * torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        )

    return attend


def under(model, factor):
    with attention_by(model, times(factor)):
        return logits(model, SHORT)


@pytest.fixture(scope="module")
def llamas():
    return make("llama"), make("llama", num_hidden_layers=1)


@pytest.fixture(autouse=True)
def nothing_is_left(llamas):
    before = [logits(model, SHORT) for model in llamas]
    yield
    for model, own in zip(llamas, before, strict=True):
        assert model.config._attn_implementation == "sdpa"
        assert not [m for m in model.modules() if hasattr(m, SWITCHES) or hasattr(m, ATTRIBUTE)]
        assert torch.equal(logits(model, SHORT), own)


def test_nested_over_two_models_and_over_one(llamas):
    one, other = llamas
    expected = {factor: [under(model, factor) for model in llamas] for factor in (2, 3)}
    assert not torch.equal(*(expected[factor][0] for factor in (2, 3)))
    with attention_by(one, times(2)):
        with attention_by(other, times(3)):
            assert torch.equal(logits(one, SHORT), expected[2][0])
            assert torch.equal(logits(other, SHORT), expected[3][1])
        with attention_by(one, times(3)):
            assert torch.equal(logits(one, SHORT), expected[3][0])
        assert torch.equal(logits(one, SHORT), expected[2][0])


@pytest.mark.parametrize("which", [(0, 1), (0, 0)], ids=["two models", "one model"])
def test_two_threads_at_once(llamas, which):
    """Both inside, then the first to enter leaves first."""
    expected = [under(llamas[number], factor) for number, factor in zip(which, (2, 3), strict=True)]
    both_in, first_out = Barrier(2, timeout=60), Event()

    def run(turn):
        with attention_by(llamas[which[turn]], times(2 + turn)):
            both_in.wait()
            found = [logits(llamas[which[turn]], SHORT)]
            if turn == 1:
                assert first_out.wait(60)
                found.append(logits(llamas[which[turn]], SHORT))
        if turn == 0:
            first_out.set()
        return found

    with ThreadPoolExecutor(2) as threads:
        for turn, found in enumerate(threads.map(run, range(2))):
            assert all(torch.equal(out, expected[turn]) for out in found)


def test_who_has_not_entered_is_refused(llamas):
    one, _ = llamas
    with attention_by(one, times(2)):
        with ThreadPoolExecutor(1) as threads, pytest.raises(RuntimeError, match="must be entered by the thread"):
            threads.submit(logits, one, SHORT).result()
        with pytest.raises(RuntimeError, match="a copy of the model"):
            logits(copy.deepcopy(one), SHORT)


def test_enabled_ends_in_any_order(llamas):
    one, _ = llamas
    first, second = enable(one, tau=0.3, **DENSE), enable(one, tau=0.4, **DENSE)
    first.restore()
    logits(one, SHORT)
    # The second is on still: neither is it silently dense, nor is the first one's plan back.
    assert not first.report().layers and sum(second.report().dense.values()) == 2
    third = enable(one, tau=0.5, **DENSE)
    third.restore()
    logits(one, SHORT)
    assert sum(second.report().dense.values()) == 4
    second.restore()


def test_the_two_ways_nest(llamas):
    one, _ = llamas
    doubled = under(one, 2)
    with enable(one, **DENSE) as on:
        assert torch.equal(under(one, 2), doubled)
        logits(one, SHORT)
    assert sum(on.report().dense.values()) == 2
    with attention_by(one, times(2)):
        with enable(one, **DENSE) as on:
            logits(one, SHORT)
        assert torch.equal(logits(one, SHORT), doubled)
    assert sum(on.report().dense.values()) == 2


@contextlib.contextmanager
def switching_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def test_counts_of_many_threads_add_up():
    record = LayerRecord()

    def count(_):
        for _ in range(500):
            record.add_dense("decode")
            record.add_sparse(torch.tensor(0.5), (1, 8, 8))

    with switching_often(), ThreadPoolExecutor(8) as threads:
        list(threads.map(count, range(8)))
    assert record.sparse == record.dense["decode"] == 4000 and record.density == 0.5


def test_threads_that_come_at_once_share_a_plan():
    for _ in range(20):
        module = torch.nn.Identity()
        with switching_often(), ThreadPoolExecutor(8) as threads:
            plans = list(threads.map(lambda _, module=module: plan_of(module), range(8)))
            records = list(threads.map(lambda _, plan=plans[0]: plan.record(0), range(8)))
        assert len({id(plan) for plan in plans}) == len({id(record) for record in records}) == 1


@contextlib.contextmanager
def another_thread_that_compiles():
    """torch.compiler.is_compiling() is true in every thread meanwhile."""
    inside, done = Event(), Event()

    def backend(graph, inputs):
        inside.set()
        assert done.wait(120)
        return graph.forward

    thread = Thread(target=torch.compile(lambda x: x + 1, backend=backend), args=(torch.ones(3),))
    thread.start()
    try:
        assert inside.wait(60)
        yield
    finally:
        done.set()
        thread.join()


@torch.no_grad()
def test_what_another_thread_compiles_changes_no_count(llamas):
    one, _ = llamas
    with enable(one, **DENSE) as on:
        cache = with_cache(one, hf.DynamicCache(config=one.config))
        with another_thread_that_compiles():
            one(SHORT, **cache)
            one(SHORT[:, :1], **cache)
    assert dict(on.report().dense) == {"shorter than min_length": 2, "decode": 2}


def test_a_record_s_density_is_that_of_its_calls_together():
    """Chunks of a prompt: a call counts by its pairs."""
    record = LayerRecord()
    record.add_sparse(torch.tensor(1.0), (1, 128, 128))  # 8,256 pairs
    record.add_sparse(torch.tensor(0.25), (1, 128, 1024))  # 122,944
    expected = (8256 + 0.25 * 122944) / (8256 + 122944)
    assert record.density == pytest.approx(expected)
    assert Report.of([{0: record}, {0: record}, {3: LayerRecord()}]).density == pytest.approx(expected)
