"""A line of the README or of CONTRIBUTING is a promise: every python block runs, in order, as one program."""

import re
import shlex
from pathlib import Path

import pytest

from rr_flex.cli import make_parser

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
pytestmark = pytest.mark.usefixtures("one_graph_a_shape")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_python_block_runs(page):
    text = (ROOT / page).read_text()
    blocks = [
        # Blank lines put the block where the README has it, so that a traceback names the README's line.
        "\n" * text[: match.start(1)].count("\n") + match.group(1)
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, str(ROOT / page), "exec"), names)


def test_the_commands_name_files_and_extras_that_exist():
    text = README.read_text()
    root = README.parent
    assert (root / "constraints.txt").is_file()
    extras = set(
        re.findall(r"^(\w+) = \[", (root / "pyproject.toml").read_text().split("optional-dependencies]")[1], re.M)
    )
    for named in re.findall(r"\.\[([\w,]+)\]", text):
        assert set(named.split(",")) <= extras


def test_every_block_says_what_it_is():
    """Blocks are python, which runs above; bash, whose commands are checked below; or output, which has no language."""
    for page in ("README.md", "CONTRIBUTING.md"):
        assert {language for language, _ in FENCE.findall((ROOT / page).read_text())} <= {"python", "bash", ""}


def test_every_rr_flex_command_parses():
    """In blocks and in the text: the subcommand and its flags exist. `.ci/run` runs the installation itself."""
    parser = make_parser()
    found = 0
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text()
        lines = [line for language, block in FENCE.findall(text) if language == "bash" for line in block.splitlines()]
        for line in lines + re.findall(r"`(rr-flex [^`\n]+)`", text):
            for command in re.split(r"&&|\|", line.split("#")[0]):
                words = shlex.split(command)
                if words[:1] == ["rr-flex"] and "--help" not in words and "…" not in command:
                    parser.parse_args(words[1:])
                    found += 1
    assert found
