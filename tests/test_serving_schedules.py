"""What a request gets from a server does not depend on its neighbours: random schedules over a cache of pages."""

from itertools import pairwise

import torch
from paged_server import VOCABULARY, PagedServer

from rr_flex import RRConfig, select_blocks
from rr_flex.sampling import pooled_features
from rr_flex.serving.pages import PooledPages, read_pages, tokens_to_pool
from rr_flex.serving.settings import Layer
from rr_flex.serving.step import SparseStep, select_rows
from rr_flex.serving.step_rows import dense_batch, pieces_of_step

SCHEDULES = 10_000
SCHEDULES_WITH_ATTENTION = 300


def batch_of(chunks):
    """query_starts, lengths and prefilling of a step."""
    starts = [0]
    for chunk in chunks:
        starts.append(starts[-1] + chunk.stop - chunk.start)
    return starts, [chunk.stop for chunk in chunks], [chunk.prefilling for chunk in chunks]


class Cache:
    """Pools of keys and values and the pooled keys beside them; what a chunk computes is written by its slots."""

    def __init__(self, pages, page, keys, values, stride):
        self.page, self.of_token = page, (keys, values)
        Hkv, D = keys.shape[1:]
        self.pools = [torch.full((pages, Hkv, page, D), torch.nan, dtype=keys.dtype) for _ in range(2)]
        empty = torch.full((pages, Hkv, page // stride, 2 * D), torch.nan, dtype=keys.dtype)
        self.pooled = PooledPages(features=empty, stride=stride, order=2)

    def write(self, server, chunks, starts, lengths, exact):
        slots = torch.tensor([slot for chunk in chunks for slot in server.slots(chunk)])
        rows = torch.cat([chunk.request.rows[chunk.start : chunk.stop] for chunk in chunks])
        for pool, of_token in zip(self.pools, self.of_token, strict=True):
            pool[slots // self.page, :, slots % self.page] = of_token[rows]
        tokens = tokens_to_pool(starts, lengths, exact, self.pooled.stride)
        if tokens:
            self.pooled.rewrite(self.pools[0], slots[tokens])


def check_pieces(chunks, pieces, starts, min_length, row):
    """Whole rows in a prompt's chunk, long enough, are sparse, and nothing else; the pieces are the batch, in order."""
    token = 0
    for piece in pieces:
        assert piece.token == token and len(piece) > 0
        token += len(piece)
    assert token == starts[-1]
    for number, chunk in enumerate(chunks):
        own = [piece for piece in pieces if piece.request == number]
        assert own[0].start == chunk.start and own[-1].stop == chunk.stop
        sparse = {at for piece in own if piece.sparse for at in range(piece.start, piece.stop)}
        alone = {
            at
            for at in range(chunk.start, chunk.stop)
            if chunk.prefilling
            and at // row * row >= chunk.start
            and (at // row + 1) * row <= chunk.stop
            and (at // row + 1) * row >= min_length
        }
        assert sparse == alone


def check_bounds(chunks, pieces, min_length, row, resumed):
    """What cuts and preemptions may change: a cut its own row, a resumption the generated tokens of one chunk, or where
    the server takes it for a prompt of all that it has, those that were generated before.

    `resumed`: the chunks in which generated tokens were sparse, by request and the times it was preempted.
    """
    for number, chunk in enumerate(chunks):
        request, own = chunk.request, [piece for piece in pieces if piece.request == number]
        cut = {at // row for piece in own if piece.reason == "cut" for at in range(piece.start, piece.stop)}
        cut = {each for each in cut if (each + 1) * row >= min_length}
        assert cut <= {at // row for at in (chunk.start, chunk.stop) if at % row}
        if any(piece.sparse and piece.stop > request.prompt for piece in own):
            assert request.preempted and chunk.start < request.prefill
            life = id(request), request.preempted
            assert life not in resumed or request.prefill > request.prompt
            resumed[life] = chunk  # which keeps the request, and so its id


def check_dense(pieces, starts):
    dense = dense_batch(pieces)
    wanted = [piece for piece in pieces if not piece.sparse]
    if dense is None:
        assert not wanted
        return
    tokens = [at for piece in wanted for at in range(piece.token, piece.token + len(piece))]
    assert sorted(dense.tokens.tolist()) == tokens
    bounds = dense.query_starts.tolist()
    for number, (first, stop) in enumerate(pairwise(bounds)):
        (piece,) = (piece for piece in wanted if piece.token == dense.tokens[first])
        assert (stop - first, dense.lengths[number], dense.requests[number]) == (len(piece), piece.stop, piece.request)
        assert dense.longest >= stop - first


def test_random_schedules_keep_the_books():
    """10^4 schedules: which rows are sparse, what their tables read, pooled pages against fresh pooling, exactly."""
    row, stride = 4, 2
    # Whole numbers: means and variances of two are exact.
    keys = torch.randint(-500, 500, (VOCABULARY, 1, 1), generator=torch.Generator().manual_seed(0)).float()
    totals = {"hits": 0, "preempted": 0, "cancelled": 0, "evicted": 0, "sparse": 0}
    resumed_in_all = 0
    for seed in range(SCHEDULES):
        page, min_length, pages = (4, 8)[seed % 2], (0, 0, 9, 16)[seed % 4], (14, 8)[seed % 2]
        server = PagedServer(seed, pages=pages, page=page, longest=40, resumes_prompts=seed % 5 == 0)
        cache, resumed = Cache(pages, page, keys, -keys, stride), {}
        for _ in range(7):
            chunks = server.step()
            if not chunks:
                continue
            starts, lengths, prefilling = batch_of(chunks)
            pieces = pieces_of_step(starts, lengths, prefilling, min_length=min_length, row=row)
            check_pieces(chunks, pieces, starts, min_length, row)
            check_bounds(chunks, pieces, min_length, row, resumed)
            check_dense(pieces, starts)
            exact = [flag or seed % 3 > 0 for flag in prefilling]
            cache.write(server, chunks, starts, lengths, exact)
            for piece in (piece for piece in pieces if piece.sparse):
                totals["sparse"] += 1
                request = chunks[piece.request].request
                table = torch.tensor([request.table[: -(-piece.stop // page)]])
                own = keys[request.rows[: piece.stop]].movedim(0, 1)[None]
                assert torch.equal(read_pages(cache.pools[0], table)[:, :, : piece.stop], own)
                fresh = pooled_features(own, stride, order=2)
                assert torch.equal(cache.pooled.read(table)[:, :, : piece.stop // stride], fresh)
            server.finish(chunks)
        resumed_in_all += len(resumed)
        for name, count in server.seen.items():
            totals[name] += count
    assert min(totals.values()) > SCHEDULES / 10 and resumed_in_all > SCHEDULES / 100, (totals, resumed_in_all)


def attend(q, k, v, start, kept=None):
    """Causal softmax attention of queries at start, start + 1, … over all keys, or over those of the kept blocks."""
    seen = torch.arange(k.shape[2]) <= torch.arange(start, start + q.shape[2])[:, None]
    if kept is not None:
        seen = seen & kept.repeat_interleave(128, 2).repeat_interleave(128, 3)
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(group, 1)


def test_random_schedules_attend_as_the_request_alone():
    """Whole rows keep the blocks of the request alone and have its outputs; rows that a cut splits are dense."""
    Hq, Hkv, D, page = 2, 1, 16, 128
    generator = torch.Generator().manual_seed(1)
    queries, keys, values = (
        torch.randn(VOCABULARY, heads, D, generator=generator) * factor
        for heads, factor in ((Hq, 2.0), (Hkv, 1.0), (Hkv, 1.0))
    )
    config = RRConfig(tau=0.7, dense_last_rows=0, min_length=0)
    layer = Layer(config=config, scale=D**-0.5, softcap=None, head_offset=0)
    checked, dropped, together = 0, 0, 0
    for seed in range(SCHEDULES_WITH_ATTENTION):
        server = PagedServer(seed, pages=12, page=page, longest=700)
        cache = Cache(12, page, keys, values, 8)
        for _ in range(4):
            chunks = server.step()
            if not chunks:
                continue
            starts, lengths, prefilling = batch_of(chunks)
            cache.write(server, chunks, starts, lengths, [True] * len(chunks))
            pieces = pieces_of_step(starts, lengths, prefilling)
            chosen = blocks_of_step(chunks, pieces, layer, queries, cache)
            together += len(chosen) > 1
            for piece in pieces:
                request = chunks[piece.request].request
                table = torch.tensor([request.table[: -(-piece.stop // page)]])
                k, v = (read_pages(pool, table)[:, :, : piece.stop] for pool in cache.pools)
                q_alone, k_alone, v_alone = (
                    x[request.rows[: piece.stop]].movedim(0, 1)[None] for x in (queries, keys, values)
                )
                q = q_alone[:, :, piece.start :]
                if not piece.sparse:
                    expected = attend(q_alone, k_alone, v_alone, 0)[:, :, piece.start :]
                    torch.testing.assert_close(attend(q, k, v, piece.start), expected, atol=1e-6, rtol=1e-5)
                    continue
                alone = select_blocks(q_alone, k_alone, config=config).kept
                kept = chosen[piece]
                assert torch.equal(kept, alone[:, :, piece.start // 128 :])
                expected = attend(q_alone, k_alone, v_alone, 0, alone)[:, :, piece.start :]
                torch.testing.assert_close(attend(q, k, v, piece.start, kept), expected, atol=1e-6, rtol=1e-5)
                checked, dropped = checked + 1, dropped + int((~kept).sum())
            server.finish(chunks)
    assert checked > SCHEDULES_WITH_ATTENTION / 2 and dropped > checked and together > SCHEDULES_WITH_ATTENTION / 10


def blocks_of_step(chunks, pieces, layer, queries, cache):
    """What the step keeps for each sparse piece, as the server selects it: several at once, over its pages."""
    table = torch.zeros(len(chunks), max(len(chunk.request.table) for chunk in chunks), dtype=torch.int32)
    for row, chunk in enumerate(chunks):
        table[row, : len(chunk.request.table)] = torch.tensor(chunk.request.table)
    step = SparseStep.of(pieces, table, cache.page)
    if step is None:
        return {}
    query = torch.cat([queries[chunk.request.rows[chunk.start : chunk.stop]] for chunk in chunks])
    kept, _, _ = select_rows(step, layer, query, cache.pools[0])
    sizes = [len(piece) // 128 for piece in step.sparse]
    parts = zip(step.sparse, kept.split(sizes, 2), strict=True)
    return {piece: rows[..., : piece.stop // 128] for piece, rows in parts}
