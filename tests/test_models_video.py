"""Qwen's vision-language models on small clips: the language model under rr_flex, the vision tower as it was."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf

from mask_mods import both, causal, frames
from rr_flex import select_blocks
from rr_flex.models import enable, register, report

SETTINGS = {"block_size": 64, "dense_last_rows": 0}
START, END, IMAGE, VIDEO = 60, 61, 62, 63
GRID = (8, 12, 12)  # patches: frame pairs, height, width; 2 × 2 patches a token
TOKENS = 8 * 6 * 6
TEXT = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
TEXT |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
IDS = {"vision_start_token_id": START, "vision_end_token_id": END, "image_token_id": IMAGE, "video_token_id": VIDEO}


def qwen2_vl():
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 128, "num_heads": 2}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=TEXT, vision_config=vision, **IDS))


def qwen2_5_vl():
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 128, "num_heads": 2}
    vision |= {"fullatt_block_indexes": [0]}
    return hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision, **IDS))


def qwen3_vl():
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 128, "num_heads": 2}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 144, "patch_size": 14}
    text = TEXT | {"head_dim": 32}
    return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=text, vision_config=vision, **IDS))


MODELS = {"qwen2-vl": qwen2_vl, "qwen2.5-vl": qwen2_5_vl, "qwen3-vl": qwen3_vl}


def clip():
    """uint8 [frames, 3, height, width]: a bright square that wanders over noise."""
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(60, (16, 3, 168, 168), generator=generator, dtype=torch.uint8)
    for step in range(16):
        video[step, :, 8 * step : 8 * step + 40, 6 * step : 6 * step + 40] = 220
    return video


def through_the_processor(name):
    pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    kind = hf.Qwen3VLVideoProcessor if name == "qwen3-vl" else hf.Qwen2VLVideoProcessor
    size = {"shortest_edge": 28 * 28, "longest_edge": 168 * 168 * 16}
    out = kind(size=size, patch_size=14, merge_size=2)([clip()], return_tensors="pt", do_sample_frames=False)
    return {name: out[name] for name in ("pixel_values_videos", "video_grid_thw")}


def by_hand(name):
    """The processors' layout: a row a patch of 2 frames × 14 × 14 pixels, 2 × 2 patches in a row of rows."""
    t, h, w = GRID
    pixels = (clip().float() / 255 - 0.5) / 0.25
    patches = pixels.view(t, 2, 3, h // 2, 2, 14, w // 2, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return {"pixel_values_videos": patches.reshape(t * h * w, -1), "video_grid_thw": torch.tensor([GRID])}


def prompt(name, video):
    """Video and question; Qwen3-VL sets each frame pair between its own start and end."""
    question = list(range(1, 30))
    if name == "qwen3-vl":
        ids = [token for _ in range(GRID[0]) for token in (5, START, *[VIDEO] * (TOKENS // GRID[0]), END)]
    else:
        ids = [START, *[VIDEO] * TOKENS, END]
    ids = torch.tensor([[2, *ids, *question]])
    kinds = torch.where(ids == VIDEO, 2, 0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, **video(name)}


@pytest.mark.parametrize("video", [by_hand, through_the_processor])
@pytest.mark.parametrize("name", MODELS)
def test_video_prefill(name, video):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    inputs = prompt(name, video)
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    dense = model.generate(**inputs, **options)
    with enable(model, tau=1.0, **SETTINGS) as on:
        whole = model.generate(**inputs, **options)
    assert torch.equal(dense.sequences, whole.sequences)
    torch.testing.assert_close(whole.logits[0], dense.logits[0], atol=1e-3, rtol=1e-3)
    assert on.report().sparse == 2 and set(on.report().dense) == {"decode"}

    with enable(model, tau=0.4, **SETTINGS) as on:
        assert model.config.text_config._attn_implementation == "rr_flex"
        assert model.config.vision_config._attn_implementation == "sdpa"
        sparse = model.generate(**inputs, **options)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert on.report().density < 1 and not torch.equal(sparse.logits[0], dense.logits[0])
    # The video is part of what is attended to.
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].flip(0)
    assert not torch.allclose(model.generate(**inputs, **options).logits[0], dense.logits[0], atol=1e-3)


def test_a_vision_tower_by_name_stays_dense_and_says_so():
    torch.manual_seed(0)
    model = qwen2_vl().eval()
    register()
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "rr_flex"})
    with torch.no_grad():
        model(**prompt("qwen2-vl", by_hand))
    assert set(report(model).dense) == {"not causal"} and not report(model).sparse


def test_frames_mask_on_a_video_layout():
    """Each frame pair's 36 tokens see their own frame and two before it; the selection chooses among those."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, TOKENS, 32, generator=generator) for heads in (4, 2))
    mask = both(causal(), frames(36, past=2))
    selection = select_blocks(q, k, mask_mod=mask, tau=0.5, **SETTINGS)
    row = torch.arange(TOKENS)
    seen = (row[:, None] // 36 - row // 36 <= 2) & (row <= row[:, None])
    blocks = torch.nn.functional.max_pool2d(seen[None].float(), 64, ceil_mode=True)[0].bool()
    assert torch.equal(selection.visible[0, 0], blocks)
    assert not (selection.kept & ~blocks).any() and 0 < selection.density < 1
