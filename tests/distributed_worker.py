"""One of several processes: every way of rr_flex.distributed against one process.

Each rank has the whole tensors from a seed, takes its part, and compares with what select_blocks and attention over
the whole give. Uncompiled: a mask looks its kept blocks up, so eager flex_attention gives the same.
"""

import dataclasses
import warnings
from collections.abc import Iterable
from unittest.mock import patch

import torch
import torch.distributed as dist
from cases import Shape, eager_flex, tensors
from torch.distributed.device_mesh import init_device_mesh

from mask_mods import document, padding, sliding_window
from rr_flex import RRConfig, select_blocks
from rr_flex import selection as selection_module
from rr_flex.distributed import (
    Account,
    Shards,
    balanced,
    context_parallel,
    contiguous,
    head_parallel,
    make_mesh,
    ulysses,
    zigzag,
)
from rr_flex.distributed import local as of_rank
from rr_flex.distributed.asked import check_asked
from rr_flex.distributed.context import choose_blocks
from rr_flex.distributed.local import prepare
from rr_flex.distributed.ring import pass_around
from rr_flex.kernels.options import TUNED

selection_module.LONG_ROW = 2  # blocks: so are rows here
SHAPE = Shape(2, 4, 2, 1100, 1100, 16)  # 9 block rows, the last short: fewer key heads than ranks
TOLERANCE = 1e-5
HEAD_TAUS = tuple(0.15 + 0.12 * head for head in range(SHAPE.Hq))


def masks():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 4, (SHAPE.B, SHAPE.Lk), generator=generator).sort(1).values
    return {
        "causal": None,
        "document": document(ids),
        "window": sliding_window(300),
        "left": padding(torch.tensor([1100, 801]), side="left", total=SHAPE.Lk),
        "right": padding(torch.tensor([1100, 801])),
        "function": lambda b, h, q_idx, kv_idx: (kv_idx % 300 != 7 + h) | (q_idx == kv_idx),
    }


CASES = {
    "per head": {"config": RRConfig(tau=HEAD_TAUS)},
    "order 2": {"config": RRConfig(order=2, query_stride=16, block_size=(128, 64), budget="threshold", threshold=0.1)},
    "best": {"config": RRConfig.from_preset("best", threshold=0.06)},
    "softcap": {"config": RRConfig(tau=0.5, dense_last_rows=2, local_blocks=2), "softcap": 5.0, "scale": 0.2},
    "document": {"config": RRConfig(tau=0.5, mandatory="add"), "mask": "document"},
    "window": {"config": RRConfig(tau=0.4, block_size=64), "mask": "window"},
    "left padding": {"config": RRConfig(tau=0.5, stride=16), "mask": "left"},
    "right padding": {"config": RRConfig(tau=0.5, order=2), "mask": "right"},
    "function": {"config": RRConfig(tau=0.6), "mask": "function"},
    "dense": {"config": RRConfig(tau=0.3, min_length=4000)},
    "not causal": {"config": RRConfig(tau=0.3), "causal": False},
}


class Whole:
    """What one process gives: kept blocks and outputs."""

    def __init__(self, case: dict) -> None:
        self.q, self.k, self.v = tensors(SHAPE, seed=5)
        case = dict(case)
        self.mask = masks()[case.pop("mask", "causal")]
        self.config, self.causal = case.pop("config"), case.pop("causal", True)
        if self.config.min_length is None:  # sparse, short as it is
            self.config = self.config.with_settings({"min_length": 0})
        self.logits = case
        # Said in full, whatever the default beside a mask is.
        options = {"mask_mod": self.mask, "causal": self.causal, **self.logits}
        self.selection = select_blocks(self.q, self.k, config=self.config, **options)
        self.out = attention(self.q, self.k, self.v, self.selection, self.logits)
        self.options = {"config": self.config, **options}


def attention(q, k, v, selection, logits):
    cap = logits.get("softcap")
    if cap is None:
        return eager_flex(q, k, v, selection.block_mask, logits.get("scale"))
    from torch.nn.attention.flex_attention import flex_attention

    def capped(score, b, h, q_idx, kv_idx):
        return cap * torch.tanh(score / cap)

    settings = {"scale": logits.get("scale"), "enable_gqa": True, "score_mod": capped}
    return flex_attention(q, k, v, block_mask=selection.block_mask, **settings)


def same(found, exact, name):
    error = (found - exact).abs().max().item()
    assert error <= TOLERANCE, f"{name}: {error}"


