"""Hugging Face models. Nothing here is imported by `import rr_flex`, and importing it registers nothing."""

from rr_flex.models.enable import Enabled, enable, register, report
from rr_flex.models.records import LayerRecord, Report

__all__ = ["Enabled", "LayerRecord", "Report", "enable", "register", "report"]
