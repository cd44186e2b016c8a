"""One of several processes that prefill a model's prompt together, against one process: logits, cache, next tokens."""

import warnings

import torch
import torch.distributed as dist
from model_families import make
from transformers import DynamicCache

from rr_flex.distributed import Shards, make_mesh, zigzag
from rr_flex.distributed.models import cache_name, prefill
from rr_flex.models import enable

IDS = torch.randint(1, 64, (2, 600), generator=torch.Generator().manual_seed(4))
SETTINGS = {"tau": [(0.3, 0.4, 0.5, 0.6), 0.5], "block_size": 64, "min_length": 0}


def greedy(model, logits, cache, steps=3):
    """The next tokens, decoded with the cache that is there."""
    ids = IDS
    for _ in range(steps):
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        logits = model(ids[:, -1:], **{cache_name(model): cache}, use_cache=True).logits
    return ids[:, -steps:]


@torch.no_grad()
def main(ranks: int, families: list[str]) -> None:
    torch.compiler.set_stance("force_eager")
    warnings.simplefilter("ignore")
    mesh = make_mesh(sequence=ranks, device="cpu", timeout=60)
    shards = Shards(mesh, zigzag(IDS.shape[1], mesh.size()))
    for family in families:
        model = make(family)
        with enable(model, **SETTINGS):
            cache = DynamicCache()
            alone = model(IDS, **{cache_name(model): cache}, use_cache=True, logits_to_keep=1)
            out = prefill(model, IDS, shards)
            torch.testing.assert_close(out.logits, alone.logits, atol=1e-3, rtol=1e-3)
            for own, layer in zip(out.cache.layers, cache.layers, strict=True):
                torch.testing.assert_close(own.keys, layer.keys, atol=1e-3, rtol=1e-3)
                torch.testing.assert_close(own.values, layer.values, atol=1e-3, rtol=1e-3)
            assert torch.equal(greedy(model, out.logits, out.cache), greedy(model, alone.logits, cache))
        if dist.get_rank() == 0:
            print(f"{family}: same logits, cache and tokens", flush=True)
    dist.barrier()
    dist.destroy_process_group()
