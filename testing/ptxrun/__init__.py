"""Runs PTX, as Triton and nvcc emit it, on CPU tensors: the compiled kernels without a GPU.

The code is what ptxas would get: layouts, warps, shared memory, inline PTX, fragments of matrix products, pipelines of
asynchronous copies. `triton_kernels.executed` and `cuda_kernels.executed` run whatever an op launches; each launch
yields its findings (accesses out of bounds, races, missing waits and barriers) and counters. README.md lists what is
checked and what is not supported.
"""
