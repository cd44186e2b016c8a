"""Runs the notebooks as a reader would, in fresh kernels: `python notebooks/run.py [NAME ...] [--output FOLDER]`."""

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent
LIMIT = 180  # seconds a notebook, on two cores


def notebooks() -> list[Path]:
    return sorted(path for path in FOLDER.glob("*.py") if path.name != Path(__file__).name)


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
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at a time [%(default)s]")
    options = parser.parse_args()
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
    chosen = [path for path in notebooks() if not options.names or path.stem in options.names]
    if len(chosen) < len(options.names):
        parser.error(f"names must be among {', '.join(path.stem for path in notebooks())}, got {options.names}")
    # Kernels share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))
    with ThreadPoolExecutor(options.jobs) as pool:
        good = list(pool.map(lambda path: told(path, options.output), chosen))
    return 0 if all(good) else 1


def told(path: Path, output: Path | None) -> bool:
    """Runs one and says how it went; False for an error and for one that takes longer than LIMIT."""
    try:
        seconds = run(path, output)
    except CellExecutionError as error:
        print(f"{path.stem}: FAILED\n{error}", flush=True)
        return False
    print(f"{path.stem}: {seconds:.0f} s" + (f", more than {LIMIT}" if seconds > LIMIT else ""), flush=True)
    return seconds <= LIMIT


if __name__ == "__main__":
    raise SystemExit(main())
