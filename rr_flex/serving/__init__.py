"""rr_flex inside a server that keeps keys and values in pages: what of it is plain torch, and the plugin for vLLM."""
