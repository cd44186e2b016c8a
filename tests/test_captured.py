"""A prompt's chunks over a cache that stays gives what each chunk gives by itself; on a CPU the graphs are run anew."""

import gc
import warnings
from concurrent.futures import ThreadPoolExecutor
from weakref import ref

import pytest
import torch
from cases import Shape, tensors
from run_anew import Anew, RunAnew

from rr_flex import CapturedPrefill, captured, rr_attention

pytestmark = pytest.mark.usefixtures("short_rows_are_long")
RULES = [{"tau": 0.4}, {"preset": "best", "threshold": 0.05, "dense_last_rows": 0}]
CACHE = Shape(B=2, Hq=4, Hkv=2, Lq=1000, Lk=1000, D=16)


@pytest.fixture(autouse=True)
def small_steps_and_no_compiler(monkeypatch):
    monkeypatch.setattr(captured, "LEAST_STEP", 384)
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's word that eager flex_attention stores all scores
        yield


def recorded_by(recorder):
    return type("Recorded", (RunAnew,), {"_recorder": recorder})(256, min_length=0, tau=0.4)


def test_every_chunk_is_what_it_is_alone():
    prompts = (
        [(0, 256), (256, 512), (512, 768), (768, 860)],
        [(0, 256), (256, 380), (380, 636)],
        [(0, 1000)],
        [(0, 256)],
    )
    for rule in RULES:
        prefill = RunAnew(256, min_length=0, **rule)
        caches = [tensors(CACHE, layer)[1:] for layer in range(2)]
        for seed, chunks in enumerate(prompts):
            prompt = [tensors(CACHE, 10 + seed + layer) for layer in range(2)]
            for start, end in chunks:
                for (q, new_k, new_v), (k, v) in zip(prompt, caches, strict=True):
                    k[:, :, start:end], v[:, :, start:end] = new_k[:, :, start:end], new_v[:, :, start:end]
                    found = prefill(q[:, :, start:end], k, v, start)
                    alone = rr_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], min_length=0, **rule)
                    torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
        assert prefill.calls == {"replayed": 2 * 5, "called": 2 * 4}
        prefill.forget()
        torch.testing.assert_close(prefill(q[:, :, :256], k, v, 0), alone, rtol=0, atol=1e-5)


def test_a_prefix_that_is_in_the_cache():
    q, k, v = tensors(CACHE)
    prefill = RunAnew(256, min_length=0, tau=0.4)
    found = prefill(q[:, :, 512:768], k, v, 512)
    alone = rr_attention(q[:, :, 512:768], k[:, :, :768], v[:, :, :768], min_length=0, tau=0.4)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


def test_inference_mode_and_not():
    q, k, v = tensors(CACHE)
    prefill = RunAnew(256, min_length=0, tau=0.4)
    for start, mode in ((0, True), (256, False), (512, True)):
        end = start + 256
        with torch.inference_mode(mode):
            found = prefill(q[:, :, start:end], k, v, start)
            alone = rr_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], min_length=0, tau=0.4)
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


def test_where_dense_attention_is_faster_it_is_called():
    q, k, v = tensors(CACHE)
    prefill = RunAnew(256, min_length=600, tau=0.4)
    for start in (0, 256, 512):
        end = start + 256
        found = prefill(q[:, :, start:end], k, v, start)
        alone = rr_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], min_length=600, tau=0.4)
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
    assert prefill.calls == {"replayed": 1, "called": 2}


def test_a_cache_that_is_another_one(monkeypatch):
    """Moved, with other strides, longer, in half precision; or where the one before was freed and another put."""
    q, k, v = tensors(CACHE)
    prefill = RunAnew(256, min_length=0, tau=0.4)

    def is_right(q, k, v):
        for start in (0, 256):
            end = start + 256
            found = prefill(q[:, :, start:end], k, v, start)
            alone = rr_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], min_length=0, tau=0.4)
            torch.testing.assert_close(found, alone)

    is_right(q, k, v)
    is_right(q, -k, v)
    is_right(q, k.transpose(1, 2).contiguous().transpose(1, 2), v)
    is_right(q, torch.cat([k, -k], 2)[:, :, :1500], torch.cat([v, v], 2)[:, :, 500:])
    is_right(q.bfloat16(), k.bfloat16(), v.bfloat16())
    monkeypatch.setattr(captured, "_place", lambda *_: "here")
    for factor in (3, -1):
        is_right(q, k * factor, v)


