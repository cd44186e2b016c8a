"""A server's step on a card without the server: its pages and metadata built here, sparse against the dense kernel.

    python -m benchmarks.paged_step --contexts 32768 131072 --chunk 8192 --batch 1 8 --output paged.jsonl
    python -m benchmarks.paged_step --dry-run

Each row: the last chunk of a prompt of `context` tokens for `batch` requests at once (each its own pages, drawn at
random from one pool), by the dense kernel over the pages (FlashAttention 4, which stands for vLLM's own; on a CPU
torch's over gathered keys), or by sparse attention over them. Its time, of that the time of selecting, and the errors:
of all outputs against the dense kernel's, and of sampled rows of the first request against float32.
The layout is vLLM's for FLASH_ATTN with tokens outermost: [pages, P, Hkv, 2·D], seen as [pages, Hkv, P, 2·D].
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.dense_kernels import exact_rows, sampled_rows
from benchmarks.environment import describe
from benchmarks.timing import measure
from benchmarks.workloads import Shape, structured
from rr_flex.cli import flags
from rr_flex.config import RRConfig
from rr_flex.serving.pages import PooledPages, pools_of_flash, read_pages
from rr_flex.serving.settings import Layer
from rr_flex.serving.step import SparseStep, attend_sparse, select_rows
from rr_flex.serving.step_rows import pieces_of_step

PAGE = 128
SETTINGS = {
    "tau .95": RRConfig(tau=0.95),
    "tau .9": RRConfig(tau=0.9),
    "best": RRConfig.from_preset("best"),
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

    def of_first(self, requests: int) -> "Served":
        """The same pool with fewer requests in the step."""
        return replace(self, table=self.table[:requests], query=self.query[: requests * self.chunk])


def serve(context: int, chunk: int, batch: int, heads: tuple[int, int, int], dtype: torch.dtype, device) -> tuple:
    """The server's state, and q, k, v of the first request as they would be without pages."""
    Hq, Hkv, D = heads
    pages = context // PAGE
    order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0))
    table = order.view(batch, pages).to(device=device, dtype=torch.int32)
    storage = torch.zeros(batch * pages, PAGE, Hkv, 2 * D, dtype=dtype, device=device)
    queries, first = [], None
    for request in range(batch):
        q, k, v = structured(Shape(context, Hq, Hkv, D), dtype=dtype, device=device, seed=request)
        tokens = torch.cat([k, v], -1)[0].transpose(0, 1).unflatten(0, (pages, PAGE))
        storage[table[request].long()] = tokens
        queries.append(q[0, :, context - chunk :].transpose(0, 1))
        first = first or (q[:, :, context - chunk :], k, v)
    return Served(storage.transpose(1, 2), table, torch.cat(queries), context, chunk), first


def dense_kernel(served: Served, device: torch.device) -> tuple[str, Callable[[int], Tensor]]:
    """The dense parent's kernel over the step's pages: outputs [tokens, Hq, D]."""
    if device.type != "cuda":
        seen = torch.ones(served.context, served.context, dtype=torch.bool).tril()[-served.chunk :]

        def gathered(_: int) -> Tensor:
            outs = []
            for table, query in zip(served.table, served.query.split(served.chunk), strict=True):
                k, v = (read_pages(pool, table[None].long()) for pool in pools_of_flash(served.cache))
                q = query.transpose(0, 1)[None]
                outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)[0])
            return torch.cat(outs, 1).transpose(0, 1)

        return "sdpa over gathered keys", gathered
    from flash_attn.cute import flash_attn_varlen_func

    keys, values = (pool.transpose(1, 2) for pool in pools_of_flash(served.cache))  # pages P Hkv D
    requests = len(served.table)
    starts = torch.arange(requests + 1, device=device, dtype=torch.int32) * served.chunk
    lengths = torch.full((requests,), served.context, device=device, dtype=torch.int32)
    options = {"cu_seqlens_q": starts, "seqused_k": lengths, "page_table": served.table, "causal": True}

    def paged(_: int) -> Tensor:
        out = flash_attn_varlen_func(served.query, keys, values, max_seqlen_q=served.chunk, **options)
        return out[0] if isinstance(out, tuple) else out

    return "fa4 over pages", paged


