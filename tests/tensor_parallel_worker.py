"""One process of a tensor-parallel prefill, `torchrun --nproc-per-node N worker.py MODEL_FOLDER OUT`, or the only one.

Writes, from rank 0, the logits and every layer's kept blocks of all heads.
"""

import os
import sys
from unittest.mock import patch

import torch
import torch.distributed as dist
from model_families import IDS
from transformers import AutoModelForCausalLM

from rr_flex import select_blocks
from rr_flex.models import enable, forward


def main(folder: str, out: str) -> None:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto" if world > 1 else None).eval()
    kept = []
    attend = forward.answer

    def recorded(q, k, v, asked, **options):
        local = select_blocks(q, k, config=asked.config, **options).kept
        parts = [torch.empty_like(local) for _ in range(world)]
        if world > 1:
            dist.all_gather(parts, local)
        kept.append(torch.cat(parts if world > 1 else [local], 1))
        # Rank 0 compiles, and then the others find its code in the cache.
        if rank > 0:
            dist.barrier()
        attended = attend(q, k, v, asked, **options)
        if rank == 0 and world > 1:
            dist.barrier()
        return attended

    settings = {"tau": [(0.3, 0.4, 0.5, 0.6), 0.5], "block_size": 64, "dense_last_rows": 0, "min_length": 0}
    with torch.no_grad(), enable(model, **settings), patch.object(forward, "answer", recorded):
        logits = model(IDS[:1], use_cache=False).logits
    if rank == 0:
        torch.save({"logits": logits, "kept": kept, "heads": model.model.layers[0].self_attn.q_proj.weight.shape}, out)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
