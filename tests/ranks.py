"""Programs that several processes run as ranks, forked from one server that has imported what they need: once."""

import contextlib
import importlib
import multiprocessing
import os
import runpy
import socket
import time
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes

multiprocessing.set_forkserver_preload(["ranks", "distributed_worker", "distributed_models_worker"])


def on_ranks(folder: Path, ranks: int, program: str, *args: Any, seconds: float = 200) -> list[str]:
    """What each rank printed in `program`, a script or a module whose main takes `args`, in torchrun's environment.

    An error of one is raised here.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    running = start_processes(
        _as_rank, (about, folder, program, args), nprocs=ranks, join=False, start_method="forkserver"
    )
    end = time.monotonic() + seconds
    while not running.join(timeout=5):
        if time.monotonic() > end:
            for process in running.processes:
                process.kill()
            raise TimeoutError(f"{program} must end within {seconds} s on {ranks} ranks, got none")
    return [(folder / f"{rank}.txt").read_text() for rank in range(ranks)]


def _as_rank(rank: int, about: dict[str, str], folder: Path, program: str, args: tuple) -> None:
    os.environ |= about | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    with (folder / f"{rank}.txt").open("w") as stream, contextlib.redirect_stdout(stream):
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            importlib.import_module(program).main(*args)
