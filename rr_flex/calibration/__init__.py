"""A budget spent where it counts: a threshold for every layer and head."""

from rr_flex.calibration.thresholds import calibrate

__all__ = ["calibrate"]
