"""Document mask for sequences packed end to end."""

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from mask_mods.spans import (
    Index,
    SpanMask,
    buffered,
    check_count,
    check_integers,
    check_per_batch,
    larger,
    per_batch,
    show,
    smaller,
)


def document(document_ids: Int[Tensor, "B Lk"] | Int[Tensor, " Lk"], offset: Index = 0) -> SpanMask:
    """Key j is visible to the query at position p = i + offset when ids[p … j] are all equal: one run, one document.

    An id that comes back after another one starts a new document. Positions outside [0, Lk) belong to none. Not causal
    by itself: `both(document(ids), causal())`.
    """
    check_integers("document_ids", document_ids, (1, 2), "[Lk] or [B, Lk]")
    check_per_batch("offset", offset)
    ids = document_ids[0] if document_ids.ndim == 2 and document_ids.shape[0] == 1 else document_ids
    # The run number of each token is sorted, so a run's first and last token are where it would be inserted.
    run = F.pad((ids[..., 1:] != ids[..., :-1]).long().cumsum(-1), (1, 0))  # [Lk] or [B, Lk]
    run_first = buffered(torch.searchsorted(run, run, out_int32=True))
    run_last = buffered(torch.searchsorted(run, run, out_int32=True, right=True) - 1)
    # Lk − 1 as a tensor: under dynamic=True flex cannot capture an int that depends on the length.
    end = buffered(run_last.amax())

    def spans(b, h, q_idx):
        position = q_idx + per_batch(offset, b)
        token = smaller(larger(position, 0), end)
        first, last = (x[token] if x.ndim == 1 else x[b, token] for x in (run_first, run_last))
        return ((first, torch.where(token == position, last, -1)),)

    return SpanMask(spans, label=lambda: f"document({show(document_ids)}, offset={show(offset)})")


def documents_from_lengths(
    lengths: Int[Tensor, "B documents"] | Int[Tensor, " documents"], total: int
) -> Int[Tensor, "B Lk"] | Int[Tensor, " Lk"]:
    """Ids 0, 1, … of `total` tokens from the documents' lengths (of `cu_seqlens`: its `.diff()`), without a host sync.

    Tokens after the last document share one further id.
    """
    check_integers("lengths", lengths, (1, 2), "[documents] or [B, documents]")
    check_count("total", total, minimum=1)
    position = torch.arange(total, device=lengths.device).expand(*lengths.shape[:-1], total).contiguous()
    return torch.searchsorted(lengths.cumsum(-1), position, right=True)
