"""Queries, keys and values to measure on: structured ones from a seed, or those captured from a real model.

Never plain Gaussians: their attention has nothing to select.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

WIDTHS = (24, 768)  # tokens of a segment, log-uniform between
EDGE = 16  # tokens over which a segment's topic and wishes fade in and out
TOPICS = 32
TOPIC_SKEW = 0.7  # the n-th topic is n^-0.7 times as frequent as the first
SOUGHT = (1.0, 0.9, 0.7)  # strengths of the topics that a query seeks, in units of its head's gain
NOISE = (0.3, 1.2)  # per dimension, a key's own part beside its segment's: log-uniform over segments
SALIENCE = 0.08  # standard deviation over a segment's tokens of how strongly they carry its topic
LOCAL_PERIODS = (8.0, 4096.0)  # tokens of a period of the local features, geometric between
SINK_TOKENS = 1
CHUNK_TOKENS = 1 << 17  # tokens generated at once, so that a million need no more float32 than 128K


class Inputs(NamedTuple):
    q: Float[Tensor, "B Hq L D"]
    k: Float[Tensor, "B Hkv L D"]
    v: Float[Tensor, "B Hkv L D"]


class Text(NamedTuple):
    """What all heads of a sequence share."""

    segment: Int[Tensor, " L"]  # of each token
    strength: Float[Tensor, " L"]  # of the segment's topic and wishes in each token, in (0, 1]
    topic: Int[Tensor, " segments"]


class HeadTraits(NamedTuple):
    """What a query head looks for, in nats unless said otherwise."""

    gain: float  # logit of a key of the topic most sought
    local: float  # logit at distance 0 over far away
    sink: float  # share of the mass that falls on the sink, about


class Shape(NamedTuple):
    """Of q [B, Hq, L, D] and k, v [B, Hkv, L, D]."""

    L: int
    Hq: int
    Hkv: int
    D: int
    B: int = 1


class Randomness(NamedTuple):
    """Structure is drawn on the CPU, so that every device gets the same; noise where the tensors live."""

    structure: torch.Generator
    noise: torch.Generator


def structured(shape: Shape, *, dtype: torch.dtype, device: torch.device | str, seed: int) -> Inputs:
    """Attention with a sink, a local band and heavy-tailed content, different in every head; a seed fixes it.

    A text is cut into segments of random width, each about one of a few topics. A key carries its segment's topic with
    an amplitude of the segment's and noise of its own; a query seeks three topics that its segment and head decide.
    Positions give a band through rotary-like features, the first tokens a sink, and a random rotation of each key head
    hides which dimensions do what. Values are alike within a segment. Generated on `device`, some tokens at a time.
    """
    L, Hq, Hkv, D, B = shape
    if D % 16 or Hq % Hkv:
        raise ValueError(f"D must be a multiple of 16 and Hq of Hkv, got D={D}, Hq={Hq}, Hkv={Hkv}")
    q = torch.empty(B, Hq, L, D, dtype=dtype, device=device)
    k, v = (torch.empty(B, Hkv, L, D, dtype=dtype, device=device) for _ in range(2))
    drawn = Randomness(torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed))
    structure = drawn.structure
    group = Hq // Hkv
    for b in range(B):
        text = draw_text(L, structure, device)
        for key_head in range(Hkv):
            rotation = torch.linalg.qr(torch.randn(D, D, generator=structure)).Q.to(device)
            topics = torch.randn(TOPICS, dimensions(D)[0], generator=structure).to(device)
            fill_keys(k[b, key_head], v[b, key_head], text, topics, rotation, drawn)
            for head in range(key_head * group, (key_head + 1) * group):
                fill_queries(q[b, head], text, topics, rotation, drawn)
    return Inputs(q, k, v)


def draw_text(L: int, generator: torch.Generator, device: torch.device | str) -> Text:
    """Segments of log-uniform width and their topics, of which some are frequent."""
    low, high = (math.log(width) for width in WIDTHS)
    shares = torch.rand(L // WIDTHS[0] + 1, generator=generator)
    widths = torch.exp(low + (high - low) * shares).long()
    ends = widths.cumsum(0)
    position = torch.arange(L)
    segment = torch.searchsorted(ends, position, right=True)
    to_edge = torch.minimum(position - (ends - widths)[segment], ends[segment] - 1 - position)
    strength = ((to_edge + 1) / EDGE).clamp(max=1)
    frequency = torch.arange(1, TOPICS + 1, dtype=torch.float32) ** -TOPIC_SKEW
    topic = torch.multinomial(frequency, int(segment[-1]) + 1, replacement=True, generator=generator)
    return Text(segment.to(device), strength.to(device), topic.to(device))


def dimensions(D: int) -> tuple[int, int]:
    """Content and local dimensions; one is left for the sink."""
    return D - D // 4 - 1, D // 4


def local_features(position: Int[Tensor, " n"], width: int) -> Float[Tensor, "n width"]:
    """Unit-variance features whose dot product over `width` falls from 1 with the distance of two positions."""
    low, high = (math.log(period) for period in LOCAL_PERIODS)
    periods = torch.exp(torch.linspace(low, high, width // 2, device=position.device))
    angle = 2 * math.pi * position[:, None] / periods
    return math.sqrt(2) * torch.cat([angle.cos(), angle.sin()], dim=1)


def token_chunks(L: int, device: torch.device) -> list[Int[Tensor, " n"]]:
    return list(torch.arange(L, device=device).split(CHUNK_TOKENS))


def fill_keys(
    k: Float[Tensor, "L D"],
    v: Float[Tensor, "L D"],
    text: Text,
    topics: Float[Tensor, "topics content"],
    rotation: Float[Tensor, "D D"],
    drawn: Randomness,
) -> None:
    L, D = k.shape
    structure, noise = drawn
    segments = len(text.topic)
    amplitude = torch.exp(0.25 * torch.randn(segments, generator=structure)).clamp(max=1.5).to(k.device)
    low, high = (math.log(level) for level in NOISE)
    level = torch.exp(low + (high - low) * torch.rand(segments, generator=structure)).to(k.device)
    value = torch.randn(segments, D, generator=structure).to(k.device)
    for position in token_chunks(L, k.device):
        segment = text.segment[position]
        n = len(position)
        salience = amplitude[segment] * (1 + SALIENCE * torch.randn(n, generator=noise, device=k.device))
        content = topics[text.topic[segment]] * (salience * text.strength[position])[:, None]
        keys = torch.cat([content, local_features(position, dimensions(D)[1]), content.new_zeros(n, 1)], dim=1)
        keys += level[segment, None] * torch.randn(n, D, generator=noise, device=k.device)
        values = value[segment] + torch.randn(n, D, generator=noise, device=k.device)
        # A sink key speaks through the last dimension alone, and its value is small.
        is_sink = position < SINK_TOKENS
        keys[is_sink] = torch.eye(D, device=k.device)[-1] * math.sqrt(D)
        values[is_sink] *= 0.1
        k[position] = (keys @ rotation).to(k.dtype)
        v[position] = values.to(v.dtype)


def fill_queries(
    q: Float[Tensor, "L D"],
    text: Text,
    topics: Float[Tensor, "topics content"],
    rotation: Float[Tensor, "D D"],
    drawn: Randomness,
) -> None:
    L, D = q.shape
    structure, noise = drawn
    content, local = dimensions(D)
    traits = draw_traits(structure)
    # The head maps a segment's own topic to another; two more are the segment's choice.
    partner = torch.randperm(TOPICS, generator=structure).to(q.device)
    others = torch.randint(0, TOPICS, (2, len(text.topic)), generator=structure).to(q.device)
    sought = torch.stack([partner[text.topic], *others])  # 3 segments
    seek = sum(strength * topics[topic] for strength, topic in zip(SOUGHT, sought, strict=True))
    sink = log_mass_of_content(text, sought, traits.gain) + math.log(traits.sink / (1 - traits.sink))
    scale = math.sqrt(D)  # undoes the scale of the logits
    for position in token_chunks(L, q.device):
        features = [
            seek[text.segment[position]] * text.strength[position, None] * (traits.gain * scale / content),
            local_features(position, local) * (traits.local * scale / local),
            torch.full((len(position), 1), sink, device=q.device),
        ]
        own = torch.randn(len(position), D, generator=noise, device=q.device)
        q[position] = ((torch.cat(features, 1) + 0.3 * own) @ rotation).to(q.dtype)


def draw_traits(generator: torch.Generator) -> HeadTraits:
    def between(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    return HeadTraits(gain=between(6.5, 9.0), local=between(5.0, 11.0), sink=between(0.05, 0.5))


def log_mass_of_content(text: Text, sought: Int[Tensor, "3 segments"], gain: float) -> float:
    """About the log-sum-exp of the content logits of a query in the middle of the text, averaged over queries."""
    tokens = torch.bincount(text.topic[text.segment], minlength=TOPICS).float() / 2
    logits = torch.tensor(SOUGHT, device=tokens.device)[:, None] * gain
    mass = (tokens[sought] * logits.exp()).sum(0) + tokens.sum()
    return mass.log().mean().item()


def captured(path: str | Path, device: torch.device | str, dtype: torch.dtype) -> Inputs:
    """q, k and v of one layer of a real model: a dict in a .pt or .safetensors file, [B, H, L, D] or [H, L, D]."""
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
    elif path.suffix == ".pt":
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    else:
        raise ValueError(f"path must end in .pt or .safetensors, got {path}")
    if not {"q", "k", "v"} <= tensors.keys():
        raise ValueError(f"{path} must hold tensors q, k and v, got {sorted(tensors)}")
    q, k, v = (tensors[name] if tensors[name].ndim == 4 else tensors[name][None] for name in ("q", "k", "v"))
    return Inputs(*(x.to(device=device, dtype=dtype).contiguous() for x in (q, k, v)))
