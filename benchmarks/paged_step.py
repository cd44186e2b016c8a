"""A server's step on a card without the server: its pages and metadata built here, sparse against the dense kernel.

    python -m benchmarks.paged_step --contexts 32768 131072 --chunk 8192 --batch 1 8 --output paged.jsonl
    python -m benchmarks.paged_step --dry-run

Each row: the last chunk of a prompt of `context` tokens for `batch` requests at once (each its own pages, drawn at
random from one pool), its time by sparse attention over the pages, by selecting alone, by the dense kernel over the
same pages where FlashAttention 4 is installed and over contiguous keys, and the error of sampled rows against float32.
The layout is vLLM's for FLASH_ATTN with tokens outermost: [pages, P, Hkv, 2·D], seen as [pages, Hkv, P, 2·D].
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.dense_kernels import exact_rows, sampled_rows
from benchmarks.environment import describe
from benchmarks.timing import measure, synchronize
from benchmarks.workloads import Shape, structured
from rr_flex.config import RRConfig
from rr_flex.serving.pages import PooledPages, pools_of_flash
from rr_flex.serving.step import Layer, SparseStep, attend_sparse, parts, select_piece
from rr_flex.serving.step_rows import pieces_of_step

PAGE = 128
SETTINGS = {
    "tau .95": RRConfig(tau=0.95),
    "tau .9": RRConfig(tau=0.9),
    "best": RRConfig.from_preset("best"),
    "order 2, 16/8, one threshold": RRConfig(
        query_stride=16, key_stride=8, order=2, budget="threshold", threshold=0.004
    ),
}


@dataclass
class Served:
    """What a server holds when a step begins: its pool, and the step's requests."""

    cache: Tensor  # [pages, Hkv, P, 2·D]
    table: Tensor  # int32 [requests, pages of each]
    query: Tensor  # [tokens, Hq, D]: the last chunk of each request
    context: int  # tokens
    chunk: int  # tokens

    @property
    def step(self) -> SparseStep:
        requests = len(self.table)
        starts = [self.chunk * request for request in range(requests + 1)]
        pieces = pieces_of_step(starts, [self.context] * requests, [True] * requests)
        return SparseStep.of(pieces, self.table, PAGE)


def serve(context: int, chunk: int, batch: int, heads: tuple[int, int, int], dtype: torch.dtype, device) -> tuple:
    """The server's state, and q, k, v of the first request as they would be without pages."""
    Hq, Hkv, D = heads
    pages = context // PAGE
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(batch * pages + 1, generator=generator)[: batch * pages]
    table = order.view(batch, pages).to(device=device, dtype=torch.int32)
    storage = torch.zeros(batch * pages + 1, PAGE, Hkv, 2 * D, dtype=dtype, device=device)
    queries, first = [], None
    for request in range(batch):
        q, k, v = structured(Shape(context, Hq, Hkv, D), dtype=dtype, device=device, seed=request)
        tokens = torch.cat([k, v], -1)[0].transpose(0, 1).unflatten(0, (pages, PAGE))
        storage[table[request].long()] = tokens
        queries.append(q[0, :, context - chunk :].transpose(0, 1))
        first = first or (q[:, :, context - chunk :], k, v)
    return Served(storage.transpose(1, 2), table, torch.cat(queries), context, chunk), first


def dense_kernels(served: Served, first: tuple, device: torch.device) -> dict[str, Callable[[int], Tensor]]:
    """Dense attention of the step by what is installed: over the pages, and of one request over contiguous keys."""
    q, k, v = first
    if device.type != "cuda":
        rows = torch.arange(served.context - served.chunk, served.context, device=device)[:, None]
        seen = torch.arange(served.context, device=device) <= rows
        return {"sdpa": lambda _: F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)}
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    keys, values = (pool.transpose(1, 2) for pool in pools_of_flash(served.cache))  # pages P Hkv D
    requests = len(served.table)
    starts = torch.arange(requests + 1, device=device, dtype=torch.int32) * served.chunk
    lengths = torch.full((requests,), served.context, device=device, dtype=torch.int32)

    def paged(_: int) -> Tensor:
        options = {"cu_seqlens_q": starts, "seqused_k": lengths, "page_table": served.table}
        return flash_attn_varlen_func(served.query, keys, values, max_seqlen_q=served.chunk, causal=True, **options)

    def contiguous(_: int) -> Tensor:
        # Causal from the bottom right, as FlashAttention has it.
        return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)

    return {"fa4 over pages": paged, "fa4 over contiguous keys, one request": contiguous}


