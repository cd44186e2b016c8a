"""Qwen's vision-language models on small clips: the language model under rr_flex, the vision tower as it was."""

import json

import numpy as np
import pytest
import torch
from vision_operators import HAS_TORCHVISION

pytest.importorskip("transformers")

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.video_utils import VideoMetadata

from mask_mods import both, causal, frames
from rr_flex import select_blocks
from rr_flex.models import enable, register, report
from rr_flex.tasks import video_mme
from rr_flex.tasks.answers import Asked

SETTINGS = {"block_size": 64, "dense_last_rows": 0, "min_length": 0}
START, END, IMAGE, VIDEO = 60, 61, 62, 63
GRID = (8, 12, 12)  # patches: frame pairs, height, width; 2 × 2 patches a token
TOKENS = 8 * 6 * 6
TEXT = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
TEXT |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
WORDS = ["[PAD]", "[UNK]", *video_mme.ASK.split(), *(f"w{i}" for i in range(20))]
WORDS = {word: token for token, word in enumerate(dict.fromkeys(WORDS))}
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


def question_in(folder, name):
    """Video-MME's files in `folder`, and what they ask, in so many words that all three prompts have 384 tokens.

    The clip, uint8 [16, 168, 168, 3]: a bright square that wanders over noise.
    """
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(60, (16, 168, 168, 3), generator=generator, dtype=torch.uint8).numpy()
    for step in range(16):
        video[step, 8 * step : 8 * step + 40, 6 * step : 6 * step + 40] = 220
    (folder / "data").mkdir()
    np.save(folder / "data" / "v1.npy", video)
    n_words = 64 if name == "qwen3-vl" else 94
    asked = " ".join(f"w{i % 20}" for i in range(n_words - len(video_mme.ASK.split()) - 4 - 4))
    row = {"videoID": "v1", "duration": "short", "question": asked, "options": [*"ABCD"], "answer": "B"}
    (folder / "videomme.jsonl").write_text(json.dumps(row))
    return video_mme.questions(Asked("short", 0, 1, data=folder))[0]


def by_hand(name, question):
    """The processors' output. Pixels: a row a patch of 2 frames × 14 × 14 pixels, 2 × 2 patches in a row of rows.

    Qwen3-VL sets each frame pair, after two words with its time, between its own start and end.
    """
    t, h, w = GRID
    video = torch.from_numpy(np.load(question.video)).permute(0, 3, 1, 2)
    pixels = (video.float() / 255 - 0.5) / 0.25
    patches = pixels.view(t, 2, 3, h // 2, 2, 14, w // 2, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    if name == "qwen3-vl":
        ids = [token for _ in range(t) for token in (1, 1, START, *[VIDEO] * (TOKENS // t), END)]
    else:
        ids = [START, *[VIDEO] * TOKENS, END]
    ids = torch.tensor([[*ids, *(WORDS.get(word, 1) for word in question.prompt.split())]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.where(ids == VIDEO, 2, 0),
        "pixel_values_videos": patches.reshape(t * h * w, -1),
        "video_grid_thw": torch.tensor([GRID]),
        # A clip in an array has one frame a second.
        **({"second_per_grid_ts": torch.tensor([2.0])} if name == "qwen2.5-vl" else {}),
    }


def processor_of(name):
    """The family's processor with a vocabulary of words; it resizes nothing and normalises by round numbers."""
    special = {"<|vision_start|>": START, "<|vision_end|>": END, "<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO}
    tokenizer = Tokenizer(models.WordLevel({**WORDS, **special}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "additional_special_tokens": [*special]}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    pixels = {"size": {"shortest_edge": 28 * 28, "longest_edge": 168 * 168 * 16}, "patch_size": 14, "merge_size": 2}
    pixels |= {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    is_3 = name == "qwen3-vl"
    kinds = {"qwen2-vl": hf.Qwen2VLProcessor, "qwen2.5-vl": hf.Qwen2_5_VLProcessor, "qwen3-vl": hf.Qwen3VLProcessor}
    videos = (hf.Qwen3VLVideoProcessor if is_3 else hf.Qwen2VLVideoProcessor)(cap_pixels_per_frame=False, **pixels)
    video = "<|video_pad|>" if is_3 else "<|vision_start|><|video_pad|><|vision_end|>"
    template = (
        "{% for part in messages[0]['content'] %}"
        "{% if part['type'] == 'video' %}" + video + "{% else %} {{ part['text'] }}{% endif %}{% endfor %}"
    )
    return kinds[name](hf.Qwen2VLImageProcessor(**pixels), tokenizer, videos, chat_template=template)


@pytest.mark.skipif(not HAS_TORCHVISION, reason="the processors need torchvision")
@pytest.mark.parametrize("name", MODELS)
def test_video_mme_through_the_real_processor(name, tmp_path, monkeypatch):
    """Model and processor are saved, loaded and asked as a checkpoint is."""
    question = question_in(tmp_path, name)
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(tmp_path / "model")
    processor_of(name).save_pretrained(tmp_path / "model")
    model, processor = video_mme.load(str(tmp_path / "model"), device="cpu", dtype=torch.float32)
    expected = by_hand(name, question)

    def decoded(paths, sample_indices_fn):
        """In a video file's decoder's place: its 32 frames, two a second, are the clip's, each twice."""
        times = VideoMetadata(total_num_frames=32, fps=2.0)
        times.frames_indices = sample_indices_fn(metadata=times)
        frames = torch.from_numpy(np.load(question.video)).permute(0, 3, 1, 2).repeat_interleave(2, 0)
        return [frames[times.frames_indices]], [times]

    monkeypatch.setattr(processor.video_processor, "fetch_videos", decoded)
    for asked in (question, question._replace(video=tmp_path / "v1.mp4")):
        inputs = video_mme.prepare(processor, asked, 16)
        assert set(inputs) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(inputs[key], value, atol=1e-5, rtol=1e-5, check_dtype=False)
    with enable(model, tau=0.4, **SETTINGS) as on:
        (score,), tokens = video_mme.scores(model, processor, Asked("short", 0, 1, data=tmp_path), frames=16)
    assert tokens == 384 and score in (0.0, 1.0)
    assert on.report().sparse == 2 and on.report().density < 1


@pytest.mark.parametrize("name", MODELS)
def test_video_prefill(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    inputs = by_hand(name, question_in(tmp_path, name))
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


def test_a_vision_tower_by_name_stays_dense_and_says_so(tmp_path):
    torch.manual_seed(0)
    model = qwen2_vl().eval()
    register()
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "rr_flex"})
    with torch.no_grad():
        model(**by_hand("qwen2-vl", question_in(tmp_path, "qwen2-vl")))
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
