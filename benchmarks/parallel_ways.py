"""One length's tensors on the ranks of a run, and every way to attend to them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.parallel_run import Run
from benchmarks.workloads import Shape, structured
from rr_flex import RRConfig, rr_attention
from rr_flex.distributed import (
    Account,
    Shards,
    balanced,
    context_parallel,
    head_parallel,
    ring,
    ulysses,
    zigzag,
)
from rr_flex.distributed.asked import check_asked
from rr_flex.distributed.context import choose_blocks
from rr_flex.distributed.local import Local, prepare
from rr_flex.kernels.dense import dense_attention

RULES = {
    "coarse": RRConfig(order=2, query_stride=16, key_stride=8, budget="threshold", min_length=0),
    "best": RRConfig.from_preset("best", min_length=0),
}
BALANCED = "balanced"
BISECTIONS = 8


class Prompt:
    """One length's tensors: the whole ones while some way needs them, and each way's part."""

    def __init__(self, run: Run, length: int) -> None:
        Hq, Hkv = run.options.heads
        self.run, self.length, self.shape = run, length, (Hq, Hkv, run.options.head_dim)
        dtype = getattr(torch, run.options.dtype)
        whole = structured(Shape(length, Hq, Hkv, run.options.head_dim), dtype=dtype, device=run.device, seed=0)
        self.layout = zigzag(length, run.ranks)
        self.shards = Shards(run.sequence, self.layout)
        self.part = [self.layout.take(x, self.shards.place).contiguous() for x in whole]
        # One card and head parallelism work on whole sequences; very long ones leave no room for both.
        self.whole = list(whole) if length <= run.options.most_whole else None
        self.exact = None  # one card's output, where outputs are compared
        # The other ways to lay it out, by name: shards, and this rank's part.
        self.arranged: dict[str, tuple[Shards, list[Tensor]]] = {}
        for mesh in run.planes if self.whole and length <= run.options.most_checked else ():
            name = f"{mesh.size(0)} heads × {mesh.size(1)} sequence"
            self.arrange(name, Shards(mesh, zigzag(length, mesh.size(1))))
        if self.whole:
            self.arrange(BALANCED, self.shards)

    def arrange(self, name: str, shards: Shards) -> None:
        part = [shards.layout.take(shards.heads(x), shards.place).contiguous() for x in self.whole]
        self.arranged[name] = shards, part

    def balance(self, config: RRConfig) -> None:
        """Lays BALANCED out by what this very selection keeps in each block row, as the layer before might tell."""
        size = config.block_sizes[0]
        cost = torch.zeros(-(-self.length // size), device=self.run.device)
        local = self.local(config)
        for chunk, (kept, _) in zip(local.chunks, choose_blocks(local)[0], strict=True):
            cost[chunk.start // size : -(-chunk.stop // size)] = kept.sum((0, 1, 3)).float()
        dist.all_reduce(cost)
        self.arrange(BALANCED, Shards(self.run.sequence, balanced(cost.tolist(), self.length, self.run.ranks)))

    def local(self, config: RRConfig, name: str | None = None, **options: Any) -> Local:
        shards, part = self.arranged.get(name, (self.shards, self.part))
        return prepare(*part, shards, check_asked(*part, shards, {"config": config, **options}, {"fetch"}))

    def at_density(self, config: RRConfig, wanted: float) -> RRConfig:
        """The threshold that keeps `wanted` of the visible blocks, all ranks together."""
        low, high = 1e-7, 0.5
        for _ in range(BISECTIONS):
            config = replace(config, threshold=(low * high) ** 0.5)
            more = density_of(self, config)["density"] > wanted
            low, high = (config.threshold, high) if more else (low, config.threshold)
        return config


def density_of(prompt: Prompt, config: RRConfig) -> dict[str, float]:
    """Of all ranks' blocks together, and the threshold that gave it."""
    account = Account()
    choose_blocks(prompt.local(config, account=account))
    kept, visible = prompt.run.total(float(sum(account.kept)), float(sum(account.visible)))
    return {"threshold": config.threshold, "density": kept / visible}


def ways(prompt: Prompt) -> dict[str, Callable[[RRConfig, Account], Tensor]]:
    """Each way as a call of a config and an account."""
    run, found = prompt.run, {}
    backends = ("auto", "triton") if run.device.type == "cuda" else ("auto",)
    if prompt.whole is not None:
        for backend in backends:
            found[named("one card", backend)] = lambda c, a, b=backend: rr_attention(*prompt.whole, config=c, backend=b)
        heads = Shards(run.heads)
        own = [heads.heads(x).contiguous() for x in prompt.whole]
        found["heads"] = lambda c, a: head_parallel(*own, heads, config=c)
    found["ulysses"] = lambda c, a: ulysses(*prompt.part, prompt.shards, config=c, account=a)
    for backend in backends:
        for fetch in ("kept", "all"):
            how = {"fetch": fetch, "backend": backend}
            found[named(fetch, backend)] = lambda c, a, how=how: context_parallel(
                *prompt.part, prompt.shards, config=c, account=a, **how
            )
        if run.device.type == "cuda":
            found[named("ring", backend)] = lambda c, a, b=backend: ring(
                *prompt.part, prompt.shards, config=c, account=a, backend=b
            )
    for name in prompt.arranged:
        found[name] = lambda c, a, n=name: context_parallel(
            *prompt.arranged[n][1], prompt.arranged[n][0], config=c, account=a
        )
    return {name: way for name, way in found.items() if name in run.options.ways or not run.options.ways}


def named(way: str, backend: str) -> str:
    return way if backend == "auto" else f"{way}, {backend}"


def exact_part(prompt: Prompt, name: str) -> Tensor | None:
    """What the way's output should be: one card's, of this rank's heads or tokens."""
    if prompt.exact is None or name.startswith("one card"):
        return prompt.exact
    if name == "heads":
        count = prompt.exact.shape[1] // prompt.run.ranks
        return prompt.exact[:, prompt.run.rank * count : (prompt.run.rank + 1) * count]
    shards, _ = prompt.arranged.get(name, (prompt.shards, None))
    return shards.layout.take(shards.heads(prompt.exact), shards.place)


def dense_ways(prompt: Prompt) -> dict[str, Callable[[], Tensor]]:
    """Dense attention over the same ranks: all-to-all to heads and the fastest dense kernel, and on one card."""
    from benchmarks.parallel_dense import dense_context, dense_ulysses

    run, found = prompt.run, {}
    if prompt.length <= run.options.most_dense:
        found["dense ulysses"] = lambda c, a: dense_ulysses(*prompt.part, prompt.shards)
    if run.device.type == "cuda" and prompt.length <= run.options.most_whole:
        found["dense context"] = lambda c, a: dense_context(*prompt.part, prompt.shards)
    if prompt.whole is not None and prompt.length <= run.options.most_dense:
        whole = {"causal": True, "scale": None, "flash": "must" if run.device.type == "cuda" else "no"}
        found["one card, dense"] = lambda c, a: dense_attention(*prompt.whole, **whole)
    return found
