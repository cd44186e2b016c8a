"""Captured chunks on a CPU, which has no graphs to replay."""

from rr_flex import CapturedPrefill
from rr_flex.runtime.recording import Recorder


class Anew(Recorder):
    """Launches the same kernels each time."""

    def record(self, run):
        return run


class RunAnew(CapturedPrefill):
    """Without CUDA graphs."""

    _devices = ("cpu",)
    _recorder = Anew
