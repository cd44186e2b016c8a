"""Builds the site from pages, notebooks and docstrings: `python .ci/site.py [--notebooks FOLDER] [--output FOLDER]`.

The pages are those of the repository, where they lie in it: README.md, and every room's.
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
from pathlib import Path, PurePosixPath

import jupytext

ROOT = Path(__file__).parent.parent
REPOSITORY_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([\w./-]+)(#[\w-]+)?\)")

# Pages of the rooms in the order of the navigation; one that is not named here stops the build.
ROOMS = {
    "The house": "rr_flex/README.md",
    "Kernels": "rr_flex/kernels/README.md",
    "Speed": "benchmarks/README.md",
    "Accuracy": "notebooks/README.md",
    "Models": "rr_flex/models/README.md",
    "Masks": "mask_mods/README.md",
    "Tasks": "rr_flex/tasks/README.md",
    "Serving": "rr_flex/serving/README.md",
    "Many cards": "rr_flex/distributed/README.md",
}
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
    unknown = sorted(set(room_pages()) - set(ROOMS.values()))
    if unknown:
        raise SystemExit(f"ROOMS of .ci/site.py must name every room's page, got none for {', '.join(unknown)}")
    for source in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *ROOMS.values()):
        text = (ROOT / source).read_text(encoding="utf-8")
        write(pages / page_of(source), REPOSITORY_LINK.sub(partial(on_site, source, pages), text))
    for name, modules in REFERENCE.items():
        text = f"# {modules[0]}\n\n" + "\n".join(f"::: {module}\n" for module in modules)
        write(pages / "reference" / f"{name}.md", text)
    titles = {}
    for path in notebooks():
        done = executed and executed / f"{path.stem}.ipynb"
        notebook = jupytext.read(done if done and done.exists() else path)
        page = page_of(f"notebooks/{path.name}")
        titles[notebook.cells[0].source.splitlines()[0].removeprefix("# ")] = page
        (pages / page).parent.mkdir(parents=True, exist_ok=True)
        jupytext.write(without_widgets(notebook), pages / page)
    return [
        {"Start": "index.md"},
        *({title: page} for title, page in ROOMS.items()),
        {"Notebooks": [{title: page} for title, page in titles.items()]},
        {"Reference": [{modules[0]: f"reference/{name}.md"} for name, modules in REFERENCE.items()]},
        {"Contributing": "CONTRIBUTING.md"},
        {"Changes": "CHANGELOG.md"},
    ]


def room_pages() -> list[str]:
    """The rooms' pages as paths in the repository."""
    folders = sorted({page.split("/")[0] for page in ROOMS.values()})
    return [path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("README.md")]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def notebooks() -> list[Path]:
    return sorted(path for path in (ROOT / "notebooks").glob("*.py") if path.name != "run.py")


def page_of(source: str) -> str | None:
    """Where a file of the repository lies on the site; None for one that has no page."""
    if source == "README.md":
        return "index.md"
    if source in ("CONTRIBUTING.md", "CHANGELOG.md") or source in ROOMS.values():
        return source
    notebook = re.fullmatch(r"notebooks/([\w-]+)\.py", source)
    return f"notebooks/{notebook.group(1)}.ipynb" if notebook and notebook.group(1) != "run" else None


def on_site(source: str, pages: Path, link: re.Match) -> str:
    """A link to a file of the repository: to its page, or as plain text where the site has none. A dead one fails.

    Pictures are copied to where they lie in the repository.
    """
    picture, text, target, anchor = link.group(1), link.group(2), link.group(3), link.group(4) or ""
    here = PurePosixPath(source).parent
    found = os.path.normpath(here / target)
    if not (ROOT / found).exists():
        raise SystemExit(f"{source} must link to files that exist, got {target}")
    page = found if picture or found.endswith(".png") else page_of(found)
    if page is None:
        return text
    if page == found and page.endswith(".png"):
        (pages / found).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / found, pages / found)
    return f"{picture}[{text}]({os.path.relpath(page, here)}{anchor})"


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
