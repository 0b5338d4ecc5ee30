"""The ops that CUDA C++ computes faster than Triton; their sources are in `csrc/`.

An installation compiles them where it finds nvcc (`setup.py`). Without, `library.built()` is false, the ops' Triton
twins run everywhere, and the log of every worker says so.
"""
