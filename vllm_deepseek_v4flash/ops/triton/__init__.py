"""The ops as Triton kernels, for every GPU from SM80 on; each file is the twin of one in `ops/reference/`.

The kernels are built from four parts: `launch` (the one way to start a kernel, and what a kernel may know of its
device), `codecs` (8- and 4-bit numbers), `rows` (a row of a paged cache), `hadamard`.
"""
