"""The plugin without vLLM: inert unless asked, refusals in one line, counters that several processes share."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rr_flex.serving.vllm import counters, refused, support


def test_without_the_variable_nothing_is_imported():
    program = (
        "import sys\n"
        "from rr_flex.serving.vllm.plugin import register\n"
        "before = set(sys.modules)\n"
        "register()\n"
        "print(sorted(set(sys.modules) - before), 'vllm' in sys.modules)"
    )
    environment = {"PATH": "", "PYTHONPATH": "."}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.strip() == "[] False"


def test_the_entry_point_is_in_the_project():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"rr_flex": "rr_flex.serving.vllm.plugin:register"}


def config(**changed):
    parallel = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "pipeline_parallel_size": 1}
    parallel |= {name: changed.pop(name) for name in list(changed) if name in parallel}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel, use_ubatching=changed.pop("use_ubatching", False)),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        cache_config=SimpleNamespace(cache_dtype=changed.pop("cache_dtype", "auto")),
        kv_transfer_config=changed.pop("kv_transfer_config", None),
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cache_dtype": "fp8_e4m3"}, "a KV cache of fp8_e4m3, quantised"),
        ({"cache_dtype": "int4_per_token_head"}, "a KV cache of int4_per_token_head"),
        ({"cache_dtype": "float16"}, "a KV cache of float16, .* not of the model's own bfloat16"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size 2"),
        ({"prefill_context_parallel_size": 4}, "prefill_context_parallel_size 4"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size 2"),
        ({"use_ubatching": True}, "micro-batches"),
        ({"kv_transfer_config": object()}, "a KV connector"),
    ],
)
def test_what_is_not_served_is_refused_in_one_line(changed, message, monkeypatch):
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    support.check_configuration(config())
    support.check_configuration(config(cache_dtype="bfloat16"))
    with pytest.raises(NotImplementedError, match=message) as raised:
        support.check_configuration(config(**changed))
    assert "\n" not in str(raised.value) and "unset RR_FLEX" in str(raised.value)


def test_batch_invariant_mode_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(NotImplementedError, match="VLLM_BATCH_INVARIANT"):
        support.check_configuration(config())


@pytest.mark.parametrize("version", ["0.30.4", "0.33.0", "1.0", "nightly", None])
def test_untested_versions_are_refused(version, monkeypatch):
    def found(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(support.metadata, "version", found)
    with pytest.raises(NotImplementedError, match=r"vLLM must be of version 0\.31 or 0\.32"):
        support.check_version()


def test_tested_versions_are_not(monkeypatch):
    for version in ("0.31.0", "0.32.0", "0.32.0+cpu", "0.32.1"):
        monkeypatch.setattr(support.metadata, "version", lambda name, version=version: version)
        support.check_version()


def test_the_doctor_is_told_version_plugin_and_switch(monkeypatch):
    monkeypatch.delenv("RR_FLEX", raising=False)
    points = [SimpleNamespace(name="rr_flex")]
    monkeypatch.setattr(support.metadata, "entry_points", lambda group: points)
    for version, found, remedy in (
        (None, "no vLLM here", "pip install 'rr-flex[vllm]'"),
        ("0.33.0", "vLLM 0.33.0, which the plugin refuses; off: RR_FLEX is not set", "a vLLM of version 0.31 or 0.32"),
        ("0.32.0", "vLLM 0.32.0, supported; off: RR_FLEX is not set", None),
    ):
        monkeypatch.setattr(support, "installed_version", lambda version=version: version)
        assert support.found_here() == (found, remedy)
    monkeypatch.setenv("RR_FLEX", '{"tau": 0.9}')
    assert support.found_here() == ('vLLM 0.32.0, supported; RR_FLEX={"tau": 0.9}', None)
    points.clear()
    assert "does not see the plugin" in support.found_here()[0]


def test_pages_and_page_layouts_are_checked():
    support.check_page(256)
    for page in (16, 192):
        with pytest.raises(ValueError, match=f"block size must be a multiple of 128 tokens, got {page}: start with"):
            support.check_page(page)
    support.check_pool(8192, 128 * 8 * 256)
    support.check_pool(None, 128 * 8 * 256)
    with pytest.raises(ValueError, match="KV cache must have at most 8192 blocks, got 8193: --num"):
        support.check_pool(8193, 128 * 8 * 256)
    support.check_isa("vec")
    with pytest.raises(NotImplementedError, match="page layout must be one of vec, vec16 on a CPU, got amx"):
        support.check_isa("amx")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"sliding_window": (-1, -1)}, None),
        ({"sliding_window": 511}, "sliding window"),
        ({"sliding_window": (511, 0)}, "sliding window"),
        ({"attn_type": "encoder_only"}, "encoder or cross attention"),
        ({"sinks": torch.zeros(2)}, "attention sinks"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "keys of another layer"),
    ],
)
def test_layers_that_are_left_to_vllm(changed, reason):
    impl = {"sliding_window": -1, "attn_type": "decoder", "sinks": None, "kv_sharing_target_layer_name": None}
    impl = SimpleNamespace(**(impl | changed))
    assert support.why_dense(impl) == reason
    assert support.why_dense(impl, SimpleNamespace(is_draft_layer=True)) == (reason or "draft model")
    attention = type("Attention", (), {})
    assert support.why_dense(impl, attention()) == reason
    assert support.why_dense(impl, type("ChunkedLocalAttention", (attention,), {})()) == (
        reason or "ChunkedLocalAttention"
    )


def test_other_backends_say_why_they_are_absent():
    for name in ("MLA", "OtherBackend"):
        with pytest.raises(ImportError, match="unset RR_FLEX"):
            getattr(refused, name)
    with pytest.raises(AttributeError):
        _ = refused.Else


def test_counters_of_several_processes_are_added(tmp_path):
    own = counters.Counters(tmp_path, interval=0.0, device=torch.device("cpu"))
    other = np.zeros(len(counters.FIELDS))
    other[counters.FIELDS.index("sparse")] = 128
    other.tofile(tmp_path / "1.counts")
    for way, amount in (("sparse", 256), ("cut", 17), ("decode", 3)):
        own.add(way, amount)
    own.add("seconds", 0.25)
    own.blocks += torch.tensor([30, 40])
    line = own.line_if_due()
    assert line == ("rr_flex: 256 queries sparse at density 0.750, 0.25 s in sparse attention; dense: 3 decode, 17 cut")
    assert own.line_if_due() is None
    sums = dict(zip(counters.FIELDS, counters.sum_of(tmp_path), strict=True))
    assert (sums["sparse"], sums["cut"], sums["kept"], sums["visible"]) == (384, 17, 30, 40)


def test_prometheus_gets_the_sums(tmp_path):
    pytest.importorskip("prometheus_client")
    own = counters.Counters(tmp_path, interval=0.0, device=torch.device("cpu"))
    own.add("sparse", 256)
    own.blocks += torch.tensor([10, 40])
    own.line_if_due()
    found = {
        (sample.name, sample.labels.get("way")): sample.value
        for family in counters.Collector(tmp_path).collect()
        for sample in family.samples
    }
    assert found["rr_flex_queries_total", "sparse"] == 256 and found["rr_flex_queries_total", "cut"] == 0
    assert found["rr_flex_density", None] == 0.25
