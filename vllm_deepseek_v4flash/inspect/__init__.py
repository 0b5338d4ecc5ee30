"""What a checkpoint holds, whether it is supported, and what fits: `vllm-deepseek-v4flash inspect`."""
