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


@pytest.fixture
def small_checkpoint(tmp_path, monkeypatch):
    """In place of the 8 billion parameters that the README loads by name: a tiny llama, and its long text."""
    hf = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, **{f"w{i}": i for i in range(1, 128)}}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlamaConfig(vocab_size=128, pad_token_id=0, eos_token_id=None, **sizes)
    model = hf.LlamaForCausalLM(config).eval()
    monkeypatch.setattr(hf.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", lambda name, dtype, device_map: model)
    (tmp_path / "long.txt").write_text(" ".join(f"w{1 + i % 127}" for i in range(505)))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_python_block_runs(page, small_checkpoint):
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
    if "on" in names:
        report = names["on"].report()
        assert names["prompt"] == 512 and report.sparse == 2 and report.dense["decode"] == 2 * 99


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