def test_levels_are_those_of_the_beginning():
    q, k, v = tensors(CACHE)
    levels = torch.full((4,), 0.3)
    prefill = RunAnew(256, min_length=0, sink_blocks=0, dense_last_rows=0, tau=levels)
    prefill(q[:, :, 512:768], k, v, 512)
    exact = [prefill(q[:, :, i : i + n], k, v, i).clone() for i, n in ((512, 256), (512, 200))]
    levels.fill_(1)
    for found, (i, n) in zip(exact, ((512, 256), (512, 200)), strict=True):
        assert torch.equal(prefill(q[:, :, i : i + n], k, v, i), found)


def test_one_thread_at_a_time():
    q, k, v = tensors(CACHE)
    call = lambda prefill: prefill(q[:, :, :256], k, v, 0)  # noqa: E731

    begun, errors = [], []

    class Interrupted(Anew):
        def record(self, run):
            if not begun:
                begun.append(True)  # the other's call records without a third
                others = (lambda: call(prefill), prefill.forget)
                errors.extend(pool.submit(other).exception() for other in others)
            return run

    with ThreadPoolExecutor(1) as pool:
        prefill = recorded_by(Interrupted)
        found = call(prefill).clone()
        assert len(errors) == 2
        for error in errors:
            assert type(error) is RuntimeError and "by one thread at a time" in str(error)
        assert torch.equal(pool.submit(call, prefill).result(), found)


def test_what_is_let_go_of_is_freed_at_once():
    q, k, v = tensors(CACHE)
    gc.disable()
    try:
        for let_go in (RunAnew.forget, lambda _: None):
            prefill = RunAnew(256, min_length=0, tau=0.4)
            prefill(q[:, :, :256], k, v, 0)
            (cache,) = map(ref, prefill._caches.values())
            let_go(prefill)
            if let_go is not RunAnew.forget:
                del prefill
            assert cache() is None
    finally:
        gc.enable()


def test_a_capture_that_fails_is_tried_again():
    q, k, v = tensors(CACHE)

    class Fails(Anew):
        def record(self, run):
            run()
            del Fails.record
            raise torch.OutOfMemoryError("none left")

    prefill = recorded_by(Fails)
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        prefill(q[:, :, :256], k, v, 0)
    for start in (0, 256):
        end = start + 256
        found = prefill(q[:, :, start:end], k, v, start)
        alone = rr_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], min_length=0, tau=0.4)
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


def test_the_steps_of_a_cache():
    assert [captured.step_end(end, 1000) for end in (1, 384, 385, 900, 1000)] == [384, 384, 768, 1000, 1000]
    assert captured.step_end(5, 1 << 20) == 1 << 15  # thirty-two graphs and no more


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": 100}, "^queries must be a multiple of 128, got 100"),
        ({"pool": "queries"}, "^pool must be one that pools keys, got 'queries'"),
        ({"backend": "cuda"}, "^backend must be one of auto, triton, flash, got 'cuda'"),
        ({"scale": -1.0}, "^scale must be positive and finite in float32, got -1"),
        ({"softcap": 0}, "^softcap must be positive and finite in float32, got 0"),
        ({"head_offset": -1}, "^head_offset must be an int from 0 to 2147483647, got -1"),
    ],
)
def test_what_it_refuses_at_first(change, message):
    with pytest.raises(ValueError, match=message):
        RunAnew(**({"queries": 128} | change))


def test_what_a_call_refuses():
    q, k, v = tensors(CACHE)
    for first in (-1, 745, 1.0, True):
        with pytest.raises(ValueError, match=r"^first must be an int from 0 to 744, got"):
            RunAnew(256)(q[:, :, :256], k, v, first)
    with pytest.raises(ValueError, match=r"^q must have at most the cache's 1000 tokens, got 1024"):
        RunAnew(256)(torch.zeros(2, 4, 1024, 16), k, v, 0)
    with pytest.raises(TypeError, match=r"^head_offset must be an int, got Tensor"):
        RunAnew(256, head_offset=torch.tensor(1))
    with pytest.raises(NotImplementedError, match=r"^q, k and v must not require grad"):
        RunAnew(256)(q[:, :, :256].clone().requires_grad_(), k, v, 0)
    with pytest.raises(NotImplementedError, match=r"outside of torch.autocast"), torch.autocast("cpu", torch.bfloat16):
        RunAnew(256)(q[:, :, :256], k, v, 0)
    with (
        pytest.raises(NotImplementedError, match=r"outside of torch.compile"),
        torch.compiler.set_stance("default"),
    ):
        torch.compile(lambda q: RunAnew(256)(q, k, v, 0), backend="eager")(q[:, :, :256])
    with pytest.raises(NotImplementedError, match=r"^q must be on a CUDA device, got cpu"):
        CapturedPrefill(256)(q[:, :, :256], k, v, 0)
