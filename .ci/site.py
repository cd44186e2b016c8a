"""Builds the site from README, notebooks and docstrings: `python .ci/site.py [--notebooks FOLDER] [--output FOLDER]`.

`--notebooks`: where `notebooks/run.py --output` has left them with their pictures; without it they come without.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import jupytext

ROOT = Path(__file__).parent.parent
REPOSITORY_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([\w./-]+)(#[\w-]+)?\)")

# page: modules whose docstrings it shows
REFERENCE = {
    "rr_flex": ("rr_flex",),
    "mask_mods": ("mask_mods",),
    "evaluation": ("rr_flex.evaluation",),
    "models": ("rr_flex.models",),
    "plots": ("rr_flex.view.plots", "rr_flex.view.notebook"),
}


def gather(pages: Path, executed: Path | None) -> list[dict]:
    """Every page of the site into one folder, which is thrown away; returns the navigation."""
    for source, page in (("README.md", "index.md"), ("CONTRIBUTING.md",) * 2, ("CHANGELOG.md",) * 2):
        text = (ROOT / source).read_text(encoding="utf-8")
        (pages / page).write_text(REPOSITORY_LINK.sub(partial(on_site, source), text), encoding="utf-8")
    for name, modules in REFERENCE.items():
        text = f"# {modules[0]}\n\n" + "\n".join(f"::: {module}\n" for module in modules)
        (pages / f"{name}.md").write_text(text, encoding="utf-8")
    titles = {}
    for path in notebooks():
        done = executed and executed / f"{path.stem}.ipynb"
        notebook = jupytext.read(done if done and done.exists() else path)
        titles[notebook.cells[0].source.splitlines()[0].removeprefix("# ")] = f"{path.stem}.ipynb"
        jupytext.write(without_widgets(notebook), pages / f"{path.stem}.ipynb")
    return [
        {"Start": "index.md"},
        {"Notebooks": [{title: page} for title, page in titles.items()]},
        {"Reference": [{modules[0]: f"{name}.md"} for name, modules in REFERENCE.items()]},
        {"Contributing": "CONTRIBUTING.md"},
        {"Changes": "CHANGELOG.md"},
    ]


def notebooks() -> list[Path]:
    return sorted(path for path in (ROOT / "notebooks").glob("*.py") if path.name != "run.py")


def on_site(source: str, link: re.Match) -> str:
    """A link to a file of the repository: to its page, or as plain text where the site has none. A dead one fails."""
    text, target, anchor = link.group(1), link.group(2), link.group(3) or ""
    if not (ROOT / target).exists():
        raise SystemExit(f"{source} must link to files that exist, got {target}")
    pages = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
    notebook = re.fullmatch(r"notebooks/([\w-]+)\.py", target)
    page = pages.get(target) or (notebook and f"{notebook.group(1)}.ipynb")
    return f"[{text}]({page}{anchor})" if page else text


def without_widgets(notebook):
    """Sliders need a kernel; the picture under them stays. What libraries log is of the machine that ran it."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if not any("widget" in kind for kind in output.get("data", {})) and output.get("name") != "stderr"
            ]
    notebook.metadata.pop("widgets", None)
    return notebook


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notebooks", type=Path, help="folder of executed notebooks")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "site", help="[build/site]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder, "pages")
        pages.mkdir()
        config = {
            "INHERIT": str(ROOT / ".ci" / "mkdocs.yml"),
            "docs_dir": str(pages),
            "site_dir": str(options.output.resolve()),
            "nav": gather(pages, options.notebooks),
        }
        Path(folder, "mkdocs.yml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        # Without it the theme advertises its successor at every build.
        environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", f"{folder}/mkdocs.yml"]
        shutil.rmtree(options.output, ignore_errors=True)
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
