"""CUDA graphs of one owner: recorded into memory that they share, by one thread at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch


class Recorder:
    """Records what repeats some kernels, and keeps its owner's calls apart: all share buffers and memory."""

    def __init__(self) -> None:
        self._pool: Any = None  # memory that all graphs share
        self._stream: Any = None  # of the last call
        self._busy = Lock()

    @contextmanager
    def alone(self, device: torch.device) -> Iterator[None]:
        """No other thread's call, on this device, behind the last call's work."""
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("a captured prefill must be called by one thread at a time, got a second call")
        try:
            if device.type != "cuda":
                yield
                return
            with torch.cuda.device(device):  # where a graph is captured
                stream = torch.cuda.current_stream()
                if self._stream not in (None, stream):
                    stream.wait_stream(self._stream)
                self._stream = stream
                yield
        finally:
            self._busy.release()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """What repeats the kernels that `run` launches."""
        run()  # compiles, and sets up what a capture may not
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                run()
        except BaseException:
            self._pool = None  # one whose only graph has failed is none any more
            raise

        def replay(keep: Callable = run) -> None:  # the tensors that the graph reads live as long as it does
            graph.replay()

        return replay

    @contextmanager
    def letting_go(self) -> Iterator[None]:
        """Where the graphs may be let go of: what was launched of them has ended, and the next one begins anew."""
        with self.alone(torch.device("cpu")):
            if self._stream is not None:
                self._stream.synchronize()
            yield
            self._pool = self._stream = None
