"""Tiny random models of many families, the ways in which generate() calls them, and which cells of the two are run."""

import inspect
from typing import Any, NamedTuple

import torch
import transformers as hf

# Large weights make sharp attention: with the usual ones every block looks alike and any selection would pass.
SHAPE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024}
SHAPE |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
WINDOW = 96
LAYERS = ["sliding_attention", "full_attention"]
# Some releases of transformers run sdpa by default for gemma2, which leaves its soft cap out.
EAGER = {"attn_implementation": "eager"}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


class Family(NamedTuple):
    """A new family is one entry of FAMILIES."""

    config: type
    extra: dict[str, Any] = {}  # noqa: RUF012  (a NamedTuple's default, which nothing writes to)
    # What its layers ask of an attention function, and so of rr_flex. Biases, norms, experts and rotary embeddings come
    # before or after.
    asks: tuple[str, ...] = ("full attention",)


FAMILIES = {
    "llama": Family(hf.LlamaConfig),
    "qwen2": Family(hf.Qwen2Config),  # bias on q, k, v
    "qwen3": Family(hf.Qwen3Config),  # norms on q and k
    "qwen3-moe": Family(hf.Qwen3MoeConfig, MOE),
    "mistral": Family(hf.MistralConfig, {"sliding_window": WINDOW}, ("a window in every layer",)),
    "gemma2": Family(
        hf.Gemma2Config,
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 32} | EAGER,
        ("a window in some layers", "soft cap", "own scale"),
    ),
    "gemma3": Family(
        hf.Gemma3TextConfig,
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 32, "layer_types": LAYERS},
        ("a window in some layers", "own scale"),
    ),
    "gpt-oss": Family(
        hf.GptOssConfig,
        {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
        ("a window in some layers", "sinks"),
    ),
    "phi3": Family(hf.Phi3Config),  # q, k and v from one projection
    "glm4": Family(hf.Glm4Config),
    "olmo2": Family(hf.Olmo2Config),
    "granite": Family(hf.GraniteConfig, {"attention_multiplier": 32**-0.5}, ("own scale",)),
}


def make(name, **more):
    """`name`'s causal language model with random weights, the same every time."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(family.config(**(SHAPE | family.extra | more))).eval()


# Blocks of 64, so that 320 tokens have some to drop; without dense last rows, so that the last token's logits see it.
SETTINGS = {"block_size": 64, "dense_last_rows": 0, "min_length": 0}
IDS = torch.randint(1, 64, (3, 320), generator=torch.Generator().manual_seed(1))
STEPS = 3


@torch.no_grad()
def logits(model, ids=IDS[:1], **options):
    return model(ids, use_cache=False, **options).logits


def with_cache(model, cache):
    """The cache as an argument of forward() and generate(), whose name changed within transformers 5."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def generate(model, ids=None, **options):
    """(tokens [B, STEPS], logits of the first [B, V]) of greedy decoding."""
    ids = IDS[:1] if ids is None else ids
    options = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True} | options
    options |= {"return_dict_in_generate": True, "use_cache": True}
    with torch.no_grad():
        out = model.generate(ids, **options)
    return out.sequences[:, -STEPS:], out.logits[0].float()


def ragged(model, side):
    mask = torch.ones_like(IDS)
    for row, length in enumerate((320, 217, 301)):
        cut = slice(length, None) if side == "right" else slice(0, 320 - length)
        mask[row, cut] = 0
    if side == "left":
        return generate(model, IDS, attention_mask=mask)
    # generate() continues after the last column: with padding on the right, a forward's last real token it is.
    with torch.no_grad():
        logits = model(IDS, attention_mask=mask).logits
    last = logits[torch.arange(3), mask.sum(1) - 1].float()
    return last.argmax(-1, keepdim=True), last


def prefix(model):
    """A prompt whose first 192 tokens are in the cache already."""
    cache = with_cache(model, hf.DynamicCache(config=model.config))
    with torch.no_grad():
        model(IDS[:1, :192], **cache)
    return generate(model, **cache)


def packed(model):
    """Two documents in one row, told apart by their positions."""
    positions = torch.cat([torch.arange(130), torch.arange(190)])[None]
    with torch.no_grad():
        logits = model(IDS[:1], position_ids=positions, use_cache=False).logits[:, -1].float()
    return logits.argmax(-1, keepdim=True), logits


def assisted(model, **options):
    """The assistant adds one guess to the prompt, which so has the length of the others. One new token more, and a call
    of two would verify the next guess."""
    assistant = make("llama", num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 1
    return generate(model, IDS[:1, :-1], **{"assistant_model": assistant, "max_new_tokens": 2} | options)


WAYS = {
    "one prompt": generate,
    "left padding": lambda model: ragged(model, "left"),
    "right padding": lambda model: ragged(model, "right"),
    "static cache": lambda model: generate(model, cache_implementation="static", disable_compile=True),
    "chunked": lambda model: generate(model, prefill_chunk_size=192),
    "prefix in cache": prefix,
    "beams": lambda model: generate(model, num_beams=2),
    "assistant": assisted,
    "packed": packed,
}


def cells():
    """(family, way) pairs that meet each family, each way, and each way with each thing that a family's layers ask for.

    What rr_flex does depends on these two alone, so that the other pairs repeat what some cell has shown.
    """
    every = [(family, way) for family in FAMILIES for way in WAYS]
    return cover(every, lambda family, way: {family} | {(asked, way) for asked in FAMILIES[family].asks})


def cells_to_compile():
    """Those of `cells` that meet each family and each way: the others run in torch's eager mode, which means the same
    and takes a second a cell."""
    return cover(cells(), lambda family, way: {("family", family), ("way", way)})


def cover(candidates, met_by):
    """Some of `candidates` that meet all that these meet. Greedy: the one that meets most of what is left, and of equal
    ones that of the family met least."""
    left = set().union(*(met_by(*cell) for cell in candidates))
    chosen = []
    while left:
        gain = {cell: len(left & met_by(*cell)) for cell in candidates}
        best = max(candidates, key=lambda cell: (gain[cell], -sum(family == cell[0] for family, _ in chosen)))
        chosen.append(best)
        left -= met_by(*best)
    return chosen
