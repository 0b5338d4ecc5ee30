"""The attention, indexer, compressor, mHC and router kernels at DeepSeek-V4-Flash's shapes, compared with vLLM's.

    python -m benchmarks.attention [--only sparse_attention topk ...] [--budget SECONDS] [--out DIR] [--dry-run]

Every case is compared with the PyTorch reference on sampled tokens and then timed; `roofline.py` describes how. Bytes
and operations are those that no implementation can avoid: each row of a cache and each weight read once, however many
tokens use it; each input read and each output written once. What a kernel moves beyond that lowers its share.

The exit status is 1 if a result differs from its reference by more than its bound, or if a kernel does not run.
"""
