"""Captured chunks on a CPU, which has no graphs to replay."""

from rr_flex import CapturedPrefill


class RunAnew(CapturedPrefill):
    """Without CUDA graphs: the same chunks, launched each time."""

    _devices = ("cpu",)

    def _record(self, run):
        return run
