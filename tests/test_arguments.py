"""Every command: whatever is wrong with an argument is said before a model is loaded or anything is measured."""

import argparse
import importlib
import json
from pathlib import Path

import pytest
import torch

from rr_flex.cli import COMMANDS, main, make_parser

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from test_cli import tiny  # noqa: F401

from rr_flex.models import loading

ROOT = Path(__file__).parents[1]
# What may be any text; `options` are another program's words.
ANYTHING = {"--title", "options", "--help"}
NOWHERE, NUMBERS = "/dev/null/place", ("nan", "-1", "1e400")
# A command that is right but for one argument.
RIGHT = {
    "calibrate": ["profile.json", "--target-density", "0.9"],
    "page": ["run.json"],
    "tasks": ["--suite", "recall"],
    "doctor": ["--no-compile"],
}
NAMES = [command.__name__.split(".")[-1] for command in COMMANDS]


def options_of(name: str) -> list[argparse.Action]:
    (commands,) = (action for action in make_parser()._actions if hasattr(action, "choices") and action.choices)
    actions = commands.choices[name]._actions
    return [action for action in actions if action.nargs != 0 and not ANYTHING & {*action.option_strings, action.dest}]


def is_number(action: argparse.Action) -> bool:
    try:
        return action.type is not None and not isinstance(action.type("1"), str | Path)
    except (ValueError, argparse.ArgumentTypeError):
        return False


@pytest.fixture
def nothing_slow(monkeypatch, tmp_path):
    """What takes long fails the test; the folder holds a run for `page`."""
    for place in (
        "rr_flex.models.loading.load_causal_lm",
        "transformers.AutoModelForImageTextToText.from_pretrained",
        "rr_flex.cli.diagnosis.examine",
        "subprocess.run",
    ):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("begun"))
    monkeypatch.chdir(tmp_path)
    Path("run.json").write_text(json.dumps({"title": "a run"}))


@pytest.fixture
def model(tiny):  # noqa: F811
    return ["--model", str(tiny)]


def refused(arguments: list[str], capsys) -> str:
    """What is told of wrong arguments."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    told = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and told.startswith("rr-flex"), told
    return told


@pytest.mark.parametrize("name", NAMES)
def test_every_option_refuses_nonsense_before_anything_slow(name, nothing_slow, capsys):
    for action in options_of(name):
        option = (action.option_strings or [None])[-1]
        for wrong in (NOWHERE, *(NUMBERS if is_number(action) else ())):
            given = [f"{option}={wrong}"] if option else [wrong]
            right = RIGHT.get(name, [])
            told = refused([name, *(right if option else right[1:]), *given], capsys)
            words = (option or action.dest, action.dest, action.dest.replace("_", "-"), wrong)
            assert any(word in told for word in words), f"{given}: {told}"


ROW = {"context": "", "question": "a", "answer": "b", "demos": []}
QUESTION = {"videoID": "v1", "question": "?", "options": [], "answer": "A", "duration": "short"}
HELMET = ["--suite", "helmet", "--data", ".", "--tasks", "json_kv"]
VIDEO = ["--suite", "video-mme", "--data", ".", "--tasks", "short"]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (None, ["--suite", "recall", "--lengths", "1024,64"], "length must hold a sample of json_kv"),
        (None, ["--suite", "recall", "--chat-template"], "--model must have a chat template"),
        (None, ["--suite", "recall", "--results", "a.jsonl", "--json", "./a.jsonl"], "files must differ"),
        (None, HELMET, "--data must be the folder of the suite's data, which has no json_kv/test_k105_dep6.jsonl"),
        ("", HELMET, "test_k105_dep6.jsonl must hold rows, got none"),
        ("<html>", HELMET, "test_k105_dep6.jsonl must hold a JSON object a line"),
        ("{}", HELMET, "--data must hold rows of json_kv as published, got one without 'demos'"),
        (json.dumps(ROW), [*HELMET, "--lengths", "8192,16384"], "which has no json_kv/test_k220_dep6.jsonl"),
        (None, VIDEO, "--data must be the folder of the suite's data, which has no videomme.jsonl"),
        (json.dumps(QUESTION | {"duration": "long"}), VIDEO, "videomme.jsonl must hold rows of duration short"),
        (json.dumps(QUESTION), VIDEO, "data must hold the video v1"),
    ],
    ids=lambda value: " ".join(value) if type(value) is list else "",
)
def test_tasks_look_at_data_and_lengths_before_the_model_is_loaded(
    rows, arguments, message, model, nothing_slow, capsys
):
    if rows is not None:
        path = Path("videomme.jsonl" if arguments[:4] == VIDEO[:4] else "json_kv/test_k105_dep6.jsonl")
        path.parent.mkdir(exist_ok=True)
        path.write_text(rows)
    assert message in refused(["tasks", *model, *arguments, "--quiet"], capsys)


def test_a_model_that_enable_refuses_is_told_before_it_is_measured(model, nothing_slow, monkeypatch, capsys):
    other = torch.nn.Linear(1, 1)
    monkeypatch.setattr(loading, "load_causal_lm", lambda *_, **__: (other, None))
    other.generate = lambda *_, **__: pytest.fail("begun")
    assert "model must" in refused(["tasks", *model, "--suite", "recall", "--quiet"], capsys)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["--layers", "0"], "--layers must lie in [1], those of full causal attention, got (0,)"),
        (["--length", "2048"], "--length must lie in [2, 1024]"),
    ],
)
def test_layers_without_full_attention_are_told_by_the_config(layers, message, nothing_slow, capsys):
    kinds = ["sliding_attention", "full_attention"]
    config = {"model_type": "qwen3", "num_hidden_layers": 2, "layer_types": kinds, "max_position_embeddings": 1024}
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(config))
    assert message in refused(["evaluate", "--model", "./model", "--length", "512", *layers, "--quiet"], capsys)


PROGRAMS = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for path in ROOT.glob("benchmarks/**/*.py")
    if "ArgumentParser(" in (text := path.read_text()) and "__main__" in text
)
# Names and places that are looked up at once, before the model or the first timing, and what is only recorded.
LOOKED_UP = {"--commit", "--name", "--model", "--device", "--world", "--results", "--suites", "--settings", "--config"}
LOOKED_UP |= {"--only", "--ways", "--texts", "--choosing", "--after", "--help"}


class Built(Exception):
    """A parser that is ready."""


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_of_the_benchmarks_refuses_nonsense(program, monkeypatch):
    def built(parser, *_):
        raise Built(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", built)
    with pytest.raises(Built) as found:
        importlib.import_module(program).main()
    parsers = [*found.value.args]
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            elif action.nargs != 0 and not LOOKED_UP & {*action.option_strings}:
                for wrong in (NOWHERE, *(NUMBERS if is_number(action) else ())):
                    try:
                        value = (action.type or str)(wrong)
                    except (ValueError, argparse.ArgumentTypeError):
                        continue
                    assert value not in (action.choices or [value]), f"{parser.prog} {action.option_strings} {wrong}"
