"""Runs the notebooks as a reader would, in fresh kernels: `python notebooks/run.py [NAME ...] [--output FOLDER]`."""

import argparse
import sys
import time
from pathlib import Path

import jupytext
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
LIMIT = 180  # seconds a notebook, on two cores


def notebooks() -> list[Path]:
    return sorted(FOLDER.glob("[0-9]-*.py"))


def run(path: Path, output: Path | None) -> float:
    """Seconds that it took; an error in a cell raises CellExecutionError."""
    notebook = jupytext.read(path)
    notebook.metadata.pop("jupytext", None)
    start = time.perf_counter()
    NotebookClient(notebook, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    seconds = time.perf_counter() - start
    if output is not None:
        jupytext.write(notebook, output / f"{path.stem}.ipynb")
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="as in 1-idea; all unless given")
    parser.add_argument("--output", type=Path, help="folder for the notebooks with their pictures")
    options = parser.parse_args()
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
    chosen = [path for path in notebooks() if not options.names or path.stem in options.names]
    if len(chosen) < len(options.names):
        parser.error(f"names must be among {', '.join(path.stem for path in notebooks())}, got {options.names}")
    slow = []
    for path in chosen:
        seconds = run(path, options.output)
        print(f"{path.stem}: {seconds:.0f} s", flush=True)
        if seconds > LIMIT:
            slow.append(path.stem)
    if slow:
        print(f"longer than {LIMIT} s: {', '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
