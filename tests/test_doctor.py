"""`rr-flex doctor` and `tune`: what they say, and their exit codes; what holds for the help of every command."""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rr_flex.cli import COMMANDS, main, make_parser, tune
from rr_flex.cli import diagnosis as doctor


def findings(capsys, *arguments: str) -> tuple[int, dict]:
    code = main(["doctor", "--json", "--quiet", *arguments])
    return code, {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}


def test_this_machine_runs_the_compiled_kernel(capsys):
    code, found = findings(capsys)
    assert code == 0 and found["compiled attention"]["state"] == "ok", found
    assert found["torch"]["found"].startswith(torch.__version__)
    assert "runs, compiled in" in found["compiled attention"]["found"]


def test_a_wrong_kernel_is_found(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "rr_attention", lambda q, k, v, **settings: torch.zeros_like(q))
    code, found = findings(capsys)
    assert code == 1 and found["compiled attention"]["state"] == "missing"


def test_a_failing_compiler_is_told_not_raised(monkeypatch, capsys):
    def broken(*arguments, **settings):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(doctor, "rr_attention", broken)
    code, found = findings(capsys)
    assert code == 1 and "RuntimeError: no compiler" in found["compiled attention"]["found"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_a_width_of_the_estimate_s_features_is_no_head_dim_that_was_tuned(monkeypatch):
    monkeypatch.setattr(
        doctor, "TUNED", {"cpu": {"64": doctor.TUNED["cpu"]["64"], "256": {"float32": {"estimate": {}}}}}
    )
    found = doctor.break_even()
    assert found.state == "ok" and "of 64, float32" in found.found and "256" not in found.found
    monkeypatch.setattr(doctor, "TUNED", {"cpu": {"256": {"float32": {"estimate": {}}}}})
    assert doctor.break_even().state == "optional"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_missing_parts_come_with_their_command(monkeypatch, capsys):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    code, found = findings(capsys, "--no-compile")
    assert code == 1 and "compiled attention" not in found
    assert "g++" in found["C++ compiler"]["remedy"] and "AVX2" in found["vector units"]["remedy"]
    assert found["matplotlib"] == {
        **{"name": "matplotlib", "state": "optional", "found": "none, for pictures"},
        "remedy": "pip install 'rr-flex[viz]'",
    }


def test_remedies_name_extras_that_exist():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text().split("optional-dependencies]")[1]
    for _, install in doctor.OPTIONAL.values():
        if "[" in install:
            assert f"\n{install.split('[')[1].split(']')[0]} = [" in text


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert doctor.torch_version().state == "missing"
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert doctor.torch_version().state == "ok"


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return action.choices


def test_every_command_has_examples_that_parse():
    """An example is a promise as a README line is: its flags must exist."""
    parser = make_parser()
    examples = 0
    for command in COMMANDS:
        for line in getattr(command, "EXAMPLES", "").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part.split(">")[0].split("   (")[0])
                if words[:1] == ["rr-flex"] and "NAME" not in part:
                    parser.parse_args(words[1:])
                    examples += 1
    assert examples >= len(subcommands(parser))


def test_help_of_every_command_ends_with_examples(capsys):
    for name in subcommands(make_parser()):
        if name in ("tune", "report"):  # another program's help, and the older name of page
            continue
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        examples = capsys.readouterr().out.split("examples:\n")
        assert stopped.value.code == 0 and f"rr-flex {name}" in examples[1]


def test_tune_hands_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["tune"])
    assert stopped.value.code == 2 and "tune must run in a clone" in capsys.readouterr().err
    program = tmp_path / "benchmarks" / "__main__.py"
    program.parent.mkdir()
    program.write_text("import sys; print(sys.argv[1:]); raise SystemExit(7)")
    run = subprocess.run

    def recorded(command, **settings):
        return run([sys.executable, str(program), *command[3:]], **settings)

    monkeypatch.setattr(subprocess, "run", recorded)
    assert main(["tune", "--head-dims", "64"]) == 7


def test_help_waits_for_no_torch():
    """`--help` of any command, and a wrong flag, in the half second that Python itself leaves."""
    program = (
        "import sys; from rr_flex.cli import make_parser\n"
        "for words in (['--help'], ['demo', '--help'], ['tasks', '--help'], ['demo', '--tau', 'x']):\n"
        "    try: make_parser().parse_args(words)\n"
        "    except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    where = {"cwd": Path(__file__).parent.parent, "check": True}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, **where)
    assert ran.stdout.splitlines()[-1] == "[]"
    assert ran.stderr == "rr-flex demo: error: --tau: invalid float value: 'x'   (rr-flex demo --help)\n"
