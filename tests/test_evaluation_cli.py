"""`rr-flex evaluate` and `rr-flex calibrate` on a two-layer model made here, and their misuse."""

import json
import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from test_cli import tiny  # noqa: F401

from rr_flex import RRConfig
from rr_flex.cli import main
from rr_flex.models import loading

RULES = ["rr", "best 128×64", "oracle mass 128×64"]


@pytest.fixture
def source(tiny):  # noqa: F811
    return ["--model", str(tiny), "--text", str(tiny / "text.txt"), "--device", "cpu"]


def evaluate(source, *more):
    return ["evaluate", *source, "--length", "384", "--densities", "0.9,1", "--layers", "0,1", "--rules", *RULES, *more]


def test_full_density_is_the_dense_model(source, tmp_path, capsys):
    paths = ["--json", str(tmp_path / "out.json"), "--output", str(tmp_path / "curves.png")]
    assert main(evaluate(source, *paths)) == 0
    out, _ = capsys.readouterr()
    assert all(rule in out for rule in RULES) and "perplexity" in out
    for name in ("curves.png", "curves-predictions.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["tokens"] == 384 and report["layers"] == [0, 1]
    assert len(report["records"]) == 3 * 2 * 2
    assert all(each["error"] < 1e-5 for each in report["records"] if each["density"] == 1)
    # The oracle has no settings, so the model runs with the other two.
    assert {each["rule"] for each in report["predictions"]} == set(RULES[:2])
    assert all(0 < each["density"] <= 1 and each["kl"] >= -1e-6 for each in report["predictions"])


def test_torchao_s_quantization_stands_beside_sparsity(source, capsys):
    pytest.importorskip("torchao")
    assert main(evaluate(source, "--quantize", "int8-weight-only", "--json", "--quiet")) == 0
    report = json.loads(capsys.readouterr().out)
    (dense,) = (each for each in report["predictions"] if each["rule"] == "dense")
    assert dense["density"] == 1 and 0 < dense["kl"] < 0.1
    assert len(report["predictions"]) == 11


def test_all_rules_can_be_listed(capsys):
    assert main(["evaluate", "--list-rules", "--quiet"]) == 0
    assert set(RULES) <= set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--length", "300"], "--length must be a whole number of at least 256 and a multiple of 128"),
        (["--rules", "nonsense"], "--rules must be of those that --list-rules prints"),
        (["--layers", "7"], r"--layers must lie in \[0, 2\)"),
        (["--densities", "1.5"], r"--densities must be a number in \(0, 1\], got '1.5'"),
        (["--densities", "nan"], "--densities must be"),
        (["--layers", "-1"], "--layers must be"),
        (["--length", "0"], "--length must be"),
        (["--quantize", "int1"], "--quantize: invalid choice"),
        (["--quantize", "int8-dynamic", "--no-predictions"], "--quantize must come without"),
        (["--output", "x.xyz"], r"--output must end in .png, .pdf, .svg, got 'x.xyz'"),
        (["--output", "/nowhere/at.png"], "--output must name a file in an existing folder"),
        (["--text", "/no/such/file"], "--text must be a file or one of .*No such file"),
    ],
)
def test_misuse_is_a_message_before_the_model_is_loaded(source, more, message, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_causal_lm", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as stop:
        main(evaluate(source, *more))
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_profile_is_written(source, tmp_path, capsys):
    path = tmp_path / "profile.json"
    assert main(["calibrate", str(path), *source, "--length", "384", "--target-recall", "0.99", "--quiet"]) == 0
    assert "2 layers; on the calibration texts density" in capsys.readouterr().out
    configs = RRConfig.from_profile(path)
    assert sorted(configs) == [0, 1] and len(configs[0].threshold) == 4


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (["--target-density", "3"], "--target-density must be a number in (0, 1], got '3'"),
        (["--target-density", "nan"], "--target-density must be"),
        (["--target-recall", "-1"], "--target-recall must be"),
        (["--target-error", "0"], "--target-error must be a number above 0"),
        (["--target-kl", "inf"], "--target-kl must be"),
        (["--target-density", "0.01"], "target_density must be within reach, 1 by mandatory blocks, got 0.01"),
        (["--target-density", "0.5", "--text", "empty.txt"], "--text must hold words, got an empty file 'empty.txt'"),
        (["--target-density", "0.5", "--text", "latin.txt"], "--text must be a file in UTF-8, got 'latin.txt'"),
        (["--target-density", "0.5", "--text", "prose:99"], "--text must name a part of prose that there is, got"),
    ],
    ids=lambda value: "=".join(value) if type(value) is list else "",
)
def test_calibrate_checks_before_it_loads(source, target, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_causal_lm", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", "profile.json", *source, "--length", "384", *target])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and "usage:" not in err
    assert not (tmp_path / "profile.json").exists()


def test_what_was_measured_before_an_error_is_kept(source, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rr_flex.evaluation.rules_on_texts.compare_logits", broken)
    assert main(evaluate(source, "--json", str(tmp_path / "out.json"), "--quiet")) == 130
    assert len(json.loads((tmp_path / "out.json").read_text())["records"]) == 3 * 2 * 2
