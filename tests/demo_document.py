"""A document as `rr-flex demo --json --maps` writes it, of block maps made here."""

import torch

from rr_flex.evaluation.prefill import LayerMaps
from rr_flex.view.page.block_maps_json import maps_as_json

HEADS, BLOCK = 4, 128


def layer_maps(nQ: int, seed: int) -> LayerMaps:
    """Causal maps in which head h of any layer puts half of each row's mass on its first block and keeps it."""
    generator = torch.Generator().manual_seed(seed)
    visible = torch.ones(nQ, nQ, dtype=torch.bool).tril().expand(HEADS, -1, -1)
    mass = torch.rand(HEADS, nQ, nQ, generator=generator) * visible
    mass = mass / mass.sum(-1, keepdim=True)
    mass[..., 0] += 1
    kept = visible & (torch.rand(HEADS, nQ, nQ, generator=generator) < 0.4)
    kept = kept | torch.eye(nQ, dtype=torch.bool)
    kept[..., 0] = True
    error = torch.rand(HEADS, nQ, generator=generator)
    return LayerMaps(true_mass=mass, estimated_mass=mass.roll(1, 0), kept=kept, visible=visible, row_error=error)


def demo_document(*, layers: int = 3, length: int = 1000, tokens: list[str] | None = None) -> dict:
    maps = {layer: layer_maps(-(-length // BLOCK), layer) for layer in range(layers)}
    measured = {
        layer: [(layer + 1) * (head + 1) / (layers * HEADS) for head in range(HEADS)] for layer in range(layers)
    }
    return {
        "title": f"tiny, {length:,} tokens",
        "model": "tiny",
        "texts": ["my.txt"],
        "tokens": length,
        "config": {"tau": 0.9, "query_stride": None},
        "device": "CPU, 2 threads",
        "dtype": "float32",
        "torch": "2.13.0",
        "rr_flex": "0.9.9",
        "python": "3.11.7",
        "mean": {"density": 0.5, "recall": 0.9, "error": 0.01},
        "layers": [{"layer": layer, "density": m, "recall": m, "error": m} for layer, m in measured.items()],
        "language_model": {"perplexity": 10.0, "perplexity_compared": 11.0, "agreement": 0.95, "kl": 0.01},
        "seconds": {"compilation": 20.0, "dense attention": 0.5},
        "peak_memory_bytes": 2**30,
        "maps": maps_as_json(
            maps, length=length, block_size=(BLOCK, BLOCK), tokens=tokens or [f" t{number}" for number in range(length)]
        ),
    }
