"""Attention over a pool of pages is attention over the gathered keys, however the pages lie."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.paged_step import main as measure_paged_steps
from rr_flex import RRConfig, select_blocks
from rr_flex.runtime.private import graphs_compiled
from rr_flex.serving.batches import in_batches, select_batch
from rr_flex.serving.paged import as_sequence, folds_heads
from rr_flex.serving.pages import PooledPages, pools_of_cpu, pools_of_flash, read_pages
from rr_flex.serving.settings import Layer
from rr_flex.serving.step import SparseStep, attend_sparse, select_rows
from rr_flex.serving.step_rows import ROW, Piece, pieces_of_step
from rr_flex.serving.warmup import STEPS, compile_graphs, synthetic_step

pytestmark = pytest.mark.usefixtures("short_rows_are_long")
P, Hq, Hkv, D, PAGES = 128, 4, 2, 16, 24
LAYOUTS = ("heads outermost", "tokens outermost")


def random_cache(layout: str, seed: int) -> torch.Tensor:
    """[pages, Hkv, P, 2·D] in the memory order that a server may choose."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "heads outermost":
        return torch.randn(PAGES, Hkv, P, 2 * D, generator=generator)
    return torch.randn(PAGES, P, Hkv, 2 * D, generator=generator).transpose(1, 2)


