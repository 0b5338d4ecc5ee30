"""What the compiled kernels do in a step of DeepSeek-V4-Flash, counted on a CPU, and how long a GPU takes at least."""
