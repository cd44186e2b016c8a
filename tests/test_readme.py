"""A line of a page is a promise: python blocks run, page by page as one program; commands, links and figures hold."""

import ast
import inspect
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

import mask_mods
from benchmarks import front_page
from rr_flex import RRConfig
from rr_flex.cli import make_parser
from rr_flex.kernels.choose import KERNELS
from rr_flex.kernels.options import TUNED
from rr_flex.registry import BUDGETS, ESTIMATORS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
# The rooms' pages: every README of a folder of ours.
FOLDERS = ("benchmarks", "mask_mods", "notebooks", "rr_flex")
ROOMS = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *ROOMS]
pytestmark = pytest.mark.usefixtures("one_graph_a_shape")
# "<!-- needs a download -->" on the line above a fence: its block is only parsed.
FENCE = re.compile(r"(<!-- needs a download -->\n)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\((?!https?:)([^)#\s]*)(#[\w-]+)?\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def small_checkpoint(tmp_path, monkeypatch):
    """In place of what pages load by name: a tiny llama, and its long text."""
    hf = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, **{f"w{i}": i for i in range(1, 128)}}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "model_input_names": ["input_ids", "attention_mask"]}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlamaConfig(vocab_size=128, pad_token_id=0, eos_token_id=None, **sizes)
    model = hf.LlamaForCausalLM(config).eval()
    monkeypatch.setattr(hf.AutoTokenizer, "from_pretrained", lambda name, **_: tokenizer)
    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", lambda name, **_: model)
    (tmp_path / "long.txt").write_text(" ".join(f"w{1 + i % 127}" for i in range(505)))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tables():
    """Whatever a page enters into a table is taken out again."""
    before = [(table, dict(table)) for table in (ESTIMATORS, BUDGETS, KERNELS, TUNED)]
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_python_block_runs(page, small_checkpoint, tables):
    text = page.read_text(encoding="utf-8")
    names = {}
    for match in FENCE.finditer(text):
        download, language, block = match.groups()
        if language != "python":
            continue
        # Blank lines put the block where the page has it, so that a traceback names the page's line.
        program = compile("\n" * text[: match.start(3)].count("\n") + block, str(page), "exec")
        if not download:
            exec(program, names)
    if "on" in names:
        report = names["on"].report()
        # The small checkpoint's text is short: dense is faster.
        assert dict(report.dense) == {"dense is faster": 2, "decode": 2 * 99} and not report.sparse
    if page.name == "CONTRIBUTING.md":
        assert "block means" in ESTIMATORS and "per row" in BUDGETS and "masked" in KERNELS and "8.0" in TUNED


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{name_of(page)} must link to files that exist, got {target}"
        if anchor:
            assert anchor.removeprefix("#") in anchors(file), f"{name_of(page)} links to {target}{anchor}"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is(page):
    """Python, which runs above; bash, whose commands are checked below; or output, which has no language."""
    assert {language for _, language, _ in FENCE.findall(page.read_text(encoding="utf-8"))} <= {"python", "bash", ""}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_of_ours_parses(page, capsys):
    """In blocks and in the text: the subcommand and its flags exist. `.ci/run` runs the installation itself."""
    from benchmarks.__main__ import parser as benchmarks_parser

    text = page.read_text(encoding="utf-8")
    blocks = [block.replace("\\\n", " ") for _, language, block in FENCE.findall(text) if language == "bash"]
    lines = [line for block in blocks for line in block.splitlines()]
    for line in lines + re.findall(r"`((?:rr-flex|python -m benchmarks) [^`\n]+)`", text):
        for command in re.split(r"&&|\|", line.split("#")[0]):
            words = shlex.split(command)
            for program, parser in ((["rr-flex"], make_parser), (["python", "-m", "benchmarks"], benchmarks_parser)):
                if words[: len(program)] == program and "…" not in command:
                    assert exit_code(parser(), words[len(program) :]) == 0, command


def exit_code(parser, words: list[str]) -> int:
    """Of parsing; a command that is only named is asked for its help."""
    try:
        parser.parse_args(words if len(words) > 1 or words == ["demo"] else [*words, "--help"])
    except SystemExit as left:
        return left.code
    return 0


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_extras_exist(page):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("optional-dependencies]")[1]
    extras = set(re.findall(r"^(\w+) = \[", text, re.MULTILINE))
    for named in re.findall(r"(?:rr-flex|\.)\[([\w,]+)\]", page.read_text(encoding="utf-8")):
        assert set(named.split(",")) <= extras


def test_the_front_door_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200 and len(text.encode()) <= 12 * 1024


def test_the_front_page_s_figures_are_the_files_(tmp_path):
    """`python -m benchmarks.front_page` writes them."""
    copy = tmp_path / "README.md"
    copy.write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    front_page.write(copy)
    assert copy.read_text(encoding="utf-8") == README.read_text(encoding="utf-8")


def test_a_speed_row_is_the_last_measured_and_one_that_is_missing_is_named():
    call = front_page.CALLS[0]
    rows = front_page.load(front_page.RESULTS)
    found = front_page.row_of(call, rows)
    later = found | {"date": "2999-01-01T00:00", "total_ms": 1.0}
    assert front_page.row_of(call, [later, *rows]) is later
    others = [row for row in rows if row["label"] != call.label]
    with pytest.raises(SystemExit, match=r"must hold a row of NVIDIA H200 for Call\(what='default settings'"):
        front_page.row_of(call, others)


def test_every_page_of_a_room_is_named_on_the_front_page():
    linked = {(README.parent / target).resolve() for target, _ in LINK.findall(README.read_text(encoding="utf-8"))}
    assert set(ROOMS) <= linked


def test_the_masks_have_their_real_signatures():
    """The first column of the README's table: each mask of mask_mods with the names and kinds of its parameters."""
    text = README.read_text(encoding="utf-8").split("| mask |")[1].split("\n\n")[0]
    calls = re.findall(r"`(\w+)\(([^)]*)\)`", text)
    for name, parameters in calls:
        real = inspect.signature(getattr(mask_mods, name)).parameters.values()
        shown = ast.parse(f"def f({parameters}): pass").body[0].args
        kinds = [(x.arg, inspect.Parameter.POSITIONAL_OR_KEYWORD) for x in shown.args]
        kinds += [(shown.vararg.arg, inspect.Parameter.VAR_POSITIONAL)] if shown.vararg else []
        kinds += [(x.arg, inspect.Parameter.KEYWORD_ONLY) for x in shown.kwonlyargs]
        assert [(x.name, x.kind) for x in real] == kinds, name
    files = {path.stem for path in (ROOT / "mask_mods").glob("*.py")}
    masks = {name for name in mask_mods.__all__ if name in files} | {"both", "either"}
    assert {name for name, _ in calls} == masks


def test_the_settings_are_those_of_the_record():
    table = (ROOT / "rr_flex" / "README.md").read_text(encoding="utf-8").split("| setting |")[1].split("\n\n")[0]
    named = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(field.name for field in fields(RRConfig))


def test_no_page_names_a_machine():
    """A path of the machine that it was written on, or the host of a package index."""
    for page in PAGES:
        assert not re.search(r"/(?:work|home|root|tmp)/|pypi\.|files\.pythonhosted", page.read_text(encoding="utf-8"))


def test_pages_are_in_the_repository():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {name_of(page) for page in PAGES} <= set(listed.stdout.splitlines())