def attention_over_kept(q, k, v, kept, k_block):
    """Plain softmax attention, float64, over the causal pairs of the kept blocks; queries end where the keys end."""
    Lq, Lk = q.shape[2], k.shape[2]
    position = torch.arange(Lk - Lq, Lk)[:, None]
    seen = (torch.arange(Lk) <= position) & kept.repeat_interleave(128, 2)[:, :, :Lq].repeat_interleave(k_block, 3)
    scores = q.double() @ k.double().repeat_interleave(Hq // Hkv, 1).mT * D**-0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.double().repeat_interleave(Hq // Hkv, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k_block", [128, 64])
def test_attention_over_pages_is_attention_over_the_gathered_keys(layout, k_block):
    cache = random_cache(layout, 0)
    config = RRConfig(block_size=(128, k_block), tau=0.6, dense_last_rows=0, min_length=0)
    layer = replace(Heads.layer_settings, config=config)
    # Three requests, of which the first begins its prompt and the others go on after a chunk or a prefix hit.
    step, table, query = step_of([(0, 256), (512, 640), (768, 1152)], torch.Generator().manual_seed(1))
    out, blocks = attend_sparse(step, layer, query, *pools_of_flash(cache))
    expected, counts = each_alone(step, layer, table, query, *pools_of_flash(cache))
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
    assert blocks.tolist() == counts and counts[0] < counts[1]


class Heads:
    """What a warm-up asks of a server's attention."""

    num_heads, num_kv_heads, head_size = Hq, Hkv, D
    layer_settings = Layer(
        config=RRConfig(tau=0.6, dense_last_rows=0, min_length=0), scale=D**-0.5, softcap=None, head_offset=0
    )
    pools = staticmethod(pools_of_cpu)
    side = None


def step_of(chunks, generator):
    """A step of (start, stop) of each prefilling request, its block table and its queries."""
    starts = [0]
    for start, stop in chunks:
        starts.append(starts[-1] + stop - start)
    order = torch.randperm(PAGES, generator=generator)
    table, at = torch.zeros(len(chunks), 10, dtype=torch.int32), 0
    for number, (_, stop) in enumerate(chunks):
        pages = -(-stop // P)
        table[number, :pages], at = order[at : at + pages], at + pages
    pieces = pieces_of_step(starts, [stop for _, stop in chunks], [True] * len(chunks))
    return SparseStep.of(pieces, table, P), table, torch.randn(starts[-1], Hq, D, generator=generator)


def each_alone(step, layer, table, query, keys, values):
    """Outputs of the step's pieces in its order, and blocks kept and visible, by each request alone."""
    outs, kept, visible = [], 0, 0
    for piece in step.sparse:
        own = table[piece.request : piece.request + 1, : -(-piece.stop // P)].long()
        k, v = (read_pages(pool, own)[:, :, : piece.stop] for pool in (keys, values))
        q = query[piece.token : piece.token + len(piece)].transpose(0, 1)[None]
        alone = select_blocks(q, k, config=layer.config, q_offset=piece.start)
        outs.append(attention_over_kept(q, k, v, alone.kept, layer.config.block_sizes[1])[0].transpose(0, 1))
        kept, visible = kept + int(alone.kept.sum()), visible + int(alone.visible.sum()) * Hq
    return torch.cat(outs), [kept, visible]


def pooled_anew(keys, config):
    """Every page's pooled keys."""
    stride = config.strides[1]
    pooled = PooledPages(
        features=torch.zeros(PAGES, Hkv, P // stride, D * config.order), stride=stride, order=config.order
    )
    pooled.rewrite(keys, torch.arange(PAGES * P))
    return pooled


@pytest.mark.parametrize("pools_of", [pools_of_cpu, pools_of_flash])
def test_a_step_attends_as_each_request_alone(pools_of):
    """A mixed step of cut rows, a prefix hit and a new prompt, with keys pooled by page and without."""
    generator = torch.Generator().manual_seed(4)
    keys, values = pools_of(random_cache("heads outermost", 5))
    step, table, query = step_of([(100, 700), (0, 300), (640, 1200)], generator)
    assert [(piece.start, piece.stop) for piece in step.sparse] == [(0, 256), (128, 640), (640, 1152)]
    for pooled in (None, pooled_anew(keys, Heads.layer_settings.config)):
        out, blocks = attend_sparse(step, Heads.layer_settings, query, keys, values, pooled)
        expected, counts = each_alone(step, Heads.layer_settings, table, query, keys, values)
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
        assert blocks.tolist() == counts and counts[0] < counts[1]


SETTINGS = (
    {"tau": 0.7},
    {"tau": 0.7, "order": 2, "key_stride": 16},
    {"preset": "best", "threshold": 0.05},
    {"pool": "queries", "tau": 0.7},
)


@settings(max_examples=40, deadline=None)
@given(
    chunks=st.lists(st.tuples(st.integers(0, 700), st.integers(1, 600)), min_size=2, max_size=6),
    which=st.sampled_from(SETTINGS),
    by_page=st.booleans(),
    seed=st.integers(0, 99),
)
def test_requests_selected_at_once_have_the_blocks_of_each_alone(chunks, which, by_page, seed):
    """Of any lengths: a batch pads shorter pieces and shorter requests, and that changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    keys, _ = pools_of_cpu(random_cache("heads outermost", seed))
    chunks = [(start, start + queries) for start, queries in chunks]
    if sum(-(-stop // P) for _, stop in chunks) > PAGES - 1:
        return
    step, table, query = step_of(chunks, generator)
    if step is None:
        return
    config = RRConfig.resolve(None, which | {"dense_last_rows": 0, "min_length": 0})
    layer = replace(Heads.layer_settings, config=config)
    pooled = pooled_anew(keys, config) if by_page and config.pool != "queries" else None
    kept, visible, whole = select_rows(step, layer, query, keys, pooled)
    at = 0
    for piece in step.sparse:
        own = table[piece.request : piece.request + 1, : piece.stop // P].long()
        q = query[piece.token : piece.token + len(piece)].transpose(0, 1)[None]
        alone = select_blocks(q, read_pages(keys, own), config=config, q_offset=piece.start)
        nQ, nK = alone.kept.shape[2:]
        for found, expected in ((kept, alone.kept), (visible, alone.visible), (whole, alone.whole)):
            assert torch.equal(found[:, :, at : at + nQ, :nK], expected) and not found[:, :, at : at + nQ, nK:].any()
        at += nQ
    assert at == kept.shape[2]


def test_a_batch_has_little_padding():
    def sizes(*chunks, device="cuda"):
        rows = {"request": 0, "token": 0, "reason": "sparse"}
        pieces = [Piece(start=start * ROW, stop=stop * ROW, **rows) for start, stop in chunks]
        found = in_batches(pieces, torch.device(device))
        return [[(piece.start // ROW, piece.stop // ROW) for piece in batch] for batch in found]

    # Of 131,072 keys each, eight are as many as are copied at once.
    assert sizes(*[(960, 1024)] * 9) == [[(960, 1024)] * 8, [(960, 1024)]]
    # On a CPU two requests of 8 rows and 64 rows of keys, not more.
    assert sizes(*[(56, 64)] * 3, device="cpu") == [[(56, 64)] * 2, [(56, 64)]]
    # As much work, in one by its keys and in the other by its queries.
    assert sizes((960, 961), (0, 31)) == [[(960, 961)], [(0, 31)]]
    assert sizes((0, 8), (4, 11), (0, 64), (3, 11)) == [[(0, 8), (4, 11), (3, 11)], [(0, 64)]]


def select_one(q, step, layer, keys, pooled=None):
    (batch,) = step.batches
    return select_batch(q, batch, layer, keys, pooled).kept


def test_ranks_of_tensor_parallelism_select_as_one():
    """Each rank has its query heads, their key heads, and the global index of its first head."""
    keys, _ = pools_of_cpu(random_cache("heads outermost", 9))
    step, _, query = step_of([(128, 1152)], torch.Generator().manual_seed(8))
    q = query[step.tokens].transpose(0, 1)[None]
    whole = select_one(q, step, Heads.layer_settings, keys)
    ranks = [
        select_one(q[:, first : first + 2], step, layer, keys[:, first // 2 : first // 2 + 1])
        for first, layer in ((0, Heads.layer_settings), (2, replace(Heads.layer_settings, head_offset=2)))
    ]
    assert torch.equal(torch.cat(ranks, 1), whole) and not whole.all()


def test_after_the_warm_up_no_step_compiles():
    told = []
    compile_graphs(Heads, torch.empty(0), P, told.append)
    assert f"step 1 of {len(STEPS)}" in told[0] and "graphs compiled in" in told[-1]
    before = graphs_compiled()
    generator = torch.Generator().manual_seed(6)
    for chunks in ([(0, 128)], [(128, 256)], [(0, 1152)], [(512, 1024), (0, 256), (128, 384)], [(1024, 1152)]):
        step, _, query = step_of(chunks, generator)
        with torch.inference_mode():
            attend_sparse(step, Heads.layer_settings, query, *pools_of_cpu(random_cache("heads outermost", 7)))
    assert graphs_compiled() == before
    compile_graphs(Heads, torch.empty(0), P, told.append)
    assert graphs_compiled() == before


def test_a_step_is_measured_against_the_dense_kernel(tmp_path):
    rows = tmp_path / "paged.jsonl"
    measure_paged_steps(["--dry-run", "--settings", "tau .9", "--output", str(rows)])
    rows = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(row["what"], row["batch"]) for row in rows[1::2]] == [("tau .9", 1), ("tau .9", 2)]
    for dense, sparse in zip(rows[::2], rows[1::2], strict=True):
        assert dense["error"] < 1e-5 and sparse["density"] < 0.8
        assert sparse["error_to_dense"] < 0.5 and 0 < sparse["select_ms"]["median"] < sparse["ms"]["median"]


def test_a_synthetic_step_has_pages_of_its_own():
    step, pages, queries = synthetic_step(((2, 1), (1, 0)), 256, torch.device("cpu"))
    assert [batch.table.tolist() for batch in step.batches] == [[[2]], [[0, 1]]]
    assert (pages, queries, len(step.tokens)) == (4, 384, 384)


def test_a_pool_is_one_sequence_without_a_copy():
    for layout in LAYOUTS:
        cache = random_cache(layout, 2)
        for pool in pools_of_flash(cache):
            assert as_sequence(pool).untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
    assert folds_heads(pools_of_flash(random_cache("heads outermost", 2))[0])
    assert not folds_heads(pools_of_flash(random_cache("tokens outermost", 2))[0])


def test_keys_that_lie_across_their_pages_are_refused():
    keys, values = pools_of_cpu(random_cache("heads outermost", 3))
    assert keys.shape == values.shape == (PAGES, Hkv, P, D)
    with pytest.raises(ValueError, match="pool must have whole tokens one behind the other"):
        as_sequence(keys)


def test_a_pool_beyond_the_kernels_offsets_is_refused():
    pool = torch.empty(2**16, 8, 128, 256, device="meta")[..., :128]
    with pytest.raises(ValueError, match="pool must reach over at most 2147483648 elements"):
        as_sequence(pool)