def rows_of(served: Served, first: tuple, device: torch.device, options: argparse.Namespace) -> Iterator[dict]:
    """A row for the dense kernel, then for each setting."""
    timed = {"sets": 1, "device": device, "seconds": options.seconds}
    about = {"context": served.context, "chunk": served.chunk, "batch": len(served.table)}
    keys, values = pools_of_flash(served.cache)
    q, k, v = first
    before = served.context - served.chunk
    rows = sampled_rows(served.chunk, 64, device) + before
    exact = exact_rows(torch.cat([q.new_zeros(1, q.shape[1], before, q.shape[3]), q], 2), k, v, rows)

    def error(out: Tensor) -> float:
        mine = out[: served.chunk].transpose(0, 1)[None, :, rows - before].float()
        return float((mine - exact).norm() / exact.norm())

    name, call = dense_kernel(served, device)
    dense = call(0)
    yield about | {"what": name, "ms": measure(call, **timed).as_dict(), "error": error(dense)}
    step = served.step
    for name in options.settings:
        config = SETTINGS[name].with_settings({"dense_last_rows": 0, "min_length": 0})
        layer = Layer(config=config, scale=q.shape[3] ** -0.5, softcap=None, head_offset=0)
        pooled = pooled_keys(keys, config)

        def attend(_: int, layer=layer, pooled=pooled) -> tuple[Tensor, Tensor]:
            return attend_sparse(step, layer, served.query, keys, values, pooled)

        def select(_: int, layer=layer, pooled=pooled) -> tuple:
            return select_rows(step, layer, served.query, keys, pooled)

        out, blocks = attend(0)
        yield about | {
            "what": name,
            "ms": measure(attend, **timed).as_dict(),
            "select_ms": measure(select, **timed).as_dict(),
            "density": float(blocks[0] / blocks[1]),
            "error": error(out),
            "error_to_dense": float((out.float() - dense.float()).norm() / dense.float().norm()),
        }


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
    parser.add_argument("--contexts", type=flags.whole(PAGE, PAGE), nargs="+", default=[32768, 131072])
    parser.add_argument("--chunk", type=flags.whole(1), default=8192, help="tokens of a step, of each request")
    parser.add_argument("--batch", type=flags.whole(1), nargs="+", default=[1, 8])
    parser.add_argument("--heads", type=flags.whole(1), nargs=3, default=[32, 8, 128], metavar=("Hq", "Hkv", "D"))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="NAME")
    parser.add_argument("--seconds", type=flags.positive, default=1.0, help="for each timing, about")
    parser.add_argument("--output", type=flags.new_file, help="file of JSON lines to add to; else they are printed")
    parser.add_argument("--commit", help="where there is no git history")
    parser.add_argument("--dry-run", action="store_true", help="a small case, on whatever device there is")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.dry_run:
        options.contexts, options.chunk, options.batch, options.heads = [1024], 256, [1, 2], [4, 2, 16]
        options.seconds = 0.01
    if options.chunk > min(options.contexts):
        raise SystemExit(f"--chunk must be at most the shortest of --contexts, got {options.chunk}")
    if options.heads[0] % options.heads[1] or options.heads[2] % 16:
        raise SystemExit(f"--heads must be Hq, a multiple of Hkv, and D, a multiple of 16, got {options.heads}")
    about = describe(device, options.commit)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for context in options.contexts:
        whole, first = serve(context, options.chunk, max(options.batch), tuple(options.heads), dtype, device)
        for batch in options.batch:
            for row in rows_of(whole.of_first(batch), first, device, options):
                line = json.dumps(row | {"heads": options.heads, "dtype": str(dtype)} | about)
                if options.output:
                    with options.output.open("a") as stream:
                        stream.write(line + "\n")
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
