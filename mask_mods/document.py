"""Document mask for sequences packed end to end."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from mask_mods.checks import can_be_read, check_count, check_device, check_flag, check_integers
from mask_mods.positions import PositionMask
from mask_mods.spans import Index, buffered, called, only_where, per_batch


@dataclass(frozen=True, eq=False, repr=False)
class Document(PositionMask):
    """See `document`."""

    document_ids: Int[Tensor, "B Lk"] | Int[Tensor, " Lk"]
    run_first: Int[Tensor, "B Lk"] | Int[Tensor, " Lk"]  # first token of each token's document
    run_last: Int[Tensor, "B Lk"] | Int[Tensor, " Lk"]
    # Lk − 1 as a tensor: under dynamic=True flex cannot capture an int that depends on the length.
    end: Int[Tensor, "..."]

    def spans(self, b, h, q_idx):
        position, end = self.position(b, q_idx), per_batch(self.end, b)
        inside = (position >= 0) & (position <= end)
        token = torch.where(inside, position, end)
        first, last = (x[token] if x.ndim == 1 else x[b, token] for x in (self.run_first, self.run_last))
        return (only_where(inside, first, last),)

    def check(self, *, B: int, Hq: int, Lq: int, Lk: int, device: torch.device | str) -> None:
        super().check(B=B, Hq=Hq, Lq=Lq, Lk=Lk, device=device)
        shape = tuple(self.document_ids.shape)
        if shape not in ((Lk,), (B, Lk)):
            raise ValueError(f"document_ids must be of shape [{Lk}] or [{B}, {Lk}], an id a key, got {list(shape)}")
        check_device("document_ids", self.run_first, device)
        if can_be_read(self.document_ids):
            _check_runs(self.document_ids)

    def __repr__(self) -> str:
        return called("document", self.document_ids, offset=self.offset)


def document(document_ids: Int[Tensor, "B Lk"] | Int[Tensor, " Lk"], offset: Index | None = None) -> PositionMask:
    """Key j is visible to the query at position p = i + offset when ids[p … j] are all equal: one run, one document.

    An id that comes back after another one starts a new document, which `check`, and with it rr_flex's calls, refuse
    where they can read the ids: on a CPU. Positions outside [0, Lk) belong to none. Not causal by itself:
    `both(document(ids), causal())`. Offset: see PositionMask.
    """
    check_integers("document_ids", document_ids, (1, 2), "[Lk] or [B, Lk]")
    ids = document_ids[0] if document_ids.ndim == 2 and document_ids.shape[0] == 1 else document_ids
    # The run number of each token is sorted, so a run's first and last token are where it would be inserted.
    run = F.pad((ids[..., 1:] != ids[..., :-1]).long().cumsum(-1), (1, 0))  # [Lk] or [B, Lk]
    run_first = buffered(torch.searchsorted(run, run, out_int32=True))
    run_last = buffered(torch.searchsorted(run, run, out_int32=True, right=True) - 1)
    return Document(document_ids, run_first, run_last, buffered(run_last.amax()), offset=offset)


def _check_runs(document_ids: Tensor) -> None:
    """ValueError for an id that comes back: FlexAttention's examples would join the two, this mask would not."""
    change = document_ids[..., 1:] != document_ids[..., :-1]
    if not (document_ids[..., 1:] < document_ids[..., :-1]).any():
        return
    ordered = document_ids.sort(-1).values
    returns = change.sum(-1) != (ordered[..., 1:] != ordered[..., :-1]).sum(-1)
    if returns.any():
        row = "" if document_ids.ndim == 1 else f" in sequence {returns.int().argmax().item()}"
        raise ValueError(
            f"document_ids must hold each document's tokens side by side, got an id that comes back{row}; number"
            " such documents apart"
        )


def documents_from_lengths(
    lengths: Int[Tensor, "B documents"] | Int[Tensor, " documents"], total: int, *, rest: bool = False
) -> Int[Tensor, "B Lk"] | Int[Tensor, " Lk"]:
    """Ids 0, 1, … of `total` tokens from the documents' lengths (of `cu_seqlens`: its `.diff()`), without a host sync.

    ValueError unless the lengths sum to `total`, where they can be read: on a CPU. With `rest` they may sum to less,
    and the tokens after the last document share one further id.
    """
    check_integers("lengths", lengths, (1, 2), "[documents] or [B, documents]")
    check_count("total", total, minimum=1)
    check_flag("rest", rest)
    if can_be_read(lengths):
        _check_sums(lengths, total, rest)
    position = torch.arange(total, device=lengths.device).expand(*lengths.shape[:-1], total).contiguous()
    return torch.searchsorted(lengths.cumsum(-1), position, right=True)


def _check_sums(lengths: Tensor, total: int, rest: bool) -> None:
    if (lengths < 0).any():
        raise ValueError(f"lengths must be at least 0, got {lengths.min().item()}")
    sums = lengths.sum(-1)
    wrong = sums[(sums > total) | (sums < total)] if not rest else sums[sums > total]
    if wrong.numel():
        rule, remedy = ("at most ", "") if rest else ("", "; rest=True makes what is left one further document")
        raise ValueError(f"lengths must sum to {rule}total {total}, got {wrong[0].item()}{remedy}")
