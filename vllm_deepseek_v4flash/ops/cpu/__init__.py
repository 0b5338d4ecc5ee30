"""CPU kernels of the ops, compiled by Numba: one file per op, with the function of the same name.

A wrapper allocates the result and passes addresses, strides and dtype codes, so that each kernel is one compiled
function for every dtype (`compiling.py`); rows are converted to fp32 where they are read (`memory.py`, `paged.py`).
Kernels treat tokens one by one: a token's result does not depend on which others share its step.
"""
