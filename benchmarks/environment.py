"""What a figure depends on beside the code: card, versions, commit, date."""

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = {"triton": "triton", "flash_attn_4": "flash-attn-4"}


def describe(device: torch.device, commit: str | None = None) -> dict[str, str | None]:
    """Fields that every row carries. `commit` stands in where there is no git history."""
    about = {
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "commit": commit or commit_here(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    for field, package in PACKAGES.items():
        try:
            about[field] = metadata.version(package)
        except metadata.PackageNotFoundError:
            about[field] = None
    return about


def commit_here() -> str:
    """Short hash of the checked-out commit, with a + where tracked files differ from it; "unknown" without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
