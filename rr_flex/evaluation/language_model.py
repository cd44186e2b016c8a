"""What a change to the attention does to a language model's predictions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LanguageModelComparison:
    """Two runs over the same tokens, the second judged by the first."""

    perplexity: float  # of the reference run
    perplexity_compared: float
    agreement: float  # share of positions where both name the same most likely next token
    kl: float  # nats a token, KL(reference ‖ compared), mean over positions


def compare_logits(
    reference: Float[Tensor, "L V"],
    compared: Float[Tensor, "L V"],
    ids: Int[Tensor, "L"],
    *,
    chunk: int = 256,
    head: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> LanguageModelComparison:
    """Compares two runs' logits over `ids`, `chunk` positions at a time so that no second [L, V] is made.

    With `head` (a model's last projection) the runs are hidden states [L, width], and no [L, V] is made at all.
    The last position has no next token in `ids`: it counts for agreement and KL, not for perplexity.
    """
    L = ids.shape[0]
    loss = torch.zeros(2, dtype=torch.float64, device=reference.device)
    agreed = torch.zeros((), dtype=torch.int64, device=reference.device)
    kl = torch.zeros((), dtype=torch.float64, device=reference.device)
    for start in range(0, L, chunk):
        log_p = head(reference[start : start + chunk]).float().log_softmax(-1)
        log_q = head(compared[start : start + chunk]).float().log_softmax(-1)
        target = ids[start + 1 : start + chunk + 1]
        for run, log_probability in enumerate((log_p, log_q)):
            loss[run] += F.nll_loss(log_probability[: target.shape[0]], target, reduction="sum")
        agreed += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
        kl += (log_p.exp() * (log_p - log_q)).sum()
    perplexity = (loss / (L - 1)).exp().tolist()
    return LanguageModelComparison(
        perplexity=perplexity[0], perplexity_compared=perplexity[1], agreement=agreed.item() / L, kl=kl.item() / L
    )
