"""Hugging Face models. Nothing here is imported by `import rr_flex`."""
