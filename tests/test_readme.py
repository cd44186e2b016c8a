"""A README line is a promise: every python block runs, in order, as one program."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_every_python_block_runs():
    text = README.read_text()
    blocks = [
        # Blank lines put the block where the README has it, so that a traceback names the README's line.
        "\n" * text[: match.start(1)].count("\n") + match.group(1)
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)


def test_the_commands_name_files_and_extras_that_exist():
    text = README.read_text()
    root = README.parent
    assert (root / "constraints.txt").is_file()
    extras = set(
        re.findall(r"^(\w+) = \[", (root / "pyproject.toml").read_text().split("optional-dependencies]")[1], re.M)
    )
    for named in re.findall(r"\.\[([\w,]+)\]", text):
        assert set(named.split(",")) <= extras
