"""The modules of a DeepSeek-V4 layer: they hold weights and call ops; vLLM's metadata stays in `kv_cache/`."""
