"""What runs in production through PyTorch: on a GPU the products that cuBLAS computes best, on a CPU the ops that have
no kernel.

References are written to be read and compute in fp32; these are as fast, and need as little memory, as PyTorch allows.
"""
