"""`rr-flex doctor`, `completion` and `tune`: what they say, their exit codes, and shells that use the completion."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from rr_flex.cli import COMMANDS, main, make_parser, tune
from rr_flex.cli import diagnosis as doctor
from rr_flex.cli.completion import SCRIPTS, subcommands
from rr_flex.config import Budget


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
        if name == "tune":  # its help is the benchmarks program's
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


def offered(shell: str, line: str, tmp_path: Path) -> list[str]:
    """What the shell offers at the end of `line`."""
    script = tmp_path / "script"
    script.write_text(SCRIPTS[shell](make_parser()))
    words = line.split(" ")
    if shell == "bash":
        state = "COMP_WORDS=(" + " ".join(f"'{word}'" for word in words) + f"); COMP_CWORD={len(words) - 1}"
        command = ["bash", "--norc", "-c", f'source {script}; {state}; _rr_flex; printf "%s\\n" "${{COMPREPLY[@]}}"']
    else:
        command = ["fish", "--no-config", "-c", f"source {script}; complete -C '{line}'"]
    # fish keeps its history where HOME is.
    where = {"cwd": tmp_path, "env": {**os.environ, "HOME": str(tmp_path)}}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, **where)
    assert not ran.stderr
    return [word.split("\t")[0] for word in ran.stdout.split("\n") if word]


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_shells_complete(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    (tmp_path / "mine.txt").touch()
    assert set(offered(shell, "rr-flex ", tmp_path)) >= {"demo", "report", "doctor", "tune", "completion"}
    assert offered(shell, "rr-flex repo", tmp_path) == ["report"]
    assert offered(shell, "rr-flex demo --dty", tmp_path) == ["--dtype"]
    assert set(offered(shell, "rr-flex demo --budget ", tmp_path)) == set(get_args(Budget))
    assert "mine.txt" in offered(shell, "rr-flex demo --text mi", tmp_path)
    assert offered(shell, "rr-flex completion z", tmp_path) == ["zsh"]


def test_zsh_script_is_zsh(tmp_path):
    if shutil.which("zsh") is None:
        pytest.skip("needs zsh")
    (tmp_path / "_rr-flex").write_text(SCRIPTS["zsh"](make_parser()))
    load = f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -d {tmp_path}/dump; print $_comps[rr-flex]"
    ran = subprocess.run(["zsh", "-f", "-c", load], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "_rr-flex" and not ran.stderr
    subprocess.run(["zsh", "-n", str(tmp_path / "_rr-flex")], check=True)