def check_context(whole, shards, heads, name):
    layout, me = shards.layout, shards.place
    local = [
        layout.take(x[:, part], me).contiguous() for x, part in zip((whole.q, whole.k, whole.v), heads, strict=True)
    ]
    exact = layout.take(whole.out[:, heads[0]], me)
    prepared = prepare(*local, shards, check_asked(*local, shards, dict(whole.options), set()))
    size = whole.config.block_sizes[0]
    for chunk, (kept, _) in zip(prepared.chunks, choose_blocks(prepared)[0], strict=True):
        expected = whole.selection.kept[:, heads[0], chunk.start // size : -(-chunk.stop // size)]
        assert not expected[..., kept.shape[3] :].any()
        expected = expected[..., : kept.shape[3]]
        assert torch.equal(kept, expected), f"{name}: {(kept != expected).sum()} blocks differ"
    if whole.config.pool == "keys":
        # What only a GPU's kernels are asked for, in eager mode: parts and their log-sum-exp.
        same(pass_around(prepared._replace(kernel="triton")), exact, f"{name} ring")
    moved = {}
    for fetch in ("all", "kept"):
        account = Account()
        out = context_parallel(*local, shards, fetch=fetch, account=account, **whole.options)
        same(out, exact, f"{name} {fetch}")
        moved[fetch] = account.fetched
    assert moved["kept"] <= moved["all"]
    return moved, int(sum(account.kept))


def check_chunks(shards, layout):
    """The second chunk asks both chunks' keys, as one process does."""
    whole = Whole(CASES["per head"])
    first = layout.tokens
    then = layout.then(zigzag(SHAPE.Lk - first, layout.ranks))
    sharded = dataclasses.replace(shards, layout=then)
    q = whole.q[:, :, first:]
    selection = select_blocks(q, whole.k, config=whole.config, q_offset=first)
    exact = attention(q, whole.k, whole.v, selection, {})
    me = sharded.place
    local = then.of_queries.take(q, me), then.take(whole.k, me), then.take(whole.v, me)
    out = context_parallel(*local, sharded, **whole.options)
    same(out, then.of_queries.take(exact, me), "chunk by fetch")
    out = ulysses(*local, sharded, **whole.options)
    same(out, then.of_queries.take(exact, me), "chunk by ulysses")


def main(ranks: int, names: Iterable[str] = tuple(CASES)) -> None:
    mesh = make_mesh(sequence=ranks, device="cpu", timeout=60)
    everything = slice(0, SHAPE.Hq), slice(0, SHAPE.Hkv), slice(0, SHAPE.Hkv)
    torch.compiler.set_stance("force_eager")
    warnings.simplefilter("ignore")
    of_rank.STRIP_BYTES = 1  # several strips, short as the prompt is
    skewed = balanced([1.0] * 3 + [6.0] * 6, SHAPE.Lk, ranks)
    layouts = {"zigzag": zigzag(SHAPE.Lk, ranks), "contiguous": contiguous(SHAPE.Lk, ranks), "balanced": skewed}
    for number, name in enumerate(names):
        whole = Whole(CASES[name])
        arrangement = list(layouts)[number % 3]
        shards = Shards(mesh, layouts[arrangement])
        moved, kept = check_context(whole, shards, everything, f"{name} {arrangement}")
        local = [shards.layout.take(x, shards.place) for x in (whole.q, whole.k, whole.v)]
        same(ulysses(*local, shards, **whole.options), shards.layout.take(whole.out, shards.place), f"{name} ulysses")
        with torch.autocast("cpu", torch.bfloat16):
            assert context_parallel(*local, shards, **whole.options).dtype == torch.bfloat16
        if dist.get_rank() == 0:
            print(
                f"{name}: {arrangement}, density {whole.selection.density:.3f}, moved {moved}, kept {kept}", flush=True
            )
    if "per head" in names:
        check_chunks(Shards(mesh, layouts["zigzag"]), zigzag(512, ranks))
        check_meshes(ranks)
    dist.barrier()
    dist.destroy_process_group()


def check_that_all_heads_decide(whole: Whole, shards: Shards) -> None:
    """Sparse where it pays for all heads together, though it would not for this rank's alone."""
    pair = float(whole.q.shape[0] * whole.q.shape[2] * (whole.q.shape[2] + 1) / 2 / 128**2)  # visible blocks of a head
    costs = dict.fromkeys(TUNED["cpu"]["64"]["float32"]["costs"]["cpu"], 0.0)
    costs |= {"dense_block": 1e6, "host": 0.75 * SHAPE.Hq * pair}  # ms of all heads: dense Hq · pair
    options = whole.options | {"config": whole.config.with_settings({"min_length": None})}
    with patch.dict(TUNED["cpu"]["64"]["float32"]["costs"], cpu=costs):
        out = head_parallel(*(shards.heads(x) for x in (whole.q, whole.k, whole.v)), shards, **options)
    same(out, shards.heads(whole.out), "heads that decide together")


def check_meshes(ranks: int) -> None:
    """Heads alone, and heads × sequence."""
    whole = Whole(CASES["per head"])
    shards = Shards(init_device_mesh("cpu", (ranks,), mesh_dim_names=("heads",)))
    out = head_parallel(*(shards.heads(x) for x in (whole.q, whole.k, whole.v)), shards, **whole.options)
    same(out, shards.heads(whole.out), "heads")
    check_that_all_heads_decide(whole, shards)
    if ranks == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("heads", "sequence"))
        shards = Shards(mesh, zigzag(SHAPE.Lk, 2))
        rank = shards.rank("heads")
        heads = slice(rank * 2, rank * 2 + 2), slice(rank, rank + 1), slice(rank, rank + 1)
        check_context(whole, shards, heads, "2 × 2")
        local = [shards.layout.take(shards.heads(x), shards.place) for x in (whole.q, whole.k, whole.v)]
        exact = shards.layout.take(shards.heads(whole.out), shards.place)
        same(ulysses(*local, shards, **whole.options), exact, "2 × 2 ulysses")
