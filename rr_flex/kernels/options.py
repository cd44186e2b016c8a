"""Options of the flex_attention kernels: plain data, looked up by card, head dim and dtype."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rr_flex.kernels.break_even import Costs

# Compute capability -> head dim -> dtype -> options, as `python -m benchmarks tune` writes it.
TUNED = json.loads(Path(__file__).with_name("tuned.json").read_text())


def read_cards(path: str | Path) -> None:
    """Takes the cards of a JSON file, such as `rr-flex tune --table` writes, beside those that ship; its entries win.

    For this process. ValueError where the file is none.
    """
    try:
        cards = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = [(card, D, by_dtype) for card, by_dim in cards.items() for D, by_dtype in by_dim.items()]
        if not all(isinstance(options, dict) for _, _, by_dtype in entries for options in by_dtype.values()):
            raise AttributeError("options that are no object")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"path must hold card -> head dim -> dtype -> options as JSON, got {path}: {error}") from error
    for card, D, by_dtype in entries:
        TUNED.setdefault(card, {}).setdefault(D, {}).update(by_dtype)


COLUMNS = 128  # key blocks that the estimate as attention takes at once, where the table says nothing


def attention_options(
    q: Tensor, block_size: tuple[int, int], backend: str = "triton", *, whole_tiles: bool = False
) -> dict[str, Any]:
    """Kernel options of block-sparse attention over blocks of `block_size` (queries, keys).

    Empty on the CPU. Elsewhere the tuned entry for the card where there is one, and tiles that fit the blocks.
    `whole_tiles`: both lengths are multiples of 128. Triton's kernel can't see that of a length that is a symbol, and
    checking the bounds of every block takes 8 % of its time.
    FlashAttention ("flash") has no options but its name.
    """
    if q.device.type == "cpu":
        return {}
    if backend == "flash":
        return {"BACKEND": "FLASH"}
    q_block, k_block = block_size
    options = {"FORCE_USE_FLEX_ATTENTION": True}  # the decoding kernel, for few queries, takes other lists
    options |= tuned(q.device, q.shape[-1], q.dtype).get("attention", {})
    if whole_tiles:
        options["IS_DIVISIBLE"] = True
    # A tile must divide the mask's block, in the backward too.
    for size, names in ((q_block, ("BLOCK_M", "BLOCK_M2")), (k_block, ("BLOCK_N", "BLOCK_N1"))):
        if size == 64:
            options |= dict.fromkeys(names, 64)
    return options


def estimate_options(sampled: Tensor) -> dict[str, Any]:
    """Kernel options of the estimate as attention, whose tiles are 128 × 128."""
    options = {"FORCE_USE_FLEX_ATTENTION": True}
    return options | tuned(sampled.device, sampled.shape[-1], sampled.dtype).get("estimate", {})


def estimate_columns(sampled: Tensor, keys_per_block: int, tile: int) -> int:
    """Key blocks that the estimate takes at once, the width of its one-hot values: whole tiles of pooled keys."""
    columns = tuned(sampled.device, sampled.shape[-1], sampled.dtype).get("estimate_columns", COLUMNS)
    return max(columns, tile // keys_per_block)


def costs_of(q: Tensor, kernel: str) -> Costs | None:
    """What was measured for q's card, head dim and dtype and the kernel of that name; None where nothing was.

    Of a CPU those of heads of 64 stand for all head dims, and float32's for a dtype without its own.
    """
    if q.device.type == "cpu":
        dtypes = TUNED.get("cpu", {}).get("64", {})
        entry = dtypes.get(str(q.dtype).removeprefix("torch."), dtypes.get("float32", {}))
    else:
        entry = tuned(q.device, q.shape[-1], q.dtype)
    found = entry.get("costs", {}).get(kernel)
    return None if found is None else Costs(**found)


def tuned(device: torch.device, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """The table's entry for a card, or an empty one: the compiler's own defaults."""
    if device.type != "cuda":
        return {}
    card = torch.cuda.get_device_properties(device)
    return tuned_for(f"{card.major}.{card.minor}", head_dim, dtype)


def tuned_for(capability: str, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """`tuned` for cards of a compute capability, as in "9.0"."""
    # In a caller's graph the head dim may be a symbol, of which an f-string makes a text and str() does not.
    entry = TUNED.get(capability, {}).get(f"{head_dim}", {})
    return entry.get(str(dtype).removeprefix("torch."), {})
