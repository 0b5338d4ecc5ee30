"""The modules of a DeepSeek-V4 layer. They hold weights and call ops on tensors; vLLM's metadata stays in `attention/`."""