def rows_of(served: Served, first: tuple, heads: tuple, device: torch.device, seconds: float):
    """A row for each dense kernel, then for each setting."""
    about = {"context": served.context, "chunk": served.chunk, "batch": len(served.table)}
    for name, call in dense_kernels(served, first, device).items():
        try:
            timing = measure(call, sets=1, device=device, seconds=seconds)
        except Exception as error:  # a kernel may refuse a shape in any way
            yield about | {"what": name, "absent": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            continue
        yield about | {"what": name, "ms": timing.as_dict()}
    step = served.step
    keys, values = pools_of_flash(served.cache)
    q, k, v = first
    rows = sampled_rows(served.chunk, 64, device) + served.context - served.chunk
    padded = torch.cat([q.new_zeros(1, q.shape[1], served.context - served.chunk, q.shape[3]), q], 2)
    exact = exact_rows(padded, k, v, rows)
    for name, config in SETTINGS.items():
        settings = Layer(
            config=config.with_settings({"dense_last_rows": 0, "min_length": 0}),
            scale=heads[2] ** -0.5,
            softcap=None,
            head_offset=0,
        )
        pooled = pooled_keys(keys, settings.config)

        def attend(_: int, settings=settings, pooled=pooled) -> Tensor:
            return attend_sparse(step, settings, served.query, keys, values, pooled)

        def select(_: int, settings=settings, pooled=pooled) -> list:
            q = served.query.transpose(0, 1)[None].contiguous()
            return [select_piece(part, piece, table, settings, keys, pooled) for part, piece, table in parts(step, q)]

        out, counted = attend(0)
        mine = out[: served.chunk].transpose(0, 1)[None, :, rows - (served.context - served.chunk)].float()
        yield about | {
            "what": name,
            "ms": measure(attend, sets=1, device=device, seconds=seconds).as_dict(),
            "select_ms": measure(select, sets=1, device=device, seconds=seconds).as_dict(),
            "density": float(counted.kept / counted.visible),
            "error": float((mine - exact).norm() / exact.norm()),
        }
        synchronize(device)


def pooled_keys(keys: Tensor, config: RRConfig) -> PooledPages:
    """Every page's pooled keys, as the server has them from the steps before."""
    (pages, Hkv, P, D), stride = keys.shape, config.strides[1]
    shape = (pages, Hkv, P // stride, D * config.order)
    features = torch.zeros(shape, dtype=keys.dtype, device=keys.device)
    pooled = PooledPages(features=features, stride=stride, order=config.order)
    pooled.rewrite(keys, torch.arange(0, pages * P, stride, device=keys.device))
    return pooled


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paged_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a step, of each request")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], metavar=("Hq", "Hkv", "D"))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each timing, about")
    parser.add_argument("--output", type=Path, help="file of JSON lines to add to; else they are printed")
    parser.add_argument("--commit", help="where there is no git history")
    parser.add_argument("--dry-run", action="store_true", help="a small case, on whatever device there is")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.dry_run:
        options.contexts, options.chunk, options.batch, options.heads = [1024], 256, [1, 2], [4, 2, 16]
        options.seconds = 0.01
    about = describe(device, options.commit)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for context in options.contexts:
        for batch in options.batch:
            heads = tuple(options.heads)
            served, first = serve(context, options.chunk, batch, heads, dtype, device)
            for row in rows_of(served, first, heads, device, options.seconds):
                line = json.dumps(row | {"heads": heads, "dtype": str(dtype)} | about)
                if options.output:
                    with options.output.open("a") as stream:
                        stream.write(line + "\n")
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
