"""The ops that CUDA C++ computes faster than Triton; their sources are in `csrc/`.

An installation compiles them where it finds nvcc (`setup.py`). Without nvcc, `library.built()` is false, Triton's
kernels run instead, and the log of every worker says so.
"""
