"""Video-MME (arXiv 2405.21075) from local files: rows of questions with four options, and the videos they ask about."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rr_flex.tasks.answers import Asked, rows_of

ASK = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
TASKS = ("short", "medium", "long")
LENGTHS = (0,)  # the video decides
SUFFIXES = (".mp4", ".mkv", ".webm", ".npy")
FRAMES = 64  # of a video
NEW_TOKENS = 16


def check(asked: Asked, processor) -> None:
    """ValueError or FileNotFoundError unless the questions and their videos are there."""
    questions(asked)


class VideoQuestion(NamedTuple):
    video: Path  # a video file, or .npy: uint8 [frames, height, width, 3], one frame a second
    prompt: str
    answer: str  # A, B, C or D


def questions(asked: Asked) -> list[VideoQuestion]:
    """The first `samples` of one duration: `videomme.jsonl` (fields videoID, question, options, answer, duration),
    one row a line as the data set has them, and `data/{videoID}.mp4`. FileNotFoundError for a video that is not there.
    """
    if asked.length:
        raise ValueError(f"--lengths must be 0 for video-mme, whose videos decide, got {asked.length}")
    path = asked.data / "videomme.jsonl"
    rows = [row for row in rows_of(path) if row["duration"] == asked.task]
    if not rows:
        raise ValueError(f"{path} must hold rows of duration {asked.task}, got none")
    found = []
    for row in rows[: asked.samples]:
        prompt = "\n".join([ASK, row["question"], *row["options"], "The best answer is:"])
        found.append(VideoQuestion(find_video(asked.data / "data", row["videoID"]), prompt, row["answer"]))
    return found


def find_video(folder: Path, name: str) -> Path:
    for suffix in SUFFIXES:
        if (path := folder / f"{name}{suffix}").exists():
            return path
    raise FileNotFoundError(f"{folder} must hold the video {name} ({', '.join(SUFFIXES)})")


def load_processor(name: str):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(name)


def load(name: str, *, device: str | torch.device, dtype: torch.dtype, tokenizer=None):
    """(vision-language model in eval mode, its processor, unless that is there already), by name or folder."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    return model.to(device).eval(), load_processor(name) if tokenizer is None else tokenizer


@torch.no_grad()
def scores(model, processor, asked: Asked, frames: int = FRAMES) -> tuple[list[float], int]:
    """(1 for each right answer, prompt tokens); prompts go through the processor's chat template always."""
    found, tokens = [], 0
    for question in questions(asked):
        inputs = prepare(processor, question, frames).to(model.device)
        size = inputs["input_ids"].shape[1]
        out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        text = processor.batch_decode(out[:, size:], skip_special_tokens=True)[0]
        tokens += size
        found.append(float(letter(text) == question.answer))
    return found, tokens


def prepare(processor, question: VideoQuestion, frames: int = FRAMES) -> Any:
    """The processor's inputs for one chat turn of video and question; it samples `frames` frames of a video."""
    if question.video.suffix == ".npy":
        clip = np.load(question.video)
        chosen = np.linspace(0, len(clip) - 1, min(frames, len(clip))).round().astype(int).tolist()
        # Some processors write each frame's time into the prompt, others into the positions.
        times = {"fps": 1.0, "total_num_frames": len(clip), "frames_indices": chosen}
        video = torch.from_numpy(clip[chosen]).permute(0, 3, 1, 2)
        sampling = {"do_sample_frames": False, "video_metadata": [times]}
    else:
        # Qwen3-VL's processor has an fps of its own, which it would not take beside num_frames.
        video, sampling = str(question.video), {"do_sample_frames": True, "num_frames": frames, "fps": None}
    turn = [{"type": "video"}, {"type": "text", "text": question.prompt}]
    message = {"role": "user", "content": turn}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    return processor(text=[text], videos=[video], return_tensors="pt", **sampling)


def letter(text: str) -> str:
    """The first A, B, C or D that stands alone, or that starts the answer; "" without one."""
    match = re.search(r"\b([ABCD])\b", text) or re.match(r"\s*([ABCD])", text)
    return match.group(1) if match else ""
