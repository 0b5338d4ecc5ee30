"""Everything that vLLM calls: registration, option checks, workarounds, the quantization config."""
