"""The KV cache: row formats, cache specs, a layer's caches, a step's metadata, the attention backend."""

BACKEND_NAME = "DEEPSEEK_V4FLASH"
"""The attention backend's name in vLLM. Here, so that registering it imports neither torch nor vLLM."""
