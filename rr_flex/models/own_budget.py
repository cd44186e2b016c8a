"""`enable(model, budget="auto")`: what may stand beside it, and the profile that it comes to."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from rr_flex.checks import shown
from rr_flex.profiles import Profile

AUTO = "auto"
TARGET_DENSITY = 0.3


def own_budget(
    root: PreTrainedModel, given: dict[str, Any], calibrate_on: Any, cache: str | Path | None
) -> Profile | None:
    """The model's own thresholds where the settings `given` ask for budget="auto"; None where they do not.

    ValueError for settings beside it that the profile holds itself, and for what belongs to it alone.
    """
    if given.get("budget") != AUTO:
        for name, value in (("calibrate_on", calibrate_on), ("profile_cache", cache)):
            if value is not None:
                raise ValueError(f"{name} must be left out without budget='auto', got {shown(value)}")
        return None
    known = ("budget", "target_density", "target_kl")
    beside = sorted(name for name, value in given.items() if value is not None and name not in known)
    if beside:
        raise ValueError(f"{beside[0]} must be left out beside budget='auto', which finds all settings, got {beside}")
    # Here, since most who enable a model calibrate none.
    from rr_flex.calibration.auto import own_profile

    density, kl = (given.get(f"target_{name}") for name in ("density", "kl"))
    density = TARGET_DENSITY if density is None and kl is None else density
    return own_profile(root, density, target_kl=kl, calibrate_on=calibrate_on, cache=cache)
