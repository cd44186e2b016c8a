"""Who this process is: its place in a mesh of heads × sequence, and whether all ranks were asked the same."""

import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rr_flex.distributed.layout import Layout
from rr_flex.fields import check_int

HEADS, SEQUENCE = "heads", "sequence"
TIMEOUT = 300  # seconds that a rank waits for another


@dataclass
class Account:
    """What calls moved to this rank and attended here; pass one to several calls to add them up."""

    fetched: int = 0  # bytes of keys, values, queries and outputs from other ranks
    selecting: int = 0  # bytes of pooled keys and of what is wanted
    all_gather: int = 0  # bytes that an all-gather of keys and values would have moved
    # Blocks of this rank's queries, 0-dim, a chunk each; without dense last rows that all ranks share.
    kept: list[Tensor] = field(default_factory=list)
    visible: list[Tensor] = field(default_factory=list)

    def add_blocks(self, kept: Tensor, visible: Tensor) -> None:
        self.kept.append(kept.sum())
        self.visible.append(visible.expand_as(kept).sum())


@dataclass(frozen=True, eq=False)
class Shards:
    """A mesh whose dimensions are named "heads", "sequence" or both, and the layout of the tokens on "sequence".

    ValueError for other names, or a layout of other ranks than the mesh has.
    """

    mesh: DeviceMesh
    layout: Layout | None = None  # None where the sequence is not sharded

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, DeviceMesh):
            raise TypeError(f"mesh must be a DeviceMesh, got {type(self.mesh).__name__}")
        if not isinstance(self.layout, Layout | None):
            raise TypeError(f"layout must be a Layout or None, got {type(self.layout).__name__}")
        names = self.mesh.mesh_dim_names or ()
        if not names or not set(names) <= {HEADS, SEQUENCE}:
            raise ValueError(f"mesh must have dimensions named {HEADS!r} and {SEQUENCE!r}, or one of them, got {names}")
        if (SEQUENCE in names) != (self.layout is not None):
            raise ValueError(f"layout must be given where the mesh has {SEQUENCE!r}, and only there, got {self.layout}")
        if self.layout is not None and self.layout.ranks != self.ranks(SEQUENCE):
            raise ValueError(
                f"layout must be of the mesh's {self.ranks(SEQUENCE)} {SEQUENCE} ranks, got {self.layout.ranks}"
            )

    def ranks(self, name: str) -> int:
        names = self.mesh.mesh_dim_names
        return self.mesh.size(names.index(name)) if name in names else 1

    def rank(self, name: str) -> int:
        return self.mesh.get_local_rank(name) if name in self.mesh.mesh_dim_names else 0

    def group(self, name: str) -> dist.ProcessGroup:
        return self.mesh.get_group(name)

    @property
    def place(self) -> int:
        """This process's rank along the sequence."""
        return self.rank(SEQUENCE)

    def heads(self, x: Tensor) -> Tensor:
        """This process's heads of a tensor [B, H, ...] that has all: whole groups, or one key head that ranks share."""
        ranks, rank, H = self.ranks(HEADS), self.rank(HEADS), x.shape[1]
        if H % ranks and ranks % H:
            raise ValueError(f"heads must be a multiple or a divisor of the mesh's {ranks} head ranks, got {H}")
        first, count = (rank * (H // ranks), H // ranks) if ranks <= H else (rank * H // ranks, 1)
        return x[:, first : first + count]

    def agree(self, facts: dict[str, int], failed: Exception | None, device: torch.device) -> None:
        """Raises on every rank if it failed on one, or if the ranks' facts differ; waits for all of them."""
        own = torch.tensor([int(failed is not None), *facts.values()], device=device)
        ends = torch.cat([own, -own])
        for name in self.mesh.mesh_dim_names:
            with answering():
                dist.all_reduce(ends, dist.ReduceOp.MAX, group=self.group(name))
        if failed is not None:
            raise failed
        high, low = ends[: len(own)].tolist(), (-ends[len(own) :]).tolist()
        if high[0]:
            raise RuntimeError("arguments must be right on every rank, got an error on another one, which names it")
        for name, most, least in zip(facts, high[1:], low[1:], strict=True):
            if most != least:
                raise ValueError(f"{name} must be the same on every rank, got {least} to {most}")


def make_mesh(*, heads: int = 1, sequence: int = 1, device: str = "cuda", timeout: float = TIMEOUT) -> DeviceMesh:
    """A mesh of heads × sequence over all processes, under torchrun; a dimension of 1 is left out unless both are.

    Starts torch.distributed where it is not (NCCL for "cuda", gloo for "cpu"), with `timeout` seconds.
    ValueError or TypeError naming the argument.
    """
    check_int("heads", heads, 1)
    check_int("sequence", sequence, 1)
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device must be 'cuda' or 'cpu', got {device!r}")
    if isinstance(timeout, bool) or not isinstance(timeout, float | int) or not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be a number of seconds above 0, got {timeout!r}")
    if not dist.is_initialized():
        settings = {"timeout": timedelta(seconds=timeout)}
        if device == "cuda":
            settings["device_id"] = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(settings["device_id"])
        dist.init_process_group("nccl" if device == "cuda" else "gloo", **settings)
    if heads * sequence != dist.get_world_size():
        raise ValueError(f"heads × sequence must be the {dist.get_world_size()} processes, got {heads} × {sequence}")
    sizes = {name: size for name, size in ((HEADS, heads), (SEQUENCE, sequence)) if size > 1} or {SEQUENCE: 1}
    return init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


@contextmanager
def answering() -> Iterator[None]:
    """Around a collective: its failure says what it means."""
    try:
        yield
    except RuntimeError as error:
        first_line = (str(error).splitlines() or [""])[0][:200]
        raise RuntimeError(
            "every rank of the mesh must answer within the process group's timeout, got one that is gone or late"
            f" ({first_line})"
        ) from error


def fingerprint(value: object) -> int:
    """A number that is the same wherever `repr(value)` is."""
    return zlib.crc32(repr(value).encode())
