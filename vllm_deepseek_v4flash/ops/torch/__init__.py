"""The ops that run in production through PyTorch: cuBLAS multiplies on a GPU, oneDNN on a CPU without Numba.

The references compute in fp32 and copy what they need; these are as fast as PyTorch allows.
"""
