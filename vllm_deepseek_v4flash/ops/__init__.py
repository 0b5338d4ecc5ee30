"""The arithmetic of DeepSeek-V4, one op a file.

`ops/<op>.py` documents shapes, validates and dispatches; `ops/reference/<op>.py` holds the plain PyTorch function of
the same name, which runs on any device and is the oracle of every faster twin. Ops know tensors only: no vLLM, no
modules.
"""
