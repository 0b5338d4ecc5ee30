"""What lies between the layers and vLLM: the caches of a layer, their specs, the metadata of a step, the backend."""

BACKEND_NAME = "DEEPSEEK_V4FLASH"
"""The attention backend's name in vLLM. Here, so that registering it imports neither torch nor vLLM."""
