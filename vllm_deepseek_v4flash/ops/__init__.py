"""The arithmetic of DeepSeek-V4, one op a file.

`ops/<op>.py` is an op's contract: what it computes (shapes, dtypes, units, source), the checks of its arguments, and
the PyTorch reference, which runs on any device. `ops/<backend>/<op>.py` holds a faster implementation, and no more than
that; `dispatch.py` chooses. Ops know tensors only: no vLLM, no modules.
"""
