"""The ops as Triton kernels for GPUs of compute capability 8.0 and newer; `<op>.py` implements `ops/<op>.py`.

The kernels share six parts: `launch` (the one way to start a kernel, and what its wrapper may know about the device),
`codecs` (8- and 4-bit numbers), `rows` (a row of a paged cache), `packed_weights` (products with a stored weight),
`rope` and `hadamard`.

Kernels take structs. What a launch brings (pointers, strides) is in NamedTuples; Triton specialises their members as it
does arguments: None and 1 become constants, multiples of 16 are known to be such. `do_not_specialize` does not reach
into them, so integers that change from step to step are arguments of their own. What a kernel is compiled for is in
NamedTuples passed as `tl.constexpr`. A member of these is a plain Python value, which Triton before 3.8 passes on to
another `@triton.jit` function (`tl.zeros` is one) only under a name: `DIM: tl.constexpr = LAYOUT.dim`.

A comment after a load or store is the shape of what is loaded or stored; one above a step is the step in PyTorch.
"""
