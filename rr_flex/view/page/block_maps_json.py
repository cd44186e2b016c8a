"""Block maps as JSON: base64 of little-endian numbers, row by row, so that a whole model's fit in a page."""

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rr_flex.mass import row_share
from rr_flex.view.cells import cell_size, kept_of_cells, shares_of_cells

SIDE = 128  # cells a side, at most


def maps_as_json(
    layers: Mapping[int, Any], *, length: int, block_size: tuple[int, int], tokens: list[str]
) -> dict[str, Any]:
    """`layers`: by number, [Hq, nQ, nK] tensors true_mass, estimated_mass, kept and visible (evaluation.LayerMaps).

    Each head gets `true` and `estimated`, float16 shares of the row's mass; `kept`, bytes: 0 where the mask hides the
    cell, else 1 + 254 × the kept share of its blocks. A cell is `blocks_per_cell` blocks a side.
    """
    nQ, nK = next(iter(layers.values())).kept.shape[1:]
    size = cell_size(nQ, nK, SIDE)
    return {
        "length": length,
        "block_size": list(block_size),
        "blocks_per_cell": size,
        "rows": -(-nQ // size),
        "columns": -(-nK // size),
        "tokens": tokens,
        "layers": [{"layer": layer, "heads": heads(layers[layer], size)} for layer in sorted(layers)],
    }


def heads(maps: Any, size: int) -> list[dict[str, str]]:
    true, estimated = (shares_of_cells(row_share(mass), size) for mass in (maps.true_mass, maps.estimated_mass))
    share = kept_of_cells(maps.kept, maps.visible, size)
    kept = torch.where(share < 0, 0, 1 + 254 * share).round().to(torch.uint8)
    return [
        {"true": encoded(t.half()), "estimated": encoded(e.half()), "kept": encoded(k)}
        for t, e, k in zip(true, estimated, kept, strict=True)
    ]


def encoded(numbers: Tensor) -> str:
    array = numbers.contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()
