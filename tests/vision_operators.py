"""torchvision's processors beside a CPU build of torch; imported before transformers."""

import importlib.util
from pathlib import Path

import torch


def declare_operators() -> bool:
    """Whether torchvision is installed. Its wheels are built for CUDA: beside a CPU torch their operators don't load,
    and the import then stops at those that it names. The processors call none of them.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return False
    try:
        torch.ops.load_library(str(next(Path(spec.origin).parent.glob("_C.*"))))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return True


HAS_TORCHVISION = declare_operators()
