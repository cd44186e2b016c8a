"""Dense causal attention by everything that is installed: what sparse attention has to beat."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import stages
from rr_flex import RRConfig
from rr_flex.kernels.options import attention_options

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

BLOCK = (128, 128)
STRIP_SCORES = 1 << 28  # float32 scores held at once by `exact_rows`: 1 GiB


class Absent(Exception):
    """This kernel cannot run here; the message says why."""


@dataclass(frozen=True)
class Dense:
    """One dense kernel, made ready for inputs of one shape."""

    name: str
    attend: Attention
    context: Callable[[], AbstractContextManager] = nullcontext  # around all calls, so that it costs none of them
    note: str | None = None


def prepare(name: str, q: Tensor, k: Tensor, v: Tensor) -> Dense:
    """The kernel of that name, run once on q, k, v; Absent where it cannot run."""
    try:
        dense = MAKERS[name](q, k, v)
        with dense.context():
            dense.attend(q, k, v)
    except Absent:
        raise
    except Exception as error:  # a package's import may fail in any way
        raise Absent(f"{type(error).__name__}: {first_line(error)}") from error
    return dense


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def sdpa(backend: SDPBackend) -> Callable[..., Dense]:
    def make(q: Tensor, k: Tensor, v: Tensor) -> Dense:
        def attend(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

        def attend_repeated(q, k, v):
            return F.scaled_dot_product_attention(q, *repeated(q, k, v), is_causal=True)

        def context():
            return sdpa_kernel(backend)

        name = backend.name.lower()
        with warnings.catch_warnings(record=True) as reasons:
            warnings.simplefilter("always")
            for candidate, note in ((attend, None), (attend_repeated, "repeats the keys in every call")):
                try:
                    with context():
                        candidate(q, k, v)
                except RuntimeError as error:
                    failed = error
                else:
                    return Dense(name, candidate, context, note)
        raise Absent("; ".join(dict.fromkeys(first_line(reason.message) for reason in reasons)) or first_line(failed))

    return make


def repeated(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    group = q.shape[1] // k.shape[1]
    return [x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v)]


def flex(q: Tensor, k: Tensor, v: Tensor) -> Dense:
    """FlexAttention over all visible blocks."""
    L = q.shape[2]
    blocks = stages.causal_blocks(RRConfig(), L, q.device)
    mask = stages.block_mask(blocks.visible, blocks.whole, RRConfig(), L)
    options = attention_options(q, BLOCK)

    def attend(q, k, v):
        return stages.attend(q, k, v, mask, options)

    return Dense("flex", attend, note=str(options))


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor) -> Dense:
    from flash_attn.cute import flash_attn_func

    def attend(q, k, v):
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)  # takes B L H D
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return Dense("fa4", attend)


MAKERS: dict[str, Callable[[Tensor, Tensor, Tensor], Dense]] = {
    "fa4": flash_attention_4,
    "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "fa2": sdpa(SDPBackend.FLASH_ATTENTION),
    "math": sdpa(SDPBackend.MATH),
    "flex": flex,
}


def names_for(device: torch.device) -> tuple[str, ...]:
    """Every dense kernel worth timing there. On the CPU torch's flash kernel is the one that "fa2" names."""
    return ("fa4", "cudnn", "fa2", "flex") if device.type == "cuda" else ("fa2", "math")


def attention_flops(q: Tensor) -> float:
    """Of dense causal attention: two products, 2 operations a multiply-add, over L (L + 1) / 2 pairs."""
    B, Hq, L, D = q.shape
    return 4.0 * D * B * Hq * (L * (L + 1) / 2)


def sampled_rows(L: int, count: int, device: torch.device, seed: int = 0) -> Int[Tensor, " rows"]:
    """One random row of each of `count` equal parts of the text; every row where there are no more than that."""
    if count >= L:
        return torch.arange(L, device=device)
    part = torch.arange(count) * L // count
    width = (torch.arange(1, count + 1) * L // count) - part
    inside = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * width
    return (part + inside.long()).to(device)


def exact_rows(
    q: Float[Tensor, "B Hq L D"],
    k: Float[Tensor, "B Hkv L D"],
    v: Float[Tensor, "B Hkv L D"],
    rows: Int[Tensor, " rows"],
) -> Float[Tensor, "B Hq rows D"]:
    """Dense causal attention of some queries in float32, one key head and some rows at a time."""
    B, Hq, L, D = q.shape
    Hkv = k.shape[1]
    group = Hq // Hkv
    position = torch.arange(L, device=q.device)
    out = torch.empty(B, Hq, len(rows), D, dtype=torch.float32, device=q.device)
    for b in range(B):
        for head in range(Hkv):
            heads = slice(head * group, (head + 1) * group)
            keys, values = k[b, head].float(), v[b, head].float()
            for part in torch.arange(len(rows), device=q.device).split(max(1, STRIP_SCORES // (group * L))):
                queries = q[b, heads, rows[part]].float() * D**-0.5
                scores = (queries @ keys.T).masked_fill_(position > rows[part, None], -torch.inf)
                out[b, heads, part] = scores.softmax(-1) @ values
    return out


def relative_error(out: Tensor, exact: Float[Tensor, "B Hq rows D"], rows: Int[Tensor, " rows"]) -> float:
    """‖out − exact‖ / ‖exact‖ over the rows that `exact` has, in float32."""
    return ((out[:, :, rows].float() - exact).norm() / exact.norm()).item()
