"""Reading DeepSeek-V4 checkpoints: `names` (one table of tensor names and shapes) and `loader`."""
