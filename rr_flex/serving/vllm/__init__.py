"""The plugin for vLLM, which finds it by the entry point `vllm.general_plugins`; imported only where RR_FLEX is set."""
