"""Queries, keys and values to measure on: structured ones from a seed, or those captured from a real model.

Never plain Gaussians: their attention has nothing to select.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

WIDTHS = (8, 512)  # tokens of a content segment, log-uniform between
LOCAL_PERIODS = (8.0, 4096.0)  # tokens of a period of the local features, geometric between
SINK_TOKENS = 4
CHUNK_TOKENS = 1 << 17  # tokens generated at once, so that a million need no more float32 than 128K
NOISE = (0.1, 0.6)  # per dimension, a key's own part beside its segment's: log-uniform over segments


class Inputs(NamedTuple):
    q: Float[Tensor, "B Hq L D"]
    k: Float[Tensor, "B Hkv L D"]
    v: Float[Tensor, "B Hkv L D"]


class HeadTraits(NamedTuple):
    """What a query head looks for: the spread of its logits, in nats, by what causes them."""

    content: float  # standard deviation over key segments of amplitude 1
    shared: float  # share of the variance of what it seeks that all its queries have in common: vertical lines
    local: float  # gain at distance 0 over far away
    sink: float  # share of the mass that would fall on the sink without content of great amplitude


def structured(
    *,
    L: int,
    Hq: int,
    Hkv: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    B: int = 1,
) -> Inputs:
    """Attention with a sink, a local band and heavy-tailed content, different in every head; a seed fixes it.

    The text is cut into segments of random width. A key carries its segment's vector times a heavy-tailed amplitude,
    a query what its own segment seeks, so that logits are constant on rectangles but for each token's noise and their
    exponentials are log-normal. Positions give a band through rotary-like features, the first tokens a sink, and a
    random rotation of each key head hides which dimensions do what. Generated on `device`, a chunk of tokens at a time.
    """
    if D % 16 or Hq % Hkv:
        raise ValueError(f"D must be a multiple of 16 and Hq of Hkv, got D={D}, Hq={Hq}, Hkv={Hkv}")
    q = torch.empty(B, Hq, L, D, dtype=dtype, device=device)
    k, v = (torch.empty(B, Hkv, L, D, dtype=dtype, device=device) for _ in range(2))
    # Structure is drawn on the CPU, so that every device gets the same; noise where the tensors live.
    cpu = torch.Generator().manual_seed(seed)
    noise = torch.Generator(device).manual_seed(seed)
    for b in range(B):
        segment = segment_of_token(L, cpu).to(device)
        for key_head in range(Hkv):
            rotation = torch.linalg.qr(torch.randn(D, D, generator=cpu)).Q.to(device)
            heads = range(key_head * (Hq // Hkv), (key_head + 1) * (Hq // Hkv))
            fill_keys(k[b, key_head], v[b, key_head], segment, rotation, cpu, noise)
            for head in heads:
                fill_queries(q[b, head], segment, rotation, draw_traits(cpu), cpu, noise)
    return Inputs(q, k, v)


def segment_of_token(L: int, generator: torch.Generator) -> Int[Tensor, " L"]:
    """The segment that each token belongs to; widths are log-uniform between WIDTHS."""
    low, high = (math.log(width) for width in WIDTHS)
    shares = torch.rand(L // WIDTHS[0] + 1, generator=generator)
    ends = torch.exp(low + (high - low) * shares).long().cumsum(0)
    return torch.searchsorted(ends, torch.arange(L), right=True)


def draw_traits(generator: torch.Generator) -> HeadTraits:
    def between(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    return HeadTraits(
        content=between(2.4, 3.6), shared=between(0.1, 0.6), local=between(2.0, 9.0), sink=between(0.05, 0.5)
    )


def dimensions(D: int) -> tuple[int, int]:
    """Content and local dimensions; one is left for the sink."""
    local = D // 4
    return D - local - 1, local


def local_features(position: Int[Tensor, " n"], width: int) -> Float[Tensor, "n width"]:
    low, high = (math.log(period) for period in LOCAL_PERIODS)
    periods = torch.exp(torch.linspace(low, high, width // 2, device=position.device))
    angle = 2 * math.pi * position[:, None] / periods
    return math.sqrt(2) * torch.cat([angle.cos(), angle.sin()], dim=1)


def fill_keys(
    k: Float[Tensor, "L D"],
    v: Float[Tensor, "L D"],
    segment: Int[Tensor, " L"],
    rotation: Float[Tensor, "D D"],
    cpu: torch.Generator,
    noise: torch.Generator,
) -> None:
    L, D = k.shape
    content, local = dimensions(D)
    segments = int(segment[-1]) + 1
    # Student's t with 5 degrees of freedom, as normal × amplitude; a cap keeps one segment from taking everything.
    chi_square = torch.randn(segments, 5, generator=cpu).square().sum(1)
    amplitude = (5 / chi_square).sqrt().clamp(0.5, 2.2)
    meaning = (torch.randn(segments, content, generator=cpu) * amplitude[:, None]).to(k.device)
    low, high = (math.log(level) for level in NOISE)
    own = torch.exp(low + (high - low) * torch.rand(segments, generator=cpu)).to(k.device)
    value = torch.randn(segments, D, generator=cpu).to(k.device)
    for start in range(0, L, CHUNK_TOKENS):
        tokens = slice(start, min(start + CHUNK_TOKENS, L))
        position = torch.arange(tokens.start, tokens.stop, device=k.device)
        is_sink = (position < SINK_TOKENS).float()[:, None]
        # The sink speaks through its own dimension alone.
        features = [
            meaning[segment[tokens]] * (1 - is_sink),
            local_features(position, local) * (1 - is_sink),
            is_sink * math.sqrt(D),
        ]
        drawn = torch.randn(len(position), D, generator=noise, device=k.device)
        drawn *= own[segment[tokens], None] * (1 - is_sink)
        k[tokens] = ((torch.cat(features, 1) + drawn) @ rotation).to(k.dtype)
        drawn = torch.randn(len(position), D, generator=noise, device=k.device)
        v[tokens] = ((value[segment[tokens]] + drawn) * (1 - 0.9 * is_sink)).to(v.dtype)


def fill_queries(
    q: Float[Tensor, "L D"],
    segment: Int[Tensor, " L"],
    rotation: Float[Tensor, "D D"],
    traits: HeadTraits,
    cpu: torch.Generator,
    noise: torch.Generator,
) -> None:
    L, D = q.shape
    content, local = dimensions(D)
    segments = int(segment[-1]) + 1
    own = torch.randn(segments, content, generator=cpu) * math.sqrt(1 - traits.shared)
    sought = (own + torch.randn(content, generator=cpu) * math.sqrt(traits.shared)).to(q.device)
    per_unit = math.sqrt(D)  # undoes the scale of the logits
    sink = log_mass_of_content(L, segments, traits.content) + math.log(traits.sink / (1 - traits.sink))
    for start in range(0, L, CHUNK_TOKENS):
        tokens = slice(start, min(start + CHUNK_TOKENS, L))
        position = torch.arange(tokens.start, tokens.stop, device=q.device)
        features = [
            sought[segment[tokens]] * traits.content * per_unit / math.sqrt(content),
            local_features(position, local) * traits.local * per_unit / local,
            torch.full((len(position), 1), sink * per_unit / math.sqrt(D), device=q.device),
        ]
        drawn = torch.randn(len(position), D, generator=noise, device=q.device)
        q[tokens] = ((torch.cat(features, 1) + 0.3 * drawn) @ rotation).to(q.dtype)


def log_mass_of_content(L: int, segments: int, spread: float) -> float:
    """About the log-sum-exp of a query's content logits: `segments` normals of standard deviation `spread`.

    Their sum is near its mean, exp(spread² / 2) each, until its largest term takes over.
    """
    entropy = math.log(segments)
    tail = entropy + spread**2 / 2 if spread**2 < 2 * entropy else spread * math.sqrt(2 * entropy)
    return math.log(L / 2 / segments) + tail


def captured(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float16) -> Inputs:
    """q, k and v of one layer, saved from a real model as a dict in a .pt or .safetensors file, [B, H, L, D] or [H, L, D]."""
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
    elif path.suffix == ".pt":
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    else:
        raise ValueError(f"path must end in .pt or .safetensors, got {path}")
    missing = {"q", "k", "v"} - tensors.keys()
    if missing:
        raise ValueError(f"{path} must hold q, k and v, got {sorted(tensors)}")
    q, k, v = (tensors[name] if tensors[name].ndim == 4 else tensors[name][None] for name in ("q", "k", "v"))
    return Inputs(*(x.to(device=device, dtype=dtype).contiguous() for x in (q, k, v)))
