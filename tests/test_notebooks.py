"""The notebooks as files: stripped, one story each, and run by `notebooks/run.py`, which CI calls for all of them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]-*.py"))

jupytext = pytest.importorskip("jupytext", reason="needs the extra notebooks")
pytest.importorskip("nbclient", reason="needs the extra notebooks")
sys.path.insert(0, str(ROOT / "notebooks"))
import run as runner  # noqa: E402


def test_there_are_five_and_the_runner_knows_them():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["1-", "2-", "3-", "4-", "5-"]
    assert set(NOTEBOOKS) <= set(runner.notebooks())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_a_title_a_story_and_pictures(path):
    notebook = jupytext.read(path)
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert text[0].startswith(f"# {path.stem[0]} · ")
    assert len(text) >= 5 and code[0].startswith("%load_ext rr_flex.notebook")
    assert sum("figure" in cell for cell in code) >= 2
    assert all(cell.strip() for cell in text + code)


def test_their_page_names_every_notebook():
    text = (ROOT / "notebooks" / "README.md").read_text()
    assert all(f"]({path.name})" in text for path in NOTEBOOKS)


def test_the_runner_keeps_pictures_and_tells_errors(tmp_path):
    shutil.copy(ROOT / "notebooks" / "run.py", tmp_path)
    (tmp_path / "1-good.py").write_text("# %%\nprint(6 * 7)\n")
    (tmp_path / "2-bad.py").write_text("# %%\nassert False, 'no'\n")
    command = [sys.executable, str(tmp_path / "run.py"), "--jobs", "2", "--output", str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1, ran.stderr
    assert "1-good: " in ran.stdout and "2-bad: FAILED" in ran.stdout
    (cell,) = jupytext.read(tmp_path / "out" / "1-good.ipynb").cells
    assert cell.outputs[0].text == "42\n"
    assert not (tmp_path / "out" / "2-bad.ipynb").exists()
